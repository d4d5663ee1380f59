"""Readers of weights in the formats of other projects: each returns a `Pretrained` with our names, shapes and configuration.

A reader takes the configuration from the files, then maps each of our parameters to one of their tensors with a table of
names.py. Names and shapes are checked; values are read later, one tensor at a time.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from rahf import checkpoints, names, pretrained, weights, workdirs
from rahf.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rahf.models.heads import HeatmapHeadConfig, ScoreHeadConfig
from rahf.models.parameters import param_shapes
from rahf.models.rahf import RAHF, RAHFConfig, dummy_inputs
from rahf.models.t5 import T5, T5Config
from rahf.models.vit import ViT, ViTConfig
from rahf.pretrained import Pretrained, matched
from rahf.weights import Tensor, Tensors
from richhf_data import json_files, schema
from richhf_data.errors import UserError

LENGTHS = {"text_length": 128, "keyword_length": 128}  # for the release, which does not limit them


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
    config = vit_config_from_hugging_face(_hugging_face_config(path, "vit"))
    what = f"ViT {path}"
    _require_axes(theirs, {"embeddings.position_embeddings": 3}, what)
    ours = _vit_shapes(config, theirs["embeddings.position_embeddings"].shape[1], what)
    table = names.vit_from_hugging_face(config)
    return _vit(config, matched(theirs, table, ours, r"(classifier|pooler|decoder)\..*|embeddings\.mask_token", what))


def vit_config_from_hugging_face(config: Mapping) -> ViTConfig:
    """Hugging Face's config.json of a ViT as our configuration."""
    _require(config, ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), "ViT")
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"ViT: got the activation {config['hidden_act']!r}, expected 'gelu'")
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
    settings = _hugging_face_config(path, "t5")
    config = t5_config_from_hugging_face(settings)
    theirs, table = weights.open_hugging_face(path), names.t5_from_hugging_face(config)
    # transformers 5 writes one matrix if logits and embedding are equal, even for models other than T5 v1.0.
    if not config.logits_via_embedding and "scale_decoder_outputs" in settings and "lm_head.weight" not in theirs:
        table["decoder/logits_dense/kernel"] = ("shared.weight", names.transposed)
    return _t5(config, matched(theirs, table, _t5_shapes(config), names.T5_UNUSED, f"T5 {path}"))


def t5_config_from_hugging_face(config: Mapping) -> T5Config:
    """Hugging Face's config.json of a T5 as our configuration."""
    _require(config, ("vocab_size", "d_model", "num_heads", "d_kv", "num_layers", "d_ff"), "T5")
    if (epsilon := config.get("layer_norm_epsilon", 1e-6)) != 1e-6:
        raise UserError(f"T5: got layer_norm_epsilon {epsilon}, expected 1e-6, T5's own")
    activations = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}
    kind = config.get("feed_forward_proj", "relu")
    if kind not in activations:
        raise UserError(f"T5: got feed_forward_proj {kind!r}, expected one of {sorted(activations)}")
    return T5Config(
        vocab_size=config["vocab_size"],
        emb_dim=config["d_model"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        num_encoder_layers=config["num_layers"],
        num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        mlp_dim=config["d_ff"],
        mlp_activations=activations[kind],
        # transformers 5 always writes `tie_word_embeddings` as True; `scale_decoder_outputs` holds the real value.
        logits_via_embedding=config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
        num_buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
    )


def _t5_shapes(config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((1, 2), np.int32)
    return param_shapes(T5(config).init, ids, ids)


def _t5(config: T5Config, tensors: Tensors) -> Pretrained:
    return Pretrained("t5", {"t5": dataclasses.asdict(config)}, tensors)


# ---- CLIP -----------------------------------------------------------------------------------------------------------
def clip_hugging_face(path) -> Pretrained:
    """A CLIP, both towers, from a Hugging Face `CLIPModel` folder."""
    config = clip_config_from_hugging_face(_hugging_face_config(path, "clip"))
    image = np.zeros((1, config.vision.image_size, config.vision.image_size, 3), np.float32)
    ours = param_shapes(CLIP(config).init, image, np.zeros((1, config.text.length), np.int32))
    table = names.clip_from_hugging_face(config)
    tensors = matched(weights.open_hugging_face(path), table, ours, r".*\.position_ids", f"CLIP {path}")
    return Pretrained("clip", {"clip": dataclasses.asdict(config)}, tensors)


def clip_config_from_hugging_face(config: Mapping) -> CLIPConfig:
    """Hugging Face's config.json of a CLIP as our configuration; a missing value is ViT-B/32's, as in their code."""
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    text_defaults, vision_defaults = CLIPTextConfig(), CLIPVisionConfig()

    for name, default in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5)):
        if text.get(name, default) != vision.get(name, default):
            got = f"{text.get(name, default)!r} for text and {vision.get(name, default)!r} for images"
            raise UserError(f"CLIP: got {name} {got}, expected one for both, as OpenAI's models have")

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
            # Old files say 2 and mean the highest id of CLIP's vocabulary.
            eos_id=min(text_defaults.eos_id, vocab_size - 1) if eos_id == 2 else eos_id,
            **sizes(text, text_defaults),
        ),
        projection_dim=config.get("projection_dim", 512),
        activation=vision.get("hidden_act", "quick_gelu"),
        epsilon=vision.get("layer_norm_eps", 1e-5),
    )


# ---- The first author's PyTorch release -----------------------------------------------------------------------------
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # width -> number of heads of ViT-Ti, S, B, L and H


def rahf_pytorch(path) -> Pretrained:
    """The multi-head RAHF that the paper's first author released, `rahf_model.pt` (github.com/youweiliang/RichHF).

    Its weights are for non-commercial use. The file does not say how many heads the ViT has: a config.json beside it with
    `vit.num_heads` does, otherwise the ViT's width decides (`HEADS`).
    """
    path = pathlib.Path(path)
    path = path / "rahf_model.pt" if path.is_dir() else path
    config_file = path.with_name("config.json")
    vit = json_files.read(config_file).get("vit", {}) if config_file.is_file() else {}
    return rahf_from_release(weights.open_torch(path), vit.get("num_heads"), f"RAHF {path}")


def rahf_from_release(theirs: Tensors, num_heads: int | None, what: str) -> Pretrained:
    """The RAHF of the release's tensors.

    Args:
      num_heads: of the ViT; None = by its width. what: names the source in errors.
    """
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
    tensors = matched(theirs, table, param_shapes(RAHF(config).init, *dummy_inputs(config)), unused, what)
    return Pretrained("rahf", {"model": dataclasses.asdict(config), "data": LENGTHS}, tensors)


def _release_config(theirs: Tensors, num_heads: int | None, what: str) -> RAHFConfig:
    """The release's configuration, from the names and shapes of its tensors."""

    def shape(name):
        _require(theirs, (name,), what)
        return theirs[name].shape

    def shapes(pattern):  # of the layers whose names match, in order
        found = {int(match[1]): tensor for name, tensor in theirs.items() if (match := re.fullmatch(pattern, name))}
        return [found[i].shape for i in sorted(found)]

    width, _, patch, _ = shape("vit.embeddings.patch_embeddings.projection.weight")
    if not num_heads and width not in HEADS:
        raise UserError(
            f"{what}: got a ViT of width {width}, whose number of heads is unknown; expected a width of {list(HEADS)}, or "
            'a config.json beside the file such as {"vit": {"num_heads": 16}}'
        )
    vit = ViTConfig(
        patch_size=patch,
        width=width,
        depth=_count(theirs, r"vit\.layers\.(\d+)\."),
        num_heads=num_heads or HEADS[width],
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
    dense = shapes(rf"{score}\.linear_layers\.(\d+)\.weight")
    return RAHFConfig(
        image_size=pretrained.grid_side(patches, what) * patch,
        decoder_attends="text",
        vit=vit,
        t5=t5,
        score_head=ScoreHeadConfig(
            filters=tuple(shape[0] for shape in shapes(rf"{score}\.conv_layers\.(\d+)\.weight")),
            kernel_size=3,
            padding="SAME",
            dense=tuple(shape[0] for shape in dense[:-1]),
            style="pytorch",
        ),
        heatmap_head=HeatmapHeadConfig(
            filters=tuple(shape[0] for shape in shapes(rf"{heatmap}\.conv_layers\.(\d+)\.weight")),
            deconv_filters=tuple(shape[1] for shape in shapes(rf"{heatmap}\.deconv_layers\.(\d+)\.0\.weight")),
            output_hidden=shape(f"{heatmap}.last_conv1.weight")[0],
            style="pytorch",
        ),
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


def _hugging_face_config(path, expected: str) -> dict:
    path = pathlib.Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise UserError(f"weights: no {file}, expected Hugging Face's config.json beside the weights")
    config = json_files.read(file)
    if config.get("model_type") not in (None, expected):
        raise UserError(f"weights: {file} is of a {config['model_type']!r}, expected {expected!r}; choose another --source")
    return config


# ---- Workdirs -------------------------------------------------------------------------------------------------------
def rahf_workdir(path) -> Pretrained:
    """The best checkpoint of a training run's workdir."""
    path = pathlib.Path(path)
    config = workdirs.read_config(path)
    model_config = RAHFConfig.from_dict(config.model.to_dict())
    ours = param_shapes(RAHF(model_config).init, *dummy_inputs(model_config))
    with checkpoints.manager(path, "best") as best:
        theirs = weights.open_orbax(best.directory / str(checkpoints.best_step(best)) / "state")
    tensors = matched(theirs, names.same_names(ours), ours, "", f"workdir {path}")
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
