"""Recognize norms of other libraries that run torch's norm and then children of their own, such as an activation.

timm's BatchNormAct2d and GroupNormAct are of this kind. No names are compared: the norm's forward is traced, and in
training and in evaluation it must call torch's function as torch's own class does, give the result to one child after
another, and return it. nv.fuse then runs norm and activation in one operator, and nv.export.quantize folds the norm and
lets the children run.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from te_nvfp4_cv.fusion.children import changed, child_of
from te_nvfp4_cv.fusion.modules import NORM_CLASSES, NormActModule, activation_of, fusable
from te_nvfp4_cv.fusion.stand_ins import Untraceable
from te_nvfp4_cv.fusion.trace import Traced, trace

NORM_FUNCTIONS = (F.batch_norm, F.group_norm)


class NormThenChildren(NormActModule):
    """A mixin of the classes that nv.fuse makes for such norms. The original forward runs if anything has changed."""

    nvfp4_original: type[nn.Module]
    nvfp4_tail: tuple[str, ...]
    nvfp4_traced: Traced

    @property
    def bare(self) -> bool:
        """Whether the norm computes what torch's own does."""
        return not self.nvfp4_tail and self.nvfp4_traced.holds(self)

    @property
    def activation(self) -> str | None:  # type: ignore[override]
        """The activation after the norm, if it is all that follows and the fused operator serves it, or None."""
        child = child_of(self, self.nvfp4_tail[0]) if len(self.nvfp4_tail) == 1 else None
        name = activation_of(child)
        return None if name is None or changed(child) or not self.nvfp4_traced.holds(self) else name  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the original forward does. With a residual and an activation, call it as NormActModule's."""
        if len(args) == 3:  # from norm_act, which has seen that the norm is bare
            return super().forward(*args)
        name = self.activation if len(args) == 1 and not kwargs else None
        if name is not None and fusable(args[0], None, name):
            return self.fused(args[0], None, name)
        return super(NormActModule, self).forward(*args, **kwargs)  # type: ignore[misc]


def tail_of(norm: nn.Module) -> tuple[tuple[str, ...], Traced]:
    """Return the paths of the children that a norm calls after torch's norm, in order, and under which conditions.

    Children that return their input are left out of the paths. The conditions are those of Traced.holds.

    Raises:
        Untraceable: The norm is not of this kind; the message says why.
    """
    if isinstance(norm, NormThenChildren):
        return norm.nvfp4_tail, norm.nvfp4_traced
    name = type(norm).__name__
    base = torchs_class(norm)
    if base is None:
        raise Untraceable(f"{name} is not torch's own norm")
    plain: nn.Module = object.__new__(base)  # torch's class with the norm's parameters, buffers and settings
    plain.__dict__.update(norm.__dict__, _modules={})
    try:
        own, torchs = trace(norm), trace(plain)
    except Untraceable as error:
        raise Untraceable(f"{name} is not torch's own norm, and {error}") from error
    tails = set()
    for ours, theirs in ((own.training, torchs.training), (own.evaluation, torchs.evaluation)):
        *found, tail = _split(ours)
        if found != list(_split(theirs)[:2]):
            raise Untraceable(f"{name} is not torch's own norm, and its forward does more than call that and children")
        tails.add(tail)
    if len(tails) != 1:
        raise Untraceable(f"{name} is not torch's own norm, and it calls other children in evaluation")
    # What torch's norm reads, the fused operator reads anew at each call: momentum may be changed, for example.
    more = {name: value for name, value in own.attributes.items() if name not in torchs.attributes}
    return tails.pop(), replace(own, attributes=more)


def torchs_class(norm: nn.Module) -> type[nn.Module] | None:
    """Return which of torch's norms this one is derived from, if a fused operator serves that."""
    return next((cls for cls in type(norm).__mro__ if cls in NORM_CLASSES), None)


def _split(graph: fx.Graph) -> tuple[Any, set[Any], tuple[str, ...]]:
    """Return what a norm's graph computes up to its children's calls, what it writes, and the children's paths."""
    *nodes, output = graph.nodes
    tail: list[str] = []
    node = output.args[0]
    while isinstance(node, fx.Node) and node.op == "call_module":
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or list(before.users) != [node]:
            break
        tail.insert(0, str(node.target))
        node = before
    # What nothing reads is there for its effect, except for attributes and for questions about the input's shape.
    unread = [n for n in nodes if not n.users and n.op.startswith("call") and n.target is not getattr]
    written = {_meaning(n) for n in unread if not n.name.startswith("_assert")}
    return _meaning(node), written, tuple(tail)


def _meaning(value: Any) -> Any:
    """Describe an expression of a graph, so that equal ones compare as equal."""
    if not isinstance(value, fx.Node):
        return value if isinstance(value, (int, float, str)) else repr(value)
    if value.op in ("placeholder", "output"):
        return value.op
    arguments: Any = dict(enumerate(value.args)) | value.kwargs
    if value.target in NORM_FUNCTIONS:
        arguments = inspect.signature(value.target).bind(*value.args, **value.kwargs)  # type: ignore[arg-type]
        arguments.apply_defaults()
        arguments = arguments.arguments
    return value.op, value.target, tuple((name, _meaning(argument)) for name, argument in arguments.items())
