from __future__ import annotations

import os

import pytest

from instantcharacter.files.atomic import atomic_write, check_replaceable


def test_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "folder/a.txt"
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_writers_of_one_path_do_not_share_a_temporary_file(tmp_path):
    """As two threads of a process, or processes of one number on two hosts."""
    path = tmp_path / "a.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_file_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "a.txt", [], os.fsync

    def recording(descriptor):
        assert not path.exists()
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    with atomic_write(path) as partial:
        partial.write_text("new")
    assert synced == [path.stat().st_ino]


def test_file_has_the_permissions_of_new_files(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "a") as partial:
        partial.chmod(0o600)  # as safetensors does
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_only_files_of_the_same_kind_are_replaceable(tmp_path):
    path = tmp_path / "a.txt"
    check_replaceable(path, "a note", lambda _: False)
    path.touch()
    check_replaceable(path, "a note", lambda _: False)
    path.write_text("text")
    check_replaceable(path, "a note", lambda _: True)
    with pytest.raises(FileExistsError, match="is not a note"):
        check_replaceable(path, "a note", lambda _: False)
    with pytest.raises(IsADirectoryError):
        check_replaceable(tmp_path, "a note", lambda _: True)
