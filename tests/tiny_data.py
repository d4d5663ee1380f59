"""A tiny dataset in the published record format and Pick-a-Pic's shard format, made of random images."""

import functools
import json
import pathlib
import struct
import tempfile
import zlib

import cv2
import numpy as np

from richhf_data import keywords, schema

WORDS = ("red", "blue", "cat", "dog", "on", "under", "a", "the", "table", "moon", "two", "three")
SCORE_STEPS = {"alignment_score": 1, "coherence_score": 2, "style_score": 4}  # of Rapidata's table, halves of a point


def prompt_of(uid: str) -> str:
    rng = np.random.default_rng(zlib.crc32(uid.encode()))
    return " ".join(rng.choice(WORDS, rng.integers(3, 9))) + "."


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def png_bomb(side: int) -> bytes:
    """A small PNG whose header promises `side` x `side` pixels."""
    data = png(np.zeros((4, 4), np.uint8))
    header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


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


def record_header(length: int) -> bytes:
    """The first 12 bytes of a TFRecord: a length, and its checksum, a CRC-32C that is rotated and offset."""
    data, crc = struct.pack("<Q", length), 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return data + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


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


def write_table(path, uids: list[str], columns: dict[str, str], images: dict | None = None, records: bool = False) -> None:
    """A mirror's table: a row per image, its `columns` {uid, prompt, image: name}, beside them what such tables hold.

    A uid called filename is a path, one called number an integer, one called image.path the path in Hugging Face's
    struct, which an image called image is in.
    """
    import pyarrow
    import pyarrow.parquet

    encoded = [(images or {}).get(uid, jpg(image_of(uid))) for uid in uids]
    table = {"index": list(range(len(uids))), columns["prompt"]: [prompt_of(uid) for uid in uids]}
    if records:
        raw = [raw_record(uid) for uid in uids]
        table |= {key: [record[key] for record in raw] for key in raw[0] if key != schema.RAW_UID}
    if columns["image"] == "image":
        table["image"] = [{"bytes": image, "path": f"{uid}.jpg"} for uid, image in zip(uids, encoded, strict=True)]
    else:
        table[columns["image"]] = encoded
    if columns["uid"] == "number":
        table["number"] = [int(uid) for uid in uids]
    elif columns["uid"] != "image.path":
        table[columns["uid"]] = [f"test/{uid}.png" if columns["uid"] == "filename" else uid for uid in uids]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=4)


def flip(path, column: str) -> None:
    """Flips a bit in the last value of a column of a parquet file, whose pages are written anew with checksums."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table, path, compression="NONE", use_dictionary=False, write_page_checksum=True)
    with pyarrow.parquet.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        chunks = [group.column(i) for i in range(group.num_columns)]
    (chunk,) = [chunk for chunk in chunks if chunk.path_in_schema == column]
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 2] ^= 4
    path.write_bytes(data)


def write_sources(folder: pathlib.Path, sizes: dict[str, int], split: str | None = None) -> tuple[str, str]:
    """Records and shards of splits with so many examples; returns the values of --records and --images.

    The uids start with the keys of `sizes`, which are the splits' names unless `split` is given.
    """
    from richhf_data import records

    for name, size in sizes.items():
        uids = [f"{name}-{i:03d}" for i in range(size)]
        records.write(folder / "records" / f"{split or name}.tfrecord", map(raw_record, uids))
        write_parquet(folder / "images" / f"{name}.parquet", [(uid, f"unused-{uid}") for uid in uids])
    return str(folder / "records"), f"parquet:{folder}/images/*.parquet"


def write_rapidata(path, prompts: list[str], **changes) -> None:
    """A table with the columns and types of Rapidata/text-2-image-Rich-Human-Feedback (its card, release f65e504).

    Row 0 has no coherence map, row 1 no word scores, row 2 words of another prompt, row 3 no alignment score; maps are of
    64 instead of 1024 pixels. In the others "cat" is the worst word, and misaligned.
    """
    import pyarrow
    import pyarrow.parquet

    def words(prompt):
        scores = [[word, 6.0 if word.strip(",.") == "cat" else 0.25] for word in prompt.split()]
        return json.dumps([*scores, ["[No_mistakes]", 4.0]])

    def heatmap(row, centre):
        image = np.zeros((64, 64), np.float32)
        cv2.circle(image, centre, 6 + row % 5, 0.75, -1)
        return image.astype(np.float16)

    rows = range(len(prompts))
    scores = {name: [1 + (row * step) % 9 / 2 for row in rows] for name, step in SCORE_STEPS.items()}
    scores["alignment_score"][3] = None
    images = [{"bytes": jpg(image_of(f"rapidata-{row}")), "path": None} for row in rows]
    maps = {"alignment_heatmap": [heatmap(row, (20, 40)) for row in rows]}
    maps["coherence_heatmap"] = [None if row == 0 else heatmap(row, (44, 16)) for row in rows]
    word_scores = [words(prompt) for prompt in prompts]
    word_scores[1], word_scores[2] = None, words("another prompt")
    encoded = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    halves = pyarrow.list_(pyarrow.list_(pyarrow.float16()))
    columns = {
        "image": pyarrow.array(images, encoded),
        "prompt": prompts,
        "word_scores": pyarrow.array(word_scores, pyarrow.string()),
        **{f"{name}_norm": pyarrow.array([0.5] * len(prompts), pyarrow.float32()) for name in scores},
        **{name: pyarrow.array([v if v is None else list(v) for v in values], halves) for name, values in maps.items()},
        **{name: pyarrow.array(values, pyarrow.float32()) for name, values in scores.items()},
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: values for name, values in columns.items() if values is not None}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=8)


def annotation(uid: str, annotator: str, **changes) -> dict:
    """A full line of annotations; `changes` replace keys, None takes one away."""
    rng = np.random.default_rng(zlib.crc32(f"{uid} {annotator}".encode()))
    tokens = keywords.tokenize(prompt_of(uid))
    line = {
        "uid": uid,
        "annotator": annotator,
        "prompt": prompt_of(uid),
        "points": {name: rng.random((rng.integers(0, 3), 2)).round(3).tolist() for name in schema.HEATMAPS},
        "misaligned": [i for i in range(len(tokens)) if rng.random() < 0.3],
        "scores": {name: int(rng.integers(1, 6)) for name in schema.SCORES},
    } | changes
    return {key: value for key, value in line.items() if value is not None}


def write_annotations(folder: pathlib.Path, lines: list[dict]) -> tuple[str, str]:
    """Annotations and their pictures; returns the values of --annotations and --images."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for uid in {line["uid"] for line in lines}:
        (folder / "pictures" / f"{uid}.png").write_bytes(png(image_of(uid)))
    return str(folder / "lines.jsonl"), str(folder / "pictures")


def write_captions(path, captions: list[str], column: str = "caption") -> None:
    """A captioning table: encoded images as plain bytes, and texts."""
    import pyarrow
    import pyarrow.parquet

    images = [jpg(image_of(f"caption-{row}")) for row in range(len(captions))]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": images, column: captions}), path)


@functools.cache
def built(train: int = 23, dev: int = 9) -> str:
    """The data_dir of a built dataset, once per process."""
    from richhf_data import build

    folder = pathlib.Path(tempfile.mkdtemp(prefix="richhf_tiny_"))
    build.build(*write_sources(folder, {"train": train, "dev": dev}), folder / "data", vocabulary_size=80)
    return str(folder / "data")
