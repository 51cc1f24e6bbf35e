"""The order of segments and documents: whole epochs, by weight, and the same from any position on."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from moshi_ttt.data.order import SegmentOrder, StreamOrder


def taken(counts, weights, n, *, seed=0, shuffle=True):
    return SegmentOrder(counts, weights, seed, shuffle).take(n)


def test_an_epoch_has_every_index_once_and_the_next_another_order():
    draws = [index for _, index in taken([37], [1.0], 3 * 37)]
    epochs = [tuple(draws[start : start + 37]) for start in (0, 37, 74)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({*epochs, tuple(range(37))}) == 4


def test_without_shuffling_the_order_is_the_sources_own():
    assert taken([3], [1.0], 7, shuffle=False) == [(0, 0), (0, 1), (0, 2)] * 2 + [(0, 0)]
    of_second = [index for source, index in taken([5, 4], [1, 2], 60, shuffle=False) if source == 1]
    assert of_second == [n % 4 for n in range(len(of_second))]


def test_every_source_goes_through_its_own_epochs():
    draws = taken([7, 11, 1], [1, 2, 0.5], 400)
    for source, count in enumerate([7, 11, 1]):
        indexes = [index for drawn, index in draws if drawn == source]
        for start in range(0, len(indexes) - count, count):
            assert sorted(indexes[start : start + count]) == list(range(count))


def test_sources_are_drawn_by_weight():
    counted = Counter(source for source, _ in taken([10, 10, 10], [6.0, 3.0, 1.0], 20_000))
    np.testing.assert_allclose([counted[source] / 20_000 for source in range(3)], [0.6, 0.3, 0.1], atol=0.02)
    assert taken([5, 5], [2, 4], 50) == taken([5, 5], [1, 2], 50)


def test_the_seed_decides():
    assert taken([50], [1], 50, seed=3) == taken([50], [1], 50, seed=3)
    assert taken([50], [1], 50, seed=3) != taken([50], [1], 50, seed=4)
    sources = [[source for source, _ in taken([5, 5], [1, 1], 50, seed=seed)] for seed in (3, 4)]
    assert sources[0] != sources[1]
    assert len(taken([3], [1], 3, seed=2**32 - 1)) == 3


def test_two_sources_of_one_size_have_different_orders():
    draws = taken([64, 64], [1, 1], 400)
    first = [[index for source, index in draws if source == each][:64] for each in (0, 1)]
    assert first[0] != first[1]


def test_permutations_are_even():
    """Every index is equally often in every place."""
    draws = np.array([index for _, index in taken([6], [1.0], 6 * 6_000)]).reshape(6_000, 6)
    counts = np.stack([np.bincount(draws[:, place], minlength=6) for place in range(6)])
    assert abs(counts - 1000).max() < 5 * 1000**0.5


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_cut_gives_the_same_draws(shuffle):
    whole = taken([7, 3, 20], [1, 2, 3], 500, shuffle=shuffle)
    order = SegmentOrder([7, 3, 20], [1, 2, 3], 0, shuffle)
    pieces = []
    for n in itertools.cycle([1, 0, 2, 64, 5]):
        pieces += order.take(min(n, 500 - len(pieces)))
        assert order.position == len(pieces)
        if len(pieces) == 500:
            break
    assert pieces == whole


def test_draws_are_these():
    """A run is resumed by another version of Python and numpy: the numbers must not move."""
    draws = [(1, 0), (1, 2), (0, 3), (0, 4), (0, 2), (0, 1), (1, 1), (1, 2), (0, 0), (1, 0)]
    assert taken([5, 3], [2, 1], 10, seed=7) == draws


@pytest.mark.parametrize("counts", [[7], [7, 3, 20]])
def test_skipping_is_taking_without_looking(counts):
    order = SegmentOrder(counts, [1.0] * len(counts), 5, True)
    order.skip(333)
    order.take(3)
    order.skip(0)
    order.skip(64)
    assert order.position == 400
    assert order.take(50) == taken(counts, [1.0] * len(counts), 450, seed=5)[400:]


def steps_of(order, n):
    return [order.next_step() for _ in range(n)]


DOCUMENTS = [[3, 1, 4, 1], [5, 9, 2]]


def test_streams_read_documents_from_end_to_end():
    steps = steps_of(StreamOrder(DOCUMENTS, [1, 1], 0, True, 5), 60)
    seen: dict[int, tuple[int, int]] = {}
    for stream in range(5):
        rows = [step[stream] for step in steps]
        for _, group in itertools.groupby(rows, key=lambda row: row[3]):
            document = list(group)
            source, recording, _, document_id = document[0]
            assert document_id not in seen
            seen[document_id] = (source, recording)
            assert all(row[:2] == (source, recording) for row in document)
            assert [row[2] for row in document] == list(range(len(document)))
            if document[-1] != rows[-1]:
                assert len(document) == DOCUMENTS[source][recording]
    assert sorted(seen) == list(range(len(seen)))
    drawn = SegmentOrder([4, 3], [1, 1], 0, True).take(len(seen))
    assert [seen[number] for number in range(len(seen))] == drawn


def test_streams_take_documents_in_turn():
    order = StreamOrder([[1, 2, 1]], [1], 0, False, 2)
    assert steps_of(order, 3) == [
        [(0, 0, 0, 0), (0, 1, 0, 1)],
        [(0, 2, 0, 2), (0, 1, 1, 1)],
        [(0, 0, 0, 3), (0, 1, 0, 4)],
    ]


def test_an_epoch_of_documents_has_every_segment_once():
    order = StreamOrder([[3, 1, 4, 1, 5]], [1], 9, True, 1)
    segments = [step[0][1:3] for step in steps_of(order, 14)]
    every = [(document, segment) for document, length in enumerate([3, 1, 4, 1, 5]) for segment in range(length)]
    assert sorted(segments) == every


@pytest.mark.parametrize("streams", [1, 2, 7])
def test_skipping_steps_is_stepping_without_looking(streams):
    whole = steps_of(StreamOrder(DOCUMENTS, [1, 2], 3, True, streams), 300)
    order = StreamOrder(DOCUMENTS, [1, 2], 3, True, streams)
    position = 0
    for skipped in (0, 1, 7, 0, 150):
        order.skip(skipped)
        position += skipped
        assert order.position == position
        assert steps_of(order, 2) == whole[position : position + 2]
        position += 2
    order.skip(100)
    assert order.next_step() == whole[order.position - 1]


def test_far_skips_are_quick():
    start = time.perf_counter()
    SegmentOrder([1_000, 10], [1.0, 3.0], 0, True).skip(2_000_000)
    StreamOrder([[1] * 50, [1, 1, 1]], [1.0, 2.0], 0, True, 1).skip(500_000)
    StreamOrder([[1, 2, 3] * 50], [1.0], 0, True, 64).skip(500_000 // 64)
    assert time.perf_counter() - start < 10, "a second is usual"


@pytest.mark.parametrize(
    ("counts", "weights"), [([], []), ([3, 0], [1, 1]), ([3], [1, 1]), ([3], [0.0]), ([3, 3], [1, -1])]
)
def test_what_no_corpus_has_is_refused(counts, weights):
    with pytest.raises(AssertionError):
        SegmentOrder(counts, weights, 0, True)
    with pytest.raises(AssertionError):
        StreamOrder([[1, 0]], [1], 0, True, 1)
