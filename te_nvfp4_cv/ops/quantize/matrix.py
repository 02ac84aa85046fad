"""Quantization of a matrix to NVFP4: check the arguments, then call the backend that was chosen.

The call is registered as the custom operator te_nvfp4_cv::quantize with a fake implementation, so that torch.compile
and torch.export trace through it. The options travel to it as one list of ints, MatrixSpec.to_ints.

    x_MK -> row data, row scale_inv, row amax, column data, column scale_inv, column amax

A face that was not asked for is three empty tensors. The arithmetic is in formats.py and reference_matrix.py,
NVFP4Quantizer makes NVFP4Tensors of the result, and formats.dequantize gives the values back. Operands that are no
floating-point matrix are refused here, and so are combinations of options that TransformerEngine does not define.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from te_nvfp4_cv import errors
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.formats import E4M3_MAX
from te_nvfp4_cv.ops.quantize import reference_matrix
from te_nvfp4_cv.ops.quantize.reference_matrix import Faces, MatrixSpec
from te_nvfp4_cv.ops.records import ERRORS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

__all__ = ["Faces", "MatrixSpec", "check_options", "quantize"]


def quantize(
    x_MK: Tensor,
    *,
    amax_rowwise: Tensor | None = None,
    amax_columnwise: Tensor | None = None,
    seed: Tensor | int | None = None,
    backend: str = "reference",
    **spec: Any,
) -> Faces:
    """Quantize a matrix to NVFP4 with `backend`.

    Args:
        x_MK: [M, K] bf16, fp16 or fp32, any strides.
        amax_rowwise: fp32. If None, it is computed; pass it when ranks must agree.
        amax_columnwise: fp32, after RHT. If None, it is computed, or copied from amax_rowwise without RHT.
        seed: int64 Philox key, needed for stochastic rounding.
        backend: "reference", "integer" or "vendor" (the same kernels on a CPU), "triton" or "cudnn". It is resolved
            already: "auto" is not a backend.
        **spec: fields of MatrixSpec, for example rowwise=True, columnwise=True, rht=True.
    Returns:
        Faces(row_data, row_scale, row_amax, col_data, col_scale, col_amax).
    Raises:
        ValueError: an operand that is no bf16, fp16 or fp32 matrix; options that exclude each other; stochastic
            rounding without a seed.
    """
    fields = MatrixSpec(**spec)
    if x_MK.dim() != 2 or x_MK.dtype not in DTYPES:
        raise errors.value_error(
            "nvfp4 quantize: this operand cannot be quantized.",
            got=errors.describe(x_MK),
            needs="a 2-D tensor of bfloat16, float16 or float32",
            fix="flatten the leading dimensions, x.reshape(-1, x.shape[-1]), and cast to one of these dtypes",
        )
    check_options(fields)
    if fields.stochastic_rounding and seed is None:
        raise errors.value_error(
            "nvfp4 quantize: stochastic rounding has no random numbers.",
            got="stochastic_rounding=True, seed=None",
            needs="seed, an int or an int64 tensor of one element: the Philox key",
            fix="pass seed=torch.randint(2**62, (), dtype=torch.int64)",
        )
    if isinstance(seed, int):  # an operator's argument is either a tensor or not: ints become tensors here
        seed = torch.tensor(seed, dtype=torch.int64, device=x_MK.device)
    return Faces(*_quantize_op(x_MK, fields.to_ints(), amax_rowwise, amax_columnwise, seed, backend))


def check_options(spec: MatrixSpec) -> None:
    """Refuse options that exclude each other.

    Raises:
        ValueError: two options that exclude each other; an unknown error mode of 4over6; an e4m3_max that does not
            exist.
    """
    options = ("rht", "stochastic_rounding", "two_d", "four_over_six", "row_scaled")
    on = [name for name in options if getattr(spec, name) not in (None, False)]
    exclusive = {  # what TransformerEngine defines no numbers for
        "four_over_six": ("rht", "stochastic_rounding"),
        "row_scaled": ("rht", "stochastic_rounding", "two_d"),
        "two_d": ("rht",),
    }
    for first, others in exclusive.items():
        clash = [other for other in others if first in on and other in on]
        if clash:
            raise errors.value_error(
                f"nvfp4 quantize: {first} and {clash[0]} exclude each other.",
                got=", ".join(on),
                needs=f"{first} without {' and without '.join(others)}",
                fix=f"turn off {first} or {clash[0]}",
            )
    if spec.four_over_six not in ERRORS:
        raise errors.value_error(
            "nvfp4 quantize: unknown error mode of 4over6.",
            got=f"four_over_six={spec.four_over_six!r}",
            needs="None, 'MAE' or 'MSE' (case matters)",
            fix="use 'MAE', the default of the recipe",
        )
    if spec.e4m3_max != E4M3_MAX and not (spec.e4m3_max == 256 and spec.four_over_six is not None):
        raise errors.value_error(
            "nvfp4 quantize: this bound of the block scales does not exist.",
            got=f"e4m3_max={spec.e4m3_max}, four_over_six={spec.four_over_six!r}",
            needs="448, or 256 together with 4over6",
            fix="leave e4m3_max at 448",
        )


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::quantize", mutates_args=())
def _quantize_op(
    x_MK: Tensor,
    spec: list[int],
    amax_rowwise: Optional[Tensor],  # noqa: UP045  (the schema is inferred from these annotations)
    amax_columnwise: Optional[Tensor],  # noqa: UP045
    seed: Optional[Tensor],  # noqa: UP045
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the registered operator: no checks, one call of the backend. `spec` is MatrixSpec.to_ints."""
    fields = MatrixSpec.from_ints(spec)
    faces = _implementation(backend)(
        x_MK, amax_rowwise=amax_rowwise, amax_columnwise=amax_columnwise, seed=seed, **fields._asdict()
    )
    return (*faces,)  # a plain tuple: the schema knows no NamedTuple


@_quantize_op.register_fake
def _(x_MK, spec, amax_rowwise, amax_columnwise, seed, backend):  # type: ignore[no-untyped-def]
    return (*reference_matrix.empty_faces(x_MK, *x_MK.shape, MatrixSpec.from_ints(spec)),)


def _implementation(backend: str) -> Callable[..., Faces]:
    """Return the quantize_2d of a backend. The kernels' is imported at first use, since it starts a compiler."""
    if backend == "reference":
        return reference_matrix.quantize_2d
    if backend in ("integer", "vendor", "triton", "cudnn"):
        from te_nvfp4_cv.ops.quantize.cpu_matrix import quantize_2d

        return functools.partial(quantize_2d, kernels=True) if backend in ("triton", "cudnn") else quantize_2d
    raise errors.value_error(
        "nvfp4 quantize: unknown backend.",
        got=f"backend={backend!r}",
        needs="'reference', 'integer', 'vendor', 'triton' or 'cudnn'",
        fix="let nvfp4_autocast or NVFP4Quantizer choose with backend='auto'",
    )
