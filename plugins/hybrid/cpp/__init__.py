"""The chunk form of the TTT layer's inner loop in C++, for CPUs."""
