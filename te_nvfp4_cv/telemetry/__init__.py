"""Telemetry: what happens to weights, activations and gradients in 4-bit training, as records, curves and heatmaps."""
