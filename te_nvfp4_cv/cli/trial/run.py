"""All checks of one model: the row that they make, as text, as plain data and as a line of a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from te_nvfp4_cv.cli.trial import exported, files, programs, training
from te_nvfp4_cv.cli.trial.cells import Cell, Check, Trial, answer, in_words
from te_nvfp4_cv.cli.trial.subject import Subject
from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.report.text import aligned


def _onnx(trial: Trial) -> Cell:
    return exported.onnx(trial, files.trained(trial).loaded)


# By the name of their column, in the order in which they run: the first ones give the others what they compare with.
CHECKS: dict[str, Check] = {
    "step": training.runs,
    "share": training.share,
    "gradient": training.gradient,
    "compile": programs.compiled,
    "checkpoint": programs.checkpointed,
    "both": programs.compiled_checkpointed,
    "save": files.saved,
    "lists": files.listed,
    "onnx": _onnx,
    "fuse": programs.fused,
    "ema": programs.averaged,
    "channels_last": programs.channels_last,
}
MARKS = {True: "ok", False: "NO", None: "-"}


@dataclass
class Row:
    """The cells of one model by the names of their checks. Print it."""

    name: str
    parameters: int = 0
    seconds: float = 0.0
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Return True if no check found anything."""
        return all(cell.ok is not False for cell in self.cells.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [(name, MARKS[cell.ok], cell.text) for name, cell in self.cells.items()]
        failed = sum(cell.ok is False for cell in self.cells.values())
        last = f"{failed} of {len(self.cells)} checks failed" if failed else "no check failed"
        head = f"{self.name}: {self.parameters:,} parameters"
        return "\n".join([head, *aligned(lines, left=2), f"{last}; {self.seconds:.0f} s"])


def try_model(
    subject: Subject,
    recipe: NVFP4BlockScaling | None = None,
    checks: Sequence[str] | None = None,
    watch: Callable[[Row, str], object] | None = None,
) -> Row:
    """Run the checks of one model.

    Args:
        recipe: the recipe to try; if None, the default recipe.
        checks: names of CHECKS; if None, all.
        watch: called before each check with the row so far and the check's name.
    Raises:
        ValueError: a check of an unknown name.
        Exception: whatever the model raises in plain torch: then there is nothing to compare with.
    """
    unknown = [name for name in checks or () if name not in CHECKS]
    if unknown:
        raise value_error("try: no such check.", got=", ".join(unknown), needs=", ".join(CHECKS), fix="leave it out")
    start = time.perf_counter()
    trial = Trial(subject, recipe or NVFP4BlockScaling())
    row = Row(subject.name, sum(p.numel() for p in trial.base.parameters()))
    _ = trial.high  # its errors are the user's to read
    try:
        _ = trial.calls
    except Exception as error:  # without a step there is nothing to check
        row.cells["step"] = Cell(False, in_words(error))
        checks = ()
    for name in CHECKS if checks is None else [name for name in CHECKS if name in checks]:
        if watch is not None:
            watch(row, name)
        row.cells[name] = answer(CHECKS[name], trial)
    row.seconds = round(time.perf_counter() - start, 1)
    return row
