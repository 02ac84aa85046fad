"""Exchange the parts of a tensor-parallel layer: codes of x and dy, amaxes, sums of results.

    column   x whole, or gathered as codes -> multiply -> y by channels    backward: dx of the ranks summed
    row      x by channels -> multiply -> y of the ranks summed            backward: dy whole, or gathered as codes

Each operand is quantized once, where it lies, with the amaxes of all ranks. The rowwise face travels for fprop or
dgrad; the columnwise one, 16 images at a pixel, when wgrad needs it, since backward saves only the part that lies here.
Weights are quantized with the amax of all ranks. So operands have the codes and scales of the unsharded layer, where
cuts lie between blocks of 16 (`broken_blocks` says where they do not); sums of ranks differ by their rounding.

With stochastic rounding, ranks that hold the same dy draw the same seed, and those that hold parts of one draw
different ones. The layer's sequence is forward_backward.py's; how layers are cut is tensor_parallel.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from te_nvfp4_cv.distributed.collectives import PendingParts, gather_parts
from te_nvfp4_cv.distributed.part_plan import PartPlan
from te_nvfp4_cv.formats import BLOCK, round_up
from te_nvfp4_cv.layer.delayed_scaling import CallScales
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.quantize.amax import reduce_amax
from te_nvfp4_cv.ops.quantize.operand import unpack_columns, unpack_rows
from te_nvfp4_cv.ops.records import DEQUANTIZED, Face, Fold, Operand, OperandSpec
from te_nvfp4_cv.recipe.fields import Role

GEMMS = {"fprop", "dgrad", "wgrad"}
Array = tuple[int, ...]  # a shape: [B, *image, channels], or [*leading, channels] of a linear layer


@dataclass(frozen=True)
class Link:
    """Says how one call's tensors lie over the ranks.

    `x` and `y` are the shapes of this rank's parts. The exchanged tensor (x of a column, y of a row) is cut along
    `axis`, or whole on every rank (None). Without `summed`, the caller adds the ranks' parts of its counterpart.
    """

    column: bool
    group: Any
    x: Array
    y: Array
    axis: int | None
    summed: bool = True

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def exchanged(self) -> Array:
        return self.x if self.column else self.y

    def gathers(self, role: Role) -> bool:
        """Return True if the ranks exchange their parts of x (INPUT) or dy (GRAD_OUTPUT)."""
        return self.axis is not None and self.column == (role == Role.INPUT)

    def differs(self, role: Role) -> bool:
        """Return True if the ranks hold different parts of x (INPUT) or dy (GRAD_OUTPUT)."""
        return self.gathers(role) or self.column != (role == Role.INPUT)


def part_plan(plan: Plan, link: Link) -> PartPlan:
    """Return the plan by which a rank quantizes its part of the exchanged operand."""
    x, dy = plan.folds
    if link.axis is not None:
        fold = _fold_here(plan.geometry.rank, link.exchanged, link.axis, x if link.column else dy)
        x, dy = (fold, dy) if link.column else (x, fold)
    return PartPlan.of(plan, (x, dy))


def _fold_here(rank: int, shape: Array, axis: int, fold: Fold) -> Fold:
    """Return the fold of a part's columnwise face."""
    if rank == 0:
        return Fold(1, 0, 1, 0, round_up(math.prod(shape[:-1]), BLOCK))
    return Fold(1, 0, shape[1], 0, round_up(shape[0], BLOCK)) if axis < 2 else fold


def broken_blocks(plan: Plan, link: Link, columnwise: bool) -> str:
    """Return why blocks of the exchanged operand lie across ranks, or "". `columnwise`: that face is needed, too."""
    shape, axis, rank = link.exchanged, link.axis, plan.geometry.rank
    assert axis is not None
    if axis == len(shape) - 1:
        return f"{shape[-1]} channels per rank are not a multiple of 16" if shape[-1] % BLOCK else ""
    if not columnwise:
        return ""
    if rank == 0:
        rows = math.prod(shape[axis:-1])
        return f"{rows} consecutive rows per rank are not a multiple of 16" if rows % BLOCK else ""
    if axis == 0:
        return f"{shape[0]} images per rank are not a multiple of 16" if shape[0] % BLOCK else ""
    if axis == 1 and plan.folds[0 if link.column else 1].strips > 1:
        return f"a batch of {shape[0]} images is cut into strips along the axis that is shared out"
    return ""


# ---- amaxes ---------------------------------------------------------------------------------------------------------


class SharedScales:
    """Gives the amaxes of x and dy for one call: those of all ranks for what lies in parts on them."""

    def __init__(self, inner: CallScales, link: Link, always: bool) -> None:
        self.inner, self.link, self.always, self.group = inner, link, always, link.group
        # What is known, remembered and moved does not depend on the ranks.
        self.knows, self.collector, self.backward_ran = inner.knows, inner.collector, inner.backward_ran
        self.take_move = inner.take_move

    def amax(self, role: Role, operand: Tensor) -> Tensor | None:
        """Return fp32 [2], the largest over the ranks, in evaluation too, in which all of them take part.

        An operand that every rank holds whole has its own amaxes, found in the pass that quantizes it: None.
        """
        in_parts = self.link.differs(role)
        if not self.always and not in_parts:
            return None
        known = self.inner.knows(role)
        amax = self.inner.amax(role, operand)
        # The clone: this may be the tensor of a layer's state, and the reduction writes in place.
        return amax if known or not in_parts else reduce_amax(amax.clone(), self.link.group)


# ---- what travels ---------------------------------------------------------------------------------------------------


def gather_rows(data: Tensor, scale: Tensor, link: Link) -> PendingParts:
    """Begin to gather a packed rowwise face: [*shape without channels, bytes] and its scales."""
    assert link.axis is not None
    lead = link.exchanged[:-1]
    parts = [(face.view(*lead, -1), link.axis) for face in (data, scale)]
    return gather_parts(parts, link.group, async_op=True)


def gather_columns(data: Tensor, scale: Tensor, link: Link) -> PendingParts:
    """Begin to gather a packed columnwise face: [N16, *image, C, 8] and its scales [N16, *image, C]."""
    shape, axis = link.exchanged, link.axis
    assert axis is not None
    if len(data.shape) == 3 and axis < len(shape) - 1:  # a linear layer: blocks of 16 rows of the flattened axes
        before = math.prod(shape[:axis])
        data, scale = (face.view(before, face.shape[0] // before, *face.shape[1:]) for face in (data, scale))
        axis = 1
    elif axis == len(shape) - 1:
        axis = scale.dim() - 1
    return gather_parts([(data, axis), (scale, axis)], link.group, async_op=True)


def _arrived(pending: PendingParts, geometry: ConvGeometry) -> Face:
    """Return a whole operand's face; the leading axes of a linear layer are flattened."""
    data, scale = pending.wait()
    more = scale.dim() - geometry.rank - 2
    return Face(data.flatten(0, more), scale.flatten(0, more))


def sum_parts(part: Tensor, link: Link) -> Tensor:
    """Return the sum of the ranks' parts of an array: all of it on each rank, or each rank's share along the axis."""
    if not link.summed:
        return part
    part = part.contiguous()
    if link.axis is None:
        dist.all_reduce(part, group=link.group)
        return part
    here, axis = link.exchanged, link.axis
    whole = (*here[:axis], link.ranks, *here[axis:])
    # [..., ranks * n, ...] -> [ranks, ..., n, ...]: reduce_scatter gives one row of it to each rank.
    by_rank = part.view(whole).movedim(axis, 0).contiguous()
    share = part.new_empty(here)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its name from torch 2.13 on
    scatter(share.view(-1), by_rank.view(-1), group=link.group)
    return share.flatten(0, -2) if part.dim() == 2 else share


# ---- one call -------------------------------------------------------------------------------------------------------


class Exchange:
    """Exchanges operands and results in one call of a tensor-parallel layer; see layer/options.py, Ranks."""

    def __init__(self, plan: Plan, link: Link) -> None:
        part, rank = part_plan(plan, link), plan.geometry.rank
        self.plan, self.link = plan, link
        self.x_shape, self.y_shape, self.y_torch_shape = _flat(link.x, rank), _flat(link.y, rank), link.y
        self.input_plan = part if link.gathers(Role.INPUT) else plan
        self.gradient_plan = part if link.gathers(Role.GRAD_OUTPUT) else plan
        self.fprop_plan = self.dgrad_plan = self.wgrad_plan = plan
        self.adds_bias = link.column or link.rank == 0
        self.wgrad_first = False

    def begin(self, role: Role, operand: Tensor, spec: OperandSpec, amax: Tensor | None) -> None:
        """Do nothing: what is exchanged are whole parts."""

    def _gathered(
        self,
        role: Role,
        face: Face,
        gather: Callable[[Tensor, Tensor, Link], PendingParts],
        unpack: Callable[[Face], Tensor],
    ) -> Callable[[], Face]:
        """Begin to gather a face, and return what waits for it; dy's is unpacked where values are multiplied."""
        if not self.link.gathers(role):
            return lambda: face
        pending = gather(*face, self.link)

        def arrived() -> Face:
            whole = _arrived(pending, self.plan.geometry)
            if role == Role.INPUT or self.plan.operand_form != DEQUANTIZED:
                return whole
            return Face(unpack(whole), whole.scale.new_empty(0))

        return arrived

    def gather_rows(self, role: Role, face: Face) -> Callable[[], Face]:
        """Begin to gather a rowwise face; x's stays packed, which fprop unpacks."""
        channels = self.plan.geometry.y_shape[-1]
        how = self.plan.compute_dtype, self.plan.backend
        return self._gathered(role, face, gather_rows, lambda whole: unpack_rows(whole, channels, 1, *how))

    def gather_columns(self, role: Role, face: Face) -> Callable[[], Face]:
        """Begin to gather a columnwise face; x's stays packed, which wgrad unpacks."""
        how = self.plan.compute_dtype, self.plan.backend
        return self._gathered(role, face, gather_columns, lambda whole: unpack_columns(whole, *how))

    def with_columns(self, role: Role, operand: Tensor, made: Operand, needed: bool) -> Operand:
        """Return `made`: both faces are made at once."""
        return made

    def weight_amax(self, w: Tensor) -> Tensor:
        """Return fp32 [1]: the amax of all parts of the weight."""
        return reduce_amax(w.detach().abs().amax().float().reshape(1), self.link.group)

    def seed(self, seed: Tensor) -> Tensor:
        """Return another seed on each rank for parts of one dy, the same one for equal dy."""
        if not self.link.differs(Role.GRAD_OUTPUT):
            return seed
        # An odd constant with many bits keeps the ranks' seeds far apart; the mask keeps them positive in int64.
        return seed.bitwise_xor(self.link.rank * 0x2545F4914F6CDD1D & (1 << 62) - 1)

    def sum_output(self, y: Tensor) -> Tensor:
        """Add the ranks' y of a row; a column's lies by channels."""
        return y if self.link.column else sum_parts(y, self.link)

    def sum_input_gradient(self, dx: Tensor) -> Tensor:
        """Add the ranks' dx of a column; a row's lies by channels."""
        return sum_parts(dx, self.link) if self.link.column else dx

    def whole_bias_gradient(self, total: Tensor) -> Tensor:
        """Return db, fp32, of all of dy from that of this rank's part of it."""
        link = self.link
        if not link.gathers(Role.GRAD_OUTPUT):
            return total
        # dy is cut by channels, so each rank has some entries of db, complete; otherwise all entries, in part.
        if link.axis == len(link.y) - 1:
            return gather_parts([(total, 0)], link.group).wait()[0]
        dist.all_reduce(total, group=link.group)
        return total


def _flat(shape: Array, rank: int) -> Array:
    """Return the array's shape as operators take it: the leading axes of a linear layer are one."""
    return shape if rank else (math.prod(shape[:-1]), shape[-1])
