from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from instantcharacter.files.atomic import atomic_write, check_replaceable, check_writable, clear_leftovers


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


def test_file_is_synced_before_it_takes_its_name_and_its_folder_after(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "a.txt", [], os.fsync

    def recording(descriptor):
        synced.append((os.fstat(descriptor).st_ino, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    with atomic_write(path) as partial:
        partial.write_text("new")
    assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    """As on Windows, where a folder cannot be opened."""
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: real(path, *rest) if path != tmp_path else real("/gone", 0))
    with atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"


def left_by_a_killed_process(path: Path, hours: float) -> Path:
    """The folder of a partial file that nobody has written to for that long."""
    folder = path.with_name(f".{path.name}.part") / "0123456789abcdef"
    folder.mkdir(parents=True)
    for part in (folder / "partial", folder / ".tmpAbC", folder):
        if part != folder:
            part.write_text("half")
        then = time.time() - hours * 3600
        os.utime(part, (then, then))
    return folder


def test_next_write_of_a_name_clears_what_killed_processes_left(tmp_path):
    for hours in (1.1, 1000):
        left_by_a_killed_process(tmp_path / "a.txt", hours)
        with atomic_write(tmp_path / "a.txt") as partial:
            partial.write_text("new")
        assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_writer_that_wrote_within_the_hour_is_left_alone(tmp_path):
    living = left_by_a_killed_process(tmp_path / "a.txt", 0.9)
    with atomic_write(tmp_path / "a.txt"):
        pass
    assert sorted(part.name for part in living.iterdir()) == [".tmpAbC", "partial"]


def test_threads_that_write_one_name_do_not_disturb_each_other(tmp_path):
    def write(number: int) -> None:
        for _ in range(40):
            with atomic_write(tmp_path / "a.txt") as partial:
                partial.write_text(str(number) * 1000)
            assert len(set((tmp_path / "a.txt").read_text())) == 1

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(write, number) for number in range(4)]:
            future.result()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("moment", ["after its folder was made", "after its folder was met"])
def test_a_writer_may_end_while_another_begins(tmp_path, monkeypatch, moment):
    """The folder that both share goes in between."""
    shared, real, gone = tmp_path / ".a.txt.part", os.mkdir, []

    def mkdir(path, *rest, **options):
        if Path(path) == shared and len(gone) < 3:
            real(path, *rest, **options)
            gone.append(path)
            if moment == "after its folder was made":
                shared.rmdir()
            else:
                try:
                    real(path, *rest, **options)
                finally:
                    shared.rmdir()
        else:
            real(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert len(gone) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_in_the_way_of_the_temporary_folder_is_an_error_and_stays(tmp_path):
    (tmp_path / ".a.txt.part").write_text("mine")
    with pytest.raises(OSError), atomic_write(tmp_path / "a.txt"):
        pass
    assert (tmp_path / ".a.txt.part").read_text() == "mine"


def test_leftovers_are_cleared_beside_writers(tmp_path):
    """Writers make and remove folders while others walk over them."""

    def write(number: int) -> None:
        for _ in range(200):
            check_writable(tmp_path / f"{number % 2}" / "a.txt")

    def clear(_: int) -> None:
        for _ in range(200):
            clear_leftovers(tmp_path)

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(task, number) for number in range(2) for task in (write, clear)]:
            future.result()


@pytest.mark.parametrize("named", ["not at all", "by the partial file"])
def test_error_of_the_system_names_the_file(tmp_path, named):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'$"),
        atomic_write(tmp_path / "a.txt") as partial,
    ):
        raise OSError(28, "No space left on device", *([] if named == "not at all" else [str(partial)]))


def test_name_is_writable_if_its_partial_file_is(tmp_path):
    check_writable(tmp_path / "new" / "a.txt")
    assert list((tmp_path / "new").iterdir()) == []
    for path in (tmp_path / f"{'a' * 251}.txt", Path(__file__) / "a.txt"):
        with pytest.raises(OSError):
            check_writable(path)


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
