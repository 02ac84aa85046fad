"""Ahead-of-time cases of ops/quantize/triton/amax_kernels.py: see tests/aot.py."""

from __future__ import annotations

MODULE = "te_nvfp4_cv.ops.quantize.triton.amax_kernels"
NUMBERS = ("mantissa_0", "mantissa_1", "exponent_0", "exponent_1", "margin_0", "margin_1")

CASES = [
    dict(
        name="move",
        fn=(MODULE, "move_kernel"),
        signature=dict(used="*fp32", seen="*fp32", **dict.fromkeys(NUMBERS, "i32"), CLEAR="constexpr"),
        constexprs=dict(CLEAR=True),
        options=dict(num_warps=1, divisible=()),
        expect=[],
    ),
]
