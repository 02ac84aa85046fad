"""The room onnx."""
