"""The torch function mode: torch calls made inside a context reach it, and it decides how each of them runs.

    conv1d/2d/3d, conv_transpose1d/2d/3d, linear    in NVFP4 where eligible; else as in torch, and observers hear why
    grouped_mm                                      as linear: rows of tokens times a kernel for each expert
    relu, relu_                                     saves one bit per element for backward
    multi_head_attention_forward                    its body runs under the mode, so its projections are calls of linear

A TorchFunctionMode sees the calls of unmodified modules. Inside its handler it is off. `enter` and `leave` put it on
and take it off, together with what is active in this thread (state.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from te_nvfp4_cv.backend.torch_private import (
    HigherOrderOperator,
    OperatorBase,
    constant_in_graphs,
    function_modes,
    no_graphs_inside,
    only_inlined,
)
from te_nvfp4_cv.context import direct_calls, entries, grouped, islands, relu, tracing
from te_nvfp4_cv.context.bodies import ATTENTION, note_parts
from te_nvfp4_cv.context.direct_calls import DIRECT
from te_nvfp4_cv.context.state import State, active_recipe, drop_stale, local, pop_state, push_state
from te_nvfp4_cv.errors import ShapeError, warn_once
from te_nvfp4_cv.layer import check, constants, deferred, execute, observe, shared_amax, shortfall
from te_nvfp4_cv.layer import grouped as grouped_layer
from te_nvfp4_cv.layer.check import transformed
from te_nvfp4_cv.layer.execute import ATEN, LAYERS, by_name, read
from te_nvfp4_cv.layer.inside import replaced
from te_nvfp4_cv.layer.subclasses import PLAIN, by_their_class, overridden
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

_PACKETS = {aten: op for op, aten in ATEN.items()}
_UNFLATTEN = Tensor.unflatten  # written in Python: Dynamo does not find such a method in a set, nor trace it in a mode
_OURS = {*relu.FUNCTIONS, F.multi_head_attention_forward}
_OTHERS = {*_OURS, *DIRECT, *_PACKETS, *grouped.FUNCTIONS, *constants.TAKING} - {_UNFLATTEN}
_BY_MODULES = {getattr(F, op) for op in ATEN}  # not what exported programs call, with lists


class Mode(TorchFunctionMode):
    """Handles torch calls of its thread. Inside the handler it is off, so what the handler calls is plain torch."""

    hands_values_on = True  # it never reads a tensor's values: see layer/deferred.py

    def __init__(self) -> None:
        super().__init__()
        # Autograd takes a mode along into the threads that run a GPU's backward pass, but not what is active here.
        traced = torch.compiler.is_compiling()
        self._home = None if traced else local.__dict__
        self._observers = None if traced else observe.local.observers

    # Between two graphs torch calls it in eager mode: that makes no third graph, and neither do its helpers below.
    @only_inlined
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: A002
        kwargs = kwargs or {}
        op = LAYERS.get(function)
        # Plain tensors and Parameters have no types, so nearly every call asks no further.
        if types and (op is not None or function in _OURS) and overridden(types):
            noted = self if op is None or torch.compiler.is_compiling() else _Noting(self)
            with noted:  # the class calls the function again, for tensors that then override nothing
                y = by_their_class(function, types, args, kwargs)
            if y is NotImplemented:
                return function(*args, **kwargs)  # torch's own error
            if op is not None and isinstance(noted, _Noting) and not noted.came_back:
                _run_by_a_class(op, types, args, kwargs, y)
            return y
        if op is not None:
            if not local.states and self._home is not None:
                with self._at_home():
                    return _layer(op, function, args, kwargs)
            return _layer(op, function, args, kwargs)
        if function in _OTHERS:
            return self._other(function, args, kwargs)
        if function is _UNFLATTEN:
            return constants.take(torch.unflatten if torch.compiler.is_compiling() else function, args, kwargs)
        if isinstance(function, OperatorBase) and torch.compiler.is_dynamo_compiling() and _traces_bodies(function):
            with self:  # does not come back here: tracing.py
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    @only_inlined
    def _other(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in relu.FUNCTIONS:
            return relu.run(function, args, kwargs)
        if function is F.multi_head_attention_forward:
            if not torch.compiler.is_compiling():
                module = next(constants.running_modules(), None)
                if isinstance(module, torch.nn.MultiheadAttention):
                    note_parts(module, args, kwargs)
            with self:  # its projections are calls of F.linear: run its body under the mode
                return ATTENTION(*args, **kwargs)
        if function in DIRECT:
            return direct_calls.run(function, args, kwargs)
        if function in _PACKETS:
            left = _called_by_a_graph()
            return function(*args, **kwargs) if left else _layer(_PACKETS[function], function, args, kwargs)
        if function in grouped.FUNCTIONS:
            if not local.states and self._home is not None:
                with self._at_home():
                    return _grouped(function, args, kwargs)
            return _grouped(function, args, kwargs)
        return constants.take(function, args, kwargs)

    def _at_home(self) -> AbstractContextManager[Any]:
        """Make active in this thread what is active in the one where the mode was entered."""
        assert self._home is not None and self._observers is not None
        stack = ExitStack()
        stack.enter_context(replaced(local, **{name: self._home[name] for name in ("states", "marks", "overrides")}))
        stack.enter_context(observe.told_to(self._observers))
        return stack


class _Noting(Mode):
    """Takes a Mode's place while a class is asked to run a layer of its tensors, and notes if the layer comes back."""

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self._home, self._observers = mode._home, mode._observers
        self.came_back = False

    @only_inlined
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: A002
        self.came_back = self.came_back or function in LAYERS
        return super().__torch_function__(function, types, args, kwargs)


def _run_by_a_class(op: str, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
    """Say that a class has run a layer of its tensors itself, where no mode saw it."""
    kind = next(kind for kind in types if kind not in PLAIN)
    if active_recipe() is None or getattr(kind, "reports_its_layers", False):
        return
    _, x, w, _, sizes = read(op, args, kwargs)
    told = observe.Call(op, w, x, None, None, f"{kind.__name__} runs its layers itself")
    observe.reported(told, lambda: y)
    if not isinstance(w, kind):  # quantized by another library, say: that is what its user wants
        shortfall.missed(told, y, sizes.groups)


@constant_in_graphs
def _traces_bodies(function: Any) -> bool:
    """Return True for a higher-order operator whose body Dynamo will trace with the mode on."""
    if not isinstance(function, HigherOrderOperator):
        return False
    found = tracing.trace_bodies_under(Mode, local)
    if not found:
        warn_once(
            f"body {function}",
            f"nvfp4: with torch {torch.__version__}, layers inside of {function} run in high precision under "
            "torch.compile. Leave that part out of the compiled function, or use torch 2.11 to 2.13",
        )
    return found


def mode_is_on() -> bool:
    """Return True if torch calls reach a Mode. It is off in its handler."""
    return any(isinstance(mode, Mode) for mode in function_modes())


# ---- enter and leave ------------------------------------------------------------------------------------------------


@constant_in_graphs
def _prepare_trace() -> bool:
    """Do what the entry of a context has done before a trace, for a first context that is entered in traced code."""
    tracing.repair_dynamo(Mode, local)
    return True


def enter(new: State) -> None:
    """Make `new` the innermost context of this thread, and let torch calls reach a Mode."""
    if torch.compiler.is_compiling():
        _prepare_trace()
    elif not local.states:
        if local.overrides:
            drop_stale()
        shortfall.local.macs = shortfall.local.in_graphs = shortfall.local.asked = 0
        if shortfall.local.calls:
            shortfall.forget()
    push_state(new)
    # One mode per thread is enough: it reads the innermost state.
    mode = None if mode_is_on() else Mode()
    local.modes = [*local.modes, mode]
    if mode is not None:
        mode.__enter__()


def leave(failed: bool = False) -> None:
    """Undo the last `enter`; failed: an exception has ended the body."""
    pop_state()
    mode, local.modes = local.modes[-1], local.modes[:-1]
    if mode is not None:
        mode.__exit__(None, None, None)
    if torch.compiler.is_compiling() or local.states:
        return
    if shortfall.local.calls and not failed:
        shortfall.judge()
    if shared_amax.later.waits:
        shared_amax.later.look()


@contextmanager
def entered(new: State) -> Iterator[None]:
    """Run the body inside of `new`. For this package's own use: nvfp4_autocast also checks, warns and patches torch."""
    enter(new)
    try:
        yield
    finally:
        leave()


# ---- the calls ------------------------------------------------------------------------------------------------------

_LISTS = ("stride", "padding", "output_padding", "dilation")  # a number stands for all axes; ATen wants a list


@no_graphs_inside
def _layer(op: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one call in NVFP4, or as torch would."""
    traced, known = torch.compiler.is_compiling(), None
    if not traced and not kwargs and local.states:
        known = execute.known_call(function, args)
        if known is not None and not _decides_the_same(known, args[1]):
            known = None
        if known is not None:
            again = execute.repeat(known, *args[:3])
            if again is not None:
                return again
    call = read(op, args, kwargs)
    _, x, w, bias, sizes = call
    recipe, reason = decide(op, x, w, sizes.groups)
    if kwargs and kwargs.get("out") is not None:
        recipe, reason = None, "the result goes to a tensor of the caller (out=)"
    elif op == "linear" and recipe is not None and isinstance(bias, Tensor) and bias.shape != w.shape[:1]:
        recipe, reason = None, "the bias is not one number per output channel"  # torch adds what can be broadcast
    if traced and islands.in_traced_island():
        recipe, reason = None, islands.REASON
    if recipe is None:
        deferred.settle(x)
        # In a graph of torch.compile, ATen's operator: torch's own function would come back to this mode when it runs.
        if traced:
            given = by_name(op, args, kwargs)
            plain = ATEN[op]
            kwargs = {key: [value] if key in _LISTS and type(value) is int else value for key, value in given.items()}
            return plain(**kwargs)  # nobody observes a graph
        told = observe.Call(op, w, x, None, None, reason)
        y = observe.reported(told, function, *args, **kwargs)
        shortfall.missed(told, y, sizes.groups)
        return y
    current = local.states[-1]
    if traced:
        return execute.execute(op, x, w, bias, sizes, recipe, current.backend, current.group)
    try:
        y = execute.execute(op, x, w, bias, sizes, recipe, current.backend, current.group)
    except ShapeError:  # what torch refuses, too, gets its error, whose type programs may wait for
        function(*args, **kwargs)
        raise
    stale = known is None or not execute.holds(known)
    if stale and not kwargs and current.group is None and function in _BY_MODULES:
        execute.remember(function, args, call, recipe, current.backend)
    return y


def _decides_the_same(known: execute.Known, w: Tensor) -> bool:
    """Return True if what `decide` asks of this thread has the answers that it had for a call that is known."""
    current = local.states[-1]
    rule = entries.ruling(w) if entries.used else local.overrides[-1] if local.overrides else None
    recipe = current.recipe if rule is None else rule[1]
    if not current.enabled or recipe is None or current.group is not None:
        return False
    return execute.asks_alike(known, recipe, current.backend) and not transformed()


@no_graphs_inside
def _grouped(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one grouped product in NVFP4, or as torch would."""
    x, w, offsets, reason = grouped.read(args, kwargs)
    recipe = None
    if not reason:
        recipe, reason = decide(grouped_layer.OP, x, w, 1)
    traced = torch.compiler.is_compiling()
    if traced and islands.in_traced_island():
        recipe, reason = None, islands.REASON
    if recipe is None:
        deferred.settle(x)
        if traced:
            return grouped.plain(function, args, kwargs)
        told = observe.Call("grouped_mm", w, x, None, None, reason)
        y = observe.reported(told, function, *args, **kwargs)
        if isinstance(w, Tensor) and w.dim() == 3 and w.shape[0]:
            shortfall.missed(observe.Call("grouped_mm", w[0], x, None, None, reason), y, 1)
        return y
    current = local.states[-1]
    return grouped_layer.execute(x, w, offsets, None, recipe, current.backend, current.group).to(x.dtype)


@constant_in_graphs
def _called_by_a_graph() -> bool:
    """Return True if a graph of torch.fx makes the call: _layer has put it there for high precision."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return bool(frame.f_code.co_filename.startswith("<eval_with_key>"))


def decide(op: str, x: Any, w: Any, groups: Any) -> tuple[NVFP4BlockScaling | None, str]:
    """Return (recipe, "") for a call that runs in NVFP4, (None, reason) for one that stays in high precision."""
    current = local.states[-1] if local.states else None
    if current is None or not current.enabled:
        island = current is not None and current.island
        return None, islands.REASON if island else "nvfp4_autocast(enabled=False)"
    rule = entries.ruling(w) if entries.used else local.overrides[-1] if local.overrides else None
    recipe = current.recipe if rule is None else rule[1]
    if recipe is None:
        return None, "set_precision: high precision"
    if not isinstance(x, Tensor) or not isinstance(w, Tensor) or not isinstance(groups, int):
        return None, "not a call on tensors"
    computed = not (isinstance(w, torch.nn.Parameter) or isinstance(w._base, torch.nn.Parameter))
    if computed and getattr(w, "packed", False):
        return None, "the weight is stored in NVFP4"  # and its class runs the layer: export/packed_weight.py
    if computed and recipe.kernels == "parameters":
        return None, "the kernel is not a Parameter (recipe.kernels='parameters')"
    if transformed():
        return None, "inside a torch.func transform or forward-mode differentiation"
    if x.device.type not in ("cpu", "cuda") and current.backend != "reference":
        return None, f"no fast backend for {x.device.type}"
    if op == grouped_layer.OP:
        reason = grouped_layer.why_not(x, w, recipe)
    else:
        reason = check.ineligible(op, x, w, groups, recipe)
    if reason is None and not torch.is_autocast_enabled(x.device.type) and x.dtype != w.dtype:
        reason = "input and weight differ in dtype"  # torch's own error follows
    if reason is None:
        reason = _rank_problem(op, x, w)
    # The last question, as it takes the longest. What needs a gradient is no constant.
    if reason is None and computed and not w.requires_grad and constants.is_constant(w):
        reason = "the kernel is a constant: a buffer, or a tensor that a module holds and does not train"
    slow = x.device.type == "cuda" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
    if reason is None and slow:
        warn_once(
            "fp32 cuda",
            "nvfp4: fp32 activations on a GPU are slow in NVFP4; run under torch.autocast('cuda', torch.bfloat16)",
        )
    return (recipe, "") if reason is None else (None, reason)


def _rank_problem(op: str, x: Tensor, w: Tensor) -> str | None:
    """Return a reason for shapes that torch refuses: torch's own error is the best one."""
    if op == grouped_layer.OP:
        return None if w.shape[0] and x.shape[1] == w.shape[2] else "shapes that torch refuses"
    if op == "linear":
        fits = w.dim() == 2 and x.dim() >= 1 and x.shape[-1] == w.shape[1]
        return None if fits else "linear with a weight that is no matrix"
    rank = int(op[-2])
    if w.dim() != rank + 2 or x.dim() not in (rank + 1, rank + 2):
        return "shapes that torch refuses"
    return None
