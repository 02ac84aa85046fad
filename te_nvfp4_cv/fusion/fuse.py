"""Fuse each norm of a model with the residual and the activation that follow it: nv.fuse(model), in place.

    BatchNorm or GroupNorm -> ReLU, SiLU, Hardswish, ReLU6, GELU or LeakyReLU
    BatchNorm or GroupNorm -> add -> ReLU

The forward of every module that calls norms is traced by torch.fx, with its children's calls as they are, but for
children that end with a norm whose sum or activation their caller runs (inlining.py). If a norm's result goes to the
activation alone, the two calls become one. Parameters, buffers, the state_dict, names, hooks and
module objects stay. Only classes change: norms get those of modules.py, and a module whose forward was rewritten gets
a subclass of its own class. If only convolutions or linear layers read the result, the operator is told which ones;
under nvfp4_autocast it then writes their quantized operand instead of the activation (layer/deferred.py; GPUs only).

Norms of other libraries that run torch's norm and then an activation of their own, as timm's BatchNormAct2d, become one
operator in themselves (subclasses.py). Children that do nothing, such as nn.Identity(), are no obstacle.

What cannot be fused stays as it is, and the report gives the reason. Pickling and deepcopy preserve the fusion;
torch.load of such a model needs this package. Fuse before torch.compile, DDP and FSDP, and after tools that trace by
torch.fx or torch.jit (feature extraction, FX quantization): they stop at a fused norm. Hooks that are put on a fused
norm or its activation later are called, because the two then run unfused. The original forward runs, too, if plain
attributes that it reads (self.drop_rate) or the module's children have changed since. But plain values inside other
objects that it reads (self.config.drop_rate, an attribute of a child) stay those of the time of fusing.
"""

from __future__ import annotations

import copy
import linecache
import re
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import count
from typing import Any, Literal, overload

from torch import Tensor, fx, nn

from te_nvfp4_cv.errors import check_module, warn_once
from te_nvfp4_cv.fusion.children import FAMILY, child_of, named_children
from te_nvfp4_cv.fusion.inlining import Inlined
from te_nvfp4_cv.fusion.modules import NORM_CLASSES, NormActModule, activation_of
from te_nvfp4_cv.fusion.patterns import Row, kind_of, rewrite, shown_name
from te_nvfp4_cv.fusion.stand_ins import Untraceable
from te_nvfp4_cv.fusion.subclasses import NormThenChildren, tail_of, torchs_class
from te_nvfp4_cv.fusion.trace import Traced, trace
from te_nvfp4_cv.layer.names import plain_name

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

    @property
    def left(self) -> dict[str, list[str]]:
        """The names of the norms that stay as they are, by the reason."""
        reasons = dict.fromkeys(row.reason for row in self.rows if not row.fused)
        return {reason: [row.name for row in self.rows if row.reason == reason] for reason in reasons}

    def __str__(self) -> str:
        lines = [f"{self.fused} of {len(self.rows)} norms are fused with what follows"]
        lines += [f"  {row.name}: {row.kind} + {row.fused}" for row in self.rows if row.fused]
        lines += [f"  left, because {reason}: {', '.join(names)}" for reason, names in self.left.items()]
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
    reasons: dict[nn.Module, str] = {}  # for norms that no traced forward calls
    named = {module: plain_name(name) for name, module in model.named_modules()}
    # Norms first: those of other libraries must be known when the modules that call them are rewritten.
    rows: dict[nn.Module, Row] = {}
    rows |= {norm: row for norm in named if isinstance(norm, FAMILY) and (row := _fuse_norm(norm)) is not None}
    for module in named:
        if isinstance(module, FAMILY) or not any(isinstance(m, FAMILY) for m in module.modules()):
            continue
        outcome = _fuse_one(module)
        for norm, row in outcome.rows.items():
            if norm not in rows or row.fused:
                rows[norm] = row
        if outcome.reason:
            for child in module.children():
                if isinstance(child, FAMILY):
                    reasons[child] = f"the forward of {type(module).__name__} cannot be rewritten: {outcome.reason}"
    result = Fusion(model)
    for module, name in named.items():
        if _is_norm(module):
            why = "no forward that could be traced calls it"
            if not isinstance(module, FAMILY):
                why = f"no operator serves {type(module).__name__}"
            row = rows.get(module, Row(name, kind_of(module), "", reasons.get(module, why)))
            result.rows.append(replace(row, name=name))
    if report:
        return result
    if result.rows and not result.fused:
        warn_once(
            "fuse",
            f"nv.fuse has fused none of the {len(result.rows)} norms of this {type(model).__name__}. "
            "print(nv.fuse(model, report=True)) says why.",
        )
    return model


def _is_norm(module: nn.Module) -> bool:
    """Return True if a report lists the module: torch's norms, and others whose class calls itself a norm."""
    if isinstance(module, FAMILY):
        return True
    return bool(re.search("Norm(?!al)", type(module).__name__)) and not any(map(_is_norm, module.children()))


def unfuse(model: nn.Module) -> None:
    """Give the modules that nv.fuse has changed their own classes again, in place."""
    torchs = {ours: plain for plain, ours in NORM_CLASSES.items()}
    for module in model.modules():
        if isinstance(module, Remade):
            module.__class__ = module.nvfp4_original  # type: ignore[assignment]
        elif type(module) in torchs and "activation" not in module.__dict__:  # one with it was made by the user
            module.__class__ = torchs[type(module)]  # type: ignore[index]


# ---- one module -----------------------------------------------------------------------------------------------------


@dataclass
class _Outcome:
    rows: dict[nn.Module, Row]
    reason: str = ""


class Remade:
    """A mixin of the classes that fuse makes, which have no name to import."""

    nvfp4_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the original class and the state. Loading fuses again."""
        return _blank, (self.nvfp4_original,), self.__getstate__()  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the state only: what fits this instance fits its copy, so nothing need be traced again."""
        new = memo[id(self)] = object.__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[attr-defined]
        return new


class FusedForward(Remade):
    """A mixin of modules that call norms. Their forward runs the graph, or the original if the call differs."""

    nvfp4_rows: tuple[tuple[str, Row], ...]


class _Restored:
    """A mixin of an unpickled instance that waits for its state."""

    def __setstate__(self, state: Any) -> None:
        original = type(self).__mro__[2]  # after this instance's class and _Restored
        self.__class__ = original  # type: ignore[assignment]
        assert isinstance(self, nn.Module)
        self.__setstate__(state)
        _fuse_norm(self) if isinstance(self, FAMILY) else _fuse_one(self)


def _blank(original: type[nn.Module]) -> Any:
    return object.__new__(type(original.__name__, (_Restored, original), {}))


def _remake(module: nn.Module, mixins: tuple[type, ...], space: dict[str, Any]) -> None:
    """Give the module a subclass of its class.

    Raises:
        TypeError: Python cannot do so: __slots__ and other layouts that a subclass cannot take over.
    """
    base = type(module)
    named = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    module.__class__ = type(base.__name__, (*mixins, base), {**space, **named, "nvfp4_original": base})


def _fuse_norm(norm: nn.Module) -> Row | None:
    """Let a norm that runs an activation itself do so in one operator. Returns None if that is up to its caller."""
    kind = kind_of(norm)
    if isinstance(norm, NormActModule):
        return None if norm.activation is None else Row("", kind, shown_name(norm.activation), "")
    if type(norm) in NORM_CLASSES:
        return None
    try:
        tail, traced = tail_of(norm)
        children = [child_of(norm, path) for path in tail]
        if children and (len(children) > 1 or activation_of(children[0]) is None):
            return Row("", kind, "", f"{type(children[0]).__name__} follows it")
        base: Any = torchs_class(norm)
        fused = NORM_CLASSES[base].__bases__[0]  # the mixin that calls the operator
        _remake(norm, (Remade, NormThenChildren, fused), {"nvfp4_tail": tail, "nvfp4_traced": traced})
    except (Untraceable, TypeError) as error:
        return Row("", kind, "", str(error))
    return _fuse_norm(norm)


def _fuse_one(module: nn.Module) -> _Outcome:
    """Rewrite the forward of one module, if its graph holds a pattern."""
    if isinstance(module, FusedForward):
        return _Outcome(_by_module(module, dict(module.nvfp4_rows)))
    try:
        traced = trace(module)
    except Untraceable as error:
        return _Outcome({}, str(error))
    rows, changed, inlined = rewrite(module, traced.training)
    if traced.evaluation is not traced.training:  # a norm that only one of the two graphs fuses is fused there
        more, also, others = rewrite(module, traced.evaluation)
        rows |= {name: row for name, row in more.items() if row.fused}
        inlined |= others
        changed |= also
    outcome = _by_module(module, rows)
    if changed:
        try:
            _remake(module, (FusedForward,), _rewritten(module, traced, rows, tuple(inlined.values())))
        except TypeError as error:
            return _Outcome({}, str(error))
        for norm, row in outcome.items():
            if row.fused and type(norm) in NORM_CLASSES:
                norm.__class__ = NORM_CLASSES[type(norm)]
    return _Outcome(outcome)


def _by_module(module: nn.Module, rows: dict[str, Row]) -> dict[nn.Module, Row]:
    return {norm: row for name, row in rows.items() if (norm := child_of(module, name)) is not None}


def _rewritten(
    module: nn.Module, traced: Traced, rows: dict[str, Row], inlined: tuple[Inlined, ...]
) -> dict[str, Any]:
    """Return the attributes of a class whose forward runs the graphs."""
    base = type(module)
    training = _compiled(traced.training, base)
    evaluation = training if traced.evaluation is traced.training else _compiled(traced.evaluation, base)
    children = named_children(module)
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
            or named_children(self) != children
            or not traced.holds(self)
            or not all(child.holds(self) for child in inlined)
            or any(map(_lacks, given))  # the trace had a tensor there
            or any(isinstance(given[index], Tensor) for index in guards)
        ):
            return original(self, *args, **kwargs)
        return (training if self.training else evaluation)(self, *given)

    return {"forward": forward, "nvfp4_rows": tuple(rows.items())}


def _lacks(value: Any) -> bool:
    """Return True for None, and for a list, tuple or dictionary that holds None."""
    if isinstance(value, (list, tuple, dict)):
        return any(map(_lacks, value.values() if isinstance(value, dict) else value))
    return value is None


def _compiled(graph: fx.Graph, base: type) -> Any:
    """Compile the graph into a function that takes self and the forward's required arguments."""
    code = graph.python_code("self")
    file = f"<nv.fuse {base.__module__}.{base.__qualname__} {next(_serial)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)  # for tracebacks
    space: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, file, "exec"), space)
    return space["forward"]
