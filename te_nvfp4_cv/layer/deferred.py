"""Skip writing an activation to memory when only quantized layers will read it.

The layer asks the norm for 4-bit codes directly. If anyone else touches the tensor, `settle` writes it first, so
results never change.

    norm_act under `deferring`   makes the statistics, and a tensor with a shape but without memory, which carries a
                                 Producer
    execute.execute              takes Producer.quantize's operand, the same bits as the activation's, where the call is
                                 of the kind that the kernels produce
    anything else                `settle` writes the activation into that tensor, as if nothing had been deferred

One activation may feed several layers; equal faces are made once. ReLU's mask, which backward keeps, is written by the
same kernel. Only where kernels run (a GPU, or the interpreter in tests), channels innermost in memory, no folding of
images, groups of a multiple of 16 channels, one tensor scale, no 4over6.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import devices, dispatch, torch_private
from te_nvfp4_cv.layer.inside import replaced
from te_nvfp4_cv.layer.options import Scales
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.norm import operators as ops
from te_nvfp4_cv.ops.norm.spec import NormSpec, norm_of
from te_nvfp4_cv.ops.records import Operand
from te_nvfp4_cv.recipe.fields import Role

# The producer hangs on the tensor itself: whoever gets the tensor finds it, and both are freed together.
ATTRIBUTE = "_nvfp4_producer"


class _Local(threading.local):
    deferring = False


_local = _Local()


def deferring() -> AbstractContextManager[None]:
    """Promise that activations made inside will be read by quantized layers alone, so they need not be written."""
    return replaced(_local, deferring=True)


def wanted(z: Tensor, residual: Tensor | None, backend: str) -> bool:
    """Return True if an activation made now may stay unwritten."""
    return (
        _local.deferring
        and backend == "triton"
        and dispatch.runs_directly(z)  # torch.compile and dispatch modes would see what is not written
        and not torch_private.saved_tensors_hooks_are_on()  # they would copy a mask not yet written
        and not _watched()
        and z.shape[0] <= 65535  # group norm: images are an axis of a grid
        and z.shape[1] % 16 == 0
        and channels_innermost(z)
        and (residual is None or residual.dtype == z.dtype)
    )


def _watched() -> bool:
    """Return True if somebody else's function mode sees each torch call, and may read what is not written."""
    modes = torch_private.function_modes()
    # The context's own mode says so itself, by an attribute: a comparison of module names would fail without an error
    # when a file is renamed. torch.device's mode only changes where new tensors are made.
    harmless = (getattr(m, "hands_values_on", False) or type(m).__module__ == "torch.utils._device" for m in modes)
    return not all(harmless)


def channels_innermost(z: Tensor) -> bool:
    """Return True if z [B, C, *image] lies in memory as [B, *image, C], without gaps."""
    return z.movedim(1, -1).is_contiguous()


@dataclass
class Producer:
    """The parts of an unwritten activation; mean, rstd and mask are filled in by the norm's forward."""

    z: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    groups: int
    activation: str
    mean: Tensor | None = None
    rstd: Tensor | None = None
    mask: Tensor | None = None
    # By (spec, dtype). Empty with given scales: these may differ between two layers that read one activation.
    made: dict[tuple[Any, ...], Operand] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stream = devices.stream_of(self.z)  # on which the activation would be written if it were not deferred

    def serves(self, plan: Plan, need_dw: bool, scales: Scales | None) -> bool:
        """Return True if `quantize` gives what this call needs."""
        s = plan.input
        return (
            self.stream == devices.stream_of(self.z)
            and dispatch.kernels_quantize(plan.backend, self.z.device)
            and plan.folds[0].strips == 1
            and self.z.shape[1] // plan.geometry.groups % 16 == 0
            and s.four_over_six is None
            and not plan.row_scaled
            and plan.recipe.backward_override is None
            # A GEMM in high precision would read x itself, in forward or as what is saved for backward.
            and "fprop" in plan.gemms
            and ("wgrad" in plan.gemms or not need_dw)
            and (scales is None or scales.knows(Role.INPUT))  # measuring an amax would read x
        )

    def quantize(self, plan: Plan, need_dw: bool, scales: Scales | None) -> Operand:
        """Return what operand.quantize_operand would make of the activation."""
        spec, dtype = plan.input_specs[need_dw], plan.compute_dtype
        if scales is None and (spec, dtype) in self.made:
            return self.made[spec, dtype]
        amax = None if scales is None else scales.amax(Role.INPUT, self.z)
        given = None if scales is None or amax is None else (amax, scales.collector(Role.INPUT))
        z, residual, norm, mask = self._parts()
        made = ops.norm_quantize(z, residual, norm, mask, NormSpec(self.groups, self.activation), spec, dtype, given)
        if scales is None:
            self.made[spec, dtype] = made
        return made

    def write(self, y: Tensor) -> None:
        """Write the activation into y, on the stream where others expect it to have been written."""
        now = devices.stream_of(self.z)
        if now != self.stream:
            with torch.cuda.stream(self.stream):
                self.write(y)
            now.wait_stream(self.stream)
            return
        # The storage grows in place, so every alias of y has the values; .data, because y may be saved for backward
        # already, and autograd would take a counted write for a modification of it.
        storage = y.untyped_storage()
        storage.resize_(y.numel() * y.element_size())
        *parts, mask = self._parts()
        ops.norm_apply(*parts, y.data, mask, self._spec())

    def _parts(self) -> tuple[Any, ...]:
        assert self.mask is not None and self.mean is not None and self.rstd is not None
        norm = norm_of(self.mean, self.rstd, self.weight, self.bias)
        # the mask belongs to a graph already: .data keeps its filling in from counting as a change
        return self.z, self.residual, norm, self.mask.data

    def _spec(self) -> list[float]:
        return NormSpec(self.groups, self.activation).encode()


def attach(y: Tensor, producer: Producer) -> Tensor:
    """Hang its producer on y, which has no memory, and return y."""
    setattr(y, ATTRIBUTE, producer)
    return y


def empty_like(z: Tensor) -> Tensor:
    """Return a tensor of z's shape and strides without memory: reading it is an error until Producer.write."""
    y = torch.empty_like(z)
    y.untyped_storage().resize_(0)  # shape, strides and device stay, only the bytes go
    return y


def settle(x: Any) -> None:
    """Write an activation that was deferred; anything else stays as it is."""
    producer = getattr(x, ATTRIBUTE, None)
    if producer is not None:
        delattr(x, ATTRIBUTE)
        producer.write(x)


def claimable(x: Tensor, rank: int, padding: Any, dtype: torch.dtype) -> bool:
    """Return False if a layer of `rank` image axes that runs in `dtype` would read x before it is quantized."""
    return x.dtype == dtype and not isinstance(padding, str) and x.dim() == max(rank + 2, 2)
