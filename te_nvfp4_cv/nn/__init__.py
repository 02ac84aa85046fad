"""NVFP4 modules, and what can be said of the modules of a model: their precision, their weights, their state."""
