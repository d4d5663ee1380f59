"""A part of the output: part-NNNNN.parquet, with a row for each picture of a shard. Imports no JAX.

A part has the same bytes whenever it is written: batches are formed within its shard, and nothing of the time or the machine
is in it. Its metadata, under the key `METADATA`, are JSON: the `fingerprint` of the shard's input and of all options, the
`input`, the numbers of `rows` and of `failed`, the `model` and the `rewards` (their names, specs and identities).
"""

import concurrent.futures
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet

from rahf.fingerprint import fingerprint
from richhf_data import images, input_files, jsonl, keywords, parquet, paths, picture_shards, schema
from richhf_data.errors import UserError

METADATA = b"rahf.score"
_FORMAT = 1  # another number whenever the same input gives another part
_ROW_GROUP = 1 << 14
_THREADS = 32  # that read the parts' metadata: most of it is waiting
RESULTS = ("index.json", "failed.jsonl")  # beside the parts
_PARTIAL = re.compile(r"(part-\d{5,}\.parquet|index\.json|failed\.jsonl)\.[0-9a-f]{16}\.partial")  # left by a kill


@dataclasses.dataclass(frozen=True)
class Job:
    """What all shards have in common, and a worker process needs to know.

    Attributes:
      output: the folder. model: its identity. vocabulary: the path of the model's. image_size: pixels of a side that the
        model reads. batch_size: pictures at a time.
      rewards: (name of the column, spec, identity). heatmaps: whether they are kept. strict: whether a fault ends the job.
      deviations: whether the model predicts those of its scores.
    """

    output: str
    model: str
    vocabulary: str
    image_size: int
    batch_size: int
    truncates: bool
    rewards: tuple[tuple[str, str, str], ...] = ()
    heatmaps: bool = False
    strict: bool = False
    deviations: bool = False

    def fingerprint(self) -> str:
        """Of all that a part depends on but its shard."""
        return fingerprint(_FORMAT, self.model, self.batch_size, self.truncates, self.rewards, self.heatmaps)

    def path(self, index: int) -> str:
        """Of the part of the shard with this number."""
        return f"{self.output.rstrip('/')}/part-{index:05d}.parquet"

    def schema(self) -> pyarrow.Schema:
        """The columns of a part."""
        deviations = schema.DEVIATIONS if self.deviations else ()
        names = (*schema.SCORES, *deviations, *(name for name, *_ in self.rewards))
        numbers = [(name, pyarrow.float32()) for name in names]
        maps = [(name, pyarrow.binary()) for name in schema.HEATMAPS if self.heatmaps]
        words = [("keywords", pyarrow.list_(pyarrow.string())), ("labelled_prompt", pyarrow.string())]
        texts = [("image", pyarrow.string()), ("prompt", pyarrow.string())]
        return pyarrow.schema([*texts, *numbers, *words, *maps, ("error", pyarrow.string())])


@dataclasses.dataclass
class Batch:
    """Up to `Job.batch_size` rows of a shard that follow each other.

    Attributes:
      names, prompts: of all rows. faults: row -> why it has no prediction.
      pictures: row -> uint8[S, S, 3], of the others, at the model's size. originals: row -> uint8[H, W, 3], for the rewards.
    """

    names: list[str]
    prompts: list[str | None]
    faults: dict[int, str]
    pictures: dict[int, np.ndarray]
    originals: dict[int, np.ndarray]


@dataclasses.dataclass
class Predictions:
    """What the model says of the rows of a batch that have none of `faults`, n in their order. None: it predicts no such.

    Attributes:
      scores: float32[n, 4]. labelled: n keyword sequences. heatmaps: uint8[n, h, w, 2]. rewards: float32[n, rewards].
      deviations: float32[n, 4].
    """

    faults: dict[int, str]
    scores: np.ndarray | None
    labelled: list[str] | None
    heatmaps: np.ndarray | None
    rewards: np.ndarray
    deviations: np.ndarray | None = None


def header(job: Job, shard: picture_shards.Shard) -> dict[str, str]:
    """What identifies the part of a shard: its `fingerprint`, which changes with the shard's input, and its `input`."""
    return {"fingerprint": fingerprint(job.fingerprint(), shard.state()), "input": parquet.local(shard.where)}


def is_done(job: Job, index: int, head: Mapping[str, str]) -> bool:
    """Whether the part is there with this header; if the job is strict, without a fault."""
    found = read_metadata(job.path(index))
    return found is not None and found["fingerprint"] == head["fingerprint"] and not (job.strict and found["failed"])


def batches(job: Job, shard: picture_shards.Shard) -> Iterator[Batch]:
    """Reads and decodes a shard; yields a batch at least, if an empty one. Raises UserError if `job.strict`, of a fault."""
    batch, count = Batch([], [], {}, {}, {}), 0
    for name, prompt, data, fault in shard.read():
        row = len(batch.names)
        batch.names.append(name.encode("utf-8", "backslashreplace").decode())
        batch.prompts.append(prompt)
        if fault is None:
            try:
                image = images.decode(data, batch.names[-1])
                batch.pictures[row] = images.resize(image, job.image_size)
                if job.rewards:
                    batch.originals[row] = image
            except UserError as error:
                fault = str(error)
        if fault is not None:
            if job.strict:
                raise UserError(f"{parquet.local(shard.where)}: {batch.names[-1]}: {fault}")
            batch.faults[row] = fault
        if row + 1 == job.batch_size:
            yield batch
            batch, count = Batch([], [], {}, {}, {}), count + 1
    if batch.names or not count:
        yield batch


def rows(job: Job, batch: Batch, predictions: Predictions, written) -> pyarrow.RecordBatch:
    """The rows of a part. written: `Vocabulary.written`."""
    number = {row: i for i, row in enumerate(row for row in range(len(batch.names)) if row not in predictions.faults)}

    def column(values, of=lambda value: value):
        """Null where there is no prediction."""
        places = (number.get(row) for row in range(len(batch.names)))
        return [None if place is None or values is None else of(values[place]) for place in places]

    found = {"image": batch.names, "prompt": batch.prompts, "labelled_prompt": column(predictions.labelled)}
    for i, name in enumerate(schema.SCORES):
        found[name] = column(predictions.scores, lambda row, i=i: row[i])
    for i, name in enumerate(schema.DEVIATIONS):
        found[name] = column(predictions.deviations, lambda row, i=i: row[i])
    for i, (name, *_) in enumerate(job.rewards):
        found[name] = column(predictions.rewards, lambda row, i=i: row[i])
    found["keywords"] = [
        None if text is None else keywords.misaligned_in(text, prompt, written)
        for text, prompt in zip(found["labelled_prompt"], batch.prompts, strict=True)
    ]
    if job.heatmaps:
        for i, name in enumerate(schema.HEATMAPS):
            found[name] = column(predictions.heatmaps, lambda maps, i=i: images.png(maps[..., i]))
    found["error"] = [predictions.faults.get(row) for row in range(len(batch.names))]
    columns = job.schema()
    return pyarrow.RecordBatch.from_arrays(
        [pyarrow.array(found[field.name], field.type) for field in columns], schema=columns
    )


def write(job: Job, index: int, head: Mapping[str, str], found: Sequence[pyarrow.RecordBatch]) -> None:
    """Writes a part whole or not at all."""
    table = pyarrow.Table.from_batches(found, job.schema()).combine_chunks()
    failed = len(table) - table["error"].null_count
    rewards = {name: {"spec": spec, "identity": identity} for name, spec, identity in job.rewards}
    of_all = {"format": _FORMAT, "model": job.model, "rewards": rewards}
    metadata = of_all | dict(head) | {"rows": len(table), "failed": failed}
    table = table.replace_schema_metadata({METADATA: json.dumps(metadata, sort_keys=True)})
    with paths.writing_url(job.path(index)) as file:
        pyarrow.parquet.write_table(table, file, row_group_size=_ROW_GROUP, compression="zstd", write_page_checksum=True)


def read_metadata(path: str) -> dict | None:
    """The metadata of a part; None if it is not there or damaged."""
    try:
        filesystem, place = input_files.open_url(path)
        with filesystem.open(place) as file, pyarrow.parquet.ParquetFile(file) as part:
            found = jsonl.loads(part.schema_arrow.metadata[METADATA].decode())
            types = {"fingerprint": str, "input": str, "rows": int, "failed": int}
            return found if all(isinstance(found[name], kind) for name, kind in types.items()) else None
    except (OSError, pyarrow.ArrowException, ValueError, LookupError, TypeError):
        return None


def read_all_metadata(job: Job, count: int) -> list[dict]:
    """Of the parts of `count` shards. Raises UserError if one is missing."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(read_metadata, map(job.path, range(count))))
    if missing := [job.path(index) for index, metadata in enumerate(found) if metadata is None]:
        raise UserError(f"output: {missing[0]} is missing or damaged, expected a part of this job; run the command again")
    return found


def failures(job: Job, index: int) -> Iterator[dict]:
    """The rows of a part without a prediction: its name, the picture, its prompt and the reason."""
    filesystem, path = parquet.open_url("output", job.path(index))
    with filesystem.open(path) as file, pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as part:
        for row in part.read(["image", "prompt", "error"]).to_pylist():
            if row["error"] is not None:
                name = job.path(index).rpartition("/")[2]
                yield {"part": name, "image": row["image"], "prompt": row["prompt"], "reason": row["error"]}


def begin(job: Job, count: int) -> None:
    """Makes the output of `count` shards, and removes what earlier runs left there of other shards, or half-written.

    The index goes first: it is there when all parts are.

    Raises:
      UserError: a parquet file of someone else has the name of a part.
    """
    filesystem, folder = parquet.open_url("output", job.output)
    filesystem.makedirs(folder, exist_ok=True)
    names = [path.rpartition("/")[2] for path in filesystem.ls(folder, detail=False, refresh=True)]
    found = {name: int(match[1]) for name in names if (match := re.fullmatch(r"part-(\d{5,})\.parquet", name))}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        ours = dict(zip(found, threads.map(lambda name: _is_ours(f"{job.output.rstrip('/')}/{name}"), found), strict=True))
    if foreign := [name for name, is_ours in ours.items() if not is_ours]:
        raise UserError(f"output: {job.output} holds {foreign[0]}, which this command did not write; take another --output")
    left = [name for name in names if name in RESULTS or _PARTIAL.fullmatch(name)]
    for name in left + [name for name, index in found.items() if index >= count]:
        filesystem.rm_file(f"{folder}/{name}")


def _is_ours(path: str) -> bool:
    """Whether a parquet file has our metadata, or is damaged."""
    try:
        filesystem, place = input_files.open_url(path)
        with filesystem.open(place) as file, pyarrow.parquet.ParquetFile(file) as part:
            return METADATA in (part.schema_arrow.metadata or ())
    except (OSError, pyarrow.ArrowException):
        return True
