"""Pictures with their prompts, any number of them, in shards that one process reads. Imports no TensorFlow and no JAX.

A SPEC is a path, a pattern or a URL that fsspec knows (gs://, s3://, hf://) of one of these:

  DIR, *.jpg      picture files; the prompt of NAME.jpg is in NAME.txt beside it, or one prompt is given for all
  *.jsonl         lines of {"image": path or URL, "prompt": text}; a relative path begins at the file's folder
  *.parquet       tables of a picture (bytes, or Hugging Face's struct of bytes and path) and a prompt a row
  *.tar           WebDataset's shards: NAME.jpg with NAME.txt, or with NAME.json that has the key prompt

A tar is one shard. A table is divided between its row groups, and a list of pictures between its entries, into shards of at
most `shard_rows` rows; a larger row group is a shard.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from richhf_data import images, input_files, jsonl, parquet, paths
from richhf_data.errors import UserError

_ROWS_AT_ONCE = 16
_THREADS = 32  # that read the footers of tables: most of it is waiting
_BLOCK = 1 << 22  # bytes of a list that are searched for line ends at once
_LARGE = "more than a GiB"
_LINE = '{"image": path, "prompt": text}'
_EXPECTED_FILES = "picture files, *.jsonl, *.parquet or *.tar; quote a pattern in a shell"
# Of fsspec's `info`: what changes with a file's content, the first that there is.
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "mtime", "LastModified", "updated", "created")

Row = tuple[str, str | None, bytes | None, str | None]  # name, prompt, encoded picture, or None and why it cannot be used


class Shard(Protocol):
    """A part of a source that one process reads, in order.

    Attributes:
      url: the file that it lies in; of picture files, the first. where: names it for people.
    """

    url: str
    where: str

    def state(self) -> list:
        """JSON that changes with what `read` yields. A picture of a list whose path is a URL counts as unchanged."""

    def read(self) -> Iterator[Row]:
        """Yields its rows. Raises UserError if the shard itself cannot be read."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Picture files. entries: (path or URL, its version if it is no local file). prompt: of all, in place of NAME.txt."""

    entries: tuple[tuple[str, str | None], ...]
    prompt: str | None

    @property
    def url(self) -> str:
        return self.entries[0][0]

    @property
    def where(self) -> str:
        return f"{self.entries[0][0]} to {self.entries[-1][0]}"

    def state(self) -> list:
        beside = [] if self.prompt is not None else [_file_state(_beside(url)) for url, _ in self.entries]
        return [self.prompt, beside, [[url, version or _file_state(url)] for url, version in self.entries]]

    def read(self) -> Iterator[Row]:
        for url, _ in self.entries:
            prompt, fault = self.prompt, None
            if prompt is None:
                prompt, fault = _text_beside(url)
            yield (url, prompt, None, fault) if fault else (url, prompt, *_picture(url))


@dataclasses.dataclass(frozen=True)
class Lines:
    """Bytes `start` to `stop` of a JSONL file, which begin with the line number `line`."""

    url: str
    start: int
    stop: int
    line: int

    @property
    def where(self) -> str:
        return f"{self.url} from line {self.line} on"

    def state(self) -> list:
        data = self._content()
        pictures = [_file_state(url) for _, url, _, fault in self._entries(data) if not fault and input_files.is_local(url)]
        return [self.url, self.line, hashlib.sha256(data).hexdigest(), pictures]

    def read(self) -> Iterator[Row]:
        for name, url, prompt, fault in self._entries(self._content()):
            yield (name, prompt, None, fault) if fault else (name, prompt, *_picture(url))

    def _content(self) -> bytes:
        filesystem, path = parquet.open_url("images", self.url)
        try:
            return filesystem.cat_file(path, start=self.start, end=self.stop)
        except Exception as error:
            raise parquet.unreadable("images", self.url, error) from error

    def _entries(self, data: bytes) -> Iterator[tuple[str, str, str | None, str | None]]:
        """Yields (name, path or URL, prompt, fault) of each line."""
        folder = posixpath.dirname(self.url)
        for number, line in jsonl.lines(io.BytesIO(data)):
            where = f"line {self.line + number - 1}"
            try:
                row = jsonl.parse(line, _LINE, where)
                image, prompt = (jsonl.text_of(row, name, _LINE, where) for name in ("image", "prompt"))
            except UserError as error:
                yield f"{self.url} {where}", "", None, str(error)
                continue
            yield image, image if "://" in image else posixpath.join(folder, image), prompt, None


@dataclasses.dataclass(frozen=True)
class Table:
    """Row groups `first` to before `last` of a parquet file; `row` is the number of their first row."""

    url: str
    version: str
    columns: tuple[tuple[str, str], ...]  # image, prompt and maybe uid: its column
    first: int
    last: int
    row: int
    count: int

    @property
    def where(self) -> str:
        return f"{self.url} rows {self.row} to {self.row + self.count - 1}"

    def state(self) -> list:
        return [self.url, self.version, list(map(list, self.columns)), self.first, self.last]

    def read(self) -> Iterator[Row]:
        columns, number = dict(self.columns), self.row
        with parquet.open_file("images", self.url) as file:
            try:
                groups, names = list(range(self.first, self.last)), list(columns.values())
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=names, use_threads=False):
                    values = {role: parquet.values(batch, name) for role, name in columns.items()}
                    for i in range(batch.num_rows):
                        yield self._row({role: column[i] for role, column in values.items()}, number)
                        number += 1
            except UserError:
                raise
            except Exception as error:  # a file system's library raises its own
                raise parquet.unreadable("images", self.url, error) from error

    def _row(self, values: Mapping, number: int) -> Row:
        place = f"row {number}"
        try:
            name = parquet.first_text(values["uid"], place)[0] if "uid" in values else None
            prompt, _ = parquet.first_text(values["prompt"], place)
        except UserError as error:
            return place, None, None, str(error)
        data = values["image"].as_py()
        fault = "prompt: the row has none" if prompt is None else None if data else "image: the row has none"
        return name or place, prompt, data, fault


@dataclasses.dataclass(frozen=True)
class Tar:
    """A WebDataset shard: files that follow each other and are called alike, up to the first dot, are a sample."""

    url: str
    version: str
    prompt_key: str | None  # of a sample's JSON; by default the first of `parquet.GUESSES`

    @property
    def where(self) -> str:
        return self.url

    def state(self) -> list:
        return [self.url, self.version, self.prompt_key]

    def read(self) -> Iterator[Row]:
        filesystem, path = parquet.open_url("images", self.url)
        try:
            with filesystem.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as archive:
                members = (member for member in archive if member.isfile() and not member.name.startswith("__"))
                for key, sample in itertools.groupby(members, key=lambda member: _tar_name(member.name)[0]):
                    yield self._row(key, archive, sample)
        except tarfile.TarError as error:
            raise UserError(f"images: {self.url} is no whole tar file ({error}), expected one; fetch it again") from error
        except UserError:
            raise
        except Exception as error:
            raise parquet.unreadable("images", self.url, error) from error

    def _row(self, key: str, archive: tarfile.TarFile, sample: Iterator[tarfile.TarInfo]) -> Row:
        pictures, prompt, fault = [], None, None
        for member in sample:
            ending = _tar_name(member.name)[1]
            is_picture = f".{ending}" in images.EXTENSIONS
            if not is_picture and ending not in ("txt", "json"):
                continue
            if member.size > images.MAX_BYTES:
                fault = f"{member.name}: {_LARGE}"
                continue
            data = archive.extractfile(member).read()
            try:
                if is_picture:
                    pictures.append(data)
                elif ending == "txt":
                    prompt = jsonl.decode(data, member.name).strip()
                else:
                    prompt = self._prompt_of(jsonl.parse(data, '{"prompt": text}', member.name), member.name) or prompt
            except UserError as error:
                fault = str(error)
        if not fault and len(pictures) != 1:
            fault = f"image: the sample has {len(pictures) or 'none'}, expected one"
        if not fault and prompt is None:
            fault = "prompt: the sample has none, expected NAME.txt, or NAME.json with the key prompt"
        return key, prompt, None if fault else pictures[0], fault

    def _prompt_of(self, values: dict, name: str) -> str | None:
        keys = parquet.GUESSES["prompt"] if self.prompt_key is None else (self.prompt_key,)
        found = next((key for key in keys if key in values), None)
        return None if found is None else jsonl.text_of(values, found, '{"prompt": text}', name)


def shards(
    spec: str, shard_rows: int, prompt: str | None = None, columns: Mapping[str, str] | None = None
) -> list[Files | Lines | Table | Tar]:
    """The shards of a SPEC, in the order of the files' names.

    Args:
      prompt: of all picture files, in place of NAME.txt.
      columns: {uid, prompt or image: its column of a table}, in place of a guess; prompt also of a tar's JSON.

    Raises:
      UserError: nothing matches or can be reached; a table is damaged or lacks a column; `prompt` beside other sources.
    """
    columns = dict(columns or {})
    parquet.check_columns(columns)
    if prompt is not None and not jsonl.is_text(prompt):
        raise UserError(f"prompt: got {prompt!r}, which is not UTF-8, expected UTF-8")
    found = _found(spec)
    if not found:
        raise UserError(f"images: nothing matches {spec}, expected {_EXPECTED_FILES}")
    for url in found:
        if _kind(url) != "picture" and "://" not in url:
            paths.check_file("images", url, _EXPECTED_FILES)
    kinds = {kind: [url for url in found if _kind(url) == kind] for kind in ("jsonl", "parquet", "tar", "picture")}
    if prompt is not None and (other := next((kind for kind in ("jsonl", "parquet", "tar") if kinds[kind]), None)):
        raise UserError(f"prompt: got it with {kinds[other][0]}, which has its own, expected it with pictures; leave it out")
    if columns and not kinds["parquet"] and not kinds["tar"]:
        raise UserError(f"columns: got them with {next(iter(found))}, expected them with *.parquet or *.tar; leave them out")
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        jobs = [threads.submit(_tables, url, found[url], shard_rows, columns) for url in kinds["parquet"]]
        tables = [job.result() for job in jobs]
    return [
        *itertools.chain.from_iterable(tables),
        *(Tar(url, found[url], columns.get("prompt")) for url in kinds["tar"]),
        *itertools.chain.from_iterable(_lines(url, shard_rows) for url in kinds["jsonl"]),
        *_files([(url, found[url]) for url in kinds["picture"]], shard_rows, prompt),
    ]


def _kind(url: str) -> str:
    ending = pathlib.PurePosixPath(url).suffix.lower().removeprefix(".")
    return ending if ending in ("jsonl", "parquet", "tar") else "picture"


def _found(spec: str) -> dict[str, str]:
    """path or URL -> version of the files that a SPEC names. Of a folder: the pictures, in its subfolders too."""
    filesystem, path = parquet.open_url("images", spec)
    try:
        if input_files.is_local(spec):
            plain = spec.removeprefix("file://")
            if os.path.isdir(plain):
                walked = (os.path.join(folder, name) for folder, _, names in os.walk(plain) for name in names)
                return {name: _file_state(name) for name in sorted(walked) if _is_picture(name)}
            named = (name for name in input_files.matches(plain) if not os.path.isdir(name) and not name.endswith(".txt"))
            return {name: _file_state(name) for name in named}
        if filesystem.isdir(path):
            infos = {name: info for name, info in filesystem.find(path, detail=True).items() if _is_picture(name)}
        else:
            infos = filesystem.glob(path, detail=True)
    except Exception as error:
        raise parquet.unreadable("images", spec, error) from error
    return {
        filesystem.unstrip_protocol(name): _version(info)
        for name, info in sorted(infos.items())
        if info["type"] == "file" and not name.endswith(".txt")
    }


def _is_picture(name: str) -> bool:
    return name.lower().endswith(images.EXTENSIONS)


def _version(info: Mapping) -> str:
    return f"{info.get('size')} {next((info[key] for key in _VERSIONS if info.get(key)), '')}"


def _file_state(path: str) -> str:
    """The size and the time of a local file; "" if there is none, and of a URL."""
    path = path.removeprefix("file://")
    if "://" in path:
        return ""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _tables(url: str, version: str, shard_rows: int, columns: Mapping[str, str]) -> list[Table]:
    with parquet.open_file("images", url) as file:
        leaves, sizes = parquet.leaves(file.schema_arrow), []
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    chosen = tuple(sorted(_columns(leaves, f"images: {parquet.local(url)}", columns).items()))
    result, first, row = [], 0, 0
    while first < len(sizes):
        last, count = first + 1, sizes[first]
        while last < len(sizes) and count + sizes[last] <= shard_rows:
            count += sizes[last]
            last += 1
        if count:
            result.append(Table(url, version, chosen, first, last, row, count))
        first, row = last, row + count
    return result


def _columns(leaves, where: str, given: Mapping[str, str]) -> dict[str, str]:
    """`parquet.choose_columns`; a table need not have names."""
    guesses = parquet.GUESSES
    if "uid" not in given:
        try:
            return parquet.choose_columns(leaves, where, dict(given), guesses)
        except UserError:
            guesses = {role: names for role, names in guesses.items() if role != "uid"}
    return parquet.choose_columns(leaves, where, dict(given), guesses)


def _lines(url: str, shard_rows: int) -> list[Lines]:
    filesystem, path = parquet.open_url("images", url)
    cuts, lines, end = [(0, 1)], 0, 0  # (the place of a shard's first byte, its line)
    try:
        with filesystem.open(path, "rb") as file:
            while block := file.read(_BLOCK):
                place = -1
                while (place := block.find(b"\n", place + 1)) >= 0:
                    lines += 1
                    if lines % shard_rows == 0:
                        cuts.append((end + place + 1, lines + 1))
                end += len(block)
    except Exception as error:
        raise parquet.unreadable("images", url, error) from error
    stops = [start for start, _ in cuts[1:]] + [end]
    return [Lines(url, start, stop, line) for (start, line), stop in zip(cuts, stops, strict=True) if start < stop]


def _files(found: Sequence[tuple[str, str]], shard_rows: int, prompt: str | None) -> list[Files]:
    entries = [(url, version if "://" in url else None) for url, version in found]
    return [Files(tuple(entries[i : i + shard_rows]), prompt) for i in range(0, len(entries), shard_rows)]


def _beside(url: str) -> str:
    return f"{url.removesuffix(pathlib.PurePosixPath(url).suffix)}.txt"


def _text_beside(url: str) -> tuple[str | None, str | None]:
    """(the prompt in NAME.txt, None), or (None, why there is none)."""
    beside = _beside(url)
    data, fault = _content(beside)
    if fault:
        name = posixpath.basename(beside)
        return None, f"prompt: none, expected --prompt, or {name} beside the picture, or a .jsonl file ({fault})"
    try:
        return jsonl.decode(data, f"prompt: {beside}").strip(), None
    except UserError as error:
        return None, str(error)


def _picture(url: str) -> tuple[bytes | None, str | None]:
    """(the encoded picture, None), or (None, why it cannot be read). Raises UserError as `_content`."""
    data, fault = _content(url)
    return data, f"image: {url}: {fault}" if fault else None


def _content(url: str) -> tuple[bytes | None, str | None]:
    """(the bytes of a file, None), or (None, why it cannot be read). UserError if its file system cannot be reached."""
    is_local = input_files.is_local(url)
    try:
        if is_local:
            path = url.removeprefix("file://")
            fault = input_files.not_a_file(path) or (_LARGE if os.path.getsize(path) > images.MAX_BYTES else None)
            return (None, fault) if fault else (pathlib.Path(path).read_bytes(), None)
        filesystem, path = input_files.open_url(url)
        return filesystem.cat_file(path), None
    except FileNotFoundError:
        return None, "no such file"
    except ValueError as error:  # of the URL, such as a protocol that fsspec does not know
        return None, str(error)
    except Exception as error:
        if isinstance(error, OSError) and is_local and error.errno not in paths.PROCESS_LIMITS:
            return None, str(error.strerror)
        raise parquet.unreadable("images", url, error) from error


def _tar_name(name: str) -> tuple[str, str]:
    """(the sample's name, the kind of the file) of a member of a tar: "a/b.c.png" -> ("a/b", "c.png")."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()
