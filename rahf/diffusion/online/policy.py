"""Policy gradients: DDPO (arXiv 2305.13301) and GRPO (arXiv 2505.05470, 2505.07818).

A step of the stochastic DDIM sampler (eta = 1) draws x' from a normal distribution around `mean(x)`, of deviation sigma. The
network is a policy that chooses x'. With A the advantage of the finished picture, and r the ratio of the probability of x'
by now to that at the time of drawing, the loss is the mean over pictures and steps of

    max(-A r, -A clip(r, 1 - c, 1 + c)) + beta KL,    KL = mean((mean - mean of the reference)^2) / (2 sigma^2)

As in the authors' code, a log-probability is the mean over the latents' numbers, not their sum; c is chosen for that.

With regional advantages, A and r belong to a pixel of the latents, and c is scaled by the root of the number of pixels: the
log-ratio of one pixel deviates by so much more than their mean.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from rahf import partitioning
from rahf import program as programs
from rahf.diffusion import finetuning, folder, sample
from rahf.diffusion.online import words
from rahf.diffusion.schedule import Plan, Schedule, plan
from richhf_data.errors import UserError

Array = jax.Array


def steps_of(schedule: Schedule, steps: int) -> Plan:
    """The stochastic DDIM sampler's steps. Raises UserError as `schedule.plan`, and if fewer than two steps add noise."""
    found = plan(schedule, "ddim", steps, eta=1.0)
    if np.count_nonzero(found.noise) < 2:
        raise UserError(f"rollout.steps: got {steps}, expected at least 2 steps that add noise")
    return found


def trained_of(config, steps: Plan) -> int:
    """How many steps of each picture are trained. Steps without noise have no probability and are not."""
    return max(1, round(config.policy.steps * np.count_nonzero(steps.noise)))


def mean_of(schedule: Schedule, now: Plan, x: Array, prediction: Array) -> Array:
    """The mean of a step's result, float32[B, h, w, Z]. now: a step's coefficients, scalars or float32[B, 1, 1, 1]."""
    return now.x * x + now.x0 * schedule.x0(x, prediction, now.alpha)


def log_prob(after: Array, mean: Array, sigma: Array) -> Array:
    """The log-probability of a step's result at each pixel, the mean over channels: float32[B, h, w]."""
    z = (after - mean) / sigma
    return (-0.5 * jnp.square(z) - jnp.log(sigma) - 0.5 * math.log(2 * math.pi)).mean(-1)


# ---- Drawing --------------------------------------------------------------------------------------------------------
def draw(model: folder.Config, config, steps: Plan, mesh) -> partitioning.MeshFunction:
    """The program that draws pictures and keeps their way.

    It takes params {"unet"[, "lora"]}, the VAE's parameters, float32[B, L, D] texts, float32[1, L, D] the empty text,
    int32[B] the pictures' numbers, and `sample.seed_data`; B is a multiple of the devices. It returns the way {"latents":
    float32[B, n + 1, h, w, Z], "log_prob": float32[B, n], or [B, n, h, w] with regional advantages}; and on all devices
    uint8[B, H, W, 3] pictures and bool[B], whether they are finite.
    """
    schedule, grid = model.schedule, model.unet.sample_size
    shape = grid, grid, model.vae.latent_channels
    regional, parts = config.dense.weight > 0, config.train.accumulation_steps

    def drawn(params, vae, context, empty, numbers, seed):
        def part(rows):
            return drawn_part(params, vae, rows[0], empty, rows[1], seed)

        if parts == 1:
            return part((context, numbers))
        rows = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (context, numbers))
        # Each device keeps its rows: neighbours are of different parts.
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), jax.lax.map(part, rows))

    def drawn_part(params, vae, context, empty, numbers, seed):
        keys, unet = sample.image_keys(seed, numbers), finetuning.merged(params, config.lora.alpha)
        scale = config.rollout.guidance_scale
        predict = sample.of_contexts(model, unet, context, empty if scale > 1 else None, np.float32(scale))

        def step(x, now):
            i, now = now
            mean = mean_of(schedule, now, x, predict(x, now.timesteps))
            after = mean + now.noise * sample.step_noise(keys, i, shape)
            found = log_prob(after, mean, jnp.where(now.noise > 0, now.noise, 1.0))
            return after, (x, found if regional else found.mean((1, 2)))

        numbered = jnp.arange(len(steps.timesteps)), jax.tree.map(jnp.asarray, steps)
        last, (latents, found) = jax.lax.scan(step, sample.noise(keys, sample.INITIAL, shape), numbered)
        latents = jnp.concatenate([latents, last[None]]).swapaxes(0, 1)
        images = model.modules["vae"].apply({"params": vae}, last, method="decode_latents")
        finite = jnp.isfinite(images).all((1, 2, 3))
        images = jnp.round((jnp.clip(jnp.nan_to_num(images), -1, 1) + 1) * 127.5).astype(jnp.uint8)
        return {"latents": latents, "log_prob": found.swapaxes(0, 1)}, images, finite

    rows, everywhere = partitioning.batch_sharding(mesh), partitioning.replicated(mesh)
    return partitioning.MeshFunction(
        drawn, mesh, config.mesh.sharding, config.mesh.attention, out_shardings=(rows, everywhere, everywhere)
    )


def way_shapes(model: folder.Config, config, rows: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shapes of `draw`'s way of so many pictures."""
    steps, grid = config.rollout.steps, model.unet.sample_size
    pixels = (grid, grid) if config.dense.weight > 0 else ()
    return {
        "latents": ((rows, steps + 1, grid, grid, model.vae.latent_channels), "float32"),
        "log_prob": ((rows, steps, *pixels), "float32"),
    }


# ---- The program ----------------------------------------------------------------------------------------------------
def make_loss(model: folder.Config, config, steps: Plan):
    """(params, rows, normalisers, key) -> (loss, metrics): one of a picture's trained steps, `rows["turn"]` of several.

    rows: the way; steps int32[B, K], the trained ones; advantage float32[B], or [B, h, w]; context float32[B, L, D]; with
    `dense.words` also words float32[B, L].
    """
    schedule, trained, scale = model.schedule, trained_of(config, steps), config.rollout.guidance_scale
    cells = model.unet.sample_size**2
    clip = config.policy.clip * (math.sqrt(cells) if config.dense.weight > 0 else 1)
    steps = jax.tree.map(np.asarray, steps)

    def loss_fn(params, rows, normalisers, key):
        step = rows["steps"][:, rows.get("turn", 0)]
        of_step = jax.vmap(lambda way, i: way[i])  # so that each device reads its own rows alone
        x, after = (of_step(rows["latents"], step + i) for i in (0, 1))
        now = jax.tree.map(lambda value: jnp.asarray(value)[step].reshape(-1, 1, 1, 1), steps)
        empty, through = params["empty"] if scale > 1 else None, None
        if "words" in rows:
            weights = rows["words"]
            if scale > 1:
                weights = jnp.stack([jnp.ones_like(weights), weights], axis=1).reshape(-1, weights.shape[1])
            through = functools.partial(words.weighted, weights=weights)

        def mean_by(unet, through=None):
            predict = sample.of_contexts(model, unet, rows["context"], empty, np.float32(scale), through=through)
            return mean_of(schedule, now, x, predict(x, now.timesteps.reshape(-1)))

        mean = mean_by(finetuning.merged(params, config.lora.alpha), through)
        new, old = log_prob(after, mean, now.noise), of_step(rows["log_prob"], step)
        ratio = jnp.exp((new if old.ndim == 3 else new.mean((1, 2))) - old)
        advantage, parts = rows["advantage"], normalisers["rows"] * trained
        losses = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip))

        def added(values):  # over the rows, of their means over pixels
            return values.reshape(len(values), -1).mean(1).sum() / parts

        metrics = {"policy": added(losses), "clipped": added((jnp.abs(ratio - 1) > clip).astype(jnp.float32))}
        metrics["ratio_deviation"] = added(jnp.abs(ratio - 1))
        metrics["loss"] = metrics["policy"]
        if config.beta:
            other = mean_by(jax.lax.stop_gradient(params.get("reference", params["unet"])))
            metrics["kl"] = added(jnp.square((mean - other) / now.noise).mean(-1) / 2)
            metrics["loss"] += config.beta * metrics["kl"]
        return metrics["loss"], metrics

    return loss_fn


def program(model: folder.Config, config) -> programs.Program:
    """The training of a model (of `finetuning.model_config`) on pictures of `draw`, to be assembled."""
    steps, text, grid = steps_of(model.schedule, config.rollout.steps), model.text.text, model.unet.sample_size
    trained = trained_of(config, steps)

    def batch_shapes(rows):
        found = way_shapes(model, config, rows) | {
            "steps": ((rows, trained), "int32"),
            "advantage": ((rows, grid, grid) if config.dense.weight > 0 else (rows,), "float32"),
            "context": ((rows, text.length, text.width), "float32"),
        }
        return found | ({"words": ((rows, text.length), "float32")} if config.dense.words > 0 else {})

    constants = {"empty": jax.ShapeDtypeStruct((1, text.length, text.width), np.float32)}
    return programs.Program(
        init=lambda key: finetuning.initial_params(model, config.lora.rank, key),
        loss=make_loss(model, config, steps),
        normalisers=lambda batch: {"rows": jnp.float32(len(batch["steps"]))},
        batch_shapes=batch_shapes,
        remat=("model.remat",),
        frozen=("unet",) if config.lora.rank else (),
        constants=constants | finetuning.reference_shapes(model, config),
        turns=trained,
    )
