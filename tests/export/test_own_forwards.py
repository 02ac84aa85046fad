"""What trains in NVFP4 is exported in NVFP4: modules with a forward of their own, attention, computed kernels.

Coverage, save, quantize and ONNX must name the same layers, and a loaded model must be the trained forward.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import te_nvfp4_cv as nv
from te_nvfp4_cv.context.bodies import note_parts
from te_nvfp4_cv.export.fit import shown
from te_nvfp4_cv.export.inner import around
from te_nvfp4_cv.export.verify import __main__ as verify
from tests.helpers import relative_error, same_bits, seeds, values

pytest.importorskip("safetensors")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils"),
    pytest.mark.filterwarnings("ignore:nvfp4. only"),
]


class Same(nn.Conv2d):
    """Pads on one side, as convolutions of TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class This(nn.Conv2d):
    """Calls its first argument something else than `self`."""

    def forward(this, x: Tensor) -> Tensor:  # noqa: N805
        return F.conv2d(x, this.weight, this.bias)


class Rescaled(nn.Linear):
    """Multiplies by its kernel's directions, and then by the norms that it has taken out."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.norm(dim=1)
        return F.linear(x, self.weight / size[:, None]) * size + self.bias


class Standardized(nn.Conv2d):
    """Weight standardization with a gain, as the NF networks have it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(values((self.out_channels, 1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        w, gain = self.weight.reshape(1, self.out_channels, -1), self.gain.view(-1)
        w = F.batch_norm(w, None, None, weight=gain, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Linear):
    """Equalized learning rate."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5, self.bias)


class Up(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding)


class Read(nn.Module):
    """Multiplies by the weight of a layer that it does not call, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class Attention(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **kwargs)
        self.more = kwargs.get("kdim", 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x[..., : self.more], x[..., : self.more])[0] if self.more != 32 else self.self(x)
        return y

    def self(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return y


def image() -> Tensor:
    return values((2, 16, 6, 6))


def tokens() -> Tensor:
    return values((2, 8, 32))


def thin() -> nn.Module:
    return nn.Sequential(Same(16, 32, 3), nn.ReLU(), Same(32, 4, 3), nn.Conv2d(4, 4, 1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "a subclass": (lambda: nn.Sequential(Same(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 1)), image),
    "a subclass as the model": (lambda: Same(16, 32, 3), image),
    "a subclass without a bias": (lambda: nn.Sequential(Same(16, 32, 3, bias=False, stride=2)), image),
    "a first argument of another name": (lambda: nn.Sequential(This(16, 32, 3)), image),
    "a transposed subclass": (lambda: nn.Sequential(Up(16, 32, 2, stride=2)), image),
    "weight standardization": (lambda: nn.Sequential(Standardized(16, 32, 3, padding=1, groups=1)), image),
    "equalized learning rate": (lambda: nn.Sequential(Scaled(32, 48)), tokens),
    "thin layers": (thin, image),
    "attention": (Attention, tokens),
    "attention with other widths": (lambda: Attention(kdim=16, vdim=16), tokens),
    "attention without a bias": (lambda: Attention(bias=False), tokens),
    "an encoder layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), tokens),
    "a weight that is read": (Read, tokens),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(16, 32, 3)), nn.ReLU()), image),
    "weight_norm, the old one": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(16, 32, 3))), image),
    "weight_norm of a transposed layer": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.ConvTranspose2d(16, 32, 2))), image
    ),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(32, 48))), tokens),
    "spectral_norm, the old one": (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(32, 48))), tokens),
    "prune": (lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(32, 48), "weight", 0.5)), tokens),
}
OLD = ("weight_norm, the old one", "prune", "spectral_norm, the old one")  # torch cannot copy them after a forward pass


def trained(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, data = MODELS[name]
    model, x = make(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        with nv.nvfp4_autocast():
            loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), x


def fresh(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name][0]()


def forward(model: nn.Module, x: Tensor, recipe: Any = None) -> Tensor:
    with torch.no_grad(), nv.nvfp4_autocast(recipe):
        y: Tensor = model(x)
    return y.clone()


def covered(model: nn.Module, x: Tensor) -> set[str]:
    kind = type(model).__name__
    return {"" if row.name == kind else row.name for row in nv.coverage(model, x).rows if row.nvfp4}


def packed(model: nn.Module) -> set[str]:
    inside = {name for name, _ in around(model)}
    layers = (name for name, module in model.named_modules() if isinstance(module, nv.export.InferenceLayer))
    return {shown(name, inside) for name in layers}


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_trained_forward(tmp_path: Path, name: str) -> None:
    model, x = trained(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    saved = nv.export.save(model, tmp_path / "a")
    assert all(same_bits(value, state[key]) for key, value in model.state_dict().items())
    expected = forward(model, x)
    assert set(saved.quantized) == covered(model, x) and not set(saved.quantized) & set(saved.high)
    for weights in ("packed", "cached"):
        loaded = nv.export.load(saved.files[0], fresh(name), weights=weights)
        assert same_bits(loaded(x), expected) and same_bits(forward(loaded, x), expected)
        assert packed(loaded) == set(saved.quantized)
    again = nv.export.save(loaded, tmp_path / "b")
    assert set(again.quantized) == set(saved.quantized)
    assert same_bits(nv.export.load(again.files[0], fresh(name))(x), expected)
    assert same_bits(copy.deepcopy(loaded)(x), expected)
    torch.save(loaded, tmp_path / "model.pt")
    assert same_bits(torch.load(tmp_path / "model.pt", weights_only=False)(x), expected)
    if name not in OLD:  # hooks of these need values
        with torch.device("meta"):
            empty = MODELS[name][0]()
        assert same_bits(nv.export.load(saved.files[0], empty)(x), expected)


# One of each kind of forward; the test above saves and loads all of them.
LISTED = ("a subclass", "weight standardization", "thin layers", "attention", "attention with other widths")
LISTED += ("an encoder layer", "a weight that is read", "weight_norm", "spectral_norm")


@pytest.mark.slow
@pytest.mark.parametrize("name", seeds(LISTED, [name for name in MODELS if name not in OLD]))
def test_the_lists_agree(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxruntime")
    import onnxruntime

    model, x = trained(name)
    plain = model(x).detach()
    quantized = nv.export.quantize(model, [x, x.flip(0)])
    assert packed(quantized) == covered(model, x)
    assert all(m.input_amax is not None for m in quantized.modules() if isinstance(m, nv.export.InferenceLayer))
    with torch.no_grad():
        expected = quantized(x)
    assert relative_error(expected, plain) < 0.3
    saved = nv.export.save(quantized, tmp_path / "a")
    with torch.no_grad():
        assert same_bits(nv.export.load(saved.files[0], fresh(name))(x), expected)
    # torch's decompositions fix the batch size where attention has other widths.
    dynamic = "other widths" not in name
    made = nv.export.to_onnx(quantized, x, tmp_path / "a.onnx", form="portable", dynamic_batch=dynamic)
    assert set(made.quantized) == set(saved.quantized) == covered(model, x)
    assert set(made.high) == set(saved.high)
    assert verify.main([str(made.files[0])]) == 0
    session = onnxruntime.InferenceSession(str(made.files[0]), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(found), expected) < 1e-4


@pytest.mark.parametrize(("name", "owner"), [("a subclass", "0"), ("attention", "attention.out_proj")])
def test_a_corrected_bias_is_that_of_the_layer_inside_too(name: str, owner: str) -> None:
    model, x = trained(name)  # the module adds its bias in torch, and ONNX files have that of the layer inside
    before = model.get_submodule(owner).bias.clone()
    quantized = nv.export.quantize(model, [x, x.flip(0)])
    found = quantized.get_submodule(owner)
    assert not torch.equal(found.bias, before)
    assert found._modules["packed_weight"].bias is found._parameters["bias"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("name", ["a subclass", "weight standardization", "attention", "a weight that is read"])
def test_a_loaded_model_compiles_in_one_graph(tmp_path: Path, name: str) -> None:
    model, x = trained(name)
    loaded = nv.export.load(nv.export.save(model, tmp_path / "a").files[0], fresh(name))
    torch._dynamo.reset()
    with torch.no_grad():
        assert same_bits(torch.compile(loaded, backend="aot_eager", fullgraph=True)(x), loaded(x))


def test_delayed_scales_of_kernels_inside(tmp_path: Path) -> None:
    recipe = nv.NVFP4BlockScaling(tensor_scale="delayed")
    for name in ("a subclass", "weight standardization", "attention", "weight_norm"):
        make, data = MODELS[name]
        torch.manual_seed(0)
        model, x = make(), data()
        with nv.nvfp4_autocast(recipe):
            model(x).square().mean().backward()
        model.eval()
        saved = nv.export.save(model, tmp_path / "a", recipe)
        loaded = nv.export.load(saved.files[0], fresh(name))
        layers = [m for m in loaded.modules() if isinstance(m, nv.export.InferenceLayer)]
        assert layers and all(layer.input_amax is not None for layer in layers)
        with torch.no_grad():
            assert same_bits(loaded(x), forward(model, x, recipe))


class Packed(nn.Module):
    """Its layers have names like those that this library gives."""

    def __init__(self) -> None:
        super().__init__()
        self.packed_weight = nn.Conv2d(16, 32, 3)
        self.packed_conv = Same(32, 32, 3)
        self.conv = nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.packed_conv(self.packed_weight(x)))
        return y


def test_the_verifier_finds_the_layers_of_an_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra [export]")
    torch.manual_seed(0)
    model, x = Packed().eval(), image()
    quantized = nv.export.quantize(model, [x])
    made = nv.export.to_onnx(quantized, x, tmp_path / "a", form="portable")
    saved = nv.export.save(model, tmp_path / "a")
    names = {"packed_weight", "packed_conv", "conv"}
    assert set(made.quantized) == set(saved.quantized) == covered(model, x) == names
    assert verify.main([str(made.files[0])]) == 0
    made = nv.export.to_onnx(quantized, x, tmp_path / "b", form="matmul")
    assert made.quantized == ("conv",) and set(made.high) == names - {"conv"}
    assert verify.main([str(made.files[0])]) == 0


class OfInput(nn.Conv2d):
    """Its kernel hangs on its input, so that no file can hold it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.weight.t())


@pytest.mark.parametrize(("make", "reason"), [(OfInput, "hangs on the input"), (Twice, "several kernels")])
def test_what_cannot_be_packed_is_listed_and_warned_of(tmp_path: Path, make: Any, reason: str) -> None:
    layer = make(32, 32, 1) if make is OfInput else make(32, 32)
    model = nn.Sequential(layer, nn.Conv2d(32, 32, 1) if make is OfInput else nn.Linear(32, 32))
    with pytest.warns(UserWarning, match=r"50% of the weights that train in NVFP4 stay .*: 0 \(") as told:
        saved = nv.export.save(model, tmp_path / "a")
    assert reason in saved.high["0"] and reason in str(told[0].message) and saved.quantized == ("1",)
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="50%") as told:
        nv.export.quantize(model, [values((2, 32, 4, 4) if make is OfInput else (2, 32))])
    assert told[0].filename == __file__


class Loose(nn.Module):
    """A convolution that is no layer of torch, as some networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(values((16, 16, 3, 3)))
        self.queries = nn.Parameter(values((32, 16)))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


def test_parameters_of_other_modules_are_listed(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3), Loose(), nn.Embedding(32, 16)), image()
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"50% of the weights that train in NVFP4 stay in high precision: 1\.kernel"):
        saved = nv.export.save(model, tmp_path / "a")
    assert set(saved.high) == {"1.kernel", "1.queries"} and saved.quantized == ("0",)
    assert covered(model, x) == {"0", "1.kernel"}


def test_high_precision_stays_and_is_no_loss(tmp_path: Path) -> None:
    model = nn.Sequential(Same(16, 16, 3), Attention())
    nv.set_precision(model, {"0": None, "1": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = nv.export.save(model, tmp_path / "a")
    assert saved.quantized == () and set(saved.high) == {"0", "1.attention.in_proj_weight", "1.attention.out_proj"}


def test_attention_over_another_sequence_says_what_it_loses(tmp_path: Path) -> None:
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    saved = nv.export.save(model, tmp_path / "a")
    loaded = nv.export.load(saved.files[0], nn.MultiheadAttention(32, 4, batch_first=True))
    x, memory = tokens(), tokens() * 2
    with pytest.warns(UserWarning, match="read in parts"), torch.no_grad():
        y = loaded(x, memory, memory)[0]
    assert relative_error(y, model(x, memory, memory)[0].detach()) < 0.3


class Crossed(nn.Module):
    """Attention whose query comes from elsewhere: `same` is whether keys are the values."""

    def __init__(self, same: bool, **kwargs: Any) -> None:
        super().__init__()
        self.attention, self.same = nn.MultiheadAttention(32, 4, batch_first=True, **kwargs), same

    def forward(self, x: Tensor) -> Tensor:
        memory = x.flip(1) * 2
        if self.same:
            return self.attention(x, memory, value=memory)[0]  # type: ignore[no-any-return]
        return self.attention(x, memory, memory + x)[0]  # type: ignore[no-any-return]


class Reads(nn.MultiheadAttention):
    """Attention with a forward of its own, which reads the fused weight itself."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.in_proj_weight[:32]) * F.linear(memory, self.in_proj_weight[32:64])


def test_attention_with_a_forward_of_its_own_keeps_its_weight() -> None:
    net, x = nn.Module(), tokens()
    net.attention = Reads(32, 4)
    net.forward = lambda x: net.attention(x, x * 2)  # type: ignore[method-assign,assignment]
    found = nv.export.quantize(net.eval(), [x])
    assert found.attention.in_proj_weight is not None and not hasattr(net.attention, "nvfp4_parts")


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x.flip(1) * 2)
        return y


CROSSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "keys are values": (lambda: Crossed(True), "attention"),
    "three inputs": (lambda: Crossed(False), "attention"),
    "no bias": (lambda: Crossed(True, bias=False), "attention"),
    "a decoder layer": (Decoder, "layer.multihead_attn"),
}


@pytest.mark.parametrize(
    ("name", "scale"), [*((name, "current") for name in CROSSED), ("keys are values", "delayed")]
)
def test_attention_over_another_sequence_is_the_trained_forward(tmp_path: Path, name: str, scale: str) -> None:
    make, place = CROSSED[name]
    torch.manual_seed(0)
    model, x, recipe = make(), tokens(), nv.NVFP4BlockScaling(tensor_scale=scale)
    for _ in range(2):
        with nv.nvfp4_autocast(recipe):
            model(x).square().mean().backward()
    state = {key: value.clone() for key, value in model.eval().state_dict().items()}
    expected = forward(model, x, recipe)
    saved = nv.export.save(model, tmp_path / "a", recipe)
    assert list(model.state_dict()) == list(state) and same_bits(forward(model, x, recipe), expected)
    assert f"{place}.in_proj_weight" in saved.quantized and set(saved.quantized) == covered(model, x)
    loaded = nv.export.load(saved.files[0], make())
    assert same_bits(loaded(x), expected)
    again = nv.export.save(loaded, tmp_path / "b", recipe)
    assert set(again.quantized) == set(saved.quantized)
    assert same_bits(nv.export.load(again.files[0], make())(x), expected)
    if scale == "delayed":
        return
    if name == "keys are values":
        with torch.no_grad():
            assert same_bits(torch.compile(loaded, backend="aot_eager", fullgraph=True)(x), expected)
    plain = make().eval()  # never called before: the images show how
    quantized = nv.export.quantize(plain, [x], recipe, method="nearest")
    assert relative_error(quantized(x), plain(x).detach()) < 0.3
    assert {f"{place}.packed_q_proj_weight"} <= {n for n, m in quantized.named_modules()}
    assert set(nv.export.save(quantized, tmp_path / "c", recipe).quantized) == set(saved.quantized)


def test_how_attention_is_called_is_noted_by_position_and_by_name() -> None:
    model, x, memory = nn.MultiheadAttention(32, 4), tokens(), tokens()
    cases = [
        ((x, memory, memory), {}, "kv"), ((x, memory), {"value": x}, "qkv"),
        ((), {"query": x, "key": memory, "value": memory}, "kv"), ((x, x, x), {}, ""),
    ]
    for args, kwargs, how in cases:
        note_parts(model, args, kwargs)
        assert model.nvfp4_parts == how


def test_a_file_that_does_not_fit_leaves_attention_as_it_was(tmp_path: Path) -> None:
    model, x = Crossed(True), tokens()
    forward(model, x)
    saved = nv.export.save(model, tmp_path / "a")
    other = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "more": nn.Linear(32, 32)})
    keys = list(other.state_dict())
    with pytest.raises(ValueError, match="not in the file: more"):
        nv.export.load(saved.files[0], other)
    assert list(other.state_dict()) == keys and other.attention(x, x, x)[0].shape == x.shape  # type: ignore[operator]


def test_a_kernel_as_the_user_reads_it(tmp_path: Path) -> None:
    model = Same(16, 32, 3).eval()
    loaded = nv.export.load(nv.export.save(model, tmp_path / "a").files[0], Same(16, 32, 3))
    assert relative_error(loaded.weight + 0, model.weight.detach()) < 0.2 and type(loaded.weight + 0) is Tensor
    assert loaded.get_submodule("packed_weight") is dict(loaded.named_modules())["packed_weight"]


def test_a_plain_model_does_not_fit_a_file_of_subclasses(tmp_path: Path) -> None:
    saved = nv.export.save(nn.Sequential(Same(16, 32, 3)), tmp_path / "a")
    plain = nn.Sequential(nn.Conv2d(16, 32, 3))
    with pytest.raises(ValueError, match="a forward of its own"):
        nv.export.load(saved.files[0], plain)
    assert type(plain[0]) is nn.Conv2d and isinstance(plain[0].weight, nn.Parameter)


def test_a_forward_that_reads_its_parameter_for_more_than_its_kernel_stays_in_high_precision(tmp_path: Path) -> None:
    net, x = nn.Sequential(Rescaled(32, 16)).eval(), values((8, 32))
    with torch.no_grad():
        net[0].weight.mul_(3.0)
    with pytest.warns(UserWarning, match="reads a Parameter for more than the kernel"):
        saved = nv.export.save(net, tmp_path / "net")
    assert not saved.quantized and list(saved.high) == ["0"]
    assert same_bits(nv.export.load(saved.files[0], nn.Sequential(Rescaled(32, 16)))(x), net(x))
    assert not net[0].weight.isnan().any() and net[0].weight.requires_grad


class Doubled(nn.Module):
    def forward(self, bias: Tensor) -> Tensor:
        return 2 * bias


def test_a_parametrized_bias_stays_with_its_layer(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        nn.utils.parametrize.register_parametrization(net[0], "bias", Doubled())
        return net.eval()

    net, x = build(), values((8, 32))
    saved = nv.export.save(net, tmp_path / "net")
    assert saved.high == {"0": "its bias is computed"} and saved.quantized == ("1",)
    loaded = nv.export.load(saved.files[0], build())
    assert same_bits(loaded[0](x), net[0](x))
    quantized = nv.export.quantize(net, [x])
    assert relative_error(quantized(x), net(x)) < 0.2


def test_a_pruned_bias_is_not_said_to_be_corrected() -> None:
    net, x = nn.Sequential(nn.Linear(32, 32)).eval(), values((64, 32)) + 0.2
    prune.random_unstructured(net[0], "bias", 0.5)
    reports: list[Any] = [nv.export.quantize(net, [x], bias_correction=wanted).nvfp4_drift for wanted in (False, True)]
    assert reports[0].layers[0].sqnr_db == reports[1].layers[0].sqnr_db
