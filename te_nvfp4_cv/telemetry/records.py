"""Define telemetry's file format, JSON lines with one record per line, and read it.

    {"kind": "run", "format": FORMAT, "version": 1, "name", "group", "model", "recipe" (TOML), "backend", "every",
     "started", "layers": [{"name", "op", "shape"}]}               the first line; written again at each resume
    {"kind": "step", "step": 100, "layers": {name: {"op", "precision": "nvfp4" | "high" | "unseen", "reason", "tensors",
     ["flip_rate", "oscillation", "gradient": {"norm", "noise", "ratio", "alarm"}]}}}
    {"kind": "scalars", "step": 100, "values": {"train/loss": 0.91}}
    {"kind": "alarm", "step": 100, "layer": "up.3.conv.0", "text": "..."}

    tensors      weight, weight_column, input, input_column, grad_output, grad_output_column, weight_gradient; each
                 {"raw": stats, and in NVFP4 "codes": stats + "usage", "dequantized": stats, "scales", "sqnr_db",
                 "correlation", "underflow", "saturation"} (statistics.py). Any may be absent. All but "amax" and
                 "nonfinite" of raw come from a sample of "count" values
    flip_rate    share of weight codes that differ from the sample before
    oscillation  share of weight codes that went back to what they were two samples before

Numbers that are not finite are null. A resumed run continues the same file: of two records of one kind and step the
later one counts. A last line that was cut off is dropped; a damaged line elsewhere is refused, with its number.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.report.text import plain

FORMAT, VERSION = "te_nvfp4_cv.telemetry", 1


def dumps(record: Any) -> str:
    """Return a record as one line of strict JSON, with null for numbers that are not finite."""
    try:
        return json.dumps(record, separators=(",", ":"), allow_nan=False)
    except ValueError:  # Python would write NaN, which is no JSON; few records have one and need the copy
        return json.dumps(plain(record), separators=(",", ":"), allow_nan=False)


def cannot_write(place: str | os.PathLike[str], error: OSError) -> ValueError:
    """Return the error to raise if a file or folder of telemetry cannot be written."""
    return value_error(
        f"telemetry: {os.fspath(place)} cannot be written.",
        got=str(error), needs="a folder that can be written", fix="choose another path"
    )


def numbered(name: str, form: str = "{}_{}") -> Iterator[str]:
    """Yield a name and then, without end, the name with a number: name_2, name_3, ..."""
    yield name
    yield from (form.format(name, number) for number in itertools.count(2))


@dataclass
class Run:
    """A file of records, read.

    `steps` maps each sampled step to its layers, and `scalars` each step to its values, both in ascending order.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> path = tempfile.mkdtemp() + "/telemetry.jsonl"
        >>> watch = nv.telemetry.attach(torch.nn.Linear(32, 16), sinks=[nv.telemetry.JSONL(path)])
        >>> watch.scalars(0, {"train/loss": 0.5})
        >>> nv.telemetry.read(path).scalars
        {0: {'train/loss': 0.5}}
    """

    path: Path
    name: str
    group: str
    model: str
    recipe: str
    backend: str
    every: int
    started: str
    layers: list[str]
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    scalars: dict[int, dict[str, Any]] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def series(self, layer: str, *keys: str) -> list[float | None]:
        """Return one number of a layer at every sampled step, None where it is absent.

        For example series("conv1", "flip_rate"), or series("conv1", "tensors", "weight", "raw", "std").
        """
        found: list[float | None] = []
        for layers in self.steps.values():
            value: Any = layers.get(layer)
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            found.append(float(value) if isinstance(value, (int, float)) else None)
        return found


def read(path: str | os.PathLike[str]) -> Run:
    """Read a file of records.

    Raises:
        ValueError: the file is missing, empty, damaged, no telemetry file, or of a newer version.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> path = tempfile.mkdtemp() + "/telemetry.jsonl"
        >>> watch = nv.telemetry.attach(torch.nn.Linear(32, 16), sinks=[nv.telemetry.JSONL(path)], name="bf16")
        >>> nv.telemetry.read(path).name
        'bf16'
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(f"{path} cannot be read", str(error), "a JSON lines file that telemetry wrote") from error
    records, notes = _parse(path, text)
    if not records or records[0].get("format") != FORMAT or records[0].get("kind") != "run":
        got = "no records" if not records else f"a first line with format {records[0].get('format')!r}"
        needs = f'a first line {{"kind": "run", "format": "{FORMAT}", ...}}'
        raise _refused(f"{path} is no telemetry file", got, needs)
    head = [record for record in records if record.get("kind") == "run"][-1]  # a resumed run has written another
    if not isinstance(head.get("version"), int) or head["version"] > VERSION:
        raise value_error(
            f"telemetry: {path} is of another version.", got=f"version {head.get('version')!r}",
            needs=f"at most {VERSION}", fix="install the version of te_nvfp4_cv that wrote it",
        )
    layers, every = head.get("layers", []), head.get("every", 0)
    named = isinstance(layers, list) and all(isinstance(layer, dict) and "name" in layer for layer in layers)
    if not named or not isinstance(every, int):
        got = f"layers {str(layers)[:60]}, every {every!r}"
        raise _refused(f"the header of {path} is damaged", got, "a list of tables with names, and a number")
    names = ("name", "group", "model", "recipe", "backend", "started")
    texts: dict[str, Any] = {key: str(head.get(key, "")) for key in names}
    run = Run(path, every=every, layers=[str(layer["name"]) for layer in layers], notes=notes, **texts)
    for record in records:
        _take(run, record)
    run.steps, run.scalars = dict(sorted(run.steps.items())), dict(sorted(run.scalars.items()))
    # Layers that own no `weight` (attention's projections, functional calls) stand in steps, but not in the header.
    run.layers = list(dict.fromkeys([*run.layers, *(name for layers in run.steps.values() for name in layers)]))
    return run


def _refused(title: str, got: str, needs: str) -> ValueError:
    return value_error(f"telemetry: {title}.", got=got, needs=needs, fix="give the telemetry.jsonl of a run")


def _take(run: Run, record: dict[str, Any]) -> None:
    kind = record.get("kind")
    if kind == "step":
        run.steps[int(record["step"])] = record["layers"]  # of a step that a resumed run repeated, the later record
    elif kind == "scalars":
        # Of one step there may be several records: training and validation write theirs apart.
        run.scalars.setdefault(int(record["step"]), {}).update(record["values"])
    elif kind == "alarm" and record not in run.alarms:  # a resumed run repeats steps, and so may repeat their alarms
        run.alarms.append(record)


REQUIRED: dict[str, dict[str, type]] = {
    "step": {"step": int, "layers": dict},
    "scalars": {"step": int, "values": dict},
    "alarm": {"step": int, "layer": str, "text": str},
}


def _parse(path: Path, text: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the records, and notes on what was left out."""
    records: list[dict[str, Any]] = []
    ended = text.endswith("\n") or not text  # a run that was killed while it wrote leaves a part of a line
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            # Records of other kinds pass: a later version may add some.
            needed = REQUIRED.get(record.get("kind"), {})
            wrong = [
                f"{key} ({kind.__name__})" for key, kind in needed.items() if not isinstance(record.get(key), kind)
            ]
            if wrong:
                raise ValueError(f"no {', '.join(wrong)}")
        except (ValueError, AttributeError, TypeError) as error:
            # Only the very last line, and only without its newline, can come from a run that was killed.
            if number == len(lines) and not ended:
                return records, [f"line {number} was cut off and is left out"]
            raise value_error(
                f"telemetry: {path}, line {number} is damaged.",
                got=f"{line[:60]!r}: {error}", needs="one JSON record per line", fix="remove the line"
            ) from error
        records.append(record)
    return records, []
