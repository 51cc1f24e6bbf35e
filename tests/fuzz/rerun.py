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
    Spoiled,
)
from tests.fuzz.configurations import check_configuration
from tests.fuzz.hosts import check_host_schedule
from tests.fuzz.schedules import check_schedule
from tests.fuzz.spoiled import check_spoiled
from tests.fuzz.volumes import AtVolumes, check_volumes

Case = Configuration | Schedule | HostSchedule | Spoiled | AtVolumes

CHECKS: dict[type, Callable[[Any], None]] = {
    Configuration: check_configuration,
    Schedule: check_schedule,
    HostSchedule: check_host_schedule,
    Spoiled: check_spoiled,
    AtVolumes: check_volumes,
}


def run(case: Case) -> None:
    """Compare with the definition. Raises AssertionError with all that differs."""
    CHECKS[type(case)](case)


def command(case: Case) -> str:
    """What runs ``case`` alone."""
    return f'python -c "from tests.fuzz.rerun import *; run({case!r})"'


__all__ = [
    "AtVolumes",
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
    "Spoiled",
    "command",
    "run",
]
