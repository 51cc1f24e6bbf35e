"""The last line of a report."""

from __future__ import annotations

import pytest

from moshi_ttt.evaluation.reporting import ENOUGH, note


@pytest.mark.parametrize(
    ("recordings", "said"), [(1, "1 recording gives no interval"), (2, "2 recordings make intervals too narrow")]
)
def test_intervals_of_few_recordings_come_with_a_warning(recordings, said):
    assert f"{said}: evaluate {ENOUGH} or more." in note(recordings)


def test_intervals_of_enough_recordings_come_without():
    assert note(ENOUGH).endswith("lower is better.")
