"""Marks the combinations that ``make test`` leaves to ``make test-full``: see ``grid``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moshi_ttt.core.testing import BlockCase
from tests.conformance.variants.grid import IN_BFLOAT16, runs_by_default

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_exhaustive(items, HERE)


def mark_exhaustive(items: list[pytest.Item], folder: Path) -> None:
    """Mark what ``grid`` does not run by default, of the tests of the kit in ``folder``."""
    first: dict[Any, Any] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") and folder in item.path.parents else {}
        case, check = parameters.get("case"), parameters.get("check")
        if isinstance(case, BlockCase) and check is not None:
            test = (item.path, item.originalname)  # type: ignore[attr-defined]
            is_first = case.config == first.setdefault(test, case.config) and "options_of" not in test[1]
            given = {"first": is_first, "compiled": case.compiled_step, "in_bfloat16": test[1] in IN_BFLOAT16}
            if not runs_by_default(check, case.dtype, **given):
                item.add_marker(pytest.mark.exhaustive)
