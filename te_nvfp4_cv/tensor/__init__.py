"""TransformerEngine's face: NVFP4Tensor, NVFP4Quantizer, gemm and im2col.

Pickles made by version 0.1 look for these two names here.
"""

from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor, _rebuild_nvfp4_tensor

__all__ = ["NVFP4Tensor", "_rebuild_nvfp4_tensor"]
