"""Hold and print what the verifier found in an exported file: a report with one row per layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from te_nvfp4_cv.report.text import aligned

SHOWN = 20  # tensors that are listed one by one
HEAD = ("layer", "kind", "claimed", "precision", "shape", "bytes", "bits", "blocks along", "scales", "activations")


@dataclass
class Row:
    """One layer of a file.

    Attributes:
        kind: the operator, or "layer" if it is not known.
        claimed: the precision that the file says.
        precision: the precision that the bytes of the weight have.
        shape: the shape of the weight as stored; for NVFP4, of the matrix [N, K] of its values.
        count: how many values the weight has.
        bytes: the size of codes and scales, or of the plain weight.
        axis: the direction in which the blocks of 16 run, in words.
        scales: the smallest and the largest block scale, as stored.
        activations: for an ONNX graph, how the layer's input is quantized.
        problems: every reason why the claim does not hold.
        notes: remarks that break no claim.
    """

    name: str
    kind: str
    claimed: str
    precision: str
    shape: tuple[int, ...]
    count: int
    bytes: int
    axis: str = ""
    scales: tuple[float, float] | None = None
    activations: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bits(self) -> float:
        """Return the bits per value."""
        return 8 * self.bytes / max(self.count, 1)


@dataclass
class Report:
    """All layers of a file, and what is wrong with the file itself.

    Attributes:
        notes: remarks on the file.
        unexplained: tensors with two axes or more that belong to no row, with dtype and shape.
    """

    source: str
    origin: str
    rows: list[Row]
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Tell whether every claim holds."""
        # Notes do not count: they remark on what no claim forbids.
        return not self.problems and not any(row.problems for row in self.rows)

    @property
    def recognized(self) -> bool:
        """Tell whether there is a layer to check, in a file that may well hold others in a format not known here."""
        return bool(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        rows = [asdict(row) | {"bits": round(row.bits, 3)} for row in self.rows]
        totals = {"layers": len(rows), "nvfp4": sum(row.precision == "nvfp4" for row in self.rows)}
        head = {"source": self.source, "origin": self.origin, "sound": self.sound, "problems": self.problems,
                "recognized": self.recognized, "notes": self.notes, "unexplained": self.unexplained}
        return {**head, **totals, "rows": rows}

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.origin})"]
        table = aligned([HEAD, *map(_cells, self.rows)], left=len(HEAD))
        for line, row in zip(table, [None, *self.rows], strict=True):  # None: the head has no problems
            lines.append(line)
            lines += [f"    PROBLEM: {problem}" for problem in (row.problems if row else ())]
            lines += [f"    note: {note}" for note in (row.notes if row else ())]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"not explained by any layer: {name}" for name in self.unexplained[:SHOWN]]
        if len(self.unexplained) > SHOWN:
            lines.append(f"not explained by any layer: {len(self.unexplained) - SHOWN} more; --json lists all")
        if not self.recognized and self.sound:
            return "\n".join([*lines, "Nothing recognized: no layer of a known format, so nothing was checked."])
        nvfp4 = [row for row in self.rows if row.precision == "nvfp4"]
        size, packed = sum(row.bytes for row in self.rows), sum(row.bytes for row in nvfp4)
        lines.append(
            f"{len(nvfp4)} of {len(self.rows)} layers are NVFP4; their weights take {packed / 1e6:.2f} of "
            f"{size / 1e6:.2f} MB. " + ("Every claim holds." if self.sound else "NOT what it claims to be.")
        )
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    scales = "" if row.scales is None else f"{row.scales[0]:.3g} .. {row.scales[1]:.3g}"
    shape = "x".join(map(str, row.shape))
    numbers = (shape, str(row.bytes), f"{row.bits:.2f}")
    return (row.name, row.kind, row.claimed, row.precision, *numbers, row.axis, scales, row.activations)
