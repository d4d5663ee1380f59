"""CLIP: parity with Hugging Face's CLIPModel (where torch is installed), sizes, pooling, errors."""

import copy
import functools
import json
import sys

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest
import transformers
from tiny_diffusion import write_tokenizer

from rahf import names, readers
from rahf.models.clip import CLIP, VIT_L14, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from richhf_data import clip_tokenizer
from richhf_data.errors import UserError

TINY = CLIPConfig(
    CLIPVisionConfig(image_size=32, patch_size=8, width=24, depth=2, num_heads=4, mlp_dim=40),
    CLIPTextConfig(vocab_size=50, width=16, depth=3, num_heads=2, mlp_dim=36, length=12, eos_id=49),
    projection_dim=20,
)
TINY_GELU = CLIPConfig(
    CLIPVisionConfig(image_size=42, patch_size=14, width=16, depth=3, num_heads=2, mlp_dim=24),
    CLIPTextConfig(vocab_size=60, width=24, depth=2, num_heads=3, mlp_dim=32, length=9, eos_id=59),
    projection_dim=12,
    activation="gelu",
    epsilon=1e-4,
)


def from_huggingface(config, state):
    """A CLIPModel's state dict as parameters. Raises AssertionError unless each of theirs becomes one of ours."""
    state = {name: value.numpy() for name, value in state.items() if not name.endswith("position_ids")}  # a buffer
    table = names.clip_from_hugging_face(config)
    assert sorted(theirs for theirs, _ in table.values()) == sorted(state)
    flat = {ours: np.asarray(layout(state[theirs])) for ours, (theirs, layout) in table.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract(config))
    return params


def abstract(config):
    """The parameters that the module makes, as shapes."""
    image, ids = inputs(config, [3])
    return nn.unbox(jax.eval_shape(CLIP(config).init, jax.random.key(0), image, ids))["params"]


def inputs(config, lengths, seed=0):
    """A float image and a text for each length, which counts the end id.

    More end ids follow in the first text, as CLIP's tokeniser pads; other ids follow in the others.
    """
    rng, size, text = np.random.default_rng(seed), config.vision.image_size, config.text
    ids = rng.integers(3, text.eos_id, (len(lengths), min(text.length, max(lengths) + 2)))
    ids[np.arange(len(lengths)), np.array(lengths) - 1] = text.eos_id
    ids[0, lengths[0] :] = text.eos_id
    return rng.uniform(-1, 1, (len(lengths), size, size, 3)).astype(np.float32), ids.astype(np.int32)


@pytest.fixture(scope="module")
def tiny():
    """(module, parameters, image, ids), the parameters random and none at its initial value."""
    image, ids = inputs(TINY, [3, 12, 7])
    params = nn.unbox(jax.jit(CLIP(TINY).init)(jax.random.key(0), image, ids))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), params)
    return CLIP(TINY), params, image, ids


def huggingface_options(config):
    """The config in Hugging Face's words: (text options, vision options)."""

    def shared(tower):
        return {
            "hidden_size": tower.width,
            "num_hidden_layers": tower.depth,
            "num_attention_heads": tower.num_heads,
            "intermediate_size": tower.mlp_dim,
            "hidden_act": config.activation,
            "layer_norm_eps": config.epsilon,
        }

    text, vision = config.text, config.vision
    text_options = {"vocab_size": text.vocab_size, "max_position_embeddings": text.length, "eos_token_id": text.eos_id}
    vision_options = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    return shared(text) | text_options, shared(vision) | vision_options


def huggingface_model(config, eos_token_id):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text, vision = huggingface_options(config)
    text["eos_token_id"] = eos_token_id
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.projection_dim)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and scales too, which start at 0 and 1
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def huggingface_outputs(model, image, ids, mask):
    """(image tokens, text tokens, image embedding, text embedding, logits); the embeddings not of unit length."""
    import torch
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pixels = ((image + 1) / 2 - np.float32(OPENAI_CLIP_MEAN)) / np.float32(OPENAI_CLIP_STD)
    pixels, ids, mask = torch.tensor(pixels.transpose(0, 3, 1, 2)), torch.tensor(ids).long(), torch.tensor(mask)
    with torch.no_grad():
        vision, text = model.vision_model(pixels), model.text_model(ids)
        outputs = (
            model.vision_model.post_layernorm(vision.last_hidden_state),
            text.last_hidden_state,
            model.visual_projection(vision.pooler_output),
            model.text_projection(text.pooler_output),
            model(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits_per_image,
        )
    return [output.numpy() for output in outputs]


@pytest.mark.parametrize(
    ("config", "lengths", "eos_token_id"),
    [(TINY, [3, 12, 7], 49), (TINY_GELU, [2, 5, 4, 1], 2)],  # 2: pooled at the highest id, which is eos_id here
    ids=["quick_gelu", "gelu_and_legacy_eos"],
)
def test_clip_equals_huggingface(config, lengths, eos_token_id):
    model = huggingface_model(config, eos_token_id)
    image, ids = inputs(config, lengths)
    mask = (np.arange(ids.shape[1])[None] < np.array(lengths)[:, None]).astype(np.int64)
    expected = huggingface_outputs(model, image, ids, mask)
    module, params = CLIP(config), {"params": from_huggingface(config, model.state_dict())}

    def outputs(module, image, ids):
        parts = module.image_tokens(image), module.text_tokens(ids), module.encode_image(image), module.encode_text(ids)
        return *parts, module(image, ids)

    actual = jax.jit(lambda *args: module.apply(params, *args, method=outputs))(image, ids)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()), rtol=0)


def test_the_defaults_are_huggingfaces():
    transformers = pytest.importorskip("transformers")
    text, vision = huggingface_options(CLIPConfig())
    assert text == {name: getattr(transformers.CLIPTextConfig(), name) for name in text}
    assert vision == {name: getattr(transformers.CLIPVisionConfig(), name) for name in vision}
    assert CLIPConfig().projection_dim == transformers.CLIPConfig().projection_dim


@pytest.mark.parametrize(("config", "count"), [(CLIPConfig(), 151_277_313), (VIT_L14, 427_616_513)], ids=["B32", "L14"])
def test_clip_has_the_published_sizes(config, count):
    image, ids = np.zeros((2, 224, 224, 3), np.float32), np.zeros((2, 77), np.int32)
    params = nn.unbox(jax.eval_shape(CLIP(config).init, jax.random.key(0), image, ids))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count

    def shape(method, *args):
        return jax.eval_shape(lambda params: CLIP(config).apply(params, *args, method=method), params).shape

    vision, text, width = config.vision, config.text, config.projection_dim
    assert shape("image_tokens", image) == (2, 1 + (224 // vision.patch_size) ** 2, vision.width)
    assert shape("text_tokens", ids) == (2, 77, text.width)
    assert shape("encode_image", image) == shape("encode_text", ids) == (2, width)
    assert shape("__call__", image, ids) == (2, 2)


def test_clip_pools_at_the_first_end_whatever_follows(tiny):
    module, params, _, ids = tiny
    encode = jax.jit(lambda ids: module.apply(params, ids, method="encode_text"))
    others = ids.copy()
    others[0, 3:], others[2, 7:] = 0, 49  # were end ids, other ids
    np.testing.assert_allclose(encode(others), encode(ids), atol=1e-6, rtol=0)
    np.testing.assert_allclose(encode(ids[:1, :3]), encode(ids)[:1], atol=1e-6, rtol=0)
    others[0, 1] += 1
    assert np.abs(encode(others) - encode(ids))[0].max() > 1e-3


@pytest.mark.parametrize("bad", [5, 50, -1], ids=["no_end", "above_the_vocabulary", "negative"])
def test_a_text_that_cannot_be_read_gives_nan(tiny, bad):
    module, params, _, ids = tiny
    ids = np.concatenate([ids[:1], np.full_like(ids[:1], bad), ids[2:]])
    if bad != 5:
        ids[1, -1] = 49
    embedding = jax.jit(lambda ids: module.apply(params, ids, method="encode_text"))(ids)
    assert np.isnan(embedding).all(axis=1).tolist() == [False, True, False]


def test_uint8_and_float_images_agree(tiny):
    module, params, _, _ = tiny
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    encode = jax.jit(lambda image: module.apply(params, image, method="encode_image"))
    np.testing.assert_allclose(encode(image), encode(image / np.float32(127.5) - 1), atol=1e-5, rtol=0)


def test_the_similarity_has_a_gradient_in_a_float_image(tiny):
    module, params, image, ids = tiny
    gradient = jax.jit(jax.grad(lambda image: module.apply(params, image, ids).trace()))(image)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).max(axis=(1, 2, 3)) > 1e-4).all()


def test_the_text_tower_alone_gives_the_same_tokens(tiny):
    module, params, _, ids = tiny
    alone = CLIP(TINY, text_only=True)
    made = nn.unbox(jax.eval_shape(functools.partial(alone.init, method="text_tokens"), jax.random.key(0), ids))
    part = {name: params["params"][name] for name in ("token_embedding", "text")}
    assert jax.tree.map(np.shape, made["params"]) == jax.tree.map(np.shape, part)
    tokens = jax.jit(functools.partial(module.apply, method="text_tokens"))(params, ids)
    again = jax.jit(functools.partial(alone.apply, method="text_tokens"))({"params": part}, ids)
    np.testing.assert_array_equal(again, tokens)


def test_bfloat16_stays_close_to_float32(tiny):
    module, params, image, ids = tiny
    half = CLIP(TINY, jax.numpy.bfloat16)
    for method, x in (("encode_image", image), ("encode_text", ids)):
        rounded, exact = (jax.jit(m.apply, static_argnames="method")(params, x, method=method) for m in (half, module))
        assert rounded.dtype == np.float32
        assert 0 < np.abs(rounded - exact).max() < 0.03 * np.abs(exact).max()


def test_clip_names_a_wrong_input(tiny):
    module, params, image, ids = tiny
    with pytest.raises(ValueError, match=r"image: got shape \(3, 24, 32, 3\), expected \[B, 32, 32, 3\]"):
        module.apply(params, image[:, :24], method="encode_image")
    with pytest.raises(ValueError, match=r"image: got int32, expected uint8 in \[0, 255\] or a float type"):
        module.apply(params, image.astype(np.int32), method="encode_image")
    with pytest.raises(ValueError, match=r"ids: got shape \(3, 24\), expected \[B, L\] with L of 1 to 12"):
        module.apply(params, np.concatenate([ids, ids], axis=1), method="encode_text")
    with pytest.raises(ValueError, match=r"ids: got shape \(12,\), expected \[B, L\]"):
        module.apply(params, ids[0], method="encode_text")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CLIPConfig(CLIPVisionConfig(width=10)), r"clip.vision.width: got 10, .* multiple of num_heads = 12"),
        (lambda: CLIPConfig(text=CLIPTextConfig(width=10)), r"clip.text.width: got 10, .* multiple of num_heads = 8"),
        (lambda: CLIPConfig(CLIPVisionConfig(patch_size=15)), r"clip.vision.image_size: got 224, .* patch_size = 15"),
        (lambda: CLIPConfig(text=CLIPTextConfig(eos_id=2)), r"clip.text.eos_id: got 2, expected the end id itself"),
        (lambda: CLIPConfig(text=CLIPTextConfig(eos_id=49408)), r"got 49408, .* below vocab_size = 49408"),
        (lambda: CLIPConfig(activation="relu"), r"clip.activation: got 'relu', expected one of \('quick_gelu', 'gelu'\)"),
    ],
)
def test_clip_config_names_a_wrong_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "file",
    [
        {},
        {"text_config": {"hidden_size": 64}, "vision_config": {"patch_size": 16}, "projection_dim": 7},
        {"text_config": {"hidden_size": 64}, "text_config_dict": {"num_hidden_layers": 3}},  # 64 does not count
        {"text_config": {"vocab_size": 99}, "text_config_dict": {}},
        {"text_config": {"hidden_size": 64, "num_attention_heads": 4}, "text_config_dict": None},
        {"text_config_dict": {"hidden_size": 64, "max_position_embeddings": 20, "eos_token_id": 5}},
        {"vision_config": {"image_size": 64}, "vision_config_dict": {"image_size": 96, "num_hidden_layers": 2}},
        {"vision_config": None, "vision_config_dict": {"intermediate_size": 10}},
        {
            "text_config_dict": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
            "text_config": {"hidden_act": "quick_gelu"},
            "vision_config_dict": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
        },
    ],
)
def test_an_old_config_has_the_values_that_transformers_reads(file):
    theirs, ours = transformers.CLIPConfig(**copy.deepcopy(file)), readers.clip.clip_config_from_hugging_face(file)
    names = {"hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    names |= {"intermediate_size": "mlp_dim"}
    of_text = names | {"vocab_size": "vocab_size", "max_position_embeddings": "length", "eos_token_id": "eos_id"}
    of_vision = names | {"image_size": "image_size", "patch_size": "patch_size"}
    for tower, values, table in ((theirs.text_config, ours.text, of_text), (theirs.vision_config, ours.vision, of_vision)):
        assert {name: getattr(tower, name) for name in table} == {name: getattr(values, table[name]) for name in table}
        assert (tower.hidden_act, tower.layer_norm_eps) == (ours.activation, ours.epsilon)
    assert theirs.projection_dim == ours.projection_dim


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[1]"),
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", "{}"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"a": ' + "[" * 1000 + "]" * 1000 + "}"),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", '{"model_max_length": []}'),
        ("special_tokens_map.json", '{"eos_token": {"a": 1}}'),
        ("added_tokens.json", '{"a": "b"}'),
        ("merges.txt", "a b c d\n\xff"),
    ],
)
def test_a_damaged_tokenizer_is_named_or_read(name, content, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    try:
        assert clip_tokenizer.Tokenizer(tmp_path).num_ids("red cat") > 1
    except UserError as error:
        assert str(tmp_path) in str(error)


@pytest.mark.parametrize(
    "named",
    [
        {"tokenizer_class": "own_tokenizer.X"},
        {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["own_tokenizer.X"] * 2}},
    ],
)
def test_a_tokenizers_folder_runs_no_code(tmp_path, monkeypatch, named):
    write_tokenizer(tmp_path)
    (tmp_path / "own_tokenizer.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass X: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"trust_remote_code": True}))
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "own_tokenizer.X"}}))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    clip_tokenizer.Tokenizer(tmp_path)(["cat"])
    assert not (tmp_path / "marker").exists() and "own_tokenizer" not in sys.modules


def test_tokenizer_merges_pads_and_cuts(tmp_path):
    ids = write_tokenizer(tmp_path)
    tokenizer = clip_tokenizer.Tokenizer(tmp_path)
    start, end = ids["<|startoftext|>"], ids["<|endoftext|>"]
    assert tokenizer.eos_id == end
    cat, red = [ids["cat</w>"]], [ids["re"], ids["d</w>"]]
    expected = [[start, *red, *cat, end, end], [start, *cat, *cat, *cat, *cat, end]]
    np.testing.assert_array_equal(tokenizer(["a Red cat"[2:], "cat " * 9], length=6), expected)
    assert [tokenizer.num_ids(text) for text in ("red cat", "cat " * 9)] == [5, 11]
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"has neither tokenizer.json nor vocab.json with merges.txt"):
        clip_tokenizer.Tokenizer(tmp_path)
