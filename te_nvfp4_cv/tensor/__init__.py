"""The classes and functions that TransformerEngine's users know: NVFP4Tensor, NVFP4Quantizer, gemm and im2col.

Pickles made by version 0.1 look for the two names below in this module.
"""

from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor, _rebuild_nvfp4_tensor

__all__ = ["NVFP4Tensor", "_rebuild_nvfp4_tensor"]
