"""Gives the weight of an inference layer to code that reads it and multiplies by itself, and runs the layer then.

Some modules never call their layers: nn.MultiheadAttention and torchvision's Swin pass `layer.weight` to F.linear. The
weight that an inference layer shows is a tensor in real units. A convolution or linear function of torch that gets it
runs the layer with its codes, as in training; everything else sees a plain tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend.torch_private import without_subclasses
from te_nvfp4_cv.context.bodies import ATTENTION
from te_nvfp4_cv.errors import warn_once
from te_nvfp4_cv.layer.execute import layer_call

_PARTS = {Tensor.chunk, Tensor.split, torch.chunk, torch.split}


class PackedWeight(Tensor):
    """The weight of `packed_layer`, dequantized."""

    packed_layer: Any
    packed = True  # context/function_mode.py leaves such a kernel to this class

    @classmethod
    def of(cls, w: Tensor, layer: Any) -> Tensor:
        """Return a tensor with the values of w that stands for the layer."""
        if not torch.compiler.is_dynamo_compiling() and type(w) is not Tensor:
            # In a trace of torch.export tensors are fake, and cannot become some of this class.
            warn_once(
                "packed weight in export",
                "nvfp4: torch.export traces a module that reads the weight of an inference layer instead of calling "
                "it. If it multiplies by it, that product is in high precision in the graph",
            )
            return w
        made = w.as_subclass(cls)
        made.packed_layer = layer
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: A002
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            return ATTENTION(*args, **kwargs)  # its projections are calls of linear
        call = layer_call(function, args, kwargs)
        if call is not None and isinstance(call.w, cls):
            return call.w.packed_layer.multiply(call.x, call.bias, call.args)
        if function in _PARTS:
            warn_once(
                "parts of a packed weight",
                "nvfp4: a packed weight is read in parts, as attention over another sequence does. It was packed for "
                "attention of a sequence to itself, so products by its parts run in high precision",
            )
        with without_subclasses():
            return function(*args, **kwargs)
