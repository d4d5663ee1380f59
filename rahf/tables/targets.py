"""The annotators' answers of a split, as a parquet file: the tables can be made again from it without the dataset.

  uid, prompt                       string
  plausibility, alignment, aesthetics, overall
                                    float32; null where the annotators gave none
  implausibility, misalignment      binary: size * size uint8, row by row, 255 = every annotator; null where they gave none
  labels                            list of int8, one for each token of the prompt: 0 = misaligned, 1 = aligned; or null
  caption                           string, of captioning datasets; or null

The schema metadata `rahf.tables` is JSON (`Header`).
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet

from rahf.tables import predictions
from richhf_data import checked, jsonl, parquet, paths
from richhf_data.errors import UserError
from richhf_data.schema import HEATMAPS, SCORES

SCHEMA = pyarrow.schema(
    [
        ("uid", pyarrow.string()),
        ("prompt", pyarrow.string()),
        *((name, pyarrow.float32()) for name in SCORES),
        *((name, pyarrow.binary()) for name in HEATMAPS),
        ("labels", pyarrow.list_(pyarrow.int8())),
        ("caption", pyarrow.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
      dataset: its identity. split, num_examples: which of its examples. heatmap_size: pixels of a side.
    """

    dataset: str
    split: str
    num_examples: int
    heatmap_size: int
    format: int = predictions.FORMAT

    @property
    def of(self) -> dict[str, str | int]:
        """What predictions of the same examples say that they are of."""
        return {name: getattr(self, name) for name in ("dataset", "split", "num_examples")}


class Targets:
    """A file of targets. Opening it reads all but the maps.

    Attributes:
      header: Header. uids, prompts: lists of str. scores: float64[n, 4], nan where there is none.

    Raises:
      UserError: no such file, or one that this code did not write.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        paths.check_file("targets", path, "what this command writes; pass --data_dir")
        with self._open() as file:
            self.header = _header(file)
            if self.header is None or file.schema_arrow.names != SCHEMA.names:
                raise UserError(f"targets: {path} is of another version, expected what this command writes; pass --data_dir")
            self._groups = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
            small = file.read(columns=[name for name in SCHEMA.names if name not in HEATMAPS]).to_pydict()
        self.uids, self.prompts = small["uid"], small["prompt"]
        self._labels, self._captions = small["labels"], small["caption"]
        self._maps_of = functools.lru_cache(maxsize=4)(self._read_maps)  # predictions may be in another order
        self.scores = np.array([small[name] for name in SCORES], np.float64).T.reshape(-1, len(SCORES))

    def rows(self, places: Sequence[int]) -> list[dict]:
        """Some rows as `richhf_data.metrics.evaluate` takes targets."""
        return [self._row(place) for place in places]

    def _row(self, place):
        size = self.header.heatmap_size
        group = int(np.searchsorted(self._groups, place, side="right")) - 1
        maps = self._maps_of(group)[place - int(self._groups[group])]
        heatmaps = np.zeros((size, size, len(HEATMAPS)), np.uint8)
        for i, values in enumerate(maps):
            if values is not None:
                heatmaps[..., i] = np.frombuffer(values, np.uint8).reshape(size, size)
        there = np.isfinite(self.scores[place])
        return {
            "uid": self.uids[place],
            "prompt": self.prompts[place],
            "scores": np.where(there, self.scores[place], 0).astype(np.float32),
            "score_mask": there,
            "heatmaps": heatmaps,
            "heatmap_mask": np.array([values is not None for values in maps]),
            "labels": self._labels[place],
            "caption": self._captions[place],
        }

    def _read_maps(self, group):
        with self._open() as file:
            found = file.read_row_group(group, columns=list(HEATMAPS))
        return list(zip(*(found.column(name).to_pylist() for name in HEATMAPS), strict=True))

    def _open(self):
        return parquet.open_file("targets", os.fspath(self.path))


def header_of(path) -> Header | None:
    """What a file of targets holds; None if there is none, or it is of another version."""
    if not os.path.isfile(path):
        return None
    with parquet.open_file("targets", os.fspath(path)) as file:
        return _header(file)


def write(path, header: Header, examples: Iterable[dict]) -> None:
    """Writes a file of targets, whole or not at all.

    Args:
      examples: dictionaries as `richhf_data.metrics.evaluate` takes targets, with uid; maps of `header.heatmap_size`.
    """
    metadata = {predictions.METADATA: json.dumps(dataclasses.asdict(header)).encode()}
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with (
        paths.writing(path) as partial,
        pyarrow.parquet.ParquetWriter(partial, SCHEMA.with_metadata(metadata), **options) as writer,
    ):
        waiting = []
        for example in examples:
            waiting.append(_columns(example))
            if len(waiting) == predictions.ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(waiting, SCHEMA))
                waiting = []
        if waiting:
            writer.write_table(pyarrow.Table.from_pylist(waiting, SCHEMA))


def _columns(example):
    scores, maps = (
        zip(names, example[f"{kind}_mask"], strict=True) for kind, names in (("score", SCORES), ("heatmap", HEATMAPS))
    )
    return {
        **{key: example[key] for key in ("uid", "prompt", "labels")},
        "caption": example.get("caption"),
        **{name: float(example["scores"][i]) if there else None for i, (name, there) in enumerate(scores)},
        **{name: example["heatmaps"][..., i].tobytes() if there else None for i, (name, there) in enumerate(maps)},
    }


def _header(file) -> Header | None:
    metadata = (file.schema_arrow.metadata or {}).get(predictions.METADATA, b"")
    with contextlib.suppress(ValueError):
        header = checked.conform(Header, jsonl.loads(metadata.decode()))
        return header if header.format == predictions.FORMAT else None
    return None
