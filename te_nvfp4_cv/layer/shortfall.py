"""Warns once for a model of which most work stays in high precision though its user has not asked for that.

Counted are multiply-adds of layers of eligible shape while the outermost context is open: those in NVFP4, and those
that a reason keeps in high precision which is not the user's choice (fp64, torch.func, a constant kernel, a device
without a backend). Thin layers, depthwise convolutions, what set_precision or the recipe names, and calls that
a graph of torch.compile runs in high precision do not count: but what set_precision and the recipe name is work, too,
of which the rest must be more than half. nv.coverage lists everything.

A context that stays open is looked at in the middle of a pass, where the part that runs in NVFP4 may be still to come:
only after another pass has ended, and with a lower bound. After an exception nothing is said of the part that ran.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import tree_leaves
from te_nvfp4_cv.layer import check, observe
from te_nvfp4_cv.layer.constants import running_modules
from te_nvfp4_cv.ops.geometry import ConvGeometry

# Beginnings of reasons that the user has chosen.
USERS = (
    "nvfp4_autocast(enabled=False)",
    "torch.autocast(enabled=False)",
    "set_precision",
    "the weight is stored in NVFP4",
    "no fast backend for meta",  # where nothing is computed
    "meta tensors hold no values",
)
ASKED = ("torch.autocast(enabled=False)", "set_precision")  # of these, what a model's own layers have
HALF, THIRD = 0.5, 1 / 3
OFTEN = 512  # high-precision calls after which a context that stays open is looked at
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_warned_reasons: set[str] = set()  # of calls outside of all modules
_lock = threading.Lock()
_CALL = nn.Module.__call__.__code__


class _Local(threading.local):
    """What this thread has counted since it entered its outermost context."""

    def __init__(self) -> None:
        self.macs = 0  # multiply-adds in NVFP4; whoever runs a layer adds its own
        # By operators that graphs call; context/torch_patches.py asks whether a Function's own Python runs layers.
        self.in_graphs = 0
        self.asked = 0  # in high precision as the recipe or set_precision says
        self.missed: dict[str, int] = {}  # by reason
        self.calls = 0  # that were missed
        self.model: weakref.ref[nn.Module] | None = None  # the outermost module in the first of them
        self.batch: weakref.ref[Tensor] | None = None  # that it was given, at the last look in the middle of a pass
        self.quiet = False


local = _Local()


def forget() -> None:
    """Forget the calls that were missed: a thread enters its outermost context, and counts from 0."""
    local.missed, local.calls, local.model, local.batch = {}, 0, None, None


def ran(geometry: ConvGeometry) -> None:
    """Count a layer that runs in NVFP4. Sizes that a trace leaves open are no numbers, and are not counted."""
    if torch.compiler.is_compiling():  # the operator counts, when the graph runs it
        return
    macs = geometry.macs
    if isinstance(macs, int):
        local.macs += macs


def ran_as_operator(geometry: ConvGeometry) -> None:
    """Count a layer that a graph runs."""
    local.in_graphs += geometry.macs


def call_counted(operator: Callable[..., Any], *args: Any) -> Any:
    """Call the operator of a layer that the caller has counted, whether it runs or is only traced."""
    if torch.compiler.is_compiling():
        return operator(*args)
    before = local.in_graphs
    y = operator(*args)
    local.in_graphs = before
    return y


def missed(call: observe.Call, y: Tensor, groups: int) -> None:
    """Count a call that is in high precision for call.reason, if that is not the user's choice and the shape is fit."""
    x, w, reason = call.x, call.weight, call.reason
    asked = reason.startswith(ASKED) or "recipe." in reason
    if local.quiet or (reason.startswith(USERS) and not asked):
        return
    fit = isinstance(x, Tensor) and isinstance(w, Tensor) and isinstance(y, Tensor) and w.dim() >= 2
    if fit and not check.is_thin(w, groups):
        macs = (x if "transpose" in call.op else y).numel() * w.numel() // max(w.shape[0], 1)
        if asked:
            ask(macs)
        else:
            add(reason, macs)


def ask(macs: int) -> None:
    """Count multiply-adds of a layer in high precision that the user has asked for."""
    if isinstance(macs, int) and not torch.compiler.is_compiling():
        local.asked += macs


def add(reason: str, macs: int) -> None:
    """Count multiply-adds in high precision for a reason that is not the user's choice, of a shape that is fit."""
    if local.quiet or not isinstance(macs, int):  # as in `ran`
        return
    if not local.calls:
        running = list(running_modules())
        local.model = weakref.ref(running[-1]) if running else None
    local.missed[reason] = local.missed.get(reason, 0) + macs
    local.calls += 1
    if local.calls % OFTEN == 0 and _pass_has_ended():
        judge(THIRD)


def _pass_has_ended() -> bool:
    """Return True if the outermost module has another batch than at the last look."""
    batch, frame = None, sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            batch = frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    given = [] if batch is None else tree_leaves((batch.get("args"), batch.get("kwargs")))
    found = next((value for value in given if isinstance(value, Tensor)), None)
    if found is None:
        return False
    before, local.batch = local.batch, weakref.ref(found)
    return before is not None and before() is not found


def _is_in_forward_of(model: nn.Module) -> bool:
    """Return True if the code that leaves the context is called by the module's own."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        method = code.co_argcount and code.co_varnames[0] == "self" and code.co_filename != _CALL.co_filename
        if method and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False


def judge(least: float = HALF) -> None:
    """Warn if a smaller part than `least` of what was counted ran in NVFP4. Each model is warned of once."""
    macs = local.macs + local.in_graphs
    total = macs + sum(local.missed.values())
    model = None if local.model is None else local.model()
    reasons = sorted(local.missed.items(), key=lambda pair: -pair[1])
    if macs >= least * total or total - macs <= HALF * (total + local.asked):
        return
    with _lock:
        if model is None:
            # Outside of modules, or its model is gone: no more can be said than the reason.
            known = reasons[0][0] in _warned_reasons
            _warned_reasons.add(reasons[0][0])
        else:
            known = model in _warned
            _warned.add(model)
    if known:
        return
    name = "these calls" if model is None else type(model).__name__
    if model is not None and least == HALF and _is_in_forward_of(model):  # other parts may be in other contexts
        name = f"a context inside of {name}"
    parts = "; ".join(f"{work / total:.0%} because {reason}" for reason, work in reasons)
    warnings.warn(
        f"nvfp4: only {macs / total:.0%} of the work of {name} runs in NVFP4, of layers of eligible shape. "
        f"High precision: {parts}. nv.coverage(model, inputs) lists every layer; "
        'set_precision(model, {"name": None}) says that it is meant',
        UserWarning,
        stacklevel=4,
    )
