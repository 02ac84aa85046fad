"""Tensor scales that come from the step before: delayed ones.

    x: amax = 6 E 2^k >= 8 * (amax of x in the training step before);  dy: the same with 4;  w: its own amax

The state of a delayed scale belongs to a weight, and holds for x and for dy, rowwise and columnwise:

    used        the amaxes that its calls quantize with
    collected   the largest ones met since; non-finite ones do not count
    saturated   blocks clipped because an estimate was too small

    first use                  measured, then the same rule; a call after it in the same step uses the same scale
    training forward           the first one after a backward pass moves collected into used; every one collects
    evaluation                 only reads; before the first training step it measures, and leaves no state
    recomputed forward         (checkpointing) uses what the forward used, unless another training step of the weight
                               came between; it adds no saturated block twice

The state is kept beside the weight, by the tensor's identity, as long as that lives: not in the state_dict and not in a
copy (deepcopy starts fresh); nv.extra_state saves it. A view of a weight has one of its own, by its place in it. A
kernel that is computed anew at each call has the one of the innermost module that is running, shared with kernels of
the same shape there; outside of modules it is measured at each call. Where nothing finite was ever met, the scale is 1.
Everything is computed on the weight's device, without synchronization, in tensors that stay where they are, as CUDA
graphs need it. torch.compile leaves layers with delayed scales uncompiled; with fullgraph=True it stops.
Refused: scales of rows that ranks should share, a saved state that does not fit.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend import devices
from te_nvfp4_cv.backend.dispatch import is_traced
from te_nvfp4_cv.backend.swapping import gives_up
from te_nvfp4_cv.backend.torch_private import dispatch_modes, graph_task, under_checkpoint, unseen_by_checkpoints
from te_nvfp4_cv.errors import runtime_error, value_error
from te_nvfp4_cv.layer.constants import running_modules
from te_nvfp4_cv.layer.inside import replaced
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.layer.shared_amax import ROWS, CallScales, name_of
from te_nvfp4_cv.ops.quantize import amax as amaxes
from te_nvfp4_cv.ops.records import Collector, Move
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.fields import Role

_states: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight, or the module of computed ones -> {Key: scales}
_lock = threading.Lock()  # two threads may make the first call with one weight at once
Key = tuple[Any, ...]  # (place of a view in its base or None, e4m3_max of the input, RHT)
Owner = Tensor | torch.nn.Module


@gives_up
def _set_aside(w: Tensor) -> Callable[[], None] | None:
    with _lock:
        states = _states.pop(w, None)
    return None if states is None else functools.partial(_states.__setitem__, w, states)


class _Local(threading.local):
    """Say, per thread, if states may change, if a checkpoint's forward without gradients is a training one, and if
    ranks hold parts of one image."""

    reading = False
    first_pass = False
    together = False


_local = _Local()


# ---- the state of one weight ----------------------------------------------------------------------------------------


class DelayedScales:
    """The scales of x and dy for one weight: tensors [2 roles, 2 faces] on its device, and flags that steer them."""

    def __init__(self, e4m3_max: int, device: torch.device) -> None:
        self.e4m3_max = (e4m3_max, formats.E4M3_MAX)
        self.used = torch.empty(2, 2, dtype=torch.float32, device=device)
        # With amax = 6 E the tensor scale is 1: what holds until something finite is met.
        for role in (0, 1):
            self.used[role].fill_(formats.E2M1_MAX * self.e4m3_max[role])
        self.collected = torch.zeros(2, 2, dtype=torch.float32, device=device)
        # What `used` will be after the next move, if `foreseen`: prepared.py's backward passes write it.
        self.next, self.foreseen = torch.zeros(2, 2, dtype=torch.float32, device=device), False
        # fp64 counts on where fp32 would stop, at 2^24 blocks.
        self.saturated = torch.zeros(2, dtype=torch.float64, device=device)
        self.stream = devices.stream_of(self.used)  # of the last call
        # Python flags: asking a tensor on a GPU would wait for the GPU at each call.
        self.measured = [False, False]
        self.stale = False  # a backward pass has run since `used` moved
        self.captured = False  # the last training forward was captured in a CUDA graph
        self.in_graphs = False  # any was: its replays move the values, and Python sees nothing of it

    def to(self, device: torch.device) -> None:
        """Follow a weight that was moved."""
        self.follow()
        for name in ("used", "collected", "saturated", "next"):
            setattr(self, name, getattr(self, name).to(device))
        self.stream = devices.stream_of(self.used)

    def follow(self) -> None:
        """Let a call or a reader on another stream than the last one wait for what that has moved and collected."""
        self.stream = devices.follow(self.stream, (self.used, self.collected, self.saturated, self.next))

    def state(self) -> dict[str, Any]:
        """Return the values, copied to the CPU."""
        self.follow()
        tensors = {name: getattr(self, name).detach().cpu().clone() for name in ("used", "collected", "saturated")}
        return {**tensors, "measured": list(self.measured), "stale": self.stale}

    @classmethod
    def from_state(cls, e4m3_max: int, saved: Mapping[str, Any], device: torch.device) -> DelayedScales:
        """Build the scales from what `state` gave."""
        new = cls(e4m3_max, device)
        for name in ("used", "collected", "saturated"):
            getattr(new, name).copy_(saved[name])
        new.measured, new.stale = list(saved["measured"]), saved["stale"]
        return new


def owner(w: Tensor) -> Tensor:
    """Return the tensor for which a parameter's state is kept: the parameter, but for what FSDP2 shards and gathers."""
    found: Tensor | None = getattr(getattr(w, "_local_tensor", w), "state_owner", None)
    return w if found is None else found


def _place(w: Tensor) -> tuple[Owner, tuple[Any, ...] | None]:
    """Find the parameter that owns the scaling state of w, or the module if w is computed.

    If w is a view (a third of a fused qkv weight, say), also return its position, so that each view has scales of its
    own; if it is computed, its shape.
    """
    base, found = w._base, owner(w)
    # A Parameter may be a view of a flat buffer, too, and owns its state all the same.
    if isinstance(w, torch.nn.Parameter) or found is not w:
        return found, None
    if not isinstance(base, torch.nn.Parameter):
        module = next(running_modules(), None)
        # Freed after the call, as nothing else is there that lives longer.
        return (w, None) if module is None else (module, (-1, tuple(w.shape), ()))
    return base, (w.storage_offset(), tuple(w.shape), tuple(w.stride()))


# ---- the scales of one call -----------------------------------------------------------------------------------------


class DelayedCallScales(CallScales):
    """Gives the amaxes of one call with delayed scales, from the state of its weight."""

    def __init__(self, shared: CallScales, again: bool, state: DelayedScales | None) -> None:
        super().__init__(shared.plan, shared.group, shared.training, shared.name, shared.together)
        self.again, self.scales = again, state
        self.moves = False  # a backward pass has run since the scales moved, and this call moves them

    def knows(self, role: Role) -> bool:
        """Return True if the state has been measured."""
        return self.scales is not None and self.scales.measured[ROWS[role]]

    @unseen_by_checkpoints
    def amax(self, role: Role, operand: Tensor) -> Tensor:
        """Return fp32 [2]: the state's amaxes, measured where there are none yet."""
        scales, i = self.scales, ROWS[role]
        self.settle()
        if scales is not None and scales.measured[i]:
            return scales.used[i]
        measured = super().amax(role, operand)
        # Evaluation must not leave a state behind: it measures into one that is thrown away.
        if scales is None or not self.training:
            scales = DelayedScales(self.plan.input.e4m3_max, operand.device)
        row, margin = slice(i, i + 1), self.plan.recipe.settings(role).margin
        amaxes.move(scales.used[row], measured.view(1, 2), (scales.e4m3_max[i],), (margin,), clear=False)
        scales.measured[i] = True
        return scales.used[i]

    @unseen_by_checkpoints
    def collector(self, role: Role) -> Collector | None:
        """Return the part of the state that the next step's scales come from."""
        if self.scales is None or not self.training:
            return None
        s, i = self.scales, ROWS[role]
        # A recomputed forward clips the same blocks again, but dy is quantized once.
        return Collector(s.collected[i], s.saturated[i : i + 1], role == Role.GRAD_OUTPUT or not self.again)

    def backward_ran(self) -> None:
        """Let the next training forward move the scales."""
        if self.scales is not None and self.training:
            self.scales.stale, self.scales.foreseen = True, False

    def start(self, capturing: bool) -> None:
        """Start a training forward: have the scales move if a backward pass has run since they moved."""
        scales = self.scales
        if scales is None:
            return
        scales.captured, scales.in_graphs = capturing, scales.in_graphs or capturing
        if not scales.stale:
            return
        scales.stale = False
        # The ranks meet here, once a step: reducing at each call would be a communication per layer and operand.
        if self.group is not None:
            with torch.no_grad():
                self._reduced(scales.collected, "delayed scales")
        self.moves = True

    def take_move(self) -> Move | None:
        """Return what has to move before `amax` is asked."""
        if not self.moves:
            return None
        self.moves, scales = False, self.scales
        assert scales is not None
        margins = (self.plan.input.margin, self.plan.grad_output.margin)
        return Move(scales.used, scales.collected, scales.e4m3_max, margins)


def refuse(recipe: NVFP4BlockScaling, group: Any) -> None:
    """Refuse scales that a call cannot have.

    Raises:
        ValueError: scales of rows that ranks should share.
        RuntimeError: delayed scales while torch.compile or make_fx traces the call.
    """
    if group is not None and recipe.row_scaled_activation:
        raise value_error(
            "nvfp4: these scales cannot be shared between ranks.",
            got=f"amax_reduction_group with the recipe {recipe!r}",
            needs="one scale per tensor: row_scaled_activation=False",
            fix="leave amax_reduction_group out, or change the recipe",
        )
    if recipe.tensor_scale == "delayed" and is_traced():
        raise runtime_error(
            "nvfp4: delayed tensor scales do not work under torch.compile yet.",
            got="a recipe with tensor_scale='delayed', in a call that torch.compile, torch.export or make_fx traces",
            needs="tensor_scale='current' there: the state of delayed scales is kept outside of the graph",
            fix="dataclasses.replace(recipe, tensor_scale='current'), or do not trace",
        )


def _capturing(x: Tensor, scales: DelayedScales | None) -> bool:
    """Return True if a training forward with these scales is being captured in a CUDA graph.

    Raises:
        RuntimeError: the graph would not move them.
    """
    capturing = devices.capturing(x)
    if capturing and (scales is None or not (scales.stale or scales.captured)):
        raise runtime_error(
            "nvfp4: a CUDA graph captured now would never move the delayed tensor scales.",
            got="a training forward under capture, and no backward pass of this layer since its scales moved",
            needs="warm-up steps, forward and backward, before the capture",
            fix="run a few steps on a side stream first, as torch.cuda.graph's documentation shows",
        )
    return capturing


def of_call(x: Tensor, w: Tensor, bias: Tensor | None, plan: Plan, group: Any) -> CallScales | None:
    """Return the scales of one call, moved on if it starts a training step; None where each tensor's own amax rules.

    Raises:
        ValueError: as `refuse`.
        RuntimeError: as `refuse`, or a CUDA graph's capture before any training step.
    """
    if not plan.delayed and group is None:
        return None
    if dispatch_modes() and under_checkpoint():
        return unseen_by_checkpoints(of_call)(x, w, bias, plan, group)
    if not _local.together:  # there plan.row_scaled has been asked for each layer
        refuse(plan.recipe, group)
    again = graph_task() != -1  # a checkpoint recomputes
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, bias))
    training = (training or (_local.first_pass and not again)) and not _local.reading
    shares = group is not None and (training or _local.together)
    shared = CallScales(plan, group, training, name_of(w) if shares else "", _local.together)
    if not plan.delayed:
        return shared
    settings = plan.input
    place, view = _place(w)
    key: Key = (view, settings.e4m3_max, settings.rht)
    starts, capturing = training and not again, False
    with _lock:
        known: dict[Key, DelayedScales] = _states.get(place, {})
        scales = known.get(key)
        if starts:  # before a state is made, in memory that only the graph may write
            capturing = _capturing(x, scales)
        # Not for a recomputed forward: the forward that it repeats had no state, and both must give the same codes.
        if scales is None and starts:
            with torch.no_grad():
                scales = DelayedScales(settings.e4m3_max, x.device)
            _states.setdefault(place, known)[key] = scales
        elif scales is not None and scales.used.device != x.device:
            scales.to(x.device)
    if scales is not None and scales.stream is not None:
        scales.follow()
    call = DelayedCallScales(shared, again, scales)
    if starts:
        call.start(capturing)
    return call


def reading_only() -> AbstractContextManager[None]:
    """Treat calls inside as evaluation: no state is made or changed (coverage)."""
    return replaced(_local, reading=True)


def first_pass(training: bool) -> AbstractContextManager[None]:
    """Say that a backward pass will recompute the calls inside with gradients (`training`), which run without now."""
    return replaced(_local, first_pass=training)


def of_one_image() -> AbstractContextManager[None]:
    """Say that the ranks of the group hold parts of one image in the calls inside: they share amaxes always."""
    return replaced(_local, together=True)


# ---- for nv.extra_state, nv.saturated_blocks and nv.export ----------------------------------------------------------


def has_state(w: Owner) -> bool:
    """Return True if calls with this weight have delayed scales, or those with kernels that this module computes."""
    return w in _states


def trained_amax(w: Tensor, recipe: NVFP4BlockScaling, trained: Owner) -> Tensor | None:
    """Return fp32 [1]: the amax with which a call with this weight would quantize x now, or None before training.

    Args:
        trained: what was trained: w itself, or for a kernel that is computed the module that multiplies it.
    """
    settings = recipe.settings("input")
    place, view = _place(trained) if isinstance(trained, Tensor) else (trained, (-1, tuple(w.shape), ()))
    scales = _states.get(place, {}).get((view, settings.e4m3_max, settings.rht))
    if scales is None or not scales.measured[0]:
        return None
    scales.follow()
    return scales.used[0, :1].clone()  # `used` is written in place at each step


def states_of(w: Owner) -> Mapping[Key, DelayedScales]:
    """Return the scales of a weight, or of the kernels that a module computes, by what they belong to."""
    return _states.get(w, {})


def replace_states(weights: Iterable[Owner], made: Mapping[Owner, dict[Key, DelayedScales]]) -> None:
    """Give weights other scales; one that is not in `made` starts fresh."""
    with _lock:
        for w in weights:
            _states.pop(w, None)
        for w, states in made.items():
            _states[w] = states


def saturated(w: Owner) -> tuple[int, int]:
    """Return how many blocks were clipped in x and in dy for this weight since its state began."""
    states = states_of(w).values()
    for scales in states:
        scales.follow()
    total = [sum(int(s.saturated[role]) for s in states) for role in (0, 1)]
    return total[0], total[1]
