"""Compile kernels for a GPU that is not here, as its launches would: `te-nvfp4-cv warm`, and tests/dry_launch.py.

A driver that only names the architecture stands in for CUDA's. From then on, for the rest of the process, a launch goes
through Triton's own look-up of its arguments (types, multiples of 16, constants) and stops before the GPU. What was
compiled lies in Triton's cache folder, under a key that holds no path, so that it may be moved to another machine with
the same build of Triton.
"""

from __future__ import annotations

import collections
import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import cache, driver, jit

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.ops.triton import launching

LIBRARY = "triton/_C/libtriton.so"


class _Driver:
    """What a launch asks of a driver before it launches."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """Name the GPU that is compiled for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Return the one device there is."""
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        """Return the default stream."""
        return 0


def imagine(arch: int) -> None:
    """Let Triton find a GPU of this architecture (90 for sm_90), for the rest of the process."""
    driver.set_active(_Driver(arch))


class Launches:
    """What was launched since this was made.

    Attributes:
        counts: the launches of each kernel.
        kernels: (name, compiled kernel or None) of each distinct specialization, in the order of the first launches.
    """

    def __init__(self, arch: int, compiles: bool, say: Callable[[str, int], None] | None = None) -> None:
        """Take over all launches of this process.

        Args:
            arch: 90 for sm_90 and so on.
            compiles: compile each new specialization; otherwise they are counted only.
            say: called with a kernel's name and the number of specializations so far, before each compilation.
        Raises:
            RuntimeError: Triton was imported for its interpreter, which launches nothing.
        """
        os.environ.pop("TRITON_INTERPRET", None)
        self.counts: collections.Counter[str] = collections.Counter()
        self.kernels: list[tuple[str, Any]] = []
        known: set[tuple[str, str]] = set()
        before = jit.JITFunction.run
        launching.KEEPS = False  # nothing of this may be launched
        imagine(arch)

        def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            name = kernel.__name__
            self.counts[name] += 1
            # Triton's own answers, in its own order: an option that is not among a kernel's arguments belongs to it.
            key_cache, binder = kernel.device_caches[0][1], kernel.device_caches[0][4]
            _, kinds, chosen = binder(*arguments, **{"debug": False, "instrumentation_mode": "", **options})
            key = (name, jit.compute_cache_key(key_cache, kinds, chosen))
            if key in known:
                return None
            known.add(key)
            if compiles and say is not None:
                say(name, len(known))
            made = before(kernel, *arguments, grid=(1,), warmup=True, **options) if compiles else None
            self.kernels.append((name, made))
            return made

        jit.JITFunction.run = run


def cache_folder() -> str:
    """Return the folder in which Triton keeps compiled kernels."""
    return str(triton.knobs.cache.dir)


def take_key_of(wheel: Path) -> str:
    """Name compiled kernels as another Python's build of this Triton would, so that they can be moved to it.

    A name holds the digest of Triton's Python files, which all builds of a version share, and of its library, which is
    another for each version of Python. What is compiled does not depend on it.

    Args:
        wheel: The wheel of that build.
    Returns:
        The wheel's version of Python: "3.12".
    Raises:
        ValueError: It is no wheel of Triton, or Python files that the name holds differ from those installed here.
    """
    here = Path(triton.__file__).parent
    what = f"{wheel}: not another build of the Triton that is installed here."
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("triton/") and name.endswith(".py")]
            differing = [
                name for name in names
                if not (here.parent / name).is_file() or archive.read(name) != (here.parent / name).read_bytes()
            ]  # fmt: skip
            theirs = hashlib.sha256(archive.read(LIBRARY)).hexdigest()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise value_error(what, got=str(error), needs=f"a wheel that holds {LIBRARY}", fix="pip download it") from error
    ours, key = hashlib.sha256((here.parent / LIBRARY).read_bytes()).hexdigest(), cache.triton_key()
    tag = wheel.name.split("-")[2] if wheel.name.count("-") >= 4 else ""
    if differing or ours not in key or not tag.startswith("cp3"):
        raise value_error(
            what, got=f"{wheel.name}, with {len(differing)} other Python files",
            needs=f"triton-{triton.__version__}-cp3XX-....whl, as pip downloads it",
            fix=f"pip download --no-deps --only-binary=:all: --python-version 3.12 triton=={triton.__version__}",
        )  # fmt: skip
    key = key.replace(ours, theirs)
    cache.triton_key = lambda: key
    return f"3.{tag[3:]}"
