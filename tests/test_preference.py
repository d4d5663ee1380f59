"""The published preference scores: equal to the originals' golden outputs, as rewards, and what they refuse."""

import functools
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import tiny_clip
import tiny_diffusion
import tiny_preference
from tiny_preference import PROMPTS, SIZE

from rahf import convert, experiments
from rahf.diffusion import finetuning, folder, guide, inputs, sample
from rahf.reward import bert_tokenizer, framing, preference, specs
from rahf.reward.differentiable import Differentiable
from richhf_data import clip_tokenizer
from richhf_data.errors import UserError

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax promotes freely
SPECS = {  # name -> spec without its folder, key of the golden outputs
    "open_clip": ("hpsv2", "hpsv2"),
    "clip": ("pickscore", "pickscore"),
    "mlp": ("aesthetic", "aesthetic"),
    "linear": ("aesthetic", "aesthetic"),
    "image_reward": ("imagereward", "imagereward"),
}
REWARDS = ("open_clip", "clip", "mlp", "image_reward")  # one of each kind
SOURCES = {"open_clip": "open-clip", "clip": "clip-hf", "image_reward": "image-reward"}


@pytest.fixture(scope="module")
def golden(unpacked):
    """name -> what the originals computed."""
    return lambda name: dict(np.load(unpacked("preference_tiny") / name / "golden.npz"))


@pytest.fixture(scope="module")
def converted(unpacked, tmp_path_factory):
    """name of `tiny_preference.MODELS` -> folder of rahf.convert."""

    @functools.cache
    def convert_one(name) -> pathlib.Path:
        output = tmp_path_factory.mktemp(name)
        source = tiny_preference.write(unpacked("preference_tiny"), name)
        options = {} if name in SOURCES else {"clip": convert_one("clip")}
        convert.convert(SOURCES.get(name, "aesthetic"), source, output, **options)
        return output

    return convert_one


@pytest.fixture(scope="module")
def reward(converted):
    """name -> its reward."""
    return functools.cache(lambda name: specs.reward_of(f"{SPECS[name][0]}:{converted(name)}"))


# ---- Parity ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SPECS)
def test_a_score_is_the_originals(name, reward, golden):
    """From pictures of odd sizes and prompts, too long ones among them, to the number."""
    expected = golden(name)[SPECS[name][1]]
    found = specs.checked(reward(name), tiny_preference.pictures(), PROMPTS)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=0)


def test_the_golden_outputs_are_the_originals(golden, torch, tmp_path):
    for package in ("open_clip", "torchvision"):
        pytest.importorskip(package)
    for name, (_, outputs) in tiny_preference.originals(tmp_path).items():
        for key, values in outputs.items():
            np.testing.assert_allclose(values, golden(name)[key], atol=2e-5, rtol=0, err_msg=f"{name} {key}")


def test_berts_ids_are_the_originals(converted, golden):
    tokenizer = bert_tokenizer.Tokenizer(converted("image_reward"), len(tiny_preference.WORDS) + 2)
    ids, mask = tokenizer(PROMPTS, 35)
    np.testing.assert_array_equal(ids, golden("image_reward")["ids"])
    np.testing.assert_array_equal(mask, ids != 0)
    assert tokenizer(["red [ENC]"], 6)[0].tolist() == [[2, 6, 12, 3, 0, 0]]


def test_clips_ids_are_open_clips(tmp_path):
    """With the vocabulary of the published models."""
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.SimpleTokenizer()
    tiny_diffusion.write_published_tokenizer(tmp_path, theirs)
    texts = ["A photo of 2 cats, 4k!  (very) detailed...", "It's Zürich's\ttram-stop #3", "", "words " * 200]
    ids = clip_tokenizer.Tokenizer(tmp_path)(texts)
    for ours, expected in zip(ids, theirs(texts).numpy(), strict=True):
        end = int(np.argmax(expected == 49407))
        assert ours[: end + 1].tolist() == expected[: end + 1].tolist()


# ---- Pixels ---------------------------------------------------------------------------------------------------------
SHAPES = [(31, 46), (67, 29), (24, 24), (13, 17), (500, 24), (25, 32), (1, 30)]


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def test_padded_pixels_are_hpsv2s(golden):
    expected = golden("open_clip")["hpsv2_pixels"] * 255
    for picture, pixels in zip(tiny_preference.pictures(), expected, strict=True):
        found = framing.prepare(picture, SIZE, "padded")
        np.testing.assert_allclose((found + 1) * 127.5, pixels, atol=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_middle_is_torchvisions(shape):
    """Resize to the shorter side, then CenterCrop, which rounds half of the rest to even."""
    height, width = shape
    scaled = [max(SIZE, int(SIZE * side / min(shape))) for side in (width, height)]
    left, top = (round((side - SIZE) / 2) for side in scaled)
    picture = PIL.Image.fromarray(noise(*shape)).resize(scaled, PIL.Image.Resampling.BICUBIC)
    expected = np.asarray(picture)[top : top + SIZE, left : left + SIZE]
    np.testing.assert_array_equal(framing.prepare(noise(height, width), SIZE, "torchvision"), expected)
    transforms = pytest.importorskip("torchvision.transforms")
    steps = transforms.Resize(SIZE, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(SIZE)
    np.testing.assert_array_equal(transforms.Compose(steps)(PIL.Image.fromarray(noise(*shape))), expected)


@pytest.mark.parametrize("shape", [(31, 46), (25, 32), (24, 24), (13, 17)])
@pytest.mark.parametrize("frame", ["hugging_face", "torchvision", "padded"])
def test_framed_in_jax_is_prepared_on_the_host(frame, shape):
    picture = np.full((*shape, 3), 128, np.uint8) + (noise(*shape) // 4)
    expected = framing.prepare(picture, SIZE, frame)
    expected = expected / np.float32(127.5) - 1 if expected.dtype == np.uint8 else expected
    found = framing.framed(jax.numpy.asarray(picture[None] / np.float32(127.5) - 1), SIZE, frame)[0]
    np.testing.assert_allclose(found, expected, atol=1.01 / 127.5)  # a level: PIL rounds between its two passes
    if frame == "padded":
        np.testing.assert_allclose(found, expected, atol=1e-5)


# ---- Rewards --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", REWARDS)
def test_the_differentiable_score_is_the_reward(name, reward):
    one, pictures = reward(name), [noise(SIZE, SIZE), noise(SIZE, SIZE) // 2]
    images, rows = np.stack(pictures) / np.float32(127.5) - 1, one.differentiable.rows(PROMPTS[:2])
    found = jax.jit(one.differentiable.score)(one.differentiable.params, images, rows)
    np.testing.assert_allclose(found, one(pictures, PROMPTS[:2]), atol=1e-5)


@pytest.fixture(scope="module")
def diffusion(unpacked):
    return folder.read(tiny_diffusion.write_weights(unpacked("diffusion_tiny") / "first"))


@pytest.fixture(scope="module")
def guided(reward, diffusion):
    """(name, scale) -> pictures of one guided step. All rewards are in one program, which compiles once."""
    every = {name: reward(name).differentiable for name in REWARDS}

    def score(params, images, rows):
        found = [one.score(params["params"][name], images, rows[name]) for name, one in every.items()]
        return sum(params["chosen"][i] * one for i, one in enumerate(found))

    def rows(prompts):
        return {name: one.rows(prompts) for name, one in every.items()}

    def generate(name, scale):
        chosen = np.array([one == name for one in REWARDS], np.float32)
        params = {"params": {name: one.params for name, one in every.items()}, "chosen": chosen}
        options = {"seed": 3, "negative_prompt": "", "steps": 1, "guidance_scale": 1.0}
        guidance = guide.Guidance(Differentiable(score, params, rows), scale=scale)
        return sample.generate(diffusion, PROMPTS[:2], guide=guidance, **options)

    return generate


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_guides_a_step(name, reward, guided):
    pictures = [picture for scale in (1e-6, 1e4) for picture in guided(name, scale)]
    pictures = [np.round((picture + 1) * 127.5).astype(np.uint8) for picture in pictures]
    scores = reward(name)(pictures, PROMPTS[:2] * 2)
    assert (scores[2:] > scores[:2]).all(), scores


@pytest.fixture(scope="module")
def step(diffusion):
    """weights float32[4] -> the loss of reward-weighted fine-tuning before and after one step of gradient descent."""
    loss_of, rng = finetuning.make_loss(diffusion.config, beta=0.0, lora_alpha=1.0), np.random.default_rng(0)
    shapes = inputs.batch_shapes(diffusion.config, 4)
    batch = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    @jax.jit
    def value(params, weights):
        rows = batch | {"weight": weights, "pretraining": np.zeros(4, np.float32)}
        return loss_of(params, rows, finetuning.normalisers_of(rows), jax.random.key(1))[0]

    gradient, params = jax.jit(jax.value_and_grad(value)), {"unet": diffusion.params["unet"]}

    def run(weights):
        loss, slope = gradient(params, weights)
        return float(loss), float(gradient(jax.tree.map(lambda x, y: x - 1e-3 * y, params, slope), weights)[0])

    return run


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_weighs_a_fine_tuning_step(name, reward, step):
    config = experiments.load("sd_reward").reward
    config.update(weighting="exponential", temperature=0.1)
    rewards = specs.checked(reward(name), tiny_preference.pictures(), PROMPTS)
    before, after = step(finetuning.weights_of(rewards, config))
    assert after < before and abs(before / step(np.ones(4, np.float32))[0] - 1) > 3e-5


def test_a_reward_takes_any_number_of_pictures_and_has_an_identity(reward, converted):
    one, pictures = reward("clip"), tiny_preference.pictures()
    every = one(pictures * 9, PROMPTS * 9)  # more than one batch
    np.testing.assert_allclose(every, np.tile(one(pictures, PROMPTS), 9), atol=1e-4)
    assert one([], []).shape == (0,)
    with pytest.raises(UserError, match="reward: got 4 images and 1 prompts, expected as many"):
        one(pictures, ["a"])
    named = {name: reward(name).identity for name in SPECS}
    assert len(set(named.values())) == len(SPECS)
    assert specs.identity_of(specs.reward_of(f"clip:{converted('clip')}")) not in named.values()
    assert preference.pickscore(converted("clip")).identity == named["clip"]


def test_aesthetics_read_no_prompt(reward):
    picture = tiny_preference.pictures()[:1]
    assert reward("linear")(picture, ["red"]) == reward("linear")(picture, [""])


# ---- Refusals -------------------------------------------------------------------------------------------------------
def test_folders_of_another_kind_and_without_a_tokenizer_are_refused(converted, unpacked, tmp_path):
    for name, spec in (("clip", "aesthetic"), ("clip", "imagereward"), ("image_reward", "pickscore"), ("mlp", "hpsv2")):
        with pytest.raises(UserError, match=r"holds a \w+, expected one whose kind is"):
            specs.reward_of(f"{spec}:{converted(name)}")
    for name, spec, message in (
        ("image_reward", "imagereward", r"has neither tokenizer.json nor vocab.txt; convert it again with --vocabulary"),
        ("open_clip", "hpsv2", r"has neither tokenizer.json nor .* copies them from --vocabulary=FOLDER"),
    ):
        tiny_preference.write(unpacked("preference_tiny"), name)
        place = tmp_path / name
        place.mkdir()
        (place / "model.safetensors").write_bytes((unpacked("preference_tiny") / name / f"{name}.safetensors").read_bytes())
        if name == "open_clip":
            config = unpacked("preference_tiny") / name / "open_clip_config.json"
            (place / config.name).write_bytes(config.read_bytes())
        convert.convert(SOURCES[name], place / "model.safetensors", tmp_path / f"{name}_out")
        with pytest.raises(UserError, match=message):
            specs.reward_of(f"{spec}:{tmp_path / name}_out")
        with pytest.raises(UserError, match=r"vocabulary: .*empty has none of tokenizer.json"):
            (tmp_path / "empty").mkdir(exist_ok=True)
            convert.convert(SOURCES[name], place / "model.safetensors", tmp_path / "other", tmp_path / "empty")
        source = unpacked("preference_tiny") / name
        convert.convert(SOURCES[name], place / "model.safetensors", tmp_path / f"{name}_out", source)
        specs.reward_of(f"{spec}:{tmp_path / name}_out")


def test_a_vocabulary_of_another_size_is_refused(converted, tmp_path):
    tiny_preference.write_words(tmp_path)
    with pytest.raises(UserError, match=r"has 13 ids with \[DEC\] and \[ENC\], the weights embed 30524; expected bert-base"):
        bert_tokenizer.Tokenizer(tmp_path, 30524)


def head(tmp_path, tensors):
    safetensors.numpy.save_file(
        {name: np.ones(shape, np.float32) for name, shape in tensors.items()}, tmp_path / "a.safetensors"
    )
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": (1, 9), "bias": (1,)}, r"reads embeddings of width 9, the CLIP .* gives 10; pass the CLIP that it"),
        ({"weight": (10,), "bias": (1,)}, r"the tensor weight has shape \(10,\), expected at least 2 axes"),
        ({"layers.0.weight": (4, 10), "layers.3.weight": (1, 4)}, r"lacks .*layers.2.weight"),  # with activations between
        ({"weight": (2, 10), "bias": (2,)}, r"head/layer_0/kernel \(10, 1\): the tensor weight has shape \(2, 10\)"),
        ({"weight": (1, 10), "bias": (1,), "more": (1,)}, r"more \(1,\): no parameter of ours takes it"),
    ],
)
def test_heads_that_do_not_fit_are_refused(tensors, message, converted, tmp_path):
    with pytest.raises(UserError, match=message):
        convert.convert("aesthetic", head(tmp_path, tensors), tmp_path / "out", clip=converted("clip"))


def test_a_head_needs_a_clip_that_is_not_overwritten(converted, tmp_path):
    file, clip = head(tmp_path, {"weight": (1, 10), "bias": (1,)}), converted("clip")
    with pytest.raises(UserError, match=r"clip: got none, .*a.safetensors needs the CLIP .* pass --clip=FOLDER"):
        convert.convert("aesthetic", file, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds the input .*; choose another folder"):
        convert.convert("aesthetic", file, clip, clip=clip)
    with pytest.raises(UserError, match=r"holds a image_reward, expected one whose kind is clip"):
        convert.convert("aesthetic", file, tmp_path / "out", clip=converted("image_reward"))


def test_weights_that_are_not_finite_are_refused(converted, tmp_path):
    safetensors.numpy.save_file({"weight": np.full((1, 10), np.nan, np.float32), "bias": np.ones(1, np.float32)},
                                tmp_path / "a.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="the tensor weight holds 10 numbers of 10 that are not finite"):
        convert.convert("aesthetic", tmp_path / "a.safetensors", tmp_path / "out", clip=converted("clip"))
    written = tiny_clip.write(tmp_path / "clip")
    tensors = safetensors.numpy.load_file(written / "weights.safetensors")
    tensors["image_projection/kernel"][0] = np.nan
    safetensors.numpy.save_file(tensors, written / "weights.safetensors")
    with pytest.raises(UserError, match=r"tensor image_projection/kernel holds 12 numbers .* not finite"):
        preference.hpsv2(written)
