"""Text in columns for people, and numbers as JSON knows them: what every report prints and writes.

JSON has neither NaN nor infinity, so both are written as null.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the rows as lines of equal columns: the first `left` columns flush left, the others flush right.

    The last column is appended as it is, because it often holds a sentence.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            # Not strict: a row has one cell more than there are widths.
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines


def number(value: float | None, form: str = ".4g") -> str:
    """Format a number; None gives an empty cell."""
    return "" if value is None else format(value, form)


def plain(value: Any) -> Any:
    """Convert a value to dicts, lists, strings and finite numbers, which JSON can hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
