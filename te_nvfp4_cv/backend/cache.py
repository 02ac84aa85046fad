"""Small JSON files that outlive a process, in the cache folder of ops/native.py, and what they are valid for.

A file is valid for one identity: the GPU (its name and compute capability), the driver, torch, triton and the source
of te_nvfp4_cv/ops. It is written to a temporary neighbour and moved into place, so that parallel processes never read
half of one; a damaged or foreign file reads as None.
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
from pathlib import Path
from typing import Any

import torch

from te_nvfp4_cv.backend import native

_PACKAGE = Path(__file__).resolve().parents[1]


def version(package: str) -> str:
    """The installed version of a package, "absent", or "unknown" where it is found on the path but not installed."""
    if importlib.util.find_spec(package) is None:
        return "absent"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.lru_cache(maxsize=1)
def source_digest() -> str:
    """Return 12 hex digits of the sources in backend/ and ops/: a changed kernel is another kernel in one version."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("backend", "ops") for path in (_PACKAGE / folder).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def driver_version() -> str:
    """NVIDIA's driver as its kernel module names it, else the CUDA version it supports, else "none"."""
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
    """What decides whether a measurement or a passed test still holds; no host names, no paths."""
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


def path_of(kind: str, identity: dict[str, str]) -> Path:
    """Where the file of this kind and identity lives."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return _folder() / f"{kind}_{digest}.json"


@functools.lru_cache(maxsize=1)
def _folder() -> Path:
    return native.cache_folder()  # asked once: without a writable folder every call makes a new temporary one


def read(path: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """The content of a file written for this identity, or None."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # absent, unreadable, not UTF-8, not JSON
        return None
    if not isinstance(found, dict) or found.get("identity") != identity or not isinstance(found.get("content"), dict):
        return None
    return found["content"]


def write(path: Path, identity: dict[str, str], content: dict[str, Any]) -> bool:
    """Replace the file; False where the folder cannot be written, which is no error: a cache is a convenience."""
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
