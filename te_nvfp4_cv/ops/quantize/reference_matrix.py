"""The specification of quantization: plain torch, slow, obvious. Other backends are compared with this file, in bits.

Two faces of a matrix x_MK can be written, both from the same values:

    rowwise     blocks of 16 along K of x:                      data [M, Kp/2], scale_inv [M, Kp/16], amax of x
    columnwise  blocks of 16 along M of x^T, after RHT if any:  data [K, Mp/2], scale_inv [K, Mp/16], amax as quantized

Mp and Kp are M and K rounded up to 16 with zeros. How a block gets its scale:

    1x16        s_b from the amax of 16 elements
    16x16       s_b from the amax of a tile, repeated on the tile's rows
    4over6      s_b maps the amax to 6 or to 4, whichever gives the smaller error; ties to 6
    row-scaled  one amax per row of the face instead of one per tensor

The numbers themselves are in formats.py. Dtypes, ranks and meaningless combinations of options are refused by the
caller, matrix.py.
Source: TransformerEngine's reference_nvfp4.py; random bytes and edge rules are this library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK, E4M3_MAX
from te_nvfp4_cv.ops.records import ERRORS

ROWWISE, COLUMNWISE = 0, 1


class Faces(NamedTuple):
    """The two faces that quantize_2d returns; the tensors of a face that was not asked for are empty."""

    row_data: Tensor
    row_scale: Tensor
    row_amax: Tensor
    col_data: Tensor
    col_scale: Tensor
    col_amax: Tensor


class MatrixSpec(NamedTuple):
    """The options of one quantization.

    Args:
        rht: rotate the columnwise operand, 16 rows of x at a time; the rowwise face is never rotated.
        two_d: one scale per 16x16 tile.
        four_over_six: None, "MAE" or "MSE".
        e4m3_max: 448, or 256 with 4over6.
        row_scaled: amax is a vector, [M] rowwise and [K] columnwise.
        with_sign: use the fixed signs of the RHT.
    """

    rowwise: bool = True
    columnwise: bool = False
    rht: bool = False
    stochastic_rounding: bool = False
    two_d: bool = False
    four_over_six: str | None = None
    e4m3_max: int = E4M3_MAX
    row_scaled: bool = False
    with_sign: bool = True

    def to_ints(self) -> list[int]:
        """Return the fields in their order as ints, for the operator boundary."""
        return [ERRORS[f] if f is None or isinstance(f, str) else int(f) for f in self]

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> MatrixSpec:
        """Rebuild a spec from to_ints."""
        rowwise, columnwise, rht, stochastic, two_d, row_scaled, with_sign = (bool(i) for i in (*ints[:5], *ints[7:]))
        mode, e4m3_max = list(ERRORS)[ints[5]], ints[6]
        return cls(rowwise, columnwise, rht, stochastic, two_d, mode, e4m3_max, row_scaled, with_sign)


def empty_faces(like: Tensor, M: int, K: int, spec: MatrixSpec) -> Faces:
    """Return uninitialized faces of a matrix [M, K] on the device of `like`."""

    def face(wanted: bool, R: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
        n_blocks = -(-L // BLOCK)
        sizes = ((R, n_blocks * (BLOCK // 2)), (R, n_blocks), (R if spec.row_scaled else 1,)) if wanted else ((0,),) * 3
        data, scale, amax = sizes
        return (
            like.new_empty(data, dtype=torch.uint8),
            like.new_empty(scale, dtype=torch.float8_e4m3fn),
            like.new_empty(amax, dtype=torch.float32),
        )

    return Faces(*face(spec.rowwise, M, K), *face(spec.columnwise, K, M))


def quantize_2d(
    x_MK: Tensor,
    *,
    amax_rowwise: Tensor | None = None,
    amax_columnwise: Tensor | None = None,
    seed: Tensor | int | None = None,
    random_rowwise: Tensor | None = None,
    random_columnwise: Tensor | None = None,
    **spec: Any,
) -> Faces:
    """Quantize a matrix to NVFP4, rowwise and/or columnwise.

    Args:
        x_MK: [M, K] bf16, fp16 or fp32, any strides.
        amax_rowwise: fp32. If None, it is computed; pass it when ranks must agree.
        amax_columnwise: fp32, after RHT. If None, it is computed, or copied from amax_rowwise without RHT.
        seed: int64 Philox key; needed for stochastic rounding unless the random bytes are given.
        random_rowwise: uint8 [M, Kp] to use instead of Philox.
        random_columnwise: uint8 [K, Mp] to use instead of Philox.
        **spec: fields of MatrixSpec.
    Numerics: amax propagates NaN and inf, S_enc is then 1 and the block's scale byte at most 0x7E.
    """
    s = MatrixSpec(**spec)
    M, K = x_MK.shape
    x_pad = F.pad(x_MK, (0, -K % BLOCK, 0, -M % BLOCK))  # zeros change neither amax nor codes of the rest of a block
    tile_scale: Tensor | None = None
    # The columnwise face after RHT has an amax of its own: x's is needed for the rowwise face and without RHT.
    if amax_rowwise is None and not (s.rht and not s.rowwise):
        amax_rowwise = _amax(x_MK.float(), s.row_scaled)
    if s.two_d:  # one choice for both faces, so that their codes are the same numbers
        assert amax_rowwise is not None
        tile_scale = _scales(x_pad.float(), amax_rowwise, s.e4m3_max, s.four_over_six, two_d=True)

    none = empty_faces(x_MK, M, K, s._replace(rowwise=False, columnwise=False))
    row, col = none[:3], none[3:]
    if s.rowwise:
        assert amax_rowwise is not None
        v_MK = x_pad[:M].float()
        scale = None if tile_scale is None else tile_scale[:M]
        row = _face(v_MK, amax_rowwise, s, scale, _random(s, random_rowwise, seed, v_MK, ROWWISE))
    if s.columnwise:
        v_KM = x_pad[:, :K].t()
        if s.rht:
            v_KM = formats.rht16(formats.blocks(v_KM), s.with_sign).flatten(-2)
        v_KM = v_KM.float()  # after the RHT, which rounds to bf16 for a bf16 input
        if amax_columnwise is None:
            amax_columnwise = _amax(v_KM, s.row_scaled) if s.rht or s.row_scaled else amax_rowwise
        assert amax_columnwise is not None
        scale = None if tile_scale is None else _transposed(tile_scale)[:K]
        col = _face(v_KM, amax_columnwise, s, scale, _random(s, random_columnwise, seed, v_KM, COLUMNWISE))
    return Faces(*row, *col)


def amax_2d(x_MK: Tensor, s: MatrixSpec) -> tuple[Tensor, Tensor]:
    """Return amax_rowwise and amax_columnwise as quantize_2d would find them; the second is empty unless columnwise."""
    row = _amax(x_MK.float(), s.row_scaled)
    if not s.columnwise:
        return row, row.new_empty(0)
    if not s.rht and not s.row_scaled:
        return row, row.clone()
    v_KM = F.pad(x_MK.t(), (0, -x_MK.shape[0] % BLOCK))
    if s.rht:
        v_KM = formats.rht16(formats.blocks(v_KM), s.with_sign).flatten(-2)
    return row, _amax(v_KM.float(), s.row_scaled)


def _face(
    v: Tensor, amax: Tensor, s: MatrixSpec, scale: Tensor | None, random: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return data, scale_inv and amax of values [R, L] (fp32, L a multiple of 16), with blocks along L."""
    if scale is None:
        scale = _scales(v, amax, s.e4m3_max, s.four_over_six, two_d=False)
    codes = _codes(v, scale, formats.encode_scale(amax, s.e4m3_max), random)
    return formats.pack_nibbles(codes).contiguous(), scale.contiguous(), amax.clone()


def _codes(v: Tensor, scale: Tensor, s_enc: Tensor, random: Tensor | None) -> Tensor:
    """Encode v as E2M1 codes [R, L] under block scales [R, L/16]."""
    enc = formats.encode_multiplier(scale, s_enc.unsqueeze(-1))
    scaled = (formats.blocks(v) * enc.unsqueeze(-1)).flatten(-2)
    return formats.encode_e2m1(scaled) if random is None else formats.encode_e2m1_stochastic(scaled, random)


def _scales(v: Tensor, amax: Tensor, e4m3_max: int, four_over_six: str | None, two_d: bool) -> Tensor:
    """Return E4M3 decode scales [R, L/16]; with two_d those of 16x16 tiles, and R is a multiple of 16."""
    s_enc = formats.encode_scale(amax, e4m3_max).unsqueeze(-1)
    amax_b = _max(formats.blocks(v.abs()), -1)
    if two_d:
        amax_b = _over_tile_rows(_max(amax_b.unflatten(0, (amax_b.shape[0] // BLOCK, BLOCK)), 1))
    if four_over_six is None:
        return formats.block_scale(amax_b, s_enc)
    # Both candidates are tried in full; on a tie the 6 stays, since the comparison below is strict.
    s6, s4 = formats.four_over_six_scales(amax_b, s_enc)
    e6, e4 = (_error(v, s, amax, e4m3_max, four_over_six, two_d) for s in (s6, s4))
    return torch.where(e4 < e6, s4.view(torch.uint8), s6.view(torch.uint8)).view(torch.float8_e4m3fn)


def _error(v: Tensor, scale: Tensor, amax: Tensor, e4m3_max: int, mode: str, two_d: bool) -> Tensor:
    """Return the error [R, L/16] of a candidate scale.

    Sums are fp32, over 16 elements in order and then by a tree over the tile's rows: kernels copy that order, because
    another one could choose the other scale.
    """
    codes = _codes(v, scale, formats.encode_scale(amax, e4m3_max), None)
    value = formats.blocks(formats.decode_e2m1(codes)) * scale.float().unsqueeze(-1)
    value = value * amax.reshape(-1, 1, 1)
    # By a tensor: on CUDA, torch makes division by a number a product with its reciprocal, which rounds differently.
    d = torch.div(value, torch.full_like(value, 6.0 * e4m3_max)) - formats.blocks(v)
    d = d.abs() if mode == "MAE" else d * d
    total = d[..., 0]  # not sum(): its order of additions is torch's secret, and differs from machine to machine
    for i in range(1, BLOCK):
        total = total + d[..., i]
    if two_d:
        total = total.unflatten(0, (total.shape[0] // BLOCK, BLOCK))
        for half in (8, 4, 2, 1):
            total = total[:, :half] + total[:, half:]
        total = _over_tile_rows(total[:, 0])
    return total


def _random(s: MatrixSpec, given: Tensor | None, seed: Tensor | int | None, v: Tensor, face: int) -> Tensor | None:
    """Return the random bytes of values [R, L], or None for nearest-even; block (r, b) has the index r * L/16 + b."""
    if not s.stochastic_rounding or given is not None:
        return given if s.stochastic_rounding else None
    assert seed is not None
    # The face's number goes into the counter, so that the two faces draw different bytes.
    index = torch.arange(v.shape[0] * (v.shape[1] // BLOCK), dtype=torch.int64, device=v.device)
    return formats.philox4x32(seed, index, face).reshape(v.shape)


def _transposed(scale: Tensor) -> Tensor:
    """Transpose the rowwise scales [Mp, Kp/16] of 16x16 tiles to the columnwise face's [Kp, Mp/16]."""
    return _over_tile_rows(scale.view(torch.uint8)[::BLOCK].t()).view(torch.float8_e4m3fn)


def _over_tile_rows(tile: Tensor) -> Tensor:
    """Repeat [T, C] on the 16 rows of each tile: [16 T, C]."""
    return tile.repeat_interleave(BLOCK, dim=0)


def _amax(v: Tensor, row_scaled: bool) -> Tensor:
    """Return max |v|, [1], or that of every row, [R]; 0 for an empty tensor. NaN and inf stay."""
    return _max(v.abs(), 1) if row_scaled else _max(v.abs().reshape(1, -1), 1)


def _max(v: Tensor, dim: int) -> Tensor:
    """Return v.amax(dim), also for an axis of length 0, which torch refuses."""
    return v.amax(dim) if v.shape[dim] else v.new_zeros(v.shape[:dim] + v.shape[dim + 1 :])
