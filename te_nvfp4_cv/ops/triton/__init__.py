"""Share Triton functions among the kernels of several folders: decoding, numerics, elementwise kernels."""
