"""Claim the folder of a run, --out, when the run starts, so that two runs never overwrite each other's files.

    OUT/run.json    written by the run that owns OUT, and only if there was none

Without --resume, a folder that another run has claimed or has left results in stays as it is, and the run claims OUT_2,
OUT_3, ... instead. This is true also if the other run was stopped before its first checkpoint; a run that was refused
before it began gives up its claim. --resume continues in OUT itself: make sure that no other run is still writing
there. A folder that cannot be written is refused.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from te_nvfp4_cv.errors import value_error

CLAIM = "run.json"


def run_folder(out: Path, resume: bool) -> tuple[Path, bool]:
    """Claim `out`, or the first free one of OUT_2, OUT_3, ...; with several ranks only the first rank calls this.

    Returns:
        The folder, and whether the claim is new.
    Raises:
        ValueError: If a folder cannot be made or written.
    """
    found, number = out, 1
    while True:
        claimed = _claim(found)
        if claimed or resume:
            return found, claimed
        number += 1
        found = out.resolve().with_name(f"{out.resolve().name}_{number}")


def give_up(folder: Path) -> None:
    """Release a folder that this run has claimed, if the run has left nothing in it."""
    if not _holds_a_run(folder):
        (folder / CLAIM).unlink(missing_ok=True)


def _claim(folder: Path) -> bool:
    """Try to claim the folder, and return whether it was free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CLAIM).exists() or _holds_a_run(folder):
            return False
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            # Mode "x" fails if another run creates the file at the same moment.
            with (folder / CLAIM).open("x", encoding="utf-8") as file:
                file.write(json.dumps({"started": started}) + "\n")
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
