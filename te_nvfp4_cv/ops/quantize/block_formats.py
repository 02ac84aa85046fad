"""Quantize the operands of a convolution to the formats of block_scales.py: plain torch, on any device.

A Quantizer has the functions of a backend's module. Forms and layouts are those of operand.py, but for a block of 32:

    codes     as in NVFP4, in pieces of 16 values: a group of 40 channels has 3, as many images as fill whole pieces
    scales    one for each two pieces, along the axis of the blocks (a tile of a 2-D scaled weight is 32 x 32); the last
              block may be one piece, whose other half would be zeros

so that only the scales' axes are shorter. The Hadamard transform stays that of 16 images: it cancels between x and dy
whatever the blocks are. Stochastic rounding draws the numbers that the reference draws for the same pieces.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.block_scales import BlockFormat, tensor_amax
from te_nvfp4_cv.ops.quantize.reference import amax_of, columnwise_values, measure_operand, pad_groups
from te_nvfp4_cv.ops.quantize.reference_matrix import COLUMNWISE, ROWWISE
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    NONE,
    Face,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightLayout,
    WeightSpec,
)


class Quantizer:
    """Quantizes to one format; methods as the functions of operand.py."""

    def __init__(self, block_format: BlockFormat) -> None:
        self.format = block_format

    measure_operand = staticmethod(measure_operand)

    # ---- activations and gradients

    def quantize_operand(
        self, x: Tensor, spec: OperandSpec, dtype: torch.dtype, seed: Tensor | None, amax: Tensor | None
    ) -> Operand:
        """Quantize as operand.quantize_operand does. Of a given `amax` only matters whether it is finite."""
        empty = x.new_empty(0, dtype=torch.uint8)
        row = col = Face(empty, torch.empty_like(empty))
        own = seen = amax_of(x)
        if spec.row != NONE:
            pieces = pad_groups(x, spec.groups).unflatten(-1, (spec.groups, -1, BLOCK))  # [B, *image, G, Kb, 16]
            # [*image, B, G, Kb, 16]: the order of random numbers
            data, scale = self._rounded(pieces.movedim(0, -4), seed, ROWWISE)
            data, scale = data.flatten(-3), scale.flatten(-2)
            row = Face(*(part.movedim(-2, 0).contiguous() for part in (data, scale)))
        if spec.col != NONE:
            values = columnwise_values(x, spec)  # [N16, *folded image, C, 16]
            seen = amax_of(values)
            # [C, *folded image, N16, 16]: the order of random numbers
            values = values.movedim(0, -3).movedim(-2, 0)
            data, scale = self._rounded(values, seed, COLUMNWISE)
            data, scale = data.movedim(0, -2).movedim(-3, 0), scale.movedim(0, -1).movedim(-2, 0)
            col = Face(data.contiguous(), scale.contiguous())
        if spec.row == DEQUANTIZED:
            row = Face(self.unpack_rows(*row, x.shape[-1], spec.groups, dtype), torch.empty_like(empty))
        if spec.col == DEQUANTIZED:
            col = Face(self.unpack_columns(*col, dtype), torch.empty_like(empty))
        given = () if amax is None else (amax[:1], amax[1:])
        observed = own.new_empty(0) if amax is None else torch.cat((own, seen, torch.zeros_like(own)))
        row_amax, col_amax = tensor_amax(own, *given[:1]), tensor_amax(own, seen, *given[1:])
        return Operand(row, row_amax, col, col_amax, observed)

    def _rounded(self, values: Tensor, seed: Tensor | None, face: int) -> tuple[Tensor, Tensor]:
        """Return packed codes [..., pieces, 8] and scales [..., blocks] of values [..., pieces, 16]."""
        values = values.float()
        scale = self.format.encode(self._of_blocks(values.abs().amax(-1), (-1,)))
        scaled = self.format.divide(values, self.format.of_pieces(scale, -1, values.shape[-2]).unsqueeze(-1))
        if seed is None:
            return formats.pack_nibbles(formats.encode_e2m1(scaled)), scale
        index = torch.arange(values.numel() // BLOCK, dtype=torch.int64, device=values.device)
        random = formats.philox4x32(seed, index, face).view(values.shape)
        return formats.pack_nibbles(formats.encode_e2m1_stochastic(scaled, random)), scale

    def unpack_columns(self, data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Unpack as operand.unpack_columns does."""
        values = _decoded(data, self.format.decode(self.format.of_columns(Face(data, scale))))  # [N16, *rest, 16]
        return values.to(dtype).movedim(-1, 1).flatten(0, 1).contiguous()

    def unpack_rows(self, data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype) -> Tensor:
        """Unpack as operand.unpack_rows does."""
        pieces = self.format.decode(self.format.of_rows(Face(data, scale), groups))
        values = _decoded(data.unflatten(-1, (-1, 8)), pieces).to(dtype).flatten(-2)  # [..., G * Kb * 16]
        return values.unflatten(-1, (groups, -1))[..., : channels // groups].flatten(-2).contiguous()

    # ---- weights

    def quantize_weight(
        self, w: Tensor, spec: WeightSpec, dtype: torch.dtype, amax: Tensor | None = None
    ) -> WeightCodes:
        """Quantize as operand.quantize_weight does. Of a given `amax` only matters whether it is finite."""
        groups, n, c, taps = spec.groups, w.shape[0], w.shape[1], math.prod(w.shape[2:])
        kb, ob, each = -(-c // BLOCK), -(-(n // spec.groups) // BLOCK), n // spec.groups
        kernel = w.float().reshape(groups, each, c, taps).transpose(2, 3)  # [G, axis 0, T, axis 1]
        kernel = F.pad(kernel, (0, kb * BLOCK - c, 0, 0, 0, ob * BLOCK - each))
        empty = w.new_empty(0, dtype=torch.uint8)
        row = col = Face(empty, torch.empty_like(empty))
        if spec.row != NONE:
            values = kernel.unflatten(-1, (kb, BLOCK))  # [G, Ob * 16, T, Kb, 16]
            largest = values.abs().amax(-1)
            if spec.two_d:
                tiles = largest.unflatten(1, (ob, BLOCK)).amax(2)
                scale = self.format.encode(self._of_blocks(tiles, (1, 3)))  # [G, tiles, T, tiles]
                of_tiles = self.format.of_pieces(self.format.of_pieces(scale, 1, ob), 3, kb)
                of_rows = of_tiles.repeat_interleave(BLOCK, dim=1)
            else:
                scale = self.format.encode(self._of_blocks(largest, (3,)))
                of_rows = self.format.of_pieces(scale, 3, kb)
                scale = scale[:, :each].flatten(0, 1)
            codes = formats.encode_e2m1(self.format.divide(values, of_rows.unsqueeze(-1)))[:, :each]
            row = Face(formats.pack_nibbles(codes).flatten(-2).flatten(0, 1).contiguous(), scale.contiguous())
        if spec.col != NONE:
            values = kernel[..., :c].unflatten(1, (ob, BLOCK)).movedim(2, -1)  # [G, Ob, T, axis 1, 16]
            scale = self.format.encode(self._of_blocks(values.abs().amax(-1), (1,)))
            scaled = self.format.divide(values, self.format.of_pieces(scale, 1, ob).unsqueeze(-1))
            col = Face(formats.pack_nibbles(formats.encode_e2m1(scaled)).contiguous(), scale.contiguous())
        if spec.row == DEQUANTIZED:
            values = self.unpack_weight(*row, WeightLayout(n, c, groups, False), None, dtype)
            row = Face(values, torch.empty_like(empty))
        if spec.col == DEQUANTIZED:
            values = self.unpack_weight(*col, WeightLayout(n, c, groups, True), None, dtype)
            col = Face(values, torch.empty_like(empty))
        return WeightCodes(row, col, tensor_amax(amax_of(w), *(() if amax is None else (amax,))))

    def unpack_weight(
        self, data: Tensor, scale: Tensor, layout: WeightLayout, factor: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Unpack as operand.unpack_weight does."""
        n, channels, groups, columnwise = layout
        one_or_factor = 1.0 if factor is None else factor
        pieces = self.format.decode(self.format.of_kernel(Face(data, scale), n // groups))
        if columnwise:
            values = (_decoded(data, pieces) * one_or_factor).to(dtype)  # [G, Ob, T, axis 1, 16]
            values = values.movedim(-1, 2).flatten(1, 2)[:, : n // groups]
            return values.reshape(n, *values.shape[2:]).contiguous()
        if pieces.dim() == 4:  # one scale a tile
            pieces = pieces.repeat_interleave(BLOCK, dim=1)[:, : n // groups].flatten(0, 1)
        values = _decoded(data.unflatten(-1, (-1, 8)), pieces) * one_or_factor
        return values.to(dtype).flatten(-2)[..., :channels].contiguous()

    # ---- from pieces to blocks

    def _of_blocks(self, amax: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Return the largest of the pieces of each block; `axes` are those along which blocks run."""
        if self.format.pieces == 1:
            return amax
        for axis in axes:
            last = amax.movedim(axis, -1)
            last = F.pad(last, (0, -last.shape[-1] % self.format.pieces))
            amax = last.unflatten(-1, (-1, self.format.pieces)).amax(-1).movedim(-1, axis)
        return amax


def _decoded(data: Tensor, scale: Tensor) -> Tensor:
    """Return code * scale [..., 16], fp32, of packed pieces [..., 8] and the scale of each, fp32 [...]."""
    return formats.decode_e2m1(formats.unpack_nibbles(data)) * scale.unsqueeze(-1)
