"""Reads the first author's PyTorch release of RAHF (github.com/youweiliang/RichHF), and what that code trains."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import PIL.Image

from rahf import names, pretrained, weights
from rahf.models import critics
from rahf.models.heads import HeatmapHeadConfig, ScoreHeadConfig
from rahf.models.parameters import param_shapes
from rahf.models.rahf import RAHF, RAHFConfig
from rahf.pretrained import Pretrained, matched
from rahf.readers import encoders, files
from rahf.weights import Tensor, Tensors
from richhf_data import checked, json_files, schema
from richhf_data.errors import UserError
from richhf_data.ranges import Range

LENGTHS = {"text_length": 128, "keyword_length": 128}  # for the release, which does not limit them
TASK_LENGTH = 32  # more ids of text for the names of `schema.PYTORCH_TASKS`
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
    tensors = matched(theirs, table, param_shapes(RAHF(config).init, *critics.dummy_inputs(config)), unused, what)
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
        files.require(theirs, (name,), what)
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
        "num_hidden_layers": files.count(theirs, r"vit\.layers\.(\d+)\."),
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
        "num_layers": files.count(theirs, r"t5\.encoder\.block\.(\d+)\."),
        "num_decoder_layers": files.count(theirs, r"t5\.decoder\.block\.(\d+)\."),
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
        files.require(theirs, (f"{name}.weight",), what)
    config = RAHFConfig(
        variant=variant,
        image_size=side * patch,
        decoder_attends="text",
        vit=encoders.vit_config_from_hugging_face(vit, what),
        t5=encoders.t5_config_from_hugging_face(t5, what),
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
