"""The records that operators take and give, and the forms in which a quantized operand is stored.

A *face* is a quantized operand laid out for one GEMM: the blocks of a rowwise face run along its rows, those of a
columnwise face along its columns. A custom operator of torch takes and returns flat lists of tensors and numbers; the
records here say what each of them is, and their `to_ints` / `from_ints` and `flat` / `from_flat` are the only places
that rely on an order.

    form           what a face holds
    NONE           nothing: the face was not asked for
    PACKED         E2M1 codes, two a byte, and E4M3 scale bytes: what backward saves
    DEQUANTIZED    code * scale, without the tensor scale, and an empty scale: what a vendor's convolution multiplies
    RECORDS        20 bytes for a block, 16 of 2 * value + 12 and the scale / 2 in fp32, and an empty scale: what the
                   integer backend multiplies
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Plain ints, because kernels compare them at compile time.
NONE, PACKED, DEQUANTIZED, RECORDS = 0, 1, 2, 3
RECORD = 20  # bytes
ERRORS = {None: 0, "MAE": 1, "MSE": 2}  # of 4over6, as native.cpp and the Triton kernels number them
_ERROR_NAMES = tuple(ERRORS)


class Face(NamedTuple):
    """Codes and scales of one direction; dequantized, or as records, data and an empty scale."""

    data: Tensor
    scale: Tensor


class Operand(NamedTuple):
    """An activation or gradient after quantization; what was not asked for is empty.

    `observed` is fp32 [3] where amaxes were given: the amax of x, that of the columnwise operand after folding and
    RHT, and the number of saturated blocks. It is empty where the operand's own amaxes were used.
    """

    row: Face
    row_amax: Tensor
    col: Face
    col_amax: Tensor
    observed: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        """Return the seven tensors in the order in which an operator returns them."""
        return (*self.row, self.row_amax, *self.col, self.col_amax, self.observed)

    @classmethod
    def from_flat(cls, tensors: tuple[Tensor, ...]) -> Operand:
        """Build the record from what an operator returned."""
        row_data, row_scale, row_amax, col_data, col_scale, col_amax, observed = tensors
        return cls(Face(row_data, row_scale), row_amax, Face(col_data, col_scale), col_amax, observed)


class Collector(NamedTuple):
    """Where a call with given amaxes leaves what it observed: delayed scales.

    Attributes:
        collected: fp32 [2], raised to the observed amaxes where these are finite.
        saturated: float64 [1]: saturated blocks are added if `counts`.
    """

    collected: Tensor
    saturated: Tensor
    counts: bool


class Move(NamedTuple):
    """Amaxes of delayed scales that are to be taken from those seen, which are cleared; see amax.move."""

    used: Tensor
    seen: Tensor
    e4m3_max: tuple[int, ...]
    margin: tuple[int, ...]


class WeightCodes(NamedTuple):
    """A weight after quantization: one or both faces, and the amax [1] whose tensor scale both use."""

    row: Face
    col: Face
    amax: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        """Return the five tensors in the order in which an operator returns them."""
        return (*self.row, *self.col, self.amax)

    @classmethod
    def from_flat(cls, tensors: tuple[Tensor, ...]) -> WeightCodes:
        """Build the record from what an operator returned."""
        row_data, row_scale, col_data, col_scale, amax = tensors
        return cls(Face(row_data, row_scale), Face(col_data, col_scale), amax)

    @classmethod
    def of_face(cls, name: str, face: Face, amax: Tensor) -> WeightCodes:
        """Build the record of a weight of which only the face `name`, "row" or "col", exists."""
        # The record has two faces always, and one that was not made is empty.
        empty = Face(face.data.new_empty(0), face.scale.new_empty(0))
        return cls(face, empty, amax) if name == "row" else cls(empty, face, amax)

    def face(self, name: str) -> Face:
        """Return the face "row" or "col"."""
        return self.row if name == "row" else self.col


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
        """Encode the fields, in their order, for a custom operator."""
        return [self.strips, self.step, self.rows, self.offset, self.images]

    def source_rows(self, batch: int, source: int) -> Tensor:
        """Return int64 [images, rows]: b * source + row for every folded row, -1 for zeros."""
        image = torch.arange(self.images, device="cpu")
        row = (image % self.strips)[:, None] * self.step + torch.arange(self.rows, device="cpu")[None, :] - self.offset
        inside = (row >= 0) & (row < source) & (image // self.strips < batch)[:, None]
        return torch.where(inside, (image // self.strips)[:, None] * source + row, -1)


class OperandSpec(NamedTuple):
    """Says how an activation or gradient [B, *image, C] is quantized.

    Attributes:
        groups: blocks never cross a group of C / groups channels.
        fold: how images are laid out in the columnwise face.
        row: form of the rowwise face.
        col: form of the columnwise face.
        rht: rotate the columnwise face.
        stochastic: round stochastically; the call then needs a seed.
        four_over_six: None, "MAE" or "MSE".
        e4m3_max: the largest block scale, 448 or 256.
        row_scaled: one amax per pixel (rowwise [B, *image]) and per channel (columnwise [C]).
        pow2: use formats.power_of_two_amax of the amaxes. Not with row_scaled.
    """

    groups: int
    fold: Fold
    row: int = NONE
    col: int = NONE
    rht: bool = False
    stochastic: bool = False
    four_over_six: str | None = None
    e4m3_max: int = 448
    row_scaled: bool = False
    pow2: bool = False

    def to_ints(self) -> list[int]:
        """Encode the spec for a custom operator."""
        flags = (self.rht, self.stochastic, ERRORS[self.four_over_six], self.e4m3_max, self.row_scaled, self.pow2)
        return [self.groups, *self.fold.to_ints(), self.row, self.col, *map(int, flags)]

    @staticmethod
    def from_ints(ints: list[int]) -> OperandSpec:
        """Decode what to_ints gave."""
        return _operand_spec(tuple(ints))


# An operator passes the same list at each call of a layer.
@functools.lru_cache(maxsize=4096)
def _operand_spec(ints: tuple[int, ...]) -> OperandSpec:
    groups, *fold, row, col, rht, stochastic, error, e4m3_max, row_scaled, pow2 = ints
    flags, more = (bool(rht), bool(stochastic), _ERROR_NAMES[error]), (bool(row_scaled), bool(pow2))
    return OperandSpec(groups, Fold(*fold), row, col, *flags, e4m3_max, *more)


class WeightSpec(NamedTuple):
    """Says how a weight [axis 0, axis 1, *kernel], or a rank's rows or columns of one, is quantized.

    Attributes:
        groups: divides axis 0; blocks never cross a group.
        row: form of the face whose blocks run over axis 1.
        col: form of the face whose blocks run over axis 0; NONE with two_d, where the rowwise face serves both.
        two_d: 16x16 blocks instead of 1x16.
        four_over_six: None, "MAE" or "MSE".
        e4m3_max: the largest block scale, 448 or 256.
        pow2: use formats.power_of_two_amax of the weight's amax, so that the tensor scale is a power of two.
    """

    groups: int
    row: int = NONE
    col: int = NONE
    two_d: bool = True
    four_over_six: str | None = None
    e4m3_max: int = 448
    pow2: bool = False

    def to_ints(self) -> list[int]:
        """Encode the spec for a custom operator."""
        flags = (self.two_d, ERRORS[self.four_over_six], self.e4m3_max, self.pow2)
        return [self.groups, self.row, self.col, *map(int, flags)]

    @staticmethod
    def from_ints(ints: list[int]) -> WeightSpec:
        """Decode what to_ints gave."""
        groups, row, col, two_d, error, e4m3_max, pow2 = ints
        return WeightSpec(groups, row, col, bool(two_d), _ERROR_NAMES[error], e4m3_max, bool(pow2))


class Alpha(NamedTuple):
    """The factor (a * b) * number, fp32 [1], of a product: kernels multiply it out where they use it.

    Only eager calls on the kernels of the vendor backend have one; everywhere else it is a tensor.
    """

    a: Tensor
    b: Tensor
    number: float

    def tensor(self) -> Tensor:
        """Multiply it out."""
        return (self.a * self.b) * self.number


def tensor_of(alpha: Tensor | Alpha | None) -> Tensor | None:
    """Return the factor as a tensor."""
    return alpha.tensor() if isinstance(alpha, Alpha) else alpha


class WeightLayout(NamedTuple):
    """The sizes of a weight whose face is unpacked: axis 0, axis 1, groups, and which face it is."""

    n: int
    channels: int
    groups: int
    columnwise: bool
