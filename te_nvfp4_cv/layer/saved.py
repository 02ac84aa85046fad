"""layer.saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.layer import saved
from te_nvfp4_cv.layer.operands import real_weight
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops import layouts


def kept_of_x(x: Tensor, x_q: tuple[Tensor, ...], plan: Plan, need_dw: bool) -> dict[str, Tensor]:
    """Tensors by name: the packed columnwise face; or x itself, or its packed rowwise face, where the recipe wants
    wgrad otherwise.
    """
    if not need_dw:
        return {}
    if "wgrad" not in plan.gemms:
        if plan.recipe.backward_override == "dequantized":
            return {"x_row": x_q[0], "x_row_scale": x_q[1], "x_row_amax": x_q[2]}
        return {"x": x}
    return {"x_col": x_q[3], "x_col_scale": x_q[4], "x_col_amax": x_q[5]}


def kept_of_w(w: Tensor, w_q: tuple[Tensor, ...] | None, plan: Plan, need_dx: bool) -> dict[str, Tensor]:
    """Tensors by name: the packed face that dgrad multiplies, or w itself."""
    if not need_dx:
        return {}
    if "dgrad" not in plan.gemms and plan.recipe.backward_override != "dequantized":
        return {"w": w}
    assert w_q is not None
    face = plan.weight_faces[1 if "dgrad" in plan.gemms else 0]
    data, scale = (w_q[0], w_q[1]) if face == "row" else (w_q[2], w_q[3])
    return {f"w_{face}": data, f"w_{face}_scale": scale, "w_amax": w_q[4]}


def input_from_kept(kept: dict[str, Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    """x in real units from its packed rowwise face, in TransformerEngine's order of operations."""
    amax = kept["x_row_amax"]
    values = formats.dequantize(
        kept["x_row"],
        kept["x_row_scale"].view(torch.float8_e4m3fn),
        amax.flatten(),
        plan.recipe.settings("input").e4m3_max,
    )
    channels = plan.geometry.x_shape[-1] // plan.geometry.groups
    return values.to(dtype).unflatten(-1, (plan.geometry.groups, -1))[..., :channels].flatten(-2)


def weight_from_kept(kept: dict[str, Tensor], plan: Plan) -> Tensor:
    """real_weight of what kept_of_w keeps."""
    names = ("w_row", "w_row_scale", "w_col", "w_col_scale", "w_amax")
    return real_weight(tuple(kept.get(name) for name in names), plan)  # type: ignore[misc]


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
    return {**saved.kept_of_x(x, x_q, plan, need_dw), **saved.kept_of_w(w, w_q, plan, need_dx)}


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
