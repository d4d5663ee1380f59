"""Other people's weights in: a folder of ours from theirs.

    python -m rahf.convert --source=vit-npz --input=ViT-B_16.npz --output=DIR
    python -m rahf.convert --source=t5x     --input=gs://t5-data/.../checkpoint_1000000 --output=DIR

writes DIR/weights.safetensors, in our parameter names, and DIR/config.json, what the weights are of. Training starts from
such folders with `--config.init.vit=DIR` and `--config.init.t5=DIR`.

A conversion is a table: each of our parameters, the tensor of theirs that it is, and how that is laid out. Shapes and
names are checked before anything is written, and one tensor is in memory at a time.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping

import flax.traverse_util
import jax
import numpy as np
from absl import app, flags
from flax import linen as nn
from tqdm.auto import tqdm

from rahf import checkpoints, names, predict, weights
from rahf.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rahf.models.heads import HeatmapHeadConfig, ScoreHeadConfig
from rahf.models.rahf import RAHF, RAHFConfig, dummy_inputs
from rahf.models.t5 import T5, T5Config
from rahf.models.vit import ViT, ViTConfig
from rahf.weights import Tensor, Tensors
from richhf_data import schema
from richhf_data import vocabulary as vocabularies

MAX_NAMED = 5  # mismatches in a message
LENGTHS = {"text_length": 128, "keyword_length": 128}  # of a model that names none; the release reads and writes any


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model's part in our names.

    Attributes:
      kind: "vit", "t5", "clip" or "rahf".
      config: its configuration, as JSON.
      tensors: by the name of our parameter, joined by "/".
    """

    kind: str
    config: dict
    tensors: Tensors


def matched(
    theirs: Tensors, table: names.Table, ours: Mapping[str, tuple[int, ...]], unused: str, what: str
) -> Tensors:
    """Our tensors, each read from theirs when asked for.

    Args:
      table: our name -> (their name, layout). ours: our name -> the shape that our module makes.
      unused: a regular expression of their tensors that our model has no use for.

    Raises:
      ValueError: missing, extra or wrongly shaped tensors; names the first ones with both shapes.
    """
    problems, out, used = [], {}, set()
    for name, shape in ours.items():
        their_name, layout = table[name]
        used.add(their_name)
        if (tensor := theirs.get(their_name)) is None:
            problems.append(f"{name} {shape}: missing, expected the tensor {their_name}")
            continue
        try:
            got = layout(np.broadcast_to(np.float32(0), tensor.shape)).shape
        except (ValueError, IndexError):
            got = None
        if got != shape:
            problems.append(f"{name} {shape}: the tensor {their_name} has shape {tensor.shape}")
        out[name] = Tensor(shape, lambda tensor=tensor, layout=layout: layout(tensor.read()))
    for name in theirs.keys() - used:
        if not re.fullmatch(unused, name):
            problems.append(f"{name} {theirs[name].shape}: no parameter of ours takes it")
    if problems:
        more = f"\n  and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise ValueError(f"{what}: tensors do not match:\n  " + "\n  ".join(sorted(problems)[:MAX_NAMED]) + more)
    return out


def shapes(module: nn.Module, *inputs) -> dict[str, tuple[int, ...]]:
    """The parameters of a module, by joined name, from the inputs' shapes alone."""
    made = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))["params"]
    return {name: leaf.shape for name, leaf in flax.traverse_util.flatten_dict(made, sep="/").items()}


# ---- ViT ------------------------------------------------------------------------------------------------------------
def vit_npz(path) -> Converted:
    """A ViT of an AugReg or big_vision .npz, its layers one by one or scanned."""
    theirs = {name.removeprefix("params/"): tensor for name, tensor in weights.open_npz(path).items()}
    theirs = unstacked(theirs, "Transformer/encoderblock", 0)
    theirs = {names.big_vision_name(name): tensor for name, tensor in theirs.items()}
    what = f"ViT {path}"
    query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    mlp = "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
    _require(theirs, ("embedding/kernel", "pos_embedding", query, mlp), what)
    config = ViTConfig(
        patch_size=theirs["embedding/kernel"].shape[0],
        width=theirs["embedding/kernel"].shape[-1],
        depth=_count(theirs, r"Transformer/encoderblock_(\d+)/"),
        num_heads=theirs[query].shape[1],
        mlp_dim=theirs[mlp].shape[1],
        class_token="cls" in theirs,
    )
    ours = _vit_shapes(config, theirs["pos_embedding"].shape[1])
    # The classifiers, and big_vision's attention pooling; AugReg's in21k files have a layer before the logits.
    unused = r"(head|pre_logits|MAPHead_0)/.*|(opt|chrono)/.*"
    return _vit(config, matched(theirs, {name: (name, names.same) for name in ours}, ours, unused, what))


def _vit_shapes(config: ViTConfig, positions: int) -> dict[str, tuple[int, ...]]:
    side = _grid(positions - config.class_token) * config.patch_size
    return shapes(ViT(config), jax.ShapeDtypeStruct((1, side, side, 3), np.float32))


def _vit(config: ViTConfig, tensors: Tensors) -> Converted:
    size = _grid(tensors["pos_embedding"].shape[1] - config.class_token) * config.patch_size
    return Converted("vit", {"vit": dataclasses.asdict(config), "image_size": size}, tensors)


def _grid(patches: int) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"ViT: got {patches} position embeddings besides the class token's, expected a square number")
    return side


def resample_positions(positions: np.ndarray, patches: int, class_token: bool) -> np.ndarray:
    """Position embeddings for another number of patches: antialiased bilinear over the grid, the class token's kept.

    Args:
      positions: float32[1, P (+ 1), D], the class token's first if there is one. patches: the new P, a square.
    """
    first, grid = positions[:, : int(class_token)], positions[:, int(class_token) :]
    old, new, width = _grid(grid.shape[1]), _grid(patches), grid.shape[-1]
    if old != new:
        grid = jax.image.resize(grid.reshape(1, old, old, width), (1, new, new, width), "bilinear", antialias=True)
    return np.concatenate([first, np.asarray(grid).reshape(1, new * new, width)], axis=1)


def vit_hugging_face(path) -> Converted:
    """A ViT of a Hugging Face folder (config.json and the weights): `ViTModel`, or the ViT of a `ViTFor...` model."""
    theirs = {names.hugging_face_vit_name(name): tensor for name, tensor in weights.open_hugging_face(path).items()}
    config = vit_config_from_hugging_face(_hugging_face_config(path, "vit"))
    what = f"ViT {path}"
    _require(theirs, ("embeddings.position_embeddings",), what)
    ours = _vit_shapes(config, theirs["embeddings.position_embeddings"].shape[1])
    table = names.vit_from_hugging_face(config)
    return _vit(config, matched(theirs, table, ours, r"(classifier|pooler|decoder)\..*|embeddings\.mask_token", what))


def vit_config_from_hugging_face(config: Mapping) -> ViTConfig:
    """Our configuration of a ViT from Hugging Face's config.json (or one with its names)."""
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"ViT: got the activation {config['hidden_act']!r}, expected 'gelu'")
    return ViTConfig(
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        class_token=True,
        gelu="erf",
        epsilon=config.get("layer_norm_eps", 1e-12),
    )


# ---- T5 -------------------------------------------------------------------------------------------------------------
def t5_t5x(path) -> Converted:
    """A T5 of a T5X checkpoint (`examples/t5`, its layers one by one)."""
    theirs, what = weights.open_t5x(path), f"T5 {path}"
    for stack in ("encoder", "decoder"):
        # Scanned layers hold a table of relative positions each, where ours share one.
        theirs = unstacked(theirs, f"{stack}/layers", 1)
        theirs = _one_of_equal(theirs, rf"{stack}/layers_\d+/relative_posemb/", f"{stack}/relpos_bias/", what)
    embedding, wi = "token_embedder/embedding", "encoder/layers_0/mlp/wi_0/kernel"
    gated = wi in theirs
    wi = wi if gated else "encoder/layers_0/mlp/wi/kernel"
    query, bias = "encoder/layers_0/attention/query/kernel", "encoder/relpos_bias/rel_embedding"
    _require(theirs, (embedding, wi, query, bias), what)
    num_heads, num_buckets = theirs[bias].shape
    config = T5Config(
        vocab_size=theirs[embedding].shape[0],
        emb_dim=theirs[embedding].shape[1],
        num_heads=num_heads,
        head_dim=theirs[query].shape[1] // num_heads,
        num_encoder_layers=_count(theirs, r"encoder/layers_(\d+)/"),
        num_decoder_layers=_count(theirs, r"decoder/layers_(\d+)/"),
        mlp_dim=theirs[wi].shape[1],
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in theirs,
        num_buckets=num_buckets,
    )
    ours = _t5_shapes(config)
    return _t5(config, matched(theirs, {name: (name, names.same) for name in ours}, ours, "", what))


def t5_hugging_face(path) -> Converted:
    """A T5 of a Hugging Face folder: `t5-*`, `t5-v1_1-*`, `flan-t5-*`."""
    settings = _hugging_face_config(path, "t5")
    config = t5_config_from_hugging_face(settings)
    theirs, table = weights.open_hugging_face(path), names.t5_from_hugging_face(config)
    # transformers 5 writes one matrix where logits and embedding are equal, also without T5 v1.0's scale.
    if not config.logits_via_embedding and "scale_decoder_outputs" in settings and "lm_head.weight" not in theirs:
        table["decoder/logits_dense/kernel"] = ("shared.weight", names.transposed)
    return _t5(config, matched(theirs, table, _t5_shapes(config), names.T5_UNUSED, f"T5 {path}"))


def t5_config_from_hugging_face(config: Mapping) -> T5Config:
    """Our configuration of a T5 from Hugging Face's config.json."""
    activations = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}
    kind = config.get("feed_forward_proj", "relu")
    if kind not in activations:
        raise ValueError(f"T5: got feed_forward_proj {kind!r}, expected one of {sorted(activations)}")
    return T5Config(
        vocab_size=config["vocab_size"],
        emb_dim=config["d_model"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        num_encoder_layers=config["num_layers"],
        num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        mlp_dim=config["d_ff"],
        mlp_activations=activations[kind],
        # transformers 5 writes `tie_word_embeddings` as True whatever it is, and this beside it.
        logits_via_embedding=config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
        num_buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
    )


def _t5_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    ids = jax.ShapeDtypeStruct((1, 2), np.int32)
    return shapes(T5(config), ids, ids)


def _t5(config: T5Config, tensors: Tensors) -> Converted:
    return Converted("t5", {"t5": dataclasses.asdict(config)}, tensors)


# ---- CLIP -----------------------------------------------------------------------------------------------------------
def clip_hugging_face(path) -> Converted:
    """Both towers of a Hugging Face `CLIPModel` folder."""
    config = clip_config_from_hugging_face(_hugging_face_config(path, "clip"))
    image = jax.ShapeDtypeStruct((1, config.vision.image_size, config.vision.image_size, 3), np.float32)
    ours = shapes(CLIP(config), image, jax.ShapeDtypeStruct((1, config.text.length), np.int32))
    table = names.clip_from_hugging_face(config)
    tensors = matched(weights.open_hugging_face(path), table, ours, r".*\.position_ids", f"CLIP {path}")
    return Converted("clip", {"clip": dataclasses.asdict(config)}, tensors)


def clip_config_from_hugging_face(config: Mapping) -> CLIPConfig:
    """Our configuration of CLIP from Hugging Face's config.json; what the file leaves out is ViT-B/32's, as there."""
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    text_defaults, vision_defaults = CLIPTextConfig(), CLIPVisionConfig()

    def sizes(values, defaults):
        theirs = {
            "width": "hidden_size",
            "depth": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "mlp_dim": "intermediate_size",
        }
        return {ours: values.get(name, getattr(defaults, ours)) for ours, name in theirs.items()}

    vocab_size = text.get("vocab_size", text_defaults.vocab_size)
    eos_id = text.get("eos_token_id", text_defaults.eos_id)
    return CLIPConfig(
        vision=CLIPVisionConfig(
            image_size=vision.get("image_size", vision_defaults.image_size),
            patch_size=vision.get("patch_size", vision_defaults.patch_size),
            **sizes(vision, vision_defaults),
        ),
        text=CLIPTextConfig(
            vocab_size=vocab_size,
            length=text.get("max_position_embeddings", text_defaults.length),
            # 2 stands for the highest id of CLIP's own vocabulary.
            eos_id=min(text_defaults.eos_id, vocab_size - 1) if eos_id == 2 else eos_id,
            **sizes(text, text_defaults),
        ),
        projection_dim=config.get("projection_dim", 512),
        activation=vision.get("hidden_act", "quick_gelu"),
        epsilon=vision.get("layer_norm_eps", 1e-5),
    )


# ---- The first author's PyTorch release -----------------------------------------------------------------------------
def rahf_pytorch(path) -> Converted:
    """The RAHF that the paper's first author released: `rahf_model.pt`, multi-head (github.com/youweiliang/RichHF).

    Its weights are for non-commercial use. Beside it there may be a config.json with `vit.num_heads`; else heads are 64
    wide, as in the ViTs that it takes.
    """
    path = pathlib.Path(path)
    path = path / "rahf_model.pt" if path.is_dir() else path
    config_file = path.with_name("config.json")
    known = json.loads(config_file.read_text()).get("vit", {}) if config_file.is_file() else {}
    return rahf_from_release(weights.open_torch(path), known.get("num_heads"), f"RAHF {path}")


def rahf_from_release(theirs: Tensors, num_heads: int | None, what: str) -> Converted:
    """`rahf_pytorch` of tensors at hand; num_heads: of the ViT."""
    theirs = {
        "vit." + names.hugging_face_vit_name(name) if name.startswith("vit.") else name: tensor
        for name, tensor in theirs.items()
    }
    config = _release_config(theirs, num_heads, what)
    table = names.dense("image_projection", "visual_token_projection")
    for part, entries in (
        ("vit", names.vit_from_hugging_face(config.vit, "vit.")),
        ("t5", names.t5_from_hugging_face(config.t5, "t5.")),
    ):
        table |= {f"{part}/{name}": entry for name, entry in entries.items()}
    for name in schema.SCORES:
        table |= names.score_head_from_release(config, f"score_head_{name}", f"score_predictor.{name}")
    for name in schema.HEATMAPS:
        table |= names.heatmap_head_from_release(config, f"heatmap_head_{name}", f"heatmap_predictor.{name}")
    unused = rf"vit\.pooler\..*|t5\.({names.T5_UNUSED})"
    tensors = matched(theirs, table, shapes(RAHF(config), *dummy_inputs(config)), unused, what)
    return Converted("rahf", {"model": dataclasses.asdict(config), "data": LENGTHS}, tensors)


def _release_config(theirs: Tensors, num_heads: int | None, what: str) -> RAHFConfig:
    """The release's configuration, read off its tensors."""

    def shape(name):
        _require(theirs, (name,), what)
        return theirs[name].shape

    def widths(pattern):  # of the convolutions whose names match, in order
        found = {int(match[1]): tensor for name, tensor in theirs.items() if (match := re.fullmatch(pattern, name))}
        return [found[i].shape for i in sorted(found)]

    width, _, patch, _ = shape("vit.embeddings.patch_embeddings.projection.weight")
    vit = ViTConfig(
        patch_size=patch,
        width=width,
        depth=_count(theirs, r"vit\.layers\.(\d+)\."),
        num_heads=num_heads or width // 64,
        mlp_dim=shape("vit.layers.0.mlp.fc1.weight")[0],
        class_token=True,
        gelu="erf",
        epsilon=1e-12,
    )
    num_buckets, t5_heads = shape("t5.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    t5 = T5Config(
        vocab_size=shape("t5.shared.weight")[0],
        emb_dim=shape("t5.shared.weight")[1],
        num_heads=t5_heads,
        head_dim=shape("t5.encoder.block.0.layer.0.SelfAttention.q.weight")[0] // t5_heads,
        num_encoder_layers=_count(theirs, r"t5\.encoder\.block\.(\d+)\."),
        num_decoder_layers=_count(theirs, r"t5\.decoder\.block\.(\d+)\."),
        mlp_dim=shape("t5.encoder.block.0.layer.1.DenseReluDense.wi.weight")[0],
        mlp_activations=("relu",),
        logits_via_embedding=True,
        num_buckets=num_buckets,
    )
    score, heatmap = f"score_predictor.{schema.SCORES[0]}", f"heatmap_predictor.{schema.HEATMAPS[0]}"
    patches = shape("vit.embeddings.position_embeddings")[1] - 1
    dense = widths(rf"{score}\.linear_layers\.(\d+)\.weight")
    return RAHFConfig(
        image_size=_grid(patches) * patch,
        decoder_attends="text",
        vit=vit,
        t5=t5,
        score_head=ScoreHeadConfig(
            filters=tuple(shape[0] for shape in widths(rf"{score}\.conv_layers\.(\d+)\.weight")),
            kernel_size=3,
            padding="SAME",
            dense=tuple(shape[0] for shape in dense[:-1]),
            style="pytorch",
        ),
        heatmap_head=HeatmapHeadConfig(
            filters=tuple(shape[0] for shape in widths(rf"{heatmap}\.conv_layers\.(\d+)\.weight")),
            deconv_filters=tuple(shape[1] for shape in widths(rf"{heatmap}\.deconv_layers\.(\d+)\.0\.weight")),
            output_hidden=shape(f"{heatmap}.last_conv1.weight")[0],
            style="pytorch",
        ),
    )


# ---- What the tables need -------------------------------------------------------------------------------------------
def unstacked(theirs: Tensors, prefix: str, axis: int) -> Tensors:
    """Scanned layers one by one: `prefix/x` becomes `prefix_0/x`, `prefix_1/x`, ... along `axis`."""
    latest = functools.lru_cache(maxsize=1)(lambda read: read())  # one for all: a single stack is in memory
    out = {}
    for name, tensor in theirs.items():
        if not name.startswith(prefix + "/"):
            out[name] = tensor
            continue
        shape = tensor.shape[:axis] + tensor.shape[axis + 1 :]
        for i in range(tensor.shape[axis]):
            layer = f"{prefix}_{i}/{name.removeprefix(prefix + '/')}"
            out[layer] = Tensor(shape, lambda read=tensor.read, i=i: np.take(latest(read), i, axis))
    return out


def _one_of_equal(theirs: Tensors, pattern: str, name: str, what: str) -> Tensors:
    """Replaces tensors that match a prefix, one a layer, by the one that they all are."""
    found = [key for key in theirs if re.match(pattern, key)]
    if not found:
        return theirs
    first = theirs[found[0]].read()
    if any(not np.array_equal(theirs[key].read(), first) for key in found):
        raise ValueError(f"{what}: {found[0]} differs from layer to layer, expected one table for all")
    rest = {key: tensor for key, tensor in theirs.items() if key not in found}
    return rest | {name + found[0].rpartition("/")[2]: Tensor(first.shape, lambda: first)}


def _require(theirs: Tensors, needed: Iterable[str], what: str) -> None:
    if missing := [name for name in needed if name not in theirs]:
        raise ValueError(f"{what}: lacks {missing}, has {sorted(theirs)[:MAX_NAMED]} ...; is it another format?")


def _count(theirs: Tensors, pattern: str) -> int:
    return len({match[1] for name in theirs if (match := re.match(pattern, name))})


def _hugging_face_config(path, expected: str) -> dict:
    path = pathlib.Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise ValueError(f"weights: no {file}, expected Hugging Face's config.json beside the weights")
    config = json.loads(file.read_text())
    if config.get("model_type") not in (None, expected):
        raise ValueError(f"weights: {file} is of a {config['model_type']!r}, expected {expected!r}; choose another --source")
    return config


# ---- Folders of ours ------------------------------------------------------------------------------------------------
def write(converted: Converted, output) -> None:
    """Writes weights.safetensors, then config.json; a folder without the latter is not finished."""
    output = pathlib.Path(output)
    progress = functools.partial(tqdm, desc="convert", unit="tensor")
    weights.write_safetensors(output / "weights.safetensors", converted.tensors, progress)
    checkpoints.write_json(output / "config.json", {"kind": converted.kind, **converted.config})


def read(folder, kind: str) -> Converted:
    """A folder that `write` made.

    Raises:
      ValueError: no such folder, or one of another kind.
    """
    file = pathlib.Path(folder) / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    if config.pop("kind", None) != kind:
        raise ValueError(f"init.{kind}: {folder} is no converted {kind}, expected a folder that rahf.convert wrote from one")
    return Converted(kind, config, weights.open_safetensors(pathlib.Path(folder) / "weights.safetensors"))


def initialise(params, init: Mapping[str, str], config: RAHFConfig):
    """Parameters for training, with those replaced that `init` names folders of: `rahf`, then `vit` and `t5`.

    Position embeddings are resampled to the config's image size, and a class token's parameters are left out where
    the model has none. Each array stays where it was placed.

    Raises:
      ValueError: a folder of another kind or size, or made for another function than the config's (such as the GELU).
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for kind in ("rahf", "vit", "t5"):
        if not init[kind]:
            continue
        converted, prefix = read(init[kind], kind), "" if kind == "rahf" else f"{kind}/"
        what = f"init.{kind}: {init[kind]}"
        _check_same_function(converted, config, what)
        tensors = {prefix + name: tensor for name, tensor in converted.tensors.items()}
        tensors = _fitted(tensors, flat, prefix, what)
        for name, array in weights.read_all(tensors):
            flat[name] = jax.device_put(array, flat[name].sharding)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


# What a configuration may choose whatever the weights are of; for a ViT alone also its class token.
FREE = {"image_size", "dtype", "dropout", "remat", "mask_padding"}


def _check_same_function(converted: Converted, config: RAHFConfig, what: str) -> None:
    theirs = converted.config["model"] if converted.kind == "rahf" else converted.config
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    theirs = flax.traverse_util.flatten_dict({name: theirs[name] for name in theirs if name in ours}, sep=".")
    ours = flax.traverse_util.flatten_dict(ours, sep=".")
    free = FREE | ({"class_token"} if converted.kind == "vit" else set())
    differ = [
        f"model.{name}: the weights have {value!r}, the config {ours[name]!r}"
        for name, value in theirs.items()
        if name.rpartition(".")[2] not in free and ours[name] != value
    ]
    if differ:
        raise ValueError(f"{what} is for another model:\n  " + "\n  ".join(differ[:MAX_NAMED]) + "\nset --config.KEY=VALUE")


def _fitted(tensors: Tensors, ours: Mapping, prefix: str, what: str) -> Tensors:
    """The tensors at our shapes: position embeddings resampled, a class token dropped where ours has none."""
    wanted = {name: leaf.shape for name, leaf in ours.items() if name.startswith(prefix)}
    table = {name: (name, names.same) for name in wanted}
    had, has = "vit/cls" in tensors, "vit/cls" in wanted
    if (name := "vit/pos_embedding") in wanted:
        table[name] = (name, lambda x: resample_positions(x[:, max(had - has, 0) :], wanted[name][1] - has, has))
    return matched(tensors, table, wanted, "" if has else "vit/cls", what)


# ---- Workdirs -------------------------------------------------------------------------------------------------------
def rahf_workdir(path) -> Converted:
    """The best checkpoint of a training run."""
    model = predict.load(path)
    flat = flax.traverse_util.flatten_dict(model.params, sep="/")
    tensors = {name: Tensor(leaf.shape, lambda leaf=leaf: np.asarray(leaf)) for name, leaf in flat.items()}
    lengths = {name: model.config.data[name] for name in LENGTHS}
    return Converted("rahf", {"model": dataclasses.asdict(model.model_config), "data": lengths}, tensors)


def export_stablehlo(converted: Converted, path: pathlib.Path) -> None:
    """Writes a RAHF's predict function as StableHLO for CPU, GPU and TPU and any batch, without its weights.

    `jax.export.deserialize(bytes).call(weights, image, text_ids)` gives scores, heatmaps and keyword_ids without our code:
    `weights` is the dictionary that safetensors reads, image uint8[B, H, W, 3], text_ids int32[B, L], or int32[B, 7, L] in
    the augmented-prompt variant.
    """
    model_config = RAHFConfig.from_dict(converted.config["model"])
    module, lengths = RAHF(model_config), converted.config["data"]
    inputs = dummy_inputs(model_config, lengths["text_length"])

    def predict_function(params, image, text_ids):
        params = flax.traverse_util.unflatten_dict(params, sep="/")
        return module.apply({"params": params}, image, text_ids, lengths["keyword_length"], method=module.predict)

    (batch,) = jax.export.symbolic_shape("B")
    arguments = (
        {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes(module, *inputs).items()},
        *(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in inputs[:2]),
    )
    exported = jax.export.export(jax.jit(predict_function), platforms=("cpu", "cuda", "tpu"))(*arguments)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(exported.serialize())
    partial.replace(path)


READERS = {
    "vit-npz": vit_npz,
    "vit-hf": vit_hugging_face,
    "t5x": t5_t5x,
    "t5-hf": t5_hugging_face,
    "clip-hf": clip_hugging_face,
    "rahf-pytorch": rahf_pytorch,
    "workdir": rahf_workdir,
}


def convert(source: str, path, output, vocabulary=None) -> Converted:
    """What the command does; a RAHF comes with its vocabulary and as StableHLO.

    Raises:
      ValueError: an input that `source` does not describe; a RAHF without a vocabulary, or with too large a one.
    """
    converted, output = READERS[source](path), pathlib.Path(output)
    held = output / "config.json"
    if held.is_file() and "kind" not in json.loads(held.read_text()):
        raise ValueError(f"output: {output} holds a config.json that rahf.convert did not write; choose another folder")
    held.unlink(missing_ok=True)
    if converted.kind == "rahf":
        if source == "workdir":
            vocabulary = pathlib.Path(path) / "vocabulary.model"
        elif not vocabulary:
            raise ValueError(f"vocabulary: got none, {path} needs the SentencePiece model of its T5; pass --vocabulary=PATH")
        vocabulary = vocabularies.Vocabulary(vocabulary)
        predict.check_vocabulary(RAHFConfig.from_dict(converted.config["model"]), vocabulary)
        output.mkdir(parents=True, exist_ok=True)
        vocabulary.copy(output / "vocabulary.model")
        export_stablehlo(converted, output / "predict.stablehlo")
    write(converted, output)
    return converted


def main(argv):
    """The command."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    args = flags.FLAGS
    try:
        converted = convert(args.source, args.input, args.output, args.vocabulary)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    parameters = sum(int(np.prod(tensor.shape)) for tensor in converted.tensors.values())
    print(f"{args.output}: {converted.kind}, {parameters:,} parameters\n{json.dumps(converted.config, indent=2)}")


if __name__ == "__main__":
    flags.DEFINE_enum("source", None, list(READERS), "Whose format the input is in.")
    flags.DEFINE_string("input", None, "A file, a folder, or a gs:// address of a T5X checkpoint.")
    flags.DEFINE_string("output", None, "The folder to write.")
    flags.DEFINE_string("vocabulary", None, "rahf-pytorch: T5's SentencePiece model, or a tokenizer folder that has it.")
    flags.mark_flags_as_required(["source", "input", "output"])
    app.run(main)
