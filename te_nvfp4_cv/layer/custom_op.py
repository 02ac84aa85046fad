"""The quantized layer as one operator, for torch.compile: te_nvfp4_cv::layer, and ::layer_backward behind it.

    layer            x, w, bias -> y and what backward needs: up to three tensors of x, three of w
    layer_backward   dy and those -> dx, dw, db; draws the seed of stochastic rounding

A graph holds one node for each layer and pass: nothing of geometry, recipe or random numbers is traced, so nothing of
them can break a graph, be merged with another layer's or be compiled otherwise than it runs in eager mode. Shapes are
those of the trace: another batch size is another graph. Refused by calls.py before: delayed tensor scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.layer import delayed_scaling, saved, weight_codes
from te_nvfp4_cv.layer import forward_backward as layers
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.layer.saved import Like
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.recipe.block_scaling import recipe_of_key

PARTS = 3  # of x, and of w, at most


def _plan(shape: Any, recipe: str, backend: str, dtype: torch.dtype, channels_last: bool) -> Plan:
    geometry = ConvGeometry.from_ints([int(n) for n in shape])
    return Plan(geometry, recipe_of_key(recipe), backend, dtype, channels_last)


def _padded(parts: list[Tensor], like: Tensor) -> list[Tensor]:
    return parts + [like.new_empty(0, dtype=torch.uint8) for _ in range(PARTS - len(parts))]


def _kept_names(plan: Plan, need_dx: bool, need_dw: bool) -> tuple[list[str], list[str]]:
    """Names of what backward needs of x and of w; "x" and "w" are the operands themselves."""
    return saved.names_of_x(plan, need_dw), saved.names_of_w(plan, need_dx)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::layer", mutates_args=())
def layer(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    shape: list[int],
    recipe: str,
    backend: str,
    dtype: torch.dtype,
    channels_last: bool,
    need_dx: bool,
    need_dw: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer's forward.

    Args:
        x, w, bias: as torch.nn.functional takes them, x in the dtype of autocast where that is on.
        shape: ConvGeometry.to_ints(). recipe: NVFP4BlockScaling.key. dtype: of dequantized operands.
        channels_last: y's memory format.
        need_dx, need_dw: what backward will compute; neither: nothing is kept.
        group: name of the process group whose ranks share amaxes in training, or "".
    Returns:
        (y, three tensors of x, three of w), empty where there is nothing to keep, and for an operand kept as it is.
    """
    plan = _plan(shape, recipe, backend, dtype, channels_last)
    codes, scales = weight_codes.codes_of(w, plan), _scales(plan, group, need_dx or need_dw)
    y, kept = layers.forward(x, w, bias, plan, need_dx, need_dw, codes, scales)
    return y, *_outputs(kept, plan, need_dx, need_dw, x)  # type: ignore[return-value]


def _outputs(kept: dict[str, Tensor], plan: Plan, need_dx: bool, need_dw: bool, x: Tensor) -> list[Tensor]:
    of_x, of_w = _kept_names(plan, need_dx, need_dw)
    sides = [[kept[name] for name in names if name not in ("x", "w")] for names in (of_x, of_w)]
    return _padded(sides[0], x) + _padded(sides[1], x)


def _scales(plan: Plan, group: str, training: bool) -> delayed_scaling.CallScales | None:
    if not group:
        return None
    found = torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return delayed_scaling.CallScales(plan, found, training)


@layer.register_fake
def _(x, w, bias, shape, recipe, backend, dtype, channels_last, need_dx, need_dw, group):  # type: ignore[no-untyped-def]
    plan = _plan(shape, recipe, backend, dtype, channels_last)
    _, x_q, w_q = layers.quantize(x, w, plan, need_dx, need_dw)
    kept = saved.keep(x, x_q, w, w_q, plan, need_dx, need_dw)
    y = layouts.like_image_first(x, plan.geometry.y_shape, x.shape, channels_last)
    return y, *_outputs(kept, plan, need_dx, need_dw, x)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::layer_backward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def layer_backward(
    dy: Tensor,
    of_x: list[Tensor],
    of_w: list[Tensor],
    shape: list[int],
    recipe: str,
    backend: str,
    dtype: torch.dtype,
    channels_last: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    group: str,
    x_shape: list[int],
    x_dtype: torch.dtype,
    x_channels_last: bool,
    w_shape: list[int],
    w_dtype: torch.dtype,
    w_channels_last: bool,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db) of one layer, empty where not needed; the arguments are those of `layer`, and the fields of Like."""
    plan = _plan(shape, recipe, backend, dtype, channels_last)
    names = [name for side in _kept_names(plan, need_dx, need_dw) for name in side]
    kept = dict(zip(names, (*of_x, *of_w), strict=True))
    like = Like(tuple(x_shape), x_dtype, x_channels_last, tuple(w_shape), w_dtype, w_channels_last, bias_dtype)
    scales = _scales(plan, group, True)
    grads = layers.backward(dy, kept, plan, like, need_dx, need_dw, need_db, scales)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


@layer_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy,
    of_x,
    of_w,
    shape,
    recipe,
    backend,
    dtype,
    channels_last,
    need_dx,
    need_dw,
    need_db,
    group,
    x_shape,
    x_dtype,
    x_channels_last,
    w_shape,
    w_dtype,
    w_channels_last,
    bias_dtype,
):
    plan = _plan(shape, recipe, backend, dtype, channels_last)
    g = plan.geometry
    dx, dw, db = (dy.new_empty(0) for _ in range(3))
    if need_dx:
        dx = layouts.like_image_first(dy, g.x_shape, x_shape, x_channels_last).to(x_dtype)
    if need_dw:
        dw = layouts.kernel_as(dy.new_empty(g.weight_shape, dtype=w_dtype), g, tuple(w_shape), w_channels_last)
    if need_db:
        db = dy.new_empty(dy.shape[-1] if g.rank == 0 else dy.shape[1], dtype=bias_dtype)
    return dx, dw, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, bias, *call = inputs
    shape, recipe, backend, dtype, channels_last, need_dx, need_dw, group = call
    of_x, of_w = _kept_names(_plan(shape, recipe, backend, dtype, channels_last), need_dx, need_dw)
    parts = {"x": x, "w": w}
    made = zip((of_x, of_w), (output[1 : 1 + PARTS], output[1 + PARTS :]), strict=True)
    kept = [parts.get(name, part) for names, side in made for name, part in zip(names, side, strict=False)]
    ctx.save_for_backward(*kept)
    ctx.split, ctx.call, ctx.like = len(of_x), call, tuple(vars(Like.of(x, w, bias)).values())
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * (3 + len(ctx.call))
    if dy is None:
        return nothing
    shape, recipe, backend, dtype, channels_last, need_dx, need_dw, group = ctx.call
    *like, bias_dtype = ctx.like
    kept = list(ctx.saved_tensors)
    need_db = ctx.needs_input_grad[2]
    grads = layer_backward(
        dy,
        kept[: ctx.split],
        kept[ctx.split :],
        *(shape, recipe, backend, dtype, channels_last, need_dx, need_dw, need_db, group),
        *like,
        dtype if bias_dtype is None else bias_dtype,
    )
    needs = (need_dx, need_dw, need_db)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *nothing[3:]


layer.register_autograd(_backward, setup_context=_setup_context)


def apply(x: Tensor, w: Tensor, bias: Tensor | None, plan: Plan, group: Any) -> Tensor:
    """y of one call that torch.compile traces; the arguments are those of autograd.QuantizedConv."""
    need_dx, need_dw = x.requires_grad, w.requires_grad
    if not torch.is_grad_enabled():
        need_dx = need_dw = False
    outputs = layer(
        x,
        w,
        bias,
        plan.shape,
        plan.recipe.key,
        plan.backend,
        plan.compute_dtype,
        plan.channels_last,
        need_dx,
        need_dw,
        "" if group is None else group.group_name,
    )
    return outputs[0]
