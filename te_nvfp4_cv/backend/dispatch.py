"""Choose the backend that runs a call.

One function decides. An explicit choice that cannot run raises an error; nothing falls back silently.

    reference   anywhere: plain torch, the specification
    integer     CPU: compiled kernels that multiply codes as small integers
    vendor      CPU: compiled quantization kernels + oneDNN
                CUDA from sm_80: Triton quantization kernels + cuDNN / cuBLAS
    triton      CUDA from sm_80: Triton quantization kernels + implicit GEMM over packed operands; on Blackwell
                (sm_100, sm_103, sm_120) by its FP4 tensor cores. On a CPU only under Triton's interpreter, for tests
    cudnn       CUDA, sm_100: the operands of triton, multiplied by cudnn-frontend and cuBLAS where they take a layer
    auto        CPU: integer or vendor, layer by layer, once the integer kernels have passed their check on this machine
                CUDA: vendor; triton on a Blackwell GPU where `te-nvfp4-cv selftest` has passed

Which GPUs have FP4 tensor cores is decided here as well, by compute capability and never by trying: a kernel
that breaks the compiler can end the process.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import Parameter

from te_nvfp4_cv.backend import cache, native, torch_private
from te_nvfp4_cv.errors import runtime_error, value_error, warn_once

BACKENDS = ("auto", "reference", "integer", "vendor", "triton", "cudnn")
BY_LAYER = "integer or vendor"  # what "auto" means on a CPU until a layer's shapes decide
MINIMUM_CAPABILITY = (8, 0)
CUDNN_CAPABILITY = (10, 0)  # which cudnn-frontend's NVFP4 convolution asks for
FP4_CAPABILITIES = ((10, 0), (10, 3), (12, 0))  # what triton 3.6 to 3.9 compile block-scaled FP4 products for
_PLAIN = (Tensor, Parameter)  # exactly these: a subclass may give an operator another meaning
_PROXIES = torch._C._TorchDispatchModeKey.PROXY  # make_fx's dispatch mode
KERNELS_ON_CPU = False  # tests set it, under the interpreter: vendor on a CPU then takes its path on CUDA


def check_backend(backend: str) -> str:
    """Return `backend` unchanged if it is the name of one.

    Raises:
        ValueError: The name is unknown.
    """
    if backend not in BACKENDS:
        raise value_error(
            "nvfp4: unknown backend.",
            got=repr(backend),
            needs=f"one of {', '.join(BACKENDS)}",
            fix='leave it out: "auto" chooses',
        )
    return backend


def check_possible(backend: str) -> None:
    """Refuse a backend that can run on no device of this machine: before the first layer, which may be far away.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The backend cannot run here.
    """
    check_backend(backend)
    if backend in ("triton", "cudnn"):
        resolve(backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    elif backend == "integer":
        resolve(backend, torch.device("cpu"))


def resolve(backend: str, device: torch.device, by_layer: bool = False) -> str:
    """Return the backend that runs on tensors of `device`: "reference", "integer", "vendor", "triton" or "cudnn".

    Args:
        by_layer: the caller plans a layer, whose shapes decide between the CPU's two backends: "auto" may then give
            BY_LAYER. Callers that do not multiply get "vendor", which quantizes with the same kernels.
    Raises:
        ValueError: The name is unknown.
        RuntimeError: The backend cannot run on that device.
    """
    check_backend(backend)
    if backend == "reference":
        return backend
    if device.type == "cpu":
        if backend in ("triton", "cudnn"):
            _check_interpreter(device, backend)
        if backend == "integer" and not has_compiled_kernels():
            raise runtime_error(
                "nvfp4: backend 'integer' cannot run here.",
                got="no compiled kernels for this CPU",
                needs="a C++ compiler (g++, clang++ or CXX), and TE_NVFP4_CV_NATIVE not 0",
                fix="install g++, or backend='vendor'",
            )
        if backend != "auto":
            return backend
        return BY_LAYER if by_layer and not KERNELS_ON_CPU and integer_passes() else "vendor"
    if device.type != "cuda" or backend == "integer":
        raise runtime_error(
            "nvfp4: no fast backend for this device.",
            got=f"backend={backend!r}, tensors on {device}",
            needs="cpu" if backend == "integer" else "cpu or cuda",
            fix="backend='auto'" if device.type == "cuda" else "backend='reference'",
        )
    # Kernels for FP4 tensor cores are trusted only on a machine where they have been checked.
    if backend == "auto":
        backend = "triton" if native_fp4(device) and cache.selftest_passed(device) else "vendor"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        raise runtime_error(
            f"nvfp4: backend {backend!r} cannot run on this GPU.",
            got="compute capability {}.{}".format(*capability),
            needs="8.0 or newer (bf16 tensor cores)",
            fix="backend='reference'",
        )
    if not has_triton():
        raise runtime_error(
            f"nvfp4: backend {backend!r} needs Triton for its kernels.",
            got="tensors on a GPU, and no package named triton",
            needs="triton 3.6 to 3.9",
            fix="pip install 'te_nvfp4_cv[triton]', or backend='reference'",
        )
    if backend == "cudnn" and (capability != CUDNN_CAPABILITY or missing_for_cudnn()):
        raise runtime_error(
            "nvfp4: backend 'cudnn' cannot run here.",
            got="compute capability {}.{}, ".format(*capability) + f"packages missing: {missing_for_cudnn() or 'none'}",
            needs="compute capability 10.0 (B200), nvidia-cudnn-frontend >= 1.32 and nvidia-cutlass-dsl >= 4.8",
            fix="pip install nvidia-cudnn-frontend nvidia-cutlass-dsl, or backend='triton'",
        )
    return backend


def was_named(backend: str) -> bool:
    """Return True if what `resolve` returned was asked for by name, and "auto" would not give it here."""
    if backend == "triton" and torch.cuda.is_available():
        return resolve("auto", torch.device("cuda")) != backend
    return backend in ("integer", "triton", "cudnn")


def missing_for_cudnn() -> str:
    """Return the packages that the backend "cudnn" needs and that are not installed; "" if all of them are there."""
    packages = {"cudnn": "nvidia-cudnn-frontend", "cutlass": "nvidia-cutlass-dsl"}
    return ", ".join(name for module, name in packages.items() if importlib.util.find_spec(module) is None)


integer_check: Callable[[], bool] | None = None  # compares the integer kernels with the reference; ops/conv sets it


# Both may run a compiler and read files, which torch.compile cannot trace.
@torch_private.constant_in_graphs
def has_compiled_kernels() -> bool:
    """Return True if there are compiled kernels for this CPU."""
    return native.load() is not None


@torch_private.constant_in_graphs
def integer_passes() -> bool:
    """Return True if the integer kernels exist and have matched the reference on this machine, now or earlier."""
    global _integer_passes
    if _integer_passes is None:
        library = native.load()
        _integer_passes = (
            library is not None
            and integer_check is not None
            and cache.passes(f"integer_{native.name(library)}", torch.device("cpu"), _integer_check_alone)
        )
        if library is not None and not _integer_passes:
            warn_once(
                "integer",
                "nvfp4: the compiled integer kernels do not match the reference on this machine, so oneDNN multiplies "
                "instead; `te-nvfp4-cv selftest` shows what differs",
            )
    return _integer_passes


def _integer_check_alone() -> bool:
    """Run the check whatever the first layer's caller has switched on: its answer is kept for good.

    torch.export traces with fake tensors, which kernels cannot read; autocast would round the reference; and so on.
    """
    assert integer_check is not None
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with ExitStack() as alone:
            alone.enter_context(torch_private.without_modes())
            alone.enter_context(torch_private.without_function_modes())
            alone.enter_context(torch.autocast("cpu", enabled=False))
            alone.enter_context(torch.inference_mode(False))
            alone.enter_context(torch.no_grad())
            return integer_check()
    finally:
        torch.set_default_dtype(dtype)


_integer_passes: bool | None = None  # one look at the disk per process


def _check_interpreter(device: torch.device, backend: str) -> None:
    if not has_triton() or not interpreted():
        raise runtime_error(
            f"nvfp4: backend {backend!r} cannot run here.",
            got=f"tensors on {device}",
            needs="a CUDA GPU of compute capability 8.0 or newer, and Triton "
            "(on a CPU: TRITON_INTERPRET=1 before triton is imported, for tests)",
            fix="backend='vendor' (or 'auto')",
        )


def has_triton() -> bool:
    """Return True if Triton can be imported."""
    # Looked for, not imported: the import takes long, and the reference needs none of it.
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Return True if Triton kernels run in its interpreter, as NumPy code on the CPU."""
    # The variable as triton reads it, which need not be imported yet.
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def kernels_serve(device: torch.device) -> bool:
    """Return True if the vendor backend quantizes tensors of `device` with the Triton kernels."""
    return device.type == "cuda" or (KERNELS_ON_CPU and device.type == "cpu")


def kernels_quantize(backend: str, device: torch.device) -> bool:
    """Return True if a backend, resolved already, quantizes tensors of `device` with the Triton kernels."""
    return backend in ("triton", "cudnn") or (backend == "vendor" and kernels_serve(device))


def kernels_run(device: torch.device) -> bool:
    """Return True if Triton kernels take tensors of `device`: a new enough GPU, or a CPU with the interpreter."""
    if not kernels_serve(device) or not has_triton():
        return False
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= MINIMUM_CAPABILITY


def runs_directly(x: Tensor) -> bool:
    """Return True if an operator's implementation may be called on x directly, past torch's dispatcher.

    A custom operator of torch costs 15 to 30 microseconds a call before its code begins; a small layer makes ten such
    calls a step. Eager calls on plain tensors need nothing of what those microseconds buy (fake tensors, tracing,
    autograd, autocast): the layers above have dealt with autograd and autocast already. Calls on other tensors, those
    that a dispatch mode watches and those that torch.compile traces go through the operators.
    """
    if torch.compiler.is_compiling():  # asked first: torch.compile cannot trace the question after it
        return False
    return type(x) in _PLAIN and not torch_private.dispatch_modes()


def is_traced() -> bool:
    """Return True while torch.compile, torch.export or make_fx writes down the calls that it sees."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXIES) is not None


def native_fp4(device: torch.device) -> bool:
    """Return True if `device` has tensor cores that multiply NVFP4 operands without unpacking them."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in FP4_CAPABILITIES


def bf16_is_native(device: torch.device) -> bool:
    """Return True if bf16 convolutions use bf16 arithmetic on that device (on a CPU: AVX-512 bf16 or AMX)."""
    return device.type != "cpu" or torch_private.cpu_multiplies_bf16()


def compute_dtype(dtype: torch.dtype, device: torch.device, autocast: bool) -> torch.dtype:
    """Return the dtype of a vendor convolution's dequantized operands. They are exact in it, so it decides speed only.

    fp16 operands become fp32, because products of codes and scales overflow fp16 and oneDNN is slow in it. So do bf16
    ones on a CPU without bf16 arithmetic, unless the user asked for bf16 with torch.autocast.
    """
    if dtype == torch.bfloat16 and (autocast or bf16_is_native(device)):
        return torch.bfloat16
    return torch.float32
