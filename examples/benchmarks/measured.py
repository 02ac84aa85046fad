"""Keep what benchmarks measured, one JSON object a line, for the tables that examples/tables.py makes.

A line is one case of one interleaved run, so that the ratios of its figures are those of one run: "table" and "case"
say what it belongs to, "values" holds the figures, and the rest says where, when and by which command they were made.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from accuracy.provenance import commit
from accuracy.rows import append_row
from unet_coco.backends import kernels_of, processor

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "measured.jsonl"


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add --keep, the file that takes the rows."""
    parser.add_argument(
        "--keep", type=Path, nargs="?", const=RESULTS, metavar="FILE", help=f"append rows to it, or to {RESULTS.name}"
    )


def keep(path: Path | None, table: str, case: str, values: Mapping[str, float]) -> None:
    """Append a row, if there is a path.

    Args:
        table: "training", "evaluation", "inference": milliseconds by variant. "memory": bytes by variant.
        values: By variant, of one run.
    """
    if path is None:
        return
    now = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = shlex.join(["python", *(Path(word).name if word.endswith(".py") else word for word in sys.argv)])
    where = {"processor": processor(), "kernels": kernels_of(torch.device("cpu")), "torch": str(torch.__version__)}
    where |= {"threads": torch.get_num_threads(), "commit": commit(), "date": now, "command": command}
    append_row(path, {"table": table, "case": case, "values": dict(values), **where})
