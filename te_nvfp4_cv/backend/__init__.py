"""Decide where a call runs: the choice of a backend, the compiler of the CPU kernels, tuning and caches."""
