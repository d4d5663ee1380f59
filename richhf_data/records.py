"""Reads, checks and writes RichHF TFRecords.

Format (google-research-datasets/richhf-18k): a TFRecord file of `tf.train.Example`s with the keys `schema.RAW_*`. A raw
record is a dictionary with these keys:

  filename                                str, a path whose last part without extension is the image's uid
  artifact_score, ... (four)              float in [0, 1], higher is better
  artifact_map, misalignment_map          bytes, a one-channel uint8 image of 512 x 512, 255 = every annotator
  prompt_misalignment_label               str, "1 0 1": one per prompt token, 0 = misaligned

Published records have every key. Records of other annotations (consolidate.py) need only the first: the other targets may
be absent. Functions accept such records only with `allow_absent`.
"""

import math
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np

from richhf_data import images, jsonl, keywords, paths, schema
from richhf_data.errors import UserError
from richhf_data.tensorflow_cpu import tf

KEYS = (schema.RAW_UID, *schema.RAW_SCORES.values(), *schema.RAW_HEATMAPS.values(), schema.RAW_LABELS)
_ABSENT = "--allow_absent takes records of other annotations, which may lack targets"
_LFS_START, _GZIP_START = b"version https://git-lfs", b"\x1f\x8b\x08"
_HEADER, _FOOTER = 12, 4  # bytes around a record: its length and the length's checksum; the record's checksum
FRAME = _HEADER + _FOOTER


def uid_of(raw: dict) -> str:
    """The uid of a raw record's image.

    >>> uid_of({'filename': 'train/0a1b.png'})
    '0a1b'
    """
    return pathlib.PurePosixPath(raw[schema.RAW_UID]).stem


def write(path, raw_records: Iterable[dict], allow_absent: bool = False) -> int:
    """Checks raw records (see the module) and writes them to `path`, whole or not at all; returns how many.

    Raises:
      UserError: a record that `decode` refuses.
    """
    count = 0
    with paths.writing(path) as partial, tf.io.TFRecordWriter(str(partial)) as writer:
        for count, raw in enumerate(raw_records, start=1):
            decode(raw, f"{path} record {count - 1}", allow_absent)
            writer.write(serialize(raw))
    return count


def serialize(raw: dict) -> bytes:
    """A raw record as a serialised `tf.train.Example`, unchecked; absent keys are left out."""
    example = tf.train.Example()
    for key in KEYS:
        if key not in raw:
            continue
        if key in schema.RAW_SCORES.values():
            example.features.feature[key].float_list.value.append(raw[key])
        else:
            value = raw[key]
            example.features.feature[key].bytes_list.value.append(value.encode() if isinstance(value, str) else value)
    return example.SerializeToString(deterministic=True)


def read(path, allow_absent: bool = False) -> Iterator[dict]:
    """Yields the raw records of a file in order, each checked by `decode`.

    Raises:
      UserError: no such file, a Git LFS pointer, a truncated or corrupt record, or a record that `decode` refuses.
    """
    for number, raw in enumerate(read_unchecked(path, allow_absent)):
        decode(raw, f"{path} record {number}", allow_absent)
        yield raw


def read_unchecked(path, allow_absent: bool = False) -> Iterator[dict]:
    """As `read`, but checks the checksums of the file and the keys of the records, and not the values."""
    check_file(path)
    extents(path)
    iterator = iter(tf.data.TFRecordDataset(str(path)))
    number = 0
    while True:
        try:
            serialized = next(iterator)
        except StopIteration:
            return
        except tf.errors.DataLossError as error:
            raise UserError(_corrupt(path, number, said_by(error))) from error
        yield parse(serialized.numpy(), f"{path} record {number}", allow_absent)
        number += 1


def parse(serialized: bytes, where: str, allow_absent: bool = False) -> dict:
    """The raw record of a serialised `tf.train.Example`; `where` names it in errors.

    Raises:
      UserError: it is not an example; or a published key (with `allow_absent`, only the first) is missing, or has another
        number of values than one.
    """
    example = tf.train.Example()
    try:
        example.ParseFromString(serialized)
    except Exception as error:  # protobuf's DecodeError, which has moved between its versions
        raise UserError(f"{where}: got bytes that are not a tf.train.Example, expected a RichHF record") from error
    features = example.features.feature
    if schema.RAW_UID in features and features[schema.RAW_UID].bytes_list.value:
        name = features[schema.RAW_UID].bytes_list.value[0].decode(errors="replace")
        where = f"{where} ({schema.RAW_UID} {name!r})"
    raw = {}
    for key in KEYS:
        if allow_absent and key != schema.RAW_UID and key not in features:
            continue
        kind = "float_list" if key in schema.RAW_SCORES.values() else "bytes_list"
        values = getattr(features[key], kind).value if key in features else ()
        if len(values) != 1:
            got = f"{len(values)} values of type {kind}" if key in features else "no such key"
            present = ", ".join(sorted(features)) or "none"
            raise UserError(
                f"{where}: key {key!r}: got {got}, expected one value of type {kind}. Keys present: {present}. "
                f"RichHF records come from google-research-datasets/richhf-18k; {_ABSENT}"
            )
        raw[key] = values[0]
    for key in {schema.RAW_UID, schema.RAW_LABELS} & raw.keys():
        raw[key] = jsonl.decode(raw[key], f"{where}: key {key!r}")
    return raw


def decode(raw: dict, where: str = "record", allow_absent: bool = False) -> dict:
    """The annotations of a raw record under our names (see schema.py); `where` names the record in errors.

    Returns:
      `uid` str, `scores` float32[4] in [0, 1], `score_mask` bool[4], `heatmaps` uint8[512, 512, 2], `heatmap_mask`
      bool[2], `labels` int32[number of labels]. With `allow_absent` an absent score or map is 0 with a mask of False,
      and absent labels are None.

    Raises:
      UserError: a missing key (`filename` alone with `allow_absent`), a score outside [0, 1], a map that is not a
        one-channel 512 x 512 image, or a label that is neither 0 nor 1.
    """
    for key in KEYS:
        if key not in raw and not (allow_absent and key != schema.RAW_UID):
            present = ", ".join(raw)
            raise UserError(f"{where}: key {key!r}: got no such key, expected it. Keys present: {present}; {_ABSENT}")
    uid = uid_of(raw)
    where = f"{where} (uid {uid!r})"
    scores = np.asarray([raw.get(key, 0) for key in schema.RAW_SCORES.values()], np.float32)
    for key, score in zip(schema.RAW_SCORES.values(), scores.tolist(), strict=True):
        if math.isnan(score) or not 0 <= score <= 1:
            raise UserError(
                f"{where}: {key}: got {score:g}, expected a number in [0, 1]; "
                "a Likert mean s of 1 to 5 becomes (s - 1) / 4"
            )
    try:
        labels = keywords.parse_labels(raw[schema.RAW_LABELS]) if schema.RAW_LABELS in raw else None
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    heatmaps = np.zeros((schema.RAW_MAP_SIZE, schema.RAW_MAP_SIZE, len(schema.HEATMAPS)), np.uint8)
    for i, key in enumerate(schema.RAW_HEATMAPS.values()):
        if key in raw:
            heatmaps[..., i] = _decode_map(raw[key], f"{where}: {key}")
    return {
        "uid": uid,
        "scores": scores,
        "score_mask": np.asarray([key in raw for key in schema.RAW_SCORES.values()]),
        "heatmaps": heatmaps,
        "heatmap_mask": np.asarray([key in raw for key in schema.RAW_HEATMAPS.values()]),
        "labels": None if labels is None else np.asarray(labels, np.int32),
    }


def _decode_map(encoded: bytes, where: str) -> np.ndarray:
    """uint8[512, 512] from an encoded one-channel image."""
    size, got = schema.RAW_MAP_SIZE, ""
    try:
        width, height = images.stored_size(encoded)  # before it is decoded: a small file can hold a huge image
        if (width, height) == (size, size):
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
            if image is None:
                raise UserError("damaged")
            if image.shape == (size, size) and image.dtype == np.uint8:
                return image
            got = f" of {image.shape[2] if image.ndim == 3 else 1} {image.dtype} channel(s)"
    except (UserError, cv2.error) as error:
        got = f"{len(encoded)} bytes that do not decode as an image"
        raise UserError(f"{where}: got {got}, expected a PNG") from error
    raise UserError(
        f"{where}: got a {width} x {height} image{got}, expected {size} x {size} of 1 uint8 channel; resize it, or "
        "re-encode it as an 8-bit grey-scale PNG"
    )


def extents(path) -> list[tuple[int, int]]:
    """(offset, length) of each record's bytes in a local TFRecord file. Checksums are not checked.

    TensorFlow believes a record's length and reserves as much memory, so no file is given to it before this has passed.

    Raises:
      UserError: a record does not end within the file.
    """
    found, offset, size = [], 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while offset < size:
            file.seek(offset)
            header = file.read(_HEADER)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == _HEADER else size
            end = offset + length + FRAME
            if end > size:
                file.seek(0)
                if file.read(len(_GZIP_START)) == _GZIP_START:
                    raise UserError(f"records: {path} is compressed with gzip, expected plain records; unpack it first")
                raise UserError(_corrupt(path, len(found), f"it would end at byte {end} of {size}"))
            found.append((offset + _HEADER, length))
            offset = end
    return found


class RandomAccess(Sequence):
    """The serialised records of TFRecord files by index. Each is read from disk when it is asked for; thread-safe.

    The constructor reads the lengths of the records. Checksums are not checked; `read` checks them.

    Raises:
      UserError: a missing file, a Git LFS pointer or a truncated file.
    """

    def __init__(self, files: Sequence):
        self._files, entries = [], []
        for path in files:
            check_file(path)
            entries += [(len(self._files), *extent) for extent in extents(path)]
            self._files.append(open(path, "rb"))  # noqa: SIM115 - kept open for the life of the object
        self._entries = np.asarray(entries, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> bytes:
        file, offset, length = self._entries[index].tolist()
        return os.pread(self._files[file].fileno(), length, offset)


def check_file(path) -> None:
    """Raises UserError if the path is no regular local file, or a Git LFS pointer."""
    if "://" in str(path):
        raise UserError(f"records: got the remote path {path}, expected a local file; copy it to a local disk first")
    paths.check_file("records", path, "a RichHF TFRecord file such as train.tfrecord")
    with open(path, "rb") as file:
        if file.read(len(_LFS_START)) == _LFS_START:
            raise UserError(
                f"records: {path} is a Git LFS pointer (a few lines of text), expected the records themselves; "
                "run `git lfs install && git lfs pull` in the clone of google-research-datasets/richhf-18k"
            )


def said_by(error: tf.errors.OpError) -> str:
    """The message of TensorFlow's error in one line, without the names of its operations."""
    return " ".join(re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message, flags=re.DOTALL).split())


def _corrupt(path, number: int, message: str) -> str:
    return (
        f"records: {path} record {number} (counted from 0): got a truncated or corrupt record ({message}), expected "
        f"{number + 1} or more whole ones; download or write the file again"
    )
