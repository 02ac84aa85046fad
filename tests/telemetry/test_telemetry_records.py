"""Telemetry's files: what is written is read again; files that are cut off, damaged, foreign or resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from te_nvfp4_cv.telemetry import read
from te_nvfp4_cv.telemetry.records import FORMAT, dumps
from tests.telemetry.synthetic_runs import NAMES, header, write_run


def test_what_was_written_is_read(tmp_path):
    run = read(write_run(tmp_path / "run.jsonl", layers=5, steps=6))
    assert (run.name, run.group, run.model, run.every, run.notes) == ("nvfp4", "camvid", "UNet", 100, [])
    assert run.layers == NAMES[5] and list(run.steps) == [0, 100, 200, 300, 400, 500] and "stem" in run.recipe
    assert run.scalars[100].keys() == {"train/loss", "val/miou"} and run.scalars[0].keys() == {"train/loss"}
    assert run.series("head", "flip_rate")[0] is None and all(run.series("head", "flip_rate")[1:])
    kurtosis = run.series("up.0.conv.0", "tensors", "weight", "raw", "kurtosis")
    assert kurtosis[3] is None and None not in kurtosis[:3]  # was NaN
    assert run.series("stem", "tensors", "weight", "codes", "mean") == [None] * 6  # in high precision
    assert run.series("nobody", "flip_rate") == [None] * 6 and len(run.alarms) == 1


def test_numbers_that_are_not_finite_become_null():
    text = dumps({"a": math.nan, "b": [math.inf, 1.5, -math.inf], "c": {"d": (2, True, None, "x")}})
    assert json.loads(text) == {"a": None, "b": [None, 1.5, None], "c": {"d": [2, True, None, "x"]}}
    assert "NaN" not in text and "Infinity" not in text


def test_a_line_that_was_cut_off_is_left_out_and_noted(tmp_path):
    path = write_run(tmp_path / "run.jsonl", layers=5, steps=3)
    whole = path.read_text()
    last = whole.rstrip("\n").rfind("\n")
    for cut in (last + 2, len(whole) - 9):
        path.write_text(whole[:cut])
        run = read(path)
        assert len(run.notes) == 1 and "cut off" in run.notes[0] and list(run.steps) == [0, 100, 200]
    path.write_text(whole.rstrip("\n"))  # only the end of the line is missing
    assert read(path).notes == [] and len(read(path).alarms) == 1


def test_a_damaged_line_in_the_middle_is_refused_by_its_number(tmp_path):
    path = write_run(tmp_path / "run.jsonl", layers=5, steps=3)
    lines = path.read_text().splitlines(True)
    for damaged in ('{"kind": "step", "step": 1', '{"kind": "step", "step": 100}', "[1, 2]", "null"):
        path.write_text("".join([*lines[:2], damaged + "\n", *lines[3:]]))
        with pytest.raises(ValueError, match="line 3 is damaged"):
            read(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"", "no telemetry file"),
        (b'{"a": 1}\n', "no telemetry file"),
        (b"\xff\xfe\x00", "cannot be read"),
        (f'{{"kind": "run", "format": "{FORMAT}", "version": 99}}\n'.encode(), "another version"),
        (f'{{"kind": "run", "format": "{FORMAT}"}}\n'.encode(), "another version"),
    ],
)
def test_other_files_are_refused(content, told, tmp_path):
    path = tmp_path / "file.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read(path)


def test_a_resumed_run_is_one_run_and_its_later_records_count(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    write_run(path, layers=5, steps=3)
    first = path.read_text()
    records = [json.loads(line) for line in first.splitlines()]
    again = [{**header("nvfp4", [*NAMES[5], "extra"]), "recipe": "second"}]
    for record in records:
        if record["kind"] == "step" and record["step"] == 200:
            record["layers"]["head"]["flip_rate"] = 0.75
            again.append(record)
    again.append({"kind": "scalars", "step": 200, "values": {"train/loss": 9.0}})
    again.append(records[-1])  # the alarm once more
    path.write_text(first + "".join(dumps(record) + "\n" for record in again))
    run = read(path)
    assert list(run.steps) == [0, 100, 200] and run.steps[200]["head"]["flip_rate"] == 0.75
    assert run.scalars[200]["train/loss"] == 9.0 and run.recipe == "second" and "extra" in run.layers
    assert len(run.alarms) == 1


def test_layers_that_the_header_does_not_know_come_last(tmp_path):
    path = tmp_path / "run.jsonl"
    lines = [header("x", ["a"]), {"kind": "step", "step": 0, "layers": {"a": {}, "attention.in_proj_weight": {}}}]
    path.write_text("".join(dumps(line) + "\n" for line in lines))
    assert read(path).layers == ["a", "attention.in_proj_weight"]
