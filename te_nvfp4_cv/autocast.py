"""nvfp4_autocast: plain torch calls made inside the context run in NVFP4.

    with nvfp4_autocast(recipe):            conv1d/2d/3d, conv_transpose1d/2d/3d, linear  -> functional, where eligible
        loss = criterion(model(x), y)       relu, relu_                                   -> the ReLU that keeps one bit
    loss.backward()                         captured in forward: inside or outside of the context

One TorchFunctionMode per thread sees the calls of unmodified modules; a stack of states beside it says what they do.
Innermost context wins.
A layer's recipe is decided in this order: a set_precision override (while its module runs), an explicit module's own
recipe, the context's.
Activation checkpointing recomputes outside the context: torch.utils.checkpoint is wrapped once, at the first entry,
so that the recomputed
forward re-enters what was active. nn.DataParallel runs its replicas in threads that no context reaches: it raises.
What cannot run in NVFP4 runs as torch would; the reason goes to whoever observes (coverage).
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from te_nvfp4_cv import calls
from te_nvfp4_cv.autograd import MaskedReLU
from te_nvfp4_cv.checks import runtime_error, type_error, warn_once
from te_nvfp4_cv.ops import dispatch
from te_nvfp4_cv.recipe import NVFP4BlockScaling, as_recipe


@dataclass(frozen=True)
class State:
    """What one context asked for."""

    enabled: bool
    recipe: NVFP4BlockScaling
    backend: str
    relu_mask: bool


Override = tuple[object, NVFP4BlockScaling | None]  # a module with a set_precision entry; None for high precision


class _Local(threading.local):
    """Per thread: contexts entered, how many overrides each found, the mode it entered; overrides of modules."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.marks: list[int] = []
        self.overrides: list[Override] = []
        self.modes: list[_Mode | None] = []


_local: _Local
_applied_tables: set[tuple[tuple[str, NVFP4BlockScaling | None], ...]] = set()


def state() -> State | None:
    """The innermost context of this thread, enabled or not; None outside of all."""
    return _local.states[-1] if _local.states else None


def active_recipe() -> NVFP4BlockScaling | None:
    """The recipe that a layer called now would get (set_precision's override of the running module included); None:
    high precision.
    """
    current = state()
    if current is None or not current.enabled:
        return None
    return _local.overrides[-1][1] if _local.overrides else current.recipe


def has_override() -> bool:
    """Whether a module with a set_precision entry is running."""
    return bool(_local.overrides)


def push_override(recipe: NVFP4BlockScaling | None, owner: object = None) -> None:
    """`owner`, a module with a set_precision entry, starts its forward."""
    _local.overrides.append((owner, recipe))


def pop_override(owner: object = None) -> None:
    """The forward of `owner` ended: drop its override, and those of modules below that an exception left behind."""
    overrides = _local.overrides
    for index in range(len(overrides) - 1, -1, -1):
        if overrides[index][0] is owner:
            del overrides[index:]
            return


def mark_applied(recipe: NVFP4BlockScaling) -> None:
    """set_precision has applied the recipe's [precision] table to some model."""
    _applied_tables.add(recipe.precision)


class nvfp4_autocast:  # noqa: N801  (named as torch.autocast is)
    """Run eligible layers of unmodified models in NVFP4.

    A context manager, reusable and re-entrant, and a decorator. It may enclose a whole training loop or only the
    forward pass, and stand inside or
    outside of torch.autocast, whose dtype activations then have.

    Args:
        recipe: NVFP4BlockScaling, TransformerEngine's object of that name, or None for the default recipe.
        enabled: False runs everything inside in high precision, explicit NVFP4 modules too.
        backend: "auto", "reference", "vendor" or "triton"; an explicit choice that cannot run raises.
        relu_mask: ReLU keeps a 1-bit mask for backward instead of its output; the same bits forward and backward.
    Raises:
        TypeError: a first argument that is no recipe; ValueError: a recipe that contradicts itself, an unknown backend;
        RuntimeError: a backend that cannot run here.
    """

    def __init__(
        self, recipe: Any = None, *, enabled: bool = True, backend: str = "auto", relu_mask: bool = True
    ) -> None:
        for name, value in (("enabled", enabled), ("relu_mask", relu_mask)):
            if not isinstance(value, bool):
                raise type_error(
                    f"nvfp4_autocast: bad {name}.", got=repr(value), needs="True or False", fix=f"{name}=True"
                )
        resolved = as_recipe(recipe)
        resolved.validate_for_use()
        dispatch.check_backend(backend)
        if backend == "triton":
            dispatch.resolve(backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._state = State(enabled, resolved, backend, relu_mask)

    def __enter__(self) -> nvfp4_autocast:
        _patch_torch()
        _warn_unapplied(self._state)
        _push(self._state)
        return self

    def __exit__(self, *error: object) -> None:
        _pop()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return wrapped

    def __repr__(self) -> str:
        s = self._state
        return f"nvfp4_autocast({s.recipe!r}, enabled={s.enabled}, backend={s.backend!r}, relu_mask={s.relu_mask})"


def _push(new: State) -> None:
    if not _local.states and _local.overrides and not torch.compiler.is_compiling():
        _drop_stale()
    _local.states.append(new)
    _local.marks.append(len(_local.overrides))
    mode = None if _mode_is_on() else _Mode()
    _local.modes.append(mode)
    if mode is not None:
        mode.__enter__()


def _pop() -> None:
    _local.states.pop()
    del _local.overrides[_local.marks.pop() :]  # what a KeyboardInterrupt left: torch runs no hooks then
    mode = _local.modes.pop()
    if mode is not None:
        mode.__exit__(None, None, None)


def _mode_is_on() -> bool:
    """Whether torch calls reach a _Mode: it is off in its own handler, so in all that Tensor.backward runs, too."""
    return any(isinstance(mode, _Mode) for mode in torch.overrides._get_current_function_mode_stack())


def _drop_stale() -> None:
    """Keep the overrides of modules that are running; a KeyboardInterrupt outside of all contexts leaves others."""
    running, frame = set(), sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":
            running.add(id(frame.f_locals.get("self")))
        frame = frame.f_back  # type: ignore[assignment]
    _local.overrides = [entry for entry in _local.overrides if id(entry[0]) in running]


def _warn_unapplied(new: State) -> None:
    table = new.recipe.precision
    if new.enabled and table and table not in _applied_tables:
        name = new.recipe.name or "this recipe"
        warn_once(
            f"precision {table}",
            f"nvfp4: {name} has a [precision] table ({', '.join(pattern for pattern, _ in table)}) that was not "
            "applied to a model: its layers run in NVFP4 too. Add before training:  nv.set_precision(model, recipe)",
        )


# ---- the calls that are handed over ---------------------------------------------------------------------------------

_CONVOLUTIONS = {getattr(F, f"conv{t}{n}d"): f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)}
_ATEN = {F.linear: torch.ops.aten.linear, **{f: getattr(torch.ops.aten, op) for f, op in _CONVOLUTIONS.items()}}
_RELUS = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_INPLACE_RELUS = {torch.relu_, Tensor.relu_}


class _Mode(TorchFunctionMode):
    """Sees torch calls of its thread; inside its handler it is off, so what the handler calls is plain torch."""

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


_local = _Local()


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
        told = calls.Call(op, call.get("weight"), call.get("input"), None, None, reason)  # type: ignore[arg-type]
        return calls.reported(told, _plain(function), *args, **kwargs)
    current = _local.states[-1]
    return calls.execute(
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
    )


def _linear(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = {"bias": None, **dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    recipe, reason = _decide("linear", call, 1)
    if reason or recipe is None:
        told = calls.Call("linear", call.get("weight"), call.get("input"), None, None, reason)  # type: ignore[arg-type]
        return calls.reported(told, _plain(function), *args, **kwargs)
    return calls.execute(
        "linear", call["input"], call["weight"], call["bias"], 1, 0, 1, 1, 0, recipe, _local.states[-1].backend
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
    reason = calls.ineligible(op, x, w, groups, recipe)
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
        or (inplace and x.is_leaf)  # torch refuses, before it writes
    ):
        return function(*args, **kwargs)
    return MaskedReLU.apply(x, inplace)


def _dense(x: Tensor) -> bool:
    """Whether memory order is a fixed order of the axes without gaps."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))


# ---- torch.utils.checkpoint, nn.DataParallel ------------------------------------------------------------------------


@contextmanager
def _restored(states: list[State], overrides: list[Override]) -> Iterator[None]:
    """Run with the contexts and overrides of another place (checkpoint's forward), whatever is active here."""
    before = _local.states, _local.marks, _local.overrides
    mode = _Mode() if states and not _mode_is_on() else nullcontext()
    _local.states, _local.marks, _local.overrides = list(states), [0] * len(states), list(overrides)
    try:
        with mode:
            yield
    finally:
        _local.states, _local.marks, _local.overrides = before


def _captured(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which runs under the contexts that are active now (none, too), whenever it is called."""
    states, overrides = list(_local.states), list(_local.overrides)

    @functools.wraps(function, updated=())
    def rerun(*args: Any, **kwargs: Any) -> Any:
        with _restored(states, overrides):
            return function(*args, **kwargs)

    return rerun


@functools.lru_cache(maxsize=1)
def _patch_torch() -> None:
    """Once, at the first entry: checkpoint's two variants recompute under what was active; DataParallel says what to
    use instead.
    """
    import torch.utils.checkpoint as checkpoint

    generator = checkpoint._checkpoint_without_reentrant_generator
    forward = checkpoint.CheckpointFunction.forward

    @functools.wraps(generator)
    def without_reentrant(fn: Any, *args: Any, **kwargs: Any) -> Any:
        return generator(_captured(fn), *args, **kwargs)

    def reentrant(ctx: Any, run_function: Any, *args: Any) -> Any:
        return forward(ctx, _captured(run_function), *args)

    checkpoint._checkpoint_without_reentrant_generator = without_reentrant  # type: ignore[assignment]
    checkpoint.CheckpointFunction.forward = staticmethod(reentrant)  # type: ignore[assignment]
    parallel = torch.nn.DataParallel.forward

    @functools.wraps(parallel)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = state()
        if current is not None and current.enabled:
            raise runtime_error(
                "nvfp4_autocast: nn.DataParallel is not supported.",
                got="nn.DataParallel inside the context: its replicas run in threads of their own",
                needs="one process per GPU",
                fix="torch.nn.parallel.DistributedDataParallel (DDP), started by torchrun",
            )
        return parallel(self, *args, **kwargs)

    torch.nn.DataParallel.forward = refuse  # type: ignore[method-assign]
