"""A tiny dataset in the published record format and Pick-a-Pic's shard format, made of random images."""

import functools
import pathlib
import tempfile
import zlib

import cv2
import numpy as np

from richhf_data import keywords, schema

WORDS = ("red", "blue", "cat", "dog", "on", "under", "a", "the", "table", "moon", "two", "three")


def prompt_of(uid: str) -> str:
    rng = np.random.default_rng(zlib.crc32(uid.encode()))
    return " ".join(rng.choice(WORDS, rng.integers(3, 9))) + "."


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def jpg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image)[1].tobytes()


def raw_record(uid: str, **changes) -> dict:
    """A good raw record; `changes` replace keys, None takes one away."""
    rng = np.random.default_rng(zlib.crc32(uid.encode()))
    artifact = np.zeros((schema.RAW_MAP_SIZE, schema.RAW_MAP_SIZE), np.uint8)
    if rng.random() < 0.7:
        cv2.circle(artifact, tuple(int(v) for v in rng.integers(50, 460, 2)), 26, 85 * int(rng.integers(1, 4)), -1)
    misalignment = np.zeros_like(artifact)
    if rng.random() < 0.5:
        cv2.circle(misalignment, tuple(int(v) for v in rng.integers(50, 460, 2)), 26, 255, -1)
    tokens = keywords.tokenize(prompt_of(uid))
    raw = {
        "filename": f"some/folder/{uid}.png",
        **{key: float(np.float32(rng.random())) for key in schema.RAW_SCORES.values()},
        "artifact_map": png(artifact),
        "misalignment_map": png(misalignment),
        "prompt_misalignment_label": " ".join(str(int(v)) for v in rng.random(len(tokens)) < 0.8),
    }
    raw |= changes
    return {key: value for key, value in raw.items() if value is not None}


def image_of(uid: str, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    """uint8[40, 48, 3], BGR."""
    rng = np.random.default_rng(zlib.crc32(uid.encode()) + 1)
    return cv2.resize(rng.integers(0, 255, (5, 6, 3), np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)


def write_parquet(path, rows: list[tuple[str, str]], images: dict | None = None, row_group_size: int = 4) -> None:
    """Pick-a-Pic's columns, a row per pair of uids; `images` replaces the encoded image of a uid."""
    import pyarrow
    import pyarrow.parquet

    images = images or {}
    table = {
        "are_different": [True] * len(rows),
        "caption": [prompt_of(first) for first, _ in rows],
        **{f"image_{i}_uid": [row[i] for row in rows] for i in (0, 1)},
        **{f"jpg_{i}": [images.get(row[i], jpg(image_of(row[i]))) for row in rows] for i in (0, 1)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=row_group_size)


def write_sources(folder: pathlib.Path, sizes: dict[str, int]) -> tuple[str, str]:
    """Records and shards of splits with so many examples; returns the values of --records and --images."""
    from richhf_data import records

    for split, size in sizes.items():
        uids = [f"{split}-{i:03d}" for i in range(size)]
        records.write(folder / "records" / f"{split}.tfrecord", map(raw_record, uids))
        write_parquet(folder / "images" / f"{split}.parquet", [(uid, f"unused-{uid}") for uid in uids])
    return str(folder / "records"), f"parquet:{folder}/images/*.parquet"


@functools.cache
def built(train: int = 23, dev: int = 9) -> str:
    """The data_dir of a built dataset, once per process."""
    from richhf_data import build

    folder = pathlib.Path(tempfile.mkdtemp(prefix="richhf_tiny_"))
    build.build(*write_sources(folder, {"train": train, "dev": dev}), folder / "data", vocabulary_size=80)
    return str(folder / "data")
