"""Hold the result of diagnose: what each replay of the step gave, what that says, and a recipe that avoids it.

high precision is not finite    the data, the weights or the optimizer are to blame, not NVFP4
NVFP4 is not finite             to blame are the GEMM and the layer that make it finite when they run in high precision
both are finite                 to blame are the GEMM and the layer without which the gradient comes nearest to that of
                                high precision
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
from dataclasses import dataclass, field
from typing import Any

from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.report.text import aligned, number, plain
from te_nvfp4_cv.sensitivity.scan_report import Table, write_recipe
from te_nvfp4_cv.sensitivity.trace import Finding


@dataclass(frozen=True)
class Replay:
    """One replay of the step.

    Attributes:
        loss: the loss.
        gradient_norm: the norm of the whole gradient.
        finite: whether the loss and all gradients are finite.
        gradient_error: relative error against high precision's gradient; None if either of the two is not finite.
        gradient_cosine: cosine of the angle to that gradient, or None likewise.
        forward: where the first value that is not finite appeared in the forward pass.
        backward: where it appeared in the backward pass. Only the two main replays are watched.
    """

    loss: float
    gradient_norm: float
    finite: bool
    gradient_error: float | None = None
    gradient_cosine: float | None = None
    forward: Finding | None = None
    backward: Finding | None = None

    @property
    def first(self) -> Finding | None:
        """Return the first finding of the whole pass."""
        return self.forward or self.backward


@dataclass(frozen=True)
class Diagnosis:
    """The result of diagnose; `str()` gives the report.

    Attributes:
        step: the bundle's step.
        reason: why the bundle was saved.
        recorded_loss: the loss that the bundle recorded, or None.
        high: the step in high precision.
        nvfp4: the step with the bundle's recipe; None if it has none.
        gemms: the step with one GEMM of all layers in high precision: {"fprop": Replay, ...}.
        layers: the step with one layer in high precision, by the layer's name.
        recipe_used: the bundle's recipe.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> from te_nvfp4_cv.sensitivity.diagnosis import Replay
        >>> broken = Replay(loss=float("nan"), gradient_norm=float("nan"), finite=False)
        >>> nv.sensitivity.Diagnosis(step=12, reason="a spike", recorded_loss=None, high=broken).verdict()[:41]
        'High precision is itself not finite: the '
    """

    step: int
    reason: str
    recorded_loss: float | None
    high: Replay
    nvfp4: Replay | None = None
    gemms: dict[str, Replay] = field(default_factory=dict)
    layers: dict[str, Replay] = field(default_factory=dict)
    recipe_used: NVFP4BlockScaling | None = None

    @property
    def finite(self) -> bool:
        """Return whether loss and gradients are finite in both replays; values inside, such as masks, need not be."""
        return self.high.finite and (self.nvfp4 is None or self.nvfp4.finite)

    @property
    def worst_gemm(self) -> str | None:
        """Return the GEMM to blame; None if no single one is, or high precision is at fault."""
        return self._worst(self.gemms)

    @property
    def worst_layer(self) -> str | None:
        """Return the layer to blame; None if no single one is, or high precision is at fault."""
        return self._worst(self.layers)

    def _worst(self, changed: dict[str, Replay]) -> str | None:
        if self.nvfp4 is None or not self.high.finite:
            return None
        errors = {name: replay.gradient_error for name, replay in changed.items() if replay.finite}
        # With a NaN among the errors, the result of min() would depend on their order.
        known = {name: error for name, error in errors.items() if error is not None and not math.isnan(error)}
        best = min(known, key=lambda name: known[name]) if known else None
        # If NVFP4 is not finite, whatever makes it finite is better.
        now = self.nvfp4.gradient_error if self.nvfp4.finite else math.inf
        return best if best is not None and now is not None and known[best] < now else None

    def suggest(self) -> Table:
        """Return a table for set_precision with the worst layer in high precision, or the worst GEMM of all layers.

        The GEMM is chosen if no layer helps. The table continues the recipe's own [precision] table, whose entries stay
        as they are. It is empty if high precision is at fault, or nothing helps.
        """
        # The replays ran with this table in force, so a suggestion without it would not be what was measured.
        own = {} if self.recipe_used is None else dict(self.recipe_used.precision)
        # A recipe that stands in a table has no table of its own.
        rest = None if self.recipe_used is None else dataclasses.replace(self.recipe_used, precision=())
        if self.worst_layer is not None:
            pattern = glob.escape(self.worst_layer)  # a model that is itself the layer has the name ""
            own.pop(pattern, None)  # the last match wins, so the entry must come after the others
            # An entry covers a module's children: those that were in NVFP4 when this was measured get their own.
            prefix = f"{self.worst_layer}." if self.worst_layer else ""
            below = [name for name in self.layers if name != self.worst_layer and name.startswith(prefix)]
            stays = {glob.escape(name): own.get(glob.escape(name), rest) for name in below}
            return {**own, pattern: None, **stays}
        if self.worst_gemm is not None and rest is not None:
            # Layers in high precision stay there; every other entry loses the GEMM, too, since the last match rules.
            everywhere = without_gemm(rest, self.worst_gemm)
            changed = {pattern: None if r is None else without_gemm(r, self.worst_gemm) for pattern, r in own.items()}
            return {"*": everywhere, **changed}
        return {}

    def recipe(self) -> NVFP4BlockScaling | None:
        """Return the bundle's recipe with the table of `suggest`; None if there is no recipe or no table."""
        table = self.suggest()
        if not table or self.recipe_used is None:
            return None
        return dataclasses.replace(self.recipe_used, precision=tuple(table.items()))

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> NVFP4BlockScaling | None:
        """Write `recipe()` as a file that nv.load_recipe reads, and return it; without a recipe write nothing.

        Raises:
            FileExistsError: the file is there, and overwrite is False.
            OSError: the file cannot be written.
        """
        recipe = self.recipe()
        return None if recipe is None else write_recipe(recipe, path, overwrite)

    def verdict(self) -> str:
        """Say in a few sentences what the replays mean."""
        if not self.high.finite:
            where = self.high.first
            return (
                "High precision is itself not finite: the data, the weights or the optimizer are at fault, not NVFP4."
                + (f"\nFirst: {where}." if where is not None else "\nFirst: the loss function, after the model.")
                + " Look at the batch, the learning rate and the steps before."
            )
        if self.nvfp4 is None:
            return "High precision is finite; the bundle has no NVFP4 recipe to compare with."
        gemm, layer = self.worst_gemm, self.worst_layer
        if not self.nvfp4.finite:
            where = self.nvfp4.first
            text = f"NVFP4 is not finite, high precision is. First: {where or 'the loss function, after the model'}."
            helps = [f"the GEMM {gemm} of all layers"] if gemm else []
            # None is no layer, "" is the model itself.
            helps += [f"the layer {layer or '(the model)'!r}"] if layer is not None else []
            return text + (
                f"\nFinite again with {' or with '.join(helps)} in high precision."
                if helps
                else "\nNo single layer or GEMM in high precision makes it finite: take several out, or the whole step."
            )
        if gemm is None and layer is None:
            return "Both are finite, and no single layer or GEMM in high precision brings the gradient nearer."
        names = [f"GEMM {gemm}"] if gemm else []
        names += [f"layer {layer or '(the model)'!r}"] if layer is not None else []
        return f"Both are finite. Most of NVFP4's gradient error comes from: {', '.join(names)}."

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as dicts, lists, strings and numbers; null for what is not finite or absent."""
        # As a recipe file writes its [precision] table: only what differs from the default recipe.
        table = {pattern: "high" if r is None else r.deviations() for pattern, r in self.suggest().items()}
        return {
            "step": self.step,
            "reason": self.reason,
            "recorded_loss": plain(self.recorded_loss),
            "finite": self.finite,
            "verdict": self.verdict(),
            "high_precision": _dict(self.high),
            "nvfp4": None if self.nvfp4 is None else _dict(self.nvfp4),
            "gemms_in_high_precision": {name: _dict(replay) for name, replay in self.gemms.items()},
            "layers_in_high_precision": {name: _dict(replay) for name, replay in self.layers.items()},
            "worst_gemm": self.worst_gemm,
            "worst_layer": self.worst_layer,
            "precision": plain(table),
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("in high precision", "loss", "gradient norm", "gradient error", "cosine", "first not finite")
        ]
        rows.append(_cells("everything", self.high))
        if self.nvfp4 is not None:
            rows.append(_cells("nothing (the recipe)", self.nvfp4))
        rows += [_cells(f"GEMM {name}", replay) for name, replay in self.gemms.items()]
        # The layer to blame comes first: without it the gradient is nearest.
        ordered = sorted(self.layers.items(), key=lambda item: _rank(item[1]))
        rows += [_cells(name or "(the model)", replay) for name, replay in ordered]
        lines = [f"step {self.step}: {self.reason}", "", self.verdict(), "", *aligned(rows)]
        if self.recorded_loss is not None:
            lines.append(f"recorded loss: {self.recorded_loss!r}")
        for pattern, recipe in self.suggest().items():
            lines.append(f"[precision] {pattern!r} = {'high' if recipe is None else recipe!r}")
        return "\n".join(lines)


def without_gemm(recipe: NVFP4BlockScaling, gemm: str) -> NVFP4BlockScaling:
    """Return the recipe with one more GEMM in high precision."""
    out = tuple(dict.fromkeys((*recipe.high_precision_gemms, gemm)))  # each once, in order
    return dataclasses.replace(recipe, high_precision_gemms=out)


def _rank(replay: Replay) -> float:
    error = replay.gradient_error
    return math.inf if error is None or math.isnan(error) or not replay.finite else error


def _dict(replay: Replay) -> dict[str, Any]:
    # asdict turns findings into dicts; a sentence says more.
    fields = plain(dataclasses.asdict(replay))
    return fields | {
        name: None if finding is None else str(finding)
        for name, finding in (("forward", replay.forward), ("backward", replay.backward))
    }


def _cells(name: str, replay: Replay) -> tuple[str, ...]:
    # "not finite" without a place: only the two main replays are watched.
    where = str(replay.first) if replay.first is not None else "" if replay.finite else "not finite"
    return (
        name, number(replay.loss, ".9g"), number(replay.gradient_norm), number(replay.gradient_error, ".3g"),
        number(replay.gradient_cosine, ".4f"), where,
    )
