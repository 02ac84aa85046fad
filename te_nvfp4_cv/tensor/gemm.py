"""Multiply two NVFP4Tensors, for the three products of a layer (nv.gemm).

    layout  operands  faces                   result    which
    "TN"    x, w      rowwise, rowwise        [..., N]  fprop  y  = x w^T
    "NN"    dy, w     rowwise, columnwise     [..., K]  dgrad  dx = dy w
    "NT"    dy, x     columnwise, columnwise  [N, K]    wgrad  dw = dy^T x

This file checks the operands; the numerics are in ops/gemm/operator.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv import errors
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.ops.gemm import operator
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor, face_of

LAYOUTS = {"TN": ("rowwise", "rowwise"), "NN": ("rowwise", "columnwise"), "NT": ("columnwise", "columnwise")}
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gemm(
    a: NVFP4Tensor,
    b: NVFP4Tensor,
    layout: str = "TN",
    out_dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    accumulate: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply two NVFP4Tensors: y = x w^T ("TN"), dx = dy w ("NN") or dw = dy^T x ("NT").

    Args:
        a: x for "TN", dy for "NN" and "NT".
        b: w for "TN" and "NN", x for "NT".
        bias: added in fp32 before the cast, one value per column of the result.
        accumulate: add the result to `out` in fp32 before the cast.
        out: written in place and returned; its dtype is then the result's.
        backend: "auto", "reference", "vendor", "triton" or "cudnn". The integer backend multiplies layers only.
    Returns:
        Tensor of out_dtype; "TN" and "NN" keep a's leading dimensions.
    Raises:
        ValueError: an operand lacks the face that the layout multiplies; lengths differ; only one operand is rotated;
            bias or out does not fit; the integer backend was asked for.
        TypeError: an operand that is no NVFP4Tensor.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> quantizer = nv.NVFP4Quantizer()
        >>> x, w = quantizer(torch.randn(8, 32)), quantizer(torch.randn(64, 32))
        >>> nv.gemm(x, w, "TN").shape, nv.gemm(quantizer(torch.randn(8, 64)), w, "NN").shape
        (torch.Size([8, 64]), torch.Size([8, 32]))
    """
    rows, columns = _check(a, b, layout, out_dtype, bias, accumulate, out)
    operands, scaling = [], []
    for t, face in zip((a, b), LAYOUTS[layout], strict=True):
        data, scale, amax = face_of(t, face)
        # [..., Kp/2] -> [M, Kp/2]; scales are of the matrix already, and so is a columnwise face.
        operands.append([data.flatten(0, -2), scale, amax])
        # Custom operators take tensors and numbers: two numbers for each operand.
        scaling += [t._nvfp4_e4m3_max, int(t._row_scaled_nvfp4)]
    result = operator.gemm(
        *operands,
        scaling,
        bias,
        out.detach().reshape(rows, columns) if accumulate and out is not None else None,
        out.dtype if out is not None else out_dtype,
        _resolved(backend, a.device),
    )
    # A result of columnwise faces is a matrix; otherwise its rows are a's leading dimensions.
    lead = a.shape[:-1] if LAYOUTS[layout][0] == "rowwise" else (rows,)
    result = result.reshape(*lead, columns)
    return result if out is None else out.copy_(result)  # the operator never writes to its arguments


def _resolved(backend: str, device: torch.device) -> str:
    """Return the backend that multiplies."""
    chosen = dispatch.resolve(backend, device)
    if chosen == "integer":
        raise errors.value_error(
            "nvfp4 gemm: backend 'integer' multiplies layers only.",
            got="backend='integer'",
            needs="'auto', 'reference', 'vendor' or 'triton'",
            fix="leave backend out, or call nv.functional.linear",
        )
    return chosen


def _check(
    a: NVFP4Tensor,
    b: NVFP4Tensor,
    layout: str,
    out_dtype: torch.dtype,
    bias: Tensor | None,
    accumulate: bool,
    out: Tensor | None,
) -> tuple[int, int]:
    """Refuse operands that do not fit together, and return the rows and columns of the product."""
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, NVFP4Tensor):
            raise errors.type_error(
                f"nvfp4 gemm: operand {name} is not quantized.",
                got=errors.describe(t),
                needs="an NVFP4Tensor",
                fix="quantize it with NVFP4Quantizer",
            )
    if layout not in LAYOUTS:
        raise errors.value_error(
            "nvfp4 gemm: unknown layout.",
            got=f"layout={layout!r}",
            needs="'TN' (x, w), 'NN' (dy, w) or 'NT' (dy, x)",
            fix="see the table of nv.gemm",
        )
    faces = LAYOUTS[layout]
    for name, t, face in zip(("a", "b"), (a, b), faces, strict=True):
        if getattr(t, f"_{face}_data") is None:
            raise errors.value_error(
                f"nvfp4 gemm {layout}: operand {name} lacks its {face} face.",
                got=repr(t),
                needs=f"{name} with {face} data: this layout multiplies a {' by b '.join(faces)}",
                fix=f"quantize it with NVFP4Quantizer({face}=True)",
            )
    (rows, length_a), (columns, length_b) = (_sizes(t, face) for t, face in zip((a, b), faces, strict=True))
    if length_a != length_b:
        raise errors.value_error(
            f"nvfp4 gemm {layout}: the contracted lengths differ.",
            got=f"a {tuple(a.shape)} contracts {length_a}, b {tuple(b.shape)} contracts {length_b}",
            needs="equal lengths: K of x and w (TN), N of dy and w (NN), the rows of dy and x (NT)",
            fix="check the operands' order and the layout",
        )
    # A rotation along the contraction cancels only if both operands have it, with the same signs.
    rotated = [t._columnwise_rht and face == "columnwise" for t, face in zip((a, b), faces, strict=True)]
    signs = {t._with_random_sign_mask for t, r in zip((a, b), rotated, strict=True) if r}
    if rotated[0] != rotated[1] or len(signs) > 1:
        raise errors.value_error(
            f"nvfp4 gemm {layout}: the random Hadamard transform does not cancel.",
            got=f"a {'rotated' if rotated[0] else 'as is'}, b {'rotated' if rotated[1] else 'as is'}",
            needs="both operands rotated alike along the contraction, or none",
            fix="quantize dy and x with the same with_rht and sign mask; weights without RHT",
        )
    dtype = out.dtype if out is not None else out_dtype
    if dtype not in OUT_DTYPES or (accumulate and out is None):
        raise errors.value_error(
            f"nvfp4 gemm {layout}: nowhere to put the result.",
            got=f"out_dtype {dtype}, accumulate={accumulate}, out={errors.describe(out)}",
            needs="bfloat16, float16 or float32; `out` when accumulate=True",
            fix="pass out_dtype=torch.bfloat16, or out=",
        )
    if (bias is not None and tuple(bias.shape) != (columns,)) or (out is not None and out.numel() != rows * columns):
        raise errors.value_error(
            f"nvfp4 gemm {layout}: bias or out does not fit the result.",
            got=f"bias {errors.describe(bias)}, out {errors.describe(out)}",
            needs=f"bias [{columns}], out of {rows} x {columns} elements",
            fix="check the operands' order and the layout",
        )
    return rows, columns


def _sizes(t: NVFP4Tensor, face: str) -> tuple[int, int]:
    """Return how many rows or columns of the product an operand gives, and the length that is contracted."""
    M, K = t.shape[:-1].numel(), t.shape[-1]
    return (M, K) if face == "rowwise" else (K, M)
