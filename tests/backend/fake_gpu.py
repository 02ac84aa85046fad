"""A GPU that answers questions and runs nothing: for tests of code that only asks what the device is."""

from __future__ import annotations

import pytest
import torch

from te_nvfp4_cv.backend import cache, tuning

DEVICE = torch.device("cuda", 0)


def install(
    monkeypatch: pytest.MonkeyPatch, folder: object, capability: tuple[int, int] = (9, 0), name: str = "Fake GPU"
) -> None:
    """torch.cuda describes this GPU, and the cache lives in `folder`."""
    monkeypatch.setenv("TE_NVFP4_CV_CACHE", str(folder))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cache, "driver_version", lambda: "580.1")
    new_process()


def new_process() -> None:
    """Forget what a process remembers; files stay."""
    cache.forget()
    tuning.forget()
