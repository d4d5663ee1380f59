"""Where the image and caption of a uid come from, and how any image becomes one that training reads. No TensorFlow.

A source is named by a SPEC; its paths may be local or URLs that fsspec knows (gs://, s3://, hf://):

  parquet:GLOB   Pick-a-Pic's shards: columns caption, image_0_uid, image_1_uid, jpg_0, jpg_1 (encoded images)
  table:GLOB     a parquet table with a row per image: a uid or the path of an image called by it, a caption, and the
                 encoded image, as bytes or as Hugging Face's struct of bytes and path
  folder:DIR     images named by uid, in subfolders too, beside captions.csv, .jsonl or .parquet (or metadata.*)

The columns of a table and of a captions table are guessed from `GUESSES`, or given.
"""

import csv
import dataclasses
import hashlib
import io
import json
import pathlib
import warnings
from collections.abc import Callable, Collection, Iterator

import fsspec
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from richhf_data.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
GUESSES = {  # compared without case, first match wins
    "uid": ("uid", "image_uid", "image_id", "filename", "file_name", "image_path", "path", "image.path", "key", "id"),
    "prompt": ("prompt", "caption", "text"),
    "image": ("image", "image_bytes", "img", "jpg", "jpeg", "png", "bytes"),
}
MAX_PIXELS = 20_000_000
_REFUSED = 5  # times the pixels allowed: such an image is not even decoded
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # not those that run another program, such as EPS
_ORIENTATION = PIL.ExifTags.Base.Orientation
_ROWS_AT_ONCE = 16
_BUFFER = 1 << 20  # bytes; without one pyarrow reads a whole column of a row group
_FILES_AT_ONCE = 500
_NAMED = 5  # how many faults an error names
_CAPTIONS = tuple(f"{stem}{suffix}" for stem in ("captions", "metadata") for suffix in (".csv", ".jsonl", ".parquet"))

Row = tuple[str, str | None, bytes | None]  # uid, caption, encoded image


@dataclasses.dataclass(frozen=True)
class Table:
    """A parquet file of a source: of two images a row (`pairs`) or one."""

    url: str
    name: str  # differs when the file does
    size: int  # bytes
    pairs: bool
    columns: tuple[tuple[str, str], ...]  # (uid, prompt or image; column) where given

    def check(self) -> None:
        """Raises UserError where the file is no parquet file or lacks the columns, without reading a row."""
        with self._open() as file:
            self._columns(file.schema_arrow)

    def sample(self) -> list[str]:
        """The first few uids, for an error to show."""
        with self._open() as file:
            uid = self._columns(file.schema_arrow)[1][0][0]
            batch = next(file.iter_batches(_NAMED, columns=[uid]), None)
            return [str(value) for value in values(batch, uid).to_pylist()] if batch is not None else []

    def read(self, wanted: Collection[str], advance: Callable[[int], object]) -> Iterator[Row]:
        """Yields every row's image of a wanted uid, and calls `advance` with the bytes that are done with.

        Memory: a few images and a page of one image column. A writer with many images in a row group may have made that
        a single page, a dictionary, of which pyarrow holds three copies.
        """
        with self._open() as file:
            caption, pairs = self._columns(file.schema_arrow)
            done = 0
            for group in range(file.num_row_groups):
                try:
                    for uid, image in pairs:
                        yield from _read_row_group(file, group, (uid, caption, image), wanted)
                except Exception as error:  # a file system's library raises its own
                    raise unreadable("images", self.url, error) from error
                now = self.size * (group + 1) // file.num_row_groups
                advance(now - done)
                done = now

    def _open(self) -> pyarrow.parquet.ParquetFile:
        return open_parquet("images", self.url)

    def _columns(self, schema: pyarrow.Schema) -> tuple[str, list[tuple[str, str]]]:
        """The caption's column, and the columns of uid and encoded image of each image in a row."""
        where = f"images: {local(self.url)}"
        if self.pairs:
            given = [
                {"uid": f"image_{side}_uid", "prompt": "caption", "image": f"jpg_{side}"} for side in ("0", "1")
            ]
            try:
                found = [choose_columns(leaves(schema), where, names) for names in given]
            except ValueError as error:
                raise UserError(
                    f"{error}. parquet: expects Pick-a-Pic's columns; a table with one image a row is table:GLOB"
                ) from error
        else:
            found = [choose_columns(leaves(schema), where, dict(self.columns))]
        return found[0]["prompt"], [(names["uid"], names["image"]) for names in found]


@dataclasses.dataclass(frozen=True)
class Files:
    """Some image files of a folder."""

    name: str
    size: int  # bytes
    entries: tuple[tuple[str, str | None, str, int], ...]  # uid, caption, url, bytes

    def check(self) -> None:
        """Nothing: the folder was read when it was listed."""

    def sample(self) -> list[str]:
        """The first few uids."""
        return [uid for uid, *_ in self.entries[:_NAMED]]

    def read(self, wanted: Collection[str], advance: Callable[[int], object]) -> Iterator[Row]:
        """As Table.read."""
        for uid, caption, url, size in self.entries:
            if uid in wanted:
                try:
                    filesystem, path = fsspec.core.url_to_fs(url)
                    encoded = filesystem.cat_file(path)
                except Exception as error:
                    raise unreadable("images", url, error) from error
                yield uid, caption, encoded
            advance(size)


def shards(spec: str, wanted: Collection[str], columns: dict[str, str] | None = None) -> list[Table | Files]:
    """The parts of a source, each to be read by one process, in the order in which they count.

    Args:
      columns: the columns called uid, prompt and image in a table, where they are not to be guessed.

    Raises:
      UserError: SPEC is not understood, cannot be reached or matches nothing; `columns` names something else; a folder's
        captions are missing or faulty.
    """
    kind, _, where = spec.partition(":")
    if kind not in ("parquet", "table", "folder") or not where:
        raise UserError(f"images: got {spec!r}, expected parquet:GLOB, table:GLOB or folder:DIR")
    columns = dict(columns or {})
    check_columns(columns)
    if kind == "parquet" and columns:
        raise UserError("columns: Pick-a-Pic's are known, expected none for parquet:GLOB; use table:GLOB")
    if kind == "folder":
        filesystem, path = open_url("images", where)
        try:
            return _folder(filesystem, path, wanted, columns)
        except ValueError:
            raise
        except Exception as error:
            raise unreadable("images", where, error) from error
    filesystem, files = parquet_files("images", where)
    return [
        Table(
            filesystem.unstrip_protocol(name),
            _name(pathlib.PurePosixPath(name).stem, [name, filesystem.ukey(name)]),
            info["size"] or 0,
            kind == "parquet",
            tuple(sorted(columns.items())),
        )
        for name, info in files.items()
    ]


def open_url(what: str, url: str):
    """fsspec's file system of a URL or path, and the path there. Raises UserError where it is unknown or not installed."""
    try:
        return fsspec.core.url_to_fs(url)
    except Exception as error:
        raise unreadable(what, url, error) from error


def parquet_files(what: str, pattern: str) -> tuple[fsspec.AbstractFileSystem, dict[str, dict]]:
    """Files that a pattern, a path or URL, matches: {path: info} on a file system. Raises UserError where there is none."""
    filesystem, path = open_url(what, pattern)
    try:
        found = filesystem.glob(path, detail=True)
    except Exception as error:
        raise unreadable(what, pattern, error) from error
    files = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
    if not files:
        raise UserError(f"{what}: no file matches {pattern!r}, expected parquet files; quote the pattern in a shell")
    return filesystem, files


def open_parquet(what: str, url: str) -> pyarrow.parquet.ParquetFile:
    """A parquet file, its footer read. Raises UserError where that cannot be."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        return pyarrow.parquet.ParquetFile(path, filesystem=filesystem, buffer_size=_BUFFER)
    except Exception as error:
        raise unreadable(what, url, error) from error


def unreadable(what: str, url: str, error: Exception) -> UserError:
    """What to raise where reading a parquet file, or reaching a URL, raised `error`: names both, and what to do."""
    said = " ".join(str(error).split())
    of_pyarrow = type(error) is OSError and not error.errno  # of a page
    if of_pyarrow or isinstance(error, pyarrow.ArrowException | UnicodeDecodeError):
        again = "download it again (in a git clone: git lfs pull)"
        return UserError(f"{what}: {local(url)} is not a readable parquet file ({said}); {again}")
    return UserError(
        f"{what}: cannot reach {local(url)} ({type(error).__name__}: {said}); install what its file system needs (gs:// "
        "gcsfs, s3:// s3fs, hf:// huggingface_hub), see to the network and your rights there, or give the path of a copy"
    )


def plain(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[bytes, str, bytes]:
    """An image as training's decoder (`tf.io.decode_image` with 3 channels) reads it as it is meant.

    A JPEG or PNG of 8 bits in RGB or grey stays as it is, byte for byte. Alpha is laid over white; palettes, CMYK, 16
    bits, EXIF rotation, animations (their first picture) and other formats become an RGB PNG; one of more than
    `max_pixels` is scaled down.

    Returns:
      the image, encoded; what was changed ("alpha, EXIF rotation"), "" for nothing; and uint8[8, 8, 3] as bytes: the
      picture in 64 pixels, to tell whether two are the same.

    Raises:
      UserError: it cannot be decoded, or has more than 5 * `max_pixels`; the message is the reason alone.
    """
    if not data:
        raise UserError("no bytes")
    limit = PIL.Image.MAX_IMAGE_PIXELS
    PIL.Image.MAX_IMAGE_PIXELS = None  # ours is below
    try:
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _REFUSED * max_pixels:
                raise UserError(f"more than {_REFUSED * max_pixels / 1e6:g} megapixels")
            changes = _changes(image, data, max_pixels)
            rgb = _rgb(image, max_pixels)
    except PIL.UnidentifiedImageError as error:
        raise UserError("no known image format") from error
    except Exception as error:  # Pillow's plugins raise any kind on a damaged file
        message = "truncated" if "truncated" in str(error).lower() else str(error)[:80] or type(error).__name__
        raise UserError(message) from error
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit
    look = rgb.resize((8, 8), PIL.Image.Resampling.BOX).tobytes()
    if not changes:
        return data, "", look
    encoded = io.BytesIO()
    rgb.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue(), ", ".join(changes), look


def same_picture(look: bytes, other: bytes) -> bool:
    """Whether two of `plain`'s looks are of one picture, perhaps encoded or scaled differently."""
    difference = np.frombuffer(look, np.uint8).astype(int) - np.frombuffer(other, np.uint8)
    return bool(np.abs(difference).mean() < 8)


def _changes(image: PIL.Image.Image, data: bytes, max_pixels: int) -> list[str]:
    kind = "JPEG" if image.format == "MPO" else image.format  # a telephone's JPEG, with more pictures after its end
    changes = {
        kind: kind not in ("JPEG", "PNG"),
        "animation": kind != "JPEG" and getattr(image, "n_frames", 1) > 1,
        "alpha": image.has_transparency_data,
        "palette": image.mode in ("P", "PA"),
        "CMYK": image.mode == "CMYK",
        "bit depth": image.mode[0] in "1IF" or (image.format == "PNG" and data[24] != 8),
        "EXIF rotation": _turned(image),
        f"over {max_pixels / 1e6:g} megapixels": image.width * image.height > max_pixels,
    }
    return [name for name, holds in changes.items() if holds]


def _turned(image: PIL.Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION) in range(2, 9)


def _rgb(image: PIL.Image.Image, max_pixels: int) -> PIL.Image.Image:
    scale = min(1, (max_pixels / (image.width * image.height)) ** 0.5)
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    if scale < 1:
        image.draft(None, size)  # a JPEG of twice the size or more is decoded to a fraction
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    elif image.mode[0] == "I":  # Pillow's own conversion clips these at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError("more than 16 bits")
        rgb = PIL.Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    elif image.mode == "F":
        raise UserError("more than 16 bits")
    else:
        rgb = image.convert("RGB")
    if scale < 1:
        rgb = rgb.resize(size, PIL.Image.Resampling.LANCZOS)
    if _turned(image):
        rgb.getexif()[_ORIENTATION] = image.getexif()[_ORIENTATION]
        rgb = PIL.ImageOps.exif_transpose(rgb)
    rgb.info = {}  # a colour profile, gamma or EXIF would be applied by some readers and not by others
    return rgb


def check_columns(given: Collection[str], roles: Collection[str] = tuple(GUESSES)) -> None:
    """Raises UserError where columns are given for something else than the roles."""
    if unknown := set(given) - set(roles):
        raise UserError(f"columns: got {', '.join(sorted(unknown))}, expected some of {', '.join(roles)}")


def choose_columns(
    leaves: dict[str, pyarrow.DataType], where: str, given: dict[str, str], guesses: dict[str, tuple[str, ...]] = GUESSES
) -> dict[str, str]:
    """{role: column} of `leaves` {column: type} for the roles of `guesses`, as given or guessed.

    Raises:
      UserError: a given column is absent or of a wrong type, or no column of the right type has a name that tells.
    """
    chosen, faults = {}, []
    for role, guessed in guesses.items():
        fits, expected = _TYPES[role]
        if column := given.get(role):
            column = f"{column}.bytes" if f"{column}.bytes" in leaves else column
            if column not in leaves:
                faults.append(f"no column {column!r}")
            elif not fits(leaves[column]) and not (role == "uid" and pyarrow.types.is_integer(leaves[column])):
                faults.append(f"column {column!r} is {leaves[column]}, expected {expected}")
        else:
            known = {name.lower().removesuffix(".bytes"): name for name, kind in leaves.items() if fits(kind)}
            column = next((known[name] for name in guessed if name in known), None)
            if column is None:
                names = ", ".join(guessed)
                faults.append(f"no column for the {role}, expected {expected} called {names}, or --columns={role}=NAME")
        chosen[role] = column
    if faults:
        raise UserError(f"{where}: {'; '.join(faults)}. Columns there: {listed(leaves)}")
    return chosen


def listed(leaves: dict[str, pyarrow.DataType]) -> str:
    """The columns with their types, for an error."""
    return ", ".join(f"{name} ({kind})" for name, kind in leaves.items()) or "none"


def leaves(schema: pyarrow.Schema) -> dict[str, pyarrow.DataType]:
    """{column: type}; a struct's fields are `column.field` beside it."""
    leaves = {}
    for field in schema:
        leaves[field.name] = field.type
        if pyarrow.types.is_struct(field.type):
            leaves |= {f"{field.name}.{inner.name}": inner.type for inner in field.type}
    return leaves


def is_text(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds strings, however they are stored."""
    if pyarrow.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)


def _is_binary(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_binary_view(kind)


_TYPES = {"uid": (is_text, "a string"), "prompt": (is_text, "a string"), "image": (_is_binary, "binary")}


def values(batch, column: str):
    """A column of a table or batch; `column.field` is a struct's."""
    if column in batch.schema.names:
        return batch.column(column)
    name, _, field = column.partition(".")
    return pyarrow.compute.struct_field(batch.column(name), field)


def _read_row_group(file, group: int, columns: tuple[str, str, str], wanted: Collection[str]) -> Iterator[Row]:
    uid, caption, image = columns
    # The uids are small: most row groups are done with after this.
    ids = values(file.read_row_group(group, columns=[uid]), uid).to_pylist()
    rows = {row: name for row, value in enumerate(ids) if (name := _uid(value, wanted)) is not None}
    if not rows:
        return
    start, last = 0, max(rows)
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[caption, image], use_threads=False):
        captions, encoded = values(batch, caption), values(batch, image)
        for row in range(start, start + batch.num_rows):
            if row in rows:
                yield rows[row], captions[row - start].as_py(), encoded[row - start].as_py()
        start += batch.num_rows
        if start > last:
            return


def _uid(value, wanted: Collection[str]) -> str | None:
    """The wanted uid that a value is, or is a path to."""
    value = str(value)
    path = pathlib.PurePosixPath(value)
    name = path.stem if path.suffix.lower() in EXTENSIONS else path.name
    return value if value in wanted else name if name in wanted else None


def _folder(filesystem, folder: str, wanted: Collection[str], columns: dict[str, str]) -> list[Files]:
    if not filesystem.isdir(folder):
        expected = f"images named by uid and one of {', '.join(_CAPTIONS)}"
        raise UserError(f"images: no folder {folder} is there or can be reached, expected {expected}")
    if "image" in columns:
        raise UserError("columns: got image, expected uid and prompt alone: a folder's images are its files")
    captions = _read_captions(filesystem, folder, wanted, columns)
    files = []
    for path, info in sorted(filesystem.find(folder, detail=True).items()):
        path = pathlib.PurePosixPath(path)
        if path.suffix.lower() in EXTENSIONS and path.stem in wanted:
            files.append((path.stem, captions.get(path.stem), str(path), info))
    if not files:
        raise UserError(f"images: {folder} has no image called by a uid of the records, such as {min(wanted)}.jpg")
    result = []
    for start in range(0, len(files), _FILES_AT_ONCE):
        group = files[start : start + _FILES_AT_ONCE]
        states = [(uid, caption, path, filesystem.ukey(path)) for uid, caption, path, _ in group]
        entries = tuple((u, caption, filesystem.unstrip_protocol(path), info["size"]) for u, caption, path, info in group)
        result.append(Files(_name("files", states), sum(entry[3] for entry in entries), entries))
    return result


def _read_captions(filesystem, folder: str, wanted: Collection[str], columns: dict[str, str]) -> dict[str, str]:
    paths = [path for name in _CAPTIONS if filesystem.isfile(path := f"{folder}/{name}")]
    if len(paths) != 1:
        got = " and ".join(paths) or "none"
        raise UserError(f"images: {folder}: got {got}, expected one of {', '.join(_CAPTIONS)} with uid and caption")
    (path,) = paths
    captions = {}
    for number, (value, caption) in enumerate(_caption_rows(filesystem, path, columns), 1):
        uid = _uid(value, wanted)
        if uid is not None and captions.setdefault(uid, caption) != caption:
            raise UserError(
                f"images: {path} entry {number}: uid {uid!r} has the captions {captions[uid]!r} and {caption!r}, expected "
                "one; remove the other"
            )
    return captions


def _caption_rows(filesystem, path: str, columns: dict[str, str]) -> Iterator[tuple[str, str | None]]:
    """(uid or path, caption) of each entry of a captions table."""

    def names(leaves) -> tuple[str, str]:
        chosen = choose_columns(leaves, f"images: {path}", columns, {role: GUESSES[role] for role in ("uid", "prompt")})
        return chosen["uid"], chosen["prompt"]

    if path.endswith(".parquet"):
        with filesystem.open(path) as file:
            try:
                table = pyarrow.parquet.read_table(file)
            except (pyarrow.ArrowException, OSError) as error:
                raise unreadable("images", path, error) from error
        uid, prompt = names(leaves(table.schema))
        yield from zip(values(table, uid).to_pylist(), values(table, prompt).to_pylist(), strict=True)
        return
    try:
        with filesystem.open(path, "r", encoding="utf-8-sig", newline="") as file:
            if path.endswith(".csv"):
                yield from _csv_rows(csv.DictReader(file, strict=True), path, names)
                return
            chosen = None
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    if not isinstance(entry := json.loads(line), dict):
                        raise TypeError("no object")
                    uid, prompt = chosen = chosen or names(dict.fromkeys(entry, pyarrow.string()))
                    value, caption = entry[uid], entry[prompt]
                    if not isinstance(caption, str | None):
                        raise TypeError("the caption is no string")
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    got, expected = line.strip()[:80], '{"uid": "...", "caption": "..."}'
                    raise UserError(f"images: {path} line {number}: got {got!r}, expected {expected}") from error
                yield value, caption
    except UnicodeDecodeError as error:
        raise UserError(f"images: {path}: got text that is not UTF-8 ({error}), expected UTF-8") from error


def _csv_rows(reader: csv.DictReader, path: str, names) -> Iterator[tuple[str, str]]:
    line = 1
    try:
        uid, prompt = names(dict.fromkeys(reader.fieldnames or (), pyarrow.string()))
        line = reader.line_num + 1
        for row in reader:
            if None in row or None in row.values():  # more fields than the header has, or fewer
                line = reader.line_num
                got = sum(len(value) if key is None else value is not None for key, value in row.items())
                raise csv.Error(f"{got} fields")
            yield row[uid], row[prompt]
            line = reader.line_num + 1  # where a quote that is never closed is opened, rather than the end of the file
    except csv.Error as error:
        raise UserError(
            f"images: {path} line {line}: got {error}, expected as many fields as the header "
            'has; put a field with a comma, a quote or a line break in quotes, such as "a cat, on a ""table"""'
        ) from error


def _name(stem: str, state) -> str:
    """A file name for what is made of a file in this state."""
    return f"{stem}-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}"


def local(url: str) -> str:
    """A URL as people write it: a local one as its path."""
    return url.removeprefix("file://")
