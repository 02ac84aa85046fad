"""The quantized GEMM by the platform's matrix library, on exact dequantized operands.

code * scale has at most 6 significant bits. It is exact in bf16, tf32 and fp32, so that only the order of accumulation
differs from reference.py. Accumulation is in fp32 everywhere: a CPU multiplies in fp32 (oneDNN would round a bf16
result), CUDA multiplies bf16 operands into an fp32 result. Nothing is checked here, and operator.py applies the tensor
scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv import formats


def multiply(a_data: Tensor, a_scale: Tensor, b_data: Tensor, b_scale: Tensor) -> Tensor:
    """Return the sums of products of code * scale, fp32 [I, J]; the arguments are those of reference.multiply."""
    if a_data.device.type == "cuda" and a_data.numel() and b_data.numel():  # a kernel's grid cannot be empty
        return torch.mm(_decoded(a_data, a_scale), _decoded(b_data, b_scale).t(), out_dtype=torch.float32)
    return torch.mm(formats.decode_blocks(a_data, a_scale), formats.decode_blocks(b_data, b_scale).t())


def _decoded(data: Tensor, scale: Tensor) -> Tensor:
    """Return code * scale in bf16, by the Triton kernel."""
    from te_nvfp4_cv.ops.quantize.triton import launch

    return launch.unpack_rows(data, scale.view(torch.uint8), data.shape[-1] * 2, 1, torch.bfloat16)
