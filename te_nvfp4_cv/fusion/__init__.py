"""Fuse normalization, residual and activation into one operator."""
