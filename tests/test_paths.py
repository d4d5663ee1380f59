"""paths.py: a file is replaced whole or not at all, nothing else is written, and one process at a time writes."""

import contextlib
import errno
import os
import shutil
import socket
import threading

import pytest

from richhf_data import paths
from richhf_data.errors import UserError


def test_a_file_appears_whole(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with paths.writing(file) as partial:
        assert partial.parent == file.parent and partial.name != file.name and not file.exists()
        partial.write_text("first")
    assert file.read_text() == "first"
    paths.replace(file, b"second")
    assert file.read_text() == "second" and os.listdir(file.parent) == ["a.txt"]
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_file_as_it_was(tmp_path, error):
    paths.replace(tmp_path / "a.txt", b"first")
    for writing in (paths.writing, paths.writing_url):
        with pytest.raises(error), writing(str(tmp_path / "a.txt")) as partial:
            if writing is paths.writing:
                partial.write_text("second")
            else:
                partial.write(b"second")
            raise error
        assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "first"


def test_no_link_is_followed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("precious")
    monkeypatch.setattr(paths.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / "a.txt.guessed.partial").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        paths.replace(tmp_path / "a.txt", b"x")
    assert (tmp_path / "victim").read_text() == "precious" and len(os.listdir(tmp_path)) == 2


def test_urls_are_written_whole(tmp_path):
    with paths.writing_url(f"file://{tmp_path}/a.bin") as file:
        file.write(b"data")
        assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin").read_bytes() == b"data" and os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_another_process_holds_is_refused_by_name(tmp_path):
    folder = tmp_path / "new" / "run"
    with paths.locked(folder):
        held = (
            rf"run: process {os.getpid()} of {socket.gethostname()} \(since 20.*\) "
            "writes there, expected one process at a time; wait for it or end it, or choose another folder"
        )
        with pytest.raises(UserError, match=held), paths.locked(tmp_path / "new" / ".." / "new" / "run"):
            pass
        with paths.locked(folder, ".other"):
            assert sorted(os.listdir(folder)) == [".lock", ".other"]
        assert not paths.holds_files(folder)
    assert os.listdir(tmp_path) == []  # nothing was written
    with paths.locked(folder):
        paths.replace(folder / "a.txt", b"")
    assert os.listdir(folder) == ["a.txt"]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 1')
    with paths.locked(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} of"), paths.locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_waiting_process_gets_the_lock_of_a_file_that_is_there(tmp_path):
    got = []

    def wait():
        with paths.locked(tmp_path, wait=True):
            got.append((tmp_path / ".lock").exists())

    with paths.locked(tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.1)
        assert not got
    thread.join()
    assert got == [True] and os.listdir(tmp_path) == []


def test_the_lock_of_the_next_process_stays(tmp_path):
    folder, first = tmp_path / "run", contextlib.ExitStack()
    first.enter_context(paths.locked(folder))
    shutil.rmtree(folder)
    with paths.locked(folder):
        first.close()
        with pytest.raises(UserError, match="writes there"), paths.locked(folder):
            pass


@pytest.mark.parametrize("kind", ["no locks", "read-only", "bucket"])
def test_where_nothing_can_be_locked_work_goes_on(kind, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError(errno.ENOLCK if kind == "no locks" else errno.EROFS, "No locks available")

    monkeypatch.setattr(*{"no locks": (paths.fcntl, "flock")}.get(kind, (paths.os, "open")), fail)
    with paths.locked("gs://bucket/run" if kind == "bucket" else tmp_path):
        pass
    reason = "its file system has no locks (No locks available)"
    warned = f"WARNING: {tmp_path}: {reason}: let one process at a time write there\n"
    assert capsys.readouterr().err == (warned if kind == "no locks" else "")


def test_a_planted_link_is_no_lock(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="Too many levels of symbolic links"), paths.locked(tmp_path):
        pass
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").hardlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="lock: is a link or a file of someone else"), paths.locked(tmp_path):
        pass
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("my notes")
    with pytest.raises(UserError, match="lock: is a link or a file of someone else"), paths.locked(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / ".lock").read_text() == "my notes"


def test_a_lock_that_cannot_be_written_is_held_all_the_same(tmp_path, monkeypatch):
    """As that of another user is."""
    opened = os.open

    def refuse_to_write(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *mode)

    with paths.locked(tmp_path):
        monkeypatch.setattr(os, "open", refuse_to_write)
        with pytest.raises(UserError, match=f"process {os.getpid()} of"), paths.locked(tmp_path):
            pass
        monkeypatch.undo()


def test_files_take_the_places_of_earlier_ones_together(tmp_path):
    names = ("a", "folder", "gone", "mark")
    for name in ("a", "gone", "mark", "mine"):
        (tmp_path / name).write_text("old")
    with paths.exchanging(tmp_path, names) as new:
        for name in ("a", "mark", "folder/b"):
            paths.replace(new / name, b"new")
            assert (tmp_path / "a").read_text() == "old"
    found = {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {"a": "new", "folder/b": "new", "mark": "new", "mine": "old"}


def test_a_folder_that_another_process_holds_is_not_exchanged(tmp_path):
    with paths.locked(tmp_path):
        (tmp_path / ".partial").mkdir()
        with pytest.raises(UserError, match="writes there"), paths.exchanging(tmp_path, ("a",)):
            pass
        assert (tmp_path / ".partial").exists()


@pytest.mark.parametrize("late", [False, True])
def test_an_exchange_that_fails_leaves_all_as_it_was(late, tmp_path, monkeypatch):
    def rename(source, target):
        if source.parent.name == "new" and source.name == "mark":
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.rename(source, target)

    for name in ("a", "gone", "mark"):
        (tmp_path / name).write_text("old")
    if late:
        monkeypatch.setattr(paths.pathlib.Path, "rename", rename)
    with (
        pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'"),
        paths.exchanging(tmp_path, ("a", "gone", "mark")) as new,
    ):
        (new / "a").write_text("new")
        (new / "mark").write_text("new")
        if not late:
            raise OSError(errno.ENOSPC, "No space left on device")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "old", "gone": "old", "mark": "old"}


@pytest.mark.parametrize("renames", range(6))
def test_an_exchange_that_a_kill_interrupts_is_completed(renames, tmp_path, monkeypatch):
    left = iter(range(renames))

    def rename(source, target):
        if next(left, None) is None:
            raise KeyboardInterrupt  # nothing of ours runs after a kill, so nothing may be undone or removed here
        os.rename(source, target)

    names = ("a", "gone", "fresh", "mark")
    for name in ("a", "gone", "mark"):
        (tmp_path / name).write_text("old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), paths.exchanging(tmp_path, names) as new:
        for name in ("a", "fresh", "mark"):
            (new / name).write_text("new")
        patch.setattr(paths.pathlib.Path, "rename", rename)
        patch.setattr(paths, "_remove", lambda path: None)
    assert (tmp_path / ".partial").is_dir()
    paths.finish_exchange(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "new", "fresh": "new", "mark": "new"}


@pytest.mark.parametrize("journal", ['[["../victim"], []]', "{", "[1, 2]", '[["a"]]'])
def test_what_is_not_ours_stays_in_a_folder_of_that_name(journal, tmp_path):
    (tmp_path / "victim").write_text("precious")
    partial = tmp_path / "output" / ".partial"
    partial.mkdir(parents=True)
    for name, text in (("notes.txt", "mine"), ("journal.json", journal)):
        (partial / name).write_text(text)
        with pytest.raises(UserError, match=r"\.partial.*move"), paths.exchanging(tmp_path / "output", ("a",)):
            pass
        assert (partial / name).read_text() == text
        (partial / name).unlink()
    partial.rmdir()
    partial.symlink_to(tmp_path)
    with pytest.raises(UserError, match="no folder of ours"), paths.exchanging(tmp_path / "output", ("a",)):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_long_name_is_written(tmp_path):
    for name in ("a" * 255, "\N{CAT}" * 63):
        paths.replace(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"


def test_an_error_without_a_name_gets_the_files(tmp_path):
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a.txt'}'"),
        paths.writing(tmp_path / "a.txt"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")


@pytest.mark.parametrize(("number", "name"), [(errno.EACCES, "place"), (errno.EROFS, "place"), (errno.ECONNREFUSED, None)])
def test_only_an_error_of_the_file_gets_its_name(number, name):
    with pytest.raises(OSError) as found, paths.naming("place"):
        raise OSError(number, os.strerror(number))
    assert (found.value.errno, found.value.filename) == (number, name)


def test_what_lies_in_a_folder_is_found_through_links(tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "sub")
    folder, link = tmp_path / "folder", tmp_path / "link"
    assert paths.contains(folder, link) and paths.contains(link, link)
    assert not paths.contains(link, folder) and not paths.contains(tmp_path / "fold", folder)
