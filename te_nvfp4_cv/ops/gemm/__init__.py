"""Multiply two quantized matrices, with one implementation for each backend."""
