"""Exchange what all_gather must know of the shards before data travel: their settings, shapes and amaxes.

    shard_of      check a call's arguments                     -> Shard, or an error
    exchange      every rank's settings, shape and amax bits   -> Told, by tensor and rank; one small message
    check_alike   the shards must be parts of one tensor       -> nothing, or the same ValueError on every rank

A rank whose arguments are refused takes part in the exchange and says so, so that no rank waits for one that has
raised. gather.py decides how codes travel, and moves them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import errors
from te_nvfp4_cv.distributed import collectives
from te_nvfp4_cv.ops.quantize.matrix import DTYPES
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer

DIMS = {"rows": (0, 2), "height": (0, 3), "batch": (-2, 2), "channel": (-1, 1)}  # axis, and dimensions needed
_FIELDS = (
    *("refused", "packed", "dim", "dtype", "rowwise", "columnwise", "ntile layout", "RHT", "sign mask"),
    *("row-scaled", "4over6", "e4m3_max", "quantizer", "dimensions"),
)
_MAX_DIMS = 8
_WIDTH = len(_FIELDS) + _MAX_DIMS
# Settings that change no code. Which faces there are is a field of its own.
_NOT_NUMERICS = ("rowwise", "columnwise", "backend", "with_amax_reduction", "with_post_rht_amax")
_INF, _NAN = 0x7F800000, 0x7FC00000  # bits of fp32


@dataclass
class Shard:
    """The tensor that a rank gathers, an NVFP4Tensor or plain values, with its checked arguments."""

    tensor: Any
    quantizer: NVFP4Quantizer | None
    dim: str
    axis: int  # of the tensor, not negative

    @property
    def packed(self) -> bool:
        return isinstance(self.tensor, NVFP4Tensor)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def row_scaled(self) -> bool:
        return self.tensor.row_scaled if self.packed else self._made_by().row_scaled_nvfp4

    def faces(self) -> dict[str, bool]:
        return self.tensor.get_usages() if self.packed else self._made_by().get_usages()

    def _made_by(self) -> NVFP4Quantizer:
        assert self.quantizer is not None
        return self.quantizer

    def fields(self) -> list[int]:
        """Return the settings that ranks must agree on, as _FIELDS names them, and the shape."""
        q, t = self.quantizer, self.tensor
        faces = self.faces()
        col = faces["columnwise"]
        if self.packed:
            rht, signs = t.columnwise_rht, t._with_random_sign_mask
            over6, e4m3_max, layout = t.four_over_six, t.e4m3_max, t.columnwise_layout
        else:
            q = self._made_by()
            rht, signs, layout = q.with_rht, q.with_random_sign_mask, "te"
            over6, e4m3_max = q.nvfp4_use_4over6, q.nvfp4_e4m3_max
        values = [0, self.packed, list(DIMS).index(self.dim), DTYPES.index(t.dtype), faces["rowwise"], col]
        values += [col and layout == "ntile", col and rht, col and rht and signs]
        values += [self.row_scaled, over6, e4m3_max, _fingerprint(q)]
        return [int(v) for v in values] + [t.dim(), *t.shape] + [0] * (_MAX_DIMS - t.dim())

    def amax_bits(self) -> Tensor:
        """Return the bits of amax_rowwise and amax_columnwise, int32 [2]; 0 if missing, and for row-scaled tensors."""
        zero = torch.zeros(1, dtype=torch.float32, device=self.device)
        if self.row_scaled:
            return torch.cat((zero, zero)).view(torch.int32)
        if self.packed:
            row, col = self.tensor.amax_rowwise, self.tensor.amax_columnwise
            row = zero if row is None else row
        else:  # both: 16x16 tiles take the rowwise one for the columnwise face too
            row, col = self._made_by().measure(self.tensor)
        col = col if self.faces()["columnwise"] else zero
        return torch.cat((row.reshape(1), col.reshape(1))).view(torch.int32)

    def alone(self) -> NVFP4Tensor:
        """Return the gathered tensor of a group with a single rank."""
        if self.packed:
            return self.tensor.map_buffers(torch.clone)  # new buffers, as with several ranks
        return self.quantize(self.tensor)

    def quantize(self, x: Tensor, amax: tuple[Tensor, Tensor] | None = None, seed: Tensor | None = None) -> NVFP4Tensor:
        """Quantize x in the faces of the shard, without a reduction over ranks."""
        quantizer = self._made_by().copy()
        # The ranks have shared their amaxes before, in the message of metadata.
        quantizer.with_amax_reduction = False
        quantizer.set_usage(**self.faces())
        made = quantizer.quantize(x, amax=amax, seed=seed)
        made = made.to_columnwise_layout(self.tensor.columnwise_layout) if self.packed else made
        return made.make_like(quantizer=self.quantizer)


def _fingerprint(quantizer: NVFP4Quantizer | None) -> int:
    """Hash the settings that decide codes into a number; 0 without a quantizer."""
    if quantizer is None:
        return 0
    settings = sorted((name, v) for name, v in quantizer.settings().items() if name not in _NOT_NUMERICS)
    # crc32, because Python's hash of a text differs between processes; + 1, because 0 says that there is none.
    return zlib.crc32(repr(settings).encode()) + 1


def shard_of(t: Any, dim: str, quantizer: Any, caller: str) -> Shard:
    """Check a call's arguments and make a shard of them.

    Raises:
        TypeError: an argument of the wrong class; a plain tensor without a quantizer.
        ValueError: an unknown dim; a tensor that cannot be gathered along it; a quantizer that writes no face.
    """
    if dim not in DIMS:
        raise errors.value_error(
            f"{caller}: unknown dim.", got=f"dim={dim!r}", needs=f"one of {', '.join(DIMS)}", fix='dim="rows"'
        )
    if not isinstance(t, Tensor) or not (quantizer is None or isinstance(quantizer, NVFP4Quantizer)):
        raise errors.type_error(
            f"{caller}: an argument is of the wrong class.",
            got=f"{errors.describe(t)}, quantizer {type(quantizer).__name__}",
            needs="an NVFP4Tensor, or a tensor and an NVFP4Quantizer",
            fix="all_gather(x, group, quantizer=nv.NVFP4Quantizer())",
        )
    packed = isinstance(t, NVFP4Tensor)
    if not packed and quantizer is None:
        raise errors.type_error(
            f"{caller}: a plain tensor and no quantizer.",
            got=errors.describe(t),
            needs="an NVFP4Tensor, or a quantizer that makes one",
            fix="all_gather(x, group, quantizer=nv.NVFP4Quantizer()); in high precision use torch.distributed",
        )
    axis, least = DIMS[dim]
    if not least <= t.dim() <= _MAX_DIMS or t.dtype not in DTYPES:
        raise errors.value_error(
            f"{caller}: dim={dim!r} of this tensor cannot be gathered.",
            got=errors.describe(t),
            needs=f"{least} to {_MAX_DIMS} dimensions, of bfloat16, float16 or float32",
            fix='"rows" is for [..., K], "batch" and "height" for [H, W, B, C], "channel" for any',
        )
    if not packed and quantizer is not None and not any(quantizer.get_usages().values()):
        raise errors.value_error(
            f"{caller}: the quantizer writes no face.",
            got=repr(quantizer),
            needs="rowwise or columnwise",
            fix="quantizer.set_usage(rowwise=True)",
        )
    held = t.quantizer if isinstance(t, NVFP4Tensor) else None
    return Shard(t if packed else t.detach(), held or quantizer, dim, axis % t.dim())


# ---- what the ranks tell each other ---------------------------------------------------------------------------------


@dataclass
class Told:
    """The description that one rank gave of its shard."""

    fields: dict[str, int]
    shape: tuple[int, ...]
    amax: tuple[int, int]  # bits, any NaN as one


def exchange(shards: list[Shard], tensors: int, group: Any, device: torch.device) -> list[list[Told]]:
    """Return, for each tensor, what every rank says of it. A rank without shards has refused its arguments."""
    if shards:
        values = [v for shard in shards for v in shard.fields()]
        amaxes = torch.cat([shard.amax_bits() for shard in shards])
    else:
        values = ([1] + [0] * (_WIDTH - 1)) * tensors  # `refused` is set, and the rest is not looked at
        amaxes = torch.zeros(2 * tensors, dtype=torch.int32, device=device)
    rows = collectives.gather_ints(values, amaxes, group)
    told = []
    for i in range(tensors):
        by_rank = []
        for row in rows:
            # A row holds the fields of all tensors, then two amaxes for each.
            own, bits = row[i * _WIDTH : (i + 1) * _WIDTH], row[tensors * _WIDTH + 2 * i :][:2]
            fields = dict(zip(_FIELDS, own, strict=False))  # the rest of `own` is the shape
            shape = tuple(own[len(_FIELDS) : len(_FIELDS) + fields["dimensions"]])
            by_rank.append(Told(fields, shape, (_one_nan(bits[0]), _one_nan(bits[1]))))
        told.append(by_rank)
    return told


def _one_nan(bits: int) -> int:
    """Map every NaN to the same bits: ranks need not agree on a NaN's payload."""
    bits &= 0x7FFFFFFF
    return bits if bits <= _INF else _NAN


def by_value(values: Sequence[Any]) -> str:
    """Return the ranks' values in words, for a message: '8 on ranks 0, 2; 16 on rank 1'."""
    ranks: dict[Any, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return "; ".join(f"{value} on rank{'s'[: len(of) - 1]} {', '.join(of)}" for value, of in ranks.items())


def check_alike(by_rank: list[Told], caller: str) -> None:
    """Refuse shards that are not parts of one tensor.

    Raises:
        ValueError: on every rank, with the same text.
    """
    refused = [str(rank) for rank, told in enumerate(by_rank) if told.fields["refused"]]
    if refused:
        raise errors.value_error(
            f"{caller}: another rank refused its arguments.",
            got=f"an error on rank {', '.join(refused)}",
            needs="arguments that every rank accepts",
            fix="see the error of that rank",
        )
    for name in _FIELDS[1:]:
        values: list[Any] = [told.fields[name] for told in by_rank]
        if len(set(values)) > 1:
            if name == "dim":
                values = [list(DIMS)[v] for v in values]
            elif name == "dtype":
                values = [str(DTYPES[v]).removeprefix("torch.") for v in values]
            elif name == "quantizer":
                values = [f"settings {v:#x}" if v else "none" for v in values]
            elif name != "e4m3_max" and name != "dimensions":
                values = [bool(v) for v in values]
            raise errors.value_error(
                f"{caller}: the ranks' shards are of different kinds.",
                got=f"{name}: {by_value(values)}",
                needs="the same faces, dtype and settings on every rank",
                fix="make the shards with equal quantizers, and pass the same dim",
            )
    axis = DIMS[list(DIMS)[by_rank[0].fields["dim"]]][0] % len(by_rank[0].shape)
    others = [told.shape[:axis] + told.shape[axis + 1 :] for told in by_rank]
    if len(set(others)) > 1:
        raise errors.value_error(
            f"{caller}: the ranks' shards do not fit together.",
            got=f"shape: {by_value([told.shape for told in by_rank])}",
            needs=f"shapes that differ in axis {axis} only",
            fix="split one tensor along that axis, or pass the dim along which it was split",
        )
    for i, face in enumerate(("rowwise", "columnwise")):
        # Shards without elements have amax 0, and plain ones are quantized with the largest amax: neither need agree.
        amaxes = {told.amax[i] for told in by_rank if prod(told.shape)}
        if by_rank[0].fields["packed"] and len(amaxes) > 1:
            raise errors.value_error(
                f"{caller}: the ranks' shards have different tensor scales.",
                got=f"amax_{face}: {by_value([_value_of(told.amax[i]) for told in by_rank])}",
                needs="one amax for the whole tensor, in bits",
                fix="all_gather(x, group, quantizer=q) of the plain shards, or quantize them with "
                "NVFP4Quantizer(with_amax_reduction=True, amax_reduction_group=group)",
            )


def _value_of(bits: int) -> str:
    return repr(float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)))
