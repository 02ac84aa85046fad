"""The room gemm."""
