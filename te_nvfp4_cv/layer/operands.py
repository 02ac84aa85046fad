"""The operands of one call: each quantized once into the faces that its GEMMs need, and what of them backward keeps.

A face is a quantized operand laid out for one GEMM: the blocks of a rowwise one run along its rows, those of a
columnwise one along its columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv.layer.plan import Plan, Scales, Watch
from te_nvfp4_cv.ops.quantize import operand as operands
from te_nvfp4_cv.ops.quantize import rounding_seeds
from te_nvfp4_cv.ops.quantize.operand import NONE, PACKED

# ---- quantize -------------------------------------------------------------------------------------------------------


def quantize_input(
    x: Tensor, plan: Plan, need_dw: bool, scales: Scales | None = None, watch: Watch | None = None
) -> tuple[Tensor, ...]:
    """x's faces: rowwise for fprop, columnwise packed for wgrad, with its own amaxes or those of `scales`."""
    dequantize_later = plan.recipe.backward_override == "dequantized" and need_dw
    row = NONE if "fprop" not in plan.gemms else PACKED if dequantize_later else plan.operand_form
    col = PACKED if "wgrad" in plan.gemms and need_dw else NONE
    return _quantize(x, 0, plan, row, col, scales, watch)


def quantize_gradient(
    dy: Tensor,
    plan: Plan,
    need_dx: bool,
    need_dw: bool,
    scales: Scales | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, ...]:
    """dy's faces: rowwise for dgrad, columnwise for wgrad; both are used at once, in the form that the backend
    multiplies. With its own amaxes or those of `scales`.
    """
    row = plan.operand_form if "dgrad" in plan.gemms and need_dx else NONE
    col = plan.operand_form if "wgrad" in plan.gemms and need_dw else NONE
    return _quantize(dy, 1, plan, row, col, scales, watch)


def _quantize(
    operand: Tensor, role: int, plan: Plan, row: int, col: int, scales: Scales | None, watch: Watch | None
) -> tuple[Tensor, ...]:
    """The faces of x (role 0) or dy (role 1) in the forms `row` and `col`; none where neither is wanted."""
    if row == NONE and col == NONE:
        return ()
    name = ("input", "grad_output")[role]
    s = plan.recipe.settings(name)
    seed = rounding_seeds.draw_seed(operand) if s.stochastic_rounding else None
    faces = operands.quantize_operand(
        operand,
        plan.geometry.groups,
        plan.folds[role].to_ints(),
        row,
        col,
        s.rht,
        s.stochastic_rounding,
        s.four_over_six or "",
        s.e4m3_max,
        role == 0 and plan.row_scaled,
        plan.compute_dtype,
        seed,
        None if scales is None else scales.amax(role, operand),
        plan.backend,
    )
    if scales is not None:
        scales.collect(role, faces[6])
    if watch is not None:
        watch.quantized(name, operand, faces, seed, plan)
    return faces


def quantize_weight(w: Tensor, plan: Plan, keep: bool, amax: Tensor | None = None) -> tuple[Tensor, ...]:
    """w packed: (row data, row scale, col data, col scale, amax), the faces that the recipe's GEMMs need.

    Args:
        keep: dgrad will need its face.
        amax: fp32 [1], of a weight that w is a part of; None: w's own.
    """
    s = plan.recipe.settings("weight")
    faces = {plan.weight_faces[0]} | ({plan.weight_faces[1]} if keep else set())
    row, col = (PACKED if face in faces else NONE for face in ("row", "col"))
    return operands.quantize_weight(
        w.detach(),
        plan.geometry.groups,
        row,
        col,
        s.two_d,
        s.four_over_six or "",
        s.e4m3_max,
        plan.delayed,
        plan.compute_dtype,
        plan.backend,
        amax,
    )


def dequantized_weight(w: Tensor, plan: Plan) -> Tensor:
    """w [axis 0, axis 1, *kernel] quantized for fprop and dequantized, fp32."""
    return real_weight(quantize_weight(w, plan, keep=False), plan)


def weight_values(w_q: tuple[Tensor, ...], plan: Plan, factor: Tensor | None = None) -> Tensor:
    """code * scale of fprop's face, [axis 0, taps, axis 1] fp32: exact, in bf16 too; then times `factor`, fp32 [1]."""
    face = plan.weight_faces[0]
    data, scale = (w_q[0], w_q[1]) if face == "row" else (w_q[2], w_q[3])
    n, _, channels = plan.geometry.weight_shape
    return operands.unpack_weight(
        data, scale, n, channels, plan.geometry.groups, face == "col", factor, torch.float32, plan.backend
    )


def real_weight(w_q: tuple[Tensor, ...], plan: Plan) -> Tensor:
    """w [axis 0, axis 1, *kernel] in real units, fp32: code * scale is exact, times the tensor scale."""
    w = weight_values(w_q, plan, w_q[4] * (1.0 / (6.0 * plan.recipe.settings("weight").e4m3_max)))
    n, _, channels = plan.geometry.weight_shape
    return w.view(n, *plan.geometry.kernel, channels).movedim(-1, 1)


def weight_operand(
    w_q: tuple[Tensor, ...], face: str, plan: Plan, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One packed face in the form that the backend multiplies: (data, scale); a dequantized one times `factor`."""
    data, scale = (w_q[0], w_q[1]) if face == "row" else (w_q[2], w_q[3])
    if plan.operand_form == PACKED:
        return data, scale
    n, _, channels = plan.geometry.weight_shape
    out = operands.unpack_weight(
        data, scale, n, channels, plan.geometry.groups, face == "col", factor, plan.compute_dtype, plan.backend
    )
    return out, scale.new_empty(0)


# ---- what backward keeps --------------------------------------------------------------------------------------------








