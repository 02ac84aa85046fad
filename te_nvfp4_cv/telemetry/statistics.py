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

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.telemetry.blocks import Blocks, code_values, finite

BINS = 64
LOG2_FIRST = -48  # the first bin of log2_histogram; the last one is 15


class _Sample:
    """Hold the values of a sample as fp64 [n], and what every figure of them needs.

    In units of the amax, no fourth power overflows or vanishes. Values that are not finite count as 0, and each sum
    takes their share out again: masks would cost several passes more, and a sampled step has a hundred operands. For
    the same reason sums of products are dot products, and temporary tensors are written in place.

    Attributes:
        scaled: the values in units of `unit`.
        away: the scaled values minus their mean.
        square: the sum of the squares of `away` over the finite values.
    """

    def __init__(self, v: Tensor, whole: tuple[Tensor, Tensor] | None = None, unit: Tensor | None = None) -> None:
        self.v = v.double().flatten()
        self.held, amax, self.broken = finite(self.v)
        self.nonfinite = self.broken
        if whole is not None:
            amax, self.nonfinite = torch.where(whole[0].isfinite(), whole[0].double(), amax), whole[1]
        self.amax, self.count = amax, self.v.numel() - self.broken
        self.unit = torch.where(amax > 0, amax, 1.0) if unit is None else unit
        self.scaled = self.held / self.unit
        self.mean = self.scaled.sum() / self.count
        self.away = self.scaled - self.mean
        self.square = self.away.dot(self.away) - self.broken * self.mean.square()

    def stats(self, histograms: bool) -> dict[str, Any]:
        """Return the figures that the file's head lists under stats."""
        nonzero = (self.held != 0).count_nonzero()
        squares = self.away.square()
        fourth = squares.dot(squares) - self.broken * self.mean.square().square()
        out: dict[str, Any] = {
            "count": self.v.numel(),
            "nonfinite": self.nonfinite,
            **_moments(self.mean, self.square / self.count, fourth / self.count, self.unit),
            "amax": self.amax,
            "zeros": (self.count - nonzero) / self.count,
        }
        if histograms:
            out["histogram"] = histogram(self.scaled.float(), BINS, -1.0, 1.0)
            out["histogram"][BINS // 2] -= self.broken
            # The exponent's bits are floor(log2 |v|) for every normal fp64 number. Zeros and smaller ones have none,
            # and would come before the first bin.
            exponent = (self.held.view(torch.int64) >> 52).bitwise_and_(0x7FF).sub_(1023 + LOG2_FIRST)
            out["log2_histogram"] = _count(exponent.clamp_(0, BINS - 1).to(torch.uint8), BINS)
            out["log2_histogram"][0] -= self.v.numel() - nonzero
        return out


def stats(v: Tensor, whole: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
    """Compute the statistics of v, with both histograms.

    Args:
        v: a tensor of any shape and floating dtype.
        whole: amax and the number of values that are not finite, of the tensor that v is a sample of. If that amax is
            not finite, v's is used.
    """
    return _Sample(v, whole).stats(True)


def _moments(mean: Tensor, central2: Tensor, central4: Tensor, unit: Tensor) -> dict[str, Tensor]:
    # 0/0 of a constant tensor is NaN, and null in the file.
    kurtosis = central4 / central2.square() - 3
    return {"mean": mean * unit, "std": central2.sqrt() * unit, "kurtosis": kurtosis}


def operand(blocks: Blocks) -> dict[str, Any]:
    """Compute what a record says of one quantized operand: raw, codes, dequantized, and how they compare."""
    taken = [blocks.raw, blocks.values, blocks.codes, blocks.limit.unsqueeze(-1)]
    if blocks.valid is not None:
        taken = [tensor.expand_as(blocks.raw)[blocks.valid] for tensor in taken]
    raw, values, codes, limit = taken
    before = _Sample(raw, blocks.whole)
    after = _Sample(values, unit=before.unit)  # in one unit, so that equal values stay equal
    nonzero = raw != 0
    return {
        "raw": before.stats(True),
        "codes": _codes(_count(codes, 16)),
        "dequantized": after.stats(False),
        "scales": _scales(blocks.scale, blocks.scale_values),
        **_compare(before, after),
        "underflow": (nonzero & (codes & 7 == 0)).count_nonzero() / nonzero.count_nonzero().clamp(min=1),
        # 1e-6, because a value of exactly 6 scales may differ from this limit by a rounding of fp32.
        "saturation": (raw.abs() > (limit.double() * (1 + 1e-6)).float()).count_nonzero().double() / raw.numel(),
    }


def _codes(usage: Tensor) -> dict[str, Any]:
    """Compute the statistics of codes from how often each of the 16 occurs."""
    values, times = code_values(usage.device).double(), usage.double()
    count = times.sum()
    mean = (times * values).sum() / count
    squares = (values - mean).square()
    central2, central4 = (times * squares).sum() / count, (times * squares.square()).sum() / count
    return {
        "count": count,
        "nonfinite": 0,
        **_moments(mean, central2, central4, torch.ones_like(mean)),
        "amax": (values.abs() * (times > 0)).amax(),
        "zeros": (times[0] + times[8]) / count,
        "usage": usage,
    }


def _compare(before: _Sample, after: _Sample) -> dict[str, Tensor]:
    # Where a value is not finite there is nothing to compare: NaN, and null in the file.
    whole = torch.where(before.broken + after.broken > 0, torch.nan, 1.0)
    error, power = before.scaled - after.scaled, before.scaled.dot(before.scaled)
    together = before.away.dot(after.away) * whole
    return {
        "sqnr_db": 10 * torch.log10(power / (error.dot(error) * whole)),
        "correlation": together / (before.square * after.square).sqrt(),
    }


def _scales(scale: Tensor, values: Tensor) -> dict[str, Tensor]:
    # E4M3's exponents as its bytes have them, 0 for subnormals. Scales of other formats beyond count at the ends.
    exponent = (values.view(torch.int32) >> 23).sub_(127 - 7).clamp_(0, 15).to(torch.uint8)
    values = values.double()
    return {
        "mean": values.mean(),
        "min": values.amin(),
        "max": values.amax(),
        "zeros": (scale == 0).double().mean(),
        "histogram": _count(exponent, 16),
    }


def _count(small: Tensor, bins: int) -> Tensor:
    """Count how often each of 0 .. bins - 1 occurs in a tensor of uint8 that holds nothing else."""
    if small.device.type == "cpu":  # another device would be asked for sizes, and so be waited for
        return torch.bincount(small.flatten(), minlength=bins)
    return histogram(small.float(), bins, -0.5, bins - 0.5)


def histogram(v: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Return torch.histc's counts of finite values, by what is fastest and allowed.

    CUDA refuses histc under torch.use_deterministic_algorithms.
    """
    if v.device.type == "cpu":
        return _count(_bin(v, bins, low, high), bins + 2)[1:-1]
    if v.is_cuda and torch.are_deterministic_algorithms_enabled():
        return histogram_by_comparison(v, bins, low, high)
    return torch.histc(v, bins, low, high)


def histogram_by_comparison(v: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Return torch.histc's counts of finite values without atomic additions; the last bin holds its upper end."""
    numbers = torch.arange(1, bins + 1, device=v.device)
    return (_bin(v, bins, low, high).flatten().unsqueeze(-1) == numbers).sum(0).float()


def _bin(v: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Return the number of each value's bin (uint8), from 1 on; 0 for what lies below all bins, and bins + 1 above."""
    # As in histc, the upper end itself is counted into the last bin.
    index = (v - low).mul_(bins / (high - low)).floor_().clamp_(-1, bins - 1).add_(1).to(torch.uint8)
    return index.add_((v > high).to(torch.uint8))


def flips(now: Tensor, before: Tensor, earlier: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Count the packed codes that differ from `before`, and those of them that are again as in `earlier`; -0 is 0."""
    now = _signless_zeros(now)
    other = now ^ _signless_zeros(before)  # of each byte's two codes, the bits that differ
    old = None if earlier is None else now ^ _signless_zeros(earlier)
    changed, back = other.new_zeros((), dtype=torch.int64), other.new_zeros((), dtype=torch.int64)
    for code in (0x0F, 0xF0):
        differs = (other & code) != 0
        changed += differs.count_nonzero()
        if old is not None:
            back += (differs & ((old & code) == 0)).count_nonzero()
    return changed, None if old is None else back


def _signless_zeros(data: Tensor) -> Tensor:
    """Return packed codes with 0 in place of each 8, which is -0."""
    codes = formats.unpack_nibbles(torch.arange(256, dtype=torch.uint8).unsqueeze(-1))  # [256, 2]: of every byte
    table = formats.pack_nibbles(torch.where(codes == 8, 0, codes)).flatten().to(data.device)
    return table.index_select(0, data.flatten().int())


def fetch(record: Any) -> Any:
    """Return nested dicts with numbers, or lists of numbers, in place of tensors, after one copy from each device."""
    found = list(_tensors(record))
    values: dict[int, Any] = {}
    for device in {tensor.device for tensor in found}:
        here = [tensor for tensor in found if tensor.device == device]
        # One copy: each .item() would wait for the GPU, and a sampled step has thousands of numbers. float64 first, so
        # that torch makes all of them float64.
        first = torch.empty(0, dtype=torch.float64, device=device)
        flat = torch.cat([first, *(tensor.detach().reshape(-1) for tensor in here)]).tolist()
        # Counts were made floats to travel with the rest; beyond 2^53 a float is no exact count any more.
        flat = [int(value) if value.is_integer() and abs(value) < 2**53 else value for value in flat]
        end = 0
        for tensor in here:
            begin, end = end, end + tensor.numel()
            values[id(tensor)] = flat[begin] if tensor.dim() == 0 else flat[begin:end]
    return _filled(record, values)


# Not torch's pytree, which takes 0.1 s for a record of thousands of tensors.
def _tensors(record: Any) -> Iterator[Tensor]:
    if isinstance(record, dict):
        for item in record.values():
            yield from _tensors(item)
    elif isinstance(record, Tensor):
        yield record


def _filled(record: Any, values: dict[int, Any]) -> Any:
    if isinstance(record, dict):
        return {key: _filled(item, values) for key, item in record.items()}
    return values[id(record)] if isinstance(record, Tensor) else record
