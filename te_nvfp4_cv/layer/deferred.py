"""An activation that only quantized layers read is not written: they get their operands from the norm's input.

    norm_act under `deferring`     statistics, and a tensor with a shape but without memory; the Producer hangs on it
    calls.execute                  asks `claim`; where the call is of the kind that the kernels produce, the layer takes
                                   Producer.quantize's faces, the same bits as those of the activation
    anything else                  `settle` writes the activation into that tensor, as if nothing had been deferred

One activation may feed several layers; equal faces are made once. ReLU's mask, which backward keeps, is written by the
same kernel. Only where kernels run (a GPU, or the interpreter in tests), channels innermost in memory, no folding of
images, groups of a multiple of 16 channels, one tensor scale, no 4over6.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.layer.delayed_scaling import CallScales
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.norm import operators as ops
from te_nvfp4_cv.ops.quantize.operand import NONE, PACKED

_ATTRIBUTE = "_nvfp4_producer"
Faces = tuple[Tensor, ...]


class _Local(threading.local):
    deferring = False


_local = _Local()


@contextmanager
def deferring() -> Iterator[None]:
    """Activations made inside will be read by quantized layers alone: they need not be written."""
    before, _local.deferring = _local.deferring, True
    try:
        yield
    finally:
        _local.deferring = before


def wanted(z: Tensor, residual: Tensor | None, backend: str) -> bool:
    """Whether an activation made now may stay unwritten."""
    return (
        _local.deferring
        and backend == "triton"
        and not torch.compiler.is_compiling()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # they would copy a mask not yet written
        and not _watched()
        and z.shape[0] <= 65535  # group norm: images are an axis of a grid
        and z.shape[1] % 16 == 0
        and channels_innermost(z)
        and (residual is None or residual.dtype == z.dtype)
    )


def _watched() -> bool:
    """Whether a mode of somebody else sees each operation, and may read what is not written."""
    modes = torch.overrides._get_current_function_mode_stack()
    # The context's own mode says so itself, by an attribute: a comparison of module names would fail without an error
    # when a file is renamed. torch.device's mode only changes where new tensors are made.
    harmless = (getattr(m, "hands_values_on", False) or type(m).__module__ == "torch.utils._device" for m in modes)
    return bool(torch._C._len_torch_dispatch_stack()) or not all(harmless)


def channels_innermost(z: Tensor) -> bool:
    """Whether z [B, C, *image] lies in memory as [B, *image, C], without gaps."""
    return z.movedim(1, -1).is_contiguous()


@dataclass
class Producer:
    """What an unwritten activation is made of; mean, rstd and mask are filled in by the norm's forward."""

    z: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    groups: int
    activation: str
    mean: Tensor | None = None
    rstd: Tensor | None = None
    mask: Tensor | None = None
    faces: dict[tuple[Any, ...], Faces] = field(default_factory=dict)

    def serves(self, plan: Plan, need_dw: bool, scales: CallScales | None) -> bool:
        """Whether `quantize` gives what this call needs."""
        s, recipe = plan.recipe.settings("input"), plan.recipe
        return (
            (plan.backend == "triton" or (plan.backend == "vendor" and dispatch.kernels_serve(self.z.device)))
            and plan.folds[0].strips == 1
            and self.z.shape[1] // plan.geometry.groups % 16 == 0
            and s.four_over_six is None
            and not plan.row_scaled
            and recipe.backward_override is None
            and "fprop" in plan.gemms
            and ("wgrad" in plan.gemms or not need_dw)
            and (scales is None or scales.knows(0))
        )

    def quantize(self, plan: Plan, need_dw: bool, scales: CallScales | None) -> Faces:
        """The seven tensors of operands.quantize_operand for the activation."""
        s = plan.recipe.settings("input")
        images = plan.folds[0].images
        form = (plan.operand_form, PACKED if need_dw else NONE, s.rht, s.e4m3_max, plan.compute_dtype)
        if scales is None and (images, *form) in self.faces:
            return self.faces[images, *form]
        amax = None if scales is None else scales.amax(0, self.z)
        faces = ops.norm_quantize(*self._parts(), self.groups, self.activation, images, *form, amax)
        if scales is not None:
            scales.collect(0, faces[6])
        else:
            self.faces[images, *form] = faces
        return faces

    def write(self, y: Tensor) -> None:
        """The activation itself, into y."""
        storage = y.untyped_storage()
        storage.resize_(y.numel() * y.element_size())
        *parts, mask = self._parts()
        ops.norm_apply(*parts, y.data, mask, self.groups, self.activation)

    def _parts(self) -> tuple[Any, ...]:
        assert self.mask is not None
        # the mask belongs to a graph already: .data keeps its filling in from counting as a change
        return self.z, self.residual, self.weight, self.bias, self.mean, self.rstd, self.mask.data


def attach(y: Tensor, producer: Producer) -> Tensor:
    """y, which has no memory, with its producer."""
    setattr(y, _ATTRIBUTE, producer)
    return y


def empty_like(z: Tensor) -> Tensor:
    """A tensor of z's shape and strides without memory: reading it is an error until Producer.write."""
    y = torch.empty_like(z)
    y.untyped_storage().resize_(0)
    return y


def settle(x: Any) -> None:
    """Write an activation that was deferred; anything else stays as it is."""
    producer = getattr(x, _ATTRIBUTE, None)
    if producer is not None:
        delattr(x, _ATTRIBUTE)
        producer.write(x)


def claim(x: Tensor, rank: int, padding: Any, dtype: torch.dtype) -> Producer | None:
    """The producer of x, for a layer of `rank` image axes that will run in `dtype`; None, and x written, where x will
    be read before it is quantized.
    """
    producer: Producer | None = getattr(x, _ATTRIBUTE, None)
    if producer is None:
        return None
    if x.dtype != dtype or isinstance(padding, str) or x.dim() != max(rank + 2, 2):
        settle(x)
        return None
    return producer
