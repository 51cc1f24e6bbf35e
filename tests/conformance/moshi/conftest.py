"""Marks combinations of the host checks that ``make test`` leaves to ``make test-full``: ``IN_BFLOAT16``, ``LATER``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moshi_ttt.core.testing import HostVariantCase

HERE = Path(__file__).parent
IN_BFLOAT16 = {"test_ttt_mlp", "test_gating_mlp"}
"""Tests that run in a bfloat16 Moshi too by default: a variant of each kind. The kit's own checks run every variant in
a bfloat16 host in test_conformance.py."""
LATER = {
    "test_ttt_linear_on_the_bundle", "test_ttt_mlp_on_the_bundle", "test_ttt_ridge_on_the_bundle",
    "test_ttt_mlp_with_other_keys_values_and_updates", "test_gating_mlp_that_corrects",
    "test_ttt_linear", "test_ttt_multilayer", "test_ttt_ridge",
}  # fmt: skip
"""Tests on trained weights whose variants run on random ones; the bundle itself runs with ``gating_mlp``. Those of
options, which the kit's own checks run without a host. And those of variants beside one of each kind."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") and HERE in item.path.parents else {}
        case = parameters.get("case")
        in_bfloat16 = isinstance(case, HostVariantCase) and case.dtype == torch.bfloat16
        if in_bfloat16 and item.originalname not in IN_BFLOAT16:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.exhaustive)
        if isinstance(case, HostVariantCase) and item.originalname in LATER:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.exhaustive)
