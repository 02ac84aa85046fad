"""Quantize and unpack by Triton kernels on GPUs: the kernels, their tiles and their launches."""
