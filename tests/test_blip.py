"""ImageReward: its sizes, what its text tower reads, its conversion. test_preference.py compares it with the original."""

import dataclasses
import json

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_preference

from rahf import readers
from rahf.models.blip import BLIPTextConfig, ImageReward, ImageRewardConfig
from rahf.models.parameters import param_shapes
from rahf.models.vit import ViTConfig
from richhf_data import checked
from richhf_data.errors import UserError

TINY = ImageRewardConfig(
    vision=ViTConfig(patch_size=8, width=8, depth=1, num_heads=2, mlp_dim=12, class_token=True, gelu="erf"),
    text=BLIPTextConfig(vocab_size=20, width=12, depth=2, num_heads=2, mlp_dim=16, positions=10, length=7),
    image_size=16,
    hidden=(6, 5),
)


@pytest.fixture(scope="module")
def tiny():
    """(a function of image, ids, mask; the inputs)."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 20, (2, 7)).astype(np.int32)
    inputs = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32), ids, np.arange(7)[None] < np.array([[7], [4]])
    shapes = param_shapes(ImageReward(TINY).init, *inputs)
    flat = {name: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return jax.jit(lambda *inputs: ImageReward(TINY).apply({"params": params}, *inputs)), inputs


def source(unpacked):
    return tiny_preference.write(unpacked("preference_tiny"), "image_reward")


def test_the_published_model_has_its_parameters():
    """ViT-L/16 of 303,301,632, BERT base with cross-attention to 1024 channels, and the head, as in the published file."""
    config = ImageRewardConfig()
    config = dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, depth=1), text=dataclasses.replace(config.text, depth=1)
    )
    ids = np.zeros((1, 35), np.int32)
    shapes = param_shapes(ImageReward(config).init, np.zeros((1, 224, 224, 3), np.float32), ids, ids > 0)

    def count(start, but="block_0"):
        sizes = {name: int(np.prod(leaf.shape)) for name, leaf in shapes.items() if name.startswith(start)}
        one = sum(size for name, size in sizes.items() if but in name)
        return sum(sizes.values()) - one, one

    vision, block = count("vision/", "encoderblock_0")
    assert vision + 24 * block == 303_301_632
    text, block = count("text/")
    # BERT base without a pooler and token types, two ids more, and in each layer a second attention.
    second = 2 * (768 * 768 + 768) + 2 * (1024 * 768 + 768) + 2 * 768
    assert text + 12 * block == 30524 * 768 + 512 * 768 + 2 * 768 + 12 * (7_087_872 + second)
    assert count("head/", "layer_0") == (1024 * 128 + 128 + 128 * 64 + 64 + 64 * 16 + 16 + 16 + 1, 768 * 1024 + 1024)


def test_padding_changes_nothing_and_the_picture_does(tiny):
    score, (image, ids, mask) = tiny
    others = np.where(mask, ids, 0)
    np.testing.assert_allclose(score(image, others, mask), score(image, ids, mask), atol=1e-6)
    others = ids.copy()
    others[1, 3] += 1
    assert np.abs(score(image, others, mask) - score(image, ids, mask))[1] > 1e-4
    assert np.abs(score(image[::-1], ids, mask) - score(image, ids, mask)).min() > 1e-4


def test_every_token_of_a_text_reads_every_other(tiny):
    """No causal mask: the first token, which is scored, depends on the last."""
    score, (image, ids, mask) = tiny
    others = ids.copy()
    others[0, 6] = others[0, 6] % 19 + 1
    assert np.abs(score(image, others, mask) - score(image, ids, mask))[0] > 1e-4


def test_ids_outside_of_the_vocabulary_give_nan_and_wrong_pictures_are_named(tiny):
    score, (image, ids, mask) = tiny
    others = ids.copy()
    others[0, 1] = 20
    assert np.isnan(score(image, others, mask)).tolist() == [True, False]
    with pytest.raises(UserError, match=r"image: got shape \(2, 8, 16, 3\), expected \[B, 16, 16, 3\] \(image_reward"):
        score(image[:, :8], ids, mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BLIPTextConfig(width=10), r"image_reward.text.width: got 10, expected a multiple of num_heads = 12"),
        (lambda: BLIPTextConfig(positions=30), r"image_reward.text.length: got 35, expected at most positions = 30"),
        (lambda: ImageRewardConfig(image_size=100), r"image_reward.image_size: got 100, .* of patch_size = 16"),
    ],
)
def test_configs_name_a_wrong_value(make, message):
    with pytest.raises(UserError, match=message):
        make()


# ---- Conversion -----------------------------------------------------------------------------------------------------
def test_the_sizes_are_read_from_the_tensors(unpacked):
    found = checked.conform(
        ImageRewardConfig, json.loads(json.dumps(readers.clip.image_reward(source(unpacked)).config["image_reward"]))
    )
    vision, text = tiny_preference.BLIP_VISION, tiny_preference.BLIP_TEXT
    assert (found.vision.width, found.vision.num_heads, found.vision.depth) == (vision["hidden_size"], 1, 1)
    assert (found.text.width, found.text.num_heads, found.text.positions) == (text["hidden_size"], 2, 48)
    assert found.text.depth == 2
    assert (found.image_size, found.vision.epsilon, found.text.epsilon) == (24, 1e-6, 1e-12)
    assert found.hidden == (20, 12, 8, 6)


UNUSED = ("blip.vision_proj.weight", "blip.text_proj.bias", "blip.text_encoder.embeddings.position_ids", "blip.temp")
UNUSED += ("blip.text_encoder_m.encoder.layer.0.output.dense.weight", "blip.image_queue", "blip.queue_ptr")
UNUSED += ("blip.text_decoder.bert.embeddings.position_ids", "blip.itm_head.weight", "blip.visual_encoder_m.cls_token")


def test_parts_that_no_score_reads_are_left_out_and_others_are_named(unpacked, tmp_path):
    tensors = safetensors.numpy.load_file(source(unpacked))
    extra = {name: np.ones((1, 2), np.float32) for name in UNUSED}
    safetensors.numpy.save_file(tensors | extra, tmp_path / "ImageReward.safetensors")
    assert set(readers.clip.image_reward(tmp_path / "ImageReward.safetensors").tensors) == set(
        readers.clip.image_reward(source(unpacked)).tensors
    )
    safetensors.numpy.save_file(tensors | {"blip.more": np.ones(1, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"blip.more \(1,\): no parameter of ours takes it"):
        readers.clip.image_reward(tmp_path / "a.safetensors")
    tensors.pop("mlp.layers.6.weight")
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"ImageReward .*a.safetensors: lacks \['mlp.layers.6.weight'\]"):
        readers.clip.image_reward(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"no file .*ImageReward.pt"):
        readers.clip.image_reward(tmp_path)
