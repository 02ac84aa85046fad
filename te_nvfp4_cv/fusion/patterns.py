"""Find the patterns that nv.fuse rewrites in the graph of a forward, and put one call in their place.

    norm -> activation              norm_act(norm, activation, z)
    norm -> add -> relu             norm_act(norm, activation, z, residual, into)
    ... -> convolutions alone       norm_act_into(norm, activation, layers, z, ...): see layer/deferred.py

A norm at the end of a child's forward is found, too: inlining.py brings the child's calls here before.

The modules are arguments of the call. So a module that takes the place of one of them later runs, too, and it runs
unfused if it is not a known one or has hooks. A pattern stays as it is if its intermediate result has another reader,
if it is added in place to a tensor that others may read, or if something is written in between.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from te_nvfp4_cv.context.function_mode import mode_is_on
from te_nvfp4_cv.context.state import state
from te_nvfp4_cv.fusion.children import FAMILY, OURS, changed, child_of, hooks
from te_nvfp4_cv.fusion.inlining import Inlined, inline
from te_nvfp4_cv.fusion.modules import NORM_CLASSES, NormActModule, activate, activation_of, name_of_gelu
from te_nvfp4_cv.fusion.stand_ins import IN_PLACE_OPERATORS, Untraceable
from te_nvfp4_cv.fusion.subclasses import NormThenChildren
from te_nvfp4_cv.fusion.trace import trace
from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.layer.deferred import deferring
from te_nvfp4_cv.nn.base import is_plain_layer
from te_nvfp4_cv.nn.modules import NVFP4_CLASSES
from te_nvfp4_cv.nn.walk import LAYERS

FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_), "relu"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.relu6: "relu6",
    F.gelu: "gelu",
}
METHODS = {"relu": "relu", "relu_": "relu"}
ADDITIONS = {operator.add, operator.iadd, torch.add}
ADD_METHODS = {"add", "add_"}
NEW_SUMS = (operator.add, torch.add)
IN_PLACE_ADDITIONS = (operator.iadd, "add_")
WRITING = {"setitem", *(f"i{name}" for name in IN_PLACE_OPERATORS)}


@dataclass
class Row:
    """One norm of the report: the operations that it was fused with, or the reason why it was not."""

    name: str
    kind: str
    fused: str  # "relu", "add + relu", ...; "" where it stays
    reason: str


def norm_act(
    norm: nn.Module,
    activation: nn.Module | str | None,
    z: Tensor,
    residual: Tensor | None = None,
    into: str | None = None,
) -> Tensor:
    """Return activation(norm(z) + residual). Rewritten forwards call this.

    Args:
        activation: None calls the norm alone, which has an activation of its own.
        into: What the model writes the sum to, "norm" (`norm(z) += residual`) or "residual", whose dtype and shape it
            must then have; None makes a new tensor.
    """
    if activation is None:
        return norm(z)
    known = activation if isinstance(activation, str) else activation_of(activation)
    own = changed(norm) or (isinstance(activation, nn.Module) and changed(activation))
    fits = into is None or (isinstance(residual, Tensor) and (residual.dtype, residual.shape) == (z.dtype, z.shape))
    if is_bare(norm) and known is not None and not own and fits:
        return norm(z, residual, known)
    u = norm(z)
    if residual is not None:
        a, b = (residual, u) if into == "residual" else (u, residual)
        u = a + b if into is None else operator.iadd(a, b)
    return activate(u, activation) if isinstance(activation, str) else activation(u)


def is_bare(norm: nn.Module) -> bool:
    """Return True if the norm can run what follows it, and does not run something of its own after it already."""
    if isinstance(norm, NormThenChildren):
        return norm.bare
    return isinstance(norm, NormActModule) and norm.activation is None


def norm_act_into(
    norm: nn.Module,
    activation: nn.Module | str | None,
    layers: tuple[nn.Module, ...],
    z: Tensor,
    residual: Tensor | None = None,
    into: str | None = None,
) -> Tensor:
    """Run norm_act for `layers` alone: if all of them quantize its result, it need not be written to memory."""
    if isinstance(norm, NormActModule) and not changed(norm) and all(_quantizes(layer) for layer in layers):
        with deferring():
            return norm_act(norm, activation, z, residual, into)
    return norm_act(norm, activation, z, residual, into)


_FORWARDS = {kind: kind.forward for kind in (*NVFP4_CLASSES, *NVFP4_CLASSES.values())}  # others may be put there later
_FUNCTIONS = {name: getattr(F, name) for name in vars(F) if name == "linear" or name.startswith("conv")}


def _quantizes(layer: nn.Module) -> bool:
    """Return True if a call of this layer is certain to reach the function mode before anything reads its input."""
    current = state()
    return (
        current is not None
        and current.enabled
        and mode_is_on()
        and not observe.observed()
        and is_plain_layer(layer)
        and getattr(layer, "padding_mode", "zeros") == "zeros"
        and not hooks(layer)
        and not {"forward", "_conv_forward"} & layer.__dict__.keys()
        and type(layer).forward is _FORWARDS[type(layer)]
        and all(getattr(F, name) is function for name, function in _FUNCTIONS.items())
    )


class Rewritten(NamedTuple):
    """What `rewrite` did: a row for each norm that the graph calls, by its path, and the children it calls no more."""

    rows: dict[str, Row]
    changed: bool
    inlined: dict[str, Inlined]


def rewrite(module: nn.Module, graph: fx.Graph) -> Rewritten:
    """Fuse every pattern of the graph."""
    inlined = inline(module, graph, lambda node: not isinstance(_what_follows(module, node), str))
    rows: dict[str, Row] = {}
    fused_calls: list[fx.Node] = []
    calls = [
        (node, norm)
        for node in graph.nodes
        if node.op == "call_module" and isinstance(norm := child_of(module, node.target), FAMILY)
    ]
    for node, norm in calls:
        kind = kind_of(norm)
        if isinstance(norm, NormActModule) and norm.activation is not None:
            if len(node.args) == 1 and not node.kwargs:
                fused_calls.append(node)
            continue
        match = _match(module, graph, node, norm)
        if isinstance(match, str):
            rows.setdefault(node.target, Row("", kind, "", match))
            continue
        act, add, residual = match
        # With an addition the call comes where the residual exists. Otherwise it takes the norm's place, because calls
        # of a shared norm must update its running statistics in their order.
        with graph.inserting_before(node if add is None else act):
            handle = graph.create_node("get_attr", node.target)
            chosen: Any = _activation(module, act)
            if act.op == "call_module":
                chosen = graph.create_node("get_attr", act.target)
            into = None
            if add is not None and add.target in IN_PLACE_ADDITIONS:
                into = "norm" if add.args[0] is node else "residual"
            fused = graph.call_function(norm_act, (handle, chosen, node.args[0], residual, into))
        fused_calls.append(fused)
        act.replace_all_uses_with(fused)
        name = shown_name(_activation(module, act) or "")
        for old in (act, add, node):
            if old is not None:
                graph.erase_node(old)
        rows[node.target] = Row("", kind, f"add + {name}" if add is not None else name, "")
    named = [_name_layers(module, graph, node) for node in fused_calls]
    return Rewritten(rows, any(named) or any(row.fused for row in rows.values()), inlined)


def _name_layers(module: nn.Module, graph: fx.Graph, node: fx.Node) -> bool:
    """Put norm_act_into in the place of a fused call if only layers that may be quantized read its result.

    Args:
        node: A call of norm_act, or of a norm that has an activation of its own.
    Returns:
        Whether the graph has changed.
    """
    users = list(node.users)
    for user in users:
        layer = child_of(module, str(user.target)) if user.op == "call_module" else None
        if not isinstance(layer, LAYERS) or user.args != (node,) or user.kwargs:
            return False
    last = next((other for other in reversed(graph.nodes) if other in node.users), node)
    if _written_between(module, graph, node, last):  # z and the residual are read when the layers run
        return False
    with graph.inserting_before(node):
        args: tuple[Any, ...] = node.args
        if node.op == "call_module":
            args = (graph.create_node("get_attr", node.target), None, *args)
        layers = tuple(graph.create_node("get_attr", user.target) for user in users)
        into = graph.call_function(norm_act_into, (*args[:2], layers, *args[2:]))
    node.replace_all_uses_with(into)
    graph.erase_node(node)
    return True


_Match = tuple[fx.Node, fx.Node | None, fx.Node | None]


def _match(module: nn.Module, graph: fx.Graph, node: fx.Node, norm: nn.Module) -> _Match | str:
    """Return the activation, the addition and the residual after a call of a norm, or the reason why it stays.

    The addition and the residual are None if nothing is added.
    """
    if type(norm) not in NORM_CLASSES and not is_bare(norm):
        return f"{type(norm).__name__} is not torch's own norm"
    if changed(norm):
        return "it has hooks" if hooks(norm) else "its forward is replaced"
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return "it is called with other arguments than one tensor"
    found = _what_follows(module, node)
    if isinstance(found, str):
        return found
    user, add, residual = found
    if add is not None and _called_between(module, graph, node, user, norm):
        return "it is called again before its activation"
    if add is not None and _written_between(module, graph, node, user, (add, residual)):
        return "something is written in place between it and its activation"
    return found


def _what_follows(module: nn.Module, node: fx.Node) -> _Match | str:
    """Return what _match does, for the result of any call; what lies between is not looked at."""
    user = _only_user(node)
    if user is None:
        return _why_several(node, "its result") if node.users else "its result is not used"
    add = residual = None
    if _is_addition(user):
        a, b = user.args
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
            return "a number is added to its result"
        if user.target in IN_PLACE_ADDITIONS and b is node and not _is_new(a):
            return "its result is added in place to a tensor that may be read elsewhere"
        add, residual = user, b if a is node else a
        user = _only_user(add)
        if user is None:
            return _why_several(add, "the sum with the residual")
    if user.target is norm_act:
        return "its result is added to that of another norm, which is fused with the sum"
    name = _activation(module, user)
    if name is None:
        return f"{_shown(module, user)} follows it"
    if add is not None and name != "relu":
        return f"an addition before {shown_name(name)}: its derivative needs the sum"
    if user.op == "call_module":
        hooked = child_of(module, str(user.target))
        assert hooked is not None
        if changed(hooked):
            return f"the activation that follows it has {'hooks' if hooks(hooked) else 'another forward'}"
    return user, add, residual


def _only_user(node: fx.Node) -> fx.Node | None:
    """Return the single reader of a node, or None if there are several or the node is returned."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return None if user.op == "output" else user


def _why_several(node: fx.Node, what: str) -> str:
    """Say why a node has no single reader."""
    if len(node.users) == 1:
        return f"{what} is returned, and no activation follows in this forward"
    return f"{what} is used more than once"


def _is_addition(node: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs
    function = node.op == "call_function" and node.target in ADDITIONS
    return plain and (function or (node.op == "call_method" and node.target in ADD_METHODS))


def _is_new(node: fx.Node) -> bool:
    """Return True if the node makes a sum that only one call reads, so that nobody sees if it is written to."""
    return node.target in NEW_SUMS and not node.kwargs and len(node.users) == 1


def _activation(module: nn.Module, node: fx.Node) -> str | None:
    """Return the name of the activation that this node calls on one tensor, or None."""
    args, kwargs = node.args[1:], dict(node.kwargs)
    if not node.args or any(isinstance(value, fx.Node) for value in (*args, *kwargs.values())):
        return None
    if node.op == "call_module":
        return None if args or kwargs else activation_of(child_of(module, str(node.target)))
    if node.op == "call_method":
        return None if args or kwargs else METHODS.get(str(node.target))
    name = FUNCTIONS.get(node.target)
    if name == "gelu":
        name = name_of_gelu(str(kwargs.pop("approximate", "none")))
    elif name == "leaky_relu":
        name = f"{name}:{args[0] if args else kwargs.pop('negative_slope', 0.01)}"
    return None if set(kwargs) - {"inplace"} else name  # the call is the tensor's only reader, so that this is the same


def shown_name(activation: str) -> str:
    """Return the name of an activation as a report shows it, without its slope."""
    return activation.partition(":")[0]


def _between(graph: fx.Graph, first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes = list(graph.nodes)
    return nodes[nodes.index(first) + 1 : nodes.index(last)]


def _called_between(module: nn.Module, graph: fx.Graph, first: fx.Node, last: fx.Node, norm: nn.Module) -> bool:
    """Return True if the norm runs between the two, also in a child: its statistics would change out of order."""
    children = [child_of(module, str(n.target)) for n in _between(graph, first, last) if n.op == "call_module"]
    return any(m is norm for child in children if child is not None for m in child.modules())


def _written_between(
    module: nn.Module, graph: fx.Graph, first: fx.Node, last: fx.Node, addition: tuple[Any, Any] = (None, None)
) -> bool:
    """Return True if a call between the two may write to a tensor that the fused call would then read too late.

    Args:
        addition: That of the pattern itself, which writes to the norm's result at most, and the residual.
    """
    add, residual = addition
    tensors = [value for value in first.args if isinstance(value, fx.Node) and value.op != "get_attr"]
    private = all(_only_reader(module, value, first) for value in tensors)
    for node in _between(graph, first, last):
        if node is add:  # the fused call, which comes after all of them, reads the residual, too
            private = private and _only_reader(module, residual, add)
        elif _writes(node):
            return True
        if node.op == "call_module" and not private and not _writes_nothing(child_of(module, str(node.target))):
            return True
    return False


def _writes(node: fx.Node) -> bool:
    """Return True for a call of torch that writes to its argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    # Torch's names say it: relu_, add_, setitem, iadd; others take inplace=True or out=.
    in_place = name.endswith("_") or (node.op == "call_function" and name in WRITING)
    return bool(in_place or node.kwargs.get("inplace") or node.kwargs.get("out") is not None)


def _only_reader(module: nn.Module, value: fx.Node, reader: fx.Node) -> bool:
    """Return True if `value` is the result of a layer, and `reader` alone sees it."""
    layer = child_of(module, str(value.target)) if value.op == "call_module" else None
    return isinstance(layer, LAYERS) and list(value.users) == [reader]


def _writes_nothing(child: nn.Module | None) -> bool:
    """Return True if neither the module nor its children work in place: torch's own, and others by their forward."""
    modules = [] if child is None else list(child.modules())
    return all(_is_tame(m) for m in modules)


def _is_tame(module: nn.Module) -> bool:
    if getattr(module, "inplace", False):
        return False
    if type(module).__module__.split(".")[0] in ("torch", OURS) or isinstance(module, NormThenChildren):
        return True
    try:
        traced = trace(module)
    except Untraceable:
        return False
    return not any(_writes(node) for graph in (traced.training, traced.evaluation) for node in graph.nodes)


def kind_of(norm: nn.Module) -> str:
    """Return the class name of the norm, and of torch's own one where nv.fuse has put a class of this package."""
    ours = type(norm) in NORM_CLASSES.values()
    return type(norm).__name__.replace("Act", "") if ours else type(norm).__name__


def _shown(module: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(child_of(module, str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target))
