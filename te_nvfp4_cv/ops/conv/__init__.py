"""Compute the three GEMMs of a convolution from quantized operands, with one implementation for each backend."""
