"""Normalize, add a residual and activate in one operator, with one implementation for each backend."""
