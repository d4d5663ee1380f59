"""Reads the weights of CLIPs, and of the preference scores that are made of a CLIP or a BLIP."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np

from rahf import names, pretrained, weights
from rahf.models.blip import BLIPTextConfig, ImageReward, ImageRewardConfig
from rahf.models.clip import ACTIVATIONS, CLIP, MEAN, STD, Aesthetic, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rahf.models.parameters import param_shapes
from rahf.models.vit import ViTConfig
from rahf.pretrained import Pretrained, matched
from rahf.readers import files
from rahf.weights import Tensors
from richhf_data import checked, json_files
from richhf_data.checked import Epsilon, Layers, Pixels, Size
from richhf_data.errors import UserError


# ---- CLIP -----------------------------------------------------------------------------------------------------------
def clip_hugging_face(path) -> Pretrained:
    """A CLIP, both towers, from a Hugging Face `CLIPModel` folder."""
    config = clip_config_from_hugging_face(*files.hugging_face_config(path, "clip"))
    theirs, table = weights.open_hugging_face(path), names.clip_from_hugging_face(config)
    return _clip(config, matched(theirs, table, _clip_shapes(config), r".*\.position_ids", f"CLIP {path}"))


def _clip_shapes(config: CLIPConfig) -> dict[str, jax.ShapeDtypeStruct]:
    size, length = config.vision.image_size, config.text.length
    image, ids = jax.ShapeDtypeStruct((1, size, size, 3), np.float32), jax.ShapeDtypeStruct((1, length), np.int32)
    return param_shapes(CLIP(config).init, image, ids)


def _clip(config: CLIPConfig, tensors: Tensors, found: str = "") -> Pretrained:
    return Pretrained("clip", {"clip": dataclasses.asdict(config)}, tensors, found)


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


# ---- OpenCLIP -------------------------------------------------------------------------------------------------------
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # beside others in a folder of the hub
OPEN_CLIP_CONFIG = "open_clip_config.json"
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # width of an image tower -> of its heads; the others have 64
OTHER_TOWERS = {  # start of a tensor's name -> the kind of model
    "visual.layer1.": "a ResNet",
    "visual.trunk.": "an image tower of timm",
    "text_decoder.": "a CoCa",
    "logit_bias": "a SigLIP",
    "text.transformer.encoder.": "a text tower of Hugging Face",
}


@dataclasses.dataclass(frozen=True)
class OpenCLIPVisionFile:
    """What is read of `vision_cfg`, and what has to have OpenCLIP's default because no tensor tells of it."""

    width: Size | None = None
    layers: Layers | None = None
    image_size: Pixels | None = None
    patch_size: Pixels | None = None
    head_width: Size | None = None
    pool_type: Literal["tok"] = "tok"
    act_kwargs: None = None
    norm_kwargs: None = None
    timm_model_name: None = None


@dataclasses.dataclass(frozen=True)
class OpenCLIPTextFile:
    """The same of `text_cfg`."""

    width: Size | None = None
    layers: Layers | None = None
    context_length: Size | None = None
    vocab_size: Size | None = None
    heads: Size | None = None
    pool_type: Literal["argmax"] = "argmax"
    no_causal_mask: Literal[False] = False
    embed_cls: Literal[False] = False
    act_kwargs: None = None
    norm_kwargs: None = None
    hf_model_name: None = None


@dataclasses.dataclass(frozen=True)
class OpenCLIPModelFile:
    """The same of `model_cfg`."""

    embed_dim: Size | None = None
    quick_gelu: bool = False
    vision_cfg: OpenCLIPVisionFile = OpenCLIPVisionFile()
    text_cfg: OpenCLIPTextFile = OpenCLIPTextFile()


@dataclasses.dataclass(frozen=True)
class OpenCLIPPixelsFile:
    """The same of `preprocess_cfg`: pictures have to be prepared as OpenAI's CLIP does."""

    mean: tuple[float, ...] = tuple(map(float, MEAN.astype(str)))
    std: tuple[float, ...] = tuple(map(float, STD.astype(str)))
    interpolation: Literal["bicubic"] = "bicubic"
    resize_mode: Literal["shortest"] = "shortest"


@dataclasses.dataclass(frozen=True)
class OpenCLIPFile:
    """What is read of an open_clip_config.json."""

    model_cfg: OpenCLIPModelFile = OpenCLIPModelFile()
    preprocess_cfg: OpenCLIPPixelsFile = OpenCLIPPixelsFile()


def clip_open_clip(path) -> Pretrained:
    """A CLIP, both towers, from OpenCLIP's weights: a file, or a folder of the hub.

    open_clip_config.json is read where it lies beside the weights. It alone says that the activation is "quick_gelu", and
    how wide the heads are in a model whose sizes no published one has.
    """
    path = pathlib.Path(path)
    folder, file = (path, path) if path.is_dir() else (path.parent, path)
    if path.is_dir():
        file = next((path / name for name in OPEN_CLIP_FILES if (path / name).is_file()), path)
    settings = json_files.read(folder / OPEN_CLIP_CONFIG) if (folder / OPEN_CLIP_CONFIG).is_file() else None
    return clip_from_open_clip(weights.open_hugging_face(file), settings, f"CLIP {path}")


def clip_from_open_clip(theirs: Tensors, settings: Mapping | None, what: str) -> Pretrained:
    """A CLIP from the tensors of OpenCLIP, of a training's checkpoint as well.

    Args:
      settings: the content of open_clip_config.json, if there is one. what: names the source in errors.

    Raises:
      UserError: towers that are no plain transformers, or a configuration that the tensors contradict.
    """
    theirs = {name.removeprefix("module."): tensor for name, tensor in theirs.items()}
    for start, kind in OTHER_TOWERS.items():
        if any(name.startswith(start) for name in theirs):
            raise UserError(f"{what}: holds {kind} ({start}...), expected two plain transformers, such as ViT-H-14")
    theirs = {name.removeprefix("text."): tensor for name, tensor in theirs.items()}  # as a `CustomTextCLIP` has them
    file = json_files.conform(OpenCLIPFile, settings or {}, f"{what}: {OPEN_CLIP_CONFIG}", extra=True)
    config = _open_clip_config(theirs, file, what)
    if settings is None and config.text.vocab_size != CLIPTextConfig.vocab_size:
        raise UserError(
            f"{what}: embeds {config.text.vocab_size} ids, expected the {CLIPTextConfig.vocab_size} of CLIP's tokenizer; "
            f"put its {OPEN_CLIP_CONFIG} beside the weights, which says what another text tower computes"
        )
    vision, text = config.vision, config.text
    found = (
        f"image tower of {vision.depth} layers, {vision.num_heads} heads, {vision.image_size} px; text tower of "
        f"{text.depth} layers, {text.num_heads} heads; activation {config.activation}"
    )
    if settings is None:
        found += f"; no {OPEN_CLIP_CONFIG} says otherwise"
    return _clip(config, matched(theirs, names.clip_from_open_clip(config), _clip_shapes(config), "attn_mask", what), found)


def _open_clip_config(theirs: Tensors, file: OpenCLIPFile, what: str) -> CLIPConfig:
    patches, block = "visual.conv1.weight", "transformer.resblocks"
    needed = {patches: 4, "visual.positional_embedding": 2, "visual.proj": 2, f"visual.{block}.0.mlp.c_fc.weight": 2}
    needed |= {"token_embedding.weight": 2, "positional_embedding": 2, f"{block}.0.mlp.c_fc.weight": 2}
    files.require_axes(theirs, needed, what)
    model, vision, text = file.model_cfg, file.model_cfg.vision_cfg, file.model_cfg.text_cfg
    width, patch_size = theirs[patches].shape[0], theirs[patches].shape[-1]
    side = pretrained.grid_side(theirs["visual.positional_embedding"].shape[0] - 1, what)
    vocab_size, text_width = theirs["token_embedding.weight"].shape
    depths = [files.count(theirs, rf"{prefix}transformer\.resblocks\.(\d+)\.") for prefix in (r"visual\.", "")]
    length, embed_dim = theirs["positional_embedding"].shape[0], theirs["visual.proj"].shape[1]
    for name, said, found in (
        ("embed_dim", model.embed_dim, embed_dim),
        ("vision_cfg.width", vision.width, width),
        ("vision_cfg.layers", vision.layers, depths[0]),
        ("vision_cfg.patch_size", vision.patch_size, patch_size),
        ("vision_cfg.image_size", vision.image_size, side * patch_size),
        ("text_cfg.width", text.width, text_width),
        ("text_cfg.layers", text.layers, depths[1]),
        ("text_cfg.context_length", text.context_length, length),
        ("text_cfg.vocab_size", text.vocab_size, vocab_size),
    ):
        if said not in (None, found):
            raise UserError(f"{what}: {OPEN_CLIP_CONFIG}: {name}: got {said}, expected {found}, as the tensors say")
    for name, said, expected in (("mean", file.preprocess_cfg.mean, MEAN), ("std", file.preprocess_cfg.std, STD)):
        if np.shape(said) != (3,) or not np.allclose(said, expected, atol=1e-5):
            expected = ", ".join(map(str, expected))
            raise UserError(f"{what}: {OPEN_CLIP_CONFIG}: preprocess_cfg.{name}: got {said}, expected OpenAI's {expected}")
    with json_files.named(what):
        return CLIPConfig(
            vision=CLIPVisionConfig(
                image_size=side * patch_size,
                patch_size=patch_size,
                width=width,
                depth=depths[0],
                num_heads=max(1, width // (vision.head_width or HEAD_WIDTHS.get(width, 64))),
                mlp_dim=theirs[f"visual.{block}.0.mlp.c_fc.weight"].shape[0],
            ),
            text=CLIPTextConfig(
                vocab_size=vocab_size,
                width=text_width,
                depth=depths[1],
                num_heads=text.heads or max(1, text_width // 64),
                mlp_dim=theirs[f"{block}.0.mlp.c_fc.weight"].shape[0],
                length=length,
                eos_id=min(CLIPTextConfig.eos_id, vocab_size - 1),
            ),
            projection_dim=embed_dim,
            activation="quick_gelu" if model.quick_gelu else "gelu",
        )


# ---- Preference scores ----------------------------------------------------------------------------------------------
AESTHETIC_LAYERS = (0, 2, 4, 6, 7)  # of the predictor with five; dropout is between the first four


def aesthetic(path, clip=None) -> Pretrained:
    """LAION's aesthetic predictor: one linear layer or five, and the image tower of the CLIP that it was trained on.

    Args:
      path: the .pth of the head. clip: a folder of kind "clip", of OpenAI's CLIP L/14 for the published heads for L/14.

    Raises:
      UserError: a head with activations, one for another width than the CLIP's, no CLIP.
    """
    what = f"aesthetic predictor {path}"
    if not clip:
        raise UserError(f"clip: got none, {path} needs the CLIP that it was trained on; pass --clip=FOLDER of rahf.convert")
    of_clip, theirs = pretrained.read(clip, "clip"), weights.open_hugging_face(path)
    layers = [""] if "weight" in theirs else [f"layers.{i}" for i in AESTHETIC_LAYERS]
    table = names.linear_layers("head", layers)
    files.require_axes(theirs, {name: 2 for name, _ in table.values() if name.endswith("weight")}, what)
    config, shapes = (
        checked.conform(CLIPConfig, of_clip.config["clip"]),
        [theirs[name].shape for name, _ in table.values()][::2],
    )
    if shapes[0][1] != config.projection_dim:
        raise UserError(
            f"{what}: reads embeddings of width {shapes[0][1]}, the CLIP {clip} gives {config.projection_dim}; pass the "
            "CLIP that it was trained on"
        )
    hidden = [shape[0] for shape in shapes[:-1]]
    image = jax.ShapeDtypeStruct((1, config.vision.image_size, config.vision.image_size, 3), np.float32)
    ours = param_shapes(Aesthetic(config, tuple(hidden)).init, image)
    of_head = {name: leaf for name, leaf in ours.items() if name.startswith("head/")}
    image_tower = {name.removeprefix("clip/"): leaf for name, leaf in ours.items() if name not in of_head}
    unused = "(text|text_projection)/.*|token_embedding|logit_scale"
    tower = matched(of_clip.tensors, names.same_names(image_tower), image_tower, unused, f"CLIP {clip}")
    tensors = {f"clip/{name}": tensor for name, tensor in tower.items()} | matched(theirs, table, of_head, "", what)
    return Pretrained("aesthetic", {"clip": of_clip.config["clip"], "hidden": hidden}, tensors)


def image_reward(path) -> Pretrained:
    """ImageReward, from the file ImageReward.pt or its folder. All its heads are 64 wide, as in BLIP."""
    path = pathlib.Path(path)
    path = path / "ImageReward.pt" if path.is_dir() else path
    return image_reward_from(weights.open_hugging_face(path), f"ImageReward {path}")


def image_reward_from(theirs: Tensors, what: str) -> Pretrained:
    """ImageReward from its tensors. `what` names their source in errors."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    tensors = {
        "patches": f"{vision}.patch_embed.proj.weight",
        "positions": f"{vision}.pos_embed",
        "vision_mlp": f"{vision}.blocks.0.mlp.fc1.weight",
        "tokens": f"{text}.embeddings.word_embeddings.weight",
        "text_positions": f"{text}.embeddings.position_embeddings.weight",
        "text_mlp": f"{text}.encoder.layer.0.intermediate.dense.weight",
    }
    axes = {"patches": 4, "positions": 3}
    needed = {name: axes.get(part, 2) for part, name in tensors.items()}
    files.require_axes(theirs, needed | {f"{name}.weight": 2 for name in names.IMAGE_REWARD_HEAD}, what)
    shapes = {part: theirs[name].shape for part, name in tensors.items()}
    width, patch_size = shapes["patches"][0], shapes["patches"][-1]
    vocab_size, text_width = shapes["tokens"]
    with json_files.named(what):
        config = ImageRewardConfig(
            vision=ViTConfig(
                patch_size=patch_size,
                width=width,
                depth=files.count(theirs, r"blip\.visual_encoder\.blocks\.(\d+)\."),
                num_heads=max(1, width // 64),
                mlp_dim=shapes["vision_mlp"][0],
                class_token=True,
                gelu="erf",
            ),
            text=BLIPTextConfig(
                vocab_size=vocab_size,
                width=text_width,
                depth=files.count(theirs, r"blip\.text_encoder\.encoder\.layer\.(\d+)\."),
                num_heads=max(1, text_width // 64),
                mlp_dim=shapes["text_mlp"][0],
                positions=shapes["text_positions"][0],
            ),
            image_size=pretrained.grid_side(shapes["positions"][1] - 1, what) * patch_size,
            hidden=tuple(theirs[f"{name}.weight"].shape[0] for name in names.IMAGE_REWARD_HEAD[:-1]),
        )
    size, length = config.image_size, config.text.length
    ids = jax.ShapeDtypeStruct((1, length), np.int32), jax.ShapeDtypeStruct((1, length), bool)
    ours = param_shapes(ImageReward(config).init, jax.ShapeDtypeStruct((1, size, size, 3), np.float32), *ids)
    found = matched(theirs, names.image_reward(config), ours, names.IMAGE_REWARD_UNUSED, what)
    return Pretrained("image_reward", {"image_reward": dataclasses.asdict(config)}, found)
