"""Observers of calls hear their own thread, and what activation checkpointing repeats for it in another one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import observe
from tests.helpers import values

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def in_a_thread(run: Callable[[], Any]) -> None:
    """Run `run` in another thread and wait for its end; its exception is raised here."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def train_a_step(model: nn.Module, x: Tensor) -> None:
    """One step under a context of the thread that calls."""
    with nv.nvfp4_autocast():
        model(x).square().mean().backward()


class Interrupted(nn.Module):
    """A layer in the middle of whose model another thread trains a model of its own."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.others = [other]  # in a list, so that it is no part of this module

    def forward(self, x: Tensor) -> Tensor:
        in_a_thread(lambda: train_a_step(self.others[0], values((16, 32))))
        return self.fc(x)


def test_coverage_does_not_count_the_layers_of_another_threads_model():
    other = nn.Linear(32, 48)
    model = Interrupted(other)
    report = nv.coverage(model, values((16, 16)))
    assert other.weight.grad is not None
    assert [(row.name, row.kernel, row.calls) for row in report.rows] == [("fc", (16, 16), 1)]


def test_an_observer_hears_its_own_thread_and_no_other():
    here: list[observe.Call] = []
    there: list[observe.Call] = []
    model, other = nn.Linear(16, 16), nn.Linear(32, 48)

    def watched() -> None:
        assert not observe.observed()
        with observe.observe(there.append):
            train_a_step(other, values((16, 32)))

    with observe.observe(here.append):
        in_a_thread(watched)
        in_a_thread(lambda: train_a_step(other, values((16, 32))))
        train_a_step(model, values((16, 16)))
    train_a_step(model, values((16, 16)))
    assert [call.weight is model.weight for call in here] == [True]
    assert [call.weight is other.weight for call in there] == [True]


def repeated(device: str, reentrant: bool) -> tuple[nn.Module, Tensor]:
    """Return a layer and its loss, whose backward pass runs the layer a second time."""
    model = nn.Linear(16, 16).to(device)
    x = values((16, 16)).to(device).requires_grad_()
    with nv.nvfp4_autocast():
        return model, checkpoint(model, x, use_reentrant=reentrant).square().mean()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repeated_forward_pass_is_told(device, reentrant):
    told: list[observe.Call] = []
    with observe.observe(told.append):
        model, loss = repeated(device, reentrant)
        assert len(told) == 1
        loss.backward()
    assert [call.recipe is not None for call in told] == [True, True]
    assert model.weight.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_pass_repeated_in_another_thread_is_told_to_those_who_watch_the_first(reentrant):
    """As on CUDA, where autograd runs the backward pass in a thread of its own."""
    told: list[observe.Call] = []
    elsewhere: list[observe.Call] = []

    def backward(loss: Tensor) -> None:
        with observe.observe(elsewhere.append):
            loss.backward()
            train_a_step(nn.Linear(16, 16), values((16, 16)))  # afterwards this thread is told of its own calls again

    with observe.observe(told.append):
        _, loss = repeated("cpu", reentrant)
        in_a_thread(lambda: backward(loss))
    assert (len(told), len(elsewhere)) == (2, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_who_watches_when_the_forward_pass_is_repeated_is_told(device, reentrant):
    """An observer that has left hears nothing more; one that came for the backward pass hears that."""
    forward: list[observe.Call] = []
    backward: list[observe.Call] = []
    with observe.observe(forward.append):
        _, loss = repeated(device, reentrant)
    with observe.observe(backward.append):
        loss.backward()
    assert (len(forward), len(backward)) == (1, 1)


class Steps:
    """A sink that keeps the records of sampled steps."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def start(self, header: Any) -> None: ...

    def step(self, record: Any) -> None:
        self.steps.append(record)

    def alarm(self, record: Any) -> None: ...


def test_telemetry_records_no_layer_that_another_thread_runs():
    """The thread runs a layer that the watched model has, too: by its weight alone it cannot be told apart."""
    sink, model = Steps(), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    watch = nv.telemetry.attach(model, every=1, sinks=[sink])
    with watch.step(0):
        in_a_thread(lambda: train_a_step(model[1], values((16, 16))))
        train_a_step(model[0], values((16, 16)))
    tensors = {name: set(layer["tensors"]) for name, layer in sink.steps[0]["layers"].items()}
    assert "input" in tensors["0"] and "input" not in tensors.get("1", set())
