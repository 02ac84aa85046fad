"""Take over torch's grouped product under the context, torch.nn.functional.grouped_mm and what it calls.

It is a grouped linear layer where rows x [T, C] are multiplied by kernels [E, C, O] that the context may run in NVFP4.
The product of two matrices that both have rows for each expert (a weight's gradient), batches of products without
offsets, and a result of another dtype stay in high precision, and coverage lists them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from te_nvfp4_cv.backend.torch_private import grouped_products

_TORCHS, _ATEN = grouped_products
FUNCTIONS = {_TORCHS, _ATEN.default}
_NAMES = ("self", "mat2", "offs", "bias", "out_dtype")
_WORDS = {"mat_a": "self", "mat_b": "mat2", "input": "self"}


class GroupedCall(NamedTuple):
    """A call of torch's grouped product as a grouped linear layer: w is [E, O, C]."""

    x: Any
    w: Any
    offsets: Any
    reason: str


def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> GroupedCall:
    """Read a call's arguments; the reason says why it is no grouped linear layer, or is empty."""
    given = dict(zip(_NAMES, args, strict=False)) | {_WORDS.get(name, name): value for name, value in kwargs.items()}
    x, kernels, offsets, bias, dtype = (given.get(name) for name in _NAMES)
    if not (isinstance(x, Tensor) and isinstance(kernels, Tensor)):
        return GroupedCall(x, kernels, offsets, "not a call on tensors")
    reason = ""
    if offsets is None:
        reason = "a batch of products, without offsets"
    elif x.dim() != 2 or kernels.dim() != 3:
        reason = "not rows of tokens times a kernel for each expert"
    elif bias is not None:
        reason = "grouped_mm with a bias"
    elif dtype is not None and dtype != x.dtype:
        reason = "grouped_mm with a result of another dtype"
    w = _as_stored(kernels.transpose(1, 2)) if kernels.dim() == 3 else kernels
    return GroupedCall(x, w, offsets, reason)


def _as_stored(w: Tensor) -> Tensor:
    """Return the Parameter itself where w is a view of all of it as it lies: caches know a weight by its identity."""
    base = None if torch.compiler.is_compiling() else w._base
    whole = isinstance(base, Parameter) and base.shape == w.shape and base.stride() == w.stride()
    return base if whole else w  # type: ignore[return-value]


def plain(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run torch's own product; in a graph by ATen's operator, since torch's function would come back to the mode."""
    return (_ATEN if torch.compiler.is_compiling() else function)(*args, **kwargs)
