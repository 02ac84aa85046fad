"""Functions of a test module, run on several ranks: NCCL where there is a GPU for each, else gloo on a CPU.

    def on_ranks_sum(ranks: Ranks) -> Any: ...            in tests/distributed/test_x.py, asserts included
    test_on_ranks = ranks_test(globals(), four=("sum",))  one pytest test for each function and number of ranks

The same processes serve all functions of a module for one number of ranks, and all of them are forked from a server
that has imported torch and the package once: importing costs more than most of the tests. `torchrun` starts a script
as a user does. Every function starts from torch.manual_seed(0), when all ranks have ended the one before. What it
returns is kept, by rank, for tests in the parent (`results`); what it raises fails its test with the traceback of each
rank. Where one rank raises and another waits for it in a collective, they cannot meet again: the functions after it are
reported as not run.
"""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "on_ranks_"
SECONDS = 240  # of one torchrun, and of one module on ranks
COLLECTIVE_SECONDS = 60
PRELOADED = ["tests.conftest", "te_nvfp4_cv", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
PRELOADED += ["unet_coco.train"]  # which needs an extra, and is left out without it


@dataclass(frozen=True)
class Ranks:
    """What a function on ranks is given."""

    rank: int
    world: int
    device: torch.device
    folder: Path  # empty, shared by the ranks, one for each function

    @property
    def group(self) -> Any:
        return dist.group.WORLD


# ---- in pytest ------------------------------------------------------------------------------------------------------


def two_ranks(function: Callable[[Ranks], Any]) -> Callable[[Ranks], Any]:
    """Mark a function that takes long and would prove nothing more on four ranks, such as a compilation."""
    function.worlds = (2,)  # type: ignore[attr-defined]
    return function


def names_of(module: Mapping[str, Any], world: int) -> list[str]:
    """The functions of a module (its globals) that run on so many ranks, in the order of the file."""
    names = [name for name in module if name.startswith(PREFIX)]
    return [name.removeprefix(PREFIX) for name in names if world in getattr(module[name], "worlds", (world,))]


def ranks_test(
    module: Mapping[str, Any], worlds: Sequence[int] = (2, 4), four: Sequence[str] | None = None
) -> Callable[..., None]:
    """The test that reports every function on ranks of a module (its globals()); call it below them.

    Args:
        four: the functions that show something on four ranks which two cannot show (neighbours on both sides, groups
            and meshes, uneven parts); if None, all. The others run on four ranks in `make stress`.
    """
    chosen = {
        world: [n for n in names_of(module, world) if world == 2 or four is None or n in four] for world in worlds
    }
    others = {world: [n for n in names_of(module, world) if n not in chosen[world]] for world in worlds}
    assert set(four or ()) <= set(chosen[worlds[-1]]), four
    cases: list[Any] = [(world, name) for world in worlds for name in chosen[world]]
    cases += [pytest.param(world, name, marks=pytest.mark.stress) for world in worlds for name in others[world]]

    @pytest.mark.parametrize(("world", "name"), cases)
    def test_on_ranks(world: int, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        names = chosen[world] if name in chosen[world] else others[world]
        results(module["__file__"], world, name, tmp_path_factory, names)

    return test_on_ranks


def results(
    file: str, world: int, name: str, tmp_path_factory: pytest.TempPathFactory, names: Sequence[str] = ()
) -> list[Any]:
    """What a function of a test file (its __file__) returned on each rank; fails where one raised.

    Args:
        names: the functions that run with it, on the same processes; if empty, all of the file.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base  # one run for all workers of pytest-xdist
    module_name = ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)
    names = names or names_of(vars(importlib.import_module(module_name)), world)
    folder = base / f"{module_name}.{world}.{names[0]}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "output.txt").is_file():
            (folder / "output.txt").write_text(_run(module_name, world, folder, names), encoding="utf-8")
    output = (folder / "output.txt").read_text(encoding="utf-8")
    files = [folder / f"{name}.{rank}.pt" for rank in range(world)]
    told = [torch.load(file, weights_only=True) if file.is_file() else None for file in files]
    errors = [f"rank {rank}: {t['error']}" for rank, t in enumerate(told) if t is not None and t["error"]]
    if errors or any(t is None for t in told):
        missing = [str(rank) for rank, t in enumerate(told) if t is None]
        note = f"not run, or not ended, on ranks {', '.join(missing)}:\n{output[-3000:]}" if missing else ""
        pytest.fail("\n".join(errors + [note]), pytrace=False)
    return [t["value"] for t in told if t is not None]


def torchrun(arguments: Sequence[str], world: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """torchrun of this interpreter on one machine, one thread per rank, from the repository's root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
    command += ["--nproc-per-node", str(world), *arguments]
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "examples"))),
    }
    variables.pop("PYTEST_CURRENT_TEST", None)
    return subprocess.run(
        command,
        cwd=ROOT,
        env=variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def forkserver() -> Any:
    """Return multiprocessing's context whose processes start with torch and the package imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:  # what the server starts with, its processes have
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "examples"))))
        patch.setenv("OMP_NUM_THREADS", "1")  # a pool of threads would not survive the fork
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # neither would an initialised CUDA
        multiprocessing.forkserver.ensure_running()
    return context


def _run(module_name: str, world: int, folder: Path, names: Sequence[str]) -> str:
    """Run functions of a module on `world` processes; return what they print."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = forkserver()
    arguments = [(module_name, names, folder, rank, world, store.port) for rank in range(world)]
    ranks = [context.Process(target=_on_rank, args=each) for each in arguments]
    for process in ranks:
        process.start()
    try:
        _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    told = [f"exit status of rank {rank}: {process.exitcode}" for rank, process in enumerate(ranks)]
    return "\n".join([*told, *(path.read_text(errors="replace") for path in sorted(folder.glob("printed.*")))])


def _wait(ranks: Sequence[Any]) -> None:
    """Return when every process has ended, when one has failed and the others had 5 s to say so, or after SECONDS."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            end = min(end, time.monotonic() + 5)
        time.sleep(0.05)


# ---- on a rank ------------------------------------------------------------------------------------------------------


def _on_rank(module_name: str, names: Sequence[str], folder: Path, rank: int, world: int, port: int) -> None:
    from tests import conftest  # noqa: F401  (a torchvision that imports)

    printed = os.open(folder / f"printed.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    # What torchrun tells a script of its rank, for code that asks.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    cuda = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, store=store, rank=rank, world_size=world)
    module = importlib.import_module(module_name)
    failed = False
    for name in names:
        shared = folder / name
        shared.mkdir(exist_ok=True)
        told: dict[str, Any] = {"value": None, "error": ""}
        try:
            random.seed(0)
            numpy.random.seed(0)
            torch.manual_seed(0)
            told["value"] = getattr(module, PREFIX + name)(Ranks(rank, world, device, shared))
        except BaseException:
            failed, told["error"] = True, traceback.format_exc()
        torch.save(told, folder / f"{name}.{rank}.pt")
        if not _all_ended(name, rank, world):  # a rank waits in a collective for one that raised
            os._exit(1)
    dist.barrier()  # without it some exits of gloo abort
    dist.destroy_process_group()
    sys.exit(int(failed))


def _all_ended(name: str, rank: int, world: int) -> bool:
    """Whether every rank has ended this function, by return or exception: the next one can start."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{name}/{rank}", "ended")
    try:
        store.wait([f"{name}/{other}" for other in range(world)], timedelta(seconds=COLLECTIVE_SECONDS))
    except dist.DistStoreError:
        return False
    return True
