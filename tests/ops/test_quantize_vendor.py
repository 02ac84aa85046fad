"""The vendor quantizer against the reference, bit for bit: random shapes, values, options, out of poisoned memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from te_nvfp4_cv.ops.quantize.matrix import quantize

OPTIONS = [
    {},
    {"rht": True},
    {"rht": True, "with_sign": False},
    {"two_d": True},
    {"row_scaled": True},
    {"four_over_six": "MSE"},
    {"four_over_six": "MAE", "e4m3_max": 256, "two_d": True},
    {"rht": True, "stochastic_rounding": True, "seed": 2**40 + 17},
]
KINDS = ["normal", "wide", "tiny", "huge", "zeros", "negative zeros", "nan", "inf"]

pytestmark = pytest.mark.usefixtures("poison")


def matrix(rows: int, cols: int, kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    if kind == "wide":
        x = x * torch.exp2(torch.randint(-30, 30, (rows, cols), generator=generator).float())
    elif kind == "tiny":
        x = x * 1e-39
    elif kind == "huge":
        x = x * 1e35
    elif kind == "zeros":
        x = torch.zeros(rows, cols)
    elif kind == "negative zeros":
        x = torch.where(x > 0, -0.0, x * 1e-3)
    elif kind in ("nan", "inf"):
        x.view(-1)[int(torch.randint(rows * cols, (), generator=generator))] = float(kind)
    return x.to(dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("faces", [(True, True), (True, False), (False, True)])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(KINDS),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_equal_bits(faces, options, rows, cols, kind, dtype, transposed, seed):
    x = matrix(rows, cols, kind, dtype, seed)
    x = x.t().contiguous().t() if transposed else x
    expected, got = (
        quantize(x, rowwise=faces[0], columnwise=faces[1], backend=backend, **options)
        for backend in ("reference", "vendor")
    )
    for name, first, second in zip(expected._fields, expected, got, strict=True):
        assert first.shape == second.shape and first.dtype == second.dtype, name
        if name.endswith("amax"):
            assert torch.equal(first.nan_to_num(nan=-1.0), second.nan_to_num(nan=-1.0)), name
        else:
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), name
