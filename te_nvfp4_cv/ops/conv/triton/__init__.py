"""Convolve by Triton kernels on GPUs: the kernels, their order of work, and their launches."""
