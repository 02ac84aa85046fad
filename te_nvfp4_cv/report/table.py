"""The coverage report: rows of layers, their totals, a table and a dict. coverage.py fills it in.

nvfp4_flops_share = (FLOPs of the GEMMs that run in NVFP4) / (FLOPs of all three GEMMs of all layers that ran)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Layer:
    """One layer of the report; calls of a layer that went alike are one row.

    Attributes:
        name: path of the module that owns the weight, with the Parameter's name where that is not `weight`.
        op: conv2d, linear, ... ; the class name of layers that nvfp4_autocast never sees.
        kernel: shape of the weight.
        nvfp4: whether it runs in NVFP4; `reason` says why not, `note` what to know besides.
        calls: how often the layer ran in the forward pass.
        padding_waste: share of the quantized elements of x and dy that are padding.
        saved_bytes: what autograd keeps for backward because of this layer, and no layer before it.
        flops, nvfp4_flops: of fprop, dgrad and wgrad together; of those in NVFP4.
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
    """What nv.coverage found. `str()` gives a table, `to_dict()` plain data.

    Attributes:
        rows: the layers in the order in which they ran, then those that did not run.
        saved_bytes: all that autograd keeps for backward, without parameters, buffers and the inputs.
        relu_mask_bytes: the part of it that is ReLU's 1-bit masks.
        recipe: the recipe's repr.
    """

    rows: list[Layer] = field(default_factory=list)
    saved_bytes: int = 0
    relu_mask_bytes: int = 0
    recipe: str = ""

    @property
    def nvfp4_flops_share(self) -> float:
        """0 to 1; 0 for a model without layers."""
        total = sum(row.flops for row in self.rows)
        return sum(row.nvfp4_flops for row in self.rows) / total if total else 0.0

    @property
    def nvfp4_layers(self) -> int:
        """Number of rows that run in NVFP4."""
        return sum(row.nvfp4 for row in self.rows)

    @property
    def high_precision_layers(self) -> int:
        """Number of rows that do not."""
        return len(self.rows) - self.nvfp4_layers

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers."""
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
        titles = ("layer", "op", "kernel", "precision", "calls", "GFLOP", "padding", "kept for backward", "")
        table = [titles, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(titles) - 1)]
        left = (True, True, True, True, False, False, False, False)
        lines = []
        for line in table:
            cells = [
                cell.ljust(width) if to_left else cell.rjust(width)
                for cell, width, to_left in zip(line, widths, left, strict=False)
            ]
            lines.append("  ".join([*cells, line[-1]]).rstrip())
        lines.append(
            f"{self.nvfp4_layers} of {len(self.rows)} layers and {self.nvfp4_flops_share:.1%} of the FLOPs in NVFP4; "
            f"autograd keeps {_bytes(self.saved_bytes)} for backward, {_bytes(self.relu_mask_bytes)} of it ReLU masks"
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
        f"{row.padding_waste:.0%}" if row.nvfp4 else "",
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
