"""Aligns Stable Diffusion with a reward in pictures that it draws meanwhile, or with preferences.

    python -m rahf.diffusion.online --config=sd_online --config.method=draft --workdir=DIR --config.model.folder=SD15
        --config.data.prompts=prompts.txt --config.reward.source=rahf:DIR:plausibility --config.eval.reward=pickscore:DIR

    ddpo, grpo    policy gradients (policy.py, rounds.py): any reward
    refl, draft   the reward's gradient through the sampler (backprop.py): a differentiable reward
    dpo           preferences (preferences.py): pairs of pictures, none are drawn

Checkpoints, resume, signals, mesh, sharding, LoRA and caches are those of `rahf.diffusion.train`.

    workdir/evaluations.jsonl, .png    the trained and the held-out reward, diversity and FID while it trains (guard.py)
    workdir/samples/                   pictures of held-out prompts, with the same noise each time
    workdir/best/                      the parameters of the best held-out reward, where there is one
    workdir/model/                     at the end, the folder that diffusers and `rahf.diffusion.sample` read: of the best
                                       held-out reward, or of the last step
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from rahf import checkpoints, experiments, hosts, loop, partitioning, trackers, workdirs
from rahf import program as programs
from rahf.diffusion import evaluate, finetuning, folder, inputs, sample
from rahf.diffusion import schedule as sampler
from rahf.diffusion import train as diffusion_train
from rahf.diffusion.online import backprop, guard, policy, preferences, rounds
from rahf.fingerprint import fingerprint
from rahf.reward import differentiable, specs
from rahf.reward.image_table import ImageTable
from rahf.train import print_run
from richhf_data import command, images, paths, ranges, schema
from richhf_data.errors import UserError

METHODS = ("ddpo", "grpo", "refl", "draft", "dpo")
# Of a config, for `experiments.check_ranges`.
RANGES = programs.RANGES | {
    "method": ranges.OneOf(METHODS),
    "beta": ranges.WEIGHT,
    "rollout.steps": ranges.COUNT,
    "rollout.guidance_scale": ranges.GUIDANCE,
    "rollout.sampler": ranges.OneOf(backprop.SAMPLERS),
    "policy.pictures": ranges.ROWS,
    "policy.group": ranges.Range(0, 2**20, whole=True),
    "policy.epochs": ranges.COUNT,
    "policy.steps": ranges.SOME_SHARE,
    "policy.clip": ranges.POSITIVE,
    "policy.max_advantage": ranges.POSITIVE,
    "policy.history": ranges.Range(2, 2**20, whole=True),
    "gradient.last": ranges.COUNT,
    "gradient.noisings": ranges.COUNT,
    "gradient.start": ranges.RATE,
    "gradient.ceiling": ranges.Range(-1e6, 1e9),
    "preference.beta": ranges.POSITIVE,
    "reward.margin": ranges.WEIGHT,
    "dense.weight": ranges.WEIGHT,
    "dense.words": ranges.SHARE,
    "eval.every": ranges.COUNT,
    "eval.prompts": ranges.COUNT,
    "eval.images": ranges.COUNT,
    "eval.patience": ranges.NUMBER,
    "train.beta": ranges.WEIGHT,
    "train.text_dropout": ranges.RATE,
    "lora.rank": ranges.Range(0, 2**16, whole=True),
    "lora.alpha": ranges.POSITIVE,
    "sample.seed": ranges.SEED,
    "sample.steps": ranges.COUNT,
    "sample.guidance_scale": ranges.GUIDANCE,
}
RESUME_MAY_DIFFER = (
    *workdirs.CONDUCT,
    *("model.folder", "data.prompts", "data.held_out", "data.pairs", "data.images", "data.sets", "data.pretraining"),
    *("reward.source", "dense.source", "eval.reward"),  # their contents are recorded
    "eval.patience",
    "model.remat",
)


def check(config, has_critic: bool = False) -> None:
    """Refuses settings out of their range, or that do not go together: UserError."""
    experiments.check_ranges(config, RANGES)
    policies, gradients = config.method in ("ddpo", "grpo"), config.method in ("refl", "draft")
    if policies:
        rounds.check(config)
    if gradients and config.gradient.noisings > 1 and (config.method == "refl" or config.gradient.last > 1):
        raise UserError(
            f"gradient.noisings: got {config.gradient.noisings} with method={config.method} and gradient.last="
            f"{config.gradient.last}, expected 1, or draft and gradient.last=1: only the last step is noised again"
        )
    if config.method == "draft" and config.gradient.last > config.rollout.steps:
        raise UserError(f"gradient.last: got {config.gradient.last}, expected at most rollout.steps={config.rollout.steps}")
    if config.dense.weight > (1 if gradients else 1e9 if policies else 0):
        expected = "0 to 1 with refl and draft" if gradients else "0 with dpo, which has no regions"
        raise UserError(f"dense.weight: got {config.dense.weight}, expected {expected}")
    names = config.dense.heatmaps
    if not names or any(name not in schema.HEATMAPS for name in names) or len(set(names)) < len(names):
        raise UserError(f"dense.heatmaps: got {names}, expected one or more of {schema.HEATMAPS}, each once")
    if config.dense.words > 0 and gradients:
        raise UserError(f"dense.words: got {config.dense.words} with {config.method}, expected 0, or ddpo, grpo, dpo")
    if (config.dense.weight > 0 or config.dense.words > 0) != (has_critic or bool(config.dense.source)):
        raise UserError(
            f"dense.source: got {config.dense.source!r} with dense.weight={config.dense.weight} and dense.words="
            f"{config.dense.words}, expected a critic with one of them above 0: --config.dense.source=rahf:DIR"
        )
    if config.train.text_dropout and config.method != "dpo":
        raise UserError(f"train.text_dropout: got {config.train.text_dropout} with {config.method}, expected 0, or dpo")
    data, preferred = config.data, config.method == "dpo"
    reads = {
        "prompts": not preferred,
        "pairs": preferred,
        "sets": preferred and bool(data.pairs),
        "images": preferred,
        "pretraining": gradients and config.train.beta > 0,
    }
    for name, read in reads.items():
        if data[name] and not read:
            given = config.method + (f" and train.beta={config.train.beta}" if name == "pretraining" else "")
            raise UserError(f"data.{name}: got {data[name]!r} with {given}, which does not read it: leave it out")
    if config.beta > 0 and preferred:
        raise UserError(f"beta: got {config.beta} with dpo, expected 0: preference.beta holds its model near the start")
    if config.reward.margin > 0 and not data.images:
        raise UserError(f"reward.margin: got {config.reward.margin} without data.images, expected 0: it is of their rewards")


def program(model: folder.Config, config, reward=None, critic: backprop.Critic | None = None) -> programs.Program:
    """What `config.method` trains, to be assembled.

    Args:
      model: of `finetuning.model_config`.
      reward: the `differentiable.Differentiable` of refl and draft. critic: their regions. Both with arrays or shapes.
    """
    if config.method == "dpo":
        return preferences.program(model, config)
    if config.method in ("ddpo", "grpo"):
        return policy.program(model, config)
    return backprop.program(model, config, reward, critic)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Prompts that are trained on, and prompts that are only evaluated."""

    trained: list[str]
    held_out: list[str]


def texts_of(config, prompts: list[str]) -> Texts:
    """Deals the prompts of a run, of which some are held out unless a file has others.

    Raises:
      UserError: too few prompts; a held-out prompt that is trained on.
    """
    prompts = list(dict.fromkeys(prompts))
    if config.data.held_out:
        held_out = list(dict.fromkeys(sample.read_prompts(config.data.held_out)))
        if both := [prompt for prompt in held_out if prompt in set(prompts)]:
            raise UserError(
                f"data.held_out: {config.data.held_out}: {both[0]!r} and {len(both) - 1} more are training prompts too, "
                "expected others"
            )
        return Texts(prompts, held_out[: config.eval.prompts])
    if len(prompts) <= config.eval.prompts:
        raise UserError(
            f"{'data.prompts' if config.data.prompts else preferences.NAME}: got {len(prompts)} different prompts, expected "
            f"more than the {config.eval.prompts} that are held out for evaluation; pass more, lower --config.eval.prompts, "
            "or pass --config.data.held_out=FILE"
        )
    chosen = set(np.random.default_rng((config.seed, 4)).permutation(len(prompts))[: config.eval.prompts].tolist())
    kept = [prompt for i, prompt in enumerate(prompts) if i not in chosen]
    return Texts(kept, [prompts[i] for i in sorted(chosen)])


def train(config, workdir, reward=None, held_out=None, critic=None, cache=None, judge=None) -> None:
    """Runs `config` to its end in `workdir`.

    Args:
      reward: in place of `config.reward.source`: `(images uint8[B, H, W, 3], prompts) -> float32[B]`; for refl and draft a
        `differentiable.Differentiable`.
      held_out: in place of `config.eval.reward`, such a function.
      critic: in place of `config.dense.source`, a `rahf.predictor.Model`.
      cache: the folder of latents and embeddings, for several runs on the same prompts; `workdir/cache` by default.
      judge: (images uint8[n, S, S, 3], prompts) -> {name: number}, what else is measured of the held-out pictures.

    Raises:
      UserError: a folder, table, reward or setting that cannot be used.
      SystemExit: as `loop.start`.
    """
    # ---- Model, rewards, prompts ------------------------------------------------------------------------------------
    checkpoints.check_path(workdir)
    check(config, has_critic=critic is not None)
    trackers.check(config)
    mesh = partitioning.mesh_of(config.mesh)
    if not config.model.folder:
        raise UserError("model.folder: got '', expected a diffusers folder to start from: --config.model.folder=DIR")
    if not config.data.prompts and config.method != "dpo":
        raise UserError(f"data.prompts: got '' for {config.method}, expected a file: --config.data.prompts=FILE")
    base = diffusion_train.with_frozen(folder.opened(config.model.folder))
    base = dataclasses.replace(base, config=finetuning.model_config(config, base.config))
    sampler.plan(base.config.schedule, config.sample.sampler, config.sample.steps)
    reward, slope = rewards_of(config, reward)
    held_out = specs.reward_of(config.eval.reward) if held_out is None and config.eval.reward else held_out
    if critic is None and config.dense.source:
        critic = specs.critic_of(config.dense.source).model
        if config.dense.words > 0:
            critic.require(f"dense.source: {config.dense.source}", "keywords")
    workdir = paths.absolute(workdir)
    watch = guard_of(config, workdir, reward, held_out, print=lambda text: run.print(text))
    cache, identities = diffusion_train.cache_of(cache, workdir), {}
    pairs = preferences.pairs_of(config, reward, cache) if config.method == "dpo" else None
    if pairs and jax.process_index() == 0:
        print(pairs, flush=True)
    texts = texts_of(config, pairs.preferred.prompts if pairs else sample.read_prompts(config.data.prompts))
    if pairs:
        tables, identities = {"preferred": pairs.preferred, "other": pairs.other}, pairs.identities
    else:
        tables = {"pretraining": ImageTable(config.data.pretraining)} if config.data.pretraining else {}
    every = [*texts.trained, *texts.held_out]
    data = inputs.Inputs.of_tables(config, base, tables, every, identities)
    for one in (reward, held_out):
        specs.check_prompts(one, every)
    if critic is not None:
        diffusion_train.check_critic(critic, texts.trained)

    # ---- Training step ----------------------------------------------------------------------------------------------
    constants, flaws = {"vae": base.params["vae"]}, None
    if slope:
        slope.rows(texts.held_out)  # raises for a prompt that is too long
        backprop.check_gradient(slope, texts.trained[:2], base.config)
        constants["reward"] = slope.params
        if critic is not None:
            flaws = backprop.flaws_of(critic, config.dense.heatmaps)
            constants["critic"] = flaws.params
    training = programs.assemble(program(base.config, config, slope, flaws), config, mesh)
    config = training.config
    with config.unlocked():
        config.identity = data.identities | {"prompts": fingerprint(texts.trained, texts.held_out)}
    if not workdirs.is_new(workdir):
        workdirs.open_workdir(workdir, config, RESUME_MAY_DIFFER)
    contexts = data.contexts(cache, mesh)
    constants["empty"] = contexts[-1:]
    if "reference" in training.constants:
        constants["reference"] = jax.tree.map(lambda tensor: tensor.read(), base.params["unet"])
    training = training.given({name: constants[name] for name in training.constants})

    # ---- Batches ----------------------------------------------------------------------------------------------------
    batches_from, rollouts = None, None
    if slope:
        moments = data.moments("pretraining", cache, mesh) if config.data.pretraining else None
        batches_from = backprop.batches_from(config, data, contexts, texts.trained, slope, flaws, moments, training.own_rows)
    elif pairs:
        batches_from = preferences.batches_from(config, data, contexts, texts.trained, critic, cache, training)
    else:
        whole = functools.partial(partitioning.place, sharding=partitioning.replicated(mesh))
        vae = jax.tree.map(whole, base.params["vae"])
        made = rounds.Rounds(
            config, base.config, training, texts.trained, contexts, base.tokenizer, vae, reward, critic
        )
        rollouts = made.rollouts()
    workdirs.open_workdir(workdir, config, RESUME_MAY_DIFFER)  # a new one only now, when all inputs were read
    workdirs.record(workdir / "rewards.json", identities_of(reward, held_out, critic), "rewards")
    print_run(workdir, training)

    # ---- Steps; evaluation, the best checkpoint, the trained model --------------------------------------------------
    merge = functools.partial(finetuning.merged, alpha=config.lora.alpha)
    merged = jax.jit(merge, out_shardings=partitioning.replicated(mesh))
    initialise = functools.partial(diffusion_train.starting_params, base, training)
    with (
        checkpoints.manager(workdir, "best") as best,
        loop.start(config, workdir, training, initialise, batches_from, rollouts) as run,
    ):

        def evaluated(step):
            model = diffusion_train.on_devices(base, merged(run.params), mesh)
            prompts, drawn = draw_held_out(config, model, texts.held_out, mesh)
            show(run, workdir, drawn[:: config.eval.images])
            if watch:
                more = {"processor_seconds": run.processor_seconds} | (judge(drawn, prompts) if judge else {})
                run.log("eval", watch.measured(step, drawn, prompts, more=more))
            kept = best.latest_step()  # a later one than this step is of a killed run, which this one repeats
            if held_out is not None and watch.best[0] == step and (kept is None or kept < step):
                checkpoints.save(best, step, run.params, {"value": watch.best[1]})

        if held_out is not None:
            checkpoints.best_value(best, training.params)  # sets a damaged one aside
        if watch:
            watch.resume(run.step)
        if run.step == 0:
            evaluated(0)
        for step in run.steps():
            if run.due(config.eval.every):
                evaluated(step)
                if watch and watch.stop:
                    run.print(f"step {step}: {config.eval.patience} evaluations without a better one: the run ends")
                    run.end()
        params, step = run.params, run.step
        checkpoints.finish(best)
        if (kept := best.latest_step()) is not None:
            step, params = kept, checkpoints.restore(best, kept, training.params)
        elif held_out is not None:
            run.print(f"WARNING: the best model, of step {watch.best[0]}, was damaged and is lost; this is the last one")
        model = diffusion_train.on_devices(base, merged(params), mesh)
        if jax.process_index() == 0:
            if (workdir / "model").exists():  # of an earlier end: with more patience, the run goes on
                (workdir / "model").rmtree()
            diffusion_train.write_model(model, workdir / "model")
            run.print(f"{workdir / 'model'}: the model of step {step}")


def rewards_of(config, given) -> tuple[Callable | None, differentiable.Differentiable | None]:
    """The reward that is trained; and for refl and draft the same as what is differentiated.

    Raises:
      UserError: none where one is needed, or one without a gradient.
    """
    gradients = config.method in ("refl", "draft")
    if given is None and config.reward.source:
        given = (specs.differentiable_of if gradients else specs.reward_of)(config.reward.source)
    if given is None and (config.method != "dpo" or config.data.images):
        expected = "expected a reward: --config.reward.source=rahf:DIR:overall"
        raise UserError(f"reward.source: got '' for {config.method}, {expected}")
    if not gradients:
        if given is not None and not callable(given):
            raise UserError(f"reward: got a {type(given).__name__} for {config.method}, expected a function")
        return given, None
    if not isinstance(given, differentiable.Differentiable):
        raise UserError(f"reward: got a {type(given).__name__} for {config.method}, expected a Differentiable")
    return differentiable.called(given), given


def identities_of(reward, held_out, critic) -> dict[str, str | None]:
    """Of what a run learns from and is watched by, which must not change while it lasts."""
    found = {"reward": specs.identity_of(reward), "held_out": specs.identity_of(held_out, "held_out")}
    return found | {"critic": specs.identity_of(critic, "critic")}


def guard_of(config, workdir, reward, held_out, print) -> guard.Guard | None:
    """What watches the run; None without any reward. Raises UserError as `guard.Guard`."""
    if reward is None and held_out is None:
        for name in ("features", "reference", "patience"):
            if value := config.eval[name]:
                raise UserError(f"eval.{name}: got {value!r} without a reward, expected one: --config.eval.reward=SPEC")
        return None
    features = specs.features_of(config.eval.features) if config.eval.features else None
    reference = None
    if config.eval.reference:
        if features is None:
            raise UserError("eval.reference: got one without eval.features, which FID needs: add clip:DIR")
        table = ImageTable(config.eval.reference)
        shown = (images.decode(encoded, where) for where, encoded in table.images())
        reference = evaluate.compute_features(features, shown, len(table))
    options = {"features": features, "reference": reference, "patience": config.eval.patience}
    return guard.Guard(reward, held_out=held_out, **options, workdir=workdir, print=print)


def draw_held_out(config, model: folder.StableDiffusion, texts: list[str], mesh) -> tuple[list[str], np.ndarray]:
    """Pictures of the held-out prompts, always from the same noise: the prompts, each as often as it has pictures, and
    uint8[n, S, S, 3]."""
    prompts, found = [text for text in texts for _ in range(config.eval.images)], []
    size = min(len(prompts), inputs.AT_ONCE * partitioning.sizes(mesh)["data"])
    settings = {name: config.sample[name] for name in diffusion_train.SAMPLED} | {"attention": config.mesh.attention}
    settings["truncate"] = config.data.truncate_long_prompts
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        filled = part + part[-1:] * (size - len(part))  # one compiled shape
        drawn = sample.generate(model, filled, first=first, mesh=mesh, **settings)
        found.append(sample.to_uint8(drawn[: len(part)]))
    return prompts, np.concatenate(found)


def show(run: loop.Run, workdir, drawn: np.ndarray, most: int = 8) -> None:
    """Writes a grid of pictures for this step, also to TensorBoard."""
    grid = diffusion_train.grid_of(drawn[:most])
    run.writer.image("samples", grid, run.step)
    if jax.process_index() == 0:
        paths.replace(workdir / "samples" / f"step_{run.step:08d}.png", images.png(grid))


def main():
    """The command."""
    with hosts.joined(preemptible=True), hosts.locked(flags.FLAGS.workdir):
        train(flags.FLAGS.config, flags.FLAGS.workdir, cache=flags.FLAGS.cache)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "For checkpoints, logs, samples and the model; a killed run resumes from it.")
    flags.DEFINE_string("cache", None, "Where latents and texts' embeddings are kept, if not in the workdir.")
    hosts.define_flags()
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader(kinds=("online",)))
