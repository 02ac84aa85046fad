"""What becomes of layers in another block format than NVFP4 when a model is deployed, watched and shared out."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import native
from te_nvfp4_cv.export import artifact, checkpoints
from te_nvfp4_cv.export.codes import quantize_layer
from te_nvfp4_cv.export.manifest import Manifest
from te_nvfp4_cv.export.verify import inspection, verify
from te_nvfp4_cv.layer import operands
from te_nvfp4_cv.layer.check import CallShape, Sizes, planned
from te_nvfp4_cv.layer.plan import weight_plan
from te_nvfp4_cv.ops.block_scales import FORMATS
from te_nvfp4_cv.ops.geometry import ConvArgs
from te_nvfp4_cv.ops.records import Face, WeightCodes
from te_nvfp4_cv.recipe.fields import Role
from te_nvfp4_cv.telemetry import blocks, statistics
from tests.helpers import values


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 48, 3, padding=1, groups=1), nn.ReLU()]
    layers += [nn.ConvTranspose2d(48, 20, 2, stride=2), nn.Flatten(), nn.Linear(20 * 64, 24)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("name", FORMATS)
def test_post_training_quantization_computes_what_the_layers_do(name):
    """1x16 or 1x32 weights, dynamic scales, no correction: bit for bit the forward of the recipe."""
    net, x = network(), values((4, 3, 4, 4))
    recipe = nv.NVFP4BlockScaling(block_format=name, disable_2d_quantization=True)
    plain = {"fold_bn": False, "bias_correction": False, "shift": False, "reestimate_bn": False}
    made = nv.export.quantize(net, [x], recipe, method="nearest", **plain)
    with torch.no_grad(), nv.nvfp4_autocast(recipe):
        expected = net(x)
    found = [type(m).__name__ for m in made if isinstance(m, nv.export.InferenceLayer)]
    assert found == ["InferenceConv2d", "InferenceConvTranspose2d", "InferenceLinear"]
    for mode in ("packed", "cached"):
        for layer in made:
            if isinstance(layer, nv.export.InferenceLayer):
                layer.set_mode(weights=mode)
                assert layer.input_amax is None
        assert torch.equal(made(x), expected)
    layer = made[2]
    # With tiles in the place of rows, as training has them, a transposed layer's are spread.
    assert (layer.weight - net[2].weight).norm() < 0.2 * net[2].weight.norm()
    half = made.half()
    for kept in (layer.unpacked, *(m.unpacked for m in half if isinstance(m, nv.export.InferenceLayer))):
        assert kept is not None and kept.dtype in (torch.float32, torch.uint8)  # fp16 has not the range of values
    again = nv.export.quantize(net, [x], recipe, method="nearest", activations="high", **plain)
    with torch.no_grad():
        assert (again(x) - net(x)).norm() < 0.5 * net(x).norm()


def grouped_network() -> nn.Module:
    """Return a network whose taps end within a block of 32, with groups, and a kernel that torch's attention reads."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 96, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(96, 144, 1, groups=2), nn.ConvTranspose2d(144, 96, 2, stride=2, groups=2)]
    layers += [nn.Flatten(2), nn.Linear(64, 48)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("two_d", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_holds_what_the_layers_compute(name, two_d, tmp_path):
    """As for NVFP4: the bits of training's forward; the verifier knows the format; saved again it is the same file."""
    net, x = grouped_network(), values((2, 3, 4, 4))
    recipe = nv.NVFP4BlockScaling(block_format=name, disable_2d_quantization=not two_d)
    saved = nv.export.save(net, tmp_path / "net", recipe)
    assert saved.quantized == ("2", "4", "5", "7") and "4 layers in 4 bits" in str(saved)
    loaded = nv.export.load(saved.files[0], grouped_network())
    with torch.no_grad(), nv.nvfp4_autocast(recipe):
        assert torch.equal(loaded(x), net(x))
    assert torch.equal(nv.export.load(saved.files[0], grouped_network(), weights="cached")(x), loaded(x))
    made = nv.export.quantize(net, [x], recipe, method="nearest", bias_correction=False, shift=False)
    assert two_d or torch.equal(loaded(x), made(x))  # quantize gives each row scales of its own
    again = nv.export.save(loaded, tmp_path / "again")
    assert again.files[0].read_bytes()[-again.weight_bytes :] == saved.files[0].read_bytes()[-saved.weight_bytes :]
    for model, file in ((loaded, saved.files[0]), (made, nv.export.save(made, tmp_path / "made").files[0])):
        report = verify(file)
        assert report.sound, str(report)
        assert [row.precision for row in report.rows if row.claimed == name] == [name] * 4
        assert torch.equal(nv.export.load(file, grouped_network())(x), model(x))
    opened = artifact.read(saved.files[0])
    block = FORMATS[name].block
    assert opened.config["quant_algo"] == name.upper() and opened.config["group_size"] == block
    assert opened.tensors["2.weight_scale"].shape == (96, 9 * -(-40 // block))
    assert opened.tensors["2.weight_scale"].dtype == (torch.uint8 if "e4m3" not in name else torch.float8_e4m3fn)
    for layer in ("2", "4", "5", "7"):
        assert opened.tensors[f"{layer}.weight_scale_2"] == 1
    buffer = io.BytesIO()
    torch.save(loaded.state_dict(), buffer)
    buffer.seek(0)
    copy = nv.export.load(saved.files[0], grouped_network())
    for layer in copy.modules():
        if isinstance(layer, nv.export.InferenceLayer):
            layer.weight_data.zero_()
    copy.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(copy(x), loaded(x))


def test_a_model_trained_in_another_format_goes_through_its_file_and_trains_on():
    """What a user does: train, save, load, go on from a checkpoint of training."""
    recipe = nv.NVFP4BlockScaling(block_format="mxfp4")

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with nv.nvfp4_autocast(recipe):
            net(values((2, 3, 4, 4))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    results = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        net = grouped_network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        step(net, optimizer)
        kept = io.BytesIO()
        torch.save([net.state_dict(), optimizer.state_dict(), nv.extra_state(net)], kept)
        if interrupted:
            kept.seek(0)
            torch.manual_seed(7)
            net = grouped_network()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            states = torch.load(kept, weights_only=True)
            net.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
            nv.extra_state(net, states[2])
        step(net, optimizer)
        results.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_has_no_form_for_other_blocks_says_so(tmp_path):
    net, x = network(), values((2, 3, 4, 4))
    recipe = nv.NVFP4BlockScaling(block_format="mxfp4")
    for method in ("search", "gptq", "4over6"):
        with pytest.raises(ValueError, match=rf"method='{method}'(.|\n)*block_format='mxfp4'(.|\n)*method='nearest'"):
            nv.export.quantize(net, [x], recipe, method=method)
    made = nv.export.quantize(net, [x], recipe, method="nearest")
    for model in (made, nv.export.load(nv.export.save(net, tmp_path / "net", recipe).files[0], network())):
        with pytest.raises(ValueError, match=r"nv.export.to_onnx: the layer '2': no form(.|\n)*block_format='nvfp4'"):
            nv.export.to_onnx(model, x, tmp_path / "net.onnx", form="portable")
    with pytest.raises(ValueError, match=r"nvfp4_weight(.|\n)*layer.weight"):
        _ = made[2].nvfp4_weight
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    assert nv.fsdp.quantize_gathers(network(), recipe) == []  # gathered in high precision


def test_a_file_that_contradicts_itself_is_refused(tmp_path, monkeypatch):
    saved = nv.export.save(network(), tmp_path / "net", nv.NVFP4BlockScaling(block_format="mxfp4"))
    model, opened = network(), artifact.read(saved.files[0])
    scale = opened.tensors["2.weight_scale"]
    for wrong, text, found in (
        (scale.view(torch.float8_e4m3fn), "weight_scale is torch.float8_e4m3fn", "block scales are fp8, not uint8"),
        (scale[:, :-1], "weight_scale is torch.uint8", "share a block scale along the last axis, not 32"),
        (scale | 0xFF, "weight_scale holds NaN", "of its block scales are NaN"),
        (torch.cat((scale[:1] + 1, scale[1:])), "differs within a 32x32 tile", "wrong checksum"),
    ):
        bad = replace(opened, tensors={**opened.tensors, "2.weight_scale": wrong})
        for module in (artifact, inspection):
            monkeypatch.setattr(module, "read", lambda path, bad=bad: bad)
        with pytest.raises(ValueError, match=text):
            nv.export.load(saved.files[0], model, verify=False)
        assert found in str(verify(saved.files[0]))
    assert type(model[2]) is nn.Conv2d
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints, "parse_recipe", lambda *_: nv.NVFP4BlockScaling(block_format="nvfp4_ue5m3"))
    with pytest.raises(ValueError, match="its blocks are mxfp4's, not those of its recipe"):
        nv.export.load(saved.files[0], model)
    text = opened.manifest.to_json()
    inner = json.loads(json.loads(text)["manifest"])
    inner["layers"]["2"]["block_format"] = "nvfp5"
    changed = json.dumps(inner)
    outer = {"digest": hashlib.sha256(changed.encode()).hexdigest(), "manifest": changed}
    with pytest.raises(ValueError, match="nvfp5"):
        Manifest.from_json(json.dumps(outer), "net")


@pytest.mark.parametrize("name", FORMATS)
def test_tiles_of_a_transposed_layer_are_spread_to_its_rows(name):
    layer, recipe = nn.ConvTranspose2d(72, 40, 3, groups=2), nv.NVFP4BlockScaling(block_format=name)
    made = quantize_layer(layer, recipe)
    how = weight_plan(layer.weight.shape, 2, True, recipe, "auto")
    one = nv.NVFP4BlockScaling(block_format=name, disable_2d_quantization=True)
    spread = weight_plan(layer.weight.shape, 2, True, one, "auto")
    codes = WeightCodes.of_face(spread.weight_faces[0], Face(made.data, made.scale), made.amax)
    assert torch.equal(operands.real_weight(codes, spread), operands.dequantized_weight(layer.weight, how))


@pytest.mark.parametrize("name", FORMATS)
def test_telemetry_and_coverage_read_a_layer_right(name):
    net, x = nn.Sequential(nn.Conv2d(48, 40, 3, padding=1)), values((32, 48, 4, 4))
    recipe = nv.NVFP4BlockScaling(block_format=name, disable_rht=True, disable_stochastic_rounding=True)
    report = nv.coverage(net, x, recipe=recipe)
    where = "by compiled kernels" if native.load() else "in plain torch"
    assert report.rows[0].nvfp4 and report.rows[0].note == f"blocks of {name}, quantized {where}"
    w = net[0].weight
    call = CallShape.of("conv2d", x, Sizes.of(w), None, ConvArgs(1, 1))
    plan = planned(call, recipe, "vendor", torch.float32, False)
    rows = x.movedim(1, -1).contiguous()
    made = operands.quantize_input(rows, plan, need_dw=True)
    assert made is not None
    taken = blocks.of_operand(Role.INPUT, rows, made, None, plan, 10**9)
    assert torch.equal(taken["row"].values.view(rows.shape), made.row.data)
    assert taken["col"].values.shape == taken["col"].raw.shape
    weight = blocks.of_weight(w, operands.quantize_weight(w, plan, False), plan, 10**9)["fprop"]
    for found in (*taken.values(), weight):
        figures = statistics.operand(found)
        assert 12 < float(figures["sqnr_db"]) < 30
        assert float(figures["scales"]["max"]) == float(found.scale_values.max())
        assert int(figures["scales"]["histogram"].sum()) == len(found.scale)
        # Of a block of amax 7, mxfp4 clips; others map the largest value to 6, up to the rounding of a scale.
        assert 0 < float(figures["saturation"]) < 0.06
