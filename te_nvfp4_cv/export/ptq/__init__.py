"""Quantize a network that was trained in high precision: calibration, folding of batch norms, rounding."""
