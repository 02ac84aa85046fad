"""What a check needs, and what it says: the model with its steps in high precision and in NVFP4, and a cell of the row.

A check is a function from a `Trial` to a `Cell`. It says "no" by a cell, by `Finding` or by any other exception; that
plain torch cannot do it with this model either, by `NotHere`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from te_nvfp4_cv.backend.torch_private import in_backward
from te_nvfp4_cv.cli.trial.subject import Step, Subject, clone, settled, step
from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

# How much farther from high precision than another NVFP4 step or the control a gradient may be: two draws of the same
# noise differ by a few per cent, and small networks by more.
FACTOR, SLACK = 1.5, 0.05


@dataclass(frozen=True)
class Cell:
    """What one check says of a model: `ok` is None where the check does not apply."""

    ok: bool | None
    text: str


class Finding(Exception):  # noqa: N818
    """A check found something; the text is what the cell says."""


class NotHere(Exception):  # noqa: N818
    """A check does not apply to this model; the text is the reason."""


Check = Callable[["Trial"], Cell]


class Trial:
    """A subject, the recipe to try it with, and the steps that all checks compare theirs with."""

    def __init__(self, subject: Subject, recipe: NVFP4BlockScaling, backend: str = "auto") -> None:
        self.subject, self.recipe, self.backend = subject, recipe, backend
        self.trained: Any = None  # files.py: the model after a step, and its file
        self._folder = tempfile.TemporaryDirectory()

    @property
    def folder(self) -> Path:
        """A folder for files, which is removed with the trial."""
        return Path(self._folder.name)

    @cached_property
    def base(self) -> nn.Module:
        """The model as it was built. No check changes it: each takes a copy."""
        return settled(self.subject.made())

    @cached_property
    def high(self) -> Step:
        """The step in high precision."""
        return self.step(self.copy())

    @cached_property
    def nvfp4(self) -> Step:
        """The step in NVFP4, eager."""
        return self._watched[0]

    @property
    def calls(self) -> int:
        """How many calls of the eager forward pass ran in NVFP4."""
        return self._watched[1]

    @cached_property
    def _watched(self) -> tuple[Step, int]:
        model = self.copy()
        with counted() as calls:
            return self.step(model, self.context()), len(calls)

    def copy(self) -> nn.Module:
        """Return a copy of the model."""
        return clone(self.base, self.subject)

    def context(self) -> AbstractContextManager[Any]:
        """Return a new NVFP4 context."""
        return nvfp4_autocast(self.recipe, backend=self.backend)

    def step(self, model: nn.Module, context: AbstractContextManager[Any] | None = None, called: Any = None) -> Step:
        """Run a step of the model; arguments as for subject.step."""
        return step(model, self.subject, context, called)

    def compared(self, found: Step, what: str = "") -> str:
        """Compare a step in NVFP4 with the eager one. Returns "equal bits", or how far both are from high precision.

        Raises:
            Finding: It is much farther away, or is plain torch's own step where NVFP4 changed something.
        """
        if found.equals(self.nvfp4):
            return "equal bits"
        if found.equals(self.high):
            raise Finding(f"{what}all layers in high precision")
        own, other = found.error(self.high), self.nvfp4.error(self.high)
        if not own <= FACTOR * other + SLACK:  # also if it is NaN
            raise Finding(f"{what}gradient error {own:.2f} (eager {other:.2f})")
        return "near"


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collect the operators of the forward calls that run in NVFP4 in this thread, as they come.

    What a checkpoint recomputes in backward is left out: it is the same layer again.
    """
    calls: list[str] = []

    def told(call: observe.Call) -> None:
        if call.recipe is not None and not in_backward():
            calls.append(call.op)

    with observe.observe(told):
        yield calls


def in_words(error: BaseException, most: int = 160) -> str:
    """Return an error's class and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".strip()[:most]


def answer(check: Check, trial: Trial) -> Cell:
    """Run a check; whatever it raises becomes its cell."""
    try:
        return check(trial)
    except NotHere as reason:
        return Cell(None, str(reason))
    except Finding as found:
        return Cell(False, str(found))
    except Exception as error:  # the model's code, torch's and this library's run here
        return Cell(False, in_words(error))


def plainly(run: Callable[[], Any], what: str) -> Any:
    """Run what plain torch must be able to do before NVFP4 is asked for it.

    Raises:
        NotHere: It raised.
    """
    try:
        return run()
    except Exception as error:
        raise NotHere(f"{what}: {in_words(error)}") from error
