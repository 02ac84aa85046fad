"""Runs one call of a convolution or linear layer in NVFP4, however it came: a context, nv.functional, a module.

`read` gives the arguments of torch's function their names, as a LayerCall. `execute` casts as torch.autocast would, has
the call checked and planned, asks who else takes part in it, and applies forward_backward.QuantizedConv (under
torch.compile: custom_op.py). `execute_explicit` raises where a context would fall back to high precision. Observers
(coverage, telemetry) are told of every call here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.torch_private import without_function_modes
from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.layer import (
    activation_shift,
    custom_op,
    deferred,
    delayed_scaling,
    empty_batch,
    evaluation_cache,
    observe,
    weight_codes,
    weight_transforms,
)
from te_nvfp4_cv.layer.check import (
    MINIMUM,
    CallShape,
    Sizes,
    checked_recipe,
    ineligible,
    lowered,
    planned,
    refuse_jit_trace,
)
from te_nvfp4_cv.layer.forward_backward import QuantizedConv
from te_nvfp4_cv.layer.options import CallOptions
from te_nvfp4_cv.layer.subclasses import PLAIN, without_class
from te_nvfp4_cv.ops.geometry import ConvArgs, ConvGeometry
from te_nvfp4_cv.ops.layouts import is_channels_last
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

# ---- torch's functions ----------------------------------------------------------------------------------------------

_OPS = ("linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
ATEN = {op: getattr(torch.ops.aten, op) for op in _OPS}
# Exported programs (torch.export, make_fx) call overloads of ATen's operators. The operators themselves stay free for
# layers that a graph of torch.compile runs in high precision.
_EXPORTED = {getattr(aten, name): op for op, aten in ATEN.items() for name in aten.overloads() if name != "out"}
LAYERS = {getattr(F, op): op for op in _OPS} | _EXPORTED
_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # of linear the first three
_TRANSPOSED_NAMES = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"input": None, "weight": None, "bias": None, **ConvArgs()._asdict()}


class LayerCall(NamedTuple):
    """A call of one of torch's layer functions, with its arguments by name."""

    op: str
    x: Any
    w: Any
    bias: Any
    args: ConvArgs


def layer_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
    """Read the arguments of a call of torch; None if it calls no convolution and no linear layer."""
    return read(LAYERS[function], args, kwargs) if function in LAYERS else None


def read(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
    """Read the arguments of a call of the layer function `op`."""
    call = {**_DEFAULTS, **by_name(op, args, kwargs)}
    sizes = ConvArgs(call["stride"], call["padding"], call["dilation"], call["groups"], call["output_padding"])
    return LayerCall(op, call["input"], call["weight"], call["bias"], sizes)


def by_name(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a call of a layer function gives, by name."""
    return {**dict(zip(_TRANSPOSED_NAMES if "transpose" in op else _CONV_NAMES, args, strict=False)), **kwargs}


# ---- the call -------------------------------------------------------------------------------------------------------


def execute_explicit(
    op: str, x: Tensor, w: Tensor, bias: Tensor | None, args: ConvArgs, recipe: Any, backend: str, group: Any = None
) -> Tensor:
    """Run a call that asks for NVFP4 by name; arguments as for execute, but any recipe that as_recipe takes.

    Raises:
        ValueError: a call that NVFP4 cannot take, where a context would leave it in high precision.
    """
    if (type(x) not in PLAIN or type(w) not in PLAIN) and has_torch_function((x, w)):
        given = (op, x, w, bias, args, recipe, backend, group)
        found: Tensor = handle_torch_function(execute_explicit, (x, w), *given)
        return found
    recipe = checked_recipe(recipe)
    reason = ineligible(op, x, w, args.groups, recipe)
    if reason is not None:
        raise value_error(
            f"nvfp4 {op}: this call cannot run in NVFP4: {reason}.",
            got=f"x {describe(x)}, weight {describe(w)}, groups={args.groups}",
            needs=f"bf16, fp16 or fp32 on one device; at least {MINIMUM} channels per group on both sides "
            "(or thin_layers='pad' with groups=1)",
            fix=f"leave this call in high precision: torch.nn.functional.{op}",
        )
    with without_function_modes():  # inside a context, the torch calls below are not to be taken over again
        return execute(op, x, w, bias, args, recipe, backend, group)


def execute(
    op: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    args: ConvArgs,
    recipe: NVFP4BlockScaling,
    backend: str,
    group: Any = None,
) -> Tensor:
    """Run an eligible call.

    Args:
        op: as nv.functional names it, "conv2d" for example.
        group: process group of the ranks that quantize with one amax, or None.
    Raises:
        ValueError: shapes or arguments that do not fit.
        RuntimeError: a backend that cannot run here.
    """
    if recipe.activation_shift != "none" and x.numel():
        return _shifted(op, x, w, bias, args, recipe, backend, group)
    producer = getattr(x, deferred.ATTRIBUTE, None)
    if producer is None:
        return _execute(op, x, w, bias, args, recipe, backend, group)
    try:
        return _execute(op, x, w, bias, args, recipe, backend, group)
    except BaseException:
        deferred.settle(x)  # whoever catches this may read x
        raise


def _shifted(
    op: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    args: ConvArgs,
    recipe: NVFP4BlockScaling,
    backend: str,
    group: Any,
) -> Tensor:
    """Run a call on x without the mean of its channels, and add what that takes away."""
    refuse_jit_trace(f"a layer in NVFP4 ({op})")
    if getattr(x, deferred.ATTRIBUTE, None) is not None:
        deferred.settle(x)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    without_mean, more = activation_shift.shifted(op, x, w, args)
    y = execute(op, without_mean, w, bias, args, recipe.unshifted, backend, group)
    return (y + more).to(y.dtype)


def _execute(
    op: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    args: ConvArgs,
    recipe: NVFP4BlockScaling,
    backend: str,
    group: Any,
) -> Tensor:
    refuse_jit_trace(f"a layer in NVFP4 ({op})")
    # `unwritten` stays what the caller holds; x is cast, padded and unsqueezed below, and `settle` needs the former.
    device, unwritten = x.device.type, x
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    producer = getattr(x, deferred.ATTRIBUTE, None)
    # A cast or a padding would read values that are not there yet.
    if producer is not None and not deferred.claimable(x, w.dim() - 2, args.padding, dtype):
        deferred.settle(x)
        producer = None
    if autocast:
        x = x.to(dtype)
    elif x.dtype != w.dtype:
        raise value_error(
            f"nvfp4 {op}: input and weight differ in dtype.",
            got=f"x {describe(x)}, weight {describe(w)}",
            needs="one dtype outside of torch.autocast",
            fix="model.to(x.dtype), x.to(w.dtype), or run under torch.autocast",
        )
    call = CallShape.of(op, x, Sizes.of(w), bias, args)
    low = lowered(call)
    x = low.input(x)
    if low.empty:  # nothing to quantize: torch's own result, and its gradients
        deferred.settle(unwritten)
        values = w if type(w) in PLAIN else empty_batch.without_values(w)
        y = _plain(x, values.to(x.dtype), None if bias is None else bias.to(x.dtype), low.geometry)
        if group is not None:
            y = empty_batch.take_part(y, x, w, bias, planned(call, recipe, "reference", x.dtype, False), group)
        return y.squeeze(0) if low.unbatched else y
    # Asked at each call: what "auto" means changes when a self-test passes, and autocast with the context.
    chosen = dispatch.resolve(backend, x.device, by_layer=True)
    compute_dtype = dispatch.compute_dtype(x.dtype, x.device, autocast)
    channels_last = is_channels_last(x) or is_channels_last(w)
    if torch.compiler.is_compiling():  # no producers and no observers inside of a graph
        delayed_scaling.refuse(recipe, group)
        weight_transforms.refuse(w, None)
        spec = custom_op.LayerSpec(recipe.key, chosen, compute_dtype, channels_last)
        y = custom_op.apply(x, w, bias, low.geometry, spec, group)
        return y.squeeze(0) if low.unbatched else y
    if type(x) not in PLAIN:
        x = without_class(x)
    plan = planned(call, recipe, chosen, compute_dtype, channels_last)
    codes = scales = None
    # Nearly every weight is a plain Parameter that nothing has frozen: these two questions cost less than a call.
    if weight_codes.frozen or type(w) not in PLAIN:
        codes = weight_codes.codes_of(w, plan)
    if plan.delayed or group is not None:
        scales = delayed_scaling.of_call(x, w, bias, plan, group)
    if producer is not None and not producer.serves(plan, torch.is_grad_enabled() and w.requires_grad, scales):
        deferred.settle(x)
        producer = None
    # Before w is transformed: observers know a layer by its weight's identity.
    told = observe.Call(op, w, x, low.geometry, recipe, "") if observe.local.observers else None
    transformed, unpacked = bool(weight_transforms.local.running), None
    if transformed:
        w = weight_transforms.apply(w, codes, plan)
    if not torch.is_grad_enabled():  # a Function's needs_input_grad does not know: nothing is saved for nobody
        if codes is None and told is None and not transformed:
            codes, unpacked = evaluation_cache.find(w, plan)
        x, w, bias = x.detach(), w.detach(), None if bias is None else bias.detach()
    options = CallOptions(codes=codes, unpacked=unpacked, scales=scales, producer=producer)
    if told is None:
        y = QuantizedConv.apply(x, w, bias, plan, options)
    else:
        y = observe.watched(told, lambda watch: QuantizedConv.apply(x, w, bias, plan, options._replace(watch=watch)))
    return y.squeeze(0) if low.unbatched else y


def _plain(x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    if g.rank == 0:
        return F.linear(x, w, bias)
    return torch.convolution(x, w, bias, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups)
