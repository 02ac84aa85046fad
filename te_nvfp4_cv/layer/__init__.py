"""Run one call of a convolution or linear layer in NVFP4, forward and backward."""
