"""Ahead-of-time cases of ops/quantize/triton/*_kernels.py: see tests/aot.py.

Tile sizes and warps are those of quantize/triton/tiles.py's tables, by architecture. The fast paths are compiled as
they run on whole tiles of plain images; the masked, folded and unaligned variants must compile without spilling, and
have no budget. Budgets are instructions per element with everything counted: prologue, reductions, and the pass over
saturated blocks that hardly ever runs.
"""

from __future__ import annotations

from typing import Any

import triton

from te_nvfp4_cv.backend import tuning
from te_nvfp4_cv.ops.quantize.triton import tiles as launch_tiles
from tests.aot import at_most

VARIANTS = (80, 90, 100, 120)  # of the cases without a budget; the others compile for all six
FOLDER = "te_nvfp4_cv.ops.quantize.triton"
NO_FP8 = [r"!e4m3", r"!e5m2"]
EXACT = [*NO_FP8, r"!(add|sub|mul|fma|div)[.\w]*\.ftz\.f32", r"!fma\.rn\.bf16", r"!div\.(full|approx)"]
WIDE_LOADS = [r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64|ld\.global[.\w:]*\.v2\.b32"]
WIDE_STORES = [r"st\.global[.\w:]*\.v4\.b32|st\.global[.\w:]*\.v2\.b64|st\.global[.\w:]*\.v2\.b32"]
CONVERTING = (100, 120)  # with an instruction for E2M1; 100 also computes pairs of fp32 values
# Not specialized.
PLAIN = ("tiles", "per_band", "taps", "group_rows", "group_blocks", "row_blocks")
PLAIN += ("words", "w_programs", "per_row", "x_programs")
INTEGERS = ("images", "rows", "run", "per_row", "word2")
FACTOR = dict(factor="*fp32", other="*fp32", number="fp32")
WATCH = dict(work="*i32", seen="*fp32", collected="*fp32", saturated="*fp64")
OLD = triton.__version__.startswith("3.6.")  # which compiles to a few instructions more
# Instructions an element of a gradient as bf16, on sm_90, and registers.
DY, DY_REGISTERS = (47, 187) if OLD else (44, 168)
WATCHED = 26  # finish, collect and count, with rotated columns


def expected(packed: bool, arch: int) -> list[str]:
    """Of a kernel that packs codes, or only values: the conversion to E2M1 where there is one, and nowhere else."""
    if packed and arch in CONVERTING:
        return [r"cvt\.rn\.satfinite\.e2m1x2\.f32", r"F2FP\.SATFINITE\.E2M1"]
    return ["!e2m1"]


def case(
    name: str, file: str, kernel: str, table: str, signature: dict[str, str], values: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """A case whose BLOCK comes from the table; every entry of `values` is a constexpr."""
    values = dict(values)
    width, key = more.pop("width", "BLOCK"), more.pop("key", ())
    forms = [values.get(name) for name in ("ROW", "COL", "FORM")]  # of the amax kernel, ROW is a yes or no
    packed = any(form in (1, 3) and form is not True for form in forms)
    registers = more.pop("registers", {})  # at most, by architecture
    fixed, by_pairs = more.pop("expect"), values.get("RHT") and values.get("ROW", 2) != 2
    pairs = [r"add\.rn\.f32x2", "FADD2"] if by_pairs else []
    divisible = [n for n, kind in signature.items() if n not in PLAIN and (kind[0] == "*" or kind in ("i32", "i64"))]
    return dict(
        name=name,
        fn=(f"{FOLDER}.{file}", kernel),
        signature=signature | {value: "constexpr" for value in values} | {width: "constexpr"},
        constexprs=lambda arch: {**values, width: tuning.static(table, arch, key)["BLOCK"]},
        expect=lambda arch: (
            fixed
            + expected(packed, arch)
            + (pairs if arch == 100 else [])
            + ([at_most(registers[arch])] if arch in registers else [])
        ),
        options=lambda arch: launch_tiles.options_of(tuning.static(table, arch, key)) | dict(divisible=divisible),
        **({} if "instructions_per_element" in more else {"archs": VARIANTS}),
        **more,
    )


def quantize(name: str, **changes: Any) -> dict[str, Any]:
    """A case of quantize_kernel: both faces of whole tiles unless changed."""
    budget, x = changes.pop("budget", None), changes.pop("x", "bf16")
    registers = changes.pop("registers", {})
    values: dict[str, Any] = dict(
        ROW=2,
        COL=1,
        RHT=True,
        STOCHASTIC=False,
        OBSERVE=WATCHED,
        FOLDED=False,
        MASKED=False,
        CHANNELS=0,
        BLOCKS=1,
        E4M3_MAX=448,
        rows=1,
    )
    values |= changes
    signature = dict(x=f"*{x}", source_rows="*i64", amax="*fp32", seed="*i64", row_scale="*u8", col_scale="*u8")
    signature |= dict(row_data="*i32" if values["ROW"] == 1 else "*bf16", **WATCH)
    signature |= dict(col_data="*bf16" if values["COL"] == 2 else "*i64")
    signature |= {integer: "i32" for integer in INTEGERS}
    if values["rows"] != 1:
        del values["rows"]
    plain = not values["CHANNELS"]
    more: dict[str, Any] = dict(expect=EXACT + (WIDE_LOADS if plain else []), registers=registers)
    if plain and (values["ROW"] == 2 or values["COL"]):
        more["expect"] += WIDE_STORES
    if budget:
        more["instructions_per_element"] = (lambda constants: 16 * constants["BLOCK"], budget)
    flags = (values["STOCHASTIC"], x != "bf16", values["CHANNELS"] > 0)
    more["key"] = tuple(map(int, flags))
    return case(name, "operand_kernels", "quantize_kernel", "quantize", signature, values, **more)


def blocks(name: str, **changes: Any) -> dict[str, Any]:
    """A case of quantize_blocks_kernel."""
    x = changes.pop("x", "fp32")
    values: dict[str, Any] = dict(
        COLUMNS=False,
        GROUP_BLOCKS=1,
        ROW_BLOCKS=4,
        FORM=1,
        RHT=False,
        STOCHASTIC=False,
        ERROR=0,
        OBSERVE=0,
        FOLDED=False,
        E4M3_MAX=448,
    )
    values |= changes
    signature = dict(x=f"*{x}", source_rows="*i64", amax="*fp32", seed="*i64", scale="*u8", given="*fp32", **WATCH)
    signature |= dict(data="*i64" if values["FORM"] == 1 else "*bf16", dequantized="*bf16")
    for name_ in ("blocks", "rows_in", "rows_out", "taps", "width", "stride_o", "stride_t", "stride_c", "image_size"):
        signature[name_] = "i32"
    signature["word2"] = "i32"
    return case(name, "block_kernels", "quantize_blocks_kernel", "quantize_blocks", signature, values, expect=EXACT)


def tiles(name: str, **changes: Any) -> dict[str, Any]:
    """A case of quantize_tiles_kernel: a contiguous fp32 3x3 weight unless changed."""
    w = changes.pop("w", "fp32")
    values: dict[str, Any] = dict(
        TAPS_FIRST=True, FORM=2, FACTOR=0, ERROR=0, E4M3_MAX=448
    )
    values |= changes
    signature = dict(w=f"*{w}", amax="*fp32", data="*i64", scale="*u8", dequantized="*bf16", **FACTOR)
    signature |= {name_: "i32" for name_ in ("width", "stride_o", "stride_t", "stride_c")}
    signature |= {name_: "i32" for name_ in PLAIN[:6]}
    file, table = "block_kernels", "quantize_tiles"
    return case(name, file, "quantize_tiles_kernel", table, signature, values, width="TILES", expect=EXACT)


AMAX = dict(x="*bf16", source_rows="*i64", work="*i32", amax="*fp32")
AMAX |= dict(images="i32", rows="i32", run="i32", tiles="i32")
UNPACK_COLUMNS = dict(data="*i64", scale="*u8", out="*bf16", **FACTOR, run="i32")
UNPACK_COLUMNS |= dict(rows="i32", per_band="i32", group_blocks="i32")
UNPACK_ROWS = dict(data="*i32", scale="*u8", out="*bf16", **FACTOR, words="i32", width="i32")
UNPACK_ROWS |= dict(taps="i32", group_rows="i32", row_blocks="i32")
UNPACK_BOTH = {f"w_{name}": kind for name, kind in UNPACK_ROWS.items() if kind[0] == "*" or name == "number"}
UNPACK_BOTH |= dict(words="i32", width="i32", taps="i32", group_rows="i32", row_blocks="i32", w_programs="i32")
MOVES = dict(used="*fp32", seen="*fp32", next="*fp32")
JOINT = dict(x="*bf16", amax="*fp32", row_data="*bf16", row_scale="*u8", col_data="*i64", col_scale="*u8", **WATCH)
JOINT |= dict(w="*fp32", w_amax="*fp32", used="*fp32", next="*fp32", images="i32", run="i32", per_row="i32")
JOINT |= dict(x_programs="i32", n="i64")
JOINTLY = dict(ROW=2, COL=1, RHT=True, OBSERVE=WATCHED, MASKED=False, CHANNELS=0, BLOCKS=1, E4M3_MAX=448, rows=1)
JOINTLY |= dict(POW2=True, W_E4M3_MAX=448, MOVES=True, W_BLOCK=4096)

CASES = [
    quantize("activation_delayed", budget=lambda arch: {90: 36, 100: 26 if OLD else 25.5}.get(arch, 44)),
    quantize("activation_current", OBSERVE=0, budget=lambda arch: 26 if arch == 100 else 42),
    quantize("activation_packed", ROW=1, OBSERVE=0, budget=lambda arch: {90: 34, 100: 15, 120: 20}.get(arch, 46)),
    quantize("activation_rows", COL=0, OBSERVE=0),
    quantize("activation_rows_delayed", COL=0),
    quantize("gradient_rows_delayed", COL=0, STOCHASTIC=True),
    quantize(
        "gradient_delayed",
        STOCHASTIC=True,
        COL=2,
        budget=lambda arch: {90: DY, 100: 42}.get(arch, 58),
        registers={90: DY_REGISTERS},
    ),
    quantize(
        "gradient_current", STOCHASTIC=True, COL=2, OBSERVE=0,
        budget=lambda arch: {90: 42, 100: {"3.6": 42, "3.9": 40}.get(triton.__version__[:3], 39)}.get(arch, 48),
    ),
    quantize(
        "gradient_packed",
        STOCHASTIC=True,
        ROW=1,
        COL=1,
        OBSERVE=0,
        budget=lambda arch: {90: 44, 100: 36, 120: 44}.get(arch, 58),
    ),
    quantize("masked", MASKED=True),
    quantize("masked_stochastic", MASKED=True, STOCHASTIC=True, COL=2),
    quantize("folded", ROW=0, FOLDED=True, MASKED=True, rows=None),
    quantize("folded_stochastic", ROW=0, FOLDED=True, MASKED=True, rows=None, STOCHASTIC=True, COL=2),
    quantize("unaligned", MASKED=True, CHANNELS=24, BLOCKS=2),
    quantize("unaligned_stochastic", MASKED=True, CHANNELS=24, BLOCKS=2, STOCHASTIC=True, COL=2),
    quantize("fp32", x="fp32"),
    quantize("fp16", x="fp16", RHT=False),
    case(
        "amax",
        "operand_kernels",
        "amax_kernel",
        "quantize_amax",
        AMAX,
        dict(ROW=True, FOLDED=False, MASKED=False, POW2=False, E4M3_MAX=448),
        expect=EXACT + WIDE_LOADS,
        instructions_per_element=(lambda constants: 16 * constants["BLOCK"], 13),
    ),
    case(
        "amax_folded",
        "operand_kernels",
        "amax_kernel",
        "quantize_amax",
        AMAX,
        dict(ROW=False, FOLDED=True, MASKED=True, POW2=True, E4M3_MAX=448),
        expect=EXACT + WIDE_LOADS,
    ),
    case(
        "amax_flat",
        "amax_kernels",
        "amax_flat_kernel",
        "amax_flat",
        dict(x="*bf16", work="*i32", amax="*fp32", used="*fp32", seen="*fp32", n="i64"),
        dict(FACES=2, POW2=False, E4M3_MAX=448, RULE=-1),
        expect=EXACT + WIDE_LOADS,
        instructions_per_element=(lambda constants: constants["BLOCK"], 8.6),
    ),
    case(
        "amax_flat_moves_delayed_scales",
        "amax_kernels",
        "amax_flat_kernel",
        "amax_flat",
        dict(x="*fp32", work="*i32", amax="*fp32", used="*fp32", seen="*fp32", n="i64"),
        dict(FACES=1, POW2=True, E4M3_MAX=448, RULE=76),
        expect=EXACT + WIDE_LOADS,
    ),
    case(
        "unpack_columns",
        "unpack_kernels",
        "unpack_columns_kernel",
        "unpack_columns",
        UNPACK_COLUMNS,
        dict(FACTOR=0, MASKED=False),
        expect=EXACT + WIDE_LOADS + WIDE_STORES,
        instructions_per_element=(lambda constants: 16 * constants["BLOCK"], 9),
    ),
    case(
        "unpack_columns_of_a_weight",
        "unpack_kernels",
        "unpack_columns_kernel",
        "unpack_columns",
        UNPACK_COLUMNS,
        dict(FACTOR=2, MASKED=True),
        expect=EXACT,
    ),
    case(
        "unpack_both",
        "unpack_kernels",
        "unpack_both_kernel",
        "unpack_columns",
        {name: kind for name, kind in (UNPACK_COLUMNS | UNPACK_BOTH | MOVES).items() if name != "group_blocks"},
        dict(FACTOR=2, W_FACTOR=2, MASKED=False, W_BLOCK=512, RULE=76),
        expect=EXACT + WIDE_LOADS + WIDE_STORES,
    ),
    case(
        "unpack_rows",
        "unpack_kernels",
        "unpack_rows_kernel",
        "unpack_rows",
        UNPACK_ROWS,
        dict(FACTOR=0, TILED=False),
        expect=EXACT,
    ),
    case(
        "unpack_tiles",
        "unpack_kernels",
        "unpack_rows_kernel",
        "unpack_rows",
        UNPACK_ROWS,
        dict(FACTOR=2, TILED=True),
        expect=EXACT,
    ),
    case(
        "activation_and_weight",
        "joint_kernels",
        "quantize_and_measure_kernel",
        "quantize",
        JOINT,
        JOINTLY,
        key=(0, 0, 0),
        expect=EXACT + WIDE_LOADS + WIDE_STORES,
    ),
    tiles("weight"),
    tiles("weight_packed", FORM=1, TAPS_FIRST=False),
    tiles("weight_both", FORM=3, FACTOR=2),
    tiles("weight_four_over_six", FORM=1, ERROR=1, E4M3_MAX=256),
    blocks("weight_rows"),
    blocks("weight_columns", COLUMNS=True, GROUP_BLOCKS=4, FORM=2),
    blocks("four_over_six_rows", x="bf16", ERROR=1, OBSERVE=1),
    blocks("four_over_six_columns", x="bf16", ERROR=2, COLUMNS=True, FOLDED=True, RHT=True, OBSERVE=WATCHED),
    blocks("four_over_six_stochastic", x="bf16", ERROR=1, STOCHASTIC=True),
]
