"""Offer nv.tensor_parallel: styles for torch's parallelize_module. The code is in distributed/tensor_parallel.py."""

from te_nvfp4_cv.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel

__all__ = ["ColwiseParallel", "RowwiseParallel"]
