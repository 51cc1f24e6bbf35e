"""The registry of backends: what ``auto`` takes, what a name gets, what is said about the others."""

from __future__ import annotations

import logging

import pytest

from moshi_ttt.core.errors import BackendError, ConfigError
from moshi_ttt.plugins.common.backends import Backend, Operation, log_once


def operation(**reasons):
    """Backends by name; a use that is their name is refused."""
    return Operation(
        "train",
        "a training call",
        [
            Backend(
                name=name,
                why_not=lambda use, name=name: "it is full" if name in use else None,
                why_not_auto=lambda use, reason=reason: reason,
                load=lambda use, name=name: f"run of {name}",
            )
            for name, reason in reasons.items()
        ],
    )


@pytest.fixture(autouse=True)
def nothing_said():
    log_once.cache_clear()


def test_auto_takes_the_first_that_can_and_says_once_why_not_the_others(caplog):
    found = operation(triton=None, cpp="it is built first", torch=None, naive="it is slow")
    with caplog.at_level(logging.INFO, logger="moshi_ttt.backends"):
        for _ in range(2):
            chosen = found.choose("auto", ("triton",), "layers.0")
    assert (chosen.name, chosen.run) == ("torch", "run of torch")
    assert [record.getMessage() for record in caplog.records] == [
        "backend auto, a training call: not triton: it is full",
        "backend auto, a training call: not cpp: it is built first",
    ]


def test_a_name_gets_what_auto_passes_by():
    assert operation(torch=None, naive="it is slow").choose("naive", (), "layers.0").run == "run of naive"


@pytest.mark.parametrize(("name", "said"), [("triton", "it is full"), ("cpp", "there is none")])
def test_a_name_that_cannot_be_had_raises(name, said):
    found = operation(triton=None, torch=None, naive="it is slow")
    with pytest.raises(BackendError) as raised:
        found.choose(name, ("triton",), "layers.3.sequence")
    assert str(raised.value) == (
        f"layers.3.sequence: backend: {name} was asked for a training call, and cannot be had: {said}. Here, it can be "
        "auto, torch, naive. Set one of these, as in backend: {train: auto}; the results are the same."
    )
    assert isinstance(raised.value, ConfigError)


def test_what_cannot_be_loaded_raises_by_name_and_is_passed_by_under_auto(caplog):
    def fail(use):
        raise BackendError("No compiler.")

    found = Operation(
        "step",
        "a streamed step",
        [Backend(name="cpp", load=fail), Backend(name="torch", load=lambda use: 1)],
    )
    with pytest.raises(BackendError, match=r"^No compiler\.$"):
        found.choose("cpp", None, "here")
    with caplog.at_level(logging.INFO, logger="moshi_ttt.backends"):
        assert found.choose("auto", None, "here").name == "torch"
    assert "not cpp: No compiler." in caplog.text


def test_where_none_can_auto_raises():
    with pytest.raises(BackendError, match=r"backend: auto was asked for a training call.*no backend serves it"):
        operation(triton=None).choose("auto", ("triton",), "here")
