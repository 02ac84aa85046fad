"""Telemetry's sinks: nothing is overwritten, and nothing that goes wrong with them ends a run."""

from __future__ import annotations

import json
import struct
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from te_nvfp4_cv import errors
from te_nvfp4_cv.telemetry import JSONL, TensorBoard, WandB, drawing, fresh_path, read, weights_and_biases
from tests.telemetry.fake_wandb import FakeRun, fake_wandb
from tests.telemetry.synthetic_runs import header, layer, write_run

DRAW = drawing.image


@pytest.fixture(autouse=True)
def told_anew(monkeypatch):
    monkeypatch.setattr(errors, "_warned", set())
    monkeypatch.setattr(drawing, "image", lambda figure: Image.new("RGB", (1, 1)))  # drawing takes longest


def records(count: int = 2) -> list[dict[str, Any]]:
    import random

    rng = random.Random(0)
    return [
        {"kind": "step", "step": 10 * i, "layers": {"conv": layer(rng, 10 * i, not i, 0.5, False, False)}}
        for i in range(count)
    ]


def feed(sink: Any) -> None:
    sink.start(header("nvfp4", ["conv"]))
    for record in records():
        sink.step(record)
        sink.scalars(record["step"], {"train/loss": 1.0 / (1 + record["step"])})
    sink.alarm({"kind": "alarm", "step": 10, "layer": "conv", "text": "noise"})
    sink.close({"miou": 0.5})


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def test_json_lines_are_written_at_once_and_read_back(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    sink = JSONL(path)
    sink.start(header("nvfp4", ["conv"]))
    assert read(path).name == "nvfp4"
    sink.step(records()[0])
    assert list(read(path).steps) == [0]


def test_a_file_that_is_there_is_never_overwritten(tmp_path):
    path = write_run(tmp_path / "run.jsonl", steps=2)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        JSONL(path).start(header("nvfp4", ["conv"]))
    assert path.read_bytes() == before
    assert fresh_path(path) == tmp_path / "run_2.jsonl" and fresh_path(tmp_path / "b.jsonl").name == "b.jsonl"
    (tmp_path / "run_2.jsonl").touch()
    assert fresh_path(path).name == "run_3.jsonl"


def test_a_resume_goes_on_behind_the_last_whole_line(tmp_path):
    path = write_run(tmp_path / "run.jsonl", steps=2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "st')
    sink = JSONL(path, resume=True)
    sink.start(header("nvfp4", ["conv"]))
    assert path.read_bytes().startswith(whole + b'{"kind":"run"')
    sink.scalars(300, {"train/loss": 0.5})
    assert read(path).scalars[300] == {"train/loss": 0.5} and not read(path).notes


def test_a_foreign_file_is_not_cut(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in (b"PK\x03\x04 something\nelse", b"one line", b'{"kind":"other"}\n{"a'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no telemetry file"):
            JSONL(path, resume=True).start(header("nvfp4", ["conv"]))
        assert path.read_bytes() == content


def test_a_sink_of_another_rank_touches_nothing(tmp_path):
    JSONL(tmp_path / "a.jsonl"), TensorBoard(log_dir=tmp_path / "events"), WandB(project="p", folder=tmp_path / "wandb")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        JSONL(tmp_path / "file" / "run.jsonl").start(header("nvfp4", ["conv"]))


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path, monkeypatch):
    sink = JSONL(tmp_path / "run.jsonl")
    feed(sink)
    size = (tmp_path / "run.jsonl").stat().st_size

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.warns(UserWarning, match="written no further.*No space left") as seen:
        for _ in range(2):
            sink.step(records()[0])
    assert len(seen) == 1 and (tmp_path / "run.jsonl").stat().st_size == size


# ---- Weights & Biases -----------------------------------------------------------------------------------------------


def logged_offline(path: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What a file of W&B's holds: the type of each thing that was logged, and the files of each artifact.

    Nothing, while it is written: a process of W&B's does that, also after finish() has returned.

    It is a log of LevelDB: blocks of 32 KiB, in them pieces with checksum, length and kind (1: whole, 4: the last
    one), and in those protobuf records.
    """
    from wandb.proto import wandb_internal_pb2

    content, at, joined = path.read_bytes(), 7, b""
    types: dict[str, str] = {}
    files: dict[str, list[str]] = {}
    ended = False
    while at + 7 <= len(content):
        room = (1 << 15) - at % (1 << 15)
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        joined += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):
            continue
        record = wandb_internal_pb2.Record.FromString(joined)
        joined = b""
        ended |= record.HasField("exit")
        for item in record.history.item:
            name, *rest = item.nested_key or [item.key]
            types.setdefault(name, "number")
            if rest == ["_type"]:
                types[name] = json.loads(item.value_json)
        if record.HasField("artifact"):
            name = record.artifact.name.split("-", 2)[2]
            files[name] = [entry.path for entry in record.artifact.manifest.contents]
    return (types, files) if ended else ({}, {})


def test_wandb_writes_a_run_offline(tmp_path, monkeypatch):
    """The file of a real run holds what a dashboard shows: charts, histograms, pictures, tables with pictures, a page.

    Nothing is uploaded: there is no server here.
    """
    for package in ("wandb", "matplotlib"):
        pytest.importorskip(package, reason="needs the extra [telemetry]")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sink = WandB("project", group="group", name="nvfp4", folder=tmp_path, config={"lr": 0.1})
        (tmp_path / "page.html").write_text("<html><body>both</body></html>")
        with monkeypatch.context() as patch:
            patch.setattr(sink, "close", lambda summary: None)
            feed(sink)
        sink.page("report", tmp_path / "page.html", 10)
        sink.table("predictions", ["image", "score"], [[np.zeros((8, 8, 3), np.uint8), 0.5]], 10)
        sink.close({"miou": 0.5})
    assert not [w for w in seen if "W&B" in str(w.message)]
    deadline, types = time.monotonic() + 60, {}
    while not types and time.monotonic() < deadline:
        time.sleep(0.2)
        for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb"):
            types, artifacts = logged_offline(path)
    expected = {
        "weight/conv/sqnr_db": "number", "train/loss": "number", "input/conv/values": "histogram",
        "report": "html-file",
        "layers/weight/std": "image-file", "heatmap/input/conv": "image-file", "curves/input/sqnr": "image-file",
        "operands": "table-file", "predictions": "table-file",
    }  # fmt: skip
    assert {name: types.get(name) for name in expected} == expected
    assert len(artifacts["predictions"]) == 2 and any(name.endswith(".png") for name in artifacts["predictions"])


def test_one_run_on_one_step_axis(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert fake_wandb(monkeypatch, {"offline": run}) == []
    feed(WandB(project="p", group="g", name="nvfp4", folder=tmp_path))
    assert (("*",), {"step_metric": "step"}) in run.metrics and run.finished and run.summary == {"miou": 0.5}
    assert all("step" in values for values in run.logged)
    first = run.logged[0]
    assert {"weight/conv/sqnr_db", "input/conv/underflow", "weight_gradient/conv/to_noise"} <= set(first)
    assert "weight/conv/flip_rate" not in first and "weight/conv/flip_rate" in run.logged[2]
    counts, edges = first["weight/conv/values"]
    assert len(edges) == len(counts) + 1 and edges[0] == -edges[-1]


def test_pictures_and_tables_by_operand_and_layer(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra [telemetry]")
    run = FakeRun()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake_wandb(monkeypatch, {"offline": run})
    sink = WandB(project="p", folder=tmp_path)
    monkeypatch.setattr(weights_and_biases, "MOST_STEPS", 4)
    monkeypatch.setattr(drawing, "image", DRAW)
    sink.start(header("nvfp4", ["conv"]))
    for record in records(7):
        sink.step(record)
    picture = np.zeros((8, 8, 3), np.uint8)
    sink.table("predictions", ["image", "score"], [[picture, 0.5]], 60)
    sink.close()
    by_name = {name: value for values in run.logged for name, value in values.items()}
    assert by_name["predictions"] == (["image", "score"], [[(picture, ""), 0.5]])
    columns, rows = by_name["operands"]
    last = records(7)[-1]["layers"]["conv"]["tensors"]
    assert [row[:2] for row in rows] == [[name, "conv"] for name in weights_and_biases.OPERANDS]
    assert rows[1][columns.index("sqnr_db")] == last["input"]["sqnr_db"] and rows[3][columns.index("sqnr_db")] is None
    for name in ("layers/weight/std", "layers/grad_output/sqnr", "curves/input/sqnr", "heatmap/input/conv"):
        drawn, text = by_name[name]
        assert min(drawn.size) > 100 and len(drawn.getcolors(1 << 20)) > 8 and text
    assert by_name["heatmap/weight_gradient/conv"][1].endswith("steps 0 to 60"), "both ends stay in the picture"
    assert 2 < len(sink._seen.steps) <= 5


def test_an_open_run_is_joined_and_left_open(monkeypatch):
    run = FakeRun()
    assert fake_wandb(monkeypatch, {}) == []  # init would fail
    feed(WandB(run))
    assert not run.finished and run.summary == {"miou": 0.5}
    assert all(values.keys() >= {"nvfp4/step"} and "step" not in values for values in run.logged)
    axes = {names[0]: options.get("step_metric") for names, options in run.metrics}
    # The figures of the user keep their axis: no pattern takes all.
    charts = dict.fromkeys([name for name in axes if name != "nvfp4/step"], "nvfp4/step")
    assert {"weight/conv/*", "input/conv/*", "train/loss", "alarm/conv", "heatmap/input/conv"} <= charts.keys()
    assert not any(name.startswith("*") for name in charts)
    assert axes == {"nvfp4/step": None} | charts and len(run.metrics) == len(axes)
    with pytest.raises(ValueError, match="(?s)joins a run or begins one.*project") as caught:
        WandB(run, project="shapes")
    assert "fix:" in str(caught.value)


def test_what_wandb_init_takes_reaches_it(tmp_path, monkeypatch):
    taken: dict[str, Any] = {}
    fake_wandb(monkeypatch, {})
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **options: taken.update(options) or FakeRun())
    monkeypatch.setenv("WANDB_MODE", "online")
    feed(WandB(project="p", folder=tmp_path / "new", tags=["a"], mode="disabled", config={"lr": 1}))
    settings = taken.pop("settings")
    given = {"project": "p", "dir": str(tmp_path / "new"), "tags": ["a"], "mode": "disabled", "config": {"lr": 1}}
    assert taken == given and settings["reinit"] == "create_new" and (tmp_path / "new").is_dir()
    taken.clear()
    feed(WandB())
    assert set(taken) == {"settings", "mode"}, "W&B chooses the project and the folder itself"


def test_a_login_that_fails_goes_on_offline(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.setenv("WANDB_MODE", "online")
    modes = fake_wandb(monkeypatch, {"online": RuntimeError("api_key not configured"), "offline": run})
    with pytest.warns(UserWarning, match=r"continues offline: api_key") as seen:
        feed(WandB(project="p", group="g", name="nvfp4", folder=tmp_path))
        feed(WandB(project="p", group="g", name="bf16", folder=tmp_path))
    assert len(seen) == 1 and modes == ["online", "offline"] * 2 and run.finished


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_whatever_breaks_is_told_once_and_the_run_goes_on(breaks, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    fake_wandb(monkeypatch, {"offline": OSError("no disk") if breaks == "init" else FakeRun(breaks)})
    with pytest.warns(UserWarning) as seen:
        feed(WandB(project="p", group="g", name="nvfp4", folder=tmp_path))
    assert len(seen) == 1 and "W&B" in str(seen[0].message)


def test_what_wandb_does_not_take_is_told_and_all_else_is_logged(tmp_path, monkeypatch):
    run = FakeRun()
    fake_wandb(monkeypatch, {"offline": run})
    sink = WandB(project="p", mode="offline")
    sink.start(header("nvfp4", ["conv"]))
    with pytest.warns(UserWarning, match="W&B does not get 'lost'.*missing.png"):
        sink.image("lost", tmp_path / "missing.png", 0)
    monkeypatch.setattr(sys.modules["wandb"], "Table", None)  # as of cells of two types, which W&B refuses
    with pytest.warns(UserWarning, match="W&B does not get 'mixed'"):
        sink.table("mixed", ["a"], [[1], ["text"]], 0)
    sink.scalars(1, {"train/loss": 0.5})
    assert run.logged[-1]["train/loss"] == 0.5


def test_without_wandb_it_is_said_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="wandb is not installed"):
        feed(WandB(project="p", group="g", name="nvfp4", folder=tmp_path))


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


def test_tensorboard_values_are_read_back(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra [telemetry]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    feed(TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    second = records()[1]["layers"]["conv"]
    found = {event.step: event.value for event in events.Scalars("weight/conv/flip_rate")}
    assert found == {10: pytest.approx(second["flip_rate"])}
    assert [e.value for e in events.Scalars("train/loss")] == [pytest.approx(1.0), pytest.approx(1 / 11)]
    histogram = events.Histograms("weight/conv/values")[0].histogram_value
    assert histogram.num == sum(records()[0]["layers"]["conv"]["tensors"]["weight"]["raw"]["histogram"])


def test_a_tensorboard_run_that_goes_on_shows_each_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra [telemetry]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, purge_step in ((0, None), (2, 2)):  # stopped after step 3; goes on from a checkpoint before step 2
        sink = TensorBoard(tmp_path, purge_step)
        sink.start(header("nvfp4", ["conv"]))
        for step in range(first, 4):
            sink.scalars(step, {"train/loss": float(step)})
        sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]


def test_without_tensorboard_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        TensorBoard(tmp_path).start(header("nvfp4", ["conv"]))


def test_every_line_is_strict_json(tmp_path):
    feed(JSONL(tmp_path / "run.jsonl"))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for line in (tmp_path / "run.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
