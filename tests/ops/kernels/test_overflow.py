"""TRITON_DEBUG=1 lets every int32 and uint32 operation stop the GPU where it overflows: none does that shall not.

Triton's interpreter checks likewise. What wraps on purpose says so (sanitize_overflow=False).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.records import NONE, PACKED, OperandSpec, WeightSpec

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def launch(kernel_device, monkeypatch):
    from triton.runtime import interpreter

    from te_nvfp4_cv.ops.quantize.triton import launch

    if kernel_device.type == "cuda":
        pytest.skip("compiled kernels check where TRITON_DEBUG is set before Triton is imported")
    options = replace(interpreter.interpreter_builder.options, debug=True, sanitize_overflow=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    return launch


@pytest.mark.parametrize(("scale", "stochastic"), [(1.0, True), (float("nan"), False)], ids=str)
def test_no_quantizer_overflows(launch, scale, stochastic):
    """Codes of each binade beside each other: 0, 1, 2, 4 and 6 in every place of a word."""
    codes = torch.tensor([6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0])
    x = codes[torch.arange(8)[:, None] // torch.tensor([1, 2, 4, 8, 3, 5, 7, 6]) % 8].flatten().repeat(16, 2)
    x[:, :16] = 6.0  # one word of the largest codes alone
    x[0, 0] *= scale
    seed = torch.tensor([-5]) if stochastic else None
    for pow2 in (False, True):
        spec = OperandSpec(1, Fold(1, 0, 1, 0, 16), PACKED, PACKED, True, stochastic, pow2=pow2)
        launch.quantize_operand(x, spec, torch.float32, seed, None)
        launch.quantize_weight(x, WeightSpec(1, PACKED, NONE, True, pow2=pow2), torch.float32)
        launch.quantize_weight(x, WeightSpec(1, PACKED, PACKED, False, pow2=pow2), torch.float32)
