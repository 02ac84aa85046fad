"""The launches of the quantization kernels, looked up once for tensors that are alike: grid, integers, constants.

    amaxes_of, tiles_of    an operand's amaxes, and its faces
    weight_tiles_of        a weight in 16x16 tiles

What is left for a call are its tensors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import tuning
from te_nvfp4_cv.formats import BLOCK, E4M3_MAX, round_up
from te_nvfp4_cv.ops.quantize.triton import block_kernels, operand_kernels
from te_nvfp4_cv.ops.quantize.triton import tiles as parts
from te_nvfp4_cv.ops.records import DEQUANTIZED, ERRORS, NONE, PACKED, Fold, OperandSpec
from te_nvfp4_cv.ops.triton.launching import Bound, Repeated


@functools.lru_cache(maxsize=4096)
def amaxes_of(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, fold: Fold, raised: int, experts: bool
) -> tuple[Repeated, Tensor | None]:
    """Return the launch of amax_kernel for operands that are alike, and its table of rows.

    Args:
        dtype: of x; a launch serves one.
        raised: the largest block scale, if amaxes are raised to those of powers of two, else 0.
        experts: a table of rows is given at each launch.
    """
    images, rows, run, table = parts.lines(shape, fold, device, experts)

    def bind(config: tuning.Config) -> Bound:
        block = parts.block_width(run, config["BLOCK"])
        tiles = parts.ceil_div(run, block) * rows * (fold.images // BLOCK)
        constants = dict(
            ROW=table is None,
            FOLDED=experts or table is not None,
            MASKED=experts or bool(images % BLOCK or run % block),
            POW2=raised > 0,
            E4M3_MAX=raised or E4M3_MAX,
            BLOCK=block,
            **parts.options_of(config),
        )
        # Programs loop over tiles, so that there are few atomic maxima at the end.
        grid = (min(tiles, parts.PROGRAMS),)
        return Bound(operand_kernels.amax_kernel, grid, (images, rows, run, tiles), constants)

    return Repeated("quantize_amax", device, (tuning.bucket(run),), bind), table


@functools.lru_cache(maxsize=4096)
def tiles_of(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    spec: OperandSpec,
    forms: tuple[int, int],
    observe: int,
    experts: bool,
) -> tuple[Repeated, Tensor | None]:
    """Return the launch of quantize_kernel for operands that are alike, and its table of rows.

    Args:
        forms: of the rowwise and of the columnwise face.
        experts: a table of rows is given at each launch.
    """
    row, col = forms
    channels = shape[-1] // spec.groups
    blocks = parts.ceil_div(channels, BLOCK)
    # Only columns are folded: the rowwise face alone goes through x as it is.
    fold = spec.fold if col != NONE else Fold(1, 0, 1, 0, round_up(shape[0], BLOCK))
    images, rows, run, table = parts.lines(shape, fold, device, experts)
    folded = experts or table is not None
    # Blocks must not cross groups: where a group is no multiple of 16, lanes count through its padded channels.
    ragged = row != NONE and channels % BLOCK != 0
    padded = run // channels * blocks * BLOCK if ragged else run
    # Eight codes of a row are stored as one int32, sixteen of a column as one int64: places 4 and 6 of the arguments.
    views = [(4, torch.int32)] * (row == PACKED) + [(6, torch.int64)] * (col == PACKED)

    def bind(config: tuning.Config) -> Bound:
        block = parts.block_width(padded, config["BLOCK"])
        per_row = parts.ceil_div(padded, block)
        constants = dict(
            ROW=row,
            COL=col,
            RHT=spec.rht,
            STOCHASTIC=spec.stochastic,
            OBSERVE=observe,
            FOLDED=folded,
            MASKED=ragged or folded or bool(images % BLOCK or padded % block),
            CHANNELS=channels if ragged else 0,
            BLOCKS=blocks if ragged else 1,
            E4M3_MAX=spec.e4m3_max,
            BLOCK=block,
            **parts.options_of(config),
        )
        grid = (per_row * rows * fold.images // BLOCK,)
        numbers = (images, rows, run, per_row, int(folded))
        return Bound(operand_kernels.quantize_kernel, grid, numbers, constants, views)

    key = (int(spec.stochastic), int(dtype != torch.bfloat16), int(ragged), row, col, tuning.bucket(run))
    return Repeated("quantize", device, key, bind), table


@functools.lru_cache(maxsize=4096)
def weight_tiles_of(
    shape: torch.Size, strides: tuple[int, int, int], device: torch.device, number: float, kinds: tuple[Any, ...]
) -> Bound:
    """Return the launch of quantize_tiles_kernel for weights [n, c, taps] that are alike.

    Args:
        strides: of rows, taps and channels.
        number: of the factor.
        kinds: dtypes of the weight and of its values, the spec, and if values are written beside codes, by a factor.
    """
    (n, c, taps), (_, _, spec, unpacks, has_factor) = shape, kinds
    kb, ob = parts.ceil_div(c, BLOCK), parts.ceil_div(n // spec.groups, BLOCK)
    config = tuning.config("quantize_tiles", tuning.arch_of(device))
    per_block = min(config["BLOCK"], parts.power_of_two(taps * kb))
    constants = dict(
        # Both memory orders of a weight are served: tiles are taken in the order in which they lie.
        TAPS_FIRST=strides[1] < strides[2],
        FORM=PACKED + DEQUANTIZED if unpacks else spec.row,
        FACTOR=2 if has_factor else 0,
        ERROR=ERRORS[spec.four_over_six],
        E4M3_MAX=spec.e4m3_max,
        TILES=per_block,
        **parts.options_of(config),
    )
    per_band = parts.ceil_div(taps * kb, per_block)
    return Bound(
        block_kernels.quantize_tiles_kernel,
        (per_band * spec.groups * ob,),
        (number, taps * kb, per_band, taps, c, *strides, n // spec.groups, ob, kb),
        constants,
        [(2, torch.int64)] * (spec.row == PACKED),
    )
