"""Ahead-of-time cases of ops/triton/elementwise.py: see tests/aot.py."""

from __future__ import annotations

MODULE = "te_nvfp4_cv.ops.triton.elementwise"
BLOCK = 4096
WIDE = [r"ld\.global\.v4\.b32", r"st\.global\.v4\.b32"]  # 128 bits a thread and access

CASES = [
    dict(
        name="relu_mask",
        fn=(MODULE, "relu_mask_kernel"),
        signature=dict(x="*bf16", y="*bf16", mask="*u8", n="i64", WRITE="constexpr", BLOCK="constexpr"),
        constexprs=dict(WRITE=True, BLOCK=BLOCK),
        options=dict(num_warps=4),
        expect=WIDE,
        instructions_per_element=(BLOCK, 10),
    ),
    dict(
        name="apply_mask",
        fn=(MODULE, "apply_mask_kernel"),
        signature=dict(dy="*bf16", mask="*u8", dx="*bf16", n="i64", BLOCK="constexpr"),
        constexprs=dict(BLOCK=BLOCK),
        options=dict(num_warps=4),
        expect=WIDE,
        instructions_per_element=(BLOCK, 5),
    ),
    dict(
        name="scale_bias",
        fn=(MODULE, "scale_bias_kernel"),
        signature=dict(
            y="*bf16",
            out="*bf16",
            alpha="*fp32",
            other="*fp32",
            bias="*fp32",
            number="fp32",
            n="i64",
            channels="i32",
            PARTS="constexpr",
            HAS_BIAS="constexpr",
            BLOCK="constexpr",
        ),
        constexprs=dict(PARTS=2, HAS_BIAS=False, BLOCK=BLOCK),
        options=dict(num_warps=4),
        expect=WIDE,
        instructions_per_element=(BLOCK, 5),
    ),
]
