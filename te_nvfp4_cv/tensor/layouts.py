"""The layouts of TransformerEngine's tensors and of the FP4 tensor cores, beside those of the operators.

    te_to_ntile, ntile_to_te    columnwise codes of an image tensor: TransformerEngine's rows against tiles of 16 images
    pad_scales, swizzle_scales  block scales in the order in which cuBLAS reads them; swizzle_row_groups and others: the
                                scales of experts, for grouped products
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv.formats import BLOCK, round_up
from te_nvfp4_cv.ops.gemm.cublas import pad_scales as pad_scales
from te_nvfp4_cv.ops.gemm.cublas import swizzle_scales as swizzle_scales


def te_to_ntile(data: Tensor, scale: Tensor, spatial: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    """Return columnwise data [C, (h, w, n)/2] and scales [C, (h, w, n)/16] as tiles of 16 images at one pixel.

    Args:
        spatial: (H, W), of any rank.
        batch: images, a multiple of 16.
    Returns:
        data [N/16, H, W, C, 8] and scales [N/16, H, W, C].
    """
    rank, channels = len(spatial), data.shape[0]
    order = (rank + 1, *range(1, rank + 1), 0)  # the batch's tile first, channels last
    tiles = data.reshape(channels, *spatial, batch // BLOCK, BLOCK // 2).permute(*order, rank + 2)
    scales = scale.view(torch.uint8).reshape(channels, *spatial, batch // BLOCK).permute(*order)
    return tiles.contiguous(), scales.contiguous().view(scale.dtype)


def ntile_to_te(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Undo te_to_ntile; the shapes of the tiles say all it needs."""
    rank = data.dim() - 3
    order = (rank + 1, *range(1, rank + 1), 0)
    channels = data.shape[-2]
    rows = scale.numel() // max(channels, 1)
    te_data = data.permute(*order, rank + 2).reshape(channels, rows * (BLOCK // 2))
    te_scale = scale.view(torch.uint8).permute(*order).reshape(channels, rows)
    return te_data, te_scale.view(scale.dtype)


def unswizzle_scales(swizzled: Tensor) -> Tensor:
    """Undo swizzle_scales."""
    rows, cols = swizzled.shape
    tiles = swizzled.view(torch.uint8).reshape(rows // 128, cols // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, cols).view(swizzled.dtype)


# ---- scales of grouped products (experts) ----------------------------------------------------------------------------


def swizzle_row_groups(scale: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Pad and swizzle the scales of each group of rows by themselves: x and dy in fprop and dgrad of experts.

    Args:
        scale: [R, C], uint8 or float8_e4m3fn.
        ends: [E], where each group's rows end.
    Returns:
        The groups below each other [sum of rows padded to 128, C padded to 4], and where each begins, int64 [E].
    Source: the layout of torchao's torch_to_blocked_2d_M_groups.
    """
    groups = [swizzle_scales(pad_scales(part)) for part in _groups(scale, ends, 0)]
    return torch.cat(groups), _starts([part.shape[0] for part in groups], scale)


def swizzle_column_groups(scale: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Pad and swizzle the scales of each group of columns by themselves: dy and x in wgrad of experts.

    Args:
        scale: [R, C].
        ends: [E], where each group's columns of scales end.
    Returns:
        The groups [R padded to 128, sum of columns padded to 4], and the first column of each, int64 [E]. Each is one
        piece of memory, behind those before it: from byte (padded rows) * (its first column) on.
    Source: the layout of torchao's torch_to_blocked_2d_K_groups.
    """
    groups = [swizzle_scales(pad_scales(part)) for part in _groups(scale, ends, 1)]
    memory = torch.cat([part.flatten() for part in groups])
    return memory.view(round_up(scale.shape[0], 128), -1), _starts([part.shape[1] for part in groups], scale)


def swizzle_stack(scale: Tensor) -> Tensor:
    """Pad and swizzle each expert's scales of a weight, [E, R, C] -> [E, R padded to 128, C padded to 4]."""
    return torch.stack([swizzle_scales(pad_scales(part)) for part in scale])


def _groups(scale: Tensor, ends: Tensor, axis: int) -> list[Tensor]:
    places = [0, *ends.tolist()]
    return [scale.narrow(axis, begin, end - begin) for begin, end in zip(places, places[1:], strict=False)]


def _starts(sizes: list[int], like: Tensor) -> Tensor:
    return torch.tensor([0, *sizes[:-1]], dtype=torch.int64, device=like.device).cumsum(0)
