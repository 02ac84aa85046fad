"""The room quantize."""
