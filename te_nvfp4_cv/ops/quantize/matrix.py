"""Quantization to NVFP4: arguments are checked and a backend's quantize_2d is called, all on plain tensors.

    te_nvfp4_cv::quantize    x_MK -> row data, row scale_inv, row amax, column data, column scale_inv, column amax
    te_nvfp4_cv::dequantize  data, scale_inv, amax -> values of that face, as stored

Both are registered custom operators with fake implementations, so torch.compile and export trace through them. A face
that was not asked for is three empty tensors. The arithmetic is in formats.py and reference.py; NVFP4Tensors are made
by NVFP4Quantizer (quantizer.py). Refused here: operands that are no floating-point matrix, and combinations of options
that TransformerEngine does not define.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from te_nvfp4_cv import errors, formats
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.formats import BLOCK, E4M3_MAX
from te_nvfp4_cv.ops.quantize import reference_matrix
from te_nvfp4_cv.ops.quantize.reference_matrix import Faces

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

__all__ = ["Faces", "check_options", "dequantize", "quantize"]


def quantize(
    x_MK: Tensor,
    *,
    rowwise: bool = True,
    columnwise: bool = False,
    rht: bool = False,
    stochastic_rounding: bool = False,
    two_d: bool = False,
    four_over_six: str | None = None,
    e4m3_max: int = E4M3_MAX,
    row_scaled: bool = False,
    amax_rowwise: Tensor | None = None,
    amax_columnwise: Tensor | None = None,
    seed: Tensor | int | None = None,
    with_sign: bool = True,
    backend: str = "reference",
) -> Faces:
    """Quantize a matrix to NVFP4 with `backend`; the arguments are those of reference.quantize_2d.

    Args:
        backend: "reference", "vendor" or "triton", already resolved ("auto" is not a backend).
    Returns:
        Faces(row_data, row_scale, row_amax, col_data, col_scale, col_amax).
    Raises:
        ValueError: an operand that is no bf16, fp16 or fp32 matrix; options that exclude each other; stochastic
            rounding without a seed.
    """
    if x_MK.dim() != 2 or x_MK.dtype not in DTYPES:
        raise errors.value_error(
            "nvfp4 quantize: this operand cannot be quantized.",
            got=errors.describe(x_MK),
            needs="a 2-D tensor of bfloat16, float16 or float32",
            fix="flatten the leading dimensions, x.reshape(-1, x.shape[-1]), and cast to one of these dtypes",
        )
    check_options(
        rht=rht,
        stochastic_rounding=stochastic_rounding,
        two_d=two_d,
        four_over_six=four_over_six,
        e4m3_max=e4m3_max,
        row_scaled=row_scaled,
    )
    if stochastic_rounding and seed is None:
        raise errors.value_error(
            "nvfp4 quantize: stochastic rounding has no random numbers.",
            got="stochastic_rounding=True, seed=None",
            needs="seed, an int or an int64 tensor of one element: the Philox key",
            fix="pass seed=torch.randint(2**62, (), dtype=torch.int64)",
        )
    if isinstance(seed, int):
        seed = torch.tensor(seed, dtype=torch.int64, device=x_MK.device)
    outputs = _quantize_op(
        x_MK,
        rowwise,
        columnwise,
        rht,
        stochastic_rounding,
        two_d,
        four_over_six,
        e4m3_max,
        row_scaled,
        amax_rowwise,
        amax_columnwise,
        seed,
        with_sign,
        backend,
    )
    return Faces(*outputs)


def dequantize(
    data: Tensor, scale: Tensor, amax: Tensor, e4m3_max: int = E4M3_MAX, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values [R, L] of one face as it is stored: columnwise faces come back transposed, and rotated if they were.

    Args:
        data: packed uint8 [R, L/2].
        scale: float8_e4m3fn [R, L/16].
        amax: [1], or [R] for a row-scaled face.
    """
    return _dequantize_op(data, scale, amax, e4m3_max, dtype)


def check_options(
    *, rht: bool, stochastic_rounding: bool, two_d: bool, four_over_six: str | None, e4m3_max: int, row_scaled: bool
) -> None:
    """Raise a ValueError for options that exclude each other."""
    on = {
        "rht": rht,
        "stochastic_rounding": stochastic_rounding,
        "two_d": two_d,
        "four_over_six": four_over_six is not None,
        "row_scaled": row_scaled,
    }
    exclusive = {
        "four_over_six": ("rht", "stochastic_rounding"),
        "row_scaled": ("rht", "stochastic_rounding", "two_d"),
        "two_d": ("rht",),
    }
    for first, others in exclusive.items():
        clash = [other for other in others if on[first] and on[other]]
        if clash:
            raise errors.value_error(
                f"nvfp4 quantize: {first} and {clash[0]} exclude each other.",
                got=", ".join(name for name, value in on.items() if value),
                needs=f"{first} without {' and without '.join(others)}",
                fix=f"turn off {first} or {clash[0]}",
            )
    if four_over_six not in (None, "MAE", "MSE"):
        raise errors.value_error(
            "nvfp4 quantize: unknown error mode of 4over6.",
            got=f"four_over_six={four_over_six!r}",
            needs="None, 'MAE' or 'MSE' (case matters)",
            fix="use 'MAE', the default of the recipe",
        )
    if e4m3_max != E4M3_MAX and not (e4m3_max == 256 and four_over_six is not None):
        raise errors.value_error(
            "nvfp4 quantize: this bound of the block scales does not exist.",
            got=f"e4m3_max={e4m3_max}, four_over_six={four_over_six!r}",
            needs="448, or 256 together with 4over6",
            fix="leave e4m3_max at 448",
        )


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::quantize", mutates_args=())
def _quantize_op(
    x_MK: Tensor,
    rowwise: bool,
    columnwise: bool,
    rht: bool,
    stochastic_rounding: bool,
    two_d: bool,
    four_over_six: Optional[str],  # noqa: UP045  (the schema is inferred from these annotations)
    e4m3_max: int,
    row_scaled: bool,
    amax_rowwise: Optional[Tensor],  # noqa: UP045
    amax_columnwise: Optional[Tensor],  # noqa: UP045
    seed: Optional[Tensor],  # noqa: UP045
    with_sign: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered operator: no checks, one call of the backend."""
    faces = _implementation(backend)(
        x_MK,
        rowwise=rowwise,
        columnwise=columnwise,
        rht=rht,
        stochastic_rounding=stochastic_rounding,
        two_d=two_d,
        four_over_six=four_over_six,
        e4m3_max=e4m3_max,
        row_scaled=row_scaled,
        amax_rowwise=amax_rowwise,
        amax_columnwise=amax_columnwise,
        seed=seed,
        with_sign=with_sign,
    )
    return (*faces,)


@_quantize_op.register_fake
def _quantize_fake(
    x_MK: Tensor,
    rowwise: bool,
    columnwise: bool,
    rht: bool,
    stochastic_rounding: bool,
    two_d: bool,
    four_over_six: str | None,
    e4m3_max: int,
    row_scaled: bool,
    amax_rowwise: Tensor | None,
    amax_columnwise: Tensor | None,
    seed: Tensor | None,
    with_sign: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    M, K = x_MK.shape

    def face(wanted: bool, R: int, L: int) -> tuple[Tensor, ...]:
        n_blocks = (L + BLOCK - 1) // BLOCK
        data, scale, amax = (R, n_blocks * (BLOCK // 2)), (R, n_blocks), (R if row_scaled else 1,)
        return (
            x_MK.new_empty(data if wanted else (0,), dtype=torch.uint8),
            x_MK.new_empty(scale if wanted else (0,), dtype=torch.float8_e4m3fn),
            x_MK.new_empty(amax if wanted else (0,), dtype=torch.float32),
        )

    return face(rowwise, M, K) + face(columnwise, K, M)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::dequantize", mutates_args=())
def _dequantize_op(data: Tensor, scale: Tensor, amax: Tensor, e4m3_max: int, dtype: torch.dtype) -> Tensor:
    """The registered operator; every backend stores the same bits, so there is one implementation."""
    return formats.dequantize(data, scale, amax, e4m3_max).to(dtype)


@_dequantize_op.register_fake
def _dequantize_fake(data: Tensor, scale: Tensor, amax: Tensor, e4m3_max: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty((*data.shape[:-1], data.shape[-1] * 2), dtype=dtype)


def _implementation(backend: str) -> Callable[..., Faces]:
    """The quantize_2d of a backend; vendor.py is imported when it is first used, since it starts a compiler."""
    if backend == "reference":
        return reference_matrix.quantize_2d
    if backend in ("vendor", "triton"):
        from te_nvfp4_cv.ops.quantize import cpu

        return cpu.quantize_2d if backend == "vendor" else functools.partial(cpu.quantize_2d, kernels=True)
    raise errors.value_error(
        "nvfp4 quantize: unknown backend.",
        got=f"backend={backend!r}",
        needs="'reference', 'vendor' or 'triton'",
        fix="let nvfp4_autocast or NVFP4Quantizer choose with backend='auto'",
    )
