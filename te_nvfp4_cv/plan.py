"""The steps of a quantized layer, forward and backward, for one Plan: lay out, quantize, multiply, keep.

    forward    x -> both faces in one pass; w -> codes; y = fprop; keep x's packed columnwise face and w's packed codes
    backward   dy -> both faces in one pass (stochastic rounding); dx = dgrad; dw = wgrad

Which GEMMs run in NVFP4 is the recipe's; the others run on the high-precision operands, which are then kept.
autograd.py strings these steps together; nothing here knows of autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.ops import conv
from te_nvfp4_cv.ops.conv import pixel
from te_nvfp4_cv.ops.conv.vendor import aten, convolution, convolution_backward
from te_nvfp4_cv.ops.geometry import ConvGeometry, Fold, reads_everywhere
from te_nvfp4_cv.ops.layouts import image_last
from te_nvfp4_cv.ops.quantize import operands, quantize, seeds
from te_nvfp4_cv.ops.quantize.operands import DEQUANTIZED, NONE, PACKED
from te_nvfp4_cv.recipe import NVFP4BlockScaling


@dataclass(frozen=True)
class Plan:
    """One call, checked: its shapes, its recipe, where it runs, and the dtype of dequantized operands."""

    geometry: ConvGeometry
    recipe: NVFP4BlockScaling
    backend: str
    compute_dtype: torch.dtype
    channels_last: bool

    @property
    def shape(self) -> list[int]:
        return self.geometry.to_ints()

    @property
    def folds(self) -> tuple[Fold, Fold]:
        """(x side, dy side)."""
        a, b = self.geometry.folds()
        return (b, a) if self.geometry.transposed else (a, b)

    @property
    def operand_form(self) -> int:
        """Form in which this backend multiplies."""
        return DEQUANTIZED if self.backend == "vendor" else PACKED

    @property
    def gemms(self) -> tuple[str, ...]:
        return self.recipe.nvfp4_gemms

    @property
    def delayed(self) -> bool:
        """Whether tensor scales are powers of two, those of activations and gradients from an earlier step."""
        return self.recipe.tensor_scale == "delayed"

    @property
    def row_scaled(self) -> bool:
        """Row-scaled activations apply to linear layers and 1x1 convolutions."""
        return self.recipe.settings("input").row_scaled and row_scaling_applies(self.geometry)

    @property
    def weight_faces(self) -> tuple[str, str]:
        """(face for fprop, face for dgrad): 16x16 scales make both the same numbers, kept rowwise."""
        if self.recipe.settings("weight").two_d:
            return "row", "row"
        return ("col", "row") if self.geometry.transposed else ("row", "col")

    def weight_carries_scales(self, gemm: str) -> bool:
        """Whether fprop's or dgrad's alpha, a power of two, goes into the dequantized weight: no pass over the result.

        Not where some output reads no operand at all: a NaN in the weight could not reach it.
        """
        to_b = (gemm == "fprop") != self.geometry.transposed
        return self.delayed and self.operand_form == DEQUANTIZED and reads_everywhere(self.geometry, to_b)


def row_scaling_applies(g: ConvGeometry) -> bool:
    """Whether every output row reads one input row."""
    return not g.transposed and g.taps == 1 and g.groups == 1 and not any(g.padding)


class Scales(Protocol):
    """What gives amaxes that are not the operand's own (scaling.py). role 0 is x, 1 is dy."""

    def amax(self, role: int, operand: Tensor) -> Tensor:
        """fp32 [2], as operands.quantize_operand takes it."""
        ...

    def collect(self, role: int, observed: Tensor) -> None:
        """What that call observed."""
        ...


# ---- quantize -------------------------------------------------------------------------------------------------------


class Watch(Protocol):
    """Who looks on while one call is quantized (telemetry). It must not change what it sees."""

    def quantized(self, role: str, operand: Tensor, faces: tuple[Tensor, ...], seed: Tensor | None, plan: Plan) -> None:
        """`operand`, in the layout of operands.py, has become `faces`; `seed` rounded it, if it was rounded so."""
        ...

    def weight_gradient(self, dy: Tensor, dw: Tensor, plan: Plan) -> None:
        """dy [B, *image, O] has led to dw [axis 0, taps, axis 1]."""
        ...


def quantize_input(
    x: Tensor, plan: Plan, need_dw: bool, scales: Scales | None = None, watch: Watch | None = None
) -> tuple[Tensor, ...]:
    """x's faces: rowwise for fprop, columnwise packed for wgrad, with its own amaxes or those of `scales`."""
    s = plan.recipe.settings("input")
    dequantize_later = plan.recipe.backward_override == "dequantized" and need_dw
    row = NONE if "fprop" not in plan.gemms else PACKED if dequantize_later else plan.operand_form
    batch_blocks = plan.recipe.wgrad_block == "batch"
    col = PACKED if "wgrad" in plan.gemms and need_dw and batch_blocks else NONE
    if row == NONE and col == NONE:
        return ()
    seed = seeds.draw_seed(x) if s.stochastic_rounding else None
    faces = operands.quantize_operand(
        x,
        plan.geometry.groups,
        plan.folds[0].to_ints(),
        row,
        col,
        s.rht,
        s.stochastic_rounding,
        s.four_over_six or "",
        s.e4m3_max,
        plan.row_scaled,
        plan.compute_dtype,
        seed,
        None if scales is None else scales.amax(0, x),
        plan.backend,
    )
    if scales is not None:
        scales.collect(0, faces[6])
    if watch is not None:
        watch.quantized("input", x, faces, seed, plan)
    return faces


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
    s = plan.recipe.settings("grad_output")
    row = plan.operand_form if "dgrad" in plan.gemms and need_dx else NONE
    col = plan.operand_form if "wgrad" in plan.gemms and need_dw and plan.recipe.wgrad_block == "batch" else NONE
    if row == NONE and col == NONE:
        return ()
    seed = seeds.draw_seed(dy) if s.stochastic_rounding else None
    faces = operands.quantize_operand(
        dy,
        plan.geometry.groups,
        plan.folds[1].to_ints(),
        row,
        col,
        s.rht,
        s.stochastic_rounding,
        "",
        s.e4m3_max,
        False,
        plan.compute_dtype,
        seed,
        None if scales is None else scales.amax(1, dy),
        plan.backend,
    )
    if scales is not None:
        scales.collect(1, faces[6])
    if watch is not None:
        watch.quantized("grad_output", dy, faces, seed, plan)
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
    return operands.quantize_kernel(
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
    row_data, row_scale, col_data, col_scale, amax = quantize_weight(w, plan, keep=False)
    kept = {"w_row": row_data, "w_row_scale": row_scale, "w_col": col_data, "w_col_scale": col_scale, "w_amax": amax}
    return _dequantized_weight(kept, plan)


def _weight_operand(
    w_q: tuple[Tensor, ...], face: str, plan: Plan, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One packed face in the form that the backend multiplies: (data, scale); a dequantized one times `factor`."""
    data, scale = (w_q[0], w_q[1]) if face == "row" else (w_q[2], w_q[3])
    if plan.operand_form == PACKED:
        return data, scale
    n, _, channels = plan.geometry.weight_shape
    out = operands.unpack_kernel(
        data, scale, n, channels, plan.geometry.groups, face == "col", factor, plan.compute_dtype, plan.backend
    )
    return out, scale.new_empty(0)


# ---- multiply -------------------------------------------------------------------------------------------------------


def fprop(
    x: Tensor, x_q: tuple[Tensor, ...], w: Tensor, w_q: tuple[Tensor, ...] | None, bias: Tensor | None, plan: Plan
) -> Tensor:
    """y [B, *image, O] in x's dtype."""
    g = plan.geometry
    if "fprop" not in plan.gemms:
        return _plain_forward(x, w, bias, g)
    assert w_q is not None
    row, row_scale, amax = x_q[:3]
    if plan.operand_form == DEQUANTIZED and row_scale.numel():  # kept packed for backward_override="dequantized"
        row = operands.unpack_rows(row, row_scale, x.shape[-1], g.groups, plan.compute_dtype, plan.backend)
    if plan.row_scaled:
        steps = tuple(slice(None, None, stride) for stride in g.stride)
        amax = amax[(slice(None), *steps)].unsqueeze(-1) + _non_finite(amax)
    alpha = formats.alpha(amax, w_q[4], plan.recipe.settings("input").e4m3_max, plan.recipe.settings("weight").e4m3_max)
    factor, epilogue = (alpha, None) if plan.weight_carries_scales("fprop") else (None, alpha)
    weight, weight_scale = _weight_operand(w_q, plan.weight_faces[0], plan, factor)
    return conv.conv_fprop(row, row_scale, weight, weight_scale, epilogue, bias, plan.shape, x.dtype, plan.backend)


def dgrad(dy: Tensor, dy_q: tuple[Tensor, ...], kept: dict[str, Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    """dx [B, *image, C]."""
    if "dgrad" not in plan.gemms:
        w = kept["w"] if "w" in kept else _dequantized_weight(kept, plan)
        return _plain_backward(dy, None, w.to(dtype), plan.geometry)[0]
    w_q = (kept.get("w_row"), kept.get("w_row_scale"), kept.get("w_col"), kept.get("w_col_scale"))
    alpha = formats.alpha(
        dy_q[2], kept["w_amax"], plan.recipe.settings("grad_output").e4m3_max, plan.recipe.settings("weight").e4m3_max
    )
    factor, epilogue = (alpha, None) if plan.weight_carries_scales("dgrad") else (None, alpha)
    weight, weight_scale = _weight_operand(w_q, plan.weight_faces[1], plan, factor)  # type: ignore[arg-type]
    return conv.conv_dgrad(dy_q[0], dy_q[1], weight, weight_scale, epilogue, plan.shape, dtype, plan.backend)


def wgrad(dy: Tensor, dy_q: tuple[Tensor, ...], kept: dict[str, Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    """dw [axis 0, taps, axis 1]."""
    if "wgrad" not in plan.gemms:
        x = image_last(kept["x"], plan.geometry.x_shape) if "x" in kept else _dequantized_input(kept, plan, dy.dtype)
        return _plain_backward(dy, x, None, plan.geometry)[1].to(dtype)
    if plan.recipe.wgrad_block == "pixel":
        return _pixel_wgrad(dy, kept, plan, dtype)
    x, x_scale = kept["x_col"], kept["x_col_scale"]
    if plan.operand_form == DEQUANTIZED:
        x, x_scale = operands.unpack_columns(x, x_scale, plan.compute_dtype, plan.backend), x_scale.new_empty(0)
    amax = kept["x_col_amax"]
    alpha = formats.alpha(
        dy_q[5],
        amax + _non_finite(amax) if plan.row_scaled else amax,
        plan.recipe.settings("grad_output").e4m3_max,
        plan.recipe.settings("input").e4m3_max,
    )
    return conv.conv_wgrad(dy_q[3], dy_q[4], x, x_scale, alpha, plan.shape, dtype, plan.backend)


def _non_finite(amax: Tensor) -> Tensor:
    """0, or NaN where the amax of one row is not finite: it must reach every output of the GEMM."""
    return (amax * 0).sum()


def _pixel_face(side: Tensor, plan: Plan, is_a: bool, role: str) -> tuple[Tensor, Tensor, Tensor]:
    s = plan.recipe.settings(role)
    seed = seeds.draw_seed(side) if s.stochastic_rounding else None
    faces = quantize(
        pixel.matrix(side, plan.geometry, is_a),
        rowwise=False,
        columnwise=True,
        rht=s.rht,
        stochastic_rounding=s.stochastic_rounding,
        four_over_six=s.four_over_six,
        e4m3_max=s.e4m3_max,
        seed=seed,
        backend=plan.backend,
    )
    return faces.col_data, faces.col_scale, faces.col_amax


def _pixel_wgrad(dy: Tensor, kept: dict[str, Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    transposed = plan.geometry.transposed
    dy_data, dy_scale, dy_amax = _pixel_face(dy, plan, transposed, "grad_output")
    of_x, of_dy = (kept["x_pixel"], kept["x_pixel_scale"]), (dy_data, dy_scale)
    b, a = (of_x, of_dy) if transposed else (of_dy, of_x)
    alpha = formats.alpha(
        dy_amax,
        kept["x_col_amax"],
        plan.recipe.settings("grad_output").e4m3_max,
        plan.recipe.settings("input").e4m3_max,
    )
    return pixel.wgrad(*b, *a, alpha, plan.geometry, dtype)


def high_precision_wgrad(dy: Tensor, x: Tensor, plan: Plan) -> Tensor:
    """dw [axis 0, taps, axis 1] of dy and x [B, *image, channels] as they are: what wgrad is compared with."""
    return _plain_backward(dy, x, None, plan.geometry)[1]


# ---- what backward keeps --------------------------------------------------------------------------------------------


def kept_of_x(x: Tensor, x_last: Tensor, x_q: tuple[Tensor, ...], plan: Plan, need_dw: bool) -> dict[str, Tensor]:
    """Tensors by name: the packed columnwise face; or x itself, or its packed rowwise face, where the recipe wants
    wgrad otherwise.
    """
    if not need_dw:
        return {}
    if "wgrad" not in plan.gemms:
        if plan.recipe.backward_override == "dequantized":
            return {"x_row": x_q[0], "x_row_scale": x_q[1], "x_row_amax": x_q[2]}
        return {"x": x}
    if plan.recipe.wgrad_block == "pixel":
        data, scale, amax = _pixel_face(x_last, plan, not plan.geometry.transposed, "input")
        return {"x_pixel": data, "x_pixel_scale": scale, "x_col_amax": amax}
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


def _dequantized_input(kept: dict[str, Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
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


def _dequantized_weight(kept: dict[str, Tensor], plan: Plan) -> Tensor:
    """w [axis 0, axis 1, *kernel] in real units, fp32: code * scale is exact, times the tensor scale."""
    w_q = (kept.get("w_row"), kept.get("w_row_scale"), kept.get("w_col"), kept.get("w_col_scale"))
    face = plan.weight_faces[0]
    data, scale = (w_q[0], w_q[1]) if face == "row" else (w_q[2], w_q[3])
    n, _, channels = plan.geometry.weight_shape
    w = operands.unpack_kernel(
        data, scale, n, channels, plan.geometry.groups, face == "col", None, torch.float32, plan.backend
    )
    w = w * (kept["w_amax"] * (1.0 / (6.0 * plan.recipe.settings("weight").e4m3_max)))
    return w.view(n, *plan.geometry.kernel, channels).movedim(-1, 1)


# ---- GEMMs in high precision ----------------------------------------------------------------------------------------


def _plain_forward(x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    w, bias = w.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if g.rank == 0:
        return aten.linear(x, w, bias)
    y = convolution(x.movedim(-1, 1), w, bias, g)
    return y.movedim(1, -1).contiguous().to(x.dtype)


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
