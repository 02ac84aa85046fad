"""Try every model of the zoo, each in a process of its own, and append one JSON line per model to a file.

    python examples/zoo/run.py                       all models that have no row of this commit yet
    python examples/zoo/run.py 'timm/.*vit.*'        those whose names match
    python examples/zoo/run.py --missing             those that have no row of any commit
    python examples/zoo/run.py --checks step save    these checks alone; the compiled ones take most of the time

A row belongs to a model and a commit, so a run that was stopped goes on where it stopped; a row of a few checks does
not stand for all of them. A model that crashes or does not end gives a row with what it had found until then. page.py
makes docs/ZOO.md of the rows.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
ROOT = _HERE.parents[2]
for _folder in (str(ROOT), str(_HERE.parents[1])):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

ROWS = ROOT / "docs" / "zoo" / "rows.jsonl"
LIMIT = 600  # seconds a model; the slowest takes about a third of it on one core
PACKAGES = {"smp": "segmentation-models-pytorch"}  # where a library's package has another name
JUDGED = ("te_nvfp4_cv", "examples/zoo")  # what a row depends on


# ---- all models -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing. Returns 0, or 2 for a pattern that matches no model."""
    parser = argparse.ArgumentParser(prog="run.py", description="Try the models of the zoo.")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="regular expressions of names (default: all)")
    parser.add_argument("--out", type=Path, default=ROWS, metavar="FILE", help="default: docs/zoo/rows.jsonl")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="models at a time (default: 2)")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"for a model (default: {LIMIT})")
    parser.add_argument("--missing", action="store_true", help="leave out models that have a row of any commit")
    parser.add_argument("--again", action="store_true", help="run models that have a row of this commit, too")
    parser.add_argument("--checks", nargs="+", metavar="CHECK", help="run these checks alone (default: all)")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)  # what the processes are started with
    options = parser.parse_args(arguments)
    if options.one is not None:
        return one(options.one, options.out, options.checks)
    from te_nvfp4_cv.cli.trial.run import CHECKS
    from zoo.models import MODELS, in_turn

    names = [n for n in MODELS if not options.patterns or any(re.fullmatch(p, n) for p in options.patterns)]
    if not names:
        print(f"no model of that name; there are {len(MODELS)}: {', '.join(MODELS)}", file=sys.stderr)
        return 2
    commit = current_commit()
    rows = read_rows(options.out)
    asked = set(options.checks or CHECKS)
    rows = [row for row in rows if asked <= set(row.get("asked", CHECKS))]
    done = {row["model"] for row in rows if options.missing or (row["commit"] == commit and not options.again)}
    todo = [name for name in in_turn(names) if name not in done]
    print(f"{len(todo)} models to do at {commit}, {len(names) - len(todo)} done before", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.is_file():  # a line that was cut off must not stand before the next one
        whole, end, _ = options.out.read_text(encoding="utf-8").rpartition("\n")
        options.out.write_text(whole + end, encoding="utf-8")
    told = {"asked": options.checks} if options.checks else {}
    command = functools.partial(_command, checks=options.checks or ())
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        # Written by this thread alone, as each model ends.
        for ended in as_completed([pool.submit(guarded, name, options.limit, command) for name in todo]):
            if (row := ended.result()) is None:
                continue
            row = {"model": row.pop("name"), "commit": commit} | told | row
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(summary(row), flush=True)
    return 0


def guarded(name: str, limit: float, command: Callable[[str, Path], list[str]] | None = None) -> dict[str, Any] | None:
    """Try one model in a process of its own.

    Args:
        limit: seconds after which the process is ended.
        command: makes the command that writes the row of a model to a file; if None, this script with --one.
    Returns:
        Its row. If the process died or was ended, the check that was running then says so. None if the package of the
        model is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        started = time.perf_counter()
        # One thread each: models run side by side, and rows must not depend on the number of cores.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        argv = (command or _command)(name, path)
        process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            told, _ = process.communicate(timeout=limit)
            ended = ""
        except subprocess.TimeoutExpired:
            process.kill()
            told, _ = process.communicate()
            ended = f"no end within {limit:.0f} s"
        if process.returncode == NOT_INSTALLED and not ended:
            print(f"{name}: not installed: {told.strip().splitlines()[-1]}", file=sys.stderr, flush=True)
            return None
        if process.returncode and not ended:
            last = told.strip().splitlines()[-1:] or [""]
            ended = f"the process ended with status {process.returncode}: {last[0][:100]}"
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"name": name}
    running = row.pop("running", None)
    if ended:
        row.setdefault("cells", {})[running or "step"] = {"ok": False, "text": ended}
        row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def _command(name: str, path: Path, checks: Sequence[str] = ()) -> list[str]:
    return [sys.executable, str(_HERE), "--one", name, "--out", str(path), *(("--checks", *checks) if checks else ())]


# ---- one model, in a process of its own -----------------------------------------------------------------------------

NOT_INSTALLED = 3


def one(name: str, path: Path, checks: Sequence[str] | None = None) -> int:
    """Try one model and write its row after every check, with the name of the check that runs next.

    Args:
        checks: the checks to run; if None, all.
    """
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch
    from _torchvision import ensure_torchvision

    ensure_torchvision()
    from te_nvfp4_cv.cli.trial.cells import in_words
    from te_nvfp4_cv.cli.trial.run import Row, try_model
    from zoo.models import MODELS, library_of

    library = library_of(name)
    try:
        version = importlib.metadata.version(PACKAGES.get(library, library))
    except importlib.metadata.PackageNotFoundError as error:
        print(in_words(error))
        return NOT_INSTALLED
    versions = {"torch": torch.__version__.partition("+")[0], library: version}

    def write(row: Row, running: str | None) -> None:
        text = json.dumps(row.to_dict() | {"versions": versions, "running": running})
        path.with_suffix(".part").write_text(text, encoding="utf-8")
        path.with_suffix(".part").replace(path)  # a process that dies while it writes leaves the row before

    torch.set_num_threads(1)
    try:
        write(try_model(MODELS[name], checks=checks, watch=write), None)
    except Exception as error:  # plain torch cannot run it: the entry of the table is wrong
        path.write_text(json.dumps({"name": name, "versions": versions, "error": in_words(error, 400)}))
    return 0


# ---- rows -----------------------------------------------------------------------------------------------------------


def current_commit() -> str:
    """Return the commit of this checkout, with a plus sign if what the rows depend on is changed."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "--", *JUDGED) else "")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file in the order in which they were written; a last line that was cut off is left out.

    Raises:
        ValueError: another line is no row.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({"model": row["model"], "commit": row["commit"]} | row)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}, line {number} is no row of the zoo: {line[:60]!r}") from error
    return rows


def summary(row: dict[str, Any]) -> str:
    """Return one line about a row."""
    failed = [f"{name}: {cell['text']}" for name, cell in row.get("cells", {}).items() if cell["ok"] is False]
    told = row.get("error") or "; ".join(failed) or "no check failed"
    return f"{row['model']} ({row.get('seconds', 0):.0f} s): {told}"


if __name__ == "__main__":
    sys.exit(main())
