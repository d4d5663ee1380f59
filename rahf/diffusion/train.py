"""Fine-tunes Stable Diffusion on images weighted by a reward (paper B), or trains a base model on captioned pictures.

    python -m rahf.diffusion.train --config=sd_reward --workdir=DIR --config.model.folder=SD15
        --config.data.images=samples/images.jsonl --config.reward.source=reward:DIR --config.data.pretraining=pairs.parquet

What is trained is in finetuning.py. The outputs of the frozen parts are computed once and kept:

    workdir/cache/          the VAE's posteriors, the texts' embeddings, rewards and heatmaps; --cache puts them elsewhere
    workdir/rewards.json    which rewards and weights of pixels the run began with
    workdir/samples/        grids of the same prompts and seeds at several steps of the training; in TensorBoard too
    workdir/model/          at the end, the folder that diffusers and `rahf.diffusion.sample` read
"""

import dataclasses
import functools
import hashlib
import pathlib
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from flax import linen as nn

from rahf import checkpoints, experiments, hosts, loop, partitioning, trackers, workdirs
from rahf import program as programs
from rahf.diffusion import finetuning, folder, inputs, sample
from rahf.diffusion import schedule as sampler
from rahf.fingerprint import fingerprint
from rahf.reward import specs
from rahf.train import print_run
from richhf_data import command, images, paths
from richhf_data.errors import UserError

FROZEN = ("vae", "text_encoder")
SAMPLED = ("seed", "steps", "sampler", "guidance_scale")
# What may differ when a run is resumed: nothing of this changes its result.
RESUME_MAY_DIFFER = (
    *workdirs.CONDUCT,
    "model.folder",  # the section `identity` records the contents of these three
    "data.images",
    "data.pretraining",
    "reward.source",  # rewards.json says what these two give
    "region",
    "model.remat",
    "sample",
)


def train(config, workdir, reward: Callable | None = None, cache=None, critic=None) -> None:
    """Runs `config` to its end in `workdir`.

    Args:
      reward: `(images uint8[B, H, W, 3], prompts) -> float32[B]`, in place of `config.reward.source`.
      cache: the folder of latents and embeddings, for several runs on the same tables; `workdir/cache` by default.
      critic: with `predict(images, prompts) -> rahf.predictor.Feedback`, in place of `config.region.source`.

    Raises:
      UserError: a folder, table or setting that cannot be used, or rewards or a critic that weight nothing.
      SystemExit: as `loop.start`.
    """
    # ---- Model, mesh, training step ---------------------------------------------------------------------------------
    checkpoints.check_path(workdir)
    finetuning.check(config)
    trackers.check(config)
    mesh = partitioning.mesh_of(config.mesh)
    if not config.model.folder:
        raise UserError("model.folder: got '', expected a diffusers folder to start from: --config.model.folder=DIR")
    base = with_frozen(folder.opened(config.model.folder))
    base = dataclasses.replace(base, config=finetuning.model_config(config, base.config))
    sampler.plan(base.config.schedule, config.sample.sampler, config.sample.steps)
    regions = critic is not None or bool(config.region.source)
    if regions and not config.data.images:
        raise UserError("region: got a critic, but no data.images that it weights; add --config.data.images=FILE")
    training = programs.assemble(finetuning.program(base.config, config, regions), config, mesh)
    config = training.config

    # ---- Data: what the frozen parts, the reward and the critic make of it ------------------------------------------
    data = inputs.Inputs.of(config, base)
    if "images" in data.tables and reward is None:
        if not config.reward.source and not regions:
            expected = "reward:DIR, rahf:DIR:SCORE or python:MODULE:NAME, or a critic: --config.region.source=rahf:DIR"
            raise UserError(f"reward.source: got '' for data.images, expected {expected}")
        reward = specs.reward_of(config.reward.source) if config.reward.source else None
    if regions and critic is None:
        critic = specs.critic_of(config.region.source).model
    if regions:
        check_critic(critic, data.tables["images"].prompts)
    workdir = paths.absolute(workdir)
    with config.unlocked():
        config.identity = data.identities
    batches_from = prepare_batches(config, workdir, data, reward, critic, cache, training)
    print_run(workdir, training)

    # ---- Steps; samples, the trained model --------------------------------------------------------------------------
    everywhere = partitioning.replicated(mesh)
    merged = jax.jit(functools.partial(finetuning.merged, alpha=config.lora.alpha), out_shardings=everywhere)
    prompts = list(config.sample.prompts) or [text for text in data.texts if text][:8]
    settings = {name: config.sample[name] for name in SAMPLED} | {"attention": config.mesh.attention}

    def show(run, step):  # what it places on the devices is gone with its end
        model = on_devices(base, merged(run.params), mesh)
        drawn = sample.generate(model, prompts, truncate=True, mesh=mesh, **settings)
        grid = grid_of(sample.to_uint8(drawn))
        run.writer.image("samples", grid, step)
        if jax.process_index() == 0:
            paths.replace(workdir / "samples" / f"step_{step:08d}.png", images.png(grid))
            if step == config.train.num_steps and not (workdir / "model" / folder.INDEX).exists():
                write_model(model, workdir / "model")
                run.print(f"{workdir / 'model'}: the trained model")

    initialise = functools.partial(starting_params, base, training)
    with loop.start(config, workdir, training, initialise, batches_from) as run:
        for step in run.steps():
            if run.due(config.sample.every):
                show(run, step)


def starting_params(base: folder.StableDiffusion, training: programs.Training) -> dict:
    """The parameters of step 0, in their places: the UNet that was opened, and fresh adapters."""
    config = training.config

    def placed(tensor, sharding):
        return partitioning.place(tensor.read(), sharding)

    params, places = {}, jax.tree.map(lambda x: x.sharding, training.params)
    params["unet"] = jax.tree.map(placed, base.params["unet"], places["unet"])
    if config.lora.rank:
        fresh = functools.partial(finetuning.initial_params, base.config, config.lora.rank)
        init = jax.jit(lambda key: nn.unbox(fresh(key))["lora"], out_shardings=places["lora"])
        params["lora"] = init(training.init_key)
    return params


def on_devices(base: folder.StableDiffusion, unet, mesh) -> folder.StableDiffusion:
    """The model with this UNet (parameters, whole on every device), its frozen parts placed likewise."""
    everywhere = functools.partial(partitioning.place, sharding=partitioning.replicated(mesh))
    frozen = {part: jax.tree.map(everywhere, base.params[part]) for part in FROZEN}
    return dataclasses.replace(base, params=frozen | {"unet": unet})


def check_critic(critic, prompts) -> None:
    """Refuses a critic that predicts nothing, or that cannot read one of the prompts."""
    if not callable(getattr(critic, "predict", None)):
        got = type(critic).__name__
        raise UserError(f"critic: got a {got}, expected an object with predict(images, prompts), such as rahf.load(DIR)")
    if hasattr(critic, "text_ids"):
        for prompt in dict.fromkeys(prompts):
            critic.text_ids(prompt)  # raises for one that is too long


def prepare_batches(config, workdir, data: inputs.Inputs, reward, critic, cache, training: programs.Training) -> Callable:
    """step -> batches; computes what the frozen parts, the reward and the critic make of the tables, and opens the workdir.

    The workdir's config is written once its rewards and its critic are found to weight something.

    Raises:
      UserError: rewards or a critic that weight nothing, or others than the run began with; a workdir of another run.
    """
    mesh = training.mesh
    if not workdirs.is_new(workdir):
        workdirs.open_workdir(workdir, config, RESUME_MAY_DIFFER)
    cache = cache_of(cache, workdir)
    contexts, own, pretraining = data.contexts(cache, mesh), None, None
    if "images" in data.tables:
        moments = data.moments("images", cache, mesh)
        weight, region, found = weights_of(config, data, reward, critic, cache)
        own = data.rows("images", moments, weight, region)
    if "pretraining" in data.tables:
        moments = data.moments("pretraining", cache, mesh)
        pretraining = data.rows("pretraining", moments, np.ones(len(moments), np.float32))
    workdirs.open_workdir(workdir, config, RESUME_MAY_DIFFER)
    if "images" in data.tables:
        workdirs.record(workdir / "rewards.json", found, "rewards" if critic is None else "rewards or regions")
    return functools.partial(inputs.batches, own, pretraining, contexts, config, training.own_rows)


def cache_of(cache, workdir) -> pathlib.Path:
    """This process's folder for outputs of the frozen parts. Raises UserError if it is not on a disk."""
    if "://" in str(cache or workdir):
        raise UserError(f"cache: got {cache or workdir / 'cache'}, expected a folder on a disk: --cache=DIR")
    return pathlib.Path(cache or workdir / "cache") / (f"host_{jax.process_index()}" if jax.process_count() > 1 else "")


def weights_of(config, data: inputs.Inputs, reward, critic, cache) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """What the model's own images weigh, float32[n]; what their pixels weigh, float32[n, h, w]; and the record of both.

    Without a reward, every image weighs 1; without a critic, the pixels' are None.
    """
    weight, region = np.ones(len(data.tables["images"]), np.float32), None
    found, said = {"images": len(weight)}, [f"weights of {len(weight):,} images: 1 each, without a reward"]
    if reward is not None:
        rewards = data.rewards(reward, cache)
        weight = finetuning.weights_of(rewards, config.reward)
        effective = weight.sum(dtype=np.float64) ** 2 / np.sum(np.square(weight, dtype=np.float64))
        found |= {"digest": fingerprint(rewards.tolist()), "mean": float(rewards.mean())}
        said = [
            f"rewards of {len(rewards):,} images: mean {rewards.mean():.4g}, {rewards.min():.4g} to "
            f"{rewards.max():.4g}; {config.reward.weighting} weights, worth {effective:,.0f} equal ones"
        ]
    if critic is not None:
        region = finetuning.regions_of(data.heatmaps(critic, cache), config.region)
        of_critic = specs.identity_of(critic, "critic") or hashlib.sha256(region).hexdigest()
        found["regions"] = fingerprint(of_critic, sorted(config.region.heatmaps), config.region.power)
        mean, low = region.mean(dtype=np.float64), np.mean(region < 0.5)
        said.append(f"regions of {len(region):,} images: mean weight {mean:.4g}, {low:.1%} of the pixels below one half")
    if jax.process_index() == 0:
        print(*said, sep="\n", flush=True)
    return weight, region, found


def with_frozen(model: folder.StableDiffusion) -> folder.StableDiffusion:
    """An opened model whose frozen parts are read, in numpy; its UNet stays in its file."""
    read = {part: jax.tree.map(lambda tensor: tensor.read(), model.params[part]) for part in FROZEN}
    return dataclasses.replace(model, params=model.params | read)


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
    with hosts.joined(preemptible=True), hosts.locked(flags.FLAGS.workdir):
        train(flags.FLAGS.config, flags.FLAGS.workdir, cache=flags.FLAGS.cache)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "For checkpoints, logs, samples and the model; a killed run resumes from it.")
    flags.DEFINE_string("cache", None, "Where latents and texts' embeddings are kept, if not in the workdir.")
    hosts.define_flags()
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader(kinds=("diffusion",)))
