"""Writes files on a disk or in a bucket (gs://) whole or not at all, into folders that one process holds at a time."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from etils import epath

from richhf_data import input_files
from richhf_data.errors import UserError

PROCESS_LIMITS = errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN  # no file is at fault
# Of the file, and not of a network.
_OF_THE_FILE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT}
_OF_THE_FILE |= {errno.ENOSYS}  # semaphores without /dev/shm
_JOURNAL = "journal.json"
LOCK, PARTIAL = ".lock", ".partial"  # what `locked` and `exchanging` keep in a folder while they write there


def absolute(path) -> epath.Path:
    """The absolute path of a local path; a URL stays as it is."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def check_file(what: str, path, expected: str) -> None:
    """Raises UserError if a local path is no regular file: to open a named pipe would wait for ever."""
    reason = input_files.not_a_file(path)
    if reason == "no such file":
        raise UserError(f"{what}: no file {path}{', a link to nothing' * os.path.islink(path)}; expected {expected}")
    if reason:
        raise UserError(f"{what}: {path} is {reason}; expected {expected}")


@contextlib.contextmanager
def writing(path) -> Iterator[epath.Path]:
    """Gives a new, empty file beside `path` to write; the file replaces `path` when the block ends without an error.

    Makes the folder. An error removes the file and leaves `path` as it was. The name of the file cannot be guessed, and
    on a disk the file is created exclusively, so that no link is followed.

    >>> with writing("out/weights.npz") as partial:
    ...     partial.write_bytes(data)
    """
    path = epath.Path(path)
    partial = path.with_name(_partial(path.name))
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if "://" not in os.fspath(path):
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def replace(path, data: bytes) -> None:
    """Writes the file `path` whole or not at all; see `writing`."""
    with writing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def writing_url(url: str) -> Iterator[BinaryIO]:
    """As `writing`, for a path or a URL of any file system that fsspec knows; gives the open file. The folder must exist."""
    filesystem, path = input_files.open_url(url)
    folder, slash, name = path.rpartition("/")
    partial = f"{folder}{slash}{_partial(name)}"
    with naming(url):
        try:
            with filesystem.open(partial, "wb") as file:
                yield file
            filesystem.mv(partial, path)
        except BaseException:
            if filesystem.exists(partial):
                filesystem.rm(partial)
            raise


@contextlib.contextmanager
def naming(path) -> Iterator[None]:
    """Gives an error of the operating system that names no file, such as that of a full disk, the name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_FILE or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def locked(folder, name: str = LOCK, wait: bool = False) -> Iterator[None]:
    """Holds a folder against other processes. The system frees it when this process ends, however it ends.

    Makes the folder; at the end the lock's file goes, and the folder too if nothing else was written. Buckets have no locks:
    there nothing is held. On a file system without locks nothing is held either, with a warning.

    Args:
      name: of the lock's file. wait: for the process that holds it, in place of an error.

    Raises:
      UserError: another process holds it; says which, where and since when.
    """
    if "://" in os.fspath(folder):
        yield
        return
    folder = pathlib.Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    file = folder / name
    handle = _lock(file, wait)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(PermissionError):  # another user's file
                if _is_at(handle, file):
                    file.unlink()  # before another process can hold it
            os.close(handle)
        with contextlib.suppress(OSError):  # a folder that holds files stays
            for place in made:
                place.rmdir()


def _lock(file: pathlib.Path, wait: bool) -> int | None:
    """The open file, locked, with a note of who holds it; None where nothing can be locked."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno == errno.ENOENT and not file.parent.exists():  # it went with the lock of another process
                continue
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            try:  # another user's lock needs no right to write
                handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:  # a command that has nothing to write may run there
                return None
        if os.fstat(handle).st_nlink > 1 or _holder(handle) is None:
            os.close(handle)
            raise UserError(f"{file}: is a link or a file of someone else, expected a lock of our own; move it")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = _holder(handle) or "another process"
            os.close(handle)
            raise UserError(
                f"{file.parent}: {holder} writes there, expected one process at a time; wait for it or end it, or choose "
                "another folder"
            ) from None
        except OSError as error:
            os.close(handle)
            reason = f"its file system has no locks ({error.strerror})"
            print(f"WARNING: {file.parent}: {reason}: let one process at a time write there", file=sys.stderr)
            return None
        if _is_at(handle, file):
            break
        os.close(handle)  # of a process that has ended meanwhile
    note = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"}
    with contextlib.suppress(OSError):  # on a full disk the lock holds without its note
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(note).encode(), 0)
    return handle


def _is_at(handle: int, file: pathlib.Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(file))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str | None:
    """Who holds or held a lock, by its note; "" without a whole note, None if the file is no lock of ours."""
    try:
        text = os.pread(handle, 4096, 0)
    except OSError:  # a named pipe
        return None
    if text and not text.startswith(b'{"pid"'):
        return None
    try:
        note = json.loads(text)
        return f"process {note['pid']} of {note['host']} (since {note['since']})"
    except (ValueError, LookupError, TypeError):
        return ""


@contextlib.contextmanager
def exchanging(folder, names: Sequence[str]) -> Iterator[pathlib.Path]:
    """Gives a new folder to write; when the block ends without an error, its files take the places of `names` in `folder`.

    Those of `names` that were not written again are removed, everything else stays. The last of `names` goes first and comes
    last: it marks a complete folder. An error leaves all as it was. Holds the lock of `folder`, which is on a disk.

    Args:
      names: of files and folders; the block writes no others.

    Raises:
      UserError: another process writes there.
    """
    folder = pathlib.Path(folder)
    with locked(folder):
        _finish_exchange(folder)
        partial = folder / PARTIAL
        try:
            with naming(folder):
                (partial / "new").mkdir(parents=True)
                yield partial / "new"
                (partial / "old").mkdir()
                replace(partial / _JOURNAL, json.dumps([list(names), os.listdir(partial / "new")]).encode())
                _exchange(folder, names)
        finally:
            _remove(partial)


def finish_exchange(folder) -> None:
    """Completes an exchange that a kill interrupted, and removes what a killed process left of `exchanging`.

    Raises:
      UserError: another process writes there; a file or a link is there that `exchanging` did not make.
    """
    if os.path.lexists(pathlib.Path(folder, PARTIAL)):
        with locked(folder):
            _finish_exchange(pathlib.Path(folder))


def _finish_exchange(folder: pathlib.Path) -> None:
    partial = folder / PARTIAL
    if not os.path.lexists(partial):
        return
    if partial.is_symlink() or not partial.is_dir():
        raise UserError(f"{partial}: is no folder of ours, expected none; move it")
    found = set(os.listdir(partial))
    if foreign := sorted(name for name in found - {"new", "old"} if not name.startswith(_JOURNAL)):
        raise UserError(f"{partial}: holds {foreign[0]}, which this command did not write; move it")
    if _JOURNAL in found:  # the new files were complete
        try:
            names, written = json.loads((partial / _JOURNAL).read_bytes())
            plain = all(name == pathlib.PurePath(name).name for name in (*names, *written))
        except (OSError, ValueError, TypeError):
            plain = False
        if not plain:
            raise UserError(f"{partial / _JOURNAL}: damaged, expected two lists of names; move {partial}")
        for name in names:
            if name not in written or os.path.lexists(partial / "new" / name):
                for source, target in ((folder, partial / "old"), (partial / "new", folder)):
                    if os.path.lexists(source / name):
                        _remove(target / name)
                        (source / name).rename(target / name)
    _remove(partial)


def _exchange(folder: pathlib.Path, names: Sequence[str]) -> None:
    new, old = folder / PARTIAL / "new", folder / PARTIAL / "old"
    moves = [(folder / name, old / name) for name in reversed(names)] + [(new / name, folder / name) for name in names]
    done = []
    try:
        for source, target in moves:
            if os.path.lexists(source):
                source.rename(target)
                done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise


def _remove(path: pathlib.Path) -> None:
    """Removes a file or a folder that may not be there; a link, but not what it names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def holds_files(folder) -> bool:
    """Whether a folder on a disk holds anything but what `locked` and `exchanging` keep there."""
    return os.path.isdir(folder) and bool(set(os.listdir(folder)) - {LOCK, PARTIAL})


def contains(folder, path) -> bool:
    """Whether `path` is `folder` or lies in it, links resolved."""
    return pathlib.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _partial(name: str) -> str:
    """A name beside a file's that cannot be guessed. A long one is cut: a file system takes 255 bytes."""
    return f"{name[:40]}.{secrets.token_hex(8)}.partial"
