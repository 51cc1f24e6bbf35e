"""Freed memory that a process keeps, where the C library would give it back to the system after each layer.

A training step frees and takes the same hundred megabytes many times. Under the GNU C library's own limits it gives
some of them back each time, and every page of them that it takes again is a page fault: of a small Moshi with a block
1,700 to 113,000 a step were measured, and up to an eighth of the step's time.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""What ``mallopt`` calls the limits, in malloc.h."""
KEPT = 2**31 - 1
"""Bytes at the heap's end that are kept when they are free: the most that ``mallopt`` takes."""
LARGE = (2**28, 2**25)
"""Bytes above which a tensor is still a mapping of its own, given back when it is freed.

Before version 2.35 the library takes no limit above the second.
"""
CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
"""Variables with which a user chooses these limits."""


def keep_freed_memory(environment: Mapping[str, str] | None = None) -> bool:
    """Keep what this process frees, up to ``KEPT`` bytes, for what it allocates next. What the user has chosen is kept.

    Args:
        environment: where the user may have chosen (``CHOICES``); None: the process's own.

    Returns:
        Whether it does: False where the user has chosen, and where the C library is not GNU's.
    """
    if any((os.environ if environment is None else environment).get(name) for name in CHOICES):
        return False
    try:
        limit = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be asked for by None: Windows
        return False
    # Both limits: to set one of them ends the library's own choice of the other.
    return any(limit(M_MMAP_THRESHOLD, large) for large in LARGE) and bool(limit(M_TRIM_THRESHOLD, KEPT))
