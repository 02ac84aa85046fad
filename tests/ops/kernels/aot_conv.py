"""What the GEMM kernels must compile to: the tiles that launches choose for layers of several widths, for every GPU.

On sm_100 and sm_120 the FP4 instruction itself, in PTX and SASS; on sm_90 wgmma with the activation in registers;
mma.sync elsewhere. Nowhere a spill, nowhere an fp8 type where codes are decoded by integers. Signatures hold what
launches pass: sizes that Triton may know to be multiples of 16 are those of layers with 16 n channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from te_nvfp4_cv.backend import tuning
from te_nvfp4_cv.ops.conv.triton import (
    grouped_kernels,
    launch,  # noqa: F401  (fills the tables)
    weight_rows,
)
from te_nvfp4_cv.ops.conv.triton import kernels as conv_kernels
from te_nvfp4_cv.ops.gemm.triton import kernels as gemm_kernels

NATIVE = (100, 120)
ARCHS = (80, 86, 89, 90, 100, 120)
WIDTHS = {"16": (16, 16), "64": (64, 64), "256": (256, 256), "1024": (1024, 1024)}  # (outputs, contracted) of a layer
LAYERS = {label: WIDTHS[label] for label in ("16", "64", "256")}  # wider ones take the tiles of 256
POINTERS = {
    "data_product": dict(
        p_x="*u8", p_x_scale="*u8", p_w="*fp16", p_w_scale="*u8", p_alpha="*fp32", p_bias="*bf16", p_y="*bf16"
    ),
    "weight_product": dict(p_b="*u8", p_b_scale="*u8", p_a="*u8", p_a_scale="*u8", p_out="*fp32"),
    "packed_product": dict(p_a="*u8", p_a_scale="*u8", p_b="*u8", p_b_scale="*u8", p_out="*fp32"),
    "prepare_kernel": dict(p_data="*u8", p_scale="*u8", p_out="*fp16", p_out_scale="*u8"),
    "sum_parts": dict(p_parts="*fp32", p_alpha="*fp32", p_out="*bf16"),
    "grouped_product": dict(
        p_x="*u8",
        p_x_scale="*u8",
        p_w="*fp16",
        p_w_scale="*u8",
        p_alpha="*fp32",
        p_bias="*bf16",
        p_offsets="*i64",
        p_y="*bf16",
    ),
    "grouped_weight": dict(
        p_b="*u8", p_b_scale="*u8", p_a="*u8", p_a_scale="*u8", p_alpha="*fp32", p_offsets="*i64", p_dw="*bf16"
    ),
    "grouped_sums": dict(p_dy="*bf16", p_offsets="*i64", p_out="*fp32"),
}
MULTIPLES = {  # sizes that are multiples of 16 in layers with 16 n channels (units: with 256 n)
    "data_product": ["channels"],
    "weight_product": ["channels_b", "channels_a", "each_b", "each_a"],
    "packed_product": ["columns"],
    "prepare_kernel": [],
    "sum_parts": ["total"],
    "grouped_product": ["channels"],
    "grouped_weight": ["each_b", "each_a"],
    "grouped_sums": ["channels"],
}


def tile(kernel: str, arch: int, width: tuple[int, int]) -> dict[str, int]:
    """The static table's tile; below sm_90 every GPU takes the tiles of 80, whatever their shared memory."""
    outputs, depth = (tuning.bucket(size) for size in width)
    rows = outputs if kernel == "conv_weight" else 17
    key = (int(arch in NATIVE), rows, outputs, 9 if kernel == "conv_weight" else depth, 9)
    return tuning.static(kernel, arch if arch >= 90 else 80, key)


def expected(arch: int) -> list[str]:
    """Of every product."""
    if arch == 100:
        return [r"tcgen05\.mma\S*kind::mxf4nvf4\S*block_scale\.(scale_vec::4X|block16)", r"UTCOMMA\.4X", "!wgmma"]
    if arch == 120:
        return [r"mma\.sync\S*kind::mxf4nvf4\S*block_scale\.(scale_vec::4X|block16)", r"OMMA\.SF\.16864\S*UE4M3\.4X"]
    mma = [r"wgmma\.mma_async[^;]*f32\.f16\.f16", r"wgmma\.mma_async\S+ \{[^}]*\}, \{"] if arch == 90 else []
    return [*(mma or [r"mma\.sync\S*m16n8k16\S*f32\.f16\.f16\.f32"]), "!e4m3", "!e2m1", "!mxf4"]


def by_words(compiled: Any) -> str | None:
    """The scales of columnwise operands: none is fetched by itself (one byte is something else)."""
    found = compiled.count(r"LDS\.U8")
    return None if found <= 1 else f"{found} loads of single bytes"


def _case(name: str, kernel: Any, constexprs: Callable[[int], dict[str, Any]], table: str, width: tuple[int, int]):  # type: ignore[no-untyped-def]
    names, known = kernel.arg_names, constexprs(90)
    pointers = POINTERS[kernel.__name__]
    signature = {n: pointers.get(n) or ("constexpr" if n in known else "i32") for n in names}

    def options(arch: int) -> dict[str, Any]:
        chosen = tile(table, arch, width) if table else {"num_warps": 4, "num_stages": 3}
        divisible = [*pointers, *MULTIPLES[kernel.__name__]]
        return {"num_warps": chosen["num_warps"], "num_stages": chosen["num_stages"], "divisible": divisible}

    return dict(
        name=name,
        fn=(kernel.__module__, kernel.__name__),
        signature=signature,
        constexprs=constexprs,
        archs=ARCHS if "256" in name else (80, 90, 100, 120),
        options=options,
        expect=(lambda arch: expected(arch) + [by_words] * ("WORDS" in known and arch == 100)) if table else [],
    )


def _products(table: str, kernel: Any, label: str, width: tuple[int, int], **more: Any) -> dict[str, Any]:
    def constexprs(arch: int) -> dict[str, Any]:
        chosen = tile(table, arch, width)
        sizes = {name: chosen[name] for name in ("BM", "BN", "BK")}
        full = {"FULL": width[1] % chosen["BK"] == 0} if "FULL" in kernel.arg_names else {}
        words = {"WORDS": arch in NATIVE} if "WORDS" in kernel.arg_names else {}
        return {**sizes, **full, **words, "NATIVE": arch in NATIVE, "QUADS": arch == 90, "PTX": True, **more}

    return _case(f"{table}.{label}", kernel, constexprs, table, width)


def _data(label: str, width: tuple[int, int], taps: tuple[int, int] = (3, 3), **more: Any) -> dict[str, Any]:
    fixed = dict(TAPS=taps[0] * taps[1], CH=taps[0], CW=taps[1], UNIT=min(width[1] // 16, 16), WIDE=False)
    return _products(
        "conv_data", conv_kernels.data_product, label, width, **{**fixed, "ALPHA": 1, "BIAS": True, **more}
    )


CASES = [
    *(_data(f"3x3.{label}", width) for label, width in LAYERS.items()),
    _data("1x1.256", WIDTHS["256"], (1, 1)),
    _data("7x7.64.wide", WIDTHS["64"], (7, 7), WIDE=True, ALPHA=2, BIAS=False),
    *(_products("conv_weight", conv_kernels.weight_product, f"3x3.{w}", WIDTHS[w]) for w in ("16", "256")),
    *(
        _products(
            "gemm", gemm_kernels.packed_product, label, WIDTHS[label], UNIT=min(WIDTHS[label][1] // 16, 16), WIDE=False
        )
        for label in ("64", "1024")
    ),
    *(
        _case(
            f"prepare.face{face}",
            weight_rows.prepare_kernel,
            lambda arch, face=face: dict(FACE=face, HALF=True, QUADS=arch == 90, QB=4, BLOCK=128),
            "",
            WIDTHS["64"],
        )
        for face in range(4)
    ),
    _case("sum_parts", conv_kernels.sum_parts, lambda arch: dict(ALPHA=1, BLOCK=1024), "", WIDTHS["64"]),
    _products(
        "conv_data",
        grouped_kernels.grouped_product,
        "grouped.64",
        WIDTHS["64"],
        UNIT=4,
        WIDE=False,
        ALPHA=1,
        BIAS=True,
    ),
    _products("conv_weight", grouped_kernels.grouped_weight, "grouped.64", WIDTHS["64"], ALPHA=2),
    _case("grouped_sums", grouped_kernels.grouped_sums, lambda arch: dict(ROWS=32, BLOCK=64), "", WIDTHS["64"]),
]
# Triton compiles an argument of 1 as a constexpr where the kernel does not forbid it: layers of one channel or block.
ONES = {
    "data_product": ["channels", "units", "x_units", "chunks"],
    "weight_product": ["channels_b", "channels_a", "each_b", "each_a"],
    "packed_product": ["rows", "columns", "units"],
    "prepare_kernel": ["total", "taps", "blocks", "blocks_out", "each", "each_in"],
    "sum_parts": ["total", "parts", "divisor", "count"],
}


def _of_ones(case: dict[str, Any]) -> dict[str, Any]:
    ones = dict.fromkeys(ONES[case["fn"][1]], 1)
    words = "WORDS" in case["signature"]

    def options(arch: int) -> dict[str, Any]:
        plain = case["options"](arch)
        return {**plain, "divisible": [name for name in plain["divisible"] if name not in ones]}

    return {
        **case,
        "name": case["name"] + ".ones",
        "signature": {**case["signature"], **dict.fromkeys(ones, "constexpr")},
        "constexprs": lambda arch: {**case["constexprs"](arch), **ones, **({"WORDS": False} if words else {})},
        "options": options,
        "archs": (90, 100) if case["expect"] else (90,),
    }


CASES += [
    _of_ones(case) for case in CASES if case["name"].endswith(("3x3.16", "gemm.64", "face1", "face3", "sum_parts"))
]
for case in CASES:  # fp16 rows of w before Blackwell, packed ones there: the type is part of a signature
    if "p_w" in case["signature"]:
        case["archs"] = tuple(arch for arch in case["archs"] if arch not in NATIVE)
CASES += [
    {**case, "name": case["name"] + ".fp4", "signature": {**case["signature"], "p_w": "*u8"}, "archs": NATIVE}
    for case in CASES
    if "p_w" in case["signature"]
]
