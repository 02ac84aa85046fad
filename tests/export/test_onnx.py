"""nv.export.to_onnx: the model's outputs again, by onnx.reference and onnxruntime; and what it refuses."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.export.codes import quantize_layer
from te_nvfp4_cv.export.modules import become
from te_nvfp4_cv.export.onnx import file
from te_nvfp4_cv.export.onnx.convert import to_onnx
from te_nvfp4_cv.export.verify import __main__ as verify
from tests import runtimes
from tests.helpers import same_bits, seeds, values
from tests.networks import Net

onnx = pytest.importorskip("onnx", reason="the extra [export]")
ort = pytest.importorskip("onnxruntime", reason="the extra [export]")
reference = pytest.importorskip("onnx.reference", reason="the extra [export]")

RECIPE = nv.NVFP4BlockScaling()
POW2 = replace(RECIPE, tensor_scale="current_pow2")
ROW = replace(RECIPE, row_scaled_activation=True, disable_rht=True)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "odd channels": (lambda: nn.Conv2d(20, 36, 3, padding=1), (2, 20, 7, 6)),
    "groups, stride, no bias": (lambda: nn.Conv2d(32, 64, 3, stride=2, groups=2, bias=False), (2, 32, 7, 7)),
    "same, dilated": (lambda: nn.Conv2d(16, 16, 2, padding="same", dilation=3), (1, 16, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(40, 20, 2, stride=2), (2, 40, 4, 3)),
    "transposed, groups": (
        lambda: nn.ConvTranspose2d(32, 48, 3, stride=2, groups=2, output_padding=1),
        (2, 32, 4, 4),
    ),
    "1-D, circular": (lambda: nn.Conv1d(16, 24, 3, padding=1, padding_mode="circular"), (3, 16, 8)),
    "3-D": (lambda: nn.Conv3d(16, 32, 2), (1, 16, 4, 3, 3)),
    "linear": (lambda: nn.Linear(50, 30), (3, 2, 50)),
    "1x1, stride": (lambda: nn.Conv2d(20, 32, 1, stride=2), (2, 20, 7, 7)),
    "1x1": (lambda: nn.Conv2d(16, 16, 1), (2, 16, 3, 3)),
}
PADDED = [{"padding_mode": mode, "padding": 1} for mode in ("reflect", "replicate", "circular")]


def run(path: Path, x: Tensor, form: str) -> np.ndarray:
    """By onnxruntime for "portable", else by onnx.reference."""
    if form == "portable":
        return ort.InferenceSession(str(path)).run(None, {"input": x.numpy()})[0]
    return reference.ReferenceEvaluator(str(path)).run(None, {"input": x.numpy()})[0]


def difference(a: np.ndarray, b: Tensor) -> float:
    expected = b.detach().numpy()
    assert a.shape == expected.shape and a.dtype == np.float32
    return float(np.linalg.norm(a - expected) / np.linalg.norm(expected))


# Every layer in the form that onnxruntime runs; in the others one of each kind of node.
IN_EACH_FORM = ("groups, stride, no bias", "transposed", "1-D, circular", "linear", "1x1")


@pytest.mark.parametrize(
    ("case", "form"),
    seeds(
        [(case, "portable") for case in LAYERS] + [(case, form) for case in IN_EACH_FORM for form in ("qdq", "matmul")],
        [(case, form) for case in LAYERS for form in ("qdq", "matmul")],
    ),
)
def test_each_layer(case: str, form: str, tmp_path: Path) -> None:
    if form != "portable" and case == "transposed, groups":
        pytest.skip("onnx.reference has no right ConvTranspose with groups; onnxruntime runs the portable form of it")
    torch.manual_seed(0)
    build, shape = LAYERS[case]
    layer, x = build(), values(shape, seed=3)
    others = (
        ("nvfp4", replace(RECIPE, disable_2d_quantization=True), True),
        ("nvfp4", ROW, False),
        ("high", replace(RECIPE, nvfp4_4over6="weights", nvfp4_4over6_e4m3_use_256="weights"), False),
        ("nvfp4", POW2, False),
        ("nvfp4", POW2, True),
    )
    number = list(LAYERS).index(case)
    more = others[number % 5 :][:1] if form == "portable" or number not in range(4, 9) else []  # each with each form
    for activations, recipe, static in (("nvfp4", RECIPE, False), *more):
        model = nn.Sequential(copy.deepcopy(layer), nn.ReLU())
        codes = quantize_layer(model[0], recipe)
        codes = replace(codes, input_amax=0.7 * x.abs().amax().reshape(1)) if static else codes
        become(model[0], codes, recipe).set_mode(activations=activations)
        made = to_onnx(model, x, tmp_path / "model", form)
        unquantized = form == "matmul" and bool(made.high)
        model[0].set_mode(activations="high" if unquantized else activations)
        assert difference(run(made.files[0], x, form), model(x)) < 1e-3
        report = verify.verify(made.files[0])
        assert report.sound, report
        (row,) = report.rows
        assert row.name == "0" and row.precision == ("fp32" if unquantized else "nvfp4")
        wanted = {"portable": "computed"}.get(form, "nvfp4") if activations == "nvfp4" and not unquantized else "high"
        assert row.activations == wanted or case == "1-D, circular"


@pytest.mark.parametrize(
    ("form", "padding"),
    [
        *(("portable", padding) for padding in (*PADDED, {"padding": 1}, {"padding": "same"})),
        *((form, padding) for form in ("qdq", "matmul") for padding in (PADDED[0], {"padding": 1})),
    ],
    ids=str,
)
def test_row_scales_of_a_padded_1x1_convolution(form: str, padding: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 1, **padding))
    become(model[0], quantize_layer(model[0], ROW), ROW)
    x = values((3, 32, 6, 6), seed=1) * (2 * values((3, 1, 6, 6), seed=2)).exp()
    made = to_onnx(model, x, tmp_path / "m.onnx", form)
    model[0].set_mode(activations="high" if made.high else "nvfp4")
    assert bool(made.high) == (form == "matmul" and padding == {"padding": 1})
    assert difference(run(made.files[0], x, form), model(x)) < 1e-5


def test_portable_codes_are_the_layers_own_next_to_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    amax = torch.tensor(3.1415927)
    s_dec = 1 / (torch.tensor(2688.0) / amax)
    # One block a row: 6 times its scale, and values at ties. Whether a quotient or a product rounds them decides.
    scale = torch.arange(448, 0, -1.0).to(torch.float8_e4m3fn).float().unique().flip(0)[:, None] * s_dec
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])[torch.randint(7, (len(scale), 15))]
    x = torch.cat([scale * 6, scale * ties * torch.randn(ties.shape).sign()], dim=1)
    x[0, 0] = amax
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    nn.init.eye_(model[0].weight)
    become(model[0], quantize_layer(model[0], RECIPE), RECIPE)
    found = run(to_onnx(model, x, tmp_path / "m.onnx", "portable").files[0], x, "portable")
    assert difference(found, model(x)) < 1e-6


def test_no_path_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    become(net.head, quantize_layer(net.head, RECIPE), RECIPE)
    made = to_onnx(net, values((2, 3, 8, 8), seed=1), tmp_path / "net")
    content = made.files[0].read_bytes()
    assert b"pkg.torch.onnx.fx_node" in content, "torch's other notes are still there"
    for place in (torch.__file__, __file__, nv.__file__):
        assert str(Path(place).parent).encode() not in content
    assert verify.verify(made.files[0]).sound


def test_stack_traces_are_removed_from_subgraphs_and_functions() -> None:
    inner, outer, called = (onnx.helper.make_node("Relu", ["x"], ["y"]) for _ in range(3))
    branch = onnx.helper.make_graph([inner], "branch", [], [])
    outer.attribute.append(onnx.helper.make_attribute("then_branch", branch))
    model = onnx.helper.make_model(onnx.helper.make_graph([outer], "model", [], []))
    model.functions.append(onnx.helper.make_function("own", "f", ["x"], ["y"], [called], []))
    nodes = [model.graph.node[0], model.graph.node[0].attribute[0].g.node[0], model.functions[0].node[0]]
    for node in nodes:
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File a.py")
        node.metadata_props.add(key="namespace", value="Net")
    file.remove_stack_traces(model)
    assert [[prop.key for prop in node.metadata_props] for node in nodes] == [["namespace"]] * 3


def test_zeros_before_a_pooling_stay_zeros(tmp_path: Path) -> None:
    """As in the stem of timm's BiT; onnxruntime would make them the pooling's own padding, which never wins."""
    conv = nn.Conv2d(16, 16, 1, bias=False)
    model = nn.Sequential(conv, nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2))
    become(conv, quantize_layer(conv, RECIPE), RECIPE)
    x = values((2, 16, 6, 6))
    expected = model(x)
    assert (expected[:, :, 0] == 0).any()  # where all numbers of a window are negative
    made = to_onnx(model, x, tmp_path / "m.onnx", "portable")
    assert difference(run(made.files[0], x, "portable"), expected) < 1e-5


@pytest.mark.parametrize("form", ["qdq", "matmul", "portable"])
def test_a_network_with_any_batch(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    nv.export.save(net, tmp_path / "net")
    loaded = nv.export.load(tmp_path / "net", Net(), activations="high")
    x = values((1, 3, 8, 8), seed=5)  # one image, and still any batch
    made = nv.export.to_onnx(loaded, x, tmp_path / "net.onnx", form=form)
    assert made.quantized == (("head",) if form == "matmul" else ("body.1", "body.4", "up", "head"))
    assert set(made.high) == ({"stem", "body.1", "body.4", "up"} if form == "matmul" else {"stem"})
    assert "  stem: high precision: the model holds it in high precision" in str(made)
    for batch in (1, 3):
        x = values((batch, 3, 8, 8), seed=batch)
        assert difference(run(made.files[0], x, form), loaded(x)) < 1e-5
    report = verify.verify(made.files[0])
    assert report.sound and [row.name for row in report.rows if row.precision == "nvfp4"] == list(made.quantized)
    assert {row.name: row.precision for row in report.rows}["stem"] == "fp32"


def test_a_context_around_it_does_not_act(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), values((4, 16))
    become(model[0], quantize_layer(model[0], RECIPE), RECIPE)
    with nv.nvfp4_autocast():
        made = to_onnx(model, x, tmp_path / "net.onnx", form="portable")
    assert list(made.high) == ["1"] and difference(run(made.files[0], x, "portable"), model(x)) < 1e-5


def test_a_fixed_batch_and_external_data(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3))
    become(model[0], quantize_layer(model[0], RECIPE), RECIPE)
    x = values((2, 64, 5, 5))
    inside = to_onnx(model, x, tmp_path / "a.onnx", dynamic_batch=False)
    made = to_onnx(model, x, tmp_path / "b.onnx", external_data=True)
    assert len(inside.files) == 1 and len(made.files) == 2
    assert made.files[0].stat().st_size < 12_000 and made.files[1].stat().st_size > 64 * 64 * 9 / 2
    assert difference(run(made.files[0], x, "qdq"), model(x)) < 1e-3
    assert verify.verify(made.files[0]).sound
    made.files[1].write_bytes(made.files[1].read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        verify.verify(made.files[0])
    made.files[1].unlink()
    with pytest.raises(ValueError, match="is damaged"):
        verify.verify(made.files[0])


def test_a_shared_layer_is_written_once(tmp_path: Path) -> None:
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    become(layer, quantize_layer(layer, RECIPE), RECIPE)
    x = values((4, 32))
    made = to_onnx(model, x, tmp_path / "m.onnx")
    assert difference(run(made.files[0], x, "qdq"), model(x)) < 1e-3
    proto = onnx.load(str(made.files[0]))
    names = [t.name for t in proto.graph.initializer]
    assert len(names) == len(set(names)) and names.count("0.weight") == 1


class Sizes(nn.Module):
    """Reads settings of its layers, as transformers' Whisper does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(16, 32, 3, stride=2, padding=1), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        assert y.shape[2] * self.conv.stride[0] == x.shape[2] and y.shape[1] == self.head.in_features
        return self.head(y.mean(2)) / self.conv.out_channels


def test_a_forward_that_reads_settings_of_its_layers(tmp_path: Path) -> None:
    model, x = Sizes(), values((4, 16, 8))
    for layer in (model.conv, model.head):
        become(layer, quantize_layer(layer, RECIPE), RECIPE)
    made = to_onnx(model, x, tmp_path / "m.onnx", "portable")
    assert difference(run(made.files[0], x, "portable"), model(x)) < 1e-3


@pytest.mark.parametrize("form", ["qdq", "matmul", "portable"])
def test_a_model_that_is_one_layer(form: str, tmp_path: Path) -> None:
    for layer, shape in ((nn.Conv2d(16, 16, 1), (2, 16, 3, 3)), (nn.Linear(32, 16), (4, 32))):
        become(layer, quantize_layer(layer, RECIPE), RECIPE)
        x = values(shape)
        made = to_onnx(layer, x, tmp_path / "m.onnx", form)
        assert difference(run(made.files[0], x, form), layer(x)) < 1e-3
        report = verify.verify(made.files[0])
        assert made.quantized == ("",) and report.sound, report
        assert [(row.name, row.precision) for row in report.rows] == [("", "nvfp4")]


class Hidden(nn.Module):
    """Returns what its head reads, too, as transformers' detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = inference_linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x.relu()
        return hidden, self.head(hidden)


def test_an_output_may_be_a_layers_input(tmp_path: Path) -> None:
    model, x = Hidden(), values((2, 16))
    made = to_onnx(model, x, tmp_path / "m.onnx", "portable", output_names=("hidden", "y"))
    found = ort.InferenceSession(str(made.files[0])).run(["y"], {"input": x.numpy()})
    assert difference(found[0], model(x)[1]) < 1e-5


class Auxiliary(nn.Module):
    """A head that training alone calls, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Any:
        return (self.body(x), self.aux(x)) if self.training else self.body(x)


def test_a_layer_that_is_not_called_is_not_claimed(tmp_path: Path) -> None:
    model = Auxiliary().eval()
    for layer in (model.body, model.aux):
        become(layer, quantize_layer(layer, RECIPE), RECIPE)
    made = to_onnx(model, values((2, 16, 3, 3)), tmp_path / "m.onnx")
    assert made.quantized == ("body",) and made.high == {"aux": "not in the file: eval mode does not call it"}
    assert verify.main([str(made.files[0])]) == 0


@pytest.mark.parametrize(("dtype", "external"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_half_precision_model_is_exported_in_fp32(dtype: torch.dtype, external: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).bfloat16()
    become(model[1], quantize_layer(model[1], RECIPE), RECIPE).set_mode(activations="high")
    x = values((2, 3, 8, 8))
    made = to_onnx(model, x.to(dtype), tmp_path / "m.onnx", external_data=external)
    assert difference(run(made.files[0], x, "qdq"), model.float()(x)) < 1e-5
    onnx.checker.check_model(str(made.files[0]), full_check=True)
    assert verify.main([str(made.files[0])]) == 0


def test_a_compiled_model_is_exported_as_what_it_wraps(tmp_path: Path) -> None:
    model = inference_linear(torch.compile(inference_linear(), backend="eager"))
    x = values((4, 16))
    expected = model(x)
    made = to_onnx(torch.compile(model, backend="eager"), x, tmp_path / "m.onnx")
    assert made.quantized == ("0", "1.0") and verify.main([str(made.files[0])]) == 0
    assert difference(run(made.files[0], x, "qdq"), expected) < 1e-3
    assert hasattr(model[1], "_orig_mod")  # the user's own is as it was


# ---- errors ---------------------------------------------------------------------------------------------------------


class Exotic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x)[0]


def inference_linear(*after: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), *after)
    become(model[0], quantize_layer(model[0], RECIPE), RECIPE)
    return model


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    model = inference_linear(nn.ReLU(), nn.Sequential(Exotic()))
    with pytest.raises(ValueError, match=r"_linalg_svd[\s\S]*in the module '2.0'"):
        to_onnx(model, values((4, 16)), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Large(nn.Module):
    """Does something else for large batches, as diffusers' Upsample2D does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous() if x.shape[0] >= 64 else x


def test_a_model_that_does_something_else_for_large_batches_gets_a_largest_one(tmp_path: Path) -> None:
    model, x = inference_linear(Large()), values((4, 16))
    with pytest.raises(ValueError, match=r"Constraints violated[\s\S]*fix:   dynamic_batch=63: the largest batch"):
        to_onnx(model, x, tmp_path / "m.onnx")
    made = to_onnx(model, x, tmp_path / "m.onnx", dynamic_batch=63)
    for batch in (1, 63):
        x = values((batch, 16))
        assert difference(run(made.files[0], x, "qdq"), model(x)) < 1e-3
    for bad in (0.5, 1, -3):
        with pytest.raises((TypeError, ValueError), match=r"bad dynamic_batch[\s\S]*at least 2"):
            to_onnx(model, x, tmp_path / "m.onnx", dynamic_batch=bad)  # type: ignore[arg-type]


class Sum(nn.Module):
    """Takes any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = inference_linear()

    def forward(self, *xs: Tensor) -> Tensor:
        return self.linear(torch.stack(xs).sum(0))


def test_a_forward_of_any_number_of_inputs_is_exported(tmp_path: Path) -> None:
    model, xs = Sum(), (values((2, 16)), values((2, 16), seed=1))
    made = to_onnx(model, xs, tmp_path / "m.onnx", form="portable", input_names=("a", "b"))
    y = ort.InferenceSession(str(made.files[0])).run(None, {"a": xs[0].numpy(), "b": xs[1].numpy()})[0]
    assert difference(y, model(*xs)) < 1e-5
    with pytest.raises(ValueError, match=r"equal size[\s\S]*run model\(\*example\)"):
        to_onnx(model, (xs[0], values((2, 15))), tmp_path / "m.onnx")


# Of linear layers "matmul" is what "qdq" is.
@pytest.mark.parametrize("form", ["qdq", "portable", pytest.param("matmul", marks=pytest.mark.stress)])
def test_attention_over_shifted_windows_is_exported(form: str, tmp_path: Path) -> None:
    """It reads the weights of its layers and pads, rolls and masks, as all of Swin-T does."""
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="the extra [train]")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), swin.ShiftedWindowAttention(32, [4, 4], [2, 2], 2)).eval()
    x = values((2, 6, 8, 16))
    model = nv.export.quantize(net, [x], method="nearest")
    for layer in model.modules():
        if isinstance(layer, nv.export.InferenceLayer):
            layer.set_mode(activations="high")
    made = to_onnx(model, x, tmp_path / "m.onnx", form=form)
    assert made.quantized == ("0", "1.qkv", "1.proj") and not made.high
    assert verify.main([str(made.files[0])]) == 0
    x = values((3, 6, 8, 16), seed=1)
    assert difference(run(made.files[0], x, form), model(x)) < 1e-5


class OneBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, -1)


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    x = values((4, 16))
    with pytest.raises(
        ValueError, match=r"cannot trace[\s\S]*data-dependent[\s\S]*in the module '1.0'[\s\S]*torch.where"
    ):
        to_onnx(inference_linear(nn.Sequential(Branch())), x, tmp_path / "m.onnx")
    one_batch = inference_linear(OneBatch())
    with pytest.raises(ValueError, match=r"Constraints violated[\s\S]*dynamic_batch=False"):
        to_onnx(one_batch, x, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"RuntimeError[\s\S]*in the module '0'"):
        to_onnx(inference_linear(), values((4, 8)), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="TypeError: too many positional arguments"):
        to_onnx(inference_linear(), (x, x), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    made = to_onnx(one_batch, x, tmp_path / "m.onnx", dynamic_batch=False)
    assert difference(run(made.files[0], x, "qdq"), one_batch(x)) < 1e-3


@pytest.mark.parametrize(
    "example",
    [[values((4, 16))], {"x": values((4, 16))}, None, (), ([values((4, 16))],)],
    ids=["list", "dict", "None", "empty", "list in a tuple"],
)
def test_an_example_that_is_no_tensor_is_refused(example: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"the example is no tensor[\s\S]*or a tuple of them"):
        to_onnx(inference_linear(), example, tmp_path / "m.onnx")


def test_an_example_without_a_batch_axis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no batch axis"):
        to_onnx(inference_linear(), torch.tensor(1.0), tmp_path / "m.onnx")


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


@pytest.mark.parametrize("external", [False, True])
def test_a_graph_that_is_no_valid_onnx_is_not_written(external: bool, tmp_path: Path) -> None:
    model = nn.Sequential(Half(), nn.Linear(64, 64, bias=False))
    become(model[1], quantize_layer(model[1], RECIPE), RECIPE)
    with pytest.raises(ValueError, match=r"no valid ONNX[\s\S]*casts to half precision"):
        to_onnx(model, values((4, 64)), tmp_path / "m.onnx", external_data=external)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    x = values((4, 16))
    with pytest.raises(ValueError, match="no layer in NVFP4"):
        to_onnx(nn.Linear(16, 16), x, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="unknown form"):
        to_onnx(inference_linear(), x, tmp_path / "m.onnx", form="tensorrt")
    with pytest.raises(TypeError, match="not a module"):
        to_onnx("m", x, tmp_path / "m.onnx")  # type: ignore[arg-type]
    recipe = replace(RECIPE, nvfp4_4over6="all", disable_rht=True)
    model = nn.Sequential(nn.Linear(16, 16))
    become(model[0], quantize_layer(model[0], recipe), recipe)
    with pytest.raises(ValueError, match="activations of '0' have no form in ONNX"):
        to_onnx(model, x, tmp_path / "m.onnx")
    conv = nn.Sequential(nn.Conv2d(16, 16, 1))
    become(conv[0], quantize_layer(conv[0], RECIPE), RECIPE)
    with pytest.raises(ValueError, match="the call of '0' cannot be exported"):
        to_onnx(conv, values((16, 3, 3)), tmp_path / "m.onnx", dynamic_batch=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="could not be written"):
        to_onnx(inference_linear(), x, tmp_path / "file" / "m.onnx")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = to_onnx(inference_linear(), values((4, 16)), tmp_path / "m.onnx").files[0]
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("te_nvfp4_cv.files._write_all", full)
    with pytest.raises(RuntimeError, match="could not be written"):
        to_onnx(inference_linear(), values((4, 16)), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def names_in(folder: Path) -> set[str]:
    return {found.name for found in folder.iterdir()}


def invalid(_: Any) -> None:
    raise ValueError("invalid")


def full_for(path: Path) -> Callable[..., None]:
    def write(target: Path, content: Any) -> None:
        if target == path:
            raise RuntimeError("No space left on device")
        target.write_bytes(content)

    return write


def test_external_data_of_the_old_file_live_as_long_as_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, path = values((2, 64)), tmp_path / "m.onnx"
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        layer = nn.Linear(64, 64)
        become(layer, quantize_layer(layer, RECIPE), RECIPE)
        models.append(nn.Sequential(layer))
    (tmp_path / "m.onnx.notes.data").write_text("another's")
    first = to_onnx(models[0], x, path, external_data=True)
    with monkeypatch.context() as patch:
        patch.setattr("te_nvfp4_cv.export.onnx.file._check", invalid)
        with pytest.raises(ValueError, match="invalid"):
            to_onnx(models[1], x, path, external_data=True)
    with monkeypatch.context() as patch:
        patch.setattr("te_nvfp4_cv.export.onnx.file.write_atomically", full_for(path))
        with pytest.raises(RuntimeError, match="No space"):
            to_onnx(models[1], x, path, external_data=True)
    assert names_in(tmp_path) == {"m.onnx", first.files[1].name, "m.onnx.notes.data"} and verify.verify(path).sound
    second = to_onnx(models[1], x, path, external_data=True)
    assert names_in(tmp_path) == {"m.onnx", second.files[1].name, "m.onnx.notes.data"} and verify.verify(path).sound
    assert first.files[1] != second.files[1]
    to_onnx(models[1], x, path)
    assert names_in(tmp_path) == {"m.onnx", "m.onnx.notes.data"} and verify.verify(path).sound


# ---- block scales in any runtime ------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_block_scales_are_rounded_alike_by_every_runtime(runtime: str, tmp_path: Path) -> None:
    """All ties between E4M3 values, their neighbours in fp32, and random values: as torch rounds them."""
    module = pytest.importorskip(runtime, reason="it runs the graph")
    from te_nvfp4_cv.export.onnx.nodes import Nodes, to_e4m3

    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 .. 448
    ties = (grid[1:] + grid[:-1]) / 2
    near = [torch.nextafter(ties, torch.tensor(end)) for end in (0.0, 1000.0)]
    x = torch.cat([grid, ties, *near, 448 * torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 6])
    made, helper = Nodes("s"), onnx.helper
    output = to_e4m3(made, "x")
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(x.shape)) for name in ("x", output)]
    graph = helper.make_graph(made.nodes, "g", ends[:1], ends[1:], list(made.initializers.values()))
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), str(path))
    if runtime == "openvino":
        y = next(iter(module.Core().compile_model(str(path), "CPU")([x.numpy()]).values()))
    else:
        y = module.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    assert same_bits(torch.as_tensor(y), x.to(torch.float8_e4m3fn).float())


# ---- the same layers in OpenVINO ------------------------------------------------------------------------------------

OPENVINO = "the extra [openvino], a second runtime to compare with"


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_openvino_gives_the_codes_and_outputs_of_onnxruntime(case: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason=OPENVINO)
    torch.manual_seed(0)
    build, shape = LAYERS[case]
    model = nn.Sequential(build())
    become(model[0], quantize_layer(model[0], RECIPE), RECIPE)
    x = runtimes.padded_input(model[0], values(shape, seed=3))
    found = runtimes.compared(case, model[0], x, tmp_path)
    assert found.codes and found.output <= runtimes.BOUND


@pytest.mark.parametrize("name", ["small", "mobilenet_v2"])
def test_openvino_gives_the_outputs_of_a_network(name: str, tmp_path: Path) -> None:
    """And differs by no more than on plain layers of the same values: 53 layers amplify the last bits of fp32 sums."""
    pytest.importorskip("openvino", reason=OPENVINO)
    found, peer = runtimes.network(name, runtimes.quantized(name)[0], tmp_path)
    assert found <= runtimes.BOUND and found <= max(runtimes.PEER * peer, runtimes.EXACT)


def test_the_comparison_of_runtimes_finds_other_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtimes, "openvino", lambda *args: [2 * y for y in runtimes.onnxruntime(*args)])
    model = inference_linear()
    found = runtimes.compared("linear", model[0], values((4, 16)), tmp_path)
    assert not found.codes and found.output == pytest.approx(1.0)
