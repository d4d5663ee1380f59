"""The measured loop's pictures, captions, judge, tokeniser, CLIP, VAE and starting folder."""

import collections
import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from benchmarks.alignment import drawings, foundation, judge
from benchmarks.alignment.optimise import optimise
from rahf.diffusion import folder as diffusers
from rahf.diffusion.unet import UNetConfig
from rahf.diffusion.vae import VAEConfig
from rahf.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rahf.reward import embed, prompts
from richhf_data import clip_tokenizer
from richhf_data.synthetic import render

WORDS = prompts.Words(("one", "three"), ("red", "green"), ("car", "butterfly/butterflies"), ("in the snow", "on the moon"))
ANY = prompts.ParsedPrompt(None, None, None, None)


def tiny_clip(vocab_size, size):
    vision = CLIPVisionConfig(image_size=size, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=16)
    text = CLIPTextConfig(vocab_size, width=16, depth=1, num_heads=2, mlp_dim=16, length=12, eos_id=vocab_size - 1)
    return CLIPConfig(vision, text, projection_dim=8)


def tiny_unet(vae, clip, size):
    types = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    options = dict(block_out_channels=(8,), layers_per_block=1, attention_head_dim=(2,), norm_num_groups=4)
    return UNetConfig(size // vae.factor, cross_attention_dim=clip.text.width, **types, **options)


# ---- Pictures -------------------------------------------------------------------------------------------------------
def test_draw_shows_what_the_prompt_says(monkeypatch):
    planned, original = [], render.render
    monkeypatch.setattr(render, "render", lambda picture, size: planned.append(picture) or original(picture, size))
    for i, prompt in enumerate(drawings.WORDS.draw(200, seed=0)):
        image, shown = drawings.draw(prompt, i)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert all(getattr(prompt, name) in (None, getattr(shown, name)) for name in prompts.CATEGORIES)
        picture = planned.pop()
        things = [(item.thing, item.colour) for item in picture.objects]
        assert len(things) == ("one", "two", "three", "four").index(shown.count) + 1
        assert set(things) == {(shown.thing.partition("/")[0], shown.colour)}
        assert shown.background.endswith(picture.background)
        assert not picture.wrong and not picture.artifacts


def test_draw_paints_the_colour_and_the_background():
    means = {}
    for colour in ("red", "green"):
        for background in ("in the snow", "on the moon"):
            image, _ = drawings.draw(prompts.ParsedPrompt("one", colour, "house", background), 0)
            middle, border = image[12:24, 12:20].mean(axis=(0, 1)), image[:, :2].mean()
            means[colour, background] = middle[0] - middle[1], border
    assert all(means["red", place][0] > 20 > -20 > means["green", place][0] for place in ("in the snow", "on the moon"))
    assert all(means[colour, "in the snow"][1] > means[colour, "on the moon"][1] + 80 for colour in ("red", "green"))


def test_draw_leaves_the_rest_to_the_seed():
    prompt = prompts.ParsedPrompt(None, None, "cup", None)
    drawn = [drawings.draw(prompt, (5, i)) for i in range(80)]
    again, shown = drawings.draw(prompt, (5, 7))
    assert shown == drawn[7][1] and np.array_equal(again, drawn[7][0])
    for name in ("count", "colour", "background"):
        assert {getattr(shown, name) for _, shown in drawn} == set(getattr(drawings.WORDS, name))
    assert {shown.thing for _, shown in drawn} == {"cup"}


def test_captions_are_wrong_at_the_stated_rate():
    words, wrong, said, kinds = drawings.WORDS, collections.Counter(), collections.Counter(), collections.Counter()
    for i in range(7000):
        shown = prompts.ParsedPrompt(*(getattr(words, name)[i % 4] for name in prompts.CATEGORIES))
        prompt = drawings.caption(shown, drawings.KINDS[i % 7], 0.15, (0, i))
        kinds[prompts.kind(prompt)] += 1
        for name in prompts.CATEGORIES:
            if (word := getattr(prompt, name)) is not None:
                said[name] += 1
                wrong[name] += word != getattr(shown, name)
    assert set(kinds.values()) == {1000} and len(kinds) == 7
    for name in prompts.CATEGORIES:
        assert wrong[name] / said[name] == pytest.approx(0.15, abs=0.02)  # three deviations and more


def test_captioned_rows_depend_on_the_seed_and_their_number_alone(tmp_path):
    table = drawings.captioned(30, 3, 0.5, workers=0)
    longer = drawings.captioned(60, 3, 0.5, workers=2)
    assert table.equals(longer.slice(0, 30))
    assert table["image"] != drawings.captioned(30, 4, 0.5, workers=0)["image"]
    drawings.write(table, tmp_path / "pictures.parquet")
    assert drawings.read(tmp_path / "pictures.parquet").equals(table)
    image, shown = drawings.draw(ANY, (3, 11))
    assert np.array_equal(drawings.images(table)[11], image)
    assert table["shown"][11].as_py() == prompts.text(shown)
    assert all(drawings.WORDS.parse(text) for name in ("prompt", "shown") for text in table[name].to_pylist())


def test_split_prompts_parts_all_of_them():
    training, held_out = drawings.split_prompts(0.2)
    assert sorted(map(prompts.text, training + held_out)) == sorted(map(prompts.text, drawings.WORDS.all()))
    assert len(held_out) / len(training + held_out) == pytest.approx(0.2, abs=0.03)
    assert {prompts.kind(prompt) for prompt in training} == {prompts.kind(prompt) for prompt in held_out}
    fewer = dataclasses.replace(drawings.WORDS, count=("one",))
    assert set(drawings.split_prompts(0.2, fewer)[1]) <= set(held_out)


# ---- Judge ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fitted(tmp_path_factory, standard_promotion):
    folder = tmp_path_factory.mktemp("judge")
    options = dict(number=400, steps=60, words=WORDS, held_out=100, workers=0, size=16, widths=(16,))
    return folder, judge.fit(folder, **options)


def test_judge_learns_far_above_chance(fitted):
    folder, accuracy = fitted
    table = drawings.captioned(100, 11, 0.0, WORDS, 16, workers=0)  # the pictures that fit measured with
    images, shown = drawings.images(table), table["shown"].to_pylist()
    assert all(accuracy[name] > 0.8 for name in prompts.CATEGORIES), accuracy  # chance: 0.5
    assert judge.accuracy(judge.load(folder), images, shown) == accuracy


def test_judge_says_nothing_of_what_is_not_asked_and_all_only_if_all_is_right(fitted):
    loaded = judge.load(fitted[0])
    images = [drawings.draw(ANY, i, WORDS, 16)[0] for i in range(3)]
    seen = loaded.facts(images)
    other = WORDS.colour[1 - WORDS.colour.index(seen[1].colour)]
    asked = [seen[0], seen[1]._replace(colour=other, count=None), seen[2]._replace(background=None)]
    verdict = loaded(images, [prompts.text(prompt) for prompt in asked])
    expected = {"count": [1, np.nan, 1], "colour": [1, 0, 1], "thing": [1, 1, 1], "background": [1, 1, np.nan]}
    assert verdict.keys() == {*prompts.CATEGORIES, "all"}
    for name, values in (expected | {"all": [1, 0, 1]}).items():
        np.testing.assert_array_equal(verdict[name], np.array(values, np.float32))
    features = loaded.features(images)
    assert features.shape == (3, 128) and features.dtype == np.float32
    np.testing.assert_allclose(loaded.features(images[1:2]), features[1:2], rtol=1e-5, atol=1e-5)


def test_judge_names_wrong_input(fitted, tmp_path):
    loaded = judge.load(fitted[0])
    image = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="got the prompt 'a blue car', expected one made of"):
        loaded(image, ["a blue car"])
    with pytest.raises(ValueError, match="got 1 images and 2 prompts"):
        loaded(image, ["a red car", "a red car"])
    with pytest.raises(ValueError, match=r"expected a folder that judge\.fit wrote"):
        judge.load(tmp_path)


# ---- Tokeniser, CLIP, VAE, folder -----------------------------------------------------------------------------------
def test_tokenizer_makes_one_id_of_every_word_and_gives_the_text_back(tmp_path):
    size = foundation.write_tokenizer(tmp_path)
    tokenizer, texts = clip_tokenizer.Tokenizer(tmp_path), [prompts.text(prompt) for prompt in drawings.WORDS.all()]
    assert [tokenizer.num_ids(text) for text in texts] == [len(text.split()) + 2 for text in texts]
    assert max(map(tokenizer.num_ids, texts)) <= foundation.TEXT_LENGTH
    ids = tokenizer(texts, foundation.TEXT_LENGTH)
    assert ids.max() == tokenizer.eos_id == size - 1 and set(ids[:, 0]) == {size - 2}
    decoded = tokenizer._tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [text.strip() for text in decoded] == texts
    assert tokenizer(["a zébra"], 20).min() >= 0  # bytes of other words


def test_foundation_folders_are_read_and_hold_what_was_trained(tmp_path, standard_promotion):
    table = drawings.captioned(32, 0, size=16, workers=0)
    images, texts = drawings.images(table), table["prompt"].to_pylist()
    foundation.fit_clip(tmp_path / "clip", images, texts, config=tiny_clip, steps=2, batch_size=8)
    clip = embed.Clip(tmp_path / "clip")
    assert clip.images(images[:2]).shape == clip.texts(texts[:2]).shape == (2, 8)

    small = VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    vae = foundation.fit_vae(images, config=small, steps=2, batch_size=8)
    decoded = foundation.reconstruct(*vae, images[:3])
    assert decoded.shape == (3, 16, 16, 3) and decoded.dtype == np.uint8
    foundation.start(tmp_path / "start", tmp_path / "clip", vae, unet=tiny_unet)
    model = diffusers.read(tmp_path / "start")
    assert model.config.vae == vae[0] != small
    assert model.config.text.text == clip.config.text
    assert model.config.unet == tiny_unet(vae[0], clip.config, 16)
    jax.tree.map(np.testing.assert_array_equal, model.params["vae"], vae[1])
    jax.tree.map(np.testing.assert_array_equal, model.params["text_encoder"]["text"], clip.params["text"])
    np.testing.assert_array_equal(model.text_ids(texts[:4]), clip.tokenizer(texts[:4], foundation.TEXT_LENGTH))
    encode = jax.jit(functools.partial(diffusers.VAE(model.config.vae).apply, method="encode_latents"))
    latents = encode({"params": model.params["vae"]}, images)
    assert np.std(latents) == pytest.approx(1, rel=1e-3)


def test_default_unet_fits_the_default_vae_and_clip():
    unet = foundation.unet_config(foundation.VAE_CONFIG, foundation.clip_config(600))
    config = diffusers.Config(unet, foundation.VAE_CONFIG, foundation.clip_config(600))
    shapes = nn.unbox(jax.eval_shape(functools.partial(diffusers.init, config), jax.random.key(0)))
    assert unet.sample_size == 8
    assert 3e6 < sum(leaf.size for leaf in jax.tree.leaves(shapes["unet"])) < 5e6


# ---- The training loop ----------------------------------------------------------------------------------------------
def regression(steps, seed=0):
    rng = np.random.default_rng(0)
    x, wanted = rng.standard_normal((64, 4)).astype(np.float32), np.float32([[1], [-2], [3], [0]])

    def loss(params, batch, key):
        value = jax.numpy.mean((batch["x"] @ params["kernel"] - batch["y"]) ** 2)
        return value, {"loss": value}

    start = {"kernel": np.zeros((4, 1), np.float32)}
    options = dict(steps=steps, batch_size=16, learning_rate=0.5, seed=seed, name="test")
    return np.asarray(optimise(loss, start, {"x": x, "y": x @ wanted}, **options)["kernel"]), wanted


def test_optimise_learns_and_gives_the_same_twice(standard_promotion):
    found, wanted = regression(120)
    np.testing.assert_allclose(found, wanted, atol=0.05)
    np.testing.assert_array_equal(regression(120)[0], found)
    assert not np.array_equal(regression(120, seed=1)[0], found)


def test_optimise_names_a_loss_that_is_not_finite_and_too_few_rows(standard_promotion):
    start, options = {"kernel": np.ones((2, 2), np.float32)}, dict(steps=3, batch_size=2, learning_rate=1.0, seed=0)

    def loss(params, batch, key):
        value = jax.numpy.log(-jax.numpy.sum(params["kernel"] ** 2) * batch["x"].sum())
        return value, {"loss": value}

    with pytest.raises(ValueError, match="test: the loss is not finite at step 0"):
        optimise(loss, start, {"x": np.ones(4, np.float32)}, **options, name="test")
    with pytest.raises(ValueError, match="test: got 1 rows, expected at least a batch of 2"):
        optimise(loss, start, {"x": np.ones(1, np.float32)}, **options, name="test")
