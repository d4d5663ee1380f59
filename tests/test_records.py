"""records.py: what is written is read, and every fault of a record or file is named."""

import gzip
import math

import cv2
import numpy as np
import pytest
from tiny_data import png, png_bomb, raw_record, record_header

from richhf_data import records, schema
from richhf_data.tensorflow_cpu import tf

READERS = [lambda path: list(records.read(path)), lambda path: records.RandomAccess([path])]


def _write_unchecked(path, raws):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for raw in raws:
            writer.write(records.serialize(raw))


def test_write_read_round_trip(tmp_path):
    raws = [raw_record(f"u{i}") for i in range(5)]
    assert records.write(tmp_path / "train.tfrecord", raws) == 5
    assert list(records.read(tmp_path / "train.tfrecord")) == raws
    assert [path.name for path in tmp_path.iterdir()] == ["train.tfrecord"]


def test_decode_names_and_order():
    raw = raw_record(
        "abc",
        artifact_score=0.25,
        misalignment_score=0.5,
        aesthetics_score=0.75,
        overall_score=1.0,
        artifact_map=png(np.full((512, 512), 7, np.uint8)),
        misalignment_map=png(np.zeros((512, 512), np.uint8)),
        prompt_misalignment_label="1 0 1",
    )
    example = records.decode(raw)
    assert example["uid"] == "abc"
    assert dict(zip(schema.SCORES, example["scores"].tolist(), strict=True)) == {
        "plausibility": 0.25,
        "alignment": 0.5,
        "aesthetics": 0.75,
        "overall": 1.0,
    }
    assert example["heatmaps"].shape == (512, 512, 2)
    assert example["heatmaps"][..., 0].min() == 7
    assert example["heatmaps"][..., 1].max() == 0
    assert example["labels"].tolist() == [1, 0, 1]


def test_random_access_equals_reading(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    raws = [raw_record(f"u{i}") for i in range(7)]
    _write_unchecked(paths[0], raws[:4])
    _write_unchecked(paths[1], raws[4:])
    stored = records.RandomAccess(paths)
    assert len(stored) == 7
    for i in (6, 0, 4, 3):
        assert records.parse(stored[i], "here") == raws[i]


@pytest.mark.parametrize("reader", READERS)
def test_lfs_pointer_is_named(tmp_path, reader):
    path = tmp_path / "train.tfrecord"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")
    with pytest.raises(ValueError, match=r"train.tfrecord is a Git LFS pointer .* expected the records.*git lfs pull"):
        reader(path)


@pytest.mark.parametrize("reader", READERS)
def test_truncated_record_is_numbered(tmp_path, reader):
    path = tmp_path / "train.tfrecord"
    _write_unchecked(path, [raw_record(f"u{i}") for i in range(4)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train.tfrecord record 3 .*truncated or corrupt"):
        reader(path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("length", [1 << 20, 1 << 45, (1 << 64) - 5, (1 << 64) - 1])
def test_length_beyond_the_file_is_numbered(tmp_path, reader, length):
    """With a right checksum, which TensorFlow would believe, and reserve as much memory."""
    path = tmp_path / "train.tfrecord"
    _write_unchecked(path, [raw_record(f"u{i}") for i in range(3)])
    first, content = records.extents(path)[0], path.read_bytes()
    start = sum(first) + 4
    path.write_bytes(content[:start] + record_header(length) + content[start + 12 :])
    with pytest.raises(ValueError, match=r"train.tfrecord record 1 .*truncated or corrupt record \(it would end at byte"):
        reader(path)


@pytest.mark.parametrize("reader", READERS)
def test_files_that_are_no_records_are_named(tmp_path, reader):
    path = tmp_path / "train.tfrecord"
    path.mkdir()
    with pytest.raises(ValueError, match=r"records: .*train.tfrecord is a folder; expected a RichHF TFRecord file"):
        reader(path)
    path.rmdir()
    _write_unchecked(tmp_path / "plain", [raw_record("u")])
    path.write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    with pytest.raises(ValueError, match=r"train.tfrecord is compressed with gzip, expected plain records"):
        reader(path)
    path.write_text("a text that is longer than a header")
    with pytest.raises(ValueError, match=r"train.tfrecord record 0 .*truncated or corrupt record"):
        reader(path)


def test_corrupt_record_is_numbered(tmp_path):
    path = tmp_path / "train.tfrecord"
    _write_unchecked(path, [raw_record(f"u{i}") for i in range(4)])
    content = bytearray(path.read_bytes())
    content[len(content) // 4 + 200] ^= 255  # the records' sizes are about equal: in the second one
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train.tfrecord record 1 .*truncated or corrupt"):
        list(records.read(path))


def test_other_bytes_are_refused(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "x.tfrecord")) as writer:
        writer.write(b"\xff\xff\xff no protobuf")
    with pytest.raises(ValueError, match=r"x.tfrecord record 0: got bytes that are not a tf.train.Example"):
        list(records.read(tmp_path / "x.tfrecord"))


def test_missing_file_and_remote_path_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*dev.tfrecord; expected a RichHF TFRecord file"):
        list(records.read(tmp_path / "dev.tfrecord"))
    with pytest.raises(ValueError, match=r"remote path gs://bucket/train.tfrecord, expected a local file"):
        records.RandomAccess(["gs://bucket/train.tfrecord"])


@pytest.mark.parametrize("key", records.KEYS)
def test_missing_key_is_named(tmp_path, key):
    path = tmp_path / "train.tfrecord"
    _write_unchecked(path, [raw_record("u0"), raw_record("u1", **{key: None})])
    name = "" if key == schema.RAW_UID else r" \(filename 'some/folder/u1.png'\)"
    with pytest.raises(ValueError, match=rf"record 1{name}: key '{key}': got no such key, .*Keys present: .*_map"):
        list(records.read(path))
    with pytest.raises(ValueError, match=rf"key '{key}': got no such key.*--allow_absent takes records"):
        records.decode(raw_record("u1", **{key: None}))
    if key == schema.RAW_UID:
        with pytest.raises(ValueError, match="key 'filename': got no such key"):
            list(records.read(path, allow_absent=True))
    else:
        assert list(records.read(path, allow_absent=True)) == [raw_record("u0"), raw_record("u1", **{key: None})]


def test_absent_targets_are_masked_where_they_are_allowed():
    absent = {"artifact_map": None, "misalignment_score": None, "prompt_misalignment_label": None}
    example = records.decode(raw_record("u1", **absent), allow_absent=True)
    full = records.decode(raw_record("u1"))
    assert full["score_mask"].all() and full["heatmap_mask"].all()
    assert example["score_mask"].tolist() == [True, False, True, True]
    np.testing.assert_array_equal(example["scores"], full["scores"] * example["score_mask"])
    assert example["heatmap_mask"].tolist() == [False, True]
    np.testing.assert_array_equal(example["heatmaps"], full["heatmaps"] * example["heatmap_mask"])
    assert example["labels"] is None
    with pytest.raises(ValueError, match=r"overall_score: got 7, expected"):  # what is there is checked all the same
        records.decode(raw_record("u1", overall_score=7.0, **absent), allow_absent=True)


@pytest.mark.parametrize("score", [1.5, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("key", ["artifact_score", "overall_score"])
def test_score_out_of_range_is_named(key, score):
    with pytest.raises(ValueError, match=rf"record 3 \(uid 'u1'\): {key}: got .*, expected a number in \[0, 1\]"):
        records.decode(raw_record("u1", **{key: score}), "record 3")


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "got 0 bytes that do not decode as an image, expected a PNG"),
        (b"no image", "got 8 bytes that do not decode as an image, expected a PNG"),
        (png_bomb(60_000), "got a 60000 x 60000 image, expected 512 x 512 of 1 uint8 channel; resize it"),
        (
            png(np.zeros((512, 256), np.uint8)),
            "got a 256 x 512 image, expected 512 x 512 of 1 uint8",
        ),
        (
            png(np.zeros((512, 512, 3), np.uint8)),
            r"got a 512 x 512 image of 3 uint8 channel\(s\), expected 512 x 512 of 1",
        ),
        (png(np.zeros((512, 512), np.uint16)), "got a 512 x 512 image of 1 uint16 channel.*8-bit grey-scale PNG"),
    ],
)
def test_bad_heatmap_is_named(encoded, message):
    with pytest.raises(ValueError, match=rf"\(uid 'u1'\): misalignment_map: {message}"):
        records.decode(raw_record("u1", misalignment_map=encoded))


def test_bad_label_is_named():
    with pytest.raises(ValueError, match=r"\(uid 'u1'\): prompt_misalignment_label: got entry '2'.*expected 0 or 1"):
        records.decode(raw_record("u1", prompt_misalignment_label="1 2 0"))


def test_write_of_a_bad_record_leaves_no_file(tmp_path):
    path = tmp_path / "train.tfrecord"
    with pytest.raises(ValueError, match=r"train.tfrecord record 1 \(uid 'u1'\): artifact_score"):
        records.write(path, [raw_record("u0"), raw_record("u1", artifact_score=2.0)])
    assert not path.exists()


def test_jpeg_heatmap_is_accepted():
    encoded = cv2.imencode(".jpg", np.full((512, 512), 85, np.uint8))[1].tobytes()
    assert records.decode(raw_record("u1", artifact_map=encoded))["heatmaps"][..., 0].mean() == 85
