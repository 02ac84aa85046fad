"""Warns once for a model of which most work stays in high precision though its user has not asked for that.

Counted are multiply-adds of layers of eligible shape while the outermost context is open: those in NVFP4, and those
that a reason keeps in high precision which is not the user's choice (fp64, torch.func, a constant kernel, a device
without a backend). Thin layers, depthwise convolutions, what set_precision or the recipe names, and calls that
a graph of torch.compile runs in high precision do not count. nv.coverage lists everything.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
HALF = 0.5
OFTEN = 512  # high-precision calls after which a context that stays open is looked at
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_warned_reasons: set[str] = set()  # of calls outside of all modules
_lock = threading.Lock()


class _Local(threading.local):
    """What this thread has counted since it entered its outermost context."""

    def __init__(self) -> None:
        self.macs = 0  # multiply-adds in NVFP4; whoever runs a layer adds its own
        # By operators that graphs call; context/torch_patches.py asks whether a Function's own Python runs layers.
        self.in_graphs = 0
        self.missed: dict[str, int] = {}  # by reason
        self.calls = 0  # that were missed
        self.model: weakref.ref[nn.Module] | None = None  # the outermost module in the first of them
        self.quiet = False


local = _Local()


def forget() -> None:
    """Forget the calls that were missed: a thread enters its outermost context, and counts from 0."""
    local.missed, local.calls, local.model = {}, 0, None


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
    if local.quiet or reason.startswith(USERS) or "recipe." in reason:
        return
    fit = isinstance(x, Tensor) and isinstance(w, Tensor) and isinstance(y, Tensor) and w.dim() >= 2
    if fit and not check.is_thin(w, groups):
        add(reason, (x if "transpose" in call.op else y).numel() * w.numel() // max(w.shape[0], 1))


def add(reason: str, macs: int) -> None:
    """Count multiply-adds in high precision for a reason that is not the user's choice, of a shape that is fit."""
    if local.quiet or not isinstance(macs, int):  # as in `ran`
        return
    if not local.calls:
        running = list(running_modules())
        local.model = weakref.ref(running[-1]) if running else None
    local.missed[reason] = local.missed.get(reason, 0) + macs
    local.calls += 1
    if local.calls % OFTEN == 0:
        judge()


def judge() -> None:
    """Warn if less than half of what was counted ran in NVFP4. Each model is warned of once."""
    macs = local.macs + local.in_graphs
    total = macs + sum(local.missed.values())
    model = None if local.model is None else local.model()
    reasons = sorted(local.missed.items(), key=lambda pair: -pair[1])
    if not total or macs >= HALF * total:
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
    parts = "; ".join(f"{work / total:.0%} because {reason}" for reason, work in reasons)
    warnings.warn(
        f"nvfp4: only {macs / total:.0%} of the work of {name} runs in NVFP4, of layers of eligible shape. "
        f"High precision: {parts}. nv.coverage(model, inputs) lists every layer; "
        'set_precision(model, {"name": None}) says that it is meant',
        UserWarning,
        stacklevel=4,
    )
