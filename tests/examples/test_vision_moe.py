"""The example with experts: it trains, its experts run in NVFP4, and it reads CIFAR-10 from a folder."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import run_script

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "vision_moe.py"
SMALL = ("--width", 32, "--depth", 2, "--experts", 3, "--batch", 16)


def test_it_learns_drawn_images_in_both_precisions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(SCRIPT, "--steps", 20, "--lr", 3e-3, *SMALL) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    experts = [row for row in rows if row[1:2] == ["grouped_linear"]]
    assert {row[0]: row[3] for row in experts} == {"blocks.1.mlp.up": "nvfp4", "blocks.1.mlp.down": "nvfp4"}
    for name in ("high", "nvfp4"):
        (row,) = [row for row in rows if row[:2] == [name, "loss"]]
        first, last = float(row[2]), float(row[4])
        assert last < first - 0.1
    assert "tokens of each expert, mixture 0:" in text


def test_it_reads_cifar10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL", reason="the extra [train]")
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        rows = rng.integers(0, 256, (8, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(tmp_path / f"{name}.bin")
    assert run_script(SCRIPT, "--data", tmp_path, "--steps", 1, *SMALL) == 0
    assert "accuracy" in capsys.readouterr().out
