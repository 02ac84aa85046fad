"""Batch norms that follow a convolution or linear layer, multiplied into it before it is quantized.

    y = gamma (W x + b - mean) / sqrt(var + eps) + beta    =    W' x + b'

Pairs are found in the graphs that torch.fx traces of each module's own forward, so a pair is folded where nothing else
reads the layer's result, and each of the two is called once. What cannot be traced, norms of other classes, norms
without running statistics, modules with hooks and shared modules stay as they are: unfolded is right too.

A graph does not say how a model calls its parts (it may read the fourth layer of a Sequential, or a layer's weight), so
the model runs, twice unfolded and once folded: where that changes what it gives, halves of the pairs are tried, and
those that change it are left alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import fusion
from torch.utils._pytree import tree_flatten

from te_nvfp4_cv.errors import value_error, warn_once
from te_nvfp4_cv.export.modules import CLASSES
from te_nvfp4_cv.fusion.trace import Untraceable, child_of, trace

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldedNorm(nn.Identity):
    """Stands where a batch norm was that is now part of `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # a list hides it from the module tree

    @property
    def layer(self) -> nn.Module:
        """Of which the norm is part."""
        return self._layer[0]

    def extra_repr(self) -> str:
        """The layer's class."""
        return f"in the {type(self.layer).__name__} before it"


def folded_norms(model: nn.Module, plain: Callable[[str], str]) -> dict[str, str]:
    """{name of a norm: name of its layer}, both by `plain`.

    Raises:
        ValueError: a norm whose layer is outside of the model.
    """
    names = {id(module): plain(name) for name, module in model.named_modules()}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FoldedNorm):
            if id(module.layer) not in names:
                raise value_error(
                    f"nv.export.save: the batch norm {name!r} is folded into a layer outside of the model.",
                    got="a part of a quantized network",
                    needs="the layer and its norm together",
                    fix="save the whole network, or quantize the part: nv.export.quantize(part, loader)",
                )
            found[plain(name)] = names[id(module.layer)]
    return found


def fold(model: nn.Module, run: Callable[[], Any]) -> dict[str, str]:
    """Fold every pair of a model in eval mode that leaves its outputs as they are, in place.

    Args:
        run: one pass of the model over real input, without gradients; gives its outputs.
    Returns:
        {name of the norm: name of its layer}.
    """
    pairs = find(model)
    if not pairs:
        return {}
    expected = [t.clone() for t in _tensors(run())]
    if not _same(run(), expected):
        warn_once(
            "folding",
            "nv.export.quantize: batch norms are not folded: the model gives other outputs each time in eval mode, or "
            "nothing that can be compared (no tensors, or empty ones, on the first images).",
        )
        return {}
    kept = _harmless(model, list(pairs.items()), run, expected)
    _put_folded(model, kept)
    return dict(kept)


def _harmless(
    model: nn.Module, pairs: list[tuple[str, str]], run: Callable[[], Any], expected: Any
) -> list[tuple[str, str]]:
    """The pairs that may be folded: all, or what halving them leaves."""
    undo = _put_folded(model, pairs)
    try:
        same = _same(run(), expected)
    except Exception:  # code that reads the norm itself: FoldedNorm has none of its attributes
        same = False
    for step in undo:
        step()
    if same:
        return pairs
    half = len(pairs) // 2
    if not half:
        return []
    return [pair for part in (pairs[:half], pairs[half:]) for pair in _harmless(model, part, run, expected)]


def _put_folded(model: nn.Module, pairs: list[tuple[str, str]]) -> list[Callable[[], None]]:
    """Fold these pairs; returns what undoes it."""
    undo: list[Callable[[], None]] = []
    for norm_name, layer_name in pairs:
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)

        def back(
            layer: Any = layer, old: Any = (layer.weight, layer.bias), name: str = norm_name, norm: Any = norm
        ) -> None:
            layer.weight, layer.bias = old
            put(model, name, norm)

        undo.append(back)
        layer.weight, layer.bias = _fused(layer, norm)
        put(model, norm_name, FoldedNorm(layer))
    return undo


def _same(ours: Any, expected: list[Tensor]) -> bool:
    """Whether outputs agree up to rounding; False where they hold nothing."""
    found = _tensors(ours)
    if len(found) != len(expected) or not any(t.numel() for t in expected):
        return False
    return all(_close(a, b) for a, b in zip(found, expected, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    full = b.dtype in (torch.float32, torch.float64)
    noise = (1e-3 if b.device.type == "cpu" else 1e-2) if full else 0.1  # more than rounding gives, in TF32 on a GPU
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not b.numel():
        return True
    if b.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not b.is_floating_point():
        return bool((a != b).float().mean() <= 1e-2)
    finite = torch.isfinite(b)
    if not torch.equal(a.masked_fill(finite, 0).nan_to_num(7.0), b.masked_fill(finite, 0).nan_to_num(7.0)):
        return False
    a, b = a[finite].double(), b[finite].double()
    return bool((a - b).norm() <= noise * b.norm())


def _tensors(outputs: Any) -> list[Tensor]:
    leaves, _ = tree_flatten(outputs)
    found = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def find(model: nn.Module) -> dict[str, str]:
    """The pairs that can be folded."""
    known = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    pairs: dict[str, str] = {}
    for name, module in model.named_modules():
        if not any(isinstance(child, NORMS) for child in module.children()):
            continue
        try:
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
    """The call of the layer whose result a call of a batch norm alone reads."""
    norm: Any = child_of(module, str(node.target)) if node.op == "call_module" else None
    if type(norm) not in NORMS or norm.running_mean is None or norm.running_var is None or _hooked(norm):
        return None
    before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(before, fx.Node) or before.op != "call_module" or list(before.users) != [node]:
        return None
    layer: Any = child_of(module, str(before.target))
    if type(layer) not in CLASSES or _hooked(layer) or "weight" not in layer._parameters:
        return None
    width = norm.num_features
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    unclear = getattr(layer, "transposed", False) and layer.groups > 1  # its weight's axis 1 holds one group's outputs
    return before if out == width and not unclear else None


def _hooked(module: nn.Module) -> bool:
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or nn.utils.parametrize.is_parametrized(module)


def _fused(layer: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    weight: Tensor
    bias: Tensor
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            weight, bias = fusion.fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
        else:
            transposed = bool(getattr(layer, "transposed", False))
            weight, bias = fusion.fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transpose=transposed)
    return nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
