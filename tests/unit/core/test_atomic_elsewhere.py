"""Writing whole files and folders where the operating system is Windows, simulated: it opens no folder as a file."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from moshi_ttt.core.atomic import atomic_file, atomic_folder


@pytest.fixture
def windows(monkeypatch):
    """``os.open`` and ``os.fsync`` with the refusals of Windows. Yields the names of what was synced."""
    really_open, really_sync = os.open, os.fsync
    opened, synced = {}, []

    def open_file(path, flags, *others, **named):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = really_open(path, flags, *others, **named)
        opened[descriptor] = (os.path.basename(path), flags)
        return descriptor

    def sync(descriptor):
        name, flags = opened[descriptor]
        if not flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(9, "Bad file descriptor")
        synced.append(name)
        really_sync(descriptor)

    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # else rmtree opens folders, as it can elsewhere
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", sync)
    return synced


def test_a_folder_appears_whole_and_is_replaced(tmp_path, windows):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "made") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "file").write_text(text)
    assert (tmp_path / "made" / "inner" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert windows == ["file", "file"]


def test_a_file_appears_whole_and_is_replaced(tmp_path, windows):
    for text in ("old", "new"):
        with atomic_file(tmp_path / "made") as temporary:
            temporary.write_text(text)
    assert (tmp_path / "made").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert len(windows) == 2


def test_a_failure_leaves_what_was_there(tmp_path, windows):
    (tmp_path / "made").mkdir()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "made"):
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_elsewhere_folders_are_synced_as_well(tmp_path, monkeypatch):
    synced, really_sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor) or really_sync(descriptor))
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "file").write_text("")
    assert len(synced) == 3  # the file, its folder, the folder above


def test_an_interruption_as_the_temporary_folder_appears_clears_it_away(tmp_path, monkeypatch):
    really_make = os.mkdir

    def interrupted(path, *others, **named):
        really_make(path, *others, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "made"):
        pass
    assert list(tmp_path.iterdir()) == []
