"""The files that a user names: by path, by pattern, or by a URL that fsspec knows (gs://, s3://, hf://).

A local path that exists means itself, whatever characters it has: `[`, `]`, `*`, `?` and `::` are special only where no
such file or folder is.
"""

import glob
import os
import stat

import fsspec
from fsspec.implementations.local import LocalFileSystem

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
_KINDS |= {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def matches(pattern) -> list[str]:
    """The local paths that match a pattern (`**` = any folders), sorted. The part of it that exists is no pattern."""
    pattern = there = os.fspath(pattern)
    while there and not os.path.lexists(there):
        there = os.path.dirname(there)
    return sorted(glob.glob(glob.escape(there) + pattern[len(there) :], recursive=True))


def not_a_file(path) -> str | None:
    """Why a local path cannot be read as a file: "a folder", "a named pipe", "no such file"; None if it can.

    Opening a named pipe waits for ever, and a device can have any length.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a zero byte in the name
        return "no such file"
    except OSError as error:
        return f"not readable ({error.strerror})"
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


def is_local(url: str) -> bool:
    """Whether a path or URL is on a disk of this machine."""
    return url.startswith("file://") or "://" not in url or os.path.lexists(url)


def open_url(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system of a path or URL, and the path there. Raises what fsspec does."""
    if is_local(url):
        path = url.removeprefix("file://")
        return LocalFileSystem(), os.path.abspath(path if os.path.lexists(path) else os.path.expanduser(path))
    return fsspec.core.url_to_fs(url)
