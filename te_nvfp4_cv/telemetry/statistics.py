"""Compute the statistics of a tensor and of a quantized operand on its device, and fetch all of them at once.

    stats(v)     of the finite values: mean, std, kurtosis E[(v - mean)^4] / std^4 - 3, amax, share of zeros; the count
                 of all values, and of those that are not finite; histograms over v / amax (64 bins in -1..1) and
                 floor(log2 |v|) (64 bins, -48..15)
    _compare     SQNR = 10 log10(sum v^2 / sum (v - v')^2) dB; Pearson's correlation of v and v'; underflow: share of
                 the values other than 0 whose code is 0; saturation: share of values beyond 6 scales

Sums are fp64. Statistics come from a sample: every k-th block of 16, with k coprime to the number of blocks, so that no
channel is left out. Two figures come from the whole tensor: amax, and the number of values that are not finite. (For
transformed columns amax is taken after the transform, the number before it.) So kurtosis may miss an outlier that amax
shows. Numbers stay tensors until `fetch`, which moves them to the CPU in one copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend.torch_private import tree_leaves, tree_map_only
from te_nvfp4_cv.telemetry.blocks import Blocks

BINS = 64
LOG2_FIRST = -48  # the first bin of log2_histogram; the last one is 15


def stats(
    v: Tensor, valid: Tensor | None = None, histograms: bool = True, whole: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    """Compute the statistics of v.

    Args:
        v: a tensor of any shape and floating dtype.
        valid: which elements count, of v's shape; if None, all do.
        histograms: add both histograms.
        whole: amax and the number of values that are not finite, of the tensor that v is a sample of. If that amax is
            not finite, v's is used.
    """
    v = (v if valid is None else v[valid]).double().flatten()
    finite = v.isfinite()
    held = torch.where(finite, v, 0.0)
    count = finite.sum()
    amax = held.abs().amax() if v.numel() else held.sum()  # amax() refuses an empty tensor; its sum is 0
    nonfinite = v.numel() - count
    if whole is not None:
        amax, nonfinite = torch.where(whole[0].isfinite(), whole[0].double(), amax), whole[1]
    unit = torch.where(amax > 0, amax, 1.0)  # in units of amax a fourth power neither overflows nor vanishes
    scaled = held / unit
    mean = scaled.sum() / count
    squares = torch.where(finite, scaled - mean, 0.0).square()
    central2, central4 = squares.sum() / count, squares.square().sum() / count
    out: dict[str, Any] = {
        "count": v.numel(),
        "nonfinite": nonfinite,
        "mean": mean * unit,
        "std": central2.sqrt() * unit,
        "kurtosis": central4 / central2.square() - 3,  # 0/0 of a constant tensor is NaN, and null in the file
        "amax": amax,
        "zeros": (held == 0).logical_and(finite).sum() / count,
    }
    if histograms:
        share = torch.where(finite, scaled, 2.0)  # 2 lies beyond the range, and so is not counted
        out["histogram"] = _histogram(share.float(), BINS, -1.0, 1.0)
        # The middle of a bin, which no rounding moves over its edge.
        exponent = held.abs().log2().floor().clamp(LOG2_FIRST, LOG2_FIRST + BINS - 1) + 0.5
        exponent = torch.where(finite & (held != 0), exponent, 2.0 * BINS)
        out["log2_histogram"] = _histogram(exponent.float(), BINS, LOG2_FIRST, LOG2_FIRST + BINS)
    return out


def operand(blocks: Blocks) -> dict[str, Any]:
    """Compute what a record says of one quantized operand: raw, codes, dequantized, and how they compare."""
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
    limit, zero_code = b.limit.double().unsqueeze(-1).expand_as(raw), (b.codes & 7) == 0
    if b.valid is not None:
        raw, values, limit, zero_code = (t[b.valid] for t in (raw, values, limit, zero_code))
    # In units of amax no square overflows or vanishes, not even of fp64 values; ratios stay as they are.
    unit = raw.abs().amax() if raw.numel() else raw.sum()
    unit = torch.where(unit.isfinite() & (unit > 0), unit, 1.0)
    x, y = raw / unit, values / unit
    error = (x - y).square().sum()
    dx, dy = x - x.mean(), y - y.mean()
    return {
        "sqnr_db": 10 * torch.log10(x.square().sum() / error),
        "correlation": (dx * dy).sum() / (dx.square().sum() * dy.square().sum()).sqrt(),
        "underflow": ((raw != 0) & zero_code).sum() / (raw != 0).sum().clamp(min=1),
        # 1e-6, because a value of exactly 6 scales may differ from this limit by a rounding of fp32.
        "saturation": (raw.abs() > limit * (1 + 1e-6)).double().mean(),
    }


def _scales(scale: Tensor) -> dict[str, Tensor]:
    values = scale.view(torch.float8_e4m3fn).double()
    return {
        "mean": values.mean(),
        "min": values.amin(),
        "max": values.amax(),
        "zeros": (scale == 0).double().mean(),
        "histogram": _count((scale >> 3) & 15, 16),  # the exponents: a scale has no sign bit
    }


def _count(small: Tensor, bins: int) -> Tensor:
    """Count how often each of 0 .. bins - 1 occurs. Unlike bincount this asks the device for no sizes."""
    return _histogram(small.float(), bins, -0.5, bins - 0.5)


def _histogram(v: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Call torch.histc, or its equal where CUDA refuses it: under torch.use_deterministic_algorithms."""
    if v.is_cuda and torch.are_deterministic_algorithms_enabled():
        return histogram_by_comparison(v, bins, low, high)
    return torch.histc(v, bins, low, high)


def histogram_by_comparison(v: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Return torch.histc's counts without atomic additions; the last bin holds its upper end."""
    # clamp: histc counts the upper end itself into the last bin.
    index = ((v - low) * (bins / (high - low))).floor().clamp(max=bins - 1)
    index = torch.where((v >= low) & (v <= high), index, -1.0)
    return (index.flatten().unsqueeze(-1) == torch.arange(bins, device=v.device)).sum(0).float()


def flips(now: Tensor, before: Tensor, earlier: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Count the packed codes that differ from `before`, and those of them that are again as in `earlier`; -0 is 0."""
    a, b = _signless_zeros(now), _signless_zeros(before)
    changed = a != b
    back = None if earlier is None else (changed & (a == _signless_zeros(earlier))).sum()
    return changed.sum(), back


def _signless_zeros(data: Tensor) -> Tensor:
    codes = formats.unpack_nibbles(data)
    return torch.where(codes == 8, 0, codes)


def fetch(record: Any) -> Any:
    """Return the record with numbers, or lists of numbers, in place of tensors, after one copy from each device."""
    found = [leaf for leaf in tree_leaves(record) if isinstance(leaf, Tensor)]
    values: dict[int, Any] = {}
    for device in {tensor.device for tensor in found}:
        here = [tensor for tensor in found if tensor.device == device]
        # One copy: each .item() would wait for the GPU, and a sampled step has thousands of numbers.
        flat = torch.cat([tensor.detach().double().flatten() for tensor in here]).cpu()
        for tensor, part in zip(here, flat.split([tensor.numel() for tensor in here]), strict=True):
            numbers = [_number(value) for value in part.tolist()]
            values[id(tensor)] = numbers[0] if tensor.dim() == 0 else numbers
    return tree_map_only(Tensor, lambda tensor: values[id(tensor)], record)


def _number(value: float) -> float | int:
    # Counts were made floats to travel with the rest; beyond 2^53 a float is no exact count any more.
    return int(value) if math.isfinite(value) and value == int(value) and abs(value) < 2**53 else value
