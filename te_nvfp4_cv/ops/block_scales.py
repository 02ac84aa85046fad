"""The block formats beside NVFP4, as data: how many values share a scale, and how the scale's byte is made and read.

    format          block   scale of a block          byte                                     code
    mxfp4           32      2^(floor(log2 amax) - 2)  E8M0: 2^(byte - 127), 255 is NaN         e2m1(x / s)
    nvfp4_ue5m3     16      amax / 6                  UE5M3: 2^-17 .. 114688, no sign, no NaN  e2m1(x / s)
    fp4_e4m3_only   16      amax * f32(1/6)           E4M3: 2^-9 .. 448, no NaN                e2m1(x * f32(1 / s))

None has a tensor scale, so each covers only the range of its scales: a block whose scale rounds to 0 (amax up to
6 * 2^-18 and 6 * 2^-10) decodes to zeros, and one above the largest scale saturates. fp4_e4m3_only is NVFP4 with a
tensor scale of 1, bit for bit. An operand's amax is therefore TENSOR_AMAX, which stands for the tensor scale 1, or the
operand's own where that is not finite, so that it reaches every result as in NVFP4.

mxfp4 is the rule of OCP Microscaling 1.0, section 6.3, with ties to even: torchao's MXTensor with scaling_mode FLOOR,
microxcaling with shared_exp_method "max" and round "even" (its default round, "nearest", takes ties away from zero).
A block of amax 7 has the scale 1, so its largest values are clipped to 6, as that rule wants. UE5M3 has 5 exponent bits
with a bias of 15, 3 bits of mantissa, subnormals, and rounds to nearest, ties to even; bytes are those of LLVM's
Float8E5M3FNU. A NaN in a block gives the largest scale there, as in NVFP4; mxfp4's gives 255.
Source: OCP Microscaling Formats (MX) 1.0; arXiv 2509.17791 (UE5M3).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK, E2M1_MAX, E4M3_MAX
from te_nvfp4_cv.ops.records import Face

TENSOR_AMAX = E2M1_MAX * E4M3_MAX  # of a tensor scale of 1
REFERENCE, INTEGER = " reference", " integer"  # at the end of a backend's name


class BlockFormat(NamedTuple):
    """One format.

    Attributes:
        block: how many values share a scale, 16 or 32.
        encode: amaxes of blocks, fp32, to scale bytes, uint8.
        decode: scale bytes to what a code of 1.0 stands for, fp32.
        divide: fp32 values and the scale bytes of their blocks, broadcast, to what is rounded to E2M1.
    """

    block: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    divide: Callable[[Tensor, Tensor], Tensor]

    @property
    def pieces(self) -> int:
        """How many pieces of 16 values share a scale."""
        return self.block // BLOCK

    # ---- one scale byte for each piece of 16, as NVFP4's faces have them

    def of_rows(self, x: Face, groups: int) -> Tensor:
        """Return the scales of a rowwise operand's pieces, [..., G * Kb]."""
        scale = x.scale.unflatten(-1, (groups, -1))
        return self.of_pieces(scale, -1, x.data.shape[-1] // 8 // groups).flatten(-2)

    def of_columns(self, x: Face) -> Tensor:
        """Return the scales of a columnwise operand's pieces, [N16, *folded image, C]."""
        return self.of_pieces(x.scale, 0, x.data.shape[0])

    def of_kernel(self, w: Face, rows: int) -> Tensor:
        """Return the scales of the pieces of a weight's face, of 16x16 tiles where it has tiles.

        Args:
            rows: of axis 0 in a group.
        """
        if w.data.dim() == 5:  # columnwise: [G, Ob, T, axis 1, 8]
            return self.of_pieces(w.scale, 1, w.data.shape[1])
        scale = self.of_pieces(w.scale, -1, w.data.shape[-1] // 8)
        return self.of_pieces(scale, 1, -(-rows // BLOCK)) if scale.dim() == 4 else scale

    def of_pieces(self, scale: Tensor, axis: int, count: int) -> Tensor:
        """Return the scales of `count` pieces along an axis that has those of blocks."""
        if self.pieces == 1:
            return scale
        return scale.repeat_interleave(self.pieces, dim=axis).narrow(axis, 0, count).contiguous()


# ---- E8M0 -----------------------------------------------------------------------------------------------------------


def encode_e8m0(amax_b: Tensor) -> Tensor:
    """Return the byte of 2^(floor(log2 amax) - 2): 6 is the largest E2M1 value, and 4 its largest power of two.

    Numerics: from the bits; amaxes below 2^-124 give 0, which is 2^-127; inf gives 253, NaN 255.
    """
    bits = amax_b.view(torch.int32)
    byte = ((bits >> 23) - 2).clamp(min=0)
    return torch.where(amax_b.isnan(), 255, byte).to(torch.uint8)


def decode_e8m0(byte: Tensor) -> Tensor:
    """Return 2^(byte - 127), fp32; 255 gives NaN."""
    bits = byte.to(torch.int32)
    # 2^-127 is subnormal in fp32: its bits are those of half the smallest normal number.
    value = torch.where(bits == 0, 0x400000, bits << 23).to(torch.int32).view(torch.float32)
    return torch.where(bits == 255, torch.nan, value)


def _by_e8m0(v: Tensor, byte: Tensor) -> Tensor:
    return torch.div(v, decode_e8m0(byte))  # exact, but for subnormal results


# ---- UE5M3 ----------------------------------------------------------------------------------------------------------


def encode_ue5m3(v: Tensor) -> Tensor:
    """Round fp32 values >= 0 to UE5M3 bytes: nearest, ties to even, with subnormals, saturating; NaN gives 254."""
    v = torch.where(v < 114688, v, 114688.0)  # NaN, to which a reduction of torch may give a sign
    bits = v.view(torch.int32)
    # A carry out of the mantissa is the next exponent. The byte's exponent has a bias of 15, that of fp32 one of 127.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 8 * (127 - 15)
    # 8 is the smallest normal number, 2^-14. torch rounds ties to even.
    subnormal = torch.round(v * 2.0**17).clamp(max=8).to(torch.int32)
    return torch.where(v < 2.0**-14, subnormal, normal).to(torch.uint8)


def decode_ue5m3(byte: Tensor) -> Tensor:
    """Return the fp32 values of UE5M3 bytes 0 .. 254."""
    code = byte.to(torch.int32)
    normal = ((code + 8 * (127 - 15)) << 20).view(torch.float32)
    return torch.where(code < 8, code.to(torch.float32) * 2.0**-17, normal)


def _ue5m3_of_block(amax_b: Tensor) -> Tensor:
    return encode_ue5m3(torch.div(amax_b, torch.full_like(amax_b, E2M1_MAX)))


def _by_ue5m3(v: Tensor, byte: Tensor) -> Tensor:
    scale = decode_ue5m3(byte)
    return torch.div(v, torch.where(byte == 0, torch.inf, scale))  # zeros under a scale of 0, where 0 / 0 would be NaN


# ---- E4M3 -----------------------------------------------------------------------------------------------------------


def _e4m3_of_block(amax_b: Tensor) -> Tensor:
    return formats.block_scale(amax_b, torch.ones_like(amax_b)).view(torch.uint8)


def _decode_e4m3(byte: Tensor) -> Tensor:
    return byte.view(torch.float8_e4m3fn).to(torch.float32)


def _by_e4m3(v: Tensor, byte: Tensor) -> Tensor:
    scale = byte.view(torch.float8_e4m3fn)
    return v * formats.encode_multiplier(scale, torch.ones((), dtype=torch.float32, device=v.device))


# ---- the formats ----------------------------------------------------------------------------------------------------

FORMATS = {
    "mxfp4": BlockFormat(32, encode_e8m0, decode_e8m0, _by_e8m0),
    "nvfp4_ue5m3": BlockFormat(16, _ue5m3_of_block, decode_ue5m3, _by_ue5m3),
    "fp4_e4m3_only": BlockFormat(16, _e4m3_of_block, _decode_e4m3, _by_e4m3),
}
"""By the name that recipe.block_format has. Its values without NVFP4, whose numbers formats.py has."""


def backend_of(block_format: str, backend: str) -> str:
    """Return the name of the backend that runs a format, given the one that NVFP4 would run on."""
    return block_format + {"reference": REFERENCE, "integer": INTEGER}.get(backend, "")


def format_of(backend: str) -> BlockFormat | None:
    """Return the format that a backend runs, None for NVFP4."""
    return FORMATS.get(backend.partition(" ")[0])


def block_of(backend: str) -> int:
    """Return how many values share a scale on a backend."""
    found = format_of(backend)
    return BLOCK if found is None else found.block


@functools.lru_cache(maxsize=16)  # of few formats
def scale_table(block_format: str, half: bool = False) -> Any:
    """Return what the 256 scale bytes of a format stand for, or half of it, as a C array for compiled kernels."""
    values = FORMATS[block_format].decode(torch.arange(256, device="cpu").to(torch.uint8)).tolist()
    return (ctypes.c_float * 256)(*(value / 2 if half else value for value in values))


def tensor_amax(*amaxes: Tensor) -> Tensor:
    """Return what stands for the tensor scale 1, fp32 [1], or an amax that is not finite."""
    used = torch.full_like(amaxes[0], TENSOR_AMAX)
    for amax in amaxes:
        used = torch.where(amax.isfinite(), used, amax)
    return used
