"""Fold batch norms into the convolutions or linear layers before them, ahead of quantization.

    y = gamma (W x + b - mean) / sqrt(var + eps) + beta    =    W' x + b'

Pairs are found in the graphs that torch.fx traces of each module's own forward. A pair is folded if nothing else reads
the layer's result and both modules are called once. Norms of other libraries are folded if they run torch's norm and
then children, as timm's BatchNormAct2d does. Modules that cannot be traced, other norms, norms without running
statistics, modules with hooks and shared modules stay as they are: an unfolded norm is correct, too.

A graph does not show how a model uses its parts (it may read the fourth layer of a Sequential, or a layer's weight).
Therefore the model runs twice unfolded and once folded. If folding changes its outputs, halves of the pairs are tried,
and the pairs that change them stay unfolded.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import fusion

from te_nvfp4_cv.errors import warn_once
from te_nvfp4_cv.export.folding import NORMS, FoldedNorm, tail_of_batch_norm
from te_nvfp4_cv.export.ptq.drift import tensors_of
from te_nvfp4_cv.fusion.children import child_of, hooks
from te_nvfp4_cv.fusion.stand_ins import Untraceable
from te_nvfp4_cv.fusion.trace import trace
from te_nvfp4_cv.nn.base import OPS

UNEVEN = 16.0  # times the median: the largest factor of a norm that makes rows of very different size


class Folded(NamedTuple):
    """A batch norm that was folded, the layer's name, and the parameters that the layer had before."""

    norm_name: str
    layer_name: str
    norm: Any
    weight: nn.Parameter
    bias: nn.Parameter | None

    def undo(self, model: nn.Module) -> None:
        """Give the layer its parameters again, and the norm its place."""
        layer: Any = model.get_submodule(self.layer_name)
        layer.weight, layer.bias = self.weight, self.bias
        model.set_submodule(self.norm_name, self.norm)

    def normed(self, x: Tensor) -> Tensor:
        """Return what the norm makes of the layer's result, without children that it may call afterwards."""
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)

    @property
    def uneven(self) -> bool:
        """True if the norm multiplies some channel by much more than most others."""
        factors = (self.norm.running_var + self.norm.eps).rsqrt()
        factors = (factors if self.norm.weight is None else factors * self.norm.weight.detach()).abs()
        return bool(factors.amax() > UNEVEN * factors.median())


def fold(model: nn.Module, run: Callable[[], Any]) -> list[Folded]:
    """Fold the batch norms of a model in eval mode, in place, except pairs that would change its outputs.

    Args:
        model: not fused by nv.fuse: of a fused forward no graph can be made.
        run: runs the model over real input, without gradients, and returns its outputs.
    Returns:
        The pairs that are folded.
    """
    pairs = find(model)
    if not pairs:
        return []
    expected = [t.clone() for t in tensors_of(run())]  # a model may return a buffer that it writes anew each time
    if not _same(run(), expected):
        warn_once(
            "folding",
            "nv.export.quantize: batch norms are not folded: the model gives other outputs each time in eval mode, or "
            "nothing that can be compared (no tensors, or empty ones, on the first images).",
        )
        return []
    return _put_folded(model, _harmless(model, list(pairs.items()), run, expected))


def _harmless(
    model: nn.Module, pairs: list[tuple[str, str]], run: Callable[[], Any], expected: Any
) -> list[tuple[str, str]]:
    """Return the pairs that leave the outputs as they are; a set of pairs that does not is halved and tried again."""
    # Undone in any case: `fold` puts the harmless pairs in at once, at the end.
    folded = _put_folded(model, pairs)
    try:
        same = _same(run(), expected)
    except Exception:  # code that reads the norm itself: FoldedNorm has none of its attributes
        same = False
    finally:
        for pair in reversed(folded):
            pair.undo(model)
    if same:
        return pairs
    half = len(pairs) // 2
    if not half:
        return []
    return [pair for part in (pairs[:half], pairs[half:]) for pair in _harmless(model, part, run, expected)]


def _put_folded(model: nn.Module, pairs: list[tuple[str, str]]) -> list[Folded]:
    """Fold these pairs, in place."""
    folded = []
    for norm_name, layer_name in pairs:
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        folded.append(Folded(norm_name, layer_name, norm, layer.weight, layer.bias))
        layer.weight, layer.bias = _fused(layer, norm)
        model.set_submodule(norm_name, FoldedNorm(layer, norm))
    return folded


def _same(ours: Any, expected: list[Tensor]) -> bool:
    """Tell whether outputs agree up to rounding. Outputs without any value cannot be compared, and do not agree."""
    found = list(tensors_of(ours))
    if len(found) != len(expected) or not any(t.numel() for t in expected):
        return False
    return all(_close(a, b) for a, b in zip(found, expected, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    full = b.dtype in (torch.float32, torch.float64)
    # These limits are above the effect of rounding (of TF32, on a GPU) and far below that of a norm too many.
    noise = (1e-3 if b.device.type == "cpu" else 1e-2) if full else 0.1
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not b.numel():
        return True
    if b.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not b.is_floating_point():  # classes and masks, which may flip where two scores are nearly equal
        return bool((a != b).float().mean() <= 1e-2)
    finite = torch.isfinite(b)
    # Infinities must be at the same places; nan_to_num(7.0) makes NaN equal to NaN.
    if not torch.equal(a.masked_fill(finite, 0).nan_to_num(7.0), b.masked_fill(finite, 0).nan_to_num(7.0)):
        return False
    a, b = a[finite].double(), b[finite].double()
    # Of the whole tensor, since single values near 0 have no relative error to speak of.
    return bool((a - b).norm() <= noise * b.norm())


def find(model: nn.Module) -> dict[str, str]:
    """Find the pairs that can be folded. Returns the name of each norm's layer by the norm's name."""
    # A module under two names is used in two places, and a norm folded for one of them would be wrong in the other.
    known = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    pairs: dict[str, str] = {}
    for name, module in model.named_modules():
        if not any(isinstance(child, NORMS) for child in module.children()):
            continue
        try:
            # Module by module, not the whole model: a branch in its forward then hides only its own pairs.
            graph = trace(module).evaluation
        except Untraceable:
            continue
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            layer_node = _layer_before(module, node)
            if layer_node is None:
                continue
            targets = (str(node.target), str(layer_node.target))
            if all(calls[t] == 1 and known[id(child_of(module, t))] == 1 for t in targets):
                prefix = f"{name}." if name else ""
                pairs[prefix + targets[0]] = prefix + targets[1]
    return pairs


def _layer_before(module: nn.Module, node: fx.Node) -> fx.Node | None:
    """If the node is a call of a batch norm, return the call of the layer that it can be folded into, else None."""
    norm: Any = child_of(module, str(node.target)) if node.op == "call_module" else None
    if not isinstance(norm, NORMS) or norm.running_mean is None or norm.running_var is None or _hooked(norm):
        return None
    before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    # The norm must be the only reader: others would see the folded result.
    if not isinstance(before, fx.Node) or before.op != "call_module" or list(before.users) != [node]:
        return None
    layer: Any = child_of(module, str(before.target))
    if type(layer) not in OPS or _hooked(layer) or "weight" not in layer._parameters:
        return None
    width = norm.num_features
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    # torch's fusion scales axis 1 of a transposed convolution's weight, which holds the outputs of one group only.
    unclear = getattr(layer, "transposed", False) and layer.groups > 1
    # Last, because it takes longest. A subclass may compute something else than torch's norm.
    return before if out == width and not unclear and tail_of_batch_norm(norm) is not None else None


def _hooked(module: nn.Module) -> bool:
    return bool(hooks(module)) or nn.utils.parametrize.is_parametrized(module)


def _fused(layer: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the layer's weight and bias with the norm multiplied in."""
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    fuse: Any = fusion.fuse_linear_bn_weights
    if not isinstance(layer, nn.Linear):
        fuse = functools.partial(fusion.fuse_conv_bn_weights, transpose=layer.transposed)
    with torch.no_grad():
        weight, bias = fuse(layer.weight, layer.bias, *statistics)
    # New Parameters: undoing puts the old ones in their place again.
    return nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
