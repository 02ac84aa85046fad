"""Telemetry's collector: records against statistics computed by hand, the same bits with and without, alarms."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv.telemetry.collect import attach
from te_nvfp4_cv.telemetry.settings import THRESHOLD
from tests.helpers import same_bits, values

pytestmark = pytest.mark.usefixtures("one_thread")

ROLES = {"weight", "input", "input_column", "grad_output", "grad_output_column", "weight_gradient"}


class Memory:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.headers: list[Any] = []
        self.steps: list[Any] = []
        self.values: list[Any] = []
        self.alarms: list[Any] = []
        self.closed: list[Any] = []

    def start(self, header):
        self.headers.append(header)

    def step(self, record):
        self.steps.append(record)

    def scalars(self, step, values):
        self.values.append((step, values))

    def alarm(self, record):
        self.alarms.append(record)

    def close(self, summary=None):
        self.closed.append(summary)


class Net(nn.Module):
    """A stem that is too thin for NVFP4, three layers that are not, one of them transposed, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.fc = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.body(self.stem(x).relu())).mean((2, 3)))


def train(recipe: Any, steps: int, watched: bool, net: nn.Module | None = None, **options: Any):
    """(parameters after `steps` steps of SGD, what was recorded)."""
    torch.manual_seed(5)
    net = Net() if net is None else net
    sink = Memory()
    watch = attach(net, sinks=[sink] if watched else [], **{"every": 1, **options})
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for step in range(steps):
        x, y = values((16, 3, 6, 6), "normal", torch.float32, step), torch.arange(16) % 32
        optimizer.zero_grad()
        with watch.step(step):
            if recipe is None:
                loss = F.cross_entropy(net(x), y)
            else:
                with nv.nvfp4_autocast(recipe):
                    loss = F.cross_entropy(net(x), y)
            loss.backward()
        optimizer.step()
        watch.scalars(step, {"loss": loss.item()})
    watch.close({"done": True})
    return [p.detach().clone() for p in net.parameters()], sink


@pytest.mark.parametrize(
    "recipe",
    [
        None,
        nv.NVFP4BlockScaling(),
        nv.NVFP4BlockScaling(disable_2d_quantization=True, disable_rht=True),
        nv.NVFP4BlockScaling(tensor_scale="delayed"),
        nv.NVFP4BlockScaling(backward_override="high_precision"),
        nv.NVFP4BlockScaling(disable_rht=True, row_scaled_activation=True),
        nv.NVFP4BlockScaling(nvfp4_4over6="all", disable_rht=True, thin_layers="pad"),
    ],
    ids=str,
)
def test_training_is_the_same_with_and_without(recipe):
    plain, _ = train(recipe, 3, False)
    seen, sink = train(recipe, 3, True)
    assert all(same_bits(a, b) for a, b in zip(plain, seen, strict=True))
    assert [record["step"] for record in sink.steps] == [0, 1, 2]
    assert list(sink.steps[0]["layers"]) == ["stem", "body.0", "up", "fc"]
    for record in sink.steps:
        json.dumps(record)  # numbers only
    assert [step for step, _ in sink.values] == [0, 1, 2] and sink.closed == [{"done": True}]


def test_what_a_layer_in_nvfp4_records():
    _, sink = train(nv.NVFP4BlockScaling(), 2, True)
    first, second = (record["layers"]["body.0"] for record in sink.steps)
    assert first["precision"] == "nvfp4" and first["op"] == "conv2d" and set(first["tensors"]) == ROLES
    for name in ROLES - {"weight_gradient"}:
        held = first["tensors"][name]
        assert sum(held["codes"]["usage"]) == held["raw"]["count"] == held["codes"]["count"], name
        assert 10 < held["sqnr_db"] < 40 and 0.9 < held["correlation"] <= 1, name
        assert 0 <= held["underflow"] < 0.5 and 0 <= held["saturation"] < 0.2
        assert 0 < held["scales"]["max"] <= 448 and sum(held["scales"]["histogram"]) > 0
        assert sum(held["raw"]["histogram"]) == held["raw"]["count"]
        nonzero = held["raw"]["count"] * (1 - held["raw"]["zeros"])
        assert sum(held["raw"]["log2_histogram"]) == pytest.approx(nonzero)
    assert first["flip_rate"] is None and 0 < second["flip_rate"] < 1 and second["oscillation"] is None
    assert first["gradient"]["noise"] > 0 and first["gradient"]["ratio"] == pytest.approx(
        first["gradient"]["norm"] / first["gradient"]["noise"]
    )


def test_a_layer_in_high_precision_and_a_run_without_nvfp4_record_raw_operands():
    _, sink = train(nv.NVFP4BlockScaling(), 1, True)
    stem = sink.steps[0]["layers"]["stem"]
    assert stem["precision"] == "high" and "thin layer" in stem["reason"]
    _, sink = train(None, 1, True)
    for layer in (stem, *sink.steps[0]["layers"].values()):
        assert set(layer["tensors"]) == {"weight", "input", "grad_output", "weight_gradient"}
        assert all(set(held) == {"raw"} for held in layer["tensors"].values())


def test_statistics_are_those_of_the_tensors():
    _, sink = train(nv.NVFP4BlockScaling(), 1, True)
    torch.manual_seed(5)
    net = Net()
    w = net.body[0].weight.detach().double()
    held = sink.steps[0]["layers"]["body.0"]["tensors"]["weight"]
    centred = w - w.mean()
    assert held["raw"]["count"] == w.numel()
    assert held["raw"]["mean"] == pytest.approx(float(w.mean()), rel=1e-9)
    assert held["raw"]["std"] == pytest.approx(float(centred.square().mean().sqrt()), rel=1e-9)
    kurtosis = float(centred.pow(4).mean() / centred.square().mean() ** 2 - 3)
    assert held["raw"]["kurtosis"] == pytest.approx(kurtosis, rel=1e-6) and held["raw"]["amax"] == float(w.abs().max())

    # the weight as the GEMMs see it, by another way: the operand's tensor class
    taps = net.body[0].weight.detach().movedim(1, -1)
    quantizer = nv.NVFP4Quantizer(columnwise=False, with_rht=False, with_2d_quantization=True)
    q = torch.zeros_like(taps)
    amax = taps.abs().max()
    for r in range(3):
        for s in range(3):
            tile = taps[:, r, s].contiguous()
            row = torch.zeros(16, 16)
            row[0, 0] = amax  # the tensor's amax, in a tile of its own
            q[:, r, s] = quantizer(F.pad(torch.cat((F.pad(tile, (0, 0, 0, 8)), row)), (0, 0))).dequantize()[:24]
    error = (w.movedim(1, -1) - q.double()).square().sum()
    assert held["sqnr_db"] == pytest.approx(float(10 * torch.log10(w.square().sum() / error)), abs=1e-5)
    assert held["dequantized"]["std"] == pytest.approx(float(q.double().std(correction=0)), rel=1e-6)


def test_the_gradient_that_is_recorded_is_the_parameters():
    net = Net()
    sink = Memory()
    watch = attach(net, sinks=[sink], every=1)
    with watch.step(0, grad_scale=4.0), nv.nvfp4_autocast():
        (4 * net(values((16, 3, 6, 6), "normal", torch.float32, 0)).square().mean()).backward()
    held = sink.steps[0]["layers"]["up"]["tensors"]["weight_gradient"]["raw"]
    assert held["amax"] == pytest.approx(float(net.up.weight.grad.abs().max()) / 4, rel=1e-6)


def test_the_settings_of_a_watch_can_be_read():
    watch = attach(Net(), every=3, gradient_noise=False, max_elements=32, noise_bytes=7)
    assert (watch.every, watch.gradient_noise, watch.max_elements, watch.noise_bytes) == (3, False, 32, 7)


def test_only_samples_are_recorded_and_nothing_is_registered_in_between():
    net, sink = Net(), Memory()
    watch = attach(net, sinks=[sink], every=3)
    from te_nvfp4_cv.layer import observe

    for step in range(7):
        with watch.step(step):
            assert observe.observed() == (step % 3 == 0)
        assert not observe.observed()
    assert [record["step"] for record in sink.steps] == [0, 3, 6]
    fc = sink.steps[0]["layers"]["fc"]
    assert (fc["precision"], fc["reason"]) == ("unseen", "not called in this step")


def test_codes_under_stochastic_rounding_are_those_that_were_multiplied():
    """dw from the recorded seed's codes equals the layer's: the usage of codes of two runs with one seed agrees, of
    another seed does not.
    """
    runs = []
    for seed in (1, 1, 2):
        net, sink = Net(), Memory()
        net.load_state_dict(_state())
        watch = attach(net, sinks=[sink], every=1)
        torch.manual_seed(seed)
        with watch.step(0), nv.nvfp4_autocast():
            net(values((16, 3, 6, 6), "normal", torch.float32, 0)).square().sum().backward()
        runs.append(sink.steps[0]["layers"]["fc"]["tensors"]["grad_output"]["codes"]["usage"])
    assert runs[0] == runs[1] != runs[2]


def _state():
    torch.manual_seed(0)
    return Net().state_dict()


def test_packing_again_gives_the_codes_of_the_dequantized_faces():
    from te_nvfp4_cv.telemetry import blocks

    checked = []
    original = blocks.of_operand

    def compare(role, operand, made, seed, plan, most, experts):
        found = original(role, operand, made, seed, plan, 1 << 30, experts)
        data, scale = made.row
        if not scale.numel() and data.numel():  # the layer multiplied dequantized rows: codes times block scales
            b, s = found["row"], plan.recipe.settings(role)
            scaled = b.values / (made.row_amax * (1.0 / (6 * s.e4m3_max)))
            n = b.raw.shape[0]
            step = blocks.step_of(n, 1 << 30)
            assert step == 1
            width = -(-operand.shape[-1] // 16) * 16
            rows = scaled.view(*operand.shape[:-1], width)[..., : operand.shape[-1]]
            assert torch.allclose(rows, data.float(), rtol=1e-6, atol=0)
            checked.append(role)
        return found

    net, sink = Net(), Memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "of_operand", compare)
        watch = attach(net, sinks=[sink], every=1)
        with watch.step(0), nv.nvfp4_autocast(backend="vendor"):
            net(values((16, 3, 6, 6), "normal", torch.float32, 0)).square().sum().backward()
    assert checked.count("input") == 3 and checked.count("grad_output") == 3


def test_an_alarm_when_noise_drowns_the_gradient_and_once_only():
    net = nn.Sequential(nn.Linear(32, 32, bias=False))
    sink = Memory()
    watch = attach(net, sinks=[sink], every=1)
    x = torch.ones(32, 32)
    for step in range(3):
        with watch.step(step), nv.nvfp4_autocast(nv.NVFP4BlockScaling(disable_rht=True)):
            y = net(x)
            noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
            y.backward(noise - noise.mean(0))  # dw = sum over the rows: nearly nothing is left, but for rounding
    ratio = sink.steps[0]["layers"]["0"]["gradient"]["ratio"]
    assert ratio < THRESHOLD and math.isfinite(ratio)
    assert [(a["layer"], a["step"]) for a in sink.alarms] == [("0", 0)] and "noise" in sink.alarms[0]["text"]


def test_non_finite_values_are_counted_and_raise_an_alarm():
    net, sink = Net(), Memory()
    with torch.no_grad():
        net.body[0].weight[0, 0, 0, 0] = torch.nan
    watch = attach(net, sinks=[sink], every=1)
    with watch.step(0), nv.nvfp4_autocast():
        net(values((16, 3, 6, 6), "normal", torch.float32, 0)).square().sum().backward()
    held = sink.steps[0]["layers"]["body.0"]["tensors"]["weight"]["raw"]
    assert held["nonfinite"] == 1 and math.isfinite(held["std"])
    assert any(a["layer"] == "body.0" and "weight" in a["text"] for a in sink.alarms)


def test_layers_without_gradients():
    net, sink = Net(), Memory()
    net.up.requires_grad_(False)
    watch = attach(net, sinks=[sink], every=1)
    with watch.step(0), nv.nvfp4_autocast():
        net(values((16, 3, 6, 6), "normal", torch.float32, 0)).square().sum().backward()
    up = sink.steps[0]["layers"]["up"]
    assert "weight_gradient" not in up["tensors"] and "gradient" not in up and "grad_output" in up["tensors"]
    with watch.step(1), torch.no_grad(), nv.nvfp4_autocast():
        net(values((16, 3, 6, 6), "normal", torch.float32, 0))
    assert set(sink.steps[1]["layers"]["fc"]["tensors"]) >= {"weight", "input"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            x = checkpoint(self.body, self.stem(x).relu(), use_reentrant=reentrant)
            return self.fc(self.up(x).mean((2, 3)))

    runs = []
    for watched in (False, True):
        torch.manual_seed(5)
        parameters, sink = train(nv.NVFP4BlockScaling(), 2, watched, Checkpointed())
        runs.append(parameters)
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))
    assert set(sink.steps[0]["layers"]["body.0"]["tensors"]) == ROLES


def test_a_shared_layer_counts_once_and_attention_is_named():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x):
            x = self.fc(self.fc(x))
            return self.attention(x, x, x, need_weights=False)[0]

    net, sink = Shared(), Memory()
    watch = attach(net, sinks=[sink], every=1)
    with watch.step(0), nv.nvfp4_autocast():
        net(values((2, 16, 32), "normal", torch.float32, 0).requires_grad_()).square().sum().backward()
    layers = sink.steps[0]["layers"]
    assert layers["fc"]["precision"] == "nvfp4" and {"input", "grad_output"} <= set(layers["fc"]["tensors"])
    assert "attention.in_proj_weight" in layers and "weight_gradient" in layers["attention.in_proj_weight"]["tensors"]


def test_layers_take_turns_where_memory_for_noise_is_short():
    net, sink = Net(), Memory()
    watch = attach(net, sinks=[sink], every=1, noise_bytes=16 * 24 * 36 * 4)  # the largest input alone
    for step in range(6):
        with watch.step(step), nv.nvfp4_autocast():
            net(values((16, 3, 6, 6), "normal", torch.float32, 0)).square().sum().backward()
    with_noise = [{n for n, layer in r["layers"].items() if "gradient" in layer} for r in sink.steps]
    assert all(len(found) >= 1 for found in with_noise) and set().union(*with_noise) == {"body.0", "up", "fc"}


def test_a_sample_is_taken_of_large_operands():
    net, sink = Net(), Memory()
    watch = attach(net, sinks=[sink], every=1, max_elements=512)
    with watch.step(0), nv.nvfp4_autocast():
        net(values((16, 3, 6, 6), "normal", torch.float32, 0)).square().sum().backward()
    for layer in sink.steps[0]["layers"].values():
        assert all(held["raw"]["count"] <= 512 for held in layer["tensors"].values())


def test_a_compiled_model_still_shows_weights_and_gradients():
    net, sink = Net(), Memory()
    compiled = torch.compile(net, backend="eager")
    watch = attach(compiled, sinks=[sink], every=1)
    with watch.step(0), nv.nvfp4_autocast():
        compiled(values((16, 3, 6, 6), "normal", torch.float32, 0)).square().sum().backward()
    layer = sink.steps[0]["layers"]["up"]
    assert layer["reason"] == "inside a compiled graph" and set(layer["tensors"]) == {"weight", "weight_gradient"}
    assert layer["precision"] == "unseen"  # in the graph it may well run in NVFP4


def test_a_watch_is_a_context_manager_that_closes_once():
    class Closed(nv.telemetry.Sink):
        def __init__(self) -> None:
            self.summaries: list[Any] = []

        def close(self, summary: dict[str, Any] | None = None) -> None:
            self.summaries.append(summary)

    sink = Closed()
    with attach(nn.Linear(32, 16), sinks=[sink]) as watch:
        watch.close({"loss": 1.0})
    assert sink.summaries == [{"loss": 1.0}] and not watch.due(0)
    with pytest.raises(KeyboardInterrupt), attach(nn.Linear(32, 16), sinks=[sink]):
        raise KeyboardInterrupt
    assert sink.summaries == [{"loss": 1.0}, None]


def test_an_exception_inside_leaves_nothing_behind():
    net, sink = Net(), Memory()
    watch = attach(net, sinks=[sink], every=1)
    with pytest.raises(RuntimeError, match="mine"), watch.step(0):
        raise RuntimeError("mine")
    from te_nvfp4_cv.layer import observe

    assert not sink.steps and not observe.observed() and nv.active_recipe() is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"every": -1}, "every"),
        ({"every": 1.5}, "every"),
        ({"max_elements": 3}, "max_elements"),
        ({"noise_bytes": -1}, "n"),
    ],
)
def test_bad_numbers_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        attach(Net(), **options)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        attach(copy)
