"""Triton kernels compiled for GPUs that are not here: PTX, SASS, registers, spills and shared memory of each case.

    python -m tests.aot                        table of all cases in tests/ops/kernels/aot_*.py; status 1 on failure
    python -m tests.aot --only quantize --arch 90 --json
    python -m tests.aot --keep FOLDER          leave PTX and SASS there

Works with triton 3.6 to 3.9 without a driver: the wheel brings ptxas, cuobjdump and nvdisasm. One process cannot both
interpret and compile, so tests run this module in a process of its own (`report`), with TRITON_INTERPRET removed.
Instructions per element are counted statically: every SASS instruction of the kernel but NOP and the branch-to-self
that pads its end, divided by the elements that one thread handles; a loop body counts once.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("aot_quantize", "aot_amaxes", "aot_conv", "aot_norm", "aot_pointwise")
ARCHS = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture. `spills`: bytes of stack a thread; `shared`: bytes a block."""

    ptx: str
    sass: str
    registers: int
    spills: int
    shared: int

    @property
    def instructions(self) -> list[str]:
        """The SASS instructions in order, without NOPs and the padding at the end."""
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", self.sass, re.MULTILINE)
        while found and (found[-1].startswith("NOP") or found[-1].startswith("BRA")):
            found.pop()
        return [line for line in found if not line.startswith("NOP")]

    def count(self, pattern: str) -> int:
        """How many SASS instructions match."""
        return sum(bool(re.search(pattern, line)) for line in self.instructions)


def compile_kernel(
    fn: Any, signature: dict[str, str], constexprs: dict[str, Any], arch: int, **options: Any
) -> Compiled:
    """Compile `fn` for sm_`arch`.

    Args:
        signature: Triton type of every argument, "constexpr" for those in constexprs; pointers and the integers named
            in `divisible` (default: every i32 and i64) are promised to be multiples of 16.
        options: num_warps, num_stages, enable_fp_fusion ...; `divisible`: names of arguments.
    Raises:
        RuntimeError: the kernel does not compile, with what the compiler printed.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from te_nvfp4_cv.ops.triton import ahead

    ahead.imagine(arch)  # kernels ask which GPU they are compiled for
    names = fn.arg_names
    default = [name for name, kind in signature.items() if kind.startswith("*") or kind in ("i32", "i64")]
    divisible = options.pop("divisible", default)
    source = ASTSource(
        fn=fn,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    with _Quiet() as quiet:
        try:
            kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        except Exception as error:
            lines = [line for line in quiet.text().splitlines() if "error" in line.lower() or "Assert" in line]
            raise RuntimeError(f"{type(error).__name__}: {str(error)[-600:]} {' | '.join(lines[:4])[:600]}") from error
    cubin = kernel.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _tool("cuobjdump", "-sass", "-res-usage", file.name)
    registers, stack = re.search(r"REG:(\d+)", sass), re.search(r"STACK:(\d+)", sass)
    assert registers is not None and stack is not None, sass
    return Compiled(kernel.asm["ptx"], sass, int(registers[1]), int(stack[1]), int(kernel.metadata.shared))


class _Quiet:
    """What C code prints goes to a file: MLIR and ptxas dump whole modules there."""

    def __enter__(self) -> _Quiet:
        sys.stdout.flush()
        sys.stderr.flush()
        self.file = tempfile.TemporaryFile()
        self.saved = os.dup(1), os.dup(2)
        os.dup2(self.file.fileno(), 1)
        os.dup2(self.file.fileno(), 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self.saved[0], 1)
        os.dup2(self.saved[1], 2)
        os.close(self.saved[0])
        os.close(self.saved[1])
        self.file.close()

    def text(self) -> str:
        self.file.seek(0)
        return self.file.read().decode(errors="replace")


@functools.cache
def _path(name: str) -> Path:
    import triton

    return next(Path(triton.__file__).parent.rglob(f"bin/{name}"))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_path(name)), *arguments], capture_output=True, text=True, check=True).stdout


# ---- cases ----------------------------------------------------------------------------------------------------------


def cases(only: str = "") -> list[dict[str, Any]]:
    """Every case of the modules that exist, each with its module's name in "group"."""
    found = []
    for name in MODULES:
        if (ROOT / "tests" / "ops" / "kernels" / f"{name}.py").is_file():
            module = importlib.import_module(f"tests.ops.kernels.{name}")
            found += [{"group": name.removeprefix("aot_"), **case} for case in module.CASES]
    return [case for case in found if only in f"{case['group']}.{case['name']}"]


# One case of each kernel is compiled on Hopper and on both Blackwells (a product on Ampere, too): what differs there is
# the choice of instructions, and how many there are.
REPRESENTATIVES = {
    "quantize.activation_packed",
    "quantize.gradient_packed",
    "quantize.amax",
    "quantize.unpack_columns",
    "norm.statistics_last",
    "norm.backward_sums_relu_last",
    "norm.apply_batch_add_relu",
    "norm.backward_apply_batch_add_relu",
    "norm.produce_batch_add_relu",
    "norm.produced_amax_batch_add_relu",
    "pointwise.relu_mask",
    "conv.conv_data.3x3.256",
    "conv.conv_data.3x3.256.fp4",
    "conv.conv_weight.3x3.256",
    "conv.gemm.1024",
}
# Another case shows the same choice of the kernel: rows without columns, masks, group norms with channels first.
ONLY_STRESS = {
    "quantize.activation_current",
    "quantize.activation_rows_delayed",
    "quantize.masked",
    "quantize.folded_stochastic",
    "quantize.unaligned_stochastic",
    "norm.backward_sums_silu_first",
    "norm.apply_group_silu_first",
    "norm.backward_apply_group_silu_first",
    "norm.produced_amax_batch_hardswish",
}
# Where instructions and registers are shortest. Of gradients on Blackwell gradient_current shows the choice.
ELSEWHERE = {"quantize.activation_delayed": {90, 100}, "quantize.gradient_delayed": {90}}


def tested(case: dict[str, Any]) -> set[int]:
    """The GPUs for which `make test` compiles a case; `make stress` compiles each for all of its GPUs.

    A case that is not a kernel's representative is compiled for one GPU: norms where registers are short (120), others
    where codes are converted by an instruction (100), products for the first of their GPUs from Hopper on.
    """
    name, archs = f"{case['group']}.{case['name']}", set(case.get("archs", ARCHS))
    if name in ONLY_STRESS:
        return set()
    if name in ELSEWHERE:
        return archs & ELSEWHERE[name]
    if name in REPRESENTATIVES:
        return archs & ({80, 90, 100, 120} if case["group"] == "conv" else {90, 100, 120})
    if case["group"] == "conv":
        return {min(archs & {90, 100, 120})}
    return {120} if case["group"] in ("norm", "pointwise") else {100}


def at_most(registers: int) -> Callable[[Compiled], str | None]:
    """An expectation of run_case."""
    return lambda compiled: None if compiled.registers <= registers else f"{compiled.registers} registers"


def run_case(case: dict[str, Any], arch: int, keep: Path | None = None) -> dict[str, Any]:
    """Compile one case for one architecture and check what it expects.

    Expectations are regular expressions on the PTX or SASS, "!" in front for "must not occur", or functions of Compiled
    that return an error text or None.
    """
    module, kernel = case["fn"]
    options = case["options"](arch) if callable(case.get("options")) else dict(case.get("options", {}))
    constexprs = case["constexprs"](arch) if callable(case["constexprs"]) else case["constexprs"]
    row: dict[str, Any] = {"case": f"{case['group']}.{case['name']}", "arch": arch, "options": options}
    start = time.perf_counter()
    try:
        fn = getattr(importlib.import_module(module), kernel)
        compiled = compile_kernel(fn, case["signature"], constexprs, arch, **options)
    except Exception as error:
        return {**row, "problems": [str(error)[:1500]], "seconds": round(time.perf_counter() - start, 1)}
    problems = [] if not compiled.spills else [f"{compiled.spills} bytes of stack a thread"]
    expect = case.get("expect", [])
    for wanted in expect(arch) if callable(expect) else expect:
        if callable(wanted):
            problem = wanted(compiled)
            problems += [problem] if problem else []
            continue
        absent = wanted.startswith("!")
        if bool(re.search(wanted.removeprefix("!"), compiled.ptx + compiled.sass)) == absent:
            problems.append(f"{'found' if absent else 'not found'}: {wanted.removeprefix('!')}")
    # A tile of 80 is that of 86 and 89 too, which have less memory.
    limit = {80: 99, 86: 99, 89: 99, 120: 99}.get(arch, 227) * 1024
    if compiled.shared > limit:
        problems.append(f"{compiled.shared} bytes of shared memory, {limit} there")
    row |= {
        "registers": compiled.registers,
        "shared": compiled.shared,
        "instructions": len(compiled.instructions),
    }
    if case.get("instructions_per_element"):
        elements, budget = case["instructions_per_element"]
        elements = elements(constexprs) if callable(elements) else elements
        per_element = len(compiled.instructions) * options.get("num_warps", 4) * 32 / elements
        row["per_element"] = round(per_element, 1)
        budget = budget(arch) if callable(budget) else budget
        if per_element > budget:
            problems.append(f"{per_element:.1f} instructions per element, budget {budget}")
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        stem = f"{row['case']}.sm_{arch}"
        (keep / f"{stem}.ptx").write_text(compiled.ptx)
        (keep / f"{stem}.sass").write_text(compiled.sass)
    return {**row, "problems": problems, "seconds": round(time.perf_counter() - start, 1)}


def _run(index: int, arch: int, only: str, keep: Path | None) -> dict[str, Any]:
    """run_case in a process of the pool: cases hold functions, which do not travel."""
    return run_case(cases(only)[index], arch, keep)


def report(*options: str) -> list[dict[str, Any]]:
    """The rows of `python -m tests.aot --json` with these options, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", "tests.aot", "--json", *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.stdout.strip(), result.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def main() -> int:
    """Compile and check; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time and check what comes out")
    parser.add_argument("--only", default="", help="cases whose group.name contains this")
    parser.add_argument("--arch", type=int, nargs="*", default=[], help="80 86 89 90 100 120; all when not given")
    parser.add_argument("--tested", action="store_true", help="only for the GPUs of make test")
    parser.add_argument("--keep", type=Path, help="folder for PTX and SASS")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    rows = []
    wanted = [
        (index, arch)
        for index, case in enumerate(cases(options.only))
        for arch in case.get("archs", ARCHS)
        if not options.arch or arch in options.arch
        if not options.tested or arch in tested(case)
    ]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        for future in [pool.submit(_run, *which, options.only, options.keep) for which in wanted]:
            rows.append(future.result())
            if not options.json:
                print(_line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows))
    elif not rows:
        print("no case matches")
    return int(any(row["problems"] for row in rows) or not rows)


def _line(row: dict[str, Any]) -> str:
    facts = [f"{row['case']:44s} sm_{row['arch']:<4d}"]
    for name, label in (("registers", "reg"), ("shared", "smem"), ("instructions", "sass"), ("per_element", "/elt")):
        facts.append(f"{row.get(name, '-'):>7} {label}")
    return "  ".join(facts) + f"  {row['seconds']:5.1f} s  " + ("; ".join(row["problems"]) or "ok")


if __name__ == "__main__":
    sys.exit(main())
