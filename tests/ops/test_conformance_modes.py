"""conformance.run_case answers every key of a mode, or refuses it by name.

The cases are made here. What a GEMM case must give is the product, in float64, of operands quantized one by one with
the options of the mode; a key that the answer ignored would leave it at the product of other operands.
"""

from __future__ import annotations

import pytest
import torch

from te_nvfp4_cv import formats
from te_nvfp4_cv.ops.quantize.matrix import quantize
from tests.conformance import run_case
from tests.helpers import values

TOKENS, IN, OUT = 48, 64, 32
SHAPES = {
    "fprop": ((TOKENS, IN), (OUT, IN)),  # x, w
    "dgrad": ((TOKENS, OUT), (OUT, IN)),  # dy, w
    "wgrad": ((TOKENS, OUT), (TOKENS, IN)),  # dy, x
}
FACES = {"fprop": ("row", "row"), "dgrad": ("row", "col"), "wgrad": ("col", "col")}


def operands(which: str) -> dict[str, torch.Tensor]:
    a, b = SHAPES[which]
    return {"a": values(a, dtype=torch.bfloat16, seed=1), "b": values(b, dtype=torch.bfloat16, seed=2)}


def dequantized(x: torch.Tensor, face: str, e4m3_max: int = 448, **options) -> torch.Tensor:
    options |= {"rowwise": face == "row", "columnwise": face == "col", "e4m3_max": e4m3_max, "backend": "reference"}
    faces = quantize(x, **options)
    parts = (getattr(faces, f"{face}_{name}") for name in ("data", "scale", "amax"))
    return formats.dequantize(*parts, e4m3_max).double()


def product(which: str, weight_2d: bool = True, rht: bool = False, row_scaled: bool = False, **options) -> torch.Tensor:
    x, (first, second) = operands(which), FACES[which]
    a = dequantized(x["a"], first, rht=rht and first == "col", row_scaled=row_scaled, **options)
    own = {"rht": rht} if which == "wgrad" else {"two_d": weight_2d}  # wgrad's second operand is an activation
    b = dequantized(x["b"], second, **own, **options)
    return a @ b.T


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a.double() - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize("which", list(SHAPES))
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ({}, {}),
        ({"weight_tile": [16, 16]}, {}),
        ({"weight_tile": [1, 16]}, {"weight_2d": False}),
        ({"weight_tile": None}, {"weight_2d": False}),
        ({"four_over_six": "MAE", "e4m3_max": 256}, {"four_over_six": "MAE", "e4m3_max": 256}),
        ({"four_over_six": "MSE"}, {"four_over_six": "MSE"}),
        (
            {"four_over_six": "MAE", "weight_tile": [1, 16], "e4m3_max": 256},
            {"four_over_six": "MAE", "weight_2d": False, "e4m3_max": 256},
        ),
        ({"rht": True}, {"rht": True}),
    ],
    ids=str,
)
def test_gemm_cases_follow_the_mode(which, mode, options):
    out = run_case(operands(which), {"gemm": which, **mode})["out"]
    assert out.dtype == torch.float32 and close(out, product(which, **options))


def test_the_options_of_a_gemm_case_can_be_told_apart():
    """Without this the test above would pass for a case that ignores them all."""
    variants = [{}, {"weight_2d": False}, {"four_over_six": "MAE", "e4m3_max": 256}, {"four_over_six": "MSE"}]
    for which in ("fprop", "dgrad"):
        found = [product(which, **options) for options in variants]
        assert not any(close(a, b) for i, a in enumerate(found) for b in found[:i])
    assert not close(product("wgrad", rht=True), product("wgrad"))


def test_row_scaled_gemm_cases():
    out = run_case(operands("fprop"), {"gemm": "fprop", "row_scaled": True})["out"]
    assert close(out, product("fprop", row_scaled=True)) and not close(out, product("fprop"))


@pytest.mark.parametrize("tile", [[1, 16], None])
def test_a_tile_of_one_row_is_no_square_tile(tile):
    x = values((32, 48), seed=3)
    plain, case = run_case(x, {"direction": "row+col"}), run_case(x, {"direction": "row+col", "tile": tile})
    square = run_case(x, {"direction": "row+col", "tile": [16, 16]})
    assert all(torch.equal(plain[name].view(torch.uint8), case[name].view(torch.uint8)) for name in plain)
    assert not torch.equal(plain["codes"], square["codes"])


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ({"direction": "row", "flavour": 1}, "unknown key flavour"),
        ({"direction": "row", "weight_tile": [16, 16]}, "unknown key weight_tile"),
        ({"gemm": "fprop", "tile": [16, 16]}, "unknown key tile"),
        ({"gemm": "fprop", "direction": "row", "flavour": 1}, "unknown key direction, flavour"),
        ({}, "direction=None"),
        ({"direction": "both"}, "direction='both'"),
        ({"direction": "row", "tile": [32, 32]}, r"tile=\[32, 32\]"),
        ({"gemm": "fprop", "weight_tile": [16, 1]}, r"weight_tile=\[16, 1\]"),
        ({"gemm": "wgrad", "weight_tile": 16}, "weight_tile=16"),
        ({"gemm": "bgrad"}, "gemm='bgrad'"),
        ({"gemm": "fprop", "e4m3_max": 256}, "needs four_over_six"),
        ({"gemm": "dgrad", "row_scaled": True}, "no meaning for gemm='dgrad'"),
        ({"direction": "row", "e4m3_max": 256}, "e4m3_max=256"),
        ({"gemm": "wgrad", "rht": True, "four_over_six": "MAE"}, "exclude each other"),
        ({"gemm": "fprop", "four_over_six": "mae"}, "error mode of 4over6"),
    ],
    ids=str,
)
def test_what_a_mode_cannot_mean_is_refused(mode, words):
    x = operands(mode["gemm"]) if mode.get("gemm") in SHAPES else {"a": torch.ones(16, 16), "b": torch.ones(16, 16)}
    with pytest.raises(ValueError, match=words):
        run_case(x if "gemm" in mode else values((32, 48)), mode)
