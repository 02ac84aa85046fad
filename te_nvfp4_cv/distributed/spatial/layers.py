"""Convolutions and linear layers of images that are cut: in NVFP4 where a context asks for it, else as torch does.

A layer that reads no other row than its own (linear layers, 1x1 convolutions) is the plain layer on this rank's rows
with the amaxes of all ranks. The others exchange halos: exchange.py in NVFP4, windows.py in high precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.torch_private import without_function_modes
from te_nvfp4_cv.context import function_mode, state
from te_nvfp4_cv.distributed.spatial import shared
from te_nvfp4_cv.distributed.spatial.exchange import Exchange
from te_nvfp4_cv.distributed.spatial.rows import Layout
from te_nvfp4_cv.distributed.spatial.tensor import SpatialTensor, global_shape, handles, piece_of, place, refusal
from te_nvfp4_cv.distributed.spatial.windows import convolution
from te_nvfp4_cv.errors import value_error, warn_once
from te_nvfp4_cv.layer import check, delayed_scaling, execute, observe, shortfall, weight_codes, weight_transforms
from te_nvfp4_cv.layer.check import CallShape, Sizes, lowered
from te_nvfp4_cv.layer.forward_backward import QuantizedConv
from te_nvfp4_cv.layer.options import CallOptions
from te_nvfp4_cv.layer.plan import Plan, plan_for
from te_nvfp4_cv.layer.subclasses import PLAIN
from te_nvfp4_cv.ops.geometry import ConvArgs, int_tuple
from te_nvfp4_cv.ops.layouts import is_channels_last
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

_OPS = tuple(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))


@handles("linear", *_OPS)
def _layer(function: Any, args: Any, kwargs: dict[str, Any]) -> SpatialTensor:
    call = execute.layer_call(function, args, kwargs)
    if call is None:
        raise refusal(str(function), args)
    if not isinstance(call.x, SpatialTensor):
        raise refusal(f"{call.op} with a weight that is cut", args)
    recipe, reason = function_mode.decide(call.op, _like(call.x), call.w, call.args.groups)
    current = state.state()
    backend = "" if current is None else current.backend
    return _run(call.op, call.x, call.w, call.bias, call.args, (recipe, backend, reason))


@handles("execute_explicit")
def _explicit(function: Any, args: Any, kwargs: dict[str, Any]) -> SpatialTensor:
    """Run a call that asks for NVFP4 by name (nv.functional, NVFP4 modules)."""
    op, x, w, bias, sizes, recipe, backend, *_ = args
    return _run(op, x, w, bias, sizes, (check.checked_recipe(recipe), backend, ""))


Choice = tuple[NVFP4BlockScaling | None, str, str]  # the recipe or None, the backend, why not NVFP4


def _run(op: str, x: SpatialTensor, w: Tensor, bias: Tensor | None, args: ConvArgs, choice: Choice) -> SpatialTensor:
    recipe = choice[0]
    if recipe is not None and recipe.activation_shift != "none":
        raise value_error(
            f"nvfp4 {op}: an image that is cut into rows takes no activation_shift.",
            got=f"activation_shift={recipe.activation_shift!r}",
            needs="activation_shift='none': a rank has not all pixels of a channel",
            fix="leave the field out of the recipe",
        )
    if op == "linear":
        if x.placed.dim == x.dim() - 1:
            raise refusal("linear along the rows", (x,))
        return _alone(op, x, w, bias, args, choice)
    if x.dim() != w.dim() or x.placed.dim != 2:
        raise refusal(f"{op} of an image that is not cut along its first image axis", (x,))
    x, args = _numbers(op, x, w, args)
    named = (("stride", args.stride), ("padding", args.padding), ("output_padding", args.output_padding))
    rows = [int_tuple(value, w.dim() - 2, op, name)[0] for name, value in named]
    last = x.placed.of(x.placed.ranks - 1)
    if w.shape[2] == 1 and rows == [1, 0, 0] and last.size:  # torch has no convolution of an image without rows
        return _alone(op, x, w, bias, args, choice)
    return _with_halo(op, x, w, bias, args, choice)


def _numbers(op: str, x: SpatialTensor, w: Tensor, args: ConvArgs) -> tuple[SpatialTensor, ConvArgs]:
    """Return the input and arguments of a call whose padding is numbers; what "same" pads on one side is added."""
    if not isinstance(args.padding, str):
        return x, args
    low = lowered(CallShape.of(op, _like(x), Sizes.of(w), None, args))
    if low.pad:
        padded = F.pad(x, low.pad)
        assert isinstance(padded, SpatialTensor)
        x = padded
    return x, args._replace(padding=low.geometry.padding)


def _like(x: SpatialTensor) -> Tensor:
    """Return one element, expanded to the whole shape: for questions about shapes."""
    return piece_of(x).detach().new_empty(()).expand(global_shape(x))


def _group(layout: Layout) -> Any:
    """Return the ranks that share amaxes: those of the mesh, or those of the context if they are among them.

    Raises:
        ValueError: the context names a group that lacks some of the mesh.
    """
    given = state.reduction_group()
    if given is None:
        return layout.group
    if set(dist.get_process_group_ranks(layout.group)) <= set(dist.get_process_group_ranks(given)):
        return given
    raise value_error(
        "spatial_parallel: amax_reduction_group lacks ranks that hold rows of the same image.",
        got=f"ranks {dist.get_process_group_ranks(given)}",
        needs=f"at least ranks {dist.get_process_group_ranks(layout.group)}, whose rows are quantized with one scale",
        fix="leave amax_reduction_group out: the ranks of one image share their amaxes anyway",
    )


# ---- layers that read no other row ----------------------------------------------------------------------------------


def _alone(op: str, x: SpatialTensor, w: Tensor, bias: Tensor | None, args: ConvArgs, choice: Choice) -> SpatialTensor:
    recipe, backend, reason = choice
    if recipe is not None and recipe.row_scaled_activation:
        row_scaled = _plan(op, x, w, bias, args, recipe, backend).row_scaled
        recipe, reason = (None, _told(op, _ROW_SCALED)) if row_scaled else (recipe, "")
    piece, layout, own = piece_of(x), x.placed, w
    if recipe is not None and weight_transforms.local.running:  # asked for by w's identity
        w = weight_transforms.apply(w, None, _plan(op, x, w, bias, args, recipe, backend))
    w_used, bias = shared.use(w, layout.group), None if bias is None else shared.use(bias, layout.group)
    if recipe is not None:
        if w_used is not own and type(own) in PLAIN:
            w_used.state_owner = own  # type: ignore[attr-defined]  # of delayed scales, as in the plain model
        # The context must not take over the calls inside.
        with without_function_modes(), delayed_scaling.of_one_image():
            return place(execute.execute(op, piece, w_used, bias, args, recipe, backend, _group(layout)), layout)
    told = observe.Call(op, w, piece, None, None, reason)

    def plain() -> Any:
        if op == "linear":
            return F.linear(piece, w_used, bias)
        more = (args.stride, args.padding)
        if "transpose" in op:
            return getattr(F, op)(piece, w_used, bias, *more, args.output_padding, args.groups, args.dilation)
        return getattr(F, op)(piece, w_used, bias, *more, args.dilation, args.groups)

    with without_function_modes():
        return place(observe.reported(told, plain), layout)


# ---- layers with a halo ---------------------------------------------------------------------------------------------


def _with_halo(
    op: str, x: SpatialTensor, w: Tensor, bias: Tensor | None, args: ConvArgs, choice: Choice
) -> SpatialTensor:
    recipe, backend, reason = choice
    plan = None if recipe is None else _plan(op, x, w, bias, args, recipe, backend)
    if plan is not None:
        reason = _told(op, _problem(plan))
    if plan is None or reason:
        told = observe.Call(op, w, piece_of(x), None, None, reason)
        with without_function_modes():
            found: Any = observe.reported(told, lambda: convolution(op, piece_of(x), w, bias, args, x.placed))
            return found  # type: ignore[no-any-return]
    with without_function_modes():
        return _quantized(op, x, w, bias, plan)


def _plan(
    op: str, x: SpatialTensor, w: Tensor, bias: Tensor | None, args: ConvArgs, recipe: NVFP4BlockScaling, backend: str
) -> Plan:
    """Return the plan of the whole call."""
    device, piece = x.device, piece_of(x)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else piece.dtype
    call = CallShape.of(op, _like(x), Sizes.of(w), bias, args)
    chosen = dispatch.resolve(backend, device, by_layer=True)
    compute = dispatch.compute_dtype(dtype, device, autocast)
    return plan_for(lowered(call).geometry, recipe, chosen, compute, is_channels_last(piece) or is_channels_last(w))


_ROW_SCALED = "its activations have a scale for each row"


def _told(op: str, reason: str) -> str:
    """Return the reason, and warn of it if there is one."""
    if reason:
        text = f"nvfp4 {op}: a layer of an image that is cut into rows stays in high precision: {reason}"
        warn_once(f"spatial {op} {reason}", text)
    return reason


def _problem(plan: Plan) -> str:
    """Return why the halos of this call cannot be codes, or ""."""
    if set(plan.gemms) != {"fprop", "dgrad", "wgrad"} or plan.recipe.backward_override is not None:
        return "the recipe has GEMMs in high precision"
    if 0 in plan.geometry.x_shape or 0 in plan.geometry.y_shape:
        return "there is nothing to multiply"
    if plan.recipe.block_format != "nvfp4":
        return f"block_format={plan.recipe.block_format!r} is not supported here; use 'nvfp4'"
    return _ROW_SCALED if plan.row_scaled else ""


def _quantized(op: str, x: SpatialTensor, w: Tensor, bias: Tensor | None, plan: Plan) -> SpatialTensor:
    layout, piece = x.placed, piece_of(x)
    if torch.is_autocast_enabled(piece.device.type):
        piece = piece.to(torch.get_autocast_dtype(piece.device.type))
    g = plan.geometry
    exchange = Exchange(plan, layout)
    training = torch.is_grad_enabled()
    codes = weight_codes.codes_of(w, plan) if weight_codes.frozen or type(w) not in PLAIN else None
    with delayed_scaling.of_one_image():
        scales = delayed_scaling.of_call(piece, w, bias, exchange.own, _group(layout))
    told = observe.Call(op, w, piece, g, plan.recipe, "")
    w_used = weight_transforms.apply(w, codes, plan) if weight_transforms.local.running else w
    w_used = shared.use(w_used, layout.group) if training else w_used.detach()
    bias = None if bias is None else shared.use(bias, layout.group) if training else bias.detach()
    # Rows that nothing writes but the bias are added after the product's rows were cut out.
    later = bias if g.transposed and exchange.cut.grows else None
    options = CallOptions(codes=codes, scales=scales, ranks=exchange)
    shortfall.ran(g)
    inputs = (piece if training else piece.detach(), w_used, None if later is not None else bias)
    y = observe.reported(told, QuantizedConv.apply, *inputs, plan, options)
    if later is not None:
        y = y + later.to(y.dtype).view(-1, *(1,) * g.rank)
    return place(y, layout.with_rows(g.y_shape[1]))
