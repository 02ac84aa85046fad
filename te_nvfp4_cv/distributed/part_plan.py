"""PartPlan: how a rank quantizes the part of an operand that it holds, for other ranks too."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from te_nvfp4_cv.backend.answers import answer
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.records import PACKED, Fold


@dataclass(frozen=True)
class PartPlan(Plan):
    """The plan by which a rank quantizes what it holds of x and dy: packed, because codes travel.

    `here` are the folds of these parts.
    """

    here: tuple[Fold, Fold]

    @classmethod
    def of(cls, plan: Plan, here: tuple[Fold, Fold], **more: Any) -> Self:
        """Return the plan of a call as one of its parts'; `more` are the fields of a subclass."""
        return cls(**{field.name: getattr(plan, field.name) for field in fields(Plan)}, here=here, **more)

    @answer
    def folds(self) -> tuple[Fold, Fold]:
        """The folds of this rank's x and dy."""
        return self.here

    @answer
    def operand_form(self) -> int:
        """PACKED."""
        return PACKED
