"""The engine's thread: how often a row's figures are looked at."""

from __future__ import annotations

import pytest

from moshi_ttt.hosts.moshi.slots import SlotSettings
from moshi_ttt.serving.engine import STATS_SEC, STATS_SHARE, Engine, Line
from moshi_ttt.serving.metrics import ServerMetrics
from tests.e2e.serving.fakes import FakeSlots

ROWS = 4


@pytest.fixture
def engine():
    engine = Engine(FakeSlots(ROWS), post=lambda work: work(), failed=pytest.fail, metrics=ServerMetrics())
    engine.start()
    yield engine
    assert engine.stop()


def joined(engine: Engine, row: int) -> Line:
    line = Line(row, lambda output: None)
    engine.join(line, SlotSettings()).result(10)
    return line


def test_figures_come_from_the_engines_thread_and_their_time_is_kept(engine):
    line = joined(engine, 1)
    (site,) = engine.stats(line).result(10)
    assert site.updates == 0
    assert engine.slots.calls[-1] == ("stats", 1)
    assert len(engine.slots.threads) == 1
    assert engine.stats_sec > 0


def test_the_looks_at_all_rows_take_a_small_share_of_the_time(engine):
    for row in range(ROWS):
        joined(engine, row)
    engine.stats_sec = 1e-4
    assert engine.stats_every_sec == STATS_SEC
    engine.stats_sec = 0.04  # as three TTT-MLP blocks take on a GPU
    assert ROWS * engine.stats_sec / engine.stats_every_sec == pytest.approx(STATS_SHARE)
