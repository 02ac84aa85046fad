"""How a trained weight becomes codes without training: the ways that a matrix [N, K] is rounded to NVFP4.

    nearest   TransformerEngine's: each block's amax becomes 6
    4over6    each block's amax becomes 6 or 4, whichever has the smaller error (recipe field nvfp4_4over6)
    search    the block scale, of 14 neighbours, with the smallest sum of h_k (w_k - q_k)^2;  h: mean square of input k
    gptq      search, then columns are rounded one after the other, and what one loses goes to those that come after it,
              by the inverse of the Gram matrix of the layer's im2col input (arXiv 2210.17323)

The last two take the matrix in matrix.py's order; a value is code * scale * amax / (6 E), with the weight's own amax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.formats import BLOCK, E2M1_MAX, E4M3_MAX

METHODS = ("nearest", "4over6", "search", "gptq")
OFFSETS = range(-6, 8)  # bytes around a block's own scale: factors 0.6 to 1.8
DAMPING = 0.01  # of the Gram matrix's mean diagonal, added to it
STRIDE = 128  # columns of GPTQ between two updates of all that follow


def value_of(scale: Tensor, amax: Tensor, e4m3_max: int) -> Tensor:
    """fp32: what a code 1.0 stands for in a block. scale: E4M3 bytes."""
    return scale.view(torch.float8_e4m3fn).float() * (amax * (1.0 / (E2M1_MAX * e4m3_max)))


def round_codes(w: Tensor, unit: Tensor) -> Tensor:
    """E2M1 codes of w / unit, 0 where the unit is 0."""
    safe = torch.where(unit > 0, unit, torch.ones_like(unit))
    return torch.where(unit > 0, formats.encode_e2m1(w / safe), torch.zeros((), dtype=torch.uint8, device=w.device))


def dequantize(codes: Tensor, scale: Tensor, amax: Tensor, e4m3_max: int) -> Tensor:
    """fp32 [N, K] of codes [N, K] and scale bytes [N, K / 16]."""
    unit = value_of(scale, amax, e4m3_max).repeat_interleave(BLOCK, dim=1)
    return formats.decode_e2m1(codes) * unit


def nearest_scales(w: Tensor, amax: Tensor, e4m3_max: int) -> Tensor:
    """E4M3 bytes [N, K / 16] that map each block's amax to 6."""
    s_enc = formats.encode_scale(amax, e4m3_max)
    return formats.block_scale(formats.blocks(w).abs().amax(-1), s_enc).view(torch.uint8)


def search_scales(w: Tensor, amax: Tensor, e4m3_max: int, importance: Tensor | None = None) -> Tensor:
    """E4M3 bytes [N, K / 16] of the smallest error.

    Args:
        importance: fp32 [K] >= 0, of each column; None: all alike.
    """
    own = nearest_scales(w, amax, e4m3_max).to(torch.int16)
    h = torch.ones(w.shape[1], device=w.device) if importance is None else importance
    w_blocks, h_blocks = formats.blocks(w), formats.blocks(h)
    best, least = own.clone(), torch.full(own.shape, float("inf"), device=w.device)
    for offset in sorted(OFFSETS, key=abs):  # its own first: it stays where no other is better
        scale = (own + offset).clamp(0, 0x7E)
        unit = value_of(scale.to(torch.uint8), amax, e4m3_max).unsqueeze(-1)
        q = formats.decode_e2m1(round_codes(w_blocks, unit)) * unit
        error = ((w_blocks - q).square() * h_blocks).sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.to(torch.uint8)


def gptq_codes(w: Tensor, gram: Tensor, scale: Tensor, amax: Tensor, e4m3_max: int) -> Tensor:
    """Codes [N, K] of w [N, K] with given scales, for the Gram matrix [K, K] of its input."""
    unit = value_of(scale, amax, e4m3_max).repeat_interleave(BLOCK, dim=1)
    w = w.clone().float()
    diagonal = gram.diagonal()
    dead = diagonal <= 0  # never met, or padding: rounded as they are
    damped = gram + torch.diag(DAMPING * diagonal.mean() + dead.to(gram.dtype))
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
    """(packed data [N, K / 2], scale bytes [N, K / 16]) by search, and by GPTQ where the Gram matrix is given.

    Args:
        w: fp32 [N, K] of one group; amax: fp32 [1] of the whole weight.
    """
    scale = search_scales(w, amax, e4m3_max, importance)
    if gram is not None:
        return formats.pack_nibbles(gptq_codes(w, gram, scale, amax, e4m3_max)), scale
    unit = value_of(scale, amax, e4m3_max).repeat_interleave(BLOCK, dim=1)
    return formats.pack_nibbles(round_codes(w, unit)), scale
