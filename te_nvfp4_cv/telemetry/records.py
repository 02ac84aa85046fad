"""Telemetry's file format: JSON lines, one record per line, and its reader.

    {"kind": "run", "format": FORMAT, "version": 1, "name", "group", "model", "recipe" (TOML), "every", "started",
     "layers": [{"name", "op", "shape"}]}                                         first line; another one at each resume
    {"kind": "step", "step": 100, "layers": {name: {"op", "precision": "nvfp4" | "high", "reason", "tensors",
     ["flip_rate", "oscillation", "gradient": {"norm", "noise", "ratio", "alarm"}]}}}
    {"kind": "scalars", "step": 100, "values": {"train/loss": 0.91}}
    {"kind": "alarm", "step": 100, "layer": "up.3.conv.0", "text": "..."}

    tensors    weight, weight_column, input, input_column, grad_output, grad_output_column, weight_gradient; each
               {"raw": stats, and in NVFP4 "codes": stats + "usage", "dequantized": stats, "scales", "sqnr_db",
               "correlation", "underflow", "saturation"} (statistics.py); any may be absent. Of a sample of "count"
               values, but for "amax" and "nonfinite" of raw
    flip_rate  share of weight codes that differ from the sample before; oscillation: that went back to the one before

Numbers that are not finite are null. A resumed run goes on in the same file: of records of one kind and step the later
one counts. A last line that was cut off is dropped; a damaged line elsewhere is refused, with its number.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from te_nvfp4_cv.errors import value_error

FORMAT, VERSION = "te_nvfp4_cv.telemetry", 1


def dumps(record: Any) -> str:
    """A record as one line of strict JSON."""
    return json.dumps(_finite(record), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@dataclass
class Run:
    """One file, read. `steps` and `scalars` map a step to its layers and to its values, in ascending order."""

    path: Path
    name: str
    group: str
    model: str
    recipe: str
    every: int
    started: str
    layers: list[str]
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    scalars: dict[int, dict[str, Any]] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def series(self, layer: str, *keys: str) -> list[float | None]:
        """One number of a layer at every sampled step, None where it is absent: series("conv1", "flip_rate"), or
        series("conv1", "tensors", "weight", "raw", "std").
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
        ValueError: a missing, empty, damaged or foreign file, or one of a newer version.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise value_error(
            f"telemetry: {path} cannot be read.",
            got=str(error),
            needs="a JSON lines file that telemetry wrote",
            fix="give the telemetry.jsonl of a run",
        ) from error
    records, notes = _parse(path, text)
    if not records or records[0].get("format") != FORMAT or records[0].get("kind") != "run":
        raise value_error(
            f"telemetry: {path} is no telemetry file.",
            got="no records" if not records else f"a first line with format {records[0].get('format')!r}",
            needs=f'a first line {{"kind": "run", "format": "{FORMAT}", ...}}',
            fix="give the telemetry.jsonl of a run",
        )
    head = [record for record in records if record.get("kind") == "run"][-1]
    if not isinstance(head.get("version"), int) or head["version"] > VERSION:
        raise value_error(
            f"telemetry: {path} is of another version.",
            got=f"version {head.get('version')!r}",
            needs=f"at most {VERSION}",
            fix="install the version of te_nvfp4_cv that wrote it",
        )
    layers, every = head.get("layers", []), head.get("every", 0)
    named = isinstance(layers, list) and all(isinstance(layer, dict) and "name" in layer for layer in layers)
    if not named or not isinstance(every, int):
        raise value_error(
            f"telemetry: {path}: its header is damaged.",
            got=f"layers {str(layers)[:60]}, every {every!r}",
            needs="a list of tables with names, and a number",
            fix="give the telemetry.jsonl of a run",
        )
    run = Run(
        path,
        name=str(head.get("name", "")),
        group=str(head.get("group", "")),
        model=str(head.get("model", "")),
        recipe=str(head.get("recipe", "")),
        every=every,
        started=str(head.get("started", "")),
        layers=[str(layer["name"]) for layer in layers],
        notes=notes,
    )
    for record in records:
        _take(run, record)
    run.steps, run.scalars = dict(sorted(run.steps.items())), dict(sorted(run.scalars.items()))
    known = set(run.layers)
    for held in run.steps.values():
        run.layers += [name for name in held if name not in known]
        known.update(held)
    return run


def _take(run: Run, record: dict[str, Any]) -> None:
    kind = record.get("kind")
    if kind == "step":
        run.steps[int(record["step"])] = record["layers"]
    elif kind == "scalars":
        run.scalars.setdefault(int(record["step"]), {}).update(record["values"])
    elif kind == "alarm" and record not in run.alarms:
        run.alarms.append(record)


REQUIRED: dict[str, dict[str, type]] = {
    "step": {"step": int, "layers": dict},
    "scalars": {"step": int, "values": dict},
    "alarm": {"step": int, "layer": str, "text": str},
}


def _parse(path: Path, text: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(records, notes)."""
    records: list[dict[str, Any]] = []
    lines = text.split("\n")
    ended = lines.pop() == "" if lines else True
    if not ended:
        lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            needed = REQUIRED.get(record.get("kind"), {})
            wrong = [
                f"{key} ({kind.__name__})" for key, kind in needed.items() if not isinstance(record.get(key), kind)
            ]
            if wrong:
                raise ValueError(f"no {', '.join(wrong)}")
        except (ValueError, AttributeError, TypeError) as error:
            if number == len(lines) and not ended:
                return records, [f"line {number} was cut off and is left out"]
            raise value_error(
                f"telemetry: {path}, line {number} is damaged.",
                got=f"{line[:60]!r}: {error}",
                needs="one JSON record per line",
                fix="remove the line",
            ) from error
        records.append(record)
    return records, []
