"""Run a model with the twins of its layers: for their errors, for the layers that cost most, for the report."""

from __future__ import annotations

import glob
import itertools
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from te_nvfp4_cv.export.ptq.calibration import Images, watching
from te_nvfp4_cv.export.ptq.drift import Drift, LayerDrift, compare
from te_nvfp4_cv.export.ptq.norm_folding import tensors_of
from te_nvfp4_cv.export.ptq.twins import Watched, exchange
from te_nvfp4_cv.nn.precision import set_precision
from te_nvfp4_cv.report.budget import worst_within

OBSERVED = 4  # batches of the calibration: means of errors need fewer images than extreme values


def run_beside(net: nn.Module, twins: Mapping[str, Watched], images: Images) -> list[list[Tensor]]:
    """Show every layer's input to its twins. Returns the model's outputs, for each batch that the report is about."""
    expected: list[list[Tensor]] = []
    with watching(twins.values()):
        for batch in itertools.islice(images, OBSERVED):
            outputs = net(batch)
            if not images.held:
                expected.append(_kept(outputs))
        for watch in twins.values():
            watch.measuring = True
        expected += [_kept(net(batch)) for batch in images.held]
    return expected


def _kept(outputs: object) -> list[Tensor]:
    return [t.detach().clone() for t in tensors_of(outputs)]  # a model may return a buffer that it writes anew


@torch.no_grad()
def leave_high(net: nn.Module, twins: Mapping[str, Watched], images: Images, budget: float) -> set[str]:
    """Leave the layers in high precision whose quantization alone changes the outputs most. Returns their names.

    Args:
        budget: the share of the FLOPs that they may have together.
    """
    names = [name for name, watch in twins.items() if watch.ran and not watch.inner]
    if not budget or not names:
        return set()
    costs = [twins[name].flops for name in names]
    batch = next(iter(images))
    expected = _kept(net(batch))
    scores = []
    for name in names:
        with ExitStack() as stack:
            pair = twins[name].layer, twins[name].twin
            exchange(*pair)
            stack.callback(exchange, *pair)
            sqnr = compare(tensors_of(net(batch)), expected)[0]
        # Noise beside the signal: 0 without any; NaN, an output that cannot be compared, says nothing of the layer.
        scores.append(0.0 if math.isnan(sqnr) else 10 ** (-sqnr / 10))
    total = sum(watch.flops for watch in twins.values())
    chosen = {names[index] for index in worst_within(scores, costs, budget * total)}
    if chosen:  # nv.export.save would quantize them otherwise
        set_precision(net, {glob.escape(name): None for name in chosen})
    return chosen


@torch.no_grad()
def drift_of(
    net: nn.Module, twins: Mapping[str, Watched], images: Images, expected: list[list[Tensor]], high: Collection[str]
) -> Drift:
    """Compare the outputs of the quantized model with `expected`, and report them with the layers' errors."""
    total = sum(watch.flops for watch in twins.values())
    rows = [
        LayerDrift(
            name, watch.sqnr_db(), watch.flops / total,
            "high" if name in high else "shifted" if watch.shifted else "nvfp4",
        )
        for name, watch in twins.items()
        if watch.ran
    ]
    rows.sort(key=lambda row: math.inf if math.isnan(row.sqnr_db) else row.sqnr_db)
    batches = images.held or itertools.islice(images, OBSERVED)
    # Batch by batch side by side: all tensors of the first place are compared, then those of the second.
    found = [_kept(net(batch)) for batch in batches]
    joined = (
        [torch.cat(place) if all(t.dim() for t in place) and len({t.shape[1:] for t in place}) == 1 else place[0]
         for place in zip(*outputs, strict=False)]
        for outputs in (found, expected)
    )
    sqnr, cosine, count = compare(*joined)
    return Drift(rows, sqnr, cosine, count, bool(images.held), tuple(sorted(high)))
