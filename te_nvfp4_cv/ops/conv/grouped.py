"""The three GEMMs of a grouped linear layer (mixture of experts) on quantized operands: those of a linear layer, with
each expert's rows and each expert's weight.

    fprop  y[rows of e]  = alpha_e x[rows of e] w_e^T + bias_e
    dgrad  dx[rows of e] = alpha_e dy[rows of e] w_e
    wgrad  dw_e          = alpha_e dy[rows of e]^T x[rows of e]      over the blocks of expert e

Operands come in the forms of operators.py. Alpha is fp32 [1], or [E] where experts have scales of their own. Results
are those of the backend's linear layer, expert by expert, bit for bit; the Triton kernels of triton/grouped.py compute
all experts in one launch. Rows that belong to nobody get zeros, and so does the dw of an expert without rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.conv import integer, reference, vendor
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.geometry import ConvGeometry, linear_geometry
from te_nvfp4_cv.ops.records import Alpha, Face, tensor_of

KERNELS = ("triton", "cudnn")  # the second multiplies what it takes by other libraries, which know no experts


def fprop(
    x: Face,
    w: Face,
    alpha: Tensor | Alpha | None,
    bias: Tensor | None,
    experts: Experts,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return y [T, O] in `dtype`; bias is [E, O] or None."""
    if backend in KERNELS:
        return _triton().fprop(x, w, tensor_of(alpha), bias, experts, geometry, dtype)
    if backend == "integer":
        return integer.data_of_experts(x, w, tensor_of(alpha), bias, experts, geometry, True, dtype)
    module, parts, one = _module(backend), _weights(w, geometry), _alphas(alpha)
    y = torch.empty(geometry.y_shape, dtype=dtype, device=x.data.device)
    channels, outputs = geometry.x_shape[-1], geometry.y_shape[-1]
    for rows in experts.rows:
        g = linear_geometry(rows.end - rows.start, channels, outputs)
        own = None if bias is None else bias[rows.expert]
        operands = (_rows(x, rows.here), parts(rows.expert), one(rows.expert), own)
        _into(y[rows.here], module, module.fprop, *operands, g, dtype)
    y[experts.end :] = 0
    return y


def dgrad(
    dy: Face,
    w: Face,
    alpha: Tensor | Alpha | None,
    experts: Experts,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return dx [T, C] in `dtype`."""
    if backend in KERNELS:
        return _triton().dgrad(dy, w, tensor_of(alpha), experts, geometry, dtype)
    if backend == "integer":
        return integer.data_of_experts(dy, w, tensor_of(alpha), None, experts, geometry, False, dtype)
    module, parts, one = _module(backend), _weights(w, geometry), _alphas(alpha)
    dx = torch.empty(geometry.x_shape, dtype=dtype, device=dy.data.device)
    channels, outputs = geometry.x_shape[-1], geometry.y_shape[-1]
    for rows in experts.rows:
        g = linear_geometry(rows.end - rows.start, channels, outputs)
        operands = (_rows(dy, rows.here), parts(rows.expert), one(rows.expert))
        _into(dx[rows.here], module, module.dgrad, *operands, g, dtype)
    dx[experts.end :] = 0
    return dx


def wgrad(
    dy: Face,
    x: Face,
    alpha: Tensor | Alpha | None,
    experts: Experts,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return dw [E * O, 1, C] in `dtype`, from the columnwise faces of all experts."""
    if backend in KERNELS:
        return _triton().wgrad(dy, x, tensor_of(alpha), experts, geometry, dtype)
    if backend == "integer":
        return integer.wgrad_of_experts(dy, x, tensor_of(alpha), experts, geometry, dtype)
    module, one = _module(backend), _alphas(alpha)
    # Of every expert with rows all is written: zeros would cost as much as writing dw.
    all_have_rows = len(experts.rows) == experts.number
    make = torch.empty if all_have_rows else torch.zeros
    dw = make(geometry.weight_shape, dtype=dtype, device=dy.data.device)
    by_expert = dw.view(experts.number, -1, *dw.shape[1:])
    channels, outputs = geometry.x_shape[-1], geometry.y_shape[-1]
    blocks = geometry.folds[0].images // BLOCK
    for rows in experts.rows:
        g = linear_geometry(rows.end - rows.start, channels, outputs)
        sides = (_rows(face, slice(rows.block, rows.last), blocks) for face in (dy, x))
        _into(by_expert[rows.expert], module, module.wgrad, *sides, one(rows.expert), g, dtype)
    return dw


def row_sums(dy: Tensor, experts: Experts, backend: str) -> Tensor:
    """Return db, fp32 [E, O]: the sum of each expert's rows of dy [T, O] before quantization."""
    if backend in KERNELS:
        found: Tensor = _triton().row_sums(dy, experts)
        return found
    total = torch.zeros(experts.number, dy.shape[-1], dtype=torch.float32, device=dy.device)
    for rows in experts.rows:
        torch.sum(dy[rows.here], 0, dtype=torch.float32, out=total[rows.expert])
    return total


def _into(target: Tensor, module: Any, product: Callable[..., Tensor], *arguments: Any) -> None:
    """Write an expert's product where it belongs: at once, if the backend writes results into given memory."""
    more = {} if module is reference else {"out": target}
    made = product(*arguments, **more)
    if made.data_ptr() != target.data_ptr():
        target.copy_(made)


def _module(backend: str) -> Any:
    return {"reference": reference, "vendor": vendor}[backend]


def _triton() -> Any:
    from te_nvfp4_cv.ops.conv.triton import grouped

    return grouped


def _rows(face: Face, here: slice, blocks: int = 0) -> Face:
    """Return the rows `here` of a face, or its blocks; values of columns have 16 rows a block."""
    each = face.data.shape[0] // blocks if blocks else 1
    return Face(face.data[here.start * each : here.stop * each], face.scale[here] if face.scale.numel() else face.scale)


def _weights(w: Face, g: ConvGeometry) -> Callable[[int], Face]:
    """Return what gives one expert's part of a weight [E * O, C], in the form that the backend multiplies."""
    parts = w.data.unflatten(0, (g.groups, -1))
    scales = w.scale.unflatten(0, (g.groups, -1)) if w.scale.numel() else None
    return lambda expert: Face(parts[expert], w.scale if scales is None else scales[expert])


def _alphas(alpha: Tensor | Alpha | None) -> Callable[[int], Tensor | None]:
    """Return what gives one expert's factor, fp32 [1]."""
    found = tensor_of(alpha)
    if found is None or found.numel() == 1:
        return lambda expert: found
    return lambda expert: found[expert : expert + 1]
