"""What a run of examples/unet_coco shows: its lines, against a clock that the test turns, and the texts in pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples import unet_coco_data  # noqa: F401  (puts examples/ on the path)

from unet_coco import report, tracking  # noqa: E402  isort: skip
from unet_coco.options import parse_options  # noqa: E402  isort: skip
from unet_coco.precision import Precision  # noqa: E402  isort: skip


def test_images_per_second_and_the_time_left_are_those_of_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four images take a second; a validation between two lines takes 30, after three steps without a line."""
    now = 100.0
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now)
    progress = tracking.Progress("fp32", 20, 0)
    for step in range(1, 16):
        now += 1
        progress.step(step, 4, {"loss": 1.0, "lr": 1e-3} if step in (1, 5, 10, 15) else {})
        if step in (4, 8):
            with progress.phase("validating"):
                now += 30
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    assert [float(re.search(r"([\d.]+) images/s", line)[1]) for line in lines] == [4, 4, 4, 4]  # type: ignore[index]
    assert [line.split()[-2] for line in lines] == ["0:00:19", "0:00:15", "0:00:10", "0:00:05"]


def test_class_names_are_readable_in_most_alphabets() -> None:
    """Pillow's own font draws the same box for each letter that it lacks, such as the sharp s."""
    pytest.importorskip("matplotlib")

    def drawn(letter: str) -> bytes:
        return bytes(report.font(f"Stra{letter}e").getmask(letter))

    letters = "ßäčøłжщλΩ"
    assert len({drawn(letter) for letter in letters}) == len(letters) and drawn("\uffff") not in map(drawn, letters)
    assert report.font("street") is report.font() is not report.font("Straße")


def test_the_group_of_a_run_in_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(tracking.telemetry, "attach", lambda model, **about: told.update(about))
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    settings = parse_options(["--out", ".", "--no-wandb"])
    tracking.start_telemetry(torch.nn.Identity(), settings, Precision("fp32", None), "", Path("."), 1, 2)
    assert told["group"] == "runs"
