"""layer.weight_codes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from te_nvfp4_cv.layer.plan import Plan


class Frozen(Protocol):
    """What nv.frozen_weights registers here for each Parameter."""

    def codes(self, w: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        """The tuple of faces.quantize_weight with every face that the plan's GEMMs need."""
        ...


frozen: dict[int, Frozen] = {}  # id(Parameter) -> its entry, which holds the Parameter: ids stay unique


def codes_of(w: Tensor, plan: Plan) -> tuple[Tensor, ...] | None:
    """The codes with which `w` was gathered (FSDP2), or that an enclosing nv.frozen_weights holds for it, or None."""
    gathered = getattr(type(w), "codes_for", None)  # a weight that FSDP2 gathered in 4 bits: distributed/fsdp_weight.py
    if gathered is not None:
        return gathered(w, plan)
    entry = frozen.get(id(w)) if frozen else None
    return None if entry is None else entry.codes(w, plan)
