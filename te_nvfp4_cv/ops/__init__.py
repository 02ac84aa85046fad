"""Operators on plain tensors: quantize, gemm, conv, relu; each checks nothing that its caller has checked."""
