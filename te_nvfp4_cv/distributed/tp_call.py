"""One call of a tensor-parallel layer: where its tensors lie, whether it runs in NVFP4, what crosses ranks and how.

    column   x whole, or gathered -> multiply -> y by channels      row   x by channels -> multiply -> y summed
    then     from there to the layout of the plan

Exchanges that tp_exchange.py does not do on codes are torch's DTensor.redistribute, forward and backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.context import function_mode, state
from te_nvfp4_cv.distributed.tp_exchange import GEMMS, Array, Exchange, Link, SharedScales, broken_blocks, part_plan
from te_nvfp4_cv.errors import describe, value_error, warn_once
from te_nvfp4_cv.layer import check, delayed_scaling, observe, shared_amax, shortfall
from te_nvfp4_cv.layer.check import CallShape, Sizes, lowered, named_padding
from te_nvfp4_cv.layer.forward_backward import QuantizedConv
from te_nvfp4_cv.layer.options import CallOptions
from te_nvfp4_cv.layer.plan import Plan, plan_for
from te_nvfp4_cv.nn.modules import NVFP4_CLASSES, NVFP4Module
from te_nvfp4_cv.nn.walk import for_output_size, padded
from te_nvfp4_cv.ops.geometry import ConvArgs
from te_nvfp4_cv.ops.layouts import is_channels_last
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.fields import check_nvfp4


@dataclass(frozen=True, eq=False)
class Sharing:
    """Says how one module's tensors lie on a mesh. A layout of None means by channels."""

    column: bool
    mesh: Any
    input: Shard | Replicate | None
    output: Shard | Replicate | None
    use_local_output: bool

    def __deepcopy__(self, memo: Any) -> Sharing:  # of process groups there are no copies
        return self

    @property
    def group(self) -> Any:
        return self.mesh.get_group()

    @property
    def ranks(self) -> int:
        return self.mesh.size()


def run(module: Any, x: Tensor, output_size: Any) -> Tensor:
    """Return the layer's result for this rank's part of x, in the layout of its plan."""
    sharing: Sharing = module.sharing
    rank = module.weight.dim() - 2
    # The dimension that holds the channels: the last one of a linear layer, 1 of images [B, C, *image].
    channels = x.dim() - rank - 1 if rank else x.dim() - 1
    if not isinstance(x, DTensor):
        _check_alike(module.op, x, sharing)
    x, layout = _as_it_lies(x, sharing, channels)
    recipe, backend, reason = _decide(module, x, layout, channels)
    call = _Call(module, sharing, layout, channels, output_size)
    if recipe is not None:
        return call.quantized(x, recipe, backend)
    told = observe.Call(module.op, module.weight, x, None, None, reason)
    return observe.reported(told, call.high_precision, x) if state.state() is not None else call.high_precision(x)


def _check_alike(op: str, x: Tensor, sharing: Sharing) -> None:
    """Refuse, on every rank, parts of different shapes: collectives of other sizes would wait, or mix up data.

    Raises:
        ValueError: the ranks' parts differ in shape.
    """
    # The number of axes, and their sizes, each also negative: the maxima tell the smallest and the largest.
    sizes = [x.dim(), *x.shape, *[0] * (7 - x.dim())][:8]
    told = torch.tensor([*sizes, *(-size for size in sizes)], device="cpu")
    group = sharing.group
    if x.device.type != "cpu":  # the host must know before it sends, and not wait for the GPU (not executed yet)
        group = shared_amax.own_group(group, x.device, "gloo")
    dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
    largest, smallest = told[:8].tolist(), (-told[8:]).tolist()
    if largest == smallest:
        return
    axes = [i for i in range(7) if largest[i + 1] != smallest[i + 1]]
    raise value_error(
        f"tensor_parallel {op}: the ranks' inputs differ in shape.",
        got=f"{tuple(x.shape)} on rank {sharing.mesh.get_local_rank()}; "
        + ", ".join(f"{smallest[i + 1]} to {largest[i + 1]} along axis {i}" for i in axes),
        needs="parts of one shape; a DTensor may be cut unevenly, as torch.chunk cuts",
        fix="drop the last, smaller batch (drop_last=True), pad it, or pass a DTensor",
    )


def _as_it_lies(x: Tensor, sharing: Sharing, channels: int) -> tuple[Tensor, int | None]:
    """Return this rank's part of x, and the dimension along which x is cut, or None for a whole one."""
    if isinstance(x, DTensor):
        (place,) = x.placements
        # Parts of different sizes have no common blocks, and the shapes below count on equal parts: gather such an x.
        even = type(place) is Shard and x.shape[place.dim] % sharing.ranks == 0
        if not even and not isinstance(place, Replicate):
            x, place = x.redistribute(placements=[Replicate()]), Replicate()
        return x.to_local(grad_placements=[place]), place.dim if isinstance(place, Shard) else None
    return x, _dimension(sharing.input, x.dim(), channels)


def _dimension(layout: Shard | Replicate | None, dims: int, channels: int) -> int | None:
    if layout is None:
        return channels
    return layout.dim % dims if isinstance(layout, Shard) else None


def _whole_shape(x: Tensor, dim: int | None, ranks: int) -> Array:
    return tuple(size * ranks if axis == dim else size for axis, size in enumerate(x.shape))


def _decide(module: Any, x: Tensor, layout: int | None, channels: int) -> tuple[NVFP4BlockScaling | None, str, str]:
    """Return (recipe or None for high precision, backend, reason for high precision) for what this rank multiplies."""
    sharing: Sharing = module.sharing
    w = module.weight._local_tensor
    shape = list(_whole_shape(x, layout, sharing.ranks))
    shape[channels] //= 1 if sharing.column else sharing.ranks
    # One element, expanded: the question is about shapes, and must not cost memory.
    x_like = x.detach().new_empty(()).expand(shape)  # what the layer multiplies: its shape, dtype and device
    if x.dim() != max(module.weight.dim(), 2) and module.weight.dim() > 2:
        return None, "", "an image without a batch axis, under tensor parallelism"
    if 0 in shape or math.prod(w.shape) == 0:
        return None, "", "nothing to multiply"
    if isinstance(module, NVFP4Module):
        recipe, backend = module.chosen()
        if recipe is None:
            return None, backend, "set_precision: high precision"
        reason = check.ineligible(module.op, x_like, w, 1, recipe)
        if reason is not None:
            raise value_error(
                f"nvfp4 {module.op}: x and y of a rank cannot run in NVFP4: {reason}.",
                got=f"x {describe(x_like)}, weight {describe(w)} on each of {sharing.ranks} ranks",
                needs=f"bf16, fp16 or fp32; at least {check.MINIMUM} channels on both sides on every rank",
                fix="use fewer ranks, or a plain module: nvfp4_autocast leaves it in high precision",
            )
        return recipe, backend, ""
    # The context asks if a weight is a Parameter. The local part of a DTensor is not one, so it is dressed as one.
    if isinstance(module.weight, nn.Parameter):
        w = nn.Parameter(w.detach(), requires_grad=False)
    recipe, reason = function_mode.decide(module.op, x_like, w, 1)
    current = state.state()
    return recipe, "" if current is None else current.backend, reason


class _Call:
    """Runs one call of a module. `layout` is the dimension along which x is cut, or None if it is whole."""

    def __init__(self, module: Any, sharing: Sharing, layout: int | None, channels: int, output_size: Any) -> None:
        self.module, self.sharing, self.layout, self.channels = module, sharing, layout, channels
        self.output_size, self.op, self.column = output_size, module.op, sharing.column
        self.rank = module.weight.dim() - 2

    # ---- layouts

    def _redistributed(self, x: Tensor, before: Any, after: Any, grad: Any = None) -> Tensor:
        """Return this rank's part of x, moved in high precision."""
        # run_check would compare the ranks' shapes, a communication at each call.
        moved = DTensor.from_local(x, self.sharing.mesh, [before], run_check=False).redistribute(placements=[after])
        return moved.to_local(grad_placements=[grad or after])

    def _input(self, x: Tensor) -> Tensor:
        """Return x as the layer multiplies it: whole for columns, its channels for rows."""
        place = Replicate() if self.layout is None else Shard(self.layout)
        if self.column:
            # Every rank has the dx of its output channels only: Partial lets backward add them.
            return self._redistributed(x, place, Replicate(), Partial())
        return x if self.layout == self.channels else self._redistributed(x, place, Shard(self.channels))

    def _output(self, y: Tensor, place: Any) -> Tensor:
        """Move y from the layout in which it was made to that of the plan."""
        dim = _dimension(self.sharing.output, y.dim(), self.channels)
        wanted = Replicate() if dim is None else Shard(dim)
        if self.sharing.use_local_output:
            return y if place == wanted else self._redistributed(y, place, wanted)
        return DTensor.from_local(y, self.sharing.mesh, [place], run_check=False).redistribute(placements=[wanted])

    # ---- high precision

    def high_precision(self, x: Tensor) -> Tensor:
        """Run the layer as torch's styles do."""
        module, bias = self.module, self._bias()
        x, w = self._input(x), module.weight.to_local()
        if bias is not None and not self.column and self.sharing.mesh.get_local_rank():
            bias = bias - bias.detach()  # 0, and each rank has the whole db
        if self.rank == 0:
            y = F.linear(x, w, bias)
        elif "transpose" in self.op:
            extra = self._output_padding(x)
            y = getattr(F, self.op)(x, w, bias, module.stride, module.padding, extra, module.groups, module.dilation)
        else:
            kind: Any = next(base for base in type(module).__mro__ if base in NVFP4_CLASSES)
            y = kind._conv_forward(module, x, w, bias)
        return self._output(y, Shard(self.channels) if self.column else Partial())

    def _bias(self) -> Tensor | None:
        return None if self.module.bias is None else self.module.bias.to_local()

    def _output_padding(self, x: Tensor) -> Any:
        return for_output_size(self.module, x, self.output_size).output_padding if "transpose" in self.op else 0

    # ---- NVFP4

    def quantized(self, x: Tensor, recipe: NVFP4BlockScaling, backend: str) -> Tensor:
        """Run the layer with its three GEMMs in NVFP4."""
        module, sharing, device = self.module, self.sharing, x.device.type
        autocast = torch.is_autocast_enabled(device)
        if autocast:
            x = x.to(torch.get_autocast_dtype(device))
        w, bias = module.weight.to_local(), self._bias()
        pads = self.rank and (module.padding_mode != "zeros" or isinstance(module.padding, str))
        cut = self.layout if self.column else None  # where x will be gathered
        why = "its padding is not a number of zeros" if pads and cut is not None and cut > 1 else ""
        if not self.column or why:
            x, cut = self._gathered(x, why), None
        x, args = self._padded(x, w)

        def planned(x: Tensor, cut: int | None) -> tuple[Plan, Link]:
            whole = x.detach().new_empty(()).expand(_whole_shape(x, cut, sharing.ranks))
            sizes = args._replace(output_padding=self._output_padding(whole))
            call = CallShape.of(self.op, whole, Sizes.of(w), bias, sizes)
            plan = self._plan(call, x, w, recipe, backend)
            return plan, self._link(plan, whole, None if cut is None else self._axis(cut))

        # First as if codes of x could travel; only the plan can say if blocks would be cut, and then x is gathered.
        plan, link = planned(x, cut)
        if self.column and cut is not None:
            why = self._unquantized(plan, link)
            if why:
                x = self._gathered(x, why)
                plan, link = planned(x, None)
        if self.column and self.layout is not None and link.axis is None:  # gathered outside, and so is dx summed
            link = Link(True, link.group, link.x, link.y, None, summed=False)
        y = self._run(x, w, bias, plan, link)
        if self.column:
            return self._output(y, Shard(self.channels))
        if not link.summed:
            return self._output(y, Partial())
        return self._output(y, Replicate() if link.axis is None else Shard(self._dim(link.axis)))

    def _gathered(self, x: Tensor, why: str) -> Tensor:
        if why:
            self._warn("the input", why)
        return self._input(x)

    def _warn(self, what: str, why: str) -> None:
        warn_once(
            f"tensor_parallel {self.op} {what} {why}",
            f"nvfp4 {self.op}: {what} of a tensor-parallel layer crosses ranks in high precision: {why}",
        )

    def _padded(self, x: Tensor, w: Tensor) -> tuple[Tensor, ConvArgs]:
        """Return x padded as far as the operator cannot, and the operator's arguments with padding as numbers."""
        x, args = padded(self.module, x)
        if isinstance(args.padding, str):
            pad, numbers = named_padding(CallShape.of(self.op, x, Sizes.of(w), None, args), self.rank)
            x, args = (F.pad(x, pad) if pad else x), args._replace(padding=numbers)
        return x, args._replace(groups=1)

    def _plan(self, call: CallShape, x: Tensor, w: Tensor, recipe: NVFP4BlockScaling, backend: str) -> Plan:
        """Return the plan of the whole call, of which this rank has x and w."""
        if recipe.activation_shift != "none":  # a rank has not all pixels, or not all channels
            raise value_error(
                f"tensor_parallel {self.op}: the input cannot be shifted.",
                got=f"activation_shift={recipe.activation_shift!r}", needs="activation_shift='none'",
                fix="leave the field out of the recipe of tensor-parallel layers",
            )
        needs, fix = "NVFP4, whose codes ranks exchange", "leave block_format out of these layers' recipe"
        check_nvfp4(f"tensor_parallel {self.op}", recipe.block_format, needs, fix)
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = dispatch.compute_dtype(x.dtype, x.device, autocast)
        chosen = dispatch.resolve(backend, x.device, by_layer=True)
        return plan_for(lowered(call).geometry, recipe, chosen, dtype, is_channels_last(x) or is_channels_last(w))

    def _axis(self, dim: int) -> int:
        """Turn a dimension of a tensor into the axis of the array with channels innermost."""
        if self.rank == 0 or dim == 0:
            return dim
        return self.rank + 1 if dim == 1 else dim - 1

    def _dim(self, axis: int) -> int:
        """Turn an axis of the array back into a dimension of the tensor."""
        if self.rank == 0 or axis == 0:
            return axis
        return 1 if axis == self.rank + 1 else axis + 1

    def _link(self, plan: Plan, whole: Tensor, axis: int | None) -> Link:
        """Return where x and y lie; for rows, decide how y is shared out. `axis`: along which a column's x is cut."""
        g, group = plan.geometry, self.sharing.group
        lead = tuple(whole.shape[:-1])
        x, y = (g.x_shape, g.y_shape) if self.rank else ((*lead, whole.shape[-1]), (*lead, g.y_shape[-1]))
        if self.column:
            return Link(True, group, self._cut(x, axis), y, axis)
        dim = _dimension(self.sharing.output, len(y), self.channels)
        axis = None if dim is None else self._axis(dim)
        if axis is None:
            return Link(False, group, x, y, None)
        if y[axis] % self.sharing.ranks:
            why = f"{y[axis]} cannot be cut into {self.sharing.ranks} equal parts"
        else:
            link = Link(False, group, x, self._cut(y, axis), axis)
            why = self._unquantized(plan, link) if torch.is_grad_enabled() else ""
            if not why:
                return link
        if torch.is_grad_enabled():
            self._warn("the gradient of the output", why)
        return Link(False, group, x, y, None, summed=False)

    def _cut(self, shape: Array, axis: int | None) -> Array:
        return tuple(size // self.sharing.ranks if i == axis else size for i, size in enumerate(shape))

    def _unquantized(self, plan: Plan, link: Link) -> str:
        """Return why the exchanged operand cannot be gathered as codes, or ""."""
        if set(plan.gemms) != GEMMS or plan.recipe.backward_override is not None:
            return "the recipe has GEMMs in high precision"
        need_dw = torch.is_grad_enabled() and self.module.weight.requires_grad
        return broken_blocks(plan, link, need_dw)

    def _run(self, x: Tensor, w: Tensor, bias: Tensor | None, plan: Plan, link: Link) -> Tensor:
        group = state.reduction_group()
        delayed_scaling.refuse(plan.recipe, link.group)
        scales = self._scales(x, bias, plan, link, group)
        told = observe.Call(self.op, self.module.weight, x, plan.geometry, plan.recipe, "")
        # As in layer/execute.py: a Function's needs_input_grad does not know grad mode.
        if not torch.is_grad_enabled():
            x, w, bias = x.detach(), w.detach(), None if bias is None else bias.detach()
        options = CallOptions(scales=scales, ranks=Exchange(plan, link))
        shortfall.ran(plan.geometry)
        return observe.reported(told, QuantizedConv.apply, x, w, bias, plan, options)

    def _scales(self, x: Tensor, bias: Tensor | None, plan: Plan, link: Link, group: Any) -> SharedScales:
        part = part_plan(plan, link)
        if not plan.delayed:
            inner = delayed_scaling.of_call(x, self.module.weight, bias, part, group)
            # Without a group of the context, the ranks of this layer still share amaxes.
            inner = inner or shared_amax.CallScales(part, None, True)
            return SharedScales(inner, link, group is not None)
        if group is not None:
            raise value_error(
                f"nvfp4 {self.op}: delayed scales of a tensor-parallel layer are shared by its own ranks.",
                got="amax_reduction_group and tensor_scale='delayed'",
                needs="one group",
                fix="leave amax_reduction_group out, or use tensor_scale='current'",
            )
        found = delayed_scaling.of_call(x, self.module.weight, bias, part, link.group)
        assert found is not None
        return SharedScales(found, link, True)
