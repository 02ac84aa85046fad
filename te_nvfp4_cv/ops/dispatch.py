"""Which backend runs a call, and why. One function decides; an explicit choice that cannot run raises; nothing falls
back silently.

    reference   anywhere: plain torch, the specification
    vendor      CPU: compiled kernels + oneDNN. CUDA from sm_80: plain torch + cuDNN / cuBLAS (not executed yet)
    triton      CUDA only; its kernels are not part of this version, so choosing it raises
    auto        vendor

Refuses unknown names and backends that cannot run on the device.
"""

from __future__ import annotations

import torch

from te_nvfp4_cv.checks import runtime_error, value_error
from te_nvfp4_cv.ops import native

BACKENDS = ("auto", "reference", "vendor", "triton")


def check_backend(backend: str) -> str:
    """`backend` itself.

    Raises:
        ValueError: an unknown name.
    """
    if backend not in BACKENDS:
        raise value_error(
            "nvfp4: unknown backend.",
            got=repr(backend),
            needs=f"one of {', '.join(BACKENDS)}",
            fix='leave it out: "auto" chooses',
        )
    return backend


def resolve(backend: str, device: torch.device) -> str:
    """The backend that serves tensors of `device`: "reference" or "vendor".

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that cannot run there.
    """
    check_backend(backend)
    if backend == "reference":
        return backend
    if backend == "triton":
        raise runtime_error(
            "nvfp4: backend 'triton' cannot run here.",
            got=f"tensors on {device}",
            needs="a CUDA GPU from compute capability 8.0, and Triton kernels, which this version does not hold yet",
            fix="backend='vendor' (or 'auto')",
        )
    if device.type not in ("cpu", "cuda"):
        raise runtime_error(
            "nvfp4: no fast backend for this device.",
            got=f"tensors on {device}",
            needs="cpu or cuda",
            fix="backend='reference'",
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise runtime_error(
            "nvfp4: backend 'vendor' cannot run on this GPU.",
            got=f"compute capability {major}.{minor}",
            needs="8.0 or newer (bf16 tensor cores)",
            fix="backend='reference'",
        )
    return "vendor"


def bf16_is_native(device: torch.device) -> bool:
    """Whether bf16 convolutions run on bf16 arithmetic there (on a CPU: AVX-512 bf16 or AMX)."""
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compute_dtype(dtype: torch.dtype, device: torch.device, autocast: bool) -> torch.dtype:
    """dtype of the dequantized operands of a vendor convolution; always exact, so only speed depends on it.

    fp16 goes through fp32 (products of codes and scales overflow fp16, and oneDNN is slow there); so does bf16 on a
    CPU without
    bf16 arithmetic, unless the user asked for bf16 by torch.autocast.
    """
    if dtype == torch.bfloat16 and (autocast or bf16_is_native(device)):
        return torch.bfloat16
    return torch.float32


def explain(device: torch.device) -> dict[str, str]:
    """For `te-nvfp4-cv doctor`: backend, why, and what each other one would need."""
    try:
        chosen = resolve("auto", device)
    except RuntimeError as error:
        return {
            "backend": "none",
            "why": str(error),
            "triton": "needs a CUDA GPU from compute capability 8.0; not part of this version",
        }
    if device.type == "cpu":
        quantizer = "compiled kernels" if native.load() is not None else "plain torch (no C++ compiler)"
        dtype = (
            "bf16 where autocast is on"
            if bf16_is_native(device)
            else "fp32, no AVX-512 bf16 or AMX here (bf16 where autocast is on)"
        )
        why = f"CPU: quantization by {quantizer}, convolutions by oneDNN in {dtype}"
    else:
        why = "CUDA: plain torch quantization, cuDNN on exact dequantized operands (not executed on a GPU yet)"
    return {
        "backend": chosen,
        "why": why,
        "triton": "needs a CUDA GPU from compute capability 8.0; not part of this version",
    }
