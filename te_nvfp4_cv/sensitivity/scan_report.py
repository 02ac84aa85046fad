"""Hold the result of a scan: a ranked table, a [precision] table within a budget, a recipe file.

    size  of a change: the gradient's relative error if gradients were compared, else the root mean square of the loss
          changes of the batches (their mean would be small for changes that go up and down)
    score = size(alone)                              how much this layer does by itself
    score = size(all) - size(without)                how much less all layers do without it
    score = the mean of the two, in mode "both";     infinite if one of them is not a number

A [precision] table holds the layers to leave in high precision: the worst first, as long as they fit into the budget,
a share of the FLOPs of the layers that could run in NVFP4. Layers with a score of 0 or less never belong to it.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from te_nvfp4_cv.errors import message, need_package, value_error
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe
from te_nvfp4_cv.recipe.files import save_recipe
from te_nvfp4_cv.report.budget import check_share, worst_within
from te_nvfp4_cv.report.text import aligned, number, plain
from te_nvfp4_cv.sensitivity.scan_page import Bar, page

Table = dict[str, NVFP4BlockScaling | None]


@dataclass(frozen=True)
class Change:
    """The difference that a configuration makes, against high precision.

    Attributes:
        loss: the change of the loss, as the mean over the batches.
        loss_rms: its root mean square over the batches.
        standard_error: the standard error of the mean; None for a single batch.
        gradient_error: the gradient's relative error, as the mean over the batches; None if not asked for.
        gradient_cosine: the cosine between both gradients, likewise.
    """

    loss: float
    loss_rms: float
    standard_error: float | None = None
    gradient_error: float | None = None
    gradient_cosine: float | None = None

    @property
    def size(self) -> float:
        """Return the number by which layers are ranked."""
        return self.loss_rms if self.gradient_error is None else self.gradient_error


@dataclass(frozen=True)
class LayerScan:
    """The measurements of one layer; its name is "" if the model itself is the layer."""

    name: str
    op: str
    kernel: tuple[int, ...]
    flops: int
    alone: Change | None
    without: Change | None


def _gain(everything: float, without: float) -> float:
    """Return what taking one layer out of NVFP4 improves; 0 if the loss is still no number without it."""
    if not math.isfinite(without):
        return 0.0
    return everything - without if math.isfinite(everything) else math.inf


@dataclass(frozen=True)
class Scan:
    """The result of nv.sensitivity.scan; `str()` gives the ranked table.

    Attributes:
        rows: the layers in the order in which they ran.
        loss: the loss in high precision, as the mean over the batches.
        everything: the change with all layers in NVFP4.
        batches: the number of batches.
        flops: the FLOPs of all convolutions and linear layers, also of those that cannot run in NVFP4.
        recipe_used: the recipe that was measured, without a [precision] table.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16))
        >>> found = nv.sensitivity.scan(model, lambda model, x: model(x).square().mean(), [torch.randn(16, 32)])
        >>> len(found.suggest(count=1))  # the worse of the two layers, to be left in high precision
        1
    """

    rows: list[LayerScan]
    loss: float
    everything: Change
    batches: int
    flops: int
    recipe_used: NVFP4BlockScaling

    def score(self, row: LayerScan) -> float:
        """Return how much a layer suffers: by what it does alone, by what all layers do less without it, or by both."""
        parts = []
        if row.alone is not None:
            parts.append(row.alone.size)
        if row.without is not None:
            parts.append(_gain(self.everything.size, row.without.size))
        value = sum(parts) / len(parts)  # at least one: every mode measures something
        # A layer whose figures are NaN is the worst that there is; NaN would also spoil the sort.
        return math.inf if math.isnan(value) else value

    def ranked(self) -> list[LayerScan]:
        """Return the layers, the worst first."""
        return sorted(self.rows, key=self.score, reverse=True)

    def suggest(self, budget: float | None = None, count: int | None = None) -> Table:
        """Return a table for set_precision that leaves the worst layers in high precision.

        Args:
            budget: the share of the scanned layers' FLOPs to leave in high precision, by default 0.1; a layer that does
                not fit any more is passed over.
            count: the number of layers to leave in high precision, instead of a budget.
        Raises:
            ValueError: both are given, or a value is out of range.
        """
        return self._table(self._worst(budget, count))

    def _worst(self, budget: float | None, count: int | None) -> list[LayerScan]:
        rows = self.ranked()
        # With a count every layer costs 1, so that both limits are one loop.
        costs = [1 if count is not None else row.flops for row in rows]
        chosen = worst_within([self.score(row) for row in rows], costs, self._budget(budget, count))
        return [rows[index] for index in chosen]

    def _budget(self, budget: float | None, count: int | None) -> float:
        if budget is not None and count is not None:
            raise value_error(
                "scan: budget and count contradict each other.",
                got=f"budget={budget!r}, count={count!r}", needs="one of the two", fix="leave one out"
            )
        if count is not None:
            # True and False are integers in Python, and surely a mistake here.
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise value_error("scan: bad count.", got=repr(count), needs="an integer >= 0", fix="count=3")
            return count
        share = check_share("scan", "budget", 0.1 if budget is None else budget)
        return share * sum(row.flops for row in self.rows)

    def _table(self, chosen: list[LayerScan]) -> Table:
        """Build the table. An entry covers a module's children, so those that stay in NVFP4 get entries too."""
        names = {row.name for row in chosen}
        table: dict[str, NVFP4BlockScaling | None] = dict.fromkeys(names, None)
        for row in self.rows:
            # A dot after the name: "layer1" is not above "layer10".
            if row.name not in names and any(not name or row.name.startswith(f"{name}.") for name in names):
                table[row.name] = self.recipe_used
        # The last match wins: a module comes before its children, in the order in which they ran.
        order = sorted(table, key=lambda name: (name.count(".") + bool(name), self._place(name)))
        # Names are taken literally: one with brackets would be a pattern otherwise.
        return {glob.escape(name): table[name] for name in order}

    def _place(self, name: str) -> int:
        return next(index for index, row in enumerate(self.rows) if row.name == name)

    def recipe(self, base: Any = None, budget: float | None = None, count: int | None = None) -> NVFP4BlockScaling:
        """Return `base`, or the recipe that was scanned, with the table of `suggest` as its [precision] table."""
        chosen = self.recipe_used if base is None else as_recipe(base)
        return dataclasses.replace(chosen, precision=tuple(self.suggest(budget, count).items()))

    def save(
        self,
        path: str | os.PathLike[str],
        base: Any = None,
        budget: float | None = None,
        count: int | None = None,
        overwrite: bool = False,
    ) -> NVFP4BlockScaling:
        """Write `recipe(base, budget, count)` as a file that nv.load_recipe reads, and return it.

        Raises:
            FileExistsError: the file is there, and overwrite is False.
            OSError: the file cannot be written.
        """
        return write_recipe(self.recipe(base, budget, count), path, overwrite)

    def to_dict(self) -> dict[str, Any]:
        """Return the scan as dicts, lists, strings and numbers, with the layers ranked; null for what is not finite."""
        return {
            "layers": [plain(dataclasses.asdict(row)) | {"score": plain(self.score(row))} for row in self.ranked()],
            "loss": plain(self.loss),
            "all layers": plain(dataclasses.asdict(self.everything)),
            "batches": self.batches,
            "flops": self.flops,
            "recipe": repr(self.recipe_used),
        }

    def to_dataframe(self) -> Any:
        """Return the layers as a pandas.DataFrame: one row per layer, the worst first, one column per figure.

        Columns are op, kernel, flops, score, and for each configuration that was measured "alone ..." and "without ..."
        with the fields of Change. The index holds the layers' names.

        Raises:
            RuntimeError: pandas is not installed.
        """
        fix = "pip install pandas, or use to_dict()"
        need_package("pandas", "scan: no DataFrame.", needs="the package pandas", fix=fix)
        import pandas

        rows = []
        for row in self.ranked():
            cells: dict[str, Any] = {"op": row.op, "kernel": row.kernel, "flops": row.flops, "score": self.score(row)}
            for name, change in (("alone", row.alone), ("without", row.without)):
                if change is not None:
                    cells |= {f"{name} {field}": value for field, value in dataclasses.asdict(change).items()}
            rows.append(cells)
        return pandas.DataFrame(rows, index=pandas.Index([row.name for row in self.ranked()], name="layer"))

    def to_html(self, title: str = "scan", budget: float = 0.1) -> str:
        """Return a page with the ranked table and pictures, which needs no script and no network.

        Args:
            title: what was scanned.
            budget: the share of the FLOPs whose worst layers are marked, as `suggest` takes it.
        """
        own, spared = sum(row.flops for row in self.rows), {row.name for row in self._worst(budget, None)}
        bars = [
            Bar(row.name or "(the model)", row.op, self.score(row), row.flops / own if own else 0.0, row.name in spared)
            for row in self.rows
        ]
        return page(title, bars, self._summary())

    def __str__(self) -> str:
        own = sum(row.flops for row in self.rows)
        rows = [("layer", "op", "kernel", "FLOPs", *_titles("alone"), *_titles("without"), "score", "")]
        for row in self.ranked():
            share = f"{row.flops / own:.1%}" if own else ""  # of the scanned layers, as budgets are counted
            kernel = "x".join(map(str, row.kernel))
            cells = (*_cells(row.alone), *_cells(row.without), number(self.score(row), ".3g"), "")
            rows.append((row.name or "(the model)", row.op, kernel, share, *cells))
        last = len(rows[0]) - 1
        # A mode or a single batch leaves columns empty; those are not shown.
        shown = [column for column in range(last + 1) if column == last or any(row[column] for row in rows[1:])]
        lines = aligned([[row[column] for column in shown] for row in rows], left=3)
        return "\n".join([*lines, *self._summary()])

    def _summary(self) -> list[str]:
        loss, error = number(self.everything.loss, "+.3g"), self.everything.gradient_error
        gradient = "" if error is None else f", gradient error {error:.3g}"
        return [
            f"all layers in NVFP4: loss {loss}{gradient}; high precision: loss {self.loss:.6g}",
            f"{self.batches} batches, recipe {self.recipe_used!r}",
        ]


def _titles(name: str) -> tuple[str, ...]:
    return name, "+-", "gradient error", "cosine"


def _cells(change: Change | None) -> tuple[str, ...]:
    if change is None:
        return ("",) * 4
    return (
        number(change.loss, "+.3g"), number(change.standard_error, ".1g"), number(change.gradient_error, ".3g"),
        number(change.gradient_cosine, ".4f"),
    )


def write_recipe(recipe: NVFP4BlockScaling, path: str | os.PathLike[str], overwrite: bool) -> NVFP4BlockScaling:
    """Write a recipe file; replace one only if `overwrite` is True.

    Raises:
        FileExistsError: the file is there, and overwrite is False.
        OSError: the file cannot be written.
    """
    if Path(path).exists() and not overwrite:
        # Python's own class for this, with the text in our form.
        text = message(
            "recipe file: not written, the file exists.",
            got=str(path), needs="a path where no file is", fix="overwrite=True, or another path"
        )
        raise FileExistsError(text)
    save_recipe(recipe, path)
    return recipe
