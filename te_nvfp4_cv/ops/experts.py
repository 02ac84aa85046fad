"""Say which rows of a grouped linear layer's tokens go to which expert.

    offsets [E]    expert e has the rows offsets[e - 1] (0 for the first) to offsets[e] of x [T, C]
    rows, ...      of each expert that has some: its rows, and its blocks of 16 in a columnwise face
    source_rows    the same as a table on x's device, for kernels: nothing is read on the host

A columnwise face has blocks of 16 rows, and no block has rows of two experts: each expert's rows end in a block of
their own, filled up with zero rows that are in no memory. Rows after the last offset belong to nobody.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend.answers import answer
from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.geometry import blocks_of


class Rows(NamedTuple):
    """The rows `start` to `end` of x, which are one expert's, and its blocks from `block` to `last` of a face."""

    expert: int
    start: int
    end: int
    block: int
    last: int

    @property
    def here(self) -> slice:
        """The expert's rows of x, y or a rowwise face."""
        return slice(self.start, self.end)


class Experts:
    """Hold the offsets of one call.

    Args:
        offsets: int32 or int64 [E], on x's device. On a CPU they are read here; on a GPU where a backend needs them.
        tokens: rows of x.
        own_scales: each expert's rows have a tensor scale of their own.
    Raises:
        ValueError: on a CPU: offsets that fall, or that are negative or larger than `tokens`. Kernels on a GPU, which
            read them there, take what is out of order as no rows.
    """

    def __init__(self, offsets: Tensor, tokens: int, own_scales: bool = False) -> None:
        self.offsets, self.tokens, self.own_scales = offsets, tokens, own_scales
        if offsets.device.type == "cpu":
            _ = self.rows

    @classmethod
    def of_sizes(cls, offsets: Tensor, tokens: int, own_scales: bool) -> Experts:
        """Make the record of a call whose values are not there: while shapes are traced."""
        made = cls.__new__(cls)
        made.offsets, made.tokens, made.own_scales = offsets, tokens, own_scales
        return made

    @answer
    def number(self) -> int:
        """The number of experts."""
        return self.offsets.shape[0]

    @answer
    def rows(self) -> list[Rows]:
        """The rows and blocks of each expert that has any, in order."""
        found, start, block = [], 0, 0
        for expert, end in enumerate(self.offsets.tolist()):
            if not start <= end <= self.tokens:
                raise value_error(
                    "nvfp4 grouped_linear: bad offsets.",
                    got=f"offsets[{expert}] = {end} after {start}, with {self.tokens} tokens",
                    needs="the end of each expert's rows: offsets that never fall, up to the number of tokens",
                    fix="sort the tokens by expert; offsets = bincount(expert_of_token, minlength=E).cumsum(0)",
                )
            if end > start:
                last = block + -(-(end - start) // BLOCK)
                found.append(Rows(expert, start, end, block, last))
                block = last
            start = end
        return found

    def for_rows(self, values: Tensor) -> Tensor:
        """Return [tokens]: the number of each row's expert of values [E], or 0 where a row belongs to nobody."""
        found = values.new_zeros(self.tokens)
        for rows in self.rows:
            found[rows.here] = values[rows.expert]
        return found

    def laid_out(self, x: Tensor) -> Tensor:
        """Return [16 blocks, C]: the rows of x [T, C] as columnwise faces have them, with zeros between experts."""
        return F.pad(x, (0, 0, 0, 1))[self.used_rows]  # -1 is the last row

    @property
    def end(self) -> int:
        """The first row that belongs to nobody."""
        return self.rows[-1].end if self.rows else 0

    @answer
    def used_rows(self) -> Tensor:
        """The part of source_rows that has blocks of experts: int64 [16 blocks]."""
        return self.source_rows[: self.rows[-1].last * BLOCK]

    @answer
    def source_rows(self) -> Tensor:
        """The row of x that each row of a columnwise face is, -1 for zeros: int64 [16 blocks], on x's device."""
        ends = self.offsets.long().cummax(0).values.clamp(0, self.tokens)
        starts = torch.cat((ends.new_zeros(1), ends[:-1]))
        blocks = (ends - starts + BLOCK - 1) // BLOCK
        last = blocks.cumsum(0)
        place = torch.arange(blocks_of(self.tokens, self.number) * BLOCK, device=ends.device)
        # The expert of a block is the number of those whose blocks end before it.
        expert = torch.searchsorted(last, place // BLOCK, right=True)
        inside = expert < self.number
        expert = expert.clamp(max=self.number - 1)
        row = place - (last - blocks)[expert] * BLOCK + starts[expert]
        return torch.where(inside & (row < ends[expert]), row, -1)


def checked_offsets(offsets: object, x: Tensor, experts: int) -> Tensor:
    """Return the offsets after looking at their class, shape, dtype and device, but not at their values.

    Raises:
        ValueError: they cannot be those of a call with this x and that many experts.
    """
    good = isinstance(offsets, Tensor) and offsets.shape == (experts,) and offsets.device == x.device
    if good and offsets.dtype in (torch.int32, torch.int64):  # type: ignore[attr-defined]
        return offsets  # type: ignore[return-value]
    place = f" on {offsets.device}" if isinstance(offsets, Tensor) else ""
    raise value_error(
        "nvfp4 grouped_linear: bad offsets.",
        got=f"{describe(offsets)}{place}",
        needs=f"int32 or int64 ({experts},) on {x.device}: where each expert's rows end",
        fix="offsets = torch.bincount(expert_of_token, minlength=E).cumsum(0)",
    )
