"""The CPU kernels compiled for aarch64 and executed under qemu-user: quantization and all products, bit for bit.

The library's own calls run: in place of the loaded kernels stands an object that writes what a call points to into a
file and has kernel_driver.cpp run the function on it. The same driver is also built for this machine, so that a fault
of the driver is not taken for one of the kernels. Needs (Debian) g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import ctypes
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from te_nvfp4_cv.backend import compilation, native
from te_nvfp4_cv.ops.conv import operators
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import NONE, PACKED, RECORDS, OperandSpec, WeightSpec
from tests.helpers import make_geometry, same_bits, same_codes, seeds, values

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DRIVER = Path(__file__).with_name("kernel_driver.cpp")
# By the name that the kernels must give their loop: the compiler, its flags, and what runs the program.
MACHINES = {
    "here": (compilation.compiler(), compilation.MACHINES["native"], []),
    "neon_dotprod": (CROSS, compilation.MACHINES["neon_dotprod"], [EMULATOR, "-cpu", "max"]),
    # A processor without dot products.
    "plain": (CROSS, compilation.MACHINES["plain"], [EMULATOR, "-cpu", "cortex-a57"]),
}
GEOMETRIES = {
    "3x3": make_geometry(2, (20, 33), (7, 9), 3, padding=1),
    "3x3 of stride 2": make_geometry(16, (32, 48), (8, 11), 3, stride=2, padding=1),
    "1x1": make_geometry(3, (48, 16), (5, 6), 1),
    "1x1 of stride 2": make_geometry(17, (16, 40), (6, 5), 1, stride=2),
    "dilated, in groups": make_geometry(2, (64, 40), (9, 8), 3, padding=2, dilation=2, groups=2),
    "transposed": make_geometry(2, (32, 37), (4, 5), 3, stride=2, padding=1, output_padding=1, transposed=True),
    "1-D": make_geometry(5, (17, 32), (24,), 5, stride=3, padding=2),
    "3-D": make_geometry(1, (16, 32), (4, 5, 6), (3, 1, 3), padding=(1, 0, 1)),
    "linear": make_geometry(50, (96, 33), ()),
}
pytestmark = pytest.mark.slow


class Records(ctypes.Structure):
    """The arguments of nvfp4_expand_records as a record, which the driver takes apart again."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scale", "records")]
    _fields_ += [(name, ctypes.c_int64) for name in ("blocks", "threads")]


class Driver:
    """Kernels in another program, called as the loaded library is."""

    def __init__(self, command: list[str], folder: Path, storages: dict[int, torch.UntypedStorage]) -> None:
        self.command, self.folder, self.storages = command, folder, storages

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("nvfp4_"):
            raise AttributeError(name)
        if name == "nvfp4_expand_records":
            return lambda *arguments: self._call(name, Records(*arguments))
        return lambda reference: self._call(name, reference._obj)

    def _call(self, name: str, record: ctypes.Structure) -> None:
        used: list[int] = []  # the first addresses of the storages that the record points into
        pointers: list[tuple[int, int, int]] = []
        for field, kind, *_ in record._fields_:
            address = getattr(record, field) if kind is ctypes.c_void_p else None
            if not address:
                continue
            (base,) = [b for b, storage in self.storages.items() if b <= address < b + storage.nbytes()]
            if base not in used:
                used.append(base)
            pointers.append((getattr(type(record), field).offset, used.index(base), address - base))
        sizes = [self.storages[base].nbytes() for base in used]
        parts = [struct.pack("<q", len(used))]
        for base, size in zip(used, sizes, strict=True):
            parts += [struct.pack("<q", size), ctypes.string_at(base, size)]
        parts += [struct.pack("<q", ctypes.sizeof(record)), bytes(record), struct.pack("<q", len(pointers))]
        parts += [struct.pack("<qqq", *pointer) for pointer in pointers]
        given, made = self.folder / "given", self.folder / "made"
        given.write_bytes(b"".join(parts))
        done = subprocess.run([*self.command, name, given, made], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        result = made.read_bytes()
        assert len(result) == sum(sizes)
        for base, size in zip(used, sizes, strict=True):
            ctypes.memmove(base, result[:size], size)
            result = result[size:]


# Loops without vector instructions are the same code here (test_integer_memory.py), and this machine's are asked when a
# fault may be the driver's: each takes a compilation of half a minute.
@pytest.fixture(scope="module", params=seeds(["neon_dotprod"], MACHINES))
def program(request, tmp_path_factory) -> list[str]:
    """Build the driver with the kernels for one machine and return the command that runs it."""
    machine = request.param
    cxx, flags, runner = MACHINES[machine]
    words = shlex.split(cxx or "")
    if not words or shutil.which(words[0]) is None:
        pytest.skip("needs a C++ compiler" if machine == "here" else f"needs {CROSS}")
    if runner and shutil.which(EMULATOR) is None:
        pytest.skip(f"needs {EMULATOR}, of Debian's package qemu-user")
    target = tmp_path_factory.mktemp("driver") / machine
    more = [*compilation.FLAGS, "-fopenmp"]
    more += ["-static"] if runner else []  # the emulator then needs no libraries of the other machine
    build = [*words, *more, *flags, *map(str, compilation.SOURCES), str(DRIVER), "-o", str(target)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    command = [*runner, str(target)]
    said = subprocess.run([*command, "machine"], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and (machine == "here" or said.stdout.strip() == machine), said
    return command


@pytest.fixture
def other(program, tmp_path, monkeypatch) -> Driver:
    """Put the other program in the place of the loaded kernels."""
    storages: dict[int, torch.UntypedStorage] = {}
    address_of = Tensor.data_ptr

    def remembered(tensor: Tensor) -> int:
        # The kernels get addresses alone. The storages are held, so that none of them is reused for another one.
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return address_of(tensor)

    monkeypatch.setattr(Tensor, "data_ptr", remembered)
    driver = Driver(program, tmp_path, storages)
    monkeypatch.setattr(native, "load", lambda: driver)
    return driver


def specs(g: ConvGeometry, form: int) -> tuple[OperandSpec, OperandSpec]:
    """Return the specs of x and of dy: `form` is that of operands that live for one call."""
    folds = g.folds[::-1] if g.transposed else g.folds
    return (
        OperandSpec(g.groups, folds[0], form, PACKED, rht=True, four_over_six="MAE"),
        OperandSpec(g.groups, folds[1], form, form, rht=True, stochastic=True),
    )


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_another_machine_gives_the_same_bits(other, one_thread, name):
    g = GEOMETRIES[name]
    two_d = bool(g.groups > 1 or g.batch % 2)  # the kernels quantize 1x16 weights of one group
    dtype = torch.bfloat16 if g.batch == 3 else torch.float32
    threads = 1 + g.batch % 2
    made: dict[str, dict[str, Any]] = {}
    torch.set_num_threads(threads)
    for backend, form in (("reference", PACKED), ("integer", RECORDS)):
        x_spec, dy_spec = specs(g, form)
        seed, alpha = torch.tensor([12345]), torch.tensor([0.37])
        bias = values((g.y_shape[-1],), seed=4) if g.groups == 1 else None
        x = operand.quantize_operand(values(g.x_shape, dtype=dtype, seed=1), x_spec, torch.float32, None, None, backend)
        dy = values(g.y_shape, "nan" if name == "linear" else "wide", seed=2)
        dy = operand.quantize_operand(dy, dy_spec, torch.float32, seed, None, backend)
        axis0, _, axis1 = g.weight_shape
        w_spec = WeightSpec(g.groups, PACKED, NONE if two_d else PACKED, two_d)
        w = values((axis0, axis1, *g.kernel), seed=3)
        w = operand.quantize_weight(w, w_spec, torch.float32, backend)
        forth, back = ("row", "row") if two_d else (("col", "row") if g.transposed else ("row", "col"))
        made[backend] = {
            "x": x.col,
            "w": w,
            "y": operators.conv_fprop(x.row, w.face(forth), alpha, bias, g, dtype, backend),
            "dx": operators.conv_dgrad(dy.row, w.face(back), alpha, g, dtype, backend),
            "dw": operators.conv_wgrad(dy.col, x.col, alpha, g, torch.float32, backend),
        }
        if form == PACKED:
            # Saved codes become records again in a backward that needs them.
            made[backend]["y of codes"] = made[backend]["y"]
            saved = x.row
        else:
            made[backend]["y of codes"] = operators.conv_fprop(saved, w.face(forth), alpha, bias, g, dtype, backend)
    expected, got = made["reference"], made["integer"]
    assert same_codes(expected["w"], got["w"])
    assert all(same_bits(a, b) for a, b in zip(expected["x"], got["x"], strict=True))
    for product in ("y", "dx", "dw", "y of codes"):
        assert same_bits(expected[product], got[product]), product
