"""builder.py and build.py: what is joined, counted and refused, and that nothing half-made passes for done."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import quick_xla
import tensorflow_datasets as tfds
from absl import flags
from absl.testing import flagsaver
from tiny_data import built, image_of, jpg, png, prompt_of, raw_record, write_parquet, write_sources, write_table

from richhf_data import build, builder, consolidate, keywords, records, schema, tasks, vocabulary
from richhf_data.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_bars():
    tfds.disable_progress_bar()


def _sources(folder, uids, present=None, images=None, **changes):
    records.write(folder / "records" / "train.tfrecord", [raw_record(uid, **changes.get(uid, {})) for uid in uids])
    rows = [(uid, "-" + uid) for uid in (uids if present is None else present)]
    write_parquet(folder / "images" / "0.parquet", rows, images)
    return folder / "records", f"parquet:{folder}/images/*.parquet"


def _words(text):
    return " ".join(text.split())


def _load(data_dir, split):
    return list(tfds.as_numpy(tfds.builder_from_directory(str(builder.dataset_dir(data_dir))).as_dataset(split=split)))


def test_examples_equal_their_sources():
    examples = {example["uid"].decode(): example for example in _load(built(), "dev")}
    assert sorted(examples) == [f"dev-{i:03d}" for i in range(9)]
    for uid, example in examples.items():
        raw = raw_record(uid)
        decoded = records.decode(raw)
        assert example["prompt"].decode() == prompt_of(uid)
        assert example["image"] == jpg(image_of(uid))
        np.testing.assert_array_equal(example["scores"], decoded["scores"])
        assert example["heatmaps"].tolist() == [raw["artifact_map"], raw["misalignment_map"]]
        assert example["labels"].tolist() == decoded["labels"].tolist()
        tokens = keywords.tokenize(prompt_of(uid))
        assert example["labelled_prompt"].decode() == keywords.label_prompt(tokens, decoded["labels"])
        assert example["labels_valid"]


def test_report_counts_and_statistics():
    report = tasks.report(built())
    assert {split: row["examples"] for split, row in report["splits"].items()} == {"train": 23, "dev": 9}
    row = report["splits"]["train"]
    assert row["published_examples"] == schema.PUBLISHED_COUNTS["train"]
    examples = [records.decode(raw_record(f"train-{i:03d}")) for i in range(23)]
    scores = np.stack([example["scores"] for example in examples]).astype(np.float64)
    np.testing.assert_allclose(list(row["score_mean"].values()), scores.mean(0), atol=1e-6)
    np.testing.assert_allclose(list(row["score_std"].values()), scores.std(0), atol=1e-6)
    empty = np.mean([[not example["heatmaps"][..., i].any() for i in range(2)] for example in examples], axis=0)
    np.testing.assert_allclose(list(row["empty_maps_share"].values()), empty)
    table = builder.report_table(report)
    assert "15810" in table
    assert len([line for line in table.splitlines() if line.startswith(("train", "dev"))]) == 2 * (1 + 4)
    for i, (name, counts) in enumerate(row["score_histogram"].items()):
        expected = np.histogram(scores[:, i], np.linspace(-1 / 24, 25 / 24, 14))[0]
        assert counts == expected.tolist()
        assert f"train {name} {' '.join(map(str, counts))}" in re.sub(r"(train \w+) [\d.]+ [\d.]+", r"\1", _words(table))


def test_constants_are_the_training_means():
    constants = tasks.constants(built())
    examples = [records.decode(raw_record(f"train-{i:03d}")) for i in range(23)]
    np.testing.assert_allclose(constants["scores"], np.mean([e["scores"] for e in examples], axis=0), rtol=1e-5)
    maps = np.mean([e["heatmaps"] for e in examples], axis=0).reshape(64, 8, 64, 8, 2).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(constants["heatmaps"], maps, atol=1e-6)
    assert constants["heatmaps"].dtype == np.float32


def test_vocabulary_is_trained_on_the_train_prompts():
    pieces = vocabulary.Vocabulary(pathlib.Path(built()) / "vocabulary.model")
    assert pieces.size <= 80
    text = prompt_of("train-000")
    assert pieces.decode(pieces.encode(text, 64)) == text


def test_label_mismatch_is_kept_and_counted(tmp_path):
    labels = {"u1": "1 0", "u2": "1 0 0", "u3": "0 0 0"}
    changes = {uid: {"prompt_misalignment_label": given} for uid, given in labels.items()}
    where, _ = _sources(tmp_path, ["u0", "u1", "u2", "u3"], [], **changes)
    prompts = {"u0": prompt_of("u0"), "u1": "a red cat", "u2": "a \n cat", "u3": "a\tb … ½"}
    (tmp_path / "pictures").mkdir()
    for uid in prompts:
        (tmp_path / "pictures" / f"{uid}.png").write_bytes(png(image_of(uid)))
    lines = (json.dumps({"uid": uid, "caption": prompt}) for uid, prompt in prompts.items())
    (tmp_path / "pictures" / "captions.jsonl").write_text("\n".join(lines))
    report = build.build(where, f"folder:{tmp_path}/pictures", tmp_path / "data", vocabulary_size=60)
    assert report["splits"]["train"]["label_mismatches"] == {
        "count": 2,
        "first": ["u1 (2 labels, 3 tokens)", "u2 (misaligned, but no word to mark: '\\n')"],
    }
    written = {uid: labelled for uid, _, labelled in tasks.prompts(tmp_path / "data")["train"]}
    assert (written["u2"], written["u3"]) == ("a cat_0", "a_0 b_0 ..._0 1\u20442_0")
    task = tasks.register(tmp_path / "data", image_size=8, heatmap_size=8)
    examples = list(task.seqio_task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    targets = [tasks.postprocess("", example=one, is_target=True) for one in examples]
    texts = [task.seqio_task.output_features["targets"].vocabulary.decode(one["targets"]) for one in examples]
    ones = {"scores": np.zeros((4, 4)), "heatmaps": np.zeros((4, 8, 8, 2))}
    (evaluate,) = task.seqio_task.metric_fns
    found = evaluate(targets, texts, ones)  # of a decoder that writes its targets
    assert found["keywords/micro/precision"] == found["keywords/micro/recall"] == 1
    example = {example["uid"]: example for example in _load(tmp_path / "data", "train")}[b"u1"]
    assert not example["labels_valid"]
    assert example["labelled_prompt"] == b""
    assert example["labels"].tolist() == [1, 0]
    assert "train: 2 label mismatches, first u1 (2 labels" in builder.report_table(report)


def test_report_table_shows_no_control_characters():
    report = tasks.report(built())
    report["splits"]["dev"]["images_missing"] = {"count": 1, "first": ["u\x1b[2J\nx"]}
    assert r"dev: 1 images missing, first u\x1b[2J\nx" in builder.report_table(report).split("\n")


def test_record_files_may_be_named_one_by_one(tmp_path):
    for folder, split in (("a", "train"), ("a", "test"), ("b", "train")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{split}.tfrecord").write_bytes(b"")
    assert list(builder.record_paths(tmp_path / "a")) == ["train", "test"]
    assert builder.record_paths(tmp_path / "a" / "test.tfrecord") == {"test": tmp_path / "a" / "test.tfrecord"}
    assert list(builder.record_paths(tmp_path / "a" / "t*.tfrecord")) == ["train", "test"]
    with pytest.raises(ValueError, match=r"matches two files of a split"):
        builder.record_paths(tmp_path / "*" / "train.tfrecord")
    (tmp_path / "b" / "old.tfrecord").write_bytes(b"")
    with pytest.raises(ValueError, match=r"old.tfrecord, expected a file called train.tfrecord, .*; rename it"):
        builder.record_paths(tmp_path / "b" / "*")
    with pytest.raises(ValueError, match=r"nothing holds none of train.tfrecord"):
        builder.record_paths(tmp_path / "nothing")


def test_missing_and_broken_images_are_counted(tmp_path, capsys):
    tfds.enable_progress_bar()
    uids = [f"u{i}" for i in range(10)]
    broken = jpg(image_of("u1"))[:300]
    source = _sources(tmp_path, uids, present=uids[:-2], images={"u1": broken})
    with pytest.raises(
        ValueError,
        match=r"images: split 'train': 3 of 10 records have no usable image \(2 no image, first u8, u9; 1 "
        r"broken, first u1; 0 ambiguous\), expected at most a share of 0.01 .*--max_missing_share",
    ):
        build.build(*source, tmp_path / "data")
    printed = capsys.readouterr().err
    assert "Generating train examples" in printed and printed.endswith("\n")  # the error begins a line
    assert not builder.dataset_dir(tmp_path / "data").exists()  # and the same folder can be built after all:
    report = build.build(*source, tmp_path / "data", max_missing_share=0.3, vocabulary_size=60)
    row = report["splits"]["train"]
    assert row["examples"] == 7
    assert row["images_missing"] == {"count": 2, "first": ["u8", "u9"]}
    assert row["images_undecodable"] == {"count": 1, "first": ["u1"], "reasons": {"truncated": 1}}
    assert "u8, u9" in builder.report_table(report)
    assert "train: 1 images undecodable, first u1; 1 truncated" in builder.report_table(report)


def test_ambiguous_uids_are_left_out_and_counted(tmp_path):
    records_folder, spec = _sources(tmp_path, ["u0", "u1", "u2"])
    write_parquet(tmp_path / "images" / "1.parquet", [("u1", "x")], {"u1": jpg(image_of("another"))})
    records.write(tmp_path / "records" / "dev.tfrecord", [raw_record("absent"), raw_record("u0")])  # so that all is read
    report = build.build(records_folder, spec, tmp_path / "data", max_missing_share=0.5, vocabulary_size=60)
    ambiguous = {"count": 1, "first": ["u1"], "reasons": {"two pictures": 1}}
    assert report["splits"]["train"]["images_ambiguous"] == ambiguous
    assert sorted(example["uid"] for example in _load(tmp_path / "data", "train")) == [b"u0", b"u2"]
    for split in ("train", "dev"):
        assert report["splits"][split]["uids_in_other_splits"] == {"count": 1, "first": ["u0"]}
        assert f"{split}: 1 uids in other splits, first u0" in builder.report_table(report)


def test_odd_images_are_normalised_and_counted(tmp_path):
    alpha = np.dstack([image_of("u1"), np.full(image_of("u1").shape[:2], 255, np.uint8)])
    source = _sources(tmp_path, ["u0", "u1"], images={"u1": png(alpha)})
    report = build.build(*source, tmp_path / "data", vocabulary_size=60)
    assert report["splits"]["train"]["images_normalised"] == {"count": 1, "first": ["u1"], "reasons": {"alpha": 1}}
    example = {example["uid"]: example for example in _load(tmp_path / "data", "train")}[b"u1"]
    decoded = records.tf.io.decode_image(example["image"], channels=3)
    np.testing.assert_array_equal(decoded[..., ::-1], image_of("u1"))


def test_a_mirror_trains_and_evaluates(tmp_path):
    uids = {"train": [f"t{i}" for i in range(12)], "dev": [f"d{i}" for i in range(4)], "test": [f"e{i}" for i in range(4)]}
    columns = {"uid": "filename", "prompt": "prompt", "image": "image"}
    for split, names in uids.items():
        records.write(tmp_path / "records" / f"{split}.tfrecord", map(raw_record, names))
        write_table(tmp_path / "mirror" / f"{split}-00000-of-00001.parquet", names, columns, records=True)
    data_dir = tmp_path / "data"
    report = build.build(tmp_path / "records", f"table:{tmp_path}/mirror/*.parquet", data_dir, vocabulary_size=60)
    assert {split: row["examples"] for split, row in report["splits"].items()} == {"train": 12, "dev": 4, "test": 4}
    config = ["--config=configs/rahf_ci.py", f"--config.data.data_dir={data_dir}", "--config.train.num_steps=1"]
    for module, arguments in (
        ("train", [*config, "--config.eval.every=1"]),
        ("evaluate", ["--split=test"]),
    ):
        command = [sys.executable, "-m", f"rahf.{module}", f"--workdir={tmp_path / 'run'}", *arguments]
        one_device = os.environ | {"XLA_FLAGS": quick_xla.FLAGS}
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=one_device)
        assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run" / "eval" / "test.json").read_text())
    assert results["num_examples"] == 4 and np.isfinite(results["heatmap/mse/implausibility"])


def test_no_image_at_all_is_refused(tmp_path):
    source = _sources(tmp_path, ["u0", "u1"], images={"u0": b"", "u1": b"x"})
    with pytest.raises(ValueError, match=r"2 of 2 records have no usable image.*at least one example"):
        build.build(*source, tmp_path / "data", max_missing_share=1.0)


def test_bad_record_is_named_with_its_file(tmp_path):
    source = _sources(tmp_path, ["u0", "u1"])
    with records.tf.io.TFRecordWriter(str(tmp_path / "records" / "train.tfrecord")) as writer:
        for raw in (raw_record("u0"), raw_record("u1", overall_score=7.0)):
            writer.write(records.serialize(raw))
    with pytest.raises(ValueError, match=r"train.tfrecord record 1 \(uid 'u1'\): overall_score: got 7, expected"):
        build.build(*source, tmp_path / "data")


def test_dead_reader_of_the_records_is_named():
    with pytest.raises(ValueError, match=r"records: the process that reads them died, .*--workers=0"):
        build._apart(os._exit, 1)


def test_faulty_record_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of train.tfrecord, dev.tfrecord.*see --records"):
        build.build(tmp_path, "folder:x", tmp_path / "data")
    source = _sources(tmp_path, [])
    with pytest.raises(ValueError, match=r"got no record for split 'train'"):
        build.build(*source, tmp_path / "data")
    source = _sources(tmp_path, ["u0", "u1", "u0"])
    with pytest.raises(ValueError, match=r"uid 'u0' is in record 0 and in 2, expected it once; remove one"):
        build.build(*source, tmp_path / "data")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "dev.tfrecord is a folder"),
        (lambda path: path.symlink_to("/nowhere/dev.tfrecord"), "no file .*dev.tfrecord, a link to nothing"),
        (os.mkfifo, "dev.tfrecord is a named pipe"),
    ],
)
def test_what_is_there_but_no_file_is_named_and_not_left_out(tmp_path, make, message):
    """Also when the other split is whole; to read a named pipe would wait for ever."""
    records.write(tmp_path / "train.tfrecord", [raw_record("u")])
    make(tmp_path / "dev.tfrecord")
    for where in (tmp_path, tmp_path / "*.tfrecord"):
        with pytest.raises(UserError, match=f"records: .*{message}; expected a RichHF TFRecord file"):
            builder.record_paths(where)
    lines = tmp_path / "lines.jsonl"
    (tmp_path / "dev.tfrecord").rename(lines)
    message = message.replace("dev.tfrecord", "lines.jsonl")
    with pytest.raises(UserError, match=f"annotations: .*{message}; expected a JSONL file"):
        consolidate.read(str(lines))


def test_building_again_does_nothing(tmp_path, capsys):
    source = _sources(tmp_path, ["u0", "u1"])
    first = build.build(*source, tmp_path / "data", vocabulary_size=60)
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    assert build.build(*source, tmp_path / "data", vocabulary_size=60) == first
    assert "already built" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == times


def test_other_records_are_not_taken_for_built(tmp_path):
    source = _sources(tmp_path, ["u0", "u1"])
    build.build(*source, tmp_path / "data", vocabulary_size=60)
    source = _sources(tmp_path, ["u0", "u2"])
    with pytest.raises(ValueError, match=r"was built from other records than those of .* use another --data_dir"):
        build.build(*source, tmp_path / "data")


def test_given_vocabulary_is_copied_and_never_replaced(tmp_path):
    source = _sources(tmp_path, ["u0", "u1"])
    given = pathlib.Path(built()) / "vocabulary.model"
    build.build(*source, tmp_path / "data", vocabulary_path=given)
    assert (tmp_path / "data" / "vocabulary.model").read_bytes() == given.read_bytes()
    vocabulary.train(["another text"], tmp_path / "other.model", 40)
    with pytest.raises(ValueError, match=r"vocabulary.model is there and differs from .*other.model"):
        build.build(*source, tmp_path / "data", vocabulary_path=tmp_path / "other.model")


def test_references_travel_with_the_dataset(tmp_path):
    source = _sources(tmp_path, ["u0", "u1"])
    assert tasks.references(built()) == {}
    references = {"test": {"ceiling": {"score/plcc/overall": 0.9}}}
    (tmp_path / "records" / "references.json").write_text(json.dumps({"test": {"ceiling": {"score/plcc/overall": "x"}}}))
    with pytest.raises(ValueError, match=r"references.json: test.ceiling.score/plcc/overall: got 'x', expected a"):
        build.build(*source, tmp_path / "data")
    (tmp_path / "records" / "references.json").write_text(json.dumps(references))
    build.build(*source, tmp_path / "data", vocabulary_size=60)
    assert tasks.references(tmp_path / "data") == references


def test_a_killed_build_leaves_nothing_that_looks_done(tmp_path, capsys):
    source = _sources(tmp_path, [f"u{i}" for i in range(4)])
    code = f"""
import os
from richhf_data import build, scan
read = scan.Found.read
def killed(*args):
    for i, found in enumerate(read(*args)):
        if i == 2:
            os.kill(os.getpid(), 9)
        yield found
scan.Found.read = killed
build.build({str(source[0])!r}, {source[1]!r}, {str(tmp_path / "data")!r})
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert result.returncode == -9
    assert not builder.dataset_dir(tmp_path / "data").exists()
    with pytest.raises(ValueError, match=r"no dataset in .*python -m richhf_data.build"):
        tasks.register(tmp_path / "data")
    assert build.build(*source, tmp_path / "data", vocabulary_size=60)["splits"]["train"]["examples"] == 4
    printed = capsys.readouterr().out
    assert "left by an interrupted build" in printed and "1 of 1 shards were read before" in printed
    assert not (tmp_path / "data" / "parts").exists()
    assert build.build(*source, tmp_path / "whole", vocabulary_size=60, keep_parts=True) == tasks.report(tmp_path / "data")
    assert list((tmp_path / "whole" / "parts").glob("*/0-*.parquet"))
    for resumed, whole in zip(_load(tmp_path / "data", "train"), _load(tmp_path / "whole", "train"), strict=True):
        assert resumed.keys() == whole.keys()
        for key in whole:
            np.testing.assert_array_equal(resumed[key], whole[key])


@pytest.mark.parametrize(
    ("source", "flag", "expected"),
    [
        ("captions:x", "--keep_parts", "record files"),
        ("rapidata:x", "--beam=", "record files"),
        ("captions:tfds:x", "--parts=x", "record files"),
        ("rapidata:x", "--allow_absent", "record files"),
        ("x", "--holdout=0.05", "rapidata:GLOB and captions:GLOB and captions:tfds:NAME"),  # the default, but given
        ("x", "--word_threshold=0.4", "rapidata:GLOB"),
        ("rapidata:x", "--caption_prompt=a", "captions:GLOB and captions:tfds:NAME"),
        ("captions:x", "--tfds_data_dir=x", "captions:tfds:NAME"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(tmp_path, source, flag, expected):
    name = flag.partition("=")[0][2:]
    with flagsaver.flagsaver():
        flags.FLAGS(["build", f"--records={source}", f"--data_dir={tmp_path}", flag])
        with pytest.raises(ValueError, match=rf"^{name}: got it with --records={source}, .* with {expected} alone"):
            build.main()


def test_unknown_kinds_of_records_are_refused(tmp_path):
    expected = r"expected record files \(.*\), rapidata:GLOB, captions:GLOB, captions:tfds:NAME"
    with pytest.raises(ValueError, match=rf"records: got 'pickapic:x/\*.parquet', {expected}"):
        build.build("pickapic:x/*.parquet", "", tmp_path / "data")
    (tmp_path / "a:b").mkdir()
    with pytest.raises(ValueError, match=r"records: .*a:b holds none of train.tfrecord"):
        build.build(f"{tmp_path}/a:b", "folder:x", tmp_path / "data")


def test_command_line(tmp_path):
    source, images = write_sources(tmp_path, {"train": 3})
    command = [sys.executable, "-m", "richhf_data.build", f"--records={source}", f"--images={images}"]
    command += [f"--data_dir={tmp_path / 'data'}", "--vocabulary_size=60"]
    result = subprocess.run([*command, "--workers=1"], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert "train 3 15810 0 0 0 0 0" in _words(result.stdout)
    assert "INFO" not in result.stderr
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["richhf", "vocabulary.model"]
    result = subprocess.run(
        [*command, "--workers=0", "--vocabulary=nothing"], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert result.returncode == 2
    assert "error: vocabulary: no file nothing" in result.stderr
    assert "Traceback" not in result.stderr
