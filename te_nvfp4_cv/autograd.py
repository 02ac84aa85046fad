"""The autograd Functions: a quantized convolution (or linear layer), and a ReLU that keeps one bit per element.

    forward    x -> both faces in one pass; w -> codes; y = fprop; keep x's packed columnwise face and w's packed codes, never x
    backward   dy -> both faces in one pass (stochastic rounding); dx = dgrad; dw = wgrad; db = sum of the unquantized dy

Which GEMMs run in NVFP4 is the recipe's; the others run on the high-precision operands, which are then kept. Everything that backward needs
is captured in forward: it runs the same inside and outside of the context. A second differentiation raises.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.ops import conv, native
from te_nvfp4_cv.ops.conv import pixel
from te_nvfp4_cv.ops.conv.vendor import aten
from te_nvfp4_cv.ops.geometry import ConvGeometry, Fold
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

    @functools.cached_property
    def shape(self) -> list[int]:
        return self.geometry.to_ints()

    @functools.cached_property
    def folds(self) -> tuple[Fold, Fold]:
        """(x side, dy side)."""
        a, b = self.geometry.folds()
        return (b, a) if self.geometry.transposed else (a, b)

    @property
    def operand_form(self) -> int:
        """Form in which this backend multiplies."""
        return PACKED if self.backend == "reference" else DEQUANTIZED

    @functools.cached_property
    def gemms(self) -> tuple[str, ...]:
        return self.recipe.nvfp4_gemms

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


def row_scaling_applies(g: ConvGeometry) -> bool:
    """Whether every output row reads one input row."""
    return not g.transposed and g.taps == 1 and g.groups == 1 and not any(g.padding)


class QuantizedConv(torch.autograd.Function):
    """x, w, bias -> y for one Plan. `frozen` is a weight quantized before (quantize_weight), or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, plan: Plan, frozen: tuple[Tensor, ...] | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            need_dx, need_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
            x_last = image_last(x, plan.geometry.x_shape)
            x_q = quantize_input(x_last, plan, need_dw)
            w_q = None
            if "fprop" in plan.gemms or ("dgrad" in plan.gemms and need_dx) or (plan.recipe.backward_override == "dequantized" and need_dx):
                w_q = frozen if frozen is not None else quantize_weight(w, plan, keep=need_dx)
            y = fprop(x_last, x_q, w, w_q, bias, plan)
            kept = {**kept_of_x(x_last, x_q, plan, need_dw), **kept_of_w(w, w_q, plan, need_dx)}
            ctx.kept_names = tuple(kept)
            ctx.save_for_backward(*kept.values())
            ctx.plan, ctx.x_dtype, ctx.x_dim = plan, x.dtype, x.dim()
            ctx.w_like = (w.dtype, w.shape, _weight_is_channels_last(w))
            ctx.x_channels_last, ctx.bias_dtype, ctx.x_shape = is_channels_last(x), None if bias is None else bias.dtype, x.shape
            return image_first(y, plan.geometry.y_shape, x.shape, plan.channels_last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = dict(zip(ctx.kept_names, ctx.saved_tensors, strict=True))
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            grads = _backward(ctx, dy, kept)
        if torch.is_grad_enabled():  # create_graph=True: the results must not look like constants
            grads = tuple(None if g is None else _NoSecondOrder.apply(g, dy) for g in grads)
        return (*grads, None, None)


def _backward(ctx: Any, dy: Tensor, kept: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    plan: Plan = ctx.plan
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    dy_last = image_last(dy, plan.geometry.y_shape)
    dy_q = quantize_gradient(dy_last, plan, need_dx, need_dw)
    dx = dw = db = None
    if need_dx:
        dx = image_first(dgrad(dy_last, dy_q, kept, plan, ctx.x_dtype), plan.geometry.x_shape, ctx.x_shape, ctx.x_channels_last)
    if need_dw:
        dw = kernel_as(wgrad(dy_last, dy_q, kept, plan, ctx.w_like[0]), plan.geometry, *ctx.w_like[1:])
    if need_db:
        db = dy_last.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dw, db


class _NoSecondOrder(torch.autograd.Function):
    """Identity whose backward explains that NVFP4 layers are differentiable once."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, dy: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError(
            "nvfp4: a gradient of an NVFP4 layer was differentiated again.\n"
            "  got:   double backward (create_graph=True, a gradient penalty or a Hessian)\n"
            "  needs: first derivatives only: rounding has no useful second derivative\n"
            "  fix:   run that forward pass under nvfp4_autocast(enabled=False)"
        )


# ---- memory layouts -------------------------------------------------------------------------------------------------


def image_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B, C, *image] (or [..., C] of a linear layer) as contiguous [B, *image, C]; free for channels_last tensors."""
    return (x if len(shape) == 2 else x.movedim(1, -1)).reshape(shape).contiguous()


def image_first(y: Tensor, shape: tuple[int, ...], x_shape: torch.Size, channels_last: bool) -> Tensor:
    """The inverse of image_last for a result, with the strides torch would give it."""
    if len(shape) == 2:
        return y.reshape(*x_shape[:-1], shape[-1])
    y = y.view(shape).movedim(-1, 1)
    return y if channels_last else y.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether torch would treat x as channels_last (2-D and 3-D images only)."""
    if x.dim() not in (4, 5):
        return False
    return torch._prims_common.suggest_memory_format(x) != torch.contiguous_format


def _weight_is_channels_last(w: Tensor) -> bool:
    return is_channels_last(w) and not w.is_contiguous()


def kernel_as(dw: Tensor, g: ConvGeometry, shape: torch.Size, channels_last: bool) -> Tensor:
    """[axis 0, taps, axis 1] as the parameter's [axis 0, axis 1, *kernel], in its memory format."""
    if g.rank == 0:
        return dw.reshape(shape)
    dw = dw.view(dw.shape[0], *g.kernel, dw.shape[2]).movedim(-1, 1)
    return dw if channels_last else dw.contiguous()


# ---- quantize -------------------------------------------------------------------------------------------------------


def quantize_input(x: Tensor, plan: Plan, need_dw: bool) -> tuple[Tensor, ...]:
    """x's faces: rowwise for fprop, columnwise packed for wgrad."""
    s = plan.recipe.settings("input")
    dequantize_later = plan.recipe.backward_override == "dequantized" and need_dw
    row = NONE if "fprop" not in plan.gemms else PACKED if dequantize_later else plan.operand_form
    batch_blocks = plan.recipe.wgrad_block == "batch"
    col = PACKED if "wgrad" in plan.gemms and need_dw and batch_blocks else NONE
    if row == NONE and col == NONE:
        return ()
    return operands.quantize_operand(
        x, plan.geometry.groups, list(vars(plan.folds[0]).values()), row, col, s.rht, False, s.four_over_six or "", s.e4m3_max, plan.row_scaled,
        plan.compute_dtype, None, plan.backend,
    )  # fmt: skip


def quantize_gradient(dy: Tensor, plan: Plan, need_dx: bool, need_dw: bool) -> tuple[Tensor, ...]:
    """dy's faces: rowwise for dgrad, columnwise for wgrad; both are used at once, in the form that the backend multiplies."""
    s = plan.recipe.settings("grad_output")
    row = plan.operand_form if "dgrad" in plan.gemms and need_dx else NONE
    col = plan.operand_form if "wgrad" in plan.gemms and need_dw and plan.recipe.wgrad_block == "batch" else NONE
    if row == NONE and col == NONE:
        return ()
    seed = seeds.draw_seed(dy) if s.stochastic_rounding else None
    return operands.quantize_operand(
        dy, plan.geometry.groups, list(vars(plan.folds[1]).values()), row, col, s.rht, s.stochastic_rounding, "", s.e4m3_max, False,
        plan.compute_dtype, seed, plan.backend,
    )  # fmt: skip


def quantize_weight(w: Tensor, plan: Plan, keep: bool) -> tuple[Tensor, ...]:
    """w packed: (row data, row scale, col data, col scale, amax), the faces that the recipe's GEMMs need.

    Args:
        keep: dgrad will need its face.
    """
    s = plan.recipe.settings("weight")
    faces = {plan.weight_faces[0]} | ({plan.weight_faces[1]} if keep else set())
    row, col = (PACKED if face in faces else NONE for face in ("row", "col"))
    return operands.quantize_kernel(w.detach(), plan.geometry.groups, row, col, s.two_d, s.four_over_six or "", s.e4m3_max, plan.compute_dtype, plan.backend)


def _weight_operand(w_q: tuple[Tensor, ...], face: str, plan: Plan) -> tuple[Tensor, Tensor]:
    """One packed face in the form that the backend multiplies: (data, scale)."""
    data, scale = (w_q[0], w_q[1]) if face == "row" else (w_q[2], w_q[3])
    if plan.operand_form == PACKED:
        return data, scale
    n, _, channels = plan.geometry.weight_shape
    out = operands.unpack_kernel(data, scale, n, channels, plan.geometry.groups, face == "col", plan.compute_dtype, plan.backend)
    return out, scale.new_empty(0)


# ---- multiply -------------------------------------------------------------------------------------------------------


def fprop(x: Tensor, x_q: tuple[Tensor, ...], w: Tensor, w_q: tuple[Tensor, ...] | None, bias: Tensor | None, plan: Plan) -> Tensor:
    """y [B, *image, O] in x's dtype."""
    g = plan.geometry
    if "fprop" not in plan.gemms:
        return _plain_forward(x, w, bias, g)
    assert w_q is not None
    weight, weight_scale = _weight_operand(w_q, plan.weight_faces[0], plan)
    row, row_scale, amax = x_q[:3]
    if plan.operand_form == DEQUANTIZED and row_scale.numel():  # kept packed for backward_override="dequantized"
        row = operands.unpack_rows(row, row_scale, x.shape[-1], g.groups, plan.compute_dtype, plan.backend)
    if plan.row_scaled:
        steps = tuple(slice(None, None, stride) for stride in g.stride)
        amax = amax[(slice(None), *steps)].unsqueeze(-1)
    alpha = formats.alpha(amax, w_q[4], plan.recipe.settings("input").e4m3_max, plan.recipe.settings("weight").e4m3_max)
    return conv.conv_fprop(row, row_scale, weight, weight_scale, alpha, bias, plan.shape, x.dtype, plan.backend)


def dgrad(dy: Tensor, dy_q: tuple[Tensor, ...], kept: dict[str, Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    """dx [B, *image, C]."""
    if "dgrad" not in plan.gemms:
        w = kept["w"] if "w" in kept else _dequantized_weight(kept, plan)
        return _plain_backward(dy, None, w.to(dtype), plan.geometry)[0]
    w_q = (kept.get("w_row"), kept.get("w_row_scale"), kept.get("w_col"), kept.get("w_col_scale"))
    weight, weight_scale = _weight_operand(w_q, plan.weight_faces[1], plan)  # type: ignore[arg-type]
    alpha = formats.alpha(dy_q[2], kept["w_amax"], plan.recipe.settings("grad_output").e4m3_max, plan.recipe.settings("weight").e4m3_max)
    return conv.conv_dgrad(dy_q[0], dy_q[1], weight, weight_scale, alpha, plan.shape, dtype, plan.backend)


def wgrad(dy: Tensor, dy_q: tuple[Tensor, ...], kept: dict[str, Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    """dw [axis 0, taps, axis 1]."""
    if "wgrad" not in plan.gemms:
        x = kept["x"] if "x" in kept else _dequantized_input(kept, plan, dy.dtype)
        return _plain_backward(dy, x, None, plan.geometry)[1].to(dtype)
    if plan.recipe.wgrad_block == "pixel":
        return _pixel_wgrad(dy, kept, plan, dtype)
    x, x_scale = kept["x_col"], kept["x_col_scale"]
    if plan.operand_form == DEQUANTIZED:
        x, x_scale = operands.unpack_columns(x, x_scale, plan.compute_dtype, plan.backend), x_scale.new_empty(0)
    alpha = formats.alpha(dy_q[5], kept["x_col_amax"], plan.recipe.settings("grad_output").e4m3_max, plan.recipe.settings("input").e4m3_max)
    return conv.conv_wgrad(dy_q[3], dy_q[4], x, x_scale, alpha, plan.shape, dtype, plan.backend)


def _pixel_face(side: Tensor, plan: Plan, is_a: bool, role: str) -> tuple[Tensor, Tensor, Tensor]:
    s = plan.recipe.settings(role)
    seed = seeds.draw_seed(side) if s.stochastic_rounding else None
    faces = quantize(
        pixel.matrix(side, plan.geometry, is_a), rowwise=False, columnwise=True, rht=s.rht, stochastic_rounding=s.stochastic_rounding,
        four_over_six=s.four_over_six, e4m3_max=s.e4m3_max, seed=seed, backend=plan.backend,
    )  # fmt: skip
    return faces.col_data, faces.col_scale, faces.col_amax


def _pixel_wgrad(dy: Tensor, kept: dict[str, Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    transposed = plan.geometry.transposed
    dy_data, dy_scale, dy_amax = _pixel_face(dy, plan, transposed, "grad_output")
    of_x, of_dy = (kept["x_pixel"], kept["x_pixel_scale"]), (dy_data, dy_scale)
    b, a = (of_x, of_dy) if transposed else (of_dy, of_x)
    alpha = formats.alpha(dy_amax, kept["x_col_amax"], plan.recipe.settings("grad_output").e4m3_max, plan.recipe.settings("input").e4m3_max)
    return pixel.wgrad(*b, *a, alpha, plan.geometry, dtype)


# ---- what backward keeps --------------------------------------------------------------------------------------------


def kept_of_x(x: Tensor, x_q: tuple[Tensor, ...], plan: Plan, need_dw: bool) -> dict[str, Tensor]:
    """Tensors by name: the packed columnwise face; or x itself, or its packed rowwise face, where the recipe wants wgrad otherwise."""
    if not need_dw:
        return {}
    if "wgrad" not in plan.gemms:
        if plan.recipe.backward_override == "dequantized":
            return {"x_row": x_q[0], "x_row_scale": x_q[1], "x_row_amax": x_q[2]}
        return {"x": x}
    if plan.recipe.wgrad_block == "pixel":
        data, scale, amax = _pixel_face(x, plan, not plan.geometry.transposed, "input")
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
        kept["x_row"], kept["x_row_scale"].view(torch.float8_e4m3fn), amax.flatten(), plan.recipe.settings("input").e4m3_max
    )
    channels = plan.geometry.x_shape[-1] // plan.geometry.groups
    return values.to(dtype).unflatten(-1, (plan.geometry.groups, -1))[..., :channels].flatten(-2)


def _dequantized_weight(kept: dict[str, Tensor], plan: Plan) -> Tensor:
    """w [axis 0, axis 1, *kernel] in real units, fp32: code * scale is exact, times the tensor scale."""
    w_q = (kept.get("w_row"), kept.get("w_row_scale"), kept.get("w_col"), kept.get("w_col_scale"))
    face = plan.weight_faces[0]
    data, scale = (w_q[0], w_q[1]) if face == "row" else (w_q[2], w_q[3])
    n, _, channels = plan.geometry.weight_shape
    w = operands.unpack_kernel(data, scale, n, channels, plan.geometry.groups, face == "col", torch.float32, plan.backend)
    w = w * (kept["w_amax"] * (1.0 / (6.0 * plan.recipe.settings("weight").e4m3_max)))
    return w.view(n, *plan.geometry.kernel, channels).movedim(-1, 1)


# ---- GEMMs in high precision ----------------------------------------------------------------------------------------


def _plain_forward(x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    w, bias = w.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if g.rank == 0:
        return torch.nn.functional.linear(x, w, bias)
    y = aten.convolution(x.movedim(-1, 1), w, bias, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups)
    return y.movedim(1, -1).contiguous()


def _plain_backward(dy: Tensor, x: Tensor | None, w: Tensor | None, g: ConvGeometry) -> tuple[Tensor, Tensor]:
    """(dx [B, *image, C], dw [axis 0, taps, axis 1]); only the one whose operand is given is computed."""
    empty = dy.new_empty(0)
    if g.rank == 0:
        dx = empty if w is None else dy @ w.reshape(g.channels_b, g.channels_a)
        return dx, (empty if x is None else (dy.t() @ x).unsqueeze(1))
    x_first = dy.new_empty(g.x_shape).movedim(-1, 1) if x is None else x.movedim(-1, 1)
    w_first = dy.new_empty((g.channels_b, *g.kernel, g.channels_a // g.groups)).movedim(-1, 1) if w is None else w
    mask = [w is not None, x is not None, False]
    dx, dw, _ = aten.convolution_backward(
        dy.movedim(-1, 1), x_first, w_first, None, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups, mask
    )
    return (
        empty if w is None else dx.movedim(1, -1).contiguous(),
        empty if x is None else dw.movedim(1, -1).contiguous().view(g.weight_shape),
    )


# ---- ReLU -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("te_nvfp4_cv::positive_mask", mutates_args=())
def positive_mask(y: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)]: one bit for every element of y in memory order, set where ReLU's backward passes (not y <= 0)."""
    library = native.load() if y.device.type == "cpu" else None
    n = y.numel()
    if library is not None and y.dtype in (torch.bfloat16, torch.float32):
        mask = torch.empty(-(-n // 8), dtype=torch.uint8)
        library.nvfp4_positive_mask(y.data_ptr(), mask.data_ptr(), n, y.dtype == torch.bfloat16, torch.get_num_threads())
        return mask
    bits = torch.nn.functional.pad(~(_memory(y) <= 0), (0, -n % 8)).view(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=y.device)).sum(1, dtype=torch.uint8)


@positive_mask.register_fake
def _(y):  # type: ignore[no-untyped-def]
    return y.new_empty((y.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("te_nvfp4_cv::apply_mask", mutates_args=())
def apply_mask(dy: Tensor, mask: Tensor) -> Tensor:
    """dy where the mask's bit is set, else 0; dy dense, in the memory order of the tensor that the mask was made of."""
    library = native.load() if dy.device.type == "cpu" else None
    n = dy.numel()
    dx = torch.empty_like(dy)
    if library is not None and dy.element_size() in (2, 4):
        library.nvfp4_apply_mask(dy.data_ptr(), mask.data_ptr(), dx.data_ptr(), n, dy.element_size() == 2, torch.get_num_threads())
        return dx
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=dy.device)) & 1
    _memory(dx).copy_(torch.where(bits.view(-1)[:n].bool(), _memory(dy), 0.0))
    return dx


@apply_mask.register_fake
def _(dy, mask):  # type: ignore[no-untyped-def]
    return torch.empty_like(dy)


def _memory(y: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, as a 1-D view."""
    return y.as_strided((y.numel(),), (1,))


class MaskedReLU(torch.autograd.Function):
    """ReLU that keeps 1 bit per element for backward; forward and backward equal torch's, bit for bit. x must be dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y = torch.relu_(x) if inplace else torch.relu(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(positive_mask(y))
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        if dy.stride() != ctx.strides:
            dy = torch.empty_strided(dy.shape, ctx.strides, dtype=dy.dtype, device=dy.device).copy_(dy)
        return _MaskedGrad.apply(dy, mask), None


class _MaskedGrad(torch.autograd.Function):
    """dy times the mask; linear in dy, so that ReLU keeps its second derivative (which is zero in x)."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.strides = dy.stride()
        return apply_mask(dy, mask)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        if ddx.stride() != ctx.strides:
            ddx = torch.empty_strided(ddx.shape, ctx.strides, dtype=ddx.dtype, device=ddx.device).copy_(ddx)
        return _MaskedGrad.apply(ddx, mask), None
