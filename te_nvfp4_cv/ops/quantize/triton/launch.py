"""Quantization by the Triton kernels: the functions of reference_operands, on a GPU, or under the interpreter on a CPU.

Codes and scales are the reference's, bit for bit, where rounding is to nearest. Stochastic rounding draws other bytes:
the value f of image n in [images, values] uses byte n % 16 of Philox4x32-7 with counter (n // 16 * values + f, 0, 0)
and key `seed`; both faces use the same byte. Columns of a folded operand count through the folded images, and have 1 as
the counter's third word.

    amax, then both faces in one launch       x is read twice, or once where the amaxes are given
    folded columns (B no multiple of 16)      a launch of their own, rows found through a table
    4over6                                    a launch for each face: its error sums have an order
    row-scaled                                plain torch (reference_operands)

No function reads a tensor's value or waits for the GPU. The table of a folded operand is made on the CPU at its first
use and kept. Addresses are int64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from te_nvfp4_cv.backend import tuning
from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.quantize import reference
from te_nvfp4_cv.ops.quantize.triton import block_kernels, operand_kernels
from te_nvfp4_cv.ops.quantize.triton import tiles as parts

NONE, PACKED, DEQUANTIZED = 0, 1, 2
BLOCK = 16
ERRORS = {None: 0, "MAE": 1, "MSE": 2}  # of 4over6, as the kernels number them
SLOTS = 64


@on_its_device
def quantize_operand(
    x: Tensor,
    groups: int,
    fold: Fold,
    row: int,
    col: int,
    rht: bool,
    stochastic: bool,
    four_over_six: str | None,
    e4m3_max: int,
    row_scaled: bool,
    dtype: torch.dtype,
    seed: Tensor | None,
    amax: Tensor | None,
) -> tuple[Tensor, ...]:
    """See operands.quantize_operand."""
    if not x.numel():
        return _nothing(x, groups, fold, row, col, row_scaled, dtype, amax)
    if row_scaled:
        return reference.quantize_operand(
            x, groups, fold, row, col, rht, stochastic, four_over_six, e4m3_max, row_scaled, dtype, seed, amax
        )
    x = x.contiguous()
    observe = amax is not None
    slots = x.new_zeros((3, SLOTS), dtype=torch.int32) if observe else None
    used = measure_operand(x, fold, rht and col != NONE) if amax is None else amax.contiguous()
    outputs = _empty_faces(x, groups, fold, row, col, dtype)
    job = _Operand(x, groups, fold, outputs, rht, stochastic, ERRORS[four_over_six], e4m3_max, used, seed, slots)
    if job.error:
        if row != NONE:
            job.row_blocks(row)
        if col != NONE:
            job.col_blocks(col)
    elif fold.strips == 1:
        job.tiles(row, col)
    else:
        if row != NONE:
            job.tiles(row, NONE)
        if col != NONE:
            job.tiles(NONE, col)
    if slots is None:
        return *outputs[:2], used[:1].clone(), *outputs[2:], used[1:].clone(), x.new_empty(0, dtype=torch.float32)
    if row == NONE and not rht and (fold.strips > 1 or col == NONE):
        parts.amax_flat(x, slots)  # folded columns need not have seen all of x
    observed = x.new_empty(3, dtype=torch.float32)
    decoded = x.new_empty(2, dtype=torch.float32)
    operand_kernels.finish_kernel[(1,)](slots, used, observed, decoded, SAME=not rht, num_warps=1)
    return *outputs[:2], decoded[:1].clone(), *outputs[2:], decoded[1:].clone(), observed


@on_its_device
def measure_operand(x: Tensor, fold: Fold, rht: bool) -> Tensor:
    """See operands.measure_operand."""
    if not x.numel():
        return x.new_zeros(2, dtype=torch.float32)
    x = x.contiguous()
    amax = x.new_zeros(2, dtype=torch.int32)
    images, rows, run, source_rows = parts.lines(x, fold)
    if not rht:
        parts.amax_flat(x, amax)
        return amax.view(torch.float32)[:1].expand(2).contiguous()
    if source_rows is not None:
        parts.amax_flat(x, amax)
    table = x if source_rows is None else source_rows

    def launch(config: tuning.Config) -> None:
        block = parts.block_width(run, config["BLOCK"])
        tiles = parts.ceil_div(run, block) * rows * (fold.images // BLOCK)
        operand_kernels.amax_kernel[(min(tiles, parts.PROGRAMS),)](
            x,
            table,
            amax,
            images,
            rows,
            run,
            tiles,
            ROW=source_rows is None,
            FOLDED=source_rows is not None,
            MASKED=bool(images % BLOCK or run % block),
            BLOCK=block,
            **parts.options_of(config),
        )

    parts.run_kernel("quantize_amax", x, (tuning.bucket(run),), launch)
    return amax.view(torch.float32)


@on_its_device
def quantize_weight(
    w: Tensor,
    groups: int,
    row: int,
    col: int,
    two_d: bool,
    four_over_six: str | None,
    e4m3_max: int,
    pow2: bool,
    dtype: torch.dtype,
    amax: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See operands.quantize_weight."""
    if not w.numel():
        return reference.quantize_weight(
            w, groups, row, col, two_d, four_over_six, e4m3_max, pow2, dtype, amax
        )
    w = w.detach()
    n, c, taps = w.shape[0], w.shape[1], math.prod(w.shape[2:])
    kb, ob = parts.ceil_div(c, BLOCK), parts.ceil_div(n // groups, BLOCK)
    if amax is None:
        bits = w.new_zeros(1, dtype=torch.int32)
        parts.amax_flat(parts.in_memory_order(w), bits)
    else:
        bits = amax.view(torch.int32)
    amax = w.new_empty(1, dtype=torch.float32)
    block_kernels.weight_amax_kernel[(1,)](bits, amax, POW2=pow2, E4M3_MAX=e4m3_max, num_warps=1)
    w = w.flatten(2) if w.dim() > 2 else w.unsqueeze(-1)  # a copy where one stride does not reach all taps
    stride_o, stride_c, stride_t = w.stride()
    error = ERRORS[four_over_six]
    empty = w.new_empty(0, dtype=torch.uint8)
    row_data, row_scale, col_data, col_scale = (torch.empty_like(empty) for _ in range(4))
    if row == PACKED:
        row_data = empty.new_empty((n, taps, kb * 8))
        row_scale = empty.new_empty((groups, ob, taps, kb) if two_d else (n, taps, kb))
    elif row == DEQUANTIZED:
        row_data = w.new_empty((n, taps, c), dtype=dtype)
    if col == PACKED:
        col_data, col_scale = empty.new_empty((groups, ob, taps, c, 8)), empty.new_empty((groups, ob, taps, c))
    elif col == DEQUANTIZED:
        col_data = w.new_empty((n, taps, c), dtype=dtype)
    if two_d and row != NONE:
        config = parts.config_of("quantize_tiles", w)
        per_block = min(config["BLOCK"], parts.power_of_two(taps * kb))
        block_kernels.quantize_tiles_kernel[(parts.ceil_div(taps * kb, per_block), groups * ob)](
            w,
            amax,
            parts.words_of(row_data) if row == PACKED else empty,
            row_scale,
            row_data,
            taps * kb,
            taps,
            c,
            stride_o,
            stride_t,
            stride_c,
            GROUP_ROWS=n // groups,
            GROUP_BLOCKS=ob,
            ROW_BLOCKS=kb,
            TAPS_FIRST=stride_t < stride_c,
            FORM=row,
            ERROR=error,
            E4M3_MAX=e4m3_max,
            TILES=per_block,
            **parts.options_of(config),
        )
    elif row != NONE:
        strides = (stride_o, stride_t, stride_c)
        parts.quantize_blocks(
            w, amax, row_data, row_scale, row, n * taps * kb, (n, n, taps, c), strides, False, 1, kb, error, e4m3_max
        )
    if col != NONE:
        sizes, strides = (n // groups, n // groups, taps, c), (stride_o, stride_t, stride_c)
        total = groups * ob * taps * c
        parts.quantize_blocks(w, amax, col_data, col_scale, col, total, sizes, strides, True, ob, 1, error, e4m3_max)
    return row_data, row_scale, col_data, col_scale, amax


@on_its_device
def unpack_columns(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See operands.unpack_columns."""
    out = scale.new_empty((scale.shape[0] * BLOCK, *scale.shape[1:]), dtype=dtype)
    if out.numel():
        parts.unpack_columns(data, scale, out, None, scale.shape[0], scale.shape[0] * BLOCK, math.prod(scale.shape[1:]))
    return out


@on_its_device
def unpack_rows(data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype) -> Tensor:
    """See operands.unpack_rows."""
    out = data.new_empty((*data.shape[:-1], channels), dtype=dtype)
    if out.numel():
        parts.unpack_rows(data, scale, out, None, channels // groups, 1, 0)
    return out


@on_its_device
def unpack_weight(
    data: Tensor,
    scale: Tensor,
    n: int,
    channels: int,
    groups: int,
    columnwise: bool,
    factor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See operands.unpack_weight."""
    taps = data.shape[2 if columnwise else 1]
    out = data.new_empty((n, taps, channels), dtype=dtype)
    if not out.numel():
        return out
    if columnwise:
        parts.unpack_columns(data, scale, out, factor, data.shape[1], n // groups, taps * channels)
    else:
        parts.unpack_rows(data, scale, out, factor, channels, taps, n // groups if scale.dim() == 4 else 0)
    return out


# ---- operands -------------------------------------------------------------------------------------------------------


class _Operand:
    """One call's tensors and shapes, launched face by face or both at once."""

    def __init__(
        self,
        x: Tensor,
        groups: int,
        fold: Fold,
        outputs: tuple[Tensor, Tensor, Tensor, Tensor],
        rht: bool,
        stochastic: bool,
        error: int,
        e4m3_max: int,
        amax: Tensor,
        seed: Tensor | None,
        slots: Tensor | None,
    ) -> None:
        self.x, self.groups, self.fold, self.outputs, self.rht, self.error = x, groups, fold, outputs, rht, error
        self.stochastic, self.e4m3_max, self.amax, self.slots = stochastic, e4m3_max, amax, slots
        self.seed = amax if seed is None else seed
        self.channels = x.shape[-1] // groups

    def tiles(self, row: int, col: int) -> None:
        """Both faces of an operand that is not folded, or one face."""
        x, blocks = self.x, parts.ceil_div(self.channels, BLOCK)
        folded = self.fold.strips > 1 and col != NONE
        if folded:
            images, rows, run, source_rows = parts.lines(x, self.fold)
            groups16 = self.fold.images // BLOCK
        else:
            images, rows, run, source_rows = x.shape[0], 1, x.numel() // x.shape[0], None
            groups16 = parts.ceil_div(images, BLOCK) if col == NONE else self.fold.images // BLOCK
        ragged = row != NONE and self.channels % BLOCK != 0
        padded = run // self.channels * blocks * BLOCK if ragged else run
        row_data, row_scale, col_data, col_scale = self.outputs
        table = x if source_rows is None else source_rows
        slots = self.amax if self.slots is None else self.slots

        def launch(config: tuning.Config) -> None:
            block = parts.block_width(padded, config["BLOCK"])
            per_row = parts.ceil_div(padded, block)
            counted = slots.clone() if tuning.searching() else slots  # saturated blocks count once
            operand_kernels.quantize_kernel[(per_row * rows * groups16,)](
                x,
                table,
                self.amax,
                self.seed,
                row_data.view(torch.int32) if row == PACKED else row_data,
                row_scale,
                parts.words_of(col_data) if col == PACKED else col_data,
                col_scale,
                counted,
                images,
                rows,
                run,
                per_row,
                int(folded),
                ROW=row,
                COL=col,
                RHT=self.rht,
                STOCHASTIC=self.stochastic,
                OBSERVE=self.slots is not None,
                FOLDED=folded,
                MASKED=ragged or folded or bool(images % BLOCK or padded % block),
                CHANNELS=self.channels if ragged else 0,
                BLOCKS=blocks if ragged else 1,
                E4M3_MAX=self.e4m3_max,
                BLOCK=block,
                **parts.options_of(config),
            )

        key = (int(self.stochastic), int(x.dtype != torch.bfloat16), int(ragged), row, col, tuning.bucket(run))
        parts.run_kernel("quantize", x, key, launch)

    def row_blocks(self, form: int) -> None:
        """The rowwise face by one lane per block."""
        x, kb = self.x, parts.ceil_div(self.channels, BLOCK)
        lines = x.numel() // x.shape[-1]
        sizes, strides = (lines, lines, self.groups, self.channels), (x.shape[-1], self.channels, 1)
        data, scale = self.outputs[:2]
        self._blocks(data, scale, form, lines * self.groups * kb, sizes, strides, False, 1, kb)

    def col_blocks(self, form: int) -> None:
        """The columnwise face by one lane per block."""
        images, rows, run, source_rows = parts.lines(self.x, self.fold)
        sizes, strides = (images, self.fold.images, rows, run), (rows * run, run, 1)
        data, scale = self.outputs[2:]
        ob = self.fold.images // BLOCK
        self._blocks(data, scale, form, ob * rows * run, sizes, strides, True, ob, 1, source_rows)

    def _blocks(
        self,
        data: Tensor,
        scale: Tensor,
        form: int,
        total: int,
        sizes: tuple[int, int, int, int],
        strides: tuple[int, int, int],
        columns: bool,
        ob: int,
        kb: int,
        source_rows: Tensor | None = None,
    ) -> None:
        face = int(columns)
        parts.quantize_blocks(
            self.x,
            self.amax[face:],
            data,
            scale,
            form,
            total,
            sizes,
            strides,
            columns,
            ob,
            kb,
            self.error,
            self.e4m3_max,
            rht=self.rht and columns,
            seed=self.seed if self.stochastic else None,
            slots=None if self.slots is None else self.slots[face],
            source_rows=source_rows,
            image_size=self.x.numel() // self.x.shape[0],
        )


def _nothing(
    x: Tensor, groups: int, fold: Fold, row: int, col: int, row_scaled: bool, dtype: torch.dtype, amax: Tensor | None
) -> tuple[Tensor, ...]:
    """quantize_operand of a tensor without elements: zeros of the right shapes."""
    row_data, row_scale, col_data, col_scale = (face.zero_() for face in _empty_faces(x, groups, fold, row, col, dtype))
    row_amax = x.new_zeros(x.shape[:-1] if row_scaled and row else (1,), dtype=torch.float32)
    col_amax = x.new_zeros((x.shape[-1],) if row_scaled and col else (1,), dtype=torch.float32)
    if amax is not None:
        row_amax, col_amax = amax[:1].clone(), amax[1:].clone()
    observed = x.new_zeros(0 if amax is None else 3, dtype=torch.float32)
    return row_data, row_scale, row_amax, col_data, col_scale, col_amax, observed


def _empty_faces(
    x: Tensor, groups: int, fold: Fold, row: int, col: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row data, row scale, column data, column scale, of the shapes in operands.py's docstring."""
    blocks = groups * parts.ceil_div(x.shape[-1] // groups, BLOCK)
    folded = (fold.rows, *x.shape[2:]) if x.dim() > 2 else (x.shape[-1],)
    empty = x.new_empty(0, dtype=torch.uint8)
    row_data, row_scale, col_data, col_scale = (torch.empty_like(empty) for _ in range(4))
    if row == PACKED:
        row_data, row_scale = empty.new_empty(*x.shape[:-1], blocks * 8), empty.new_empty(*x.shape[:-1], blocks)
    elif row == DEQUANTIZED:
        row_data = x.new_empty(x.shape, dtype=dtype)
    if col == PACKED:
        shape = (fold.images // BLOCK, *folded)
        col_data, col_scale = empty.new_empty(*shape, 8), empty.new_empty(shape)
    elif col == DEQUANTIZED:
        col_data = x.new_empty((fold.images, *folded), dtype=dtype)
    return row_data, row_scale, col_data, col_scale
