"""A tiny CLIP with random weights, in a folder as `rahf.convert` writes one."""

import dataclasses
import pathlib

import flax.traverse_util
import jax
import numpy as np
from flax import linen as nn
from tiny_diffusion import write_tokenizer

from rahf import pretrained
from rahf.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rahf.weights import Tensor


def write(folder: pathlib.Path) -> pathlib.Path:
    """Reads 16 pixels and 40 ids, embeds into 12."""
    ids = write_tokenizer(folder)
    config = CLIPConfig(
        CLIPVisionConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=24),
        CLIPTextConfig(vocab_size=len(ids), width=16, depth=1, num_heads=2, mlp_dim=24, length=40, eos_id=len(ids) - 1),
        projection_dim=12,
    )
    inputs = np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 40), np.int32)
    shapes = nn.unbox(jax.eval_shape(CLIP(config).init, jax.random.key(0), *inputs))["params"]
    rng, tensors = np.random.default_rng(0), {}
    for name, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items():
        value = rng.normal(0, 0.3, leaf.shape).astype(np.float32) + np.float32(name.endswith("scale"))
        tensors[name] = Tensor(leaf.shape, lambda value=value: value)
    pretrained.write(pretrained.Pretrained("clip", {"clip": dataclasses.asdict(config)}, tensors), folder)
    return folder
