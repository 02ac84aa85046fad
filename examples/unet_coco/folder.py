"""Claim the folder of a run, --out, when the run starts, so that two runs never overwrite each other's files.

    OUT/run.json    written by the run that owns OUT, and only if there was none

Without --resume, a folder that another run has claimed or has left results in stays as it is, and the run claims OUT_2,
OUT_3, ... instead. This is true also if the other run was stopped before its first checkpoint; a run that was refused
before it began gives up its claim. --resume continues in OUT itself: make sure that no other run is still writing
there. A folder that cannot be written is refused.

A job that torchrun or Slurm has started again goes on in the folder of its earlier start, as with --resume. The claim
holds what tells: the job's id and the command line.

    torchrun --max-restarts N    TORCHELASTIC_RESTART_COUNT > 0, the same TORCHELASTIC_RUN_ID
    sbatch --requeue             SLURM_RESTART_COUNT > 0, the same SLURM_JOB_ID
"""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from te_nvfp4_cv.errors import value_error

CLAIM = "run.json"
RESTARTS = {"TORCHELASTIC_RUN_ID": "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID": "SLURM_RESTART_COUNT"}


def run_folder(out: Path, resume: bool, arguments: Sequence[str] = ()) -> tuple[Path, bool]:
    """Claim `out`, or the first free one of OUT_2, OUT_3, ...; with several ranks only the first rank calls this.

    Args:
        arguments: The command line, by which a restart of the job finds the folder.
    Returns:
        The folder, and whether the claim is new.
    Raises:
        ValueError: If a folder cannot be made or written.
    """
    found, number = out, 1
    while True:
        claimed = _claim(found, arguments)
        if claimed or resume:
            return found, claimed
        number += 1
        found = _numbered(out, number)


def restarted_in(out: Path, arguments: Sequence[str]) -> Path | None:
    """Return the folder that an earlier start of this job has claimed; None if this is the first or none is found."""
    again = [name for name, count in RESTARTS.items() if os.environ.get(count, "0") not in ("", "0")]
    mine, found, number = _job(), None, 1
    folder = out
    while again and folder.is_dir():
        try:
            claim = json.loads((folder / CLAIM).read_text(encoding="utf-8"))
            same_job = any(name in claim["job"] and claim["job"][name] == mine.get(name) for name in again)
            if same_job and claim["arguments"] == list(arguments):
                found = folder  # the last one: a job's id may come back
        except (OSError, ValueError, TypeError, KeyError):  # none, another version's, or damaged
            pass
        number += 1
        folder = _numbered(out, number)
    return found


def _numbered(out: Path, number: int) -> Path:
    return out.resolve().with_name(f"{out.resolve().name}_{number}")


def _job() -> dict[str, str]:
    """Return what identifies this job for those that start it again."""
    job = {name: os.environ[name] for name in RESTARTS if os.environ.get(name)}
    if job.get("TORCHELASTIC_RUN_ID") == "none":  # torchrun's default; its process is the same after a restart
        job["TORCHELASTIC_RUN_ID"] = f"{socket.gethostname()}:{os.getppid()}"
    return job


def give_up(folder: Path) -> None:
    """Release a folder that this run has claimed, if the run has left nothing in it."""
    if not _holds_a_run(folder):
        (folder / CLAIM).unlink(missing_ok=True)


def _claim(folder: Path, arguments: Sequence[str]) -> bool:
    """Try to claim the folder, and return whether it was free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CLAIM).exists() or _holds_a_run(folder):
            return False
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            # Mode "x" fails if another run creates the file at the same moment.
            with (folder / CLAIM).open("x", encoding="utf-8") as file:
                claim = {"started": started, "job": _job(), "arguments": list(arguments)}
                file.write(json.dumps(claim) + "\n")
        except FileExistsError:  # another run was faster
            return False
    except OSError as error:
        raise value_error(
            "--out cannot be made.",
            got=f"{folder}: {error}",
            needs="a folder that can be written",
            fix="choose another --out",
        ) from error
    return True


def _holds_a_run(folder: Path) -> bool:
    patterns = ("*/last.pt", "*/telemetry*.jsonl", "summary.json")
    return any(any(folder.glob(pattern)) for pattern in patterns)
