"""nv.distributed and everything else with ranks: all-gather of quantized tensors, FSDP2 weights that travel in 4 bits,
tensor parallelism.
"""

from te_nvfp4_cv.distributed.gather import AllGatherHandle, all_gather, all_gather_coalesced

__all__ = ["AllGatherHandle", "all_gather", "all_gather_coalesced"]
