"""The CPU kernels in processes of their own: other machines' instructions, forbidden pages, sanitizers.

Every process runs random layers (tests/integer_products.py) and compares all tensors with the reference in bits.
A read or write beside a tensor ends it. So does every mistake that AddressSanitizer or UndefinedBehaviorSanitizer sees
in the C++; what the kernels hold inside of themselves only these see, and vector loads beyond a tensor only the pages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from te_nvfp4_cv.backend import compilation, native
from te_nvfp4_cv.backend.compilation import cache_folder
from tests.guard_pages import SIDES
from tests.helpers import seeds

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {**compilation.WHEEL_MACHINES, "neon_dotprod": {"asimddp"}}  # what /proc/cpuinfo must list
FEW = ("avx2",)  # the machine in make test besides this one: each takes a compilation
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [
    pytest.mark.skipif(native.load() is None, reason="no compiled kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mprotect, LD_PRELOAD, /proc"),
]


def skip_without(machine: str) -> None:
    """Skip a test whose kernels this processor cannot run."""
    missing = set(NEEDS[machine]) - set(compilation.features().split())
    if missing:
        pytest.skip(f"this processor cannot run {machine}: no {', '.join(sorted(missing))}")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run random layers in a process of their own."""
    command = [sys.executable, "-m", "tests.integer_products", *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=500)


def assert_equal(done: subprocess.CompletedProcess[str], machine: str | None = None) -> None:
    """Check that a run found equal tensors, on this machine's kernels."""
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    count, rest = done.stdout.split(" ", 1)
    assert int(count) > 0 and rest.startswith("tensors equal on ")
    assert machine is None or rest.split()[-1] == machine


def test_every_machine_has_its_needs():
    assert set(NEEDS) == set(compilation.MACHINES) - {"native"}


@pytest.mark.slow
@pytest.mark.parametrize("machine", seeds(FEW, NEEDS))
def test_every_machines_kernels_have_the_references_bits(machine):
    skip_without(machine)
    # One of its tensors begins or ends at a forbidden page: other instructions load other bytes.
    done = run("--count", "8", "--threads", "2", "--guard", *SIDES, TE_NVFP4_CV_MACHINE=machine)
    assert_equal(done, machine)


@pytest.mark.parametrize("seed", seeds([1], range(12)))
def test_nothing_beside_a_tensor_is_touched(seed):
    count = 12 if seed == 1 else 60
    assert_equal(run("--count", str(count), "--threads", "1", "--guard", *SIDES, "--seed", str(seed)))


@pytest.mark.parametrize("side", SIDES)
def test_a_read_beside_a_tensor_ends_the_process(side):
    done = run("--count", "0", "--guard", side, "--fault")
    assert "tensors equal" in done.stdout and done.returncode in (-11, -7)  # SIGSEGV, SIGBUS


# ---- sanitizers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A function: the flags of a machine -> a build of the kernels with sanitizers, and what a process of it needs."""
    cxx = compilation.compiler()

    def build(flags: list[str]) -> tuple[Path, dict[str, str]]:
        preloaded = []
        for name in ("libasan.so", "libubsan.so"):
            found = subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
            if not Path(found).is_absolute():  # the compiler gives the name back where it has no such library
                pytest.skip(f"{cxx} has no {name}")
            preloaded.append(found)
        target = tmp_path_factory.mktemp("sanitized") / "kernels.so"
        # Without optimization: vector code would hide single accesses, and take four times as long to compile.
        command = [cxx, "-std=c++17", "-O0", "-ffp-contract=off", "-shared", "-fPIC", "-fopenmp", *SANITIZERS, *flags]
        command += [*map(str, compilation.SOURCES), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{cxx} cannot build with sanitizers: {done.stderr[-300:]}")
        # Python itself never gives back all of its memory. The cache folder is this process's, so nothing is built.
        options = {"ASAN_OPTIONS": "detect_leaks=0", "TE_NVFP4_CV_CACHE": str(cache_folder())}
        return target, options | {"LD_PRELOAD": " ".join(preloaded)}

    return build


@pytest.mark.slow
@pytest.mark.parametrize("machine", seeds(["plain"], ["plain", "avx2"]))
def test_sanitizers_find_nothing(sanitized, machine):
    skip_without(machine)
    library, environment = sanitized(compilation.MACHINES[machine])
    count = "4" if machine == "plain" else "40"
    done = run("--library", str(library), "--count", count, "--threads", "2", "--fault", **environment)
    # The fault at its end, and nothing before it, ends the process.
    assert f"tensors equal on {machine}" in done.stdout and not done.stdout.startswith("0 "), done.stderr[-4000:]
    assert done.returncode not in (0, -11) and "heap-buffer-overflow" in done.stderr, "the fault was not found"
