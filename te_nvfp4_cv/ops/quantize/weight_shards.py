"""Quantize a 16x16-scaled weight whose rows (axis 0) lie on several ranks: each rank quantizes its own rows, with the
scales of the whole weight's tiles.

    tile_amaxes     the largest magnitudes of a rank's rows in every tile of the whole weight; 0 in tiles it does not
                    touch (the maximum over the ranks makes them the whole weight's; their maximum is its amax)
    tile_scales     amaxes of tiles -> E4M3 bytes [G, Ob, T, Kb], as operand.quantize_weight gives them
    quantize_rows   a rank's rows -> packed codes [rows, T, Kb * 8], those of the whole weight bit for bit

A tile may straddle ranks. All is plain torch on any device, since a rank's share of a weight is small. 4over6 is not
offered: its choice needs the errors of whole tiles.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK


def _blocks(w: Tensor) -> Tensor:
    """Return rows [rows, axis 1, *kernel] as fp32 [rows, T, Kb, 16], with axis 1 padded with zeros."""
    taps_last = w.reshape(w.shape[0], w.shape[1], math.prod(w.shape[2:])).transpose(1, 2)
    return formats.blocks(F.pad(taps_last, (0, -w.shape[1] % BLOCK)).float())


def _places(first: int, rows: int, n: int, groups: int, device: torch.device) -> Tensor:
    """Return where each row of axis 0 lies when every group is padded to whole tiles, int64 [rows]."""
    # A group's rows are padded to whole tiles, so rows of the next group start at a tile of their own.
    row, per_group = torch.arange(first, first + rows, device=device), n // groups
    return row // per_group * formats.round_up(per_group, BLOCK) + row % per_group


def tile_amaxes(w: Tensor, first: int, n: int, groups: int) -> Tensor:
    """Return the tiles' amaxes, fp32 [G, Ob, T, Kb], as far as the rows w [rows, axis 1, *kernel] decide them.

    The rows start at `first` of the weight's n. NaN stays.
    """
    of_rows = _blocks(w).abs().amax(-1)  # [rows, T, Kb]
    padded = of_rows.new_zeros(groups * formats.round_up(n // groups, BLOCK), *of_rows.shape[1:])
    padded[_places(first, w.shape[0], n, groups, w.device)] = of_rows
    return padded.unflatten(0, (groups, -1, BLOCK)).amax(2)


def tile_scales(tiles: Tensor, amax: Tensor) -> Tensor:
    """Return the E4M3 decode scales, uint8 [G, Ob, T, Kb], of the tiles of a weight with this amax [1]."""
    return formats.block_scale(tiles, formats.encode_scale(amax)).view(torch.uint8)


def quantize_rows(w: Tensor, first: int, n: int, groups: int, scales: Tensor, amax: Tensor) -> Tensor:
    """Return packed codes, uint8 [rows, T, Kb * 8], of the rows w under the scales of tile_scales."""
    of_tiles = scales.flatten(0, 1).view(torch.float8_e4m3fn)
    factor = formats.encode_multiplier(of_tiles, formats.encode_scale(amax))  # [tiles, T, Kb]
    of_rows = factor[_places(first, w.shape[0], n, groups, w.device) // BLOCK]
    codes = formats.encode_e2m1(_blocks(w) * of_rows.unsqueeze(-1))
    return formats.pack_nibbles(codes.flatten(-2)).contiguous()
