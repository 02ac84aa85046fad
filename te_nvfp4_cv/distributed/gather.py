"""Join the ranks' shards to one NVFP4Tensor (nv.distributed). Packed codes and scales travel, not values.

    quantize(cat(x_0, ..., x_{n-1})) == all_gather(quantize(x_r)),  bit for bit,  where all used  amax = max_r amax(x_r)
    bytes on the wire of one face: 1/2 + 1/16 per element, 0.28 of bf16; a few hundred bytes of metadata per tensor

    dim        axis of x [..., K]          rowwise face    columnwise face "te" [K, M/2]   columnwise face "ntile"
    "rows"     0, of a matrix              the same axis   behind each other in each row   axis 1
    "height"   0, of [H, W, B, C]          the same axis   behind each other in each row   axis 1
    "batch"    -2                          the same axis   next to b, at each pixel        axis 0
    "channel"  -1                          interleaved     the first axis                  the channels' axis

Codes are gathered if no block of 16 crosses a shard's border; the last shard may end inside a block. Where blocks would
be cut, and for row-scaled tensors, the values are gathered in the nominal dtype and the whole is quantized, and a
warning says so once. Messages of uneven shards are as long as the longest. All ranks decide alike, from metadata that
they exchange first: a shard that does not fit, or that has another tensor scale, raises on every rank.

Sizes and scales are compared on the host, so torch.compile breaks its graph here. The gather is not differentiable.
Every shard draws its own random numbers for stochastic rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from te_nvfp4_cv import errors
from te_nvfp4_cv.distributed import collectives
from te_nvfp4_cv.distributed.collectives import Part, PendingParts
from te_nvfp4_cv.distributed.shard_metadata import Shard, Told, by_value, check_alike, exchange, shard_of
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.quantize import rounding_seeds
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer

__all__ = ["AllGatherHandle", "all_gather", "all_gather_coalesced"]


class AllGatherHandle:
    """A tensor that is being gathered; all_gather(..., async_op=True) returns it.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> handle = nv.distributed.all_gather(x, quantizer=q, async_op=True)  # doctest: +SKIP
        >>> isinstance(handle, nv.distributed.AllGatherHandle)  # doctest: +SKIP
        True
        >>> whole = handle.wait()  # doctest: +SKIP
    """

    def __init__(self, finish: Callable[[], NVFP4Tensor]) -> None:
        self._finish: Callable[[], NVFP4Tensor] | None = finish
        self._result: NVFP4Tensor | None = None

    def wait(self) -> NVFP4Tensor:
        """Return the whole tensor, the same object each time. On a GPU only the current stream waits."""
        return _eager(self._wait)()

    def _wait(self) -> NVFP4Tensor:
        if self._finish is not None:
            with torch.no_grad():
                self._result = self._finish()
            self._finish = None
        assert self._result is not None
        return self._result


@overload
def all_gather(
    t: Tensor,
    group: Any = ...,
    dim: str = ...,
    async_op: Literal[False] = ...,
    *,
    quantizer: NVFP4Quantizer | None = ...,
) -> NVFP4Tensor: ...
@overload
def all_gather(
    t: Tensor,
    group: Any = ...,
    dim: str = ...,
    *,
    async_op: Literal[True],
    quantizer: NVFP4Quantizer | None = ...,
) -> AllGatherHandle: ...
@overload
def all_gather(
    t: Tensor, group: Any, dim: str, async_op: Literal[True], *, quantizer: NVFP4Quantizer | None = ...
) -> AllGatherHandle: ...
def all_gather(
    t: Tensor,
    group: Any = None,
    dim: str = "rows",
    async_op: bool = False,
    *,
    quantizer: NVFP4Quantizer | None = None,
) -> NVFP4Tensor | AllGatherHandle:
    """Gather the shards of a tensor over a group, in NVFP4.

    Args:
        t: this rank's shard [..., K]: an NVFP4Tensor whose tensor scale all ranks share (its quantizer had
            with_amax_reduction=True), or a plain tensor, which `quantizer` quantizes with the group's largest amax.
        group: a process group of which this process is a member, or None for the default group.
        dim: the axis that was split: "rows" and "height" the first, "batch" the last but one, "channel" the last.
        async_op: return a handle. The metadata has been exchanged then, and this call raises the errors.
        quantizer: quantizes a plain tensor; its amax_reduction_group is not used. For an NVFP4Tensor that holds no
            quantizer, it quantizes the whole where values are gathered.
    Returns:
        NVFP4Tensor with the faces and settings of the shards, or AllGatherHandle, whose wait() returns it. The buffers
        are new, with one rank too. requires_grad is False.
    Raises:
        TypeError: an argument of the wrong class, on the rank that gave it; other ranks raise a ValueError.
        ValueError: an argument that cannot be gathered; on every rank, shards that differ in more than their size along
            `dim`, or in their tensor scale. A shard without elements has no scale to differ.
        RuntimeError: torch.distributed is not initialized.
    Numerics: bitwise what the quantizer makes of the whole with the shared amax (any NaN is one NaN). Where values are
        gathered, NVFP4Tensors are dequantized first, rowwise if that face is there, so their values are rounded twice.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> store = torch.distributed.HashStore()
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> x = torch.randn(32, 64)  # this rank's rows
        >>> nv.distributed.all_gather(x, quantizer=nv.NVFP4Quantizer(columnwise=False))
        NVFP4Tensor((32, 64), torch.float32, rowwise, device='cpu')
        >>> torch.distributed.destroy_process_group()
    """
    (handle,) = _eager(_start)([t], group, dim, async_op, quantizer, "all_gather")
    return handle if async_op else handle.wait()


def all_gather_coalesced(
    tensors: Sequence[Tensor],
    group: Any = None,
    dim: str = "rows",
    async_op: bool = False,
    *,
    quantizer: NVFP4Quantizer | None = None,
) -> list[NVFP4Tensor] | list[AllGatherHandle]:
    """Gather several tensors in one message of data, after their number and their metadata have been exchanged.

    Every rank gives as many, in the same order. The other arguments, the errors and the numerics are those of
    all_gather; it returns a list. Ranks that give different numbers of tensors raise a ValueError, all of them.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> codes = nv.distributed.all_gather_coalesced([x, w], quantizer=nv.NVFP4Quantizer())  # doctest: +SKIP
    """
    handles = _eager(_start)(list(tensors), group, dim, async_op, quantizer, "all_gather_coalesced")
    return handles if async_op else [handle.wait() for handle in handles]


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function such that torch.compile does not trace into it.

    As a decorator, torch.compiler.disable would import half of torch when this module is imported.
    """
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def _start(
    tensors: list[Any], group: Any, dim: str, async_op: bool, quantizer: NVFP4Quantizer | None, caller: str
) -> list[AllGatherHandle]:
    """Exchange the metadata, and start the message of data."""
    group, ranks = collectives.check_group(group, caller)
    if caller != "all_gather" and ranks > 1:
        _check_count(tensors, group, caller)
    if not tensors:
        return []
    shards: list[Shard] = []
    error: Exception | None = None
    try:
        shards = [shard_of(t, dim, quantizer, caller) for t in tensors]
    except (TypeError, ValueError) as refused:
        error = refused  # raised after the exchange, so that other ranks do not wait for this one
        if ranks == 1:
            raise
    with torch.no_grad():
        if ranks == 1:
            return [AllGatherHandle(partial(_same, shard.alone())) for shard in shards]
        # From here on every rank takes the same steps, whatever its arguments were.
        # It has to come before the error: a rank that raised first would leave the others waiting for it.
        told = exchange(shards, len(tensors), group, _device_of(tensors, group))
        if error is not None:
            raise error
        for i, by_rank in enumerate(told):
            check_alike(by_rank, caller + (f", tensor {i}" if len(tensors) > 1 else ""))
        plans = [_plan(shard, by_rank, group) for shard, by_rank in zip(shards, told, strict=True)]
        parts = [part for plan in plans for part in plan.parts]
        pending = collectives.gather_parts(parts, group, async_op, [s for plan in plans for s in plan.sizes])
    handles, first = [], 0
    for plan in plans:
        handles.append(AllGatherHandle(partial(_arrived, plan, pending, slice(first, first + len(plan.parts)))))
        first += len(plan.parts)
    return handles


def _check_count(tensors: list[Any], group: Any, caller: str) -> None:
    """Refuse lists of different lengths, whose messages would have different lengths, too.

    Raises:
        ValueError: on every rank.
    """
    nothing = torch.empty(0, dtype=torch.int64, device=_device_of(tensors, group))
    counts = [count for (count,) in collectives.gather_ints([len(tensors)], nothing, group)]
    if len(set(counts)) > 1:
        raise errors.value_error(
            f"{caller}: the ranks give different numbers of tensors.",
            got=f"{by_value(counts)} tensors",
            needs="as many on every rank, in the same order",
            fix="give an empty shard of the same kind, x[:0], where a rank has nothing",
        )


def _device_of(tensors: list[Any], group: Any) -> torch.device:
    """Return the device of the metadata: that of the tensors or, if there is none (an error), one that can send."""
    found = [t.device for t in tensors if isinstance(t, Tensor)]
    nccl = torch.distributed.get_backend(group) == "nccl"
    return found[0] if found else torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _same(whole: NVFP4Tensor) -> NVFP4Tensor:
    return whole


def _arrived(plan: _Plan, pending: PendingParts, own: slice) -> NVFP4Tensor:
    return plan.finish(pending.wait()[own])


# ---- how a tensor travels -------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """The parts of one tensor's message, their sizes along their axes by rank, and the function that joins them."""

    parts: list[Part]
    sizes: list[list[int]]
    finish: Callable[[list[Tensor]], NVFP4Tensor]


def _plan(shard: Shard, by_rank: list[Told], group: Any) -> _Plan:
    """Plan a message of codes if no block is cut, else of values. All ranks decide alike, by the same `by_rank`."""
    sizes = [told.shape[shard.axis] for told in by_rank]
    reason = _reason_for_values(shard, sizes)
    if reason is None:
        whole = [told for told in by_rank if prod(told.shape)] or by_rank  # empty shards have no amax to share
        # The bits of non-negative floats are ordered as the floats are, with NaN above inf.
        amax = torch.tensor([max(told.amax[face] for told in whole) for face in (0, 1)], dtype=torch.int32)
        return _plan_codes(shard, sizes, amax.to(shard.device).view(torch.float32))
    if shard.quantizer is None:
        raise errors.value_error(
            f"all_gather: {reason}, and nothing can quantize the whole.",
            got=f"{errors.describe(shard.tensor)} without a quantizer, sizes {sizes} along {shard.dim!r}",
            needs=f"shards of whole blocks of {BLOCK}, or the quantizer that made them",
            fix="pass quantizer=",
        )
    errors.warn_once(
        f"all_gather: {reason}",
        f"all_gather: {reason} (here sizes {sizes} along {shard.dim!r}). Values are gathered, in "
        f"{shard.tensor.dtype}, and the whole is quantized: right, but 2 to 7 times the bytes",
    )
    return _plan_values(shard, sizes, group)


def _reason_for_values(shard: Shard, sizes: list[int]) -> str | None:
    """Return why the shards' codes cannot be joined, or None if they can."""
    shape, faces = shard.tensor.shape, shard.faces()
    # 16x16 tiles lie along both axes, whichever faces there are.
    tiles = getattr(shard.quantizer, "with_2d_quantization", False)
    if shard.row_scaled:
        return "a row-scaled tensor has no tensor scale to share"
    if shard.axis == len(shape) - 1:
        needed, outer, lengths = faces["rowwise"] or tiles, 1, sizes
    else:
        # Blocks of the columnwise face lie along the flattened rows, of which a shard has `outer` runs.
        outer, inner = prod(shape[: shard.axis]), prod(shape[shard.axis + 1 : -1])
        needed, lengths = faces["columnwise"] or tiles, [size * inner for size in sizes]
    lengths = [length for length in lengths if length]
    may_end_inside = outer == 1  # nothing follows the last shard, so its block is padded as that of the whole
    inside = lengths[:-1] if may_end_inside else lengths
    if needed and outer and any(length % BLOCK for length in inside):
        return f"shards along {shard.dim!r} cut blocks of {BLOCK}"
    return None


class _Buffer(NamedTuple):
    """A buffer of a shard as it travels, with the axis along which the ranks' buffers are joined."""

    name: str  # keyword of NVFP4Tensor
    tensor: Tensor
    axis: int
    sizes: list[int]  # along that axis, by rank
    whole: tuple[int, ...]  # shape of the joined buffer


def _plan_codes(shard: Shard, sizes: list[int], amax: Tensor) -> _Plan:
    """Plan a message of packed codes and scales; amax: fp32 [2], rowwise and columnwise, the largest of all shards."""
    t = shard.tensor if shard.packed else shard.quantize(shard.tensor, (amax[:1], amax[1:]))
    shape = (*t.shape[: shard.axis], sum(sizes), *t.shape[shard.axis + 1 :])
    buffers: list[_Buffer] = []
    amaxes = {}
    if t.rowwise_data is not None:
        buffers += _rowwise(t, shard.axis, sizes, shape)
        # Clones: the two faces must not share memory, since each is written in place.
        amaxes["amax_rowwise"] = amax[:1].clone()
    if t.columnwise_data is not None:
        buffers += (_columnwise_tiles if t.columnwise_layout == "ntile" else _columnwise)(t, shard.axis, sizes)
        amaxes["amax_columnwise"] = amax[1:].clone()

    def finish(arrived: list[Tensor]) -> NVFP4Tensor:
        named = {b.name: whole.reshape(b.whole).view(b.tensor.dtype) for b, whole in zip(buffers, arrived, strict=True)}
        return t.make_like(shape=shape, **named, **amaxes)

    parts = [(b.tensor.view(torch.uint8), b.axis) for b in buffers]
    return _Plan(parts, [b.sizes for b in buffers], finish)


def _blocks_in(lengths: Sequence[int]) -> list[int]:
    return [-(-length // BLOCK) for length in lengths]


def _face(
    name: str, data: Tensor, scale: Tensor, axis: int, sizes: list[int], wholes: tuple[tuple[int, ...], tuple[int, ...]]
) -> list[_Buffer]:
    """Return the two buffers of a face, whose shapes will be `wholes`. Both travel by blocks: 8 bytes, and a scale."""
    by_block = data.reshape(*scale.shape, BLOCK // 2)
    return [
        _Buffer(f"{name}_data", by_block, axis, sizes, wholes[0]),
        _Buffer(f"{name}_scale_inv", scale, axis, sizes, wholes[1]),
    ]


def _rowwise(t: NVFP4Tensor, axis: int, sizes: list[int], shape: tuple[int, ...]) -> list[_Buffer]:
    """Return the rowwise buffers. data [*lead, Kp/2] and scale_inv [*lead, Kp/16] have the tensor's axes, so that along
    K they interleave by rows.
    """
    scale = t.rowwise_scale_inv
    columns = scale.shape[-1]
    if axis == len(shape) - 1:  # each shard was padded to whole blocks
        sizes = _blocks_in(sizes)
        columns = sum(sizes)
    scale = scale.reshape(*t.shape[:-1], scale.shape[-1])
    wholes = (*shape[:-1], columns * BLOCK // 2), (prod(shape[:-1]), columns)
    return _face("rowwise", t.rowwise_data, scale, axis, sizes, wholes)


def _columnwise(t: NVFP4Tensor, axis: int, sizes: list[int]) -> list[_Buffer]:
    """Return the columnwise buffers. data is [K, M/2] with M = (outer, axis, inner): its blocks are joined as
    [K, outer, blocks], along the last axis.
    """
    data, scale, K = t.columnwise_data, t.columnwise_scale_inv, t.shape[-1]
    if axis == t.dim() - 1:
        K = sum(sizes)
        return _face("columnwise", data, scale, 0, sizes, ((K, data.shape[1]), (K, scale.shape[1])))
    # M = (outer, axis, inner): each shard holds `outer` runs of axis * inner rows, and blocks lie along a run.
    outer, inner = prod(t.shape[:axis]), prod(t.shape[axis + 1 : -1])
    blocks_by_rank = _blocks_in([size * inner for size in sizes])
    own, total = _blocks_in([t.shape[axis] * inner])[0], outer * sum(blocks_by_rank)
    wholes = (K, total * BLOCK // 2), (K, total)
    return _face("columnwise", data, scale.reshape(K, outer, own), 2, blocks_by_rank, wholes)


def _columnwise_tiles(t: NVFP4Tensor, axis: int, sizes: list[int]) -> list[_Buffer]:
    """Return the columnwise buffers of tiles. data [B/16, *image, C, 8] and scale_inv [B/16, *image, C] have the
    tensor's axes, the batch first.
    """
    scale = t.columnwise_scale_inv
    batch, channel = t.dim() - 2, t.dim() - 1
    by_rank = _blocks_in(sizes) if axis == batch else sizes
    # The tiles' axes are [B / 16, *image, C] for a tensor [*image, B, C].
    place = 0 if axis == batch else channel if axis == channel else axis + 1
    whole = (*scale.shape[:place], sum(by_rank), *scale.shape[place + 1 :])
    return _face("columnwise", t.columnwise_data, scale, place, by_rank, ((*whole, BLOCK // 2), whole))


def _plan_values(shard: Shard, sizes: list[int], group: Any) -> _Plan:
    """Plan a message of values. Every rank quantizes the whole alike, with the first rank's seed for rounding."""
    seed: Tensor | None = None
    x = shard.tensor.dequantize() if shard.packed else shard.tensor
    if shard.quantizer is not None and shard.quantizer.stochastic_rounding:
        # Every rank draws, so that the streams stay in step, and all take what the first one drew.
        drawn = rounding_seeds.draw_seed(x)
        seed = torch.tensor(collectives.gather_ints([], drawn, group)[0], device=x.device)
    return _Plan([(x, shard.axis)], [sizes], lambda arrived: shard.quantize(arrived[0], seed=seed))
