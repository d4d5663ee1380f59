"""Folders of rahf.convert that travel: fetched from an address into a cache, and sent to one; and those in the package.

    synth                                    a critic that RAHF comes with, of rahf/critics
    hf://owner/name[@revision][/folder]      a repository of the Hugging Face hub
    gs://bucket/folder, s3://bucket/folder   and every other file system that fsspec knows

Such a folder holds SHA256SUMS, its files' names and digests as the command sha256sum writes and checks them. The cache,
RAHF_CACHE or ~/.cache/rahf, holds

    <SHA-256 of SHA256SUMS>/      the files, compared with it whenever they are asked for
    <SHA-256 of an address>.sums  the SHA256SUMS that was last read there, for use without a network

A folder at an address that has no SHA256SUMS, such as a workdir in a bucket, is used where it is. Without gcsfs all of gs://
is taken for such a one.
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator

import fsspec

from richhf_data import input_files, paths
from richhf_data.errors import UserError

SHIPPED = pathlib.Path(__file__).parent / "critics"
SUMS = "SHA256SUMS"
CARD = "README.md"  # not among the sums, because its reader may edit it
MARK = "<!-- Written by rahf.convert, which replaces this file. Delete this line to keep the file. -->"
MAX_SUMS = 2**16  # bytes
HUB = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<folder>.+))?")


def shipped() -> list[str]:
    """The names of the critics that RAHF comes with: folders that nothing writes to."""
    return sorted(config.parent.name for config in SHIPPED.glob("*/config.json"))


def local_folder(where) -> str:
    """A folder on this machine with what is at `where`. A local path, or an address without SHA256SUMS, stays as it is.

    The name of a shipped critic is replaced by its folder, unless there is a local file or folder of that name.

    SHA256SUMS is read each time, and what the cache lacks is fetched. Without a network what was fetched last is used, with
    a warning. Processes that ask for the same folder at the same time wait for each other.

    Raises:
      UserError: nothing of that name, no SHA256SUMS on the hub, or no answer and nothing in the cache; a package is not
        installed; a file is not what SHA256SUMS says. It is removed from the cache, and fetched again by the next call.
    """
    url = os.fspath(where).rstrip("/")
    if url in shipped() and not os.path.lexists(url):
        return str(SHIPPED / url)
    if input_files.is_local(url):
        return os.fspath(where)
    if url.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        return os.fspath(where)  # a workdir, which TensorFlow can read
    filesystem, path = _opened(url)
    cache = pathlib.Path(os.environ.get("RAHF_CACHE") or pathlib.Path.home() / ".cache/rahf").absolute()
    if (listed := _listed(filesystem, path, url, cache)) is None:
        return os.fspath(where)
    folder = cache / hashlib.sha256(listed).hexdigest()
    with paths.locked(cache, f".{folder.name}.lock", wait=True):
        for name, digest in _parsed(listed, url).items():
            if (file := folder / name).is_file():
                if _digest(file) != digest:
                    file.unlink()
                    raise UserError(f"{url}: {file} in the cache was damaged, and is removed; call again to fetch it")
            else:
                _fetch(filesystem, f"{path}/{name}", file, digest, f"{url}/{name}")
    return str(folder)


def _opened(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system of an address, with nothing remembered of earlier calls, and the path there."""
    if url.startswith("hf://") and not HUB.fullmatch(url):
        raise UserError(f"{url}: expected hf://owner/name, hf://owner/name@revision or hf://owner/name/folder")
    try:
        filesystem, path = input_files.open_url(url)
    except ImportError as error:
        package = {"hf": "huggingface_hub", "gs": "gcsfs", "s3": "s3fs"}.get(url.partition("://")[0])
        raise UserError(f"{url}: {f'needs the package {package}; pip install {package}' if package else error}") from error
    except Exception as error:  # no credentials, an unknown protocol
        raise UserError(f"{url}: cannot be opened ({_reason(error)})") from error
    filesystem.invalidate_cache()
    return filesystem, path


def _listed(filesystem, path: str, url: str, cache: pathlib.Path) -> bytes | None:
    """SHA256SUMS at an address, or as it was last read there if there is no answer; None if there is none."""
    kept = cache / f"{hashlib.sha256(url.encode()).hexdigest()}.sums"
    try:
        with filesystem.open(f"{path}/{SUMS}", "rb") as file:
            listed = file.read(MAX_SUMS)
    except FileNotFoundError as error:
        if url.startswith("hf://"):
            raise UserError(
                f"{url}: holds no {SUMS}, expected a folder that `python -m rahf.convert --output={url}` wrote ({error})"
            ) from error
        return None
    except Exception as error:  # each file system has its own
        if not kept.is_file():
            raise UserError(f"{url}: cannot be read ({_reason(error)}), and the cache {cache} does not hold it") from error
        warnings.warn(f"{url} cannot be read ({_reason(error)}): what was fetched last is used", stacklevel=3)
        return kept.read_bytes()
    if not kept.is_file() or kept.read_bytes() != listed:
        paths.replace(kept, listed)
    return listed


def _parsed(listed: bytes, url: str) -> dict[str, str]:
    """File name -> SHA-256."""
    sums = {}
    for line in listed.decode(errors="replace").splitlines():
        if not (match := re.fullmatch(r"([0-9a-f]{64}) [ *]([A-Za-z0-9][\w.-]{0,99})", line, re.ASCII)):
            raise UserError(f"{url}/{SUMS}: got the line {line[:80]!r}, expected a SHA-256 and a file's name")
        sums[match[2]] = match[1]
    return sums


def _fetch(filesystem, source: str, target: pathlib.Path, digest: str, url: str) -> None:
    progress = fsspec.callbacks.TqdmCallback(tqdm_kwargs={"desc": target.name, "unit": "B", "unit_scale": True})
    with paths.writing(target) as partial:
        try:
            with progress:
                filesystem.get_file(source, os.fspath(partial), callback=progress)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # of this disk
                raise
            raise UserError(f"{url}: could not be fetched ({_reason(error)}); call again to go on") from error
        if (found := _digest(partial)) != digest:
            raise UserError(
                f"{url}: got a file with SHA-256 {found[:12]}..., expected {digest[:12]}... as {SUMS} says; it is damaged, "
                "or was written while it was read: call again, or convert again"
            )


def _digest(file) -> str:
    with pathlib.Path(file).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# ---- Writing --------------------------------------------------------------------------------------------------------
def write_sums(folder: pathlib.Path) -> None:
    """Writes SHA256SUMS of all other files of a folder."""
    lines = [f"{_digest(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.name != CARD]
    paths.replace(folder / SUMS, "".join(lines).encode())


def is_written_by_us(card) -> bool:
    """Whether a README.md, a file or its content, is one that rahf.convert may replace."""
    if isinstance(card, pathlib.Path):
        card = b"" if card.is_symlink() or input_files.not_a_file(card) else card.read_bytes()
    return MARK.encode() in card


@contextlib.contextmanager
def writing(output, names: Iterable[str]) -> Iterator[pathlib.Path]:
    """Gives a folder to write: `output`, or for an address an empty one whose files are sent there at the end of the block.

    Those of `names` that the block does not write are removed from the address; a user's README.md stays. On the hub this is
    one commit, to a repository that is made if it is not there. Elsewhere SHA256SUMS comes last: until then, and after a
    kill, it does not agree with the files, and `local_folder` refuses them.

    Args:
      names: of the files that a conversion may write.

    Raises:
      UserError: the address holds a file of these names that rahf.convert did not write, or cannot be read or written.
    """
    url = os.fspath(output).rstrip("/")
    if input_files.is_local(url):
        yield pathlib.Path(output)
        return
    filesystem, path = _opened(url)
    with _naming(url):
        there = _names(filesystem, path)
        stays = CARD in there and not is_written_by_us(filesystem.cat_file(f"{path}/{CARD}"))
    if SUMS not in there and (foreign := sorted(there & set(names))):
        raise UserError(f"output: {url} holds a {foreign[0]} that rahf.convert did not write; choose another address")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        yield folder
        files = [file.name for file in folder.iterdir() if file.name != SUMS and not (stays and file.name == CARD)]
        files = [*sorted(files), SUMS]
        gone = sorted((there & {*names, CARD}) - {*files, CARD if stays else ""})
        with _naming(url):
            if url.startswith("hf://"):
                _commit(folder, url, files, gone)
            else:
                for name in files:
                    filesystem.put_file(str(folder / name), f"{path}/{name}")
                for name in gone:
                    filesystem.rm_file(f"{path}/{name}")
    if stays:
        print(f"{url}: the {CARD} there is yours, and stays")


def _commit(folder: pathlib.Path, url: str, files: list[str], gone: list[str]) -> None:
    import huggingface_hub as hub

    repository, revision, inside = HUB.fullmatch(url).group("repository", "revision", "folder")
    prefix, api = f"{inside}/" if inside else "", hub.HfApi()
    api.create_repo(repository, exist_ok=True)
    if revision:
        api.create_branch(repository, branch=revision, exist_ok=True)
    operations = [hub.CommitOperationAdd(prefix + name, folder / name) for name in files]
    operations += [hub.CommitOperationDelete(prefix + name) for name in gone]
    api.create_commit(repository, operations, commit_message="Convert with RAHF", revision=revision)


def _names(filesystem, path: str) -> set[str]:
    """The names at an address; none if nothing is there."""
    try:
        return {entry["name"].rpartition("/")[2] for entry in filesystem.ls(path, detail=True)}
    except FileNotFoundError:
        return set()


@contextlib.contextmanager
def _naming(url: str) -> Iterator[None]:
    """Names the address in what its file system raises."""
    try:
        yield
    except Exception as error:
        hint = "; `hf auth login` gives you the right to" if url.startswith("hf://") else ""
        raise UserError(f"output: {url} cannot be written ({_reason(error)}){hint}") from error
