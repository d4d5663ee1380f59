"""Gradients of a differentiable reward through the sampler: ReFL (arXiv 2304.05977) and DRaFT (arXiv 2309.17400).

    draft    the whole sampler runs; the gradient passes through its last K steps and the VAE's decoder. With several
             noisings (DRaFT-LV), the finished latents are noised again to the last step's level, several times; the
             reward is the mean over them.
    refl     the sampler runs to a random late step; the gradient passes through the clean picture predicted there.

    loss = -mean(min(reward, ceiling)) + beta distance + train.beta (denoising error of pre-training pairs)

    distance: mean squared difference between the predictions of the model and of the reference, in the steps with a gradient
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rahf import program as programs
from rahf.diffusion import finetuning, folder, inputs, sample
from rahf.diffusion.online import deals
from rahf.diffusion.schedule import Plan, plan
from rahf.models import cpu
from rahf.reward import differentiable
from rahf.reward.differentiable import Differentiable
from richhf_data.errors import UserError

Array = jax.Array
SAMPLERS = ("ddim", "dpm++")  # those that add no noise


@dataclasses.dataclass(frozen=True)
class Critic:
    """What says which regions are flawed.

    Attributes:
      heatmaps: (params, images, rows) -> float32[B, h, w] in [0, 1], as of `Differentiable.score`. params, rows: as there.
    """

    heatmaps: Callable[[Any, Array, Any], Array]
    params: Any
    rows: Callable[[Sequence[str]], Any]


def named(prefix: str, tree) -> dict[str, Any]:
    """The leaves of a tree by name, as entries of a batch."""
    return {f"{prefix}_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def gathered(prefix: str, rows: Mapping[str, Array], like):
    """The tree of `named`."""
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [rows[f"{prefix}_{i}"] for i in range(len(leaves))])


def make_loss(model: folder.Config, config, reward: Differentiable, critic: Critic | None = None) -> Callable:
    """(params, rows, normalisers, key) -> (loss, metrics), which add up over the parts of a batch.

    params: also reward, vae, and as configured empty, reference, critic. rows: context float32[B, L, D], scored_* (what the
    reward reads of the prompts), region_* (what the critic reads); of pre-training pairs moments and pretraining_context.
    """
    model = dataclasses.replace(model, vae=dataclasses.replace(model.vae, remat=True))
    schedule, options, scale = model.schedule, config.gradient, config.rollout.guidance_scale
    steps = plan(schedule, config.rollout.sampler, config.rollout.steps)
    count, shape = len(steps.timesteps), (*(model.unet.sample_size,) * 2, model.vae.latent_channels)
    steps = jax.tree.map(np.asarray, steps)
    like = reward.rows([""]), None if critic is None else critic.rows([""])

    def loss_fn(params, rows, normalisers, key):
        unet = finetuning.merged(params, config.lora.alpha)
        empty = params["empty"] if scale > 1 else None
        noise_key, time_key, again_key, pair_key = jax.random.split(key, 4)

        def predictor(unet):
            return sample.of_contexts(model, unet, rows["context"], empty, np.float32(scale))

        trained, fixed = predictor(unet), predictor(jax.lax.stop_gradient(unet))
        reference = None
        if config.beta:
            reference = predictor(jax.lax.stop_gradient(params.get("reference", params["unet"])))

        def at(i) -> Plan:
            return jax.tree.map(lambda values: jnp.asarray(values)[i], steps)

        def taken(predict, x, before, now):
            """A step: the latents after it, x_0 and float32[B], the distance from the reference."""
            prediction = predict(x, now.timesteps)
            x0, distance = schedule.x0(x, prediction, now.alpha), jnp.zeros(len(x))
            if reference is not None and predict is trained:
                other = reference(x, now.timesteps)
                distance = jnp.square(prediction - other).mean((1, 2, 3))
            return now.x * x + now.x0 * x0 + now.x0_before * before, x0, distance

        def without_gradient(x, steps: int | Array):
            def body(i, carry):
                return taken(fixed, *carry, at(i))[:2]

            return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, body, (x, jnp.zeros_like(x))))

        def rewards(latents):
            images = model.modules["vae"].apply({"params": params["vae"]}, latents, method="decode_latents")
            if critic is not None:
                images = _through_flaws(images, rows)
            return reward.score(params["reward"], images, gathered("scored", rows, like[0])).astype(jnp.float32)

        def _through_flaws(images, rows):
            """The same pictures, whose gradient passes where they are flawed."""
            fixed = jax.lax.stop_gradient(images)
            flaws = critic.heatmaps(params["critic"], fixed, gathered("region", rows, like[1]))
            flaws = flaws / jnp.maximum(flaws.max((1, 2), keepdims=True), 1e-6)
            share = 1 - config.dense.weight * (1 - jax.image.resize(flaws, images.shape[:3], "linear")[..., None])
            return fixed + jax.lax.stop_gradient(share) * (images - fixed)

        x = jax.random.normal(noise_key, (len(rows["context"]), *shape))
        if config.method == "refl":
            i = jax.random.randint(time_key, (), int(options.start * count), count)
            x, before = without_gradient(x, i)
            _, x0, distance = taken(trained, x, before, at(i))
            found = rewards(x0)
        elif options.noisings > 1:
            x, _ = without_gradient(x, count)
            now = at(count - 1)

            @jax.checkpoint
            def again(total, key):
                noised = jnp.sqrt(now.alpha) * x + jnp.sqrt(1 - now.alpha) * jax.random.normal(key, x.shape)
                with cpu.in_loop():
                    after, _, distance = taken(trained, noised, jnp.zeros_like(x), now)
                    return jax.tree.map(jnp.add, total, (rewards(after), distance)), None

            zeros = jnp.zeros(len(x)), jnp.zeros(len(x))
            total, _ = jax.lax.scan(again, zeros, jax.random.split(again_key, options.noisings))
            found, distance = (part / options.noisings for part in total)
        else:
            first = max(0, count - options.last)
            x, before = without_gradient(x, first)

            @jax.checkpoint
            def step(carry, i):
                with cpu.in_loop():
                    after, x0, distance = taken(trained, *carry, at(i))
                return (after, x0), distance

            (x, _), distances = jax.lax.scan(step, (x, before), jnp.arange(first, count))
            found, distance = rewards(x), distances.mean(0)

        def added(values):
            return values.sum() / normalisers["rows"]

        metrics = {"reward": added(found), "loss": -added(jnp.minimum(found, options.ceiling))}
        if config.beta:
            metrics["distance"] = added(distance)
            metrics["loss"] += config.beta * metrics["distance"]
        if "moments" in rows:
            noised = finetuning.noised(model, rows["moments"], pair_key)
            context = rows["pretraining_context"]
            metrics["pretraining"] = added(finetuning.errors(model, unet, noised, context).mean((1, 2)))
            metrics["loss"] += config.train.beta * metrics["pretraining"]
        return metrics["loss"], metrics

    return loss_fn


def program(model: folder.Config, config, reward: Differentiable, critic: Critic | None = None) -> programs.Program:
    """The training of a model (of `finetuning.model_config`) by a reward's gradient, to be assembled.

    reward, critic: with arrays or shapes as parameters.
    """
    text, grid = model.text.text, model.unet.sample_size
    of_reward = named("scored", reward.rows([""])) | (named("region", critic.rows([""])) if critic else {})

    def batch_shapes(rows):
        found = {"context": ((rows, text.length, text.width), "float32")}
        found |= {name: ((rows, *np.shape(array)[1:]), str(array.dtype)) for name, array in of_reward.items()}
        if config.data.pretraining:
            found["moments"] = (rows, grid, grid, 2 * model.vae.latent_channels), "float32"
            found["pretraining_context"] = found["context"]
        return found

    constants = {"vae": jax.eval_shape(functools.partial(folder.init, model), jax.random.key(0))["vae"]}
    constants |= {"empty": jax.ShapeDtypeStruct((1, text.length, text.width), np.float32), "reward": shapes(reward.params)}
    constants |= {} if critic is None else {"critic": shapes(critic.params)}
    return programs.Program(
        init=lambda key: finetuning.initial_params(model, config.lora.rank, key),
        loss=make_loss(model, config, reward, critic),
        normalisers=lambda batch: {"rows": jnp.float32(len(batch["context"]))},
        batch_shapes=batch_shapes,
        remat=("model.remat",),
        frozen=("unet",) if config.lora.rank else (),
        constants=constants | finetuning.reference_shapes(model, config),
    )


def batches_from(
    config, data: inputs.Inputs, contexts, prompts: Sequence[str], reward, critic, moments, rows: np.ndarray
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """step -> endless batches from that step on. A batch depends only on the seed and its step.

    Args:
      contexts: float32[n, L, D], the prompts' embeddings first. moments: of the pre-training pairs, or None.
      rows: which rows of the global batch to return.
    """
    read = named("scored", reward.rows(prompts)) | (named("region", critic.rows(prompts)) if critic else {})
    pairs = None if moments is None else data.rows("pretraining", moments, np.ones(len(moments), np.float32))
    size = config.train.batch_size

    def batches(start):
        for step in itertools.count(start):
            texts = deals.dealt(config.seed, len(prompts), step * size, size)[rows]
            batch = {"context": contexts[texts]} | {name: array[texts] for name, array in read.items()}
            if pairs is not None:
                drawn = pairs.drawn(config.seed, 1, step * size, size)[rows]
                batch |= {"moments": pairs.moments[drawn], "pretraining_context": contexts[pairs.text[drawn]]}
            yield batch

    return batches


def flaws_of(model, heatmaps: Sequence[str]) -> Critic:
    """The mean of some of the heatmaps of a `rahf.predictor.Model`."""
    return Critic(differentiable.rahf_heatmaps(model.model_config, heatmaps), model.params, differentiable.rows_of(model))


def check_gradient(reward: Differentiable, prompts: Sequence[str], model: folder.Config) -> None:
    """Refuses a reward without a gradient: UserError."""
    size = model.unet.sample_size * model.vae.factor
    drawn = np.random.default_rng(0).uniform(-1, 1, (len(prompts), size, size, 3)).astype(np.float32)
    read = reward.rows(prompts)

    def total(images, params):
        found = reward.score(params, images, read)
        if np.shape(found) != (len(prompts),):
            raise UserError(f"reward: got shape {np.shape(found)}, expected [{len(prompts)}], one number an image")
        return found.astype(jnp.float32).sum()

    try:
        value, slope = jax.jit(jax.value_and_grad(total))(drawn, reward.params)
    except (jax.errors.JAXTypeError, TypeError) as error:
        raise UserError(
            f"reward: its gradient cannot be computed ({str(error).splitlines()[0]}), expected a JAX function of the "
            "pictures; take --config.method=grpo for any other"
        ) from error
    if not np.isfinite(value) or not np.isfinite(slope).all() or not np.any(slope):
        got = "0 everywhere" if np.isfinite(value) and np.isfinite(slope).all() else "not finite"
        raise UserError(f"reward: its gradient is {got} on pictures of noise, expected one that leads uphill; take grpo")


def shapes(params):
    """The shapes of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), params)
