"""A step of telemetry is a context manager: a call that nobody enters is noticed."""

from __future__ import annotations

import warnings

import pytest
import torch

import te_nvfp4_cv as nv
from te_nvfp4_cv import errors


def test_a_step_that_is_called_and_not_entered_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    model, x = torch.nn.Linear(16, 16), torch.randn(16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with nv.telemetry.attach(model) as watch, watch.step(0), nv.nvfp4_autocast():
            model(x).sum().backward()
    watch = nv.telemetry.attach(model)
    for step in range(2):
        watch.step(step)
    with pytest.warns(UserWarning, match=r"step\(\) was called 2 times without `with`"):
        watch.close()


def test_a_step_may_decorate_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    model, x = torch.nn.Linear(16, 16), torch.randn(16, 16)
    watch = nv.telemetry.attach(model)

    @watch.step(0)
    def train() -> None:
        model(x).sum().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()
        train()
        watch.close()
    watch = nv.telemetry.attach(model)
    with watch.step(0):
        train()  # of the other watch
    watch.step(1)
    with pytest.warns(UserWarning, match="called 1 times without"):
        watch.close()
