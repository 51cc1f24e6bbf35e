"""Which combinations of the kit's grid run in ``make test``. ``make test-full`` and CI run all of them.

The first option set of each test runs in all dtypes, each with its shape, but for the checks on which no number has an
effect (``WITHOUT_VALUES``): a float32 host runs the operations of a float64 one, neither with a cast, so they run in
float64 and, where there are casts, in bfloat16.

A further option set, and each one of the tests of options (``test_options_of_...``: of variants whose first set runs in
another test), runs

- every check in float64, which finds 81 of the 84 pairs of a mutation and a check in ``test_kit_mutations.py``; the
  three others (``check_volume`` with BlendsAtEveryVolume, ``check_figures_under_autocast``, ``check_long_stream``)
  depend on the variant and not on its options;
- ``MORE`` besides: rows and splits with three heads (float32), the dtype of the state in a bfloat16 host.

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
WITHOUT_VALUES: tuple[Check, ...] = (kit.check_device, kit.check_no_host_read, kit.check_other_modes)


def runs_by_default(check: Check, dtype: torch.dtype, *, first: bool) -> bool:
    if first:
        return dtype != torch.float32 or check not in WITHOUT_VALUES
    return dtype == EVERYWHERE or check in MORE[dtype]
