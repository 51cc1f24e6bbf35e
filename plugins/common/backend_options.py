"""The option ``backend`` of a variant's config: one name for every operation, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from moshi_ttt.core.config import FrozenConfig, parse_model
from moshi_ttt.plugins.common.backends import BackendName


def by_operation(model: type[FrozenConfig]) -> Callable[[Any], Any]:
    """Reads a mapping as a ``model``: its errors alone are then reported, not those of a name."""

    def read(value: Any) -> Any:
        return parse_model(model, value, "backend") if isinstance(value, Mapping) else value

    return read


class StepBackends(FrozenConfig):
    """The backend of each operation of a variant that has backends of its streamed step alone.

    Attributes:
        step: of one streamed token.
    """

    step: BackendName = "auto"


StepBackend = Annotated[BackendName | StepBackends, BeforeValidator(by_operation(StepBackends))]
"""The type of the option ``backend`` of such a variant."""


def step_backend(option: BackendName | StepBackends) -> BackendName:
    """The name that the option ``backend`` gives the step."""
    return option.step if isinstance(option, StepBackends) else option
