"""Settings that must hold before anything imports torch or moshi."""

from __future__ import annotations

import os

# Moshi compiles `LMModel.out_norm` at its first forward unless this is set before it is imported: 20 s on a CPU.
os.environ["NO_TORCH_COMPILE"] = "1"
# The processes that tests spawn (gloo ranks, the command line) inherit these. See below for why one thread. Whoever
# takes more waits without spinning, and torch.compile compiles in the process itself, not in one helper a core.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# No test may reach the network: what a user would download is in the package or in a temporary folder.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# One thread: the tensors of the tests are too small to share, and the order of a sum, so its last bit, then does not
# depend on how many cores a machine has. Two tests at a time (`pytest -n 2`) use two cores better than this would.
torch.set_num_threads(1)
