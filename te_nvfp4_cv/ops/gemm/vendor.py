"""The quantized GEMM by the platform's matrix library, on exact dequantized operands.

code * scale has at most 6 significant bits: exact in bf16, tf32 and fp32, so only the order of accumulation differs
from reference.py. Accumulation is in fp32 everywhere: a CPU multiplies in fp32 (oneDNN would round a bf16 result),
CUDA multiplies bf16 operands into an fp32 result. It checks nothing and applies no tensor scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv import formats


def multiply(a_data: Tensor, a_scale: Tensor, b_data: Tensor, b_scale: Tensor) -> Tensor:
    """Sum of products of code * scale, fp32 [I, J]; arguments as in reference.multiply."""
    a, b = formats.decode_blocks(a_data, a_scale), formats.decode_blocks(b_data, b_scale)
    if a.device.type == "cuda" and a.numel() and b.numel():
        return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16).t(), out_dtype=torch.float32)
    return torch.mm(a, b.t())
