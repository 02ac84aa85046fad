"""A stand-in for TransformerEngine's compiled extension: its Python package then runs on a machine without a GPU.

    install()                                       before the first import of transformer_engine
    import transformer_engine.pytorch as te         the real package; te.Linear(..., device="cpu")

What the Python side computes is TransformerEngine's own. In place of the extension: plain torch for the product of two
ordinary tensors, the norms and GELU; enums; and, for every other function, one that raises. bgrad_quantize raises too,
as the compiled one does for a quantizer that it has no converter for. Packages that TransformerEngine imports and these
paths never use (onnx, onnxscript, einops) are empty where they are not installed.
It changes torch (a GPU seems to be there; tensors say that they are on it), so it refuses to run in a process that
was not started for it.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import multiprocessing
import os
import sys
import types
import warnings
import zlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ENUMS = {
    "DType": {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
    "FP8FwdTensors": {
        f"GEMM{gemm}_{kind}": 3 * gemm - 3 + i
        for gemm in (1, 2, 3)
        for i, kind in enumerate(("INPUT", "WEIGHT", "OUTPUT"))
    },
    "FP8BwdTensors": {
        f"{kind}{gemm}": 2 * gemm - 2 + i for gemm in (1, 2, 3) for i, kind in enumerate(("GRAD_OUTPUT", "GRAD_INPUT"))
    },
    "NVTE_Fused_Attn_Backend": {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
}
UNUSED_PACKAGES = ("onnx", "onnxscript", "onnxscript.onnx_types", "einops")


# ---- functions of the extension -------------------------------------------------------------------------------------


def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    **others: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """op(b) op(a): fprop x w^T, dgrad dy w, wgrad dy^T x. With grad, a bias stands for the wish for its gradient."""
    if quantizer is not None or (gelu and grad):
        raise NotImplementedError("stand-in: a quantized result, or GELU in a backward GEMM")
    left, right = b.reshape(-1, b.shape[-1]), a.reshape(-1, a.shape[-1])
    product = (left.t() if transpose_b else left).float() @ (right.t() if transpose_a else right).float()
    grad_bias = left.float().sum(0).to(b.dtype) if grad and bias is not None else None
    if bias is not None and not grad:
        product = product + bias.float()
    if accumulate:
        product = product + out.float()
    dtype = b.dtype if out_dtype is None else TORCH_DTYPES[int(out_dtype)]
    if gelu:
        before = product.to(dtype)
        return torch.nn.functional.gelu(before, approximate="tanh"), None, before, None
    if out is not None:
        return out.copy_(product), grad_bias, None, None
    leading = b.shape[:-1] if not transpose_b else product.shape[:1]
    return product.to(dtype).reshape(*leading, -1), grad_bias, None, None


TORCH_DTYPES = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


def bgrad_quantize(grad_output: Tensor, quantizer: Any) -> None:
    raise RuntimeError(f"Unexpected type for quantizer: {type(quantizer).__name__} has no converter in C++")


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Any, quantizer: Any, dtype: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, 1 / standard deviation); the weight's offset for zero-centred gamma is the last argument."""
    assert out is None and quantizer is None, "the norm's result stays in high precision for custom quantizers"
    x32 = x.float()
    mean = x32.mean(-1)
    scale = ((x32 - mean[:, None]).square().mean(-1) + eps).rsqrt()
    gamma = weight.float() + float(rest[-1])
    y = (x32 - mean[:, None]) * scale[:, None] * gamma + (0 if bias is None else bias.float())
    return y.to(x.dtype), mean, scale


def layernorm_bwd(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dgamma, dbeta)."""
    dy32, normed = dy.float(), (x.float() - mean[:, None]) * scale[:, None]
    g = dy32 * (weight.float() + float(zero_centered))
    dx = (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) * scale[:, None]
    return dx.to(x.dtype), (dy32 * normed).sum(0).to(weight.dtype), dy32.sum(0).to(weight.dtype)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, *rest: Any
) -> tuple[Tensor, None, Tensor]:
    """(y, None, 1 / root mean square)."""
    assert out is None and quantizer is None, "the norm's result stays in high precision for custom quantizers"
    scale = (x.float().square().mean(-1) + eps).rsqrt()
    return (x.float() * scale[:, None] * (weight.float() + float(rest[-1]))).to(x.dtype), None, scale


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dgamma)."""
    dy32, normed = dy.float(), x.float() * scale[:, None]
    g = dy32 * (weight.float() + float(zero_centered))
    dx = (g - normed * (g * normed).mean(-1, keepdim=True)) * scale[:, None]
    return dx.to(x.dtype), (dy32 * normed).sum(0).to(weight.dtype)


def gelu(x: Tensor, quantizer: Any, **others: Any) -> Tensor:
    assert quantizer is None, "custom quantizers quantize after the activation"
    return torch.nn.functional.gelu(x, approximate="tanh")


def dgelu(dy: Tensor, x: Tensor, quantizer: Any, **others: Any) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = torch.nn.functional.gelu(x, approximate="tanh")
    return torch.autograd.grad(y, x, dy.view_as(y))[0]


FUNCTIONS = (generic_gemm, bgrad_quantize, layernorm_fwd, layernorm_bwd, rmsnorm_fwd, rmsnorm_bwd, gelu, dgelu)
OTHER_ACTIVATIONS = (
    "glu geglu qgelu qgeglu relu reglu srelu sreglu silu swiglu dglu dgeglu dqgelu dqgeglu drelu dreglu \
dsrelu dsreglu dsilu dswiglu clamped_swiglu clamped_dswiglu"  # a table of TransformerEngine's names them all
)


# ---- installation ---------------------------------------------------------------------------------------------------


class _AnyMember(type):
    """A class whose every attribute is there: an enum of the extension that nothing here looks into."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return zlib.crc32(f"{cls.__name__}.{name}".encode())


def _other(name: str) -> Any:
    """An attribute that is not defined above: an enum where its name looks like a class's, else a function to raise."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return _AnyMember(name, (), {})

    def missing(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"stand-in for transformer_engine_torch: {name} is not there")

    return missing


def _extension() -> types.ModuleType:
    module = types.ModuleType("transformer_engine_torch")
    for name, members in ENUMS.items():
        setattr(module, name, enum.IntEnum(name, members))
    for function in FUNCTIONS:
        setattr(module, function.__name__, function)
    for name in OTHER_ACTIVATIONS.split():
        setattr(module, name, _other(name))
    module.__getattr__ = _other  # type: ignore[method-assign]
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    return module


def _pretend_gpu() -> None:
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="stand-in")
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.get_device_properties = lambda *args: properties
    torch.Tensor.is_cuda = property(lambda self: True)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def install() -> None:
    """Make `import transformer_engine.pytorch` work in this process."""
    if multiprocessing.parent_process() is None or "transformer_engine" in sys.modules:
        raise RuntimeError("the stand-in changes torch: install it first thing in a process of its own")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no search for compiled libraries at import
    sys.modules["transformer_engine_torch"] = _extension()
    for name in UNUSED_PACKAGES:
        if importlib.util.find_spec(name.partition(".")[0]) is None or isinstance(
            sys.modules.get(name), mock.MagicMock
        ):
            sys.modules[name] = mock.MagicMock()
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    _pretend_gpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_engine.common as common  # imports .pytorch, which fails for want of the library's file

        common.load_framework_extension = lambda framework: None
        for name in [name for name in sys.modules if name.startswith("transformer_engine.pytorch")]:
            del sys.modules[name]
        import transformer_engine.pytorch  # noqa: F401
