"""Every kernel compiles for the GPUs that it is meant for, to the instructions, registers and memory asked for.

The compiler and the interpreter cannot share a process: each group of cases is compiled in one of its own. The harness
is tested on planted failures.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import aot

pytest.importorskip("triton", reason="triton is not installed")
GROUPS = sorted({case["group"] for case in aot.cases()})


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("group", GROUPS)
def test_every_case_compiles_to_what_it_expects(group):
    rows = aot.report(only=f"{group}.")
    assert len(rows) >= 6
    failed = [aot._line(row) for row in rows if row["problems"]]
    assert not failed, "\n".join(failed)


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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(expect=["wgmma"]), "not found: wgmma"),
        (dict(expect=[r"!st\.global"]), "found: st"),
        (dict(instructions_per_element=(4096, 0.1)), "instructions per element, budget 0.1"),
        (dict(constexprs=dict(WRITE=True, BLOCK=4095)), "CompilationError"),
        (dict(options=dict(num_warps=1, maxnreg=24)), "bytes of stack a thread"),
    ],
    ids=["missing", "forbidden", "budget", "compile", "spills"],
)
def test_a_planted_failure_is_found(change, told):
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "from tests import aot\n"
        "case = next(case for case in aot.cases('pointwise.relu_mask'))\n"
        f"print(aot.run_case({{**case, **{change!r}}}, 90)['problems'])\n"
        "print(aot.run_case(case, 90)['problems'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=aot.ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    broken, sound = result.stdout.strip().splitlines()
    assert told in broken and sound == "[]"
