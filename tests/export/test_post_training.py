"""nv.export.quantize: folding is exact, calibration sees what the layer multiplies, better rounding has less error."""

import copy
import functools
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.export import matrix
from te_nvfp4_cv.export.modules import InferenceLayer
from te_nvfp4_cv.export.ptq import rounding
from te_nvfp4_cv.export.ptq.calibration import collect, im2col_rows
from te_nvfp4_cv.export.ptq.norm_folding import FoldedNorm, fold
from te_nvfp4_cv.layer.plan import weight_plan
from tests.helpers import relative_error, same_bits, values

RECIPE = nv.NVFP4BlockScaling(precision={"stem": None, "head": None})


class Small(nn.Module):
    """A stem, a residual block with batch norms, a transposed convolution with one, a group norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 16, 3, padding=1, groups=1), nn.BatchNorm2d(16)
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.late = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = self.up(x + y)
        return self.head(self.late(x).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Small:
    torch.manual_seed(0)
    small = Small()
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.dim() > 1:
                parameter *= 2.0
        for norm in (m for m in small.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.2, 0.2)
        nv.sensitivity.update_bn(small, [images(seed) for seed in range(4)])
    return small.eval()


def images(seed: int, count: int = 8) -> Tensor:
    return values((count, 3, 12, 12), seed=seed) + 0.5


BATCHES = [images(seed) for seed in range(10, 14)]


def error(model: nn.Module, original: nn.Module) -> float:
    x = images(99, 32)
    with torch.no_grad():
        expected = original(x)
        return float((model(x) - expected).norm() / expected.norm())


def run_fold(model: nn.Module, x: Tensor) -> dict[str, str]:
    with torch.no_grad():
        return {pair.norm_name: pair.layer_name for pair in fold(model, functools.partial(model, x))}


# ---- folding --------------------------------------------------------------------------------------------------------


def test_folding_keeps_the_function(net: Small) -> None:
    folded = copy.deepcopy(net)
    assert run_fold(folded, images(1)) == {"bn1": "conv1", "bn2": "conv2", "up.1": "up.0"}
    assert isinstance(folded.bn1, FoldedNorm) and type(folded.late) is nn.BatchNorm2d and folded.conv1.bias is not None
    assert error(folded, net) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "1d", "3d"])
def test_every_kind_of_layer_folds(kind: str) -> None:
    torch.manual_seed(0)
    model, shape = {
        "linear": (nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)), (8, 16)),
        "1d": (nn.Sequential(nn.ConvTranspose1d(16, 32, 3), nn.BatchNorm1d(32)), (2, 16, 8)),
        "3d": (nn.Sequential(nn.Conv3d(16, 16, 2, groups=4), nn.BatchNorm3d(16)), (2, 16, 4, 4, 4)),
    }[kind]
    model(values(shape))
    model.eval()
    expected = model(values(shape, seed=1))
    assert run_fold(model, values(shape)) == {"1": "0"}
    torch.testing.assert_close(model(values(shape, seed=1)), expected, rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """Norms that must stay: of a shared layer, of a result that is read twice, with a hook, without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(16, 16, 1)
        self.a, self.b = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.twice, self.c = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.hooked, self.d = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.plain, self.e = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16, track_running_stats=False)
        self.groups, self.f = nn.ConvTranspose2d(16, 16, 1, groups=2), nn.BatchNorm2d(16)
        self.hooked.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.shared(x)) + self.b(self.shared(x))
        y = self.twice(x)
        x = y + self.c(y)
        return self.f(self.groups(self.e(self.plain(self.d(self.hooked(x))))))


def test_what_cannot_be_folded_stays() -> None:
    assert run_fold(Odd().eval(), values((2, 16, 4, 4))) == {}


class Called(nn.Module):
    """A pair in a Sequential, used in ways that the Sequential's own graph does not show; another pair that is not."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.other = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        taps = []
        if self.use == "taps":
            for layer in self.block:
                x = layer(x)
                taps.append(x)
        elif self.use == "first":
            x = self.block(x) + self.block[0](x)
        elif self.use == "weight":
            x = F.conv_transpose2d(self.block(x), self.block[0].weight, padding=1)
        elif self.use == "statistics":
            x = self.block(x) + self.block[1].running_mean.view(-1, 1, 1)
        else:
            x = self.block[0](x)
        return self.other(x), taps


@pytest.mark.parametrize("use", ["taps", "first", "weight", "statistics", "without the norm"])
def test_a_pair_that_is_used_otherwise_is_not_folded(use: str) -> None:
    torch.manual_seed(0)
    model = Called(use)
    for module in (model.block, model.other):
        for seed in range(4):
            module(2 * values((4, 16, 6, 6), seed=seed) + 1)
    model.eval()
    x = values((4, 16, 6, 6), seed=7)
    expected = model(x)[0].detach()
    assert run_fold(model, values((4, 16, 6, 6))) == {"other.1": "other.0"}
    assert float((model(x)[0].detach() - expected).norm() / expected.norm()) < 1e-5


class Returns(nn.Module):
    """A pair that is used twice, so that folding it is wrong, and outputs that are hard to compare."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.other = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        self.register_buffer("kept", torch.zeros(2, 16, 6, 6))

    def forward(self, x: Tensor) -> Any:
        y = self.other(self.block(x) + self.block[0](x))
        if self.how == "empty":
            return y[y > 1e9]
        if self.how == "its own buffer":
            self.kept.copy_(y)
            return self.kept
        if self.how == "complex":
            return torch.complex(y, -y)
        return y.masked_fill(x > 0, -torch.inf).masked_fill(x > 1, torch.nan)


@pytest.mark.parametrize("how", ["empty", "its own buffer", "complex", "not finite"])
def test_outputs_that_are_hard_to_compare(how: str) -> None:
    torch.manual_seed(0)
    model, x = Returns(how), values((2, 16, 6, 6))
    for seed in range(4):
        model(2 * values((2, 16, 6, 6), seed=seed) + 1)
    assert run_fold(model.eval(), x) == ({} if how == "empty" else {"other.1": "other.0"})


def test_a_model_that_is_random_in_eval_mode_is_not_folded() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x + torch.randn_like(x)))

    assert run_fold(Noisy().eval(), values((2, 16, 4, 4))) == {}


# ---- batch norms that are left ----


class Left(nn.Module):
    """A norm that nothing can be folded into, behind dropout, another one that no image reaches, one of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm, self.conv = nn.Dropout(0.5), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.pooled, self.unused = nn.BatchNorm1d(16), nn.BatchNorm2d(16)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            raise RuntimeError("targets should not be none when in training mode")
        x = F.relu(self.conv(self.norm(self.drop(x))))
        return self.pooled(x.mean((2, 3)))


class Rectified(Left):
    """The norm reads what a convolution has made, so quantization moves its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.norm(F.relu(self.conv(self.drop(x)))).mean((2, 3)))


def test_statistics_of_norms_move_by_what_quantization_moves_them() -> None:
    """And by nothing else: those of training stay, whatever the calibration images are."""
    torch.manual_seed(0)
    model = Rectified().eval()
    for norm in (model.norm, model.unused):
        norm.running_mean.uniform_()
        norm.running_var.uniform_(0.5, 2)
    batches = [2 * values((2, 16, 8, 8), seed=seed) + 1 for seed in range(6)]
    quantized = nv.export.quantize(model, batches, bias_correction=False)
    with torch.no_grad():
        x, x_q = (F.relu(torch.cat([net.conv(x) for x in batches])) for net in (model, quantized))
    mean, mean_q, var, var_q = (f(t, (0, 2, 3)) for f in (torch.mean, torch.var) for t in (x, x_q))
    torch.testing.assert_close(quantized.norm.running_mean - model.norm.running_mean, mean_q - mean)
    ratio = (quantized.norm.running_var + model.norm.eps) / (model.norm.running_var + model.norm.eps)
    torch.testing.assert_close(ratio, var_q / var, rtol=1e-3, atol=0.0)
    assert not same_bits(quantized.pooled.running_mean, model.pooled.running_mean)  # one value per channel and image
    assert same_bits(quantized.unused.running_mean, model.unused.running_mean)  # no image reached it
    assert not any(module.training for module in quantized.modules()) and float(quantized.passes) == 0
    kept = nv.export.quantize(model, batches, reestimate_bn=False)
    assert same_bits(kept.norm.running_mean, model.norm.running_mean)
    nv.set_precision(model, {"conv": None})
    high = nv.export.quantize(model, batches)
    assert all(same_bits(a, b) for a, b in zip(high.buffers(), model.buffers(), strict=True))


def test_folded_norms_are_pickled_by_their_old_name() -> None:
    batches = [values((1, 16, 8, 8))]
    folded = nv.export.quantize(nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)), batches)
    assert FoldedNorm.__module__ == "te_nvfp4_cv.export.folding", "models that version 0.1 pickled name it so"
    assert isinstance(folded[1], FoldedNorm) and not any(module.training for module in folded.modules())


# ---- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(20, 32, 3, stride=2, padding=1, dilation=2), (3, 20, 9, 8)),
        (nn.Conv2d(32, 32, 2, groups=2), (2, 32, 5, 5)),
        (nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), (2, 16, 5, 5)),
        (nn.ConvTranspose2d(24, 16, 3, stride=2, padding=1, output_padding=1), (2, 24, 4, 4)),
        (nn.ConvTranspose1d(32, 48, 2, groups=2), (2, 32, 5)),
        (nn.Linear(20, 16), (4, 3, 20)),
        (nn.Conv3d(16, 16, 2, padding="same"), (1, 16, 3, 4, 4)),
    ],
    ids=str,
)
def test_rows_times_matrix_is_the_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """All im2col rows, multiplied with the weight's matrix: the outputs, in another order."""
    x, groups = values(shape), getattr(layer, "groups", 1)
    rows = im2col_rows(layer, x, torch.Generator().manual_seed(0), most=10**9)
    plan = weight_plan(layer.weight.shape, groups, bool(getattr(layer, "transposed", False)), RECIPE, "reference")
    w = matrix.of_weight(layer.weight.detach(), plan).unflatten(0, (groups, -1))
    y = torch.einsum("rgk,gnk->rgn", rows, w).flatten(1) + layer.bias.detach()
    expected = layer(x).detach()
    expected = (
        expected.flatten(0, -2) if isinstance(layer, nn.Linear) else expected.flatten(2).transpose(1, 2).flatten(0, 1)
    )
    assert y.shape == expected.shape
    order, by = y[:, 0].argsort(), expected[:, 0].argsort()
    torch.testing.assert_close(y[order], expected[by], rtol=1e-4, atol=1e-5)


def test_statistics_of_all_batches(net: Small) -> None:
    found = collect(net, {"conv1": net.conv1}, BATCHES, gram=True)["conv1"]
    seen: list[Tensor] = []
    hook = net.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in BATCHES:
            net(batch)
    hook.remove()
    assert same_bits(found.amax, torch.cat(seen).abs().amax().reshape(1))
    columns = F.unfold(torch.cat(seen), 3, padding=1).unflatten(1, (16, 9)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    assert found.rows == columns.shape[0] == 4 * 8 * 144
    torch.testing.assert_close(found.mean[0], columns.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.square[0], columns.square().mean(0), rtol=1e-4, atol=1e-5)
    assert found.gram is not None
    torch.testing.assert_close(found.gram[0], columns.t() @ columns / found.rows, rtol=1e-4, atol=1e-5)
    assert not net.conv1._forward_pre_hooks and not net.training


# ---- rounding -------------------------------------------------------------------------------------------------------


def test_less_error_by_search_and_gptq() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(32, 256), torch.randn(2000, 256) @ torch.randn(256, 256) / 16 * torch.rand(256)
    gram, amax = x.t() @ x / 2000, w.abs().amax().reshape(1)
    importance = gram.diagonal()
    nearest = rounding.nearest_scales(w, amax, 448)
    unit = rounding.value_of(nearest, amax, 448).repeat_interleave(16, 1)
    plain = formats_dequantized(rounding.round_codes(w, unit), nearest, amax)

    def of(data: Tensor, scale: Tensor) -> Tensor:
        return formats_dequantized(nv.formats.unpack_nibbles(data), scale, amax)

    searched = of(*rounding.quantize_matrix(w, amax, None, importance))
    gptq = of(*rounding.quantize_matrix(w, amax, gram, importance))

    def weighted(q: Tensor) -> float:
        return float(((w - q).square() * importance).sum())

    def output(q: Tensor) -> float:
        return float(((w - q) @ gram * (w - q)).sum())

    assert weighted(searched) < 0.95 * weighted(plain)
    assert output(gptq) < 0.8 * output(searched) < output(plain)


def formats_dequantized(codes: Tensor, scale: Tensor, amax: Tensor) -> Tensor:
    return nv.formats.decode_e2m1(codes) * rounding.value_of(scale, amax, 448).repeat_interleave(16, dim=1)


@pytest.mark.parametrize("kind", ["zeros", "subnormal", "huge", "wide"])
def test_odd_weights_round_to_finite_values(kind: str) -> None:
    w = values((16, 64), kind)
    amax = w.abs().amax().reshape(1)
    gram = torch.eye(64)
    gram[3] = 0
    for use_gram in (None, gram):
        data, scale = rounding.quantize_matrix(w, amax, use_gram, None)
        q = formats_dequantized(nv.formats.unpack_nibbles(data), scale, amax)
        assert bool(torch.isfinite(q).all()) and bool(((scale & 0x7F) != 0x7F).all())
        assert float((w - q).norm()) <= 0.2 * float(w.norm()) or kind == "subnormal"


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", rounding.METHODS)
@pytest.mark.parametrize("activations", ["nvfp4", "high"])
def test_every_method(net: Small, tmp_path: Path, method: str, activations: str) -> None:
    before = copy.deepcopy(net.state_dict())
    quantized = nv.export.quantize(net, BATCHES, RECIPE, method=method, activations=activations)
    assert all(same_bits(before[name], value) for name, value in net.state_dict().items()), "the model is left alone"
    inside = [name for name, m in quantized.named_modules() if isinstance(m, InferenceLayer)]
    assert inside == ["conv1", "conv2", "up.0"] and type(quantized.stem) is nn.Conv2d
    assert error(quantized, net) < (0.2 if activations == "nvfp4" else 0.12)
    nv.export.save(quantized, tmp_path / "q", RECIPE)
    loaded = nv.export.load(tmp_path / "q", Small(), activations=activations)
    assert isinstance(loaded.bn1, FoldedNorm)
    assert same_bits(loaded(BATCHES[0]), quantized(BATCHES[0]))


def test_search_and_gptq_are_better_than_nearest(net: Small) -> None:
    errors = {
        method: error(nv.export.quantize(net, BATCHES, RECIPE, method=method, activations="high"), net)
        for method in ("nearest", "search", "gptq")
    }
    assert errors["search"] < errors["nearest"] and errors["gptq"] < errors["nearest"]


def test_without_folding_the_norms_are_estimated_again(net: Small) -> None:
    kept = nv.export.quantize(net, BATCHES, RECIPE, fold_bn=False, reestimate_bn=False)
    anew = nv.export.quantize(net, BATCHES, RECIPE, fold_bn=False)
    assert same_bits(kept.bn1.running_mean, net.bn1.running_mean)
    assert not same_bits(anew.bn1.running_mean, net.bn1.running_mean)
    assert error(anew, net) < 0.2


def test_bias_correction_removes_the_mean_error(net: Small) -> None:
    x = torch.cat(BATCHES)
    with torch.no_grad():
        expected = net.stem(x).relu()
        wanted = net.bn1(net.conv1(expected)).mean((0, 2, 3))
        means = [
            nv.export.quantize(net, BATCHES, RECIPE, activations="high", bias_correction=flag)
            .conv1(expected)
            .mean((0, 2, 3))
            for flag in (True, False)
        ]
    corrected, left = ((mean - wanted).norm() for mean in means)
    assert corrected < 1e-3 * wanted.norm() and corrected < 0.1 * left


def test_scales_static_and_dynamic(net: Small) -> None:
    static = nv.export.quantize(net, BATCHES, RECIPE)
    dynamic = nv.export.quantize(net, BATCHES, RECIPE, scales="dynamic")
    assert static.conv1.input_amax is not None and dynamic.conv1.input_amax is None
    pair = torch.cat([images(5, 1), 3 * images(6, 1)])
    torch.testing.assert_close(static(pair)[:1], static(pair[:1]), rtol=1e-4, atol=1e-5)
    assert float((dynamic(pair)[:1] - dynamic(pair[:1])).abs().max()) > 1e-3


def test_a_sensitivity_scan_says_what_stays(net: Small, tmp_path: Path) -> None:
    model = copy.deepcopy(net)
    with torch.no_grad():
        model.conv2.weight[3] *= 60.0  # one filter far larger than the others: the tensor's scale is its
    scan = nv.sensitivity.scan(model, lambda m, x: m(x).square().mean(), BATCHES[:2], RECIPE)
    scan.save(tmp_path / "mine.toml", budget=0.5)
    recipe = nv.load_recipe(tmp_path / "mine.toml")
    assert recipe.precision == (("conv2", None),)
    quantized = nv.export.quantize(model, BATCHES, recipe)
    packed = {name for name, module in quantized.named_modules() if isinstance(module, InferenceLayer)}
    assert packed == {"conv1", "up.0"}  # stem and head are too thin
    assert error(quantized, model) < error(nv.export.quantize(model, BATCHES, RECIPE), model)


def test_inputs_by_name_and_without_images(net: Small) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.regions = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(input=x)
            return x.mean() + self.regions(x[:0]).sum()

    quantized = nv.export.quantize(Named(), [values((2, 16, 4, 4))])
    assert quantized.first.input_amax is not None and quantized.regions.input_amax is None

    class OfDicts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.conv(self.norm(input=batch["image"]))

    quantized = nv.export.quantize(OfDicts(), [{"image": values((2, 16, 4, 4)) + 1}], device="cpu")
    assert quantized.conv.input_amax is not None and same_bits(quantized.norm.running_mean, torch.zeros(16))


@pytest.mark.parametrize("scales", ["static", "dynamic"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_image_reaches_its_batch(scales: str, bad: float) -> None:
    """As docs/DEPLOY.md warns those who put the images of several users together."""
    x = values((3, 16, 4, 4))
    quantized = nv.export.quantize(nn.Sequential(nn.Conv2d(16, 16, 1)), [x], scales=scales)
    x[1, 0, 0, 0] = bad
    assert not torch.isfinite(quantized(x)).any()
    quantized[0].set_mode(activations="high")
    assert torch.isfinite(quantized(x)).flatten(1).all(1).tolist() == [True, False, True]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + more


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        return self.model(*inputs)


@pytest.mark.parametrize("fold_bn", [True, False])
def test_batches_that_the_model_does_not_take(fold_bn: bool) -> None:
    x, model = values((2, 16, 4, 4)), nn.Sequential(nn.Conv2d(16, 16, 1), nn.MultiheadAttention(16, 1))
    for wrong, batch, got in (
        (model[:1], {"image": x, "label": 1}, "dict with the keys 'image', 'label': "),
        (nn.TransformerEncoderLayer(16, 1), {"image": x}, "dict with the keys 'image': "),
        (Two(), (x, x), r"\(2, 16, 4, 4\) float32: TypeError: .*argument: 'more'"),
        (Two(), [(x, x)], "tuple: TypeError: .*argument: 'more'"),
        (model[:1], x.numpy(), r"TypeError: conv2d\(\) received an invalid"),
    ):
        with pytest.raises(TypeError, match=rf"what the loader gives[\s\S]*{got}[\s\S]*one argument[\s\S]*fix:"):
            nv.export.quantize(wrong, [batch], fold_bn=fold_bn)
    with pytest.raises(ValueError, match="needs: 16 input channels"):  # what fits and is wrong has its own error
        nv.export.quantize(model[:1], [x[:, :8]], fold_bn=fold_bn)
    quantized = nv.export.quantize(Around(Two()), [((x, x), 0)], fold_bn=fold_bn).model
    assert isinstance(quantized, Two) and isinstance(quantized.conv, InferenceLayer)


def test_a_model_without_any_layer_in_nvfp4_is_warned_of(tmp_path: Path) -> None:
    wide, x = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()).double(), values((2, 16, 4, 4))
    text = r"no layer is in NVFP4, everything stays as it is: 0 \(.*float64\).*model.float\(\)"
    with pytest.warns(UserWarning, match="nv.export.quantize: " + text) as warned:
        nv.export.quantize(wide, [x.double()])
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="nv.export.save: " + text) as warned:
        nv.export.save(wide, tmp_path / "wide")
    assert warned[0].filename == __file__
    many = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
    with pytest.warns(UserWarning, match="3 .thin layer: .* and 2 more$"):
        nv.export.save(many, tmp_path / "many")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of what was asked for
        nv.export.save(nn.Linear(16, 16), tmp_path / "high", nv.NVFP4BlockScaling(precision={"": None}))
        nv.export.save(nn.ReLU(), tmp_path / "none")


def test_contexts_around_it_do_not_act() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), values((32, 16))
    expected = nv.export.quantize(model, [x], nv.NVFP4BlockScaling())
    with nv.nvfp4_autocast("no_rht"):
        inside = nv.export.quantize(model, [x], nv.NVFP4BlockScaling())
    found, wanted = inside.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys() and all(same_bits(found[name], wanted[name]) for name in wanted)


def test_results_that_training_left_in_the_model_are_no_obstacle() -> None:
    """MONAI's DynUNet keeps the outputs of its heads, torch's older weight_norm the kernel that it computes."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads: list[Tensor] = []
            self.conv = nn.utils.weight_norm(nn.Conv2d(16, 16, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.heads = [self.conv(x)]
            return self.heads[0].relu()

    model, x = Kept(), values((2, 16, 6, 6))
    model(x).sum().backward()
    with torch.no_grad():
        model.conv.weight_g.mul_(2)
    quantized = nv.export.quantize(model, [x], method="nearest", bias_correction=False)
    assert relative_error(quantized(x), model(x)) < 0.2
    assert model.heads[0].grad_fn is not None and quantized.heads[0].grad_fn is None


class Normalizing(nn.Module):
    """Normalizes its images in place, as many a model's forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x.sub_(0.5).div_(0.25))).relu())


@pytest.mark.parametrize("batches", [1, 9], ids=["few", "one held back"])
def test_a_model_that_writes_to_its_input_is_calibrated_on_the_images(batches: int) -> None:
    loader = [values((2, 16, 6, 6), seed=seed) for seed in range(batches)]
    before = [x.clone() for x in loader]
    quantized: Any = nv.export.quantize(Normalizing().eval(), loader, auto_high=0.01)
    assert all(same_bits(*pair) for pair in zip(loader, before, strict=True))
    read = max(float(((x - 0.5) / 0.25).abs().max()) for x in before[: 8 if batches > 8 else None])
    assert float(quantized.conv.input_amax) == pytest.approx(read)
    assert quantized.nvfp4_drift.sqnr_db > 5


def test_layers_that_share_a_weight_have_scales_of_their_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(1000 * x)

    x = values((16, 32))
    quantized: Any = nv.export.quantize(Tied(), [x], shift=False)
    amax = float(x.abs().max())
    assert float(quantized.first.input_amax) == pytest.approx(amax)
    assert float(quantized.second.input_amax) == pytest.approx(1000 * amax)


def test_linear_layers_of_one_row() -> None:
    net, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), values((32,))
    quantized = nv.export.quantize(net, [x], bias_correction=False, reestimate_bn=False)
    assert relative_error(quantized(x), net(x)) < 0.2


def test_bad_input_is_refused(net: Small) -> None:
    with pytest.raises(TypeError, match="no batches"):
        nv.export.quantize(net, 5)
    # Its images, one by one and without their batch axis, are valid inputs of many networks.
    with pytest.raises(TypeError, match=r"no batches[\s\S]*\[images\]"):
        nv.export.quantize(net, BATCHES[0])
    with pytest.raises(ValueError, match=r"cannot be copied[\s\S]*lock"):
        locked = nn.Conv2d(16, 16, 1)
        locked.lock = threading.Lock()  # type: ignore[assignment]
        nv.export.quantize(locked, BATCHES)
    with pytest.raises(ValueError, match="unknown method"):
        nv.export.quantize(net, BATCHES, method="best")
    with pytest.raises(ValueError, match="unknown scales"):
        nv.export.quantize(net, BATCHES, scales="row")
    with pytest.raises(TypeError, match="not a module"):
        nv.export.quantize(BATCHES, net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no batches"):
        nv.export.quantize(net, [])
    with pytest.raises(ValueError, match="read once only"):
        nv.export.quantize(net, iter(BATCHES))
    with pytest.raises(ValueError, match="'conv1' is not finite"):
        nv.export.quantize(net, [BATCHES[0] * float("nan")], RECIPE)
    with pytest.raises(ValueError, match="'stern'"):
        nv.export.quantize(net, BATCHES, nv.NVFP4BlockScaling(precision={"stern": None}))
