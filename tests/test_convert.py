"""Other people's weights: parity, every format, every refusal, and training that starts from them."""

import dataclasses
import json
import re

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tensorstore
import tiny_model

import rahf
from configs import rahf_ci
from rahf import convert, losses, train, weights
from rahf.models import t5
from rahf.models.rahf import RAHF, RAHFConfig
from rahf.models.vit import ViT, ViTConfig
from rahf.weights import Tensor
from richhf_data import schema, vocabulary

pytestmark = pytest.mark.usefixtures("standard_promotion")


def tree(converted):
    return flax.traverse_util.unflatten_dict(dict(weights.read_all(converted.tensors)), sep="/")


def tensors_of(params):
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {name: Tensor(np.shape(value), lambda value=value: np.asarray(value)) for name, value in flat.items()}


# ---- The first author's release -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def release(data_dir):
    """The release's tensors, and what it computed."""
    theirs = {}
    for part in ("trunk", "scores", "heatmaps"):
        theirs |= weights.open_npz(data_dir / f"richhf_pytorch_tiny_{part}.npz")
    return theirs, dict(np.load(data_dir / "richhf_pytorch_tiny_golden.npz"))


def test_the_pytorch_release_is_reproduced_with_its_quirks(release):
    theirs, golden = release
    converted = convert.rahf_from_release(theirs, num_heads=4, what="release")
    config = RAHFConfig.from_dict(converted.config["model"])
    assert config.mask_padding  # ours by default; the release attends to padding
    model, params = RAHF(dataclasses.replace(config, mask_padding=False)), {"params": tree(converted)}
    image, ids = golden["image"].transpose(0, 2, 3, 1), golden["caption_ids"].astype(np.int32)
    targets = golden["target_ids"].astype(np.int32)
    assert (ids == 0).any() and (targets == 0).any()

    def everything(model, image, ids, targets):
        return model.vit(image), model.encode(model.encode_image(image), ids)[0], model(image, ids, targets)

    tokens, fused, outputs = jax.jit(lambda *args: model.apply(params, *args, method=everything))(image, ids, targets)
    close = {"atol": 1e-5, "rtol": 0}
    np.testing.assert_allclose(tokens, golden["vit_tokens"], **close)
    np.testing.assert_allclose(fused, golden["fused"], **close)
    np.testing.assert_allclose(outputs.keyword_logits, golden["decoder_logits"], **close)
    for i, name in enumerate(schema.SCORES):
        np.testing.assert_allclose(outputs.scores[:, i], golden[f"score_{name}"], **close)
    for i, name in enumerate(schema.HEATMAPS):
        np.testing.assert_allclose(outputs.heatmaps[..., i], golden[f"heatmap_{name}"], **close)
    loss_sum, _ = losses.keyword_loss_sum(outputs.keyword_logits, targets, count_padding=True)
    np.testing.assert_allclose(loss_sum / targets.size, golden["seq_loss"], **close)


def test_a_torch_file_predicts_and_runs_as_stablehlo(release, tmp_path):
    torch = pytest.importorskip("torch")
    theirs, _ = release
    torch.save({name: torch.from_numpy(tensor.read()) for name, tensor in theirs.items()}, tmp_path / "rahf_model.pt")
    (tmp_path / "config.json").write_text('{"vit": {"num_heads": 4}}')
    vocabulary.train(["a red cat", "a blue dog"], tmp_path / "spiece.model", 64)
    convert.convert("rahf-pytorch", tmp_path, tmp_path / "out", tmp_path)
    tiny_model.check_stablehlo(tmp_path / "out")


# ---- T5X, scanned ---------------------------------------------------------------------------------------------------
def write_t5x(folder, arrays):
    """A checkpoint in T5X's own format: a msgpack index, one zarr array a parameter, small ones in the index."""
    target = {}
    for name, array in arrays.items():
        if array.size < 40:
            target[name] = array
            continue
        path = folder / f"target.{name.replace('/', '.')}"
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}
        target[name] = spec
        tensorstore.open(spec, create=True, dtype=array.dtype, shape=array.shape).result().write(array).result()
    index = {"version": 3, "optimizer": {"target": flax.traverse_util.unflatten_dict(target, sep="/"), "state": {}}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(index))


def scanned(arrays):
    """Layers of a stack on axis 1, as T5X's scalable_t5 has them, each with a table of relative positions."""
    out = {name: array for name, array in arrays.items() if "layers_" not in name and "relpos_bias" not in name}
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        for name in [name for name in arrays if name.startswith(f"{stack}/layers_0/")]:
            layers = [arrays[name.replace("layers_0", f"layers_{i}")] for i in range(depth)]
            out[name.replace("layers_0", "layers")] = np.stack(layers, axis=1)
        bias = arrays[f"{stack}/relpos_bias/rel_embedding"]
        out[f"{stack}/layers/relative_posemb/rel_embedding"] = np.stack([bias] * depth, axis=1)
    return out


def test_scanned_t5x_layers_are_taken_apart(unpacked, tmp_path):
    plain = convert.t5_t5x(unpacked("t5x_v1_1_tiny") / "checkpoint_0")
    stacked = scanned(dict(weights.read_all(plain.tensors)))
    write_t5x(tmp_path, stacked)
    again = convert.t5_t5x(tmp_path)
    assert again.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, tree(again), tree(plain))


def test_layers_with_tables_of_their_own_are_refused(unpacked, tmp_path):
    stacked = scanned(dict(weights.read_all(convert.t5_t5x(unpacked("t5x_v1_1_tiny") / "checkpoint_0").tensors)))
    stacked["encoder/layers/relative_posemb/rel_embedding"][0, 1, 0] += 1
    write_t5x(tmp_path, stacked)
    with pytest.raises(ValueError, match="relative_posemb/rel_embedding differs from layer to layer"):
        convert.t5_t5x(tmp_path)


def test_a_t5x_folder_without_an_array_of_its_index_is_refused(unpacked, tmp_path):
    arrays = dict(weights.read_all(convert.t5_t5x(unpacked("t5x_v1_1_tiny") / "checkpoint_0").tensors))
    write_t5x(tmp_path, arrays)
    (tmp_path / "target.token_embedder.embedding" / ".zarray").unlink()
    with pytest.raises(ValueError, match=r"lacks the array target.token_embedder.embedding"):
        convert.t5_t5x(tmp_path)
    with pytest.raises(ValueError, match="no file `checkpoint`, expected a T5X folder"):
        convert.t5_t5x(tmp_path / "nothing")


# ---- Hugging Face, live ---------------------------------------------------------------------------------------------
@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


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
    converted = convert.vit_hugging_face(tmp_path)
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
    again, now = convert.vit_hugging_face(tmp_path / "old"), convert.vit_hugging_face(tmp_path)
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
    converted = convert.t5_hugging_face(tmp_path)
    module, params = t5.T5(t5.T5Config(**converted.config["t5"])), {"params": tree(converted)}

    rng = np.random.default_rng(0)
    ids, targets = rng.integers(2, 60, (3, 11)).astype(np.int32), rng.integers(2, 60, (3, 7)).astype(np.int32)
    ids[1, 6:] = 0
    mask = ids != 0
    with torch.no_grad():
        arguments = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
        expected = theirs(**arguments, decoder_input_ids=torch.from_numpy(np.asarray(t5.shift_right(targets))).long())
        generated = theirs.generate(**arguments, max_new_tokens=64, do_sample=False, use_cache=False).numpy()[:, 1:]

    def forward(module, ids, inputs):
        encoded = module.encode(module.embed(ids), mask)
        return encoded, module.decode(encoded, mask, inputs), module.greedy_decode(encoded, mask, 64)

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
    convert.write(convert.vit_hugging_face(tmp_path), tmp_path / "out")
    held = convert.read(tmp_path / "out", "vit").tensors["cls"].read()
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
    converted = convert.convert("clip-hf", tmp_path, tmp_path / "out")
    assert converted.config["clip"]["text"]["eos_id"] == 49  # 2 stands for the highest id
    assert set(convert.read(tmp_path / "out", "clip").tensors) == set(converted.tensors)


def test_positions_are_resampled_as_torch_does(torch):
    positions = np.random.default_rng(0).normal(size=(1, 1 + 36, 5)).astype(np.float32)
    for side in (3, 6, 9):
        ours = convert.resample_positions(positions, side * side, class_token=True)
        grid = torch.from_numpy(positions[:, 1:].reshape(1, 6, 6, 5).transpose(0, 3, 1, 2).copy())
        grid = torch.nn.functional.interpolate(grid, (side, side), mode="bilinear", antialias=True, align_corners=False)
        np.testing.assert_allclose(ours[:, 1:], grid.numpy().transpose(0, 2, 3, 1).reshape(1, -1, 5), atol=1e-5)
        np.testing.assert_array_equal(ours[:, :1], positions[:, :1])


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
    ],
)
def test_missing_extra_and_wrong_tensors_are_named_and_nothing_is_written(change, message, tmp_path):
    folder = hugging_face_vit(tmp_path / "in", change)
    with pytest.raises(ValueError, match=message):
        convert.convert("vit-hf", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert.convert("vit-hf", hugging_face_vit(tmp_path / "whole"), tmp_path / "out")


def test_a_truncated_safetensors_file_is_refused_before_anything_is_written(tmp_path):
    folder = hugging_face_vit(tmp_path / "in")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read, it is damaged"):
        convert.convert("vit-hf", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_index_may_not_leave_its_folder_nor_miss_a_part(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for outside in ("../a.safetensors", "/a.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(ValueError, match="expected a file name without a folder"):
            weights.open_hugging_face(tmp_path)
    for no_file in ("..", index.name):
        index.write_text(json.dumps({"weight_map": {"a": no_file}}))
        with pytest.raises(ValueError, match="weights: "):
            weights.open_hugging_face(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"no file .*a.safetensors"):
        weights.open_hugging_face(tmp_path)
    safetensors.numpy.save_file({"b": np.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"lacks \['a'\], which model.safetensors.index.json says it has"):
        weights.open_hugging_face(tmp_path)


def test_torch_parts_of_an_index_are_read(torch, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-2.bin")
    parts = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(parts))
    found = weights.open_hugging_face(tmp_path)
    assert {name: tensor.read().tolist() for name, tensor in found.items()} == {"a": [1, 1], "b": [0, 0, 0]}
    with pytest.raises(ValueError, match=r"has the files \[\], expected one"):
        weights.open_hugging_face(tmp_path / "..")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, not the file"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not weights"),
    ],
)
def test_what_a_failed_download_leaves_is_named(start, message, tmp_path):
    for name in ("a.npz", "a.safetensors", "a.bin"):
        (tmp_path / name).write_bytes(start)
        opener = weights.open_npz if name == "a.npz" else weights.open_hugging_face
        with pytest.raises(ValueError, match=message):
            opener(tmp_path / name)


def test_bfloat16_in_an_npz_is_read(tmp_path):
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    np.savez(tmp_path / "b.npz", a=values)
    np.testing.assert_array_equal(np.asarray(weights.open_npz(tmp_path / "b.npz")["a"].read(), np.float32), [1.5, -2.0])


def test_an_output_that_holds_something_else_is_not_overwritten(tmp_path):
    folder = hugging_face_vit(tmp_path / "in")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"output: .* holds a config.json that rahf.convert did not write"):
        convert.convert("vit-hf", folder, folder)
    assert (folder / "config.json").read_bytes() == before


def test_npz_pickles_and_damage_are_refused(unpacked, tmp_path):
    np.savez(tmp_path / "p.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match=r"has the pickled object a.npy, expected plain arrays"):
        weights.open_npz(tmp_path / "p.npz")
    whole = (unpacked("vit_augreg_tiny") / "vit_tiny_p8.npz").read_bytes()
    (tmp_path / "t.npz").write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"t.npz cannot be read, it is damaged"):
        weights.open_npz(tmp_path / "t.npz")


def test_torch_files_that_are_more_than_tensors_are_refused(torch, tmp_path):
    torch.save({"a": torch.ones(2), "f": print}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="a pickle with more than plain tensors; it could run code"):
        weights.open_torch(tmp_path / "evil.pt")
    torch.save({"a": torch.ones(2), "step": 3}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match=r"entries that are no tensors: \['step'\]"):
        weights.open_torch(tmp_path / "step.pt")
    (tmp_path / "t.pt").write_bytes((tmp_path / "step.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"t.pt cannot be read, it is damaged"):
        weights.open_torch(tmp_path / "t.pt")
    torch.save({"state_dict": {"a": torch.full((2,), 1.5, dtype=torch.bfloat16)}}, tmp_path / "nested.pt")
    np.testing.assert_array_equal(weights.open_torch(tmp_path / "nested.pt")["a"].read(), np.full(2, 1.5, np.float32))


def test_a_release_without_its_vocabulary_is_refused(release, tmp_path, monkeypatch):
    converted = convert.rahf_from_release(release[0], num_heads=4, what="release")
    monkeypatch.setitem(convert.READERS, "rahf-pytorch", lambda path: converted)
    with pytest.raises(ValueError, match=r"vocabulary: got none, .* pass --vocabulary=PATH"):
        convert.convert("rahf-pytorch", "rahf_model.pt", tmp_path / "out")


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    alive, most = [0], [0]

    class Counted(np.ndarray):
        def __del__(self):
            alive[0] -= 1

    def read():
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return np.zeros((100, 100), np.float32).view(Counted)

    weights.write_safetensors(tmp_path / "w.safetensors", {str(i): Tensor((100, 100), read) for i in range(5)})
    assert most[0] <= 2  # views count as well
    assert len(weights.open_safetensors(tmp_path / "w.safetensors")) == 5


# ---- Training from converted weights --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a ViT (48 px, with a class token) and of a T5 that fit configs/rahf_ci.py."""
    folder, config = tmp_path_factory.mktemp("parts"), RAHFConfig.from_dict(ci_config().model.to_dict())
    vit = dataclasses.replace(config.vit, class_token=True)
    params = tiny_model.random_params(ViT(vit), np.zeros((1, 48, 48, 3), np.float32))
    converted = {"vit": dataclasses.asdict(vit), "image_size": 48}
    convert.write(convert.Converted("vit", converted, tensors_of(params)), folder / "vit")
    ids = np.zeros((1, 2), np.int32)
    params = tiny_model.random_params(t5.T5(config.t5), ids, ids)
    convert.write(convert.Converted("t5", {"t5": dataclasses.asdict(config.t5)}, tensors_of(params)), folder / "t5")
    return folder


def ci_config(**optimizer):
    config = rahf_ci.get_config()
    config.data.source = "stream"
    config.optimizer.update(optimizer)
    return config


def initial(config):
    """Parameters before training, as numpy."""
    model_config = RAHFConfig.from_dict(config.model.to_dict())
    params = jax.jit(RAHF(model_config).init)(jax.random.key(0), *rahf.models.rahf.dummy_inputs(model_config))["params"]
    params = jax.tree.map(jax.numpy.asarray, flax.linen.unbox(params))
    return jax.device_get(convert.initialise(params, config.init, model_config))


def test_training_starts_from_converted_parts_and_leaves_frozen_ones_alone(parts, tmp_path):
    config = ci_config(freeze=("vit", "t5/token_embedder"), ema_decay=0.9)
    config.init.update(vit=str(parts / "vit"), t5=str(parts / "t5"))
    config.train.num_steps, config.eval.every = 8, 8
    before = initial(config)
    train.train(config, tmp_path)
    after = jax.device_get(rahf.load(tmp_path).params)  # the moving average's
    for part in (("vit",), ("t5", "token_embedder")):
        for x, y in zip(jax.tree.leaves(get(before, part)), jax.tree.leaves(get(after, part)), strict=True):
            assert x.tobytes() == y.tobytes()
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max() > 0, before, after)
    assert all(jax.tree.leaves(get(moved, ("t5", "encoder"))))
    assert all(jax.tree.leaves(get(moved, ("heatmap_head_implausibility",))))
    held = dict(weights.read_all(convert.read(parts / "vit", "vit").tensors))
    np.testing.assert_array_equal(before["vit"]["embedding"]["kernel"], held["embedding/kernel"])
    resampled = convert.resample_positions(held["pos_embedding"][:, 1:], 16, class_token=False)
    np.testing.assert_array_equal(before["vit"]["pos_embedding"], resampled)


def get(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_the_loss_falls_from_converted_parts_with_the_vit_frozen(parts, tmp_path):
    config = ci_config(freeze=("vit",), learning_rate=1e-2)
    config.init.vit = str(parts / "vit")
    config.train.num_steps, config.eval.every, config.checkpoint_every = 30, 30, 30
    train.train(config, tmp_path)
    events = logged(tmp_path, "train/loss")
    assert np.mean(events[-5:]) < 0.7 * np.mean(events[:3])


def logged(workdir, tag):
    from tensorboard.backend.event_processing import event_accumulator

    accumulator = event_accumulator.EventAccumulator(str(workdir / "tensorboard")).Reload()
    return [event.value for event in accumulator.Scalars(tag)]


def test_multipliers_scale_the_updates_of_a_part(tmp_path):
    from rahf import optimizers

    params = {"vit": {"kernel": np.ones((2, 2), np.float32)}, "score_head": {"kernel": np.ones((2, 2), np.float32)}}
    section = ci_config(learning_rate_multipliers=dict(vit=0.1, t5=1.0, heads=1.0)).optimizer
    optimizer = optimizers.make_optimizer(section, 4)
    state = optimizer.init(params)
    for _ in range(2):  # the first learning rate of the warm-up is 0
        updates, state = optimizer.update(params, state, params)
    ratio = np.asarray(updates["vit"]["kernel"] / updates["score_head"]["kernel"])
    np.testing.assert_allclose(ratio, 0.1, rtol=1e-5)
    section.learning_rate_multipliers = dict(vit=0.1, t4=1.0, heads=1.0)
    with pytest.raises(ValueError, match="learning_rate_multipliers: got"):
        optimizers.make_optimizer(section, 4)


def test_initial_weights_of_another_model_are_refused(parts):
    config = ci_config()
    config.init.vit = str(parts / "t5")
    with pytest.raises(ValueError, match=r"init.vit: .* is no converted vit"):
        initial(config)
    config.init.vit = str(parts / "vit")
    config.model.vit.gelu = "erf"
    with pytest.raises(ValueError, match=r"model.vit.gelu: the weights have 'tanh', the config 'erf'"):
        initial(config)


def test_freezing_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer.freeze: nothing lies under 'vitt', expected one of"):
        train.train(ci_config(freeze=("vitt",)), tmp_path)
