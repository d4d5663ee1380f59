"""ViT: parity with big_vision and with AugReg files, options, errors."""

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest

from rahf import readers, weights
from rahf.models.attention import softmax
from rahf.models.vit import ViT, ViTConfig

TINY = {"patch_size": 8, "width": 24, "depth": 2, "num_heads": 4, "mlp_dim": 40}


def load(unpacked, name):
    """(config, parameters, golden image and output) of a fixture."""
    converted = readers.encoders.vit_npz(unpacked(name) / "vit_tiny_p8.npz")
    params = flax.traverse_util.unflatten_dict(dict(weights.read_all(converted.tensors)), sep="/")
    golden = np.load(unpacked(name) / "golden.npz")
    return ViTConfig(**converted.config["vit"]), params, golden["image"], golden["encoded"]


@pytest.mark.parametrize("name", ["vit_bigvision_tiny", "vit_bigvision_scan_tiny", "vit_augreg_tiny"])
def test_vit_equals_the_original(unpacked, name):
    config, params, image, encoded = load(unpacked, name)
    assert config == ViTConfig(**TINY, class_token=name == "vit_augreg_tiny")
    made = nn.unbox(jax.eval_shape(ViT(config).init, jax.random.key(0), image))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, made)
    tokens = jax.jit(ViT(config).apply)({"params": params}, image)  # [B, P (+ 1), D]
    assert tokens.shape == (2, 16 + config.class_token, 24)
    np.testing.assert_allclose(tokens, encoded, atol=1e-5, rtol=0)


def test_vit_remat_changes_no_gradient(unpacked):
    _, params, image, _ = load(unpacked, "vit_bigvision_tiny")

    def gradient(remat):
        module = ViT(ViTConfig(**TINY, remat=remat))
        loss = jax.jit(jax.grad(lambda params: (module.apply({"params": params}, image, train=True) ** 2).sum()))
        return loss(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), gradient(True), gradient(False))


@pytest.mark.parametrize("common", [0, 20])  # to a row's cotangents: without effect
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_softmax_and_its_gradient_are_those_of_jax(dtype, tolerance, common):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 64)).astype(np.float32)
    cotangent = (common + rng.normal(size=logits.shape)).astype(dtype)

    def value_and_gradient(f):
        value, pull_back = jax.vjp(f, logits)
        return np.asarray(value, np.float32), *pull_back(cotangent)

    found = value_and_gradient(lambda x: softmax(x, dtype))
    wanted = value_and_gradient(lambda x: jax.nn.softmax(x).astype(dtype))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def test_vit_dropout_acts_in_training_alone(unpacked):
    _, params, image, encoded = load(unpacked, "vit_bigvision_tiny")
    module = ViT(ViTConfig(**TINY, dropout=0.5))
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, image), encoded, atol=1e-5, rtol=0)
    rngs = {"dropout": jax.random.key(0)}
    dropped = jax.jit(lambda: module.apply({"params": params}, image, train=True, rngs=rngs))()
    assert np.abs(dropped - encoded).max() > 0.1


@pytest.mark.parametrize("blocks", [0, 2])
def test_the_stem_embeds_patches_of_patches(blocks):
    module = ViT(ViTConfig(**TINY, stem_patch=4, stem_width=6, stem_blocks=blocks))
    image = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), image))["params"]
    assert params["stem"]["kernel"].shape == (4, 4, 3, 6)
    assert params["embedding"]["kernel"].shape == (2, 2, 6, 24)

    def conv(x, name, size, padding="VALID"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        x = jax.lax.conv_general_dilated(x, kernel, size, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return np.asarray(x) + np.asarray(bias)

    def activated(x):
        return jax.nn.gelu((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6))

    features = activated(conv(image, "stem", (4, 4)))
    for i in range(blocks):
        features += activated(conv(features, f"stem_conv_{i}", (1, 1), "SAME"))
    tokens = conv(features, "embedding", (2, 2)).reshape(2, 6, 24)
    plain = ViT(ViTConfig(**TINY))
    without = {name: value for name, value in params.items() if not name.startswith("stem")}
    without["embedding"] = {"kernel": np.zeros((8, 8, 3, 24), np.float32), "bias": np.zeros(24, np.float32)}
    without["pos_embedding"] = params["pos_embedding"] + tokens[:1]  # of the first image
    expected = plain.apply({"params": without}, image[:1])
    np.testing.assert_allclose(module.apply({"params": params}, image)[:1], expected, atol=1e-5, rtol=1e-5)


def test_a_stem_that_does_not_divide_the_patch_is_refused():
    with pytest.raises(ValueError, match=r"vit.stem_patch: got 5, expected a divisor of patch_size = 8"):
        ViTConfig(**TINY, stem_patch=5)
    with pytest.raises(ValueError, match=r"vit.stem_blocks: got 1, expected 0 without a stem"):
        ViTConfig(**TINY, stem_blocks=1)


def test_vit_base_has_the_published_number_of_parameters():
    def count(config):
        image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
        made = nn.unbox(jax.eval_shape(ViT(config).init, jax.random.key(0), image))
        return sum(leaf.size for leaf in jax.tree.leaves(made))

    assert count(ViTConfig(class_token=True)) == 85_798_656  # ViT-B/16 at 224 without its classifier
    assert count(ViTConfig()) == 85_798_656 - 2 * 768  # no class token and no position for it


def test_vit_names_a_wrong_size():
    with pytest.raises(ValueError, match=r"got 30x32 pixels, expected multiples of vit.patch_size = 8"):
        ViT(ViTConfig(**TINY)).init(jax.random.key(0), np.zeros((1, 30, 32, 3), np.float32))
    with pytest.raises(ValueError, match=r"expected a multiple of vit.num_heads"):
        ViTConfig(width=10, num_heads=4)
