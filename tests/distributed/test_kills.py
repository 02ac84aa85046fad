"""Jobs of examples/unet_coco that are killed and started again: the same bits, and few steps done twice.

A `Job` stands for torchrun and a scheduler: it starts the ranks with their environment, ends all when one has ended, as
torchrun's agent does, and starts them again with the next restart count. Ranks are forked from a server that has
imported the trainer: a start costs little. Signals come at random: to one rank or to all, in steps, validations, writes
and starts.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from unet_coco import ranks as unet_ranks
from unet_coco.checkpoint import load_checkpoint
from unet_coco.engine import Trainer
from unet_coco.initial import read_weights
from unet_coco.train import main

from tests.distributed.launch import forkserver
from tests.examples.test_examples import same
from tests.examples.unet_coco_data import SMALL, draw_shapes

SAVE_EVERY = 5
PARALLEL = {"ddp": ["ddp"], "fsdp": ["fsdp"], "shards": ["fsdp", "--sharded-checkpoints"]}
GRACE = 30.0  # torchrun's own
OPTIONS = [*SMALL, "--precisions", "nvfp4", "--pictures", "0", "--device", "cpu", "--deterministic", "--no-bundles"]
OPTIONS += ["--save-every", str(SAVE_EVERY), "--timeout", "60"]


def _rank(arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    """Run train.py as a rank of a job; each step that has ended is a byte in the rank's file."""
    from tests import conftest  # noqa: F401  (a torchvision that imports)

    os.environ |= environment
    rank = environment["RANK"]
    printed = os.open(folder / f"printed.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    torch.set_num_threads(1)
    done = os.open(folder / f"steps.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    step = Trainer._step

    def counted(self: Trainer, *rest: Any) -> torch.Tensor:
        loss = step(self, *rest)
        os.pwrite(done, str(self.position.step + 1).encode(), 0)
        return loss

    Trainer._step = counted  # type: ignore[method-assign]
    sys.argv = ["train.py", *arguments]
    unet_ranks.run(main)


@dataclass
class Job:
    """One run of train.py on `world` ranks, however often it is started; its results are in folder/out."""

    folder: Path
    world: int
    arguments: list[str]
    ranks: list[Any] = field(default_factory=list)
    starts: int = 0

    @property
    def checkpoint(self) -> Path:
        return self.folder / "out" / "nvfp4" / "last.pt"

    def saved(self) -> int:
        return load_checkpoint(self.checkpoint)["position"]["step"] if self.checkpoint.is_file() else 0

    def done(self) -> int:
        """The number of the last step that a rank has ended in this start."""
        files = [self.folder / f"steps.{rank}" for rank in range(self.world)]
        return max((int(file.read_text() or 0) for file in files if file.is_file()), default=0)

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for file in self.folder.glob("steps.*"):
            file.unlink()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(self.world)}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": self.folder.name}
        common |= {"TORCHELASTIC_RESTART_COUNT": str(self.starts), "OMP_NUM_THREADS": "1"}
        arguments = [*self.arguments, "--out", str(self.folder / "out")]
        self.ranks = [
            forkserver().Process(
                target=_rank, args=(arguments, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, self.folder)
            )
            for rank in range(self.world)
        ]
        for process in self.ranks:
            process.start()
        self.starts += 1

    def running(self) -> bool:
        return all(process.exitcode is None for process in self.ranks)

    def signal(self, number: int, ranks: Sequence[int]) -> None:
        for rank in ranks:
            if self.ranks[rank].exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # it ends just now
                    os.kill(self.ranks[rank].pid, number)

    def end(self, seconds: float) -> list[int]:
        """Wait for the first rank to end, end the others as torchrun's agent does, and return the exit statuses."""
        connection.wait([process.sentinel for process in self.ranks], seconds)
        statuses = [process.exitcode for process in self.ranks]
        if any(status != 0 for status in statuses if status is not None) or all(status is None for status in statuses):
            self.signal(signal.SIGTERM, range(self.world))
        for process in self.ranks:
            process.join(GRACE)
        self.signal(signal.SIGKILL, range(self.world))
        for process in self.ranks:
            process.join()
        return [process.exitcode for process in self.ranks]

    def printed(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("printed.*")))


def comparable(path: Path) -> dict[str, Any]:
    """A checkpoint without the names of files: a start that follows one without a checkpoint begins a new log."""
    state = load_checkpoint(path)
    return {**state, "shards": "", "position": {**state["position"], "telemetry": ""}}


def kill_loop(folder: Path, shapes: Path, ranks: tuple[int, str], steps: int, kinds: Sequence[int], seed: int) -> str:
    """Kill jobs, once for each of `kinds` (signals), until all have come; each ends with the bits of an unhurt one.

    Returns:
        What happened, in one line.
    """
    (world, parallel), rng, kinds = ranks, random.Random(seed), list(kinds)
    epochs = -(-steps // 3)
    arguments = ["--data", str(shapes), "--parallel", *PARALLEL[parallel], *OPTIONS]
    arguments += ["--epochs", str(epochs), "--steps", str(steps), "--eval-every", "4"]
    whole = Job(folder / "whole", world, arguments)
    whole.start()
    assert whole.end(600) == [0] * world, whole.printed()
    assert whole.saved() == steps
    lost: dict[int, list[int]] = {signal.SIGKILL: [], signal.SIGTERM: []}
    jobs = starts = 0
    while kinds:
        job = Job(folder / f"job{jobs}", world, arguments)
        jobs += 1
        while True:
            best = job.saved()
            job.start()
            starts += 1
            if kinds:
                # A tenth of the kills hits a start; the others a moment of the next steps, or what follows the last.
                until = best + rng.randint(1, 7) if rng.random() > 0.1 else 0
                while job.running() and job.done() < until:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.4 if until else 3))
            if kinds and job.running():
                number = kinds.pop(rng.randrange(len(kinds)))
                job.signal(number, rng.choice([range(world), [rng.randrange(world)]]))
                statuses = job.end(GRACE + 60)
                done = max(job.done(), best)
                lost[number].append(done - job.saved())
                if number == signal.SIGTERM and job.done() > best and done < steps:
                    assert statuses == [143] * world, (statuses, job.printed())
            else:
                statuses = job.end(600)
                assert statuses == [0] * world, (statuses, job.printed())
            if statuses == [0] * world:
                break
        same(*(comparable(path) for path in (job.checkpoint, whole.checkpoint)))
        same(*(read_weights(path) for path in (job.checkpoint, whole.checkpoint)))
        assert [path.name for path in folder.glob(f"{job.folder.name}/out*")] == ["out"], "one folder for all starts"
        assert not list(job.folder.rglob("*.tmp")), "no draft is left"
    assert max(lost[signal.SIGKILL], default=0) <= SAVE_EVERY and not any(lost[signal.SIGTERM]), lost
    by_kill, by_term = lost[signal.SIGKILL], lost[signal.SIGTERM]
    return (
        f"{parallel} on {world} ranks: {jobs} jobs of {steps} steps, {starts} starts, {len(by_kill)} SIGKILL (at most "
        f"{max(by_kill, default=0)} steps lost), {len(by_term)} SIGTERM (none)"
    )


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_is_killed_goes_on_with_the_same_bits(shapes: Path, tmp_path: Path) -> None:
    print(kill_loop(tmp_path, shapes, (2, "shards"), 8, [signal.SIGKILL, signal.SIGTERM], seed=0))


@pytest.mark.stress
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", [2, 4])
def test_forty_kills(world: int, parallel: str, shapes: Path, tmp_path: Path) -> None:
    print(kill_loop(tmp_path, shapes, (world, parallel), 20, [signal.SIGKILL, signal.SIGTERM] * 5, seed=world))
