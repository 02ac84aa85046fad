"""Read the names under which torchao stores a quantized weight in safetensors, as those that the checks know.

    NAME._weight_qdata               codes, two to a byte
    NAME._weight_scale               E4M3 block scales, as a matrix or in the order of tensor cores (tiles of 128 x 4)
    NAME._weight_per_tensor_scale    fp32, absent if it is 1
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from te_nvfp4_cv.export.manifest import join
from te_nvfp4_cv.formats import BLOCK, round_up

QDATA, SCALE, TENSOR_SCALE = "_weight_qdata", "_weight_scale", "_weight_per_tensor_scale"
ROWS, COLUMNS = 128, 4  # of a tile of scales


def parts_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return a layer's codes and scales as weight, weight_scale and weight_scale_2, or nothing for other layers."""
    codes, scale = tensors.get(join(name, QDATA)), tensors.get(join(name, SCALE))
    if codes is None:
        return {}
    found = {"weight": codes}
    if scale is not None:
        found["weight_scale"] = _as_matrix(scale, codes)
    if codes.dtype == torch.uint8:  # NVFP4; torchao's int8 and fp8 weights have the same names
        found["weight_scale_2"] = tensors.get(join(name, TENSOR_SCALE), torch.ones(()))
    return found


def _as_matrix(scale: Tensor, codes: Tensor) -> Tensor:
    """Return block scales as a matrix [N, K / 16]; scales of another kind as they are."""
    if scale.dtype != torch.float8_e4m3fn or codes.dim() != 2:
        return scale
    rows, columns = codes.shape[0], 2 * codes.shape[1] // BLOCK
    high, wide = round_up(rows, ROWS), round_up(columns, COLUMNS)
    if tuple(scale.shape) == (rows, columns) or scale.numel() != high * wide:
        return scale
    # A tile holds its 128 rows as 32 x 4: rows that lie 32 apart are neighbours.
    tiles = scale.contiguous().view(torch.uint8).reshape(high // ROWS, wide // COLUMNS, 32, 4, COLUMNS)
    matrix = tiles.transpose(2, 3).reshape(high // ROWS, wide // COLUMNS, ROWS, COLUMNS).transpose(1, 2)
    return matrix.reshape(high, wide)[:rows, :columns].contiguous().view(torch.float8_e4m3fn)
