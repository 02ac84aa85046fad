"""A convolution or linear layer whose channels lie on several ranks, as an autograd Function; activations that have to
travel do so as packed codes.

    column   w by out-channels   x gathered    y: its channels    dy: its channels   dx summed          dw local
    row      w by in-channels    x its channels y summed          dy gathered        dx: its channels   dw local

What is gathered in one direction (x, dy) is the exchanged tensor; its counterpart (dx, y) is the sum of all ranks'
parts. It is cut along one axis, or whole on every rank: then nothing is gathered, and sums are all-reduced. A cut one
is quantized once, where it lies, with the amaxes of all ranks; the rowwise face travels for fprop or dgrad, the
columnwise one, 16 images at a pixel, when wgrad needs it: backward keeps only the part that lies here. Weights are
quantized with the amax of all ranks. So operands have the codes and scales of the unsharded layer, where cuts lie
between blocks of 16 (`broken_blocks` says where not); sums of ranks differ by their rounding.
SR: ranks that hold the same dy draw the same seed, those that hold parts of one draw different ones.
The steps are plan.py's; how layers are cut is tensor_parallel.py's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from te_nvfp4_cv.distributed.collectives import PendingParts, gather_parts
from te_nvfp4_cv.formats import round_up
from te_nvfp4_cv.layer import gemms, saved
from te_nvfp4_cv.layer import operands as faces
from te_nvfp4_cv.layer.autograd import _NoSecondOrder
from te_nvfp4_cv.layer.delayed_scaling import CallScales
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.layer.saved import Like
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.geometry import BLOCK, ConvGeometry, Fold
from te_nvfp4_cv.ops.quantize import amax as amaxes
from te_nvfp4_cv.ops.quantize import operand as operands
from te_nvfp4_cv.ops.quantize import rounding_seeds
from te_nvfp4_cv.ops.quantize.operand import DEQUANTIZED, NONE, PACKED

GEMMS = {"fprop", "dgrad", "wgrad"}
Array = tuple[int, ...]  # a shape: [B, *image, channels], or [*leading, channels] of a linear layer


@dataclass(frozen=True)
class Link:
    """How one call's tensors lie over the ranks.

    `x` and `y` are what this rank holds of them. `axis`: along which the exchanged one (x of a column, y of a row) is
    cut; None: it is whole. `summed` False: the caller adds the ranks' parts of its counterpart.
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

    @property
    def gathers_x(self) -> bool:
        return self.column and self.axis is not None

    @property
    def gathers_dy(self) -> bool:
        return not self.column and self.axis is not None

    @property
    def parts(self) -> tuple[bool, bool]:
        """Whether x and dy differ from rank to rank."""
        return (not self.column or self.gathers_x), (self.column or self.gathers_dy)


@dataclass(frozen=True)
class PartPlan(Plan):
    """The plan by which a rank quantizes what it holds of x and dy: `here` are the folds of these; a part of what is
    gathered is packed.
    """

    here: tuple[Fold, Fold]

    @property
    def folds(self) -> tuple[Fold, Fold]:
        return self.here

    @property
    def operand_form(self) -> int:
        return PACKED


def part_plan(plan: Plan, link: Link) -> PartPlan:
    """The PartPlan of a call."""
    x, dy = plan.folds
    if link.axis is not None:
        fold = _fold_here(plan.geometry.rank, link.exchanged, link.axis, x if link.column else dy)
        x, dy = (fold, dy) if link.column else (x, fold)
    return PartPlan(**vars(plan), here=(x, dy))


def _fold_here(rank: int, shape: Array, axis: int, fold: Fold) -> Fold:
    """How the columnwise face of a part is laid out."""
    if rank == 0:
        return Fold(1, 0, 1, 0, round_up(math.prod(shape[:-1]), BLOCK))
    return Fold(1, 0, shape[1], 0, round_up(shape[0], BLOCK)) if axis < 2 else fold


def broken_blocks(plan: Plan, link: Link, columnwise: bool) -> str:
    """Why the blocks of the exchanged operand do not lie on one rank each, or "". `columnwise`: that face is needed."""
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
    """The amaxes of x and dy for one call: those of all ranks for what lies in parts on them."""

    def __init__(self, inner: CallScales, link: Link, always: bool) -> None:
        self.inner, self.link, self.always = inner, link, always

    def of(self, role: int) -> SharedScales | None:
        """For one operand; None: its own amaxes, found in the pass that quantizes it."""
        return self if self.always or self.link.parts[role] else None

    def amax(self, role: int, operand: Tensor) -> Tensor:
        """fp32 [2], the largest over the ranks; evaluation too, in which all of them take part."""
        known = self.inner.knows(role)
        amax = self.inner.amax(role, operand)
        return amax if known or not self.link.parts[role] else amaxes.reduce_amax(amax.clone(), self.link.group)

    def collect(self, role: int, observed: Tensor) -> None:
        """What that call observed."""
        self.inner.collect(role, observed)


def quantize_weight(w: Tensor, plan: Plan, keep: bool, group: Any) -> tuple[Tensor, ...]:
    """faces.quantize_weight of this rank's part, with the amax of all parts."""
    amax = amaxes.reduce_amax(w.detach().abs().amax().float().reshape(1), group)
    return faces.quantize_weight(w, plan, keep, amax)


def _quantize_gradient(
    dy: Tensor, plan: Plan, need_dx: bool, need_dw: bool, scales: SharedScales | None, link: Link
) -> tuple[Tensor, ...]:
    """faces.quantize_gradient; parts of one dy are rounded by different random numbers, equal ones by the same."""
    s = plan.recipe.settings("grad_output")
    row = plan.operand_form if "dgrad" in plan.gemms and need_dx else NONE
    col = plan.operand_form if "wgrad" in plan.gemms and need_dw else NONE
    if row == NONE and col == NONE:
        return ()
    seed = rounding_seeds.draw_seed(dy) if s.stochastic_rounding else None
    if seed is not None and link.parts[1]:
        seed = seed.bitwise_xor(link.rank * 0x2545F4914F6CDD1D & (1 << 62) - 1)
    amax = None if scales is None else scales.amax(1, dy)
    fold, dtype, sr = plan.folds[1].to_ints(), plan.compute_dtype, s.stochastic_rounding
    quantized = operands.quantize_operand(
        dy, 1, fold, row, col, s.rht, sr, "", s.e4m3_max, False, dtype, seed, amax, plan.backend
    )
    if scales is not None:
        scales.collect(1, quantized[6])
    return quantized


# ---- what travels ---------------------------------------------------------------------------------------------------


def gather_rows(data: Tensor, scale: Tensor, link: Link) -> PendingParts:
    """Start to gather a packed rowwise face: [*shape without channels, bytes] and its scales."""
    assert link.axis is not None
    lead = link.exchanged[:-1]
    parts = [(face.view(*lead, -1), link.axis) for face in (data, scale)]
    return gather_parts(parts, link.group, async_op=True)


def gather_columns(data: Tensor, scale: Tensor, link: Link) -> PendingParts:
    """Start to gather a packed columnwise face: [N16, *image, C, 8] and its scales [N16, *image, C]."""
    shape, axis = link.exchanged, link.axis
    assert axis is not None
    if len(data.shape) == 3 and axis < len(shape) - 1:  # a linear layer: blocks of 16 rows of the flattened axes
        before = math.prod(shape[:axis])
        data, scale = (face.view(before, face.shape[0] // before, *face.shape[1:]) for face in (data, scale))
        axis = 1
    elif axis == len(shape) - 1:
        axis = scale.dim() - 1
    return gather_parts([(data, axis), (scale, axis)], link.group, async_op=True)


def _arrived(pending: PendingParts, geometry: ConvGeometry) -> tuple[Tensor, Tensor]:
    """(data, scale) of a whole operand; the leading axes of a linear layer flattened."""
    data, scale = pending.wait()
    more = scale.dim() - geometry.rank - 2
    return data.flatten(0, more), scale.flatten(0, more)


def sum_parts(part: Tensor, link: Link) -> Tensor:
    """The sum of the ranks' parts of an array: whole on each, or each rank its share along the axis."""
    if not link.summed:
        return part
    part = part.contiguous()
    if link.axis is None:
        dist.all_reduce(part, group=link.group)
        return part
    here, axis = link.exchanged, link.axis
    whole = (*here[:axis], link.ranks, *here[axis:])
    by_rank = part.view(whole).movedim(axis, 0).contiguous()
    share = part.new_empty(here)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its name from torch 2.13 on
    scatter(share.view(-1), by_rank.view(-1), group=link.group)
    return share.flatten(0, -2) if part.dim() == 2 else share


# ---- the Function ---------------------------------------------------------------------------------------------------


class TensorParallelConv(torch.autograd.Function):
    """x, w, bias -> y of one rank, for one Plan (whole images, this rank's channels) and Link. `bias` of a row is whole
    on every rank; the first one adds it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, plan: Plan, link: Link, scales: SharedScales
    ) -> Tensor:
        need_dx, need_dw = ctx.needs_input_grad[:2]
        g, part = plan.geometry, part_plan(plan, link)
        with torch.autocast(x.device.type, enabled=False):
            x_last = layouts.image_last(x, _flat(link.x, g.rank))
            x_q = faces.quantize_input(x_last, part if link.gathers_x else plan, need_dw, scales.of(0))
            rows = gather_rows(x_q[0], x_q[1], link) if link.gathers_x else None
            for_dgrad = need_dx and ("dgrad" in plan.gemms or plan.recipe.backward_override == "dequantized")
            w_q = quantize_weight(w, plan, need_dx, link.group) if "fprop" in plan.gemms or for_dgrad else None
            x_face = x_q if rows is None else (*_arrived(rows, g), x_q[2])
            x_like = x_last if rows is None else x_last.new_empty(()).expand(g.x_shape)  # fprop reads its shape
            y = gemms.fprop(x_like, x_face, w, w_q, bias if link.column or link.rank == 0 else None, plan)
            y = y if link.column else sum_parts(y, link)
            kept = {**saved.kept_of_x(x, x_q, plan, need_dw), **saved.kept_of_w(w, w_q, plan, need_dx)}
            ctx.kept_names = tuple(kept)
            ctx.save_for_backward(*kept.values())
            ctx.plan, ctx.link, ctx.scales, ctx.like = plan, link, scales, Like.of(x, w, bias)
            return layouts.image_first(y, _flat(link.y, g.rank), link.y, plan.channels_last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = dict(zip(ctx.kept_names, ctx.saved_tensors, strict=True))
        plan, link, scales, like = ctx.plan, ctx.link, ctx.scales, ctx.like
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        g, dx, dw, db = plan.geometry, None, None, None
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            x_columns = gather_columns(kept["x_col"], kept["x_col_scale"], link) if link.gathers_x and need_dw else None
            dy_last = layouts.image_last(dy, _flat(link.y, g.rank))
            part = part_plan(plan, link) if link.gathers_dy else plan
            dy_q = _quantize_gradient(dy_last, part, need_dx, need_dw, scales.of(1), link)
            scales.inner.backward_ran()
            dy_rows = gather_rows(dy_q[0], dy_q[1], link) if link.gathers_dy and need_dx else None
            dy_columns = gather_columns(dy_q[3], dy_q[4], link) if link.gathers_dy and need_dw else None
            if need_dx:
                if dy_rows is not None:
                    dy_q = (*_rows_operand(dy_rows, plan), *dy_q[2:])
                dx = gemms.dgrad(dy_last, dy_q, kept, plan, like.x_dtype)
                dx = sum_parts(dx, link) if link.column else dx
                dx = layouts.image_first(dx, _flat(link.x, g.rank), like.x_shape, like.x_channels_last)
            if need_dw:
                if x_columns is not None:
                    kept["x_col"], kept["x_col_scale"] = _arrived(x_columns, g)
                if dy_columns is not None:
                    dy_q = (*dy_q[:3], *_columns_operand(dy_columns, plan), *dy_q[5:])
                dw = gemms.wgrad(dy_last, dy_q, kept, plan, like.w_dtype)
                dw = layouts.kernel_as(dw, g, like.w_shape, like.w_channels_last)
            if need_db:
                total = dy_last.flatten(0, -2).sum(0, dtype=torch.float32)
                if link.gathers_dy:
                    total = _whole_bias(total, link)
                db = total.to(like.bias_dtype)
        grads: tuple[Tensor | None, ...] = (dx, dw, db)
        if torch.is_grad_enabled():  # create_graph=True: gradients must not look like constants
            leaves = [node.variable for node, _ in ctx.next_functions if hasattr(node, "variable")]
            anchor = torch.zeros((), requires_grad=True)
            grads = tuple(None if g is None else _NoSecondOrder.apply(g, dy, anchor, *leaves) for g in grads)
        return (*grads, None, None, None)


def _flat(shape: Array, rank: int) -> Array:
    """The array's shape as operators take it: leading axes of a linear layer are one."""
    return shape if rank else (math.prod(shape[:-1]), shape[-1])


def _whole_bias(total: Tensor, link: Link) -> Tensor:
    """db of all of dy, fp32, from that of this rank's part of it."""
    if link.axis == len(link.y) - 1:
        return gather_parts([(total, 0)], link.group).wait()[0]
    dist.all_reduce(total, group=link.group)
    return total


def _rows_operand(pending: PendingParts, plan: Plan) -> tuple[Tensor, Tensor]:
    """dy's gathered rowwise face in the form that the backend multiplies."""
    data, scale = _arrived(pending, plan.geometry)
    if plan.operand_form != DEQUANTIZED:
        return data, scale
    channels = plan.geometry.y_shape[-1]
    return operands.unpack_rows(data, scale, channels, 1, plan.compute_dtype, plan.backend), scale.new_empty(0)


def _columns_operand(pending: PendingParts, plan: Plan) -> tuple[Tensor, Tensor]:
    """dy's gathered columnwise face in the form that the backend multiplies."""
    data, scale = _arrived(pending, plan.geometry)
    if plan.operand_form != DEQUANTIZED:
        return data, scale
    return operands.unpack_columns(data, scale, plan.compute_dtype, plan.backend), scale.new_empty(0)
