"""The instructions of the integer kernels' inner loop, read from the compiler's assembly for each x86-64 machine.

A compiler that spilled an accumulator to the stack, or did not unroll a loop over rows, would give the same bits and
cost half of the speed; no other test would see it.
"""

from __future__ import annotations

import platform
import re
import shlex
import subprocess

import pytest

from te_nvfp4_cv.backend import compilation

# By machine: the instruction that multiplies, and a register that it must use.
INSTRUCTIONS = {
    "avx512_vnni": (r"vpdpbusd\t.*%zmm", "zmm"),
    "avx_vnni": (r"\{vex\} vpdpbusd\t.*%ymm", "ymm"),
    "avx2": (r"vpmaddubsw\t.*%ymm", "ymm"),
}
ON_STACK = re.compile(r"%[xyz]mm\d+, *-?\d*\(%r[sb]p|-?\d*\(%r[sb]p\S*\), .*%[xyz]mm")
pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or compilation.compiler() is None,
    reason="needs a C++ compiler for x86-64",
)


@pytest.fixture(scope="module", params=list(INSTRUCTIONS))
def loops(request) -> tuple[str, dict[str, list[str]]]:
    """Compile integer.cpp and return the machine, and the lines of each copy of the function multiply by name."""
    flags = [*compilation.FLAGS, *compilation.MACHINES[request.param], "-fopenmp"]
    command = [*shlex.split(compilation.compiler() or ""), *flags, "-S", str(compilation.SOURCES[1]), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and "avxvnni" in done.stderr:
        pytest.skip("this compiler does not know AVX-VNNI")
    assert done.returncode == 0, done.stderr
    functions = re.findall(r"^(\S*8multiply\S*):\n(.*?)^\t\.size\t\1,", done.stdout, re.MULTILINE | re.DOTALL)
    assert functions, "integer.cpp has no function multiply"
    return request.param, {name: [line.strip() for line in body.splitlines()] for name, body in functions}


def innermost(lines: list[str], instruction: str) -> list[str]:
    """Return the lines of the shortest loop that holds the instruction: from a label to a jump back to it."""
    places = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\.?L\w+:", line)}
    jumps = ((at, re.fullmatch(r"j\w+\t(\S+)", line)) for at, line in enumerate(lines))
    found = [lines[places[jump[1]] : at] for at, jump in jumps if jump and places.get(jump[1], at) < at]
    found = [loop for loop in found if any(re.search(instruction, line) for line in loop)]
    assert found, "no loop multiplies"
    return min(found, key=len)


def test_the_inner_loop_holds_the_machines_instruction_for_all_rows(loops):
    machine, functions = loops
    instruction, register = INSTRUCTIONS[machine]
    for name, lines in functions.items():
        loop = innermost(lines, instruction)
        count = sum(bool(re.search(instruction, line)) for line in loop)
        sums = sum(bool(re.search(rf"vfmadd\w+ps\t.*%{register}", line)) for line in loop)
        # A block of 16 products is four instructions, and one fused multiply-add adds it to the accumulator.
        assert sums >= 6 and count == 4 * sums, f"{name}: {count} products, {sums} sums"


def test_no_vector_register_is_spilled(loops):
    for name, lines in loops[1].items():
        spills = [line for line in lines if ON_STACK.search(line)]
        assert not spills, f"{name}: {spills}"
