"""The current GPU.

Triton launches on torch's current device and its stream, whatever device the tensors are on: a launch function makes
its tensors' device current first. Operators of torch do that by themselves, custom ones do not.
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


def usable(device: str | torch.device, caller: str) -> torch.device:
    """The device, if a tensor can be made there.

    Raises:
        ValueError: an unknown name, a build without CUDA, a GPU that is not there.
    """
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise value_error(
            f"{caller}: device not usable.",
            got=f"{device!r}: {str(error).splitlines()[0]}",
            needs="cpu, or a device that torch finds here",
            fix="device='cpu'",
        ) from None
    return chosen


def on_its_device(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """`launch` with the device of its first tensor as the current one."""

    @functools.wraps(launch)
    def launched(first: Tensor, *rest: P.args, **named: P.kwargs) -> R:
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return launch(first, *rest, **named)
        with torch.cuda.device(first.device):
            return launch(first, *rest, **named)

    return launched
