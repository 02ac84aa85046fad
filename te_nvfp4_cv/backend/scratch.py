"""Buffers for operands that live only until the next convolution: large ones are kept and used again on a CPU.

The C library maps fresh pages for every large tensor and unmaps them when it is freed; touching them costs more than
quantizing into them.
A buffer is free when no tensor refers to it any more; at most KEEP are kept, the largest ones. Never use it for
tensors that autograd keeps.
"""

from __future__ import annotations

import math
import sys
import threading

import numpy as np
import torch
from torch import Tensor

KEEP = 4
SMALL = 1 << 20  # bytes: the C library serves smaller ones without new pages
ALIGN = 64

_buffers: list[np.ndarray] = []
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized contiguous tensor, in a kept buffer where that is faster."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < SMALL:
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        whole = torch.from_numpy(_take(size + ALIGN))
    start = -whole.data_ptr() % ALIGN
    return whole[start : start + size].view(dtype).view(shape)


def _take(size: int) -> np.ndarray:
    free = [buffer for buffer in _buffers if sys.getrefcount(buffer) <= FREE]
    fitting = [buffer for buffer in free if buffer.nbytes >= size]
    if fitting:
        return min(fitting, key=lambda buffer: buffer.nbytes)
    del fitting
    buffer = np.empty(size, dtype=np.uint8)
    _buffers.append(buffer)
    if len(_buffers) > KEEP:  # forget the smallest; where it is in use, its tensor keeps it alive
        smallest = min(range(len(_buffers)), key=lambda i: _buffers[i].nbytes)
        del _buffers[smallest]
    return buffer


def _count_of_a_free_buffer() -> int:
    """What sys.getrefcount says in _take's comprehension of a buffer that only the list holds; it differs between
    Python versions.
    """
    held = [np.empty(1, dtype=np.uint8)]
    return [sys.getrefcount(buffer) for buffer in held][0]


FREE = _count_of_a_free_buffer()
