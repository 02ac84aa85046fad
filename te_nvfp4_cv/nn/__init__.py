"""Compute layers in NVFP4, and set what belongs to a model's modules: their precision, frozen weights, state."""
