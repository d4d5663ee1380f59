"""What both sides are given: models of random weights, made once, and inputs that depend on the models' sizes alone.

    FOLDER/rahf/    model.safetensors and config.json, as the first author's PyTorch release would write them
    FOLDER/sd/      a Stable Diffusion as diffusers writes it
    FOLDER/*.npz    inputs of either
"""

import json
import pathlib

import jax
import numpy as np

from benchmarks.metrics import random_maps
from rahf import experiments, readers
from rahf.diffusion import folder, sample
from rahf.models.rahf import RAHFConfig
from richhf_data import schema

PROMPT = "a yellow cat"
LENGTH = 32  # ids of a RAHF's text and of its keywords, without padding
LEARNING_RATE, CLIP_NORM = 1e-5, 1.0
STEPS = 4  # of the sampler


# ---- RAHF -----------------------------------------------------------------------------------------------------------
def rahf_config(place: pathlib.Path, dtype: str):
    """The config of a training of the RAHF in `place`, and its tensors, by our names."""
    found = readers.release.rahf_pytorch(place / "rahf" / "model.safetensors")
    config = experiments.load("rahf_pytorch")
    config.model = found.config["model"] | {"dtype": dtype}
    config.model.t5.dropout = 0.0
    config.data.update(text_length=LENGTH, keyword_length=LENGTH)
    config.optimizer.update(learning_rate=LEARNING_RATE, final_learning_rate=LEARNING_RATE, warmup_steps=0)
    config.optimizer.update(weight_decay=0.0, clip_norm=CLIP_NORM)
    return config, found.tensors


def write_rahf(place: pathlib.Path, rows: int = 2) -> None:
    """A batch of schema.py; its texts and targets have no padding, and every target is there."""
    model = RAHFConfig.from_dict(readers.release.rahf_pytorch(place / "rahf" / "model.safetensors").config["model"])
    rng = np.random.default_rng(0)
    maps = (rows, model.heatmap_size, model.heatmap_size, len(schema.HEATMAPS))
    np.savez(
        place / "rahf.npz",
        image=rng.integers(0, 256, (rows, model.image_size, model.image_size, 3)).astype(np.uint8),
        text_ids=rng.integers(2, model.t5.vocab_size, (rows, model.num_texts, LENGTH)).astype(np.int32),
        keyword_ids=rng.integers(2, model.t5.vocab_size, (rows, LENGTH)).astype(np.int32),
        scores=rng.random((rows, len(schema.SCORES))).astype(np.float32),
        score_mask=np.ones((rows, len(schema.SCORES)), bool),
        heatmaps=rng.integers(0, 256, maps).astype(np.uint8),
        heatmap_mask=np.ones((rows, len(schema.HEATMAPS)), bool),
    )


# ---- Stable Diffusion -----------------------------------------------------------------------------------------------
def diffusion_config(dtype: str, remat: bool):
    """The config of a training of the whole UNet, one picture a step, without a reward."""
    config = experiments.load("sd_reward")
    config.model.update(dtype=dtype, remat=remat)
    config.optimizer.update(learning_rate=LEARNING_RATE, final_learning_rate=LEARNING_RATE, warmup_steps=0)
    config.optimizer.update(weight_decay=0.0, clip_norm=CLIP_NORM, ema_decay=0.0)
    config.train.batch_size = 1
    return config


def write_diffusion(place: pathlib.Path) -> None:
    """Two rows for the UNet, one for the VAE and for a training step, and what our first two steps draw."""
    model, rng = folder.read_config(place / "sd"), np.random.default_rng(0)
    grid, text = (model.unet.sample_size,) * 2, model.text.text
    latents = (1, *grid, model.vae.latent_channels)
    moments = rng.standard_normal((1, *grid, 2 * model.vae.latent_channels))
    draws = [_draws(step, latents, model.schedule.num_train_timesteps) for step in range(2)]
    given = {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}
    keys = sample.image_keys(sample.seed_data(0), np.arange(1))
    np.savez(
        place / "sd.npz",
        initial=np.asarray(sample.noise(keys, sample.INITIAL, latents[1:])),
        latents=rng.standard_normal((2, *latents[1:])).astype(np.float32),
        timesteps=np.array([501, 7], np.int32),
        context=rng.standard_normal((2, text.length, text.width)).astype(np.float32),
        moments=moments.astype(np.float32),
        **given,
    )


def _draws(step: int, shape: tuple[int, ...], timesteps: int) -> dict[str, np.ndarray]:
    """The random numbers of `finetuning.make_loss` in a step of `program.assemble` with seed 0."""
    key = jax.random.split(jax.random.key(0))[1]
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), 0), 3)
    return {
        "latent_noise": np.asarray(jax.random.normal(keys[0], shape)),
        "times": np.asarray(jax.random.randint(keys[1], shape[:1], 0, timesteps)),
        "noise": np.asarray(jax.random.normal(keys[2], shape)),
    }


# ---- Metrics --------------------------------------------------------------------------------------------------------
def write_metrics(place: pathlib.Path, examples: int, size: int) -> None:
    """Truths and predictions of a whole set: scores [N, 4], maps [N, size, size, 2]."""
    rng = np.random.default_rng(0)
    predicted, truth = random_maps(rng, examples * len(schema.HEATMAPS), size)
    scores = rng.random((2, examples, len(schema.SCORES))).astype(np.float32)
    shape = (examples, len(schema.HEATMAPS), size, size)
    np.savez(
        place / "metrics.npz",
        scores=scores[0],
        predicted_scores=scores[1],
        heatmaps=np.round(255 * truth).astype(np.uint8).reshape(shape).transpose(0, 2, 3, 1),
        predicted_heatmaps=predicted.reshape(shape).transpose(0, 2, 3, 1),
    )


def read(place: pathlib.Path, kind: str) -> dict[str, np.ndarray]:
    """The inputs that one of the writers made."""
    with np.load(place / f"{kind}.npz") as held:
        return dict(held)


def case(place: pathlib.Path) -> dict:
    """The RAHF's sizes, as tests/release_torch.py takes them."""
    return json.loads((place / "rahf" / "config.json").read_text(encoding="utf-8"))
