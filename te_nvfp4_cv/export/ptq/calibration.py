"""Measure each layer's input on calibration images: amax, moments and, if it is asked for, the im2col Gram matrix.

The model runs over the batches once, in high precision. Per layer, in fp32, over all batches:

    rows    the im2col rows of some output pixels, drawn anew for each batch: [rows, G, K] with K in matrix.py's order
    mean    sum of rows / number of rows                 [G, K]
    square  sum of row^2 / number of rows                [G, K]
    gram    sum of row^T row / number of rows            [G, K, K]

Output pixels at the edge read zeros from the padding, as in the convolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import tree_map_only
from te_nvfp4_cv.context.layer_calls import LayerCalls
from te_nvfp4_cv.errors import describe, type_error, value_error
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.layer.check import CallShape, Sizes, lowered
from te_nvfp4_cv.layer.constants import running_modules
from te_nvfp4_cv.layer.execute import LayerCall
from te_nvfp4_cv.layer.subclasses import without_class
from te_nvfp4_cv.nn.walk import op_of, padded
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.conv.reference import gather
from te_nvfp4_cv.ops.geometry import pixel_map

ROWS = 2048  # im2col rows per layer and batch: a Gram matrix of all pixels would take longer than the forward pass


@dataclass
class Statistics:
    """Statistics of one layer's input.

    Attributes:
        low, high: fp32 [C], the smallest and the largest value of each channel.
        mean, square: fp32 [G, K], of the rows.
        gram: fp32 [G, K, K] of the rows, or None.
        rows: how many rows there were.
        center: fp32 [C], the mean of each channel, without the zeros of the padding.
        pixels: how many values of each channel there were.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    square: Tensor
    gram: Tensor | None
    rows: int
    center: Tensor
    pixels: int

    @property
    def amax(self) -> Tensor:
        """Return the amax of the input, fp32 [1]."""
        return torch.maximum(self.low.abs(), self.high.abs()).amax().reshape(1)


class _Watch:
    """Forward pre-hook that adds up one layer's statistics."""

    def __init__(self, layer: nn.Module, gram: bool, generator: torch.Generator) -> None:
        self.layer, self.gram, self.generator = layer, gram, generator
        self.found: Statistics | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input")
        if not isinstance(given, Tensor):  # torch's own error says more
            return
        x = without_class(given).detach()
        if not x.numel():  # a detector's head, for example, on an image without objects
            return
        rows = im2col_rows(module, x, self.generator).float()
        count = rows.shape[0]
        # Sums until the last batch; `collect` divides by the number of rows.
        mean, square = rows.sum(0), rows.square().sum(0)
        gram = torch.einsum("rgk,rgl->gkl", rows, rows) if self.gram else None
        # Of all pixels, also those not drawn: the static scale must cover them.
        values = by_channel(module, x).float()
        (low, high), center, pixels = values.aminmax(dim=0), values.sum(0), values.shape[0]
        before = self.found
        if before is not None:
            # torch.minimum and maximum pass NaN on, which `collect` reports.
            low, high, count = torch.minimum(low, before.low), torch.maximum(high, before.high), count + before.rows
            mean, square = mean + before.mean, square + before.square
            center, pixels = center + before.center, pixels + before.pixels
            gram = None if gram is None or before.gram is None else gram + before.gram
        self.found = Statistics(low, high, mean, square, gram, count, center, pixels)


Watcher = Any  # has `layer`, and is called as a forward pre-hook of it


class _Read(LayerCalls):
    """Show a layer's input to its watch where the layer is not called: others read its weight and multiply by it."""

    def __init__(self, watches: Mapping[int, Watcher]) -> None:
        super().__init__()
        self.watches = watches  # by the id of the weight

    def called(self, call: LayerCall, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the call as it is."""
        watch = self.watches.get(id(call.w))
        # A layer that multiplies its own weight has a hook for that, and may share the weight with the watch's layer.
        if watch is not None and _weight_of(next(running_modules(), None)) is not call.w:
            watch(watch.layer, (call.x,), {})
        return function(*args, **kwargs)


def _weight_of(module: nn.Module | None) -> Tensor | None:
    return None if module is None else module._parameters.get("weight")


def by_channel(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's input or output with its channels last: [values of a channel, channels]."""
    rank = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)  # type: ignore[arg-type]
    last = x.movedim(-1 - rank, -1)
    return last.unsqueeze(0) if last.dim() == 1 else last.flatten(0, -2)


def im2col_rows(layer: Any, x: Tensor, generator: torch.Generator, most: int = ROWS) -> Tensor:
    """Return the im2col rows of some output pixels, drawn at random: the values of x that each of them reads.

    Args:
        layer: a convolution or linear layer.
        x: the layer's input.
        generator: draws the pixels, on the CPU.
        most: how many pixels are drawn at most.
    Returns:
        [rows, G, T * Kb * 16], in x's dtype, with K in matrix.py's order.
    """
    op = op_of(layer)
    groups = getattr(layer, "groups", 1)
    x, args = padded(layer, x)
    # The same lowering as in training: rows then agree with the weight's matrix, column by column.
    low = lowered(CallShape.of(op, x, Sizes.of(layer.weight), None, args))
    g = low.geometry
    x_last = layouts.image_last(low.input(x), g.x_shape)
    pixels = pixel_map(g, not g.transposed)  # [pixels out, T]
    channels, inside = x_last.shape[-1], x_last[0, ..., 0].numel()
    # Numbers pixel * B + image: all images of the batch are drawn alike.
    taken = torch.randperm(pixels.shape[0] * g.batch, generator=generator)[:most]
    pixel, image = pixels[taken // g.batch], (taken % g.batch).unsqueeze(1)
    source = torch.where(pixel >= 0, image * inside + pixel, -1)  # -1: a tap in the padding, which reads zeros
    rows = gather(x_last.reshape(-1, channels), source).unflatten(-1, (groups, -1))  # [rows, T, G, C]
    # [rows, T, G, C] -> [rows, G, T * Kb * 16]
    return F.pad(rows, (0, -rows.shape[-1] % BLOCK)).transpose(1, 2).flatten(2)


@contextmanager
def watching(watches: Collection[Watcher]) -> Iterator[None]:
    """Show each watch the input of its layer while the body runs the model, without gradients."""
    with ExitStack() as stack, torch.no_grad():
        for watch in watches:
            stack.callback(watch.layer.register_forward_pre_hook(watch, with_kwargs=True).remove)
        # Of several watches of one layer the first.
        stack.enter_context(_Read({id(w.layer._parameters["weight"]): w for w in reversed([*watches])}))
        yield


class Images:
    """The batches of a loader: the last one is held back from calibration if there are enough of them.

    Iterating gives the batches for calibration; `held` is filled when they have been read once.
    """

    FEW = 8  # of fewer batches none can be spared

    def __init__(self, loader: Iterable[Any], limit: int | None, device: str | torch.device | None) -> None:
        self.loader, self.limit, self.device = loader, limit, device
        self.held: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        last, count = None, 0
        for batch in itertools.islice(self.loader, self.limit):
            if count:
                yield input_of(last, self.device)
            last, count = batch, count + 1
        if count >= self.FEW:
            # Kept, because a loader that shuffles would give another one next time.
            self.held = self.held or [input_of(last, self.device)]
        elif count:
            yield input_of(last, self.device)


def input_of(batch: Any, device: str | torch.device | None) -> Any:
    """Return the model's input from one batch of a loader: the first element of a tuple or list, else the batch."""
    x = batch[0] if isinstance(batch, (list, tuple)) and batch else batch  # (images, labels) of a data set
    return x if device is None else tree_map_only(Tensor, lambda t: t.to(device), x)


def call(model: nn.Module, x: Any) -> Any:
    """Run the model on an input of the loader, which the model may write to: it gets a copy.

    Raises:
        TypeError: The model does not take it: it has several inputs, for example, or the loader gives dicts.
    """
    # Of a tensor, a model's own code may do anything wrong, and only a TypeError says that the call does not fit.
    kinds = TypeError if isinstance(x, Tensor) else (TypeError, AttributeError, LookupError)
    try:
        return model(tree_map_only(Tensor, Tensor.clone, x))
    except kinds as error:
        if "\n  got:" in str(error):  # one of ours, which says more
            raise
        keys = f" with the keys {', '.join(map(repr, x))}" if isinstance(x, Mapping) else ""
        raise type_error(
            "nv.export.quantize: the model does not take what the loader gives.",
            got=f"{describe(x)}{keys}: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            needs="a model that takes one argument: the batch, or its first element if it is a tuple or list",
            fix="a loader of such batches; for a model of several inputs a module around it, whose forward(self, "
            "inputs) returns self.model(*inputs), a loader of pairs (inputs, labels), and the result's .model",
        ) from error


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Iterable[Any],
    gram: bool = False,
) -> dict[str, Statistics]:
    """Run a model over calibration batches and return the statistics of each layer that ran, by name.

    Args:
        model: in eval mode: dropout would change what the layers read, and batch norms would learn.
        layers: the layers to watch, by name.
        inputs: the model's inputs, as Images gives them.
        gram: compute the Gram matrices, too.
    Raises:
        ValueError: There is no batch, or a layer's input is not finite.
    """
    # Of our own, so that calibration is repeatable and leaves torch's global stream alone.
    generator = torch.Generator().manual_seed(0)
    watches = {name: _Watch(layer, gram, generator) for name, layer in layers.items()}
    seen = 0
    with watching(watches.values()):
        for x in inputs:
            call(model, x)
            seen += 1
    if not seen:
        raise value_error(
            "nv.export.quantize: the calibration loader has no batches.",
            got="0 batches",
            needs="at least one batch of real images",
            fix="a list or DataLoader rather than an iterator that was read before",
        )
    found = {name: watch.found for name, watch in watches.items() if watch.found is not None}
    for name, statistics in found.items():
        if not bool(torch.isfinite(statistics.amax).all()):
            raise value_error(
                f"nv.export.quantize: the input of {name!r} is not finite.",
                got=f"amax {float(statistics.amax)}",
                needs="a model and images that give finite numbers",
                fix="check the images' normalization, and the checkpoint",
            )
        statistics.mean, statistics.square = statistics.mean / statistics.rows, statistics.square / statistics.rows
        statistics.center = statistics.center / statistics.pixels
        statistics.gram = None if statistics.gram is None else statistics.gram / statistics.rows
    return found
