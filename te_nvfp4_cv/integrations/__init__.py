"""Connect NVFP4 to other frameworks: PyTorch Lightning and TransformerEngine."""
