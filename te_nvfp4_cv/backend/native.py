"""Load the compiled CPU kernels through ctypes: those of a wheel, or those that the user's compiler makes here, once.

A wheel (`make wheel`) brings one shared object per instruction set; the best that the processor can run is loaded. A
source install compiles at first use, with g++, clang++ or what `CXX` names, into the folder of cache.py. That file's
name is a digest of source, flags, compiler and CPU, so that different machines can share the folder.
Without either `load()` returns None and warns once; the vendor backend then quantizes with plain torch, which gives
the same bits and is slower. `TE_NVFP4_CV_NATIVE=0` switches the kernels off.

The kernels use the instructions of the machine's processor. `TE_NVFP4_CV_MACHINE` takes those for another one of
MACHINES that this processor can run, which is how tests and benchmarks compare them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
import subprocess
import threading
from pathlib import Path

import torch

from te_nvfp4_cv.backend import compilation
from te_nvfp4_cv.backend.compilation import MACHINES, WHEEL_MACHINES, compiler, wheel_object
from te_nvfp4_cv.errors import value_error, warn_once

_building = threading.Lock()
_log = logging.getLogger("te_nvfp4_cv")
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
        *_fields(_I32, "each_once"),
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


def _machine() -> str:
    name = os.environ.get("TE_NVFP4_CV_MACHINE", "native")
    if name not in MACHINES:
        raise value_error(
            "te_nvfp4_cv: unknown machine.",
            got=f"TE_NVFP4_CV_MACHINE={name!r}",
            needs=f"one of {', '.join(MACHINES)}",
            fix="unset it",
        )
    return name


# ---- the kernels of a wheel -----------------------------------------------------------------------------------------


def _in_wheel() -> Path | None:
    """Return the best shared object beside this file that the processor can run, or None after a source install."""
    name, has = _machine(), set(compilation.features().split())
    for machine, needs in WHEEL_MACHINES.items():
        chosen = needs <= has if name == "native" else name == machine
        if chosen and (path := wheel_object(machine)).exists():
            return path
    return None


def _share_openmp() -> None:
    """Let a wheel's kernels find the OpenMP runtime that torch has loaded.

    torch's wheels bring a libgomp, some under a name of their own. Kernels that named libgomp.so.1 would then load a
    second runtime, whose threads compete with torch's for the cores, or would fail on a system without one. So they
    name none. Their calls bind to whatever the process has made visible to all: the runtime of torch, which may also
    be Intel's or LLVM's, because these have the functions of libgomp.
    """
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = [path for path in mapped if re.match(r"lib(gomp|iomp5|omp)[-.]", Path(path).name)]
    # Other packages bring copies, too.
    for path in sorted(runtimes, key=lambda path: not Path(path).is_relative_to(Path(torch.__file__).parent))[:1]:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


# ---- the kernels that are compiled here -----------------------------------------------------------------------------


def _build(cxx: str) -> Path:
    target = compilation.cached(cxx, _machine())
    with _building:  # a second thread waits, and finds what the first has built
        if target.exists():
            return target
        # A warning, not an info: without logging set up Python shows only these, and a pause of seconds needs a reason.
        _log.warning("te_nvfp4_cv: compiling the CPU kernels (once per machine, some seconds) ...")
        compilation.compile_here(cxx, _machine(), target)
    return target


# ---- either ---------------------------------------------------------------------------------------------------------


def name(library: ctypes.CDLL) -> str:
    """Return a name for the kernels on this processor: one of a wheel serves many, and each checks it for itself."""
    return f"{Path(library._name).stem}_{compilation.digest(compilation.features())}"


@functools.lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """Return the compiled kernels, which the first call builds, or None if they are off or cannot be built."""
    if os.environ.get("TE_NVFP4_CV_NATIVE", "1") == "0":
        return None
    path, cxx = _in_wheel(), compiler()
    try:
        if path is not None:
            _share_openmp()
        elif cxx is not None:
            path = _build(cxx)
        else:
            warn_once(
                "native",
                "te_nvfp4_cv found no C++ compiler (g++, clang++ or CXX): NVFP4 quantization on the CPU runs in "
                "plain torch, with the same bits but about 50 times slower. Install g++ to change that.",
            )
            return None
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        warn_once(
            "native",
            "te_nvfp4_cv could not build or load its CPU kernels, plain torch quantizes instead (same bits, slower): "
            f"{error}",
        )
        return None
    # Without argtypes ctypes would pass 64-bit sizes as C ints.
    of_records = "amax quantize quantize_weight unpack_weight expand_weight data_product weight_product"
    for name in of_records.split():
        function = getattr(library, f"nvfp4_{name}")
        function.argtypes, function.restype = [_P], None
    library.nvfp4_unpack_columns.argtypes = [_P, _P, _P, _I64, _I64, _I32, _I32]
    library.nvfp4_unpack_rows.argtypes = [_P, _P, _P, _I64, _I64, _I32, _I32]
    library.nvfp4_expand_records.argtypes = [_P, _P, _P, _I64, _I32]
    for name in "quantize quantize_weight unpack_weight expand_weight weight_product".split():
        function = getattr(library, f"format_{name}")
        function.argtypes, function.restype = [_P, _I32 if name.startswith("quantize") else _P], None
    library.format_unpack_columns.argtypes = [_P, _P, _P, _I64, _I64, _I32, _I32, _P]
    library.format_unpack_rows.argtypes = [_P, _P, _P, _I64, _I64, _I32, _I32, _P]
    library.format_expand_records.argtypes = [_P, _P, _P, _I64, _I32, _P]
    library.nvfp4_machine.restype = ctypes.c_char_p
    library.nvfp4_scale_bias.argtypes = [_P, _P, _I64, _I64, _F32, _P, _I32, _I32, _I32]
    library.nvfp4_positive_mask.argtypes = [_P, _P, _I64, _I32, _I32]
    library.nvfp4_apply_mask.argtypes = [_P, _P, _P, _I64, _I32, _I32]
    library.nvfp4_digest.argtypes = [_P, _I64, _P, _I32]
    return library


def of_wheel(library: ctypes.CDLL) -> bool:
    """Return True if the loaded kernels came with a wheel, False if they were compiled here."""
    return Path(library._name).parent == Path(__file__).parent


def digest(t: torch.Tensor) -> bytes:
    """Return 128 bits that depend on every byte of a dense CPU tensor; only with compiled kernels.

    Equal digests of equally long tensors mean equal bytes, but for one chance in 2^64 or less. It does not withstand
    someone who searches for two tensors with one digest.
    """
    library, found = load(), (ctypes.c_uint64 * 2)()
    assert library is not None
    library.nvfp4_digest(t.data_ptr(), t.numel() * t.element_size(), found, torch.get_num_threads())
    return bytes(found)


def available(device: torch.device) -> bool:
    """Return True if the compiled kernels can run on tensors of this device."""
    return device.type == "cpu" and load() is not None
