"""Which rows of an image each rank has, and which it must read of the others: arithmetic alone.

An image of `rows` rows (its first image axis: height, or depth of a volume) lies on a mesh dimension as
torch.distributed.tensor.Shard lays it: pieces of ceil(rows / ranks) rows in the order of the ranks. The last pieces may
be smaller or empty. So the number of rows of all ranks together says where every row is, and no rank has to ask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch.distributed as dist

from te_nvfp4_cv.ops.geometry import halo_rows


class Span(NamedTuple):
    """Rows `start` to `end - 1`."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return max(0, self.end - self.start)

    def within(self, other: Span) -> Span:
        """Return the rows that both have; an empty span if there are none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.end, other.end)))


Needs = Callable[[int], Span]  # rank -> the rows that it reads; they may lie beyond the image


def piece(rows: int, ranks: int, rank: int) -> Span:
    """Return the rows that a rank has."""
    each = -(-rows // ranks)
    return Span(min(rows, rank * each), min(rows, (rank + 1) * each))


@dataclass(frozen=True)
class Layout:
    """How one tensor lies on a mesh: dimension `dim` is cut, and has `rows` rows on all ranks together."""

    mesh: Any
    dim: int
    rows: int

    @property
    def group(self) -> Any:
        """The process group of the mesh."""
        return self.mesh.get_group()

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return int(self.mesh.size())

    @property
    def rank(self) -> int:
        """This process's place among them."""
        return dist.get_rank(self.group)

    @property
    def mine(self) -> Span:
        """The rows of this rank."""
        return self.of(self.rank)

    def of(self, rank: int) -> Span:
        """Return the rows of a rank."""
        return piece(self.rows, self.ranks, rank)

    def with_rows(self, rows: int) -> Layout:
        """Return the layout of a tensor with another number of rows."""
        return replace(self, rows=rows)

    def with_dim(self, dim: int) -> Layout:
        """Return the layout of a tensor whose cut dimension has another place."""
        return replace(self, dim=dim)


class Window(NamedTuple):
    """How one axis of a convolution or pooling reads: output row o reads o * stride - padding + tap * dilation."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    def reads(self, out: Span) -> Span:
        """Return the input rows under these output rows, those of the padding too."""
        start = out.start * self.stride - self.padding
        if not out.size:
            return Span(start, start)
        return Span(start, start + halo_rows(out.size, self.stride, self.kernel, self.dilation))

    def reached_from(self, read: Span, outputs: int) -> Span:
        """Return the output rows, of `outputs`, that read any of these input rows."""
        reach = self.dilation * (self.kernel - 1)
        first = max(0, -(-(read.start + self.padding - reach) // self.stride))
        last = min(outputs, (read.end - 1 + self.padding) // self.stride + 1)
        return Span(first, max(first, last)) if read.size else Span(first, first)
