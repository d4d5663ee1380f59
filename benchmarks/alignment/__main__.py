"""Measures paper B's loop at a small scale: does a reward learnt from labels improve a diffusion model's alignment?

    python -m benchmarks.alignment --workdir=DIR

A judge, trained on flawless pictures of RichHF-Synth, replaces the raters: it labels pictures, and it judges the results.
Nothing else of it is used. Each stage has its folder; a finished stage is skipped, a killed one is resumed:

    pictures     with captions that are wrong at a known rate; flawless ones for FID
    judge        what a picture shows: count, colour, thing, background
    clip         trained on the wrongly captioned pictures: text encoder, the reward's features, CLIP score
    start        the VAE and an untrained UNet
    base         the diffusion model, trained on the wrongly captioned pictures
    samples      the base's pictures of training prompts, half of them labelled
    reward       with the auxiliary loss (reward) and without (reward_plain)
    tuned/*      the base, fine-tuned on its own samples
    verdicts     pictures of held-out prompts, measured by judge, FID, reward, CLIP score and diversity
    table.md, figure.png, results.json, report.html
"""

import functools
import itertools
import pathlib
import textwrap

import jax
import numpy as np
import tabulate
from absl import flags

from benchmarks.alignment import drawings, foundation, judge, stages
from rahf import experiments, workdirs
from rahf import reward as rahf_reward
from rahf.diffusion import evaluate, finetuning, folder
from rahf.diffusion import train as diffusion_train
from rahf.diffusion.comparison_page import Evaluated
from rahf.reward import embed, predict, prompts
from rahf.reward import train as reward_train
from rahf.reward.image_table import ImageTable
from richhf_data import command, json_files, paths, ranges
from richhf_data.errors import UserError

# Of a config, for `experiments.check_ranges`; its sections reward, base and tuning have those of their programs.
RANGES = {
    "seed": ranges.Range(0, 4_000_000, whole=True),  # times 1000 is a seed too
    "pictures.train": ranges.COUNT,
    "pictures.clean": ranges.COUNT,
    "pictures.wrong_rate": ranges.SHARE,
    "sampling.steps": ranges.COUNT,
    "sampling.guidance_scale": ranges.GUIDANCE,
    "samples.labelled": ranges.COUNT,
    "samples.unlabelled": ranges.NUMBER,
    "eval.prompts": ranges.COUNT,
    "eval.images": ranges.COUNT,
    "eval.candidates": ranges.COUNT,
    "eval.strong_guidance": ranges.GUIDANCE,
}
SHOWN = ("beta_1", "beta_03", "beta_0")  # the fine-tuned models in the figure
ACCURATE = 0.98  # the accuracy that the judge must reach
BASE = "base"
PREDICTORS = {"reward": "reward", "clip_score": "CLIP score"}
TUNED = {  # name -> (label, the reward's folder, beta)
    "beta_1": ("reward-weighted, beta 1", "reward", 1.0),
    "beta_03": ("reward-weighted, beta 0.3", "reward", 0.3),
    "beta_0": ("reward-weighted, beta 0", "reward", 0.0),
    "beta_1_plain": ("reward-weighted, beta 1, no auxiliary loss", "reward_plain", 1.0),
    "unweighted": ("all weights alike, beta 1", "reward", 1.0),
}


def check(config) -> None:
    """Refuses a value that is missing or out of its range: UserError."""
    experiments.check_ranges(config, RANGES)
    parts = {"reward": reward_train.RANGES, "base": finetuning.RANGES, "tuning": finetuning.RANGES}
    for section, allowed in parts.items():
        experiments.check_ranges(config[section], allowed, f"{section}.")


# ---- Stages ---------------------------------------------------------------------------------------------------------
def make_pictures(config, place: pathlib.Path) -> None:
    """Writes train.parquet and clean.parquet."""
    for name, number, rate in (("clean", 1, 0.0), ("train", 0, config.pictures.wrong_rate)):
        if not (place / f"{name}.parquet").is_file():
            table = drawings.captioned(config.pictures[name], stages.seed_of(config, number), rate)
            drawings.write(table, place / f"{name}.parquet")


def make_samples(config, root: pathlib.Path, raters) -> None:
    """Draws pictures by the base: own.parquet has all of them, feedback.parquet the labelled ones."""
    place, settings = root / "samples", config.samples
    if (place / "own.parquet").is_file():
        return
    training = [prompts.text(prompt) for prompt in drawings.split_prompts()[0]]
    training = np.random.default_rng(stages.seed_of(config, 60)).permutation(training).tolist()
    texts = list(itertools.islice(itertools.cycle(training), settings.labelled + settings.unlabelled))
    images = stages.drawn(root / "base/model", texts, stages.seed_of(config, 61), config.sampling, place / "own.npy")
    labels = raters(images[: settings.labelled], texts[: settings.labelled])["all"].astype(np.int64)
    stages.write_table(place / "feedback.parquet", images[: settings.labelled], texts[: settings.labelled], label=labels)
    stages.write_table(place / "own.parquet", images, texts)


def fit_rewards(config, root: pathlib.Path) -> dict[str, list[dict]]:
    """Trains both rewards; returns the contents of their results.json."""
    found = {}
    for name, weight in (("reward", config.reward.loss.classification_weight), ("reward_plain", 0.0)):
        settings = config.reward.copy_and_resolve_references()
        settings.prompts = {name: tuple(getattr(drawings.WORDS, name)) for name in prompts.CATEGORIES}
        settings.loss.classification_weight, settings.seed = weight, stages.seed_of(config, 70)
        feedback = root / "samples/feedback.parquet"
        found[name] = reward_train.train(settings, feedback, root / "clip", root / name, root / "clip/cache")
    return found


def tune(config, root: pathlib.Path, name: str) -> None:
    """Fine-tunes the base as `TUNED` says. All runs have the same number of own pictures per step."""
    _, reward, beta = TUNED[name]
    settings = config.tuning.copy_and_resolve_references()
    settings.model.folder, settings.data.images = str(root / "base/model"), str(root / "samples/own.parquet")
    settings.reward.source, settings.train.beta, settings.seed = f"reward:{root / reward}", beta, stages.seed_of(config, 80)
    if name == "unweighted":
        settings.reward.update(weighting="top", fraction=1.0)
    if beta:
        settings.data.pretraining = str(root / "pictures/train.parquet")
    else:
        settings.train.batch_size //= 2
    diffusion_train.train(settings, root / "tuned" / name, cache=root / "cache")


# ---- Verdicts -------------------------------------------------------------------------------------------------------
def judged(config, root: pathlib.Path, raters) -> list[Evaluated]:
    """Compares all generators on held-out prompts, from the same noise; writes results.json and report.html."""
    place, strong = root / "verdicts", config.sampling.to_dict() | {"guidance_scale": config.eval.strong_guidance}
    held_out = [prompts.text(prompt) for prompt in drawings.split_prompts()[1]]
    chosen = np.random.default_rng(stages.seed_of(config, 90)).permutation(held_out)[: config.eval.prompts].tolist()
    texts = [text for text in chosen for _ in range(config.eval.images)]
    reward, count = rahf_reward.load(root / "reward"), config.eval.candidates

    def draw(model, name, texts=texts, sampling=config.sampling):
        return stages.drawn(root / model / "model", texts, stages.seed_of(config, 91), sampling, place / f"{name}.npy")

    candidates = draw("base", "candidates", texts * count)
    candidates = candidates.reshape(count, len(texts), *candidates.shape[1:]).swapaxes(0, 1)
    kept, _ = predict.keep_best(reward, candidates, texts)
    sets = {BASE: candidates[:, 0]}
    sets[f"base, best of {count} by the reward"] = candidates[np.arange(len(texts)), kept]
    for name, (label, *_) in TUNED.items():
        sets[label] = draw(f"tuned/{name}", name)
    guidance = f"guidance {config.eval.strong_guidance:g}"
    sets[f"base, {guidance}"] = draw("base", "base_strong", sampling=strong)
    sets[f"{TUNED['beta_1'][0]}, {guidance}"] = draw("tuned/beta_1", "beta_1_strong", sampling=strong)
    start = folder.read(root / "start")
    flawless = [
        drawings.draw(drawings.WORDS.parse(text), (stages.seed_of(config, 92), i))[0] for i, text in enumerate(texts)
    ]
    through = foundation.reconstruct(start.config.vae, start.params["vae"], np.stack(flawless))
    sets["flawless pictures, through the VAE"] = through
    tables = {}
    for number, (label, images) in enumerate(sets.items()):
        file = place / f"{number}.parquet"
        stages.write_table(file, images, texts)
        tables[label] = ImageTable(file)
    return evaluate.compare(
        tables,
        root,
        features=raters.features,
        reference=ImageTable(root / "pictures/clean.parquet"),
        reward=reward,
        clip=embed.Clip(root / "clip"),
        judge=raters,
        words=drawings.WORDS,
    )


def predictors(found: list[Evaluated]) -> list[dict[str, float]]:
    """AUC of reward and CLIP score as predictors of which of the base's pictures the judge finds right."""
    (base,) = (one for one in found if one.name == BASE)
    right, kinds = base.values["alignment/all"], np.array(drawings.WORDS.kinds(base.prompts))
    return [
        {"held-out prompts": kind, "pictures": int(rows.sum())}
        | {label: reward_train.auc(base.values[name][rows], right[rows]) for name, label in PREDICTORS.items()}
        for kind, rows in [("all", kinds == kinds), *((kind, kinds == kind) for kind in sorted(set(kinds)))]
    ]


def table(found: list[Evaluated], rewards) -> str:
    """All tables, as Markdown."""
    shown = {"alignment/all": "all right", **{f"alignment/{name}": name for name in prompts.CATEGORIES}}
    lines = []
    for one in found:
        of = one.results
        share = {label: f"{100 * of[key]:.1f} ± {100 * of[f'{key}/se']:.1f}" for key, label in shown.items()}
        others = {"reward": "reward/all", "CLIP score": "clip_score/all", "diversity": "diversity"}
        others = {"FID": f"{of['fid']:.1f}", **{label: f"{of[key]:.3f}" for label, key in others.items()}}
        lines.append({"judge's verdict, %": one.name, **share, **others})
    markdown = functools.partial(tabulate.tabulate, headers="keys", tablefmt="github", disable_numparse=True)
    verdicts = markdown(lines)
    on_held_out = tabulate.tabulate(predictors(found), headers="keys", tablefmt="github", floatfmt=".3f")
    names = {"reward": "with the auxiliary loss", "reward_plain": "without"}
    lines = [
        {"reward": names[name], "training labels": entry["train"]}
        | {f"{metric}, {label}": f"{entry[who][metric]:.3f}" for metric in ("auc", "accuracy", "f1")
           for who, label in PREDICTORS.items()}
        for name, entries in rewards.items() for entry in entries
    ]  # fmt: skip
    return "\n\n".join((verdicts, on_held_out, markdown(lines))) + "\n"


def figure(found: list[Evaluated], root: pathlib.Path, columns: int = 12) -> bytes:
    """A PNG: one picture for each of the first prompts, by the base and the fine-tuned; frames show the judge's verdict."""
    from matplotlib.figure import Figure

    names = [BASE, *(TUNED[name][0] for name in SHOWN)]
    step = len(found[0].prompts) // len(set(found[0].prompts))
    drawing = Figure(figsize=(1.05 * columns, 1.25 * len(names) + 0.5), layout="constrained")
    grid = drawing.subplots(len(names), columns)
    for number, one in enumerate(found):
        if one.name not in names:
            continue
        images = drawings.images(drawings.read(root / f"verdicts/{number}.parquet"))
        for column, axes in enumerate(grid[names.index(one.name)]):
            row = column * step
            axes.imshow(images[row], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(linewidth=2.5, edgecolor="#1a8f3c" if one.values["alignment/all"][row] else "#c81e1e")
            if one.name == BASE:
                axes.set_title("\n".join(textwrap.wrap(one.prompts[row], 15)), fontsize=7)
            if column == 0:
                axes.set_ylabel("\n".join(textwrap.wrap(one.name, 16)), fontsize=8)
    return stages.png_of(drawing, 100)


def run(config, workdir) -> None:
    """Runs all stages and records the seconds of each."""
    check(config)
    root = pathlib.Path(workdir).absolute()
    workdirs.open_workdir(root, config)
    stage = stages.Timed(root / "seconds.json")
    stage("pictures", make_pictures, config, root / "pictures")
    fit_judge = functools.partial(judge.fit, root / "judge", seed=stages.seed_of(config, 10))
    stage("judge", fit_judge, unless=root / "judge/config.json")
    raters = judge.load(root / "judge")
    accuracies = json_files.read(root / "judge/config.json")["accuracy"]
    if min(accuracies.values()) < ACCURATE:
        raise UserError(f"judge: got accuracies {accuracies} on held-out pictures, expected at least {ACCURATE} of each")
    stage("clip, start", stages.make_start, config, root)
    stage("base", stages.fit_base, config, root, unless=root / "base/model" / folder.INDEX)
    stage("samples", make_samples, config, root, raters)
    rewards = stage("rewards", fit_rewards, config, root)
    for name in TUNED:
        stage(f"tuned/{name}", tune, config, root, name, unless=root / "tuned" / name / "model" / folder.INDEX)
        jax.clear_caches()
    found = stage("verdicts", judged, config, root, raters)

    text = table(found, rewards)
    text += "\nThe judge on held-out flawless pictures: " + ", ".join(f"{name} {v:.3f}" for name, v in accuracies.items())
    text += f"\n{stage.summary()}\n"
    paths.replace(root / "table.md", text.encode())
    paths.replace(root / "figure.png", figure(found, root))
    print(f"\n{text}\n{root}: table.md, figure.png, results.json, report.html")


def main():
    """The command."""
    run(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The folder of all stages; a killed run resumes from it.")
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader(default=str(pathlib.Path(__file__).parent / "config.py")))
