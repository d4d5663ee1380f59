"""The parts that the diffusion model starts from, trained on the pictures: tokeniser, CLIP and VAE, and their folder.

The CLIP is trained on all captions, including wrong ones. Its text tower is the diffusion model's text encoder.
"""

import dataclasses
import json
import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from benchmarks.alignment import drawings
from benchmarks.alignment.optimise import optimise
from rahf import pretrained
from rahf.diffusion import folder as diffusers
from rahf.diffusion.schedule import Schedule
from rahf.diffusion.unet import UNetConfig
from rahf.diffusion.vae import VAE, VAEConfig
from rahf.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rahf.models.layers import normalize_image
from rahf.reward import embed, prompts
from rahf.weights import Tensor
from richhf_data import clip_tokenizer, paths

TEXT_LENGTH = 12  # the longest prompt takes 8: six words, start and end
MAX_SCALE = float(np.log(100))  # of CLIP's temperature, as in its paper


# ---- Tokeniser ------------------------------------------------------------------------------------------------------
def write_tokenizer(folder, words: prompts.Words = drawings.WORDS) -> int:
    """Writes a vocab.json and merges.txt with which CLIP's tokeniser encodes each word of the prompts as one id.

    Other text is encoded by bytes, as by CLIP's own vocabulary.

    Returns:
      The size of the vocabulary; its last two ids are start and end.
    """
    texts = [prompts.text(prompt) for prompt in words.all()]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.BpeTrainer(end_of_word_suffix="</w>", min_frequency=1, show_progress=False)
    model.train_from_iterator(texts, trainer)
    merges = [pair for pair in json.loads(model.to_str())["model"]["merges"]]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [char + "</w>" for char in alphabet] + ["".join(pair) for pair in merges]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    folder, lines = pathlib.Path(folder), ["#version: 0.2", *map(" ".join, merges)]
    paths.replace(folder / "vocab.json", json.dumps({piece: i for i, piece in enumerate(pieces)}).encode())
    paths.replace(folder / "merges.txt", ("\n".join(lines) + "\n").encode())
    return len(pieces)


# ---- CLIP -----------------------------------------------------------------------------------------------------------
def clip_config(vocab_size: int, size: int = drawings.SIZE) -> CLIPConfig:
    """The sizes of the CLIP."""
    sizes = dict(width=128, num_heads=4, mlp_dim=512)
    vision = CLIPVisionConfig(image_size=size, patch_size=4, depth=3, **sizes)
    text = CLIPTextConfig(vocab_size=vocab_size, depth=2, length=TEXT_LENGTH, eos_id=vocab_size - 1, **sizes)
    return CLIPConfig(vision, text, projection_dim=128)


def fit_clip(
    folder,
    images: np.ndarray,
    texts: list[str],
    *,
    config=clip_config,
    steps: int = 600,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 20,
    words: prompts.Words = drawings.WORDS,
) -> None:
    """Trains a CLIP contrastively on pictures and captions, and writes the folder that `embed.Clip` reads.

    Args:
      images: uint8[n, S, S, 3]. texts: n captions.
      config: `(vocab_size, S) -> CLIPConfig`.
    """
    folder = pathlib.Path(folder)
    (folder / "config.json").unlink(missing_ok=True)  # its presence marks a finished folder
    config = config(write_tokenizer(folder, words), images.shape[1])
    module, ids = CLIP(config), clip_tokenizer.Tokenizer(folder)(texts, config.text.length)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(seed), images[:1], ids[:1]))["params"]

    def loss(params, batch, key):
        scale = jnp.minimum(params["logit_scale"], MAX_SCALE)
        logits = module.apply({"params": params | {"logit_scale": scale}}, batch["image"], batch["ids"])
        own = jnp.arange(len(logits))
        both = [optax.softmax_cross_entropy_with_integer_labels(x, own).mean() for x in (logits, logits.T)]
        loss = (both[0] + both[1]) / 2
        return loss, {"loss": loss, "accuracy": jnp.mean((logits.argmax(axis=1) == own).astype(jnp.float32))}

    options = dict(steps=steps, batch_size=min(batch_size, len(images)), learning_rate=learning_rate, seed=seed)
    params = optimise(loss, params, {"image": images, "ids": ids}, **options, name="clip")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {name: Tensor(leaf.shape, lambda leaf=leaf: np.asarray(leaf)) for name, leaf in flat.items()}
    pretrained.write(pretrained.Pretrained("clip", {"clip": dataclasses.asdict(config)}, tensors), folder)


# ---- VAE ------------------------------------------------------------------------------------------------------------
VAE_CONFIG = VAEConfig(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8)


def fit_vae(
    images: np.ndarray,
    *,
    config: VAEConfig = VAE_CONFIG,
    steps: int = 900,
    batch_size: int = 32,
    learning_rate: float = 0.015,
    kl_weight: float = 1e-5,
    seed: int = 30,
) -> tuple[VAEConfig, dict]:
    """Trains a VAE on pictures.

    Args:
      images: uint8[n, S, S, 3].
      kl_weight: weight of the KL divergence per latent value; the reconstruction error is per pixel and channel.

    Returns:
      `config` with the `scaling_factor` that gives the latents a standard deviation of 1, and the parameters.
    """
    module = VAE(config)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(seed), images[:1]))["params"]

    def loss(params, batch, key):
        image = normalize_image(batch["image"])
        height, width = config.grid(*image.shape[1:3])
        noise = jax.random.normal(key, (len(image), height, width, config.latent_channels))
        decoded, posterior = module.apply({"params": params}, image, noise)
        error, kl = decoded - image, posterior.kl().mean() / noise[0].size
        squared, absolute = jnp.mean(error * error), jnp.mean(jnp.abs(error))
        return squared + absolute + kl_weight * kl, {"mse": squared, "l1": absolute, "kl": kl}

    options = dict(steps=steps, batch_size=min(batch_size, len(images)), learning_rate=learning_rate, seed=seed)
    params = optimise(loss, params, {"image": images}, **options, name="vae")
    encode = jax.jit(lambda params, image: module.apply({"params": params}, image, method="encode").mean)
    deviation = np.asarray(encode(params, images[:1000])).std()
    return dataclasses.replace(config, scaling_factor=float(1 / deviation)), params


def reconstruct(config: VAEConfig, params, images: np.ndarray, batch_size: int = 100) -> np.ndarray:
    """uint8[n, S, S, 3] -> uint8[n, S, S, 3], encoded by the VAE to the mean of their latents and decoded."""
    through = jax.jit(lambda params, image: VAE(config).apply({"params": params}, image)[0])
    parts = [np.asarray(through(params, images[i : i + batch_size])) for i in range(0, len(images), batch_size)]
    return np.round(np.clip(np.concatenate(parts) * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)


# ---- The folder -----------------------------------------------------------------------------------------------------
def unet_config(vae: VAEConfig, clip: CLIPConfig, size: int = drawings.SIZE) -> UNetConfig:
    """A UNet for these latents, with attention at every resolution."""
    return UNetConfig(
        sample_size=size // vae.factor,
        in_channels=vae.latent_channels,
        out_channels=vae.latent_channels,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=(2, 4),  # heads, of width 32
        cross_attention_dim=clip.text.width,
        norm_num_groups=8,
    )


def start(folder, clip_folder, vae: tuple[VAEConfig, dict], *, unet=unet_config, seed: int = 40) -> None:
    """Writes the diffusers folder of an untrained diffusion model.

    Args:
      clip_folder: folder that `fit_clip` wrote; gives the text encoder and the tokeniser.
      vae: result of `fit_vae`.
      unet: `(VAEConfig, CLIPConfig, S) -> UNetConfig`.

    Raises:
      UserError: the folder has a finished pipeline already.
    """
    clip, (vae_config, vae_params) = embed.Clip(clip_folder), vae
    size = clip.config.vision.image_size
    config = diffusers.Config(unet(vae_config, clip.config, size), vae_config, clip.config, Schedule())
    params = {"unet": nn.unbox(jax.jit(lambda key: diffusers.init(config, key)["unet"])(jax.random.key(seed)))}
    arrays = dict(pretrained.weights.read_all(pretrained.read(clip_folder, "clip").tensors))
    text = {name: array for name, array in arrays.items() if name.startswith(("text/", "token_embedding"))}
    params |= {"vae": vae_params, "text_encoder": flax.traverse_util.unflatten_dict(text, sep="/")}
    diffusers.write(diffusers.StableDiffusion(config, params, pathlib.Path(clip_folder)), folder)
