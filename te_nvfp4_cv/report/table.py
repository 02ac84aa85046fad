"""Hold the coverage report: rows of layers and their totals, as a table for people and as a dict for programs.

nvfp4_flops_share = (FLOPs of the GEMMs that run in NVFP4) / (FLOPs of all three GEMMs of all layers that ran)

watch.py fills it in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from te_nvfp4_cv.report.text import aligned


@dataclass
class Layer:
    """One row of the report: a layer, with all of its calls that ran in the same way.

    Attributes:
        name: path of the module that owns the weight, followed by the Parameter's name unless that is `weight`.
        op: conv2d, linear, ...; for layers that nvfp4_autocast never sees, the name of their class.
        kernel: shape of the weight.
        nvfp4: whether the layer runs in NVFP4.
        reason: why it does not.
        note: anything else that one should know.
        calls: how often the layer ran in the forward pass.
        padding_waste: share of the quantized elements of x and dy that are padding.
        saved_bytes: what autograd saves for backward because of this layer, and of no layer before it.
        flops: FLOPs of fprop, dgrad and wgrad together.
        nvfp4_flops: those of them that run in NVFP4.
    """

    name: str
    op: str
    kernel: tuple[int, ...]
    nvfp4: bool
    reason: str = ""
    note: str = ""
    calls: int = 1
    padding_waste: float = 0.0
    saved_bytes: int = 0
    flops: int = 0
    nvfp4_flops: int = 0


@dataclass
class Coverage:
    """The result of nv.coverage; `str()` gives a table, `to_dict()` plain data.

    Attributes:
        rows: the layers in the order in which they ran, then those that did not run.
        saved_bytes: all that autograd saves for backward, without parameters, buffers and the inputs.
        relu_mask_bytes: the part of saved_bytes that ReLU's 1-bit masks take.
        recipe: the recipe's repr.
    """

    rows: list[Layer] = field(default_factory=list)
    saved_bytes: int = 0
    relu_mask_bytes: int = 0
    recipe: str = ""

    @property
    def nvfp4_flops_share(self) -> float:
        """Return the share of FLOPs that run in NVFP4, from 0 to 1; 0 for a model without layers."""
        total = sum(row.flops for row in self.rows)
        return sum(row.nvfp4_flops for row in self.rows) / total if total else 0.0

    @property
    def nvfp4_layers(self) -> int:
        """Count the rows that run in NVFP4."""
        return sum(row.nvfp4 for row in self.rows)

    @property
    def high_precision_layers(self) -> int:
        """Count the rows that do not."""
        return len(self.rows) - self.nvfp4_layers

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers."""
        return {
            "layers": [dataclasses.asdict(row) | {"kernel": list(row.kernel)} for row in self.rows],
            "saved_bytes": self.saved_bytes,
            "relu_mask_bytes": self.relu_mask_bytes,
            "nvfp4_flops_share": self.nvfp4_flops_share,
            "nvfp4_layers": self.nvfp4_layers,
            "high_precision_layers": self.high_precision_layers,
            "recipe": self.recipe,
        }

    def __str__(self) -> str:
        titles = ("layer", "op", "kernel", "precision", "calls", "GFLOP", "padding", "saved for backward", "")
        lines = aligned([titles, *(_cells(row) for row in self.rows)], left=4)
        lines.append(
            f"{self.nvfp4_layers} of {len(self.rows)} layers and {self.nvfp4_flops_share:.1%} of the FLOPs in NVFP4; "
            f"autograd saves {_bytes(self.saved_bytes)} for backward, {_bytes(self.relu_mask_bytes)} of it ReLU masks"
        )
        lines.append(f"recipe: {self.recipe}")
        return "\n".join(lines)


def _cells(row: Layer) -> tuple[str, ...]:
    return (
        row.name,
        row.op,
        "x".join(map(str, row.kernel)),
        "nvfp4" if row.nvfp4 else "high",
        str(row.calls),
        f"{row.flops / 1e9:.3f}",
        f"{row.padding_waste:.0%}" if row.nvfp4 else "",  # only quantized operands are padded
        _bytes(row.saved_bytes),
        "; ".join(text for text in (row.reason, row.note) if text),
    )


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
