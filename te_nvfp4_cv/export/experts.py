"""Grouped linear layers (mixture of experts) whose weight [E, O, C] stays in NVFP4: those of other layers, E groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from te_nvfp4_cv.export.modules import CLASSES, InferenceLayer
from te_nvfp4_cv.layer import grouped, inference
from te_nvfp4_cv.nn.modules import Experts
from te_nvfp4_cv.ops.experts import checked_offsets
from te_nvfp4_cv.ops.geometry import ConvArgs


class InferenceGroupedLinear(InferenceLayer, Experts):  # type: ignore[misc]  # weight: computed from codes
    """Hold the weights of nv.NVFP4GroupedLinear in NVFP4, and run it."""

    op = grouped.OP
    plain = Experts

    def forward(self, input: Tensor, offsets: Tensor) -> Tensor:
        """Run the layer, with the arguments of NVFP4GroupedLinear."""
        offsets = checked_offsets(offsets, input, self.num_experts)
        bias: Any = self.bias
        if self.quantize_x:
            return inference.run(self.op, input, self.stored(), bias, ConvArgs(), self.recipe, self.backend, offsets)
        w = self._real_weight() if self.unpacked is None else self.unpacked
        return grouped.plain(input, w.to(input.dtype), offsets, None if bias is None else bias.to(input.dtype))


CLASSES[Experts] = InferenceGroupedLinear  # nv.export imports this file first of all
