"""``~`` in a path is the user's home, wherever no shell has replaced it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moshi_ttt.core.adapter import find_adapter, read_manifest
from moshi_ttt.core.config_parsing import read_mapping
from moshi_ttt.core.errors import AdapterError, ConfigError
from moshi_ttt.core.paths import user_path


@pytest.mark.parametrize(
    ("given", "path"),
    [("~", "/home/me"), ("~/runs/a", "/home/me/runs/a"), ("./~", "~"), ("a/~/b", "a/~/b"), ("a~", "a~"), ("", ".")],
)
def test_a_leading_tilde_alone_is_the_home(monkeypatch, given, path):
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path(given) == Path(path)


def test_a_home_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match=r"~no-such-user/a: there is no home folder.*Write \./~no"):
        user_path("~no-such-user/a")


def test_the_python_api_knows_the_home_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path}/none.yaml"):
        read_mapping("~/none.yaml")
    with pytest.raises(AdapterError, match=f"{tmp_path}/none"):
        read_manifest("~/none")
    with pytest.raises(AdapterError, match=f"{tmp_path}/none"):
        find_adapter("~/none")
