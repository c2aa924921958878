"""Triton kernels and their launchers, one file an op; imported only where the kernels can run."""
