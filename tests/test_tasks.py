"""tasks.py: registration, what the metrics are given, and the files beside the dataset."""

import json
import logging
import pathlib
import shutil
import sys

import numpy as np
import pytest
import seqio
from tiny_data import built, prompt_of, raw_record, record_header

from rahf import experiments, features, sources
from richhf_data import builder, keywords, records, schema, tasks, vocabulary
from richhf_data.errors import UserError
from richhf_data.tensorflow_cpu import tf

SMALL = {"image_size": 32, "heatmap_size": 16, "text_length": 60, "keyword_length": 40}


def test_register_is_idempotent():
    task = tasks.register(built(), **SMALL)
    assert tasks.register(built(), **SMALL) == task
    assert tasks.register(built(), **SMALL, augment=True) != task
    assert task.seqio_task is seqio.TaskRegistry.get(task.name)
    assert {key: getattr(task, key) for key in SMALL} == SMALL
    assert task.variant == "multi_head" and task.data_dir == built()
    assert set(task.seqio_task.splits) == {"train", "dev"}


def test_register_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir: no dataset in .*python -m richhf_data.build"):
        tasks.register(tmp_path)
    with pytest.raises(ValueError, match=r"variant: got 'both', expected one of"):
        tasks.register(built(), variant="both")
    with pytest.raises(ValueError, match=r"vocabulary: no file .*nothing.model"):
        tasks.register(built(), vocabulary_path=tmp_path / "nothing.model")


@pytest.mark.parametrize(("key", "variant"), [("text_length", "augmented_prompt"), ("keyword_length", "multi_head")])
def test_long_texts_are_refused_before_training(key, variant, caplog):
    pieces = vocabulary.Vocabulary(pathlib.Path(built()) / "vocabulary.model")
    needed = {}
    for rows in tasks.prompts(built()).values():
        for uid, prompt, labelled in rows:
            texts = schema.task_prompts(prompt, variant) if key == "text_length" else [labelled]
            needed[uid] = max(map(pieces.num_ids, texts))
    longest = max(needed.values())
    limit = longest - 1
    count = sum(n > limit for n in needed.values())
    pattern = (
        rf"{key}: got {limit}, but {count} texts of .* take more ids, the longest {longest} .*expected {key} >= {longest}"
    )
    with pytest.raises(ValueError, match=pattern):
        tasks.register(built(), **SMALL | {key: limit}, variant=variant)
    tasks.register(built(), **SMALL | {key: longest}, variant=variant)
    with caplog.at_level(logging.WARNING):
        tasks.register(built(), **SMALL | {key: limit}, variant=variant, truncate_long_prompts=True)
    assert f"{key}: got {limit}, but {count} texts" in caplog.text


def test_a_vocabulary_that_does_not_know_the_texts_is_reported(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"16 pieces cannot be trained on these prompts .*; allow more"):
        vocabulary.train(["b b b"], tmp_path / "other.model", 16)
    vocabulary.train(["b b b"], tmp_path / "other.model", 60)
    with caplog.at_level(logging.WARNING, logger="absl"):
        tasks.register(built(), vocabulary_path=tmp_path / "other.model", text_length=200, keyword_length=200)
    assert "32 examples, the first" in caplog.text and "other.model does not know" in caplog.text


def test_prompts_are_the_datasets():
    stored = {uid: (prompt, labelled) for uid, prompt, labelled in tasks.prompts(built())["dev"]}
    assert sorted(stored) == [f"dev-{i:03d}" for i in range(9)]
    labels = records.decode(raw_record("dev-004"))["labels"]
    assert stored["dev-004"][0] == prompt_of("dev-004")
    assert stored["dev-004"][1] == keywords.label_prompt(keywords.tokenize(prompt_of("dev-004")), labels)


def _example(**changes):
    example = {
        "scores": np.arange(4, dtype=np.float32) / 4,
        "score_mask": np.ones(4, bool),
        "heatmaps": np.zeros((2, 2, 2), np.uint8),
        "heatmap_mask": np.ones(2, bool),
        "prompt": "a café".encode(),
        "uid": b"u0",
        "labels": np.asarray([1, 0], np.int32),
        "labels_valid": np.bool_(True),
        "labelled_prompt": "a café_0".encode(),
    }
    return example | changes


def test_postprocess_gives_the_truth():
    truth = tasks.postprocess("", example=_example(), is_target=True)
    assert truth["prompt"] == "a café"
    assert truth["labels"] == [1, 0]
    assert truth["uid"] == "u0"
    np.testing.assert_array_equal(truth["scores"], [0, 0.25, 0.5, 0.75])
    assert truth["heatmaps"].dtype == np.uint8
    assert truth["caption"] is None
    unlabelled = tasks.postprocess("", example=_example(labels_valid=np.bool_(False)), is_target=True)
    assert unlabelled["labels"] is None
    assert unlabelled["caption"] == "a café_0"  # a text to write that is no labelled prompt
    mismatch = tasks.postprocess("", example=_example(labels_valid=np.bool_(False), labelled_prompt=b""), is_target=True)
    assert mismatch["labels"] is None and mismatch["caption"] is None
    assert tasks.postprocess("a café_0", example=_example(), is_target=False) == "a café_0"


def test_evaluate_gives_every_key():
    targets = [tasks.postprocess("", example=_example(scores=np.full(4, i / 5, np.float32)), is_target=True) for i in (1, 2)]
    aux = {"scores": np.stack([t["scores"] for t in targets]), "heatmaps": np.zeros((2, 2, 2, 2), np.float32)}
    result = tasks.evaluate(targets, ["a café_0", "a café"], aux)
    assert set(result) == {
        *(f"score/{m}/{name}" for m in ("plcc", "srcc") for name in schema.SCORES),
        *(
            f"heatmap/{m}/{name}"
            for m in ("mse", "mse_empty", "cc", "kld", "sim", "nss", "auc_judd")
            for name in schema.HEATMAPS
        ),
        *(f"keywords/{a}/{m}" for a in ("micro", "per_prompt") for m in ("precision", "recall", "f1")),
        "num_examples",
    }
    assert result["score/plcc/overall"] == pytest.approx(1)
    assert result["keywords/micro/recall"] == 0.5
    assert result["num_examples"] == 2


def test_decoded_examples_equal_their_records():
    examples, count = tasks.decoded(built(), "dev", 3)
    examples = list(examples)
    assert count == len(examples) == 3
    for example in examples:
        truth = records.decode(raw_record(example["uid"]))
        assert example["prompt"] == prompt_of(example["uid"])
        assert example["image"].shape == (40, 48, 3)
        assert example["labels"] == truth["labels"].tolist()
        np.testing.assert_array_equal(example["scores"], truth["scores"])
        np.testing.assert_array_equal(example["heatmaps"], truth["heatmaps"])
    assert tasks.decoded(built(), "dev")[1] == 9
    with pytest.raises(ValueError, match="split: got 'test', expected one of the dataset's"):
        tasks.decoded(built(), "test")


# ---- Datasets of other people, and damaged ones -----------------------------------------------------------------------
def _train(folder):
    config = experiments.load("rahf_ci")
    config.data.data_dir = str(folder)
    sources.check_splits(config)
    return sources.identity(config)


DOORS = {
    "train": _train,
    "browse and predict": lambda folder: list(tasks.decoded(folder, "dev")[0]),
    "train and evaluate": lambda folder: tasks.register(folder, **SMALL),
    "prompts": tasks.prompts,
}


@pytest.fixture
def copied(tmp_path):
    """A copy of the built dataset: (its data_dir, the folder of its files)."""
    shutil.copytree(built(), tmp_path / "data")
    return tmp_path / "data", builder.dataset_dir(tmp_path / "data")


@pytest.mark.parametrize(
    "hostile",
    [
        lambda text: text.replace("tensorflow_datasets.core.features.text_feature.Text", "evil_features.X", 1),
        lambda text: text.replace("tensorflow_datasets.core.features.features_dict.FeaturesDict", "evil_features.X"),
        lambda text: json.dumps({"type": "evil_features.X", "content": {}}),
        lambda text: text.replace('"int32"', '"int64"'),
        lambda text: "{}",
    ],
)
def test_a_dataset_runs_no_code(copied, tmp_path, monkeypatch, hostile):
    """TFDS would import what features.json names."""
    data_dir, folder = copied
    (tmp_path / "evil_features.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = folder / "features.json"
    path.write_text(hostile(path.read_text()))
    for door in DOORS.values():
        with pytest.raises(UserError, match=r"features.json: "):
            door(data_dir)
    assert not (tmp_path / "marker").exists() and "evil_features" not in sys.modules


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"fileFormat": "tfrecord"', '"fileFormat": "array_record"', "fileFormat: got 'array_record', expected 'tfrecord'"),
        ('"name": "richhf"', '"name": "other"', "name: got 'other', expected 'richhf'"),
        ('"2.0.0"\n}', '"9.9.9"\n}', "version: got '9.9.9', expected '2.0.0'"),
        ("{DATASET}-{SPLIT}", "../{DATASET}-{SPLIT}", "got a split 'train' in .*, expected some of"),
        ('"name": "dev"', '"name": "other"', "got a split 'other' in .*, expected some of"),
        ('"9"', '"x"', "invalid literal for int.*, expected what a build writes"),
        ('"9"', "{}", "expected what a build writes"),
        ('"9"', '"0"', r"of \[0\] examples, expected some of"),
    ],
)
def test_infos_of_another_dataset_are_refused(copied, old, new, message):
    path = copied[1] / "dataset_info.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    for door in DOORS.values():
        with pytest.raises(UserError, match=rf"dataset_info.json: .*{message}.*build it again"):
            door(copied[0])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("report.json", "{}", "report.json: "),
        ("report.json", '{"records": {}, "splits": {"dev": {}}}', "report.json: "),
        ("report.json", '{"records": {}, "splits": [1]}', "report.json: "),
        ("prompts.json", '{"dev": {}}', "prompts.json: "),
        ("prompts.json", '{"dev": [["u", "a cat"]]}', "prompts.json: "),
        ("prompts.json", '{"dev": [["u", "a cat", null]]}', "prompts.json: "),
        ("prompts.json", '{"dev": [["u", "\\ud800", ""]]}', "prompts.json: "),
        ("references.json", '{"dev": {"row": {"metric": "x"}}}', "references.json: "),
        ("references.json", '{"dev": 3}', "references.json: "),
        ("constants.npz", "not a zip", "constants.npz: "),
        ("constants.npz", {"scores": np.zeros(4, np.float32), "heatmaps": np.zeros((64, 64), np.float32)}, "heatmaps: "),
        ("digests.json", '{"dev": 5}', "digests.json: dev: got 5"),
        ("digests.json", '{"train": {}}', r"got other bytes than the build wrote \(digests.json\)"),
        ("constants.npz", {"scores": np.full(4, 2, np.float32), "heatmaps": np.zeros((64, 64, 2), np.float32)}, "scores: "),
        ("constants.npz", {"scores": np.zeros(4), "heatmaps": np.zeros((64, 64, 2), np.float32)}, "scores: float64"),
    ],
)
def test_damaged_files_beside_the_examples_are_named(copied, name, text, message):
    np.savez(copied[1] / name, **text) if isinstance(text, dict) else (copied[1] / name).write_text(text)
    reader = {"report": tasks.report, "prompts": tasks.prompts, "references": tasks.references, "constants": tasks.constants}
    reader["digests"] = lambda data_dir: builder.open_built(data_dir).verify("dev")
    with pytest.raises(UserError, match=message):
        reader[name.partition(".")[0]](copied[0])


def test_the_module_that_infos_name_is_not_imported(copied, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = copied[1] / "dataset_info.json"
    path.write_text(path.read_text().replace("richhf_data.builder", "evil_module"))
    for door in DOORS.values():
        door(copied[0])
    assert not (tmp_path / "marker").exists() and "evil_module" not in sys.modules


def _flipped(content: bytes) -> bytes:
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


READERS = {
    "decoded": lambda folder: list(tasks.decoded(folder, "dev")[0]),
    "evaluator": lambda folder: features.evaluator(tasks.register(folder, **SMALL), "dev"),
    "batches": lambda folder: next(features.training_batches(tasks.register(folder, **SMALL), 9, 0, split="dev")),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "no file .*{name}, expected 9 examples"),
        (lambda content: content[:-100], "{name} record 8 .*truncated or corrupt"),
        (lambda content: b"", "{name}: got 0 examples, expected 9"),
        (lambda content: record_header(1 << 45) + content[12:], "{name} record 0 .*it would end at byte 35184372088848 of"),
        (_flipped, "{place}: got (other bytes than the build wrote|a damaged example)"),
    ],
)
def test_damaged_shards_are_named(copied, reader, digests, damage, message):
    data_dir, folder = copied
    (path,) = folder.glob("richhf-dev.tfrecord*")
    if not digests:  # as in a dataset of an earlier version
        (folder / "digests.json").unlink()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    place = f"({folder}|{path})"
    with pytest.raises(UserError, match=message.format(name=path.name, place=place)):
        READERS[reader](data_dir)


@pytest.fixture
def rewritten(copied):
    """change -> the data_dir, whose dev split has examples that `change` changed, with right checksums."""

    def rewrite(change):
        (path,) = copied[1].glob("richhf-dev.tfrecord*")
        examples = [tf.train.Example.FromString(bytes(one.numpy())) for one in tf.data.TFRecordDataset(str(path))]
        change(examples[-1].features.feature)
        with tf.io.TFRecordWriter(str(path)) as writer:
            for example in examples:
                writer.write(example.SerializeToString(deterministic=True))
        return copied[0]

    return rewrite


def _other_image(feature):
    value = feature["image"].bytes_list.value
    value[0] = value[0][:-3] + b"\0" + value[0][-2:]


@pytest.mark.parametrize("reader", ["evaluator", "batches"])
def test_shards_of_another_build_are_not_read(rewritten, reader):
    with pytest.raises(UserError, match=r"richhf-dev.*: got other bytes than the build wrote \(digests.json\)"):
        READERS[reader](rewritten(_other_image))


@pytest.mark.parametrize(
    ("reader", "key", "value"),
    [
        ("decoded", "image", b"no image"),
        ("decoded", "scores", None),
        ("decoded", "prompt", b"\xff cat"),
        ("evaluator", "heatmaps", b"no map"),
        ("batches", "image", None),
    ],
)
def test_damaged_examples_are_named_with_their_folder(rewritten, reader, key, value):
    """In a dataset without digests, which an earlier version built."""

    def change(feature):
        if value is None:
            del feature[key]
        else:
            feature[key].bytes_list.value[0] = value

    data_dir = rewritten(change)
    (builder.dataset_dir(data_dir) / "digests.json").unlink()
    with pytest.raises(UserError, match=rf"data_dir: {data_dir}.*: got a damaged example"):
        READERS[reader](data_dir)
