"""Take the largest amax of all ranks, over a process group of this package, and check that they are of one layer.

    CallScales    the amaxes of one call under nvfp4_autocast(amax_reduction_group=...)
    reduce        amaxes of one operand, or of one weight's delayed scales, become the largest of the ranks
    own_group     the process group of a set of ranks that carries nothing else
    name_of       which layer of the model a call is

DDP sends its buckets over the group that users have at hand, in an order that a branch taken by one rank alone changes.
Two kinds of collectives on one group would then meet each other. So the amaxes have a group of their own, which is made
when the ranks meet for the first time. On it ranks may still meet in different layers. So each message carries two
numbers: of the layer's name, and of its operand's kind and sizes (all that a graph of torch.compile and code outside of
modules know). Both travel as n and -n: the maxima are those of one number if no rank has another one.

On a CPU a mismatch raises at once, on all ranks. On a GPU nobody waits for the answer: it is looked at when a context
is left, as soon as it has arrived, so the error comes up to a step late. Under a CUDA graph's capture nobody looks.
"""

from __future__ import annotations

import functools
import threading
import weakref
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from te_nvfp4_cv.backend import devices
from te_nvfp4_cv.backend.torch_private import unseen_by_checkpoints
from te_nvfp4_cv.errors import runtime_error
from te_nvfp4_cv.layer.constants import running_modules
from te_nvfp4_cv.layer.names import plain_name
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.quantize import amax as amaxes
from te_nvfp4_cv.ops.quantize import grouped
from te_nvfp4_cv.ops.quantize.operand import measure_operand
from te_nvfp4_cv.ops.records import Collector, Move, OperandSpec
from te_nvfp4_cv.recipe.fields import Role

SLOTS = 4  # amaxes in a message: those of a weight's delayed scales; shorter ones are filled up, so that all fit
ROWS = {Role.INPUT: 0, Role.GRAD_OUTPUT: 1}  # of pairs of numbers, for x and for dy
_NAMELESS = -(2**31) + 1  # in place of n and of -n: no maximum

_lock = threading.Lock()
# (ranks, backend) -> the default group at that time, and the group. Weak: its threads and sockets end with it.
_groups: dict[Any, tuple[weakref.ref[Any], weakref.ref[Any]]] = {}
_paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_texts: dict[int, str] = {}  # what a number stands for; errors say it


def own_group(group: Any, device: torch.device, backend: str | None = None) -> Any:
    """Return the group that carries nothing but our numbers, of the ranks of `group`.

    The first call meets these ranks. `backend` "gloo" is for numbers that the host asks beside a GPU's work.
    """
    ranks = tuple(dist.get_process_group_ranks(group))
    known = _groups.get((ranks, backend))
    world: Any = dist.group.WORLD
    # After destroy_process_group a group of that name is a dead one.
    if known is not None and known[0]() is world and known[1]() is not None:
        return known[1]()
    if backend is None and len(ranks) < world.size() and world.bound_device_id is not None:
        # NCCL splits a group off the default one there, for which it needs ranks that do not come here.
        made = group
    else:
        try:
            timeout = group._get_backend(device).options._timeout
        except (AttributeError, RuntimeError):  # a backend without options
            timeout = None
        made = dist.new_group(
            list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True, group_desc="nvfp4_amax"
        )
    with _lock:
        _groups[ranks, backend] = (weakref.ref(world), weakref.ref(made))
    return made


# ---- which layer ----------------------------------------------------------------------------------------------------


def _number(text: str) -> int:
    number = zlib.crc32(text.encode()) & 0x7FFFFFFF
    _texts[number] = text
    return number


# Made once: a tensor made from numbers would be a copy to the device at each call.
@functools.lru_cache(maxsize=4096)
def _tags(name: str, operand: str, device: torch.device) -> Tensor:
    """Return int32 [4]: the numbers of the operand and of the name, n and -n each."""
    n, m = _number(operand), _number(name)
    named = [m, -m] if name else [_NAMELESS, _NAMELESS]
    return torch.tensor([n, -n, *named], dtype=torch.int32, device=device)


def name_of(w: Tensor) -> str:
    """Return the name of a weight in the model that is running, or that of its module if it is no Parameter."""
    running = list(running_modules())
    for module in running:
        path = _paths.get(module)
        if path is None:
            # The outermost one is the model. All names are learned, because errors name layers of other ranks, too.
            for name, inside in running[-1].named_modules():
                _paths.setdefault(inside, plain_name(name))
                _number(_paths[inside])  # which stands for a kernel that is computed there
                for own, _ in inside._parameters.items():  # over a ScriptModule's own dict one cannot iterate
                    _number(".".join(filter(None, (plain_name(name), own))))
            path = _paths.get(module)
        if path is not None:
            held = [name for name, p in module._parameters.items() if p is w]
            return ".".join(filter(None, (path, *held[:1])))
    return ""


# ---- the exchange ---------------------------------------------------------------------------------------------------


def reduce(amax: Tensor, group: Any, name: str, operand: str) -> None:
    """Replace amaxes by the largest of all ranks: by the bits, so that NaN wins.

    Args:
        amax: fp32, at most SLOTS, not negative; overwritten.
        group: the ranks.
        name: of the weight, or "" where that is not known.
        operand: its kind and its layer's sizes, in words.
    Raises:
        RuntimeError: the ranks are at different layers; on a GPU, a later call raises it.
    """
    seen = _tags(name, operand, amax.device).clone()
    mine = f"{operand}, {name!r}" if name else operand
    message = torch.nn.functional.pad(amax.flatten(), (0, SLOTS - amax.numel()))
    amaxes.reduce_amax(message, own_group(group, amax.device), seen)
    amax.copy_(message[: amax.numel()].view_as(amax))
    if amax.device.type == "cpu":
        _check(seen.tolist(), mine)
    elif not torch.cuda.is_current_stream_capturing():
        later.add(seen, mine)


def _check(seen: list[int], mine: str) -> None:
    for high, low in ((seen[2], -seen[3]), (seen[0], -seen[1])):  # the name says more than the sizes
        if high == low or high == _NAMELESS:
            continue
        one, other = (_texts.get(number, "a layer that this rank does not have") for number in (high, low))
        raise runtime_error(
            "nvfp4: the ranks share the amaxes of different layers.",
            got=f"{one} on one rank, {other} on another; this one is at {mine}",
            needs="the same layers in the same order on all ranks of amax_reduction_group, in forward and in backward",
            fix="let every rank take the same branches (an empty batch is fine), or leave amax_reduction_group out",
        )


class Later:
    """Checks that wait for numbers on their way from a device; nothing here waits."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.seen: list[tuple[Tensor, Any]] = []  # and the streams that make them
        self.sent: list[tuple[Any, Tensor, list[str]]] = []  # event, numbers on the host when it has come, texts
        self.waits = False  # there is something to look at

    def add(self, seen: Tensor, text: str) -> None:
        """Remember the numbers of one call."""
        self.seen.append((seen, devices.stream_of(seen)))
        self.texts.append(text)
        self.waits = True

    def look(self) -> None:
        """Send what has been added to the host, and check what has arrived.

        Raises:
            RuntimeError: the ranks were at different layers.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return  # which must hold none of this
        if self.seen:
            device = self.seen[0][0].device
            for seen, stream in self.seen:
                devices.follow(stream, [seen])
            numbers = torch.stack([seen.to(device) for seen, _ in self.seen])
            # Pinned memory: only into that a copy does not wait.
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=device.type == "cuda")
            host.copy_(numbers, non_blocking=True)
            event = torch.Event(device)
            event.record()
            self.sent.append((event, host, self.texts))
            self.seen, self.texts = [], []
        while self.sent and self.sent[0][0].query():
            _, host, texts = self.sent.pop(0)
            self.waits = bool(self.sent)
            for row, text in zip(host.tolist(), texts, strict=True):
                _check(row, text)


later = Later()


# ---- the scales of one call -----------------------------------------------------------------------------------------


class CallScales:
    """Gives the amaxes of one call, the largest over the ranks.

    Args:
        training: a backward pass comes or is running.
        together: the ranks hold parts of one image, and so are here together in evaluation, too.
    """

    def __init__(self, plan: Plan, group: Any, training: bool, name: str = "", together: bool = False) -> None:
        self.plan, self.group, self.training, self.name, self.together = plan, group, training, name, together
        self.experts: Experts | None = None  # of a grouped linear layer

    def knows(self, role: Role) -> bool:
        """Return True if `amax` answers without reading the operand."""
        return False

    @unseen_by_checkpoints  # the ranks' numbers are written in place, which a checkpoint that keeps them refuses
    def amax(self, role: Role, operand: Tensor) -> Tensor:
        """Return fp32 [2] for quantize_operand: the largest amaxes over the ranks."""
        if operand.numel() == 0:  # an empty batch has a part in what the ranks share
            return self._reduced(torch.zeros(2, device=operand.device), role.value)
        # One group: how channels are grouped does not change an amax.
        spec = OperandSpec(1, self.plan.folds[ROWS[role]], rht=self.plan.recipe.settings(role).rht)
        if self.experts is not None:
            return self._reduced(grouped.measure_operand(operand, self.experts, spec, self.plan.backend), role.value)
        return self._reduced(measure_operand(operand, spec, self.plan.backend), role.value)

    def collector(self, role: Role) -> Collector | None:
        """Return where a call leaves what it observes; here there is nothing to remember."""
        return None

    def backward_ran(self) -> None:
        """Take note that the backward pass of the call has quantized dy."""

    def settle(self) -> None:
        """Move now what take_move would return."""
        move = self.take_move()
        if move is not None:
            amaxes.move(*move, clear=True)

    def take_move(self) -> Move | None:
        """Return what has to move before `amax` is asked; here nothing does."""
        return None

    def _reduced(self, amax: Tensor, what: str) -> Tensor:
        """Take the maximum over the ranks. Evaluation asks nobody: a rank may run it alone, if it has whole images."""
        if self.group is not None and (self.training or self.together):
            g = self.plan.geometry
            operand = f"{what} of a layer with a weight {g.weight_shape}, groups={g.groups}"
            reduce(amax, self.group, self.name, operand)
        return amax
