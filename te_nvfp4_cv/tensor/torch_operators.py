"""Run torch operators on NVFP4Tensors: the table behind NVFP4Tensor.__torch_dispatch__.

    on the codes      detach, alias, clone, _to_copy, view, as_strided and slice of the whole, copy_, zero_
    on values         everything else: NVFP4Tensors are dequantized; those that the operator writes to, quantized again

A view that changes the last dimension would cut blocks, so it is a copy of the values, with a warning. A tensor without
a quantizer refuses to be written to (NVFP4Tensor.quantize_). Values of a rotated columnwise-only tensor are rotated
back. Handlers get the class from their caller, so that this file need not import nvfp4_tensor.py.

Some of what torch does goes past its dispatcher, to memory that a tensor of codes does not have: an assignment to an
index or to .data would be lost, and a null pointer read. For these NVFP4Tensor has the functions at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import errors
from te_nvfp4_cv.backend.torch_private import tree_leaves, tree_map

aten = torch.ops.aten

BUFFERS = (
    "_rowwise_data",
    "_rowwise_scale_inv",
    "_columnwise_data",
    "_columnwise_scale_inv",
    "_amax_rowwise",
    "_amax_columnwise",
)
READING = (  # how codes were made, and so how they are read
    "_row_scaled_nvfp4",
    "_nvfp4_use_4over6",
    "_nvfp4_e4m3_max",
    "_columnwise_rht",
    "_with_random_sign_mask",
)
SETTINGS = ("_quantizer", *READING, "_columnwise_layout")


def dispatch(cls: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator that was called with an NVFP4Tensor (`cls`) among its arguments."""
    handler = _HANDLERS.get(func)
    if handler is not None:
        result = handler(cls, func, *args, **kwargs)
        if result is not NotImplemented:  # a handler may serve only some arguments of its operator
            return result
    return _on_values(cls, func, args, kwargs)


def _on_values(cls: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator on dequantized values; NVFP4Tensors that it writes to are quantized again and returned."""
    values: dict[int, Tensor] = {}

    def value_of(x: Any) -> Any:
        if not isinstance(x, cls):
            return x
        return values.setdefault(id(x), x._dequantize())  # one tensor given twice must be one value

    plain_args, plain_kwargs = tree_map(value_of, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    written: dict[int, Any] = {}  # an in-place operator returns its argument: the NVFP4Tensor, not its values
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        for x in tree_leaves(given):
            if isinstance(x, cls):
                x.quantize_(values[id(x)])
                written[id(values[id(x)])] = x
    return tree_map(lambda out: written.get(id(out), out), result) if written else result


def _detach(cls: Any, func: Any, t: Any) -> Any:
    return t.make_like()  # shares the buffers, as a view shares memory


def _clone(cls: Any, func: Any, t: Any, memory_format: Any = None) -> Any:
    return t.map_buffers(torch.clone)


def _to_copy(cls: Any, func: Any, t: Any, **kwargs: Any) -> Any:
    """Move the codes to another device; another dtype is only the nominal one (float(), half() give values)."""
    dtype = kwargs.get("dtype") or t.dtype
    if kwargs.get("layout") not in (None, torch.strided) or not dtype.is_floating_point:
        return NotImplemented  # integers and bool are other values, which a later float() must not undo
    moves = {key: kwargs[key] for key in ("device", "non_blocking") if kwargs.get(key) is not None}
    # The dtype is left out here: each buffer keeps that of its format.
    return t.map_buffers(lambda b: aten._to_copy.default(b, **moves), dtype=dtype)


def _view(cls: Any, func: Any, t: Any, size: Any) -> Any:
    """Share the codes in views that keep the last dimension; other views copy dequantized values, with a warning."""
    asked, size = size, list(size)
    if -1 in size:
        known = -prod(size)  # of all lengths but the one to find
        size[size.index(-1)] = t.numel() // max(known, 1)
    if prod(size) != t.numel():
        torch.empty(t.shape, device="meta").view(asked)  # raises torch's own error
    if not size or size[-1] != t.shape[-1]:
        warnings.warn(
            f"NVFP4Tensor {tuple(t.shape)} viewed as {tuple(size)}: blocks lie along the last dimension, so this "
            "view is a dequantized copy",
            stacklevel=2,
        )
        return t._dequantize().reshape(size)
    # Only rowwise data have the leading dimensions; scales and the columnwise face know the matrix [M, K].
    data = t._rowwise_data
    return t.make_like(
        shape=tuple(size), rowwise_data=None if data is None else data.reshape(*size[:-1], data.shape[-1])
    )


def _as_strided(cls: Any, func: Any, t: Any, size: Any, stride: Any, storage_offset: Any = None) -> Any:
    # Codes have no strides that a caller could choose: what asks for the present ones gets an alias.
    same = tuple(size) == tuple(t.shape) and tuple(stride) == t.stride() and not storage_offset
    return t.make_like() if same else NotImplemented


def _slice(cls: Any, func: Any, t: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    whole = not start and (end is None or end >= t.shape[dim]) and step == 1
    return t.make_like() if whole else NotImplemented


def _copy_(cls: Any, func: Any, dst: Any, src: Any, non_blocking: bool = False) -> Any:
    """Copy the codes where both sides hold the same faces in the same form; else quantize the values again."""
    if not isinstance(dst, cls):
        dst.copy_(src._dequantize(), non_blocking)
        return dst
    if not isinstance(src, cls):
        return dst.quantize_(src.expand(dst.shape))  # copy_ broadcasts
    # 4over6 is not among these: it chooses scales, but codes are read alike with and without it.
    form = ("_row_scaled_nvfp4", "_nvfp4_e4m3_max", "_columnwise_rht", "_with_random_sign_mask")
    usable = src.shape == dst.shape and all(getattr(src, name) == getattr(dst, name) for name in form)
    usable = usable and (has_tiles(src) or not has_tiles(dst))
    if not usable or any(held and not src.get_usages()[face] for face, held in dst.get_usages().items()):
        return dst.quantize_(src._dequantize().to(dst.device).expand(dst.shape))
    if dst._columnwise_data is not None:  # the layout may differ, since it changes no code
        src = src.to_columnwise_layout(dst._columnwise_layout)
    for name, buffer in dst._buffers().items():
        buffer.copy_(getattr(src, name).view(buffer.shape), non_blocking)
    return dst


def has_tiles(t: Any) -> bool:
    """Return True if t's quantizer gives each 16x16 tile one scale, so that either face can be made from the other."""
    return getattr(t._quantizer, "with_2d_quantization", False)


def _zero_(cls: Any, func: Any, t: Any) -> Any:
    for buffer in t._buffers().values():
        buffer.view(torch.uint8).zero_()  # code 0, scale byte 0 and amax 0 all have the bits 0
    return t


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.as_strided.default: _as_strided,
    aten.slice.Tensor: _slice,
    aten.copy_.default: _copy_,
    aten.zero_.default: _zero_,
}


# ---- past the dispatcher ---------------------------------------------------------------------------------------------


def data(t: Any) -> Any:
    """Return an alias without a gradient, as torch's `data` does."""
    return Tensor.data.__get__(t)  # type: ignore[attr-defined]


def set_data(t: Any, value: Tensor) -> None:
    """Let t hold `value`: another NVFP4Tensor's buffers and settings, or the codes of plain values.

    Raises:
        RuntimeError: plain values for a tensor without a quantizer.
    """
    new = value if isinstance(value, type(t)) else _codes_of(t, value.detach())
    Tensor.data.__set__(t, new)  # type: ignore[attr-defined]  # shape and nominal dtype
    for name in (*BUFFERS, *SETTINGS):
        setattr(t, name, getattr(new, name))


def _codes_of(t: Any, values: Tensor) -> Any:
    """Quantize values as t was; its own ones, as Module.half() assigns them, keep their codes."""
    same = values.shape == t.shape and values.device == t.device and not values.is_meta
    if same and torch.equal(t._dequantize(values.dtype), values):
        return t.make_like(dtype=values.dtype)
    if t._quantizer is None:
        raise without_quantizer("an assignment of plain values to data")
    quantizer = t._quantizer.copy()
    quantizer.set_usage(**t.get_usages())
    return quantizer(values).to_columnwise_layout(t._columnwise_layout)


def set_item(t: Any, index: Any, value: Any) -> None:
    """Write to a part of t: the whole is quantized again, as after every in-place operator."""
    values = t.dequantize().clone()  # autograd refuses to write to a part of what a Function returned
    values[index] = value
    t.copy_(values)


def apply_(t: Any, function: Callable[[Any], Any]) -> Any:
    """Replace each value by the function's, and quantize again."""
    return t.copy_(t._dequantize().apply_(function))


def share_memory_(t: Any) -> Any:
    """Move the buffers to memory that processes share."""
    for buffer in t._buffers().values():
        buffer.share_memory_()
    return t


def is_shared(t: Any) -> bool:
    """Tell if the buffers lie in memory that processes share."""
    return all(buffer.is_shared() for buffer in t._buffers().values())


def dlpack(t: Any, **_: Any) -> Any:
    """Refuse to give a pointer to values, of which there are none.

    Raises:
        RuntimeError: always.
    """
    raise errors.runtime_error(
        "NVFP4Tensor: its values have no memory that DLPack could share.",
        got="__dlpack__() of an NVFP4Tensor",
        needs="a plain tensor",
        fix="pass t.dequantize(), or one of its buffers",
    )


def without_quantizer(got: str) -> RuntimeError:
    """Make the error of writing to a tensor that nothing could quantize again."""
    return errors.runtime_error(
        "NVFP4Tensor: it cannot be written to.",
        got=got,
        needs="the quantizer that made it",
        fix="build it as quantizer(x), or write to x.dequantize()",
    )
