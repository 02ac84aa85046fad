"""Compute on plain tensors: quantize, gemm, conv, norm and relu. What the caller has checked is not checked again."""
