"""Reuse memory on a CPU for large operands that live only until the next convolution.

The C library maps fresh pages for every large tensor and unmaps them when the tensor is freed; touching fresh pages
costs more than quantizing into them. So the KEEP largest buffers stay here and are handed out again as soon as no
tensor refers to them. Do not use them for saved tensors: those would block the buffers until backward.
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


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized contiguous tensor on the CPU in a reused buffer, which is faster from SMALL bytes on."""
    size = math.prod(shape) * dtype.itemsize
    with _lock:
        whole = torch.from_numpy(_take(size + ALIGN))
    start = -whole.data_ptr() % ALIGN  # whole cache lines for the vector stores of the kernels
    return whole[start : start + size].view(dtype).view(shape)


def _take(size: int) -> np.ndarray:
    free = [buffer for buffer in _buffers if sys.getrefcount(buffer) <= FREE]
    fitting = [buffer for buffer in free if buffer.nbytes >= size]
    if fitting:
        return min(fitting, key=lambda buffer: buffer.nbytes)
    buffer = np.empty(size, dtype=np.uint8)
    _buffers.append(buffer)
    if len(_buffers) > KEEP:  # forget the smallest; where it is in use, its tensor keeps it alive
        smallest = min(range(len(_buffers)), key=lambda i: _buffers[i].nbytes)
        del _buffers[smallest]
    return buffer


def _count_of_a_free_buffer() -> int:
    """Return what sys.getrefcount says, in a comprehension as in _take, about a buffer that only its list holds.

    The number differs between Python versions.
    """
    held = [np.empty(1, dtype=np.uint8)]
    return [sys.getrefcount(buffer) for buffer in held][0]


FREE = _count_of_a_free_buffer()
