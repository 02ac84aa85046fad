"""Multiply quantized matrices by Triton kernels on GPUs: the kernels and their launches."""
