"""Diffusion-DPO: pairs from every source, the loss against numpy and torch, weights of tokens."""

import contextlib
import copy
import json
import types

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_diffusion
from flax import linen as nn

from rahf import experiments, partitioning
from rahf.diffusion import finetuning, folder, inputs, side_by_side
from rahf.diffusion.online import preferences, words
from rahf.reward import image_table
from rahf.reward.image_table import ImageTable
from richhf_data import clip_tokenizer, keywords
from richhf_data.annotate import export, pictures, store
from richhf_data.errors import UserError

BETA, PAIRS = 30.0, 4  # margins of about 1


def png(level, size=16):
    return cv2.imencode(".png", np.full((size, size, 3), level, np.uint8))[1].tobytes()


def levels(side):
    """The grey levels of a side's pictures."""
    return [int(cv2.imdecode(np.frombuffer(encoded, np.uint8), 1)[0, 0, 0]) for _, encoded in side.images()]


def pair_levels(pairs):
    """(prompt, level of the preferred picture, of the other one) of each pair."""
    assert len(pairs) == len(pairs.preferred) == len(pairs.other) and pairs.preferred.prompts == pairs.other.prompts
    return list(zip(pairs.preferred.prompts, levels(pairs.preferred), levels(pairs.other), strict=True))


def write_set(place, rows, kind="jsonl"):
    """A table of (prompt, grey level)."""
    place.mkdir(exist_ok=True)
    if kind == "parquet":
        columns = {"prompt": [prompt for prompt, _ in rows], "image": [png(level) for _, level in rows]}
        pyarrow.parquet.write_table(pyarrow.table(columns), place / "set.parquet", row_group_size=2)
        return place / "set.parquet"
    for number, (_, level) in enumerate(rows):
        (place / f"{number}.png").write_bytes(png(level))
    lines = [json.dumps({"prompt": prompt, "image": f"{i}.png"}) + "\n" for i, (prompt, _) in enumerate(rows)]
    (place / "images.jsonl").write_text("".join(lines))
    return place


# ---- Pick-a-Pic -----------------------------------------------------------------------------------------------------
def pick_a_pic_file(path, labels, first=0, **columns):
    """Row i has the pictures of levels first + 2 i and first + 2 i + 1. Two rows a row group."""
    count = len(labels)
    table = {
        "caption": [f"prompt {first // 2 + i}" for i in range(count)],
        "jpg_0": [png(first + 2 * i) for i in range(count)],
        "jpg_1": [png(first + 2 * i + 1) for i in range(count)],
        "label_0": labels,
        "label_1": [None if label is None else 1 - label for label in labels],
    }
    table = {name: values for name, values in (table | columns).items() if values is not None}  # None: no such column
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=2)
    return path


def test_pick_a_pics_labels_choose_the_picture(tmp_path):
    pick_a_pic_file(tmp_path / "a.parquet", [1.0, 0.0, 0.5, 0.0, 1.0], image_0_uid=["u0", None, "u2", "u3", "u4"])
    pick_a_pic_file(tmp_path / "b.parquet", [0.0, 0.5, 1.0], first=10, has_label=[True, True, False])
    pick_a_pic_file(tmp_path / "c.parquet", [0.5, 0.5], first=20)
    found = preferences.pick_a_pic(str(tmp_path / "*.parquet"))
    assert found.preferred.prompts == [f"prompt {number}" for number in (0, 1, 3, 4, 5)]
    assert (levels(found.preferred), levels(found.other)) == ([0, 3, 7, 8, 11], [1, 2, 6, 9, 10])
    assert found.left_out == {"ties": 4, "rows without a label": 1}
    assert str(found) == f"pairs: 5 of {tmp_path}/*.parquet; left out: 4 ties, 1 rows without a label"
    assert found.preferred.places[:2] == [f"{tmp_path}/a.parquet: row 1 (u0)", f"{tmp_path}/a.parquet: row 2"]
    assert next(found.other.images())[0] == f"preferences: {tmp_path}/a.parquet: row 1 (u0): jpg_1"
    one = preferences.pick_a_pic(tmp_path / "a.parquet")
    assert one.preferred.places == ["row 1 (u0)", "row 2", "row 4 (u3)", "row 5 (u4)"]
    assert one.identities != found.identities and one.identities["preferred"] != one.identities["other"]
    for name in ("preferred", "other"):
        assert inputs.fingerprint_of_table(getattr(one, name), "") == one.identities[name]


@pytest.mark.parametrize(
    ("labels", "columns", "message"),
    [
        ([1, 0.7], {}, r"a.parquet:\n  row 2: label_0, label_1: got 0.7 and 0.3\d*, expected 1 and 0, 0 and 1, or 0.5"),
        ([1, None], {}, r"row 2: label_0, label_1: got None and None"),
        ([1, 1], {"label_1": [0.0, 1.0]}, r"row 2: label_0, label_1: got 1 and 1.0"),
        ([1, 1], {"label_1": None}, r"a.parquet has no column label_1; it has caption \(string\), jpg_0 \(binary\)"),
        ([1, 1], {"caption": ["a", " "]}, r"row 2: caption: got ' ', expected a text"),
        ([1, 1], {"jpg_1": [png(9), None]}, r"a.parquet:\n  row 2: jpg_1: got None, expected a path or an image's bytes"),
        ([0, 1], {"jpg_1": [png(9), png(2)]}, r"a.parquet:\n  row 2: got one picture twice, expected two different"),
        ([0.5, 0.5], {}, r"a.parquet has no pair left, expected one or more; left out: 2 ties"),
        ([0, 1], {"are_different": [False, False]}, r"no pair left, .*: 2 rows of one picture"),
    ],
)
def test_a_faulty_row_of_pick_a_pic_is_named(tmp_path, labels, columns, message):
    path = pick_a_pic_file(tmp_path / "a.parquet", labels, **columns)
    with pytest.raises(UserError, match=f"(?s)preferences: .*{message}"):
        preferences.pick_a_pic(path)


def test_pick_a_pic_is_parquet(tmp_path):
    with pytest.raises(UserError, match=r"preferences: no file matches '.*none.\*', expected parquet files"):
        preferences.pick_a_pic(tmp_path / "none.*")
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"a.jsonl ends in '.jsonl', expected one of \['.parquet'\]"):
        preferences.pick_a_pic(tmp_path / "a.jsonl")


# ---- Own tables -----------------------------------------------------------------------------------------------------
def pair_rows(tmp_path, *rows):
    """preferences.jsonl of (prompt, level, level)."""
    for level in {level for row in rows for level in row[1:]}:
        (tmp_path / f"{level}.png").write_bytes(png(level))
    lines = [{"prompt": prompt, "preferred": f"{one}.png", "other": f"{two}.png"} for prompt, one, two in rows]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "preferences.jsonl"


def test_a_table_of_pairs_is_json_or_parquet(tmp_path):
    rows = [("a cat", 3, 4), ("a dog", 9, 3), ("a cat", 4, 3)]
    path = pair_rows(tmp_path, *rows)
    columns = {"prompt": [prompt for prompt, *_ in rows]}
    columns |= {name: [png(row[i]) for row in rows] for i, name in ((1, "preferred"), (2, "other"))}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")
    for given in (path, tmp_path, tmp_path / "pairs.parquet"):
        found = preferences.of_table(given)
        assert pair_levels(found) == rows and not found.left_out
        assert str(found) == f"pairs: 3 of {found.preferred.path}; left out: none"
    assert preferences.of_table(path).identities == found.identities  # of the pictures, wherever they are


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"other": None}, "row 2: other: got None, expected a path or an image's bytes"),
        ({"other": "5.png"}, "row 2: other: no file .*5.png"),
        ({"preferred": "4.png"}, "row 2: got one picture twice, expected two different pictures"),
        ({"prompt": ""}, "row 2: prompt: got '', expected a text"),
        (None, 'row 2: got no preferred, other, expected {"prompt": text, "preferred": path, "other": path}'),
    ],
)
def test_a_faulty_pair_is_named(tmp_path, line, message):
    path = pair_rows(tmp_path, ("a cat", 3, 4), ("a dog", 3, 4))
    first, second = path.read_text().splitlines()
    second = json.dumps({"prompt": "a"} if line is None else json.loads(second) | line)
    path.write_text(f"{first}\n{second}\n")
    with pytest.raises(UserError, match=f"preferences: .*preferences.jsonl:\n  {message}"):
        preferences.of_table(tmp_path)


# ---- Responses ------------------------------------------------------------------------------------------------------
def write_responses(path, *rows):
    """Lines of (prompt, left, right, response)."""
    lines = [dict(zip(("prompt", "left", "right", "response"), row, strict=True)) for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_mean_response_decides(tmp_path):
    before = write_set(tmp_path / "before", [("a", 10), ("b", 11), ("c", 12), ("d", 13), ("e", 14)])
    after = write_set(tmp_path / "after", [("c", 22), ("b", 21), ("d", 23), ("a", 20), ("f", 25)], "parquet")
    last = write_set(tmp_path / "last", [("d", 33)])
    path = write_responses(
        tmp_path / "responses.jsonl",
        ("c", "before", "after", "left slightly better"),
        ("a", "before", "after", "right slightly better"),
        ("b", "before", "after", "right slightly better"),
        ("b", "after", "before", "right slightly better"),  # a tie
        ("a", "after", "before", "left significantly better"),
        ("a", "before", "after", "left slightly better"),
        ("d", "after", "before", "right significantly better"),
        ("d", "before", "after", "right slightly better"),
        ("d", "last", "after", "left slightly better"),
    )
    given = [f"before={before}", f"after={after}", f"last={last}"]
    found = preferences.of_responses(path, preferences.sets_of(given))
    assert pair_levels(found) == [("c", 12, 22), ("a", 20, 10), ("d", 13, 23), ("d", 33, 23)]
    assert found.left_out == {"ties": 1} and found.preferred.places == ["line 1", "line 2", "line 7", "line 9"]
    assert next(found.other.images())[0] == f"pictures: {after}: row 1"


def test_the_servers_export_tells_which_pictures_of_a_prompt_it_is_about(tmp_path):
    """Three pairs of a prompt, each given to two annotators, one of whom skips some: only the digests tell."""
    prompts = ["a cat", "a dog", "a cat", "a cat"]
    tables = {
        name: write_set(tmp_path / name, [(prompt, first + i) for i, prompt in enumerate(prompts)])
        for name, first in (("before", 10), ("after", 20))
    }
    better = {11: False, 10: True, 12: False, 13: True}  # level before -> whether the later picture is
    with contextlib.closing(store.Store(tmp_path / "project", {"kind": "side_by_side", "wanted": 2})) as opened:
        pictures.add_pairs(opened, {name: pictures.find(str(place)) for name, place in tables.items()})
        for name, skipped in (("ada", 1), ("bob", 4)):
            one = opened.enter(opened.key(opened.invite(name)))
            for _ in prompts:
                item = opened.next_item(one)["item"]
                if item == skipped:
                    opened.skip(item, one, "broken", 0, 1.0)
                    continue
                side = "right" if better[9 + item] != opened.swapped(item, one.id) else "left"
                opened.answer(item, one, {"response": f"{side} slightly better"}, 0, 1.0)
        export.export(opened, tmp_path / "out")
    path = tmp_path / "out" / "responses.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 6 and len({line["left"] for line in lines}) == 2
    assert sum(map(len, side_by_side.read_responses(path, ["before", "after"])["after"])) == 12
    sets = {name: ImageTable(place) for name, place in tables.items()}
    found = preferences.of_responses(path, sets)
    expected = [("a cat", 20, 10), ("a dog", 11, 21), ("a cat", 12, 22), ("a cat", 23, 13)]
    assert sorted(pair_levels(found)) == sorted(expected)

    shuffled = write_set(tmp_path / "shuffled", [("a cat", 23), ("a cat", 20), ("a dog", 21), ("a cat", 22)])
    assert sorted(pair_levels(preferences.of_responses(path, sets | {"after": ImageTable(shuffled)}))) == sorted(expected)
    changed = write_set(tmp_path / "changed", [(prompt, 30 + i) for i, prompt in enumerate(prompts)])
    with pytest.raises(UserError, match=r"line 1: got the digest '\w{32}', expected that of a picture in after"):
        preferences.of_responses(path, sets | {"after": ImageTable(changed)})
    path.write_text(json.dumps({key: value for key, value in lines[0].items() if "digest" not in key}) + "\n")
    with pytest.raises(UserError, match=r"line 1: got a prompt of 3 pairs of pictures, expected one, or digests"):
        preferences.of_responses(path, sets)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", "before", "after", "right better"), r"line 2: response: got 'right better', expected one of left"),
        (("a", "old", "after", "about the same"), r"line 2: left: got 'old', expected one of .* before, after; .*NAME=DIR"),
        (("e", "before", "after", "about the same"), "line 2: prompt: got 'e', expected one of before"),
        (("same", "before", "after", "left slightly better"), r"responses.jsonl:\n  line 2: got one picture twice"),
        (("a", "after", "before", "left slightly better"), "has no pair left, expected one or more; left out: 1 ties"),
    ],
)
def test_a_faulty_response_is_named(tmp_path, row, message):
    rows = {"before": [("a", 1), ("same", 9)], "after": [("a", 2), ("same", 9)]}
    sets = {name: ImageTable(write_set(tmp_path / name, of_set)) for name, of_set in rows.items()}
    path = write_responses(tmp_path / "responses.jsonl", ("a", "before", "after", "left slightly better"), row)
    with pytest.raises(UserError, match=f"(?s){message}"):
        preferences.of_responses(path, sets)
    path.write_text("")
    with pytest.raises(UserError, match=r"responses.jsonl has no pair left, expected one or more; left out: none"):
        preferences.of_responses(path, sets)
    path.write_text(json.dumps({"prompt": "a", "left": "before", "right": "after", "response": "about the same"}) + "\n")
    line = json.loads(path.read_text()) | {"left_digest": "1"}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="line 1: got no 'right_digest'"):
        preferences.of_responses(path, sets)


@pytest.mark.parametrize("given", [["before"], ["=x"], ["before="]])
def test_sets_are_named(given):
    with pytest.raises(UserError, match=f"preferences: sets: got '{given[0]}', expected NAME=DIR"):
        preferences.sets_of(given)


def test_two_sets_of_one_name_are_refused(tmp_path):
    place = write_set(tmp_path / "before", [("a", 1)])
    with pytest.raises(UserError, match=r"got 'before=.*', expected NAME=DIR with the responses' names, each once"):
        preferences.sets_of([f"before={place}"] * 2)


# ---- Rewards --------------------------------------------------------------------------------------------------------
ROWS = [("a", 1), ("b", 2), ("a", 3), ("b", 4), ("c", 5), ("a", 6), ("d", 7), ("d", 8)]
REWARDS = np.array([0.5, 0.1, 0.9, 0.35, 0.7, 0.2, 0.4, 0.5], np.float32)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_best_of_a_prompt_is_preferred_to_its_worst(tmp_path, monkeypatch, kind):
    table = ImageTable(write_set(tmp_path / "own", ROWS, kind))
    for at_once in (256, 1):
        monkeypatch.setattr(image_table, "_PICKED_AT_ONCE", at_once)
        found = preferences.of_rewards(table, REWARDS, 0.1)  # 0.5 - 0.4 in float32 is below 0.1
        assert pair_levels(found) == [("a", 3, 6), ("b", 4, 2), ("d", 8, 7)]
    assert found.left_out == {"prompts whose rewards differ by less than 0.1": 1}
    assert found.preferred.places[0] == "row 3 and row 6"
    assert next(found.other.images())[0] == f"pictures: {table.path}: row 6"
    assert pair_levels(preferences.of_rewards(table, REWARDS, 0.3)) == [("a", 3, 6)]
    assert len(preferences.of_rewards(table, np.arange(8) // 2, 0)) == 2  # of a prompt with one picture there is none


@pytest.mark.parametrize(
    ("rewards", "margin", "message"),
    [
        (REWARDS, 0.8, "images.jsonl has no pair left, .*: 4 prompts whose rewards differ by less than 0.8"),
        (np.ones(8), 0, "has no pair left, expected one or more; left out: 4 prompts of one reward"),
        (REWARDS[1:], 0.1, r"rewards: got shape \(7,\), expected a finite number for each of 8 pictures of"),
        (REWARDS * np.nan, 0.1, "rewards: got numbers that are not finite"),
        (REWARDS, -1, "margin: got -1, expected a number of 0 or more"),
        (REWARDS, np.nan, "margin: got nan, expected a number of 0 or more"),
    ],
)
def test_rewards_that_make_no_pairs_are_refused(tmp_path, rewards, margin, message):
    with pytest.raises(UserError, match=message):
        preferences.of_rewards(ImageTable(write_set(tmp_path / "own", ROWS)), rewards, margin)


# ---- Loss -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model_folder(unpacked):
    return tiny_diffusion.write_weights(unpacked("diffusion_tiny") / "first")


@pytest.fixture(scope="module")
def held(model_folder):
    return folder.read(model_folder)


@pytest.fixture(scope="module")
def batch(micro):
    rng = np.random.default_rng(0)
    shapes = preferences.batch_shapes(micro.config, PAIRS, words=True)
    found = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {name: rng.uniform(0, 2, found[name].shape).astype(np.float32) for name in found if "words" in name}


@pytest.fixture(scope="module")
def params(micro):
    return {"unet": micro.params["unet"], "reference": jax.tree.map(lambda x: 0.9 * x, micro.params["unet"])}


@pytest.fixture(scope="module")
def gradient(micro):
    """(params, batch) -> ((loss, metrics), gradients), compiled."""
    of = jax.jit(jax.value_and_grad(preferences.make_loss(micro.config, BETA, 2.0), has_aux=True))
    return lambda params, batch: jax.device_get(of(params, batch, preferences.normalisers_of(batch), jax.random.key(1)))


def without_words(batch):
    return {name: array for name, array in batch.items() if "words" not in name}


def drawn(micro, batch):
    """What the loss draws: noised latents of both pictures, noise, timesteps; in float64 where it counts."""
    latent_key, time_key, noise_key = jax.random.split(jax.random.key(1), 3)
    shape = (PAIRS, *batch["preferred"].shape[1:3], 4)
    noise = np.asarray(jax.random.normal(noise_key, shape), np.float64)
    times = np.asarray(jax.random.randint(time_key, (PAIRS,), 0, 1000))
    draws = np.asarray(jax.random.normal(latent_key, (2 * PAIRS, *shape[1:])), np.float64)
    alpha = micro.config.schedule.alphas_cumprod[times].reshape(-1, 1, 1, 1)
    noised = []
    for i, name in enumerate(("preferred", "other")):
        moments = batch[name].astype(np.float64)
        x0 = micro.config.vae.scaling_factor * (moments[..., :4] + np.exp(moments[..., 4:] / 2) * draws[i::2])
        noised.append((np.sqrt(alpha) * x0 + np.sqrt(1 - alpha) * noise).astype(np.float32))
    return noised, noise, times


def test_the_loss_is_the_papers(micro, batch, params, gradient):
    batch = without_words(batch)
    (_, metrics), _ = gradient(params, batch)
    noised, noise, times = drawn(micro, batch)
    unet = jax.jit(lambda params, x: micro.config.modules["unet"].apply({"params": params}, x, times, batch["context"]))
    ours, theirs = (
        [np.square(np.asarray(unet(params[name], x), np.float64) - noise).mean((1, 2, 3)) for x in noised]
        for name in ("unet", "reference")
    )
    margin = -BETA * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
    assert 0.2 < np.abs(margin).max() < 10 and 0 < np.sum(margin > 0) < PAIRS
    expected = {
        "loss": np.mean(np.log1p(np.exp(-margin))),
        "accuracy": np.mean(margin > 0),
        "margin": np.mean(margin),
        "preferred_error": np.mean(ours[0]),
        "other_error": np.mean(ours[1]),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4)


def test_a_tie_counts_half(batch, params, gradient):
    """Three pairs of equal latents, without the VAE's noise, and one of different ones."""
    still = without_words(batch) | {name: batch[name].copy() for name in ("preferred", "other")}
    for name in ("preferred", "other"):
        still[name][..., 4:] = -200
    still["other"][:3] = still["preferred"][:3]
    (_, metrics), _ = gradient(params, still)
    assert metrics["accuracy"] == (0.625 if metrics["margin"] > 0 else 0.375)


def test_the_gradient_is_that_of_torch(micro, batch, params, gradient, micro_folder, torch):
    diffusers = pytest.importorskip("diffusers")
    batch = without_words(batch)
    (loss, _), grads = gradient(params, batch)
    unet = diffusers.UNet2DConditionModel.from_pretrained(micro_folder / "unet")
    reference = copy.deepcopy(unet).requires_grad_(False)
    for tensor in reference.parameters():
        tensor.mul_(0.9)
    noised, noise, times = drawn(micro, batch)
    context, times = torch.from_numpy(batch["context"]), torch.from_numpy(times.copy())

    def errors(unet, x):
        error = unet(tiny_diffusion.nchw(x), times, context).sample - tiny_diffusion.nchw(noise.astype(np.float32))
        return error.square().mean((1, 2, 3))

    preferred, other = (errors(unet, x) - errors(reference, x) for x in noised)
    theirs = -torch.nn.functional.logsigmoid(-BETA * (preferred - other)).mean()
    theirs.backward()
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-4)
    tiny_diffusion.check_gradients(micro.config, grads["unet"], unet)


def test_nothing_passes_through_the_reference(batch, params, gradient):
    _, grads = gradient(params, without_words(batch))
    assert not any(np.any(x) for x in jax.tree.leaves(grads["reference"]))
    assert all(np.any(x) for x in jax.tree.leaves(grads["unet"]))


def test_lora_is_measured_against_the_unet_below_it(micro, batch, gradient):
    rng = np.random.default_rng(1)
    unet = jax.tree.map(np.asarray, micro.params["unet"])
    shapes = nn.unbox(jax.eval_shape(lambda key: finetuning.initial_params(micro.config, 2, key), jax.random.key(0)))["lora"]
    lora = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    for two in lora.values():
        two["up"] = np.zeros_like(two["up"])
    (_, metrics), _ = gradient({"unet": unet, "lora": lora}, batch)
    np.testing.assert_allclose([metrics["loss"], metrics["margin"]], [np.log(2), 0], atol=1e-4)  # equal networks
    for two in lora.values():
        two["up"] = rng.standard_normal(two["up"].shape).astype(np.float32)
    (_, metrics), grads = gradient({"unet": unet, "lora": lora}, batch)
    assert all(np.any(x) for x in jax.tree.leaves(grads["lora"]))
    merged = jax.tree.map(np.asarray, finetuning.merged({"unet": unet, "lora": lora}, 2.0))
    (_, expected), _ = gradient({"unet": merged, "reference": unet}, batch)
    assert abs(metrics["margin"]) > 0.1
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3)


# ---- Weights of tokens ----------------------------------------------------------------------------------------------
def test_weights_scale_the_gradient_and_not_the_value():
    rng = np.random.default_rng(0)
    text = {"a": tuple(rng.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(2))}
    weights = np.array([[0, 0.5, 1], [2, 1, 0.25]], np.float32)

    def of(text, weights):
        return jax.tree.map(jnp.sin, words.weighted(text, weights))

    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), jax.jit(words.weighted)(text, weights), text))
    grads = jax.jit(jax.grad(lambda text: sum(map(jnp.sum, jax.tree.leaves(of(text, weights))))))(text)
    for found, x in zip(grads["a"], text["a"], strict=True):
        np.testing.assert_allclose(found, weights[..., None] * np.cos(x), rtol=1e-6)


def test_weights_of_tokens_change_the_gradient_of_the_loss_alone(micro, batch, params, gradient):
    (plain_loss, _), plain = gradient(params, without_words(batch))
    (loss, _), found = gradient(params, batch)
    ones, none = ({name: np.full_like(batch[name], x) for name in ("preferred_words", "other_words")} for x in (1, 0))
    (loss_of_ones, _), of_ones = gradient(params, batch | ones)
    (loss_of_none, _), of_none = gradient(params, batch | none)
    assert loss == loss_of_ones == loss_of_none
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)

    def keys(tree):
        block = tree["unet"]["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn2"]
        return np.stack([block["to_k"]["kernel"], block["to_v"]["kernel"]])

    np.testing.assert_allclose(keys(of_ones), keys(plain), atol=1e-4 * np.abs(keys(plain)).max())
    assert not keys(of_none).any() and np.abs(keys(found) / keys(plain) - 1).max() > 0.1
    loss_fn = preferences.make_loss(micro.config, BETA, 1.0)

    def error(params, batch):
        return loss_fn(params, batch, preferences.normalisers_of(batch), jax.random.key(1))[1]["preferred_error"]

    of_preferred = jax.jit(jax.grad(error))

    one_side = batch | {"preferred_words": none["preferred_words"], "other_words": ones["other_words"]}
    assert not keys(of_preferred(params, one_side)).any()
    one_side = batch | {"preferred_words": ones["preferred_words"], "other_words": none["other_words"]}
    assert keys(of_preferred(params, one_side)).any()


ODD = [
    "A photo of 2 cats, 4k!  (very) detailed...",
    "It's Zürich's\ttram-stop #3 --ar 16:9 :: <lora:x:1>",
    "don ' t  's re're  ca\u0301t \u0130 \u01c6 ½ ﬁ",
    "a\x1cb \x1f c\u00a0d\u2028e\u200bf\u3000g\x85h\x00i",
    "<|endoftext|>cat <|startoftext|> \U0001f600\u200d\U0001f600 猫。犬",
    "",
    "  ",
    "a,cat,,on(a)red..cat " * 9,
    "cats " * 75,
    "x" * 90,
]


def check_that_words_are_tokenized_alone(tokenizer):
    ids = tokenizer(ODD)
    for prompt, row in zip(ODD, ids, strict=True):
        of_words = [tokenizer([word], tokenizer.num_ids(word))[0, 1:-1] for word in words._WORD.findall(prompt)]
        expected = [i for ids_of_word in of_words for i in ids_of_word]
        assert tokenizer.num_ids(prompt) == len(expected) + 2
        assert row[1:76].tolist() == (expected + [tokenizer.eos_id] * 75)[:75] and row[76] == tokenizer.eos_id


def test_a_prompts_tokens_are_those_of_its_words(model_folder):
    check_that_words_are_tokenized_alone(clip_tokenizer.Tokenizer(model_folder / "tokenizer"))


def test_a_prompts_tokens_are_those_of_its_words_in_the_published_vocabulary(tmp_path):
    tiny_diffusion.write_published_tokenizer(tmp_path, pytest.importorskip("open_clip").SimpleTokenizer())
    check_that_words_are_tokenized_alone(clip_tokenizer.Tokenizer(tmp_path))


def test_tokens_of_misaligned_words_have_other_weights(held):
    """With three merges, "cat" is one token, "red" two ("re", "d"), "on" two; a mark is one."""
    prompts = ["a red cat on red", "a cat,on a cat!", "red " * 40]
    sequences = ["a red cat on red_0", "a cat on_0 a cat", keywords.label_prompt(["red"] * 40, [1] * 37 + [0] * 3)]
    found = words.token_weights(held.tokenizer, prompts, sequences, 0.75, 1)
    expected = np.ones((3, 77), np.float32)
    expected[0, 7:9] = 0.25  # start a re d cat o n RE D
    expected[1, 2:6] = 0.25  # start a CAT , O N a cat !
    expected[2, 75] = 0.25  # the 38th begins there and is cut; 76 is the end
    np.testing.assert_array_equal(found, expected)
    assert held.tokenizer.num_ids(prompts[0]) == 10 and held.tokenizer(prompts)[2, 76] == held.tokenizer.eos_id
    avoided = words.token_weights(held.tokenizer, prompts, sequences, 0.75, -1)
    np.testing.assert_array_equal(avoided, np.where(expected < 1, np.float32(1.75), 1))
    unsaid = words.token_weights(held.tokenizer, prompts, ["a dog_0", "", "green_0"], 1, 1, 20)
    np.testing.assert_array_equal(unsaid, np.ones((3, 20)))


@pytest.mark.parametrize(
    ("sequences", "strength", "sign", "message"),
    [
        (None, 1, 1, "words: got none for 1 prompts, expected one each; take a critic with keywords"),
        ([], 1, 1, "words: got 0 for 1 prompts"),
        (["a"], 1.5, 1, r"words: got strength 1.5 and sign 1, expected one in \[0, 1\], and 1 or -1"),
        (["a"], 1, 0, "words: got strength 1 and sign 0"),
    ],
)
def test_faulty_weights_of_tokens_are_refused(held, sequences, strength, sign, message):
    with pytest.raises(UserError, match=message):
        words.token_weights(held.tokenizer, ["a"], sequences, strength, sign)


# ---- With the inputs of training ------------------------------------------------------------------------------------
def test_the_frozen_parts_read_both_sides(held, tmp_path):
    rows = [("a cat", 30, 40), ("a red cat", 90, 30)]
    pairs = preferences.of_table(pair_rows(tmp_path, *rows))
    config = experiments.load("sd_reward")
    tables = {"preferred": pairs.preferred, "other": pairs.other}
    data = inputs.Inputs(config, held, tables, ["a cat", "a red cat", ""], dict(pairs.identities))
    mesh = partitioning.make_mesh()
    found = {name: data.moments(name, tmp_path / "cache", mesh) for name in tables}
    assert found["preferred"].shape == (2, 8, 8, 8)
    np.testing.assert_array_equal(found["preferred"][0], found["other"][1])  # one picture
    assert np.abs(found["preferred"][1] - found["other"][0]).max() > 1e-3
    assert data.rows("other", found["other"], np.ones(2, np.float32)).text.tolist() == [0, 1]


def test_a_dropped_prompt_has_no_misaligned_words(held, tmp_path):
    """"cat" is misaligned in every picture; half of the batch learns without a prompt."""

    def predict(images, prompts):
        return types.SimpleNamespace(labelled_prompts=[prompt.replace("cat", "cat_0") for prompt in prompts])

    pairs = preferences.of_table(pair_rows(tmp_path, ("a cat", 30, 40), ("a red cat", 90, 30)))
    tables = {"preferred": pairs.preferred, "other": pairs.other}
    identities = {**pairs.identities, "model": ""}
    data = inputs.Inputs(experiments.load("sd_reward"), held, tables, ["a cat", "a red cat", ""], identities)
    config = experiments.load("sd_online")
    config.train.update(batch_size=8, text_dropout=0.5)
    config.dense.words = 0.75
    critic = types.SimpleNamespace(predict=predict, vocabulary=types.SimpleNamespace(written=str), identity="odd")
    training = types.SimpleNamespace(mesh=partitioning.make_mesh(), own_rows=np.arange(8))
    contexts = np.arange(3, dtype=np.float32)
    for _ in range(2):  # the second time, from the cache
        of = config, data, contexts, ["a cat", "a red cat"], critic, tmp_path / "cache", training
        batch = next(preferences.batches_from(*of)(0))
        dropped = batch["context"] == 2
        assert 0 < dropped.sum() < 8
        for name, weight in (("preferred_words", 0.25), ("other_words", 1.75)):
            assert (batch[name][dropped] == 1).all()
            assert [sorted(set(row)) for row in batch[name][~dropped]] == [sorted({1, weight})] * np.sum(~dropped)
        critic.predict = None
