"""The forward of one module as a torch.fx graph whose calls of children stay calls; or the reason why there is none.

    trace(module)  ->  Traced(graph while training, graph in evaluation, names of arguments, guards)

torch.fx runs the forward once with stand-ins for its arguments, so whatever the code decides meanwhile is fixed in the
graph. Arguments with a default are traced at their default and must have it at run time; an `isinstance` question about
an argument is answered "no" and must be "no" at run time. Refused: a forward that the graph cannot stand for: control
flow on values or shapes, attributes set, random numbers drawn, tensors created, a context manager entered (no_grad,
autocast, checkpoint), results of other classes than tuples, lists and dicts.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import fx, nn

from te_nvfp4_cv import context
from te_nvfp4_cv.recipe import NVFP4BlockScaling

TRACING = ("torch", "te_nvfp4_cv", "inspect", "typing", "abc")  # whose questions about a stand-in are not the model's


class Untraceable(Exception):
    """Why a forward cannot be traced."""


@dataclass
class Traced:
    """Two graphs (one object twice where they are the same) and what must hold when they run."""

    training: fx.Graph
    evaluation: fx.Graph
    arguments: tuple[str, ...]  # required ones, in order
    guards: tuple[tuple[int, type], ...]  # (index of an argument, class that it must not be an instance of)


class _Proxy(fx.Proxy):
    """A stand-in that notices isinstance questions of code outside of torch."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        caller = sys._getframe(1).f_globals.get("__name__", "").split(".")[0]
        if caller not in TRACING:
            self.tracer.asked(self.node)  # type: ignore[attr-defined]
        return _Proxy

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise Untraceable("its forward changes the class of a tensor")


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=())
        self.begun = _modes()
        self.questioned: list[fx.Node] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def asked(self, node: fx.Node) -> None:
        """Code asks for the class of `node`."""
        if node.op != "placeholder":
            raise Untraceable("its forward asks for the class of an intermediate result")
        self.questioned.append(node)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.begun:
            raise Untraceable("its forward enters a context manager (no_grad, autocast, checkpoint, nvfp4_autocast)")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[Any, ...]:
    """What context managers change and a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        id(context.state()),
    )


@contextmanager
def _telling_modes() -> Iterator[None]:
    """Grad mode and autocast are on, with a dtype that no model asks for: a forward that sets them is noticed."""
    devices = ("cpu", "cuda")
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    outer = context.local.states
    context.local.states = [context.State(False, NVFP4BlockScaling(), "auto", True)]
    try:
        with torch.enable_grad(), torch.inference_mode(False):
            for d in devices:
                torch.set_autocast_dtype(d, torch.float64)
                torch.set_autocast_enabled(d, True)
            yield
    finally:
        context.local.states = outer
        for d, enabled, dtype in before:
            torch.set_autocast_dtype(d, dtype)
            torch.set_autocast_enabled(d, enabled)


def trace(module: nn.Module) -> Traced:
    """See the file's docstring.

    Raises:
        Untraceable: with the reason.
    """
    cls = type(module)
    if "forward" in module.__dict__ or cls.__call__ is not nn.Module.__call__:
        raise Untraceable("its forward or __call__ is replaced")
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        raise Untraceable(f"it is a {cls.__name__}")
    if cls.__reduce__ is not object.__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__:
        raise Untraceable("it pickles itself in a way of its own")
    arguments = _required(cls.forward)
    flags = [(m, m.training) for m in module.modules()]
    graphs: dict[tuple[bool, bool], tuple[fx.Graph, tuple[tuple[int, type], ...]]] = {}
    try:
        for own in (True, False):
            for children in (True, False):
                for m, _ in flags:
                    m.training = children
                module.training = own
                graphs[own, children] = _trace_once(module, arguments)
    finally:
        for m, training in flags:
            m.training = training
    codes = {key: str(graph.python_code("self").src) for key, (graph, _) in graphs.items()}
    if codes[True, True] != codes[True, False] or codes[False, True] != codes[False, False]:
        raise Untraceable("its forward reads the training flag of another module")
    same = codes[True, True] == codes[False, False]
    evaluation = graphs[True, True] if same else graphs[False, False]
    guards = tuple(sorted({*graphs[True, True][1], *evaluation[1]}, key=repr))
    return Traced(graphs[True, True][0], evaluation[0], arguments, guards)


def _required(forward: Callable[..., Any]) -> tuple[str, ...]:
    names = []
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.default is not inspect.Parameter.empty:
            continue
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            names.append(parameter.name)
        elif parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY):
            raise Untraceable(f"its argument {parameter.name!r} is positional-only or keyword-only")
    return tuple(names)


def _trace_once(module: nn.Module, arguments: tuple[str, ...]) -> tuple[fx.Graph, tuple[tuple[int, type], ...]]:
    shadow, before = _shadow(module, arguments)
    numbers = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    with _telling_modes(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracer = _Tracer()
        try:
            graph = tracer.trace(shadow)
        except Untraceable:
            raise
        except Exception as error:  # whatever a model's code raises on a stand-in
            first = (str(error).strip().splitlines() or [""])[0]
            raise Untraceable(f"{type(error).__name__}: {first:.160}") from error
    after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    if numbers[:2] != after[:2] or not torch.equal(numbers[2], after[2]):
        random.setstate(numbers[0])
        torch.set_rng_state(numbers[2])
        raise Untraceable("its forward draws random numbers")
    if not _same(shadow.__dict__, before):
        raise Untraceable("its forward sets attributes or creates tensors")
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    if tracer.questioned:
        return graph, tuple({(names.index(node.name), torch.Tensor) for node in tracer.questioned})
    return graph, ()


def _shadow(module: nn.Module, arguments: tuple[str, ...]) -> tuple[nn.Module, dict[str, Any]]:
    """A stand-in for the module, whose attributes may be set, and a copy of them to compare with."""
    original = type(module).forward
    space: dict[str, Any] = {"original": original, "checked": _check_result}
    names = "".join(f", {name}" for name in arguments)
    exec(f"def forward(self{names}): return checked(original(self{names}))", space)
    cls = type(type(module).__name__, (type(module),), {"forward": space["forward"]})
    shadow: nn.Module = object.__new__(cls)
    before: dict[str, Any] = {}
    containers = (dict, list, set)
    for into in (shadow.__dict__, before):
        into.update({k: copy.copy(v) if isinstance(v, containers) else v for k, v in module.__dict__.items()})
    return shadow, before


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Equal keys, the same objects; containers: of the same objects."""
    if a.keys() != b.keys():
        return False
    for key, x in a.items():
        y = b[key]
        if isinstance(x, (dict, list, set)) and type(x) is type(y):
            left, right = (list(v.items()) if isinstance(v, dict) else list(v) for v in (x, y))
            if [id(v) for v in _flat(left)] != [id(v) for v in _flat(right)]:
                return False
        elif x is not y:
            return False
    return True


def _flat(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from value
        else:
            yield value


def _check_result(result: Any) -> Any:
    """The result, if a graph returns it as it is."""
    if isinstance(result, (tuple, list)) and type(result) in (tuple, list):
        for value in result:
            _check_result(value)
    elif type(result) is dict:
        for value in result.values():
            _check_result(value)
    elif type(result) is OrderedDict and (found := [v for v in result.values() if type(v) is _Proxy]):
        pairs = [(key, _check_result(value)) for key, value in result.items()]  # a graph would return a plain dict
        return found[0].tracer.create_proxy("call_function", OrderedDict, (pairs,), {})
    elif type(result) is not _Proxy and result is not None and type(result) not in (int, float, bool, str):
        raise Untraceable(f"its forward returns a {type(result).__name__}")
    return result
