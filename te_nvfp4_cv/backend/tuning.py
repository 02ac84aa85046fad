"""Choose the meta-parameters of Triton kernels (tile sizes, warps, stages): from a table, or by a search on request.

    config(kernel, arch, key)           the table's entry
    config(kernel, arch, key, launch)   with TE_NVFP4_CV_AUTOTUNE=1 and on a GPU: the fastest of the kernel's candidates

A table names, per kernel, an entry for each architecture class: sm_80, sm_89, sm_90, sm_100, sm_120, and 0 for the
interpreter, which wants few programs with large tiles. The entry of the highest class not above `arch` is used.
The search runs each candidate a few times between CUDA events and writes the best one to a JSON file (cache.py), which
every later process and rank reads. It never runs while a CUDA graph is captured; the table, or an earlier result, is
used there. Codes and scales do not depend on the choice. Sums of the implicit GEMMs do, in their last bits, because the
order of accumulation changes: between runs with and without a search, and between ranks that chose differently.
Nothing here imports triton.
"""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from te_nvfp4_cv.backend import cache
from te_nvfp4_cv.errors import value_error, warn_once

Config = dict[str, int]
Rule = Config | Callable[[tuple[int, ...]], Config]

_table: dict[str, dict[int, Rule]] = {}
_candidates: dict[str, Callable[[tuple[int, ...]], Sequence[Config]]] = {}
_looked_up: dict[tuple[str, int, tuple[int, ...]], Config] = {}  # of static(): every launch asks
_chosen: dict[tuple[Any, ...], Config] = {}
_lock = threading.Lock()
_search_runs = threading.local()  # other threads' launches are no search
WARM_UP, ROUNDS = 2, 7


def _nothing(key: tuple[int, ...]) -> Sequence[Config]:
    return ()


def register(
    kernel: str, table: dict[int, Rule], candidates: Callable[[tuple[int, ...]], Sequence[Config]] = _nothing
) -> None:
    """Register the entries of a kernel; a launch module does so when it is imported.

    Args:
        kernel: A name of one word.
        table: Maps the lowest architecture of a class (0, 80, 89, 90, 100, 120) to its entry, or to a function that
            returns the entry for a key.
        candidates: Returns the at most 12 entries that a search may choose from, for a key. By default there
            are none, and nothing is searched.
    Raises:
        ValueError: The table has no entry for architecture 0 or 80.
    """
    if 0 not in table or 80 not in table:
        raise value_error(
            f"nvfp4 tuning: the table of {kernel} is not complete.",
            got=f"architectures {sorted(table)}",
            needs="0 (the interpreter), 80 and those that differ from it",
            fix="add them",
        )
    _table[kernel], _candidates[kernel] = dict(table), candidates
    _looked_up.clear()


def config(
    kernel: str, arch: int, key: tuple[int, ...] = (), launch: Callable[[Config], object] | None = None
) -> Config:
    """Return the meta-parameters to launch `kernel` with. Callers must not change the dictionary.

    Args:
        arch: The compute capability as in sm_90, or 0 under the interpreter.
        key: The small integers that the best choice depends on, such as sizes in coarse steps.
        launch: Runs the kernel once with given parameters on the current device and stream. A search calls it many
            times and throws the outputs away, so it must not add to anything that outlives it while `searching()`.
    Raises:
        ValueError: The kernel is unknown.
    """
    if launch is None or not arch or not autotune_enabled():
        return static(kernel, arch, key)
    device = torch.device("cuda", torch.cuda.current_device())
    memo = (kernel, device, key)
    if memo in _chosen:  # every launch asks, so the lock is for the first one only
        return _chosen[memo]
    capturing = torch.cuda.is_current_stream_capturing()
    with _lock:
        if memo not in _chosen:
            found = _load(kernel, arch, key, device)
            if found is None and capturing:  # not remembered: a later call outside the capture may search
                return static(kernel, arch, key)
            _chosen[memo] = _search(kernel, arch, key, device, launch) if found is None else found
    return _chosen[memo]


def static(kernel: str, arch: int, key: tuple[int, ...] = ()) -> Config:
    """Return the table's entry.

    Raises:
        ValueError: The kernel is unknown, or the architecture is below all classes of its table.
    """
    found = _looked_up.get((kernel, arch, key))
    if found is not None:
        return found
    table = _table.get(kernel)
    # 0 is the interpreter's entry, and not the lowest class of GPUs.
    classes = [] if table is None else [lowest for lowest in table if lowest <= arch and (lowest > 0) == (arch > 0)]
    if table is None or not classes:
        raise value_error(
            "nvfp4 tuning: no entry.",
            got=f"kernel {kernel!r}, sm_{arch}",
            needs=f"a kernel of {sorted(_table)} and an architecture of its table",
            fix="register it",
        )
    rule = table[max(classes)]
    _looked_up[kernel, arch, key] = config = rule(key) if callable(rule) else rule
    return config


def entries() -> dict[str, list[tuple[int, Rule]]]:
    """Return the architecture classes of every kernel with their entries, for tests that compile them all."""
    return {kernel: sorted(table.items()) for kernel, table in _table.items()}


def arch_of(device: torch.device) -> int:
    """Return 90 for sm_90 and so on, and 0 for a CPU, where kernels run in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def bucket(size: int) -> int:
    """Return log2 of the size, rounded up: a coarse key for sizes that vary from call to call."""
    return max(size - 1, 0).bit_length()


def autotune_enabled() -> bool:
    """Return True if TE_NVFP4_CV_AUTOTUNE asks for the search. Layers that layer/prepared.py takes ask once."""
    return os.environ.get("TE_NVFP4_CV_AUTOTUNE", "0").lower() in ("1", "true", "on", "yes")


def searching() -> bool:
    """Return True while a search launches the kernel."""
    return getattr(_search_runs, "on", False)


def forget() -> None:
    """Read the file again at the next call."""
    with _lock:
        _chosen.clear()


def _entry(kernel: str, key: tuple[int, ...]) -> str:
    return f"{kernel} {' '.join(map(str, key))}".strip()


def _options(kernel: str, arch: int, key: tuple[int, ...]) -> list[Config]:
    """Return the table's entry, then the other candidates."""
    # The table's entry first: it stays where nothing is faster.
    first = static(kernel, arch, key)
    return [first, *(option for option in _candidates[kernel](key) if option != first)]


def _load(kernel: str, arch: int, key: tuple[int, ...], device: torch.device) -> Config | None:
    """Return an earlier result from the file, if it is still one of the candidates."""
    found = (cache.read("tuned", device) or {}).get(_entry(kernel, key))
    return found if found in _options(kernel, arch, key) else None


def _search(
    kernel: str, arch: int, key: tuple[int, ...], device: torch.device, launch: Callable[[Config], object]
) -> Config:
    options = _options(kernel, arch, key)
    best, least, failed = options[0], float("inf"), 0
    for option in options if len(options) > 1 else ():
        _search_runs.on = True
        try:
            # `option` is bound now; the loop rebinds the name.
            time = milliseconds(lambda option=option: launch(option))  # type: ignore[misc]
        except Exception as error:  # too much shared memory, or a compiler that refuses: the next one may work
            failed += 1
            if failed == len(options):
                raise
            warn_once(f"tuning {kernel} {option}", f"te_nvfp4_cv: {kernel} does not run with {option}: {error}")
            continue
        finally:
            _search_runs.on = False
        if time < least:
            best, least = option, time
    # Read again just before writing: another process may have added its results meanwhile.
    cache.write("tuned", device, {**(cache.read("tuned", device) or {}), _entry(kernel, key): best})
    return best


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of a call on the current CUDA stream, after a warm-up."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
