"""Check that this machine computes what the reference computes: te-nvfp4-cv selftest, under two minutes on a GPU.

Checked are every Triton kernel against the reference on the CPU (codes and scales in bits, stochastic rounding by its
law), the three GEMMs of the backends vendor and triton, norms, a short training run against bf16, and a CUDA graph. On
a machine without a GPU the compiled CPU kernels are checked in the same way, those of the integer backend in bits, and
the report says that no GPU was.

The report is a dict for JSON, made to be shared: it names the GPU and the versions, and holds no host name and no path.
When everything has passed on a GPU, backend/cache.py remembers it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from te_nvfp4_cv.backend import cache, dispatch, native
from te_nvfp4_cv.errors import runtime_error, value_error
from te_nvfp4_cv.selftest import products, quantization, training
from te_nvfp4_cv.selftest.setting import Setting

Check = Callable[[Setting], str]
QUANTIZATION: tuple[Check, ...] = (
    quantization.activations, quantization.unusual_activations, quantization.delayed, quantization.weights,
    quantization.unpacking, quantization.stochastic_rounding,
)
PRODUCTS: tuple[Check, ...] = (
    products.convolutions, products.convolution_variants, products.transposed_and_other_ranks,
    products.linear_layers, products.matrix_products, products.non_finite_values, training.training,
)


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the GPU if there is one, and otherwise the CPU.

    Raises:
        ValueError: the name is none of auto, cpu, cuda, cuda:N.
        RuntimeError: there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    # Before torch.device, which knows many more kinds and has another error for each mistake.
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise value_error(
            "selftest: unknown device.", got=repr(name), needs="auto, cpu, cuda or cuda:N", fix="--device auto"
        )
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise runtime_error(
            f"selftest: device {name} is not there.", got=f"{torch.cuda.device_count()} CUDA device(s)",
            needs=f"at least {(device.index or 0) + 1}, and a CUDA build of torch", fix="--device auto",
        )
    # With an index: results are remembered for this GPU.
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def run(
    device: torch.device,
    backend: str = "auto",
    small: bool = False,
    say: Callable[[str], None] | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Run the checks.

    Args:
        device: where to run them; the reference always runs on the CPU.
        backend: the backend to test; "auto" tests vendor and triton on a GPU, vendor and integer on a CPU.
        small: use tiny shapes, for Triton's interpreter.
        say: called with a line for each check that is finished.
        workers: the number of processes that share the checks. More than one needs a main module that can be imported,
            because processes are spawned.
    Returns:
        The report. "passed" says whether every check held, "gpu_tested" whether they ran on a GPU.
    Raises:
        RuntimeError: the backend cannot run on the device.
    """
    start = time.perf_counter()
    backends = [dispatch.resolve(name, device) for name in _wanted(backend, device)]
    rows = []
    for row in _rows(_plan(backends, device), device, small, workers):
        rows.append(row)
        if say is not None:
            say(line(row))
    report = {
        "selftest": 1,
        "passed": all(row["passed"] for row in rows),
        "gpu_tested": device.type == "cuda",
        "backends": backends,
        **cache.identity(device),  # GPU, driver and versions, which a remembered pass belongs to
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_kernels": native.load() is not None,
        "interpreted": dispatch.interpreted(),
        "seconds": round(time.perf_counter() - start, 1),
        "checks": rows,
    }
    # A pass counts only if both backends were tested; one failure is enough to take an earlier pass back.
    if device.type == "cuda" and (not report["passed"] or set(backends) >= {"vendor", "triton"}):
        cache.remember_selftest(device, bool(report["passed"]))
    return report


def _wanted(backend: str, device: torch.device) -> list[str]:
    """Return the backends to test."""
    if backend != "auto":
        return [backend]
    # Not only what "auto" would choose: the verdict names the backend to turn to if one fails.
    if device.type == "cuda":
        return ["vendor", "triton"]
    return ["vendor", "integer"] if dispatch.has_compiled_kernels() else ["vendor"]


def _rows(
    plan: Sequence[tuple[Check, str]], device: torch.device, small: bool, workers: int
) -> Iterator[dict[str, Any]]:
    """Run the checks, and yield the result of each as it comes.

    Several processes compile kernels side by side, and a kernel that breaks its process's GPU context fails alone.
    """
    jobs = [(check, Setting(device, backend, small)) for check, backend in plan]
    if workers == 1:
        yield from (_row(check, setting) for check, setting in jobs)
        return
    # Spawned, because a forked process cannot use CUDA; one check each, because a broken context stays broken.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        pending = {pool.submit(_row, check, setting): (check, setting) for check, setting in jobs}
        for future in as_completed(pending):
            check, setting = pending[future]
            try:
                yield future.result()
            except Exception as failure:  # the process died
                yield _result(check, setting, "", f"{type(failure).__name__}: {failure}", 0.0)


def _plan(backends: Sequence[str], device: torch.device) -> list[tuple[Check, str]]:
    """List each check with its backend: quantization once, because backends share its kernels, the rest for each."""
    plan = [(check, backends[-1]) for check in QUANTIZATION]
    if device.type == "cpu" and "triton" not in backends:
        plan += [(products.block_formats, name) for name in backends]
    for name in backends:
        # The integer backend multiplies layers only: nv.gemm refuses it.
        plan += [(check, name) for check in PRODUCTS if name != "integer" or check is not products.matrix_products]
    if device.type == "cuda" or "triton" in backends:
        plan.append((training.norms, backends[-1]))
    if device.type == "cuda":
        plan += [(training.graph, name) for name in backends]
    return plan


def _row(check: Check, setting: Setting) -> dict[str, Any]:
    start = time.perf_counter()
    detail, error = "", ""
    try:
        if setting.device.type == "cuda":
            # Triton launches on the current device, whatever its arguments are on; a spawned process begins with GPU 0.
            torch.cuda.set_device(setting.device)
        detail = check(setting)
    except Exception as failure:  # a compiler's or a launch's failure is a result too
        error = f"{type(failure).__name__}: {failure}"
    return _result(check, setting, detail, error, time.perf_counter() - start)


def _result(check: Check, setting: Setting, detail: str, error: str, seconds: float) -> dict[str, Any]:
    return {
        "check": check.__name__.replace("_", " "),
        "backend": setting.backend,
        "passed": not error,
        "detail": detail,
        # An error's text may hold a user's home folder.
        "error": _without_paths(error),
        "seconds": round(seconds, 1),
    }


def _without_paths(text: str) -> str:
    """Cut file paths to their last part, and the text to 1500 characters: the report is made to be shared."""
    return re.sub(r"(?:[A-Za-z]:)?(?:[\\/][\w.@+~-]+)+[\\/]([\w.@+~-]+)", r"\1", text)[:1500]


def line(row: dict[str, Any]) -> str:
    """Format one check as a line of the table."""
    mark = "ok    " if row["passed"] else "FAILED"
    text = row["detail"] if row["passed"] else row["error"].replace("\n", "\n" + " " * 42)
    return f"{mark} {row['check']:<27}{row['backend']:<10}{row['seconds']:6.1f} s  {text}"


def verdict(report: dict[str, Any]) -> list[str]:
    """Return the lines that say what the report means, and what to do."""
    failed = [row for row in report["checks"] if not row["passed"]]
    where = f"{report['device']}" + (f" (sm_{report['capability'].replace('.', '')})" if report["gpu_tested"] else "")
    versions = f"driver {report['driver']}, torch {report['torch']}, triton {report['triton']}"
    lines = [f"{where}: {versions}, {report['seconds']:.0f} s"]
    if not report["gpu_tested"]:
        lines.append("No CUDA device was tested: these checks ran on the CPU and say nothing about a GPU.")
    if not failed:
        lines.append(f"All {len(report['checks'])} checks passed.")
        return lines
    lines.append(f"{len(failed)} of {len(report['checks'])} checks FAILED.")
    broken = {row["backend"] for row in failed}
    # Without sound quantization no backend of the GPU is right; the reference uses none of these kernels.
    alone = broken == {"integer"} or (report["gpu_tested"] and broken == {"triton"})
    works = "vendor" if alone and _only_products(failed) else "reference"
    lines.append(
        f'fix: use backend="{works}" on this machine (nvfp4_autocast(recipe, backend="{works}")), and report this '
        "with the file of --json"
    )
    return lines


def _only_products(failed: Sequence[dict[str, Any]]) -> bool:
    """Return True if the kernels that all backends of a device share, quantization and norms, have passed."""
    shared = {check.__name__.replace("_", " ") for check in (*QUANTIZATION, training.norms)}
    return not shared & {row["check"] for row in failed}


def main(device: str, backend: str, json_path: str | None) -> int:
    """Run the command: print a table, write the report, and return 0 if all checks passed, else 1."""
    chosen = choose_device(device)
    if json_path is not None:
        open(json_path, "a", encoding="utf-8").close()  # a path that cannot be written fails before the long run
    print(f"te_nvfp4_cv self-test on {chosen}", flush=True)
    # On a GPU, compiling the kernels takes most of the time, so it is spread over processes.
    workers = max(1, min(8, (os.cpu_count() or 1) // 2)) if chosen.type == "cuda" else 1
    # Flushed line by line: somebody who waits two minutes should see what is going on.
    report = run(chosen, backend, say=lambda text: print(text, flush=True), workers=workers)
    print("\n".join(verdict(report)), flush=True)
    if json_path is not None:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")
        print(f"report: {json_path}", file=sys.stderr)
    return 0 if report["passed"] else 1
