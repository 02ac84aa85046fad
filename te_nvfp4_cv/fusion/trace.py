"""Trace the forward of one module into torch.fx graphs in which calls of children stay calls, or say why not.

    trace(module)  ->  Traced(graph while training, graph in evaluation, names of arguments, guards)

torch.fx runs the forward once with stand-ins (proxies) for its arguments, so whatever the code decides meanwhile is
fixed in the graph. Arguments with a default are traced at their default and must have it at run time. An `isinstance`
question about an argument is answered "no" and must be "no" at run time. Plain attributes of the module that are read
must then be equal; where it asks for classes, children must still have theirs. Calls of children that return their
input, nn.Identity() and nn.Dropout(0), are left out, and these children must still do so at run time.
Refused is a forward that no graph can replace: control flow on values or shapes, attributes set, tensors put anywhere
(a list, another object), random numbers drawn, tensors created, a context manager entered (no_grad, autocast,
checkpoint) or asked about (torch.is_grad_enabled), type() and hasattr() of a tensor, comparisons by `is`, look-ups of
an argument in a set or dictionary, attributes of tensors set, results of other classes than tuples, lists and dicts.
"""

from __future__ import annotations

import copy
import dis
import gc
import inspect
import random
import sys
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import fx, nn

from te_nvfp4_cv.backend.torch_private import saved_tensors_hooks_are_on
from te_nvfp4_cv.context import state
from te_nvfp4_cv.fusion.children import OURS, child_of, foreign_class, is_identity, own_class, paths_of_children
from te_nvfp4_cv.fusion.stand_ins import StandIn, Untraceable
from te_nvfp4_cv.layer.inside import replaced
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

ABOUT_MODES = {  # a trace would freeze the answers to these questions
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "is_autocast_enabled",
    "is_autocast_cpu_enabled",
    "get_autocast_dtype",
    "get_autocast_cpu_dtype",
    "get_autocast_gpu_dtype",
    "is_compiling",
    "active_recipe",
    "type",
}
ABOUT_MODULES = {"isinstance", "issubclass", "hasattr", "callable"}  # the answers hold while a child's class stays
PLAIN = (int, float, bool, str, type(None), types.FunctionType, types.BuiltinFunctionType, type, torch.dtype)
MISSING = object()
# Code of these is not the model's. The model's questions are searched for in the code that runs, by name.
FOREIGN = {"torch", "torchvision", OURS, *sys.stdlib_module_names}
CONTAINERS = (dict, list, set)


@dataclass
class Traced:
    """The graphs of training and evaluation, which may be one object, and the conditions under which they may run."""

    training: fx.Graph
    evaluation: fx.Graph
    arguments: tuple[str, ...]  # required ones, in order
    guards: tuple[int, ...]  # the arguments with these indices must not be tensors
    attributes: dict[str, Any]  # plain attributes of the module that were read, with their values
    identities: tuple[str, ...]  # the paths of children whose calls were left out
    classes: dict[str, type]  # of children, by their path, where the forward asks somebody for a class

    def holds(self, module: nn.Module) -> bool:
        """Return True if the attributes that were read are still equal, the children left out still do nothing, and
        the others have the class that was asked for.
        """
        now = module.__dict__
        return (
            all(_equal(now.get(name, MISSING), value) for name, value in self.attributes.items())
            and all(is_identity(child_of(module, path)) for path in self.identities)
            and all(foreign_class(child_of(module, path)) is cls for path, cls in self.classes.items())
        )


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else a forward that counts its calls would do so here

    def __init__(self) -> None:
        super().__init__(autowrap_functions=())
        self.begun = _modes()  # must not change while the forward runs
        self.questioned: list[fx.Node] = []
        self.made: list[weakref.ref[fx.Proxy]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True  # calls of children stay calls

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = StandIn(node, self)
        self.made.append(weakref.ref(made))
        return made

    def alive(self) -> bool:
        """Return True if a stand-in that was made still exists."""
        return any(made() is not None for made in self.made)

    def asked(self, node: fx.Node) -> None:
        """Remember that the model's code asks for the class of `node`."""
        if node.op != "placeholder":
            raise Untraceable("its forward asks for the class of an intermediate result")
        self.questioned.append(node)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.begun:
            raise Untraceable("its forward enters a context manager (no_grad, autocast, checkpoint, nvfp4_autocast)")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[Any, ...]:
    """Return the state that context managers change, and that a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
        saved_tensors_hooks_are_on(),
        id(state.state()),
    )


@contextmanager
def _telling_modes() -> Iterator[None]:
    """Turn grad mode and autocast on, with a dtype that no model asks for, so that a forward that sets them shows."""
    devices = ("cpu", "cuda")
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    # A context of our own, so that nvfp4_autocast inside the forward is noticed, too.
    states = [state.State(False, NVFP4BlockScaling(), "auto", True)]
    try:
        with torch.enable_grad(), torch.inference_mode(False), replaced(state.local, states=states):
            for d in devices:
                torch.set_autocast_dtype(d, torch.float64)
                torch.set_autocast_enabled(d, True)
            yield
    finally:
        for d, enabled, dtype in before:
            torch.set_autocast_dtype(d, dtype)
            torch.set_autocast_enabled(d, enabled)


def trace(module: nn.Module) -> Traced:
    """Trace the forward of a module in training and in evaluation; the original one, if nv.fuse has rewritten it.

    Raises:
        Untraceable: No graph can replace the forward; the message says why.
    """
    cls = own_class(module)
    if "forward" in module.__dict__ or cls.__call__ is not nn.Module.__call__:
        raise Untraceable("its forward or __call__ is replaced")
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        raise Untraceable(f"it is a {cls.__name__}")
    if cls.__reduce__ is not object.__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__:
        raise Untraceable("it pickles itself in a way of its own")
    if hasattr(cls, "__deepcopy__"):
        raise Untraceable("it copies itself in a way of its own")
    arguments = _required(cls.forward)
    read: set[str] = set()
    flags = [(m, m.training) for m in module.modules()]
    graphs: dict[tuple[bool, bool], tuple[fx.Graph, set[int], bool]] = {}
    # A forward that reads a child's training flag gives another graph where the two flags differ.
    modes = [(own, children) for own in (True, False) for children in (True, False)]
    try:
        for own, children in modes if len(flags) > 1 else modes[::3]:
            for m, _ in flags:
                m.training = children
            module.training = own
            graphs[own, children] = _trace_once(module, arguments, read)
    finally:
        for m, training in flags:
            m.training = training
    classes: dict[str, type] = {}
    if any(asks for *_, asks in graphs.values()):
        calls = (node for graph, *_ in graphs.values() for node in graph.nodes if node.op == "call_module")
        paths = {*paths_of_children(module), *(str(node.target) for node in calls)}
        classes = {path: foreign_class(child_of(module, path)) for path in sorted(paths)}
    identities = {name for graph, *_ in graphs.values() for name in _leave_out_identities(module, graph)}
    codes = {key: str(graph.python_code("self").src) for key, (graph, *_) in graphs.items()}
    if any(code != codes[own, own] for (own, _), code in codes.items()):
        raise Untraceable("its forward reads the training flag of another module")
    same = codes[True, True] == codes[False, False]
    evaluation = graphs[True, True] if same else graphs[False, False]
    guards = tuple(sorted({*graphs[True, True][1], *evaluation[1]}))
    names = module.__dict__.keys() - nn.Module().__dict__.keys()
    attributes = {name: copy.copy(value) for name in read & names if _is_plain(value := module.__dict__[name])}
    found = graphs[True, True][0], evaluation[0], arguments, guards, attributes, tuple(sorted(identities))
    return Traced(*found, classes)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return type(value) in PLAIN


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and _is_plain(a) and bool(a == b))


def _leave_out_identities(module: nn.Module, graph: fx.Graph) -> set[str]:
    """Remove the calls of children that return their input. Returns the paths of these children."""
    found = set()
    for node in list(graph.nodes):
        alone = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        if alone and is_identity(child_of(module, node.target)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            found.add(node.target)
    return found


@contextmanager
def _code_that_runs() -> Iterator[set[types.CodeType]]:
    """Collect the code of the model's functions that run inside."""
    ran: set[types.CodeType] = set()

    def note(frame: types.FrameType, event: str, _: Any) -> None:
        if str(frame.f_globals.get("__name__", "")).split(".")[0] not in FOREIGN:
            ran.add(frame.f_code)

    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()  # so that new objects stay in the youngest generation, which is searched quickly afterwards
    sys.settrace(note)
    try:
        yield ran
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()


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


def _trace_once(module: nn.Module, arguments: tuple[str, ...], read: set[str]) -> tuple[fx.Graph, set[int], bool]:
    """Return the graph of one mode, the indices of the arguments that the forward takes for no tensors, and whether it
    may ask for a module's class.
    """
    shadow, before = _shadow(module, arguments, read)
    numbers = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    with _telling_modes(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracer = _Tracer()
        try:
            with _code_that_runs() as ran:
                graph = tracer.trace(shadow)
        except Untraceable:
            raise
        except Exception as error:  # whatever a model's code raises on a stand-in
            first = (str(error).strip().splitlines() or [""])[0]
            raise Untraceable(f"{type(error).__name__}: {first:.160}") from error
    used = {name for code in ran for name in code.co_names}
    asked = used & ABOUT_MODES
    if asked:
        raise Untraceable(f"its forward asks for what may differ at each call: {', '.join(sorted(asked))}")
    if any(map(_compares_identity, ran)):
        raise Untraceable("its forward compares by `is`, or by `match` with lists or dictionaries")
    after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    if numbers[:2] != after[:2] or not torch.equal(numbers[2], after[2]):
        random.setstate(numbers[0])
        torch.set_rng_state(numbers[2])
        raise Untraceable("its forward draws random numbers")
    if not _same(shadow.__dict__, before):
        raise Untraceable("its forward sets attributes or creates tensors")
    for generation in (0, 2):  # what outlives the forward may only be part of a cycle; a full collection takes long
        if not tracer.alive():
            break
        gc.collect(generation)
    if tracer.alive():
        raise Untraceable("its forward puts tensors into a list or another object")
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    return graph, {names.index(node.name) for node in tracer.questioned}, bool(used & ABOUT_MODULES)


def _compares_identity(code: types.CodeType) -> bool:
    """Return True if the code asks what a stand-in answers with no, unseen: `is` something else than None, for example
    a flag or a dtype.
    """
    before: Any = None
    for instruction in dis.get_instructions(code):
        none = before is not None and before.opname == "LOAD_CONST" and before.argval is None
        if (instruction.opname == "IS_OP" and not none) or instruction.opname in ("MATCH_SEQUENCE", "MATCH_MAPPING"):
            return True
        before = instruction
    return False


def _shadow(module: nn.Module, arguments: tuple[str, ...], read: set[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a stand-in for the module, whose attributes may be set, and a copy of them to compare with.

    Args:
        read: Collects the names of the attributes that the forward asks for.
    """
    base = own_class(module)
    original = base.forward
    space: dict[str, Any] = {"original": original, "checked": _check_result}
    names = "".join(f", {name}" for name in arguments)
    exec(f"def forward(self{names}): return checked(original(self{names}))", space)

    def noted(self: Any, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(self, name)

    changed = {"forward": space["forward"], "__getattribute__": noted}
    if hasattr(base, "_check_input_dim"):  # a norm's, which branches on the shape
        changed["_check_input_dim"] = lambda self, x: None
    cls = type(base.__name__, (base,), changed)
    shadow: nn.Module = object.__new__(cls)
    before: dict[str, Any] = {}
    for into in (shadow.__dict__, before):
        into.update({k: copy.copy(v) if isinstance(v, CONTAINERS) else v for k, v in module.__dict__.items()})
    return shadow, before


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return True if both have the same keys and objects; containers count as equal if they hold the same objects."""
    return a.keys() == b.keys() and all(_identities(x) == _identities(b[key]) for key, x in a.items())


def _identities(value: Any) -> list[int]:
    """Return the ids of a container's class and of what it holds, keys included, or the id of any other value."""
    if not isinstance(value, CONTAINERS):
        return [id(value)]
    held = [*value, *value.values()] if isinstance(value, dict) else list(value)
    return [id(type(value)), *map(id, held)]


def _check_result(result: Any) -> Any:
    """Return the result if a graph can return the same.

    Raises:
        Untraceable: It is of a class that a graph cannot build.
    """
    if isinstance(result, (tuple, list)) and type(result) in (tuple, list):
        for value in result:
            _check_result(value)
    elif type(result) is dict:
        for value in result.values():
            _check_result(value)
    elif type(result) is OrderedDict and (found := [v for v in result.values() if type(v) is StandIn]):
        # A graph would return a plain dict, so the call of OrderedDict is recorded in it.
        pairs = [(key, _check_result(value)) for key, value in result.items()]
        return found[0].tracer.create_proxy("call_function", OrderedDict, (pairs,), {})
    elif type(result) is not StandIn and result is not None and type(result) not in (int, float, bool, str):
        raise Untraceable(f"its forward returns a {type(result).__name__}")
    return result
