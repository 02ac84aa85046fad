"""The tutorial notebook runs as it stands: every assertion in it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_tutorial_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs the extra [telemetry]")
    pyplot.switch_backend("agg")
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"tutorial.ipynb, cell {number}", "exec"), names)
    text = capsys.readouterr().out
    assert len(cells) == 12 and text.count("against the library") == 2 and "step 29" in text
    assert len(pyplot.get_fignums()) == 3 and all(pyplot.figure(number).axes for number in pyplot.get_fignums())
    pyplot.close("all")


def test_no_outputs_are_stored() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs: they are not checked"
