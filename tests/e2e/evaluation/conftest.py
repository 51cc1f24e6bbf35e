"""The base model that tests of whole evaluations share with those of their parts."""

from __future__ import annotations

from tests.unit.evaluation.conftest import base

__all__ = ["base"]
