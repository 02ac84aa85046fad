"""Quantize operands and weights to NVFP4, and unpack them, with one implementation for each backend."""
