"""Reads and writes the folders of rahf.convert, and starts training from them.

    weights.safetensors    float32 tensors with our parameter names
    config.json            `kind` (of `SECTIONS`) and the model's configuration; written last
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from tqdm.auto import tqdm

from rahf import folders, names, partitioning, weights
from rahf.models import critics
from rahf.models.blip import ImageRewardConfig
from rahf.models.clip import CLIPConfig
from rahf.models.resnet import ResNetConfig
from rahf.models.t5 import T5Config
from rahf.models.vit import ViTConfig
from rahf.weights import Tensor, Tensors
from richhf_data import checked, json_files
from richhf_data.checked import Pixels, Size
from richhf_data.errors import UserError

MAX_NAMED = 5  # mismatches that a message lists
SECTIONS = {  # kind -> what its config.json has to hold
    "vit": {"vit": ViTConfig, "image_size": Pixels},
    "t5": {"t5": T5Config},
    "resnet": {"resnet": ResNetConfig},
    "clip": {"clip": CLIPConfig},
    "aesthetic": {"clip": CLIPConfig, "hidden": tuple[Size, ...]},
    "image_reward": {"image_reward": ImageRewardConfig},
    "rahf": {"model": dict[str, Any]},
}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights of a model or of a part of it, with our names.

    Attributes:
      kind: of `SECTIONS`; "rahf" is a whole critic.
      config: the configuration, as JSON.
      tensors: our parameter name, joined by "/" -> tensor.
      found: the architecture in words, where the source does not name it.
    """

    kind: str
    config: dict
    tensors: Tensors
    found: str = ""


def write(pretrained: Pretrained, folder, dtype: str = "float32") -> None:
    """Writes weights.safetensors in a dtype, then config.json: a folder without config.json is incomplete."""
    folder = pathlib.Path(folder)
    progress = functools.partial(tqdm, desc="convert", unit="tensor")
    weights.write_safetensors(folder / "weights.safetensors", pretrained.tensors, progress, dtype)
    json_files.write(folder / "config.json", {"kind": pretrained.kind, **pretrained.config})


def read(folder, kind: str) -> Pretrained:
    """Opens a folder that `write` made.

    Raises:
      UserError: there is no such folder, it is of another kind, or its config is damaged.
    """
    file = pathlib.Path(folder) / "config.json"
    config = json_files.read(file) if file.is_file() else {}
    if (found := config.pop("kind", None)) != kind:
        holds = f"holds a {found}" if found else "is no folder that rahf.convert wrote"
        shipped = f", or a critic that RAHF comes with: {', '.join(folders.shipped())}" if kind == "rahf" else ""
        raise UserError(f"init.{kind}: {folder} {holds}, expected one whose kind is {kind}{shipped}")
    with json_files.named(file):
        for name, hint in SECTIONS[kind].items():
            checked.conform(hint, config.get(name), name)
        if kind == "rahf":
            critics.config_of(config["model"])
    return Pretrained(kind, config, weights.open_safetensors(pathlib.Path(folder) / "weights.safetensors"))


def matched(
    theirs: Tensors, table: names.TensorMap, ours: Mapping[str, jax.ShapeDtypeStruct], unused: str, what: str
) -> Tensors:
    """Maps their tensors to ours and checks all names and shapes. The result is in the order of `theirs`, for fast reads.

    Args:
      ours: our parameters (models/parameters.py), all of them in `table`.
      unused: a regular expression; their tensors with such names are ignored.
      what: names the source in errors.

    Raises:
      UserError: missing, extra or wrongly shaped tensors, or of a type that no weights have; names the first ones with both
        shapes.
    """
    problems, out, used = [], {}, set()
    for name, leaf in ours.items():
        shape, (their_name, layout) = tuple(leaf.shape), table[name]
        used.add(their_name)
        if (tensor := theirs.get(their_name)) is None:
            problems.append(f"{name} {shape}: missing, expected the tensor {their_name}")
            continue
        try:
            got = layout(np.broadcast_to(np.float32(0), tensor.shape)).shape
        except (ValueError, IndexError, TypeError):
            got = None
        if got != shape:
            problems.append(f"{name} {shape}: the tensor {their_name} has shape {tensor.shape}")
        elif tensor.dtype not in weights.FLOATS:
            expected = ", ".join(weights.FLOATS)
            problems.append(f"{name} {shape}: the tensor {their_name} holds {tensor.dtype}, expected one of {expected}")
        out[name] = Tensor(shape, lambda tensor=tensor, layout=layout: layout(tensor.read()))
    for name in theirs.keys() - used:
        if not re.fullmatch(unused, name):
            problems.append(f"{name} {theirs[name].shape}: no parameter of ours takes it")
    if problems:
        more = f"\n  and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise UserError(f"{what}: tensors do not match:\n  " + "\n  ".join(sorted(problems)[:MAX_NAMED]) + more)
    order = {name: i for i, name in enumerate(theirs)}
    return {name: out[name] for name in sorted(out, key=lambda name: order[table[name][0]])}


# ---- Start of a training --------------------------------------------------------------------------------------------
def starting_tensors(init: Mapping[str, str], ours: Mapping, config: critics.CriticConfig) -> Tensors:
    """Opens the folders of a config's `init` section and checks them against the model; reads no values.

    An encoder's takes precedence over `rahf`, a whole critic. The position embeddings of a ViT are resampled to the config's
    image size. A class token is dropped if the model has none. Layers of deviations and a word head are dropped if the model
    has none, and keep their own start if the weights have none.

    Args:
      init: "rahf", "vit", "t5", "resnet", "clip" -> a folder or its address (folders.py), or "".
      ours: the model's parameters, with shapes.

    Raises:
      UserError: a folder of another kind or size, or of a model that computes something else (another GELU, for example).
    """
    ours, out = flax.traverse_util.flatten_dict(ours, sep="/"), {}
    for kind in ("rahf", "vit", "t5", "resnet", "clip"):
        if init.get(kind):
            pretrained, prefix = read(folders.local_folder(init[kind]), kind), "" if kind == "rahf" else f"{kind}/"
            what = f"init.{kind}: {init[kind]}"
            _check_same_function(pretrained, config, what)
            out |= _fitted({prefix + name: tensor for name, tensor in pretrained.tensors.items()}, ours, prefix, what)
    return out


def initialise(params, tensors: Tensors):
    """Replaces the parameters that `starting_tensors` found. Each keeps its sharding."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for name, array in weights.read_all(tensors):
        flat[name] = partitioning.place(array, flat[name].sharding)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


# Options that may differ from those the weights were made with; for a ViT alone, `class_token` may as well.
FREE = {"image_size", "dtype", "dropout", "remat", "scan", "strips", "mask_padding", "frozen_norm", "deviation", "word_head"}
# Parameters that a critic may lack.
MAY_LACK = (r"score_head[^/]*/deviation/\w+|deviation_factors", r"word_head/\w+")


def _check_same_function(pretrained: Pretrained, config: critics.CriticConfig, what: str) -> None:
    theirs = pretrained.config["model"] if pretrained.kind == "rahf" else pretrained.config
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    theirs = flax.traverse_util.flatten_dict({name: theirs[name] for name in theirs if name in ours}, sep=".")
    ours = flax.traverse_util.flatten_dict(ours, sep=".")
    free = FREE | ({"class_token"} if pretrained.kind == "vit" else set())
    differ = [
        f"model.{name}: the weights have {value!r}, the config {ours[name]!r}"
        for name, value in theirs.items()
        if name.rpartition(".")[2] not in free and ours[name] != value
    ]
    if differ:
        raise UserError(f"{what} is for another model:\n  " + "\n  ".join(differ[:MAX_NAMED]) + "\n  set --config.KEY=VALUE")


def _fitted(tensors: Tensors, ours: Mapping, prefix: str, what: str) -> Tensors:
    """Gives the tensors our shapes: resamples position embeddings and drops what our model lacks."""
    wanted = {name: leaf for name, leaf in ours.items() if name.startswith(prefix)}
    for optional in MAY_LACK:
        if not any(re.fullmatch(optional, name) for name in tensors):
            wanted = {name: leaf for name, leaf in wanted.items() if not re.fullmatch(optional, name)}
    table = names.same_names(wanted)
    had, has = "vit/cls" in tensors, "vit/cls" in wanted
    if (name := "vit/pos_embedding") in wanted:
        table[name] = (name, lambda x: resample_positions(x[:, max(had - has, 0) :], wanted[name].shape[1] - has, has))
    return matched(tensors, table, wanted, "|".join(MAY_LACK if has else (*MAY_LACK, "vit/cls")), what)


def resample_positions(positions: np.ndarray, patches: int, class_token: bool) -> np.ndarray:
    """Position embeddings for another grid of patches, by antialiased bilinear interpolation; the class token's is kept.

    Args:
      positions: float32[1, P (+ 1), D], with a class token's first. patches: the new P, a square number.

    Returns:
      float32[1, patches (+ 1), D].
    """
    first, grid = positions[:, : int(class_token)], positions[:, int(class_token) :]
    old, new, width = grid_side(grid.shape[1]), grid_side(patches), grid.shape[-1]
    if old != new:
        grid = jax.image.resize(grid.reshape(1, old, old, width), (1, new, new, width), "bilinear", antialias=True)
    return np.concatenate([first, np.asarray(grid).reshape(1, new * new, width)], axis=1)


def grid_side(patches: int, what: str = "ViT") -> int:
    """The side h = w of a square grid of patches. Raises UserError for a number that is not a square."""
    side = round(patches**0.5)
    if side * side != patches:
        raise UserError(f"{what}: got {patches} position embeddings besides a class token's, expected a square number")
    return side
