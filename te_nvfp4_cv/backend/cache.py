"""Keep small results beyond one process: the cache folder, JSON files in it, and whether a GPU passed the self-test.

A JSON file is valid for one identity: the GPU (its name and compute capability), the driver, torch, triton, and the
sources in backend/ and ops/. It is written to a temporary file beside it and renamed, so that parallel processes never
read half of one. A damaged file, or one of another identity, reads as None. Nothing of the package is imported here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_selftests: dict[torch.device, bool] = {}  # one look at the disk per process and device: every dispatch asks


# ---- the folder -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def cache_folder() -> Path:
    """Return the folder for compiled kernels and JSON files: TE_NVFP4_CV_CACHE, or te_nvfp4_cv in the user's cache.

    If that folder cannot be written, the answer is a temporary one, which this process keeps to its end.
    """
    override, shared = os.environ.get("TE_NVFP4_CV_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(override) if override else (Path(shared) if shared else Path.home() / ".cache") / "te_nvfp4_cv"
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    except (OSError, RuntimeError):  # no rights, or no home
        pass
    return Path(tempfile.mkdtemp(prefix="te_nvfp4_cv_"))


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
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        pass
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
        return next(word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit())
    except (OSError, StopIteration):
        pass
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


def path_of(kind: str, identity: dict[str, str]) -> Path:
    """Return the path of the file of this kind and identity."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"{kind}_{digest}.json"


def read(path: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """Return the content of a file that was written for this identity, or None."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # absent, unreadable, not UTF-8, not JSON
        return None
    # The identity is compared, too: two of them may share the 16 digits in the name, and a user may copy files.
    if not isinstance(found, dict) or found.get("identity") != identity or not isinstance(found.get("content"), dict):
        return None
    return found["content"]


def write(path: Path, identity: dict[str, str], content: dict[str, Any]) -> bool:
    """Replace the file, and return False if the folder cannot be written: without a cache everything still works."""
    text = json.dumps({"identity": identity, "content": content}, indent=1, sort_keys=True)
    try:
        handle, temporary = tempfile.mkstemp(suffix=".json", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def passes(kind: str, identity: dict[str, str], check: Callable[[], bool]) -> bool:
    """Return what `check` answers; it runs once for each identity, and its answer is kept in the cache folder."""
    path = path_of(kind, identity)
    content = read(path, identity)
    if content is None or not isinstance(content.get("passed"), bool):
        content = {"passed": check()}
        write(path, identity, content)
    return bool(content["passed"])


# ---- the self-test --------------------------------------------------------------------------------------------------


def selftest_passed(device: torch.device) -> bool:
    """Return True if `te-nvfp4-cv selftest` has passed on this GPU with this driver, these versions and kernels."""
    if device.type != "cuda":
        return False
    device = _with_index(device)
    if device not in _selftests:
        key = identity(device)
        content = read(path_of("selftest", key), key)
        _selftests[device] = content is not None and content.get("passed") is True
    return _selftests[device]


def remember_selftest(device: torch.device, passed: bool) -> None:
    """Remember how the self-test of a GPU ended; a failure also takes an earlier pass back.

    Raises:
        ValueError: The device is not a GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"self-tests are remembered for GPUs only, got {device}")
    device = _with_index(device)
    _selftests[device] = passed
    key = identity(device)
    write(path_of("selftest", key), key, {"passed": passed})


def forget() -> None:
    """Look for the folder and for passed self-tests again at the next question."""
    cache_folder.cache_clear()
    _selftests.clear()


def _with_index(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
