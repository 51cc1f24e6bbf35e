"""Triton kernels of the hybrid layer's training, the backend ``triton``. docs/gpu.md has what was measured."""
