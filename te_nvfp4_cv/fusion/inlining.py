"""Put the calls of a child's forward in the place of the child's call, where the last of them is a norm.

    x = self.conv3(x)                 x = self.conv3.conv(x)
                             ->       x = self.conv3.bn(x)
    x += shortcut                     x += shortcut
    return self.act3(x)               return self.act3(x)

Many blocks are built of smaller ones that hold a convolution and its norm (timm's ConvNormAct, torchvision's
Conv2dNormActivation), and add their result to something before the activation. The patterns look at one graph, so they
find such a norm in its caller's. The child itself stays what it is; its caller just does not call it. So the caller
runs its original forward if the child has hooks, another class, or anything else than at the time of the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from te_nvfp4_cv.fusion.children import FAMILY, all_hooks, child_of, named_children, own_class
from te_nvfp4_cv.fusion.stand_ins import Untraceable
from te_nvfp4_cv.fusion.trace import Traced, trace
from te_nvfp4_cv.nn.walk import LAYERS


@dataclass
class Inlined:
    """A child whose calls its caller makes in its place, as it was then."""

    path: str
    cls: type[nn.Module]
    traced: Traced
    children: tuple[Any, ...]

    def holds(self, module: nn.Module) -> bool:
        """Return True if a call of the child would still make these calls and no others."""
        child = child_of(module, self.path)
        return (
            child is not None
            and own_class(child) is self.cls
            and "forward" not in child.__dict__
            and not all_hooks(child)  # of this package, too: entries of set_precision act while the child runs
            and named_children(child) == self.children
            and self.traced.holds(child)
        )


def inline(module: nn.Module, graph: fx.Graph, wanted: Callable[[fx.Node], bool]) -> dict[str, Inlined]:
    """Put the calls of children in the place of their own, in the graph of a module's forward.

    Args:
        wanted: tells for the call of a child whether its caller runs an activation on the result.
    Returns:
        The children, by their path.
    """
    found: dict[str, Inlined] = {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    while calls:
        node = calls.pop()
        path, child = str(node.target), child_of(module, str(node.target))
        plain = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
        if child is None or not plain or not wanted(node) or (traced := _ending_with_a_norm(child)) is None:
            continue
        found[path] = Inlined(path, own_class(child), traced, named_children(child))
        calls += _put_in(graph, node, path, traced.training)
    return found


def _ending_with_a_norm(child: nn.Module) -> Traced | None:
    """Return the trace of a child that takes one tensor and returns the result of a norm; None for any other."""
    if isinstance(child, (*FAMILY, *LAYERS)) or not any(isinstance(m, FAMILY) for m in child.modules()):
        return None
    if all_hooks(child):
        return None
    try:
        traced = trace(child)
    except Untraceable:
        return None
    if traced.training is not traced.evaluation or len(traced.arguments) != 1 or traced.guards:
        return None
    last = next(iter(reversed(traced.training.nodes))).args[0]  # what the output is; torch 2.11 has no iterator here
    if not isinstance(last, fx.Node) or last.op != "call_module" or len(last.users) != 1:
        return None
    inner = child_of(child, str(last.target))
    ends = isinstance(inner, FAMILY) or (inner is not None and _ending_with_a_norm(inner) is not None)
    return traced if ends else None


def _put_in(graph: fx.Graph, node: fx.Node, path: str, calls: fx.Graph) -> list[fx.Node]:
    """Put `calls`, the graph of the child at this path, in the place of its call `node`. Returns its own calls."""
    values: dict[fx.Node, Any] = {}
    with graph.inserting_before(node):
        for inner in calls.nodes:
            if inner.op == "placeholder":
                values[inner] = node.args[0]
            elif inner.op == "output":
                node.replace_all_uses_with(values[inner.args[0]])
            else:
                values[inner] = copied = graph.node_copy(inner, values.__getitem__)
                if inner.op in ("call_module", "get_attr"):
                    copied.target = f"{path}.{inner.target}"
    graph.erase_node(node)
    return [value for inner, value in values.items() if inner.op == "call_module"]
