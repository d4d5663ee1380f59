"""Readers of weights in the formats of other projects: each returns a `Pretrained` with our names, shapes and configuration.

A reader takes the configuration from the files, then maps each of our parameters to one of their tensors with a table of
names.py. Names and shapes are checked; values are read later, one tensor at a time.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import jax
import numpy as np
import PIL.Image

from rahf import checkpoints, names, pretrained, weights, workdirs
from rahf.models.clip import ACTIVATIONS, CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rahf.models.heads import HeatmapHeadConfig, ScoreHeadConfig
from rahf.models.parameters import param_shapes
from rahf.models.rahf import RAHF, RAHFConfig, dummy_inputs
from rahf.models.t5 import T5, T5Config
from rahf.models.vit import ViT, ViTConfig
from rahf.pretrained import Pretrained, matched
from rahf.weights import Tensor, Tensors
from richhf_data import checked, json_files, schema
from richhf_data.checked import Epsilon, Layers, Pixels, Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range

LENGTHS = {"text_length": 128, "keyword_length": 128}  # for the release, which does not limit them
TASK_LENGTH = 32  # more ids of text for the names of `schema.PYTORCH_TASKS`


# ---- ViT ------------------------------------------------------------------------------------------------------------
SINCOS_SIZE = 224  # pixels; image size of the big_vision files without position embeddings


def vit_npz(path) -> Pretrained:
    """A ViT from an AugReg or big_vision .npz file, with separate or scanned layers.

    A file without position embeddings belongs to a ViT with fixed ones (`posemb="sincos2d"`); they are made for 224 px.
    """
    what = f"ViT {path}"
    theirs = {name.removeprefix("params/"): tensor for name, tensor in weights.open_npz(path).items()}
    if any(name.startswith("img/") for name in theirs):
        raise UserError(
            f"{what}: holds the two towers of a big_vision model for images and texts, SigLIP say (params/img/...), which "
            "is not supported; expected a ViT alone (params/embedding/...)"
        )
    theirs = weights.unstacked(theirs, "Transformer/encoderblock", 0)
    theirs = {names.big_vision_name(name): tensor for name, tensor in theirs.items()}
    query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    mlp = "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
    _require_axes(theirs, {"embedding/kernel": 4, query: 3, mlp: 2}, what)
    patch_size, width = theirs["embedding/kernel"].shape[0], theirs["embedding/kernel"].shape[-1]
    config = ViTConfig(
        patch_size=patch_size,
        width=width,
        depth=_count(theirs, r"Transformer/encoderblock_(\d+)/"),
        num_heads=theirs[query].shape[1],
        mlp_dim=theirs[mlp].shape[1],
        class_token="cls" in theirs,
    )
    if "pos_embedding" not in theirs:
        fixed = sincos_positions(SINCOS_SIZE // patch_size, width)
        theirs["pos_embedding"] = Tensor(fixed.shape, lambda: fixed)
    _require_axes(theirs, {"pos_embedding": 3}, what)
    length = theirs["pos_embedding"].shape[1]
    if config.class_token and round(length**0.5) ** 2 == length:
        # big_vision adds positions to the patches only, then prepends the class token.
        patches = theirs["pos_embedding"].read
        theirs["pos_embedding"] = Tensor((1, length + 1, width), lambda: np.pad(patches(), ((0, 0), (1, 0), (0, 0))))
    ours = _vit_shapes(config, theirs["pos_embedding"].shape[1], what)
    # Classifiers, big_vision's attention pooling, and the layer before the logits in AugReg's in21k files.
    unused = r"(head|pre_logits|MAPHead_0)/.*|(opt|chrono)/.*"
    return _vit(config, matched(theirs, names.same_names(ours), ours, unused, what))


def sincos_positions(side: int, width: int) -> np.ndarray:
    """big_vision's fixed position embeddings, float32[1, side * side, width]: sin x, cos x, sin y, cos y (MoCo v3)."""
    y, x = np.mgrid[:side, :side]
    frequencies = 10_000.0 ** -np.linspace(0, 1, width // 4)
    x, y = (place.reshape(-1, 1) * frequencies for place in (x, y))
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1, dtype=np.float32)[None]


def _vit_shapes(config: ViTConfig, positions: int, what: str) -> dict[str, jax.ShapeDtypeStruct]:
    side = pretrained.grid_side(positions - config.class_token, what) * config.patch_size
    return param_shapes(ViT(config).init, jax.ShapeDtypeStruct((1, side, side, 3), np.float32))


def _vit(config: ViTConfig, tensors: Tensors) -> Pretrained:
    size = pretrained.grid_side(tensors["pos_embedding"].shape[1] - config.class_token) * config.patch_size
    return Pretrained("vit", {"vit": dataclasses.asdict(config), "image_size": size}, tensors)


def vit_hugging_face(path) -> Pretrained:
    """A ViT from a Hugging Face folder (config.json and weights): a `ViTModel`, or the ViT in a `ViTFor...` model."""
    theirs = {names.hugging_face_vit_name(name): tensor for name, tensor in weights.open_hugging_face(path).items()}
    config = vit_config_from_hugging_face(*_hugging_face_config(path, "vit"))
    what = f"ViT {path}"
    _require_axes(theirs, {"embeddings.position_embeddings": 3}, what)
    ours = _vit_shapes(config, theirs["embeddings.position_embeddings"].shape[1], what)
    table = names.vit_from_hugging_face(config)
    return _vit(config, matched(theirs, table, ours, r"(classifier|pooler|decoder)\..*|embeddings\.mask_token", what))


# Hugging Face's names of activations -> ours
GELUS = {"gelu": "erf", "gelu_python": "erf", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclasses.dataclass(frozen=True)
class ViTFile:
    """What is read of Hugging Face's config.json of a ViT. The defaults are theirs."""

    patch_size: Pixels
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    hidden_act: Literal[tuple(GELUS)] = "gelu"
    layer_norm_eps: Epsilon = 1e-12
    num_channels: Literal[3] = 3


def vit_config_from_hugging_face(config: Mapping, file="ViT") -> ViTConfig:
    """Hugging Face's config.json of a ViT as our configuration. `file` names it in errors."""
    config = json_files.conform(ViTFile, config, file, extra=True)
    with json_files.named(file):
        return ViTConfig(
            patch_size=config.patch_size,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_dim=config.intermediate_size,
            class_token=True,
            gelu=GELUS[config.hidden_act],
            epsilon=config.layer_norm_eps,
        )


# ---- T5 -------------------------------------------------------------------------------------------------------------
def t5_t5x(path, timeout: float = weights.TIMEOUT) -> Pretrained:
    """A T5 from a T5X checkpoint of `examples/t5` or `examples/scalable_t5` (UMT5), with separate or scanned layers.

    Args:
      timeout: seconds that an address may take to answer.
    """
    theirs, what = weights.open_t5x(path, timeout), f"T5 {path}"
    tables = {}
    for stack in ("encoder", "decoder"):
        for scanned in (f"{stack}/{stack}", f"{stack}/layers"):
            theirs = weights.unstacked(theirs, scanned, 1, f"{stack}/layers")
        tables[stack], theirs = _tables_of_layers(theirs, stack)
    # A model whose layers share one table may still store a copy of it for each layer.
    per_layer = any((table != table[:1]).any() for table in tables.values() if table is not None)
    for stack, table in tables.items():
        if table is not None:
            table = table if per_layer else table[0]
            theirs[f"{stack}/relpos_bias/rel_embedding"] = Tensor(table.shape, lambda table=table: table)
    embedding, wi = "token_embedder/embedding", "encoder/layers_0/mlp/wi_0/kernel"
    gated = wi in theirs
    wi = wi if gated else "encoder/layers_0/mlp/wi/kernel"
    query, bias = "encoder/layers_0/attention/query/kernel", "encoder/relpos_bias/rel_embedding"
    _require_axes(theirs, {embedding: 2, wi: 2, query: 2, bias: 2}, what)
    num_heads, num_buckets = theirs[bias].shape[-2:]
    config = T5Config(
        vocab_size=theirs[embedding].shape[0],
        emb_dim=theirs[embedding].shape[1],
        num_heads=num_heads,
        head_dim=int(np.prod(theirs[query].shape[1:])) // num_heads,
        num_encoder_layers=_count(theirs, r"encoder/layers_(\d+)/"),
        num_decoder_layers=_count(theirs, r"decoder/layers_(\d+)/"),
        mlp_dim=theirs[wi].shape[1],
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in theirs,
        num_buckets=num_buckets,
        relpos_bias_per_layer=per_layer,
    )
    ours = _t5_shapes(config)
    return _t5(config, matched(theirs, names.t5_from_t5x(ours), ours, "", what))


def _tables_of_layers(theirs: Tensors, stack: str) -> tuple[np.ndarray | None, Tensors]:
    """Splits off a stack's relative position tables, [layers, A, buckets]; None if its layers share one."""
    pattern = rf"{stack}/layers_(\d+)/(relpos_bias|relative_posemb)/rel_embedding"
    found = {int(match[1]): name for name in theirs if (match := re.fullmatch(pattern, name))}
    if not found:
        return None, theirs
    if len(shapes := {theirs[name].shape for name in found.values()}) > 1:
        raise UserError(f"T5: {stack} has relative position tables of shapes {sorted(shapes)}, expected one for all layers")
    table = np.stack([theirs[found[i]].read() for i in sorted(found)])
    return table, {name: tensor for name, tensor in theirs.items() if name not in found.values()}


def t5_hugging_face(path) -> Pretrained:
    """A T5 from a Hugging Face folder: `t5-*`, `t5-v1_1-*`, `flan-t5-*`."""
    settings, file = _hugging_face_config(path, "t5")
    config = t5_config_from_hugging_face(settings, file)
    theirs, table = weights.open_hugging_face(path), names.t5_from_hugging_face(config)
    # transformers 5 writes one matrix if logits and embedding are equal, even for models other than T5 v1.0.
    if not config.logits_via_embedding and "scale_decoder_outputs" in settings and "lm_head.weight" not in theirs:
        table["decoder/logits_dense/kernel"] = ("shared.weight", names.transposed)
    return _t5(config, matched(theirs, table, _t5_shapes(config), names.T5_UNUSED, f"T5 {path}"))


@dataclasses.dataclass(frozen=True)
class T5File:
    """What is read of Hugging Face's config.json of a T5. The defaults are theirs."""

    vocab_size: Size
    d_model: Size
    num_heads: Size
    d_kv: Size
    num_layers: Layers
    d_ff: Size
    num_decoder_layers: Layers | None = None
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"
    layer_norm_epsilon: Literal[1e-6] = 1e-6
    scale_decoder_outputs: bool | None = None
    tie_word_embeddings: bool = True
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128


def t5_config_from_hugging_face(config: Mapping, file="T5") -> T5Config:
    """Hugging Face's config.json of a T5 as our configuration. `file` names it in errors."""
    config = json_files.conform(T5File, config, file, extra=True)
    # transformers 5 always writes `tie_word_embeddings` as True; `scale_decoder_outputs` holds the real value.
    scaled = config.scale_decoder_outputs
    with json_files.named(file):
        return T5Config(
            vocab_size=config.vocab_size,
            emb_dim=config.d_model,
            num_heads=config.num_heads,
            head_dim=config.d_kv,
            num_encoder_layers=config.num_layers,
            num_decoder_layers=config.num_decoder_layers or config.num_layers,
            mlp_dim=config.d_ff,
            mlp_activations=("relu",) if config.feed_forward_proj == "relu" else ("gelu", "linear"),
            logits_via_embedding=config.tie_word_embeddings if scaled is None else scaled,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )


def _t5_shapes(config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((1, 2), np.int32)
    return param_shapes(T5(config).init, ids, ids)


def _t5(config: T5Config, tensors: Tensors) -> Pretrained:
    return Pretrained("t5", {"t5": dataclasses.asdict(config)}, tensors)


# ---- CLIP -----------------------------------------------------------------------------------------------------------
def clip_hugging_face(path) -> Pretrained:
    """A CLIP, both towers, from a Hugging Face `CLIPModel` folder."""
    config = clip_config_from_hugging_face(*_hugging_face_config(path, "clip"))
    image = np.zeros((1, config.vision.image_size, config.vision.image_size, 3), np.float32)
    ours = param_shapes(CLIP(config).init, image, np.zeros((1, config.text.length), np.int32))
    table = names.clip_from_hugging_face(config)
    tensors = matched(weights.open_hugging_face(path), table, ours, r".*\.position_ids", f"CLIP {path}")
    return Pretrained("clip", {"clip": dataclasses.asdict(config)}, tensors)


@dataclasses.dataclass(frozen=True)
class CLIPTextFile:
    """What is read of Hugging Face's config.json of a CLIP's text tower. The defaults are theirs."""

    vocab_size: Size = CLIPTextConfig.vocab_size
    hidden_size: Size = CLIPTextConfig.width
    num_hidden_layers: Layers = CLIPTextConfig.depth
    num_attention_heads: Size = CLIPTextConfig.num_heads
    intermediate_size: Size = CLIPTextConfig.mlp_dim
    max_position_embeddings: Size = CLIPTextConfig.length
    hidden_act: Literal[tuple(ACTIVATIONS)] = CLIPConfig.activation
    layer_norm_eps: Epsilon = CLIPConfig.epsilon
    eos_token_id: int = CLIPTextConfig.eos_id


@dataclasses.dataclass(frozen=True)
class CLIPVisionFile:
    """The same of its image tower."""

    image_size: Pixels = CLIPVisionConfig.image_size
    patch_size: Pixels = CLIPVisionConfig.patch_size
    hidden_size: Size = CLIPVisionConfig.width
    num_hidden_layers: Layers = CLIPVisionConfig.depth
    num_attention_heads: Size = CLIPVisionConfig.num_heads
    intermediate_size: Size = CLIPVisionConfig.mlp_dim
    hidden_act: Literal[tuple(ACTIVATIONS)] = CLIPConfig.activation
    layer_norm_eps: Epsilon = CLIPConfig.epsilon
    num_channels: Literal[3] = 3


@dataclasses.dataclass(frozen=True)
class CLIPFile:
    """The same of both towers. Old files have `*_config_dict`: where it is not null, `*_config` does not count."""

    text_config: CLIPTextFile | None = None
    text_config_dict: CLIPTextFile | None = None
    vision_config: CLIPVisionFile | None = None
    vision_config_dict: CLIPVisionFile | None = None
    projection_dim: Size = CLIPConfig.projection_dim


def clip_config_from_hugging_face(config: Mapping, file="CLIP") -> CLIPConfig:
    """Hugging Face's config.json of a CLIP as our configuration. `file` names it in errors."""
    config = json_files.conform(CLIPFile, config, file, extra=True)
    text = config.text_config_dict or config.text_config or CLIPTextFile()
    vision = config.vision_config_dict or config.vision_config or CLIPVisionFile()
    return clip_config(text, vision, config.projection_dim, file)


def clip_config(text: CLIPTextFile, vision: CLIPVisionFile, projection_dim: int, file) -> CLIPConfig:
    """Our configuration of two towers in Hugging Face's names.

    Raises:
      UserError: towers of different activations or epsilons, or sizes that do not fit. Names `file`.
    """
    for name in ("hidden_act", "layer_norm_eps"):
        if getattr(text, name) != getattr(vision, name):
            got = f"{getattr(text, name)!r} for text and {getattr(vision, name)!r} for images"
            raise UserError(f"{file}: got {name} {got}, expected one for both, as OpenAI's models have")

    def sizes(tower):
        return {
            "width": tower.hidden_size,
            "depth": tower.num_hidden_layers,
            "num_heads": tower.num_attention_heads,
            "mlp_dim": tower.intermediate_size,
        }

    # Old files say 2 and mean the highest id of CLIP's vocabulary.
    highest = min(CLIPTextConfig.eos_id, text.vocab_size - 1)
    with json_files.named(file):
        return CLIPConfig(
            vision=CLIPVisionConfig(image_size=vision.image_size, patch_size=vision.patch_size, **sizes(vision)),
            text=CLIPTextConfig(
                vocab_size=text.vocab_size,
                length=text.max_position_embeddings,
                eos_id=highest if text.eos_token_id == 2 else text.eos_token_id,
                **sizes(text),
            ),
            projection_dim=projection_dim,
            activation=vision.hidden_act,
            epsilon=vision.layer_norm_eps,
        )


# ---- The first author's PyTorch release -----------------------------------------------------------------------------
RELEASE = "rahf_model.pt"  # the published file; a training of the release writes model_best.pt and model.pt
# (depth, width) of ViT-Ti, S, B, L and H, whose MLPs are four times as wide -> number of heads
HEADS = {(12, 192): 3, (12, 384): 6, (12, 768): 12, (24, 1024): 16, (32, 1280): 16}
# The ViTs that the release's training takes by name read pixels as (p / 255 - mean) / std.
PIXELS = {
    "google/vit-": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    "facebook/dino-vit": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
}
# Hugging Face's keys that are no sizes of tensors -> their types
KINDS = {"num_attention_heads": int, "layer_norm_eps": float, "layer_norm_epsilon": float}
KINDS |= {"relative_attention_max_distance": int, "tie_word_embeddings": bool, "scale_decoder_outputs": bool}
SHORT_KEYS = {"num_heads": "num_attention_heads", "num_layers": "num_hidden_layers", "mlp_dim": "intermediate_size"}


def rahf_pytorch(path) -> Pretrained:
    """A RAHF of the code that the paper's first author released (github.com/youweiliang/RichHF).

    The published weights, `rahf_model.pt`, are for non-commercial use.

    Args:
      path: the file, or its folder. `release_notes` says what is read beside it.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = [name for name in (RELEASE, "model_best.pt", "model.pt") if (path / name).is_file()]
        if found == ["model_best.pt", "model.pt"]:
            raise UserError(f"RAHF {path}: has {' and '.join(found)}, expected one; name the file")
        path /= found[0] if found else RELEASE
    return rahf_from_release(weights.open_hugging_face(path), release_notes(path.parent), f"RAHF {path}")


@dataclasses.dataclass(frozen=True)
class ReleaseArguments:
    """What is read of an args_config.json."""

    vit_model: Annotated[str, Range(1, 4096)] | None = None
    t5_model: Annotated[str, Range(1, 4096)] | None = None
    multi_heads: bool | None = None


@dataclasses.dataclass(frozen=True)
class ReleaseFile:
    """What is read of a config.json beside the release's weights."""

    vit: dict[str, Any] = dataclasses.field(default_factory=dict)
    t5: dict[str, Any] = dataclasses.field(default_factory=dict)
    multi_heads: bool | None = None


def release_notes(folder: pathlib.Path) -> dict:
    """What the files beside the release's weights say of them. None has to exist.

      args_config.json          from its training: `vit_model`, a name of `PIXELS` or a Hugging Face folder, `t5_model`
      preprocessor_config.json  Hugging Face's, of the ViT
      config.json               sections `vit` and `t5` with the keys of Hugging Face's config.json, and `multi_heads`

    Returns:
      {"vit": {...}, "t5": {...}, "pixels": {...}} and `multi_heads`, each where something is said. config.json comes first.
    """

    def values(folder, file):
        path = os.path.join(folder, file) if folder else ""
        return json_files.read(path) if os.path.isfile(path) else {}  # False for a name that no file can have

    def checked_values(hint, file):
        return json_files.conform(hint, values(folder, file), folder / file, extra=True)

    arguments, config = checked_values(ReleaseArguments, "args_config.json"), checked_values(ReleaseFile, "config.json")
    notes = {"vit": {SHORT_KEYS.get(name, name): value for name, value in config.vit.items()}, "t5": config.t5}
    notes["pixels"] = values(folder, "preprocessor_config.json")
    name = arguments.vit_model
    known = [pixels for start, pixels in PIXELS.items() if name is None or name.startswith(start)]  # by default Google's
    if not known and not os.path.isfile(os.path.join(name, "config.json")) and not (notes["vit"] and notes["pixels"]):
        raise UserError(
            f"{folder / 'args_config.json'}: got vit_model {checked.shown(name)}, expected a folder or a name that begins "
            f"with one of {list(PIXELS)}; put this ViT's preprocessor_config.json there, and its config.json as `vit` of "
            "config.json"
        )
    for part, file in (("vit", "config.json"), ("pixels", "preprocessor_config.json")):
        notes[part] = values(name, file) | notes[part]
    notes["pixels"] = (known[0] if known else {}) | notes["pixels"]
    notes["t5"] = values(arguments.t5_model, "config.json") | notes["t5"]
    return notes | {"multi_heads": arguments.multi_heads if config.multi_heads is None else config.multi_heads}


def rahf_from_release(theirs: Tensors, notes: Mapping, what: str) -> Pretrained:
    """The RAHF of the release's tensors: of any ViT and T5, with a head for each task or one for each kind of task.

    Args:
      notes: as from `release_notes`. {} will do for a ViT of a usual size that reads pixels as Google's do.
      what: names the source in errors.

    Raises:
      UserError: missing, extra or wrongly shaped tensors; tensors that contradict the notes; an architecture that RAHF
        cannot express; a number of heads that nothing tells.
    """
    for prefix in ("module.", "_orig_mod."):  # of torch's DistributedDataParallel and compile
        if all(name.startswith(prefix) for name in theirs):
            theirs = {name.removeprefix(prefix): tensor for name, tensor in theirs.items()}
    theirs = {
        "vit." + names.hugging_face_vit_name(name) if name.startswith("vit.") else name: tensor
        for name, tensor in theirs.items()
    }
    theirs, tied = _one_embedding(theirs, what)
    config = _release_config(theirs, notes, tied, what)
    theirs, pixels = _with_our_pixels(_with_biases(theirs), notes.get("pixels", {}), config.image_size, what)
    table = names.dense("image_projection", "visual_token_projection")
    for part, entries in (
        ("vit", names.vit_from_hugging_face(config.vit, "vit.")),
        ("t5", names.t5_from_hugging_face(config.t5, "t5.")),
    ):
        table |= {f"{part}/{name}": entry for name, entry in entries.items()}
    if tied and not config.t5.logits_via_embedding:
        table["t5/decoder/logits_dense/kernel"] = ("t5.shared.weight", names.transposed)
    multi = config.variant == "multi_head"
    for kind, tasks, entries in (
        ("score", schema.SCORES, names.score_head_from_release),
        ("heatmap", schema.HEATMAPS, names.heatmap_head_from_release),
    ):
        for task in tasks if multi else [""]:
            table |= entries(config, f"{kind}_head_{task}".rstrip("_"), f"{kind}_predictor.{task}".rstrip("."))
    unused = rf"vit\.(pooler\..*|embeddings\.mask_token)|t5\.({names.T5_UNUSED})"
    tensors = matched(theirs, table, param_shapes(RAHF(config).init, *dummy_inputs(config)), unused, what)
    lengths = LENGTHS | ({} if multi else {"text_length": LENGTHS["text_length"] + TASK_LENGTH})
    found = _release_found(config, notes, pixels)
    return Pretrained("rahf", {"model": dataclasses.asdict(config), "data": lengths}, tensors, found)


def _one_embedding(theirs: Tensors, what: str) -> tuple[Tensors, bool]:
    """The tensors with T5's embedding as `t5.shared.weight`, and whether the logits are of the same matrix.

    torch's files hold each copy of the matrix, safetensors' hold it once, under one of its names.
    """
    shared, output = "t5.shared.weight", "t5.lm_head.weight"
    found = [name for name in (shared, "t5.encoder.embed_tokens.weight", "t5.decoder.embed_tokens.weight") if name in theirs]
    if len(once := [*found, *([output] if output in theirs else [])]) == 1:
        return theirs | {shared: theirs[once[0]]}, True

    def equal(name):
        one, other = theirs[name], theirs[found[0]]
        return one.shape == other.shape and np.array_equal(one.read(), other.read(), equal_nan=True)

    if differ := [name for name in found[1:] if not equal(name)]:
        raise UserError(f"{what}: {differ[0]} differs from {found[0]}, expected one embedding, as every T5 has")
    named = {shared: theirs[found[0]]} if found else {}
    return theirs | named, bool(found) and output in theirs and equal(output)


def _with_biases(theirs: Tensors) -> Tensors:
    """Zeros for the biases of queries, keys and values where a ViT has none (Hugging Face's `qkv_bias=False`)."""
    linear = re.compile(r"(vit\.layers\.\d+\.attention\.[qkv]_proj)\.(weight|bias)")
    found = [match for name in theirs if (match := linear.fullmatch(name))]
    if any(match[2] == "bias" for match in found):
        return theirs
    shapes = {f"{match[1]}.bias": theirs[match[0]].shape[:1] for match in found}
    return theirs | {name: Tensor(shape, lambda shape=shape: np.zeros(shape, np.float32)) for name, shape in shapes.items()}


def _with_our_pixels(theirs: Tensors, pixels: Mapping, size: int, what: str) -> tuple[Tensors, str]:
    """Changes the patch embedding so that it reads our pixels, p / 127.5 - 1, and says in words how theirs were.

    Args:
      pixels: Hugging Face's preprocessor_config.json, or {} for p / 127.5 - 1. size: of the image, in pixels.
    """
    pixels = {name: value for name, value in pixels.items() if value is not None}
    for name, allowed in (
        ("do_resize", (True,)),
        ("do_center_crop", (False,)),
        ("do_rescale", (True, False)),
        ("do_normalize", (True, False)),
        ("resample", (int(PIL.Image.Resampling.BILINEAR),)),
        ("size", (size, {"height": size, "width": size})),
    ):
        if name in pixels and pixels[name] not in allowed:
            raise UserError(f"{what}: its ViT's preprocessor has {name} {pixels[name]!r}, expected one of {list(allowed)}")
    mean, std = (pixels.get(name, [0.5] * 3) for name in ("image_mean", "image_std"))
    factor = pixels.get("rescale_factor", 1 / 255)
    for name, value, length, words in (
        ("image_mean", mean, 3, "3 finite numbers"),
        ("image_std", std, 3, "3 finite numbers above 0"),
        ("rescale_factor", [factor], 1, "a finite number above 0"),
    ):
        good = isinstance(value, list) and all(_is_number(x) and (x > 0 or name == "image_mean") for x in value)
        if not good or len(value) != length:
            raise UserError(f"{what}: its ViT's preprocessor has {name} {value!r}, expected {words}")
    if not pixels.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if not pixels.get("do_rescale", True):
        factor = 1.0
    # factor * p = half * (x + 1), where x is what we read
    half, mean, std = 127.5 * factor, np.asarray(mean), np.asarray(std)
    scale, shift = half / std, (half - mean) / std  # float64[3] each
    if np.allclose(scale, 1, rtol=1e-9) and np.allclose(shift, 0, atol=1e-9):
        return theirs, "pixels from -1 to 1"
    name = "vit.embeddings.patch_embeddings.projection"
    kernel, bias = theirs[f"{name}.weight"], theirs[f"{name}.bias"]
    ours = {
        f"{name}.weight": Tensor(kernel.shape, lambda: kernel.read() * scale[:, None, None]),
        f"{name}.bias": Tensor(bias.shape, lambda: bias.read() + kernel.read().sum((2, 3), np.float64) @ shift),
    }
    return theirs | ours, f"pixels of mean {mean.tolist()} and deviation {std.tolist()}, folded into the patch embedding"


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _release_config(theirs: Tensors, notes: Mapping, tied: bool, what: str) -> RAHFConfig:
    """The release's configuration, from the names and shapes of its tensors; the notes say what these do not.

    Args:
      tied: whether T5's logits are computed from its embedding.
    """

    def shape(name, rank):
        _require(theirs, (name,), what)
        if len(found := theirs[name].shape) != rank or 0 in found:
            raise UserError(f"{what}: {name} has shape {found}, expected {rank} axes")
        return found

    def sizes(pattern, rank, axis=0):  # of an axis of the layers whose names match, in order
        found = {int(match[1]): name for name in theirs if (match := re.fullmatch(pattern, name))}
        return tuple(shape(found[i], rank)[axis] for i in sorted(found))

    width, _, patch, _ = shape("vit.embeddings.patch_embeddings.projection.weight", 4)
    side = pretrained.grid_side(shape("vit.embeddings.position_embeddings", 3)[1] - 1, what)
    vit = {
        "patch_size": patch,
        "image_size": side * patch,
        "hidden_size": width,
        "num_hidden_layers": _count(theirs, r"vit\.layers\.(\d+)\."),
        "intermediate_size": shape("vit.layers.0.mlp.fc1.weight", 2)[0],
    }
    vit = _with_notes(vit, notes.get("vit", {}), "ViT", what)
    vit = {"num_attention_heads": _usual_heads(vit, what)} | vit if "num_attention_heads" not in vit else vit

    num_buckets, t5_heads = shape("t5.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2)
    gated = "t5.encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in theirs
    t5 = {
        "vocab_size": shape("t5.shared.weight", 2)[0],
        "d_model": shape("t5.shared.weight", 2)[1],
        "num_heads": t5_heads,
        "d_kv": shape("t5.encoder.block.0.layer.0.SelfAttention.q.weight", 2)[0] // t5_heads,
        "num_layers": _count(theirs, r"t5\.encoder\.block\.(\d+)\."),
        "num_decoder_layers": _count(theirs, r"t5\.decoder\.block\.(\d+)\."),
        "d_ff": shape(f"t5.encoder.block.0.layer.1.DenseReluDense.wi{'_0' if gated else ''}.weight", 2)[0],
        "relative_attention_num_buckets": num_buckets,
    }
    t5 = {"feed_forward_proj": "gated-gelu" if gated else "relu"} | _with_notes(t5, notes.get("t5", {}), "T5", what)
    if str(kind := t5["feed_forward_proj"]).startswith("gated-") != gated:
        raise UserError(f"{what}: its notes say feed_forward_proj {kind!r}, its MLPs are {'' if gated else 'not '}gated")
    # transformers 5 gives v1.1's logits the embedding's matrix where a file has none of their own, and does not scale them.
    scaled = t5.get("scale_decoder_outputs", t5.get("tie_word_embeddings", tied and not gated))
    if scaled and not tied:
        raise UserError(
            f"{what}: its notes say that T5 has one matrix for embedding and logits (tie_word_embeddings), its "
            "t5.lm_head.weight is another"
        )
    t5["scale_decoder_outputs"] = scaled

    variant, score, heatmap = _release_heads(theirs, notes.get("multi_heads"), what)
    for name in (f"{score}.conv_layers.0", f"{score}.linear_layers.0", f"{heatmap}.conv_layers.0"):
        _require(theirs, (f"{name}.weight",), what)
    config = RAHFConfig(
        variant=variant,
        image_size=side * patch,
        decoder_attends="text",
        vit=vit_config_from_hugging_face(vit, what),
        t5=t5_config_from_hugging_face(t5, what),
        score_head=ScoreHeadConfig(
            filters=sizes(rf"{score}\.conv_layers\.(\d+)\.weight", 4),
            kernel_size=3,
            padding="SAME",
            dense=sizes(rf"{score}\.linear_layers\.(\d+)\.weight", 2)[:-1],
            style="pytorch",
        ),
        heatmap_head=HeatmapHeadConfig(
            filters=sizes(rf"{heatmap}\.conv_layers\.(\d+)\.weight", 4),
            deconv_filters=sizes(rf"{heatmap}\.deconv_layers\.(\d+)\.0\.weight", 4, axis=1),
            output_hidden=shape(f"{heatmap}.last_conv1.weight", 4)[0],
            style="pytorch",
        ),
    )
    return dataclasses.replace(config, image_projection=not config.projects_image)


def _with_notes(sizes: Mapping, notes: Mapping, part: str, what: str) -> dict:
    """The sizes that the tensors have and the notes, as one of Hugging Face's configs; UserError where they differ."""
    for name, size in sizes.items():
        if notes.get(name) not in (None, size):
            raise UserError(f"{what}: its notes say {name} {notes[name]!r} of the {part}, its tensors {size}")
    for name, kind in KINDS.items():
        if (value := notes.get(name)) is None or (kind is bool and isinstance(value, bool)):
            continue
        if kind is bool or not _is_number(value) or value <= 0 or (kind is int and not isinstance(value, int)):
            expected = "true or false" if kind is bool else f"{kind.__name__} above 0"
            raise UserError(f"{what}: its notes say {name} {value!r} of the {part}, expected {expected}")
    return {name: value for name, value in notes.items() if value is not None} | sizes


def _usual_heads(vit: Mapping, what: str) -> int:
    """The number of heads of a ViT-Ti, S, B, L or H; UserError for other sizes."""
    depth, width, mlp = (vit[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    if (depth, width) not in HEADS or mlp != 4 * width:
        usual = ", ".join(f"{depth} of width {width}" for depth, width in HEADS)
        raise UserError(
            f"{what}: got a ViT of {depth} layers and width {width}, whose number of heads is unknown; expected layers of "
            f'the usual sizes ({usual}), or a config.json beside the file such as {{"vit": {{"num_heads": 16}}}}'
        )
    return HEADS[depth, width]


def _release_heads(theirs: Tensors, multi_heads: bool | None, what: str) -> tuple[str, str, str]:
    """The variant, and where in the tensors one of its score heads and one of its heatmap heads is."""
    kinds = "score_predictor", "heatmap_predictor"
    scores, heatmaps = ({name.split(".")[1] for name in theirs if name.startswith(f"{kind}.")} for kind in kinds)
    single = "conv_layers" in scores & heatmaps
    if not single and (scores != set(schema.SCORES) or heatmaps != set(schema.HEATMAPS)):
        raise UserError(
            f"{what}: got score_predictor {sorted(scores)} and heatmap_predictor {sorted(heatmaps)}, expected one head for "
            f"each of {schema.SCORES} and {schema.HEATMAPS}, or one of each kind"
        )
    if multi_heads not in (None, not single):
        raise UserError(f"{what}: its notes say multi_heads {multi_heads!r}, its tensors {not single}")
    if single:
        return "augmented_prompt_pytorch", *kinds
    return "multi_head", f"{kinds[0]}.{schema.SCORES[0]}", f"{kinds[1]}.{schema.HEATMAPS[0]}"


def _release_found(config: RAHFConfig, notes: Mapping, pixels: str) -> str:
    """What was found, in words, and what of it no note says."""
    vit, t5 = config.vit, config.t5
    heads = (
        "one head for each score and heatmap"
        if config.variant == "multi_head"
        else "one score head and one heatmap head, prompts with the names of their tasks"
    )
    said = " (as usual at this size)" if "num_attention_heads" not in notes.get("vit", {}) else ""
    size = f"{config.image_size} px in patches of {vit.patch_size}, {vit.depth} layers of width {vit.width}"
    mlps = "ReLU" if len(t5.mlp_activations) == 1 else "gated GELU"
    output = "the embedding" if t5.logits_via_embedding else "its own"
    layers = f"{t5.num_encoder_layers} + {t5.num_decoder_layers} layers of width {t5.emb_dim}"
    return (
        f"{heads}\n"
        f"  ViT: {size}, {vit.num_heads} heads{said}, epsilon {vit.epsilon:g}, {pixels}\n"
        f"  T5: {layers}, {t5.num_heads} heads, {mlps} MLPs of {t5.mlp_dim}, output matrix: {output}"
    )


# ---- Checks of their files ------------------------------------------------------------------------------------------
def _require(theirs: Mapping, needed: Iterable[str], what: str) -> None:
    if missing := [name for name in needed if name not in theirs]:
        raise UserError(f"{what}: lacks {missing}, has {sorted(theirs)[: pretrained.MAX_NAMED]} ...; is it another format?")


def _require_axes(theirs: Tensors, needed: Mapping[str, int], what: str) -> None:
    """needed: name of a tensor -> how many axes it has at least."""
    _require(theirs, needed, what)
    for name, axes in needed.items():
        if len(shape := theirs[name].shape) < axes:
            raise UserError(f"{what}: the tensor {name} has shape {shape}, expected at least {axes} axes")


def _count(theirs: Tensors, pattern: str) -> int:
    return len({match[1] for name in theirs if (match := re.match(pattern, name))})


def _hugging_face_config(path, expected: str) -> tuple[dict, pathlib.Path]:
    """The config.json beside Hugging Face's weights, and its path."""
    path = pathlib.Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise UserError(f"weights: no {file}, expected Hugging Face's config.json beside the weights")
    config = json_files.read(file)
    if config.get("model_type") not in (None, expected):
        found = checked.shown(config["model_type"])
        raise UserError(f"weights: {file} is of a {found}, expected {expected!r}; choose another --source")
    return config, file


# ---- Workdirs -------------------------------------------------------------------------------------------------------
def rahf_workdir(path) -> Pretrained:
    """The best checkpoint of a training run's workdir. An array that does not read as it was saved is refused when read."""
    path = pathlib.Path(path)
    config = workdirs.read_config(path)
    model_config = RAHFConfig.from_dict(config.model.to_dict())
    ours = param_shapes(RAHF(model_config).init, *dummy_inputs(model_config))
    with checkpoints.manager(path, "best") as best:
        step = checkpoints.best_step(best)
        where, saved_digests = best.directory / str(step), checkpoints.read_metadata(best, step)["digests"]
    theirs = weights.open_orbax(where / "state")

    def read(name):
        array = theirs[name].read()
        if checkpoints.digests({name: array}) != {name: saved_digests.get(name)}:
            raise UserError(f"checkpoint: {where} is damaged: {name} does not read as it was saved")
        return array

    checked = {name: Tensor(tensor.shape, functools.partial(read, name)) for name, tensor in theirs.items()}
    tensors = matched(checked, names.same_names(ours), ours, "", f"workdir {path}")
    lengths = {name: config.data[name] for name in LENGTHS}
    return Pretrained("rahf", {"model": dataclasses.asdict(model_config), "data": lengths}, tensors)


READERS = {
    "vit-npz": vit_npz,
    "vit-hf": vit_hugging_face,
    "t5x": t5_t5x,
    "t5-hf": t5_hugging_face,
    "clip-hf": clip_hugging_face,
    "rahf-pytorch": rahf_pytorch,
    "workdir": rahf_workdir,
}
