"""Ahead-of-time cases of ops/norm/triton/*kernels.py: see tests/aot.py."""

from __future__ import annotations

from typing import Any

from tests.aot import at_most

FOLDER = "te_nvfp4_cv.ops.norm.triton"
BLOCK, ROWS, COLS = 2048, 64, 64
ERF = 25  # instructions of GELU's error function, which has two branches
WIDE = [r"ld\.global\.v4\.b32", r"st\.global\.v4\.b32"]  # 128 bits a thread and access
SIZES = dict(inner="i32", channels="i32")
PLAIN = ("per_image", "items", "splits", "per_row", "tiles")  # not specialized
INTEGERS = dict(slice_size="i64", per_image="i32", items="i32", inner="i32", channels="i32")


def _pointers(names: str, **kinds: str) -> dict[str, str]:
    return {
        name: kinds.get(name, "*bf16" if name in ("z", "dy", "dz", "y", "residual", "dresidual") else "*fp32")
        for name in names.split()
    }


def _case(name: str, kernel: str, signature: dict[str, str], constexprs: dict[str, Any], **more: Any) -> dict[str, Any]:
    known = {**signature, **{key: "constexpr" for key in constexprs}}
    divisible = [name for name, kind in known.items() if name not in PLAIN and (kind[0] == "*" or kind[0] == "i")]
    options = dict(num_warps=4, divisible=divisible)
    file = "apply_kernels" if "apply" in kernel else "kernels"
    fn = f"{FOLDER}.{file}", kernel
    return dict(name=name, fn=fn, signature=known, constexprs=constexprs, options=options, **more)


def _reduction(last: bool, **more: Any) -> dict[str, Any]:
    rows, cols = (ROWS, COLS) if last else (512, 4)
    return dict(ROWS=rows, COLS=cols, LAST=last, **more)


def _elementwise(last: bool, activation: int, group_channels: int, **more: Any) -> dict[str, Any]:
    return dict(
        CHANNELS=0 if last and group_channels == 1 else 256,
        GROUP_CHANNELS=group_channels,
        LAST=last,
        AFFINE=True,
        ACTIVATION=activation,
        SLOPE=0.0,
        BLOCK=BLOCK,
        **more,
    )


CASES: list[dict[str, Any]] = []
for last in (True, False):
    layout = "last" if last else "first"
    CASES.append(
        _case(
            f"statistics_{layout}",
            "statistics_kernel",
            {**_pointers("z partial"), **INTEGERS},
            _reduction(last),
            expect=WIDE[:1],
            instructions_per_element=(ROWS * COLS if last else 2048, 44),
        )
    )
    for activation, name in ((1, "relu"), (2, "silu"), (5, "gelu"))[: 3 if last else 2]:
        CASES.append(
            _case(
                f"backward_sums_{name}_{layout}",
                "backward_sums_kernel",
                {
                    **_pointers("dy z mask weight bias mean rstd partial", mask="*u8"),
                    **INTEGERS,
                    "group_channels": "i32",
                },
                _reduction(last, AFFINE=True, ACTIVATION=activation, SLOPE=0.0, WHOLE_BYTES=last),
                expect=WIDE[:1],
                instructions_per_element=(ROWS * COLS if last else 2048, 52 + ERF * (activation == 5)),
            )
        )
for name, last, activation, group_channels, residual in (
    ("batch_add_relu", True, 1, 1, True),
    ("batch_add_relu_first", False, 1, 1, True),
    ("group_silu", True, 2, 8, False),
    ("group_silu_first", False, 2, 8, False),
    ("batch_gelu", True, 5, 1, False),
):
    CASES.append(
        _case(
            f"apply_{name}",
            "apply_kernel",
            {**_pointers("z residual weight bias mean rstd y mask", mask="*u8"), "slice_size": "i64", **SIZES},
            _elementwise(last, activation, group_channels, RESIDUAL=residual, KEEP=activation == 1),
            expect=WIDE,
            instructions_per_element=(BLOCK, (30 if last else 60) + ERF * (activation == 5)),
        )
    )
    CASES.append(
        _case(
            f"backward_apply_{name}",
            "backward_apply_kernel",
            {
                **_pointers("dy z mask weight bias mean rstd slope offset dz dresidual", mask="*u8"),
                "slice_size": "i64",
                **SIZES,
            },
            _elementwise(last, activation, group_channels, RESIDUAL=residual),
            expect=WIDE,
            instructions_per_element=(BLOCK, (40 if last else 70) + ERF * (activation == 5)),
        )
    )
for grouped in (False, True):
    merge = dict(GROUP=grouped, SPLITS=128, WIDTH=32 if not grouped else 8)
    integers = dict(splits="i32", channels="i32", group_channels="i32")
    CASES.append(
        _case(
            f"finish_statistics_{'group' if grouped else 'batch'}",
            "finish_statistics",
            {
                **_pointers("partial mean rstd running_mean running_var"),
                **integers,
                "momentum": "fp32",
                "eps": "fp32",
            },
            dict(UPDATE=not grouped, **merge),
        )
    )
    CASES.append(
        _case(
            f"finish_backward_{'group' if grouped else 'batch'}",
            "finish_backward",
            {**_pointers("partial weight rstd dbias dweight slope offset"), **integers, "count": "fp32"},
            dict(AFFINE=True, BATCH_STATS=True, **merge),
        )
    )


MADE = _pointers("z residual weight bias mean rstd")
PRODUCED_SIZES = {"images": "i32", "run": "i32", "per_row": "i32", "channels": "i32"}
PACKED = {80: 60, 86: 60, 89: 60, 90: 45, 100: 29, 120: 38}  # instructions an element, of an activation as codes
PRODUCED = 512  # values of each of 16 images: 64 elements a thread, 64-bit accesses
for name, activation, groups, residual, row in (
    ("batch_add_relu", 1, 0, True, 2),
    ("batch_relu_packed", 1, 0, False, 1),
    ("batch_add_relu_masked", 1, 0, True, 2),
    ("group_silu", 2, 32, False, 2),
    ("batch_hardswish", 3, 0, False, 2),
):
    shared = dict(
        GROUPS=groups,
        GROUP_CHANNELS=256 // groups if groups else 0,
        AFFINE=True,
        RESIDUAL=residual,
        ACTIVATION=activation,
        SLOPE=0.0,
        MASKED="masked" in name,
        BLOCK=PRODUCED,
    )
    # With at most 168 registers three blocks of 128 threads share a multiprocessor.
    more: dict[str, Any] = dict(expect=[r"ld\.global\.v2\.b32", at_most(168)])
    pointers = _pointers(
        "mask amax row_data row_scale col_data col_scale work seen collected saturated_blocks",
        mask="*u8",
        row_data="*bf16" if row == 2 else "*i32",
        row_scale="*u8",
        col_data="*i64",
        col_scale="*u8",
        work="*i32",
        saturated_blocks="*fp64",
    )
    produce = _case(
        f"produce_{name}",
        "produce_kernel",
        {**MADE, **pointers, **PRODUCED_SIZES},
        dict(KEEP=activation == 1, ROW=row, COL=1, RHT=True, OBSERVE=26, E4M3_MAX=448, **shared),
        instructions_per_element=(16 * PRODUCED, PACKED.get if row == 1 else 90),
        **more,
    )
    measure = _case(
        f"produced_amax_{name}",
        "produced_amax_kernel",
        {**MADE, "work": "*i32", "amax": "*fp32", **PRODUCED_SIZES, "tiles": "i32"},
        dict(RHT=True, POW2=False, E4M3_MAX=448, **shared),
        instructions_per_element=(16 * PRODUCED, 45),
        **more,
    )
    for case in (produce, measure) if row == 2 and "masked" not in name else (produce,):
        case["fn"] = ("te_nvfp4_cv.ops.norm.triton.quantize_kernels", case["fn"][1])
        case["options"] = case["options"] | dict(enable_fp_fusion=False)
        CASES.append(case)
