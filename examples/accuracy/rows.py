"""Keep the rows of finished runs: one JSON object a line, appended by several processes.

    appending:  under a lock; a line that a killed process left unfinished is removed first
    reading:    without a lock; an unfinished last line counts as not written
    collecting: rows of many files in one file, each run once
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.files import write_atomically

KEYS = ("task", "size", "compute", "epochs", "variant", "seed")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """Name one run; the fields are KEYS."""

    task: str
    size: str
    compute: str
    epochs: int
    variant: str
    seed: int

    @classmethod
    def of(cls, row: Row) -> Arm:
        """Return the arm whose run the row holds."""
        return cls(*(row[key] for key in KEYS))

    @property
    def file_name(self) -> str:
        """The arm as a file name without an ending."""
        words = "_".join(map(str, astuple(self)))
        return "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in words)

    def to_row(self) -> dict[str, Any]:
        """Return the first fields of the arm's row."""
        return dict(zip(KEYS, astuple(self), strict=True))


def read_rows(paths: Iterable[Path]) -> dict[Arm, dict[str, Any]]:
    """Read results files; where a run occurs twice, the last line counts. A missing file has no rows.

    Raises:
        ValueError: If a line is not a run of this study.
    """
    found: dict[Arm, dict[str, Any]] = {}
    for path in paths:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                break  # unfinished; only the last line can be
            try:
                row = json.loads(line)
                found[Arm.of(row)] = row
            except (ValueError, KeyError, TypeError) as error:
                raise value_error(
                    f"{path}, line {number}: not a run of this study.",
                    got=f"{line[:80]!r}: {error}",
                    needs="a line that study.py wrote",
                    fix="remove the line, or choose another file",
                ) from error
    return found


def append_row(path: Path, row: Row) -> None:
    """Append one line and wait until the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def collect(sources: Sequence[Path], target: Path) -> tuple[int, int]:
    """Add the rows of the sources to the target. Returns how many rows the target has, and how many are new."""
    before = read_rows([target])
    rows = read_rows([target, *sources])
    text = "".join(json.dumps(row) + "\n" for row in rows.values())
    write_atomically(target, text.encode())
    return len(rows), len(rows) - len(before)
