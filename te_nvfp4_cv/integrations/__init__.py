"""Connect NVFP4 to other frameworks: PyTorch Lightning, TransformerEngine, Hugging Face's Trainer and accelerate."""
