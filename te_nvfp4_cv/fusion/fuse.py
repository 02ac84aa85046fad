"""Fuse each norm of a model with the residual and the activation that follow it: nv.fuse(model), in place.

    BatchNorm -> ReLU,  BatchNorm -> add -> ReLU,  BatchNorm -> SiLU,  GroupNorm -> ReLU,  GroupNorm -> SiLU

The forward of every module that calls norms is traced by torch.fx, without looking into its children. If a norm's
result goes to the activation alone, the two calls become one. Parameters, buffers, the state_dict, names, hooks and
module objects stay. Only classes change: norms get those of modules.py, and a module whose forward was rewritten gets
a subclass of its own class. If only convolutions or linear layers read the result, the operator is told which ones;
under nvfp4_autocast it then writes their quantized operand instead of the activation (layer/deferred.py; GPUs only).

What cannot be fused stays as it is, and the report gives the reason. Pickling and deepcopy preserve the fusion;
torch.load of such a model needs this package. Fuse before torch.compile, DDP and FSDP, and after tools that trace by
torch.fx or torch.jit (feature extraction, FX quantization): they stop at a fused norm. Hooks that are put on a fused
norm or its activation later are called, because the two then run unfused. The original forward runs, too, if plain
attributes that it reads (self.drop_rate) or the module's children have changed since. But plain values inside other
objects that it reads (self.config.drop_rate, an attribute of a child) stay those of the time of fusing.
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from typing import Any, Literal, overload

from torch import Tensor, fx, nn

from te_nvfp4_cv.errors import check_module
from te_nvfp4_cv.fusion.modules import NORM_CLASSES
from te_nvfp4_cv.fusion.patterns import FAMILY, Row, kind_of, rewrite
from te_nvfp4_cv.fusion.trace import Traced, Untraceable, child_of, trace
from te_nvfp4_cv.nn.names import plain_name

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_serial = count()


@dataclass
class Fusion:
    """The report of nv.fuse(model, report=True): one row per norm. Print it."""

    model: nn.Module
    rows: list[Row] = field(default_factory=list)

    @property
    def fused(self) -> int:
        """The number of norms that were fused."""
        return sum(bool(row.fused) for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{self.fused} of {len(self.rows)} norms are fused with what follows"]
        for row in self.rows:
            what = f"{row.kind} + {row.fused}" if row.fused else f"{row.kind} stays: {row.reason}"
            lines.append(f"  {row.name}: {what}")
        return "\n".join(lines)


@overload
def fuse(model: nn.Module, report: Literal[False] = False) -> nn.Module: ...


@overload
def fuse(model: nn.Module, report: Literal[True]) -> Fusion: ...


def fuse(model: nn.Module, report: bool = False) -> nn.Module | Fusion:
    """Fuse every norm of the model with the residual and the activation that follow it, in place.

    A second call fuses what is left. Training and evaluation, set_precision, convert_model, checkpoints and optimizers
    work as before. Values differ from the unfused model's by roundings (on a CPU in training, dense fp32 tensors give
    the same bits).

    Args:
        report: Return a report of what was fused, and why other norms were not, instead of the model.
    Returns:
        The model, or a Fusion.
    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> layers = torch.nn.Conv2d(16, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU()
        >>> print(nv.fuse(torch.nn.Sequential(*layers), report=True))
        1 of 1 norms are fused with what follows
          1: BatchNorm2d + relu
    """
    check_module("fuse", model, "nv.fuse(model)")
    rows: dict[nn.Module, Row] = {}
    reasons: dict[nn.Module, str] = {}  # for norms that no traced forward calls
    named = {module: plain_name(name) for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if isinstance(module, FAMILY) or not any(isinstance(m, FAMILY) for m in module.modules()):
            continue
        outcome = _fuse_one(module)
        for norm, row in outcome.rows.items():
            found = Row(named.get(norm, name), row.kind, row.fused, row.reason)
            if norm not in rows or found.fused:
                rows[norm] = found
        if outcome.reason:
            for child in module.children():
                if isinstance(child, FAMILY):
                    reasons[child] = f"the forward of {type(module).__name__} cannot be rewritten: {outcome.reason}"
    if not report:
        return model
    result = Fusion(model)
    for module, name in named.items():
        if isinstance(module, FAMILY):
            why = reasons.get(module, "no forward that could be traced calls it")
            result.rows.append(rows.get(module, Row(name, kind_of(module), "", why)))
    return result


# ---- one module -----------------------------------------------------------------------------------------------------


@dataclass
class _Outcome:
    rows: dict[nn.Module, Row]
    reason: str = ""


class FusedForward:
    """A mixin of the classes that fuse makes. Their forward runs the graph, or the original if the call differs."""

    nvfp4_rows: tuple[tuple[str, Row], ...]
    nvfp4_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the original class and the state: the made class has no name to import. Loading fuses again."""
        state = self.__getstate__()  # type: ignore[attr-defined]
        return _blank, (self.nvfp4_original,), state


class _Restored:
    """A mixin of an unpickled instance that waits for its state."""

    def __setstate__(self, state: Any) -> None:
        original = type(self).__mro__[2]  # after this instance's class and _Restored
        self.__class__ = original  # type: ignore[assignment]
        assert isinstance(self, nn.Module)
        self.__setstate__(state)
        _fuse_one(self)


def _blank(original: type[nn.Module]) -> Any:
    return object.__new__(type(original.__name__, (_Restored, original), {}))


def _fuse_one(module: nn.Module) -> _Outcome:
    """Rewrite the forward of one module, if its graph holds a pattern."""
    if isinstance(module, FusedForward):
        return _Outcome(_by_module(module, dict(module.nvfp4_rows)))
    try:
        traced = trace(module)
    except Untraceable as error:
        return _Outcome({}, str(error))
    rows = rewrite(module, traced.training)
    found = dict(rows)
    if traced.evaluation is not traced.training:  # a norm that only one of the two graphs fuses is fused there
        found.update({name: row for name, row in rewrite(module, traced.evaluation).items() if row.fused})
    outcome = _by_module(module, found)
    if any(row.fused for row in found.values()):
        try:
            module.__class__ = _fused_class(module, traced, tuple(found.items()))
        except TypeError as error:  # __slots__ and other layouts that a subclass cannot take over
            return _Outcome({}, str(error))
        for norm, row in outcome.items():
            if row.fused and type(norm) in NORM_CLASSES:
                norm.__class__ = NORM_CLASSES[type(norm)]
    return _Outcome(outcome)


def _by_module(module: nn.Module, rows: dict[str, Row]) -> dict[nn.Module, Row]:
    return {norm: row for name, row in rows.items() if (norm := child_of(module, name)) is not None}


def _fused_class(module: nn.Module, traced: Traced, rows: tuple[tuple[str, Row], ...]) -> type[nn.Module]:
    base = type(module)
    training = _compiled(traced.training, base)
    evaluation = training if traced.evaluation is traced.training else _compiled(traced.evaluation, base)
    children = _children(module)
    names, guards = traced.arguments, traced.guards
    original = base.forward

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = args  # by position, as the graph takes them
        if kwargs and set(kwargs) == set(names[len(args) :]):
            given = (*args, *(kwargs[name] for name in names[len(args) :]))
        elif kwargs:
            return original(self, *args, **kwargs)
        if (
            len(given) != len(names)
            or _children(self) != children
            or not traced.holds(self)
            or any(value is None for value in given)  # the trace had a tensor there
            or any(isinstance(given[index], Tensor) for index in guards)
        ):
            return original(self, *args, **kwargs)
        return (training if self.training else evaluation)(self, *given)

    space = {
        "forward": forward,
        "nvfp4_rows": rows,
        "nvfp4_original": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (FusedForward, base), space)


def _children(module: nn.Module) -> tuple[Any, ...]:
    """Return the names of the module's children, also inside ModuleList and ModuleDict, and which of them are None."""
    return tuple(
        (name, child if child is None else _children(child) if isinstance(child, CONTAINERS) else ())
        for name, child in module._modules.items()
    )


def _compiled(graph: fx.Graph, base: type) -> Any:
    """Compile the graph into a function that takes self and the forward's required arguments."""
    code = graph.python_code("self")
    file = f"<nv.fuse {base.__module__}.{base.__qualname__} {next(_serial)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)  # for tracebacks
    space: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, file, "exec"), space)
    return space["forward"]
