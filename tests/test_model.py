"""RAHF: sizes, both variants, invariances, errors."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import INPUTS, forward, predict

from rahf.models import critics, rahf
from rahf.models.heads import HeatmapHead, ScoreHead
from rahf.models.layers import normalize_image
from rahf.models.parameters import param_shapes
from rahf.models.t5 import Decoder, Encoder
from rahf.models.vit import ViT
from richhf_data import schema


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=0), a, b)


# ---- Full size, abstractly ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "total", "parts"),
    [
        (
            "multi_head",
            473_705_350,
            {f"score_head_{name}": 18_980_801 for name in schema.SCORES}
            | {f"heatmap_head_{name}": 32_203_585 for name in schema.HEATMAPS},
        ),
        ("augmented_prompt", 384_559_362, {"score_head": 18_980_801, "heatmap_head": 32_203_585}),
    ],
)
def test_paper_model_has_the_expected_parameters_and_shapes(variant, total, parts):
    config = rahf.RAHFConfig(variant=variant)
    model = rahf.RAHF(config)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *critics.dummy_inputs(config)))
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params["params"].items()}
    assert counts == {"vit": 85_797_120, "t5": 247_577_856} | parts
    assert sum(counts.values()) == total

    texts = 1 if variant == "multi_head" else 7
    image, text = jax.ShapeDtypeStruct((16, 224, 224, 3), np.uint8), jax.ShapeDtypeStruct((16, texts, 64), np.int32)
    keywords = jax.ShapeDtypeStruct((16, 64), np.int32)
    outputs = jax.eval_shape(model.apply, params, image, text, keywords)
    assert outputs.deviations is None
    assert [output.shape for output in outputs[:3]] == [(16, 4), (16, 224, 224, 2), (16, 64, 32128)]
    scores, heatmaps, ids = jax.eval_shape(lambda *inputs: model.apply(*inputs, 64, method="predict"), params, image, text)
    assert [scores.shape, heatmaps.shape, ids.shape] == [(16, 4), (16, 224, 224, 2), (16, 64)]
    assert config.heatmap_size == 224


def test_every_parameter_names_an_axis_for_each_dimension():
    documented = set(rahf.__doc__.split("parameters", 1)[1].replace(",", " ").split())
    for variant in schema.VARIANTS:
        config = tiny_model.config(variant)
        boxed = jax.eval_shape(rahf.RAHF(config).init, jax.random.key(0), *critics.dummy_inputs(config))
        leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
        for path, leaf in leaves:
            assert isinstance(leaf, nn.LogicallyPartitioned), path
            assert len(leaf.names) == len(leaf.value.shape), path
            assert {name for name in leaf.names if name} <= documented, path


def test_param_shapes_names_every_parameter():
    config = tiny_model.config()
    _, params = tiny_model.model_and_params(config)
    found = param_shapes(rahf.RAHF(config).init, *critics.dummy_inputs(config))
    assert found["vit/pos_embedding"] == jax.ShapeDtypeStruct((1, 16, 12), jnp.float32)
    held = flax.traverse_util.flatten_dict(params["params"], sep="/")
    assert {name: leaf.shape for name, leaf in found.items()} == {name: leaf.shape for name, leaf in held.items()}


# ---- Both variants --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", tiny_model.VARIANTS)
def test_bfloat16_keeps_float32_outputs(variant):
    config = tiny_model.config(variant, dtype="bfloat16")
    model, params = tiny_model.model_and_params(config)
    batch = tiny_model.batch(config, 16)
    outputs = jax.tree.leaves(forward(model, params, batch))
    assert [output.dtype for output in outputs] == [jnp.float32] * 3  # scores, heatmaps, logits
    precise = jax.tree.leaves(forward(rahf.RAHF(tiny_model.config(variant)), params, batch))
    differences = [np.abs(a - b).mean() for a, b in zip(outputs, precise, strict=True)]
    assert min(differences) > 1e-5 and max(differences) < 0.05  # it computed otherwise, and nearly the same


@pytest.mark.parametrize("variant", tiny_model.VARIANTS)
def test_padding_the_prompt_or_the_batch_changes_no_prediction(variant):
    config = tiny_model.config(variant)
    model, params = tiny_model.model_and_params(config)
    batch = tiny_model.batch(config, 3)
    image, text_ids = batch["image"], batch["text_ids"]
    expected = predict(model, params, image, text_ids)
    image_padded = np.pad(image, ((0, 1), (0, 0), (0, 0), (0, 0)))
    padded = predict(model, params, image_padded, np.pad(text_ids, ((0, 1), (0, 0), (0, 3))))
    close(tuple(output[:3] for output in padded), expected)
    assert all(np.isfinite(output).all() for output in padded)
    assert len(np.unique(expected[2])) > 3  # keywords that padding could have changed


def test_predictions_depend_on_image_and_prompt():
    config = tiny_model.config()
    model, params = tiny_model.model_and_params(config)
    batch = tiny_model.batch(config, 3)
    scores, heatmaps, ids = predict(model, params, batch["image"], batch["text_ids"])
    for other in (
        predict(model, params, batch["image"][::-1], batch["text_ids"]),
        predict(model, params, batch["image"], batch["text_ids"][::-1]),
    ):
        assert np.abs(other[0] - scores).max() > 1e-4
        assert np.abs(other[1] - heatmaps).max() > 1e-4
    assert ids.shape == (3, 5) and ids.dtype == jnp.int32


def test_predicted_ids_are_those_of_the_teacher_forced_logits():
    config = tiny_model.config()
    model, params = tiny_model.model_and_params(config)
    batch = tiny_model.batch(config, 3)
    scores, heatmaps, ids = predict(model, params, batch["image"], batch["text_ids"])
    outputs = forward(model, params, batch | {"keyword_ids": ids})
    close((scores, heatmaps), outputs[:2])
    written = np.asarray(ids) != 0
    np.testing.assert_array_equal(outputs.keyword_logits.argmax(-1)[written], ids[written])
    assert written.any()


def test_a_keyword_logit_sees_only_earlier_ids():
    config = tiny_model.config()
    model, params = tiny_model.model_and_params(config)
    batch = tiny_model.batch(config, 3)
    changed = batch["keyword_ids"].copy()
    changed[:, 2] = 7
    before, after = (forward(model, params, batch | {"keyword_ids": ids}) for ids in (batch["keyword_ids"], changed))
    difference = np.abs(before.keyword_logits - after.keyword_logits).max(axis=(0, 2))  # [T]
    assert (difference[:3] == 0).all() and (difference[3:] > 0).all()


def test_decoder_attends_to_the_text_alone_if_asked():
    model, params = tiny_model.model_and_params(tiny_model.config())
    batch = tiny_model.batch(model.config, 3)
    text_model = rahf.RAHF(tiny_model.config(decoder_attends="text"))
    fused, text = forward(model, params, batch), forward(text_model, params, batch)
    close(fused[:2], text[:2])
    assert np.abs(fused.keyword_logits - text.keyword_logits).max() > 1e-3


def test_class_token_is_fused_but_not_on_the_map():
    vit = {"patch_size": 4, "width": 12, "depth": 1, "num_heads": 2, "mlp_dim": 16, "class_token": True}
    config = tiny_model.config(vit=vit)
    model, params = tiny_model.model_and_params(config)
    batch = tiny_model.batch(config, 3)

    def parts(model):
        tokens = model.encode_image(batch["image"])
        fused, mask = model.encode(tokens, batch["text_ids"])
        return tokens, fused, mask, model._feature_map(fused)

    tokens, fused, mask, grid = jax.jit(nn.apply(parts, model))(params)
    assert tokens.shape == (3, 17, 16) and fused.shape == (3, 1, 23, 16)
    np.testing.assert_array_equal(mask[:, :, 17:], batch["text_ids"] != 0)
    np.testing.assert_array_equal(grid.reshape(3, 1, 16, 16), fused[:, :, 1:17])


def test_scanned_layers_change_no_parameter_output_or_gradient():
    def made(**scanned):
        vit = {"patch_size": 4, "width": 12, "depth": 3, "num_heads": 2, "mlp_dim": 16} | scanned
        layers = {"num_encoder_layers": 3, "num_decoder_layers": 2, "relpos_bias_per_layer": True}
        sizes = {"vocab_size": tiny_model.VOCAB, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}
        return tiny_model.model_and_params(tiny_model.config(vit=vit, t5=sizes | layers | scanned))

    (plain, params), (looped, looped_params) = made(), made(scan=True, remat=True)
    assert jax.tree.structure(params) == jax.tree.structure(looped_params)
    batch = tiny_model.batch(plain.config, 3)

    def outputs_and_gradient(model):
        def total(params):
            outputs = model.apply(params, *(batch[name] for name in INPUTS))
            return sum(jnp.sum(x**2) for x in outputs[:3]), outputs

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    found, wanted = outputs_and_gradient(looped), outputs_and_gradient(plain)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(np.abs(theirs).max(), 1e-3), rtol=0)

    def trained(key):
        args = (batch[name] for name in INPUTS)
        return looped.apply(params, *args, train=True, rngs={"dropout": jax.random.key(key)}).scores

    assert not np.array_equal(trained(0), trained(1))  # dropout runs in the loop


def test_equal_widths_need_no_projection():
    vit = {"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    _, params = tiny_model.model_and_params(tiny_model.config(vit=vit))
    assert "image_projection" not in params["params"]
    _, params = tiny_model.model_and_params(tiny_model.config())
    assert params["params"]["image_projection"]["kernel"].shape == (12, 16)


def test_float_images_are_the_uint8_ones_and_have_gradients():
    config = tiny_model.config()
    model, params = tiny_model.model_and_params(config)
    batch = tiny_model.batch(config, 3)
    image = normalize_image(jnp.asarray(batch["image"]))
    assert image.dtype == jnp.float32 and image.min() >= -1 and image.max() <= 1
    np.testing.assert_allclose(normalize_image(jnp.array([0, 255], jnp.uint8)), [-1, 1])

    @jax.jit
    def score_and_gradient(image):
        def plausibility(image):
            scores, *_ = model.apply(params, image, batch["text_ids"], method="perceive")
            return scores[:, 0].sum(), scores

        return jax.value_and_grad(plausibility, has_aux=True)(image)

    (_, scores), gradient = score_and_gradient(image)
    close(scores, forward(model, params, batch).scores)
    assert (np.abs(gradient).max(axis=(1, 2, 3)) > 0).all()


# ---- Augmented prompt -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def augmented():
    model, params = tiny_model.model_and_params(tiny_model.config("augmented_prompt"))
    return model, params, tiny_model.batch(model.config, 16)


def test_augmented_prediction_equals_each_task_alone(augmented):
    model, params, batch = augmented
    image, text_ids = batch["image"], batch["text_ids"]
    scores, heatmaps, ids = predict(model, params, image, text_ids)

    @jax.jit
    def one_task(text):
        def run(model):
            fused, mask = model.encode(model.encode_image(image), text[:, None])
            grid, (score_head,), (heatmap_head,) = model._feature_map(fused)[:, 0], model.score_heads, model.heatmap_heads
            return score_head(grid), heatmap_head(grid), model.t5.greedy_decode(fused[:, 0], mask[:, 0], 5)

        return nn.apply(run, model)(params)

    alone = [one_task(text_ids[:, task]) for task in range(7)]
    close(scores, np.stack([alone[task][0] for task in (0, 1, 2, 3)], axis=-1))
    close(heatmaps, np.stack([alone[task][1] for task in (4, 5)], axis=-1))
    np.testing.assert_array_equal(ids, alone[6][2])
    assert len(np.unique(ids)) > 3


@pytest.mark.parametrize("variant", ["multi_head", "augmented_prompt"])
def test_pooled_scores_depend_on_the_words_and_not_on_the_padding(variant):
    head = {"filters": (), "dense": (16, 16), "pool": "mean", "reads_text": True}
    model, params = tiny_model.model_and_params(tiny_model.config(variant, score_head=head))
    batch = tiny_model.batch(model.config, 4)
    image, text_ids = batch["image"], batch["text_ids"]
    scores, heatmaps, _ = predict(model, params, image, text_ids)
    longer = np.pad(text_ids, ((0, 0), (0, 0), (0, 3)))
    close((scores, heatmaps), predict(model, params, image, longer)[:2])
    without = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if any(key.key == "dense_text" for key in path) else leaf, params
    )
    silent = predict(model, without, image, text_ids)
    assert np.abs(silent[0] - scores).max(0).min() > 1e-4  # of every score
    close(silent[1], heatmaps)


def test_augmented_training_predicts_what_prediction_does(augmented):
    model, params, batch = augmented
    scores, heatmaps, ids = predict(model, params, batch["image"], batch["text_ids"])
    outputs = forward(model, params, batch | {"keyword_ids": ids})
    close(outputs[:2], (scores, heatmaps))
    written = np.asarray(ids) != 0
    np.testing.assert_array_equal(outputs.keyword_logits.argmax(-1)[written], ids[written])


def test_augmented_prompt_runs_each_part_on_the_rows_that_need_it(augmented):
    model, params, batch = augmented
    seen = {}

    def spy(run, args, kwargs, context):
        parts = ViT | Encoder | Decoder | ScoreHead | HeatmapHead
        if isinstance(context.module, parts) and context.method_name == "__call__":
            seen[type(context.module).__name__] = args[0].shape[0]
        return run(*args, **kwargs)

    with nn.intercept_methods(spy):
        jax.eval_shape(model.apply, params, *(batch[name] for name in INPUTS))
    assert seen == {"ViT": 16, "Encoder": 7 * 16, "ScoreHead": 4 * 16, "HeatmapHead": 2 * 16, "Decoder": 16}


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "multihead"}, r"variant: got 'multihead', expected one of \('multi_head'"),
        ({"imagesize": 3}, r"unknown option 'model.imagesize'; did you mean 'model.image_size'\?"),
        ({"vit": {"dept": 3}}, r"unknown option 'model.vit.dept'; did you mean 'model.vit.depth'\?"),
        ({"vit": 3}, r"vit: got 3, expected an object with keys"),
        ({"t5": {"emb_dim": "64"}}, r"model.t5.emb_dim: got '64', expected an integer from 1 to 1,048,576"),
        ({"dtype": "bf16"}, r"dtype: got 'bf16', expected one of"),
        ({"image_size": 100}, r"image_size: got 100, expected a multiple of vit.patch_size = 16"),
    ],
)
def test_config_names_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        rahf.RAHFConfig.from_dict(values)


def test_config_from_dict_keeps_defaults_and_takes_lists():
    config = rahf.RAHFConfig.from_dict({"t5": {"dropout": 0, "mlp_activations": ["relu"]}})
    assert config.t5.mlp_activations == ("relu",) and config.t5.dropout == 0.0 and config.t5.emb_dim == 768
    hash(config)  # a module's attribute and a jit's static argument must hash


def test_model_names_wrong_inputs(augmented):
    model, params, batch = augmented
    image, text_ids, keyword_ids = (batch[name] for name in INPUTS)
    apply = model.apply
    with pytest.raises(ValueError, match=r"text_ids: got shape \(16, 6\), expected \[B, 7, L\] in the aug"):
        apply(params, image, text_ids[:, 0], keyword_ids)
    with pytest.raises(ValueError, match=r"text_ids: got shape \(16, 7, 6\), expected \[B, 1, L\] in the multi_head"):
        rahf.RAHF(tiny_model.config()).apply(params, image, text_ids, keyword_ids)
    with pytest.raises(ValueError, match=r"image: got shape \(16, 8, 16, 3\), expected \[B, 16, 16, 3\]"):
        apply(params, image[:, :8], text_ids, method="perceive")
    with pytest.raises(ValueError, match="image: got int32, expected uint8"):
        apply(params, image.astype(np.int32), text_ids, method="perceive")
