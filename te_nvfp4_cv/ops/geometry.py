"""The shapes of a convolution: sizes, padding, space-to-batch folding, and which pixel each im2col row comes from.

Convolutions and transposed convolutions are described by the same plain convolution underneath. It has an `a` side (its
input: image `a_size`, channels of weight axis 1) and a `b` side (its output: image `b_size`, weight axis 0):

    convolution             x = a, y = b     fprop a -> b, dgrad b -> a
    transposed convolution  x = b, y = a     fprop b -> a, dgrad a -> b

Operands are channels-last arrays [B, *image, C]; a linear layer has no image axes. A grouped linear layer (mixture of
experts) is a linear layer of E groups, of which each row of x goes to one: its weight is that of a grouped convolution,
[E * O, C], while its rows have the C channels of one group. Nothing here touches tensor values.
Letters: B batch, C in-channels, O out-channels, T taps.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_nvfp4_cv.backend.answers import answer
from te_nvfp4_cv.errors import shape_error
from te_nvfp4_cv.formats import BLOCK, round_up
from te_nvfp4_cv.ops.records import Fold


class ConvArgs(NamedTuple):
    """The arguments of one call of a convolution, as torch's functions and modules take them; a linear layer's too."""

    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    output_padding: Any = 0

    @classmethod
    def of(cls, module: Any) -> ConvArgs:
        """Read them from a convolution or linear module. A transposed convolution's call may add output padding."""
        if not hasattr(module, "kernel_size"):
            return cls()
        return cls(module.stride, module.padding, module.dilation, module.groups, module.output_padding)


@dataclass(frozen=True)
class ConvGeometry:
    """The shapes of one call, all checked.

    `kernel`, `stride`, `padding`, `dilation` and `output_padding` have one entry per image axis. `channels_a` and
    `channels_b` are totals over groups. `routed`: a grouped linear layer, whose groups are experts. Derived sizes are
    computed once per object.
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
    routed: bool = False

    @answer
    def rank(self) -> int:
        """The number of image axes: 0 for a linear layer, else 1 to 3."""
        return len(self.kernel)

    @answer
    def taps(self) -> int:
        """The number of positions of the kernel."""
        return math.prod(self.kernel)

    @answer
    def routes(self) -> int:
        """The number of experts among which rows are shared out; 1 for every other layer."""
        return self.groups if self.routed else 1

    @answer
    def row_groups(self) -> int:
        """The number of groups into which the channels of one row of x or dy fall."""
        return self.groups // self.routes

    @answer
    def a_shape(self) -> tuple[int, ...]:
        """The a side's shape, [B, *image, channels]."""
        return (self.batch, *self.a_size, self.channels_a // self.routes)

    @answer
    def b_shape(self) -> tuple[int, ...]:
        """The b side's shape, [B, *image, channels]."""
        return (self.batch, *self.b_size, self.channels_b // self.routes)

    @answer
    def x_shape(self) -> tuple[int, ...]:
        """The shape of x, [B, *image, channels]."""
        return self.b_shape if self.transposed else self.a_shape

    @answer
    def y_shape(self) -> tuple[int, ...]:
        """The shape of y, [B, *image, channels]."""
        return self.a_shape if self.transposed else self.b_shape

    @answer
    def weight_shape(self) -> tuple[int, ...]:
        """The weight's shape, [axis 0, taps, axis 1]: like operands, weights have their channels innermost here."""
        return (self.channels_b, self.taps, self.channels_a // self.groups)

    @answer
    def axes(self) -> list[tuple[int, ...]]:
        """One row per image axis: (a size, b size, kernel, stride, padding, dilation)."""
        columns = (self.a_size, self.b_size, self.kernel, self.stride, self.padding, self.dilation)
        return list(zip(*columns, strict=True))

    @answer
    def touches_only_padding(self) -> bool:
        """True if some tap, or some output row of an axis, reads nothing but padding."""
        return any(padding_only(*row) for row in self.axes)

    @answer
    def macs(self) -> int:
        """Multiply-adds of one GEMM."""
        outputs = self.batch * math.prod(self.b_size) * (self.channels_b // self.routes)
        return outputs * (self.channels_a // self.groups) * self.taps

    @answer
    def folds(self) -> tuple[Fold, Fold]:
        """The folds (a side, b side) that lay the columnwise operands of wgrad out in images."""
        # A linear layer has no image axis that could be cut.
        a_rows = self.a_size[0] if self.rank else 1
        b_rows = self.b_size[0] if self.rank else 1
        # wgrad's blocks are 16 images. A batch that does not fill them is cut into strips along the first image axis,
        # because padding it with zero images would multiply zeros.
        strips = fold_factor(self.batch, b_rows, self.stride[0], self.kernel[0], self.dilation[0]) if self.rank else 1
        images = round_up(self.batch * strips, BLOCK)
        if self.routed:  # as many as it takes however the rows fall on the experts: each expert's are padded to 16
            images = blocks_of(self.batch, self.groups) * BLOCK
        if strips == 1:
            return Fold(1, 0, a_rows, 0, images), Fold(1, 0, b_rows, 0, images)
        strip = -(-b_rows // strips)
        halo = halo_rows(strip, self.stride[0], self.kernel[0], self.dilation[0])
        # Strips of the a side overlap by the rows that the kernel reads beyond its stride; those of the b side do not.
        a = Fold(strips, strip * self.stride[0], halo, self.padding[0], images)
        return a, Fold(strips, strip, strip, 0, images)

    @answer
    def folded(self) -> ConvGeometry:
        """The geometry of wgrad on the folded operands; with one strip only zero images are added."""
        a, b = self.folds
        if a.strips == 1:
            return replace(self, batch=a.images)
        return replace(
            self,
            batch=a.images,
            a_size=(a.rows, *self.a_size[1:]),
            b_size=(b.rows, *self.b_size[1:]),
            # The strips carry their halo: nothing is padded along the axis that was cut.
            padding=(0, *self.padding[1:]),
            output_padding=(0, *self.output_padding[1:]),
        )

    @answer
    def at_least_2d(self) -> ConvGeometry:
        """The geometry itself, but for a 1-D convolution, which becomes a 2-D one of height 1."""
        return self.with_axes(2) if self.rank == 1 else self

    def with_axes(self, rank: int) -> ConvGeometry:
        """Return the geometry with that many image axes, at least as many as it has; the new ones are of one pixel."""
        ones, zeros = ("a_size", "b_size", "kernel", "stride", "dilation"), ("padding", "output_padding")
        more: dict[str, Any] = {name: (1,) * (rank - self.rank) + getattr(self, name) for name in ones}
        more |= {name: (0,) * (rank - self.rank) + getattr(self, name) for name in zeros}
        return replace(self, **more)

    @answer
    def walk(self) -> dict[str, tuple[int, int, int]]:
        """Sizes, taps, stride, dilation and padding in three axes, as the CPU kernels take them."""
        ones = {"a": self.a_size, "b": self.b_size, "taps": self.kernel, "stride": self.stride}
        ones["dilation"] = self.dilation
        return {name: three(sizes, 1) for name, sizes in ones.items()} | {"padding": three(self.padding, 0)}

    def reads_everywhere(self, to_b: bool) -> bool:
        """Return True if every pixel of the b side reads a pixel of the a side; the reverse without `to_b`."""
        # Axis by axis, because the pixels that are read are all combinations of those along each axis.
        for a, b, k, s, p, d in self.axes:
            pairs = ((o, o * s - p + t * d) for o in range(b) for t in range(k))
            touched = {(o if to_b else i) for o, i in pairs if 0 <= i < a}
            if len(touched) != (b if to_b else a):
                return False
        return True

    def to_ints(self) -> list[int]:
        """Encode the geometry as a flat list for a custom operator."""
        lists = (self.a_size, self.b_size, self.kernel, self.stride, self.padding, self.dilation, self.output_padding)
        # The rank is in front, since it says how long the lists are.
        kind = int(self.transposed) + 2 * self.routed
        head = [self.batch, self.channels_a, self.channels_b, self.groups, kind, len(self.kernel)]
        return head + [n for values in lists for n in values]

    @staticmethod
    def from_ints(ints: Sequence[int]) -> ConvGeometry:
        """Decode what to_ints gave; equal lists give the same object."""
        try:
            return _geometry(tuple(ints))
        except TypeError:  # a traced size has no hash
            return _geometry.__wrapped__(tuple(ints))


@functools.lru_cache(maxsize=4096)
def _geometry(ints: tuple[int, ...]) -> ConvGeometry:
    batch, channels_a, channels_b, groups, kind, rank = ints[:6]
    lists: Any = [ints[6 + rank * k : 6 + rank * (k + 1)] for k in range(7)]
    flags = (bool(kind & 1), bool(kind & 2))
    return ConvGeometry(batch, channels_a, channels_b, *lists, groups, *flags)  # type: ignore[call-arg]


@functools.lru_cache(maxsize=4096)
def linear_geometry(rows: int, channels: int, outputs: int) -> ConvGeometry:
    """Return the geometry of a linear layer: that of one expert's rows in a grouped one."""
    return ConvGeometry(rows, channels, outputs, (), (), (), (), (), (), (), 1, False)


def three(sizes: tuple[int, ...], fill: int) -> tuple[int, int, int]:
    """Return one entry per image axis as three. A first axis alone stays first, because wgrad works along it."""
    a, *rest = sizes or (fill,)
    return (a, *(fill,) * (2 - len(rest)), *rest) if rest else (fill, fill, a)  # type: ignore[return-value]


def halo_rows(strip: int, stride: int, kernel: int, dilation: int) -> int:
    """Return how many input rows `strip` output rows need."""
    return (strip - 1) * stride + (kernel - 1) * dilation + 1


@functools.lru_cache(maxsize=4096)
def fold_factor(batch: int, rows: int, stride: int, kernel: int, dilation: int) -> int:
    """Return the number of strips per image, g in 1..min(16, rows), that minimises 16 ceil(B g / 16) L(g).

    Of two that cost the same the smaller is taken; a batch of 16 n is not cut.
    """
    if batch % BLOCK == 0:
        return 1

    def cost(g: int) -> int:
        # What wgrad contracts: images, padded to whole blocks, times the rows of a strip with its halo.
        return round_up(batch * g, BLOCK) * halo_rows(-(-rows // g), stride, kernel, dilation)

    return min(range(1, min(BLOCK, rows) + 1), key=cost, default=1)


@functools.lru_cache(maxsize=4096)
def padding_only(a: int, b: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Return True if, along one axis, a tap reads no element of `a` for any output, or an output none by any tap."""

    def inside(out: int, tap: int) -> bool:
        return 0 <= out * stride - padding + tap * dilation < a

    taps = all(any(inside(out, tap) for out in range(b)) for tap in range(kernel))
    return not taps or not all(any(inside(out, tap) for tap in range(kernel)) for out in range(b))


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the output length of a convolution along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def transposed_output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, output_padding: int
) -> int:
    """Return the output length of a transposed convolution along one axis."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


def conv_taps(a: int, b: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Return int64 [b, kernel]: the `a` index that output index and tap read, -1 in the padding."""
    taps = torch.arange(kernel, device="cpu")[None, :] * dilation
    index = torch.arange(b, device="cpu")[:, None] * stride - padding + taps
    return torch.where((index >= 0) & (index < a), index, -1)


def transposed_taps(a: int, b: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Return int64 [a, kernel]: the `b` index from which `a` index and tap were written, -1 where there is none."""
    taps = torch.arange(kernel, device="cpu")[None, :] * dilation
    shifted = torch.arange(a, device="cpu")[:, None] + padding - taps
    # Rounded down, so that a position before the image becomes a negative index.
    index = torch.div(shifted, stride, rounding_mode="floor")
    return torch.where((shifted % stride == 0) & (index >= 0) & (index < b), index, -1)


def pixel_map(geometry: ConvGeometry, to_b: bool) -> Tensor:
    """Return int64 [pixels out, taps]: the flat source pixel of every im2col entry, -1 for zeros.

    With `to_b`, rows are pixels of the b side that gather from the a side; without, the reverse.
    """
    function = conv_taps if to_b else transposed_taps
    sizes = geometry.a_size if to_b else geometry.b_size
    # Grown axis by axis: [pixels, taps] so far and [size, taps] of the next axis give all their combinations.
    pixels = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    for axis, row in enumerate(geometry.axes):
        index = function(*row)
        out, taps = pixels.shape
        left, right = pixels.view(out, 1, taps, 1), index.view(1, index.shape[0], 1, index.shape[1])
        joined = torch.where((left >= 0) & (right >= 0), left * sizes[axis] + right, -1)
        pixels = joined.reshape(out * index.shape[0], taps * index.shape[1])
    return pixels


def _as_int(value: Any) -> Any:
    """Return numpy's and torch's integers as int, and None for anything else, bool included."""
    # bool is an int to Python, but True as a stride is a mistake. What is no int may still be one of numpy's.
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    try:
        return operator.index(value)
    except TypeError:
        return None


def int_tuple(value: Any, rank: int, op: str, name: str) -> tuple[int, ...]:
    """Return an int or a sequence of ints as one int per axis.

    Raises:
        ShapeError: anything else, or a value below 1; paddings may be 0.
    """
    least = 0 if "padding" in name else 1
    values = tuple(map(_as_int, value)) if isinstance(value, Sequence) else (_as_int(value),)
    values = values * rank if len(values) == 1 else values
    if len(values) != rank or any(not isinstance(v, (int, torch.SymInt)) or v < least for v in values):
        raise shape_error(
            f"nvfp4 {op}: bad {name}.",
            got=repr(value),
            needs=f"an int >= {least}, or {rank} of them",
            fix=f"check {name}",
        )
    return values


def blocks_of(tokens: int, experts: int) -> int:
    """Return how many blocks of 16 rows a columnwise face has room for, however the tokens fall on the experts."""
    return (tokens + (BLOCK - 1) * experts) // BLOCK
