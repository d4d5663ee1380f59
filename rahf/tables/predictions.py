"""Predictions of a model for the examples of a split, as a parquet file that anyone can write and read.

  uid                               string
  plausibility, alignment, aesthetics, overall
                                    float32
  implausibility, misalignment      binary: height * width float16, little endian, row by row, in [0, 1]
  height, width                     int32
  labelled_prompt                   string, the prompt with `_0` on each misaligned word
  labels                            list of int8, one for each token of the prompt (keywords.tokenize): 0 = misaligned,
                                    1 = aligned, -1 = not copied; read in place of labelled_prompt where it is there

A column that is absent, or null in every row, was not predicted. One that is null in some rows is refused. Rows may be in
any order. Maps are float16 because KLD takes logarithms of small values, which 8 bits round to 0.

Our own files have the schema metadata `rahf.tables`: JSON of what was predicted (`Identity`). They are written in parts, and
a killed run continues.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow
import pyarrow.parquet

from rahf.fingerprint import fingerprint
from richhf_data import checked, jsonl, parquet, paths
from richhf_data.errors import UserError
from richhf_data.schema import HEATMAPS, SCORES

METADATA = b"rahf.tables"
FORMAT = 1
ROW_GROUP = 16  # rows of a file that are read at once: 10 MiB of 384 pixels
CHUNK_PIXELS = 1 << 20  # of one map, of the examples whose metrics are computed at once
_NOT_COPIED = -1
_NUMBERS = (pyarrow.types.is_floating, pyarrow.types.is_integer)
_BINARY = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
# Null is the type of lists that are all empty.
_WHOLE = {pyarrow.null(), *(pyarrow.type_for_alias(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))}
_KINDS = {
    "uid": ((parquet.is_text,), "strings"),
    **dict.fromkeys(SCORES, (_NUMBERS, "numbers")),
    **dict.fromkeys(HEATMAPS, (_BINARY, "binary")),
    **dict.fromkeys(("height", "width"), ((pyarrow.types.is_integer,), "integers")),
    "labelled_prompt": ((parquet.is_text,), "strings"),
    "labels": ((lambda kind: parquet.is_list(kind) and kind.value_type in _WHOLE,), "lists of integers"),
}
SCHEMA = pyarrow.schema(
    [
        ("uid", pyarrow.string()),
        *((name, pyarrow.float32()) for name in SCORES),
        *((name, pyarrow.binary()) for name in HEATMAPS),
        *((name, pyarrow.int32()) for name in ("height", "width")),
        ("labelled_prompt", pyarrow.string()),
        ("labels", pyarrow.list_(pyarrow.int8())),
    ]
)


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a file of ours holds predictions of.

    Attributes:
      model: the model's identity; None if it has none. Its predictions are made anew each time.
      dataset: the dataset's identity. split, num_examples: which of its examples.
      reward: whether the scores are on a scale of their own.
    """

    model: str | None
    dataset: str
    split: str
    num_examples: int
    reward: bool
    format: int = FORMAT

    def __post_init__(self):
        checked.fields(self, "identity")

    def same(self, other: "Identity | None") -> bool:
        """Whether predictions of `other` are those of this."""
        return self.model is not None and other == self


# ------------------------------------------------------------------------------------------------------------- writing


def write(path, identity: Identity, predict: Callable[[int], Iterable[list[dict[str, Any]]]]) -> None:
    """Writes a file of predictions, whole or not at all. Continues where a killed run of the same identity ended.

    Args:
      path: the file; the parts are in a folder beside it until it is whole.
      predict: (how many examples to skip) -> batches of predictions: dictionaries of uid; scores float32[4], heatmaps
        float32[h, w, 2] in [0, 1], labelled_prompt and labels, each None if not predicted; and score_mask bool[4] or
        heatmap_mask bool[2], False for a single score or map that was not.
    """
    path = pathlib.Path(path)
    folder = path.with_name(f"{path.stem}.unfinished")
    key = "none" if identity.model is None else fingerprint(identity)
    parts, done = [], 0
    while identity.model is not None and (part := _part(folder, done, key)):
        parts.append(part)
        done += pyarrow.parquet.read_metadata(part).num_rows
    if done:
        print(f"{path.parent.name}: {done} of {identity.num_examples} examples were predicted before")
    for batch in predict(done):
        file = folder / f"{done:08d}-{key}-{len(batch)}.parquet"
        with paths.writing(file) as partial:
            _write_table(partial, table(batch))
        parts.append(file)
        done += len(batch)
    assert done == identity.num_examples, (done, identity.num_examples)
    metadata = {METADATA: json.dumps(dataclasses.asdict(identity)).encode()}
    with (
        paths.writing(path) as partial,
        pyarrow.parquet.ParquetWriter(partial, SCHEMA.with_metadata(metadata), **_options()) as writer,
    ):
        for part in parts:
            writer.write_table(pyarrow.parquet.read_table(part), row_group_size=ROW_GROUP)
    shutil.rmtree(folder, ignore_errors=True)


def _part(folder: pathlib.Path, start: int, key: str) -> pathlib.Path | None:
    """The whole part that begins with an example."""
    for file in folder.glob(f"{start:08d}-{key}-*.parquet"):
        with contextlib.suppress(pyarrow.ArrowException, OSError, ValueError):
            if pyarrow.parquet.read_metadata(file).num_rows == int(file.stem.rpartition("-")[2]):
                return file
    return None


def _options() -> dict[str, Any]:
    return {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}


def _write_table(file, rows: pyarrow.Table) -> None:
    pyarrow.parquet.write_table(rows, file, row_group_size=ROW_GROUP, **_options())


def table(batch: Sequence[dict[str, Any]]) -> pyarrow.Table:
    """Predictions, as `write` describes them, in the columns of a file."""
    columns = {name: [] for name in SCHEMA.names}
    for row in batch:
        scores, maps = row.get("scores"), row.get("heatmaps")
        columns["uid"].append(row["uid"])
        for i, name in enumerate(SCORES):
            there = scores is not None and row.get("score_mask", (True,) * len(SCORES))[i]
            columns[name].append(float(scores[i]) if there else None)
        for i, name in enumerate(HEATMAPS):
            there = maps is not None and row.get("heatmap_mask", (True,) * len(HEATMAPS))[i]
            columns[name].append(np.ascontiguousarray(maps[..., i]).astype("<f2").tobytes() if there else None)
        for i, name in enumerate(("height", "width")):
            columns[name].append(None if maps is None else maps.shape[i])
        columns["labelled_prompt"].append(row.get("labelled_prompt"))
        labels = row.get("labels")
        columns["labels"].append(None if labels is None else [_NOT_COPIED if one is None else one for one in labels])
    return pyarrow.table([pyarrow.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def identity_of(path) -> Identity | None:
    """What a file of ours holds; None if there is no such file, or it is not of this format."""
    path = pathlib.Path(path)
    if not path.is_file():
        return None
    with parquet.open_file("predictions", os.fspath(path)) as file:
        metadata = (file.schema_arrow.metadata or {}).get(METADATA)
    with contextlib.suppress(ValueError):
        identity = checked.conform(Identity, jsonl.loads((metadata or b"").decode()))
        return identity if identity.format == FORMAT else None
    return None


# ------------------------------------------------------------------------------------------------------------- reading


class Predictions:
    """A file of predictions. Opening it reads and checks all but the maps, which are read in pieces.

    Args:
      path: the file. name: of its row in the tables, for errors.

    Attributes:
      path, name. uids: list of str. scores: float64[n, 4], nan where not predicted. score_mask bool[4],
      heatmap_mask bool[2]: which are predicted. texts: list of str, or None. labels: list of lists, or None.

    Raises:
      UserError: the file cannot be read; a column is missing, of a wrong type, or null in some rows; a uid is there twice; a
        score is not a finite number.
    """

    def __init__(self, path, name: str):
        self.path, self.name, self._where = pathlib.Path(path), name, f"rows: {name}: {path}"
        paths.check_file(f"rows: {name}", path, "a parquet file of predictions (python -m pydoc rahf.tables.predictions)")
        with self._open() as file:
            kinds = {field.name: field.type for field in file.schema_arrow}
            self._groups = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
            self._check_columns(kinds)
            self._have = {column for column in kinds if column in _KINDS and self._is_whole(file, column)}
            if "uid" not in self._have:
                raise UserError(f"{self._where}: uid is null in every row, expected the examples' ids")
            small = self._read(file, sorted(self._have - set(HEATMAPS)))
        self._piece = functools.lru_cache(maxsize=1)(self._read_piece)
        self.uids = small["uid"]
        if twice := [uid for uid, count in collections.Counter(self.uids).items() if count > 1]:
            self._refuse("uid", "is there more than once", twice, "each picture once")
        self.score_mask = np.array([column in self._have for column in SCORES])
        self.heatmap_mask = np.array([column in self._have for column in HEATMAPS])
        self.scores = np.full((len(self.uids), len(SCORES)), np.nan)
        for i in np.flatnonzero(self.score_mask):
            self.scores[:, i] = small[SCORES[i]]
            bad = ~np.isfinite(self.scores[:, i])
            self._refuse(SCORES[i], "is NaN or infinite", self._named(bad), "finite numbers")
        self.texts, self.labels = small.get("labelled_prompt"), None
        if "labels" in small:
            self.labels = [[None if one == _NOT_COPIED else one for one in row] for row in small["labels"]]
            bad = [not set(row) <= {0, 1, None} for row in self.labels]
            self._refuse("labels", "holds other values than 0, 1 and -1", self._named(bad), "0, 1 or -1 for each token")
        self._sizes = None
        if self.heatmap_mask.any():
            if missing := {"height", "width"} - self._have:
                raise UserError(f"{self._where}: got maps without the columns {', '.join(sorted(missing))}, expected both")
            self._sizes = np.array([small["height"], small["width"]]).T
            bad = (self._sizes < 1).any(axis=1) | (self._sizes > 2**13).any(axis=1)
            self._refuse("height or width", "is not from 1 to 8192", self._named(bad), "the maps' size in pixels")

    @property
    def size(self) -> int:
        """The largest side of the maps, 0 without any."""
        return 0 if self._sizes is None else int(self._sizes.max())

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """uid -> its row in the file."""
        return {uid: place for place, uid in enumerate(self.uids)}

    def check_uids(self, uids: Sequence[str]) -> None:
        """Raises UserError unless the file has exactly these uids, in any order."""
        if missing := [uid for uid in uids if uid not in self.places]:
            raise UserError(
                f"{self._where}: {len(missing)} of the split's {len(uids)} examples are missing, the first "
                f"{missing[0][:80]!r}; expected every example"
            )
        if unknown := sorted(self.places.keys() - set(uids)):
            self._refuse("uid", "is not in the split", unknown, f"its {len(uids)} examples alone")

    def batches(self, size: int) -> Iterator[tuple[range, list[np.ndarray] | None]]:
        """Yields some rows of the file at a time, and their maps, float32[size, size, 2] each; None without any.

        A map of another size is resized: averaged over areas if it is larger, else bilinear. One that is not predicted is 0.

        Raises:
          UserError: after the last row, if maps do not have the length that height and width say, or values out of [0, 1].
        """
        count = max(1, min(256, CHUNK_PIXELS // size**2))
        if not self.heatmap_mask.any():
            for start in range(0, len(self.uids), count):
                yield range(start, min(start + count, len(self.uids))), None
            return
        columns = [name for name in HEATMAPS if name in self._have]
        faults, start = collections.defaultdict(list), 0
        with self._open() as file, self._named_errors():
            for batch in file.iter_batches(count, columns=columns):
                rows = range(start, start + batch.num_rows)
                start = rows.stop
                maps = [self._maps(row, batch, place, faults) for place, row in enumerate(rows)]
                if not faults:
                    yield rows, [resized(one, size) for one in maps]
        for (column, fault), uids in faults.items():
            self._refuse(column, fault, uids, "height * width float16 values in [0, 1], little endian")

    def maps(self, row: int) -> np.ndarray | None:
        """The maps of a row, float32[h, w, 2]; None without any. One that is not predicted is 0."""
        if not self.heatmap_mask.any():
            return None
        group = int(np.searchsorted(self._groups, row, side="right")) - 1
        piece, place = divmod(row - int(self._groups[group]), ROW_GROUP)
        return self._maps(row, self._piece(group, piece), place, collections.defaultdict(list))

    def row(self, row: int, maps: np.ndarray | None = None) -> dict[str, Any]:
        """The prediction of a row, as `write` describes it; with these maps, or those of the file."""
        return {
            "uid": self.uids[row],
            "scores": self.scores[row] if self.score_mask.any() else None,
            "score_mask": self.score_mask,
            "heatmaps": self.maps(row) if maps is None else maps,
            "heatmap_mask": self.heatmap_mask,
            "labelled_prompt": self.texts and self.texts[row],
            "labels": self.labels and self.labels[row],
        }

    def _read_piece(self, group, piece):
        """The maps of `ROW_GROUP` rows of a row group, which may be as large as the file."""
        columns = [name for name in HEATMAPS if name in self._have]
        with self._open() as file, self._named_errors():
            return next(itertools.islice(file.iter_batches(ROW_GROUP, [group], columns), piece, None))

    def _maps(self, row, batch, place, faults):
        height, width = map(int, self._sizes[row])
        found = {}
        for i in np.flatnonzero(self.heatmap_mask):
            values = batch.column(HEATMAPS[i])[place]
            values = np.frombuffer(values.as_buffer(), np.uint8) if values.is_valid else ()
            if len(values) != 2 * height * width:
                faults[HEATMAPS[i], "does not have 2 * height * width bytes"].append(self.uids[row])
                continue
            found[i] = values.view("<f2").astype(np.float32).reshape(height, width)
            if not (found[i].min() >= 0 and found[i].max() <= 1):  # false for nan too
                faults[HEATMAPS[i], "has NaN or a value out of [0, 1]"].append(self.uids[row])
        blank = np.zeros((height, width) if found else (1, 1), np.float32)
        return np.stack([found.get(i, blank) for i in range(len(HEATMAPS))], axis=-1)

    def _open(self):
        return parquet.open_file("rows", os.fspath(self.path))

    @contextlib.contextmanager
    def _named_errors(self):
        try:
            yield
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise parquet.unreadable("rows", os.fspath(self.path), error) from error

    def _check_columns(self, kinds):
        if "uid" not in kinds:
            raise UserError(f"{self._where}: no column uid, expected the examples' ids; it has {parquet.listed(kinds)}")
        for column, kind in kinds.items():
            fits, expected = _KINDS.get(column, ((lambda _: True,), ""))
            if not any(fit(kind) for fit in (*fits, pyarrow.types.is_null)):
                raise UserError(f"{self._where}: column {column} is {kind}, expected {expected}")
        if not self._groups[-1]:
            raise UserError(f"{self._where}: has no rows, expected one for each example")

    def _is_whole(self, file, column) -> bool:
        """Whether a column is there; False if it is null in every row."""
        place = [file.schema.column(i).path.partition(".")[0] for i in range(len(file.schema))].index(column)
        counts = []
        for group in range(file.num_row_groups):
            statistics = file.metadata.row_group(group).column(place).statistics
            if column == "labels" or statistics is None or not statistics.has_null_count:
                counts.append(None)
            else:
                counts.append(statistics.null_count)
        if None not in counts:
            total = sum(counts)
            if total in (0, self._groups[-1]):
                return total == 0
        null = []
        with self._named_errors():
            for batch in file.iter_batches(ROW_GROUP, columns=[column]):
                null.append(batch.column(0).is_null().to_numpy(zero_copy_only=False))
            null = np.concatenate(null)
            if 0 < null.sum() < len(null):
                uids = self._read(file, ["uid"])["uid"] if column != "uid" else [f"row {i}" for i in range(len(null))]
                found = [uid for uid, is_null in zip(uids, null, strict=True) if is_null]
                self._refuse(column, "is null", found, "a value in every row, or in none where it is not predicted")
        return not null.any()

    def _read(self, file, columns) -> dict[str, list]:
        with self._named_errors():
            found = file.read(columns=columns)
            return {name: found.column(name).to_pylist() for name in columns}

    def _named(self, bad) -> list[str]:
        return [self.uids[row] for row in np.flatnonzero(bad)]

    def _refuse(self, column, fault, uids, expected) -> None:
        if uids:
            count = f"in {len(uids)} of {self._groups[-1]} rows, the first {str(uids[0])[:80]!r}"
            raise UserError(f"{self._where}: {column} {fault} {count}; expected {expected}")


def resized(maps: np.ndarray, size: int) -> np.ndarray:
    """float32[h, w, 2] -> float32[size, size, 2]: averages over areas if it shrinks, else bilinear."""
    if maps.shape[:2] == (size, size):
        return maps
    interpolation = cv2.INTER_AREA if max(maps.shape[:2]) > size else cv2.INTER_LINEAR
    return np.clip(cv2.resize(maps, (size, size), interpolation=interpolation), 0, 1)
