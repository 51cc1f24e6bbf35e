"""Which combinations of the kit's grid run in ``make test``. ``make test-full`` and CI run all of them.

The first option set of each test runs in float64 with every check; of the tests in ``IN_BFLOAT16``, of one variant for
each kind of site, in bfloat16 too, with another shape. In float32 it runs ``MORE`` and
``IN_FLOAT32``: a float32 host runs the operations of a float64 one, neither with a cast, and no mistake in
``test_kit_mutations.py`` but one, of ``check_long_stream``, shows in float32 alone.

A further option set, and each one of the tests of options (``options_of`` is in their names: the first set of their
variant runs in another test), runs

- ``OF_OPTIONS`` in float64: the checks that a mistake in an option can fail, which find every one of those in
  ``test_option_mutations.py``. What reads a value on the CPU is found by ``check_no_host_read``;
- ``MORE`` besides: rows and splits with three heads (float32), the dtype of the state in a bfloat16 host.

A compiled step has no part in a call of several tokens, nor on the meta device, so the cases that stream by it leave
out ``WITHOUT_STEPS``: the tests of the same variants without a compiled step run those.

``test_option_mutations.py`` has mistakes in options, and holds that these combinations find each;
``test_kit_mutations.py`` holds that the combinations of a first option set find every mistake there.
"""

from __future__ import annotations

import torch

from moshi_ttt.core import testing as kit
from moshi_ttt.core.testing import Check

EVERYWHERE = torch.float64
MORE: dict[torch.dtype, tuple[Check, ...]] = {
    torch.float32: (kit.check_splits, kit.check_every_prefix, kit.check_exec_mask, kit.check_rows),
    torch.bfloat16: (kit.check_state_is_float32,),
}
WITHOUT_STEPS: tuple[Check, ...] = (
    kit.check_causality, kit.check_unwanted_state, kit.check_rows, kit.check_token_mask, kit.check_token_mask_gradient,
    kit.check_nonfinite_rows, kit.check_volume, kit.check_volume_gradient, kit.check_inner_lr_factor, kit.check_device,
    kit.check_figures_under_autocast, kit.check_parameter_dimensions, kit.check_checkpointing, kit.check_two_forwards,
    kit.check_detached_state, kit.check_trainable_set, kit.check_gradients_numerically, kit.check_second_derivatives,
    kit.check_adapter_round_trip, kit.check_buffers, kit.check_config_keys, kit.check_dtypes,
    kit.check_state_is_float32, kit.check_layouts, kit.check_form,
)  # fmt: skip
OF_OPTIONS: tuple[Check, ...] = (
    kit.check_splits, kit.check_every_prefix, kit.check_causality, kit.check_reset, kit.check_exec_mask, kit.check_rows,
    kit.check_updates_off, kit.check_token_mask_streamed, kit.check_nonfinite_rows, kit.check_memory,
    kit.check_state_ranges, kit.check_inner_lr_factor, kit.check_no_host_read, kit.check_checkpointing,
    kit.check_trainable_set, kit.check_gradients_numerically, kit.check_adapter_round_trip, kit.check_plan_figures,
)  # fmt: skip
IN_FLOAT32: tuple[Check, ...] = (kit.check_long_stream,)


IN_BFLOAT16 = {"test_ttt_mlp", "test_gating_mlp"}


def runs_by_default(
    check: Check, dtype: torch.dtype, *, first: bool, compiled: bool = False, in_bfloat16: bool = True
) -> bool:
    if compiled and check in WITHOUT_STEPS:
        return False
    if first and (dtype != torch.bfloat16 or in_bfloat16):
        return dtype != torch.float32 or check in MORE[dtype] or check in IN_FLOAT32
    if dtype == EVERYWHERE:
        return first or check in OF_OPTIONS
    return check in MORE[dtype]
