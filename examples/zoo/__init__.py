"""A zoo of models of other libraries, each with tiny settings and random weights, and what NVFP4 makes of them."""
