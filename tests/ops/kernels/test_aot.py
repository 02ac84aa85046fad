"""Every kernel compiles for the GPUs that it is meant for, to the instructions, registers and memory asked for.

The compiler and the interpreter cannot share a process: each group of cases is compiled in one of its own. The harness
is tested on planted failures.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tests import aot

pytest.importorskip("triton", reason="triton is not installed")
GROUPS = sorted({case["group"] for case in aot.cases()})


# An architecture proves that its compiler takes the kernel, and how many instructions and registers it makes of it. The
# products have other instructions on each GPU, so all six. 86 and 89 make of the other kernels what 80 does; what only
# must not spill is compiled for the two architectures of data centres. The rest runs in `make stress`.
ARCHS = {"conv": (), "quantize": (90, 100), "norm": (80, 90, 100), "pointwise": (80, 90, 100, 120), "amaxes": (90,)}
BUDGETED = (80, 120)  # of quantize, besides: the cases with a budget of instructions


def names(group: str, with_key: str = "name") -> set[str]:
    return {f"{case['group']}.{case['name']}" for case in aot.cases(f"{group}.") if with_key in case}


def check(rows: list[dict[str, Any]], wanted: set[str]) -> None:
    assert {row["case"] for row in rows} == wanted
    failed = [aot._line(row) for row in rows if row["problems"]]
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("group", GROUPS)
def test_every_case_compiles_to_what_it_expects(group):
    check(aot.report(only=f"{group}.", archs=ARCHS[group]), names(group))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quantization_keeps_its_budgets_of_instructions():
    check(aot.report(only="quantize.", archs=BUDGETED, budget=True), names("quantize", "instructions_per_element"))


@pytest.mark.stress
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("group", [group for group in GROUPS if ARCHS[group]])
def test_every_case_compiles_for_every_architecture(group):
    check(aot.report(only=f"{group}."), names(group))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_launch_of_training_steps_compiles():
    """Argument types, alignment and constants as real layers give them; on sm_90, both backends, fused and not."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.dry_launch", "90", "steps"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=aot.ROOT, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    launched = {line.split()[0] for line in result.stdout.splitlines()}
    wanted = {
        "quantize_kernel",
        "data_product",
        "weight_product",
        "produce_kernel",
        "apply_kernel",
        "scale_bias_kernel",
    }
    assert wanted <= launched


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delayed", "fused"])
def test_a_step_launches_no_more_kernels_than_it_may(name):
    """A ResNet-50 step: launches, specializations that would compile, torch's operators between them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.dry_launch", "90", "count", name]
    result = subprocess.run(command, capture_output=True, text=True, cwd=aot.ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert len(re.findall(rf"{name}: \d+ [a-z' ]+, at most \d+", result.stdout)) == 3


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
        "    print(aot.run_case({**case, **change}, 90)['problems'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=aot.ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    sound, *broken = result.stdout.strip().splitlines()
    assert sound == "[]"
    for (name, (_, told)), problems in zip(PLANTED.items(), broken, strict=True):
        assert told in problems, name
