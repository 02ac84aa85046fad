"""Where a passed self-test is remembered, per GPU, driver, versions and kernel sources; dispatch asks here.

A damaged or foreign file counts as "not passed". A device is looked up once per process.
"""

from __future__ import annotations

import torch

from te_nvfp4_cv.backend import cache

_memo: dict[torch.device, bool] = {}


def passed(device: torch.device) -> bool:
    """Whether `te-nvfp4-cv selftest` has passed on this GPU with this driver, these versions and these kernels."""
    if device.type != "cuda":
        return False
    device = _with_index(device)
    if device not in _memo:
        identity = cache.identity(device)
        content = cache.read(cache.path_of("selftest", identity), identity)
        _memo[device] = content is not None and content.get("passed") is True
    return _memo[device]


def write(device: torch.device, result: bool) -> None:
    """Remember how the self-test of a GPU ended; a failure also takes an earlier pass back.

    Raises:
        ValueError: a device that is no GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"self-tests are remembered for GPUs only, got {device}")
    device = _with_index(device)
    _memo[device] = result
    identity = cache.identity(device)
    cache.write(cache.path_of("selftest", identity), identity, {"passed": result})


def forget() -> None:
    """Read the files again at the next question."""
    _memo.clear()


def _with_index(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
