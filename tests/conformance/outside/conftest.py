"""Marks what ``make test`` leaves to ``make test-full`` of the kit: see ``tests/conformance/variants/grid.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.variants.conftest import mark_exhaustive

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_exhaustive(items, HERE)
