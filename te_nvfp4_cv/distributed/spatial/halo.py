"""Fetch the rows that a rank needs of other ranks' pieces, point to point; and give gradients back the same way.

Each rank knows what all ranks need (rows.py), so nobody asks. One message goes from each owner to each rank that needs
something of it: to neighbours, or further where a piece is smaller than the halo. Rows that are on the rank already are
not sent. Several tensors (codes and scales) travel in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from te_nvfp4_cv.distributed.spatial.rows import Layout, Needs, Span
from te_nvfp4_cv.ops.quantize import amax

Part = tuple[Tensor, int]  # this rank's piece of a tensor, and the axis along which it is cut
Give = Callable[[Span], list[Tensor]]  # some of this rank's rows -> these rows of each part


class Pending:
    """Rows that are on their way; wait() puts them together.

    Args:
        parts: this rank's pieces. Where `give` is given, tensors without rows; the pieces come with wait(parts=...).
        give: makes the rows that others need, before the pieces are there.
    """

    def __init__(self, parts: Sequence[Part], layout: Layout, needs: Needs, give: Give | None = None) -> None:
        self._parts, self._layout, self._wanted = parts, layout, needs(layout.rank)
        inside = Span(0, layout.rows)
        give = self._cut if give is None else give
        me, group = layout.rank, layout.group
        self._received: dict[int, Tensor] = {}
        self._sent: list[Tensor] = []
        ops = []
        for other in range(layout.ranks):
            if other == me:
                continue
            peer = dist.get_global_rank(group, other)
            wanted = layout.mine.within(needs(other).within(inside))
            if wanted.size:
                self._sent.append(_message(give(wanted)))
                ops.append(dist.P2POp(dist.isend, self._sent[-1], peer, group))
            take = layout.of(other).within(self._wanted.within(inside))
            if take.size:
                size = (
                    sum(t.numel() // max(1, t.shape[axis]) * t.element_size() for t, axis in self._shapes()) * take.size
                )
                self._received[other] = parts[0][0].new_empty(size, dtype=torch.uint8)
                ops.append(dist.P2POp(dist.irecv, self._received[other], peer, group))
        for told in amax.on_received:
            told(sum(message.numel() for message in self._received.values()))
        self._works: Any = dist.batch_isend_irecv(ops) if ops else []

    def _shapes(self) -> list[Part]:
        # A rank without rows must know how large a row is, too.
        return [(t if t.shape[axis] else _one_row(t, axis), axis) for t, axis in self._parts]

    def _cut(self, rows: Span) -> list[Tensor]:
        start = self._layout.mine.start
        return [t.narrow(axis, rows.start - start, rows.size) for t, axis in self._parts]

    def wait(self, fill: float = 0.0, parts: Sequence[Part] | None = None) -> list[Tensor]:
        """Return each tensor with the rows that this rank needs; `fill` stands where they lie beyond the image."""
        self._parts = self._parts if parts is None else parts
        for work in self._works:
            work.wait()
        self._works = []  # gloo waits for ever where it is asked twice
        offsets = dict.fromkeys(self._received, 0)
        return [self._assembled(t, axis, fill, offsets) for t, axis in self._parts]

    def _assembled(self, t: Tensor, axis: int, fill: float, offsets: dict[int, int]) -> Tensor:
        layout, wanted = self._layout, self._wanted

        def shape(rows: int) -> tuple[int, ...]:
            return (*t.shape[:axis], rows, *t.shape[axis + 1 :])

        pieces = []
        before = min(wanted.size, max(0, -wanted.start))
        after = min(wanted.size - before, max(0, wanted.end - layout.rows))
        if before:
            pieces.append(t.new_full(shape(before), fill))
        for rank in range(layout.ranks):
            have = layout.of(rank).within(wanted.within(Span(0, layout.rows)))
            if not have.size:
                continue
            if rank == layout.rank:
                pieces.append(t.narrow(axis, have.start - layout.mine.start, have.size))
                continue
            like, start = shape(have.size), offsets[rank]
            bytes_here = t.element_size()
            for size in like:
                bytes_here *= size
            message = self._received[rank][start : start + bytes_here]
            # view(dtype) needs an aligned start, which a tensor after one of uint8 need not have.
            message = message if message.storage_offset() % t.element_size() == 0 else message.clone()
            pieces.append(message.view(t.dtype).view(like))
            offsets[rank] = start + bytes_here
        if after:
            pieces.append(t.new_full(shape(after), fill))
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces, dim=axis) if pieces else t.new_empty(shape(0))


def _message(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.contiguous().reshape(-1).view(torch.uint8) for t in rows])


def _one_row(t: Tensor, axis: int) -> Tensor:
    shape = list(t.shape)
    shape[axis] = 1
    return torch.empty(shape, dtype=t.dtype, device="meta")


class _Fetch(torch.autograd.Function):
    """This rank's piece of x -> the rows that it needs; backward sends gradients to the owners, who add them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, needs: Needs, fill: float) -> Tensor:
        ctx.layout, ctx.needs = layout, needs
        (rows,) = Pending([(x, layout.dim)], layout, needs).wait(fill)
        # New memory on every rank, to write to in place: torch refuses that for a view that a Function made.
        return rows.clone() if rows is x or rows._is_view() else rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _give_back(grad, ctx.layout, ctx.needs), None, None, None


def _give_back(grad: Tensor, layout: Layout, needs: Needs) -> Tensor:
    """Return the gradient of this rank's piece: the sum over all ranks that had fetched rows of it, in their order."""
    me, group, dim = layout.rank, layout.group, layout.dim
    inside, wanted = Span(0, layout.rows), needs(me)
    ops, arrived, sent = [], {}, []
    for other in range(layout.ranks):
        if other == me:
            continue
        peer = dist.get_global_rank(group, other)
        give = layout.of(other).within(wanted.within(inside))
        if give.size:
            sent.append(grad.narrow(dim, give.start - wanted.start, give.size).contiguous())
            ops.append(dist.P2POp(dist.isend, sent[-1], peer, group))
        take = layout.mine.within(needs(other).within(inside))
        if take.size:
            shape = (*grad.shape[:dim], take.size, *grad.shape[dim + 1 :])
            arrived[other] = take, grad.new_empty(shape)
            ops.append(dist.P2POp(dist.irecv, arrived[other][1], peer, group))
    for told in amax.on_received:
        told(sum(part.numel() * part.element_size() for _, part in arrived.values()))
    works = dist.batch_isend_irecv(ops) if ops else []
    mine = layout.mine
    own = mine.within(wanted.within(inside))
    result = grad.new_zeros((*grad.shape[:dim], mine.size, *grad.shape[dim + 1 :]))
    if own.size:
        piece = grad.narrow(dim, own.start - wanted.start, own.size)
        result.narrow(dim, own.start - mine.start, own.size).copy_(piece)
    for work in works:
        work.wait()
    for take, part in (arrived[other] for other in sorted(arrived)):
        result.narrow(dim, take.start - mine.start, take.size).add_(part)
    return result


def fetch(x: Tensor, layout: Layout, needs: Needs, fill: float = 0.0) -> Tensor:
    """Return the rows of x that this rank needs, as needs(rank) says; differentiable.

    Args:
        x: this rank's piece.
        needs: the rows that any rank reads; `fill` stands for rows beyond the image.
    """
    if all(needs(rank) == layout.of(rank) for rank in range(layout.ranks)):
        return x
    fetched: Tensor = _Fetch.apply(x, layout, needs, fill)
    return fetched


def fetch_parts(parts: Sequence[Part], layout: Layout, needs: Needs, give: Give | None = None) -> Pending:
    """Begin to fetch rows of several tensors in one message each; not differentiable. Arguments as for Pending."""
    return Pending(parts, layout, needs, give)
