"""Writes RichHF-Synth in the published formats: RichHF record files, and images in Pick-a-Pic-like parquet shards."""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib

import cv2
import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from richhf_data import consolidate, json_files, paths, schema
from richhf_data.errors import UserError
from richhf_data.synthetic import ceiling, example, stream

JPEG_QUALITY = 95
SHARD_ROWS = 2000


@dataclasses.dataclass(frozen=True)
class _Written:
    """What a worker returns for one example."""

    record: dict
    row: dict
    likert: np.ndarray  # [3 annotators, 4 scores]
    empty: np.ndarray  # bool[2]
    evidence: ceiling.Evidence | None


def _jpeg(image):
    return cv2.imencode(".jpg", image[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))[1].tobytes()


def _make(index: int, *, split: str, seed: int, size: int) -> _Written:
    drawn = example.draw(seed, index, split, size, ceiling.MAP_SIZE)
    other = example.draw(seed, index, split, size, ceiling.MAP_SIZE, take=1)  # Pick-a-Pic has two pictures a prompt
    targets = consolidate.consolidate(drawn.annotations, drawn.prompt, schema.RAW_MAP_SIZE)
    slots = (drawn, other) if index % 2 == 0 else (other, drawn)
    row = {"caption": drawn.prompt}
    for slot, one in enumerate(slots):
        row |= {f"image_{slot}_uid": one.uid, f"jpg_{slot}": _jpeg(one.image)}
    return _Written(
        record=consolidate.raw_record(f"richhf_synth/{split}/{drawn.uid}.jpg", targets),
        row=row,
        likert=np.array([annotation.scores for annotation in drawn.annotations]),
        empty=~targets["heatmaps"].any(axis=(0, 1)),
        evidence=None if split == "train" else ceiling.evidence(drawn),
    )


def statistics(likert: np.ndarray, empty: np.ndarray) -> dict[str, float]:
    """Agreement of the annotators, score mean and deviation, and shares of empty maps.

    Args:
      likert: float[n, 3 annotators, 4 scores], 1 .. 5. empty: bool[n, 2], order schema.HEATMAPS.
    """
    spread = likert.max(axis=1) - likert.min(axis=1)  # [n, 4]
    scores = (likert.mean(axis=1) - schema.LIKERT_LOW) / (schema.LIKERT_HIGH - schema.LIKERT_LOW)
    figures = {
        "all three raters equal": (spread == 0).mean(),
        "within one point": (spread <= 1).mean(),
        "score mean": scores[:, 0].mean(),
        "score deviation": scores[:, 0].std(),
        **{f"empty {name} maps": share for name, share in zip(schema.HEATMAPS, empty.mean(axis=0), strict=True)},
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


def write(output, counts: dict[str, int], size: int, seed: int, workers: int | None = None) -> dict[str, float]:
    """Writes the dataset and returns its `statistics`. The files are the same for any number of workers.

    A finished folder of the same arguments is left as it is; an interrupted one is written again from the start.

    Args:
      counts: examples of each split; order grammar.SPLITS.
      size: pixels of the images, both sides.

    Raises:
      UserError: the folder holds other files, or the dataset of other arguments.
    """
    from richhf_data import records

    output = pathlib.Path(output)
    arguments = {"counts": counts, "size": size, "seed": seed}
    marker, done = output / "arguments.json", output / "statistics.json"
    if marker.is_file() and (recorded := json_files.read(marker)) != arguments:
        raise UserError(f"output: {output} holds RichHF-Synth of {recorded}, this is {arguments}; take another folder")
    if not marker.is_file() and paths.holds_files(output):
        raise UserError(f"output: {output} holds other files; take an empty or a new folder")
    if done.is_file():
        print(f"{output} is complete already")
        return json_files.read(done)
    (output / "images").mkdir(parents=True, exist_ok=True)
    _write_json(marker, arguments)

    references, likert, empty = {}, [], []
    context = multiprocessing.get_context("spawn")
    with paths.naming("/dev/shm"):  # their semaphores
        pool = concurrent.futures.ProcessPoolExecutor(
            workers or os.cpu_count(), mp_context=context, initializer=stream.start_drawing
        )
    with pool, tqdm(total=sum(counts.values()), desc="draw", unit="example") as bar:
        for split, count in counts.items():
            evidence, rows = [], []

            def made(split=split, count=count, evidence=evidence, rows=rows):
                make = functools.partial(_make, split=split, seed=seed, size=size)
                for index, one in enumerate(pool.map(make, range(count), chunksize=25)):
                    likert.append(one.likert)
                    empty.append(one.empty)
                    rows.append(one.row)
                    if one.evidence:
                        evidence.append(one.evidence)
                    if len(rows) == SHARD_ROWS or index == count - 1:
                        _write_parquet(output / "images" / f"{split}-{index // SHARD_ROWS:05d}.parquet", rows)
                        rows.clear()
                    bar.update()
                    yield one.record

            records.write(output / f"{split}.tfrecord", made())
            if evidence:
                references[split] = ceiling.references(evidence)
    _write_json(output / "references.json", references)
    figures = statistics(np.array(likert), np.array(empty))
    _write_json(done, figures)
    return figures


def _write_parquet(path, rows):
    with paths.writing(path) as partial:
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, str(partial), row_group_size=100, write_page_checksum=True)


def _write_json(path, value):
    paths.replace(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
