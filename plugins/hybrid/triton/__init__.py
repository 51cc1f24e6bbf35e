"""Triton kernels of the hybrid layer's training; no block uses them yet. docs/gpu.md has what was measured."""
