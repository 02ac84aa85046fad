"""Which calls a record is of: repeated, shared and tied layers, operands that have no statistics, alarms by turns."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv import telemetry
from tests.helpers import values

RECIPE = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)


class Keep(telemetry.Sink):
    """A sink that keeps steps and alarms."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Any]] = {}
        self.alarms: list[tuple[int, str]] = []

    def step(self, record: dict[str, Any]) -> None:
        self.steps[record["step"]] = record["layers"]

    def alarm(self, record: dict[str, Any]) -> None:
        self.alarms.append((record["step"], record["layer"]))


class Heads(nn.Module):
    """One convolution on two images of other sizes, as a detector's heads run on all levels of its pyramid."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.conv, self.reentrant = nn.Conv2d(16, 16, 3, padding=1), reentrant

    def forward(self, *images: Tensor) -> Tensor:
        if self.reentrant is None:
            return sum(self.conv(x).square().mean() for x in images)
        made = [checkpoint(self.conv, x, use_reentrant=self.reentrant) for x in images]
        return sum(y.square().mean() for y in made)


def sampled(model: nn.Module, *inputs: Any, batches: int = 1, context: Any = None, **options: Any) -> dict[str, Any]:
    sink = Keep()
    watch = telemetry.attach(model, every=1, sinks=[sink], **options)
    with watch.step(0):
        for number in range(batches):
            with nv.nvfp4_autocast(RECIPE) if context is None else context:
                y = model(*(x * (1 + number) for x in inputs))
            y.sum().backward()
    model.zero_grad()
    return sink.steps[0]


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("precision", ["nvfp4", "high"])
def test_of_a_shared_layer_under_checkpointing_the_first_call_is_recorded(precision, reentrant, batches):
    images = values((16, 16, 8, 8)).requires_grad_(), values((16, 16, 4, 4), seed=1).requires_grad_()
    torch.manual_seed(0)
    plain, model = Heads(None), Heads(reentrant)
    model.load_state_dict(plain.state_dict())
    for net in (plain, model):
        nv.set_precision(net, {"conv": None if precision == "high" else RECIPE})
    expected, found = sampled(plain, *images)["conv"], sampled(model, *images, batches=batches)["conv"]
    del expected["tensors"]["weight_gradient"], found["tensors"]["weight_gradient"]  # the sum of all calls
    assert found == expected and "grad_output" in found["tensors"] and ("gradient" in found) == (precision == "nvfp4")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("room", [(1, 0), (0, 1), (1, 1), (2, 0)])
def test_short_memory_never_compares_a_call_with_the_input_of_another(reentrant, room):
    images = values((16, 16, 8, 8)).requires_grad_(), values((16, 16, 4, 4), seed=1).requires_grad_()
    torch.manual_seed(0)
    plain, model = Heads(None), Heads(reentrant)
    model.load_state_dict(plain.state_dict())
    expected = sampled(plain, *images)["conv"]["gradient"]
    size = sum(count * x.numel() * x.element_size() for count, x in zip(room, images, strict=True))
    found = sampled(model, *images, noise_bytes=size)["conv"]
    assert found.get("gradient", expected) == expected


def test_layers_that_share_a_weight_are_told_apart():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    x = values((16, 32))
    found = sampled(model, x)
    assert [layer["precision"] for layer in found.values()] == ["nvfp4", "nvfp4"]
    assert found["0"]["tensors"]["input"]["raw"]["amax"] == float(x.abs().max())
    assert found["2"]["tensors"]["input"]["raw"]["zeros"] > 0.1  # it comes out of the ReLU


class Inside(nn.Module):
    """A linear layer that is called as `call` says."""

    def __init__(self, call: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer, self.call = nn.Linear(32, 32, dtype=dtype), call

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(self.layer, x)
        y = y.values() if y.layout == torch.jagged else y
        return y.abs() if y.is_complex() else y


def jagged(layer: Any, x: Tensor) -> Tensor:
    return layer(torch.nested.nested_tensor(list(x.split([7, 9])), layout=torch.jagged))


CALLS: dict[str, Any] = {
    "nested": jagged,
    "sparse": lambda layer, x: layer(x.relu().to_sparse()),
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "complex": lambda layer, x: layer(x.to(torch.complex64)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("context", [None, contextlib.nullcontext()])
@pytest.mark.parametrize("name", CALLS)
def test_operands_without_statistics_are_left_out_and_end_no_run(name, context, tmp_path):
    model = Inside(CALLS[name], torch.complex64 if name == "complex" else torch.float32)
    found = sampled(model, values((16, 32)), context=context)["layer"]
    assert found["precision"] == "high" and "input" not in found["tensors"]
    assert ("weight" in found["tensors"]) == (name != "complex")  # whose amax would be that of real parts


def test_an_alarm_is_not_repeated_after_samples_in_which_other_layers_had_their_turn():
    torch.manual_seed(0)
    model, sink = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), Keep()
    x, dy = 1 + 1e-3 * values((16, 32)), values((16, 32), seed=1)
    watch = telemetry.attach(model, every=1, sinks=[sink], noise_bytes=x.numel() * 4)
    for step in range(6):
        with watch.step(step):
            with nv.nvfp4_autocast():
                y = model(x)
            y.backward(dy - dy.mean(0))  # equal inputs: the gradient is about 0, and all of it noise
    assert ["gradient" in layers["0"] for layers in sink.steps.values()] == [True, False] * 3
    assert sink.alarms == [(0, "0"), (1, "1")]


def test_steps_may_be_integers_of_numpy_and_torch(tmp_path: Path):
    model = nn.Linear(32, 32)
    with telemetry.attach(model, every=2, sinks=[telemetry.JSONL(tmp_path / "run.jsonl")]) as watch:
        for step in np.arange(3):
            with watch.step(step):
                model(values((16, 32))).sum().backward()
            watch.scalars(torch.tensor(int(step)), {"train/loss": 1.0})
    run = telemetry.read(tmp_path / "run.jsonl")
    assert list(run.steps) == [0, 2] and list(run.scalars) == [0, 1, 2]
