"""What becomes of layers in another block format than NVFP4 when a model is deployed, watched and shared out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import native
from te_nvfp4_cv.export import checkpoints
from te_nvfp4_cv.export.codes import quantize_layer
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


def test_what_has_no_form_for_other_blocks_says_so(tmp_path):
    net, x = network(), values((2, 3, 4, 4))
    recipe = nv.NVFP4BlockScaling(block_format="mxfp4")
    for method in ("search", "gptq", "4over6"):
        with pytest.raises(ValueError, match=rf"method='{method}'(.|\n)*block_format='mxfp4'(.|\n)*method='nearest'"):
            nv.export.quantize(net, [x], recipe, method=method)
    made = nv.export.quantize(net, [x], recipe, method="nearest")
    for model in (net, made):
        with pytest.raises(ValueError, match=r"nv.export.save: the layer '2': no form for this block format"):
            nv.export.save(model, tmp_path / "net", recipe)
    with pytest.raises(ValueError, match=r"nv.export.to_onnx: the layer '2': no form"):
        nv.export.to_onnx(made, x, tmp_path / "net.onnx", form="portable")
    with pytest.raises(ValueError, match=r"nvfp4_weight(.|\n)*layer.weight"):
        _ = made[2].nvfp4_weight
    assert not list(tmp_path.iterdir())
    assert nv.fsdp.quantize_gathers(network(), recipe) == []  # gathered in high precision


def test_a_file_whose_recipe_has_other_blocks_is_not_loaded(tmp_path, monkeypatch):
    """nv.export.save writes none, but a file may come from elsewhere."""
    saved = nv.export.save(network(), tmp_path / "net")
    monkeypatch.setattr(checkpoints, "parse_recipe", lambda *_: nv.NVFP4BlockScaling(block_format="nvfp4_ue5m3"))
    model = network()
    with pytest.raises(ValueError, match=r"net.*no form for this block format(.|\n)*block_format='nvfp4_ue5m3'"):
        nv.export.load(saved.files[0], model)
    assert type(model[2]) is nn.Conv2d


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
