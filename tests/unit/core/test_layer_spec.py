"""Layer specifications: every form of the grammar, every refusal."""

from __future__ import annotations

import re

import pytest

from moshi_ttt.core.errors import ConfigError, LayerSpecError
from moshi_ttt.core.layer_spec import resolve_layers


@pytest.mark.parametrize(
    ("specification", "num_layers", "expected"),
    [
        ("none", 8, ()),
        ("all", 3, (0, 1, 2)),
        ("middle", 32, tuple(range(8, 24))),
        ("middle", 6, (1, 2, 3)),
        ("first:2", 8, (0, 1)),
        ("first:8", 8, tuple(range(8))),
        ("last:3", 32, (29, 30, 31)),
        ("last:1", 1, (0,)),
        ("every:3", 8, (0, 3, 6)),
        ("every:6@5", 32, (5, 11, 17, 23, 29)),
        ("every:1", 4, (0, 1, 2, 3)),
        ("7", 8, (7,)),
        ("-1", 8, (7,)),
        ("-8", 8, (0,)),
        ("29,30,31", 32, (29, 30, 31)),
        ("31, 29 ,30", 32, (29, 30, 31)),
        ("8-15", 32, tuple(range(8, 16))),
        ("5-5", 8, (5,)),
        ("-4--1", 8, (4, 5, 6, 7)),
        ("0--1", 3, (0, 1, 2)),
        ("first:1,3-4,-1", 8, (0, 3, 4, 7)),
        (5, 8, (5,)),
        (-1, 8, (7,)),
        ((3, 1, -1), 8, (1, 3, 7)),
        ([0], 8, (0,)),
    ],
)
def test_resolves(specification, num_layers, expected):
    assert resolve_layers(specification, num_layers) == expected


@pytest.mark.parametrize(
    ("specification", "reason"),
    [
        ("8", "out of range"),
        ("-9", "out of range"),
        ("4-8", "out of range"),
        (8, "out of range"),
        ("every:2@8", "out of range"),
        ("first:0", "a number from 1 to 8"),
        ("first:9", "a number from 1 to 8"),
        ("last:0", "a number from 1 to 8"),
        ("every:0", "a number from 1 to 8"),
        ("5-2", "runs backwards"),
        ("-1-0", "runs backwards"),
        ("first:2,1", "claimed twice"),
        ("3,3", "claimed twice"),
        ("7,-1", "claimed twice"),
        ("all,2", "claimed twice"),
        ((1, 1), "claimed twice"),
    ],
)
def test_impossible_specification_raises_and_lists_the_layers(specification, reason):
    with pytest.raises(LayerSpecError, match=reason) as caught:
        resolve_layers(specification, 8)
    assert re.search("0 to 7|1 to 8", str(caught.value)), "the message says which layers exist"


@pytest.mark.parametrize(
    "specification",
    [
        "",
        " ",
        ",",
        "1,",
        "half",
        "first",
        "first:",
        "first:-1",
        "first: 2",
        "every:2@-1",
        "last:1.5",
        "1..3",
        "ALL",
        True,
    ],
)
def test_unreadable_specification_raises_and_names_the_grammar(specification):
    with pytest.raises(LayerSpecError, match=r"cannot read.*Allowed: none, all, middle"):
        resolve_layers(specification, 8)


def test_empty_list_raises():
    with pytest.raises(LayerSpecError):
        resolve_layers((), 8)


def test_none_stands_alone():
    with pytest.raises(LayerSpecError, match="'none' stands alone"):
        resolve_layers("none,3", 8)


def test_middle_of_too_few_layers_raises():
    with pytest.raises(LayerSpecError, match="'middle' selects none of the 1 layers"):
        resolve_layers("middle", 1)


def test_double_claim_names_both_parts():
    with pytest.raises(LayerSpecError, match="layer 5 is claimed twice, by '4-6' and 'every:5'"):
        resolve_layers("4-6,every:5", 8)


def test_is_a_config_error():
    assert issubclass(LayerSpecError, ConfigError)


@pytest.mark.parametrize(
    ("specification", "expected"),
    [
        ("all", (1, 3, 5, 7)),
        ("middle", (3, 5)),
        ("first:2", (1, 3)),
        ("last:2", (5, 7)),
        ("every:2@1", (3, 7)),
        ("-1", (7,)),
        ("0,last:1", (0, 7)),
        ("2-3", (2, 3)),
    ],
)
def test_words_count_over_the_layers_with_a_site_and_numbers_are_of_layers(specification, expected):
    assert resolve_layers(specification, 8, (1, 3, 5, 7)) == expected


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("last:5", "a number from 1 to 4; the layers with such a site are 1, 3, 5, 7"),
        ("every:1@4", "out of range; the layers with such a site are 1, 3, 5, 7"),
        ("3,last:3", "layer 3 is claimed twice"),
    ],
)
def test_a_count_over_too_few_sites_names_them(specification, message):
    with pytest.raises(LayerSpecError, match=message):
        resolve_layers(specification, 8, (1, 3, 5, 7))
