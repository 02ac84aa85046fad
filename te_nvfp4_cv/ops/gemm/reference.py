"""The specification of the quantized GEMM: blocks of 16 in sequence, fp32, the tensor scales at the end.

    out[i, j] = alpha * sum_b s_a[i, b] s_b[j, b] (codes of a . codes of b over the 16 elements of block b)

Every block's product is exact in fp32, so that only the accumulation over blocks rounds, in the order of the blocks.
Both operands come with their blocks along the contracted dimension: A [I, L], B [J, L] gives [I, J]. Nothing is checked
here, and operator.py applies the tensor scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv import formats


def multiply(a_data: Tensor, a_scale: Tensor, b_data: Tensor, b_scale: Tensor) -> Tensor:
    """Return the sums of products of code * scale, fp32 [I, J], without the tensor scales.

    Args:
        a_data: packed uint8 [I, L/2].
        a_scale: float8_e4m3fn [I, L/16], or fp32, as b_scale.
        b_data: packed uint8 [J, L/2].
        b_scale: float8_e4m3fn [J, L/16].
    """
    a = formats.blocks(formats.decode_e2m1(formats.unpack_nibbles(a_data)))
    b = formats.blocks(formats.decode_e2m1(formats.unpack_nibbles(b_data)))
    s_a, s_b = a_scale.to(torch.float32), b_scale.to(torch.float32)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for block in range(a.shape[1]):
        products = a[:, block] @ b[:, block].t()
        # The scales' product is exact too: two E4M3 mantissas of 4 bits.
        total = total + products * (s_a[:, block, None] * s_b[None, :, block])
    return total
