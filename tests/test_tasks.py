"""tasks.py: registration, what the metrics are given, and the files beside the dataset."""

import logging
import pathlib

import numpy as np
import pytest
import seqio
from tiny_data import built, prompt_of, raw_record

from richhf_data import keywords, records, schema, tasks, vocabulary

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
    targets = [
        tasks.postprocess("", example=_example(scores=np.full(4, i / 5, np.float32)), is_target=True) for i in (1, 2)
    ]
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
