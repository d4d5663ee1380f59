"""features.py: batches as schema.py says, resumable and shardable, and the whole way through seqio's Evaluator."""

import functools
import itertools
import pathlib
import subprocess
import sys
import tempfile

import cv2
import numpy as np
import pytest
import seqio
import tiny_model
from tiny_data import built, image_of, png, prompt_of, raw_record, write_parquet, write_sources

from rahf import features
from richhf_data import build, records, schema, tasks, vocabulary
from richhf_data.tensorflow_cpu import tf

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {"image_size": 32, "heatmap_size": 16, "text_length": 60, "keyword_length": 40}
KEYS = {"image", "text_ids", "keyword_ids", "scores", "score_mask", "heatmaps", "heatmap_mask"}


def _take(iterator, count):
    return list(itertools.islice(iterator, count))


def _assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def _uids(batches):
    """Which training examples the rows are, told by their scores."""
    known = {records.decode(raw_record(uid))["scores"].tobytes(): uid for uid in (f"train-{i:03d}" for i in range(23))}
    return [known[row.tobytes()] for batch in batches for row in batch["scores"]]


@pytest.mark.parametrize("variant", tiny_model.VARIANTS)
def test_batches_are_as_the_schema_says(variant):
    task = tasks.register(built(), **SMALL, variant=variant, augment=True)
    batch = next(features.training_batches(task, 5, seed=0))
    texts = 1 if variant == "multi_head" else 7
    expected = {
        "image": (np.uint8, (5, 32, 32, 3)),
        "text_ids": (np.int32, (5, texts, 60)),
        "keyword_ids": (np.int32, (5, 40)),
        "scores": (np.float32, (5, 4)),
        "score_mask": (np.bool_, (5, 4)),
        "heatmaps": (np.uint8, (5, 16, 16, 2)),
        "heatmap_mask": (np.bool_, (5, 2)),
    }
    assert {key: (value.dtype.type, value.shape) for key, value in batch.items()} == expected
    assert batch["score_mask"].all()
    assert batch["heatmap_mask"].all()


@pytest.mark.parametrize("variant", tiny_model.VARIANTS)
def test_batches_hold_the_records_values(variant):
    task = tasks.register(built(), **SMALL, variant=variant)
    pieces = vocabulary.Vocabulary(task.vocabulary)
    batch = next(features.training_batches(task, 23, seed=3))
    for row, uid in enumerate(_uids([batch])):
        truth = records.decode(raw_record(uid))
        small = truth["heatmaps"].reshape(16, 32, 16, 32, 2).mean(axis=(1, 3))
        np.testing.assert_allclose(batch["heatmaps"][row], small, atol=0.51)
        image = cv2.resize(image_of(uid)[..., ::-1], (32, 32), interpolation=cv2.INTER_AREA)
        assert np.abs(batch["image"][row].astype(int) - image).mean() < 12
        texts = [pieces.encode(text, 60) for text in schema.task_prompts(prompt_of(uid), variant)]
        np.testing.assert_array_equal(batch["text_ids"][row], texts)
        labelled = dict((u, text) for u, _, text in tasks.prompts(built())["train"])[uid]
        np.testing.assert_array_equal(batch["keyword_ids"][row], pieces.encode(labelled, 40))


def test_epochs_hold_every_example_once_in_changing_order():
    task = tasks.register(built(), **SMALL, augment=True)
    uids = _uids(_take(features.training_batches(task, 7, seed=0), 10))  # three epochs of 23 and one row
    epochs = [uids[i : i + 23] for i in (0, 23, 46)]
    for epoch in epochs:
        assert sorted(epoch) == [f"train-{i:03d}" for i in range(23)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert _uids(_take(features.training_batches(task, 7, seed=1), 3)) != uids[:21]


def test_augmentation_changes_from_epoch_to_epoch():
    task = tasks.register(built(), **SMALL, augment=True)
    first, second = _take(features.training_batches(task, 23, seed=0), 2)
    images = [dict(zip(_uids([batch]), batch["image"], strict=True)) for batch in (first, second)]
    changed = [uid for uid in images[0] if (images[0][uid] != images[1][uid]).any()]
    assert len(changed) > 8  # half of the 23 are cropped in each of the two
    plain = tasks.register(built(), **SMALL)
    first, second = _take(features.training_batches(plain, 23, seed=0), 2)
    images = [dict(zip(_uids([batch]), batch["image"], strict=True)) for batch in (first, second)]
    assert all((images[0][uid] == images[1][uid]).all() for uid in images[0])


@pytest.mark.parametrize("start", [1, 5, 6])
def test_resumed_batches_equal_the_uninterrupted(start):
    task = tasks.register(built(), **SMALL, augment=True)
    whole = _take(features.training_batches(task, 6, seed=5), 9)
    _assert_equal(_take(features.training_batches(task, 6, seed=5, start_step=start), 9 - start), whole[start:])


def test_resuming_far_away_reads_nothing_before():
    task = tasks.register(built(), **SMALL, augment=True)
    far = next(features.training_batches(task, 6, seed=5, start_step=10**9))
    assert len(set(_uids([far]))) == 6


def test_a_program_ends_while_batches_are_being_made():
    """A pipeline that called back into Python hung here in 1 of 10 runs, so one pass is weak evidence."""
    code = f"""
from rahf import features
from richhf_data import tasks
batches = features.training_batches(tasks.register({built()!r}, image_size=32, heatmap_size=16, augment=True), 4, 0)
print(len(next(batches)))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "7"), result.stderr
    assert "oneDNN" not in result.stderr  # and TensorFlow's start-up notes are kept out


def test_any_number_of_hosts_reads_the_same_global_batches():
    """Over two ends of epochs, the 23 examples not being a multiple of 8; and resumed by other hosts than began."""
    task = tasks.register(built(), **SMALL, augment=True)

    def joined(start, count, hosts):
        shards = [
            _take(features.training_batches(task, 8, 2, start, rows=rows), count) for rows in np.split(np.arange(8), hosts)
        ]
        assert all(len(batch["image"]) == 8 // hosts for shard in shards for batch in shard)
        steps = list(zip(*shards, strict=True))
        return [{key: np.concatenate([batch[key] for batch in step]) for key in KEYS} for step in steps]

    whole = _take(features.training_batches(task, 8, 2), 6)
    uids = _uids(whole)
    assert sorted(uids[:23]) == sorted(uids[23:46]) == [f"train-{i:03d}" for i in range(23)]
    _assert_equal(joined(0, 4, hosts=2) + joined(4, 2, hosts=4), whole)


def test_marker_stays_under_its_heat_in_training_batches(tmp_path):
    """A disk planted in the JPEG, and its heat in the PNG maps, through all that training does to them."""
    count, side, batches = 12, 512, 8
    uids = [f"train-{i:03d}" for i in range(count)]
    rng = np.random.default_rng(0)
    rows, images = [], {}
    for uid in uids:
        x, y = (int(place) for place in rng.integers(150, side - 150, 2))  # in every crop, whole
        planted = [cv2.circle(np.zeros((side, side), np.uint8), (x, y), size, 255, -1) for size in (24, 24, 12)]
        images[uid] = cv2.imencode(".jpg", cv2.cvtColor(planted[0], cv2.COLOR_GRAY2BGR))[1].tobytes()
        rows.append(raw_record(uid, artifact_map=png(planted[1]), misalignment_map=png(planted[2])))
    records.write(tmp_path / "records" / "train.tfrecord", rows)
    write_parquet(tmp_path / "images" / "a.parquet", [(uid, f"unused-{uid}") for uid in uids], images)
    build.build(tmp_path / "records", f"parquet:{tmp_path}/images/*.parquet", tmp_path / "data", vocabulary_size=80)
    task = tasks.register(tmp_path / "data", image_size=224, heatmap_size=56, augment=True)
    places = []
    for batch in _take(features.training_batches(task, count, seed=0), batches):
        image = batch["image"].astype(float).mean(-1)
        assert batch["image"].max() > 190  # the disk, whatever its colours
        marks = [np.where(image > 90, image, 0), batch["heatmaps"][..., 0], batch["heatmaps"][..., 1]]
        image_place, *map_places = (_centres(mark) for mark in marks)  # shares of the picture
        for map_place in map_places:
            np.testing.assert_allclose(map_place, image_place, atol=0.004)  # a pixel of 224; crops move it by up to 0.2
        places.append(dict(zip(_uids([batch]), image_place, strict=True)))
    moved = [np.ptp([place[uid] for place in places], axis=0).max() for uid in places[0]]
    assert np.mean(moved) > 0.05


def _centres(marks):
    """[n, h, w] -> [n, 2]: each one's centre of mass, as shares of its sides."""
    side = (np.arange(marks.shape[1]) + 0.5) / marks.shape[1]
    mass = marks.sum(axis=(1, 2), dtype=float)
    return np.stack([marks.sum(axis=2) @ side / mass, marks.sum(axis=1) @ side / mass], axis=-1)


def test_training_batches_refuses_what_it_cannot_do():
    task = tasks.register(built(), **SMALL)
    with pytest.raises(ValueError, match=r"rows: got \[2, 4\] of a batch of 4, expected some of 0 to 3"):
        features.training_batches(task, 4, 0, rows=[2, 4])
    with pytest.raises(ValueError, match=r"split: got 'test', expected one of the dataset's: (train, dev|dev, train)"):
        features.training_batches(task, 4, 0, split="test")


def test_ordinary_seqio_reading_augments_too():
    task = tasks.register(built(), **SMALL, augment=True)

    def images(seed):
        dataset = task.seqio_task.get_dataset(split="train", shuffle=False, seed=seed, sequence_length=None)
        return np.stack([example["image"] for example in dataset.as_numpy_iterator()])

    assert (images(0) == images(0)).all()
    assert (images(0) != images(1)).any()


def _perfect(dataset, model_feature_shapes=None):
    """What a model that knows the truth would predict, in another order than asked."""
    indices, scores, heatmaps = [], [], []
    for index, example in dataset.as_numpy_iterator():
        indices.append((index, example["keyword_ids"]))
        scores.append(example["scores"])
        heatmaps.append(example["heatmaps"] / np.float32(255))
    order = np.random.default_rng(0).permutation(len(indices))
    return [indices[i] for i in order], {
        "scores": [scores[i] for i in order],
        "heatmaps": [heatmaps[i] for i in order],
    }


@pytest.mark.parametrize("variant", tiny_model.VARIANTS)
def test_evaluator_gives_a_perfect_model_full_marks(variant):
    task = tasks.register(built(), **SMALL, variant=variant)
    evaluator = features.evaluator(task, "dev")
    index, example = next(iter(evaluator.cached_model_datasets[task.name].as_numpy_iterator()))
    assert index == 0
    assert set(example) == KEYS
    future, _ = evaluator.evaluate(compute_metrics=True, predict_with_aux_fn=_perfect)
    result = future.result()[task.name]
    assert result["num_examples"] == 9
    ones = [f"score/{m}/{s}" for m in ("plcc", "srcc") for s in schema.SCORES]
    ones += [f"heatmap/{m}/{h}" for m in ("cc", "sim") for h in schema.HEATMAPS]
    ones += [f"keywords/micro/{m}" for m in ("precision", "recall", "f1")]
    for key in ones:
        assert result[key] == pytest.approx(1, abs=1e-4), key
    for heatmap in schema.HEATMAPS:
        assert result[f"heatmap/mse/{heatmap}"] < 1e-9
        assert result[f"heatmap/auc_judd/{heatmap}"] > 0.99


def test_evaluator_works_called_as_seqio_documents():
    task = tasks.register(built(), **SMALL)
    evaluator = seqio.Evaluator(
        mixture_or_task_name=task.name,
        feature_converter=features.RAHFFeatureConverter(),
        eval_split="dev",
        use_cached=False,
        seed=0,
        sequence_length=None,
        num_examples=4,
    )
    future, _ = evaluator.evaluate(compute_metrics=True, predict_with_aux_fn=_perfect)
    assert future.result()[task.name]["num_examples"] == 4


def test_targets_are_in_the_evaluators_order():
    task = tasks.register(built(), **SMALL)
    evaluator = features.evaluator(task, "dev")
    truths = features.targets(evaluator, task)
    assert sorted(truth["uid"] for truth in truths) == [f"dev-{i:03d}" for i in range(9)]
    for index, example in evaluator.cached_model_datasets[task.name].as_numpy_iterator():
        np.testing.assert_array_equal(example["scores"], truths[index]["scores"])
        np.testing.assert_array_equal(example["heatmaps"], truths[index]["heatmaps"])


def test_evaluator_sees_a_worse_model_as_worse():
    task = tasks.register(built(), **SMALL)

    def constant(dataset, model_feature_shapes=None):
        indices, aux = _perfect(dataset)
        aux["heatmaps"] = [np.full_like(heatmap, 0.5) for heatmap in aux["heatmaps"]]
        return [(index, np.zeros_like(ids)) for index, ids in indices], aux

    future, _ = features.evaluator(task, "dev").evaluate(compute_metrics=True, predict_with_aux_fn=constant)
    result = future.result()[task.name]
    assert result["score/plcc/overall"] == pytest.approx(1)
    assert result["heatmap/mse/implausibility"] > 0.1
    assert result["keywords/micro/recall"] == 0


def test_evaluator_refuses_what_seqio_would_skip():
    with pytest.raises(ValueError, match=r"has no metric functions, expected some; register it with augment=False"):
        features.evaluator(tasks.register(built(), **SMALL, augment=True), "dev")
    with pytest.raises(ValueError, match=r"split: got 'test', expected one of the dataset's"):
        features.evaluator(tasks.register(built(), **SMALL), "test")


def test_converter_refuses_other_features():
    task = tasks.register(built(), **SMALL)
    dataset = task.seqio_task.get_dataset(split="dev", shuffle=False, sequence_length=None)
    lengths = task.lengths()
    with pytest.raises(ValueError, match=r"missing features specified in the TASK_FEATURES: {'image'}"):
        features.RAHFFeatureConverter()(dataset, {k: v for k, v in lengths.items() if k != "image"})
    one_text = dataset.map(lambda example: example | {"text_ids": example["text_ids"][0]})
    with pytest.raises(ValueError, match=r"incorrect rank for feature 'text_ids'"):
        features.RAHFFeatureConverter()(one_text, lengths)
    floats = dataset.map(lambda example: example | {"image": tf.cast(example["image"], tf.float32)})
    with pytest.raises(ValueError, match=r"incorrect type for feature 'image'.*Got float32, expected uint8"):
        features.RAHFFeatureConverter()(floats, lengths)


# ---- mixtures


@functools.cache
def _mixture() -> dict[tasks.RichhfTask, float]:
    """The tasks of two datasets, of 23 and 7 training examples, at rates of 3 to 1."""
    other = pathlib.Path(tempfile.mkdtemp(prefix="richhf_other_"))
    sources = write_sources(other, {"train-other": 7}, split="train")
    build.build(*sources, other / "data", vocabulary_path=f"{built()}/vocabulary.model")
    options = SMALL | {"augment": True, "vocabulary_path": f"{built()}/vocabulary.model"}
    return dict(zip([tasks.register(data_dir, **options) for data_dir in (built(), other / "data")], (3, 1), strict=True))


def _known(batches):
    uids = [f"train-{i:03d}" for i in range(23)] + [f"train-other-{i:03d}" for i in range(7)]
    known = {records.decode(raw_record(uid))["scores"].tobytes(): uid for uid in uids}
    return [known[row.tobytes()] for batch in batches for row in batch["scores"]]


def test_a_mixture_keeps_rates_and_each_datasets_epochs():
    mixture = _mixture()
    uids = _known(_take(features.training_batches(mixture, 8, seed=1), 16))  # 128 rows: 96 and 32
    parts = [[uid for uid in uids if ("other" in uid) == other] for other in (False, True)]
    assert [len(part) for part in parts] == [96, 32]
    for start in range(0, 120, 4):
        assert sum("other" in uid for uid in uids[start : start + 4]) == 1  # spread evenly, in every batch
    for part, size in zip(parts, (23, 7), strict=True):
        for start in range(0, len(part) - size + 1, size):
            assert len(set(part[start : start + size])) == size  # an epoch has each example once
        assert part[:size] != part[size : 2 * size]


def test_a_mixtures_global_batch_does_not_depend_on_who_reads_which_rows():
    mixture = _mixture()
    whole = _take(features.training_batches(mixture, 8, seed=1), 4)
    resumed = _take(features.training_batches(mixture, 8, seed=1, start_step=2), 2)
    _assert_equal(resumed, whole[2:])
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [1, 2, 5]):
        read = _take(features.training_batches(mixture, 8, seed=1, start_step=2, rows=rows), 2)
        _assert_equal(read, [{key: batch[key][rows] for key in batch} for batch in whole[2:]])


def test_a_mixture_resumes_far_away_as_if_it_had_read_all():
    mixture = _mixture()
    steps = 10_000 // 8  # the pattern of 10,000 rows has 7,500 and 2,500 of them
    later = next(features.training_batches(mixture, 8, seed=1, start_step=steps))
    alone = _take(features.training_batches(next(iter(mixture)), 6, seed=1, start_step=7500 // 6), 1)
    rows = [uid for uid in _known([later]) if "other" not in uid]
    assert rows == _known(alone)  # the dataset's own stream goes on at its row 7,500
    assert next(features.training_batches(mixture, 8, seed=1, start_step=10**12))["scores"].shape == (8, 4)


def test_mixtures_that_cannot_be_are_refused():
    first, second = _mixture()
    plain = tasks.register(built(), **SMALL)
    with pytest.raises(ValueError, match=rf"mixture: task '{plain.name}' has augment False, expected that of"):
        features.training_batches({first: 1, plain: 1}, 8, seed=0)
    with pytest.raises(ValueError, match=r"mixture: got rate 0 of task .*, expected a number above 0"):
        features.training_batches({first: 0}, 8, seed=0)
    with pytest.raises(ValueError, match="mixture: got no task"):
        features.training_batches({}, 8, seed=0)
    with pytest.raises(ValueError, match=r"mixture: got a rate of 9.9999e-06 of all, expected at least 1 / 10,000"):
        features.training_batches({first: 1, second: 1e-5}, 8, seed=0)
