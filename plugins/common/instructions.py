"""The instructions of this machine's processor, and the levels of them that a library can be compiled for."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
PLAIN = "plain"
"""The level that every processor of a machine's kind has: what a compiler assumes where it is told nothing."""

_V3 = "cx16 lahf_lm popcnt ssse3 sse4_1 sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"
LEVELS: dict[str, dict[str, frozenset[str]]] = {
    "x86_64": {"x86-64-v4": frozenset(_V4.split()), "x86-64-v3": frozenset(_V3.split())},
}
"""Of a kind of machine, as ``platform.machine`` names it: each level by the compiler's name for it, the richest first,
and what ``/proc/cpuinfo`` lists for a processor that has it."""


def described() -> str:
    """What tells processors apart whose instructions differ: a home folder may be shared by several."""
    return _flags() or platform.processor()


def all_levels() -> tuple[str, ...]:
    """Those of this kind of machine, the richest first; ``PLAIN`` is the last."""
    return *LEVELS.get(platform.machine(), {}), PLAIN


def levels() -> tuple[str, ...]:
    """Those whose instructions this processor has, the richest first; ``PLAIN`` is the last."""
    flags = frozenset(_flags().partition(":")[2].split())
    known = LEVELS.get(platform.machine(), {})
    return *(level for level, needed in known.items() if needed <= flags), PLAIN


def compiler_flags(level: str) -> tuple[str, ...]:
    """For ``g++`` and compilers with its options."""
    return () if level == PLAIN else (f"-march={level}",)


def _flags() -> str:
    """The line of ``/proc/cpuinfo`` that lists the instructions; empty where there is none."""
    if not CPUINFO.exists():
        return ""
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
