"""Runs one call of a convolution or linear layer in NVFP4, however it came: a context, nv.functional, a module.

`read` gives the arguments of torch's function their names, as a LayerCall. `execute` casts as torch.autocast would, has
the call checked and planned, asks who else takes part in it, and applies forward_backward.QuantizedConv (under
torch.compile: custom_op.py). `execute_explicit` raises where a context would fall back to high precision. Observers
(coverage, telemetry) are told of every call here.

A layer of a model is called again and again with tensors that differ in nothing but values. So a call that went well is
remembered by its weight (`remember`); `known_call` finds it by a few comparisons, `asks_alike` compares what was chosen
for it, and `repeat` asks only what they do not settle: whether somebody watches, traces or takes part.
"""

from __future__ import annotations

import operator
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from te_nvfp4_cv.backend import cache, dispatch
from te_nvfp4_cv.backend.swapping import gives_up
from te_nvfp4_cv.backend.torch_private import saved_tensors_hooks_are_on, without_function_modes
from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.layer import (
    activation_shift,
    custom_op,
    deferred,
    delayed_scaling,
    empty_batch,
    observe,
    prepared,
    shortfall,
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
    transformed,
)
from te_nvfp4_cv.layer.forward_backward import QuantizedConv
from te_nvfp4_cv.layer.options import ALONE, CallOptions
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.layer.run import cast, run
from te_nvfp4_cv.layer.subclasses import PLAIN, without_class
from te_nvfp4_cv.layer.transforms import PLAIN_MODEL, refuse_transforms
from te_nvfp4_cv.ops.geometry import ConvArgs, ConvGeometry
from te_nvfp4_cv.ops.layouts import is_channels_last, is_dense
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
        RuntimeError: a transform of torch.func is at work.
    """
    if (type(x) not in PLAIN or type(w) not in PLAIN) and has_torch_function((x, w)):
        given = (op, x, w, bias, args, recipe, backend, group)
        found: Tensor = handle_torch_function(execute_explicit, (x, w), *given)
        return found
    with without_function_modes():  # inside a context, the torch calls below are not to be taken over again
        recipe = checked_recipe(recipe)
        # As in a context (context/function_mode.py), where torch's function stands for the operator's name.
        values = (x, w, bias, *args)
        remembers = group is None and not torch.compiler.is_compiling() and not transformed()
        known = known_call(op, values) if remembers else None
        if known is not None:
            known = known if asks_alike(known, recipe, backend) else None
            again = None if known is None else repeat(known, x, w, bias)
            if again is not None:
                return again
        reason = ineligible(op, x, w, args.groups, recipe)
        if reason is not None:
            raise value_error(
                f"nvfp4 {op}: this call cannot run in NVFP4: {reason}.",
                got=f"x {describe(x)}, weight {describe(w)}, groups={args.groups}",
                needs=f"bf16, fp16 or fp32 on one device; at least {MINIMUM} channels per group on both sides "
                "(or thin_layers='pad' with groups=1)",
                fix=f"leave this call in high precision: torch.nn.functional.{op}",
            )
        refuse_transforms(f"a layer that asks for NVFP4 ({op})", PLAIN_MODEL, x, w, bias)
        y = execute(op, x, w, bias, args, recipe, backend, group)
        if remembers and (known is None or not holds(known)):
            remember(op, values, LayerCall(op, x, w, bias, args), recipe, backend)
        return y


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
    unwritten, producer = x, getattr(x, deferred.ATTRIBUTE, None)
    if producer is not None:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        # A cast or a padding would read values that are not there yet.
        if not deferred.claimable(x, w.dim() - 2, args.padding, dtype):
            deferred.settle(x)
            producer = None
    x, autocast = cast(op, x, w)
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
    shortfall.ran(low.geometry)
    # Asked at each call: what "auto" means changes when a self-test passes, and autocast with the context.
    chosen = dispatch.resolve(backend, x.device, by_layer=True)
    compute_dtype = dispatch.compute_dtype(x.dtype, x.device, autocast)
    channels_last = is_channels_last(x) or is_channels_last(w)
    if dispatch.is_traced():  # no producers and no observers inside of a graph
        delayed_scaling.refuse(recipe, group)
        weight_transforms.refuse(w, None)
        spec = custom_op.LayerSpec(recipe.key, chosen, compute_dtype, channels_last)
        y = custom_op.apply(x, w, bias, low.geometry, spec, group)
        return y.squeeze(0) if low.unbatched else y
    if type(x) not in PLAIN:
        x = without_class(x)
    plan = planned(call, recipe, chosen, compute_dtype, channels_last)
    y = run(op, x, w, bias, plan, group, producer)
    return y.squeeze(0) if low.unbatched else y


def _plain(x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    if g.rank == 0:
        return F.linear(x, w, bias)
    return torch.convolution(x, w, bias, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups)


# ---- calls that are alike -------------------------------------------------------------------------------------------


class Known:
    """A call that ran in NVFP4. What may change between two calls and is no value of a tensor is in `look`."""

    def __init__(
        self, function: Any, args: tuple[Any, ...], recipe: NVFP4BlockScaling, backend: str, chosen: str, plan: Plan
    ) -> None:
        self.function, self.args, self.recipe, self.backend, self.chosen = function, args[3:], recipe, backend, chosen
        self.plan, self.look = plan, _look(*args[:3])
        self.dtype: torch.dtype = self.look[-1]
        self.prepared: prepared.PreparedLayer | None = None
        self.asked = False  # for that, at the first call that might use one


SIZES = 16  # of x, that are remembered of one weight
# By a weight's id: the weight, and its calls by the shape of x.
_known: dict[int, tuple[weakref.ref[Tensor], dict[torch.Size, Known]]] = {}


@gives_up
def _forget(w: Tensor) -> None:
    _known.pop(id(w), None)


def _look(x: Any, w: Any, bias: Any) -> tuple[Any, ...]:
    device = x.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
    more = None if bias is None else (bias.dtype, bias.shape, bias.device)
    return x.dtype, x.stride(), device, w.dtype, w.shape, w.stride(), w.device, more, cache.changes, autocast, dtype


def known_call(function: Any, args: tuple[Any, ...]) -> Known | None:
    """Return what is known of a call of torch with these arguments, none by name; None where it must be looked at."""
    if len(args) < 3:
        return None
    x, w = args[0], args[1]
    held = _known.get(id(w))
    if held is None or held[0]() is not w or type(x) not in PLAIN or x.is_nested or x.layout is not torch.strided:
        return None
    known = held[1].get(x.shape)
    if known is None or known.function is not function or len(args) != len(known.args) + 3:
        return None
    if x.device != known.look[2]:  # of which autocast may know nothing
        return None
    # Modules hand over the same objects at each call, functions may compute them; what is remembered cannot change.
    same = all(map(operator.is_, args[3:], known.args)) or all(map(_equal, args[3:], known.args))
    return known if same and known.look == _look(x, w, args[2]) else None


def _equal(a: Any, b: Any) -> bool:
    """Return True if two arguments cannot be told apart: 1, 1.0 and True can, and lists may change."""
    if type(a) is tuple is type(b):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (type(a) is type(b) and type(a) in (int, str) and a == b)


def asks_alike(known: Known, recipe: NVFP4BlockScaling, backend: str) -> bool:
    """Return True if a call with this recipe and backend may be repeated as the known one."""
    if backend != known.backend:
        return False
    if recipe is not known.recipe:
        if recipe != known.recipe or recipe.name != known.recipe.name:  # names take no part in the comparison
            return False
        known.recipe = recipe
    return True


def remember(
    function: Any, args: tuple[Any, ...], read: LayerCall, recipe: NVFP4BlockScaling, backend: str
) -> None:
    """Remember a call that went well, unless there is something special about it.

    Args:
        function, args: by which known_call finds it.
        read: the same call with its arguments by name.
    """
    op, x, w, bias, sizes = read
    plain = type(w) is torch.nn.Parameter and type(x) in PLAIN and (bias is None or type(bias) in PLAIN)
    if not plain or len(args) < 3 or not is_dense(x) or recipe.activation_shift != "none":
        return
    look = _look(x, w, bias)
    call = CallShape.of(op, x, Sizes.of(w), bias, sizes)
    call = call._replace(x=Sizes(tuple(x.shape), look[-1]))
    if isinstance(call.types, list):  # arguments that may change
        return
    low = lowered(call)
    if low.unbatched or low.pad or low.empty:
        return
    chosen = dispatch.resolve(backend, x.device, by_layer=True)
    compute_dtype = dispatch.compute_dtype(look[-1], x.device, look[-2])
    plan = planned(call, recipe, chosen, compute_dtype, is_channels_last(x) or is_channels_last(w))
    known = Known(function, args, recipe, backend, chosen, plan)
    held, number = _known.get(id(w)), id(w)
    if held is None or held[0]() is not w:
        held = (weakref.ref(w, lambda _, known=_known: known.pop(number, None)), {})  # type: ignore[misc]
        _known[number] = held
    if len(held[1]) >= SIZES:  # some of which never come back
        held[1].clear()
    held[1][x.shape] = known


def holds(known: Known) -> bool:
    """Return True if "auto" means the backend that it meant."""
    device = known.look[2]
    # On a GPU the answer changes with cache.changes only, and is not cheap.
    return device.type == "cuda" or dispatch.resolve(known.backend, device, by_layer=True) == known.chosen


def repeat(known: Known, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor | None:
    """Run a call as `known` says; None if somebody takes part in it, or if "auto" means another backend now."""
    if (
        observe.local.observers
        or weight_codes.frozen
        or weight_transforms.local.running
        or not torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or dispatch.is_traced()
        or getattr(x, deferred.ATTRIBUTE, None) is not None
        or not holds(known)
    ):
        return None
    plan, scales, ready = known.plan, None, None
    if x.dtype is not known.dtype:
        x = x.to(known.dtype)
    if plan.delayed:
        scales = delayed_scaling.of_call(x, w, bias, plan, None)
    if (known.prepared or not known.asked) and x.requires_grad and w.requires_grad and _alone(x):
        if not known.asked:
            known.asked = True
            known.prepared = prepared.PreparedLayer(plan, x, w, bias) if prepared.fits(plan, x, w) else None
        if scales is None or prepared.measured(scales):
            ready = known.prepared
    options = ALONE if scales is None and ready is None else CallOptions(scales=scales, prepared=ready)
    shortfall.local.macs += plan.geometry.macs
    y: Tensor = QuantizedConv.apply(x, w, bias, plan, options)
    return y


def _alone(x: Tensor) -> bool:
    """Return True if nobody sees the launches or the saved tensors of a call, which runs on the current device."""
    device = x.device
    # Hooks: the two forward passes of a checkpoint must save alike, and the second one may find other scales.
    if not dispatch.kernels_serve(device) or not dispatch.runs_directly(x) or saved_tensors_hooks_are_on():
        return False
    if device.type != "cuda":
        return True
    # A graph must not be the first to launch a kernel, and the short form's begin at a layer's second and third step.
    return device.index == torch.cuda.current_device() and not torch.cuda.is_current_stream_capturing()
