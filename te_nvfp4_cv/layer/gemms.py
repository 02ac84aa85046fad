"""The three GEMMs of one call, each in NVFP4 or, where the recipe says so, in high precision."""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.layer.operands import weight_operand
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.layer.saved import input_from_kept, weight_from_kept
from te_nvfp4_cv.ops.conv import operators
from te_nvfp4_cv.ops.conv.vendor import aten, convolution, convolution_backward
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.layouts import CHANNELS_LAST, image_last
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.quantize.operand import DEQUANTIZED


def fprop(
    x: Tensor,
    x_q: tuple[Tensor, ...],
    w: Tensor | None,
    w_q: tuple[Tensor, ...] | None,
    bias: Tensor | None,
    plan: Plan,
    unpacked: Tensor | None = None,
) -> Tensor:
    """y [B, *image, O] in x's dtype.

    Args:
        unpacked: code * scale of the weight, [axis 0, taps, axis 1], where it is kept so between calls; else None.
    """
    g = plan.geometry
    if "fprop" not in plan.gemms:
        assert w is not None
        return plain_forward(x, w, bias, g)
    assert w_q is not None
    row, row_scale, amax = x_q[:3]
    if plan.operand_form == DEQUANTIZED and row_scale.numel():  # kept packed for backward_override="dequantized"
        row = operand.unpack_rows(row, row_scale, x.shape[-1], g.groups, plan.compute_dtype, plan.backend)
    if plan.row_scaled:
        steps = tuple(slice(None, None, stride) for stride in g.stride)
        amax = amax[(slice(None), *steps)].unsqueeze(-1) + _non_finite(amax)
    alpha = formats.alpha(amax, w_q[4], plan.recipe.settings("input").e4m3_max, plan.recipe.settings("weight").e4m3_max)
    factor, epilogue = (alpha, None) if plan.weight_carries_scales("fprop") else (None, alpha)
    if unpacked is not None and plan.operand_form == DEQUANTIZED:
        weight = unpacked if factor is None else unpacked * factor  # a power of two: exact
        weight, weight_scale = weight.to(plan.compute_dtype), row_scale.new_empty(0)
    else:
        weight, weight_scale = weight_operand(w_q, plan.weight_faces[0], plan, factor)
    return operators.conv_fprop(row, row_scale, weight, weight_scale, epilogue, bias, plan.shape, x.dtype, plan.backend)


def dgrad(dy: Tensor, dy_q: tuple[Tensor, ...], kept: dict[str, Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    """dx [B, *image, C]."""
    if "dgrad" not in plan.gemms:
        w = kept["w"] if "w" in kept else weight_from_kept(kept, plan)
        return _plain_backward(dy, None, w.to(dtype), plan.geometry)[0]
    w_q = (kept.get("w_row"), kept.get("w_row_scale"), kept.get("w_col"), kept.get("w_col_scale"))
    alpha = formats.alpha(
        dy_q[2], kept["w_amax"], plan.recipe.settings("grad_output").e4m3_max, plan.recipe.settings("weight").e4m3_max
    )
    factor, epilogue = (alpha, None) if plan.weight_carries_scales("dgrad") else (None, alpha)
    weight, weight_scale = weight_operand(w_q, plan.weight_faces[1], plan, factor)  # type: ignore[arg-type]
    return operators.conv_dgrad(dy_q[0], dy_q[1], weight, weight_scale, epilogue, plan.shape, dtype, plan.backend)


def wgrad(dy: Tensor, dy_q: tuple[Tensor, ...], kept: dict[str, Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    """dw [axis 0, taps, axis 1]."""
    if "wgrad" not in plan.gemms:
        x = image_last(kept["x"], plan.geometry.x_shape) if "x" in kept else input_from_kept(kept, plan, dy.dtype)
        return _plain_backward(dy, x, None, plan.geometry)[1].to(dtype)
    x, x_scale = kept["x_col"], kept["x_col_scale"]
    if plan.operand_form == DEQUANTIZED:
        x, x_scale = operand.unpack_columns(x, x_scale, plan.compute_dtype, plan.backend), x_scale.new_empty(0)
    amax = kept["x_col_amax"]
    alpha = formats.alpha(
        dy_q[5],
        amax + _non_finite(amax) if plan.row_scaled else amax,
        plan.recipe.settings("grad_output").e4m3_max,
        plan.recipe.settings("input").e4m3_max,
    )
    return operators.conv_wgrad(dy_q[3], dy_q[4], x, x_scale, alpha, plan.shape, dtype, plan.backend)


def _non_finite(amax: Tensor) -> Tensor:
    """0, or NaN where the amax of one row is not finite: it must reach every output of the GEMM."""
    return (amax * 0).sum()


def high_precision_wgrad(dy: Tensor, x: Tensor, plan: Plan) -> Tensor:
    """dw [axis 0, taps, axis 1] of dy and x [B, *image, channels] as they are: what wgrad is compared with."""
    return _plain_backward(dy, x, None, plan.geometry)[1]


# ---- in high precision ----------------------------------------------------------------------------------------------


def plain_forward(x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    """y [B, *image, O] of x [B, *image, C] and w in torch's layout, in x's dtype."""
    w, bias = w.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if g.rank == 0:
        return aten.linear(x, w, bias)
    y = convolution(x.movedim(-1, 1), w, bias, g)
    return y.movedim(1, -1).contiguous().to(x.dtype)


def plain_layer(
    x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """y of x as torch's layer takes it (batched), computed in `dtype`, given back in x's: torch's own call."""
    if g.rank == 0:
        return aten.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
    if not channels_last:
        w = w.reshape(-1).view(w.shape)  # one operand with strides of channels_last would make torch convert the other
    bias = None if bias is None else bias.to(dtype)
    sizes = (g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups)
    y = aten.convolution(x.to(dtype), w.to(dtype), bias, *sizes).to(x.dtype)
    return y.contiguous(memory_format=CHANNELS_LAST[g.rank]) if channels_last else y.contiguous()


def _plain_backward(dy: Tensor, x: Tensor | None, w: Tensor | None, g: ConvGeometry) -> tuple[Tensor, Tensor]:
    """(dx [B, *image, C], dw [axis 0, taps, axis 1]); only the one whose operand is given is computed."""
    empty = dy.new_empty(0)
    if g.rank == 0:
        dx = empty if w is None else dy @ w.reshape(g.channels_b, g.channels_a)
        return dx, (empty if x is None else (dy.t() @ x).unsqueeze(1))
    x_first = dy.new_empty(g.x_shape).movedim(-1, 1) if x is None else x.movedim(-1, 1)
    w_first = dy.new_empty((g.channels_b, *g.kernel, g.channels_a // g.groups)).movedim(-1, 1) if w is None else w
    mask = [w is not None, x is not None, False]
    dx, dw, _ = convolution_backward(dy.movedim(-1, 1), x_first, w_first, g, mask)
    return (
        empty if w is None else dx.movedim(1, -1).contiguous().to(dy.dtype),
        empty if x is None else dw.movedim(1, -1).contiguous().view(g.weight_shape),
    )
