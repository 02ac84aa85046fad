"""Explain in words which backend serves a device, and why: for `te-nvfp4-cv doctor`.

The choice itself is made in dispatch.py. Every call imports that file, so the words stand here.
"""

from __future__ import annotations

import torch

from te_nvfp4_cv.backend import cache, dispatch, native, torch_private

INSTRUCTIONS = {
    "avx512_vnni": "AVX-512 VNNI (vpdpbusd, 512 bits)",
    "avx_vnni": "AVX-VNNI (vpdpbusd, 256 bits)",
    "avx2": "AVX2 (vpmaddubsw)",
    "neon_dotprod": "NEON dot products (sdot)",
    "plain": "plain C++, without vector instructions of its own",
}


def explain(device: torch.device) -> dict[str, str]:
    """Return the chosen backend, the reason, and what the triton backend would need, each as a text.

    For a CPU also its compiled kernels: their instructions, where they come from, whether they match the reference.
    """
    try:
        chosen = dispatch.resolve("auto", device, by_layer=True)
    # No backend serves the device: the error's text is the explanation.
    except RuntimeError as error:
        return {"backend": "none", "why": str(error), "triton": _about_triton(device)}
    if device.type == "cpu":
        why = _about_cpu(chosen)
        return {"backend": chosen, "why": why, "kernels": _about_kernels(), "triton": _about_triton(device)}
    if chosen == "vendor":
        why = "CUDA: quantization by Triton kernels, convolutions by cuDNN on exact dequantized operands"
    else:
        why = "CUDA: FP4 tensor cores by Triton kernels; the self-test has passed on this GPU"
    return {"backend": chosen, "why": why, "triton": _about_triton(device), "cudnn": _about_cudnn(device)}


def _about_cpu(chosen: str) -> str:
    dtype = (
        "bf16 where autocast is on"
        if dispatch.bf16_is_native(torch.device("cpu"))
        else "fp32, no AVX-512 bf16 or AMX here (bf16 where autocast is on)"
    )
    if chosen != dispatch.BY_LAYER:
        quantizer = "compiled kernels" if native.load() is not None else "plain torch"
        return f"CPU: quantization by {quantizer}, convolutions by oneDNN in {dtype}"
    to_vendor = "layers with row-scaled activations"
    if torch_private.cpu_has_tiles():
        to_vendor += ", and large layers in bf16, which oneDNN multiplies faster on AMX tiles"
    return f"CPU: layers multiply 4-bit codes as integers; vendor (oneDNN in {dtype}) takes {to_vendor}"


def _about_kernels() -> str:
    library = native.load()
    if library is None:
        return "none: switched off by TE_NVFP4_CV_NATIVE=0, or no C++ compiler and no wheel that brings them"
    origin = "of the wheel" if native.of_wheel(library) else "compiled on this machine"
    matches = "match the reference bit for bit" if dispatch.integer_passes() else "DO NOT match the reference: not used"
    return f"{INSTRUCTIONS[library.nvfp4_machine().decode()]}; {origin}; integer products {matches}"


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


def _about_cudnn(device: torch.device) -> str:
    if torch.cuda.get_device_capability(device) != dispatch.CUDNN_CAPABILITY:
        return "needs compute capability 10.0"
    missing = dispatch.missing_for_cudnn()
    if missing:
        return f"needs {missing}: pip install 'te_nvfp4_cv[cudnn]'"
    return "can run; `te-nvfp4-cv selftest --backend cudnn` checks it"
