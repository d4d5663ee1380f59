"""Heads: the deconvolution against lax.conv_transpose, shapes, ranges, errors."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from rahf.models import heads, tpu
from rahf.models.layers import CONV_DIMENSIONS

SMALL_SCORE = heads.ScoreHeadConfig(filters=(8, 4), dense=(8, 4))
SMALL_HEATMAP = heads.HeatmapHeadConfig(filters=(8,), deconv_filters=(8, 4), output_hidden=4)


def transpose(x, kernel, style="paper"):
    return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME" if style == "paper" else ((1, 2), (1, 2)))


def value_and_gradients(f, cotangent, *arguments):
    def both(*arguments):
        value, pull_back = jax.vjp(f, *arguments)
        return value, *pull_back(cotangent)

    return jax.jit(both)(*arguments)


def of_image(f, strips):
    """What `f` computes of images in strips, of whole images: cut before, put together after."""

    def whole(x, kernel):
        cut = f(tpu.to_strips(x, strips), kernel)
        return jnp.moveaxis(tpu.from_strips(jnp.moveaxis(cut, -1, 0), strips), 0, -1)

    return whole


@pytest.mark.parametrize("style", heads.STYLES)
@pytest.mark.parametrize("strips", [1, 3])
def test_deconv2x_equals_conv_transpose(style, strips):
    rng = np.random.default_rng(0)
    shapes = (2, 5, 6, 4), (3, 3, 4, 7), (2, 10, 12, 7)
    x, kernel, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    deconv2x = of_image(lambda x, kernel: tpu.deconv2x(x, kernel, style, strips), strips)
    found = value_and_gradients(deconv2x, cotangent, x, kernel)
    wanted = value_and_gradients(lambda x, kernel: transpose(x, kernel, style), cotangent, x, kernel)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("strips", [1, 2, 6])
@pytest.mark.parametrize("columns", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_convolution_of_strips_equals_that_of_the_image(strips, columns):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 1 + sum(columns), 4, 3)).astype(np.float32)
    x, cotangent = rng.normal(size=(2, 5, 6, 4)).astype(np.float32), rng.normal(size=(2, 5, 6, 3)).astype(np.float32)

    def plain(x, kernel):
        padding = ((0, 1), columns)
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=CONV_DIMENSIONS)

    convolve = of_image(lambda x, kernel: tpu.convolve(x, kernel, strips, (0, 1), columns), strips)
    found, wanted = (value_and_gradients(f, cotangent, x, kernel) for f in (convolve, plain))
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_deconv2x_trains_without_dilation_on_cpu():
    x, kernel = jax.ShapeDtypeStruct((1, 4, 4, 6), np.float32), jax.ShapeDtypeStruct((3, 3, 6, 7), np.float32)

    def compiled(f):
        loss = jax.value_and_grad(lambda x, kernel: (f(x, kernel) ** 2).sum(), argnums=(0, 1))
        return jax.jit(loss).lower(x, kernel).compile().as_text()

    assert "lhs_dilate" in compiled(transpose) or "rhs_dilate" in compiled(transpose)
    assert "lhs_dilate" not in compiled(tpu.deconv2x) and "rhs_dilate" not in compiled(tpu.deconv2x)


class PlainHeatmapHead(nn.Module):
    """The paper's heatmap head, each layer as it is written: convolution, flax's layer norm, ReLU."""

    config: heads.HeatmapHeadConfig

    @nn.compact
    def __call__(self, x):
        def conv(x, features, path, deconv=False):
            own = self.variables["params"]
            for name in (*path, "conv"):
                own = own[name]
            x = transpose(x, own["kernel"]) if deconv else nn.Conv(features, (3, 3)).apply({"params": own}, x)
            return x + own["bias"].reshape(1, 1, 1, -1) if deconv else x

        def layer(x, features, *path, deconv=False):
            own = self.variables["params"]
            for name in (*path, "norm"):
                own = own[name]
            return nn.relu(nn.LayerNorm(epsilon=1e-6).apply({"params": own}, conv(x, features, path, deconv)))

        for i, features in enumerate(self.config.filters):
            x = layer(x, features, f"conv_{i}")
        for i, features in enumerate(self.config.deconv_filters):
            x = layer(x, features, f"up_{i}", "deconv", deconv=True)
            x = layer(x, features, f"up_{i}", "readout_0")
            x = layer(x, features, f"up_{i}", "readout_1")
        x = layer(x, self.config.output_hidden, "output_0")
        x = nn.Conv(1, (3, 3)).apply({"params": self.variables["params"]["output_1"]}, x)
        return nn.sigmoid(x[..., 0])


@pytest.mark.parametrize("strips", [1, 2, 8])  # cut at once, and from the second deconvolution on
@pytest.mark.usefixtures("standard_promotion")  # flax's modules promote freely
def test_heatmap_head_equals_its_layers_written_plainly_in_output_and_gradients(strips):
    config = dataclasses.replace(SMALL_HEATMAP, strips=strips)
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 6)).astype(np.float32)
    params = tiny_model.random_params(heads.HeatmapHead(SMALL_HEATMAP), x)
    weights = np.random.default_rng(1).normal(size=(2, 16, 16)).astype(np.float32)

    def value_and_gradients(module):
        def loss(params, x):
            output = module.apply({"params": params}, x)
            return (output * weights).sum(), output

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    found, wanted = (value_and_gradients(kind(config)) for kind in (heads.HeatmapHead, PlainHeatmapHead))
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        scale = max(np.abs(theirs).max(), 1e-2)  # a bias before a norm has next to no gradient
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_heads_shapes_and_ranges():
    x = 3 * np.random.default_rng(0).normal(size=(2, 4, 4, 6)).astype(np.float32)

    def run(module):
        return jax.jit(module.apply)({"params": tiny_model.random_params(module, x)}, x)

    score = run(heads.ScoreHead(SMALL_SCORE))
    assert score.shape == (2,) and score.dtype == jnp.float32
    assert score[0] != score[1]  # the rows are not mixed up into one
    heatmap = run(heads.HeatmapHead(SMALL_HEATMAP))
    assert heatmap.shape == (2, 16, 16) and heatmap.dtype == jnp.float32
    for output in (score, heatmap):
        assert 0 <= output.min() < output.max() <= 1


def test_paper_heads_have_the_expected_number_of_parameters():
    x = jax.ShapeDtypeStruct((1, 14, 14, 768), np.float32)

    def made(module):
        output, params = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
        return output.shape, sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(params)))

    assert made(heads.ScoreHead(heads.ScoreHeadConfig())) == ((1,), 18_980_801)
    assert made(heads.HeatmapHead(heads.HeatmapHeadConfig())) == ((1, 224, 224), 32_203_585)


def test_score_head_names_a_grid_that_is_too_small():
    x = np.zeros((1, 2, 2, 6), np.float32)
    with pytest.raises(ValueError, match=r"got a grid of 2x2, expected more than 2.*score_head.padding to 'SAME'"):
        heads.ScoreHead(SMALL_SCORE).init(jax.random.key(0), x)
    same = heads.ScoreHeadConfig(filters=(8, 4), dense=(8,), padding="SAME")
    output, _ = jax.eval_shape(heads.ScoreHead(same).init_with_output, jax.random.key(0), x)
    assert output.shape == (1,)
    with pytest.raises(ValueError, match=r"score_head.padding: got 'same'"):
        heads.ScoreHeadConfig(padding="same")


def pooled_score(**options):
    config = heads.ScoreHeadConfig(filters=(), dense=(8, 4), pool="mean", **options)
    rng = np.random.default_rng(0)
    x, text = rng.normal(size=(2, 4, 4, 6)).astype(np.float32), rng.normal(size=(2, 5, 6)).astype(np.float32)
    mask = np.array([[True] * 3 + [False] * 2, [True] * 5])
    inputs = (x, text, mask) if config.reads_text else (x,)
    module = heads.ScoreHead(config)
    return module, tiny_model.random_params(module, *inputs), inputs


@pytest.mark.parametrize("reads_text", [False, True])
def test_a_pooled_score_head_equals_numpy(reads_text):
    module, params, inputs = pooled_score(reads_text=reads_text)

    def dense(name, x):
        return np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)

    hidden = dense("dense_0", inputs[0].reshape(2, 16, 6)).mean(1)
    if reads_text:
        words = [dense("dense_text", text[mask]).sum(0) / heads.WORDS for text, mask in zip(*inputs[1:], strict=True)]
        hidden = np.concatenate([hidden, words], -1)
    logits = dense("dense_1", hidden) @ params["output"]["kernel"] + params["output"]["bias"]
    found = jax.jit(module.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits[:, 0])), atol=1e-6)


def test_a_pooled_score_head_needs_a_dense_layer_and_only_it_reads_text():
    with pytest.raises(ValueError, match=r"score_head.dense: got \(\), expected one layer or more"):
        heads.ScoreHeadConfig(pool="mean", dense=())
    with pytest.raises(ValueError, match=r"score_head.reads_text: got True, expected False .*pool='flatten'"):
        heads.ScoreHeadConfig(reads_text=True)
