"""CLIP's text and image towers, as Hugging Face's `CLIPModel` computes them.

The ViT models of "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020): two pre-norm
transformers with equal blocks. Their pooled outputs are projected into one space of width E.

    image --patches--> [B, P, D] --class token in front--> vision --first token--> projection --> [B, E]
    ids --embedding--> [B, L, D] ------------------------> text, causal --at eos--> projection --> [B, E]

The text is pooled at the first `eos_id`, as in Hugging Face. Two cases differ:
  - OpenAI's converted checkpoints have `eos_token_id` 2, for which Hugging Face pools at the first highest id. Here 2 is
    refused; such a checkpoint gets `eos_id` 49407, the end id of CLIP's tokenizer and the highest id of its vocabulary.
    The results differ only if ids above 49407 were added.
  - A row without an end id gives NaN. Hugging Face pools it at position 0.

Logical axes beyond those of `rahf.models.rahf`: projection (the outputs of both projections).
"""

import dataclasses
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rahf.models.attention import attention
from rahf.models.layers import Dense, LayerNorm, LinearLayers, normalize_image, partitioned, to_patches
from richhf_data import checked
from richhf_data.checked import Epsilon, Layers, Pixels, Size
from richhf_data.errors import UserError
from richhf_data.ranges import Range

Array = jax.Array
ACTIVATIONS = {"quick_gelu": lambda x: x * nn.sigmoid(1.702 * x), "gelu": lambda x: nn.gelu(x, approximate=False)}
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of RGB in [0, 1], from OpenAI's release
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of the image tower; the defaults are ViT-B/32."""

    image_size: Pixels = 224  # both sides
    patch_size: Pixels = 32
    width: Size = 768
    depth: Layers = 12
    num_heads: Size = 12
    mlp_dim: Size = 3072

    def __post_init__(self):
        checked.fields(self, "clip.vision")

    @property
    def length(self) -> int:
        """Positions: the class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of the text tower; the defaults are those of the model with ViT-B/32."""

    vocab_size: Size = 49408
    width: Size = 512
    depth: Layers = 12
    num_heads: Size = 8
    mlp_dim: Size = 2048
    length: Annotated[int, Range(2, 2**20)] = 77  # positions, the longest text with its start and end
    eos_id: int = 49407

    def __post_init__(self):
        checked.fields(self, "clip.text")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers; the defaults are ViT-B/32."""

    vision: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    text: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    projection_dim: Size = 512
    activation: Literal[tuple(ACTIVATIONS)] = "quick_gelu"  # "gelu" is the exact GELU of some OpenCLIP checkpoints
    epsilon: Epsilon = 1e-5  # of the layer norms

    def __post_init__(self):
        checked.fields(self, "clip")
        vision, text = self.vision, self.text
        for name, tower in (("vision", vision), ("text", text)):
            if tower.width % tower.num_heads:
                raise UserError(
                    f"clip.{name}.width: got {tower.width}, expected a multiple of num_heads = {tower.num_heads}"
                )
        if vision.image_size % vision.patch_size:
            raise UserError(
                f"clip.vision.image_size: got {vision.image_size}, expected a multiple of patch_size = {vision.patch_size}"
            )
        if text.eos_id == 2 or not 0 <= text.eos_id < text.vocab_size:
            raise UserError(
                f"clip.text.eos_id: got {text.eos_id}, expected the end id itself, below vocab_size = {text.vocab_size} "
                "(Hugging Face's 2 stands for the highest id, 49407 in CLIP's vocabulary)"
            )


VIT_L14 = CLIPConfig(
    CLIPVisionConfig(patch_size=14, width=1024, depth=24, num_heads=16, mlp_dim=4096),
    CLIPTextConfig(width=768, num_heads=12, mlp_dim=3072),
    projection_dim=768,
)


def standardized(image: Array) -> Array:
    """float[B, H, W, 3] in [-1, 1], or uint8 -> float32, less CLIP's mean and by its deviation. Raises for other types."""
    image = normalize_image(image).astype(jnp.float32) * 0.5 + 0.5
    return (image - MEAN.reshape(1, 1, 1, 3)) / STD.reshape(1, 1, 1, 3)


class CLIPBlock(nn.Module):
    """Self-attention (softmax in float32) and MLP, each with a norm before it and a residual."""

    config: CLIPConfig
    tower: CLIPVisionConfig | CLIPTextConfig  # which of the config's two
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, width, head_dim = self.config, self.tower.width, self.tower.width // self.tower.num_heads

        def dense(features, axes, name):
            return nn.Dense(
                features,
                dtype=self.dtype,
                kernel_init=partitioned(nn.initializers.lecun_normal(), axes),
                bias_init=partitioned(nn.initializers.zeros, axes[1:]),
                name=name,
            )

        def project(name):
            y_heads = dense(width, ("embed", "joined_kv"), name)(y)
            y_heads = y_heads.reshape(*x.shape[:-1], -1, head_dim)  # [B, N, A, K]
            return nn.with_logical_constraint(y_heads, ("batch", "length", "heads", "kv"))

        y = LayerNorm(self.dtype, epsilon=config.epsilon, name="attention_norm")(x)
        query, key, value = project("query") * head_dim**-0.5, project("key"), project("value")
        y = attention(query, key, value, causal=self.causal)  # [B, N, A, K]
        x = x + dense(width, ("joined_kv", "embed"), "out")(y.reshape(x.shape))  # [B, N, D]
        y = LayerNorm(self.dtype, epsilon=config.epsilon, name="mlp_norm")(x)
        y = ACTIVATIONS[config.activation](dense(self.tower.mlp_dim, ("embed", "mlp"), "wi")(y))  # [B, N, M]
        y = nn.with_logical_constraint(y, ("batch", "length", "mlp"))
        x = x + dense(width, ("mlp", "embed"), "wo")(y)  # [B, N, D]
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))


class Tower(nn.Module):
    """Embedded tokens -> tokens after the final norm. The text is causal. The image has a norm before its blocks."""

    config: CLIPConfig
    tower: CLIPVisionConfig | CLIPTextConfig
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """dtype[B, N, D] -> dtype[B, N, D], N at most `tower.length`."""
        config, tower = self.config, self.tower
        init = partitioned(nn.initializers.normal(0.02), (None, "position", "embed"))
        positions = self.param("pos_embedding", init, (1, tower.length, tower.width), jnp.float32)
        x = x + positions[:, : x.shape[1]].astype(self.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        if not self.causal:
            x = LayerNorm(self.dtype, epsilon=config.epsilon, name="pre_norm")(x)
        for i in range(tower.depth):
            x = CLIPBlock(config, tower, self.causal, self.dtype, name=f"block_{i}")(x)
        return LayerNorm(self.dtype, epsilon=config.epsilon, name="final_norm")(x)


class CLIP(nn.Module):
    """The model. Parameters: patch_embedding, cls, token_embedding, vision, text, the projections, logit_scale.

    With `text_only` it has only token_embedding and text, enough for `text_tokens`. Stable Diffusion uses it so. With
    `image_only` it has what `encode_image` reads.
    """

    config: CLIPConfig
    dtype: DTypeLike = jnp.float32
    text_only: bool = False
    image_only: bool = False

    def setup(self):
        config, dtype = self.config, self.dtype
        vision, text = config.vision, config.text
        if not self.image_only:
            init = partitioned(nn.initializers.normal(0.02), ("vocab", "embed"))
            self.token_embedding = self.param("token_embedding", init, (text.vocab_size, text.width), jnp.float32)
            self.text = Tower(config, text, True, dtype)
        if self.text_only:
            return
        # CLIP has a convolution without bias. A product of flattened patches equals it, and its gradient is a product too.
        self.patch_embedding = Dense(vision.width, ("conv_in", "embed"), dtype)
        init = partitioned(nn.initializers.normal(0.02), (None, None, "embed"))
        self.cls = self.param("cls", init, (1, 1, vision.width), jnp.float32)
        self.vision = Tower(config, vision, False, dtype)
        self.image_projection = Dense(config.projection_dim, ("embed", "projection"), dtype)
        if self.image_only:
            return
        self.text_projection = Dense(config.projection_dim, ("embed", "projection"), dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), (), jnp.float32)

    def image_tokens(self, image: Array) -> Array:
        """The image tower's output, the class token first and then row by row over the grid.

        The final norm is applied to every token. Hugging Face's `last_hidden_state` is the output before it.

        Args:
          image: float32[B, H, W, 3] in [-1, 1], or uint8. CLIP's own mean and deviation are applied here.

        Returns:
          dtype[B, 1 + P, D].

        Raises:
          UserError: the image is not of `config.vision.image_size`, or neither uint8 nor float.
        """
        size, patch = self.config.vision.image_size, self.config.vision.patch_size
        if image.ndim != 4 or image.shape[1:] != (size, size, 3):
            raise UserError(f"image: got shape {image.shape}, expected [B, {size}, {size}, 3] (clip.vision.image_size)")
        image = standardized(image)
        x = self.patch_embedding(to_patches(image, patch).reshape(image.shape[0], -1, 3 * patch**2))  # [B, P, D]
        cls = jnp.broadcast_to(self.cls.astype(self.dtype), (image.shape[0], 1, x.shape[-1]))
        return self.vision(jnp.concatenate([cls, x], axis=1))  # [B, 1 + P, D]

    def text_tokens(self, ids: Array) -> Array:
        """The text tower's output. Each token attends to itself and the earlier ones.

        Args:
          ids: int32[B, L]. An id outside the vocabulary gives NaN.

        Returns:
          dtype[B, L, D].

        Raises:
          UserError: a shape that is not [B, L], or more than `config.text.length` ids.
        """
        length = self.config.text.length
        if ids.ndim != 2 or not 0 < ids.shape[1] <= length:
            raise UserError(f"ids: got shape {ids.shape}, expected [B, L] with L of 1 to {length} (clip.text.length)")
        ids = ids.astype(jnp.uint32)  # as a signed index, -1 would be the last id
        return self.text(jnp.take(self.token_embedding, ids, axis=0, mode="fill").astype(self.dtype))

    def encode_image(self, image: Array) -> Array:
        """float32[B, H, W, 3] in [-1, 1], or uint8 -> float32[B, E], not normalised. Raises the errors of `image_tokens`."""
        return self.image_projection(self.image_tokens(image)[:, 0], jnp.float32)

    def encode_text(self, ids: Array) -> Array:
        """int32[B, L] -> float32[B, E], not normalised; NaN without an end id. Raises the errors of `text_tokens`.

        Ids after the first end id change nothing, so any padding will do.
        """
        ends = ids == self.config.text.eos_id  # [B, L]
        tokens = self.text_tokens(ids)
        pooled = jnp.take_along_axis(tokens, jnp.argmax(ends, axis=1)[:, None, None], axis=1)[:, 0]  # [B, D]
        return jnp.where(ends.any(axis=1, keepdims=True), self.text_projection(pooled, jnp.float32), jnp.nan)

    def __call__(self, image: Array, ids: Array) -> Array:
        """Cosine similarity of every image (row) and every text (column), times exp(logit_scale): float32[B, B]."""
        image, text = self.encode_image(image), self.encode_text(ids)
        image, text = unit(image), unit(text)
        return jnp.exp(self.logit_scale) * jnp.matmul(image, text.T, precision=jax.lax.Precision.HIGHEST)


class Aesthetic(nn.Module):
    """LAION's aesthetic predictor: linear layers on CLIP's image embedding of unit length. It reads no text.

    One layer in https://github.com/LAION-AI/aesthetic-predictor. Five, with nothing but dropout between them, in
    https://github.com/christophschuhmann/improved-aesthetic-predictor.
    """

    config: CLIPConfig
    hidden: tuple[int, ...] = ()  # widths of the layers before the last

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """float32[B, H, W, 3] in [-1, 1], or uint8 -> float32[B], about 1 to 10. Raises the errors of `image_tokens`."""
        embedding = CLIP(self.config, image_only=True, name="clip").encode_image(image)
        return LinearLayers((*self.hidden, 1), name="head")(unit(embedding))[:, 0]


def unit(embedding: Array) -> Array:
    """float32[B, E] -> float32[B, E] of length 1."""
    return embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)
