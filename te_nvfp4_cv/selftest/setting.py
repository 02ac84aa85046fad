"""Hold what every check of the self-test shares: where it runs, random tensors, comparisons, the failure it raises.

The reference always runs on the CPU, where the test suite has compared it with TransformerEngine's numbers. So a fault
of the GPU's own arithmetic shows too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class CheckFailed(Exception):
    """A comparison did not hold; the message says which, and by how much."""


@dataclass(frozen=True)
class Setting:
    """The device and the backend of a check. `small` asks for a few tiny shapes, for Triton's interpreter."""

    device: torch.device
    backend: str
    small: bool = False

    def put(self, x: Tensor) -> Tensor:
        """Copy a CPU tensor to the device, with its strides."""
        # clone: on the CPU .to() would return the tensor itself, which then is shared between both sides.
        return x.detach().clone().to(self.device)

    def dirty(self) -> None:
        """Fill freed GPU memory with bytes 0xFF, so that what a kernel leaves unwritten is NaN or 255."""
        if self.device.type == "cuda":
            blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=self.device) for size in (1 << 16, 1 << 24)]
            # Freed, but not returned to the driver: torch's allocator gives these bytes to the next outputs.
            del blocks


def normal(shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Draw normal numbers on the CPU, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    # Drawn in fp32 on the CPU: a GPU's generator gives other numbers.
    return (torch.randn(tuple(shape), generator=generator) * scale).to(dtype)


def differing(a: Tensor, b: Tensor) -> int:
    """Count the elements whose bits differ; any NaN equals any other NaN. Return -1 for another shape or dtype."""
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.shape != b.shape or a.dtype != b.dtype:
        return -1
    if a.dtype.is_floating_point and a.element_size() > 1:
        # Compared as integers, since -0.0 == 0.0 as numbers; NaNs of other bits are allowed.
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        unequal = a.contiguous().view(integer) != b.contiguous().view(integer)
        return int((unequal & ~(a.isnan() & b.isnan())).sum())
    return int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum())


def same_fields(what: str, names: Sequence[str], ours: Sequence[Tensor], truth: Sequence[Tensor]) -> int:
    """Compare results field by field, in bits, and return how many elements were compared.

    Raises:
        CheckFailed: a field differs.
    """
    for name, a, b in zip(names, ours, truth, strict=True):
        wrong = differing(a, b)
        if wrong < 0:
            raise CheckFailed(f"{what}: {name} is {_shape(a)}, the reference's {_shape(b)}")
        if wrong:
            raise CheckFailed(f"{what}: {name} differs from the reference in {wrong} of {b.numel()} elements")
    return sum(b.numel() for b in truth)


def close(what: str, ours: Tensor, truth: Tensor, bound: float) -> float:
    """Return the relative Frobenius error of `ours`.

    Raises:
        CheckFailed: the error is above the bound or NaN, or the shape differs.
    """
    if ours.shape != truth.shape:
        raise CheckFailed(f"{what}: shape {tuple(ours.shape)}, the reference's {tuple(truth.shape)}")
    a, b = ours.detach().cpu().double(), truth.detach().cpu().double()
    error = float((a - b).norm() / b.norm().clamp(min=1e-300))  # a truth of zeros then needs zeros
    if not error <= bound:  # not "error > bound", which NaN would pass
        raise CheckFailed(f"{what}: relative error {error:.2e}, at most {bound:.0e}")
    return error


def bound_for(dtype: torch.dtype) -> float:
    """Return the relative error that two orders of accumulation may have: a few roundings of the output's dtype."""
    return {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-4)


def _shape(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


Options = dict[str, Any]
