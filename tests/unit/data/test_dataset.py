"""Batches: the same segments whatever the ranks, the split and the workers; broken recordings without a broken run."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from moshi_ttt.data import dataset
from moshi_ttt.data.corpus import Corpus, SegmentError, Source, SourceRecording, open_corpus
from moshi_ttt.data.dataset import TrainingData, loader
from moshi_ttt.data.problems import DataError, Problem
from moshi_ttt.data.sources import SourceSpec

from .conftest import cut_off

LENGTHS = ((3, 1, 4, 1), (5, 2))
FRAMES = 2


class Numbers(Source):
    """Segments whose codes are their source, recording and first frame; those in ``broken`` cannot be read."""

    def __init__(self, tmp_path, number, lengths, broken):
        self.number, self.broken = number, broken
        recordings = [
            SourceRecording(name=str(r), frames=n * FRAMES, segments=n, manifest=tmp_path / "t.jsonl", line=r + 1)
            for r, n in enumerate(lengths)
        ]
        super().__init__(SourceSpec(tmp_path / f"source{number}", 1.0 + number), recordings)

    def tokens(self, recording, start, frames):
        if (recording, start // FRAMES) in self.broken:
            raise DataError(f"segment {start // FRAMES} is broken")
        return torch.tensor([self.number, recording, start // FRAMES])[:, None].expand(3, frames)


def corpus_of(tmp_path, lengths=LENGTHS, broken=()) -> Corpus:
    sources = tuple(
        Numbers(tmp_path, number, each, {(recording, segment) for s, recording, segment in broken if s == number})
        for number, each in enumerate(lengths)
    )
    return Corpus(
        sources=sources, problems=(), frames=FRAMES, rows=3, zero_token=-1, frame_rate=12.5, encodes_on="cpu"
    )  # fmt: skip


def data_of(corpus, *, batch=1, micro=1, rank=0, world=1, seed=0, shuffle=True, carry=False) -> TrainingData:
    return TrainingData(
        corpus, batch_size=batch, microbatches=micro, rank=rank, world_size=world,
        seed=seed, shuffle=shuffle, carry=carry,
    )  # fmt: skip


def segments(batch):
    """(source, recording, segment) of each row."""
    return [tuple(row[:, 0].tolist()) for row in batch.codes]


def global_step(corpus, step, batch, micro, world, **options):
    """Codes, ids and problems of the G rows of a step, put together from all ranks."""
    parts = [
        data_of(corpus, batch=batch, micro=micro, rank=rank, world=world, **options)[step * micro + m]
        for m, rank in itertools.product(range(micro), range(world))
    ]
    return (
        torch.cat([part.codes for part in parts]),
        torch.cat([part.document_ids for part in parts]),
        sorted({problem for part in parts for problem in part.problems}),
    )


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("broken", [(), ((0, 2, 1), (0, 2, 2), (1, 0, 3))])
def test_all_ranks_together_see_what_one_rank_sees(tmp_path, carry, broken):
    corpus = corpus_of(tmp_path, broken=broken)
    one = data_of(corpus, batch=8, carry=carry)
    found = []
    for step in range(9):
        whole = one[step]
        assert whole.codes.shape == (8, 3, FRAMES)
        for batch, micro, world in [(1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (2, 1, 4), (8, 1, 1)]:
            codes, ids, problems = global_step(corpus, step, batch, micro, world, carry=carry)
            assert torch.equal(codes, whole.codes)
            assert torch.equal(ids, whole.document_ids)
            assert problems == sorted(whole.problems)
        found += whole.problems
    assert bool(found) == bool(broken)


def test_the_row_of_a_microbatch_and_rank(tmp_path):
    corpus = corpus_of(tmp_path)
    whole = segments(data_of(corpus, batch=12)[5])
    row = data_of(corpus, batch=2, micro=3, rank=1, world=2)[5 * 3 + 2]
    assert segments(row) == whole[(2 * 2 + 1) * 2 :][:2]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_segment_once(tmp_path, shuffle):
    corpus = corpus_of(tmp_path, [(3, 1, 4, 1, 3)])
    every = [(0, recording, s) for recording, count in enumerate((3, 1, 4, 1, 3)) for s in range(count)]
    data = data_of(corpus, batch=2, micro=2, shuffle=shuffle)
    epochs = [[row for item in range(6) for row in segments(data[6 * epoch + item])] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == every
    assert (epochs[0] == every) == (not shuffle)
    assert (epochs[0] == epochs[1]) == (not shuffle)


def test_rows_are_documents_of_their_own_unless_carried(tmp_path):
    corpus = corpus_of(tmp_path)
    plain = data_of(corpus, batch=4)
    ids = torch.cat([plain[step].document_ids for step in range(5)])
    assert ids.dtype == torch.int64
    assert ids.tolist() == list(range(20))
    carried = data_of(corpus, batch=4, carry=True)
    last: list[tuple[int, tuple[int, ...]]] = [(-1, ())] * 4
    for step in range(30):
        batch = carried[step]
        for row, (document, place) in enumerate(zip(batch.document_ids.tolist(), segments(batch), strict=True)):
            before, (*recording, segment) = last[row], place
            if document == before[0]:
                assert before[1] == (*recording, segment - 1)
            else:
                assert segment == 0
                assert not before[1] or before[1][2] == LENGTHS[before[1][0]][before[1][1]] - 1
            last[row] = (document, place)


@pytest.mark.parametrize("carry", [False, True])
def test_any_step_can_be_gone_to_and_back(tmp_path, carry):
    corpus = corpus_of(tmp_path)
    data = data_of(corpus, batch=2, micro=2, carry=carry)
    straight = [segments(data_of(corpus, batch=2, micro=2, carry=carry)[item]) for item in range(40)]
    assert [segments(data[item]) for item in (0, 1, 2, 9, 9, 8, 39, 3, 4, 38)] == [
        straight[item] for item in (0, 1, 2, 9, 9, 8, 39, 3, 4, 38)
    ]


@pytest.mark.parametrize("carry", [False, True])
def test_orders_are_advanced_and_not_made_again(tmp_path, carry, monkeypatch):
    made = []
    name = "StreamOrder" if carry else "SegmentOrder"
    order = getattr(dataset, name)
    monkeypatch.setattr(dataset, name, lambda *values: made.append(1) or order(*values))
    data = data_of(corpus_of(tmp_path), batch=2, micro=2, carry=carry)
    for item in (0, 1, 2, 7, 30, 31):
        data[item]
    assert len(made) == 1
    data[0]
    assert len(made) == 2


def test_the_seed_decides(tmp_path):
    corpus = corpus_of(tmp_path)
    first, same, other = (segments(data_of(corpus, batch=16, seed=seed)[0]) for seed in (1, 1, 2))
    assert first == same != other


def test_a_broken_segment_is_replaced_by_the_next_of_its_source(tmp_path):
    broken = ((0, 2, 3), (0, 3, 0))
    corpus = corpus_of(tmp_path, [(3, 1, 4, 1)], broken)
    batch = data_of(corpus, batch=9, shuffle=False)[0]
    whole = segments(data_of(corpus_of(tmp_path, [(3, 1, 4, 1)]), batch=9, shuffle=False)[0])
    assert segments(batch) == [*whole[:7], (0, 0, 0), (0, 0, 0)]
    assert batch.problems == (
        f"{tmp_path / 't.jsonl'}:3: segment 3 is broken", f"{tmp_path / 't.jsonl'}:4: segment 0 is broken",
    )  # fmt: skip


def test_a_broken_segment_is_left_empty_when_carried(tmp_path):
    corpus = corpus_of(tmp_path, [(3,)], ((0, 0, 1),))
    data = data_of(corpus, carry=True)
    batches = [data[step] for step in range(4)]
    assert [segments(batch)[0] for batch in batches] == [(0, 0, 0), (-1, -1, -1), (0, 0, 2), (0, 0, 0)]
    assert (batches[1].codes == -1).all()
    assert batches[1].codes.shape == batches[0].codes.shape
    assert [len(batch.problems) for batch in batches] == [0, 1, 0, 0]
    assert [batch.document_ids.item() for batch in batches] == [0, 0, 0, 1]


@pytest.mark.parametrize(("count", "tried"), [(40, 21), (5, 5), (1, 1)])
def test_too_many_broken_segments_in_a_row_raise(tmp_path, count, tried):
    corpus = corpus_of(tmp_path, [(count,)], [(0, 0, segment) for segment in range(count)])
    with pytest.raises(DataError) as error:
        data_of(corpus)[0]
    assert not isinstance(error.value, SegmentError)
    assert f"{tried} segments of {tmp_path / 'source0'} in a row cannot be read" in str(error.value)
    assert "t.jsonl:1: segment" in str(error.value)


@pytest.mark.parametrize("values", [{"batch": 0}, {"micro": 0}, {"rank": 1}, {"rank": -1}])
def test_what_no_run_has_is_refused(tmp_path, values):
    with pytest.raises(AssertionError):
        data_of(corpus_of(tmp_path), **values)


@pytest.mark.parametrize("carry", [False, True])
def test_workers_make_no_difference(recordings, codec, carry):
    corpus = open_corpus(str(recordings), codec, frames=16)
    cut_off(recordings.parent / "talk0.wav", 0.6)
    runs = []
    before = torch.get_rng_state()
    for workers in (0, 2):
        data = data_of(corpus, batch=2, micro=2, rank=1, world=2, carry=carry)
        batches = list(itertools.islice(loader(data, start_step=3, num_workers=workers), 11))
        runs.append(batches)
        assert torch.equal(batches[0].codes, data[6].codes)
    assert torch.equal(torch.get_rng_state(), before)
    for alone, worked in zip(*runs, strict=True):
        assert type(alone) is type(worked)
        assert torch.equal(alone.codes, worked.codes)
        assert torch.equal(alone.document_ids, worked.document_ids)
        assert alone.problems == worked.problems
    assert any(batch.problems for batch in runs[0])


def test_an_error_in_a_worker_arrives_as_what_it_is(tmp_path):
    corpus = corpus_of(tmp_path, [(1,)], [(0, 0, 0)])
    batches = iter(loader(data_of(corpus), start_step=0, num_workers=1))
    with pytest.raises(DataError, match="cannot be read"):
        next(batches)
    batches._shutdown_workers()  # at once; the garbage collector would wait 5 s for the worker


def test_workers_cannot_encode_on_a_gpu(tmp_path):
    data = data_of(corpus_of(tmp_path))
    data.corpus = SimpleNamespace(encodes_on="cuda")
    with pytest.raises(DataError, match=r"data.num_workers = 2, and Mimi is on cuda"):
        loader(data, start_step=0, num_workers=2)
    loader(data, start_step=0, num_workers=0)
    data.corpus = SimpleNamespace(encodes_on=None)
    loader(data, start_step=0, num_workers=2)


def test_a_segment_error_carries_its_problem(tmp_path):
    problem = Problem(tmp_path / "t.jsonl", 3, "is broken")
    assert SegmentError(problem).problem is problem
