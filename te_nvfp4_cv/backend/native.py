"""Build the CPU kernels once per machine from the C++ files here, with the user's compiler; load them through ctypes.

native.cpp quantizes, integer.cpp multiplies, numbers.h is what both share.

No torch headers and no Python.h are needed: a C++17 compiler is enough (g++ or clang++, or the one that `CXX` names).
The shared object goes to the folder of cache.py. Its name is a digest of source, flags, compiler and CPU, and it is
renamed into place, so that parallel processes and different machines can share the folder.
Without a compiler `load()` returns None and warns once; the vendor backend then quantizes with plain torch, which gives
the same bits and is slower. `TE_NVFP4_CV_NATIVE=0` switches the kernels off.

The kernels use the instructions of the machine's processor. `TE_NVFP4_CV_MACHINE` builds and runs them for another one of
MACHINES that this processor can run, which is how tests and benchmarks compare them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from te_nvfp4_cv.backend.cache import cache_folder
from te_nvfp4_cv.errors import value_error, warn_once

_log = logging.getLogger("te_nvfp4_cv")
_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / "native.cpp", _FOLDER / "integer.cpp"]
_HEADER = _FOLDER / "numbers.h"
# No contraction to fused multiply-adds, which would round once where the reference rounds twice. The others of -f
# allow vector code without changing a value; -ffast-math would change some.
_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_P, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_AXES = _I64 * 3


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Operand(ctypes.Structure):
    """One activation or gradient and what to make of it: the C struct of the same name in native.cpp."""

    # ctypes lays the fields out as C does, so their order and widths must be those of native.cpp.
    _fields_ = [
        *_fields(_P, "x row_start"),
        *_fields(_I64, "images L Wp C groups fold_images fold_L"),
        *_fields(_P, "row_dq row_codes row_scale row_records col_dq col_codes col_scale col_records amax observed"),
        *_fields(_I64, "seed"),
        *_fields(_I32, "rht stochastic in_bf16 out_bf16 threads want_row want_col error"),
        *_fields(_F32, "e4m3_max"),
    ]


class Kernel(ctypes.Structure):
    """A packed weight and the panels to make of it: the C struct of the same name in integer.cpp, in the same order."""

    _fields_ = [
        *_fields(_P, "codes scale panels"),
        *_fields(_I64, "groups T axis0 axis1"),
        *_fields(_I32, "from_axis1 tiles columnwise threads"),
    ]


class Data(ctypes.Structure):
    """One fprop or dgrad: the C struct of the same name in integer.cpp, in the same order."""

    _fields_ = [
        *_fields(_P, "x panels alpha bias y"),
        *_fields(_I64, "batch groups in_blocks out_channels"),
        *_fields(_AXES, "in_size out_size taps stride padding dilation"),
        *_fields(_I32, "to_b out_bf16 threads"),
    ]


class WeightGradient(ctypes.Structure):
    """One wgrad: the C struct of the same name in integer.cpp, in the same order."""

    _fields_ = [
        *_fields(_P, "records codes scale alpha dw"),
        *_fields(_I64, "n16 groups record_channels panel_channels"),
        *_fields(_AXES, "a b taps stride padding dilation"),
        *_fields(_I32, "records_on_b out_bf16 threads"),
    ]


class Weight(ctypes.Structure):
    """One weight with 16x16 blocks: the C struct of the same name in native.cpp, in the same order."""

    _fields_ = [
        *_fields(_P, "w"),
        *_fields(_I64, "groups Og Cg T stride_o stride_c stride_t"),
        *_fields(_P, "dq codes scale amax"),
        *_fields(_I32, "in_bf16 out_bf16 threads error"),
        *_fields(_F32, "e4m3_max"),
    ]


def compiler() -> str | None:
    """Return the C++ compiler command to use (that of `CXX`, else g++, clang++ or c++), or None if there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        words = shlex.split(name) if name else []
        if words and (found := shutil.which(words[0])):  # CXX may hold options, too: "ccache g++"
            return shlex.join([found, *words[1:]])
    return None


def _cpu_features() -> str:
    # -march=native builds for this CPU: in a home folder shared by several machines each needs its build.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


# Compiler flags by the name that integer.cpp gives its loop; "native" is whichever is best for this processor.
MACHINES = {
    "native": ["-march=native", "-mprefer-vector-width=512"],
    "avx512_vnni": ["-march=icelake-server", "-mprefer-vector-width=512"],
    "avx_vnni": ["-march=x86-64-v3", "-mavxvnni"],
    "avx2": ["-march=x86-64-v3"],
    "neon_dotprod": ["-march=armv8.2-a+dotprod"],
    "plain": [],
}


def _tuning() -> list[str]:
    name = os.environ.get("TE_NVFP4_CV_MACHINE", "native")
    if name not in MACHINES:
        raise value_error(
            "te_nvfp4_cv: unknown machine.",
            got=f"TE_NVFP4_CV_MACHINE={name!r}",
            needs=f"one of {', '.join(MACHINES)}",
            fix="unset it",
        )
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return MACHINES[name] if x86 or name != "native" else ["-mcpu=native"]


def _attempts() -> list[list[str]]:
    """Return sets of flags, the best first: a compiler without OpenMP or -march=native still builds working kernels."""
    return [_FLAGS + _tuning() + ["-fopenmp"], _FLAGS + _tuning(), _FLAGS]


def _build(cxx: str) -> Path:
    command = shlex.split(cxx)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    source = "\0".join(path.read_text() for path in (*_SOURCES, _HEADER))
    key = hashlib.sha256("\0".join([source, cxx, version, _cpu_features(), str(_attempts())]).encode()).hexdigest()[:20]
    target = cache_folder() / f"native_{key}.so"
    # Files are complete when they get this name, so another process may have built it meanwhile.
    if target.exists():
        return target
    # A warning, not an info: without any logging set up Python shows only these, and a pause of seconds needs a reason.
    _log.warning("te_nvfp4_cv: compiling the CPU kernels (once per machine, some seconds) ...")
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    error = ""
    try:
        for flags in _attempts():
            run = subprocess.run([*command, *flags, *map(str, _SOURCES), "-o", temporary], capture_output=True, text=True)
            if run.returncode == 0:
                os.replace(temporary, target)
                return target
            error = run.stderr
    finally:
        Path(temporary).unlink(missing_ok=True)
    raise OSError(f"{cxx} could not build the CPU kernels: {error.strip()[-800:]}")


@functools.lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """Return the compiled kernels, which the first call builds, or None if they are off or cannot be built."""
    if os.environ.get("TE_NVFP4_CV_NATIVE", "1") == "0":
        return None
    cxx = compiler()
    if cxx is None:
        warn_once(
            "native",
            "te_nvfp4_cv found no C++ compiler (g++, clang++ or CXX): NVFP4 quantization on the CPU runs in "
            "plain torch, with the same bits but about 50 times slower. Install g++ to change that.",
        )
        return None
    try:
        library = ctypes.CDLL(str(_build(cxx)))
    except (OSError, subprocess.SubprocessError) as error:
        warn_once(
            "native",
            f"te_nvfp4_cv could not build its CPU kernels, plain torch quantizes instead (same bits, slower): {error}",
        )
        return None
    # Without argtypes ctypes would pass 64-bit sizes as C ints.
    records = ("amax", "quantize", "quantize_weight", "unpack_weight", "expand_weight", "data_product", "weight_product")
    for name in (f"nvfp4_{record}" for record in records):
        getattr(library, name).argtypes, getattr(library, name).restype = [_P], None
    library.nvfp4_unpack_columns.argtypes = [_P, _P, _P, _I64, _I64, _I32, _I32]
    library.nvfp4_unpack_rows.argtypes = [_P, _P, _P, _I64, _I64, _I32, _I32]
    library.nvfp4_expand_records.argtypes = [_P, _P, _P, _I64, _I32]
    library.nvfp4_machine.restype = ctypes.c_char_p
    library.nvfp4_scale_bias.argtypes = [_P, _P, _I64, _I64, _F32, _P, _I32, _I32, _I32]
    library.nvfp4_positive_mask.argtypes = [_P, _P, _I64, _I32, _I32]
    library.nvfp4_apply_mask.argtypes = [_P, _P, _P, _I64, _I32, _I32]
    return library


def available(device: torch.device) -> bool:
    """Return True if the compiled kernels can run on tensors of this device."""
    return device.type == "cpu" and load() is not None
