"""Make sure that work runs on the device that was meant.

Triton launches on torch's current device and stream, wherever the tensors are, so a launch function first makes its
tensors' device the current one. Torch's own operators do that by themselves; custom operators do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

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
