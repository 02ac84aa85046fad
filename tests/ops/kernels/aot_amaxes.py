"""Ahead-of-time cases of ops/quantize/triton/amax_kernels.py: see tests/aot.py."""

from __future__ import annotations

MODULE = "te_nvfp4_cv.ops.quantize.triton.amax_kernels"

CASES = [
    dict(
        name="move",
        fn=(MODULE, "move_kernel"),
        signature=dict(used="*fp32", seen="*fp32", RULE="constexpr", CLEAR="constexpr"),
        constexprs=dict(RULE=76, CLEAR=True),
        options=dict(num_warps=1, divisible=()),
        expect=[],
    ),
]
