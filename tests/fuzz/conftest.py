"""How much the fuzz draws: by default a tenth, the same at every run; with ``--hypothesis-profile=fuzz`` all of it."""

from __future__ import annotations

import atexit
import tempfile
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

COMMON: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "phases": (Phase.explicit, Phase.generate, Phase.shrink),
    "suppress_health_check": (HealthCheck.too_slow, HealthCheck.data_too_large),
}
settings.register_profile("tenth", max_examples=50, derandomize=True, **COMMON)
settings.register_profile("fuzz", max_examples=500, **COMMON)

# What hypothesis remembers about the sources that it tests is no part of the repository.
_folder = tempfile.TemporaryDirectory(prefix="hypothesis-")
atexit.register(_folder.cleanup)
set_hypothesis_home_dir(_folder.name)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-profile", None) is None:
        settings.load_profile("tenth")
