"""The TTT layer's inner loop in C++, for CPUs."""

PARTS = ("matrix", "products", "activations", "norm")
"""Headers of the chunk form that the step includes too."""
