"""What several test files share: values of every kind, bit equality, relative errors, geometries and layers to call."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from te_nvfp4_cv.ops.geometry import ConvGeometry, output_size, transposed_output_size
from te_nvfp4_cv.ops.records import Operand, WeightCodes

KINDS = ("normal", "wide", "subnormal", "huge", "zeros", "negative zeros", "nan", "inf")


def seeds(few: Iterable[Any], many: Iterable[Any]) -> list[Any]:
    """Return parameters, seeds or others: tests of `few` run in `make test`, the rest of `many` in `make stress`.

    A tuple is the values of several arguments.
    """
    few = list(few)
    rest = (seed if isinstance(seed, tuple) else (seed,) for seed in many if seed not in few)
    return [*few, *(pytest.param(*seed, marks=pytest.mark.stress) for seed in rest)]


def run_script(path: Path, *arguments: object) -> int:
    """Run a script as `python PATH ARGUMENTS` does, in this process, and return its exit status.

    A process of its own would import torch first, which takes longer than most of what is tested so.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.syspath_prepend(str(path.parent))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            if isinstance(ended.code, str):  # as Python does
                print(ended.code, file=sys.stderr)
                return 1
            return ended.code or 0
    return 0


def values(shape: tuple[int, ...], kind: str = "normal", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random values with what the name says: a NaN or an inf is one element among normal ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "wide":
        x = x * torch.exp2(torch.randint(-30, 30, shape, generator=generator).float())
    elif kind == "subnormal":
        x = x * (1e-6 if dtype == torch.float16 else 1e-39)
    elif kind == "huge":
        x = x * (1e4 if dtype == torch.float16 else 1e37)
    elif kind == "zeros":
        x = torch.zeros(shape)
    elif kind == "negative zeros":
        x = torch.where(x > 0, -0.0, x * 1e-3)
    elif kind in ("nan", "inf") and x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = float(kind)
    return x.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits; any NaN equals any other NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.is_floating_point and a.element_size() > 1:
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        bits = a.contiguous().view(integer) == b.contiguous().view(integer)
        return bool((bits | (a.isnan() & b.isnan())).all())
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def same_codes(a: Operand | WeightCodes, b: Operand | WeightCodes) -> bool:
    """Return True if two records of the same kind hold the same bits in each of their tensors."""
    return type(a) is type(b) and all(same_bits(x, y) for x, y in zip(a.flat(), b.flat(), strict=True))


def relative_error(a: Tensor, truth: Tensor) -> float:
    """Relative Frobenius norm of the difference, in float64."""
    a, truth = a.detach().double(), truth.detach().double()
    return float((a - truth).norm() / truth.norm())


def make_geometry(
    batch: int,
    channels: tuple[int, int],
    image: tuple[int, ...],
    kernel: int | tuple[int, ...] = 3,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    transposed: bool = False,
) -> ConvGeometry:
    """The geometry of F.convNd or F.conv_transposeNd on x [batch, channels[0], *image]; channels[1] come out."""
    per_axis = [
        v if isinstance(v, tuple) else (v,) * len(image) for v in (kernel, stride, padding, dilation, output_padding)
    ]
    k, s, p, d, extra = per_axis
    if transposed:
        out = tuple(transposed_output_size(*row) for row in zip(image, k, s, p, d, extra, strict=True))
        return ConvGeometry(batch, channels[1], channels[0], out, image, k, s, p, d, extra, groups, True)
    out = tuple(output_size(*row) for row in zip(image, k, s, p, d, strict=True))
    return ConvGeometry(batch, *channels, image, out, k, s, p, d, extra, groups, False)
