"""Which combinations of the kit's grid run in ``make test``, and which in ``make test-full`` alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moshi_ttt.core.testing import BlockCase

EVERYWHERE = torch.float64
"""The dtype that every option set runs in.

Of the 84 pairs of a mutation and a check in ``test_kit_mutations.py``, it finds 81. The three others are found in
float32 or bfloat16: ``check_volume`` (BlendsAtEveryVolume), ``check_figures_under_autocast`` and ``check_long_stream``.
They depend on the variant, not on its options, so the first option set of each test runs in all three dtypes.
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first: dict[Any, Any] = {}
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, BlockCase):
            test = (item.path, item.originalname)  # type: ignore[attr-defined]
            if case.dtype != EVERYWHERE and case.config != first.setdefault(test, case.config):
                item.add_marker(pytest.mark.exhaustive)
