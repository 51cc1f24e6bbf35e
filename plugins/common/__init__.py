"""What the built-in variants share: the inner loop, the hybrid layer around it, RoPE. Registers nothing."""
