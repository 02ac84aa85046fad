"""Styles for torch's parallelize_module (nv.tensor_parallel). The code is in distributed/tensor_parallel.py."""

from te_nvfp4_cv.distributed.tensor_parallel import ColwiseParallel, NormParallel, RowwiseParallel
from te_nvfp4_cv.distributed.tp_plan import plan

__all__ = ["ColwiseParallel", "NormParallel", "RowwiseParallel", "plan"]
