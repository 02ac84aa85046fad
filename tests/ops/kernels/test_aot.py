"""Every kernel compiles for the GPUs that it is meant for, to the instructions, registers and memory asked for.

The compiler and the interpreter cannot share a process: each group of cases is compiled in one of its own. The harness
is tested on planted failures.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Set
from typing import Any

import pytest

from tests import aot

pytest.importorskip("triton", reason="triton is not installed")


def check(rows: list[dict[str, Any]], without: Set[str] = frozenset()) -> None:
    wanted = {f"{case['group']}.{case['name']}" for case in aot.cases()}
    assert wanted > aot.REPRESENTATIVES | aot.ONLY_STRESS, "a name that no case has"
    assert {row["case"] for row in rows} == wanted - without
    failed = [aot._line(row) for row in rows if row["problems"]]
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_case_compiles_to_what_it_expects():
    """For the GPUs of `aot.tested`. All groups in one process: each of its workers imports torch and Triton once."""
    check(aot.report("--tested"), aot.ONLY_STRESS)


@pytest.mark.stress
@pytest.mark.timeout(3000)
def test_every_case_compiles_for_every_architecture():
    check(aot.report())


LAUNCHED = {
    "few": {"prepare_kernel", "data_product", "weight_product", "sum_parts", "packed_product"},
    "quantize": {"quantize_kernel", "quantize_blocks_kernel", "quantize_tiles_kernel", "amax_flat_kernel"},
    "steps": {
        "quantize_kernel",
        "data_product",
        "weight_product",
        "produce_kernel",
        "apply_kernel",
        "quantize_and_measure_kernel",
        "scale_bias_kernel",
        "grouped_product",
        "grouped_weight",
        "grouped_sums",
    },
}


def dry_launch(arch: int, *words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may interpret, and an interpreting process cannot compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.dry_launch", str(arch), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=aot.ROOT, env=environment)


def check_launches(arch: int, *words: str) -> None:
    result = dry_launch(arch, *words)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    launched = {line.split()[0] for line in result.stdout.splitlines()}
    assert set.union(*(LAUNCHED[word] for word in words if word in LAUNCHED)) <= launched


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "words"), [(90, ["few", "quantize", "steps"]), (100, ["few"])], ids=str)
def test_every_launch_passes_the_front_end(arch, words):
    """Argument types, alignment and constants as real layers give them, axes of one element too; both backends, fused
    and not. What follows Triton's front end is the matter of the cases above.
    """
    check_launches(arch, *words, "--front")


@pytest.mark.stress
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("arch", "word"), [(90, "few"), (100, "few"), (90, "quantize"), (90, "steps")])
def test_every_launch_compiles(arch, word):
    check_launches(arch, word)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delayed", "fused"])
def test_a_step_launches_no_more_kernels_than_it_may(name):
    """A ResNet-50 step: launches, specializations that would compile, torch's operators between them."""
    result = dry_launch(90, "count", name)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert len(re.findall(rf"{name}: \d+ [a-z' ]+, at most \d+", result.stdout)) == 3


@pytest.mark.slow
def test_a_layer_makes_no_more_python_calls_than_it_may():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.dry_launch", "90", "host"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=aot.ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert len(re.findall(r": \d+ calls a layer, at most \d+; \d+ micro", result.stdout)) == 8


PLANTED = {
    "missing": (dict(expect=["wgmma"]), "not found: wgmma"),
    "forbidden": (dict(expect=[r"!st\.global"]), "found: st"),
    "budget": (dict(instructions_per_element=(4096, 0.1)), "instructions per element, budget 0.1"),
    "compile": (dict(constexprs=dict(WRITE=True, BLOCK=4095)), "CompilationError"),
    "spills": (dict(options=dict(num_warps=1, maxnreg=24)), "bytes of stack a thread"),
}


def test_planted_failures_are_found():
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "from tests import aot\n"
        "case = next(case for case in aot.cases('pointwise.relu_mask'))\n"
        f"for change in {[{}, *(change for change, _ in PLANTED.values())]!r}:\n"
        "    print(aot.run_case({**case, **change}, 90)['problems'])\n"
        "import triton\n"
        "from tests import dry_launch\n"
        "triton.compile = dry_launch.front_end\n"
        f"print(aot.run_case({{**case, **{PLANTED['compile'][0]!r}}}, 90)['problems'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=aot.ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    sound, *broken, in_front = result.stdout.strip().splitlines()
    assert sound == "[]"
    for (name, (_, told)), problems in zip(PLANTED.items(), broken, strict=True):
        assert told in problems, name
    assert PLANTED["compile"][1] in in_front
