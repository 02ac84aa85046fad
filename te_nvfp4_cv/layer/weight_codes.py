"""Codes of a weight that exist before a call: gathered by FSDP2, or quantized once under nv.frozen_weights."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.records import WeightCodes


class Frozen(Protocol):
    """The entry that nv.frozen_weights registers for each Parameter."""

    def codes(self, w: Tensor, plan: Plan) -> WeightCodes:
        """Return the weight's codes, with every face that the plan's GEMMs need."""


frozen: dict[int, Frozen] = {}  # id(Parameter) -> its entry, which holds the Parameter: ids stay unique


def codes_of(w: Tensor, plan: Plan) -> WeightCodes | None:
    """Return the codes that w was gathered with, or that an enclosing nv.frozen_weights holds for it, or None."""
    gathered = getattr(type(w), "codes_for", None)  # FSDP2's weight: distributed/fsdp_weight.py
    if gathered is not None:
        made: WeightCodes = gathered(w, plan)
        return made
    entry = frozen.get(id(w)) if frozen else None
    return None if entry is None else entry.codes(w, plan)
