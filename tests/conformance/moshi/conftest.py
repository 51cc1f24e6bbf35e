"""Marks combinations of the host checks that ``make test`` leaves to ``make test-full``: ``IN_FLOAT32``, ``LATER``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moshi_ttt.core.testing import HostVariantCase

HERE = Path(__file__).parent
IN_FLOAT32 = {"test_gating_mlp_on_the_bundle", "test_ttt_mlp_with_other_keys_values_and_updates"}
"""Tests that run in float32 alone by default. In a bfloat16 Moshi each of their variants runs on the random model, and
the kit's own checks run on their options in test_conformance.py."""
LATER = {"test_ttt_linear_on_the_bundle", "test_ttt_mlp_on_the_bundle", "test_ttt_ridge_on_the_bundle"}
"""Tests on trained weights whose variants run on random ones; the bundle itself runs with ``gating_mlp``."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") and HERE in item.path.parents else {}
        case = parameters.get("case")
        in_bfloat16 = isinstance(case, HostVariantCase) and case.dtype == torch.bfloat16
        if in_bfloat16 and item.originalname in IN_FLOAT32:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.exhaustive)
        if isinstance(case, HostVariantCase) and item.originalname in LATER:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.exhaustive)
