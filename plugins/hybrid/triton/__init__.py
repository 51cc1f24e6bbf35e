"""Triton kernels of the hybrid layer. They are tested in Triton's interpreter; no block uses them yet."""
