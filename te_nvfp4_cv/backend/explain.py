"""Explain in words which backend serves a device, and why: for `te-nvfp4-cv doctor`.

The choice itself is made in dispatch.py. Every call imports that file, so the words stand here.
"""

from __future__ import annotations

import torch

from te_nvfp4_cv.backend import cache, dispatch, native


def explain(device: torch.device) -> dict[str, str]:
    """Return the chosen backend, the reason, and what the triton backend would need, each as a text."""
    try:
        chosen = dispatch.resolve("auto", device)
    # No backend serves the device: the error's text is the explanation.
    except RuntimeError as error:
        return {"backend": "none", "why": str(error), "triton": _about_triton(device)}
    if device.type == "cpu":
        quantizer = "compiled kernels" if native.load() is not None else "plain torch (no C++ compiler)"
        dtype = (
            "bf16 where autocast is on"
            if dispatch.bf16_is_native(device)
            else "fp32, no AVX-512 bf16 or AMX here (bf16 where autocast is on)"
        )
        why = f"CPU: quantization by {quantizer}, convolutions by oneDNN in {dtype}"
    elif chosen == "vendor":
        why = "CUDA: quantization by Triton kernels, convolutions by cuDNN on exact dequantized operands"
    else:
        why = "CUDA: FP4 tensor cores by Triton kernels; the self-test has passed on this GPU"
    return {"backend": chosen, "why": why, "triton": _about_triton(device)}


def _about_triton(device: torch.device) -> str:
    if device.type != "cuda":
        return "needs a CUDA GPU of compute capability 8.0 or newer"
    if not dispatch.has_triton():
        return "needs the package triton, which is not installed"
    if torch.cuda.get_device_capability(device) < dispatch.MINIMUM_CAPABILITY:
        return "needs compute capability 8.0 or newer"
    if not dispatch.native_fp4(device):
        return "can run: operands are unpacked in registers; vendor is faster except for memory-bound 1x1 convolutions"
    if cache.selftest_passed(device):
        return "the default here"
    return "can run on the FP4 tensor cores; becomes the default when `te-nvfp4-cv selftest` has passed"
