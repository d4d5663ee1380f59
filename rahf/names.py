"""Names and layouts of our parameters in the files of other projects.

A `TensorMap` maps each of our names (joined by "/") to the name of their tensor and a layout: a function from their array
to ours. A layout only makes views (transposes, reshapes, indexes), so a broadcast scalar suffices to compute its shape.
"""

import re
from collections.abc import Callable, Iterable

import numpy as np

from rahf.models.blip import ImageRewardConfig
from rahf.models.clip import CLIPConfig
from rahf.models.rahf import RAHFConfig
from rahf.models.resnet import ResNetConfig
from rahf.models.t5 import T5Config
from rahf.models.vit import ViTConfig

Layout = Callable[[np.ndarray], np.ndarray]
TensorMap = dict[str, tuple[str, Layout]]


def same(x):
    """Layout of a tensor that needs no change."""
    return x


def transposed(x):
    """Layout of torch's `Linear`: theirs is [out, in], ours [in, out]."""
    return x.T


def leading(x):
    """Layout of a tensor to which we add a first axis of size 1."""
    return x[None]


def convolution(x):
    """Layout of torch's `Conv2d`: theirs is [out, in, h, w], ours [h, w, in, out]."""
    return x.transpose(2, 3, 1, 0)


def patches(x):
    """Layout of a `Conv2d` of patches: theirs is [out, in, h, w], ours [h * w * in, out]."""
    return convolution(x).reshape(-1, x.shape[0])


def same_names(ours: Iterable[str]) -> TensorMap:
    """For files with our names and layouts."""
    return {name: (name, same) for name in ours}


def _norm(ours: str, theirs: str) -> TensorMap:
    return {f"{ours}/scale": (f"{theirs}.weight", same), f"{ours}/bias": (f"{theirs}.bias", same)}


def dense(ours: str, theirs: str) -> TensorMap:
    """Our dense layer from torch's `Linear`."""
    return {f"{ours}/kernel": (f"{theirs}.weight", transposed), f"{ours}/bias": (f"{theirs}.bias", same)}


def big_vision_name(name: str) -> str:
    """Translates a parameter name of AugReg or of an older big_vision file to the current big_vision name."""
    for old, new in (
        ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
        ("LayerNorm_2", "LayerNorm_1"),
        ("MlpBlock_3", "MlpBlock_0"),
        ("Transformer/posembed_input/", ""),
        ("Transformer/pos_embedding", "pos_embedding"),
    ):
        name = name.replace(old, new)
    return name


def hugging_face_vit_name(name: str) -> str:
    """Translates the name of a ViT's tensor in files of older transformers versions to the current name."""
    name = name.removeprefix("vit.")
    for old, new in (
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    ):
        name = re.sub(old, new, name)
    return name


def vit_from_hugging_face(config: ViTConfig, prefix: str = "") -> TensorMap:
    """For a ViT of Hugging Face, with names as `hugging_face_vit_name` returns them."""
    heads, head_dim = config.num_heads, config.width // config.num_heads

    def into_heads(x):  # [A * K, D] -> [D, A, K]
        _, width = x.shape
        return x.T.reshape(width, heads, head_dim)

    def out_of_heads(x):  # [D, A * K] -> [A, K, D]
        width, _ = x.shape
        return x.T.reshape(heads, head_dim, width)

    table = {
        "cls": ("embeddings.cls_token", same),
        "pos_embedding": ("embeddings.position_embeddings", same),
        "embedding/kernel": ("embeddings.patch_embeddings.projection.weight", convolution),
        "embedding/bias": ("embeddings.patch_embeddings.projection.bias", same),
    } | _norm("Transformer/encoder_norm", "layernorm")
    for i in range(config.depth):
        block, layer = f"Transformer/encoderblock_{i}", f"layers.{i}"
        table |= _norm(f"{block}/LayerNorm_0", f"{layer}.layernorm_before")
        table |= _norm(f"{block}/LayerNorm_1", f"{layer}.layernorm_after")
        table |= dense(f"{block}/MlpBlock_0/Dense_0", f"{layer}.mlp.fc1")
        table |= dense(f"{block}/MlpBlock_0/Dense_1", f"{layer}.mlp.fc2")
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for name in ("query", "key", "value"):
            theirs = f"{layer}.attention.{name[0]}_proj"
            table[f"{attention}/{name}/kernel"] = (f"{theirs}.weight", into_heads)
            table[f"{attention}/{name}/bias"] = (f"{theirs}.bias", lambda x: x.reshape(heads, head_dim))
        table[f"{attention}/out/kernel"] = (f"{layer}.attention.o_proj.weight", out_of_heads)
        table[f"{attention}/out/bias"] = (f"{layer}.attention.o_proj.bias", same)
    return {name: (prefix + theirs, layout) for name, (theirs, layout) in table.items()}


def hugging_face_resnet_name(name: str) -> str:
    """Translates the name of a ResNet's tensor of Hugging Face to torchvision's, which timm has as well."""
    name = name.removeprefix("resnet.")
    for old, new in (
        (r"^embedder\.embedder\.convolution\.", "conv1."),
        (r"^embedder\.embedder\.normalization\.", "bn1."),
        (r"^encoder\.stages\.(\d+)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
        (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
        (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
        (r"^classifier\.1\.", "fc."),
    ):
        name = re.sub(old, new, name)
    return name


def resnet_from_torchvision(config: ResNetConfig) -> TensorMap:
    """For a ResNet of torchvision or timm."""

    def conv_norm(ours, conv, norm):
        table = _norm(f"{ours}/norm", norm) | {f"{ours}/conv/kernel": (f"{conv}.weight", convolution)}
        return table | {f"{ours}/norm/{name}": (f"{norm}.running_{name}", same) for name in ("mean", "var")}

    table = conv_norm("stem", "conv1", "bn1")
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            ours, theirs = f"stage_{i}_block_{j}", f"layer{i + 1}.{j}"
            for k in range(3):
                table |= conv_norm(f"{ours}/conv_{k}", f"{theirs}.conv{k + 1}", f"{theirs}.bn{k + 1}")
            if j == 0:  # a stage changes the width
                table |= conv_norm(f"{ours}/shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    return table


def t5_from_t5x(ours: Iterable[str]) -> TensorMap:
    """For a T5 of T5X. In its scanned layers, kernels keep the axis of the heads: [D, A, K], and [A, K, D] for `out`."""
    table = same_names(ours)
    for name in table:
        if name.endswith(("query/kernel", "key/kernel", "value/kernel")):
            table[name] = (name, lambda x: x.reshape(len(x), -1))
        elif name.endswith("out/kernel"):
            table[name] = (name, lambda x: x.reshape(-1, x.shape[-1]))
    return table


# Copies of the shared embedding, and a table in the first T5 files that no model reads.
T5_UNUSED = r"(encoder|decoder)\.embed_tokens\.weight|lm_head\.weight|.*\.EncDecAttention\.relative_attention_bias\.weight"


def t5_from_hugging_face(config: T5Config, prefix: str = "") -> TensorMap:
    """For a T5 of Hugging Face."""
    table = {"token_embedder/embedding": ("shared.weight", same)}
    if not config.logits_via_embedding:
        table["decoder/logits_dense/kernel"] = ("lm_head.weight", transposed)
    for stack, depth, attentions in (
        ("encoder", config.num_encoder_layers, {"attention": "SelfAttention"}),
        (
            "decoder",
            config.num_decoder_layers,
            {"self_attention": "SelfAttention", "encoder_decoder_attention": "EncDecAttention"},
        ),
    ):
        table[f"{stack}/{stack}_norm/scale"] = (f"{stack}.final_layer_norm.weight", same)
        table[f"{stack}/relpos_bias/rel_embedding"] = (
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            transposed,
        )
        for i in range(depth):
            layer = f"{stack}/layers_{i}"
            for part, (name, theirs) in enumerate(attentions.items()):
                norm = "pre_" + {"encoder_decoder_attention": "cross_attention"}.get(name, name) + "_layer_norm"
                table[f"{layer}/{norm}/scale"] = (f"{stack}.block.{i}.layer.{part}.layer_norm.weight", same)
                for ours in ("query", "key", "value", "out"):
                    table[f"{layer}/{name}/{ours}/kernel"] = (
                        f"{stack}.block.{i}.layer.{part}.{theirs}.{ours[0]}.weight",
                        transposed,
                    )
            mlp = f"{stack}.block.{i}.layer.{len(attentions)}"
            table[f"{layer}/pre_mlp_layer_norm/scale"] = (f"{mlp}.layer_norm.weight", same)
            for ours in ("wi", "wo") if len(config.mlp_activations) == 1 else ("wi_0", "wi_1", "wo"):
                table[f"{layer}/mlp/{ours}/kernel"] = (f"{mlp}.DenseReluDense.{ours}.weight", transposed)
    return {name: (prefix + theirs, layout) for name, (theirs, layout) in table.items()}


def clip_from_hugging_face(config: CLIPConfig) -> TensorMap:
    """For a `CLIPModel` of Hugging Face."""
    table = {
        "cls": ("vision_model.embeddings.class_embedding", lambda x: x.reshape(1, 1, -1)),
        "patch_embedding/kernel": ("vision_model.embeddings.patch_embedding.weight", patches),
        "token_embedding": ("text_model.embeddings.token_embedding.weight", same),
        "image_projection/kernel": ("visual_projection.weight", transposed),
        "text_projection/kernel": ("text_projection.weight", transposed),
        "logit_scale": ("logit_scale", same),
    }
    table |= _norm("vision/pre_norm", "vision_model.pre_layrnorm")
    table |= _norm("vision/final_norm", "vision_model.post_layernorm")
    table |= _norm("text/final_norm", "text_model.final_layer_norm")
    for tower, depth in (("vision", config.vision.depth), ("text", config.text.depth)):
        table[f"{tower}/pos_embedding"] = (f"{tower}_model.embeddings.position_embedding.weight", leading)
        for i in range(depth):
            ours, theirs = f"{tower}/block_{i}", f"{tower}_model.encoder.layers.{i}"
            table |= _norm(f"{ours}/attention_norm", f"{theirs}.layer_norm1")
            table |= _norm(f"{ours}/mlp_norm", f"{theirs}.layer_norm2")
            table |= dense(f"{ours}/wi", f"{theirs}.mlp.fc1") | dense(f"{ours}/wo", f"{theirs}.mlp.fc2")
            for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
                table |= dense(f"{ours}/{part}", f"{theirs}.self_attn.{name}")
    return table


def _third(i: int, layout: Layout) -> Layout:
    """Layout of query (i = 0), key or value, whose tensors torch keeps as one."""
    return lambda x: layout(np.split(x, 3)[i])


def clip_from_open_clip(config: CLIPConfig) -> TensorMap:
    """For OpenCLIP's `CLIP` with two plain transformers."""
    table = {
        "cls": ("visual.class_embedding", lambda x: x.reshape(1, 1, -1)),
        "patch_embedding/kernel": ("visual.conv1.weight", patches),
        "token_embedding": ("token_embedding.weight", same),
        "image_projection/kernel": ("visual.proj", same),
        "text_projection/kernel": ("text_projection", same),
        "logit_scale": ("logit_scale", lambda x: x.reshape(())),
    }
    table |= _norm("vision/pre_norm", "visual.ln_pre") | _norm("vision/final_norm", "visual.ln_post")
    table |= _norm("text/final_norm", "ln_final")
    for tower, prefix, depth in (("vision", "visual.", config.vision.depth), ("text", "", config.text.depth)):
        table[f"{tower}/pos_embedding"] = (f"{prefix}positional_embedding", leading)
        for i in range(depth):
            ours, theirs = f"{tower}/block_{i}", f"{prefix}transformer.resblocks.{i}"
            table |= _norm(f"{ours}/attention_norm", f"{theirs}.ln_1") | _norm(f"{ours}/mlp_norm", f"{theirs}.ln_2")
            table |= dense(f"{ours}/wi", f"{theirs}.mlp.c_fc") | dense(f"{ours}/wo", f"{theirs}.mlp.c_proj")
            table |= dense(f"{ours}/out", f"{theirs}.attn.out_proj")
            for number, part in enumerate(("query", "key", "value")):
                table[f"{ours}/{part}/kernel"] = (f"{theirs}.attn.in_proj_weight", _third(number, transposed))
                table[f"{ours}/{part}/bias"] = (f"{theirs}.attn.in_proj_bias", _third(number, same))
    return table


def linear_layers(ours: str, theirs: Iterable[str]) -> TensorMap:
    """Our `LinearLayers` from torch's `Linear`s of these names, in their order; "" for a tensor without a prefix."""
    table = {}
    for i, name in enumerate(theirs):
        table |= dense(f"{ours}/layer_{i}", name)
    return {ours: (name.removeprefix("."), layout) for ours, (name, layout) in table.items()}


IMAGE_REWARD_HEAD = [f"mlp.layers.{i}" for i in (0, 2, 4, 6, 7)]  # dropout is between the first four
# BLIP's projections for contrastive learning, what else its checkpoints hold, and a buffer.
IMAGE_REWARD_UNUSED = r"blip\.((vision|text)_proj|itm_head|text_decoder|\w+_m)\..*|blip\.(\w+_queue|queue_ptr|temp)"
IMAGE_REWARD_UNUSED += r"|blip\.text_encoder\.(embeddings\.position_ids|pooler\..*)"


def image_reward(config: ImageRewardConfig) -> TensorMap:
    """For the model of the package `image-reward`."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    heads, head_dim = config.vision.num_heads, config.vision.width // config.vision.num_heads

    def into_heads(x):  # [A * K, D] -> [D, A, K]
        return x.T.reshape(-1, heads, head_dim)

    table = {
        "vision/cls": (f"{vision}.cls_token", same),
        "vision/pos_embedding": (f"{vision}.pos_embed", same),
        "vision/embedding/kernel": (f"{vision}.patch_embed.proj.weight", convolution),
        "vision/embedding/bias": (f"{vision}.patch_embed.proj.bias", same),
        "text/token_embedding": (f"{text}.embeddings.word_embeddings.weight", same),
        "text/pos_embedding": (f"{text}.embeddings.position_embeddings.weight", leading),
    }
    table |= _norm("vision/Transformer/encoder_norm", f"{vision}.norm") | _norm("text/norm", f"{text}.embeddings.LayerNorm")
    for i in range(config.vision.depth):
        ours, theirs = f"vision/Transformer/encoderblock_{i}", f"{vision}.blocks.{i}"
        attention = f"{ours}/MultiHeadDotProductAttention_0"
        table |= _norm(f"{ours}/LayerNorm_0", f"{theirs}.norm1") | _norm(f"{ours}/LayerNorm_1", f"{theirs}.norm2")
        table |= dense(f"{ours}/MlpBlock_0/Dense_0", f"{theirs}.mlp.fc1")
        table |= dense(f"{ours}/MlpBlock_0/Dense_1", f"{theirs}.mlp.fc2")
        for number, part in enumerate(("query", "key", "value")):
            table[f"{attention}/{part}/kernel"] = (f"{theirs}.attn.qkv.weight", _third(number, into_heads))
            table[f"{attention}/{part}/bias"] = (
                f"{theirs}.attn.qkv.bias",
                _third(number, lambda x: x.reshape(heads, head_dim)),
            )
        table[f"{attention}/out/kernel"] = (
            f"{theirs}.attn.proj.weight",
            lambda x: x.T.reshape(heads, head_dim, -1),
        )
        table[f"{attention}/out/bias"] = (f"{theirs}.attn.proj.bias", same)
    for i in range(config.text.depth):
        ours, theirs = f"text/block_{i}", f"{text}.encoder.layer.{i}"
        table |= dense(f"{ours}/wi", f"{theirs}.intermediate.dense") | dense(f"{ours}/wo", f"{theirs}.output.dense")
        table |= _norm(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm")
        for part, module in (("self", "attention"), ("cross", "crossattention")):
            for name in ("query", "key", "value"):
                table |= dense(f"{ours}/{part}_{name}", f"{theirs}.{module}.self.{name}")
            table |= dense(f"{ours}/{part}_out", f"{theirs}.{module}.output.dense")
            table |= _norm(f"{ours}/{part}_norm", f"{theirs}.{module}.output.LayerNorm")
    return table | linear_layers("head", IMAGE_REWARD_HEAD)


def _conv(ours: str, theirs: str, norm: str = "") -> TensorMap:
    """A convolution; with `norm`, the name of its RMS norm, ours is a `ConvNorm`."""
    conv = f"{ours}/conv" if norm else ours
    table = {
        f"{conv}/kernel": (f"{theirs}.weight", convolution),
        f"{conv}/bias": (f"{theirs}.bias", same),
    }
    return table | ({f"{ours}/norm/scale": (f"{norm}.scale", lambda x: x.reshape(x.shape[0]))} if norm else {})


def score_head_from_release(config: RAHFConfig, ours: str, theirs: str) -> TensorMap:
    """Our score head from the `ScorePredictor` of the first author's PyTorch release."""
    grid, channels, table = config.grid, config.score_head.filters[-1], {}
    for i in range(len(config.score_head.filters)):
        table |= _conv(f"{ours}/conv_{i}", f"{theirs}.conv_layers.{3 * i}", f"{theirs}.conv_layers.{3 * i + 1}")
    for i in range(len(config.score_head.dense)):
        table |= dense(f"{ours}/dense_{i}", f"{theirs}.linear_layers.{2 * i}")
    table |= dense(f"{ours}/output", f"{theirs}.linear_layers.{2 * len(config.score_head.dense)}")
    # They flatten [C, h, w], we flatten [h, w, C].
    table[f"{ours}/dense_0/kernel"] = (
        f"{theirs}.linear_layers.0.weight",
        lambda x: x.reshape(-1, channels, grid, grid).transpose(2, 3, 1, 0).reshape(grid * grid * channels, -1),
    )
    return table


def heatmap_head_from_release(config: RAHFConfig, ours: str, theirs: str) -> TensorMap:
    """Our heatmap head from the `HeatmapPredictor` of the first author's PyTorch release."""
    table = _conv(f"{ours}/output_0", f"{theirs}.last_conv1") | _conv(f"{ours}/output_1", f"{theirs}.last_conv2")
    for i in range(len(config.heatmap_head.filters)):
        table |= _conv(f"{ours}/conv_{i}", f"{theirs}.conv_layers.{3 * i}", f"{theirs}.conv_layers.{3 * i + 2}")
    for i in range(len(config.heatmap_head.deconv_filters)):
        up, deconv, readout = f"{ours}/up_{i}", f"{theirs}.deconv_layers.{i}", f"{theirs}.conv_layers2.{i}"
        table |= _conv(f"{up}/deconv", f"{deconv}.0", f"{deconv}.1")
        table |= _conv(f"{up}/readout_0", f"{readout}.0", f"{readout}.1")
        table |= _conv(f"{up}/readout_1", f"{readout}.3", f"{readout}.4")
        # ConvTranspose2d holds [in, out, h, w]; it scatters while we gather, so the kernel is flipped.
        table[f"{up}/deconv/conv/kernel"] = (
            f"{deconv}.0.weight",
            lambda x: x.transpose(2, 3, 0, 1)[::-1, ::-1],
        )
    return table
