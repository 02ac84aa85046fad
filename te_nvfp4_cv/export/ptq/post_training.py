"""Turn a network that was trained in high precision into an NVFP4 inference model without training: nv.export.quantize.

    copy -> fold batch norms -> calibrate -> round weights -> run both side by side -> correct biases -> leave the worst
    layers in high precision, if asked for -> match biases and the other batch norms -> report the drift

Each 16 values of a weight get a scale (1x16). The 16x16 tiles of training are needed only where the backward pass reads
the same codes transposed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from te_nvfp4_cv.context.context_manager import outside_of_contexts
from te_nvfp4_cv.errors import check_batches, check_choice, check_module, value_error
from te_nvfp4_cv.export import attention, matrix
from te_nvfp4_cv.export.codes import Codes, is_transposed, quantize_layer
from te_nvfp4_cv.export.computed import settle
from te_nvfp4_cv.export.copies import copy_of
from te_nvfp4_cv.export.fit import sort_layers, stay_high
from te_nvfp4_cv.export.inner import install
from te_nvfp4_cv.export.left_high import warn_of_high
from te_nvfp4_cv.export.modules import ACTIVATIONS, WEIGHTS, InferenceLayer, become
from te_nvfp4_cv.export.ptq import rounding
from te_nvfp4_cv.export.ptq.calibration import Images, Statistics, call, collect, input_of
from te_nvfp4_cv.export.ptq.matching import put_matched
from te_nvfp4_cv.export.ptq.norm_folding import Folded, fold
from te_nvfp4_cv.export.ptq.twins import (
    Watched,
    before_folding,
    choose_foldings,
    drift_of,
    leave_high,
    run_beside,
    shift_of,
    shifted_statistics,
    twin_of,
    wants_shift,
)
from te_nvfp4_cv.export.ranks import gathered
from te_nvfp4_cv.fusion.fuse import unfuse
from te_nvfp4_cv.layer.check import checked_recipe
from te_nvfp4_cv.layer.plan import weight_plan
from te_nvfp4_cv.nn.modules import Experts
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.fields import check_nvfp4
from te_nvfp4_cv.report.budget import check_share

SCALES = ("static", "dynamic")


@outside_of_contexts()  # what it compares with is in high precision
def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    recipe: Any = None,
    *,
    method: str = "search",
    scales: str = "static",
    activations: str = "nvfp4",
    weights: str = "packed",
    fold_bn: bool = True,
    bias_correction: bool = True,
    shift: bool = True,
    auto_high: float | None = None,
    reestimate_bn: bool = True,
    batches: int | None = 16,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Quantize a trained network to NVFP4, with some images and no training.

    Args:
        model: the network, which is not changed: a copy is returned. One that nv.tensor_parallel has shared out is
            gathered; call this on every rank then.
        loader: calibration images: tensors, or tuples and lists whose first element is the model's input. It is read
            several times. The model is called with one argument; it may be a dict, if the model takes one.
        recipe: decides which layers run in NVFP4 (its [precision] table; a sensitivity scan suggests one) and how
            activations are quantized. If None, the default recipe is used. Entries of nv.set_precision take
            precedence.
        method: how weights are rounded: "nearest", "4over6", "search" or "gptq" (rounding.py). Layers of another block
            format than NVFP4 take "nearest" only.
        scales: "static" gives activations the amax of the calibration images, and larger values saturate; "dynamic"
            quantizes each tensor with its own amax. Other block formats than NVFP4 have no amax.
        activations: "nvfp4" or "high", as InferenceLayer.set_mode takes it.
        weights: "packed" or "cached", as InferenceLayer.set_mode takes it.
        fold_bn: first multiply batch norms into the layers before them. Where a norm multiplies some channel by much
            more than the others, the pair is measured folded and not, and the better way is taken.
        bias_correction: subtract the mean error of each output channel from the layer's bias, if it has one, behind
            layers that are quantized and corrected already. Biases stay as they were where the model's outputs are
            better so.
        shift: subtract the mean of each input channel before x is quantized, in layers where that is measured to
            help: y = W (x - m) + W m, exactly.
        auto_high: leave the layers in high precision whose quantization changes the outputs most, up to this share of
            the FLOPs. They are measured, each layer alone on the first images. Layers inside of modules with a
            forward of their own (attention) are not tried.
        reestimate_bn: move the statistics of the remaining batch norms by what quantization moves their inputs; of a
            norm that was measured to be better unfolded, only the bias moves.
        batches: how many batches of the loader are read each time; None for all.
        device: where batches are moved to. If None, they stay where they are.
    Returns:
        An inference model in eval mode, without gradients, to use or for nv.export.save and nv.export.to_onnx. Its
        attribute `nvfp4_drift` is a nv.export.Drift: what quantization changes, in each layer and in the outputs. A
        warning says so if the outputs change much.
    Raises:
        TypeError: An argument is of another kind, or the model does not take what the loader gives.
        ValueError: An argument has another value, the loader has no batches or can be read only once, or the input of
            a layer is not finite.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
        >>> quantized = nv.export.quantize(net, [torch.randn(2, 3, 16, 16)])
        >>> type(quantized[3]).__name__, type(quantized[1]).__name__
        ('InferenceConv2d', 'FoldedNorm')
    """
    check_module("nv.export.quantize", model, "nv.export.quantize(model, loader, recipe)")
    for name, value, allowed in (
        ("method", method, rounding.METHODS),
        ("scales", scales, SCALES),
        ("activations", activations, ACTIVATIONS),
        ("weights", weights, WEIGHTS),
    ):
        check_choice("nv.export.quantize", name, value, allowed)
    resolved = checked_recipe(recipe)
    budget = 0.0 if auto_high is None else check_share("nv.export.quantize", "auto_high", auto_high)
    check_batches("nv.export.quantize", loader)
    # An iterator would be empty for the second pass, and calibration silently without images.
    if isinstance(loader, Iterator):
        raise value_error(
            "nv.export.quantize: the loader can be read once only.", got=type(loader).__name__,
            needs="a list or a DataLoader: calibration reads it several times", fix="list(loader)",
        )
    net = copy_of("nv.export.quantize", gathered(model)[0]).eval()
    attention.note_calls(net, lambda: [call(net, input_of(batch, device)) for batch in itertools.islice(loader, 1)])
    attention.separate(net, resolved)
    found_layers = sort_layers(net, resolved)
    warn_of_high("nv.export.quantize", found_layers.quantized, found_layers.high, found_layers.lost)
    for module, _ in found_layers.quantized.values():
        settle(module)  # a kernel that torch computes becomes the Parameter that folding and rounding read
    folded: dict[str, Folded] = {}
    if fold_bn:
        unfuse(net)
        for batch in itertools.islice(loader, 1):
            with torch.no_grad():
                # One batch is enough to see whether folding changes the outputs.
                pairs = fold(net, functools.partial(call, net, input_of(batch, device)))
                folded = {pair.layer_name: pair for pair in pairs if pair.uneven}
    inner = found_layers.inner
    install(inner.values())
    layers = found_layers.quantized
    # Layers in NVFP4 already keep their codes.
    layers = {name: pair for name, pair in layers.items() if not isinstance(pair[0], InferenceLayer)}
    of_experts = {name: layers.pop(name) for name, pair in list(layers.items()) if isinstance(pair[0], Experts)}
    for name, (_, own) in layers.items():
        if method != "nearest":
            needs, fix = "NVFP4, whose scales these methods choose among", "method='nearest'"
            check_nvfp4(f"nv.export.quantize(method={method!r}): the layer {name!r}", own.block_format, needs, fix)
    watched = {name: module for name, (module, _) in layers.items()}
    images = Images(loader, batches, device)
    # One pass over the unquantized model for all layers: quantization below then changes no statistics.
    found = collect(net, watched, images, method == "gptq")
    twins: dict[str, Watched] = {}
    unfolded: dict[str, Watched] = {}
    for name, (module, own) in layers.items():
        how = _for_weights(own, method), method, found.get(name), scales, shift and name not in inner
        twins[name] = Watched(module, _twins(module, *how), name in inner)
        if name in folded:
            before = _twins(before_folding(module, folded[name]), *how)
            unfolded[name] = Watched(module, before, False, folded[name])
    both = [*twins.values(), *unfolded.values()]
    for twin in (twin for watch in both for twin in watch.twins):
        twin.set_mode(weights, activations)
    expected = run_beside(net, both, images)
    for watch in both:
        watch.correct(bias_correction)
    choose_foldings(net, twins, unfolded, images)
    high = leave_high(net, twins, images, budget)
    taken = [watch for name, watch in twins.items() if name not in high]
    put_matched(net, taken, images, bias_correction, reestimate_bn)
    for module, own in of_experts.values():  # to nearest, with the amax of each call
        become(module, quantize_layer(module, own), own).set_mode(weights, activations)
    stay_high(net, found_layers.high)
    net = net.eval().requires_grad_(False)
    net.nvfp4_drift = drift = drift_of(net, twins, images, expected, high)  # type: ignore[assignment]
    drift.warn()
    return net


def _twins(
    module: nn.Module, recipe: NVFP4BlockScaling, method: str, found: Statistics | None, scales: str, shift: bool
) -> list[InferenceLayer]:
    """Return the forms of a layer in NVFP4 among which its errors decide."""
    statistics = [found]
    if shift and found is not None and wants_shift(module, found, recipe):
        statistics.append(shifted_statistics(module, found))
    made = []
    for seen in statistics:
        codes = _codes(module, recipe, method, seen)
        calibrated = seen is not None and bool(seen.amax > 0)  # zeros alone say nothing of other images
        # Row-scaled activations have one scale per pixel, and other block formats no tensor scale.
        tensor_scale = not recipe.row_scaled_activation and recipe.block_format == "nvfp4"
        if seen is not None and calibrated and scales == "static" and tensor_scale:
            codes = replace(codes, input_amax=seen.amax)
        if found is not None and seen is not found:
            codes = replace(codes, shift=shift_of(module, found.center))
        made.append(twin_of(module, codes, recipe))
    return made


def _for_weights(recipe: NVFP4BlockScaling, method: str) -> NVFP4BlockScaling:
    """Change a recipe to 1x16 weights, and to 4over6 weights if, and only if, the method is "4over6"."""
    scope = recipe.nvfp4_4over6
    if method == "4over6":
        scope = "all" if scope in ("activations", "all") else "weights"
    elif scope in ("weights", "all"):
        scope = "activations" if scope == "all" else "none"
    # "current": no delayed scale was trained, as the network comes from high precision.
    return replace(recipe, disable_2d_quantization=True, nvfp4_4over6=scope, tensor_scale="current", precision=())


def _codes(module: Any, recipe: NVFP4BlockScaling, method: str, statistics: Statistics | None) -> Codes:
    """Round a layer's weight by one of the methods; a layer that did not run has no statistics."""
    nearest = quantize_layer(module, recipe)
    if method in ("nearest", "4over6"):
        return nearest
    groups = getattr(module, "groups", 1)
    plan = weight_plan(module.weight.shape, groups, is_transposed(module), recipe, "reference")
    # "reference": the plan serves only for shapes here, which no backend changes.
    w = matrix.of_weight(module.weight.detach().float(), plan).unflatten(0, (groups, -1))  # [G, N / G, K]
    e4m3_max = recipe.settings("weight").e4m3_max
    parts = []
    for group in range(groups):
        gram = None if statistics is None or statistics.gram is None else statistics.gram[group]
        # With an importance of 0, any scale would be as good as another.
        importance = None if statistics is None else statistics.square[group].clamp(min=1e-12)
        parts.append(rounding.quantize_matrix(w[group], nearest.amax, gram, importance, e4m3_max))
    data, scale = (torch.cat(sides) for sides in zip(*parts, strict=True))
    return Codes(*matrix.from_matrix(data, scale, plan), nearest.amax)
