"""Other people's weights: parity with what they compute, every format, every refusal."""

import dataclasses
import errno
import functools
import http.server
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_model
from tiny_model import write_t5x

from rahf import convert, experiments, losses, names, predictor, pretrained, readers, weights
from rahf.models import t5
from rahf.models.rahf import RAHF, RAHFConfig
from rahf.models.vit import ViT, ViTConfig
from rahf.weights import Tensor
from richhf_data import paths, schema, vocabulary

pytestmark = pytest.mark.usefixtures("standard_promotion")


def tree(converted):
    return flax.traverse_util.unflatten_dict(dict(weights.read_all(converted.tensors)), sep="/")


# ---- The first author's release -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def release(data_dir):
    """The release's tensors, and what it computed."""
    theirs = {}
    for part in ("trunk", "scores", "heatmaps"):
        theirs |= weights.open_npz(data_dir / f"richhf_pytorch_tiny_{part}.npz")
    return theirs, dict(np.load(data_dir / "richhf_pytorch_tiny_golden.npz"))


HEADS = {"vit": {"num_attention_heads": 4}}


def test_the_pytorch_release_is_reproduced_with_its_quirks(release):
    theirs, golden = release
    converted = readers.release.rahf_from_release(theirs, HEADS, what="release")
    config = RAHFConfig.from_dict(converted.config["model"])
    assert config.mask_padding  # ours by default; the release attends to padding
    model, params = RAHF(dataclasses.replace(config, mask_padding=False)), {"params": tree(converted)}
    image, ids = golden["image"].transpose(0, 2, 3, 1), golden["caption_ids"].astype(np.int32)[:, None]  # R = 1
    targets = golden["target_ids"].astype(np.int32)
    assert (ids == 0).any() and (targets == 0).any()

    def everything(model, image, ids, targets):
        return model.vit(image), model.encode(model.encode_image(image), ids)[0], model(image, ids, targets)

    tokens, fused, outputs = jax.jit(lambda *args: model.apply(params, *args, method=everything))(image, ids, targets)
    close = {"atol": 1e-5, "rtol": 0}
    np.testing.assert_allclose(tokens, golden["vit_tokens"], **close)
    np.testing.assert_allclose(fused[:, 0], golden["fused"], **close)
    np.testing.assert_allclose(outputs.keyword_logits, golden["decoder_logits"], **close)
    for i, name in enumerate(schema.SCORES):
        np.testing.assert_allclose(outputs.scores[:, i], golden[f"score_{name}"], **close)
    for i, name in enumerate(schema.HEATMAPS):
        np.testing.assert_allclose(outputs.heatmaps[..., i], golden[f"heatmap_{name}"], **close)
    loss_sum, _ = losses.keyword_loss_sum(outputs.keyword_logits, targets, count_padding=True)
    np.testing.assert_allclose(loss_sum / targets.size, golden["seq_loss"], **close)


def test_a_torch_file_predicts_and_runs_as_stablehlo(release, torch, tmp_path):
    theirs, _ = release
    torch.save({name: torch.from_numpy(tensor.read()) for name, tensor in theirs.items()}, tmp_path / "rahf_model.pt")
    (tmp_path / "config.json").write_text('{"vit": {"num_heads": 4}}')
    vocabulary.train(["a red cat", "a blue dog"], tmp_path / "spiece.model", 64)
    convert.convert("rahf-pytorch", tmp_path, tmp_path / "out", tmp_path)
    tiny_model.check_stablehlo(tmp_path / "out")


def test_the_release_at_its_real_size_is_the_config_for_it(torch):
    import transformers

    def conv(name, outputs, inputs, transposed=False):
        shape = (inputs, outputs, 3, 3) if transposed else (outputs, inputs, 3, 3)
        return {f"{name}.weight": shape, f"{name}.bias": (outputs,)}

    def norm(name, channels):
        return {f"{name}.scale": (channels, 1, 1)}

    shapes, width = {"visual_token_projection.weight": (768, 1024), "visual_token_projection.bias": (768,)}, 768
    with torch.device("meta"):
        vit = {"image_size": 384, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        vit = transformers.ViTConfig(**vit, intermediate_size=4096)
        t5 = transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
        for part, model in (("vit", transformers.ViTModel(vit)), ("t5", transformers.T5ForConditionalGeneration(t5))):
            shapes |= {f"{part}.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in schema.SCORES:
        head = f"score_predictor.{name}"
        for i, (inputs, outputs) in enumerate(itertools.pairwise((width, 768, 384, 192, 96, 48, 12))):
            shapes |= conv(f"{head}.conv_layers.{3 * i}", outputs, inputs) | norm(f"{head}.conv_layers.{3 * i + 1}", outputs)
        for i, (inputs, outputs) in enumerate(itertools.pairwise((24 * 24 * 12, 512, 128, 1))):
            linear = f"{head}.linear_layers.{2 * i}"
            shapes |= {f"{linear}.weight": (outputs, inputs), f"{linear}.bias": (outputs,)}
    for name in schema.HEATMAPS:
        head = f"heatmap_predictor.{name}"
        for i, (inputs, outputs) in enumerate(itertools.pairwise((width, 768, 384))):
            shapes |= conv(f"{head}.conv_layers.{3 * i}", outputs, inputs) | norm(f"{head}.conv_layers.{3 * i + 2}", outputs)
        for i, (inputs, outputs) in enumerate(itertools.pairwise((384, 768, 384, 384, 192))):
            up, readout = f"{head}.deconv_layers.{i}", f"{head}.conv_layers2.{i}"
            shapes |= conv(f"{up}.0", outputs, inputs, transposed=True) | norm(f"{up}.1", outputs)
            for j in (0, 3):
                shapes |= conv(f"{readout}.{j}", outputs, outputs) | norm(f"{readout}.{j + 1}", outputs)
        shapes |= conv(f"{head}.last_conv1", 192, 192) | conv(f"{head}.last_conv2", 1, 192)

    tensors = {name: Tensor(shape, lambda shape=shape: np.broadcast_to(0, shape)) for name, shape in shapes.items()}
    converted = readers.release.rahf_from_release(tensors, {}, "release")
    config = RAHFConfig.from_dict(experiments.load("rahf_pytorch").model.to_dict())
    found = RAHFConfig.from_dict(converted.config["model"])
    assert found == dataclasses.replace(config, dtype=found.dtype)


# ---- T5X, scanned ---------------------------------------------------------------------------------------------------
def scanned(arrays, num_heads):
    """A tree of `examples/t5` as `scalable_t5` stores it: layers on axis 1, heads on an axis of their own."""
    out = {name: array for name, array in arrays.items() if "layers_" not in name and "relpos_bias" not in name}
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        for name in [name for name in arrays if name.startswith(f"{stack}/layers_0/")]:
            layers = [arrays[name.replace("layers_0", f"layers_{i}")] for i in range(depth)]
            if "attention" in name and name.endswith("out/kernel"):
                layers = [x.reshape(num_heads, -1, x.shape[-1]) for x in layers]
            elif "attention" in name and name.endswith("kernel"):
                layers = [x.reshape(len(x), num_heads, -1) for x in layers]
            out[name.replace("layers_0", stack)] = np.stack(layers, axis=1)
        table = arrays[f"{stack}/relpos_bias/rel_embedding"]
        tables = table.swapaxes(0, 1) if table.ndim == 3 else np.stack([table] * depth, axis=1)
        out[f"{stack}/{stack}/relpos_bias/rel_embedding"] = tables  # [A, layers, buckets]
    return out


def test_scanned_t5x_layers_are_taken_apart(unpacked, tmp_path):
    plain = readers.encoders.t5_t5x(unpacked("t5x_v1_1_tiny") / "checkpoint_0")
    stacked = scanned(dict(weights.read_all(plain.tensors)), plain.config["t5"]["num_heads"])
    assert stacked["encoder/encoder/attention/query/kernel"].ndim == 4
    write_t5x(tmp_path / "now", stacked)
    # As the code's first versions named them.
    older = {"encoder/encoder/": "encoder/layers/", "decoder/decoder/": "decoder/layers/", "relpos_bias": "relative_posemb"}
    for new, old in older.items():
        stacked = {name.replace(new, old): array for name, array in stacked.items()}
    write_t5x(tmp_path / "older", stacked)
    for folder in ("now", "older"):
        again = readers.encoders.t5_t5x(tmp_path / folder)
        assert again.config == plain.config
        jax.tree.map(np.testing.assert_array_equal, tree(again), tree(plain))


def test_scanned_t5x_layers_with_tables_of_their_own_equal_umt5(torch, tmp_path):
    import transformers

    options = T5S[1] | {"num_layers": 2, "num_decoder_layers": 3, "vocab_size": 60, "dropout_rate": 0.0}
    theirs = transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**options)).eval()
    theirs.config.tie_word_embeddings = False  # transformers 5 sets it whatever it is told, and scales the logits by it
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    randomise(theirs, torch)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    shape = readers.encoders.t5_config_from_hugging_face(transformers.T5Config(**options).to_dict())
    table = names.t5_from_hugging_face(shape)
    arrays = {name: layout(state[their_name]) for name, (their_name, layout) in table.items()}
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        bias = f"{stack}.block.%d.layer.0.SelfAttention.relative_attention_bias.weight"
        arrays[f"{stack}/relpos_bias/rel_embedding"] = np.stack([state[bias % i].T for i in range(depth)])
    write_t5x(tmp_path, scanned(arrays, shape.num_heads))

    converted = readers.encoders.t5_t5x(tmp_path)
    assert converted.config["t5"]["relpos_bias_per_layer"]
    check_t5(converted, theirs, torch, length=64)


def test_a_t5x_folder_without_an_array_of_its_index_is_refused(unpacked, tmp_path):
    arrays = dict(weights.read_all(readers.encoders.t5_t5x(unpacked("t5x_v1_1_tiny") / "checkpoint_0").tensors))
    write_t5x(tmp_path, arrays)
    (tmp_path / "target.token_embedder.embedding" / ".zarray").unlink()
    with pytest.raises(ValueError, match=r"lacks the array target.token_embedder.embedding"):
        readers.encoders.t5_t5x(tmp_path)
    with pytest.raises(ValueError, match="no file `checkpoint`, expected a T5X folder"):
        readers.encoders.t5_t5x(tmp_path / "nothing")


def test_a_t5x_index_that_is_damaged_is_refused(unpacked, tmp_path):
    arrays = dict(weights.read_all(readers.encoders.t5_t5x(unpacked("t5x_v1_1_tiny") / "checkpoint_0").tensors))
    write_t5x(tmp_path, arrays)
    deep = '{"order": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for header, message in (("{", ": damaged, expected JSON"), (deep, ": got more than 100"), (" " * 2**21, " cannot be")):
        (tmp_path / "target.token_embedder.embedding" / ".zarray").write_text(header)
        with pytest.raises(ValueError, match=rf"target.token_embedder.embedding/.zarray{message}"):
            readers.encoders.t5_t5x(tmp_path)
    for index in ({"optimizer": {"target": 3}}, {"params": {}}):
        (tmp_path / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(index))
        with pytest.raises(ValueError, match="cannot be read, it is damaged or of another format"):
            readers.encoders.t5_t5x(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint", *(f"target.token_embedder.embedding/{part}" for part in (".zarray", "0.0"))])
def test_a_t5x_folder_with_a_named_pipe_is_refused_at_once(name, unpacked, tmp_path):
    shutil.copytree(unpacked("t5x_v1_1_tiny") / "checkpoint_0", tmp_path / "t5")
    (tmp_path / "t5" / name).unlink(missing_ok=True)
    (tmp_path / "t5" / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "t5" / name)
    with pytest.raises(ValueError, match=rf"t5/{re.escape(name)} cannot be read, .*a named pipe"):
        readers.encoders.t5_t5x(tmp_path / "t5")


def test_an_orbax_item_that_lists_no_arrays_is_refused(unpacked, tmp_path):
    shutil.copytree(unpacked("older_workdirs") / "run/best/2/state", tmp_path / "state")
    (tmp_path / "state/_METADATA").write_bytes((tmp_path / "state/_METADATA").read_bytes() + b"}")
    with pytest.raises(ValueError, match=r"state cannot be read, .*its arrays are not listed"):
        weights.open_orbax(tmp_path / "state")


@pytest.mark.parametrize(
    "change",
    [
        {"chunks": [10**9, 10**9]},
        {"chunks": [60, 10**9]},
        {"shape": [10**9, 10**9]},
        {"shape": [10**9, 32], "chunks": [10**9, 32]},
        {"shape": [10**9, 10**9], "chunks": [10**9, 10**9]},
        {"shape": [61, 32], "chunks": [1, 32]},
        {"shape": [10**30, 32]},
        {"shape": [-1, 32]},
        {"shape": None},
        {"shape": []},
        {"dtype": "|O"},
        {"dtype": "|b1"},
        {"dtype": "<i4"},
        {"dtype": "<c8"},
        {"dtype": "|V1000000000"},
        {"dtype": [["a", "<f4"], ["b", "<i4"]]},
        {"compressor": None},
    ],
)
def test_a_t5x_array_that_claims_what_its_files_do_not_hold_is_refused(change, unpacked, tmp_path):
    shutil.copytree(unpacked("t5x_v1_1_tiny") / "checkpoint_0", tmp_path / "t5")
    file = tmp_path / "t5" / "target.token_embedder.embedding" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"embedding"):
        dict(weights.read_all(readers.encoders.t5_t5x(tmp_path / "t5").tensors))


def test_a_t5x_array_that_is_not_finite_or_lacks_a_chunk_is_named(unpacked, tmp_path):
    arrays = dict(weights.read_all(readers.encoders.t5_t5x(unpacked("t5x_v1_1_tiny") / "checkpoint_0").tensors))
    arrays["token_embedder/embedding"] = np.where(np.eye(*arrays["token_embedder/embedding"].shape), np.nan, 1)
    write_t5x(tmp_path, arrays)
    found, count = readers.encoders.t5_t5x(tmp_path).tensors, min(arrays["token_embedder/embedding"].shape)
    with pytest.raises(ValueError, match=rf"tensor target.token_embedder.embedding holds {count} numbers of \d+ that"):
        found["token_embedder/embedding"].read()
    (tmp_path / "target.token_embedder.embedding" / "0.0").unlink()
    with pytest.raises(ValueError, match=r"target.token_embedder.embedding cannot be read, .* it has 0 of 1"):
        readers.encoders.t5_t5x(tmp_path)


def test_a_t5x_folder_is_read_over_the_web(unpacked):
    folder = unpacked("t5x_v1_1_tiny") / "checkpoint_0"
    handler = functools.partial(Files, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = readers.encoders.t5_t5x(f"http://127.0.0.1:{server.server_address[1]}")
        jax.tree.map(np.testing.assert_array_equal, tree(found), tree(readers.encoders.t5_t5x(folder)))
        server.shutdown()


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


# ---- big_vision's varieties -----------------------------------------------------------------------------------------
def big_vision(unpacked, tmp_path, change):
    """The golden big_vision file with `change` made to its arrays, and it unchanged; both converted."""
    source = unpacked("vit_bigvision_tiny") / "vit_tiny_p8.npz"
    arrays = dict(np.load(source))
    change(arrays)
    np.savez(tmp_path / "vit.npz", **arrays)
    return readers.encoders.vit_npz(tmp_path / "vit.npz"), readers.encoders.vit_npz(source)


def test_a_class_token_without_a_position_gets_zeros(unpacked, tmp_path):
    token = np.ones((1, 1, 24), np.float32)
    with_token, without = big_vision(unpacked, tmp_path, lambda arrays: arrays.update({"params/cls": token}))
    assert with_token.config["vit"]["class_token"] and not without.config["vit"]["class_token"]
    positions = tree(with_token)["pos_embedding"]
    np.testing.assert_array_equal(positions[:, 0], 0)
    np.testing.assert_array_equal(positions[:, 1:], tree(without)["pos_embedding"])


def test_two_towers_and_tensors_without_axes_are_named(unpacked, tmp_path):
    def two_towers(arrays):
        for name in list(arrays):
            arrays[name.replace("params/", "params/img/")] = arrays.pop(name)

    with pytest.raises(ValueError, match=r"SigLIP say \(params/img/...\), which is not supported; expected a ViT alone"):
        big_vision(unpacked, tmp_path, two_towers)
    block = "Transformer/encoderblock_0"
    kernels = (f"{block}/MultiHeadDotProductAttention_0/query/kernel", f"{block}/MlpBlock_0/Dense_0/kernel")
    for name in ("embedding/kernel", "pos_embedding", "embedding/bias", *kernels):
        with pytest.raises(ValueError, match=rf"{name}.* has shape \(\)"):
            big_vision(unpacked, tmp_path, lambda arrays: arrays.update({f"params/{name}": np.float32(1)}))


def test_fixed_positions_are_made_where_the_file_has_none(unpacked, tmp_path):
    found, _ = big_vision(unpacked, tmp_path, lambda arrays: arrays.pop("params/pos_embedding"))
    size, patch, width = found.config["image_size"], found.config["vit"]["patch_size"], found.config["vit"]["width"]
    positions, side = tree(found)["pos_embedding"][0], size // patch
    assert size == 224 and positions.shape == (side * side, width)
    x, y, quarter = 3, 5, width // 4
    for k in (0, 2, quarter - 1):
        frequency = 1 / 10_000 ** (k / (quarter - 1))
        expected = [np.sin(x * frequency), np.cos(x * frequency), np.sin(y * frequency), np.cos(y * frequency)]
        np.testing.assert_allclose(positions[y * side + x, k::quarter], expected, atol=1e-6)


def test_older_names_of_positions_are_read_and_odd_numbers_refused(unpacked, tmp_path):
    def rename(arrays):
        arrays["params/Transformer/pos_embedding"] = arrays.pop("params/pos_embedding")

    found, now = big_vision(unpacked, tmp_path, rename)
    np.testing.assert_array_equal(tree(found)["pos_embedding"], tree(now)["pos_embedding"])
    with pytest.raises(ValueError, match=r"ViT .*vit.npz: got 3 position embeddings .* expected a square number"):
        big_vision(unpacked, tmp_path, lambda arrays: arrays.update({"params/pos_embedding": np.ones((1, 3, 24))}))


# ---- Hugging Face, live ---------------------------------------------------------------------------------------------
VITS = [
    {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "patch_size": 8},
    {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 4},
]


@pytest.mark.parametrize("options", VITS)
def test_vit_equals_hugging_face(options, torch, tmp_path):
    import transformers

    theirs = transformers.ViTModel(transformers.ViTConfig(image_size=32, **options)).eval()
    randomise(theirs, torch)
    theirs.save_pretrained(tmp_path)
    converted = readers.encoders.vit_hugging_face(tmp_path)
    image = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    ours = jax.jit(ViT(ViTConfig(**converted.config["vit"])).apply)({"params": tree(converted)}, image)
    assert_close(ours, expected)


def randomise(module, torch):
    """Every parameter away from its initial value, norms and biases too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def assert_close(ours, theirs):
    """To 1e-5, of the output's scale where that exceeds 1."""
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, np.abs(theirs).max()), rtol=0)


def test_vit_names_of_older_transformers_are_read(torch, tmp_path):
    import transformers

    theirs = transformers.ViTModel(transformers.ViTConfig(image_size=32, **VITS[0])).eval()
    theirs.save_pretrained(tmp_path)
    state = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    old = {}
    for name, array in state.items():
        name = re.sub(r"(^|\.)layers\.(\d+)\.attention\.([qkv])_proj", older_attention, name)
        name = re.sub(r"(^|\.)layers\.(\d+)\.attention\.o_proj", r"\1encoder.layer.\2.attention.output.dense", name)
        name = re.sub(r"(^|\.)layers\.(\d+)\.mlp\.fc1", r"\1encoder.layer.\2.intermediate.dense", name)
        name = re.sub(r"(^|\.)layers\.(\d+)\.mlp\.fc2", r"\1encoder.layer.\2.output.dense", name)
        old["vit." + re.sub(r"(^|\.)layers\.(\d+)\.layernorm", r"\1encoder.layer.\2.layernorm", name)] = array
    assert "vit.encoder.layer.0.attention.attention.query.weight" in old
    (tmp_path / "old").mkdir()
    safetensors.numpy.save_file(old, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    again, now = readers.encoders.vit_hugging_face(tmp_path / "old"), readers.encoders.vit_hugging_face(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, tree(again), tree(now))


def older_attention(match):
    names = {"q": "query", "k": "key", "v": "value"}
    return f"{match[1]}encoder.layer.{match[2]}.attention.attention.{names[match[3]]}"


T5S = [
    {"d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3},
    {"d_model": 24, "num_heads": 2, "d_kv": 10, "d_ff": 40, "num_layers": 3}
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
]


@pytest.mark.parametrize(("options", "untied"), [(T5S[0], False), (T5S[1], False), (T5S[1], True)])
def test_t5_equals_hugging_face_and_its_greedy_generation(options, untied, torch, tmp_path):
    import transformers

    settings = transformers.T5Config(vocab_size=60, decoder_start_token_id=0, dropout_rate=0.0, **options)
    theirs = transformers.T5ForConditionalGeneration(settings).eval()
    if untied:
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    randomise(theirs, torch)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert list(tmp_path.glob("*.safetensors.index.json"))
    check_t5(readers.encoders.t5_hugging_face(tmp_path), theirs, torch, length=64)


def check_t5(converted, theirs, torch, length):
    """Encoder, logits and `length` greedily decoded ids equal those of transformers' model."""
    module, params = t5.T5(t5.T5Config(**converted.config["t5"])), {"params": tree(converted)}
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(2, 60, (3, 11)).astype(np.int32), rng.integers(2, 60, (3, 7)).astype(np.int32)
    ids[1, 6:] = 0
    mask = ids != 0
    with torch.no_grad():
        arguments = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
        expected = theirs(**arguments, decoder_input_ids=torch.from_numpy(np.asarray(t5.shift_right(targets))).long())
        generated = theirs.generate(**arguments, max_new_tokens=length, do_sample=False, use_cache=False).numpy()[:, 1:]

    def forward(module, ids, inputs):
        encoded = module.encode(module.embed(ids), mask)
        return encoded, module.decode(encoded, mask, inputs), module.greedy_decode(encoded, mask, length)

    apply = jax.jit(lambda *args: module.apply(params, *args, method=forward))
    encoded, logits, decoded = apply(ids, t5.shift_right(targets))
    assert_close(encoded[mask], expected.encoder_last_hidden_state.numpy()[mask])
    assert_close(logits, expected.logits.numpy())
    assert len(np.unique(generated)) > 2
    np.testing.assert_array_equal(decoded[:, : generated.shape[1]], generated)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sources_become_float32(dtype, torch, tmp_path):
    import transformers

    theirs = transformers.ViTModel(transformers.ViTConfig(image_size=32, **VITS[0])).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    pretrained.write(readers.encoders.vit_hugging_face(tmp_path), tmp_path / "out")
    held = pretrained.read(tmp_path / "out", "vit").tensors["cls"].read()
    assert held.dtype == np.float32
    np.testing.assert_array_equal(held, theirs.embeddings.cls_token.detach().float().numpy())


def test_clip_folder_is_read(torch, tmp_path):
    import transformers

    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    settings = transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 2},
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        projection_dim=20,
    )
    transformers.CLIPModel(settings).save_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2")
    converted = convert.convert("clip-hf", tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "merges.txt").is_file()
    assert converted.config["clip"]["text"]["eos_id"] == 49  # 2 stands for the highest id
    assert set(pretrained.read(tmp_path / "out", "clip").tensors) == set(converted.tensors)


# ---- Refusals -------------------------------------------------------------------------------------------------------
def hugging_face_vit(folder, change=lambda state: None):
    """A Hugging Face ViT folder written without torch."""
    config = ViTConfig(patch_size=4, width=8, depth=1, num_heads=2, mlp_dim=12, class_token=True)
    rng, state = np.random.default_rng(0), {}
    vit_shapes = {
        "embeddings.cls_token": (1, 1, 8),
        "embeddings.position_embeddings": (1, 5, 8),
        "embeddings.patch_embeddings.projection.weight": (8, 3, 4, 4),
        "embeddings.patch_embeddings.projection.bias": (8,),
        "layernorm.weight": (8,),
        "layernorm.bias": (8,),
        "layers.0.mlp.fc1.weight": (12, 8),
        "layers.0.mlp.fc1.bias": (12,),
        "layers.0.mlp.fc2.weight": (8, 12),
        "layers.0.mlp.fc2.bias": (8,),
    }
    for norm in ("before", "after"):
        vit_shapes |= {f"layers.0.layernorm_{norm}.{kind}": (8,) for kind in ("weight", "bias")}
    for name in "qkvo":
        vit_shapes |= {f"layers.0.attention.{name}_proj.weight": (8, 8), f"layers.0.attention.{name}_proj.bias": (8,)}
    for name, shape in vit_shapes.items():
        state[name] = rng.normal(size=shape).astype(np.float32)
    change(state)
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    settings = {"model_type": "vit", "patch_size": config.patch_size, "hidden_size": config.width}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("layernorm.bias"),
            r"encoder_norm/bias \(8,\): missing, expected the tensor layernorm.bias",
        ),
        (
            lambda state: state.update({"layers.0.mlp.fc1.weight": np.zeros((13, 8), np.float32)}),
            r"Dense_0/kernel \(8, 12\): the tensor layers.0.mlp.fc1.weight has shape \(13, 8\)",
        ),
        (
            lambda state: state.update({"lora.weight": np.zeros((2, 8), np.float32)}),
            r"lora.weight \(2, 8\): no parameter of ours takes it",
        ),
        (
            lambda state: state.update({"layernorm.bias": np.ones(8, np.int32)}),
            r"encoder_norm/bias \(8,\): the tensor layernorm.bias holds I32, expected one of float16, bfloat16",
        ),
    ],
)
def test_missing_extra_and_wrong_tensors_are_named_and_nothing_is_written(change, message, tmp_path):
    folder = hugging_face_vit(tmp_path / "in", change)
    with pytest.raises(ValueError, match=message):
        convert.convert("vit-hf", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert.convert("vit-hf", hugging_face_vit(tmp_path / "whole"), tmp_path / "out")


def test_weights_that_are_not_finite_do_not_pass(tmp_path):
    folder = hugging_face_vit(tmp_path / "in", lambda state: state["layernorm.bias"].fill(np.nan))
    with pytest.raises(ValueError, match=r"model.safetensors: the tensor layernorm.bias holds 8 numbers of 8 that are not"):
        convert.convert("vit-hf", folder, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_truncated_safetensors_file_is_refused_before_anything_is_written(tmp_path):
    folder = hugging_face_vit(tmp_path / "in")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read, it is damaged"):
        convert.convert("vit-hf", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_else_is_not_overwritten(tmp_path):
    folder = hugging_face_vit(tmp_path / "in")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"output: .* holds a config.json that rahf.convert did not write"):
        convert.convert("vit-hf", folder, folder)
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("vocabulary.model", b"mine"), ("weights.safetensors", b"mine"), ("config.json", b'{"kind": "reward"}')],
)
def test_a_file_that_no_conversion_wrote_is_kept(name, content, tmp_path, release, monkeypatch):
    converted = readers.release.rahf_from_release(release[0], HEADS, what="release")
    monkeypatch.setitem(readers.READERS, "rahf-pytorch", lambda path: converted)
    paths.replace(tmp_path / "out" / name, content)
    for given in (tmp_path / "t5.model", tmp_path / "out/vocabulary.model"):
        with pytest.raises(ValueError, match=f"output: .*out holds a {name} that rahf.convert did not write; choose"):
            convert.convert("rahf-pytorch", "model.pt", tmp_path / "out", given)
    assert os.listdir(tmp_path / "out") == [name] and (tmp_path / "out" / name).read_bytes() == content


def test_a_vocabulary_of_the_users_in_a_folder_of_ours_is_kept(tmp_path):
    folder, out = hugging_face_vit(tmp_path / "in"), tmp_path / "out"
    convert.convert("vit-hf", folder, out)
    (out / "vocabulary.model").write_bytes(b"mine")
    convert.convert("vit-hf", folder, out)
    assert (out / "vocabulary.model").read_bytes() == b"mine"
    with pytest.raises(ValueError, match=r"output: .*out holds the input .*link; choose another folder"):
        (tmp_path / "link").symlink_to(out / "weights.safetensors")
        convert._replaced("vit", [tmp_path / "link"], out)


def test_a_conversion_that_fails_leaves_the_earlier_one_as_it_was(tmp_path, monkeypatch):
    folder, out = hugging_face_vit(tmp_path / "in"), tmp_path / "out"
    convert.convert("vit-hf", folder, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pretrained.json_files, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: .*out'"):
        convert.convert("vit-hf", folder, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_the_dtype_of_the_file_is_no_part_of_the_model(tmp_path):
    folder = hugging_face_vit(tmp_path / "in")
    for dtype in ("float32", "bfloat16"):
        convert.convert("vit-hf", folder, tmp_path / dtype, dtype=dtype)
    whole, half = (tmp_path / dtype / "weights.safetensors" for dtype in ("float32", "bfloat16"))
    assert half.stat().st_size < 0.7 * whole.stat().st_size  # the header is not halved
    assert (tmp_path / "bfloat16/config.json").read_bytes() == (tmp_path / "float32/config.json").read_bytes()
    exact, rounded = (dict(weights.read_all(weights.open_safetensors(file))) for file in (whole, half))
    for name, array in exact.items():
        np.testing.assert_allclose(rounded[name], array, rtol=2.0**-8)


def test_a_folder_of_ours_is_written_anew(tmp_path):
    folder, out = hugging_face_vit(tmp_path / "in"), tmp_path / "out"
    convert.convert("vit-hf", folder, out)
    for name in ("predict.stablehlo", "notes.txt"):
        (out / name).write_bytes(b"of another model")
    (out / "config.json").write_text('{"kind": "rahf"}')
    (out / ".partial").mkdir()  # of a conversion that was killed
    convert.convert("vit-hf", folder, out)
    assert sorted(file.name for file in out.iterdir()) == ["SHA256SUMS", "config.json", "notes.txt", "weights.safetensors"]
    with pytest.raises(ValueError, match=r"workdir: .* holds the weights of a vit, expected those of a whole RAHF"):
        predictor.load(out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t5"}, "config.json is of a 't5', expected 'vit'; choose another --source"),
        ({"model_type": "vit", "hidden_size": 8}, r"in/config.json: patch_size: missing, expected an integer from 1"),
        ([], "config.json: got a JSON list, expected an object"),
        (None, "config.json: damaged, expected JSON"),
    ],
)
def test_a_config_of_hugging_face_that_says_too_little_is_refused(settings, message, tmp_path):
    folder = hugging_face_vit(tmp_path / "in")
    (folder / "config.json").write_text(json.dumps(settings) if settings is not None else "{")
    with pytest.raises(ValueError, match=message):
        convert.convert("vit-hf", folder, tmp_path / "out")


def test_towers_of_clip_that_differ_in_kind_are_refused():
    with pytest.raises(ValueError, match="CLIP: got hidden_act 'gelu' for text and 'quick_gelu' for images"):
        readers.clip.clip_config_from_hugging_face({"text_config": {"hidden_act": "gelu"}})


def test_t5_with_another_epsilon_is_refused():
    settings = {"vocab_size": 60, "d_model": 8, "num_heads": 2, "d_kv": 4, "num_layers": 1, "d_ff": 8}
    with pytest.raises(ValueError, match="T5: layer_norm_epsilon: got 1e-05, expected 1e-06"):
        readers.encoders.t5_config_from_hugging_face(settings | {"layer_norm_epsilon": 1e-5})


def test_a_release_of_unknown_width_needs_its_heads(release):
    with pytest.raises(
        ValueError, match=r'a ViT of \d+ layers and width \d+, whose number of heads is unknown; .*"num_heads": 16'
    ):
        readers.release.rahf_from_release(release[0], {}, what="release")


def test_the_command_converts_and_refuses(tmp_path):
    folder = hugging_face_vit(tmp_path / "in")
    arguments = [sys.executable, "-m", "rahf.convert", "--source=vit-hf", f"--output={tmp_path / 'out'}"]
    done = subprocess.run([*arguments, f"--input={folder}"], capture_output=True, text=True)
    assert done.returncode == 0 and "vit, " in done.stdout and '"patch_size": 4' in done.stdout
    (folder / "model.safetensors").unlink()
    failed = subprocess.run([*arguments, f"--input={folder}"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.strip().splitlines()[-1].startswith("error: weights: ")
    assert "Traceback" not in failed.stderr


def test_a_release_without_its_vocabulary_is_refused(release, tmp_path, monkeypatch):
    converted = readers.release.rahf_from_release(release[0], HEADS, what="release")
    monkeypatch.setitem(readers.READERS, "rahf-pytorch", lambda path: converted)
    with pytest.raises(ValueError, match=r"vocabulary: got none, .* pass --vocabulary=PATH"):
        convert.convert("rahf-pytorch", "rahf_model.pt", tmp_path / "out")
