"""Match the means of a quantized network to those of the network in high precision, layer after layer as they run.

    layer in NVFP4, y    bias -= E[y_q] - E[y]
    batch norm of x      mean += E[x_q] - E[x];    var + eps is multiplied by (V[x_q] + eps) / (V[x] + eps),
                         within 1/4 and 4: a channel that these images leave at zero says little of others

E and V are mean and variance of a channel over calibration images, the same ones in both networks: in what these images
differ from those of training is in both, and moves no trained statistic. Each batch runs in high precision, then
quantized, and what was found so far is applied at once, so that a layer is matched behind others that are matched
already. This takes away also what errors of earlier layers become behind a ReLU or a maximum, where they have a mean.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import AnyBatchNorm
from te_nvfp4_cv.export.ptq.calibration import by_channel, call
from te_nvfp4_cv.export.ptq.drift import compare, kept, tensors_of

if TYPE_CHECKING:
    from te_nvfp4_cv.export.ptq.twins import Watched

HIGH, CORRECTED, PLAIN = "high precision", "with corrected biases", "with biases as they were"
MOST = 4.0  # a norm's variance moves by no larger factor


class _Moments:
    """Mean and variance of each channel, fp64 [C], over all values that were added."""

    def __init__(self) -> None:
        self.count, self.sums = 0, torch.zeros(2, 1, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add values [count, C]."""
        values = values.double()
        self.sums = self.sums.to(values.device) + torch.stack([values.sum(0), values.square().sum(0)])
        self.count += len(values)

    @property
    def mean(self) -> Tensor:
        """Return the means."""
        return self.sums[0] / self.count

    @property
    def variance(self) -> Tensor:
        """Return the variances."""
        return (self.sums[1] / self.count - self.mean.square()).clamp(min=0)


class _Bias:
    """Moves the bias of a layer, or of the norm behind it that is not folded, by what its mean output has moved."""

    def __init__(self, watch: Watched, bias: Tensor) -> None:
        self.watch, self.pair = watch, watch.pair
        self.bias, self.before = bias, bias.detach().clone()
        self.high, self.quantized = _Moments(), _Moments()
        self.phase = HIGH

    def see(self, layer: nn.Module, args: Any, y: Tensor) -> None:
        """Add an output in high precision: a forward hook."""
        self.high.add(by_channel(layer, y.detach()))

    def match(self, layer: Any, args: Any, y: Tensor) -> Tensor | None:
        """Add an output of the layer in NVFP4, and match it: a forward hook."""
        if self.phase != CORRECTED or not y.numel() or not self.high.count:
            return None
        # What was found so far is in the bias already; it is added up as if it were not.
        known = self.bias - self.before
        self.quantized.add(by_channel(layer, y if self.pair is None else self.pair.normed(y)) - known)
        self._move()
        if self.pair is not None:  # the norm comes only now, and reads its bias; the layer has read it before
            return None
        axes_behind = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        return y + (self.bias - self.before - known).to(y).reshape(-1, *(1,) * axes_behind)

    def begin(self, phase: str) -> None:
        """Set the bias for a pass of the model."""
        self.phase = phase
        self.bias.data.copy_(self.before if self.watch.correction is None else self.before + self.watch.correction)
        if phase == CORRECTED:
            self._move()

    def _move(self) -> None:
        moved = self.quantized.mean - self.high.mean if self.quantized.count else 0.0
        self.bias.data.copy_(self.before - moved)


class _InnerBias:
    """Moves the bias of a module with a forward of its own (attention) by the error of the layer inside.

    Both networks have this bias: in high precision it is as it was.
    """

    def __init__(self, watch: Watched, bias: Tensor) -> None:
        self.watch, self.bias, self.before = watch, bias, bias.detach().clone()

    def begin(self, phase: str) -> None:
        """Set the bias for a pass of the model."""
        assert self.watch.correction is not None
        self.bias.data.copy_(self.before - self.watch.correction if phase == CORRECTED else self.before)


class _Norm:
    """Moves the statistics of a batch norm by what those of its input have moved."""

    def __init__(self, norm: Any) -> None:
        self.norm, self.before = norm, (norm.running_mean.clone(), norm.running_var.clone())
        self.seen = {phase: _Moments() for phase in (HIGH, CORRECTED, PLAIN)}
        self.phase = HIGH

    def __call__(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add an input, and set the statistics for it: a forward pre-hook."""
        x: Any = args[0] if args else kwargs.get("input", kwargs.get("z"))  # nn.BatchNorm's word, BatchNormAct's
        if x.numel():
            self.seen[self.phase].add(x.detach().movedim(1, -1).flatten(0, -2))
        self.begin(self.phase)

    def begin(self, phase: str) -> None:
        """Set the statistics for a pass of the model."""
        self.phase, (mean, var), eps = phase, self.before, self.norm.eps
        high, found = self.seen[HIGH], self.seen[phase]
        if phase != HIGH and high.count and found.count:
            mean = mean + (found.mean - high.mean)
            factor = ((found.variance + eps) / (high.variance + eps)).clamp(1 / MOST, MOST)
            var = ((var + eps) * factor - eps).clamp(min=0)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(var)


@torch.no_grad()
def put_matched(net: nn.Module, taken: Collection[Watched], images: Iterable[Any], biases: bool, norms: bool) -> None:
    """Put twins into a model that is in high precision, and match it to what it was.

    Args:
        taken: whose twins go into the model.
        images: the model's inputs.
        biases: match biases of layers in NVFP4, unless the model's outputs are better as they are.
        norms: match statistics of batch norms.
    """
    kept_norms: list[Any] = [m for m in net.modules() if isinstance(m, AnyBatchNorm)] if norms else []
    of_norms = [_Norm(norm) for norm in kept_norms if norm.running_mean is not None]
    watches = [watch for watch in taken if biases and watch.ran]
    of_biases = [_Bias(watch, watch.bias) for watch in watches if watch.bias is not None and not watch.inner]
    inner = [_InnerBias(watch, watch.bias) for watch in watches if watch.bias is not None and watch.inner]
    matched: list[_Norm | _Bias | _InnerBias] = [*of_norms, *of_biases, *inner]

    def exchange() -> None:
        for watch in taken:
            watch.put(net)

    with ExitStack() as stack:
        for of_norm in of_norms:
            stack.callback(of_norm.norm.register_forward_pre_hook(of_norm, with_kwargs=True).remove)
        # Modules that change places take their hooks along: of these two, each sees one of the two networks.
        for of_bias in of_biases:
            stack.callback(of_bias.watch.layer.register_forward_hook(of_bias.see).remove)
        exchange()
        for of_bias in of_biases:
            stack.callback(of_bias.watch.layer.register_forward_hook(of_bias.match).remove)
        if not matched:
            return
        noise = dict.fromkeys((CORRECTED, PLAIN) if of_biases or inner else (PLAIN,), 0.0)
        for batch in images:
            exchange()
            _begin(matched, HIGH)
            expected = kept(call(net, batch))
            exchange()
            found = {}
            for phase in noise:
                _begin(matched, phase)
                found[phase] = compare(tensors_of(call(net, batch)), expected)[0]
            if not any(map(math.isnan, found.values())):  # else one of them cannot be compared
                for phase, sqnr in found.items():
                    noise[phase] += 10 ** (-sqnr / 10)
        best = min(noise, key=noise.__getitem__)  # the first of equal ones: outputs that cannot be compared
        _begin(matched, best)
        for watch in watches if best == PLAIN else ():
            watch.correction = None


def _begin(matched: Iterable[_Norm | _Bias | _InnerBias], phase: str) -> None:
    for one in matched:
        one.begin(phase)
