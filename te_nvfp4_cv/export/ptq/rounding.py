"""Round a trained weight, as a matrix [N, K], to NVFP4 codes. There are four methods:

    nearest   TransformerEngine's: each block's amax becomes 6
    4over6    each block's amax becomes 6 or 4, whichever has the smaller error (recipe field nvfp4_4over6)
    search    the block scale, of 14 neighbours, with the smallest sum of h_k (w_k - q_k)^2;  h: mean square of input k
    gptq      search, then columns are rounded one after the other, and what one loses goes to those that come after it,
              by the inverse of the Gram matrix of the layer's im2col input (arXiv 2210.17323)

The first two are done by the quantizer that training uses (quantize_layer in modules.py). The last two take the matrix
in matrix.py's order. A value is code * scale * amax / (6 E), with the amax of the whole weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK, E2M1_MAX, E4M3_MAX

METHODS = ("nearest", "4over6", "search", "gptq")
OFFSETS = range(-6, 8)  # E4M3 bytes around the scale of "nearest": factors 0.6 to 1.8
DAMPING = 0.01  # this part of the mean diagonal is added to the Gram matrix, so that it can be inverted
STRIDE = 128  # columns between two updates of all later columns: one matrix product in place of 128


def value_of(scale: Tensor, amax: Tensor, e4m3_max: int) -> Tensor:
    """Return the real value of a code 1.0 in each block, fp32, from the blocks' E4M3 bytes."""
    return scale.view(torch.float8_e4m3fn).float() * (amax * (1.0 / (E2M1_MAX * e4m3_max)))


def round_codes(w: Tensor, unit: Tensor) -> Tensor:
    """Return the E2M1 codes nearest to w / unit, and the code 0 where the unit is 0."""
    safe = torch.where(unit > 0, unit, torch.ones_like(unit))
    return torch.where(unit > 0, formats.encode_e2m1(w / safe), torch.zeros((), dtype=torch.uint8, device=w.device))


def nearest_scales(w: Tensor, amax: Tensor, e4m3_max: int) -> Tensor:
    """Return the E4M3 bytes [N, K / 16] that map the amax of each block to 6, the largest E2M1 value."""
    s_enc = formats.encode_scale(amax, e4m3_max)
    return formats.block_scale(formats.blocks(w).abs().amax(-1), s_enc).view(torch.uint8)


def search_scales(w: Tensor, amax: Tensor, e4m3_max: int, importance: Tensor | None = None) -> Tensor:
    """Return the E4M3 bytes [N, K / 16] with the smallest squared error.

    Args:
        importance: fp32 [K] >= 0, the weight of each column's error. If None, all columns count alike.
    """
    own = nearest_scales(w, amax, e4m3_max).to(torch.int16)
    h = torch.ones(w.shape[1], device=w.device) if importance is None else importance
    w_blocks, h_blocks = formats.blocks(w), formats.blocks(h)
    best, least = own.clone(), torch.full(own.shape, float("inf"), device=w.device)
    for offset in sorted(OFFSETS, key=abs):  # 0 comes first, so the scale of "nearest" stays unless another is better
        scale = (own + offset).clamp(0, 0x7E)  # 0x7E is the largest finite byte, 448
        unit = value_of(scale.to(torch.uint8), amax, e4m3_max).unsqueeze(-1)
        q = formats.decode_e2m1(round_codes(w_blocks, unit)) * unit
        error = ((w_blocks - q).square() * h_blocks).sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.to(torch.uint8)


def gptq_codes(w: Tensor, gram: Tensor, unit: Tensor) -> Tensor:
    """Round w [N, K] to codes [N, K] by GPTQ, for the Gram matrix [K, K] of the layer's input.

    Args:
        unit: fp32 [N, K], the real value of a code 1.0 at each place.
    """
    w = w.clone().float()
    diagonal = gram.diagonal()
    dead = diagonal <= 0  # inputs that were always 0, or padding: they get a diagonal of 1, and do not affect others
    damped = gram + torch.diag(DAMPING * diagonal.mean() + dead.to(gram.dtype))
    # Row k of the Cholesky factor of the inverse says how the loss of column k is spread over the columns after it.
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, w.shape[1], STRIDE):
        stop = min(start + STRIDE, w.shape[1])
        errors = torch.zeros(w.shape[0], stop - start, device=w.device)
        for k in range(start, stop):
            codes[:, k] = round_codes(w[:, k], unit[:, k])
            error = (w[:, k] - formats.decode_e2m1(codes[:, k]) * unit[:, k]) / upper[k, k]
            w[:, k + 1 : stop] -= error.unsqueeze(1) * upper[k, k + 1 : stop]
            errors[:, k - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def quantize_matrix(
    w: Tensor, amax: Tensor, gram: Tensor | None, importance: Tensor | None, e4m3_max: int = E4M3_MAX
) -> tuple[Tensor, Tensor]:
    """Quantize one group of a weight by "search", or by "gptq" if the Gram matrix is given.

    Args:
        w: fp32 [N, K].
        amax: fp32 [1], of the whole weight.
        gram: fp32 [K, K] of the group's input, or None.
        importance: as search_scales takes it.
        e4m3_max: the largest block scale, 448 or 256.
    Returns:
        Packed data [N, K / 2] and scale bytes [N, K / 16].
    """
    scale = search_scales(w, amax, e4m3_max, importance)
    unit = value_of(scale, amax, e4m3_max).repeat_interleave(BLOCK, dim=1)
    codes = round_codes(w, unit) if gram is None else gptq_codes(w, gram, unit)
    return formats.pack_nibbles(codes), scale
