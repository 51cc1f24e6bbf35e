"""Run one case again: ``python -c "from tests.fuzz.rerun import *; run(Configuration(...))"``, from the repository."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fuzz.cases import (
    Call,
    CompileStep,
    Configuration,
    HostCall,
    HostSchedule,
    Layer,
    NewCarry,
    Reload,
    Reset,
    Schedule,
)
from tests.fuzz.configurations import check_configuration
from tests.fuzz.hosts import check_host_schedule
from tests.fuzz.schedules import check_schedule

CHECKS: dict[type, Callable[[Any], None]] = {
    Configuration: check_configuration,
    Schedule: check_schedule,
    HostSchedule: check_host_schedule,
}


def run(case: Configuration | Schedule | HostSchedule) -> None:
    """Compare with the definition. Raises AssertionError with all that differs."""
    CHECKS[type(case)](case)


def command(case: Configuration | Schedule | HostSchedule) -> str:
    """What runs ``case`` alone."""
    return f'python -c "from tests.fuzz.rerun import *; run({case!r})"'


__all__ = [
    "Call",
    "CompileStep",
    "Configuration",
    "HostCall",
    "HostSchedule",
    "Layer",
    "NewCarry",
    "Reload",
    "Reset",
    "Schedule",
    "command",
    "run",
]
