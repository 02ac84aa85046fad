"""te_nvfp4_cv::quantize as an operator, its refusals, and golden hashes that guard its bits without the vectors."""

from __future__ import annotations

import hashlib

import pytest
import torch

from te_nvfp4_cv.ops.quantize import matrix as ops
from te_nvfp4_cv.ops.quantize import reference_matrix


def quantize(x, **options):
    return reference_matrix.quantize_2d(x, **{"rowwise": True, "columnwise": True, **options})


def assert_same_bits(a: reference_matrix.Faces, b: reference_matrix.Faces) -> None:
    for name, first, second in zip(a._fields, a, b, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), name


# ---- the operator ---------------------------------------------------------------------------------------------------


def test_operator_passes_opcheck_and_equals_the_reference():
    x = torch.randn(20, 40).bfloat16()
    spec = ops.MatrixSpec(columnwise=True, rht=True, stochastic_rounding=True)
    args = (x, spec.to_ints(), None, None, torch.tensor(3), "reference")
    torch.library.opcheck(torch.ops.te_nvfp4_cv.quantize.default, args)
    faces = ops.quantize(x, columnwise=True, rht=True, stochastic_rounding=True, seed=3)
    assert_same_bits(faces, quantize(x, rht=True, stochastic_rounding=True, seed=3))


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (torch.ones(4, 4, dtype=torch.int32), {}, "bfloat16, float16 or float32"),
        (torch.ones(4, 4, dtype=torch.float64), {}, "float64"),
        (torch.ones(4, 4, dtype=torch.complex64), {}, "complex64"),
        (torch.ones(4), {}, "2-D"),
        (torch.ones(4, 4), {"stochastic_rounding": True}, "seed"),
        (torch.ones(4, 4), {"two_d": True, "rht": True}, "two_d and rht"),
        (torch.ones(4, 4), {"row_scaled": True, "two_d": True}, "row_scaled"),
        (torch.ones(4, 4), {"four_over_six": "MAE", "rht": True}, "four_over_six and rht"),
        (torch.ones(4, 4), {"four_over_six": "mae"}, "'MAE' or 'MSE'"),
        (torch.ones(4, 4), {"e4m3_max": 256}, "448, or 256"),
        (torch.ones(4, 4), {"backend": "fast"}, "backend"),
    ],
)
def test_bad_input_is_a_clear_error(x, options, words):
    with pytest.raises(ValueError) as error:
        ops.quantize(x, **options)
    assert all(part in str(error.value) for part in (words, "got:", "needs:", "fix:"))


@pytest.mark.parametrize(
    "spec",
    [
        ops.MatrixSpec(),
        ops.MatrixSpec(rowwise=False, columnwise=True, rht=True, stochastic_rounding=True, with_sign=False),
        ops.MatrixSpec(two_d=True, four_over_six="MSE", e4m3_max=256),
        ops.MatrixSpec(four_over_six="MAE", row_scaled=True),
    ],
)
def test_a_spec_survives_the_operator_boundary(spec):
    assert all(type(number) is int for number in spec.to_ints())
    back = ops.MatrixSpec.from_ints(spec.to_ints())
    assert back == spec and [type(field) for field in back] == [type(field) for field in spec]


# ---- golden values --------------------------------------------------------------------------------------------------

GOLDEN = {
    "plain_fp32": "b08672eff36c0fbc",
    "plain_bf16": "88c1880507a24e5c",
    "plain_fp16": "a937fd046211796f",
    "rht_bf16": "6b73ecf2a4be64c2",
    "rht_fp32": "de8110ec8bb52376",
    "rht_unsigned": "0df6a20427032762",
    "2d": "ca4d6dfdba0d5faf",
    "sr_rht": "31f75da3effa972c",
    "row_scaled": "121dc8267bfa0d58",
    "4over6_mae_256": "0beee2d662712db1",
    "4over6_mse_2d": "33a9c38503a9a8cf",
}


def golden_input(dtype: torch.dtype) -> torch.Tensor:
    """37 x 51 values from integer arithmetic alone: the same on every machine and version."""
    i = torch.arange(37 * 51, dtype=torch.int64)
    mantissa = ((i * 2654435761) % 2**32).double() / 2**31 - 1
    exponent = ((i * 40503) % 23 - 11).double()
    return (mantissa * 2.0**exponent).float().to(dtype).reshape(37, 51)


def golden_hash(faces: reference_matrix.Faces) -> str:
    digest = hashlib.sha256()
    for t in faces:
        digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


GOLDEN_CASES = {
    "plain_fp32": (torch.float32, {}),
    "plain_bf16": (torch.bfloat16, {}),
    "plain_fp16": (torch.float16, {}),
    "rht_bf16": (torch.bfloat16, {"rht": True}),
    "rht_fp32": (torch.float32, {"rht": True}),
    "rht_unsigned": (torch.bfloat16, {"rht": True, "with_sign": False}),
    "2d": (torch.bfloat16, {"two_d": True}),
    "sr_rht": (torch.bfloat16, {"rht": True, "stochastic_rounding": True, "seed": 12345678901234}),
    "row_scaled": (torch.float32, {"row_scaled": True}),
    "4over6_mae_256": (torch.bfloat16, {"four_over_six": "MAE", "e4m3_max": 256}),
    "4over6_mse_2d": (torch.float32, {"four_over_six": "MSE", "two_d": True}),
}


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden(name):
    dtype, options = GOLDEN_CASES[name]
    assert golden_hash(quantize(golden_input(dtype), **options)) == GOLDEN[name]
