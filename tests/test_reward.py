"""The reward model: prompts and negatives, feedback, embeddings and their cache, loss, training, metrics, the command."""

import collections
import dataclasses
import io
import json
import pathlib
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import tiny_clip
from tensorboard.backend.event_processing import event_accumulator

from rahf import experiments, reward
from rahf.models.clip import CLIP
from rahf.reward import embed, model, predict, prompts, specs, train
from rahf.reward.image_table import ImageTable, LabelledImages
from richhf_data import command, json_files
from richhf_data.errors import UserError
from richhf_data.images import decode

ROOT = pathlib.Path(__file__).parent.parent
WORDS = prompts.Words(
    count=("one", "two", "three"),
    colour=("red", "orange"),
    thing=("cat", "box", "mouse/mice"),
    background=("on the moon", "in the sea"),
)
SMALL = {"prompts": dataclasses.asdict(WORDS), "model": {"hidden": (16, 16)}}
SMALL |= {"train": {"batch_size": 8, "num_steps": 6, "eval_every": 2, "learning_rate": 1e-2}}
SMALL |= {"loss": {"num_prompts": 3}, "eval": {"validation": 0.3, "data_sizes": (0.5, 1.0)}}


def small_config(**changes):
    config = experiments.load("reward_clip")
    config.update(ml_collections.ConfigDict(SMALL))
    config.update_from_flattened_dict(changes)
    return config


# ---- Prompts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (("two", "red", "cat", "on the moon"), "two red cats on the moon"),
        (("one", "red", "mouse/mice", None), "one red mouse"),
        (("three", None, "mouse/mice", None), "three mice"),
        (("two", None, "box", None), "two boxes"),
        ((None, "orange", "cat", None), "an orange cat"),
        ((None, None, "cat", "in the sea"), "a cat in the sea"),
    ],
)
def test_prompt_reads_as_english_and_is_parsed_back(prompt, expected):
    assert prompts.text(prompts.ParsedPrompt(*prompt)) == expected
    assert WORDS.parse(expected.upper() + ".") == prompts.ParsedPrompt(*prompt)
    assert WORDS.parse(expected.replace(" ", "\u00a0") + "\n") == prompts.ParsedPrompt(*prompt)


def test_negatives_change_exactly_one_category():
    for prompt in WORDS.all():
        negatives = WORDS.negatives(prompt)
        assert set(negatives) == {name for name in prompts.CATEGORIES if getattr(prompt, name)}
        for name, others in negatives.items():
            assert len(others) == len(set(others)) == len(getattr(WORDS, name)) - 1
            for other in others:
                assert [field for field in prompts.CATEGORIES if getattr(other, field) != getattr(prompt, field)] == [name]
                assert WORDS.parse(prompts.text(other)) == other
    assert set(WORDS.negatives(prompts.ParsedPrompt("two", "red", "cat", None), ("count", "background"))) == {"count"}


def test_draw_is_even_over_kinds_and_a_function_of_the_seed():
    drawn = WORDS.draw(21, seed=0)
    assert drawn == WORDS.draw(21, seed=0) != WORDS.draw(21, seed=1)
    assert len(set(drawn)) == 21
    assert list(collections.Counter(map(prompts.kind, drawn)).values()) == [3] * 7
    assert len(WORDS.draw(len(WORDS.all()), seed=0)) == 3 * (4 * 3 * 3 - 1)
    with pytest.raises(ValueError, match="got 106 to draw, expected 1 to 105"):
        WORDS.draw(106, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": ("red", "red")}, r"prompts.colour: got \['red'\] more than once"),
        ({"colour": "red"}, r"prompts.colour: got 'red', expected a list of words"),
        ({"thing": ()}, r"prompts.thing: got an empty list"),
        ({"thing": ("sheep", "sheep/sheep")}, r"both read 'a sheep'"),
    ],
)
def test_words_name_a_wrong_list(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WORDS, **changes)


def test_the_configs_words_make_over_2700_prompts():
    assert len(prompts.words_of(experiments.load("reward_clip").prompts).all()) == 25 * (7 * 10 * 9 - 1)


# ---- Feedback -------------------------------------------------------------------------------------------------------
def png(i, size=(20, 16)) -> bytes:
    """A picture for each i."""
    pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).resize(size).save(file, "PNG")
    return file.getvalue()


def write_rows(folder, number=30, change=lambda i, row: row):
    """Feedback as .jsonl and images, their labels random."""
    drawn, rng = WORDS.draw(number, seed=0), np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, prompt in enumerate(drawn):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
        row = {"prompt": prompts.text(prompt), "image": f"images/{i}.png", "label": int(rng.integers(2))}
        rows.append(change(i, row))
    file = folder / "feedback.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return file


def write_parquet(file, images, labels=(1, 0, 1)):
    table = {"prompt": ["two cats", "a red cat", "one mouse"], "image": images, "label": list(labels)}
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    return file


def test_jsonl_and_parquet_of_bytes_structs_and_paths_read_alike(tmp_path):
    encoded = [png(i) for i in range(3)]
    (tmp_path / "b.png").write_bytes(encoded[1])
    sources = [write_parquet(tmp_path / "bytes.parquet", encoded)]
    sources.append(write_parquet(tmp_path / "structs.parquet", [{"bytes": x, "path": None} for x in encoded]))
    for i, x in enumerate(encoded):
        (tmp_path / f"{i}.png").write_bytes(x)
    sources.append(write_parquet(tmp_path / "paths.parquet", ["0.png", "b.png", "2.png"], (1.0, 0.0, 1.0)))
    rows = zip(["two cats", "a red cat", "one mouse"], [True, False, True], strict=True)
    lines = [json.dumps({"prompt": p, "image": f"{i}.png", "label": label}) for i, (p, label) in enumerate(rows)]
    sources.append(tmp_path / "lines.jsonl")
    sources[-1].write_text("\n".join(lines))
    for source in sources:
        feedback = LabelledImages(source)
        assert feedback.prompts == ["two cats", "a red cat", "one mouse"]
        assert feedback.labels == [1, 0, 1]
        assert [image for _, image in feedback.images()] == encoded
        assert [where for where, _ in feedback.images()][2] == f"feedback: {source}: row 3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, row: row | {"label": 2 if i == 3 else 1}, r"feedback.jsonl:\n  row 4: label: got 2, expected 0 or 1"),
        (lambda i, row: row | {"label": float("nan")}, r"row 1: got .*NaN is no finite number(?s:.)*and 25 more"),
        (lambda i, row: row | {"label": "1"}, r"label: got '1', expected 0 or 1"),
        (lambda i, row: row | {"prompt": " "}, r"row 1: prompt: got ' ', expected a text"),
        (lambda i, row: row | {"image": f"{i}.jpg"}, r"row 1: image: no file .*0.jpg"),
        (lambda i, row: row | {"image": None}, r"image: got None, expected a path"),
        (lambda i, row: '{"prompt"' if i == 1 else row, r"row 2: got '\{\"prompt\"', which is not JSON .*, expected"),
        (lambda i, row: {"prompt": "a"}, r"row 1: got .*, expected"),
        (lambda i, row: "", r"has no rows"),
    ],
)
def test_feedback_names_file_row_got_and_expected(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        LabelledImages(write_rows(tmp_path, change=change))


def test_feedback_refuses_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"feedback: no file .*nothing.jsonl"):
        LabelledImages(tmp_path / "nothing.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"ends in '.csv', expected one of \['.jsonl', '.parquet'\]"):
        LabelledImages(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"feedback: .*a.parquet is not a readable parquet file"):
        LabelledImages(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "picture": [b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"has no column image, label; it has prompt \(string\), picture \(binary\)"):
        LabelledImages(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"row 2: label: got None, expected 0 or 1"):
        LabelledImages(write_parquet(tmp_path / "c.parquet", [png(0)] * 3, (1, None, 0)))
    with pytest.raises(ValueError, match=r"row 2: image: got no bytes, expected a path or an image's bytes"):
        list(LabelledImages(write_parquet(tmp_path / "d.parquet", [png(0), b"", png(1)])).images())


def test_pictures_need_no_label_and_read_the_folder_that_sample_writes(tmp_path):
    file = write_rows(tmp_path, 3, lambda i, row: {"prompt": row["prompt"], "image": row["image"], "seed": 0, "number": i})
    file.rename(tmp_path / "images.jsonl")
    for pictures in (ImageTable(tmp_path), ImageTable(str(tmp_path / "images.jsonl"))):
        assert len(pictures.prompts) == len(pictures) == 3
        assert [image for _, image in pictures.images()] == [png(i) for i in range(3)]
        assert next(pictures.images())[0] == f"pictures: {tmp_path / 'images.jsonl'}: row 1"
    with pytest.raises(ValueError, match=r"feedback: .*images.jsonl:\n  row 1: got .*, expected .*0 or 1"):
        LabelledImages(tmp_path)
    with pytest.raises(ValueError, match=r"pictures: no file .*none.images.jsonl"):
        (tmp_path / "none").mkdir()
        ImageTable(tmp_path / "none")
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"row 2: image: no file .*1.png"):
        ImageTable(tmp_path)
    write_parquet(tmp_path / "a.parquet", [png(0)] * 3)
    assert ImageTable(tmp_path / "a.parquet").prompts == ["two cats", "a red cat", "one mouse"]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "picture": [b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"pictures: .* has no column image; it has prompt"):
        ImageTable(tmp_path / "b.parquet")


# ---- Embeddings -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder):
    return embed.Clip(clip_folder)


def test_clip_embeddings_are_the_modules_of_unit_length_whatever_the_batch(clip):
    images = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in range(embed.BATCH + 2)]
    texts = [prompts.text(prompt) for prompt in WORDS.draw(embed.BATCH + 2, seed=0)]
    for ours, inputs, method in (
        (clip.images(images), np.stack(images), "encode_image"),
        (clip.texts(texts), clip.tokenizer(texts, 40), "encode_text"),
    ):
        apply = jax.jit(CLIP(clip.config).apply, static_argnames="method")
        expected = apply({"params": clip.params}, inputs, method=method)
        expected = np.asarray(expected) / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(ours, expected, atol=2e-6)
        assert ours.shape == (embed.BATCH + 2, 12)


def test_prepare_scales_the_shorter_side_and_keeps_the_middle():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, :20], image[:, 20:60], image[:, 60:] = 50, 100, 200
    prepared = embed.prepare(image, 10)
    assert prepared.shape == (10, 10, 3)
    np.testing.assert_array_equal(prepared[:, 2:-2], 100)
    np.testing.assert_array_equal(embed.prepare(image[:, :40].transpose(1, 0, 2), 40)[:20], 50)
    assert embed.prepare(np.zeros((7, 500, 3), np.uint8), 16).shape == (16, 16, 3)
    panorama = np.repeat(np.arange(2001) % 256, 3).reshape(1, -1, 3).astype(np.uint8)  # of 1 x 2001 pixels
    np.testing.assert_array_equal(embed.prepare(panorama, 16), embed.prepare(panorama[:, 990:1011], 16))
    assert embed.prepare(np.zeros((1, 20_000_000, 3), np.uint8), 224).shape == (224, 224, 3)  # not scaled to 3 terabytes
    with pytest.raises(ValueError, match=r"image: got float32\[4, 4, 3\], expected uint8\[H, W, 3\]"):
        embed.prepare(np.zeros((4, 4, 3), np.float32), 16)


@pytest.mark.parametrize("shape", [(40, 80, 3), (50, 33, 3), (17, 90, 3), (61, 37, 3), (32, 32, 3)])
def test_prepare_is_hugging_faces_processor(shape):
    import transformers

    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    processor = transformers.CLIPImageProcessor(
        do_normalize=False, do_rescale=False, size={"shortest_edge": 32}, crop_size=32
    )
    (expected,) = processor(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(embed.prepare(image, 32), expected.transpose(1, 2, 0))


def test_a_text_too_long_for_clip_is_named(clip):
    with pytest.raises(ValueError, match=r"prompt: '1 2 .* takes 62 ids with its start and end, CLIP reads 40"):
        clip.texts(["1 2 " * 30])


def test_an_embedding_that_is_not_finite_names_its_picture_or_prompt(clip, tmp_path, monkeypatch):
    params = jax.tree.map(lambda leaf: leaf, clip.params)
    params["image_projection"]["kernel"] *= np.nan
    monkeypatch.setattr(clip, "params", params)
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"images\[0\]: CLIP's embedding is not finite; its weights are damaged"):
        clip.images([image])
    with pytest.raises(ValueError, match=r"row 1: CLIP's embedding is not finite"):
        embed.embed_images(clip, [("row 1", png(0))], tmp_path, 1)
    assert np.isfinite(clip.texts(["a red cat"])).all()
    params["text_projection"]["kernel"] *= np.nan
    with pytest.raises(ValueError, match=r"prompt 'a red cat': CLIP's embedding is not finite"):
        clip.texts(["a red cat"])


def test_the_cache_goes_on_after_a_kill_and_embeds_nothing_twice(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "BATCH", 4)
    monkeypatch.setattr(embed, "FILE", 8)
    rows = [(f"row {i}", png(i)) for i in range(21)]
    _, expected = embed.embed_images(clip, rows, tmp_path / "other", 21)

    class Kill(BaseException):
        pass

    def killed():
        for i, row in enumerate(rows):
            if i == 18:
                raise Kill
            yield row

    embedded = []

    def counted(images, names):
        embedded.append(len(images))
        return type(clip).images(clip, images, names)

    with pytest.raises(Kill):
        embed.embed_images(clip, killed(), tmp_path / "cache", 21)
    monkeypatch.setattr(clip, "images", counted, raising=False)
    keys, found = embed.embed_images(clip, rows + rows[:3], tmp_path / "cache", 24)
    assert sum(embedded) == 21 - 16  # what came after the last whole file
    np.testing.assert_allclose(found[:21], expected, atol=1e-6)
    np.testing.assert_array_equal(found[21:], found[:3])
    assert keys[21:] == keys[:3] and len(set(keys)) == 21
    embedded.clear()
    embed.embed_images(clip, rows[::-1], tmp_path / "cache", 21)
    assert not embedded
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_cache_file_and_an_image_that_does_not_decode_are_named(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "BATCH", 1)
    with pytest.raises(ValueError, match=r"row 2: image: does not decode \(.*\), expected a JPEG, PNG or WebP"):
        embed.embed_images(clip, [("row 1", png(0)), ("row 2", b"no image")], tmp_path, 2)
    (file,) = tmp_path.rglob("*.npz")  # the first image's embedding was kept
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cache: .*npz is damaged .*; delete it"):
        embed.embed_images(clip, [("row 1", png(0))], tmp_path, 1)


# ---- Model, loss, training ------------------------------------------------------------------------------------------
def test_the_reward_is_an_mlp_on_both_features_of_the_published_size():
    mlp = model.RewardMLP()
    boxed = jax.eval_shape(lambda key: model.init(mlp, 768, 768, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(boxed))) == (1536 + 1) * 1024 + 1025 * 1024 + 1025
    assert nn.get_partition_spec(boxed)["hidden_0"]["kernel"] == jax.sharding.PartitionSpec("mlp", "embed")
    mlp, rng = model.RewardMLP((8, 6)), np.random.default_rng(0)
    params = nn.unbox(model.init(mlp, 5, 3, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32), params)
    image, text = rng.normal(size=(4, 5)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    x = np.concatenate([y / np.sqrt(np.mean(y**2, axis=1, keepdims=True)) for y in (image, text)], axis=1)
    kernel = np.concatenate([params["image"]["kernel"], params["text"]["kernel"]])
    x = np.maximum(x @ kernel + params["image"]["bias"], 0)
    x = np.maximum(x @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"], 0)
    expected = 1 / (1 + np.exp(-(x @ params["out"]["kernel"] + params["out"]["bias"])[:, 0]))
    np.testing.assert_allclose(model.predict(mlp, params, image, text), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict(mlp, params, image * 7, text, batch_size=3), expected, atol=1e-6)


def test_loss_is_the_papers_formula():
    rng = np.random.default_rng(0)
    rewards, label = rng.uniform(size=(5, 4)).astype(np.float32), np.array([1, 0, 1, 1, 0], np.float32)
    there = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    entropies = []
    for i in (0, 2):  # labelled good, with a negative
        odds = np.exp(rewards[i, there[i]].astype(np.float64) / 0.7)
        entropies.append(-np.log(odds[0] / odds.sum()))
    mse = np.mean((rewards[:, 0].astype(np.float64) - label) ** 2)
    loss, found = jax.jit(model.reward_loss)(rewards, label, there, 0.7, 0.25)
    np.testing.assert_allclose(loss, mse + 0.25 * np.mean(entropies), rtol=1e-6)
    np.testing.assert_allclose([found["mse"], found["classification"]], [mse, np.mean(entropies)], rtol=1e-6)
    none = jax.jit(model.reward_loss)(rewards[:, :1], np.zeros(5, np.float32), there[:, :1], 0.7, 0.25)[1]
    np.testing.assert_allclose([none["classification"], none["loss"]], [0, np.mean(rewards[:, 0] ** 2)], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: model.reward_loss(x, label, there, 0.7, 0.25)[0]))(rewards)
    assert np.isfinite(gradient).all() and (gradient[~there] == 0).all() and (gradient[0, 1:] > 0).all()


def test_negatives_are_drawn_by_their_odds_without_repetition():
    negatives = np.array([[5, 6, 7, 0], [8, 9, 3, 4]], np.int32)
    odds = np.array([[1, 1, 0, 0], [3, 1, 1, 1]], np.float32)
    draw = jax.jit(jax.vmap(lambda key: model.draw_negatives(key, negatives, odds, 3)))
    drawn, there = draw(jax.random.split(jax.random.key(0), 2000))
    assert (np.sort(np.where(there, drawn, 0)[:, 0]) == [0, 5, 6]).all()
    assert there[:, 1].all() and all(len(set(row)) == 3 for row in np.asarray(drawn)[:, 1].tolist())
    np.testing.assert_allclose(np.mean(np.asarray(drawn)[:, 1, 0] == 8), 0.5, atol=0.04)
    drawn, there = model.draw_negatives(jax.random.key(0), negatives, odds, 6)
    assert drawn.shape == (2, 6) and there.sum(axis=1).tolist() == [2, 4]


def matching_features(n=500, kinds=6, seed=0):
    """Images that show one of `kinds` things or their prompt's; the label says whether it is the prompt's."""
    rng, width = np.random.default_rng(seed), 16
    text, looks = (rng.normal(size=(kinds, width)).astype(np.float32) for _ in range(2))
    prompt = rng.integers(0, kinds, n).astype(np.int32)
    shown = np.where(rng.random(n) < 0.5, prompt, rng.integers(0, kinds, n))
    image = looks[shown] + rng.normal(0, 0.3, (n, width)).astype(np.float32)
    negatives = np.array([[j for j in range(kinds) if j != i] for i in range(kinds)], np.int32)
    label = (shown == prompt).astype(np.float32)
    return model.Features(image, label, prompt, text, negatives, np.ones_like(negatives, np.float32))


def test_fit_learns_is_deterministic_and_keeps_the_best(standard_promotion):
    features, rows = matching_features(), np.arange(500)
    changes = {"train.num_steps": 120, "train.eval_every": 20, "train.batch_size": 64, "model.hidden": (32, 32)}
    config, told = small_config(**changes), []
    params, best = model.fit(features, rows[:400], rows[400:], config, lambda params, found: told.append(found))
    errors = [found["validation_mse"] for found in told]
    assert told[-1] == best and len(told) > 1 and errors == sorted(errors, reverse=True)
    again, _ = model.fit(features, rows[:400], rows[400:], config)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    values = model.predict(model.RewardMLP((32, 32)), params, features.image[400:], features.text[features.prompt[400:]])
    assert train.auc(values, features.label[400:]) > 0.95
    np.testing.assert_allclose(np.mean((values - features.label[400:]) ** 2), best["validation_mse"], rtol=1e-5)


def test_the_classification_term_trains_and_without_it_negatives_do_not_matter(standard_promotion):
    features, rows = matching_features(200), np.arange(200)
    swapped = dataclasses.replace(features, negatives=np.roll(features.negatives, 1, axis=0))
    for weight, same in ((0.0, True), (5.0, False)):
        config = small_config(**{"loss.classification_weight": weight})
        a, b = (model.fit(x, rows[:150], rows[150:], config)[0] for x in (features, swapped))
        assert np.array_equal(a["out"]["kernel"], b["out"]["kernel"]) == same


def test_training_stops_early(standard_promotion, monkeypatch):
    features, rows = matching_features(60), np.arange(60)
    features = dataclasses.replace(features, label=np.random.default_rng(0).integers(0, 2, 60).astype(np.float32))
    seen, real = [], model.predict
    monkeypatch.setattr(model, "predict", lambda *args: seen.append(1) or real(*args))
    config = small_config(**{"train.num_steps": 400, "train.eval_every": 2, "train.patience": 3})
    _, best = model.fit(features, rows[:40], rows[40:], config)
    assert len(seen) == best["step"] // 2 + 3 < 200


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss.temperature", 0.0, "loss.temperature: got 0.0, expected a number above 0"),
        ("loss.num_prompts", 1, "loss.num_prompts: got 1, expected a whole number from 2"),
        ("loss.classification_weight", -1.0, "loss.classification_weight: got -1.0, expected a number from 0"),
        ("train.learning_rate", float("nan"), "train.learning_rate: got nan, expected a number above 0"),
    ],
)
def test_fit_names_a_wrong_setting(standard_promotion, key, value, message):
    rows = np.arange(20)
    with pytest.raises(ValueError, match=message):
        model.fit(matching_features(20), rows[:15], rows[15:], small_config(**{key: value}))
    with pytest.raises(ValueError, match="the validation part is empty"):
        model.fit(matching_features(20), rows, rows[:0], small_config())


def test_fit_names_the_step_whose_loss_is_not_finite(standard_promotion):
    rows, features = np.arange(20), matching_features(20)
    features = dataclasses.replace(features, label=np.full(20, np.nan, np.float32))
    with pytest.raises(ValueError, match="train: the loss is nan at step 2; lower"):
        model.fit(features, rows[:15], rows[15:], small_config())


def test_features_of_wrong_shapes_or_values_are_named():
    features = matching_features(20)
    with pytest.raises(ValueError, match=r"features.prompt: got shape \(19,\), expected \(20,\)"):
        dataclasses.replace(features, prompt=features.prompt[1:])
    with pytest.raises(ValueError, match=r"features.image: got values that are not finite"):
        dataclasses.replace(features, image=features.image * np.nan)


# ---- Metrics --------------------------------------------------------------------------------------------------------
def test_metrics_are_their_definitions():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels, values = rng.integers(0, 2, 40), rng.integers(0, 9, 40) / 8  # with ties
        predicted = values >= 0.5
        differences = values[labels == 1][:, None] - values[labels == 0]
        expected = {
            "accuracy": np.mean(predicted == labels),
            "f1": 2 * np.sum(predicted & (labels == 1)) / (predicted.sum() + labels.sum()),
            "auc": np.mean((differences > 0) + 0.5 * (differences == 0)),
        }
        assert train.binary_metrics(values, labels, 0.5) == pytest.approx(expected, abs=1e-12)
        candidates = [-1.0, *(np.arange(9) / 8 + 1 / 16)]
        accuracies = [np.mean((values >= threshold) == labels) for threshold in candidates]
        assert np.mean((values >= train.best_threshold(values, labels)) == labels) == max(accuracies)
    assert np.isnan(train.auc(np.arange(3), np.ones(3)))
    undefined = train.binary_metrics(np.zeros(3), np.zeros(3), 0.5)
    assert undefined == pytest.approx({"accuracy": 1.0, "f1": np.nan, "auc": np.nan}, nan_ok=True)


# ---- Rewards and features by name -----------------------------------------------------------------------------------
def test_python_specs_give_the_users_own_functions(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "rewards.py").write_text("class Of:\n    red = staticmethod(lambda images, prompts: images)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert specs.reward_of("python:own.rewards:Of.red")(3, "") == 3
    np.testing.assert_array_equal(specs.features_of("python:numpy:asarray")([1, 2]), [1, 2])
    assert specs.identity_of(specs.reward_of("python:builtins:max")) is None  # no source file
    for spec, message in (
        ("python:own.nothing:red", r"reward: python:own.nothing:red: No module named 'own.nothing'; is its folder on"),
        ("python:own.rewards:blue", r"reward: python:own.rewards:blue: <module 'own.rewards' .* has no attribute 'blue'"),
        ("python:math:pi", r"reward: python:math:pi is a float, expected a function"),
        ("python:math", r"reward: got python:math, expected python:package.module:name"),
        ("python::x", r"expected python:package.module:name"),
    ):
        with pytest.raises(ValueError, match=message):
            specs.reward_of(spec)


def test_python_rewards_are_identified_by_their_source(tmp_path, monkeypatch):
    """By the file of the module that is named, and of the one that defines the function."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions of a file may have one time and size

    def identity(named, defining, spec="python:rewards_named:red"):
        (tmp_path / "rewards_named.py").write_text(named)
        (tmp_path / "rewards_defining.py").write_text(defining)
        for module in ("rewards_named", "rewards_defining"):
            sys.modules.pop(module, None)
        return specs.identity_of(specs.reward_of(spec))

    named = "from rewards_defining import red\nblue = red\n"
    defining = "def red(images, prompts): return {}\n"
    found = [
        identity(named, defining.format(1)),
        identity(named + "# other\n", defining.format(1)),
        identity(named, defining.format(2)),
        identity(named, defining.format(1), "python:rewards_named:blue"),
    ]
    assert len(set(found)) == 4 and all(found)
    assert identity(named, defining.format(1)) == found[0]
    assert identity(named, defining.format(1) + "red.identity = 'version 2'\n") == "version 2"
    with pytest.raises(ValueError, match="reward: got the identity 3, expected a text"):
        identity(named, defining.format(1) + "red.identity = 3\n")


def test_a_python_reward_is_identified_by_what_it_imports(tmp_path, monkeypatch):
    """By modules of its own package and beside it, also for a constant and within a function; not by other files."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    files = {
        "own_parts/__init__.py": "",
        "own_parts/reward.py": "import numpy, rahf\nfrom . import scale\nfrom .limits import LOW\n"
        "def red(images, prompts):\n    import own_late\n",
        "own_parts/scale.py": "import own_deep.far\n",
        "own_parts/limits.py": "LOW = 1\n",
        "own_parts/unused.py": "",
        "own_deep/__init__.py": "",
        "own_deep/far.py": "from own_parts import reward\n",
        "own_late.py": "",
    }

    def identity():
        for module in [name for name in sys.modules if name.startswith("own_")]:
            del sys.modules[module]
        return specs.reward_of("python:own_parts.reward:red").identity

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    first = identity()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "# other\n")
        assert (identity() == first) == (name == "own_parts/unused.py"), name
        (tmp_path / name).write_text(text)
    assert identity() == first


FAULTY = {
    "raise RuntimeError('mine')": "RuntimeError: mine",
    "import no_such_package": "ModuleNotFoundError: No module named 'no_such_package'",
    "import sys; sys.exit(0)": "SystemExit: 0",
    "def": "SyntaxError: invalid syntax",
    "raise UserWarning": "UserWarning",
}


@pytest.mark.parametrize("line", FAULTY)
def test_an_error_of_the_users_code_is_shown_with_its_traceback(tmp_path, monkeypatch, line):
    """At import and at the call, in a reward, a network of features and a config; none of our own lines is shown."""
    monkeypatch.syspath_prepend(tmp_path)
    at_import, at_call = (f"own_faulty_{kind}_{list(FAULTY).index(line)}" for kind in ("import", "call"))
    (tmp_path / f"{at_import}.py").write_text(f"{line}\ndef get_config(): pass\n")
    with pytest.raises(UserError, match="this code is yours, and it raised") as found:
        specs.reward_of(f"python:{at_import}:red")
    shown = command.message(found.value).splitlines()
    assert shown[0].startswith(f"reward: python:{at_import}:red: this code") and shown[-1].startswith(f"  {FAULTY[line]}")
    assert str(found.value).count("File ") == 1 and f'{at_import}.py", line 1' in str(found.value)
    with pytest.raises(UserError, match=rf"(?s)^config: .*{at_import}.py: this code is yours.*line 1"):
        experiments.load(str(tmp_path / f"{at_import}.py"))
    if line == "def":
        return
    (tmp_path / f"{at_call}.py").write_text(f"def inner():\n    {line}\ndef red(*given):\n    inner()\nget_config = red\n")
    for call in (
        lambda: specs.checked(specs.reward_of(f"python:{at_call}:red"), [0], ["a"]),
        lambda: specs.features_of(f"python:{at_call}:red")([0]),
        lambda: experiments.load(str(tmp_path / f"{at_call}.py")),
    ):
        with pytest.raises(UserError, match="this code is yours, and it raised") as found:
            call()
        assert FAULTY[line] in str(found.value) and str(found.value).count("File ") == 2


def test_a_python_reward_is_named_when_it_returns_something_else(tmp_path, monkeypatch):
    (tmp_path / "own_values.py").write_text(
        "class Odd:\n    def __array__(self, *_, **__):\n        raise RuntimeError('no array')\n"
        "odd = lambda *_: Odd()\nnan = lambda *_: [float('nan')]\nscalar = lambda *_: 1\nnone = lambda *_: None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        ("odd", r"got Odd \(no array\), expected 1 finite numbers"),
        ("nan", "got 1 values that are not finite, the first nan"),
        ("scalar", r"got shape \(\), expected 1"),
        ("none", "got NoneType"),
    ):
        with pytest.raises(UserError, match=rf"^reward python:own_values:{name}: {message}"):
            specs.checked(specs.reward_of(f"python:own_values:{name}"), [0], ["a"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip:a", r"clip: a is no folder that rahf.convert wrote"),
        ("a folder", "reward: got 'a folder', expected"),
        ("reward:", "reward: got 'reward:', expected"),
        ("reward:nowhere", r"workdir: .*nowhere has no config.json; expected one of `python -m rahf.reward.train`"),
        ("rahf:nowhere", r"workdir: .*nowhere has no config.json; expected a folder written by `python -m rahf.train`"),
        ("rahf:nowhere:beauty", r"reward: rahf:nowhere:beauty: got the score 'beauty', expected some of plausib"),
        ("rahf:nowhere:overall,overall=2", r"got the score 'overall', expected some of .*, each once"),
        ("rahf:nowhere:overall=", r"got '' times overall, expected a number"),
        ("rahf:nowhere:overall=inf", r"got 'inf' times overall, expected a number"),
    ],
)
def test_reward_specs_name_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        specs.reward_of(spec)


def test_clip_features_are_its_image_embeddings(clip_folder, clip):
    images = [decode(png(i), "") for i in range(3)]
    np.testing.assert_array_equal(specs.features_of(f"clip:{clip_folder}")(images), clip.images(images))
    with pytest.raises(ValueError, match=r"features: got 'reward:a', expected clip:... or python:..."):
        specs.features_of("reward:a")


@pytest.mark.parametrize("given", [[1, 2], (True, False), np.float64([0.1, -3]), jax.numpy.bfloat16([1, 2])])
def test_checked_takes_any_finite_numbers(given):
    rewards = specs.checked(lambda *_: given, [0, 0], ["a", "b"])
    np.testing.assert_array_equal(rewards, np.asarray(given, np.float32))
    assert rewards.dtype == np.float32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 1)), r"reward: got shape \(2, 1\), expected 2 finite numbers, one an image"),
        (0.5, r"reward: got shape \(\), expected 2"),
        ([0, float("nan")], r"got 1 values that are not finite, the first nan for 'b'"),
        (np.float64([-1e300, 1e300]), r"got 2 values that are not finite, the first -inf for 'a'"),
        (["1", "2"], r"got list \(values of type <U1\), expected 2 finite numbers"),
        ([1, None], r"values of type object"),
        ([[1], [1, 2]], r"reward: got list \(.*inhomogeneous"),
        ([1j, 2j], r"values of type complex128"),
        (None, r"got NoneType"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_checked_names_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        specs.checked(lambda *_: given, [0, 0], ["a", "b"])
    with pytest.raises(ValueError, match="reward: got 1 images and 2 prompts"):
        specs.checked(lambda *_: given, [0], ["a", "b"])


# ---- The command, the function --------------------------------------------------------------------------------------
def test_train_writes_a_folder_that_load_reads_and_resumes(standard_promotion, clip_folder, tmp_path, monkeypatch):
    file, workdir = write_rows(tmp_path), tmp_path / "run"
    results = train.train(small_config(), file, clip_folder, workdir)
    train_rows = [entry["train"] for entry in results]
    assert 0 < train_rows[0] < train_rows[1] < 30
    assert {"accuracy", "f1", "auc"} == results[0]["reward"].keys() == results[1]["clip_score"].keys()
    assert PIL.Image.open(workdir / "data_size.png").width > 1000
    assert "CLIP score auc" in train.table(results)
    events = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    (best,) = [event for event in events.Scalars("share_1/validation_mse") if event.step == results[1]["step"]]
    np.testing.assert_allclose(best.value, results[1]["validation_mse"], rtol=1e-6)
    accuracy = {event.step: event.value for event in events.Scalars("data_size/clip_score/accuracy")}
    expected = {entry["train"]: entry["clip_score"]["accuracy"] for entry in results}
    assert accuracy == pytest.approx(expected) and len(events.Images("data_size")) == 1

    images = [decode(png(i), "") for i in range(30)]
    texts = LabelledImages(file).prompts
    loaded = reward.load(workdir)
    rewards = loaded(images, texts)
    assert rewards.shape == (30,) and rewards.dtype == np.float32 and np.ptp(rewards) > 1e-4
    keys = [embed.key(png(i)) for i in range(30)]
    _, validation = train.split(keys, 0.3)
    mse = np.mean((rewards[validation] - np.array(LabelledImages(file).labels)[validation]) ** 2)
    np.testing.assert_allclose(mse, results[1]["validation_mse"], rtol=1e-4)
    for function in (loaded, specs.reward_of(f"reward:{workdir}"), specs.reward_of(f"reward:{workdir}:{clip_folder}")):
        np.testing.assert_allclose(function(np.stack(images[:3]), texts[:3]), rewards[:3], atol=1e-6)

    # Other weights, layers or CLIP: another identity.
    changed = jax.tree.map(lambda leaf: leaf + 1e-6, loaded.params)
    others = [predict.Reward(loaded.clip, loaded.model, changed)]
    others.append(predict.Reward(loaded.clip, model.RewardMLP((3,)), loaded.params))
    with monkeypatch.context() as patched:
        patched.setattr(loaded.clip, "digest", "another")
        others.append(predict.Reward(loaded.clip, loaded.model, loaded.params))
        identities = {specs.identity_of(other) for other in others}
    assert len({loaded.identity, *identities}) == 4 and reward.load(workdir).identity == loaded.identity

    # Killed before the last training: it is repeated, the others are not, and the result is the same.
    whole = (workdir / "weights.safetensors").read_bytes()
    held = json_files.read(workdir / "results.json")
    json_files.write(workdir / "results.json", held | {"results": held["results"][:1]})
    (workdir / "weights.safetensors").unlink()
    fits, real = [], model.fit
    monkeypatch.setattr(model, "fit", lambda *args: fits.append(len(args[1])) or real(*args))
    monkeypatch.setattr(embed.Clip, "images", lambda *args: pytest.fail("embedded again"))
    with pytest.raises(ValueError, match=r"has no weights.safetensors yet"):
        reward.load(workdir)
    assert train.train(small_config(), file, clip_folder, workdir) == results
    assert fits == [train_rows[1]] and (workdir / "weights.safetensors").read_bytes() == whole

    # Moved, another CLIP, another run.
    copied = shutil.copytree(clip_folder, tmp_path / "copied")
    assert reward.load(workdir, clip=copied).clip.digest == loaded.clip.digest
    assert train.train(small_config(), file, copied, workdir) == results
    (copied / "merges.txt").write_text("#version: 0.2\nc a\n")
    with pytest.raises(ValueError, match=r"clip: .*copied is not the CLIP that .*run was trained with"):
        reward.load(workdir, clip=copied)
    with pytest.raises(ValueError, match=r"loss.temperature: the workdir has 2.0, this run 1.0"):
        train.train(small_config(**{"loss.temperature": 1.0}), file, clip_folder, workdir)
    (tmp_path / "fewer.jsonl").write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="holds a run on other feedback"):
        train.train(small_config(), tmp_path / "fewer.jsonl", clip_folder, workdir)

    # Removed during the training: not made anew.
    json_files.write(workdir / "results.json", held | {"results": held["results"][:1]})
    monkeypatch.setattr(model, "fit", lambda *args: shutil.rmtree(workdir) or real(*args))
    with pytest.raises(ValueError, match=r"run has no config.json"):
        train.train(small_config(), file, clip_folder, workdir)
    assert not workdir.exists()


def test_prompts_without_negatives_are_refused_unless_they_need_none(standard_promotion, clip_folder, tmp_path):
    file = write_rows(tmp_path, change=lambda i, row: row | ({"prompt": "a red thing"} if i == 7 else {}))
    with pytest.raises(ValueError, match=r"1 prompts cannot be made of the config's lists, such as 'a red thing'"):
        train.train(small_config(), file, clip_folder, tmp_path / "run")
    with pytest.raises(ValueError, match="workdir: got gs://bucket/run, expected a folder on a disk"):
        train.train(small_config(), file, clip_folder, "gs://bucket/run")
    assert not (tmp_path / "run").exists()
    config = small_config(**{"loss.classification_weight": 0.0, "eval.data_sizes": (1.0,)})
    assert len(train.train(config, file, clip_folder, tmp_path / "run")) == 1


def test_load_refuses_other_folders(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; expected one of `python -m rahf.reward.train`"):
        reward.load(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "vit"}')
    with pytest.raises(ValueError, match="holds a 'vit', expected a reward model"):
        reward.load(tmp_path)


def test_the_parts_share_no_image_and_the_sample_is_nested():
    keys = [embed.key(str(i % 150).encode()) for i in range(300)]
    rows, validation = train.split(keys, 0.2)
    assert sorted([*rows, *validation]) == list(range(300))
    assert not {keys[i] for i in rows} & {keys[i] for i in validation}
    assert 40 < len(validation) < 80


def test_keep_best_takes_the_highest_reward():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 2, 2, 3), np.uint8)

    def brightness(images, texts):
        assert texts == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
        return np.array([image.mean() for image in images], np.float32)

    kept, rewards = predict.keep_best(brightness, images, ["a", "b", "c"])
    np.testing.assert_allclose(rewards, images.mean(axis=(2, 3, 4)), rtol=1e-6)
    assert kept.tolist() == images.mean(axis=(2, 3, 4)).argmax(axis=1).tolist()
    with pytest.raises(ValueError, match=r"reward: got shape \(11,\), expected 12 finite numbers"):
        predict.keep_best(lambda *_: np.zeros(11), images, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"reward: got 12 values that are not finite, the first nan for 'a'"):
        predict.keep_best(lambda *_: np.full(12, np.nan), images, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"candidates: got 3 groups of \[4\] images for 2 prompts"):
        predict.keep_best(brightness, images, ["a", "b"])


def test_the_command_prints_its_error_and_needs_no_tensorflow(clip_folder, tmp_path):
    file = write_rows(tmp_path, change=lambda i, row: row | {"label": 3})
    block = "import sys, runpy; sys.modules['tensorflow'] = None; runpy.run_module('rahf.reward.train', run_name='__main__')"
    flags = [f"--clip={clip_folder}", f"--workdir={tmp_path / 'run'}", f"--feedback={file}"]
    done = subprocess.run(
        [sys.executable, "-c", block, "--config=configs/reward_clip.py", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: feedback: ") and "row 1: label: got 3, expected 0 or 1" in done.stderr
