"""What the command line says when something does not work: one block, and what a file is."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from te_nvfp4_cv import cli
from te_nvfp4_cv.errors import value_error


def blocks(text: str) -> list[int]:
    return [text.count(f"\n  {word}:") for word in ("got", "needs", "fix")]


def test_an_error_in_the_users_file_is_one_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "asks_for_too_much.py"
    file.write_text("import te_nvfp4_cv as nv\n\nnv.NVFP4Linear(16, 16, recipe='resnt')\n")
    assert cli.main(["coverage", f"{file}:build"]) == 2
    text = capsys.readouterr().err
    assert blocks(text) == [1, 1, 1] and "asks_for_too_much" in text and "did you mean 'resnet'" in text, text


def test_a_block_inside_of_a_block_is_drawn_out():
    inner = value_error("inner.", got="1", needs="2", fix="take 2")
    text = str(value_error("outer.", got=f"ValueError: {inner}", needs="something else", fix="correct it"))
    assert text == "outer: ValueError: inner.\n  got:   1\n  needs: 2\n  fix:   take 2"


def test_verify_says_what_a_checkpoint_of_torch_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "x.pt"
    torch.save({"model": torch.nn.Conv2d(3, 8, 3).half().state_dict(), "step": 3}, path)
    assert cli.main(["verify", str(path)]) == 1
    text = capsys.readouterr().out
    assert "checkpoint of torch.save" in text and "2 tensors of float16" in text, text
    assert f"export MODEL --checkpoint {path}" in text and blocks(text) == [1, 1, 1]
    path.write_bytes(pickle.dumps(Path))
    assert cli.main(["verify", str(path)]) == 1
    assert "something else than tensors" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
def test_a_model_of_torchvision_beside_any_torch():
    command = ["coverage", "torchvision.models:squeezenet1_1", "--input", "3", "32", "32", "--batch", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "te_nvfp4_cv.cli", *command], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0 and "layers and" in result.stdout, result.stderr
