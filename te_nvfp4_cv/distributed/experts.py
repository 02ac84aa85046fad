"""Expert parallelism: send each token to the rank that has its expert, as NVFP4 codes.

    dispatch    x [T, C], sorted by rank -> the rows that the ranks sent to this one; their gradients travel back
    combine     the reverse, for the experts' results: in high precision

A row travels as packed codes and block scales, 4.5 bits a value, under the amax of all ranks' tokens. The codes are
those of quantizing after an exchange in high precision, bit for bit, so fprop of a grouped linear layer is the same
(with amaxes shared by the group, as the tensor scale is). wgrad quantizes the rows again along the tokens: it sees the
values of the codes. Gradients of the rows travel as codes too, rounded as the recipe rounds dy, as dgrad would do
with them in the layer before; those of combine in high precision. One exchange of sizes, one of rows each way.
If one rank's rows need a gradient, all ranks take part in backward. A second differentiation raises.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend import dispatch as backends
from te_nvfp4_cv.distributed.collectives import check_group, gather_ints
from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.formats import BLOCK, round_up
from te_nvfp4_cv.layer.check import DTYPES, checked_recipe
from te_nvfp4_cv.ops.quantize import amax as amaxes
from te_nvfp4_cv.ops.quantize import operand, rounding_seeds
from te_nvfp4_cv.ops.records import PACKED, Fold, OperandSpec
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.fields import Role


def dispatch(x: Tensor, sizes: list[int] | Tensor, group: Any = None, recipe: Any = None) -> tuple[Tensor, list[int]]:
    """Send rows to the ranks of a group as NVFP4 codes, and return the rows that have come.

    Args:
        x: [T, C] bf16, fp16 or fp32, its rows sorted by the rank that they go to.
        sizes: how many rows go to each rank; their sum is T.
        group: the ranks, a process group; None is the default group.
        recipe: the one of the experts' layers.
    Returns:
        The received rows [R, C] in x's dtype, by the rank that sent them: the values of the codes. And how many came
        from each rank: what `combine` takes to send results back.
    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: sizes that do not fit; rows of another dtype or length than those of other ranks; a recipe that
            quantizes x otherwise (4over6, other block formats).

    A rank that gets no rows calls its experts with none, or the others wait for its gradient in backward.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> store = torch.distributed.HashStore()
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> rows, received = nv.distributed.dispatch(torch.randn(40, 64), [40])
        >>> y = nv.functional.grouped_linear(rows, torch.randn(2, 32, 64), torch.tensor([15, 40]))
        >>> nv.distributed.combine(y, received).shape
        torch.Size([40, 32])
        >>> torch.distributed.destroy_process_group()
    """
    group, ranks = check_group(group, "dispatch")
    chosen = checked_recipe(recipe)
    s = chosen.settings(Role.INPUT)
    if s.four_over_six is not None or s.row_scaled or chosen.block_format != "nvfp4":
        raise value_error(
            "nvfp4 dispatch: rows do not travel in this recipe's form.",
            got=repr(chosen),
            needs="NVFP4 with one tensor scale of x, without 4over6 of activations",
            fix="use a recipe without these for the experts",
        )
    x, given, received = _agreed(sizes, x, ranks, group)
    rows: Tensor = _Exchange.apply(x, given, received, group, chosen)
    return rows, received


def combine(y: Tensor, sizes: list[int] | Tensor, group: Any = None) -> Tensor:
    """Send the experts' results back in high precision: the reverse of dispatch.

    Args:
        y: [R, O], by the rank that the rows go to: in the order in which dispatch gave the experts' inputs.
        sizes: how many rows go to each rank: what dispatch returned.
        group: as for dispatch.
    Returns:
        [T, O] in y's dtype, in the order in which dispatch was given the rows.
    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: sizes that do not fit; rows of another dtype or length than other ranks have.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> y = nv.distributed.combine(rows, received)  # doctest: +SKIP
    """
    group, ranks = check_group(group, "combine")
    y, given, received = _agreed(sizes, y, ranks, group)
    rows: Tensor = _Exchange.apply(y, given, received, group, None)
    return rows


class _Exchange(torch.autograd.Function):
    """Exchange rows, as codes where there is a recipe; gradients go back the same way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: list[int], received: list[int], group: Any, recipe: NVFP4BlockScaling | None
    ) -> Tensor:
        ctx.sizes, ctx.received, ctx.group, ctx.recipe = sizes, received, group, recipe
        return _exchange(x.detach(), sizes, received, group, recipe, Role.INPUT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx = _exchange(dy, ctx.received, ctx.sizes, ctx.group, ctx.recipe, Role.GRAD_OUTPUT)
        return dx, None, None, None, None


def _exchange(
    x: Tensor, sizes: list[int], received: list[int], group: Any, recipe: NVFP4BlockScaling | None, role: Role
) -> Tensor:
    """Send x's rows, and return those that come."""
    if recipe is None:
        return _all_to_all(x.contiguous(), sizes, received, group)
    s, channels, x = recipe.settings(role), x.shape[1], x.contiguous()
    # Rows are quantized alone: without RHT, which is for columns.
    spec = OperandSpec(1, Fold(1, 0, 1, 0, round_up(x.shape[0], BLOCK)), PACKED, stochastic=s.stochastic_rounding)
    backend = backends.resolve("auto", x.device)
    amax = amaxes.reduce_amax(operand.measure_operand(x, spec, backend)[:1].contiguous(), group)
    used = formats.power_of_two_amax(amax) if s.pow2 else amax
    seed = rounding_seeds.draw_seed(x) if spec.stochastic else None
    # With an amax of zero there is nothing but zeros to send, and a given amax must be positive.
    given = torch.where(used == 0, torch.ones_like(used), used).repeat(2)
    row = operand.quantize_operand(x, spec, torch.float32, seed, given, backend).row
    message = torch.cat((row.data, row.scale), 1)  # [T, 8 Kb + Kb]: one collective
    came = _all_to_all(message, sizes, received, group)
    blocks = row.scale.shape[1]
    data, scale = came[:, : blocks * 8].contiguous(), came[:, blocks * 8 :].contiguous()
    values = formats.dequantize(data, scale.view(torch.float8_e4m3fn), used, s.e4m3_max)
    return values[:, :channels].to(x.dtype)


def _all_to_all(x: Tensor, sizes: list[int], received: list[int], group: Any) -> Tensor:
    """Exchange rows of a tensor; gloo knows no all-to-all of parts, so every rank sends to each of the others there."""
    out = x.new_empty(sum(received), *x.shape[1:])
    rank = dist.get_rank(group)
    if dist.get_backend(group) == "gloo":
        mine, theirs = list(x.split(sizes)), list(out.split(received))
        theirs[rank].copy_(mine[rank])
        work: list[Any] = []
        for other, (sent, came) in enumerate(zip(mine, theirs, strict=True)):
            peer = dist.get_global_rank(group, other)
            if other != rank and sent.numel():
                work.append(dist.isend(sent, peer, group))
            if other != rank and came.numel():
                work.append(dist.irecv(came, peer, group))
        for one in work:
            one.wait()
    else:
        dist.all_to_all_single(out, x, received, sizes, group=group)
    for told in amaxes.on_received:
        told((sum(received) - received[rank]) * math.prod(x.shape[1:]) * x.element_size())
    return out


def _agreed(sizes: list[int] | Tensor, x: Tensor, ranks: int, group: Any) -> tuple[Tensor, list[int], list[int]]:
    """Return x, how many rows go to each rank, and how many come from each.

    A rank whose arguments do not fit tells the others before it raises, or they would wait for its rows. x needs a
    gradient if that of any rank does: in backward all ranks must be there.

    Raises:
        ValueError: on every rank, if one rank's sizes do not fit its rows, or rows that travel differ in kind.
    """
    given = [int(n) for n in (sizes.tolist() if isinstance(sizes, Tensor) else sizes)]
    fits = x.dim() == 2 and x.dtype in DTYPES and len(given) == ranks and min(given) >= 0 and sum(given) == x.shape[0]
    trains = x.requires_grad and torch.is_grad_enabled()
    mine = [*given, x.shape[1], list(DTYPES).index(x.dtype), trains, 1] if fits else [0] * (ranks + 4)
    told = gather_ints(mine, torch.empty(0, device=x.device), group)
    if not all(row[-1] for row in told):
        bad = [rank for rank, row in enumerate(told) if not row[-1]]
        raise value_error(
            "nvfp4: rows and sizes do not fit.",
            got=f"x {describe(x)}, sizes {given}" if not fits else f"other arguments on rank {bad[0]}",
            needs=f"x [T, C] in bf16, fp16 or fp32, and {ranks} sizes (one for each rank) that sum to T",
            fix="torch.bincount(rank_of_row, minlength=ranks), with the rows sorted by rank",
        )
    # Of ranks that send or get rows: another one may have none of any kind.
    kinds = {
        rank: f"[T, {row[ranks]}] {str(list(DTYPES)[row[ranks + 1]]).removeprefix('torch.')}"
        for rank, row in enumerate(told)
        if any(row[:ranks]) or any(other[rank] for other in told)
    }
    if len(set(kinds.values())) > 1:
        raise value_error(
            "nvfp4: the ranks' rows are of different kinds.",
            got="; ".join(f"{kind} on rank {rank}" for rank, kind in kinds.items()),
            needs="rows of one length and dtype on all ranks",
            fix="x.to(dtype) on every rank, on one that has no rows, too",
        )
    if not x.requires_grad and any(row[-2] for row in told) and torch.is_grad_enabled():
        x = x.detach().requires_grad_()
    return x, given, [row[dist.get_rank(group)] for row in told]
