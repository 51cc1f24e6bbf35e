"""Fixtures for the tests of the Moshi host."""

from __future__ import annotations

import os

# Before Moshi is imported: on a CPU its output norm would otherwise be compiled at the first forward pass.
os.environ.setdefault("NO_TORCH_COMPILE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _few_threads():
    """Small matrices: threads cost more than they bring, and two test runs may share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
