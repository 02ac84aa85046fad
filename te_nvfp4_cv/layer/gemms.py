"""The three GEMMs of one call, each in NVFP4 or, where the recipe says so, in high precision."""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv.backend.dispatch import kernels_serve, runs_directly
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.conv import grouped
from te_nvfp4_cv.ops.conv.operators import conv_dgrad, conv_fprop, conv_wgrad
from te_nvfp4_cv.ops.conv.vendor import aten, convolution, convolution_backward
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.layouts import CHANNELS_LAST
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import DEQUANTIZED, RECORDS, Alpha, Face, Operand, WeightCodes, tensor_of


def fprop(
    x: Face,
    x_amax: Tensor,
    codes: WeightCodes,
    bias: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    unpacked: Tensor | Face | None = None,
    experts: Experts | None = None,
) -> Tensor:
    """Return y [B, *image, O] in `dtype`.

    Args:
        x: the rowwise face of x.
        x_amax: its amax [1], or one per pixel for row-scaled activations.
        unpacked: the weight as it is stored between calls: code * scale [axis 0, taps, axis 1], or the integer
            backend's panels (uint8). A form that the plan's backend does not multiply is left alone. Or a face of
            operands.quantize_measured_weight, which is multiplied as it is.
        experts: of a grouped linear layer, here and below.
    """
    g = plan.geometry
    if plan.operand_form == DEQUANTIZED and x.scale.numel():  # packed, because backward will dequantize it
        values = operand.unpack_rows(x, g.x_shape[-1], g.row_groups, plan.compute_dtype, plan.backend)
        x = Face(values, x.scale.new_empty(0))
    if plan.row_scaled:
        # Each output row of these 1x1 convolutions reads one row of x: [B, *image of x] -> [B, *image of y, 1].
        steps = tuple(slice(None, None, stride) for stride in g.stride)
        x_amax = x_amax[(slice(None), *steps)].unsqueeze(-1) + _non_finite(x_amax)
    alpha: Tensor | Alpha | None = _alpha(x_amax, codes.amax, plan, "fprop")
    factor, alpha = (alpha, None) if plan.weight_carries_scales["fprop"] else (None, alpha)
    if isinstance(unpacked, Face):
        weight = unpacked
    elif unpacked is not None and plan.operand_form == DEQUANTIZED and unpacked.dtype != torch.uint8:
        # A power of two: exact.
        number = tensor_of(factor)
        values = unpacked if number is None else unpacked * number
        # An empty scale marks a face of values, which needs no unpacking.
        weight = Face(values.to(plan.compute_dtype), x.scale.new_empty(0))
    elif unpacked is not None and plan.operand_form == RECORDS and unpacked.dtype == torch.uint8:
        weight = Face(unpacked, x.scale.new_empty(0))  # the kernels' panels
    else:
        name = plan.weight_faces[0]
        weight = _weight_operand(codes.row if name == "row" else codes.col, name, plan, factor)
    if experts is not None:
        return grouped.fprop(x, weight, alpha, bias, experts, g, dtype, plan.backend)
    return conv_fprop(x, weight, alpha, bias, g, dtype, plan.backend)


def unpack_for_backward(
    dy_q: Operand, codes: WeightCodes, x: Face, x_amax: Tensor | None, plan: Plan
) -> tuple[Face | None, Face]:
    """Return the weight for dgrad and x for wgrad, unpacked, if one launch does both; else None and the packed x."""
    name, face = plan.saves_w, codes.row
    if plan.operand_form != DEQUANTIZED or name != "row" or not plan.weight.two_d or plan.row_scaled:
        return None, x
    if not (operand.serves_directly(face.data, plan.backend) and x.data.numel()):
        return None, x
    assert x_amax is not None
    w_factor = x_factor = None
    if plan.weight_carries_scales["dgrad"]:
        w_factor = Alpha(dy_q.row_amax, codes.amax, plan.alpha_factors["dgrad"])
    if plan.input_carries_scales:
        x_factor = Alpha(dy_q.col_amax, x_amax, plan.alpha_factors["wgrad"])
    layout = plan.weight_layouts[name]
    values = operand.unpack_for_backward(face, layout, w_factor, x, x_factor, plan.compute_dtype)
    empty = x.scale.new_empty(0)  # an empty scale marks a face of values
    return Face(values[0], empty), Face(values[1], empty)


def dgrad(
    dy: Face,
    dy_amax: Tensor,
    codes: WeightCodes,
    plan: Plan,
    dtype: torch.dtype,
    weight: Face | None = None,
    experts: Experts | None = None,
) -> Tensor:
    """Return dx [B, *image, C] in `dtype` from dy's rowwise face, its amax [1], and the weight's codes.

    Args:
        weight: of unpack_for_backward, if that has unpacked it.
    """
    alpha: Tensor | Alpha | None = _alpha(dy_amax, codes.amax, plan, "dgrad")
    factor, alpha = (alpha, None) if plan.weight_carries_scales["dgrad"] else (None, alpha)
    if weight is None:
        name = plan.saves_w
        weight = _weight_operand(codes.row if name == "row" else codes.col, name, plan, factor)
    if experts is not None:
        return grouped.dgrad(dy, weight, alpha, experts, plan.geometry, dtype, plan.backend)
    return conv_dgrad(dy, weight, alpha, plan.geometry, dtype, plan.backend)


def wgrad(
    dy: Face,
    dy_amax: Tensor,
    x: Face,
    x_amax: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    experts: Experts | None = None,
) -> Tensor:
    """Return dw [axis 0, taps, axis 1] in `dtype` from the columnwise faces and amaxes of dy and x.

    Args:
        x: packed, as it was saved, or unpacked by unpack_for_backward.
        x_amax: [1], or one per channel for row-scaled activations.
    """
    assert x_amax is not None
    x_amax = x_amax + _non_finite(x_amax) if plan.row_scaled else x_amax
    alpha: Tensor | Alpha | None = _alpha(dy_amax, x_amax, plan, "wgrad")
    if plan.operand_form == DEQUANTIZED:
        factor, alpha = (alpha, None) if isinstance(alpha, Alpha) and plan.input_carries_scales else (None, alpha)
        if x.scale.numel():
            x = Face(operand.unpack_columns(x, plan.compute_dtype, plan.backend, factor), x.scale.new_empty(0))
    if experts is not None:
        return grouped.wgrad(dy, x, alpha, experts, plan.geometry, dtype, plan.backend)
    return conv_wgrad(dy, x, alpha, plan.geometry, dtype, plan.backend)


def _alpha(a: Tensor, b: Tensor, plan: Plan, gemm: str) -> Tensor | Alpha:
    """Return the factor of a GEMM's result from the amaxes of its operands."""
    number = plan.alpha_factors[gemm]
    # Two launches less, where the kernels that use it take its parts.
    if plan.backend == "vendor" and not plan.row_scaled and kernels_serve(a.device) and runs_directly(a):
        return Alpha(a, b, number)
    # Not in place: a selective checkpoint may keep the first product, and refuses what was written to since.
    return torch.mul(a, b) * number


def _weight_operand(face: Face, name: str, plan: Plan, factor: Tensor | Alpha | None = None) -> Face:
    """Return one packed face, "row" or "col", in the form that the backend multiplies.

    Args:
        factor: fp32 [1], or None: multiplies a dequantized face.
    """
    if plan.operand_form != DEQUANTIZED:
        return face
    values = operand.unpack_weight(face, plan.weight_layouts[name], factor, plan.compute_dtype, plan.backend)
    return Face(values, face.scale.new_empty(0))


def _non_finite(amax: Tensor) -> Tensor:
    """Return 0, or NaN where the amax of one row is not finite: it must reach every output of the GEMM."""
    return (amax * 0).sum()


# ---- in high precision ----------------------------------------------------------------------------------------------


def plain_fprop(
    x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry, experts: Experts | None = None
) -> Tensor:
    """Return y [B, *image, O] of x [B, *image, C] and w in torch's layout, in x's dtype."""
    w, bias = w.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if experts is not None:
        y = x.new_zeros(g.y_shape)
        for rows in experts.rows:
            own = None if bias is None else bias[rows.expert]
            y[rows.here] = aten.linear(x[rows.here], w[rows.expert], own)
        return y
    if g.rank == 0:
        return aten.linear(x, w, bias)
    # Inside of the layer channels come last, in torch's operators second: the views turn one into the other.
    y = convolution(x.movedim(-1, 1), w, bias, g)
    return y.movedim(1, -1).contiguous().to(x.dtype)


def plain_dgrad(
    dy: Tensor, w: Tensor, plan: Plan, dtype: torch.dtype, experts: Experts | None = None
) -> Tensor:
    """Return dx [B, *image, C] of dy and a weight in torch's layout, multiplied in `dtype`."""
    if experts is not None:
        w, dx = w.to(dtype), dy.new_zeros(plan.geometry.x_shape, dtype=dtype)
        for rows in experts.rows:
            dx[rows.here] = dy[rows.here].to(dtype) @ w[rows.expert]
        return dx
    return _plain_backward(dy, None, w.to(dtype), plan.geometry)[0]


def plain_wgrad(dy: Tensor, x: Tensor, plan: Plan, experts: Experts | None = None) -> Tensor:
    """Return dw [axis 0, taps, axis 1] of dy and x [B, *image, channels] as they are."""
    if experts is not None:
        dw = dy.new_zeros(experts.number, dy.shape[-1], x.shape[-1])
        for rows in experts.rows:
            dw[rows.expert] = dy[rows.here].t() @ x[rows.here]
        return dw.view(plan.geometry.weight_shape)
    return _plain_backward(dy, x, None, plan.geometry)[1]


def plain_layer(
    x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """Return y of x as torch's layer takes it (batched), computed in `dtype` by torch's operator, in x's dtype."""
    bias = None if bias is None else bias.to(dtype)
    if g.rank == 0:
        return aten.linear(x.to(dtype), w.to(dtype), bias).to(x.dtype)
    if not channels_last:
        w = w.reshape(-1).view(w.shape)  # one operand with strides of channels_last would make torch convert the other
    sizes = (g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups)
    y = aten.convolution(x.to(dtype), w.to(dtype), bias, *sizes).to(x.dtype)
    return y.contiguous(memory_format=CHANNELS_LAST[g.rank]) if channels_last else y.contiguous()


def _plain_backward(dy: Tensor, x: Tensor | None, w: Tensor | None, g: ConvGeometry) -> tuple[Tensor, Tensor]:
    """Return (dx [B, *image, C], dw [axis 0, taps, axis 1]); only the one whose operand is given is computed."""
    empty = dy.new_empty(0)
    if g.rank == 0:
        dx = empty if w is None else dy @ w.reshape(g.channels_b, g.channels_a)
        # [O, C] -> [O, 1, C]: a linear layer has one tap.
        return dx, (empty if x is None else (dy.t() @ x).unsqueeze(1))
    # ATen wants both operands, but reads only the shape of the one whose values the wanted gradient does not need.
    x_first = dy.new_empty(g.x_shape).movedim(-1, 1) if x is None else x.movedim(-1, 1)
    w_first = dy.new_empty((g.channels_b, *g.kernel, g.channels_a // g.groups)).movedim(-1, 1) if w is None else w
    mask = [w is not None, x is not None, False]
    dx, dw, _ = convolution_backward(dy.movedim(-1, 1), x_first, w_first, g, mask)
    return (
        empty if w is None else dx.movedim(1, -1).contiguous().to(dy.dtype),
        empty if x is None else dw.movedim(1, -1).contiguous().view(g.weight_shape),
    )
