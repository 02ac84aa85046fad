"""Layers that keep each channel to itself, for tensors split by channels over ranks (nv.tensor_parallel.NormParallel).

    batch norm, instance norm     statistics of a channel: each rank has all there is of its channels
    group norm                    the same where the ranks' parts hold whole groups; else sums cross ranks
    layer norm over channels      sums cross ranks: nn.LayerNorm of one axis (the last), and classes named LayerNorm2d
    depthwise convolution         each rank has the kernels of its channels; in high precision, as everywhere
    PReLU with many slopes        each rank has the slopes of its channels

Where sums cross ranks, those of x and of x^2 are added in fp64, by one all-reduce of two numbers a group or pixel, and
so are backward's. Results are those of a norm in fp64, rounded once, whatever the number of ranks. torch's fp32 norm,
whose sums are rounded, differs from them in last bits: beside a rounding tie that makes another code.

Parameters, and buffers with one entry a channel, become DTensors. In forward, the module has this rank's parts in their
place: the code that runs is the module's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from te_nvfp4_cv.backend.torch_private import BatchOrInstanceNorm, left_alone, without_function_modes
from te_nvfp4_cv.context import function_mode, state
from te_nvfp4_cv.distributed.tp_call import Sharing
from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.layer import deferred, observe
from te_nvfp4_cv.nn.base import OPS

CONVOLUTIONS = tuple(kind for kind in OPS if kind is not nn.Linear)
_CUTS = {"channel": "num_features", "group": "num_groups", "depthwise": "groups"}  # the number that differs on a rank


class ByChannel(nn.Module):
    """The class that takes the place of a layer's class: it stands in front of it among the bases."""

    sharing: Sharing

    @left_alone  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        """Run the plain module's forward for this rank's channels."""
        deferred.settle(input)
        axis = _channel_axis(self, input)
        local, was = _local(input, axis)
        _check_input(self, local, axis)
        with without_function_modes():
            y = _run(self, local, axis)
        return y if was is None else DTensor.from_local(y, was.device_mesh, [Shard(axis)], run_check=False)

    def extra_repr(self) -> str:
        """Return the plain module's extra_repr, then how the layer is cut."""
        return f"{super().extra_repr()}, channels on {self.sharing.ranks} ranks"


def kind_of(module: Any) -> str:
    """Return "channel", "group", "layer" or "depthwise", or "" for a module that is none of these."""
    if isinstance(module, BatchOrInstanceNorm) and not isinstance(module, nn.SyncBatchNorm):
        return "channel"
    if isinstance(module, nn.PReLU):
        return "channel" if module.num_parameters > 1 else ""
    if isinstance(module, nn.GroupNorm):
        return "group"
    if isinstance(module, nn.LayerNorm) and (nn.LayerNorm in (type(module), type(module).__mro__[2]) or _is_2d(module)):
        return "layer" if len(module.normalized_shape) == 1 else ""
    groups = module.groups if isinstance(module, CONVOLUTIONS) else 1
    return "depthwise" if groups != 1 and groups == module.in_channels else ""


def channels_of(module: Any) -> int:
    """Return how many channels such a module has."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0]
    names = ("num_features", "num_channels", "num_parameters", "in_channels")
    return int(next(getattr(module, name) for name in names if hasattr(module, name)))


def crosses_ranks(module: Any, ranks: int) -> bool:
    """Return True if the statistics of such a module are sums over ranks."""
    kind = kind_of(module)
    return kind == "layer" or (kind == "group" and module.num_groups % ranks != 0)


def _is_2d(module: nn.Module) -> bool:
    # torchvision, timm and others each have such a class, whose forward moves the channels to the end and back.
    return any(base.__name__ == "LayerNorm2d" for base in type(module).__mro__)


def _channel_axis(module: Any, x: Tensor) -> int:
    if isinstance(module, nn.LayerNorm) and not _is_2d(module):
        return x.dim() - 1
    weight: Any = module.weight
    return x.dim() - weight.dim() + 1 if isinstance(module, CONVOLUTIONS) else 1


def _local(x: Tensor, axis: int) -> tuple[Tensor, DTensor | None]:
    """Return this rank's channels of x, and x if it is a DTensor."""
    if not isinstance(x, DTensor):
        return x, None
    return x.redistribute(placements=[Shard(axis)]).to_local(), x


def _check_input(module: Any, x: Tensor, axis: int) -> None:
    channels, ranks = channels_of(module), module.sharing.ranks
    if x.dim() <= axis or x.shape[axis] != channels // ranks:
        raise value_error(
            f"NormParallel: the input of a {type(module).__name__} is not split by channels.",
            got=f"{describe(x)} on a rank",
            needs=f"{channels // ranks} of {channels} channels on each of {ranks} ranks",
            fix="let the layer before be nv.tensor_parallel.ColwiseParallel(), whose output is split so",
        )


def _run(module: Any, x: Tensor, axis: int) -> Tensor:
    if crosses_ranks(module, module.sharing.ranks):
        return _group_norm(module, x) if isinstance(module, nn.GroupNorm) else _layer_norm(module, x, axis)
    call = super(ByChannel, module).forward  # type: ignore[misc]
    if not isinstance(module, CONVOLUTIONS) or state.state() is None:
        with _as_local(module):
            return call(x)
    op = next(OPS[base] for base in type(module).__mro__ if base in OPS)
    weight: Any = module.weight
    reason = function_mode.decide(op, x, weight, module.groups)[1]
    told = observe.Call(op, weight, x, None, None, reason)
    with _as_local(module):
        return observe.reported(told, call, x)


@contextlib.contextmanager
def _as_local(module: Any) -> Iterator[None]:
    """Give the module this rank's parts of its state, and of its number of groups."""
    cut = _CUTS[kind_of(module)]
    cut = cut if hasattr(module, cut) else ""  # a PReLU
    parameters, whole = dict(module._parameters), getattr(module, cut) if cut else 0
    buffers = {name: b for name, b in module._buffers.items() if isinstance(b, DTensor)}
    try:
        module._parameters.update({name: p.to_local() for name, p in parameters.items() if isinstance(p, DTensor)})
        # Not to_local: modules write their buffers in place, which autograd may refuse for the alias that it gives.
        module._buffers.update({name: b._local_tensor for name, b in buffers.items()})
        if cut:
            setattr(module, cut, whole // module.sharing.ranks)
        yield
    finally:
        module._parameters.update(parameters)
        module._buffers.update(buffers)
        if cut:
            setattr(module, cut, whole)


# ---- sums that cross ranks ------------------------------------------------------------------------------------------


class _Together(NamedTuple):
    """Says what is normalized together: all channels of a pixel, or those of a group and their pixels.

    Attributes:
        group: the process group.
        axis: of the channels.
        size: how many values are normalized together, on all ranks.
        of_channel: int64 [C here], the group of each channel; None if all channels of a pixel go together.
        groups: how many groups there are, on all ranks.
    """

    group: Any
    axis: int
    size: int
    of_channel: Tensor | None = None
    groups: int = 0

    def totals(self, *values: Tensor) -> list[Tensor]:
        """Return the sums over what goes together, of each of these fp64 tensors, with axes to broadcast by."""
        parts = torch.stack([self._sums(tensor) for tensor in values])
        dist.all_reduce(parts, group=self.group)
        if self.of_channel is None:
            return list(parts)
        axes_behind = (1,) * (values[0].dim() - 2)
        return [part.index_select(1, self.of_channel).unflatten(1, (-1, *axes_behind)) for part in parts]

    def _sums(self, values: Tensor) -> Tensor:
        if self.of_channel is None:
            return values.sum(self.axis, keepdim=True)
        sums = values.flatten(2).sum(2) if values.dim() > 2 else values
        return sums.new_zeros(len(values), self.groups).index_add(1, self.of_channel, sums)


class _Normalize(torch.autograd.Function):
    """Normalize what goes together over the ranks, times weight [C here], plus bias [C here]; in fp64, rounded once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        together: _Together,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        wide = x.double()
        first, second = together.totals(wide, wide.square())
        mean = first / together.size
        scale = ((second / together.size - mean.square()).clamp(min=0) + eps).rsqrt()
        ctx.save_for_backward(x, mean, scale, weight)
        ctx.together, ctx.bias_dtype = together, None if bias is None else bias.dtype
        y = (wide - mean).mul_(scale)
        if weight is not None:
            y *= _along(weight, y, together.axis)
        if bias is not None:
            y += _along(bias, y, together.axis)
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, scale, weight = ctx.saved_tensors
        together, dx, dw, db = ctx.together, None, None, None
        wide, normal = dy.double(), (x.double() - mean).mul_(scale)
        if ctx.needs_input_grad[0]:
            g = wide if weight is None else wide * _along(weight, wide, together.axis)
            first, second = together.totals(g, g * normal)
            dx = ((g - (first + normal * second) / together.size) * scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = _by_channel(wide * normal, together.axis).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = _by_channel(wide, together.axis).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None


def _by_channel(values: Tensor, axis: int) -> Tensor:
    """Return the sums over all axes but one. Torch's sum over no axes would be that over all, of a vector too."""
    return values.movedim(axis, -1).reshape(-1, values.shape[axis]).sum(0)


def _along(vector: Tensor, x: Tensor, axis: int) -> Tensor:
    return vector.double().view([-1 if i == axis else 1 for i in range(x.dim())])


def _layer_norm(module: Any, x: Tensor, axis: int) -> Tensor:
    dtype = F.layer_norm(x.new_zeros(1, 1), (1,)).dtype  # autocast decides
    together = _Together(module.sharing.group, axis, channels_of(module))
    return _Normalize.apply(x, *_own(module), together, module.eps, dtype)  # type: ignore[no-any-return]


def _group_norm(module: Any, x: Tensor) -> Tensor:
    """Normalize groups that lie on several ranks."""
    here, size = x.shape[1], module.num_channels // module.num_groups
    dtype = F.group_norm(x.new_zeros(1, 1, 2), 1).dtype
    first = module.sharing.mesh.get_local_rank() * here
    of_channel = torch.arange(first, first + here, device=x.device) // size
    together_size = size * x[0, 0].numel() if x.numel() else 1
    together = _Together(module.sharing.group, 1, together_size, of_channel, module.num_groups)
    return _Normalize.apply(x, *_own(module), together, module.eps, dtype)  # type: ignore[no-any-return]


def _own(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of this rank's channels."""
    return tuple(None if p is None else p.to_local() for p in (module.weight, module.bias))  # type: ignore[return-value]
