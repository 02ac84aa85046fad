"""Make sure that work runs on the device that was meant, and after the work of another stream that it builds on.

Triton launches on torch's current device and stream, wherever the tensors are, so a launch function first makes its
tensors' device the current one. Torch's own operators do that by themselves; custom operators do not.

What is kept between calls and was written by one stream may be read by the next call on another. Whoever keeps it notes
`stream_of` at the writing, and calls `follow` before the reading. docs/BACKENDS.md lists what is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from te_nvfp4_cv.errors import value_error

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Tensor | tuple[Tensor, ...])


def usable(device: str | torch.device, caller: str) -> torch.device:
    """Return the device, after making sure that a tensor can be made there.

    Raises:
        ValueError: The name is unknown, torch is built without CUDA, or there is no such GPU.
    """
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)  # torch.device alone takes "cuda:7" on every machine
    except (RuntimeError, AssertionError) as error:
        raise value_error(
            f"{caller}: device not usable.",
            got=f"{device!r}: {str(error).splitlines()[0]}",
            needs="cpu, or a device that torch finds here",
            fix="device='cpu'",
        ) from None
    return chosen


def stream_of(x: Tensor) -> Any:
    """Return the stream that work on x runs on now; None on a CPU, where it is done when a call returns."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def capturing(x: Tensor) -> bool:
    """Return True if work on x is being captured in a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def follow(before: Any, tensors: Sequence[Tensor]) -> Any:
    """Let the current stream wait for what the stream `before` has written to tensors. Returns the current stream."""
    now = stream_of(tensors[0])
    # A capture cannot wait for what came before it; torch.cuda.graph itself waits for that.
    if before is not None and now != before and not capturing(tensors[0]):
        now.wait_stream(before)
        used_here(tensors)
    return now


def used_here(tensors: Sequence[Tensor]) -> None:
    """Tell torch's allocator that the current stream reads tensors which were made on another one.

    Without this their memory, once they are freed, may be given out again on that other stream while this one reads.
    """
    for x in tensors:
        if x.is_cuda:
            x.record_stream(torch.cuda.current_stream(x.device))


def on_its_device(launch: Callable[Concatenate[F, P], R]) -> Callable[Concatenate[F, P], R]:
    """Decorate a launch function so that it runs with the device of its first tensor as the current one.

    Its first argument is that tensor, or a record whose first field is.
    """

    @functools.wraps(launch)
    def launched(first: F, *rest: P.args, **named: P.kwargs) -> R:
        device = (first[0] if isinstance(first, tuple) else first).device
        # The usual case, which must not cost a change of the device.
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(first, *rest, **named)
        with torch.cuda.device(device):
            return launch(first, *rest, **named)

    return launched
