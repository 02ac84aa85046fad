"""Compile the CPU kernels from the C++ files here: with which compiler, with which flags, for which processor.

native.cpp and block_formats.cpp quantize, integer.cpp multiplies, the headers are what they share. No torch headers and
no Python.h are needed: a C++17 compiler is enough. Nothing of torch or of this package is imported, because setup.py
runs this file alone when it builds a wheel, and `make demo` while pip installs torch:

    python te_nvfp4_cv/backend/compilation.py    compile the kernels for this processor into the cache, if they lack
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
SOURCES = [_FOLDER / "native.cpp", _FOLDER / "integer.cpp", _FOLDER / "block_formats.cpp"]
_HEADERS = [_FOLDER / "numbers.h", _FOLDER / "quantize.h"]
# No contraction to fused multiply-adds, which would round once where the reference rounds twice. The others of -f
# allow vector code without changing a value; -ffast-math would change some.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
# Compiler flags by the name that integer.cpp gives its loop; "native" is whichever is best for this processor.
MACHINES = {
    "native": ["-march=native", "-mprefer-vector-width=512"],
    "avx512_vnni": ["-march=x86-64-v4", "-mavx512vnni", "-mtune=icelake-server", "-mprefer-vector-width=512"],
    "avx_vnni": ["-march=x86-64-v3", "-mavxvnni"],
    "avx2": ["-march=x86-64-v3"],
    "neon_dotprod": ["-march=armv8.2-a+dotprod"],
    "plain": [],
}
# The machines whose kernels a wheel carries, the best first, and what /proc/cpuinfo says of a processor that runs them.
_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
WHEEL_MACHINES = {
    "avx512_vnni": _V4 | {"avx512_vnni"},
    "avx_vnni": _V3 | {"avx_vnni"},
    "avx2": _V3,
    "plain": set(),
}


def compiler() -> str | None:
    """Return the C++ compiler command to use (that of `CXX`, else g++, clang++ or c++), or None if there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        words: list[str] = []
        with contextlib.suppress(ValueError):  # a quote that does not close
            words = shlex.split(name or "")
        if words and (found := shutil.which(words[0])):  # CXX may hold options, too: "ccache g++"
            return shlex.join([found, *words[1:]])
    return None


def features() -> str:
    """Return the processor's features as Linux lists them, or what Python knows of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def digest(*more: str) -> str:
    """Return 20 hex digits of the sources and of the given texts."""
    texts = [path.read_text() for path in (*SOURCES, *_HEADERS)]
    return hashlib.sha256("\0".join([*texts, *more]).encode()).hexdigest()[:20]


def _asked_folder() -> Path:
    """Return TE_NVFP4_CV_CACHE, or te_nvfp4_cv in the user's cache, whether it is there or not."""
    override, shared = os.environ.get("TE_NVFP4_CV_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(override) if override else (Path(shared) if shared else Path.home() / ".cache") / "te_nvfp4_cv"


@functools.lru_cache(maxsize=1)
def cache_folder() -> Path:
    """Return the folder for compiled kernels and JSON files: TE_NVFP4_CV_CACHE, or te_nvfp4_cv in the user's cache.

    If that folder cannot be written, the answer is a temporary one, which this process keeps to its end.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no rights, or no home
        base = _asked_folder()
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    folder = Path(tempfile.mkdtemp(prefix="te_nvfp4_cv_"))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a fork of it may end first
        shutil.rmtree(folder, ignore_errors=True)


def ready(name: str) -> Path | None:
    """Return a file of the folder that cache_folder would choose, or None; the folder may be one that is only read."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _asked_folder() / name
        return path if os.access(path, os.R_OK) else None
    return None


def attempts(machine: str) -> list[list[str]]:
    """Return sets of flags, the best first: a compiler without OpenMP or -march=native still builds working kernels."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    tuning = MACHINES[machine] if x86 or machine != "native" else ["-mcpu=native"]
    # libgomp.so.1 becomes a dependency, which the one that torch has loaded under this name fulfils.
    return [[*tuning, "-fopenmp"], tuning, []]


def cached(cxx: str, machine: str) -> Path:
    """Return where the kernels for a machine are kept once this compiler has compiled them."""
    command = [*shlex.split(cxx), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout
    # In a home folder shared by several machines each processor needs its build.
    key = digest(cxx, said.partition("\n")[0], features(), str([FLAGS, attempts(machine)]))
    name = f"native_{key}.so"
    return ready(name) or cache_folder() / name


def _build(cxx: str, flags: list[str], link: list[str], target: str) -> str:
    """Compile the sources, all at the same time, and link them. Returns the compiler's complaint, or "" of none."""
    with tempfile.TemporaryDirectory() as folder:
        objects = [f"{folder}/{source.stem}.o" for source in SOURCES]
        steps = [[*flags, "-c", str(source), "-o", name] for source, name in zip(SOURCES, objects, strict=True)]
        with contextlib.ExitStack() as stack:
            running = []
            for step in steps:
                command = [*shlex.split(cxx), *step]
                pipes: Any = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
                running.append(subprocess.Popen(command, **pipes))
                stack.enter_context(running[-1])
                stack.callback(running[-1].kill)  # after a fault, or Ctrl-C, nobody waits for the others
            for process in running:
                said = process.communicate()[1]
                if process.returncode != 0:
                    return said or f"status {process.returncode}"
        command = [*shlex.split(cxx), *link, "-shared", *objects, "-o", target]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")
        return (run.stderr or f"status {run.returncode}") if run.returncode != 0 else ""


def compile_here(cxx: str, machine: str, target: Path) -> None:
    """Compile a shared object by the first set of flags that works.

    The file is complete when it gets its name, so that other processes never load half of one.

    Raises:
        OSError: no set of flags works.
    """
    error = ""
    # A file from mkstemp could be read by this user alone, and the folder may serve several.
    with tempfile.TemporaryDirectory(prefix="build_", dir=target.parent) as folder:
        made = Path(folder) / target.name
        for flags in attempts(machine):
            error = _build(cxx, [*FLAGS, *flags], flags, str(made))
            if not error:
                os.replace(made, target)
                return
    raise OSError(f"{cxx} could not build the CPU kernels: {error.strip()[-800:]}")


# ---- for a wheel ----------------------------------------------------------------------------------------------------


def wheel_object(machine: str) -> Path:
    """Return where an installed wheel has the kernels for a machine. The name tells old sources from these."""
    return _FOLDER / f"kernels_{machine}_{digest(*MACHINES[machine])}.so"


def compile_for_wheel(cxx: str, machine: str, folder: Path) -> Path:
    """Compile the kernels for one of WHEEL_MACHINES into a folder, so that they run on other systems too.

    Raises:
        OSError: the compiler failed.
    """
    target = folder / wheel_object(machine).name
    # The sized operator delete would ask for a newer libstdc++. A static one would ask for a newer glibc, the build's.
    flags = [*FLAGS, "-fno-sized-deallocation", *MACHINES[machine]]
    # Linked without -fopenmp, so that the file names no OpenMP runtime: native.py says why.
    error = _build(cxx, [*flags, "-fopenmp"], ["-s"], str(target))
    if error:
        raise OSError(f"{cxx} could not build the CPU kernels for {machine}: {error.strip()[-800:]}")
    return target


def main() -> None:
    """Compile the kernels for this processor into the cache; what prevents it is told at the first use."""
    cxx, machine = compiler(), os.environ.get("TE_NVFP4_CV_MACHINE", "native")
    if cxx is None or machine not in MACHINES:
        return
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        target = cached(cxx, machine)
        if not target.exists():
            compile_here(cxx, machine, target)


if __name__ == "__main__":
    main()
