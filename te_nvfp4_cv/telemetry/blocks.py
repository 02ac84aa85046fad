"""Blocks of 16 of one operand as it was quantized: raw values, codes, scales and dequantized values side by side.

The layer has quantized the operand already; backends that multiply dequantized operands hold no codes, so the operand
is packed once more with the same amax and, where it was rounded stochastically, the same seed: the same codes. Columns
are compared after the Hadamard transform, which is what was quantized. The blocks are a sample; the amax and the number
of values that are not finite are those of the whole operand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.quantize.operand import quantize_operand
from te_nvfp4_cv.ops.quantize.reference import fold_images, pad_groups
from te_nvfp4_cv.ops.records import NONE, PACKED, Face, Operand, WeightCodes
from te_nvfp4_cv.recipe.fields import Role


@dataclass(frozen=True)
class Blocks:
    """N blocks: raw [N, 16] as given to the rounding, codes [N, 16] uint8, scale [N] E4M3 bytes, values [N, 16] fp32
    dequantized, limit [N]: 6 scales in real units; valid [N, 16]: False where channels were padded, None: all real;
    whole: (amax, values that are not finite) of the operand that these are a sample of.
    """

    raw: Tensor
    codes: Tensor
    scale: Tensor
    values: Tensor
    limit: Tensor
    valid: Tensor | None
    whole: tuple[Tensor, Tensor]


def whole(v: Tensor) -> tuple[Tensor, Tensor]:
    """(amax of the finite values, number of the others) of all of v: an outlier hides from a sample."""
    if not v.numel():
        return v.new_zeros(()), v.new_zeros((), dtype=torch.long)
    v = v if v.dtype in (torch.bfloat16, torch.float16, torch.float32) else v.double()
    held = torch.nan_to_num(v, 0.0, 0.0, 0.0)
    low, high = held.aminmax()
    return torch.maximum(-low, high), (held != v).count_nonzero()


def of_operand(
    role: Role, operand: Tensor, made: Operand, seed: Tensor | None, plan: Plan, most: int
) -> dict[str, Blocks]:
    """Return {"row": ..., "col": ...} of x or dy, for the faces that were made.

    Args:
        operand: [B, *image, C].
        made: what quantize_operand returned for it.
        most: elements per face that are looked at.
    """
    s = plan.recipe.settings(role)
    is_x = role == Role.INPUT
    fold, row_scaled = plan.folds[0 if is_x else 1], is_x and plan.row_scaled
    faces = (made.row, made.col)
    wants = [face.data.numel() > 0 for face in faces]
    packed = [face.scale.numel() > 0 for face in faces]
    forms = [PACKED if want and not there else NONE for want, there in zip(wants, packed, strict=True)]
    row, col = faces
    if any(forms):  # the layer made values only: quantize once more, to the same codes
        amax = None
        if made.observed.numel():
            amax = torch.cat((made.row_amax.flatten()[:1], made.col_amax.flatten()[:1]))
        spec = plan.input_specs[True] if is_x else plan.gradient_specs[True, True]
        spec = spec._replace(row=forms[0], col=forms[1])
        again = quantize_operand(operand, spec, plan.compute_dtype, seed, amax, plan.backend)
        row, col = (new if form else old for new, old, form in zip((again.row, again.col), faces, forms, strict=True))
    found = {}
    amax_whole, broken = whole(operand)
    if wants[0]:
        raw = _padded(operand, plan.geometry.groups)
        per_pixel = raw.shape[-1] // BLOCK
        valid = None
        if raw.shape[-1] != operand.shape[-1]:
            ones = torch.ones(1, operand.shape[-1], dtype=torch.bool, device=raw.device)
            valid = _padded(ones, plan.geometry.groups).view(per_pixel, BLOCK)
        amax = made.row_amax.reshape(-1, 1).expand(-1, per_pixel).reshape(-1) if row_scaled else made.row_amax
        found["row"] = _sampled(raw, row, amax, s.e4m3_max, most, valid, False, (amax_whole, broken))
    if wants[1]:
        raw = fold_images(operand, fold).unflatten(0, (-1, BLOCK)).movedim(1, -1)  # [N16, *folded, C, 16]
        amax = made.col_amax
        amax = amax.repeat(col.scale.numel() // amax.numel()) if row_scaled else amax
        real = None  # rotated, images that only fill a block cannot be told from the others
        if not s.rht:
            real = fold_images(torch.ones_like(operand[..., :1]), fold).unflatten(0, (-1, BLOCK)).movedim(1, -1)
            real = real.expand(raw.shape).reshape(-1, BLOCK) != 0
        if s.rht:
            amax_whole = made.observed[1] if made.observed.numel() else made.col_amax.amax()
        found["col"] = _sampled(raw, col, amax, s.e4m3_max, most, real, s.rht, (amax_whole, broken))
    return found


def of_weight(w: Tensor, codes: WeightCodes, plan: Plan, most: int) -> dict[str, Blocks]:
    """{"fprop": ..., "dgrad": ...} of a weight; one entry where both multiply the same face.

    Args:
        w: [axis 0, axis 1, *kernel].
        codes: what quantize_weight returned for it.
    """
    s = plan.weight
    taken = dict(zip(("fprop", "dgrad"), plan.weight_faces, strict=True))
    if taken["fprop"] == taken["dgrad"]:
        del taken["dgrad"]
    kernel = w.detach().flatten(2) if w.dim() > 2 else w.detach().unsqueeze(-1)  # [axis 0, axis 1, taps]
    found = {}
    extent = whole(w.detach())
    for gemm, face in taken.items():
        data, scale = codes.face(face)
        if not data.numel():
            continue
        raw = _row_kernel(kernel) if face == "row" else _col_kernel(kernel, plan.geometry.groups)
        valid = None
        if raw.numel() != kernel.numel():
            ones = torch.ones_like(kernel, dtype=torch.bool)
            valid = _row_kernel(ones) if face == "row" else _col_kernel(ones, plan.geometry.groups)
            valid = valid.reshape(-1, BLOCK)
        if face == "row" and scale.dim() == 4:  # 16x16 tiles: [groups, tiles of axis 0, taps, tiles of axis 1]
            rows = kernel.shape[0] // plan.geometry.groups
            scale = scale.repeat_interleave(BLOCK, dim=1)[:, :rows].flatten(0, 1)
        found[gemm] = _sampled(raw, Face(data, scale), codes.amax, s.e4m3_max, most, valid, False, extent)
    return found


def step_of(blocks: int, most: int) -> int:
    """Every how many blocks one is looked at: coprime to their number, so that all channels and taps have a turn."""
    step = max(1, -(-blocks * BLOCK // most))
    while math.gcd(step, blocks) != 1:
        step += 1
    return step


def _sampled(
    raw: Tensor,
    face: Face,
    amax: Tensor,
    e4m3_max: int,
    most: int,
    valid: Tensor | None,
    rht: bool,
    extent: tuple[Tensor, Tensor],
) -> Blocks:
    """`amax`: [1] or one per block; `valid`: for every block, or for the blocks of one pixel."""
    raw, data, scale = raw.reshape(-1, BLOCK), face.data.reshape(-1, BLOCK // 2), face.scale.reshape(-1)
    step = step_of(len(raw), most)
    raw, data, scale = raw[::step], data[::step], scale[::step]
    if rht:
        raw = formats.rht16(raw)
    if valid is not None:
        index = torch.arange(len(raw), device=raw.device) * step
        valid = valid[index % len(valid)]
    amax = amax.flatten()
    amax = amax if amax.numel() == 1 else amax[::step]
    factor = scale.contiguous().view(torch.float8_e4m3fn).float() * amax * (1.0 / (6 * e4m3_max))
    codes = formats.unpack_nibbles(data)
    values = formats.decode_e2m1(codes) * factor.unsqueeze(-1)
    return Blocks(raw.float(), codes, scale, values, 6 * factor, valid, extent)


def _padded(x: Tensor, groups: int) -> Tensor:
    return x if x.shape[-1] // groups % BLOCK == 0 else pad_groups(x, groups)


def _row_kernel(kernel: Tensor) -> Tensor:
    """[axis 0, taps, axis 1 padded]."""
    return F.pad(kernel.movedim(1, -1), (0, -kernel.shape[1] % BLOCK))


def _col_kernel(kernel: Tensor, groups: int) -> Tensor:
    """[groups, tiles of axis 0, taps, axis 1, 16]."""
    grouped = kernel.unflatten(0, (groups, -1))
    padded = F.pad(grouped, (0, 0, 0, 0, 0, -grouped.shape[1] % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).movedim(2, -1).transpose(2, 3)
