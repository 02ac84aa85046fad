"""Everything with ranks: all-gather of quantized tensors (nv.distributed), FSDP2 weights that travel in 4 bits
(nv.fsdp), tensor parallelism (nv.tensor_parallel), and rows for experts on other ranks.
"""

from te_nvfp4_cv.distributed.experts import combine, dispatch
from te_nvfp4_cv.distributed.gather import AllGatherHandle, all_gather, all_gather_coalesced

__all__ = ["AllGatherHandle", "all_gather", "all_gather_coalesced", "combine", "dispatch"]
