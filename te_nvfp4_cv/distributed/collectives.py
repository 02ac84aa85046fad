"""The collectives under everything distributed: gather several tensors in one message, and count bytes on the wire.

    gather_parts   each tensor concatenated over the ranks, along an axis of its own; one uint8 message for all of them
    gather_ints    a few numbers of every rank, read on the host

Tensors travel as uint8, whatever their dtype, because gloo refuses float8. A message is the tensors of one rank, one
after the other. Where ranks hold different sizes, each message is as long as the longest. The functions run eagerly
only, since sizes and errors are decided on the host. `wire_bytes` counts what ranks receive, for tests and reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from te_nvfp4_cv import errors
from te_nvfp4_cv.backend import devices
from te_nvfp4_cv.ops.quantize import amax

Part = tuple[Tensor, int]  # a tensor, and the axis along which the ranks' tensors are concatenated


class WireBytes:
    """A count of the bytes that this rank has received from other ranks."""

    def __init__(self) -> None:
        self.received = 0

    def add(self, received: int) -> None:
        """Add that many bytes."""
        self.received += received


@contextmanager
def wire_bytes() -> Iterator[WireBytes]:
    """Count what this file's collectives and amax.reduce_amax receive under the context.

    The count is computed from sizes: a gather receives (ranks - 1) messages.
    """
    counter = WireBytes()
    # amax.py lies below this file and cannot import it: it reports through a list.
    amax.on_received.append(counter.add)
    try:
        yield counter
    finally:
        amax.on_received.remove(counter.add)


def check_group(group: Any, caller: str) -> tuple[Any, int]:
    """Return a process group that this process is in, and its number of ranks; None is the default group.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        TypeError: `group` is no process group.
        ValueError: this process is not in the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise errors.runtime_error(
            f"{caller}: there is no process group.",
            got="torch.distributed is not initialized",
            needs="a process group, on every rank",
            fix="torch.distributed.init_process_group(...) first, and start the script by torchrun",
        )
    group = dist.group.WORLD if group is None else group
    # A process outside of a group holds either torch's mark for that, or a group in which its rank is -1.
    if group is dist.GroupMember.NON_GROUP_MEMBER or (
        isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0
    ):
        raise errors.value_error(
            f"{caller}: this process is not in the group.",
            got=f"a group without rank {dist.get_rank()}",
            needs="a group of which the caller is a member",
            fix="call it on the ranks of the group only",
        )
    if not isinstance(group, dist.ProcessGroup):
        raise errors.type_error(
            f"{caller}: group is no process group.",
            got=f"{group!r:.80}",
            needs="a torch.distributed process group, or None for the default one",
            fix="torch.distributed.new_group(ranks); of a DeviceMesh: mesh.get_group()",
        )
    return group, dist.get_world_size(group)


def all_gather_flat(message: Tensor, group: Any, async_op: bool = False) -> tuple[Tensor, Any]:
    """Gather a flat uint8 message, of the same length on every rank.

    Returns:
        uint8 [ranks, bytes], and the work to wait for, or None if it has arrived.
    """
    ranks = dist.get_world_size(group)
    out = message.new_empty(ranks * message.numel())
    if not message.numel():  # nothing to say, on every rank
        return out.view(ranks, 0), None
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
    work = gather(out, message, group=group, async_op=async_op)
    for told in amax.on_received:
        told((ranks - 1) * message.numel())
    return out.view(ranks, -1), work


class PendingParts:
    """Tensors that are being gathered; wait() returns them, as often as it is called."""

    def __init__(
        self, shapes: list[list[tuple[int, ...]]], parts: Sequence[Part], message: Tensor, group: Any, async_op: bool
    ) -> None:
        self._shapes = shapes  # of each part, by rank
        self._axes, self._dtypes = [axis for _, axis in parts], [part.dtype for part, _ in parts]
        # The message, because it must be alive as long as it is being sent.
        self._sent: tuple[Any, ...] | None = (message, *all_gather_flat(message, group, async_op))
        self._result: list[Tensor] = []

    def wait(self) -> list[Tensor]:
        """Return each tensor, concatenated over the ranks along its axis, in the order in which they were given."""
        if self._sent is not None:
            message, received, work = self._sent
            if work is not None:
                work.wait()
            devices.used_here((message, received))  # it may be waited for on another stream than the one that sent
            # By rank: where shards differ in size, a part begins at different places of the messages.
            starts = [0] * received.shape[0]
            for shapes, axis, dtype in zip(self._shapes, self._axes, self._dtypes, strict=True):
                self._result.append(_concatenated(received, starts, shapes, axis, dtype))
                starts = [start + prod(shape) * dtype.itemsize for start, shape in zip(starts, shapes, strict=True)]
            self._sent = None  # the result may be waited for again; the buffers are let go
        return self._result


def _concatenated(
    received: Tensor, starts: list[int], shapes: list[tuple[int, ...]], axis: int, dtype: torch.dtype
) -> Tensor:
    """Cut one tensor out of messages uint8 [ranks, bytes]: each rank's bytes from `starts` on, joined along `axis`."""
    ends = [start + prod(shape) * dtype.itemsize for start, shape in zip(starts, shapes, strict=True)]
    # Even shards are one view and one copy; uneven ones are cut out of each rank's message.
    if all(shape == shapes[0] for shape in shapes) and all(start == starts[0] for start in starts):
        flat = received[:, starts[0] : ends[0]].reshape(-1).view(dtype)
        axis = axis % len(shapes[0])
        return flat.view(len(shapes), *shapes[0]).movedim(0, axis).flatten(axis, axis + 1).contiguous()
    pieces = []
    for message, start, end, shape in zip(received, starts, ends, shapes, strict=True):
        piece = message[start:end]
        # view(dtype) needs an aligned start, which a tensor after one of uint8 need not have
        aligned = piece if piece.storage_offset() % dtype.itemsize == 0 else piece.clone()
        pieces.append(aligned.view(dtype).view(shape))
    return torch.cat(pieces, dim=axis)


def gather_parts(
    parts: Sequence[Part], group: Any, async_op: bool = False, sizes: Sequence[Sequence[int]] | None = None
) -> PendingParts:
    """Gather several tensors over a group, in one message.

    Args:
        parts: (tensor, axis along which the ranks' tensors are concatenated); the same dtypes on all ranks, and the
            same shapes but for that axis.
        sizes: for each part, its length along its axis on every rank. If None, the ranks' lengths are equal.
    Returns:
        PendingParts, whose wait() returns the tensors. Without async_op they have arrived already.
    """
    ranks = dist.get_world_size(group)
    shapes = []
    for i, (part, axis) in enumerate(parts):
        by_rank = [part.shape[axis]] * ranks if sizes is None else sizes[i]
        axis = axis % part.dim()
        shapes.append([(*part.shape[:axis], size, *part.shape[axis + 1 :]) for size in by_rank])
    lengths = [
        sum(prod(s[rank]) * p.element_size() for s, (p, _) in zip(shapes, parts, strict=True)) for rank in range(ranks)
    ]
    # Bytes of all parts behind each other, so that one collective serves tensors of different dtypes.
    message = torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part, _ in parts])
    # Uneven shards are padded: a collective wants the same length on every rank.
    message = torch.nn.functional.pad(message, (0, max(lengths) - message.numel()))
    return PendingParts(shapes, parts, message, group, async_op)


def gather_ints(values: Sequence[int], more: Tensor, group: Any) -> list[list[int]]:
    """Gather a few numbers of every rank to the host, by rank; every rank gives as many.

    Args:
        more: integers on the device, appended to `values`. They are not read before all arrived, so that the device is
            waited for once.
    """
    mine = torch.cat((torch.tensor(list(values), dtype=torch.int64, device=more.device), more.to(torch.int64)))
    received, _ = all_gather_flat(mine.view(torch.uint8), group)
    return received.reshape(-1).view(torch.int64).view(-1, mine.numel()).tolist()
