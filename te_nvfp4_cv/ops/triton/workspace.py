"""Zeros for kernels that accumulate by atomics: they find zeros there and leave zeros, so that nobody clears them.

    zeros(x)        SIZE int32 zeros for one launch, the same memory for all launches of a stream
    is_last         in a kernel: the program that is the last of its launch to come here
    take            in a kernel: read a number and leave 0
    take_all        in a kernel: read a vector and leave zeros

The last program of a launch sees what all have accumulated, by atomics before `is_last`, takes it and writes the
result. So one launch does what took three: clear, accumulate, finish. Launches of one stream run one after the other;
another stream has other memory. Under a CUDA graph's capture each launch has zeros of its own, which the graph clears
at each replay, because two graphs captured on one stream may be replayed at once.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from te_nvfp4_cv.ops.triton.numerics import INTERPRETED

SIZE = 256

_zeros: dict[tuple[torch.device, int], Tensor] = {}  # by device and stream


def zeros(x: Tensor) -> Tensor:
    """Return int32 [SIZE] zeros on x's device, for a launch on its current stream that leaves zeros there."""
    # Under the interpreter threads may run kernels at once, and a kernel may be interrupted.
    if INTERPRETED.value or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return x.new_zeros(SIZE, dtype=torch.int32)
    key = x.device, driver.active.get_current_stream(x.device.index)
    found = _zeros.get(key)
    if found is None:
        found = _zeros[key] = torch.zeros(SIZE, dtype=torch.int32, device=x.device)
    return found


@triton.jit
def is_last(counter):
    """Return True in the last program of a launch to come here. `counter`: int32, 0 at first; the last one takes it."""
    # "acq_rel": the others' atomics before it are done, and are seen after it.
    return tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) * tl.num_programs(1) - 1


@triton.jit
def take(place):
    """Return what is there, and leave 0. Atomics are seen by atomics, whatever a cache holds."""
    return tl.atomic_xchg(place, 0, sem="relaxed")


@triton.jit
def take_all(places):
    """Return what is there, a vector, and leave zeros. Read past the first cache: others' atomics went past it."""
    # Not by an atomic: where a vector is shorter than the program, some threads would get no answer.
    found = tl.load(places, cache_modifier=".cg")
    tl.debug_barrier()
    tl.store(places, tl.zeros_like(found))
    return found
