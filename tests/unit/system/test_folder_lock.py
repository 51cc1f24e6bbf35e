"""Holding a folder: what is left behind, and file systems that cannot lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket

import pytest

from moshi_ttt.system.folder_lock import LOCK, FolderInUseError, hold


def test_a_folder_is_made_and_removed_when_it_stays_empty(tmp_path):
    with hold(tmp_path / "a" / "b"):
        holder = json.loads((tmp_path / "a" / "b" / LOCK).read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
    assert list(tmp_path.iterdir()) == []


def test_what_was_put_there_stays(tmp_path):
    with hold(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that cannot lock."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def left_by(folder, **holder):
    (folder / LOCK).write_text(json.dumps({"pid": 1, "host": socket.gethostname(), "since": "today", **holder}))


def test_where_nothing_can_be_locked_the_file_is_the_lock(tmp_path, no_locks):
    with hold(tmp_path):
        with (
            pytest.raises(FolderInUseError, match=f"process {os.getpid()}.*cannot lock.*delete .*{LOCK}"),
            hold(tmp_path),
        ):
            pass
        assert (tmp_path / LOCK).is_file()
    assert not (tmp_path / LOCK).exists()
    with hold(tmp_path):
        pass


def test_a_file_of_a_process_of_this_host_that_has_ended_is_no_lock_there(tmp_path, no_locks):
    ended = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(ended, 0)
    left_by(tmp_path, pid=ended)
    with hold(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("holder", [{"host": "another"}, {"pid": None}], ids=["another host", "unreadable"])
def test_one_that_cannot_be_asked_is_asked_about(tmp_path, no_locks, holder):
    left_by(tmp_path, **holder)
    with pytest.raises(FolderInUseError, match="if that one does not run any more, delete"), hold(tmp_path):
        pass
    assert (tmp_path / LOCK).is_file()
