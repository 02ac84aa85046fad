"""Take blocks of 16 of one operand as it was quantized: raw values, codes, scales and dequantized values side by side.

The layer has quantized the operand already, but backends that multiply dequantized operands hold no codes. For those
the operand is packed once more with the same amax and, if it was rounded stochastically, the same seed, which gives the
same codes. Columns are compared after the Hadamard transform, because that is what was quantized. The blocks are a
sample; the amax and the number of values that are not finite are those of the whole operand.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.block_scales import TENSOR_AMAX
from te_nvfp4_cv.ops.quantize.block_formats import QUANTIZERS, Quantizer
from te_nvfp4_cv.ops.quantize.operand import measure_operand, quantize_operand
from te_nvfp4_cv.ops.quantize.reference import fold_images, pad_groups
from te_nvfp4_cv.ops.records import NONE, PACKED, Face, Operand, WeightCodes
from te_nvfp4_cv.recipe.fields import Role


@dataclass(frozen=True)
class Blocks:
    """N blocks of one operand, before and after quantization.

    Attributes:
        raw: [N, 16] fp32, what was rounded.
        codes: [N, 16] uint8.
        scale: [N] scale bytes, E4M3 in NVFP4.
        scale_values: [N] fp32, what they stand for.
        values: [N, 16] fp32, codes times scales.
        limit: [N], 6 scales in real units: values beyond are clipped.
        valid: [N, 16], False for the zeros that pad channels or images; None if there are none.
        whole: the amax of the operand that these are a sample of, and its number of values that are not finite.
    """

    raw: Tensor
    codes: Tensor
    scale: Tensor
    scale_values: Tensor
    values: Tensor
    limit: Tensor
    valid: Tensor | None
    whole: tuple[Tensor, Tensor]


def whole(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the amax of all finite values of v, and how many are not finite: a sample would miss an outlier."""
    return finite(v if v.dtype in (torch.bfloat16, torch.float16, torch.float32) else v.double())[1:]


def finite(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return v with 0 for what is not finite, its amax, and how many values are not finite."""
    none = torch.zeros((), dtype=torch.long, device=v.device)
    if not v.numel():
        return v, v.new_zeros(()), none
    if v.device.type == "cpu":  # asking costs nothing there, and usually saves three passes
        low, high = v.aminmax()
        if math.isfinite(low) and math.isfinite(high):
            return v, torch.maximum(-low, high), none
    held = torch.nan_to_num(v, 0.0, 0.0, 0.0)
    low, high = held.aminmax()  # one pass, without a copy of |v|
    return held, torch.maximum(-low, high), (held != v).count_nonzero()


def of_operand(
    role: Role, operand: Tensor, made: Operand, seed: Tensor | None, plan: Plan, most: int
) -> dict[str, Blocks]:
    """Return the blocks of x or dy as "row" and "col", each if the layer made that face.

    Args:
        role: "input" or "grad_output".
        operand: [B, *image, C].
        made: what quantize_operand returned for it.
        seed: the seed that it was rounded with, if stochastically.
        plan: the layer's plan.
        most: the number of elements of each face to look at.
    """
    s = plan.recipe.settings(role)
    is_x = role == Role.INPUT
    fold, row_scaled = plan.folds[0 if is_x else 1], is_x and plan.row_scaled
    row, col, quantizer = made.row, made.col, QUANTIZERS.get(plan.backend)
    both_faces = plan.input_specs[True] if is_x else plan.gradient_specs[True, True]
    forms = [PACKED if face.data.numel() and not face.scale.numel() else NONE for face in (row, col)]
    if any(forms):
        # With delayed scaling the amax was given, and is not that of the operand: it is given again. A current one
        # need not be, because it is measured again.
        amax = None
        if made.observed.numel():
            amax = torch.cat((made.row_amax.flatten()[:1], made.col_amax.flatten()[:1]))
        spec = both_faces._replace(row=forms[0], col=forms[1])
        again = quantize_operand(operand, spec, plan.compute_dtype, seed, amax, plan.backend)
        row, col = again.row if forms[0] else row, again.col if forms[1] else col
    if quantizer is not None:  # one scale for each 16 values, as NVFP4 has them
        row = Face(row.data, quantizer.of_rows(row, plan.geometry.groups)) if row.data.numel() else row
        col = Face(col.data, quantizer.of_columns(col)) if col.data.numel() else col
    sampled = functools.partial(_sampled, how=_Sampling(s.e4m3_max, most, quantizer))
    found = {}
    amax_whole, broken = whole(operand)
    if row.data.numel():
        raw = _padded(operand, plan.geometry.groups)
        per_pixel = raw.shape[-1] // BLOCK
        valid = None
        if raw.shape[-1] != operand.shape[-1]:
            ones = torch.ones(1, operand.shape[-1], dtype=torch.bool, device=raw.device)
            valid = _padded(ones, plan.geometry.groups).view(per_pixel, BLOCK)
        amax = made.row_amax.reshape(-1, 1).expand(-1, per_pixel).reshape(-1) if row_scaled else made.row_amax
        found["row"] = sampled(raw, row, amax, valid=valid, rht=False, extent=(amax_whole, broken))
    if col.data.numel():
        raw = fold_images(operand, fold).unflatten(0, (-1, BLOCK)).movedim(1, -1)  # [N16, *folded, C, 16]
        amax = made.col_amax
        amax = amax.repeat(col.scale.numel() // amax.numel()) if row_scaled else amax
        # The rotation mixes the 16 images of a block, so zero images that fill it up cannot be left out afterwards.
        real = None
        if not s.rht:
            real = fold_images(torch.ones_like(operand[..., :1]), fold).unflatten(0, (-1, BLOCK)).movedim(1, -1)
            real = real.expand(raw.shape).reshape(-1, BLOCK) != 0
        if s.rht:  # the largest of the rotated values, which were not stored: quantization has measured it
            amax_whole = made.observed[1] if made.observed.numel() else made.col_amax.amax()
            # But raised it to a power of two, or has no tensor scale.
            if (s.pow2 or quantizer is not None) and not made.observed.numel():
                amax_whole = measure_operand(operand, both_faces, plan.backend)[1]
        found["col"] = sampled(raw, col, amax, valid=real, rht=s.rht, extent=(amax_whole, broken))
    return found


def of_weight(w: Tensor, codes: WeightCodes, plan: Plan, most: int) -> dict[str, Blocks]:
    """Return the blocks of a weight as "fprop" and "dgrad", or as "fprop" alone if both multiply the same face.

    Args:
        w: [axis 0, axis 1, *kernel].
        codes: what quantize_weight returned for it.
        plan: the layer's plan.
        most: the number of elements of each face to look at.
    """
    s, quantizer = plan.weight, QUANTIZERS.get(plan.backend)
    taken = dict(zip(("fprop", "dgrad"), plan.weight_faces, strict=True))
    if taken["fprop"] == taken["dgrad"]:  # 16x16 blocks: one face serves both
        del taken["dgrad"]
    kernel = w.detach().flatten(2) if w.dim() > 2 else w.detach().unsqueeze(-1)
    kernel = kernel.transpose(1, 2)  # [axis 0, taps, axis 1]
    found = {}
    extent = whole(w.detach())
    for gemm, face in taken.items():
        data, scale = codes.face(face)
        if not data.numel():
            continue
        raw = _row_kernel(kernel) if face == "row" else formats.kernel_columns(kernel, plan.geometry.groups)
        valid = None
        if raw.numel() != kernel.numel():
            ones = torch.ones_like(kernel, dtype=torch.bool)
            valid = _row_kernel(ones) if face == "row" else formats.kernel_columns(ones, plan.geometry.groups)
            valid = valid.reshape(-1, BLOCK)
        rows = kernel.shape[0] // plan.geometry.groups
        if quantizer is not None:
            scale = quantizer.of_kernel(Face(data, scale), rows)
        if face == "row" and scale.dim() == 4:  # 16x16 tiles: [groups, tiles of axis 0, taps, tiles of axis 1]
            # One scale serves 16 rows; after this each block of 16 has its own, as with 1x16.
            scale = scale.repeat_interleave(BLOCK, dim=1)[:, :rows].flatten(0, 1)
        made, amax = Face(data, scale), codes.amax
        how = _Sampling(s.e4m3_max, most, quantizer)
        found[gemm] = _sampled(raw, made, amax, how=how, valid=valid, rht=False, extent=extent)
    return found


def step_of(blocks: int, most: int) -> int:
    """Return the distance of the blocks to look at: coprime to their number, so that every channel and tap has a turn.

    A step that shares a factor with the number of channels would meet the same few channels at every pixel.
    """
    step = max(1, -(-blocks * BLOCK // most))
    while math.gcd(step, blocks) != 1:
        step += 1
    return step


class _Sampling(NamedTuple):
    """How blocks are read: the largest scale, the number of elements, the quantizer of another block format."""

    e4m3_max: int
    most: int
    quantizer: Quantizer | None


def _sampled(
    raw: Tensor, face: Face, amax: Tensor, *,
    how: _Sampling, valid: Tensor | None, rht: bool, extent: tuple[Tensor, Tensor],
) -> Blocks:
    """Take every step_of-th block of one face.

    Args:
        amax: [1], or one for each block.
        valid: as in Blocks, given for every block or for the blocks of one pixel.
        rht: the transform is applied to `raw`.
        extent: Blocks.whole.
    """
    raw, data, scale = raw.reshape(-1, BLOCK), face.data.reshape(-1, BLOCK // 2), face.scale.reshape(-1)
    step = step_of(len(raw), how.most)
    # A copy, because every figure reads these blocks, and they lie far apart in the operand.
    raw, data, scale = raw[::step].contiguous(), data[::step], scale[::step]
    if rht:  # of the sample only: the transform acts within a block
        raw = formats.rht16(raw)
    if valid is not None:
        index = torch.arange(len(raw), device=raw.device) * step
        valid = valid[index % len(valid)]
    amax = amax.flatten() if amax.numel() == 1 else amax.flatten()[::step]
    scale = scale.contiguous()
    if how.quantizer is None:
        scale_values = scale.view(torch.float8_e4m3fn).float()
        factor = formats.block_units(scale.view(torch.float8_e4m3fn), amax, how.e4m3_max)
    else:
        scale_values = how.quantizer.format.decode(scale)
        factor = scale_values * (amax * (1.0 / TENSOR_AMAX))
    codes = formats.unpack_nibbles(data)
    table = formats.decode_e2m1(torch.arange(16, device=codes.device))
    values = table.index_select(0, codes.flatten().int()).view(codes.shape) * factor.unsqueeze(-1)
    return Blocks(raw.float(), codes, scale, scale_values, values, 6 * factor, valid, extent)


def _padded(x: Tensor, groups: int) -> Tensor:
    return x if x.shape[-1] // groups % BLOCK == 0 else pad_groups(x, groups)


def _row_kernel(kernel: Tensor) -> Tensor:
    """Pad the weight as its rowwise face is padded: [axis 0, taps, axis 1 padded]."""
    return F.pad(kernel, (0, -kernel.shape[-1] % BLOCK))
