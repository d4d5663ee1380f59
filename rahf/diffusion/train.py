"""Fine-tunes Stable Diffusion on images weighted by a reward (paper B), or trains a base model on captioned pictures.

    python -m rahf.diffusion.train --config=configs/sd_reward.py --workdir=DIR --config.model.folder=SD15
        --config.data.images=samples/images.jsonl --config.reward.source=reward:DIR --config.data.pretraining=pairs.parquet

    loss = sum(w L) / sum(w)  over the model's own images, w a function of their rewards
         + beta mean(L)       over pre-training pairs;         L: the denoising error, the usual bound of -log p(x | z)

Only the UNet is trained. What the frozen parts say of the data is computed once and kept:

    workdir/cache/          the VAE's posteriors, the texts' embeddings, the rewards; --cache puts them elsewhere
    workdir/rewards.json    which rewards the run began with
    workdir/samples/        grids of the same prompts and seeds as training goes on; in TensorBoard too
    workdir/model/          at the end, the folder that diffusers and `rahf.diffusion.sample` read
"""

import dataclasses
import functools
import io
import pathlib
import tempfile
from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from absl import flags
from flax import linen as nn

from rahf import checkpoints, experiments, hosts, loop, optimizers, partitioning
from rahf.diffusion import folder, inputs, sample
from rahf.diffusion import schedule as sampler
from rahf.reward import sources
from richhf_data import command, paths
from richhf_data.errors import UserError

WEIGHTINGS = ("raw", "exponential", "top", "threshold")
ADAPTED = ("to_q", "to_k", "to_v", "to_out")  # the layers that LoRA adds to
FROZEN = ("vae", "text_encoder")
SAMPLED = ("seed", "steps", "sampler", "guidance_scale")


# ---- Loss -----------------------------------------------------------------------------------------------------------
def weights_of(rewards: np.ndarray, config) -> np.ndarray:
    """Rewards of all images -> what their losses weigh, float32[n] at least 0; only the ratios between them count.

    Args:
      config: the section `reward`.

    Raises:
      UserError: rewards that are not finite or all equal, an unknown weighting or a setting out of its range, rewards
        below 0 to be taken raw, or weights that are all 0.
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
        if config.temperature <= 0:
            raise UserError(f"reward.temperature: got {config.temperature}, expected above 0")
        weights = np.exp((rewards - rewards.max()) / config.temperature)
    elif config.weighting == "top":
        if not 0 < config.fraction <= 1:
            raise UserError(f"reward.fraction: got {config.fraction}, expected above 0 and at most 1")
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


def normalisers_of(batch) -> dict[str, jax.Array]:
    """What the sums of both terms are divided by, of the global batch."""
    return {
        "weight": jnp.maximum(jnp.sum(batch["weight"]), 1e-12),
        "pretraining": jnp.maximum(jnp.sum(batch["pretraining"]), 1.0),
    }


def make_loss(model: folder.Config, beta: float, lora_alpha: float) -> Callable:
    """(params, rows, normalisers, key) -> (loss, metrics), which add up over the parts of a batch.

    rows: moments float32[B, h, w, 2Z] (mean and log variance of the VAE), context float32[B, L, D], weight float32[B] (0
    in pre-training rows), pretraining float32[B] (1 in these).
    """
    unet, schedule = model.modules["unet"], model.schedule

    def loss_fn(params, rows, normalisers, key):
        latent_key, time_key, noise_key = jax.random.split(key, 3)
        mean, logvar = jnp.split(rows["moments"], 2, axis=-1)
        x0 = mean + jnp.exp(0.5 * logvar) * jax.random.normal(latent_key, mean.shape)
        x0 = model.vae.scaling_factor * x0
        noise = jax.random.normal(noise_key, x0.shape)
        timesteps = jax.random.randint(time_key, x0.shape[:1], 0, schedule.num_train_timesteps)
        noised = schedule.add_noise(x0, noise, timesteps)
        prediction = unet.apply({"params": merged(params, lora_alpha)}, noised, timesteps, rows["context"])
        errors = jnp.square(prediction - schedule.target(x0, noise, timesteps)).mean((1, 2, 3))  # [B]
        metrics = {
            "reward_weighted": jnp.sum(rows["weight"] * errors) / normalisers["weight"],
            "pretraining": jnp.sum(rows["pretraining"] * errors) / normalisers["pretraining"],
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


# ---- Training -------------------------------------------------------------------------------------------------------
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


def check(config):
    """The config as it is meant, the UNet frozen where LoRA is trained. Raises UserError: settings out of their range."""
    limits = {
        "train.beta": (config.train.beta >= 0, "0 or more"),
        "train.pretraining_share": (0 < config.train.pretraining_share < 1, "above 0 and below 1"),
        "train.text_dropout": (0 <= config.train.text_dropout < 1, "0 or more and below 1"),
        "lora.rank": (config.lora.rank >= 0, "0 (train the whole UNet) or more"),
        "sample.every": (config.sample.every > 0, "1 or more"),
    }
    for name, (holds, expected) in limits.items():
        if not holds:
            section, _, entry = name.partition(".")
            raise UserError(f"{name}: got {config[section][entry]!r}, expected {expected}")
    if config.data.images and bool(config.data.pretraining) != (config.train.beta > 0):
        raise UserError(
            f"train.beta: got {config.train.beta} with data.pretraining={config.data.pretraining!r}; expected pre-training "
            "pairs with a beta above 0, or none with --config.train.beta=0"
        )
    rows = inputs.pretraining_rows(config)
    if config.data.images and config.data.pretraining and not 0 < rows < config.train.batch_size:
        raise UserError(
            f"train.pretraining_share: got {config.train.pretraining_share}, {rows} rows of train.batch_size="
            f"{config.train.batch_size}, expected some rows of both kinds"
        )
    config = config.copy_and_resolve_references()
    if config.lora.rank:
        config.optimizer.freeze = ("unet", *config.optimizer.freeze)
    return config


def state_shardings(model: folder.Config, optimizer, config, mesh, key):
    """The training state as shapes, and where each of its arrays lives."""

    def init(key):
        return loop.initial_state(initial_params(model, config.lora.rank, key), optimizer, config)

    return loop.state_shardings(jax.eval_shape(init, key), config, mesh)


def make_train_step(model: folder.Config, optimizer, schedule, config, mesh):
    """The update `(state, batch, key) -> (state, metrics)`, by `loop.make_train_step`."""
    loss_fn = make_loss(model, config.train.beta if config.data.images else 1.0, config.lora.alpha)
    return loop.make_train_step(loss_fn, normalisers_of, optimizer, schedule, config, mesh)


def train(config, workdir, reward: Callable | None = None, cache=None) -> None:
    """Runs `config` to its end in `workdir`.

    Args:
      reward: `(images uint8[B, H, W, 3], prompts) -> float32[B]`, in place of `config.reward.source`.
      cache: the folder of latents and embeddings, for several runs on the same tables; `workdir/cache` by default.

    Raises:
      UserError: a folder, table or setting that cannot be used, or rewards that weight nothing.
      SystemExit: as `loop.run`.
    """
    # ---- Model, optimiser, state ------------------------------------------------------------------------------------
    config = check(config)
    mesh = partitioning.mesh_of(config.mesh)
    loop.check_batch(config, mesh)
    if not config.model.folder:
        raise UserError("model.folder: got '', expected a diffusers folder to start from: --config.model.folder=DIR")
    held = on_host(folder.read(config.model.folder), mesh)
    held = dataclasses.replace(held, config=model_config(config, held.config))
    model = held.config
    sampler.plan(model.schedule, config.sample.sampler, config.sample.steps)
    schedule = optimizers.make_schedule(config.optimizer, config.train.num_steps)
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.num_steps)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    abstract, shardings = state_shardings(model, optimizer, config, mesh, init_key)
    optimizers.check_freeze(abstract["params"], config.optimizer.freeze)

    # ---- Data, what the frozen parts and the reward say of it -------------------------------------------------------
    data = inputs.Inputs.of(config, held)
    if "images" in data.tables and reward is None:
        if not config.reward.source:
            expected = "reward:DIR, rahf:DIR:SCORE or python:MODULE:NAME"
            raise UserError(f"reward.source: got '' for data.images, expected {expected}")
        reward = sources.reward_of(config.reward.source)
    workdir = paths.absolute(workdir)
    with config.unlocked():
        config.identity = data.identities
    if not checkpoints.is_new(workdir):  # else the config is written when its rewards are found to weight something
        checkpoints.open_workdir(workdir, config)
    if "://" in str(cache or workdir):
        raise UserError(f"cache: got {cache or workdir / 'cache'}, expected a folder on a disk: --cache=DIR")
    cache = pathlib.Path(cache or workdir / "cache") / (f"host_{jax.process_index()}" if jax.process_count() > 1 else "")
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda text: None
    contexts, own, pretraining = data.contexts(cache, mesh), None, None
    if "images" in data.tables:
        moments, rewards = data.moments("images", cache, mesh), data.rewards(reward, cache)
        weights = weights_of(rewards, config.reward)
        effective = weights.sum(dtype=np.float64) ** 2 / np.sum(np.square(weights, dtype=np.float64))
        say(
            f"rewards of {len(rewards):,} images: mean {rewards.mean():.4g}, {rewards.min():.4g} to {rewards.max():.4g}; "
            f"{config.reward.weighting} weights, worth {effective:,.0f} equal ones"
        )
        own = data.rows("images", moments, weights)
    if "pretraining" in data.tables:
        moments = data.moments("pretraining", cache, mesh)
        pretraining = data.rows("pretraining", moments, np.ones(len(moments), np.float32))
    workdir = checkpoints.open_workdir(workdir, config)
    if "images" in data.tables:
        same_rewards(workdir / "rewards.json", rewards)
    trained = [leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(abstract["params"])
               if not optimizers.is_frozen(path, config.optimizer.freeze)]  # fmt: skip
    sizes = " x ".join(f"{name} {size}" for name, size in partitioning.sizes(mesh).items())
    say(f"workdir {workdir}: {sum(trained):,} parameters are trained, mesh {sizes}, {config.mesh.rules}")

    # ---- State, sharded ---------------------------------------------------------------------------------------------
    def first_state(params):
        state = loop.initial_state(params, optimizer, config)
        return {name: state[name] for name in state if name != "ema"}

    def fresh():
        params = {"unet": jax.tree.map(partitioning.place, held.params["unet"], shardings["params"]["unet"])}
        if config.lora.rank:
            init = jax.jit(lambda key: nn.unbox(initial_params(model, config.lora.rank, key))["lora"],
                           out_shardings=shardings["params"]["lora"])  # fmt: skip
            params["lora"] = init(init_key)
        places = {name: sharding for name, sharding in shardings.items() if name != "ema"}
        return jax.jit(first_state, out_shardings=places)(params)

    # ---- Update step, samples ---------------------------------------------------------------------------------------
    batch_sharding = partitioning.batch_sharding(mesh)
    own_rows = partitioning.local_rows(batch_sharding, config.train.batch_size)
    train_step = loop.jit_train_step(make_train_step(model, optimizer, schedule, config, mesh), mesh, shardings)
    finished = jax.jit(lambda params: merged(params, config.lora.alpha), out_shardings=partitioning.replicated(mesh))
    prompts = list(config.sample.prompts) or [text for text in data.texts if text][:8]

    def update(state, rows):
        batch = partitioning.shard_batch(rows, batch_sharding)
        with partitioning.activate(mesh, config.mesh.rules):
            return train_step(state, batch, step_key)

    def look(step, state, writer, say):
        now = dataclasses.replace(held, params=held.params | {"unet": finished(state.get("ema", state["params"]))})
        settings = config.sample.to_dict()
        images = sample.to_uint8(
            sample.generate(now, prompts, truncate=True, mesh=mesh, **{name: settings[name] for name in SAMPLED})
        )
        grid = grid_of(images)
        writer.add_image("samples", grid, step, dataformats="HWC")
        if jax.process_index() > 0:
            return
        file = io.BytesIO()
        PIL.Image.fromarray(grid).save(file, "png")
        paths.replace(workdir / "samples" / f"step_{step:08d}.png", file.getvalue())
        if step == config.train.num_steps and not (workdir / "model" / folder.INDEX).exists():
            write_model(now, workdir / "model")
            say(f"{workdir / 'model'}: the trained model")

    # ---- Loop -------------------------------------------------------------------------------------------------------
    batches_from = functools.partial(inputs.batches, own, pretraining, contexts, config, own_rows)
    loop.run(config, workdir, abstract, shardings, fresh, batches_from, update, config.sample.every, look)


def same_rewards(file, rewards: np.ndarray) -> None:
    """Writes what the rewards are, or refuses others than the run began with."""
    told = {"digest": inputs.identity(rewards.tolist()), "images": len(rewards), "mean": float(rewards.mean())}
    if not file.exists() and jax.process_index() == 0:
        checkpoints.write_json(file, told)
    hosts.wait("rewards")
    if (held := checkpoints.read_json(file)) != told:
        raise UserError(
            f"reward: {file.parent} holds a run with other rewards (of mean {held['mean']:.6g}, these {told['mean']:.6g}); "
            "take another --workdir, or the reward that it began with"
        )


def on_host(model: folder.StableDiffusion, mesh) -> folder.StableDiffusion:
    """The model with its UNet in numpy, off the devices, and its frozen parts on all of the mesh."""
    params = jax.tree.map(np.asarray, model.params)
    everywhere = functools.partial(partitioning.place, sharding=partitioning.replicated(mesh))
    return dataclasses.replace(model, params=params | {part: jax.tree.map(everywhere, params[part]) for part in FROZEN})


def write_model(model: folder.StableDiffusion, place) -> None:
    """`folder.write`, also into a bucket."""
    if "://" not in str(place):
        return folder.write(model, place)
    with tempfile.TemporaryDirectory() as local:
        folder.write(model, pathlib.Path(local) / "model")
        files = [path for path in pathlib.Path(local).rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == folder.INDEX):
            paths.replace(place / str(path.relative_to(pathlib.Path(local) / "model")), path.read_bytes())


def grid_of(images: np.ndarray, columns: int = 4) -> np.ndarray:
    """uint8[B, H, W, 3] -> one picture, row by row, white where there is none."""
    columns = min(columns, len(images))
    missing = -len(images) % columns
    images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)], constant_values=255)
    rows = images.reshape(-1, columns, *images.shape[1:]).transpose(0, 2, 1, 3, 4)
    return rows.reshape(rows.shape[0] * rows.shape[1], -1, 3)


def main():
    """The command."""
    with hosts.joined(preemptible=True):
        train(flags.FLAGS.config, flags.FLAGS.workdir, cache=flags.FLAGS.cache)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "For checkpoints, logs, samples and the model; a killed run resumes from it.")
    flags.DEFINE_string("cache", None, "Where latents and texts' embeddings are kept, if not in the workdir.")
    hosts.define_flags()
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader())
