"""Shapes of a convolution: sizes, padding, space-to-batch folding, and which pixel each row of an im2col matrix comes
from.

Letters: B batch, C in-channels, O out-channels, T taps. Both convolution and transposed convolution are described by
the plain convolution
underneath, with an `a` side (its input, image `a_size`, channels of weight axis 1) and a `b` side (its output, image
`b_size`, weight axis 0):

    convolution             x = a, y = b     fprop a -> b, dgrad b -> a
    transposed convolution  x = b, y = a     fprop b -> a, dgrad a -> b

Operands are channels-last arrays [B, *image, C]; a linear layer has no image axes. Nothing here touches tensor values.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.errors import value_error

BLOCK = 16


@dataclass(frozen=True)
class Fold:
    """Space-to-batch of one operand: image b becomes `strips` images (index b * strips + strip) of `rows` rows each.

    Row l of strip s is row `s * step + l - offset` of the source, or zeros outside of it. `images` is a multiple of
    16: images beyond B * strips are zeros.
    """

    strips: int
    step: int
    rows: int
    offset: int
    images: int

    def to_ints(self) -> list[int]:
        """The fields in their order, for the operator boundary."""
        return [self.strips, self.step, self.rows, self.offset, self.images]

    def source_rows(self, batch: int, source: int) -> Tensor:
        """int64 [images, rows]: b * source + row for every folded row, -1 for zeros."""
        image = torch.arange(self.images)
        row = (image % self.strips)[:, None] * self.step + torch.arange(self.rows)[None, :] - self.offset
        inside = (row >= 0) & (row < source) & (image // self.strips < batch)[:, None]
        return torch.where(inside, (image // self.strips)[:, None] * source + row, -1)


@dataclass(frozen=True)
class ConvGeometry:
    """One call's shapes, all checked. `kernel`, `stride`, ... have one entry per image axis; `channels_a`,
    `channels_b` are totals over groups.
    """

    batch: int
    channels_a: int
    channels_b: int
    a_size: tuple[int, ...]
    b_size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool

    @property
    def rank(self) -> int:
        """Image axes: 0 for a linear layer, else 1 to 3."""
        return len(self.kernel)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def x_shape(self) -> tuple[int, ...]:
        """[B, *image, channels] of x."""
        return (
            (self.batch, *self.b_size, self.channels_b)
            if self.transposed
            else (self.batch, *self.a_size, self.channels_a)
        )

    @property
    def y_shape(self) -> tuple[int, ...]:
        """[B, *image, channels] of y."""
        return (
            (self.batch, *self.a_size, self.channels_a)
            if self.transposed
            else (self.batch, *self.b_size, self.channels_b)
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """[weight axis 0, taps, weight axis 1]: kernels as operands are channels-last too."""
        return (self.channels_b, self.taps, self.channels_a // self.groups)

    @property
    def touches_only_padding(self) -> bool:
        """Whether some tap, or some output row of an axis, reads nothing but padding."""
        rows = zip(self.a_size, self.b_size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return any(padding_only(*row) for row in rows)

    @property
    def macs(self) -> int:
        """Multiply-adds of one GEMM."""
        return self.batch * math.prod(self.b_size) * self.channels_b * (self.channels_a // self.groups) * self.taps

    def folds(self) -> tuple[Fold, Fold]:
        """(a side, b side): how the columnwise operands of wgrad are laid out in images."""
        a_rows = self.a_size[0] if self.rank else 1
        b_rows = self.b_size[0] if self.rank else 1
        strips = fold_factor(self.batch, b_rows, self.stride[0], self.kernel[0], self.dilation[0]) if self.rank else 1
        images = -(-self.batch * strips // BLOCK) * BLOCK
        if strips == 1:
            return Fold(1, 0, a_rows, 0, images), Fold(1, 0, b_rows, 0, images)
        strip = -(-b_rows // strips)
        halo = halo_rows(strip, self.stride[0], self.kernel[0], self.dilation[0])
        return Fold(strips, strip * self.stride[0], halo, self.padding[0], images), Fold(
            strips, strip, strip, 0, images
        )

    def folded(self) -> ConvGeometry:
        """The geometry of wgrad on the folded operands; self where nothing is folded but zero images are added."""
        a, b = self.folds()
        if self.rank == 0:
            return self._replace(batch=a.images)
        if a.strips == 1:
            return self._replace(batch=a.images)
        zero = (0, *self.padding[1:]), (0, *self.output_padding[1:])
        return self._replace(
            batch=a.images,
            a_size=(a.rows, *self.a_size[1:]),
            b_size=(b.rows, *self.b_size[1:]),
            padding=zero[0],
            output_padding=zero[1],
        )

    def _replace(self, **changes: object) -> ConvGeometry:
        return ConvGeometry(**{**self.__dict__, **changes})  # type: ignore[arg-type]

    def to_ints(self) -> list[int]:
        """A flat list for the operator boundary."""
        lists = (self.a_size, self.b_size, self.kernel, self.stride, self.padding, self.dilation, self.output_padding)
        head = [self.batch, self.channels_a, self.channels_b, self.groups, int(self.transposed), self.rank]
        return head + [n for values in lists for n in values]

    @staticmethod
    def _from_tuple(ints: tuple[int, ...]) -> ConvGeometry:
        batch, channels_a, channels_b, groups, transposed, rank = ints[:6]
        lists: Any = [tuple(ints[6 + rank * k : 6 + rank * (k + 1)]) for k in range(7)]
        return ConvGeometry(batch, channels_a, channels_b, *lists, groups, bool(transposed))  # type: ignore[call-arg]

    @staticmethod
    def from_ints(ints: list[int]) -> ConvGeometry:
        """The inverse of to_ints."""
        key = tuple(ints)
        return _geometry(key) if all(type(n) is int for n in key) else ConvGeometry._from_tuple(key)  # SymInt: no hash


@functools.lru_cache(maxsize=4096)
def _geometry(ints: tuple[int, ...]) -> ConvGeometry:
    return ConvGeometry._from_tuple(ints)


def halo_rows(strip: int, stride: int, kernel: int, dilation: int) -> int:
    """Input rows that `strip` output rows need."""
    return (strip - 1) * stride + (kernel - 1) * dilation + 1


@functools.lru_cache(maxsize=4096)
def fold_factor(batch: int, rows: int, stride: int, kernel: int, dilation: int) -> int:
    """Strips per image, g in 1..min(16, rows): minimises 16 ceil(B g / 16) L(g), ties to the smaller; 1 for a batch
    of 16 n.
    """
    if batch % BLOCK == 0:
        return 1

    best, least = 1, 0
    for g in range(1, min(BLOCK, rows) + 1):
        cost = BLOCK * -(-batch * g // BLOCK) * halo_rows(-(-rows // g), stride, kernel, dilation)
        if g == 1 or cost < least:
            best, least = g, cost
    return best


@functools.lru_cache(maxsize=4096)
def padding_only(a: int, b: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether, along one axis, a tap reads no element of `a` for any output, or an output reads none by any tap."""

    def inside(out: int, tap: int) -> bool:
        return 0 <= out * stride - padding + tap * dilation < a

    taps = all(any(inside(out, tap) for out in range(b)) for tap in range(kernel))
    return not taps or not all(any(inside(out, tap) for tap in range(kernel)) for out in range(b))


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output length of a convolution along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def transposed_output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, output_padding: int
) -> int:
    """Output length of a transposed convolution along one axis."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


def conv_taps(a: int, b: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """int64 [b, kernel]: the `a` index that output index and tap read, -1 in the padding."""
    index = torch.arange(b)[:, None] * stride - padding + torch.arange(kernel)[None, :] * dilation
    return torch.where((index >= 0) & (index < a), index, -1)


def transposed_taps(a: int, b: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """int64 [a, kernel]: the `b` index from which `a` index and tap were written, -1 where there is none."""
    shifted = torch.arange(a)[:, None] + padding - torch.arange(kernel)[None, :] * dilation
    index = torch.div(shifted, stride, rounding_mode="floor")
    return torch.where((shifted % stride == 0) & (index >= 0) & (index < b), index, -1)


def pixel_map(geometry: ConvGeometry, to_b: bool) -> Tensor:
    """int64 [pixels out, taps]: the flat source pixel of every im2col entry, -1 for zeros. `to_b`: rows are b pixels
    that gather from a.
    """
    function = conv_taps if to_b else transposed_taps
    sizes = geometry.a_size if to_b else geometry.b_size
    pixels = torch.zeros(1, 1, dtype=torch.int64)
    for axis in range(geometry.rank):
        index = function(
            geometry.a_size[axis],
            geometry.b_size[axis],
            geometry.kernel[axis],
            geometry.stride[axis],
            geometry.padding[axis],
            geometry.dilation[axis],
        )
        out, taps = pixels.shape
        left, right = pixels.view(out, 1, taps, 1), index.view(1, index.shape[0], 1, index.shape[1])
        joined = torch.where((left >= 0) & (right >= 0), left * sizes[axis] + right, -1)
        pixels = joined.reshape(out * index.shape[0], taps * index.shape[1])
    return pixels


@functools.lru_cache(maxsize=1024)
def reads_everywhere(g: ConvGeometry, to_b: bool) -> bool:
    """Whether every pixel of the b side reads some pixel of the a side (`to_b`), or the other way round."""
    for a, b, k, s, p, d in zip(g.a_size, g.b_size, g.kernel, g.stride, g.padding, g.dilation, strict=True):
        pairs = ((o, o * s - p + t * d) for o in range(b) for t in range(k))
        touched = {(o if to_b else i) for o, i in pairs if 0 <= i < a}
        if len(touched) != (b if to_b else a):
            return False
    return True


def _as_int(value: Any) -> Any:
    """numpy's and torch's integers as int; other things, bool among them, as something that is no int."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    try:
        return operator.index(value)
    except TypeError:
        return None


def int_tuple(value: Any, rank: int, op: str, name: str, least: int) -> tuple[int, ...]:
    """An int or a sequence as one int per axis; ValueError for anything else."""
    values = tuple(map(_as_int, value)) if isinstance(value, Sequence) else (_as_int(value),)
    values = values * rank if len(values) == 1 else values
    if len(values) != rank or any(not isinstance(v, (int, torch.SymInt)) or v < least for v in values):
        raise value_error(
            f"nvfp4 {op}: bad {name}.",
            got=repr(value),
            needs=f"an int >= {least}, or {rank} of them",
            fix=f"check {name}",
        )
    return values
