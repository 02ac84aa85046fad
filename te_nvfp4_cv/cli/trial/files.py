"""The trained model of a trial, its packed file, and the checks of both: saved and loaded, listed alike everywhere."""

from __future__ import annotations

import copy
import types
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.cli.trial.cells import Cell, Finding, Trial
from te_nvfp4_cv.cli.trial.subject import descend, evaluate, relative, same, seeded
from te_nvfp4_cv.export.checkpoints import Saved, load, save
from te_nvfp4_cv.export.ptq.post_training import quantize
from te_nvfp4_cv.report.watch import coverage


class Trained:
    """A trial's model after one step in NVFP4, and what nv.export.save made of it."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.model = trial.copy()
        trial.step(self.model, trial.context())
        descend(self.model)

    @cached_property
    def output(self) -> list[Tensor]:
        """The output of the trained model under the context."""
        return evaluate(self.model, self.trial.subject, self.trial.context())

    @cached_property
    def saved(self) -> Saved:
        """The file."""
        return save(self.model, self.trial.folder / "model", self.trial.recipe)

    @cached_property
    def loaded(self) -> nn.Module:
        """The file's model, loaded into one that was built anew and holds other values."""
        return load(self.saved.files[0], self._other(), backend=self.trial.backend)

    def _other(self) -> nn.Module:
        fresh = self.trial.subject.made()
        with torch.no_grad():
            for value in fresh.state_dict().values():  # what load forgets shows
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.uniform_(0.5, 1.5)
        return fresh


def trained(trial: Trial) -> Trained:
    """Return the trained model of a trial, which the checks of one row share."""
    if trial.trained is None:
        trial.trained = Trained(trial)
    return trial.trained  # type: ignore[no-any-return]


def saved(trial: Trial) -> Cell:
    """Save the trained model and load it: the loaded one computes the same bits, without a context."""
    model = trained(trial)
    found = evaluate(model.loaded, trial.subject)
    if not same(model.output, found):
        raise Finding(f"loaded differs by {relative(model.output, found):.2g}; {_unequal(model)}")
    return Cell(True, "equal bits")


def _unequal(model: Trained) -> str:
    """Say what the file holds, for a model that differs from it."""
    return f"{len(model.saved.quantized)} layers saved in NVFP4, {len(model.saved.high)} not"


def listed(trial: Trial) -> Cell:
    """Compare the lists of layers in NVFP4 of coverage, save and quantize, for an evaluation."""
    subject = trial.subject
    model = trained(trial)
    args, kwargs = subject.evaluation_call()
    seeded()
    report = coverage(model.model.eval(), *args, recipe=trial.recipe, backend=trial.backend, **kwargs)
    ran = {row.name for row in report.rows if row.calls}
    inside = {row.name for row in report.rows if row.calls and row.nvfp4}
    files = set(model.saved.quantized)
    # Layers that no evaluation reaches are saved as well, and a tied layer has one name.
    _agree("save", inside, files, ran)
    called, batch = _of_one_input(model.model, args, kwargs)
    quantized = quantize(called, [[batch]], trial.recipe, method="nearest", bias_correction=False)
    found = set(save(quantized, trial.folder / "quantized", trial.recipe).quantized)
    _agree("quantize", files, found, files | found)
    return Cell(True, f"{len(inside)} layers")


def _of_one_input(model: nn.Module, args: Any, kwargs: Any) -> tuple[nn.Module, Any]:
    """Return a model to be called with one object, and that object: a loader gives a model its first argument alone."""
    if len(args) == 1 and not kwargs:
        return model, args[0]
    called = copy.copy(model)
    # On the instance, not in a module around the model: the names of its layers stay.
    called.forward = types.MethodType(_call, called)  # type: ignore[method-assign]
    return called, (args, kwargs)


def _call(model: nn.Module, call: tuple[Any, Any]) -> Any:
    args, kwargs = call
    return type(model).forward(model, *args, **kwargs)


def _agree(what: str, expected: set[str], found: set[str], among: set[str]) -> None:
    missing, more = sorted(expected - found), sorted((found - expected) & among)
    if missing:
        raise Finding(f"{len(missing)} layers not in NVFP4 by {what}: {missing[0] or 'the model'}")
    if more:
        raise Finding(f"{len(more)} layers in NVFP4 by {what} alone: {more[0] or 'the model'}")
