"""The zoo: its table, a dozen of its models through all checks, its runner with crashes and hangs, its page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from te_nvfp4_cv.cli.trial.run import CHECKS, try_model
from tests.examples.unet_coco_data import EXAMPLES  # noqa: F401  (puts examples/ on the path)

from zoo import page, run  # noqa: E402  isort: skip
from zoo.models import LIGHT, MODELS, in_turn, library_of  # noqa: E402  isort: skip

pytestmark = pytest.mark.usefixtures("one_thread")
# One of each kind of layer and of forward: residual sums, 1x1 squeezes, inverted residuals, recomputation, attention.
SHORT = [
    f"torchvision/{name}"
    for name in ("resnet18", "squeezenet1_1", "mobilenet_v2", "densenet, memory_efficient", "vit", "swin")
]
OPEN: dict[str, set[str]] = {}  # findings that are open: of these checks alone a model may fail
# Some checks take longer than all others together, and most models give them nothing new: here by the models for which
# `make test` runs them. The others do in `make stress`, and all models of the table in `make zoo`.
COMPILED = ("torchvision/densenet, memory_efficient", "torchvision/vit")  # recomputes in the model; has no convolution
FEW = {
    "compile": COMPILED,
    "both": COMPILED,
    "onnx": ("torchvision/squeezenet1_1", "torchvision/mobilenet_v2", "torchvision/vit", "torchvision/swin"),
}


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_table_has_enough_models_of_each_library() -> None:
    assert len(MODELS) >= 120 and len(LIGHT) == 12 and set(LIGHT) <= MODELS.keys()
    assert set(SHORT) < set(LIGHT)
    assert all(set(names) < set(SHORT) and check in CHECKS for check, names in FEW.items())
    assert {library_of(name) for name in MODELS} == {
        "timm", "transformers", "monai", "smp", "diffusers", "ultralytics", "kornia", "demucs", "torchvision",
    }
    assert all(name == subject.name for name, subject in MODELS.items())


def test_every_library_of_the_table_is_installed_by_make_zoo() -> None:
    text = (run.ROOT / "examples" / "zoo" / "requirements.txt").read_text() + (run.ROOT / "Makefile").read_text()
    pinned = set(re.findall(r"([\w-]+)==", text + (run.ROOT / "constraints.txt").read_text()))
    assert {run.PACKAGES.get(name, name) for name in map(library_of, MODELS)} <= pinned


def test_libraries_take_turns() -> None:
    assert in_turn(["a/1", "a/2", "a/3", "b/1", "c/1", "c/2"]) == ["a/1", "b/1", "c/1", "a/2", "c/2", "a/3"]


def check_light(name: str, checks: list[str]) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("onnxruntime")
    row = try_model(MODELS[name], checks=checks)
    open_checks = OPEN.get(name, set())
    assert {check for check, cell in row.cells.items() if cell.ok is False} <= open_checks, str(row)
    assert list(row.cells) == checks and row.parameters > 1000
    assert all(row.cells[check].ok for check in {"step", "share", "gradient"} - open_checks), str(row)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_light_model_passes_the_checks(name: str) -> None:
    check_light(name, [check for check in CHECKS if name in FEW.get(check, LIGHT)])


@pytest.mark.stress
@pytest.mark.parametrize("name", LIGHT)
def test_a_light_model_passes_all_checks(name: str) -> None:
    check_light(name, list(CHECKS))


# ---- the runner -----------------------------------------------------------------------------------------------------


def script(text: str) -> Any:
    """A command for `guarded`: the text runs with the model's name and the file of its row as NAME and PATH."""
    head = "import sys, os, json, time; NAME, PATH = sys.argv[1:]\n"
    head += "put = lambda row: open(PATH, 'w').write(json.dumps(row))\n"
    return lambda name, path: [sys.executable, "-c", head + text, name, str(path)]


def test_a_row_comes_back() -> None:
    row = run.guarded("a/b", 60, script("put({'name': NAME, 'cells': {}, 'running': None})"))
    assert row == {"name": "a/b", "cells": {}}


def test_a_crash_is_a_row_with_what_was_found_before() -> None:
    cells = {"step": {"ok": True, "text": "ok"}}
    text = f"put({{'name': NAME, 'cells': {cells!r}, 'running': 'share'}}); print('oh'); sys.stdout.flush(); os.abort()"
    row = run.guarded("a/b", 60, script(text))
    assert row is not None and row["cells"].pop("step") == cells["step"]
    assert row["cells"] == {"share": {"ok": False, "text": "the process ended with status -6: oh"}}


def test_a_hang_is_a_row() -> None:
    row = run.guarded("a/b", 1, script("put({'name': NAME, 'running': 'compile'}); time.sleep(60)"))
    assert row is not None and row["cells"] == {"compile": {"ok": False, "text": "no end within 1 s"}}
    row = run.guarded("a/b", 1, script("time.sleep(60)"))  # before the first check: while the model is imported
    assert row is not None and row["name"] == "a/b" and row["cells"]["step"]["ok"] is False


def test_a_model_whose_package_is_missing_has_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.guarded("a/b", 60, script("print('no such package'); sys.exit(3)")) is None
    assert "a/b: not installed: no such package" in capsys.readouterr().err


def test_one_process_writes_the_row_of_its_model(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr("te_nvfp4_cv.cli.trial.run.CHECKS", {n: CHECKS[n] for n in ("step", "share")})
    assert run.one("torchvision/mnasnet0_5", tmp_path / "row.json") == 0
    row = json.loads((tmp_path / "row.json").read_text())
    assert list(row["cells"]) == ["step", "share"] and row["running"] is None
    assert row["versions"].keys() == {"torch", "torchvision"}


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    checks: list[list[str]] = []

    def fake(name: str, limit: float, command: Any) -> dict[str, Any] | None:
        asked.append(name)
        checks.append(command("a", tmp_path)[6:])
        return {"name": name, "cells": {"step": {"ok": True, "text": "ok"}}, "seconds": 1.0}

    monkeypatch.setattr(run, "guarded", fake)
    monkeypatch.setattr(run, "current_commit", lambda: "one")
    out = tmp_path / "rows.jsonl"
    words = ["--out", str(out), "--jobs", "1"]
    assert run.main(["kornia/.*", *words]) == 0 and len(asked) == 4
    out.write_text(out.read_text() + '{"model": "kornia/cut')  # a run that was stopped while it wrote
    assert run.main(["kornia/.*", "demucs/.*", *words]) == 0 and len(asked) == 6
    rows = run.read_rows(out)
    assert len(rows) == 6 and {row["commit"] for row in rows} == {"one"}
    monkeypatch.setattr(run, "current_commit", lambda: "two")
    assert run.main(["kornia/.*", "--missing", *words]) == 0 and len(asked) == 6
    assert run.main(["kornia/.*", *words]) == 0 and len(asked) == 10
    assert run.main(["kornia/.*", "--again", *words]) == 0 and len(asked) == 14
    assert set(map(tuple, checks)) == {()}
    # A row of a few checks stands for those alone.
    few = ["kornia/.*", "--checks", "step", "save", *words]
    monkeypatch.setattr(run, "current_commit", lambda: "three")
    assert run.main(few) == 0 and len(asked) == 18 and checks[-1] == ["--checks", "step", "save"]
    assert run.main(few) == 0 and len(asked) == 18
    assert run.main(["kornia/.*", "--checks", "lists", *words]) == 0 and len(asked) == 22
    assert run.main(["kornia/.*", *words]) == 0 and len(asked) == 26
    assert run.main(["nothing", *words]) == 2 and "no model of that name" in capsys.readouterr().err


def test_a_line_that_is_no_row_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text('{"model": "a/b"}\n{"model": "a/b", "commit": "c"}\n')
    with pytest.raises(ValueError, match="line 1 is no row"):
        run.read_rows(out)


def test_a_commit_with_changes_has_a_plus() -> None:
    assert re.fullmatch(r"([0-9a-f]{10}\+?)?", run.current_commit())


# ---- the page -------------------------------------------------------------------------------------------------------


def row(model: str, commit: str, **cells: Any) -> dict[str, Any]:
    found = {name: {"ok": ok, "text": text} for name, (ok, text) in cells.items()}
    return {"model": model, "commit": commit, "cells": found, "versions": {"torch": "2.13.0", "kornia": "0.9"}}


def test_the_page_shows_the_newest_row_of_each_model() -> None:
    rows = [
        row("kornia/HardNet", "one", step=(False, "stale")),
        row("kornia/HardNet", "two", step=(True, "ok"), share=(True, "92%"), onnx=(None, "torch"), save=(False, "a|b")),
        row("gone/gone", "two", step=(True, "ok")),
        {"model": "kornia/DexiNed", "commit": "two", "versions": {}, "error": "TypeError: no"},
    ]
    text = page.page(page.newest(rows))
    assert "| kornia/HardNet | ok | 92% |" in text and "| two |" in text and "stale" not in text and "gone" not in text
    assert "| kornia/HardNet | save | a\\|b |" in text
    assert "| save | 0 | 1 | 0 |" in text and "| onnx | 0 | 0 | 1 |" in text
    assert f"Of {len(MODELS)} models, {len(MODELS) - 2} without a row" in text and "kornia/Unet" in text
    assert "- kornia/DexiNed: TypeError: no" in text and "kornia 0.9, torch 2.13.0." in text


def test_a_row_of_a_few_checks_takes_their_place_in_that_of_all() -> None:
    whole = row("kornia/HardNet", "one", step=(True, "ok"), save=(False, "old"), lists=(False, "old"))
    few, more = ({"asked": ["save"]} | row("kornia/HardNet", c, save=(True, c)) for c in ("two", "three"))
    merged = page.newest([few, whole, more])["kornia/HardNet"]
    assert merged["commit"] == "one; save: three" and merged["cells"]["lists"]["text"] == "old"
    assert [cell["ok"] for cell in merged["cells"].values()] == [True, True, False]
    assert page.newest([few, more])["kornia/HardNet"]["commit"] == "two; save: three"
    assert page.newest([few, whole])["kornia/HardNet"]["cells"] == whole["cells"]
    assert page.newest([few, whole | {"error": "no"}])["kornia/HardNet"]["commit"] == "one"


def test_the_page_in_the_documentation_is_that_of_the_rows() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(page.newest(run.read_rows(run.ROWS)))
