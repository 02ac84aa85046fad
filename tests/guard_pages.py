"""Memory between two pages that may not be touched: a read or write beside a tensor ends the process.

    with guarded("after"):       every new tensor ends right before such a page
    with guarded("before"):      every new tensor begins right after one

Sanitizers do not see inline assembly, nor vector loads that begin inside of a tensor and end beyond it; a page does.
Inside of the context torch.empty, Tensor.new_empty and scratch.empty give such memory, and `put` copies a tensor there.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import scratch

SIDES = ("before", "after")
PAGE = mmap.PAGESIZE
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_side: str | None = None
_held: list[mmap.mmap] = []
_allocate = torch.empty


def _memory(size: int, side: str) -> int:
    """Return the address of `size` bytes between two forbidden pages, at the end or the beginning of the rest."""
    inner = -(-size // PAGE) * PAGE
    block = mmap.mmap(-1, inner + 2 * PAGE)
    _held.append(block)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    for page in (start, start + PAGE + inner):
        if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    return start + PAGE + (inner - size if side == "after" else 0)


def _new(shape: Any, dtype: torch.dtype) -> Tensor:
    assert _side is not None
    shape = tuple(shape)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return _allocate(shape, dtype=dtype)
    data = (ctypes.c_char * size).from_address(_memory(size, _side))
    made = torch.frombuffer(data, dtype=dtype).view(shape)
    made.view(-1).view(torch.uint8).fill_(0xFF)  # what is not written shows, too
    return made


def _empty(*shape: Any, dtype: torch.dtype | None = None, device: Any = None, **more: Any) -> Tensor:
    assert not more, f"torch.empty with {sorted(more)}: not thought of here"
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return _new(sizes, dtype or torch.float32)


def _new_empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None, **more: Any) -> Tensor:
    return _empty(*shape, dtype=dtype or like.dtype, **more)


def put(tensor: Any) -> Any:
    """Return a copy of a dense tensor in guarded memory; outside of the context, and of None, the argument itself."""
    if _side is None or tensor is None:
        return tensor
    return _new(tensor.shape, tensor.dtype).copy_(tensor)


@contextmanager
def guarded(side: str) -> Iterator[None]:
    """Give all new tensors guarded memory; tensors must not outlive the context."""
    global _side
    originals = torch.empty, torch.Tensor.new_empty, scratch.empty
    _side = side
    torch.empty, torch.Tensor.new_empty = _empty, _new_empty  # type: ignore[assignment]
    scratch.empty = _new
    try:
        yield
    finally:
        torch.empty, torch.Tensor.new_empty, scratch.empty = originals  # type: ignore[misc]
        _side = None
        _held.clear()  # a mapping goes with its last view
