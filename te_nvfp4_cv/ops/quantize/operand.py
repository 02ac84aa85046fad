"""Quantize the operands of a convolution, and unpack them again. A linear layer is the case without image axes.

    quantize_operand   an activation or gradient [B, *image, C]: a rowwise face (16 channels of a pixel) and a
                       columnwise face (16 images at a pixel)
    quantize_weight    a weight [axis 0, axis 1, *kernel]: faces over axis 1 (rowwise) and axis 0 (columnwise), one tap
                       at a time
    measure_operand    the two amaxes that quantize_operand would use
    unpack_*           packed codes back to code * scale

Each is a function over records (ops/records.py) and a custom operator on plain tensors behind it, which tracing sees.

    face                      packed data (uint8)           scale (E4M3 bytes)             dequantized
    operand, rowwise          [B, *image, G * Kb * 8]       [B, *image, G * Kb]            [B, *image, C]
    operand, columnwise       [N16, *folded image, C, 8]    [N16, *folded image, C]        [N16 * 16, *folded image, C]
    weight, rowwise, 16x16    [axis 0, T, Kb * 8]           [G, Ob, T, Kb]: a tile each    [axis 0, T, axis 1]
    weight, rowwise, 1x16     [axis 0, T, Kb * 8]           [axis 0, T, Kb]
    weight, columnwise        [G, Ob, T, axis 1, 8]         [G, Ob, T, axis 1]             [axis 0, T, axis 1]

Kb and Ob count blocks of 16 of one group's channels. A shorter last block is padded with zeros, which only its packed
codes store. With 16x16 scaling both faces of a weight are the same numbers, so only the rowwise one is written.
Other formats than NVFP4 have other scale bytes, and fewer where their blocks have 32 values (block_formats.py).

Stochastic rounding by plain torch and by the CPU's kernels uses Philox counter i for the block with row-major index i
in the TE-ordered scale matrix (rows of M in the order image axes, then batch). The Triton kernels draw other numbers
(see triton/launch.py).

The tensor scale is that of the operand's own amax, of the power of two above it (tensor_scale="current_pow2"), or of
amaxes that are given: those of an earlier step (tensor_scale="delayed"), or of all ranks. With given amaxes the call
also observes what it saw, in the same pass:

    observed [3] fp32    amax of x; amax of the columnwise operand, folded and rotated; saturated blocks

An amax whose face is not written is 0; without RHT both are the amax of x. A block is saturated where its decode scale
before rounding, amax_b * f32(S_enc * f32(1/6)), exceeds 448: its largest values are clipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.dispatch import runs_directly
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.block_scales import FORMATS, INTEGER, REFERENCE, block_of
from te_nvfp4_cv.ops.quantize import cpu, reference
from te_nvfp4_cv.ops.quantize.amax import collect
from te_nvfp4_cv.ops.quantize.block_cpu import CompiledQuantizer
from te_nvfp4_cv.ops.quantize.block_formats import Quantizer
from te_nvfp4_cv.ops.records import (
    Alpha,
    Collector,
    Face,
    Move,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightLayout,
    WeightSpec,
    tensor_of,
)


def _implementation(backend: str, device: torch.device) -> Any:
    """Return the module that quantizes tensors of `device` for a backend. The Triton one is imported at first use."""
    if dispatch.kernels_quantize(backend, device):
        from te_nvfp4_cv.ops.quantize.triton import launch

        return launch
    return _PLAIN.get(backend, cpu)


# NVFP4's specification, and the other formats, each of which is a few backends of its own.
_PLAIN: dict[str, Any] = {"reference": reference}
for _name, _format in FORMATS.items():
    _fast = cpu.ScaleOne if _name == "fp4_e4m3_only" else CompiledQuantizer(_name)
    _PLAIN |= {_name: _fast, _name + INTEGER: _fast, _name + REFERENCE: Quantizer(_format)}


# ---- activations and gradients --------------------------------------------------------------------------------------


def quantize_operand(
    x: Tensor,
    spec: OperandSpec,
    dtype: torch.dtype,
    seed: Tensor | None,
    amax: Tensor | None,
    backend: str,
    collector: Collector | None = None,
) -> Operand:
    """Quantize an activation or gradient.

    Args:
        x: [B, *image, C] contiguous, bf16, fp16 or fp32.
        dtype: of dequantized faces, bf16 or fp32.
        seed: int64 [1], for stochastic rounding.
        amax: fp32 [2], positive: of the rowwise and of the columnwise face, used in place of x's. Not with row_scaled.
            With spec.pow2 they are raised as x's own would be.
        collector: takes what the call observes; only with `amax`.
    Returns:
        The faces that the spec asks for. The two amaxes are those that were used: with spec.pow2 raised, with `amax`
        given NaN where the observed one is not finite.
    """
    if runs_directly(x):
        module = _implementation(backend, x.device)
        if collector is not None and module is not reference and module is not cpu:  # in the kernels' last launch
            found: Operand = module.quantize_operand(x, spec, dtype, seed, amax, collector)
            return found
        made: Operand = module.quantize_operand(x, spec, dtype, seed, amax)
    else:
        made = Operand.from_flat(quantize_operand_op(x, spec.to_ints(), dtype, seed, amax, backend))
    if collector is not None:
        collect(collector, made.observed)
    return made


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::quantize_operand", mutates_args=())
def quantize_operand_op(
    x: Tensor, spec: list[int], dtype: torch.dtype, seed: Tensor | None, amax: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Call a backend's quantize_operand: the spec comes as ints, the Operand goes as seven tensors."""
    made = _implementation(backend, x.device).quantize_operand(x, OperandSpec.from_ints(spec), dtype, seed, amax)
    return separate(made)


def separate(made: Operand) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the tensors of an operand without shared memory, as torch wants an operator's results.

    The kernels write both amaxes into one tensor, of which eager calls take views.
    """
    made = made._replace(row_amax=made.row_amax.clone(), col_amax=made.col_amax.clone())
    return made.flat()  # type: ignore[return-value]


@quantize_operand_op.register_fake
def _(x, spec, dtype, seed, amax, backend):  # type: ignore[no-untyped-def]
    spec = OperandSpec.from_ints(spec)
    row, col = layouts.operand_faces(x, spec, dtype, block=block_of(backend))
    row_amax = x.new_empty(x.shape[:-1] if spec.row_scaled and spec.row else (1,), dtype=torch.float32)
    col_amax = x.new_empty((x.shape[-1],) if spec.row_scaled and spec.col else (1,), dtype=torch.float32)
    observed = x.new_empty(0 if amax is None else 3, dtype=torch.float32)
    return Operand(row, row_amax, col, col_amax, observed).flat()


def measure_operand(x: Tensor, spec: OperandSpec, backend: str) -> Tensor:
    """Return fp32 [2]: the amax of x [B, *image, C], and that of the columnwise operand, folded and rotated.

    Without RHT both are the first. NaN wins over inf, inf over numbers. Only fold and rht of the spec are read.
    """
    if runs_directly(x):
        found: Tensor = _implementation(backend, x.device).measure_operand(x, spec)
        return found
    return measure_operand_op(x, spec.to_ints(), backend)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::measure_operand", mutates_args=())
def measure_operand_op(x: Tensor, spec: list[int], backend: str) -> Tensor:
    """Call a backend's measure_operand."""
    return _implementation(backend, x.device).measure_operand(x, OperandSpec.from_ints(spec))  # type: ignore[no-any-return]


@measure_operand_op.register_fake
def _(x, spec, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(2, dtype=torch.float32)


def unpack_columns(face: Face, dtype: torch.dtype, backend: str, factor: Alpha | None = None) -> Tensor:
    """Return code * scale [N16 * 16, *rest] of a packed columnwise face: data [N16, *rest, 8], scale [N16, *rest].

    Args:
        factor: multiplies every value, as in unpack_weight. Only kernels that run directly take one.
    """
    if runs_directly(face.data):
        module = _implementation(backend, face.data.device)
        found: Tensor = module.unpack_columns(*face, dtype, *(() if factor is None else (factor,)))
        return found
    return unpack_columns_op(*face, dtype, backend)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::unpack_columns", mutates_args=())
def unpack_columns_op(data: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Call a backend's unpack_columns."""
    return _implementation(backend, data.device).unpack_columns(data, scale, dtype)  # type: ignore[no-any-return]


@unpack_columns_op.register_fake
def _(data, scale, dtype, backend):  # type: ignore[no-untyped-def]
    return data.new_empty((data.shape[0] * BLOCK, *data.shape[1:-1]), dtype=dtype)


def unpack_rows(face: Face, channels: int, groups: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Return code * scale [..., channels] of a packed rowwise operand: data [..., G * Kb * 8], scale [..., G * Kb]."""
    if runs_directly(face.data):
        found: Tensor = _implementation(backend, face.data.device).unpack_rows(*face, channels, groups, dtype)
        return found
    return unpack_rows_op(*face, channels, groups, dtype, backend)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::unpack_rows", mutates_args=())
def unpack_rows_op(data: Tensor, scale: Tensor, channels: int, groups: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Call a backend's unpack_rows."""
    made = _implementation(backend, data.device).unpack_rows(data, scale, channels, groups, dtype)
    return made  # type: ignore[no-any-return]


@unpack_rows_op.register_fake
def _(data, scale, channels, groups, dtype, backend):  # type: ignore[no-untyped-def]
    return data.new_empty((*data.shape[:-1], channels), dtype=dtype)


# ---- weights --------------------------------------------------------------------------------------------------------


def quantize_weight(
    w: Tensor, spec: WeightSpec, dtype: torch.dtype, backend: str, amax: Tensor | None = None
) -> WeightCodes:
    """Quantize a weight, or a rank's rows or columns of one.

    Args:
        w: [axis 0, axis 1, *kernel], any strides.
        dtype: of dequantized faces.
        amax: fp32 [1], of the whole weight where w is a shard; if None, w's amax is used. Shards of 16 n rows and
            columns then have the codes and scales of the whole weight.
    """
    if runs_directly(w):
        found: WeightCodes = _implementation(backend, w.device).quantize_weight(w, spec, dtype, amax)
        return found
    return WeightCodes.from_flat(quantize_weight_op(w, spec.to_ints(), dtype, backend, amax))


def quantize_experts(w: Tensor, spec: WeightSpec, dtype: torch.dtype, backend: str) -> WeightCodes:
    """Quantize w [E, O, C], each expert with its own amax: amax is [E], the faces are those of [E * O, C]."""
    alone = spec._replace(groups=1)
    made = [quantize_weight(part, alone, dtype, backend).flat() for part in w.unbind(0)]
    return WeightCodes.from_flat(tuple(map(torch.cat, zip(*made, strict=True))))


def serves_directly(x: Tensor, backend: str) -> bool:
    """Return True if Triton kernels quantize and unpack such tensors, without torch's dispatcher between."""
    return dispatch.kernels_quantize(backend, x.device) and x.numel() > 0 and runs_directly(x)


def measure_weight(w: Tensor, spec: WeightSpec, backend: str, move: Move | None) -> Tensor:
    """Return the amax of a weight, fp32 [1], raised with spec.pow2, where serves_directly.

    Args:
        move: delayed scales of the layer, which move in the same launch.
    """
    found: Tensor = _implementation(backend, w.device).measure_weight(w, spec, move)
    return found


def quantize_weight_for(
    w: Tensor, spec: WeightSpec, dtype: torch.dtype, backend: str, amax: Tensor, factor: Alpha | None
) -> tuple[WeightCodes, Tensor]:
    """Return quantize_weight's packed codes for an amax of measure_weight, and unpack_weight's values for the factor.

    Only with 16x16 scales, and where serves_directly.
    """
    made: tuple[WeightCodes, Tensor]
    made = _implementation(backend, w.device).quantize_weight_for(w, spec, dtype, amax, factor)
    return made


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::quantize_weight", mutates_args=())
def quantize_weight_op(
    w: Tensor, spec: list[int], dtype: torch.dtype, backend: str, amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Call a backend's quantize_weight: the spec comes as ints, the WeightCodes go as five tensors."""
    made = _implementation(backend, w.device).quantize_weight(w, WeightSpec.from_ints(spec), dtype, amax)
    return made.flat()  # type: ignore[no-any-return]


@quantize_weight_op.register_fake
def _(w, spec, dtype, backend, amax=None):  # type: ignore[no-untyped-def]
    row, col = layouts.weight_faces(w, WeightSpec.from_ints(spec), dtype, block_of(backend))
    return WeightCodes(row, col, w.new_empty(1, dtype=torch.float32)).flat()


def unpack_weight(
    face: Face, layout: WeightLayout, factor: Tensor | Alpha | None, dtype: torch.dtype, backend: str
) -> Tensor:
    """Return code * scale [axis 0, T, axis 1] of either packed face of a weight.

    Args:
        factor: fp32 [1] (see records.Alpha), or None. It multiplies every value in fp32, before the one rounding to
            `dtype`. A power of two keeps the values exact, except below 2^-126; NaN makes all of them NaN.
    """
    if runs_directly(face.data):
        found: Tensor = _implementation(backend, face.data.device).unpack_weight(*face, layout, factor, dtype)
        return found
    return unpack_weight_op(*face, list(map(int, layout)), tensor_of(factor), dtype, backend)


def unpack_for_backward(
    w: Face, layout: WeightLayout, w_factor: Alpha | None, x: Face, x_factor: Alpha | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return unpack_weight's values of 16x16 tiles and unpack_columns' ones in one launch, where serves_directly."""
    found: tuple[Tensor, Tensor]
    found = _implementation("triton", w.data.device).unpack_for_backward(w, layout, w_factor, x, x_factor, dtype)
    return found


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::unpack_weight", mutates_args=())
def unpack_weight_op(
    data: Tensor, scale: Tensor, layout: list[int], factor: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    """Call a backend's unpack_weight: the layout comes as ints."""
    n, channels, groups, columnwise = layout
    sizes = WeightLayout(n, channels, groups, bool(columnwise))
    made = _implementation(backend, data.device).unpack_weight(data, scale, sizes, factor, dtype)
    return made  # type: ignore[no-any-return]


@unpack_weight_op.register_fake
def _(data, scale, layout, factor, dtype, backend):  # type: ignore[no-untyped-def]
    n, channels, _, columnwise = layout
    return data.new_empty((n, data.shape[2 if columnwise else 1], channels), dtype=dtype)
