"""The fixtures do what they say: otherwise every test that relies on them would pass by luck."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_poison_floating(poison, dtype):
    x = torch.zeros(3, dtype=torch.float32)
    for tensor in (
        torch.empty(2, 3, dtype=dtype),
        torch.empty_like(x, dtype=dtype),
        x.new_empty(5, dtype=dtype),
        torch.empty_strided((2, 2), (1, 2), dtype=dtype),
        torch.empty(1, 4, 2, 2, dtype=dtype, memory_format=torch.channels_last),
    ):
        assert tensor.dtype == dtype and tensor.float().isnan().all()


def test_poison_integers(poison):
    assert (torch.empty(7, dtype=torch.uint8) == 255).all()
    assert (torch.empty(7, dtype=torch.int32) == -1).all()
    assert torch.empty(0).numel() == 0


def test_without_poison_nothing_is_patched():
    assert torch.empty.__name__ == "empty"


def test_seed_is_fixed():
    assert torch.initial_seed() == 0


PLANTED = """
import pytest, torch

def allowed():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

def test_before():
    torch.backends.cuda.matmul.allow_tf32 = True
    assert allowed() == (True, True)

@pytest.mark.gpu
def test_marked():
    assert allowed() == (False, False)

@pytest.mark.gpu
@pytest.mark.xfail(strict=True, raises=KeyError)
def test_marked_and_failing():
    raise KeyError if allowed() == (False, False) else AssertionError

def test_afterwards():
    assert allowed() == (True, True)
"""


def test_tf32_is_off_in_tests_marked_gpu_and_restored_after_each(tmp_path):
    """With the fixture alone, without what skips tests marked gpu on a CPU."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import no_tf32\n")
    (tmp_path / "test_planted.py").write_text(PLANTED)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert result.returncode == 0 and "3 passed, 1 xfailed" in result.stdout, result.stdout + result.stderr
