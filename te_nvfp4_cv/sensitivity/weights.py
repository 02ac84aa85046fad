"""Rank the weights of convolutions and linear layers by how badly they suit 4 bits, without data or gradients.

    kurtosis   m4 / m2^2 - 3 (Fisher): 0 for a normal distribution, large where a few weights stand far out
    amax/std   how far the largest stands out
    SQNR       10 log10(sum w^2 / sum (w - w')^2), w' = w in NVFP4, blocks 16x16 or 1x16 along what fprop contracts
    underflow  share of the weights other than 0 that become 0
    saturated  share of the weights that are clipped: code 6, and |w| > |w'|; by a few percent of |w| if the block's
               scale was rounded down, by more if a block is too large for its scale

Blocks never cross a group; channels are padded to 16 as in a thin layer. Weights with NaN or infinity are named, but
have no figures. Recurrent layers, and complex and sparse weights, which never run in NVFP4, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.errors import check_module, value_error
from te_nvfp4_cv.formats import E2M1_MAX, E4M3_MAX, unpack_nibbles
from te_nvfp4_cv.layer.names import plain_name
from te_nvfp4_cv.nn.walk import LAYERS
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import PACKED, WeightLayout, WeightSpec
from te_nvfp4_cv.report.forward_pass import untouched
from te_nvfp4_cv.report.text import aligned, number, plain

TITLES = (
    *("weight", "shape", "mean", "std", "kurtosis", "amax/std"),
    *("SQNR 16x16", "1x16", "underflow 16x16", "1x16", "saturated 16x16", "1x16", ""),
)


@dataclass(frozen=True)
class Cost:
    """The cost of NVFP4 for one weight: SQNR in dB (inf if nothing is lost), and the shares lost to 0 and clipped."""

    sqnr_db: float
    underflow: float
    saturated: float


@dataclass(frozen=True)
class Weight:
    """The figures of one weight, with the costs of 16x16 (blocks_2d) and 1x16 blocks (blocks_1d).

    If the weight has values that are not finite, `trouble` says how many, and there are no figures.
    """

    name: str
    shape: tuple[int, ...]
    trouble: str = ""
    mean: float = math.nan
    std: float = math.nan
    kurtosis: float = math.nan
    amax_over_std: float = math.nan
    blocks_2d: Cost | None = None
    blocks_1d: Cost | None = None


@dataclass(frozen=True)
class Study:
    """The result of kurtosis, worst first: weights that are not finite, then by kurtosis. `str()` gives a table.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> study = nv.sensitivity.kurtosis(torch.nn.Linear(32, 16))
        >>> [row.shape for row in study.rows]
        [(16, 32)]
    """

    rows: list[Weight]

    def to_dict(self) -> dict[str, Any]:
        """Return the study as dicts, lists, strings and numbers; null for what is not finite."""
        return {"weights": [plain(asdict(row)) for row in self.rows]}

    def __str__(self) -> str:
        lines = aligned([TITLES, *(_cells(row) for row in self.rows)], left=2)
        bad = [row.name for row in self.rows if row.trouble]
        if bad:
            lines.append(f"not finite: {', '.join(bad)}")
        return "\n".join(lines)


def _cells(row: Weight) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape))
    if row.blocks_2d is None or row.blocks_1d is None:
        return (row.name, shape, *[""] * 10, row.trouble)  # a cell for each figure
    both = (row.blocks_2d, row.blocks_1d)
    return (
        row.name,
        shape,
        *(number(value, ".3g") for value in (row.mean, row.std, row.kurtosis, row.amax_over_std)),
        *(f"{cost.sqnr_db:.1f} dB" for cost in both),
        *(f"{cost.underflow:.2%}" for cost in both),
        *(f"{cost.saturated:.2%}" for cost in both),
        "",
    )


def kurtosis(model: nn.Module) -> Study:
    """Rank the weights of all convolutions and linear layers by how badly their values suit 4 bits.

    Weights that are sharded over ranks are gathered one by one: call it on every rank.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has no such layer, or a weight has no values (it is lazy, or on the meta device).

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16))
        >>> with torch.no_grad():
        ...     model[1].weight[0, 0] = 10.0  # an outlier
        >>> nv.sensitivity.kurtosis(model).rows[0].name
        '1'
    """
    check_module("kurtosis", model, "kurtosis(model)")
    # Reading a parametrized weight may change buffers: spectral_norm iterates.
    with untouched(model), torch.no_grad():
        rows = [_weight(name, w, module) for name, w, module in _weights(model)]
    if not rows:
        raise value_error(
            "kurtosis: the model has no convolution and no linear layer.",
            got=f"{type(model).__name__} with {sum(1 for _ in model.modules())} modules",
            needs="torch.nn.Conv1d/2d/3d, ConvTranspose1d/2d/3d, Linear or MultiheadAttention",
            fix="pass the model whose layers train",
        )
    return Study(sorted(rows, key=lambda row: math.inf if row.trouble else row.kurtosis, reverse=True))


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, LAYERS):
            keys = ["weight"]
        elif isinstance(module, nn.MultiheadAttention):
            # in_proj_weight, or q_, k_ and v_proj_weight if their widths differ. out_proj is a module of its own.
            keys = [key for key in module._parameters if "weight" in key]
        else:
            continue
        for key in keys:
            w = getattr(module, key)
            if w is None or id(w) in seen or w.is_complex() or w.layout != torch.strided:
                continue
            # A parametrized weight is computed at every access: it is freed, and another may get the same id.
            if isinstance(w, nn.Parameter):
                seen.add(id(w))
            name = plain_name(path) or type(module).__name__
            name += "" if key == "weight" else f".{key}"
            if nn.parameter.is_lazy(w) or w.device.type == "meta":
                raise value_error(
                    f"kurtosis: the weight of {name!r} has no values.",
                    got="a lazy parameter" if nn.parameter.is_lazy(w) else "a weight on the meta device",
                    needs="weights with values",
                    fix="run one forward pass, or load the weights, first",
                )
            if w.numel():  # a layer without channels has no figures
                yield name, _whole(w), module


def _whole(w: Tensor) -> Tensor:
    """Return all of a weight; of a sharded one, with the other ranks, all of which must come here."""
    if not hasattr(w, "_local_tensor"):  # a DTensor, asked for without importing its module, which takes long
        return w
    from te_nvfp4_cv.distributed.fsdp import whole_weight

    return whole_weight(w)


def _weight(name: str, w: Tensor, module: nn.Module) -> Weight:
    w, groups = w.detach(), int(getattr(module, "groups", 1))
    shape = tuple(w.shape)
    bad = [f"{int(count)} {word}" for count, word in ((w.isnan().sum(), "NaN"), (w.isinf().sum(), "inf")) if count]
    if bad:
        return Weight(name, shape, f"{' and '.join(bad)} of {w.numel()} weights")
    # fp64: in fp16 fourth powers vanish, and in bf16 they have 8 bits.
    values = w.double()
    mean = float(values.mean())
    deviations = values - mean
    variance, fourth = float(deviations.square().mean()), float(deviations.pow(4).mean())
    std, amax = math.sqrt(variance), float(values.abs().max())
    if getattr(module, "transposed", False):  # [C, O / groups, ...]: fprop contracts axis 0
        w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return Weight(
        name,
        shape,
        mean=mean,
        std=std,
        kurtosis=fourth / variance**2 - 3 if variance**2 > 0 else 0.0,  # all equal: no outliers
        amax_over_std=amax / std if std else 0.0,
        blocks_2d=_cost(w, groups, two_d=True),
        blocks_1d=_cost(w, groups, two_d=False),
    )


def _cost(w: Tensor, groups: int, two_d: bool) -> Cost:
    """Quantize a weight [O, C / groups, *kernel], and compare."""
    backend, (n, channels) = dispatch.resolve("auto", w.device), w.shape[:2]
    w = w.float()
    codes = operand.quantize_weight(w, WeightSpec(groups, PACKED, two_d=two_d), torch.float32, backend)
    layout = WeightLayout(n, channels, groups, columnwise=False)
    blocks = operand.unpack_weight(codes.row, layout, None, torch.float32, backend)
    # unpack_weight gives code times block scale; the tensor scale is applied here, in fp64, to add no rounding.
    quantized = blocks.double() * (codes.amax.double() / (E2M1_MAX * E4M3_MAX))
    values = w.flatten(2).movedim(2, 1).double() if w.dim() > 2 else w[:, None].double()  # [O, taps, C / groups]
    # Code 7 of 0..7 is the value 6. With 1e-6 a weight of exactly 6 scales does not count as clipped.
    largest = unpack_nibbles(codes.row.data)[..., :channels].bitwise_and(7) == 7
    power, noise = float(values.square().sum()), float((values - quantized).square().sum())
    # A weight that is 0 already loses nothing, as pruned ones are.
    nonzero = int((values != 0).sum())
    return Cost(
        sqnr_db=10 * math.log10(power / noise) if noise and power else math.inf,
        underflow=int(((values != 0) & (quantized == 0)).sum()) / nonzero if nonzero else 0.0,
        saturated=int((largest & (values.abs() > quantized.abs() * (1 + 1e-6))).sum()) / values.numel(),
    )
