"""Images cut into rows: functions as users call them, value and gradient against torch on the whole image."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.launch import Ranks, ranks_test
from tests.distributed.test_spatial import SP, mesh_of
from tests.helpers import values

Pair = namedtuple("Pair", "first second")


def against_torch(ranks: Ranks, function: Callable[[Tensor], Tensor], x: Tensor, dim: int = 2, **close: Any) -> None:
    """Compare a function's value and gradient on the whole image and on rows."""
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    expected = function(leaves[0])
    found = SP.whole(function(SP.shard(leaves[1], mesh_of(ranks), dim)))
    assert found.dtype == expected.dtype and found.requires_grad == expected.requires_grad
    torch.testing.assert_close(found, expected, **close)
    if expected.requires_grad:
        weight = values(tuple(expected.shape), seed=7).to(expected.dtype)
        (expected * weight).sum().backward()
        (found * weight).sum().backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, **close)


def on_ranks_arguments_by_position_and_by_other_names(ranks: Ranks) -> None:
    two, one, zero = (torch.full((4,), float(n)) for n in (2, 1, 0))
    for function in (
        lambda x: x.amax(1, True),
        lambda x: x.max(1, True)[0],
        lambda x: x.argmax(1, True),
        lambda x: torch.logsumexp(x, 1, True),
        lambda x: x.std(1, False, True),
        lambda x: x.prod(1, True),
        lambda x: x.median(1, True)[0],
        lambda x: x.amax(axis=1),
        lambda x: x.mean(axis=1),
        lambda x: x.mean(axis=(2, 3), keepdims=True),
        lambda x: x.sum(()),
        # Weight and bias before the statistics: another order than torch.nn.functional's.
        lambda x: torch.batch_norm(x, two, one, zero, two, False, 0.1, 1e-5, False),
        lambda x: F.interpolate(x, scale_factor=(2.1, 1.0)),
    ):
        against_torch(ranks, function, values((2, 4, 6, 5), seed=1))
    against_torch(ranks, lambda x: F.prelu(x, two), values((2, 4, 6), seed=1))


def on_ranks_extremes_have_gradients(ranks: Ranks) -> None:
    x = values((2, 4, 6, 5), seed=1)
    x[0, 0, 0, 0] = x[1, 2, 5, 3] = 9.0  # equal ones on the first and the last rank share it
    for extreme in (torch.amax, torch.amin, torch.max, torch.min):
        against_torch(ranks, lambda x, extreme=extreme: x * extreme(x), x)


def on_ranks_half_precision_sums_stay_in_range(ranks: Ranks) -> None:
    x = (torch.rand(2, 4, 64, 16, generator=torch.Generator().manual_seed(1)) + 1000).half()
    y = torch.zeros_like(x)
    functions = [
        lambda x: x.mean(),
        lambda x: x.mean((2, 3)),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.avg_pool2d(x * 40, 3, 2, 1),
        lambda x: F.avg_pool2d(x * 40, 3, 2, 1, count_include_pad=False),
        lambda x: F.l1_loss(x, y),
        lambda x: F.cross_entropy(x, y[:, 0].long()),
    ]
    for function in functions:
        against_torch(ranks, function, x, rtol=4e-3, atol=2e-2)


def on_ranks_integers_are_counted_exactly(ranks: Ranks) -> None:
    mesh = mesh_of(ranks)
    count = torch.full((1, 1, 1, 1), 2**24 + 1 if ranks.rank == 0 else 1)
    assert SP.from_piece(count, mesh, ranks.world).sum() == 2**24 + ranks.world


def on_ranks_losses_of_other_forms(ranks: Ranks) -> None:
    for function in (
        lambda x: F.mse_loss(x, (x * 2).detach(), weight=x.abs()),
        lambda x: F.huber_loss(x, (x * 2).detach(), weight=x.abs()),
        lambda x: F.smooth_l1_loss(x[:, :1], x.detach()),
    ):
        against_torch(ranks, function, values((2, 4, 6, 5), seed=1))
    x = SP.shard(values((2, 4, 6, 5), seed=1), mesh_of(ranks))
    for wrong in (lambda: F.mse_loss(x, x, size_average=False), lambda: F.mse_loss(x, x, False)):
        with pytest.raises(ValueError, match="mse_loss with this reduction"):
            wrong()


def on_ranks_layers_write_into_crops(ranks: Ranks) -> None:
    for rows in (2, 4):  # which the ranks have, or fetch, or both
        for write in (torch.relu_, lambda x: F.silu(x, inplace=True)):
            cropped = lambda x, rows=rows, write=write: write(x.mul(1)[:, :, :rows])  # noqa: E731
            against_torch(ranks, cropped, values((2, 4, 6, 5), seed=1))


def on_ranks_refusals_before_values_are_wrong(ranks: Ranks) -> None:
    x = values((2, 4, 6, 5), seed=1)
    cut, wide, buffer = SP.shard(x, mesh_of(ranks)), SP.shard(x, mesh_of(ranks), 3), torch.zeros_like(x)
    for wrong, text in (
        (lambda: torch.roll(cut, 1), "roll of the rows"),
        (lambda: torch.where(cut > 0), r"where\(condition\)"),
        (lambda: buffer.copy_(cut), "copy_ that writes into a whole tensor"),
        (lambda: buffer.add_(cut), "add_ that writes into a whole tensor"),
        (lambda: torch.mul(cut, 2, out=buffer), "mul that writes into a whole tensor"),
        (lambda: F.pad(cut, (0, 0, 6, 0), "reflect"), "pad.mode='reflect'. by 6 rows"),
        (lambda: F.pad(cut, (0, 0, 0, 7), "circular"), "pad.mode='circular'. by 7 rows"),
        (lambda: F.max_pool2d(cut, (7, 1)), "max_pool2d"),
        (lambda: F.avg_pool2d(cut, (7, 1)), "avg_pool2d"),
        (lambda: F.conv2d(cut, x.new_ones(4, 4, 7, 1)), "conv2d"),
        (lambda: F.pixel_shuffle(wide, 2), "not cut along its height"),
        (lambda: F.pixel_unshuffle(wide, 5), "not cut along its height"),
    ):
        with pytest.raises(ValueError, match=f"{text}.* has no form for an image that is cut"):
            wrong()
    dist.barrier()  # nobody waits for a message
    assert not buffer.any()


def on_ranks_second_derivatives_raise(ranks: Ranks) -> None:
    for function in (
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.avg_pool2d(x**3, 3, 1, 1),
        lambda x: (x**3).mean((2, 3)),
    ):
        x = values((2, 4, 6, 5), seed=1).requires_grad_()
        y = function(SP.shard(x, mesh_of(ranks)))
        (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)  # alone it is right
        with pytest.raises(RuntimeError, match="trying to differentiate twice"):
            dx.square().sum().backward()


class Named(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x * 2, x + 1)


def on_ranks_named_tuples_come_out_whole(ranks: Ranks) -> None:
    x = values((2, 4, 6, 5), seed=1)
    pair = SP.parallelize(Named(), mesh_of(ranks), outputs="whole")(x)
    assert type(pair) is Pair and torch.equal(pair.first, x * 2) and torch.equal(pair.second, x + 1)


test_on_ranks = ranks_test(globals(), four=("layers_write_into_crops",))
