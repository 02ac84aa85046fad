"""Run layers in NVFP4 beside the same layers in high precision, and let what is seen decide how they are quantized.

A twin is a copy of a layer that shares its tensors and is then turned into an InferenceLayer. The model runs in high
precision; each layer's input also goes through its twins. Their errors give

    the correction of the bias    the mean error of each output channel, that of the activations' codes included;
                                  matching.py then adds what errors of earlier layers do
    the shift                     y = W (x - m) + W m, m: the mean of each channel of x. A twin with a shift is taken
                                  if it has less error. Tried where the means are large: sum m^2 > 4 sum of variances
    the folding of a norm         the layer before folding, with the norm behind it, is a second Watched; which of the
                                  two is taken, the model's outputs decide. Tried where the norm's factors are uneven
    the layers that cost most     left in high precision, if the caller allows a share of the FLOPs for it
    the report                    SQNR of each layer and of the model's outputs (drift.py)

At the end layer and twin change places, so that the model's objects stay those that its code holds.
"""

from __future__ import annotations

import copy
import glob
import itertools
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.export.codes import Codes, is_transposed
from te_nvfp4_cv.export.modules import InferenceLayer, become, zero_pads
from te_nvfp4_cv.export.ptq.calibration import Images, Statistics, by_channel, call, watching
from te_nvfp4_cv.export.ptq.drift import Drift, Errors, LayerDrift, compare, kept, tensors_of
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.nn.precision import set_precision
from te_nvfp4_cv.nn.walk import op_of
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.report.budget import worst_within
from te_nvfp4_cv.report.forward_pass import gemm_flops

if TYPE_CHECKING:
    from te_nvfp4_cv.export.ptq.norm_folding import Folded

LARGE_MEAN = 4.0  # times the variance. Behind a ReLU the square of the mean is about 1.8 times the variance
GAIN_DB = 1.0  # a shift must gain as much
OBSERVED = 4  # batches of the calibration: means of errors need fewer images than extreme values

# ---- one layer ------------------------------------------------------------------------------------------------------


def copied(module: nn.Module) -> Any:
    """Return a module like `module`, which stays as it is; they share tensors."""
    twin: Any = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # parameters, buffers, children, hooks: copy.copy shares these
            twin.__dict__[name] = value.copy()
    return twin


def before_folding(module: nn.Module, pair: Folded) -> nn.Module:
    """Return the layer as it was before the norm was folded into it."""
    layer = copied(module)
    layer.weight, layer.bias = pair.weight, pair.bias
    return layer  # type: ignore[no-any-return]


def twin_of(module: nn.Module, codes: Codes, recipe: NVFP4BlockScaling) -> InferenceLayer:
    """Return an inference layer like `module`, which stays as it is; they share tensors, but for the bias."""
    twin = copied(module)
    if (bias := twin._parameters.get("bias")) is not None:
        twin._parameters["bias"] = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return become(twin, codes, recipe)


def exchange(module: nn.Module, twin: nn.Module) -> None:
    """Let two modules change places, in every list and attribute that holds one of them."""
    own, other = module.__dict__, twin.__dict__
    kinds = type(module), type(twin)
    # In this order: a class may look into its instance when it is assigned.
    object.__setattr__(module, "__dict__", other)
    object.__setattr__(twin, "__dict__", own)
    module.__class__, twin.__class__ = kinds[1], kinds[0]


class Watched:
    """A layer, its twins, and what they do on the same input.

    Attributes:
        layer: the layer in the model, in high precision until it changes places with its twin.
        twin: the twin that is taken.
        flops: of all calls in high precision.
        inner: the layer lies inside of a module with a forward of its own, which adds the bias.
        pair: the norm that runs behind the twins, because they are those of the layer before it was folded; or None.
    """

    def __init__(self, layer: nn.Module, twins: list[InferenceLayer], inner: bool, pair: Folded | None = None) -> None:
        self.layer, self.inner, self.pair, self.flops = layer, inner, pair, 0
        self.twins, self.seen = twins, [(Errors(), Errors()) for _ in twins]
        self.measuring = self.shifted = False
        self.correction: Tensor | None = None
        self._folded: Any = None  # what stands in the norm's place while the layer is not the twin

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if not x.numel():
            return
        y = type(module).forward(module, *args, **kwargs)  # not module(...), whose hook this is
        self.flops += gemm_flops(op_of(module), x, module.weight.shape, y)
        for twin, errors in zip(self.twins, self.seen, strict=True):
            found = twin(*args, **kwargs)
            error = (found if self.pair is None else self.pair.normed(found)) - y
            errors[self.measuring].add(by_channel(module, error), by_channel(module, y))

    @property
    def best(self) -> int:
        """Return the index of the twin with the least error, the first if nothing was seen."""
        scores = [self._score(calibration) - GAIN_DB * (index > 0) for index, (calibration, _) in enumerate(self.seen)]
        return max(range(len(scores)), key=scores.__getitem__)

    def _score(self, errors: Errors) -> float:
        return errors.sqnr_db(errors.mean) if errors.count else 0.0

    @property
    def twin(self) -> InferenceLayer:
        """Return the twin that is taken."""
        return self.twins[self.best]

    @property
    def ran(self) -> bool:
        """Tell whether the layer was called."""
        return bool(self.seen[0][0].count)

    def correct(self, wanted: bool) -> None:
        """Subtract the mean error from the twin's own bias, if there is one; leave the twin that is taken alone."""
        index = self.best
        self.twins, self.seen = [self.twins[index]], [self.seen[index]]
        self.shifted = self.twin.shift is not None
        if self.inner:  # it has the bias of the module around it, which adds it in torch; ONNX files read the layer's
            self.twin._parameters["bias"] = self.layer._parameters["bias"]
        if wanted and self.bias is not None and self.ran:
            self.correction = self.seen[0][0].mean
            if not self.inner:  # whose bias the network in high precision has, too: matching.py moves it
                self.bias.data -= self.correction.to(self.bias)

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the twin, or that of the norm behind it: there the error is measured.

        None if it is computed at each call (torch's prune), which would lose what is subtracted from it.
        """
        owner: nn.Module = self.twin if self.pair is None else self.pair.norm
        return owner._parameters.get("bias")

    def put(self, net: nn.Module) -> None:
        """Let the layer and its twin change places in the model, or back again."""
        exchange(self.layer, self.twin)
        if self.pair is not None:
            now = net.get_submodule(self.pair.norm_name)
            self._folded = self._folded or now
            net.set_submodule(self.pair.norm_name, self._folded if now is self.pair.norm else self.pair.norm)

    @property
    def how(self) -> str:
        """Return how the layer runs, as the report says it."""
        return "unfolded" if self.pair is not None else "shifted" if self.shifted else "nvfp4"

    def sqnr_db(self) -> float:
        """Return the layer's SQNR, on the images that were held back if there are any."""
        calibration, held = self.seen[0]
        return (held if held.count else calibration).sqnr_db(self.correction)


def wants_shift(module: Any, statistics: Statistics, recipe: NVFP4BlockScaling) -> bool:
    """Tell whether a layer's input has means that are large beside its deviations, in a layer that can be shifted."""
    # A transposed convolution spreads x: a shift would not be a constant of the output. Row scales: one per pixel.
    if is_transposed(module) or recipe.row_scaled_activation:
        return False
    power = float(statistics.center.square().sum())
    mean, square = statistics.mean, statistics.square
    return power > 0 and float(mean.square().sum()) > LARGE_MEAN * float((square - mean.square()).clamp(min=0).sum())


def shifted_statistics(module: Any, found: Statistics) -> Statistics:
    """Return the statistics of x minus the mean of each of its channels."""
    center = found.center
    low, high = found.low - center, found.high - center
    if zero_pads(module, getattr(module, "padding", 0)):  # the padding's zeros are shifted, too
        low, high = torch.minimum(low, -center), torch.maximum(high, -center)
    groups, columns = found.mean.shape
    rows = center.unflatten(0, (groups, -1))
    rows = F.pad(rows, (0, -rows.shape[1] % BLOCK))
    rows = rows.repeat(1, columns // rows.shape[1])  # for each tap of the convolution kernel
    square = found.square - 2 * rows * found.mean + rows.square()
    gram = found.gram
    if gram is not None:
        cross = torch.einsum("gk,gl->gkl", found.mean, rows)
        gram = gram - cross - cross.transpose(1, 2) + torch.einsum("gk,gl->gkl", rows, rows)
    return replace(
        found, low=low, high=high, mean=found.mean - rows, square=square, gram=gram, center=torch.zeros_like(center)
    )


def shift_of(module: Any, center: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shift of a layer: the mean of each channel of x, and what the layer makes of it in fp32."""
    w = module.weight.detach().float()
    if isinstance(module, nn.Linear):
        return center, w @ center
    rows = center.reshape(module.groups, 1, -1).expand(-1, w.shape[0] // module.groups, -1).flatten(0, 1)
    return center, torch.einsum("oc,oc->o", w.flatten(2).sum(2), rows)


# ---- the model ------------------------------------------------------------------------------------------------------


def run_beside(net: nn.Module, watches: Collection[Watched], images: Images) -> list[list[Tensor]]:
    """Show every layer's input to its twins. Returns the model's outputs, for each batch that the report is about."""
    expected: list[list[Tensor]] = []
    with watching(watches):
        for batch in itertools.islice(images, OBSERVED):
            outputs = call(net, batch)
            if not images.held:
                expected.append(kept(outputs))
        for watch in watches:
            watch.measuring = True
        expected += [kept(call(net, batch)) for batch in images.held]
    return expected


def _alone(net: nn.Module, watch: Watched, batch: Any, expected: list[Tensor]) -> float:
    """Return the SQNR of the model's outputs, in dB, with one layer in NVFP4."""
    with ExitStack() as stack:
        watch.put(net)
        stack.callback(watch.put, net)
        return compare(tensors_of(call(net, batch)), expected)[0]


@torch.no_grad()
def choose_foldings(net: nn.Module, twins: dict[str, Watched], unfolded: Mapping[str, Watched], images: Images) -> None:
    """Take the twins of the layer before its norm was folded, where the model's outputs are better with them alone."""
    tried = [name for name, watch in unfolded.items() if watch.ran]
    if not tried:
        return
    batch = next(iter(images))
    expected = kept(call(net, batch))
    for name in tried:
        with_norm, folded = (_alone(net, watch, batch, expected) for watch in (unfolded[name], twins[name]))
        if with_norm > folded + GAIN_DB:
            twins[name] = unfolded[name]


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
    expected = kept(call(net, batch))
    # Noise beside the signal: 0 without any; NaN, an output that cannot be compared, says nothing of the layer.
    found = [_alone(net, twins[name], batch, expected) for name in names]
    scores = [0.0 if math.isnan(sqnr) else 10 ** (-sqnr / 10) for sqnr in found]
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
            "high" if name in high else watch.how,
        )
        for name, watch in twins.items()
        if watch.ran
    ]
    rows.sort(key=lambda row: math.inf if math.isnan(row.sqnr_db) else row.sqnr_db)
    batches = images.held or itertools.islice(images, OBSERVED)
    # Batch by batch side by side: all tensors of the first place are compared, then those of the second.
    found = [kept(call(net, batch)) for batch in batches]
    joined = (
        [torch.cat(place) if all(t.dim() for t in place) and len({t.shape[1:] for t in place}) == 1 else place[0]
         for place in zip(*outputs, strict=False)]
        for outputs in (found, expected)
    )
    sqnr, cosine, count = compare(*joined)
    return Drift(rows, sqnr, cosine, count, bool(images.held), tuple(sorted(high)))
