"""Watching changes nothing: explicit modules, computed weights, clipped ranks; and figures that padding could spoil."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import te_nvfp4_cv as nv
from te_nvfp4_cv import formats, telemetry
from te_nvfp4_cv.telemetry.blocks import Blocks, whole
from te_nvfp4_cv.telemetry.statistics import histogram, histogram_by_comparison, operand
from tests.helpers import same_bits, values

NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)


class Passes(TorchDispatchMode):
    """Note the operators that read or write a tensor of at least so many elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.names = least, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        large = [t for t in (*args, out) if isinstance(t, torch.Tensor) and t.numel() >= self.least]
        if large and not function.is_view:
            self.names.append(function.name().removeprefix("aten::").split(".")[0])
        return out


class Keep:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Any]] = []
        self.values: list[dict[str, float]] = []
        self.header: dict[str, Any] = {}

    def start(self, header: dict[str, Any]) -> None:
        self.header = header

    def step(self, record: dict[str, Any]) -> None:
        self.layers.append(record["layers"])

    def scalars(self, step: int, found: dict[str, float]) -> None:
        self.values.append(found)

    def alarm(self, record: dict[str, Any]) -> None: ...

    def image(self, name: str, path: Any, step: int) -> None: ...

    def close(self, summary: dict[str, Any] | None = None) -> None: ...


def run(model: nn.Module, x: Tensor, watch: telemetry.Telemetry | None = None, **step: Any) -> list[Tensor]:
    """Output and gradients of a step, watched or not."""
    model = copy.deepcopy(model) if watch is None else model
    torch.manual_seed(1)
    if watch is None:
        y = model(x)
        y.square().mean().backward()
    else:
        with watch.step(0, **step):
            y = model(x)
            y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_explicit_modules_stay_in_nvfp4_outside_of_any_context() -> None:
    torch.manual_seed(0)
    model = nv.convert_model(nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 3)), NO_SR)
    x, sink = values((2, 16, 8, 8)), Keep()
    expected = run(model, x)
    found = run(model, x, telemetry.attach(model, every=1, sinks=[sink]))
    assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True))
    assert [layer["precision"] for layer in sink.layers[0].values()] == ["nvfp4", "nvfp4"]


@pytest.mark.filterwarnings("error")
def test_a_computed_weight_is_seen_and_not_read() -> None:
    """Each read of a spectral norm's weight is a power iteration."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)), nn.Linear(32, 16))
    x, sink = values((4, 32)), Keep()
    expected = run(model, x)
    found = run(model, x, telemetry.attach(model, every=1, sinks=[sink]))
    assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True))
    with nv.nvfp4_autocast(NO_SR):
        run(model, x, telemetry.attach(model, every=1, sinks=[sink]))
    for record, precision in zip(sink.layers, ("high", "nvfp4"), strict=True):
        layer = record["0"]
        assert (layer["precision"], layer["op"]) == (precision, "linear")
        assert layer["tensors"].keys() >= {"input", "weight"}
    assert sink.header["layers"][0]["shape"] == [] and sink.header["layers"][1]["shape"] == [16, 32]


def test_two_models_are_watched_side_by_side() -> None:
    torch.manual_seed(0)
    a, b, x = nn.Linear(32, 32), nn.Linear(32, 32), values((4, 32))
    sinks = Keep(), Keep()
    first, second = (telemetry.attach(m, every=1, sinks=[s]) for m, s in zip((a, b), sinks, strict=True))
    with first.step(0), second.step(0), nv.nvfp4_autocast(NO_SR):
        b(a(x)).square().mean().backward()
    assert [list(sink.layers[0].values())[0]["precision"] for sink in sinks] == ["nvfp4", "nvfp4"]


def test_gradient_figures_do_not_depend_on_the_loss_scale() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(32, 32), values((16, 32))
    found = []
    for scale in (1.0, 1024.0):
        sink, copied = Keep(), copy.deepcopy(model)
        watch = telemetry.attach(copied, every=1, sinks=[sink])
        with watch.step(0, grad_scale=scale), nv.nvfp4_autocast(NO_SR):
            (scale * copied(x).square().mean()).backward()
        found.append(sink.layers[0]["Linear"])
    for key in ("norm", "noise"):
        assert found[1]["gradient"][key] == pytest.approx(found[0]["gradient"][key], rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_images_that_only_fill_a_block_are_not_counted(batch: int) -> None:
    torch.manual_seed(0)
    recipe = nv.NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True)
    model, sink = nn.Conv2d(16, 16, 1), Keep()
    x = values((batch, 16, 1, 1)) + 3.0
    with telemetry.attach(model, every=1, sinks=[sink]).step(0), nv.nvfp4_autocast(recipe):
        model(x).sum().backward()
    tensors = sink.layers[0]["Conv2d"]["tensors"]
    row, column = tensors["input"]["raw"], tensors["input_column"]["raw"]
    assert column["zeros"] == row["zeros"] == 0
    assert column["mean"] == pytest.approx(row["mean"]) and column["std"] == pytest.approx(row["std"])


def test_flips_are_those_of_the_first_call_under_checkpointing() -> None:
    torch.manual_seed(0)
    recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True, high_precision_gemms=("fprop",))
    model, sink = nn.Linear(32, 32), Keep()
    watch = telemetry.attach(model, every=1, sinks=[sink])
    for step in (0, 1):
        with watch.step(step), nv.nvfp4_autocast(recipe):
            x = values((16, 32), seed=step).requires_grad_()
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().mean().backward()
        with torch.no_grad():
            model.weight.mul_(-1)
    assert sink.layers[1]["Linear"]["flip_rate"] > 0.5


def test_scalars_of_any_number_type() -> None:
    sink = Keep()
    watch = telemetry.attach(nn.Linear(16, 16), sinks=[sink])
    watch.scalars(1, {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(2.0)})  # type: ignore[dict-item]
    assert sink.values == [{"a": 0.5, "b": 3.0, "c": 2.0}] and all(type(v) is float for v in sink.values[0].values())


def test_lazy_parameters_are_refused() -> None:
    for function in (telemetry.attach, nv.learn_scales):
        with pytest.raises(ValueError, match="lazy parameters"):
            function(nn.Sequential(nn.LazyLinear(16)))


@pytest.mark.parametrize(("bins", "low", "high"), [(16, -0.5, 15.5), (64, -1.0, 1.0), (64, -40.0, 24.0)])
def test_counts_without_atomic_additions_are_histcs(bins: int, low: float, high: float) -> None:
    ends = torch.tensor([low, high])
    beyond = [ends.nextafter(torch.tensor(far)) for far in (float("inf"), -float("inf"))]
    v = torch.cat([torch.linspace(low - 1, high + 1, 4001), ends, *beyond])
    inside = v[(v >= low) & (v <= high)]
    by_comparison = histogram_by_comparison(v, bins, low, high)
    for found in (by_comparison, histogram(v, bins, low, high)):  # what CUDA may do, and what a CPU does
        assert float(found.sum()) == len(inside)
        assert (found - torch.histc(v, bins, low, high)).abs().max() <= 1  # a value on an edge


def test_a_sampled_operand_is_read_few_times() -> None:
    """A sampled step takes the time that these passes take: a hundred operands, each as large as a sample.

    Of the operators that torch needs for each element, masks, log2 and histc take ten times as long as a product.
    """
    torch.manual_seed(0)
    raw, codes = values((512, 16)), torch.randint(0, 16, (512, 16), dtype=torch.uint8)
    limit = torch.rand(512)
    decoded = formats.decode_e2m1(codes) * limit.unsqueeze(-1) / 6
    scale = torch.full((512,), 56, dtype=torch.uint8)
    with Passes(raw.numel()) as passes:
        operand(Blocks(raw, codes, scale, limit / 6, decoded, limit, None, whole(raw)))
    assert not {"where", "isfinite", "log2", "histc", "nan_to_num"} & set(passes.names), passes.names
    assert len(passes.names) <= 60, passes.names


@pytest.mark.parametrize("recipe", [NO_SR, nv.NVFP4BlockScaling(tensor_scale="delayed"), None], ids=str)
def test_outliers_and_broken_values_outside_of_the_sample_are_seen(recipe: Any) -> None:
    """amax and the values that are not finite are of the whole operand; the sample here is one value in eight."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(32, 32, 3, padding=1), values((4, 32, 16, 16))
    sample = nn.Sequential(model)
    sink = Keep()
    watch = telemetry.attach(sample, every=1, sinks=[sink], max_elements=4096)
    for step, outlier in enumerate((1000.0, float("nan"))):
        x[1, 5, 7, 9] = outlier
        with watch.step(step), nv.nvfp4_autocast(recipe, enabled=recipe is not None):
            sample(x.requires_grad_()).square().mean().backward()
        x = x.detach()
    spiked, broken = (record["0"]["tensors"] for record in sink.layers)
    assert spiked["input"]["raw"]["amax"] == 1000 and spiked["input"]["raw"]["nonfinite"] == 0
    assert spiked["input"]["raw"]["count"] < x.numel() / 4
    assert sum(spiked["input"]["raw"]["histogram"]) == spiked["input"]["raw"]["count"]
    assert broken["input"]["raw"]["nonfinite"] == 1 and 3 < broken["input"]["raw"]["amax"] < 6
    assert broken["grad_output"]["raw"]["nonfinite"] >= 9 * 32, "the outputs that read it, in every channel"
    if recipe is not None:
        assert 240 < spiked["input_column"]["raw"]["amax"] < 270, "a sixteenth of its square, rotated"
        assert broken["input_column"]["raw"]["nonfinite"] == 1 and broken["input_column"]["raw"]["amax"] > 0
