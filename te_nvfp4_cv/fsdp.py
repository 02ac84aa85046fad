"""Weights that FSDP2 gathers in 4 bits (nv.fsdp). The code is in distributed/fsdp.py."""

from te_nvfp4_cv.distributed.fsdp import quantize_gathers

__all__ = ["quantize_gathers"]
