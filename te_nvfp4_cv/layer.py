"""One quantized layer, forward and backward, as two functions on plain tensors: what eager autograd and the compiled
operator share.

    forward    x, w, bias -> y, and by name what backward needs
    backward   dy and those -> dx, dw, db

The steps are those of faces.py and multiply.py; autocast is off while they run. x itself is kept only where the recipe
wants a GEMM in high precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from te_nvfp4_cv import faces, multiply
from te_nvfp4_cv.gathered import GatheredWeight
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.plan import Plan, Watch
from te_nvfp4_cv.producer import Producer
from te_nvfp4_cv.scaling import CallScales


@dataclass(frozen=True)
class Like:
    """What dx, dw and db look like: shapes, dtypes, memory formats of x, w and bias."""

    x_shape: tuple[int, ...]
    x_dtype: torch.dtype
    x_channels_last: bool
    w_shape: tuple[int, ...]
    w_dtype: torch.dtype
    w_channels_last: bool
    bias_dtype: torch.dtype | None

    @classmethod
    def of(cls, x: Tensor, w: Tensor, bias: Tensor | None) -> Like:
        """Of the tensors of one call."""
        return cls(
            tuple(x.shape),
            x.dtype,
            layouts.is_channels_last(x),
            tuple(w.shape),
            w.dtype,
            layouts.weight_is_channels_last(w),
            None if bias is None else bias.dtype,
        )


# ---- weights quantized once, for gradient accumulation --------------------------------------------------------------


class Frozen(Protocol):
    """What nv.frozen_weights registers here for each Parameter."""

    def codes(self, w: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        """The tuple of faces.quantize_weight with every face that the plan's GEMMs need."""
        ...


frozen: dict[int, Frozen] = {}  # id(Parameter) -> its entry, which holds the Parameter: ids stay unique


def codes_of(w: Tensor, plan: Plan) -> tuple[Tensor, ...] | None:
    """The codes with which `w` was gathered (FSDP2), or that an enclosing nv.frozen_weights holds for it, or None."""
    if isinstance(w, GatheredWeight):
        return w.codes_for(plan)
    entry = frozen.get(id(w)) if frozen else None
    return None if entry is None else entry.codes(w, plan)


# ---- forward and backward -------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    plan: Plan,
    need_dx: bool,
    need_dw: bool,
    codes: tuple[Tensor, ...] | None = None,
    scales: CallScales | None = None,
    producer: Producer | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(y with the strides that torch would give it, kept tensors by name).

    Args:
        codes: of w, made before (quantize_weight), or None.
        scales: which amaxes x is quantized with; None: its own.
        producer: makes the operand of an x that was not written; None: x is there.
        watch: is shown every operand.
    """
    with torch.autocast(x.device.type, enabled=False):
        x_last, x_q, w_q = quantize(x, w, plan, need_dx, need_dw, codes, scales, producer, watch)
        y = multiply.fprop(x_last, x_q, w, w_q, bias, plan)
        kept = keep(x, x_q, w, w_q, plan, need_dx, need_dw)
        return layouts.image_first(y, plan.geometry.y_shape, x.shape, plan.channels_last), kept


def quantize(
    x: Tensor,
    w: Tensor,
    plan: Plan,
    need_dx: bool,
    need_dw: bool,
    codes: tuple[Tensor, ...] | None = None,
    scales: CallScales | None = None,
    producer: Producer | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """(x with channels innermost, its faces, w's codes or None where no GEMM needs them)."""
    if producer is not None:
        x_last, x_q = x, producer.quantize(plan, need_dw, scales)  # later steps read x's shape alone
    else:
        x_last = layouts.image_last(x, plan.geometry.x_shape)
        x_q = faces.quantize_input(x_last, plan, need_dw, scales, watch)
    for_dgrad = need_dx and ("dgrad" in plan.gemms or plan.recipe.backward_override == "dequantized")
    if "fprop" not in plan.gemms and not for_dgrad:
        return x_last, x_q, None
    w_q = codes if codes is not None else faces.quantize_weight(w, plan, keep=need_dx)
    if watch is not None:
        watch.quantized("weight", w, w_q, None, plan)
    return x_last, x_q, w_q


def keep(
    x: Tensor,
    x_q: tuple[Tensor, ...],
    w: Tensor,
    w_q: tuple[Tensor, ...] | None,
    plan: Plan,
    need_dx: bool,
    need_dw: bool,
) -> dict[str, Tensor]:
    """What backward needs, by the names of names_of_x and names_of_w."""
    return {**faces.kept_of_x(x, x_q, plan, need_dw), **faces.kept_of_w(w, w_q, plan, need_dx)}


def names_of_x(plan: Plan, need_dw: bool) -> list[str]:
    """The names of what `keep` keeps of x, in its order."""
    if not need_dw:
        return []
    if "wgrad" not in plan.gemms:
        dequantized = plan.recipe.backward_override == "dequantized"
        return ["x_row", "x_row_scale", "x_row_amax"] if dequantized else ["x"]
    return ["x_col", "x_col_scale", "x_col_amax"]


def names_of_w(plan: Plan, need_dx: bool) -> list[str]:
    """The names of what `keep` keeps of w, in its order."""
    if not need_dx:
        return []
    if "dgrad" not in plan.gemms and plan.recipe.backward_override != "dequantized":
        return ["w"]
    face = plan.weight_faces[1 if "dgrad" in plan.gemms else 0]
    return [f"w_{face}", f"w_{face}_scale", "w_amax"]


def backward(
    dy: Tensor,
    kept: dict[str, Tensor],
    plan: Plan,
    like: Like,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    scales: Any = None,
    watch: Watch | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db), None where not needed."""
    with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
        g = plan.geometry
        dy_last = layouts.image_last(dy, g.y_shape)
        dy_q = faces.quantize_gradient(dy_last, plan, need_dx, need_dw, scales, watch)
        if scales is not None:
            scales.backward_ran()
        dx = dw = db = None
        if need_dx:
            dx = multiply.dgrad(dy_last, dy_q, kept, plan, like.x_dtype)
            dx = layouts.image_first(dx, g.x_shape, like.x_shape, like.x_channels_last)
        if need_dw:
            dw = multiply.wgrad(dy_last, dy_q, kept, plan, like.w_dtype)
            if watch is not None:
                watch.weight_gradient(dy_last, dw, plan)
            dw = layouts.kernel_as(dw, g, like.w_shape, like.w_channels_last)
        if need_db:
            db = dy_last.flatten(0, -2).sum(0, dtype=torch.float32).to(like.bias_dtype)
        return dx, dw, db
