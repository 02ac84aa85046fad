"""Write an inference model as an ONNX file."""
