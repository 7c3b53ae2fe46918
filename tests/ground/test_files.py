"""`~` in paths, optional text files, atomic writes, and locks."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ov_phi3 import files
from ov_phi3.files import expanded, lock_file, text_or_empty, write_atomically


def test_a_tilde_becomes_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert expanded("~/model") == tmp_path / "model"


def test_a_tilde_of_an_unknown_user_stays() -> None:
    assert expanded("~no-such-user-here/model") == Path("~no-such-user-here/model")


def test_an_argument_that_is_no_path_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        expanded(3)


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "data.bin"
    with write_atomically(target) as file:
        file.write(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_failure_the_old_file_is_unchanged_and_nothing_else_is_left(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "data.bin"
    target.write_bytes(b"old")
    with pytest.raises(error), write_atomically(target) as file:
        file.write(b"half of the n")
        raise error
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_rename_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"), write_atomically(target) as file:
        file.write(b"data")
    assert list(tmp_path.iterdir()) == [target]


def test_the_data_is_on_the_disk_before_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "data.bin"
    synced: list[bool] = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: synced.append(target.exists()))
    with write_atomically(target) as file:
        file.write(b"data")
    assert synced == [False]
    assert target.exists()


def test_text_of_a_missing_file_is_empty(tmp_path: Path) -> None:
    assert text_or_empty(tmp_path / "missing") == ""
    (tmp_path / "file").write_bytes(b"a\xff")
    assert text_or_empty(tmp_path / "file") == "a\ufffd"


def test_a_locked_file_cannot_be_locked_again_until_it_is_closed(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / "lock")
    with pytest.raises(OSError):  # noqa: PT011 - the number depends on the system
        lock_file(tmp_path / "lock")
    lock.close()
    lock_file(tmp_path / "lock").close()


def test_a_waiting_call_gets_the_lock_when_the_other_closes_the_file(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / "lock")
    order: list[str] = []

    def wait() -> None:
        with lock_file(tmp_path / "lock", wait=True):
            order.append("locked")

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.2)
    order.append("closed")
    lock.close()
    thread.join(10)
    assert order == ["closed", "locked"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_a_closed_lock_is_free_although_a_forked_process_has_the_file_open(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / "lock")
    inherited = os.dup(lock._file.fileno())  # shares the lock, as the copy in a forked process does
    try:
        lock.close()
        lock_file(tmp_path / "lock").close()
    finally:
        os.close(inherited)
