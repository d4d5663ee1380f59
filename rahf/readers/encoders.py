"""Reads the weights of encoders: ViT, ResNet, T5."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np

from rahf import names, pretrained, weights
from rahf.models.parameters import param_shapes
from rahf.models.resnet import ResNet, ResNetConfig
from rahf.models.t5 import T5, T5Config
from rahf.models.vit import ViT, ViTConfig
from rahf.pretrained import Pretrained, matched
from rahf.readers import files
from rahf.weights import Tensor, Tensors
from richhf_data import checked, json_files
from richhf_data.checked import Epsilon, Layers, Pixels, Size
from richhf_data.errors import UserError

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
    files.require_axes(theirs, {"embedding/kernel": 4, query: 3, mlp: 2}, what)
    patch_size, width = theirs["embedding/kernel"].shape[0], theirs["embedding/kernel"].shape[-1]
    config = ViTConfig(
        patch_size=patch_size,
        width=width,
        depth=files.count(theirs, r"Transformer/encoderblock_(\d+)/"),
        num_heads=theirs[query].shape[1],
        mlp_dim=theirs[mlp].shape[1],
        class_token="cls" in theirs,
    )
    if "pos_embedding" not in theirs:
        fixed = sincos_positions(SINCOS_SIZE // patch_size, width)
        theirs["pos_embedding"] = Tensor(fixed.shape, lambda: fixed)
    files.require_axes(theirs, {"pos_embedding": 3}, what)
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
    config = vit_config_from_hugging_face(*files.hugging_face_config(path, "vit"))
    what = f"ViT {path}"
    files.require_axes(theirs, {"embeddings.position_embeddings": 3}, what)
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


# ---- ResNet ---------------------------------------------------------------------------------------------------------
def resnet(path) -> Pretrained:
    """A bottleneck ResNet v1.5, such as ResNet-50, from torchvision's or timm's file or from a Hugging Face folder."""
    what, path = f"ResNet {path}", pathlib.Path(path)
    theirs = {names.hugging_face_resnet_name(name): tensor for name, tensor in weights.open_hugging_face(path).items()}
    files.require_axes(theirs, {"conv1.weight": 4, "layer1.0.conv3.weight": 4}, what)
    if (file := (path if path.is_dir() else path.parent) / "config.json").is_file():
        settings = json_files.read(file)
        for name, expected in (("downsample_in_bottleneck", False), ("layer_type", "bottleneck"), ("hidden_act", "relu")):
            if (found := settings.get(name, expected)) != expected:
                raise UserError(f"weights: {file} says {name} {checked.shown(found)}, expected {expected!r}")
    width, _, kernel, _ = theirs["conv1.weight"].shape
    if kernel != 7:
        raise UserError(f"{what}: its first convolution has a kernel of {kernel}, expected 7, as in a plain ResNet")
    stages = files.count(theirs, r"layer(\d+)\.")
    config = ResNetConfig(depths=tuple(files.count(theirs, rf"layer{i + 1}\.(\d+)\.") for i in range(stages)), width=width)
    ours = param_shapes(ResNet(config).init, jax.ShapeDtypeStruct((1, config.stride, config.stride, 3), np.float32))
    unused = r"fc\..*|.*\.num_batches_tracked"
    tensors = matched(theirs, names.resnet_from_torchvision(config), ours, unused, what)
    return Pretrained("resnet", {"resnet": dataclasses.asdict(config)}, tensors)


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
    files.require_axes(theirs, {embedding: 2, wi: 2, query: 2, bias: 2}, what)
    num_heads, num_buckets = theirs[bias].shape[-2:]
    config = T5Config(
        vocab_size=theirs[embedding].shape[0],
        emb_dim=theirs[embedding].shape[1],
        num_heads=num_heads,
        head_dim=int(np.prod(theirs[query].shape[1:])) // num_heads,
        num_encoder_layers=files.count(theirs, r"encoder/layers_(\d+)/"),
        num_decoder_layers=files.count(theirs, r"decoder/layers_(\d+)/"),
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
    settings, file = files.hugging_face_config(path, "t5")
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
