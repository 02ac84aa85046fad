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

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.block_scales import TENSOR_AMAX, BlockFormat, format_of
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.quantize import grouped
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


def whole(v: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the amax of all finite values of v, and how many are not finite: a sample would miss an outlier.

    Args:
        amax: that of all values, if it is known: on a CPU, if it is finite, nothing is read again.
    """
    if amax is not None and v.device.type == "cpu" and math.isfinite(amax):
        return amax, torch.zeros((), dtype=torch.long)
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
    role: Role,
    operand: Tensor,
    made: Operand,
    seed: Tensor | None,
    plan: Plan,
    most: int,
    experts: Experts | None = None,
) -> dict[str, Blocks]:
    """Return the blocks of x or dy as "row" and "col", each if the layer made that face.

    Args:
        role: "input" or "grad_output".
        operand: [B, *image, C].
        made: what quantize_operand returned for it.
        seed: the seed that it was rounded with, if stochastically.
        plan: the layer's plan.
        most: the number of elements of each face to look at.
        experts: of a grouped linear layer. Rows that are nobody's, which have no codes, are not looked at.
    """
    s = plan.recipe.settings(role)
    is_x, groups = role == Role.INPUT, plan.geometry.row_groups
    if experts is not None and not experts.rows:
        return {}
    fold, row_scaled = plan.folds[0 if is_x else 1], is_x and plan.row_scaled
    row, col, other = made.row, made.col, format_of(plan.backend)
    both_faces = plan.input_specs[True] if is_x else plan.gradient_specs[True, True]
    forms = [PACKED if face.data.numel() and not face.scale.numel() else NONE for face in (row, col)]
    if any(forms):
        # With delayed scaling the amax was given, and is not that of the operand: it is given again. A current one
        # need not be, because it is measured again.
        amax = None
        if made.observed.numel() or (experts is not None and plan.delayed):  # which tell nobody what they observed
            amax = torch.cat((made.row_amax.flatten()[:1], made.col_amax.flatten()[:1]))
        spec = both_faces._replace(row=forms[0], col=forms[1])
        how = (spec, plan.compute_dtype, seed, amax, plan.backend)
        again = quantize_operand(operand, *how) if experts is None else grouped.quantize_operand(operand, experts, *how)
        row, col = again.row if forms[0] else row, again.col if forms[1] else col
    if other is not None:  # one scale for each 16 values, as NVFP4 has them
        row = Face(row.data, other.of_rows(row, groups)) if row.data.numel() else row
        col = Face(col.data, other.of_columns(col)) if col.data.numel() else col
    sampled = functools.partial(_sampled, e4m3_max=s.e4m3_max, other=other)
    found = {}
    row_amax, col_amax, filled = made.row_amax, made.col_amax, None
    if experts is None:
        columns = fold_images(operand, fold)
    else:
        columns, filled = experts.laid_out(operand), experts.used_rows.unsqueeze(-1) >= 0
        operand, row = operand[: experts.end], Face(*(part[: experts.end] for part in row))
        col = Face(*(part[: len(columns) // BLOCK] for part in col))
        if row_amax.numel() > 1:  # one for each expert
            row_amax = experts.for_rows(row_amax)[: experts.end]
            of_blocks = [col_amax[rows.expert].expand(rows.last - rows.block) for rows in experts.rows]
            col_amax = torch.cat(of_blocks).repeat_interleave(operand.shape[-1])
    amax_whole, broken = whole(operand, _measured(made, s.pow2 or other is not None))
    if row.data.numel():
        raw = _padded(operand, groups)
        per_pixel = raw.shape[-1] // BLOCK
        index = _chosen(raw.numel() // BLOCK, most, raw.device)
        valid = None
        if raw.shape[-1] != operand.shape[-1]:
            ones = torch.ones(1, operand.shape[-1], dtype=torch.bool, device=raw.device)
            valid = _padded(ones, groups).view(per_pixel, BLOCK)[index % per_pixel]
        amax = row_amax.reshape(-1, 1).expand(-1, per_pixel).reshape(-1) if row_amax.numel() > 1 else row_amax
        some = raw.reshape(-1, BLOCK)[index]
        found["row"] = sampled(some, *_taken(row, amax, index), valid=valid, rht=False, extent=(amax_whole, broken))
    if col.data.numel():
        index = _chosen(col.scale.numel(), most, operand.device)
        some = _columns(columns, index)
        amax = col_amax.repeat(col.scale.numel() // col_amax.numel()) if row_scaled else col_amax
        # The rotation mixes the 16 images of a block, so zero images that fill it up cannot be left out afterwards.
        real = None
        if not s.rht:
            if filled is None:
                filled = fold_images(torch.ones_like(operand[..., :1]), fold)
            real = _columns(filled, index // operand.shape[-1]) != 0
        if s.rht:  # the largest of the rotated values, which were not stored: quantization has measured it
            amax_whole = made.observed[1] if made.observed.numel() else made.col_amax.amax()
            # But raised it to a power of two, or has no tensor scale.
            if (s.pow2 or other is not None) and not made.observed.numel():
                measured = (both_faces, plan.backend)
                amax_whole = (
                    measure_operand(operand, *measured)
                    if experts is None
                    else grouped.measure_operand(operand, experts, *measured)
                )[1]
        found["col"] = sampled(some, *_taken(col, amax, index), valid=real, rht=s.rht, extent=(amax_whole, broken))
    return found


def of_weight(w: Tensor, codes: WeightCodes, plan: Plan, most: int) -> dict[str, Blocks]:
    """Return the blocks of a weight as "fprop" and "dgrad", or as "fprop" alone if both multiply the same face.

    Args:
        w: [axis 0, axis 1, *kernel].
        codes: what quantize_weight returned for it.
        plan: the layer's plan.
        most: the number of elements of each face to look at.
    """
    s, other = plan.weight, format_of(plan.backend)
    taken = dict(zip(("fprop", "dgrad"), plan.weight_faces, strict=True))
    if taken["fprop"] == taken["dgrad"]:  # 16x16 blocks: one face serves both
        del taken["dgrad"]
    matrix = w.detach().flatten(0, 1) if plan.geometry.routed else w.detach()  # experts' weights as their codes lie
    kernel = matrix.flatten(2) if matrix.dim() > 2 else matrix.unsqueeze(-1)
    kernel = kernel.transpose(1, 2)  # [axis 0, taps, axis 1]
    found = {}
    extent = whole(w.detach())
    for gemm, face in taken.items():
        data, scale = codes.face(face)
        if not data.numel():
            continue
        raw = _row_kernel(kernel) if face == "row" else formats.kernel_columns(kernel, plan.geometry.groups)
        index = _chosen(raw.numel() // BLOCK, most, raw.device)
        valid = None
        if raw.numel() != kernel.numel():
            ones = torch.ones_like(kernel, dtype=torch.bool)
            valid = _row_kernel(ones) if face == "row" else formats.kernel_columns(ones, plan.geometry.groups)
            valid = valid.reshape(-1, BLOCK)[index]
        rows = kernel.shape[0] // plan.geometry.groups
        if other is not None:
            scale = other.of_kernel(Face(data, scale), rows)
        if face == "row" and scale.dim() == 4:  # 16x16 tiles: [groups, tiles of axis 0, taps, tiles of axis 1]
            # One scale serves 16 rows; after this each block of 16 has its own, as with 1x16.
            scale = scale.repeat_interleave(BLOCK, dim=1)[:, :rows].flatten(0, 1)
        amax = codes.amax
        if amax.numel() > 1:  # one for each expert
            amax = amax.repeat_interleave(data.numel() * 2 // BLOCK // amax.numel())
        some, made = raw.reshape(-1, BLOCK)[index], _taken(Face(data, scale), amax, index)
        found[gemm] = _sampled(some, *made, s.e4m3_max, other, valid=valid, rht=False, extent=extent)
    return found


@functools.cache
def code_values(device: torch.device) -> Tensor:
    """Return the values of the 16 codes, fp32; kept, because a sampled step asks for them at each operand."""
    return formats.decode_e2m1(torch.arange(16, device=device))


def step_of(blocks: int, most: int) -> int:
    """Return the distance of the blocks to look at: coprime to their number, so that every channel and tap has a turn.

    A step that shares a factor with the number of channels would meet the same few channels at every pixel.
    """
    step = max(1, -(-blocks * BLOCK // most))
    while math.gcd(step, blocks) != 1:
        step += 1
    return step


def _chosen(blocks: int, most: int, device: torch.device) -> Tensor:
    """Return the numbers of the blocks to look at: every step_of-th."""
    return torch.arange(0, blocks, step_of(blocks, most), device=device)


def _columns(folded: Tensor, index: Tensor) -> Tensor:
    """Return blocks [n, 16] of [N16 * 16, *image, C], each of 16 images at one place; the places come first.

    Only the chosen ones are copied: a whole operand in this order would cost more than all that is computed of it.
    """
    images = folded.unflatten(0, (-1, BLOCK)).flatten(2)
    return images[index // images.shape[-1], :, index % images.shape[-1]]


def _taken(face: Face, amax: Tensor, index: Tensor) -> tuple[Face, Tensor]:
    """Return codes, scales and the amax, [1] or one for each block, of the chosen blocks."""
    chosen = Face(face.data.reshape(-1, BLOCK // 2)[index], face.scale.reshape(-1)[index])
    return chosen, amax.flatten() if amax.numel() == 1 else amax.flatten()[index]


def _sampled(
    raw: Tensor, face: Face, amax: Tensor, e4m3_max: int, other: BlockFormat | None, *,
    valid: Tensor | None, rht: bool, extent: tuple[Tensor, Tensor],
) -> Blocks:
    """Put the chosen blocks [n, 16] of an operand, as they were before the transform, beside their codes and scales.

    Args:
        amax: [1], or one for each block.
        other: the block format, if it is not NVFP4.
        valid: as in Blocks.
        rht: the transform is applied to `raw`.
        extent: Blocks.whole.
    """
    data, scale = face
    if rht:  # of the sample only: the transform acts within a block
        raw = formats.rht16(raw)
    if other is None:
        scale_values = scale.view(torch.float8_e4m3fn).float()
        factor = formats.block_units(scale.view(torch.float8_e4m3fn), amax, e4m3_max)
    else:
        scale_values = other.decode(scale)
        factor = scale_values * (amax * (1.0 / TENSOR_AMAX))
    codes = formats.unpack_nibbles(data)
    values = code_values(codes.device).index_select(0, codes.flatten().int()).view(codes.shape) * factor.unsqueeze(-1)
    return Blocks(raw.float(), codes, scale, scale_values, values, 6 * factor, valid, extent)


def _measured(made: Operand, raised: bool) -> Tensor | None:
    """Return the amax of the whole operand, if its quantization has measured it and not `raised` it, nor had none."""
    if made.observed.numel():  # another amax was given, and this one was observed
        return made.observed[0]
    return made.row_amax.amax() if made.row_amax.numel() and not raised else None


def _padded(x: Tensor, groups: int) -> Tensor:
    return x if x.shape[-1] // groups % BLOCK == 0 else pad_groups(x, groups)


def _row_kernel(kernel: Tensor) -> Tensor:
    """Pad the weight as its rowwise face is padded: [axis 0, taps, axis 1 padded]."""
    return F.pad(kernel, (0, -kernel.shape[-1] % BLOCK))
