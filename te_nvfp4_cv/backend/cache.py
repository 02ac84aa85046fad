"""Keep small results beyond one process: the cache folder, JSON files in it, and whether a GPU passed the self-test.

A JSON file is valid for one identity: the GPU (its name and compute capability), the driver, torch, triton, and the
sources in backend/ and ops/. It is replaced as a whole, so that parallel processes never read half of one. A damaged
file, or one of another identity, reads as None.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from te_nvfp4_cv.backend.compilation import cache_folder, ready
from te_nvfp4_cv.files import write_atomically

_PACKAGE = Path(__file__).resolve().parents[1]
_selftests: dict[torch.device, bool] = {}  # one look at the disk per process and device: every dispatch asks
changes = 0  # how often an answer of selftest_passed may have become another one


# ---- the identity ---------------------------------------------------------------------------------------------------


def version(package: str) -> str:
    """Return the installed version of a package, "absent", or "unknown" for a folder on the path without metadata."""
    if importlib.util.find_spec(package) is None:
        return "absent"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.lru_cache(maxsize=1)
def source_digest() -> str:
    """Return 12 hex digits of the sources in backend/ and ops/, so that an edited kernel is not the measured one."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("backend", "ops") for path in (_PACKAGE / folder).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def driver_version() -> str:
    """Return the version of NVIDIA's driver, else the CUDA version that the driver supports, else "none"."""
    # Files first: opening libcuda costs more, and it may be missing in a container that sees the kernel module.
    for path in ("/sys/module/nvidia/version", "/proc/driver/nvidia/version"):
        with contextlib.suppress(OSError, StopIteration):
            words = Path(path).read_text().split()
            return next(word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit())
    try:
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return "none"
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"


def identity(device: torch.device) -> dict[str, str]:
    """Return everything that decides whether an old measurement still holds. Host names and paths are left out."""
    name, capability = platform.machine(), "none"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return {
        "device": name,
        "capability": capability,
        "driver": driver_version(),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "te_nvfp4_cv": version("te_nvfp4_cv"),
        "source": source_digest(),
    }


# ---- JSON files -----------------------------------------------------------------------------------------------------


def _name(kind: str, key: dict[str, str]) -> str:
    """Return the name of the file of this kind and identity."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return f"{kind}_{digest}.json"


def _text(name: str) -> str | None:
    """Return what a file of this name says: one of this process, or one that came with a folder that is only read."""
    places: tuple[Callable[[], Path | None], ...] = (lambda: cache_folder() / name, lambda: ready(name))
    for place in places:
        with contextlib.suppress(OSError, ValueError):  # absent, unreadable, not UTF-8
            if (path := place()) is not None:
                return path.read_text()
    return None


def read(kind: str, device: torch.device) -> dict[str, Any] | None:
    """Return the content of the file of this kind that was written for the device's present identity, or None."""
    key = identity(device)
    try:
        found = json.loads(_text(_name(kind, key)) or "")
    except ValueError:  # not JSON
        return None
    # The identity is compared, too: two of them may share the 16 digits in the name, and a user may copy files.
    if not isinstance(found, dict) or found.get("identity") != key or not isinstance(found.get("content"), dict):
        return None
    return found["content"]


def write(kind: str, device: torch.device, content: dict[str, Any]) -> bool:
    """Replace the file, and return False if the folder cannot be written: without a cache everything still works."""
    key = identity(device)
    text = json.dumps({"identity": key, "content": content}, indent=1, sort_keys=True)
    try:
        write_atomically(cache_folder() / _name(kind, key), text.encode())
    except (RuntimeError, OSError):  # the latter where there is no folder at all, not even a temporary one
        return False
    return True


def passes(kind: str, device: torch.device, check: Callable[[], bool]) -> bool:
    """Return what `check` answers; it runs once for each kind and identity, and its answer is kept in the folder."""
    content = read(kind, device)
    if content is None or not isinstance(content.get("passed"), bool):
        content = {"passed": check()}
        write(kind, device, content)
    return bool(content["passed"])


# ---- the self-test --------------------------------------------------------------------------------------------------


def selftest_passed(device: torch.device) -> bool:
    """Return True if `te-nvfp4-cv selftest` has passed on this GPU with this driver, these versions and kernels."""
    if device.type != "cuda":
        return False
    device = _with_index(device)
    if device not in _selftests:
        content = read("selftest", device)
        _selftests[device] = content is not None and content.get("passed") is True
    return _selftests[device]


def remember_selftest(device: torch.device, passed: bool) -> None:
    """Remember how the self-test of a GPU ended; a failure also takes an earlier pass back.

    Raises:
        ValueError: The device is not a GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"self-tests are remembered for GPUs only, got {device}")
    global changes
    device = _with_index(device)
    _selftests[device] = passed
    changes += 1
    write("selftest", device, {"passed": passed})


def forget() -> None:
    """Look for the folder and for passed self-tests again at the next question."""
    global changes
    cache_folder.cache_clear()
    _selftests.clear()
    changes += 1


def _with_index(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
