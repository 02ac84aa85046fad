"""The search for meta-parameters on a GPU: it runs, is kept, changes no bits, and stays out of CUDA graphs."""

from __future__ import annotations

import json

import pytest
import torch

from te_nvfp4_cv.backend import cache, tuning
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import DEQUANTIZED, PACKED, Operand, OperandSpec
from tests.helpers import same_codes

pytestmark = pytest.mark.gpu


def quantize(x: torch.Tensor, amax: torch.Tensor | None = None) -> Operand:
    spec = OperandSpec(1, Fold(1, 0, 8, 0, 32), DEQUANTIZED, PACKED, True)
    return operand.quantize_operand(x, spec, torch.bfloat16, None, amax, "vendor")


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
    found = quantize(x)
    (path,) = searching.glob("tuned_*.json")
    kept = json.loads(path.read_text())["content"]
    assert any(entry.startswith("quantize") for entry in kept)
    monkeypatch.setattr(tuning, "milliseconds", lambda run: pytest.fail("searched again"))
    tuning.forget()
    again = quantize(x)
    monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", "0")
    table = quantize(x)
    assert same_codes(found, again) and same_codes(found, table)


def test_a_search_counts_saturated_blocks_once(searching, monkeypatch):
    x = torch.randn(32, 8, 8, 64, device="cuda", dtype=torch.bfloat16)
    low = torch.full((2,), 6.0 * 448 * 2.0**-13, device="cuda")
    counts = []
    for search in ("1", "0"):
        monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", search)
        counts.append(float(quantize(x, low).observed[2]))
    assert counts[0] == counts[1] > 0


def test_no_search_in_a_graph(searching, monkeypatch):
    x = torch.randn(32, 8, 8, 64, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", "0")
    for _ in range(2):
        quantize(x)
    torch.cuda.synchronize()
    monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", "1")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize(x)
    graph.replay()
    torch.cuda.synchronize()
    assert not list(searching.glob("tuned_*.json"))


def test_times_are_of_the_gpu():
    a = torch.randn(4096, 4096, device="cuda")
    short, long = (tuning.milliseconds(lambda n=n: [a @ a for _ in range(n)]) for n in (1, 8))  # type: ignore[misc]
    assert 4 < long / short < 16
