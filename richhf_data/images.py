"""Where the image and caption of a uid come from. Imports no TensorFlow.

A source is named by a SPEC:

  parquet:GLOB   Pick-a-Pic's shards: columns caption, image_0_uid, image_1_uid, jpg_0, jpg_1 (encoded images)
  folder:DIR     images named by uid (jpg, jpeg, png or webp) beside captions.jsonl or captions.csv with uid and caption
"""

import csv
import glob
import json
import pathlib
from collections.abc import Collection, Iterator

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
PARQUET_COLUMNS = ("caption", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1")
_ROWS_AT_ONCE = 64  # bounds memory: about 2 x 64 images


def find(spec: str, uids: Collection[str]) -> Iterator[tuple[str, str, bytes]]:
    """Yields (uid, caption, encoded image) for each of `uids` that the source has, once each, in the source's order.

    A uid that the source lacks is not yielded: the caller counts those. Images are not decoded here.

    Raises:
      ValueError: SPEC is not understood, matches no file, or its files lack the columns.
    """
    kind, _, where = spec.partition(":")
    finders = {"parquet": _find_parquet, "folder": _find_folder}
    if kind not in finders or not where:
        raise ValueError(f"images: got {spec!r}, expected parquet:GLOB or folder:DIR")
    yield from finders[kind](where, set(uids))


def _find_parquet(pattern: str, wanted: set[str]) -> Iterator[tuple[str, str, bytes]]:
    import pyarrow.parquet

    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"images: no file matches {pattern!r}, expected parquet shards; quote the pattern in a shell")
    for path in paths:
        if not wanted:
            return
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"images: {path} is not a readable parquet file ({error}); download it again") from error
        with file:
            columns = file.schema_arrow.names
            if missing := [column for column in PARQUET_COLUMNS if column not in columns]:
                raise ValueError(
                    f"images: {path}: got columns {', '.join(columns)}, expected Pick-a-Pic's "
                    f"{', '.join(PARQUET_COLUMNS)}; {', '.join(missing)} missing"
                )
            for group in range(file.num_row_groups):
                # The uid columns are small: most row groups are done with after this.
                ids = file.read_row_group(group, columns=["image_0_uid", "image_1_uid"])
                if wanted.isdisjoint(ids["image_0_uid"].to_pylist() + ids["image_1_uid"].to_pylist()):
                    continue
                yield from _find_in_row_group(file, group, wanted)


def _find_in_row_group(file, group: int, wanted: set[str]) -> Iterator[tuple[str, str, bytes]]:
    """Takes what it yields out of `wanted`."""
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=list(PARQUET_COLUMNS)):
        for side in ("0", "1"):
            ids, images = batch.column(f"image_{side}_uid"), batch.column(f"jpg_{side}")
            for row, uid in enumerate(ids.to_pylist()):
                if uid in wanted:
                    wanted.discard(uid)
                    yield uid, batch.column("caption")[row].as_py() or "", images[row].as_py() or b""


def _find_folder(folder: str, wanted: set[str]) -> Iterator[tuple[str, str, bytes]]:
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"images: no folder {folder}, expected images named by uid and captions.jsonl or captions.csv")
    captions = _read_captions(folder)
    for path in sorted(folder.iterdir()):
        uid = path.stem
        if path.suffix.lower() in EXTENSIONS and uid in wanted and uid in captions:
            wanted.discard(uid)
            yield uid, captions[uid], path.read_bytes()


def _read_captions(folder: pathlib.Path) -> dict[str, str]:
    captions = {}
    if (path := folder / "captions.jsonl").is_file():
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    captions[str(entry["uid"])] = str(entry["caption"])
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f'images: {path} line {number}: got {line[:80]!r}, expected {{"uid": ..., "caption": ...}}'
                    ) from error
        return captions
    if (path := folder / "captions.csv").is_file():
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if not {"uid", "caption"} <= set(reader.fieldnames or ()):
                raise ValueError(f"images: {path}: got columns {reader.fieldnames}, expected a header uid,caption")
            for row in reader:
                captions[row["uid"]] = row["caption"] or ""
        return captions
    raise ValueError(f"images: {folder} has neither captions.jsonl nor captions.csv, expected one with uid and caption")
