"""The specification of a convolution in one of the formats of block_scales.py: reference.py's, block by block.

A block of 32 counts as two of 16 with one scale, and scales come as fp32 values in place of E4M3 bytes. So the products
of a block are exact in fp32 here too, and sums over blocks round in the order of the pieces of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv.ops.block_scales import FORMATS
from te_nvfp4_cv.ops.conv import reference
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.records import Face


class Products:
    """Multiplies packed faces of one format; methods as the functions of reference.py."""

    def __init__(self, block_format: str) -> None:
        self._format = FORMATS[block_format]

    def fprop(
        self, x: Face, w: Face, alpha: Tensor | None, bias: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype
    ) -> Tensor:
        """Run the operator conv_fprop."""
        return reference.fprop(self._rows(x, geometry), self._kernel(w, geometry), alpha, bias, geometry, dtype)

    def dgrad(self, dy: Face, w: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
        """Run the operator conv_dgrad."""
        return reference.dgrad(self._rows(dy, geometry), self._kernel(w, geometry), alpha, geometry, dtype)

    def wgrad(self, dy: Face, x: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
        """Run the operator conv_wgrad."""
        return reference.wgrad(self._columns(dy), self._columns(x), alpha, geometry, dtype)

    def _rows(self, x: Face, geometry: ConvGeometry) -> Face:
        return Face(x.data, self._format.decode(self._format.of_rows(x, geometry.groups)))

    def _columns(self, x: Face) -> Face:
        return Face(x.data, self._format.decode(self._format.of_columns(x)))

    def _kernel(self, w: Face, geometry: ConvGeometry) -> Face:
        return Face(w.data, self._format.decode(self._format.of_kernel(w, geometry.channels_b // geometry.groups)))
