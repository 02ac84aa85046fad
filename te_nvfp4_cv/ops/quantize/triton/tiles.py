"""The parts that launches of quantization share: meta-parameters of the kernels, rows of folded operands, unpacking."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_nvfp4_cv.backend import tuning
from te_nvfp4_cv.formats import BLOCK, E4M3_MAX
from te_nvfp4_cv.ops.quantize.triton import amax_kernels, block_kernels, operand_kernels, unpack_kernels
from te_nvfp4_cv.ops.records import PACKED, Alpha, Collector, Face, Fold, Move, Operand
from te_nvfp4_cv.ops.triton.elementwise import parts_of
from te_nvfp4_cv.ops.triton.launching import Bound, Repeated, start
from te_nvfp4_cv.ops.triton.numerics import OPTIONS
from te_nvfp4_cv.ops.triton.workspace import zeros

PROGRAMS = 132 * 8  # of the amax kernels, which loop: enough for the largest GPU, few enough for its atomics

Entry = dict[str, int]


def _entry(block: int, warps: int) -> Entry:
    return {"BLOCK": block, "num_warps": warps}


def _quantize(key: tuple[int, ...]) -> Entry:
    """Choose the tile of quantize_kernel. The key starts with three flags: random bytes, x not bf16, ragged channels.

    128 elements a thread, in 168 registers, leave three blocks of 128 threads on a multiprocessor. With random bytes,
    fp16, fp32, or ragged channels so many spill. A limit on registers (maxnreg) made the compiler spill more.
    """
    return _entry(512 if any(key[:3]) else 1024, 4)


tuning.register(
    "quantize",
    # The interpreter (0) runs one program after the other in NumPy, and wants few large ones.
    {0: _entry(4096, 4), 80: _quantize},
    lambda key: (
        [_entry(256, 2), _entry(512, 4), _entry(1024, 8)] + ([] if key[0] else [_entry(1024, 4), _entry(512, 2)])
    ),
)
tuning.register(
    "quantize_amax",
    {0: _entry(4096, 4), 80: _entry(1024, 4)},
    lambda key: [_entry(512, 4), _entry(1024, 8), _entry(2048, 8)],
)
tuning.register(
    "amax_flat",
    {0: _entry(1 << 16, 4), 80: _entry(4096, 4)},
    lambda key: [_entry(2048, 4), _entry(8192, 4), _entry(8192, 8)],
)
# The next two have no candidates: their launches are short, and a search would cost more than it finds.
tuning.register("quantize_blocks", {0: _entry(1024, 4), 80: _entry(128, 4)})
tuning.register("quantize_tiles", {0: _entry(64, 4), 80: _entry(8, 4)})  # BLOCK: tiles of 16 rows
tuning.register(
    "unpack_columns",
    {0: _entry(4096, 4), 80: _entry(1024, 4)},
    lambda key: [_entry(512, 4), _entry(1024, 8), _entry(2048, 8)],
)
tuning.register("unpack_rows", {0: _entry(4096, 4), 80: _entry(512, 4)})


class Blocks(NamedTuple):
    """The blocks that one launch of quantize_blocks writes.

    Attributes:
        total: their number.
        sizes: rows of a group that are there, rows that are written, taps, width.
        strides: of a row, of a tap, of a value, in elements.
        columns: the blocks run along the rows' axis instead of the width.
        ob: blocks along the rows of a group.
        kb: blocks along the width.
    """

    total: int
    sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    columns: bool
    ob: int
    kb: int


class Extras(NamedTuple):
    """The arguments that activations and gradients add to a launch of quantize_blocks; weights use none of them."""

    rht: bool = False
    seed: Tensor | None = None
    source_rows: Tensor | None = None
    image_size: int = 1
    given: Tensor | None = None
    watch: Watch | None = None
    last: bool = True


_NOTHING = Extras()


class Watch(NamedTuple):
    """Where the launches of one operand leave what they observe; see finish_observed, which the last of them does."""

    work: Tensor
    seen: Tensor
    collected: Tensor
    saturated: Tensor
    flags: int

    @classmethod
    def of(cls, x: Tensor, same: bool, collector: Collector | None) -> Watch:
        """Make what observing x takes; `same`: both faces are of x, not rotated."""
        seen = x.new_empty(5, dtype=torch.float32)
        flags = operand_kernels.FINISH.value + same * operand_kernels.SAME.value
        if collector is None:
            return cls(zeros(x), seen, seen, seen, flags)
        flags += operand_kernels.COLLECT.value + collector.counts * operand_kernels.COUNT.value
        return cls(zeros(x), seen, collector.collected, collector.saturated, flags)

    def operand(self, row: Face, col: Face) -> Operand:
        """Return the record of an operand: the amaxes are NaN where what was observed is not finite."""
        observed, row_amax, col_amax = self.seen.split_with_sizes((3, 1, 1))
        return Operand(row, row_amax, col, col_amax, observed)

    def flags_of(self, last: bool) -> int:
        """Return OBSERVE of a kernel; `last`: no other launch of the operand observes after it."""
        return self.flags if last else 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a kernel's four tensors."""
        if tuning.searching():  # a search launches many times, and its launches must not add up
            return self.work.clone(), self.seen, self.collected.clone(), self.saturated.clone()
        return self[:4]


def quantize_blocks(
    x: Tensor, amax: Tensor, face: Face, form: int, blocks: Blocks, error: int, e4m3_max: int, more: Extras = _NOTHING
) -> None:
    """Write one face by quantize_blocks_kernel, one lane per block; `error` is the number of 4over6's error mode."""
    config = config_of("quantize_blocks", x)
    watched, observe = (amax,) * 4, 0
    if more.watch is not None:
        watched, observe = more.watch.tensors(), more.watch.flags_of(more.last)
    start(
        block_kernels.quantize_blocks_kernel,
        (ceil_div(blocks.total, config["BLOCK"]),),
        x,  # below, a tensor that the kernel does not read is replaced by any tensor at hand: a pointer must be there
        x if more.source_rows is None else more.source_rows,
        amax,
        amax if more.seed is None else more.seed,
        words_of(face.data) if form == PACKED else face.data,
        face.scale,
        face.data,
        amax if more.given is None else more.given,
        *watched,
        blocks.total,
        *blocks.sizes,
        *blocks.strides,
        more.image_size,
        0 if more.source_rows is None else 1,
        COLUMNS=blocks.columns,
        GROUP_BLOCKS=blocks.ob,
        ROW_BLOCKS=blocks.kb,
        FORM=form,
        RHT=more.rht,
        STOCHASTIC=more.seed is not None,
        ERROR=error,
        OBSERVE=observe,
        FOLDED=more.source_rows is not None,
        E4M3_MAX=e4m3_max,
        BLOCK=config["BLOCK"],
        **options_of(config),
    )


def lines(
    shape: torch.Size, fold: Fold, device: torch.device, experts: bool = False
) -> tuple[int, int, int, Tensor | None]:
    """Describe the columnwise operand as rows of `run` values: images, rows an image, run, and the table of rows.

    Where nothing is folded an image is one row, and there is no table; experts give one at each launch.
    """
    if experts:
        return shape[0], 1, shape[1], None
    if fold.strips == 1:
        return shape[0], 1, math.prod(shape[1:]), None
    return shape[0], fold.rows, math.prod(shape[2:]), _source_rows(fold, shape[0], shape[1], device)


@functools.cache  # never dropped: a captured CUDA graph keeps the address
def _source_rows(fold: Fold, batch: int, rows: int, device: torch.device) -> Tensor:
    """Return which row of x each folded row is, -1 for zeros: int64 [images * rows]."""
    return fold.source_rows(batch, rows).flatten().to(device)


def amax_flat(
    x: Tensor,
    work: Tensor,
    amax: Tensor | None,
    raised: tuple[bool, int] = (False, E4M3_MAX),
    move: Move | None = None,
) -> None:
    """Raise work[0], int32, to the bits of max |x| over x's memory (contiguous).

    Args:
        amax: fp32 [1] or [2], takes it then; work is left with zeros. If None, the bits stay.
        raised: (True, E): the amax is raised to one whose tensor scale is a power of two.
        move: also move the amaxes of delayed scales, of x and dy.
    """
    used, seen = (work, work) if move is None else move[:2]
    rule = () if move is None else move[2:]
    faces = 0 if amax is None else amax.numel()
    launch = amax_flat_of(x.numel(), x.dtype, x.device, faces, raised[1] if raised[0] else 0, rule)
    launch(lambda: (x, work, work if amax is None else amax, used, seen))


@functools.lru_cache(maxsize=4096)
def amax_flat_of(
    n: int, dtype: torch.dtype, device: torch.device, faces: int, raised: int, rule: tuple[tuple[int, ...], ...]
) -> Repeated:
    """Return the launch of amax_flat_kernel for n values of a dtype; raised: as in grids.amaxes_of."""

    def bind(config: tuning.Config) -> Bound:
        block = min(config["BLOCK"], max(power_of_two(n), 128))  # 128 lanes are four warps
        moves = rule and not tuning.searching()
        constants = dict(
            FACES=faces,
            POW2=raised > 0,
            E4M3_MAX=raised or E4M3_MAX,
            RULE=amax_kernels.rule_of(*rule) if moves else -1,
            BLOCK=block,
            **options_of(config),
        )
        return Bound(amax_kernels.amax_flat_kernel, (min(ceil_div(n, block), PROGRAMS),), (n,), constants)

    return Repeated("amax_flat", device, (tuning.bucket(n),), bind)


# ---- unpacking ------------------------------------------------------------------------------------------------------


def unpack_columns(
    data: Tensor, scale: Tensor, out: Tensor, factor: Tensor | Alpha | None, ob: int, rows: int, run: int
) -> None:
    """Launch unpack_columns_kernel; ob: blocks of a group, rows: of a group, run: values of a row."""

    def launch(config: tuning.Config) -> None:
        block = block_width(run, config["BLOCK"])
        bands = scale.numel() // run
        per_band = ceil_div(run, block)
        start(
            unpack_kernels.unpack_columns_kernel,
            (per_band * bands,),
            words_of(data),
            scale.view(torch.uint8),
            out,
            *parts_of(scale if factor is None else factor),
            run,
            rows,
            per_band,
            ob,
            FACTOR=0 if factor is None else 1 + isinstance(factor, Alpha),
            MASKED=bool(run % block or rows % BLOCK),
            BLOCK=block,
            **options_of(config),
        )

    run_kernel("unpack_columns", out, (tuning.bucket(run),), launch)


def unpack_both(
    w: Face, w_out: Tensor, w_factor: Alpha | None, group_rows: int, x: Face, x_out: Tensor, x_factor: Alpha | None
) -> None:
    """Launch unpack_both_kernel, for the tiles of a weight [n, taps, width] and for the columns of an operand."""
    w_parts = parts_of(w.scale if w_factor is None else w_factor)
    x_parts = parts_of(x.scale if x_factor is None else x_factor)
    factors = (0 if w_factor is None else 2, w_parts.number, 0 if x_factor is None else 2, x_parts.number)
    launch = unpack_both_of(w_out.shape, group_rows, x.scale.shape, x_out.dtype, x_out.device, factors, ())
    faces = tuple(t if t.is_contiguous() else t.contiguous() for t in (*w, *x))
    launch(lambda: (*faces, w_out, x_out, *w_parts[:2], *x_parts[:2], *[w_out] * 3))


@functools.lru_cache(maxsize=4096)
def unpack_both_of(
    weight: torch.Size,
    group_rows: int,
    scale: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    factors: tuple[int, float, int, float],
    rule: tuple[tuple[int, ...], ...],
) -> Repeated:
    """Return the launch of unpack_both_kernel for a weight [n, taps, width] and columns with such scales.

    Args:
        dtype: of the values; a launch serves one.
        factors: FACTOR and the number of the weight's factor and of the columns'.
        rule: e4m3_max and margin of delayed scales that are foreseen, or nothing.
    """
    (n, taps, width), (bands, *sizes) = weight, scale
    row_blocks, run = ceil_div(width, BLOCK), math.prod(sizes)
    words = n * taps * row_blocks * 2
    arch = tuning.arch_of(device)
    w_block = tuning.static("unpack_rows", arch)["BLOCK"]
    w_programs = ceil_div(words, w_block)

    def bind(config: tuning.Config) -> Bound:
        block = block_width(run, config["BLOCK"])
        per_band = ceil_div(run, block)
        constants = dict(
            FACTOR=factors[2],
            W_FACTOR=factors[0],
            MASKED=bool(run % block),
            BLOCK=block,
            W_BLOCK=w_block,
            RULE=amax_kernels.rule_of(*rule) if rule else -1,
            **options_of(config),
        )
        numbers = (factors[1], words, width, taps, group_rows, row_blocks, factors[3], run, bands * BLOCK, per_band)
        grid = (w_programs + per_band * bands,)
        views = ((0, torch.int32), (1, torch.uint8), (2, torch.int64), (3, torch.uint8))
        return Bound(unpack_kernels.unpack_both_kernel, grid, (*numbers, w_programs), constants, views)

    return Repeated("unpack_columns", device, (tuning.bucket(run),), bind)


def unpack_rows(
    data: Tensor, scale: Tensor, out: Tensor, factor: Tensor | Alpha | None, width: int, taps: int, group_rows: int
) -> None:
    """Launch unpack_rows_kernel; group_rows: rows of a group of 16x16-scaled data, 0 for a scale a block."""
    config = config_of("unpack_rows", out)
    words = data.numel() // 4
    start(
        unpack_kernels.unpack_rows_kernel,
        (ceil_div(words, config["BLOCK"]),),
        data.contiguous().view(torch.int32),
        scale.contiguous().view(torch.uint8),
        out,
        *parts_of(scale if factor is None else factor),
        words,
        width,
        taps,
        max(group_rows, 1),
        ceil_div(width, BLOCK),
        FACTOR=0 if factor is None else 1 + isinstance(factor, Alpha),
        TILED=group_rows > 0,
        BLOCK=config["BLOCK"],
        **options_of(config),
    )


# ---- small things ---------------------------------------------------------------------------------------------------


def words_of(data: Tensor) -> Tensor:
    """Return packed columns [..., 8], uint8, as int64."""
    return data.contiguous().view(torch.int64)


def block_width(run: int, largest: int) -> int:
    """Return a tile's width: the largest that the kernel takes, or less where a row is shorter."""
    return min(largest, max(power_of_two(run), 64))


def config_of(kernel: str, x: Tensor) -> tuning.Config:
    """Return the table's parameters for x's GPU."""
    return tuning.config(kernel, tuning.arch_of(x.device))


def run_kernel(kernel: str, x: Tensor, key: tuple[int, ...], launch: Callable[[tuning.Config], object]) -> None:
    """Launch a kernel with the parameters that the table, or an earlier search, has for x's GPU."""
    launch(tuning.config(kernel, tuning.arch_of(x.device), key, launch))


def options_of(config: tuning.Config) -> dict[str, Any]:
    """Return the options that a launch takes besides the kernel's arguments."""
    return {**OPTIONS, **{name: value for name, value in config.items() if name != "BLOCK"}}


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
