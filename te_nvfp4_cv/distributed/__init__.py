"""Everything with ranks: all-gather of quantized tensors (nv.distributed), FSDP2 weights that travel in 4 bits
(nv.fsdp) and tensor parallelism (nv.tensor_parallel).
"""

from te_nvfp4_cv.distributed.gather import AllGatherHandle, all_gather, all_gather_coalesced

__all__ = ["AllGatherHandle", "all_gather", "all_gather_coalesced"]
