"""The calls that a context hands over: convolutions and linear layers to calls.execute, ReLU to the one-bit ReLU.

    conv1d/2d/3d, conv_transpose1d/2d/3d, linear    in NVFP4 where eligible; else as in torch, and observers hear why
    relu, relu_                                     keeps one bit per element for backward
    multi_head_attention_forward                    its body runs under the mode, so its projections are calls of linear

A TorchFunctionMode sees the calls of unmodified modules; inside its handler it is off.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from te_nvfp4_cv.context.state import active_recipe, local, state
from te_nvfp4_cv.errors import warn_once
from te_nvfp4_cv.layer import deferred, eligible, execute, observe
from te_nvfp4_cv.layer.relu import MaskedReLU
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

_CONVOLUTIONS = {getattr(F, f"conv{t}{n}d"): f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)}
_ATEN = {F.linear: torch.ops.aten.linear, **{f: getattr(torch.ops.aten, op) for f, op in _CONVOLUTIONS.items()}}
_RELUS = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_INPLACE_RELUS = {torch.relu_, Tensor.relu_}


class Mode(TorchFunctionMode):
    """Sees torch calls of its thread; inside its handler it is off, so what the handler calls is plain torch."""

    hands_values_on = True  # it never reads a tensor's values: see layer/deferred.py

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: A002
        kwargs = kwargs or {}
        if function in _CONVOLUTIONS:
            return _convolution(_CONVOLUTIONS[function], function, args, kwargs)
        if function is F.linear:
            return _linear(function, args, kwargs)
        if function in _RELUS:
            return _relu(function, args, kwargs)
        if function is F.multi_head_attention_forward:
            with self:  # its projections are calls of F.linear: run its body under the mode, without its own hand-over
                return _attention_body()(*args, **kwargs)
        return function(*args, **kwargs)


def mode_is_on() -> bool:
    """Whether torch calls reach a Mode: it is off in its own handler, so in all that Tensor.backward runs, too."""
    return any(isinstance(mode, Mode) for mode in torch.overrides._get_current_function_mode_stack())


@functools.lru_cache(maxsize=1)
def _attention_body() -> Callable[..., Any]:
    """F.multi_head_attention_forward, whose body does not ask for torch function overrides again."""
    original = F.multi_head_attention_forward
    names = {**original.__globals__, "has_torch_function": lambda *_: False}
    clone = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    clone.__kwdefaults__ = original.__kwdefaults__
    return clone


_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_NAMES = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_CONV_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}


def _convolution(op: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = _TRANSPOSED_NAMES if "transpose" in op else _CONV_NAMES
    call = {**_CONV_DEFAULTS, **dict(zip(names, args, strict=False)), **kwargs}
    recipe, reason = _decide(op, call, call["groups"])
    if reason or recipe is None:
        deferred.settle(call.get("input"))
        told = observe.Call(op, call.get("weight"), call.get("input"), None, None, reason)  # type: ignore[arg-type]
        return observe.reported(told, _plain(function), *args, **kwargs)
    current = local.states[-1]
    return execute.execute(
        op,
        call["input"],
        call["weight"],
        call["bias"],
        call["stride"],
        call["padding"],
        call["dilation"],
        call["groups"],
        call["output_padding"],
        recipe,
        current.backend,
        current.group,
    )


def _linear(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = {"bias": None, **dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    recipe, reason = _decide("linear", call, 1)
    if reason or recipe is None:
        deferred.settle(call.get("input"))
        told = observe.Call("linear", call.get("weight"), call.get("input"), None, None, reason)  # type: ignore[arg-type]
        return observe.reported(told, _plain(function), *args, **kwargs)
    current = local.states[-1]
    return execute.execute(
        "linear", call["input"], call["weight"], call["bias"], 1, 0, 1, 1, 0, recipe, current.backend, current.group
    )


def _plain(function: Any) -> Any:
    """`function`, in a form that a graph traced by torch.compile does not hand over a second time when it runs."""
    return _ATEN[function] if torch.compiler.is_compiling() else function


def _decide(op: str, call: dict[str, Any], groups: Any) -> tuple[NVFP4BlockScaling | None, str]:
    """(recipe, "") for NVFP4, (None, reason) for high precision."""
    current = state()
    if current is None or not current.enabled:
        return None, "nvfp4_autocast(enabled=False)"
    recipe = active_recipe()
    if recipe is None:
        return None, "set_precision: high precision"
    x, w = call.get("input"), call.get("weight")
    if not isinstance(x, Tensor) or not isinstance(w, Tensor) or not isinstance(groups, int):
        return None, "not a call on tensors"
    if not (isinstance(w, torch.nn.Parameter) or isinstance(w._base, torch.nn.Parameter)):
        return None, "the kernel is not a Parameter (computed, or a buffer)"
    if transformed():
        return None, "inside a torch.func transform or forward-mode differentiation"
    if x.device.type not in ("cpu", "cuda") and current.backend != "reference":
        return None, f"no fast backend for {x.device.type}"
    reason = eligible.ineligible(op, x, w, groups, recipe)
    if reason is None and not torch.is_autocast_enabled(x.device.type) and x.dtype != w.dtype:
        reason = "input and weight differ in dtype"  # torch's own error follows
    if reason is None:
        reason = _rank_problem(op, x, w)
    if (
        reason is None
        and x.device.type == "cuda"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cuda")
    ):
        warn_once(
            "fp32 cuda",
            "nvfp4: fp32 activations on a GPU are slow in NVFP4; run under torch.autocast('cuda', torch.bfloat16)",
        )
    return (recipe, "") if reason is None else (None, reason)


def _rank_problem(op: str, x: Tensor, w: Tensor) -> str | None:
    """Shapes that torch refuses: torch's own error is the best one."""
    if op == "linear":
        return (
            "linear with a weight that is no matrix"
            if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[1]
            else None
        )
    rank = int(op[-2])
    if w.dim() != rank + 2 or x.dim() not in (rank + 1, rank + 2):
        return "shapes that torch refuses"
    return None


def _relu(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs.get("input")
    inplace = function in _INPLACE_RELUS or bool(args[1] if len(args) > 1 else kwargs.get("inplace", False))
    current = state()
    if (
        current is None
        or not current.enabled
        or not current.relu_mask
        or active_recipe() is None
        or type(x) is not Tensor
        or not x.requires_grad
        or not torch.is_grad_enabled()
        or not x.is_floating_point()
        or not x.numel()
        or not _dense(x)
        or (inplace and _torch_may_refuse(x))
        or transformed()
    ):
        return function(*args, **kwargs)
    return MaskedReLU.apply(x, inplace)


def _torch_may_refuse(x: Tensor) -> bool:
    """Whether writing to x in place may be refused: torch's own relu_ asks before it writes, a Function after."""
    return x.is_leaf or (not torch.compiler.is_compiling() and x._is_view())


def transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp) or a forward-mode level is at work: our Functions do not know these."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _dense(x: Tensor) -> bool:
    """Whether memory order is a fixed order of the axes without gaps."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))
