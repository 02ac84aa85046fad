"""TransformerEngine's face: NVFP4Tensor, NVFP4Quantizer, gemm, im2col. Files saved by version 0.1 look for NVFP4Tensor here."""

from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor

__all__ = ["NVFP4Tensor"]
