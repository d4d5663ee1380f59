"""Measures what a critic is for, at a small scale: selection, weights by region, guidance and repair.

    python -m benchmarks.feedback --workdir=DIR

A base diffusion model is trained on RichHF-Synth pictures with artifacts and wrong captions at known rates, so that it
makes such errors itself. The critic is a RAHF, trained on the labels of simulated annotators. Judges of another
architecture, trained on exact truth, stand for the people who compare the results; nothing else of them is used. Each stage
has its folder; a finished stage is skipped, a killed one is resumed:

    pictures         of the base's training; flawless ones for FID
    start, base      CLIP, VAE and an untrained UNet; the diffusion model
    annotated, data  pictures with the labels of simulated annotators, in the published formats, and built from these
    critic, judges   trained on them, and on exact truth
    own              the base's pictures of training prompts, eight of each
    selected, first  the critic's choice of them; the first of the same prompts
    tuned/*          the base, fine-tuned
    drawn, repaired  pictures of held-out prompts, by all models, guided, and repaired
    table.md, figure.png, look.png, results.json
"""

import dataclasses
import functools
import math
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import tabulate
from absl import flags
from tqdm.auto import tqdm

from benchmarks.alignment import drawings, foundation, stages
from benchmarks.alignment.stages import seed_of
from benchmarks.feedback import judges, pictures
from rahf import experiments, train, workdirs
from rahf.diffusion import evaluate, finetuning, folder, generator_metrics, repair, select, side_by_side
from rahf.diffusion import train as diffusion_train
from rahf.diffusion.guide import Guidance
from rahf.reward import prompts, specs
from rahf.reward.image_table import ImageTable
from richhf_data import command, json_files, paths, ranges
from richhf_data.errors import UserError

RANGES = {
    "seed": ranges.Range(0, 4_000_000, whole=True),
    "pictures.train": ranges.COUNT,
    "pictures.clean": ranges.COUNT,
    "pictures.artifact_rate": ranges.SHARE,
    "pictures.wrong_rate": ranges.SHARE,
    "samples.prompts": ranges.COUNT,
    "samples.images": ranges.COUNT,
    "seeds": ranges.COUNT,
    "eval.prompts": ranges.COUNT,
    "eval.images": ranges.COUNT,
    "select.threshold": ranges.SHARE,
    "guide.scales": ranges.Each(ranges.POSITIVE),
    "judge.train": ranges.COUNT,
    "judge.held_out": ranges.COUNT,
    "judge.steps": ranges.COUNT,
    "annotated.artifact_rate": ranges.SHARE,
    "annotated.wrong_rate": ranges.SHARE,
}
ACCURATE = 0.95  # that the judges must reach on held-out renders
TUNED = {  # name -> what the base is fine-tuned on
    "selected": "pictures that the critic selected",
    "first": "the first picture of the same prompts",
    "equal": "all own pictures, equal weights",
    "scalar": "all, weighted by the score",
    "region": "all, weighted by region",
    "both": "all, weighted by score and region",
}
WITH_SEEDS = ("selected", "first")
LOOKED_AT = 50  # pictures of the base, for a person to check the judges


def check(config) -> None:
    """Refuses a value that is missing or out of its range: UserError."""
    experiments.check_ranges(config, RANGES)
    repair.Options(**config.repair)
    for section in ("base", "tuning"):
        experiments.check_ranges(config[section], finetuning.RANGES, f"{section}.")


# ---- The parts ------------------------------------------------------------------------------------------------------
def make_pictures(config, place: pathlib.Path) -> None:
    """Writes train.parquet and clean.parquet."""
    rates = config.pictures.artifact_rate, config.pictures.wrong_rate
    for name, number, of_table in (("clean", 1, (0.0, 0.0)), ("train", 0, rates)):
        if not (place / f"{name}.parquet").is_file():
            table = pictures.table(config.pictures[name], seed_of(config, number), *of_table)
            drawings.write(table, place / f"{name}.parquet")


def through_vae(root: pathlib.Path) -> Callable:
    """uint8[n, S, S, 3] -> the same, encoded and decoded by the VAE."""
    start = folder.read(root / "start")
    return functools.partial(foundation.reconstruct, start.config.vae, start.params["vae"])


def make_annotated(config, root: pathlib.Path) -> None:
    """Writes annotated pictures in the published formats, and builds the dataset."""
    settings, through = config.annotated, through_vae(root)
    for number, split in enumerate(("test", "dev", "train")):
        if not (root / f"annotated/{split}.tfrecord").is_file():
            rates = settings.artifact_rate, settings.wrong_rate
            pictures.write_annotated(
                root / "annotated", split, settings[split], seed_of(config, 100 + number), rates, through
            )
    images = f"--images=table:{root}/annotated/images/*.parquet"
    arguments = f"--records={root}/annotated", images, f"--data_dir={root}/data"
    subprocess.run([sys.executable, "-m", "richhf_data.build", *arguments], check=True)


def fit_critic(config, root: pathlib.Path) -> None:
    """Trains the critic."""
    settings = config.critic.copy_and_resolve_references()
    settings.data.data_dir, settings.seed = str(root / "data"), seed_of(config, 110)
    train.train(settings, root / "critic")


def critic_of(root: pathlib.Path, scores: str = "plausibility") -> specs.ScoreReward:
    """A score of the critic."""
    return specs.reward_of(f"rahf:{root / 'critic'}:{scores}")


# ---- Selection and weights ------------------------------------------------------------------------------------------
def training_prompts(config) -> list[str]:
    """The prompts of the base's own pictures."""
    texts = [prompts.text(prompt) for prompt in drawings.split_prompts()[0]]
    return np.random.default_rng(seed_of(config, 60)).permutation(texts)[: config.samples.prompts].tolist()


def make_own(config, root: pathlib.Path) -> None:
    """Draws the base's own pictures, and selects from them."""
    place = root / "own"
    texts = [text for text in training_prompts(config) for _ in range(config.samples.images)]
    if not (place / "own.parquet").is_file():
        images = stages.drawn(root / "base/model", texts, seed_of(config, 61), config.sampling, place / "own.npy")
        stages.write_table(place / "own.parquet", images, texts)
    table = ImageTable(place / "own.parquet")
    select.select(table, critic_of(root), root / "selected", config.select.threshold)
    chosen = set(ImageTable(root / "selected").prompts)
    rows = [row for row in range(0, len(texts), config.samples.images) if texts[row] in chosen]
    images = drawings.images(drawings.read(place / "own.parquet"))[rows]
    stages.write_table(root / "first/images.parquet", images, [texts[row] for row in rows])


def tune(config, root: pathlib.Path, name: str, seed: int) -> None:
    """Fine-tunes the base as `TUNED` says. All runs have the same steps and rows of a batch."""
    settings = config.tuning.copy_and_resolve_references()
    settings.model.folder, settings.seed = str(root / "base/model"), seed_of(config, 80 + seed)
    if name in ("selected", "first"):
        settings.data.pretraining = str(root / name / ("images.jsonl" if name == "selected" else "images.parquet"))
    else:
        settings.data.images = str(root / "own/own.parquet")
        if name in ("scalar", "both", "equal"):
            settings.reward.source = f"rahf:{root / 'critic'}:plausibility"
        if name == "equal":
            settings.reward.update(weighting="top", fraction=1.0)
        if name in ("region", "both"):
            settings.region.source = f"rahf:{root / 'critic'}"
    diffusion_train.train(settings, root / "tuned" / f"{name}-{seed}", cache=root / "cache")


# ---- Held-out pictures ----------------------------------------------------------------------------------------------
def held_out_prompts(config) -> list[str]:
    """Each prompt as often as pictures are drawn of it."""
    texts = [prompts.text(prompt) for prompt in drawings.split_prompts()[1]]
    chosen = np.random.default_rng(seed_of(config, 90)).permutation(texts)[: config.eval.prompts].tolist()
    return [text for text in chosen for _ in range(config.eval.images)]


def draw_all(config, root: pathlib.Path) -> dict[str, np.ndarray]:
    """name -> uint8[n, S, S, 3] of the held-out prompts, from the same noise: base, the fine-tuned, guided by scale."""
    texts, found = held_out_prompts(config), {}

    def draw(model, name, **options):
        sampling = config.sampling.to_dict() | options
        found[name] = stages.drawn(root / model / "model", texts, seed_of(config, 91), sampling, root / f"drawn/{name}.npy")

    draw("base", "base")
    for name in TUNED:
        for seed in range(config.seeds if name in WITH_SEEDS else 1):
            draw(f"tuned/{name}-{seed}", f"{name}-{seed}")
    score = critic_of(root).differentiable
    for scale in config.guide.scales:
        draw("base", f"guide_{scale:g}", guide=Guidance(score, scale=scale))
    return found


class Elsewhere:
    """The critic, whose heatmaps lie half a picture further: a mask of about the same size that misses the flaw."""

    def __init__(self, critic: specs.ScoreReward):
        self.model, self.of_feedback, self._critic = self, critic.of_feedback, critic

    def predict(self, images, texts):
        """As `rahf.predictor.Model.predict`."""
        feedback = self._critic.model.predict(images, texts)
        for name, maps in feedback.heatmaps.items():
            feedback.heatmaps[name] = np.roll(maps, [side // 2 for side in maps.shape[1:]], axis=(1, 2))
        return feedback


@dataclasses.dataclass(frozen=True)
class Cured:
    """Pictures of the base after a cure.

    Attributes:
      rows: of the held-out pictures. images: uint8[n, S, S, 3].
      masks: float[n], the masks' shares; changed: bool[n]; None for a cure without masks.
    """

    rows: np.ndarray
    images: np.ndarray
    masks: np.ndarray | None = None
    changed: np.ndarray | None = None


def repaired(config, root: pathlib.Path, base: np.ndarray) -> dict[str, dict[str, Cured]]:
    """The base's flawed pictures by several cures: region -> name of the cure -> pictures."""
    texts, sampling = held_out_prompts(config), config.sampling.to_dict()
    options = repair.Options(**config.repair, **sampling, feather=0.0, smallest=0.005, seed=seed_of(config, 93))
    misaligned = dataclasses.replace(options, region="misalignment")
    critic, model = critic_of(root), folder.read(root / "base/model")
    heatmaps = critic.model.predict(base, texts).heatmaps
    rows = {name: np.flatnonzero(maps.max((1, 2)) >= options.threshold) for name, maps in heatmaps.items()}

    def cure(name, judge, options):
        file, of = root / f"repaired/{name}.npz", rows[options.region]
        if not file.is_file():
            done = [_repaired(model, judge, base[row], texts[row], options, row) for row in tqdm(of, desc=name)]
            images, masks, changed = map(np.array, zip(*done, strict=True))
            with paths.writing(file) as partial, partial.open("wb") as opened:
                np.savez(opened, images=images, masks=masks, changed=changed)
        with np.load(file) as arrays:
            return Cured(of, **arrays)

    def anew(region, seed):
        of, count = rows[region], options.candidates
        of_rows = [texts[row] for row in of]
        file = root / f"repaired/anew {region}.npy"
        more = stages.drawn(root / "base/model", of_rows * count, seed_of(config, seed), sampling, file)
        more = more.reshape(count, len(of), *more.shape[1:])
        judge = critic_of(root, repair.SCORES_OF[region])
        scores = np.stack([specs.checked(judge, part, of_rows) for part in (base[of], *more)])
        best = np.concatenate([base[of][None], more])[scores.argmax(axis=0), np.arange(len(of))]
        return {"drawn anew once": Cured(of, more[0]), f"best of {count} anew and the original": Cured(of, best)}

    aligned = critic_of(root, "alignment")
    with_words = dataclasses.replace(misaligned, add_words=True)
    return {
        "implausibility": {
            "original": Cured(rows["implausibility"], base[rows["implausibility"]]),
            "repaired": cure("repaired", critic, options),
            "a mask elsewhere": cure("elsewhere", Elsewhere(critic), options),
            **anew("implausibility", 94),
        },
        "misalignment": {
            "original": Cured(rows["misalignment"], base[rows["misalignment"]]),
            "repaired": cure("misaligned", aligned, misaligned),
            "repaired, misaligned words added": cure("misaligned_words", aligned, with_words),
            **anew("misalignment", 95),
        },
    }


def _repaired(model, critic, image, text, options, row) -> tuple[np.ndarray, float, bool]:
    found = repair.repair(model, critic, image, text, options, number=int(row))
    assert (found.image == image)[~found.mask].all()
    return found.image, found.share, found.status == "repaired"


# ---- Verdicts -------------------------------------------------------------------------------------------------------
def measured(config, root: pathlib.Path, sets: dict[str, np.ndarray], raters: judges.Judges) -> dict[str, dict]:
    """For each set of held-out pictures: shares without an artifact and all right, FID, diversity, critic, verdict."""
    texts, critic = held_out_prompts(config), critic_of(root)
    clean = drawings.images(drawings.read(root / "pictures/clean.parquet"))
    reference, base, found = evaluate.compute_features(raters.features, clean, len(clean)), sets["base"], {}
    chance = {name: 1 - raters.artifact(images) for name, images in sets.items()}
    for name, images in sets.items():
        options = {"features": raters.features, "reference": reference, "judge": raters, "reward": critic}
        found[name] = evaluate.evaluate(images, texts, **options)
        if images is not base:
            responses = side_by_side.from_scores(chance["base"], chance[name], config.eval.margins)
            found[name] |= side_by_side.verdict(responses, texts).flat("side_by_side")
    return found


def cured(cures: dict[str, Cured], texts, raters: judges.Judges) -> dict[str, dict[str, float]]:
    """For each cure: the share of pictures with an artifact, of right ones, of those that lost an artifact or got one."""
    of_rows, results = [texts[row] for row in cures["original"].rows], {}
    before = raters.artifact(cures["original"].images) >= 0.5
    for name, cure in cures.items():
        seen = raters.artifact(cure.images) >= 0.5
        values = {"artifact": seen, "right": raters(cure.images, of_rows)["all"], "cured": before & ~seen,
                  "new": ~before & seen}  # fmt: skip
        means = {key: generator_metrics.mean_of(np.asarray(value, float), of_rows) for key, value in values.items()}
        results[name] = {key: mean.value for key, mean in means.items()}
        results[name] |= {f"{key}/se": mean.error for key, mean in means.items()}
        if cure.masks is not None:
            results[name] |= {"mask": float(cure.masks.mean()), "changed": float(cure.changed.mean())}
    return results


def table(config, results: dict, of_repair: dict[str, dict], counts: dict[str, int]) -> str:
    """All tables, as Markdown."""
    markdown = functools.partial(tabulate.tabulate, headers="keys", tablefmt="github", disable_numparse=True)

    def row(label, names):
        """The means over seeds; ± the standard error over prompts of one seed, or over seeds where there are several."""
        of = [results[name] for name in names]
        entry = {"": label}
        for key, title in (("alignment/no_artifact", "no artifact, %"), ("alignment/all", "prompt right, %")):
            values = [100 * one[key] for one in of]
            error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(of) > 1 else 100 * of[0][f"{key}/se"]
            entry[title] = f"{np.mean(values):.1f} ± {error:.1f}"
        for kind in ("better", "about the same", "worse"):
            key = f"side_by_side/{kind}"
            entry[f"{kind}, %"] = f"{100 * np.mean([one[key] for one in of]):.1f}" if key in of[0] else "-"
        entry["critic"] = f"{np.mean([one['reward/all'] for one in of]):.3f}"
        entry["FID"] = f"{np.mean([one['fid'] for one in of]):.1f}"
        entry["diversity"] = f"{np.mean([one['diversity'] for one in of]):.3f}"
        return entry

    def seeds(name):
        return [f"{name}-{seed}" for seed in range(config.seeds if name in WITH_SEEDS else 1)]

    tuned = [row("base", ["base"]), *(row(f"tuned on {label}", seeds(name)) for name, label in TUNED.items())]
    scales = [row("no guidance", ["base"]), *(row(f"scale {s:g}", [f"guide_{s:g}"]) for s in config.guide.scales)]
    cures = [[
        {
            f"{counts[region]} pictures, {region}": name,
            "artifact, %": f"{100 * of['artifact']:.1f} ± {100 * of['artifact/se']:.1f}",
            "prompt right, %": f"{100 * of['right']:.1f} ± {100 * of['right/se']:.1f}",
            "cured, %": f"{100 * of['cured']:.1f}",
            "new artifact, %": f"{100 * of['new']:.1f}",
            "changed, %": f"{100 * of['changed']:.1f}" if "changed" in of else "-",
            "mask, %": f"{100 * of['mask']:.1f}" if "mask" in of else "-",
        }
        for name, of in of_region.items()
    ] for region, of_region in of_repair.items()]  # fmt: skip
    return "\n\n".join(map(markdown, (tuned, scales, *cures))) + "\n"


def figure(config, results: dict, cures: dict[str, Cured], raters) -> bytes:
    """A PNG: the curve of guidance; repaired pictures before and after, framed by the judge's verdict."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 6.2), layout="constrained")
    left, right = drawing.subfigures(1, 2, width_ratios=(1, 1.35))
    (axes, lower) = left.subplots(2, 1, sharex=True)
    names = ["base", *(f"guide_{scale:g}" for scale in config.guide.scales)]
    ticks = ["0", *(f"{scale:g}" for scale in config.guide.scales)]
    for key, label, colour in (
        ("reward/all", "critic's plausibility", "#0072b2"),
        ("alignment/no_artifact", "no artifact (judge)", "#d55e00"),
        ("alignment/all", "prompt right (judge)", "#009e73"),
    ):
        values, errors = ([results[name][k] for name in names] for k in (key, f"{key}/se"))
        axes.errorbar(range(len(names)), values, errors, marker="o", label=label, color=colour)
    axes.set(title="Guidance by the critic's plausibility", ylabel="share, score")
    axes.legend(fontsize=8)
    lower.plot([results[name]["fid"] for name in names], marker="o", color="#555555")
    lower.set(xlabel="guidance scale", ylabel="FID", xticks=range(len(names)), xticklabels=ticks)
    shown = np.flatnonzero(cures["repaired"].changed)[:8]
    grid = right.subplots(4, 4)
    for place, row in enumerate(shown):
        for offset, name in enumerate(("original", "repaired")):
            cell = grid[place // 2, 2 * (place % 2) + offset]
            image = cures[name].images[row]
            cell.imshow(image, interpolation="nearest")
            cell.set(xticks=[], yticks=[], title=name)
            for spine in cell.spines.values():
                flawed = raters.artifact(image[None])[0] >= 0.5
                spine.set(linewidth=2.5, edgecolor="#c81e1e" if flawed else "#1a8f3c")
    right.suptitle("Repair: red frame = the judge sees an artifact")
    return stages.png_of(drawing, 90)


def look(images: np.ndarray, texts, raters) -> bytes:
    """A PNG of the base's pictures with the judges' verdicts, for a person to check."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(16, 9.5), layout="constrained")
    chance, right = raters.artifact(images), raters(images, texts)["all"]
    for cell, image, text, artifact, fits in zip(drawing.subplots(5, 10).flat, images, texts, chance, right, strict=False):
        cell.imshow(image, interpolation="nearest")
        cell.set(xticks=[], yticks=[])
        cell.set_title(f"{text}\nartifact {artifact:.2f}, {'right' if fits else 'WRONG'}", fontsize=6)
    return stages.png_of(drawing, 90)


# ---- All ------------------------------------------------------------------------------------------------------------
def foundation_of(config, root: pathlib.Path, stage: stages.Timed) -> tuple[judges.Judges, dict[str, float]]:
    """Makes what stands before any use of the critic: pictures, base, critic and judges; the judges and their accuracies."""
    stage("pictures", make_pictures, config, root / "pictures")
    stage("clip, start", stages.make_start, config, root, config.clip_steps)
    stage("base", stages.fit_base, config, root, unless=root / "base/model" / folder.INDEX)
    stage("annotated", make_annotated, config, root, unless=root / "data/vocabulary.model")
    stage("critic", fit_critic, config, root)
    fit_judges = functools.partial(judges.fit, root / "judges", config.judge, seed_of(config, 10), through_vae(root))
    stage("judges", fit_judges, unless=root / "judges/config.json")
    raters = judges.load(root / "judges")
    accuracies = json_files.read(root / "judges/config.json")["accuracy"]
    if min(accuracies.values()) < ACCURATE:
        raise UserError(f"judges: got accuracies {accuracies} on held-out pictures, expected at least {ACCURATE} of each")
    return raters, accuracies


def run(config, workdir) -> None:
    """Runs all stages and records the seconds of each."""
    check(config)
    root = pathlib.Path(workdir).absolute()
    workdirs.open_workdir(root, config)
    stage = stages.Timed(root / "seconds.json")
    raters, accuracies = foundation_of(config, root, stage)
    stage("own", make_own, config, root)
    for name in TUNED:
        for seed in range(config.seeds if name in WITH_SEEDS else 1):
            done = root / "tuned" / f"{name}-{seed}" / "model" / folder.INDEX
            stage(f"tuned/{name}", tune, config, root, name, seed, unless=done)
        jax.clear_caches()
    sets = stage("drawn", draw_all, config, root)
    texts = held_out_prompts(config)
    cures = stage("repaired", repaired, config, root, sets["base"])
    results = stage("verdicts", measured, config, root, sets, raters)
    of_repair = {region: cured(found, texts, raters) for region, found in cures.items()}

    text = table(config, results, of_repair, {region: len(found["original"].rows) for region, found in cures.items()})
    text += (
        f"\n{len(texts)} pictures of the base; repaired are those with a heatmap of {config.repair.threshold:g} or more.\n"
    )
    text += "The judges on held-out renders: " + ", ".join(f"{name} {v:.3f}" for name, v in accuracies.items())
    text += f"\n{stage.summary()}\n"
    json_files.write(root / "results.json", {"sets": results, "repair": of_repair})
    paths.replace(root / "table.md", text.encode())
    paths.replace(root / "figure.png", figure(config, results, cures["implausibility"], raters))
    paths.replace(root / "look.png", look(sets["base"][:LOOKED_AT], texts[:LOOKED_AT], raters))
    print(f"\n{text}\n{root}: table.md, figure.png, look.png, results.json")


def main():
    """The command."""
    run(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The folder of all stages; a killed run resumes from it.")
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader(default=str(pathlib.Path(__file__).parent / "config.py")))
