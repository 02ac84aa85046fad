"""The search for meta-parameters on a GPU: it runs, is kept, changes no bits, and stays out of CUDA graphs."""

from __future__ import annotations

import json

import pytest
import torch

from te_nvfp4_cv.backend import cache, tuning
from te_nvfp4_cv.ops.quantize import operand
from tests.helpers import same_bits

pytestmark = pytest.mark.gpu
ARGUMENTS = (1, [1, 0, 8, 0, 32], 2, 1, True, False, "", 448, False, torch.bfloat16, None, None, "vendor")


@pytest.fixture
def searching(monkeypatch, tmp_path):
    monkeypatch.setenv("TE_NVFP4_CV_CACHE", str(tmp_path))
    monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", "1")
    cache.forget()
    tuning.forget()
    yield tmp_path
    cache.forget()
    tuning.forget()


def test_a_search_changes_no_bits_and_is_kept(searching, monkeypatch):
    x = torch.randn(32, 8, 8, 64, device="cuda", dtype=torch.bfloat16)
    found = operand.quantize_operand(x, *ARGUMENTS)
    (path,) = searching.glob("tuned_*.json")
    kept = json.loads(path.read_text())["content"]
    assert any(entry.startswith("quantize") for entry in kept)
    monkeypatch.setattr(tuning, "milliseconds", lambda run: pytest.fail("searched again"))
    tuning.forget()
    again = operand.quantize_operand(x, *ARGUMENTS)
    monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", "0")
    table = operand.quantize_operand(x, *ARGUMENTS)
    assert all(
        same_bits(a.cpu(), b.cpu()) and same_bits(a.cpu(), c.cpu()) for a, b, c in zip(found, again, table, strict=True)
    )


def test_a_search_counts_saturated_blocks_once(searching, monkeypatch):
    x = torch.randn(32, 8, 8, 64, device="cuda", dtype=torch.bfloat16)
    low = torch.full((2,), 6.0 * 448 * 2.0**-13, device="cuda")
    counts = []
    for search in ("1", "0"):
        monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", search)
        counts.append(float(operand.quantize_operand(x, *ARGUMENTS[:-2], low, "vendor")[6][2]))
    assert counts[0] == counts[1] > 0


def test_no_search_in_a_graph(searching, monkeypatch):
    x = torch.randn(32, 8, 8, 64, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", "0")
    for _ in range(2):
        operand.quantize_operand(x, *ARGUMENTS)
    torch.cuda.synchronize()
    monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", "1")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operand.quantize_operand(x, *ARGUMENTS)
    graph.replay()
    torch.cuda.synchronize()
    assert not list(searching.glob("tuned_*.json"))


def test_times_are_of_the_gpu():
    a = torch.randn(4096, 4096, device="cuda")
    short, long = (tuning.milliseconds(lambda n=n: [a @ a for _ in range(n)]) for n in (1, 8))  # type: ignore[misc]
    assert 4 < long / short < 16
