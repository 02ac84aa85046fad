"""Run the accuracy study: the pairs of docs/accuracy/plan.toml, one process per core, for hours or days.

    python examples/accuracy/study.py --data FOLDER --workers 2 --nice 19 --until 04:50
    python examples/accuracy/study.py --data FOLDER --size full --minutes 9    on a GPU, in pieces of ten minutes
    python examples/accuracy/study.py --list                                   what is done and what remains
    python examples/accuracy/study.py --collect                                add rows to docs/accuracy

FOLDER holds `cifar10` and `camvid`. Workers take runs from the plan, in its order, and may be started and stopped at
any time: SIGTERM, Ctrl-C, --until and --minutes stop them after the current step, and the next call goes on with the
same bits. A process that is killed loses the minutes since its last checkpoint. Everything goes to --out:

    rows.jsonl      one line per finished run          checkpoints/    runs that are not finished
    claims/         locks: who works on what           shapes/         drawn images

Runs in rows.jsonl, and in the results file that is committed, are not repeated. table.py prints the tables.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
if str(_HERE.parents[1]) not in sys.path:
    sys.path.insert(0, str(_HERE.parents[1]))
sys.path.insert(1, str(_HERE.parents[2]))  # before an installed package: rows name the commit that computed them

import torch  # noqa: E402
from unet_coco.options import choose_device  # noqa: E402

from accuracy.claims import claimed  # noqa: E402
from accuracy.fit import COMPUTE, Run, Setting, Stopped  # noqa: E402
from accuracy.plan import PLAN, Plan, read_plan  # noqa: E402
from accuracy.provenance import machine  # noqa: E402
from accuracy.rows import Arm, append_row, collect, read_rows  # noqa: E402
from accuracy.tasks import TASKS, Task, open_task, variants_of  # noqa: E402
from te_nvfp4_cv.backend.dispatch import BACKENDS  # noqa: E402
from te_nvfp4_cv.errors import value_error  # noqa: E402

RESULTS = PLAN.with_name("study.jsonl")
WAIT = 20.0  # seconds between two looks at what other workers have finished


@dataclass
class Stop:
    """Say when a worker is to stop: at a signal, at a time, or when the process that started it is gone."""

    deadline: float
    parent: int | None = None
    signalled: bool = False

    def __call__(self) -> bool:
        orphaned = self.parent is not None and os.getppid() != self.parent
        return self.signalled or orphaned or time.time() >= self.deadline

    def watch(self) -> None:
        """Stop at SIGTERM and at Ctrl-C."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signal)

    def _signal(self, *_: Any) -> None:
        self.signalled = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the plan wants until it is done or time is up, and return the exit status: 1 if a run failed.

    Raises:
        ValueError: If an option, the plan or a results file is wrong, or if data is missing.
    """
    options = _options(arguments)
    if options.collect:
        total, new = collect([options.out / "rows.jsonl"], options.results)
        print(f"{options.results}: {total} rows, {new} of them new")
        return 0
    plan = _plan(options)
    if options.list:
        _list(plan, read_rows(_sources(options)))
        return 0
    stop = Stop(_deadline(options))
    if options.workers == 1:
        stop.watch()
        return work(options, plan, stop)
    cores = sorted(os.sched_getaffinity(0))
    if options.workers > len(cores):
        raise value_error(
            "--workers: too many.", got=str(options.workers), needs=f"at most {len(cores)}, one per core", fix="fewer"
        )
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a worker imports torch
    spawn = multiprocessing.get_context("spawn")
    workers = []
    for core in cores[: options.workers]:
        process = spawn.Process(target=_worker, args=(options, core, stop.deadline, os.getpid()))
        process.start()
        workers.append(process)
    stop.watch()
    while any(process.is_alive() for process in workers) and not stop.signalled:
        time.sleep(0.5)
    for process in workers:
        if stop.signalled:
            process.terminate()  # once: a second signal would kill a worker that is on its way out
        process.join()
    return int(any(process.exitcode for process in workers))


def _worker(options: argparse.Namespace, core: int, deadline: float, parent: int) -> None:
    os.sched_setaffinity(0, {core})
    stop = Stop(deadline, parent)
    stop.watch()
    try:
        sys.exit(work(options, _plan(options), stop))
    except (ValueError, RuntimeError) as refusal:
        sys.exit(f"error: {refusal}")


def work(options: argparse.Namespace, plan: Plan, stop: Stop) -> int:
    """Take run after run until none is left or `stop` says so, and return 1 if a run failed."""
    device = choose_device(options.device)
    os.nice(options.nice)
    if device.type == "cpu":
        torch.set_num_threads(1)
    setting = Setting(device, plan.compute, plan.backend, stop)
    # A backend that cannot run here raises now, not once for each run.
    print(f"{_now()}  {machine(setting.precision(variants_of('shapes-unet')['preset']), device)}", flush=True)
    tasks: dict[str, Task] = {}
    failed: set[Arm] = set()
    while not stop():
        rows, others_work = read_rows(_sources(options)), False
        for arm in plan.wanted(rows):
            if arm in failed or arm.task not in options.tasks:
                continue
            with claimed(options.out / "claims" / f"{arm.file_name}.lock") as mine:
                if not mine:
                    others_work = True
                    continue
                if arm in read_rows(_sources(options)):
                    break  # another worker has finished it since the plan was asked
                if arm.task not in tasks:
                    tasks[arm.task] = open_task(arm.task, arm.size, options.data, options.out / "shapes")
                try:
                    _run(arm, tasks[arm.task], setting, options.out)
                except Stopped:
                    break
                except Exception:  # the other runs go on
                    print(f"{_now()}  {arm.file_name} failed:\n{traceback.format_exc()}", flush=True)
                    failed.add(arm)
            break  # what the plan wants next may depend on this run
        else:
            if not others_work:
                break
            _sleep(WAIT, stop)
    print(f"{_now()}  worker ends: {'stopped' if stop() else 'nothing left to do'}", flush=True)
    return int(bool(failed))


def _run(arm: Arm, task: Task, setting: Setting, out: Path) -> None:
    path = out / "checkpoints" / f"{arm.file_name}.pt"
    print(f"{_now()}  {arm.file_name}: {'goes on' if path.is_file() else 'starts'}", flush=True)
    run = Run(task, variants_of(arm.task)[arm.variant], arm.seed, setting, arm.epochs, path)
    try:
        run.train()
        row = arm.to_row() | run.row()
    except Stopped:
        print(f"{_now()}  {arm.file_name}: stopped at step {run.step} of {run.steps}", flush=True)
        raise
    append_row(out / "rows.jsonl", row)
    path.unlink(missing_ok=True)
    score = "diverged" if row["diverged"] else f"{row['score']:.2f}, averaged weights {row['ema_score']:.2f}"
    print(f"{_now()}  {arm.file_name}: {score}; {row['cpu_seconds'] / 60:.1f} core-minutes", flush=True)


def _list(plan: Plan, rows: dict[Arm, dict[str, Any]]) -> None:
    """Print what is done and what remains, with the time that like runs took."""
    left, unknown = 0.0, set()
    for arm in plan.wanted(rows):
        like = [r["cpu_seconds"] / r["steps"] for a, r in rows.items() if (a.task, a.size) == (arm.task, arm.size)]
        steps = next((r["steps"] / a.epochs for a, r in rows.items() if a.task == arm.task and a.size == arm.size), 0)
        hours = sum(like) / len(like) * steps * arm.epochs / 3600 if like else 0.0
        left += hours
        unknown |= set() if like else {arm.task}
        print(f"{arm.file_name}  {f'{hours:.2f} h' if like else ''}")
    done = [row for arm, row in rows.items() if arm.size == plan.size]
    spent = sum(row["cpu_seconds"] for row in done) / 3600
    print(f"{len(done)} runs done in {spent:.1f} core-hours of {plan.budget_hours:g}; {left:.1f} core-hours left to do")
    if unknown:
        print(f"not counted, because no run of it is done: {', '.join(sorted(unknown))}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="study.py", description="Paired accuracy runs on real and drawn images.")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="FOLDER", help="holds cifar10 and camvid")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="rows that count as done")
    parser.add_argument("--plan", type=Path, default=PLAN, metavar="FILE")
    parser.add_argument("--size", choices=("cpu", "full"), default="cpu", help="cpu: one core; full: a GPU")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS), help="only runs of these tasks")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: cpu; auto with --size full)")
    parser.add_argument("--compute", choices=COMPUTE, help="dtype of activations (default: the plan's)")
    parser.add_argument("--backend", choices=BACKENDS, help="where NVFP4 runs (default: the plan's)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes with one thread each")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="lower the priority by N, up to 19")
    parser.add_argument("--until", metavar="HH:MM", help="stop at the next such time of day")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop after so many minutes")
    parser.add_argument("--list", action="store_true", help="print what remains, and end")
    parser.add_argument("--collect", action="store_true", help="add the rows of --out to --results, and end")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.size == "cpu" else "auto")
    if options.workers < 1:
        raise value_error("--workers is out of range.", got=str(options.workers), needs="at least 1", fix="--workers 1")
    return options


def _plan(options: argparse.Namespace) -> Plan:
    plan = read_plan(options.plan, options.size)
    changed = {key: getattr(options, key) for key in ("compute", "backend") if getattr(options, key)}
    return Plan(**{**vars(plan), **changed})


def _sources(options: argparse.Namespace) -> list[Path]:
    return [options.results, options.out / "rows.jsonl"]


def _deadline(options: argparse.Namespace, now: datetime.datetime | None = None) -> float:
    now = now or datetime.datetime.now()
    ends = [float("inf") if options.minutes is None else now.timestamp() + 60 * options.minutes]
    if options.until:
        try:
            at = datetime.time.fromisoformat(options.until)
        except ValueError as error:
            raise value_error("--until is no time.", got=options.until, needs="HH:MM", fix="--until 04:50") from error
        end = now.replace(hour=at.hour, minute=at.minute, second=0, microsecond=0)
        ends.append((end if end > now else end + datetime.timedelta(days=1)).timestamp())
    return min(ends)


def _sleep(seconds: float, stop: Stop) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop():
        time.sleep(0.5)


def _now() -> str:
    return datetime.datetime.now().strftime("%m-%d %H:%M:%S")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as refusal:
        sys.exit(f"error: {refusal}")
