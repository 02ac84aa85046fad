"""Launches that go past Triton's look at their arguments: the kernels are those that Triton would have chosen.

A process that interprets cannot compile, so a script runs in one that does not, with a driver that only names a GPU and
kernels that remember what they were launched with in place of compiled ones.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, torch, triton
from te_nvfp4_cv.ops.triton import ahead, elementwise, launching
from triton.runtime import driver, jit

compiled, launched, relu = [], [], elementwise.relu_mask_kernel

class Kernel:
    def __init__(self, key):
        self.key = key
    def __getitem__(self, grid):
        return lambda *values: launched.append((self.key, grid, values))
    def launch_metadata(self, *_):
        return None
    function, packed_metadata = 0, ()
    def run(self, *values):
        launched.append((self.key, values[:3], values[9:]))

def compile_one(self, key, signature, device, constants, options, attrs, warmup):
    compiled.append(key)
    made = self.device_caches[device][0][key] = Kernel(key)
    return made

jit.JITFunction._do_compile = compile_one
driver.set_active(ahead._Driver(90))
looks = []
run = jit.JITFunction.run
jit.JITFunction.run = lambda self, *a, **k: looks.append(self.__name__) or run(self, *a, **k)
whole, mask = torch.zeros(4096 + 8), torch.zeros(1024, dtype=torch.uint8)
x, odd, half = whole[:4096], whole[1:4097], torch.zeros(4096, dtype=torch.bfloat16)

def go(x, n=4096, write=True):
    launching.start(elementwise.relu_mask_kernel, (3,), x, x, mask, n, WRITE=write, BLOCK=4096)
    return launched[-1]

# An option of its own that Triton 3.9 adds to each launch.
more = {name: False for name in ("fpsan_homomorphic_casts",) if hasattr(triton.knobs.compilation, name)}
found = {}
for name, arguments in {
    "first": (x,), "again": (x,), "more": (x, 4112), "odd number": (x, 4097), "one": (x, 1), "odd address": (odd,),
    "dtype": (half,), "constant": (x, 4096, False), "wide": (x, 2**31), "last": (x, 4112),
}.items():
    before = len(looks)
    key, grid, values = go(*arguments)
    pointers = [v if isinstance(v, int) else v.data_ptr() for v in values[:3]]
    # What Triton would choose, and the arguments that it would pass.
    binder = elementwise.relu_mask_kernel.device_caches[0][4]
    every = (arguments[0], arguments[0], mask, *(arguments[1:2] or (4096,)))
    write = arguments[2] if len(arguments) > 2 else True
    _, kinds, options = binder(*every, WRITE=write, BLOCK=4096, debug=False, instrumentation_mode="", **more)
    chosen = jit.compute_cache_key(elementwise.relu_mask_kernel.device_caches[0][1], kinds, options)
    found[name] = [
        key == chosen, grid == (3, 1, 1), pointers == [t.data_ptr() for t in every[:3]],
        list(values[3:]) == [every[3], write, 4096], len(looks) - before, len(compiled),
    ]
bound, pairs = launching.Bound(relu, (3,), (4096,), dict(WRITE=True, BLOCK=4096), ((2, torch.uint8),)), []
for given in (x, odd, x, odd):
    before = len(looks)
    bound(given, given, mask.view(torch.int32))  # the kernel reads bytes
    pairs.append([launched[-1], launched[go(given) and -1], len(looks) - before])
launching.MOST = 1
go(x, 4128)
print(json.dumps([found, len(launching._known), pairs]))
"""


def test_the_first_compilations_are_told(monkeypatch, caplog):
    from te_nvfp4_cv.ops.triton import launching

    now = [0.0]
    monkeypatch.setattr(launching, "_compilations", launching.Compilations(lambda: now[0]))
    with caplog.at_level(logging.WARNING, "te_nvfp4_cv"):
        for seconds in (0.001, 2.0, 0.01, 3.0, 6.0, 0.5, 9.0):  # short ones come from Triton's cache
            now[0] += seconds
            launching._compilations.add(seconds)
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(" (")[0] for text in told] == [
        f"te_nvfp4_cv: compiling GPU kernels, {n} so far in {s} s" for n, s in ((1, 2), (5, 20))
    ]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_a_view_of_the_last_bytes_has_an_address(dtype):
    """An empty one has none, and the kernel would read at 0."""
    from te_nvfp4_cv.ops.triton import launching

    before, size = torch.zeros(3), dtype.itemsize
    for whole in (size, size + 1, 3 * size, 16 + size):  # bytes of the owner; the view begins at its last element
        owner, begin = torch.zeros(whole, dtype=torch.uint8), (whole // size - 1) * size
        view = launching._view(owner.data_ptr() + begin, dtype, (before, owner))
        assert view.data_ptr() == owner.data_ptr() + begin and view.dtype == dtype and view.numel() == 1
    assert not launching._view(0, dtype, (owner,)).numel()  # what the kernel does not read


def test_known_kernels_are_those_that_triton_chooses():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found, kept, pairs = json.loads(result.stdout)
    for name, (same, grid, pointers, numbers, *_) in found.items():
        assert same and grid and pointers and numbers, name
    looks = {name: row[4] for name, row in found.items()}
    assert looks == dict.fromkeys(found, 1) | {"again": 0, "last": 0}  # Triton looked at all others
    # A multiple of 16 shares its kernel; another number, 1, an address, a dtype, a constant, 64 bits each have one.
    assert [row[5] for row in found.values()] == [1, 1, 1, 2, 3, 4, 5, 6, 7, 7]
    assert kept == 1
    # A launch that is put together once chooses by the addresses, too, and Triton looks at nothing.
    assert all(by_bound == by_start and not looked for by_bound, by_start, looked in pairs)
    assert pairs[0][0] == pairs[2][0] != pairs[1][0] == pairs[3][0]
