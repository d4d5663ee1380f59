"""What reward-weighted fine-tuning (paper B) trains: the loss, its weights, the parameters, LoRA.

    loss = sum(w mean(r e)) / sum(w mean(r))  over the model's own images, w a function of their rewards
         + beta mean(mean(e))                 over pre-training pairs

    e: the denoising error of each latent pixel; mean(e), over an image, is the usual bound of -log p(x | z)
    r: what the pixel weighs, a function of a critic's heatmaps; 1 without a critic, so that only w counts

Only the UNet is trained, or with LoRA the products that are added to its attention.
"""

import dataclasses
import typing
from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rahf import experiments
from rahf import program as programs
from rahf.diffusion import folder, inputs
from richhf_data import ranges, schema
from richhf_data.errors import UserError

# Of a config, for `experiments.check_ranges`.
RANGES = programs.RANGES | {
    "reward.temperature": ranges.POSITIVE,
    "reward.fraction": ranges.SOME_SHARE,
    "reward.threshold": ranges.Range(-1e6, 1e6),
    "region.power": ranges.Range(0, 100),
    "lora.rank": ranges.Range(0, 2**16, whole=True),  # 0: the whole UNet is trained
    "lora.alpha": ranges.POSITIVE,
    "train.pretraining_share": ranges.Range(0, 1, without=(0, 1)),
    "train.beta": ranges.WEIGHT,
    "train.text_dropout": ranges.RATE,
    "sample.every": ranges.COUNT,
    "sample.seed": ranges.SEED,
    "sample.steps": ranges.COUNT,
    "sample.guidance_scale": ranges.GUIDANCE,
}
WEIGHTINGS = ("raw", "exponential", "top", "threshold")
ADAPTED = ("to_q", "to_k", "to_v", "to_out")  # the layers that LoRA adds to


# ---- Loss -----------------------------------------------------------------------------------------------------------
def weights_of(rewards: np.ndarray, config) -> np.ndarray:
    """Rewards of all images -> what their losses weigh, float32[n] at least 0; only the ratios between them count.

    Args:
      config: the section `reward`, in `RANGES`.

    Raises:
      UserError: rewards that are not finite or all equal, an unknown weighting, rewards below 0 to be taken raw, or weights
        that are all 0.
    """
    rewards = np.asarray(rewards, np.float64)
    if not np.isfinite(rewards).all():
        raise UserError(f"reward: got {np.sum(~np.isfinite(rewards))} of {len(rewards)} not finite, expected numbers")
    if np.ptp(rewards) == 0:
        raise UserError(
            f"reward: got {rewards[0]:.6g} for all {len(rewards)} images, expected different ones; equal ones weight nothing"
        )
    if config.weighting == "raw":
        if rewards.min() < 0:
            raise UserError(
                f"reward: got {rewards.min():.4g}, expected at least 0 for --config.reward.weighting=raw; take exponential"
            )
        weights = rewards / rewards.max()
    elif config.weighting == "exponential":
        weights = np.exp((rewards - rewards.max()) / config.temperature)
    elif config.weighting == "top":
        weights = np.zeros(len(rewards))
        weights[np.argsort(-rewards, kind="stable")[: max(1, round(config.fraction * len(rewards)))]] = 1
    elif config.weighting == "threshold":
        weights = rewards >= config.threshold
        if not weights.any():
            raise UserError(
                f"reward.threshold: got {config.threshold}, expected at most {rewards.max():.4g}, the highest reward"
            )
    else:
        raise UserError(f"reward.weighting: got {config.weighting!r}, expected one of {WEIGHTINGS}")
    return weights.astype(np.float32)


def regions_of(heatmaps: np.ndarray, config) -> np.ndarray:
    """Heatmaps float32[n, h, w, 2] -> what the errors of their pixels weigh, float32[n, h, w] in [0, 1].

    Args:
      config: the section `region`, as `check` takes it.

    Raises:
      UserError: weights that are all 0.
    """
    regions = np.ones(heatmaps.shape[:-1], np.float32)
    for name in config.heatmaps:
        regions *= (1 - heatmaps[..., schema.HEATMAPS.index(name)]) ** np.float32(config.power)
    if not regions.any():
        raise UserError(
            f"region: got weights of 0 for all pixels of {len(regions)} images, expected some above 0; lower "
            f"--config.region.power={config.power} or take another critic"
        )
    return regions


def normalisers_of(batch) -> dict[str, jax.Array]:
    """What the sums of both terms are divided by, of the global batch."""
    weight = batch["weight"] * batch["region"].mean((1, 2)) if "region" in batch else batch["weight"]
    return {
        "weight": jnp.maximum(jnp.sum(weight), 1e-12),
        "pretraining": jnp.maximum(jnp.sum(batch["pretraining"]), 1.0),
    }


class Noised(typing.NamedTuple):
    """Pictures at random timesteps, as the network is trained on them.

    Attributes:
      latents: float32[B, h, w, Z]. timesteps: int32[B]. target: float32[B, h, w, Z], what the network should predict.
    """

    latents: jax.Array
    timesteps: jax.Array
    target: jax.Array


def drawn_latents(model: folder.Config, moments: jax.Array, key: jax.Array) -> jax.Array:
    """Draws from the VAE's posterior, float32[B, h, w, 2Z] (mean and log variance): scaled latents float32[B, h, w, Z]."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return model.vae.scaling_factor * (mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape))


def noised(model: folder.Config, moments: jax.Array, key: jax.Array) -> Noised:
    """Latents of the VAE's posterior, float32[B, h, w, 2Z] (mean and log variance), at random timesteps."""
    latent_key, time_key, noise_key = jax.random.split(key, 3)
    x0 = drawn_latents(model, moments, latent_key)
    noise = jax.random.normal(noise_key, x0.shape)
    timesteps = jax.random.randint(time_key, x0.shape[:1], 0, model.schedule.num_train_timesteps)
    return Noised(model.schedule.add_noise(x0, noise, timesteps), timesteps, model.schedule.target(x0, noise, timesteps))


def errors(model: folder.Config, unet, pictures: Noised, context: jax.Array) -> jax.Array:
    """The denoising error of each latent pixel, float32[B, h, w]. unet: parameters. context: float32[B, L, D]."""
    prediction = model.modules["unet"].apply({"params": unet}, pictures.latents, pictures.timesteps, context)
    return jnp.square(prediction - pictures.target).mean(3)


def make_loss(model: folder.Config, beta: float, lora_alpha: float) -> Callable:
    """(params, rows, normalisers, key) -> (loss, metrics), which add up over the parts of a batch.

    rows: moments float32[B, h, w, 2Z] (mean and log variance of the VAE), context float32[B, L, D], weight float32[B] (0
    in pre-training rows), pretraining float32[B] (1 in these); and region float32[B, h, w] where there is a critic.
    """

    def loss_fn(params, rows, normalisers, key):
        pictures = noised(model, rows["moments"], key)
        of_pixels = errors(model, merged(params, lora_alpha), pictures, rows["context"])
        of_pictures = of_pixels.mean((1, 2))
        own = (rows["region"] * of_pixels).mean((1, 2)) if "region" in rows else of_pictures
        metrics = {
            "reward_weighted": jnp.sum(rows["weight"] * own) / normalisers["weight"],
            "pretraining": jnp.sum(rows["pretraining"] * of_pictures) / normalisers["pretraining"],
        }
        metrics["loss"] = metrics["reward_weighted"] + beta * metrics["pretraining"]
        return metrics["loss"], metrics

    return loss_fn


# ---- Parameters -----------------------------------------------------------------------------------------------------
def initial_params(model: folder.Config, rank: int, key) -> dict:
    """{"unet"} and, with a rank, {"lora"} (arXiv 2106.09685), which begins as adding nothing; boxed, fresh."""
    key, lora_key = jax.random.split(key)
    params = {"unet": folder.init(model, key)["unet"]}
    if rank:
        params["lora"] = {}
        for path, kernel in _attention_kernels(params["unet"]).items():
            (inputs, outputs), (first, second) = kernel.value.shape, kernel.names
            key = jax.random.fold_in(lora_key, len(params["lora"]))
            down = nn.initializers.lecun_normal()(key, (inputs, rank), jnp.float32)
            up = jnp.zeros((rank, outputs), jnp.float32)
            params["lora"]["/".join(path[:-1])] = {
                "down": nn.LogicallyPartitioned(down, (first, None)),
                "up": nn.LogicallyPartitioned(up, (None, second)),
            }
    return params


def reference_shapes(model: folder.Config, config) -> dict:
    """{"reference": the UNet of the start, as boxed shapes}, where a config needs it; with LoRA, "unet" is that UNet."""
    if config.lora.rank or not (config.beta or config.method == "dpo"):
        return {}
    return {"reference": jax.eval_shape(lambda: folder.init(model, jax.random.key(0))["unet"])}


def _attention_kernels(unet) -> dict[tuple[str, ...], jax.Array]:
    flat = flax.traverse_util.flatten_dict(unet, is_leaf=lambda path, leaf: not isinstance(leaf, dict))
    return {path: leaf for path, leaf in flat.items() if path[-2] in ADAPTED and path[-1] == "kernel"}


def merged(params, alpha: float) -> dict:
    """The UNet's parameters, LoRA's products added: kernel + alpha / rank * down up."""
    if "lora" not in params:
        return params["unet"]
    flat = flax.traverse_util.flatten_dict(params["unet"])
    for name, added in params["lora"].items():
        path, scale = (*name.split("/"), "kernel"), alpha / added["down"].shape[1]
        flat[path] = flat[path] + scale * added["down"] @ added["up"]
    return flax.traverse_util.unflatten_dict(flat)


# ---- The program ----------------------------------------------------------------------------------------------------
def model_config(config, of_folder: folder.Config) -> folder.Config:
    """The sizes of the folder's parts, the UNet computed as the config's `model` says; the frozen parts in float32.

    Raises:
      UserError: an inpainting model, whose UNet reads more than noised latents.
    """
    if of_folder.inpaints:
        raise UserError(
            f"model.folder: got an inpainting model (unet.in_channels = {of_folder.unet.in_channels}), expected one for "
            f"text to image, with {of_folder.unet.out_channels}"
        )
    if config.model.dtype not in ("float32", "bfloat16"):  # float16 would need its losses scaled
        raise UserError(f"model.dtype: got {config.model.dtype!r}, expected 'float32' or 'bfloat16'")
    unet = dataclasses.replace(of_folder.unet, dtype=config.model.dtype, remat=config.model.remat)
    return dataclasses.replace(of_folder, unet=unet)


def check(config) -> None:
    """Refuses settings out of their range, or that do not go together."""
    experiments.check_ranges(config, RANGES)
    if config.data.images and bool(config.data.pretraining) != (config.train.beta > 0):
        raise UserError(
            f"train.beta: got {config.train.beta} with data.pretraining={config.data.pretraining!r}; expected pre-training "
            "pairs with a beta above 0, or none with --config.train.beta=0"
        )
    names = config.region.heatmaps
    if not names or any(name not in schema.HEATMAPS for name in names) or len(set(names)) < len(names):
        raise UserError(f"region.heatmaps: got {names}, expected one or more of {schema.HEATMAPS}, each once")
    rows = inputs.pretraining_rows(config)
    if config.data.images and config.data.pretraining and not 0 < rows < config.train.batch_size:
        raise UserError(
            f"train.pretraining_share: got {config.train.pretraining_share}, {rows} rows of train.batch_size="
            f"{config.train.batch_size}, expected some rows of both kinds"
        )


def program(model: folder.Config, config, regions: bool | None = None) -> programs.Program:
    """The fine-tuning of a model (of `model_config`), to be assembled (program.py).

    regions: whether pixels have weights; by default, whether the config names a critic.
    """
    loss = make_loss(model, config.train.beta if config.data.images else 1.0, config.lora.alpha)
    regions = bool(config.region.source) if regions is None else regions

    def batch_shapes(rows):
        return {name: (shape, "float32") for name, shape in inputs.batch_shapes(model, rows, regions).items()}

    return programs.Program(
        init=lambda key: initial_params(model, config.lora.rank, key),
        loss=loss,
        normalisers=normalisers_of,
        batch_shapes=batch_shapes,
        remat=("model.remat",),
        frozen=("unet",) if config.lora.rank else (),
    )
