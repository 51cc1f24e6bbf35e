"""The conformance kit: the rules for every variant, as tests that third parties run on their own variants.

In a test module of your plugin::

    from moshi_ttt.testing import conformance_tests

    test_conformance = conformance_tests("my_variant", {"chunk": 4})

That is one pytest test per rule, shape and dtype, on a toy host that the kit brings. ``check_block`` runs the same
checks without pytest, and each check is a function of its own (``CHECKS``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moshi_ttt.core.device_log import DeviceLog
from moshi_ttt.core.registry import Registry
from moshi_ttt.core.testing.case import BlockCase, Shape, default_cases, error
from moshi_ttt.core.testing.checks_layouts import check_buffer_layouts, check_layouts, check_parameter_layouts
from moshi_ttt.core.testing.checks_lifecycle import (
    check_adapter_round_trip,
    check_buffers,
    check_config_keys,
    check_dtypes,
    check_plan_figures,
)
from moshi_ttt.core.testing.checks_nonfinite import check_nonfinite_recovery, check_nonfinite_rows
from moshi_ttt.core.testing.checks_segments import (
    check_token_mask,
    check_token_mask_gradient,
    check_token_mask_streamed,
)
from moshi_ttt.core.testing.checks_streaming import (
    check_causality,
    check_every_prefix,
    check_exec_mask,
    check_long_stream,
    check_no_host_read,
    check_reset,
    check_rows,
    check_splits,
    check_state_is_float32,
    check_step_in_place,
    check_unwanted_state,
)
from moshi_ttt.core.testing.checks_surroundings import (
    check_changed_parameters,
    check_copies,
    check_figures_under_autocast,
    check_form,
    check_other_modes,
    check_parameter_dimensions,
)
from moshi_ttt.core.testing.checks_training import (
    check_checkpointing,
    check_detached_state,
    check_gradients_numerically,
    check_parameters_unwritten,
    check_reset_before_backward,
    check_second_derivatives,
    check_step_gradient,
    check_trainable_set,
    check_two_forwards,
)
from moshi_ttt.core.testing.checks_updates import (
    check_inner_lr_factor,
    check_memory,
    check_state_ranges,
    check_updates_off,
)
from moshi_ttt.core.testing.checks_volume import check_volume, check_volume_gradient, check_volume_streamed
from moshi_ttt.core.testing.device_cost import DeviceCost, check_device, device_cost
from moshi_ttt.core.testing.host_checks import (
    HOST_CHECKS,
    HostCase,
    HostStream,
    HostVariantCase,
    host_conformance_tests,
)
from moshi_ttt.core.testing.toy_host import TOY_HOST, ToyHost, ToyModel

Check = Callable[[BlockCase], None]

CHECKS: tuple[Check, ...] = (
    check_form,
    check_parameters_unwritten,
    check_causality,
    check_splits,
    check_every_prefix,
    check_unwanted_state,
    check_step_in_place,
    check_rows,
    check_exec_mask,
    check_reset,
    check_token_mask,
    check_token_mask_streamed,
    check_token_mask_gradient,
    check_nonfinite_rows,
    check_nonfinite_recovery,
    check_layouts,
    check_updates_off,
    check_volume,
    check_volume_streamed,
    check_volume_gradient,
    check_memory,
    check_state_ranges,
    check_inner_lr_factor,
    check_no_host_read,
    check_device,
    check_other_modes,
    check_figures_under_autocast,
    check_copies,
    check_changed_parameters,
    check_state_is_float32,
    check_long_stream,
    check_parameter_dimensions,
    check_parameter_layouts,
    check_buffer_layouts,
    check_checkpointing,
    check_two_forwards,
    check_detached_state,
    check_reset_before_backward,
    check_step_gradient,
    check_trainable_set,
    check_gradients_numerically,
    check_second_derivatives,
    check_plan_figures,
    check_adapter_round_trip,
    check_buffers,
    check_config_keys,
    check_dtypes,
)
"""Every check of the kit. The first two find mistakes that would break others without naming the cause; the rest are in
the order of the design's rules. A check that does not apply to a case returns at once."""


def check_block(variant: str, *configs: Mapping[str, Any], registry: Registry | None = None) -> None:
    """Run every check on every default case of a registered variant.

    The first failure, whatever it is, raises AssertionError with the name of the check, the case and the rule.

    Args:
        variant: the registered name.
        configs: option sets to test, without ``variant`` and ``layers``; none means the defaults.
        registry: where to look the variant up; the process's registry by default.
    """
    for case in default_cases(variant, configs or ({},), registry):
        for check in CHECKS:
            try:
                check(case)
            except Exception as error:
                what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                rule = " ".join((check.__doc__ or "").split())
                raise AssertionError(f"{check.__name__}, {case}:\n  {what}\n  The rule: {rule}") from error


def conformance_tests(
    variant: str,
    *configs: Mapping[str, Any],
    registry: Registry | None = None,
    shapes: Sequence[Shape] | None = None,
    compiled_step: bool = False,
) -> Callable[..., None]:
    """A parametrized pytest test of every rule; assign it to a name that starts with ``test_``. See ``check_block``.

    ``compiled_step`` has the blocks stream by their compiled step, for a variant that brings one.
    """
    import pytest

    cases = default_cases(variant, configs or ({},), registry, shapes, compiled_step)

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
    @pytest.mark.parametrize("case", cases, ids=str)
    def conformance(case: BlockCase, check: Check) -> None:
        check(case)

    return conformance


__all__ = [
    "CHECKS",
    "HOST_CHECKS",
    "TOY_HOST",
    "BlockCase",
    "DeviceCost",
    "DeviceLog",
    "HostCase",
    "HostStream",
    "HostVariantCase",
    "Shape",
    "ToyHost",
    "ToyModel",
    "check_block",
    *(check.__name__ for check in CHECKS),
    "conformance_tests",
    "default_cases",
    "device_cost",
    "error",
    "host_conformance_tests",
]
