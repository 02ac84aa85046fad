"""Normalize, activate and quantize by Triton kernels on GPUs: the kernels and their launches."""
