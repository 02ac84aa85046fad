"""The operands of one call: each is quantized once, into the faces that the call's GEMMs need."""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv.backend.dispatch import runs_directly
from te_nvfp4_cv.errors import warn_once
from te_nvfp4_cv.formats import BLOCK, E2M1_MAX, dequantize
from te_nvfp4_cv.layer.check import torch_func_is_on
from te_nvfp4_cv.layer.options import ALONE, CallOptions
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.block_scales import INTEGER, TENSOR_AMAX
from te_nvfp4_cv.ops.conv import integer
from te_nvfp4_cv.ops.quantize import amax as amaxes
from te_nvfp4_cv.ops.quantize import grouped, operand, rounding_seeds
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    NONE,
    PACKED,
    RECORD,
    RECORDS,
    Alpha,
    Face,
    Move,
    Operand,
    OperandSpec,
    WeightCodes,
)
from te_nvfp4_cv.recipe.fields import Role


def quantize_input(x: Tensor, plan: Plan, need_dw: bool, options: CallOptions = ALONE) -> Operand | None:
    """Quantize x: a rowwise face for fprop, and a packed columnwise one for wgrad.

    Returns None if neither GEMM runs in NVFP4.
    """
    return _quantize(Role.INPUT, x, plan.input_specs[need_dw], plan, options)


def quantize_gradient(
    dy: Tensor, plan: Plan, need_dx: bool, need_dw: bool, options: CallOptions = ALONE
) -> Operand | None:
    """Quantize dy: a rowwise face for dgrad, a columnwise one for wgrad, or None if neither GEMM runs in NVFP4."""
    spec = plan.gradient_specs[need_dx, need_dw]
    made = _quantize(Role.GRAD_OUTPUT, dy, spec, plan, options)
    if made is not None and plan.recipe.block_format != "nvfp4":
        form, face = (spec.row, made.row) if spec.row != NONE else (spec.col, made.col)
        _warn_if_lost(dy, form, face, plan.recipe.block_format)
    return made


def _warn_if_lost(dy: Tensor, form: int, face: Face, block_format: str) -> None:
    """Warn once where a format without a tensor scale turns a gradient into zeros; not on a GPU, which would wait."""
    if dy.device.type != "cpu" or not runs_directly(dy):  # fake tensors hold no values that could be looked at
        return
    kept = face.scale if form == PACKED else face.data
    kept = kept.unflatten(-1, (-1, RECORD))[..., BLOCK:] if form == RECORDS else kept  # the scales behind the codes
    if kept.any() or not dy.any():
        return
    warn_once(
        f"lost gradients {block_format}",
        f"block_format={block_format!r}: a gradient whose largest value is {dy.abs().max().item():.1e} became zeros, "
        "since this format has no tensor scale. Multiply the loss by a power of two, such as 2**20, and divide the "
        "gradients by it before the optimizer's step (docs/RECIPES.md, Other FP4 formats).",
    )


def _quantize(role: Role, x: Tensor, spec: OperandSpec, plan: Plan, options: CallOptions) -> Operand | None:
    if spec.row == NONE and spec.col == NONE:
        return None
    seed, amax, scales = None, None, options.scales
    if spec.stochastic:
        seed = rounding_seeds.draw_seed(x)
        seed = seed if options.ranks is None else options.ranks.seed(seed)
    if scales is not None:
        amax = scales.amax(role, x)
    # Without an amax from them the operand's own is used, and there is nothing to remember.
    collector = None if scales is None or amax is None else scales.collector(role)
    if options.ranks is not None:
        options.ranks.begin(role, x, spec, amax)
    if options.experts is None:
        made = operand.quantize_operand(x, spec, plan.compute_dtype, seed, amax, plan.backend, collector)
    else:
        how = (plan.compute_dtype, seed, amax, plan.backend, collector)
        made = grouped.quantize_operand(x, options.experts, spec, *how)
    if options.watch is not None:
        options.watch.quantized(role, x, made, seed, plan, options.experts)
    return made


def quantize_weight(w: Tensor, plan: Plan, for_dgrad: bool, amax: Tensor | None = None) -> WeightCodes:
    """Quantize w into the packed faces that the recipe's GEMMs need.

    Args:
        for_dgrad: make dgrad's face, too.
        amax: fp32 [1], of a weight that w is a part of; if None, w's amax is used.
    """
    spec, w = plan.weight_specs[for_dgrad], w.detach()
    if plan.expert_scales:
        return operand.quantize_experts(w, spec, plan.compute_dtype, plan.backend)
    return operand.quantize_weight(_matrix(w, plan), spec, plan.compute_dtype, plan.backend, amax)


def _matrix(w: Tensor, plan: Plan) -> Tensor:
    """Return a weight as its operators take it: those of all experts [E, O, C] as that of E groups, [E * O, C]."""
    return w.reshape(-1, w.shape[-1]) if plan.geometry.routed else w


def measure_weight(w: Tensor, plan: Plan, move: Move | None) -> Tensor | None:
    """Measure w's amax, and move delayed scales in the same launch; where no kernels serve, move and return None."""
    if operand.serves_directly(w, plan.backend) and not plan.expert_scales:
        return operand.measure_weight(w.detach(), plan.weight_specs[0], plan.backend, move)
    if move is not None:
        amaxes.move(*move, clear=True)
    return None


def quantize_measured_weight(
    w: Tensor, plan: Plan, for_dgrad: bool, amax: Tensor, x_amax: Tensor | None
) -> tuple[WeightCodes, Face | None]:
    """Quantize w with the amax of measure_weight; with x's amax also unpack it for fprop, if one launch does both."""
    spec, dtype = plan.measured_weight_specs[for_dgrad], plan.compute_dtype
    w = _matrix(w.detach(), plan)
    if x_amax is None or plan.operand_form != DEQUANTIZED or not spec.two_d:
        return operand.quantize_weight(w, spec, dtype, plan.backend, amax), None
    number = plan.alpha_factors["fprop"]
    factor = Alpha(x_amax, amax, number) if plan.weight_carries_scales["fprop"] else None
    codes, values = operand.quantize_weight_for(w, spec, dtype, plan.backend, amax, factor)
    return codes, Face(values, values.new_empty(0))


def weight_values(codes: WeightCodes, plan: Plan, factor: Tensor | None = None) -> Tensor:
    """Return code * scale of fprop's face, [axis 0, taps, axis 1] fp32, times `factor`, fp32 [1].

    Without a factor the values are exact, in bf16 too.
    """
    name = plan.weight_faces[0]
    face, layout = codes.face(name), plan.weight_layouts[name]
    if torch_func_is_on():  # whatever is made in there has no address; an operator's implementation gets what is inside
        return operand.unpack_weight_op(*face, [*map(int, layout)], factor, torch.float32, plan.backend)
    return operand.unpack_weight(face, layout, factor, torch.float32, plan.backend)


def weight_panels(codes: WeightCodes, plan: Plan) -> Tensor:
    """Return fprop's face as the integer kernels read it, uint8 in one axis: 0.375 of the weight's bytes in fp32."""
    geometry = plan.geometry
    kernels = integer.PRODUCTS.get(plan.recipe.block_format + INTEGER, integer)
    panels = kernels.panels(codes.face(plan.weight_faces[0]), geometry, to_b=not geometry.transposed)
    # Copied, because they come in memory that the next call uses again. One axis has one memory format only.
    return panels.flatten().clone()


def real_weight(codes: WeightCodes, plan: Plan) -> Tensor:
    """Return w [axis 0, axis 1, *kernel] in real units, fp32: code * scale, which is exact, times the tensor scale."""
    n, _, channels = plan.geometry.weight_shape
    scale = codes.amax * (1.0 / (E2M1_MAX * plan.weight.e4m3_max))
    if plan.expert_scales:
        w = weight_values(codes, plan) * scale.repeat_interleave(n // scale.numel()).view(-1, 1, 1)
    else:
        w = weight_values(codes, plan, scale)
    if plan.geometry.routed:
        return w.view(plan.geometry.groups, -1, channels)
    # [axis 0, taps, axis 1] -> [axis 0, axis 1, *kernel]
    return w.view(n, *plan.geometry.kernel, channels).movedim(-1, 1)


def dequantized_weight(w: Tensor, plan: Plan) -> Tensor:
    """Return w [axis 0, axis 1, *kernel] quantized for fprop and dequantized again, fp32."""
    return real_weight(quantize_weight(w, plan, for_dgrad=False), plan)


def real_input(face: Face, amax: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Return x [B, *image, C] in real units from its packed rowwise face, in TransformerEngine's order of sums."""
    g = plan.geometry
    if plan.recipe.block_format != "nvfp4":
        values = operand.unpack_rows(face, g.x_shape[-1], g.groups, torch.float32, plan.backend)
        return (values * (amax * (1.0 / TENSOR_AMAX))).to(dtype)
    return real_rows(face, amax, plan.input.e4m3_max, (g.row_groups, g.x_shape[-1] // g.row_groups)).to(dtype)


def real_rows(face: Face, amax: Tensor, e4m3_max: int, channels: tuple[int, int]) -> Tensor:
    """Return x or dy [B, *image, channels] in real units, fp32, from its packed rowwise face.

    Args:
        channels: groups, and channels of a group.
    """
    values = dequantize(face.data, face.scale.view(torch.float8_e4m3fn), amax.flatten(), e4m3_max)
    # The rest of each group's last block is padding.
    return values.unflatten(-1, (channels[0], -1))[..., : channels[1]].flatten(-2)
