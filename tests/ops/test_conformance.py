"""The conformance vectors, written by TransformerEngine's own reference, on every backend; skipped where absent.

The folder is that of the environment variable TE_NVFP4_CV_VECTORS, else ../shared/vectors beside the repository.
Golden values of our own (test_quantize_reference.py) guard the bits on other machines.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from te_nvfp4_cv import formats
from te_nvfp4_cv.tensor import layouts
from tests.conformance import run_case

ROOT = Path(__file__).resolve().parents[2]
VECTORS = Path(os.environ.get("TE_NVFP4_CV_VECTORS", ROOT.parent / "shared" / "vectors"))
MANIFEST = VECTORS / "manifest.json"
CASES = json.loads(MANIFEST.read_text())["cases"] if MANIFEST.is_file() else []
FIELDS = ("codes", "scale_inv", "amax", "dequant")
GEMM_INPUTS = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}

pytestmark = [
    pytest.mark.skipif(not CASES, reason=f"no conformance vectors at {VECTORS}"),
    pytest.mark.usefixtures("poison"),
]


def load(case):
    return pytest.importorskip("safetensors.torch").load_file(VECTORS / case["file"])


def named(*kinds):
    return [pytest.param(case, id=case["name"]) for case in CASES if case["kind"] in kinds]


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(got, nan=7e-7), torch.nan_to_num(expected, nan=7e-7))


@pytest.mark.parametrize("backend", ["reference", "vendor"])
@pytest.mark.parametrize("case", named("quantize"))
def test_quantize(case, backend):
    tensors = load(case)
    answer = run_case(tensors["input"], case["mode"], backend)
    compared = 0
    for key, expected in tensors.items():
        field = key.removesuffix("_t")
        if field not in FIELDS:
            continue
        compared += 1
        got = answer[key]
        if field == "codes":  # codes_hw has code 8 for -0.0, as this library
            expected = tensors.get(key.replace("codes", "codes_hw"), expected)
        if field == "dequant":
            relative = (got - expected).abs() / expected.abs().clamp_min(1e-45)
            assert bool(((got == expected) | (relative <= 2**-22)).all())
        elif field == "amax":
            assert torch.equal(got, expected)
        else:
            assert torch.equal(got.view(torch.uint8), expected), f"{key} differs"
    assert compared in (4, 8)


@pytest.mark.parametrize("backend", ["reference", "vendor"])
@pytest.mark.parametrize("case", named("gemm"))
def test_gemm(case, backend):
    tensors = load(case)
    first, second = GEMM_INPUTS[case["mode"]["gemm"]]
    operands = {"a": tensors[f"input_{first}"], "b": tensors[f"input_{second}"]}
    out = run_case(operands, case["mode"], backend)["out"]
    assert float((out.double() - tensors["out_exact"]).abs().max()) <= case["gemm"]["suggested_atol_fp32"]


@pytest.mark.parametrize("case", named("sr"))
def test_stochastic_rounding_rule(case):
    tensors = load(case)
    codes = formats.encode_e2m1_stochastic(tensors["scaled"], tensors["rbits"])
    assert torch.equal(codes, tensors["nibbles"])
    assert torch.equal(formats.pack_nibbles(codes), tensors["codes"])


@pytest.mark.parametrize("case", named("swizzle"))
def test_scale_swizzle(case):
    tensors = load(case)
    padded = layouts.pad_scales(tensors["scales"])
    assert torch.equal(padded, tensors["padded"])
    assert torch.equal(layouts.swizzle_scales(padded), tensors["swizzled"])
    assert torch.equal(layouts.unswizzle_scales(tensors["swizzled"]), padded)
