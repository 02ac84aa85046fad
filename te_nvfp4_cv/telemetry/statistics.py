"""What telemetry says of a tensor, and of a quantized operand: computed on its device, fetched all at once.

    stats(v)     mean, std, kurtosis E[(v - mean)^4] / std^4 - 3, amax, share of zeros, of the finite values; count of
                 values, and of those that are not finite; histograms over v / amax (64 bins in -1..1) and
                 floor(log2 |v|) (64 bins, -48..15)
    compare      SQNR = 10 log10(sum v^2 / sum (v - v')^2) dB; Pearson's correlation of v and v'; underflow: share of
                 the values other than 0 whose code is 0; saturation: share of values beyond 6 scales

Sums are fp64. All is of a sample: every k-th block of 16, k coprime to their number, so that no channel is left out;
but of raw tensors amax and the values that are not finite are those of the whole tensor (columns that are transformed:
amax after, values that are not finite before). So kurtosis may miss an outlier that amax shows. Numbers stay tensors
until `fetch`, which moves all of them to the CPU in one copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.telemetry.blocks import Blocks

BINS = 64
LOG2_FIRST = -48  # the first bin of log2_histogram; the last one is 15


def stats(
    v: Tensor, valid: Tensor | None = None, histograms: bool = True, whole: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    """Statistics of v, any shape; with `valid` of the elements where it is True.

    Args:
        whole: (amax, values that are not finite) of the tensor that v is a sample of; an amax that is not finite itself
            gives way to v's.
    """
    v = (v if valid is None else v[valid]).double().flatten()
    finite = v.isfinite()
    held = torch.where(finite, v, 0.0)
    count = finite.sum()
    amax = held.abs().amax() if v.numel() else held.sum()
    nonfinite = v.numel() - count
    if whole is not None:
        amax, nonfinite = torch.where(whole[0].isfinite(), whole[0].double(), amax), whole[1]
    unit = torch.where(amax > 0, amax, 1.0)
    mean, central2, central4 = _central(held / unit, finite, count)
    out: dict[str, Any] = {
        "count": v.numel(),
        "nonfinite": nonfinite,
        "mean": mean * unit,
        "std": central2.sqrt() * unit,
        "kurtosis": central4 / central2.square() - 3,
        "amax": amax,
        "zeros": (held == 0).logical_and(finite).sum() / count,
    }
    if histograms:
        share = torch.where(finite, held / unit, 2.0)  # beyond the range: not counted
        out["histogram"] = _histogram(share.float(), BINS, -1.0, 1.0)
        exponent = held.abs().log2().floor().clamp(LOG2_FIRST, LOG2_FIRST + BINS - 1) + 0.5
        exponent = torch.where(finite & (held != 0), exponent, 2.0 * BINS)
        out["log2_histogram"] = _histogram(exponent.float(), BINS, LOG2_FIRST, LOG2_FIRST + BINS)
    return out


def _central(v: Tensor, finite: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, second and fourth central moments) of the finite values; the others are 0 in v."""
    mean = v.sum() / count
    centred = torch.where(finite, v - mean, 0.0).square()
    return mean, centred.sum() / count, centred.square().sum() / count


def operand(blocks: Blocks) -> dict[str, Any]:
    """What the record says of one quantized operand: raw, codes, dequantized, and how they compare."""
    codes = formats.decode_e2m1(blocks.codes)
    out: dict[str, Any] = {
        "raw": stats(blocks.raw, blocks.valid, whole=blocks.whole),
        "codes": stats(codes, blocks.valid, histograms=False),
        "dequantized": stats(blocks.values, blocks.valid, histograms=False),
        "scales": _scales(blocks.scale),
        **_compare(blocks),
    }
    used = blocks.codes if blocks.valid is None else blocks.codes[blocks.valid]
    out["codes"]["usage"] = _count(used, 16)
    return out


def _compare(b: Blocks) -> dict[str, Tensor]:
    raw, values = b.raw.double(), b.values.double()
    limit = b.limit.double().unsqueeze(-1)
    if b.valid is not None:
        raw, values = raw[b.valid], values[b.valid]
        limit = limit.expand_as(b.raw)[b.valid]
        zero_code = (b.codes & 7)[b.valid] == 0
    else:
        zero_code = (b.codes & 7) == 0
    unit = raw.abs().amax() if raw.numel() else raw.sum()
    unit = torch.where(unit.isfinite() & (unit > 0), unit, 1.0)
    x, y = raw / unit, values / unit
    error = (x - y).square().sum()
    dx, dy = x - x.mean(), y - y.mean()
    return {
        "sqnr_db": 10 * torch.log10(x.square().sum() / error),
        "correlation": (dx * dy).sum() / (dx.square().sum() * dy.square().sum()).sqrt(),
        "underflow": ((raw != 0) & zero_code).sum() / (raw != 0).sum().clamp(min=1),
        "saturation": (raw.abs() > limit * (1 + 1e-6)).double().mean(),
    }


def _scales(scale: Tensor) -> dict[str, Tensor]:
    values = scale.view(torch.float8_e4m3fn).double()
    return {
        "mean": values.mean(),
        "min": values.amin(),
        "max": values.amax(),
        "zeros": (scale == 0).double().mean(),
        "histogram": _count((scale >> 3) & 15, 16),
    }


def _count(small: Tensor, bins: int) -> Tensor:
    """How often each of 0 .. bins - 1 occurs; without asking the device for sizes, as bincount does."""
    return _histogram(small.float(), bins, -0.5, bins - 0.5)


def _histogram(v: Tensor, bins: int, low: float, high: float) -> Tensor:
    """torch.histc, which CUDA refuses under torch.use_deterministic_algorithms."""
    if v.is_cuda and torch.are_deterministic_algorithms_enabled():
        return histogram_by_comparison(v, bins, low, high)
    return torch.histc(v, bins, low, high)


def histogram_by_comparison(v: Tensor, bins: int, low: float, high: float) -> Tensor:
    """The same counts without atomic additions; the last bin holds its upper end."""
    index = ((v - low) * (bins / (high - low))).floor().clamp(max=bins - 1)
    index = torch.where((v >= low) & (v <= high), index, -1.0)
    return (index.flatten().unsqueeze(-1) == torch.arange(bins, device=v.device)).sum(0).float()


def flips(now: Tensor, before: Tensor, earlier: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(elements whose code differs from `before`, those that went back to `earlier`) of packed codes; -0 is 0."""
    a, b = _signless_zeros(now), _signless_zeros(before)
    changed = a != b
    back = None if earlier is None else (changed & (a == _signless_zeros(earlier))).sum()
    return changed.sum(), back


def _signless_zeros(data: Tensor) -> Tensor:
    codes = formats.unpack_nibbles(data)
    return torch.where(codes == 8, 0, codes)


def fetch(record: Any) -> Any:
    """The record with every tensor as a float or a list of floats: one copy from the device."""
    found: list[Tensor] = []
    _walk(record, found.append)
    if not found:
        return record
    by_device: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(found):
        by_device.setdefault(tensor.device, []).append(index)
    values: dict[int, Any] = {}
    for indices in by_device.values():
        flat = torch.cat([found[i].detach().double().flatten() for i in indices]).cpu().tolist()
        start = 0
        for i in indices:
            size = found[i].numel()
            part = flat[start : start + size]
            values[i] = _number(part[0]) if found[i].dim() == 0 else [_number(value) for value in part]
            start += size
    order = iter(range(len(found)))
    return _walk(record, lambda _: values[next(order)])


def _number(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) and abs(value) < 2**53 else value


def _walk(record: Any, leaf: Any) -> Any:
    if isinstance(record, Tensor):
        return leaf(record)
    if isinstance(record, dict):
        return {key: _walk(value, leaf) for key, value in record.items()}
    if isinstance(record, list):
        return [_walk(value, leaf) for value in record]
    return record
