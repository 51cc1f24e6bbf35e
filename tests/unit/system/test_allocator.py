"""Freed memory is kept for what is allocated next; a user's own choice is left alone."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from moshi_ttt.system.allocator import CHOICES, keep_freed_memory
from moshi_ttt.training import runtime

FAULTS = """
import resource, sys
import torch
from moshi_ttt.system.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory({})

def use():
    return [torch.ones(2**20) for _ in range(40)]  # 160 MiB, freed when it is dropped

for _ in range(5):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def gnu() -> bool:
    try:
        return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    except (OSError, TypeError):
        return False


def faults(how: str) -> int:
    # Limits at which everything is given back: the library's own depend on what was freed before.
    lowest = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    found = subprocess.run(
        [sys.executable, "-c", FAULTS, how], env={**os.environ, **lowest}, capture_output=True, text=True, check=True
    )
    return int(found.stdout)


@pytest.mark.skipif(not gnu(), reason="the limits are the GNU C library's")
def test_pages_that_are_freed_are_not_taken_from_the_system_again() -> None:
    assert faults("kept") * 10 < faults("as it is")


@pytest.mark.parametrize("name", CHOICES)
def test_a_users_own_choice_is_kept(name: str) -> None:
    assert not keep_freed_memory({name: "1"})


def test_training_on_a_cpu_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: asked.append(True))
    with runtime.start("cpu", None):
        assert asked == [True]
