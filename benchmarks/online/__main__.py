"""Measures the online methods beside reward-weighted fine-tuning, at a small scale: what each reaches, costs, and breaks.

    python -m benchmarks.online --workdir=DIR [--foundation=FEEDBACK]

The base, the critic that is raised (the mean of its plausibility and alignment) and the judges of exact truth are those of
`benchmarks.feedback`, made in workdir/foundation, or taken from a workdir of it. A second critic from another seed, trained
half as long on the same labels, is never raised: it stands for what a user has to watch a run with. Every method draws as
many pictures. Each run is a process, and resumes:

    runs/NAME-SEED/evaluations.jsonl    trained and held-out critic, judges, FID, diversity, processor seconds
    table.md, curves.png, look.png, results.json
"""

import dataclasses
import functools
import math
import pathlib
import resource
import subprocess
import sys
import textwrap
import time

import matplotlib
import numpy as np
import tabulate
from absl import flags
from etils import epath

from benchmarks.alignment import drawings, stages
from benchmarks.alignment.stages import seed_of
from benchmarks.feedback import __main__ as feedback
from benchmarks.feedback import judges
from rahf import checkpoints, experiments, workdirs
from rahf import train as critic_train
from rahf.diffusion import evaluate, sample
from rahf.diffusion import train as diffusion_train
from rahf.diffusion.online import __main__ as online
from rahf.diffusion.online import guard
from rahf.reward import specs
from richhf_data import command, images, json_files, paths, ranges
from richhf_data.errors import UserError

RANGES = {
    "seed": ranges.Range(0, 4_000_000, whole=True),
    "pictures": ranges.COUNT,
    "evaluations": ranges.COUNT,
    "eval.prompts": ranges.COUNT,
    "eval.images": ranges.COUNT,
    "seeds": ranges.COUNT,
}
OWN_IMAGES = 8  # of a prompt, in the base's own pictures
BOTH = "plausibility=0.5,alignment=0.5"  # the reward of all rows but one


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of the tables: its label, a method, what it changes of `config.online`, and which scores are the reward."""

    label: str
    method: str
    changes: dict
    reward: str = BOTH


RATES = {"ddpo": 3e-5, "grpo": 3e-5, "refl": 1e-4, "draft": 1e-4, "dpo": 3e-5}  # learning rates
RUNS = {
    "ddpo": Run("ddpo", "ddpo", {"policy.group": 4, "policy.history": 8}),
    "grpo": Run("grpo", "grpo", {}),
    "grpo_fast": Run("grpo, rate 1e-4", "grpo", {"optimizer.learning_rate": 1e-4}),
    "grpo_kl": Run("grpo, KL", "grpo", {"beta": 1.0}),
    "grpo_regions": Run("grpo, regions", "grpo", {"dense.weight": 1.0}),
    "grpo_words": Run("grpo, words", "grpo", {"dense.words": 0.5}),
    "refl": Run("refl", "refl", {}),
    "refl_alignment": Run("refl, alignment alone", "refl", {}, "alignment"),
    "draft": Run("draft", "draft", {}),
    "draft_lv": Run("draft, 2 noisings", "draft", {"gradient.noisings": 2}),
    "draft_kl": Run("draft, distance 1", "draft", {"beta": 1.0}),
    "draft_kl_weak": Run("draft, distance 0.1", "draft", {"beta": 0.1}),
    "draft_regions": Run("draft, regions", "draft", {"dense.weight": 0.9}),
    "dpo": Run("dpo", "dpo", {}),
    "dpo_words": Run("dpo, words", "dpo", {"dense.words": 0.5}),
}
DASHES = "-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1))  # of a method's variants, in figures
WEIGHTED = "weighted"


def check(config) -> None:
    """Refuses a value that is missing or out of its range: UserError."""
    experiments.check_ranges(config, RANGES)
    feedback.check(config.feedback)
    if config.pictures % (OWN_IMAGES * config.online.policy.pictures):
        unit = OWN_IMAGES * config.online.policy.pictures
        raise UserError(f"pictures: got {config.pictures}, expected a multiple of {unit}")
    if unknown := set(config.seeded) - {WEIGHTED, *RUNS}:
        raise UserError(f"seeded: got {sorted(unknown)}, expected some of {[WEIGHTED, *RUNS]}")


class Judge:
    """What the judges of exact truth say of held-out pictures; `online.train`'s judge."""

    def __init__(self, foundation: pathlib.Path):
        self._raters = judges.load(foundation / "judges")
        clean = drawings.images(drawings.read(foundation / "pictures/clean.parquet"))
        self._reference = evaluate.compute_features(self._raters.features, clean, len(clean))

    def __call__(self, images, texts) -> dict[str, float]:
        options = {"features": self._raters.features, "reference": self._reference, "judge": self._raters}
        found = evaluate.evaluate(images, texts, **options)
        names = {"no_artifact": "alignment/no_artifact", "right": "alignment/all"}
        found |= {f"{name}{end}": found[f"{key}{end}"] for name, key in names.items() for end in ("", "/se")}
        kept = {name: found[name] for name in ("no_artifact", "no_artifact/se", "right", "right/se", "diversity", "fid")}
        return {f"judged/{name}": value for name, value in kept.items()}


# ---- Stages ---------------------------------------------------------------------------------------------------------
def fit_held_out(config, root: pathlib.Path, foundation: pathlib.Path) -> None:
    """Trains the second critic."""
    settings = config.held_out.copy_and_resolve_references()
    settings.data.data_dir, settings.seed = str(foundation / "data"), seed_of(config, 120)
    critic_train.train(settings, root / "held_out")


def write_prompts(config, root: pathlib.Path) -> None:
    """Writes prompts.txt and held_out.txt."""
    found = feedback.training_prompts(config.feedback), list(dict.fromkeys(feedback.held_out_prompts(config.feedback)))
    for name, texts in zip(("prompts", "held_out"), found, strict=True):
        paths.replace(root / f"{name}.txt", "".join(f"{text}\n" for text in texts).encode())


def make_own(config, root: pathlib.Path, foundation: pathlib.Path) -> None:
    """Draws the base's own pictures, for the methods that draw none; notes the processor seconds."""
    texts = feedback.training_prompts(config.feedback)[: config.pictures // OWN_IMAGES]
    texts = [text for text in texts for _ in range(OWN_IMAGES)]
    began = time.process_time()
    model, seed = foundation / "base/model", seed_of(config, 130)
    images = stages.drawn(model, texts, seed, config.feedback.sampling, root / "own.npy")
    json_files.write(root / "own_seconds.json", {"processor_seconds": time.process_time() - began})
    stages.write_table(root / "own.parquet", images, texts)


def rewarded(critic: pathlib.Path, scores: str = BOTH) -> str:
    """The reward of a critic."""
    return f"rahf:{critic}:{scores}"


def settings_of(config, root: pathlib.Path, foundation: pathlib.Path, name: str, seed: int):
    """The config of an online run."""
    run, settings = RUNS[name], config.online.copy_and_resolve_references()
    settings.method = run.method
    settings.optimizer.learning_rate = RATES[run.method]
    settings.update_from_flattened_dict(run.changes)
    settings.optimizer.final_learning_rate = settings.optimizer.learning_rate
    settings.seed, settings.model.folder = seed_of(config, 200 + seed), str(foundation / "base/model")
    settings.reward.source = rewarded(foundation / "critic", run.reward)
    settings.data.held_out = str(root / "held_out.txt")
    settings.eval.update(prompts=config.eval.prompts, images=config.eval.images)
    if settings.dense.weight or settings.dense.words:
        settings.dense.source = f"rahf:{foundation / 'critic'}"
    if settings.method == "dpo":
        settings.data.images = str(root / "own.parquet")
        steps = config.weighted.train.num_steps
    else:
        settings.data.prompts = str(root / "prompts.txt")
        steps = config.pictures // settings.train.batch_size
    settings.train.num_steps, settings.eval.every = steps, max(1, steps // config.evaluations)
    return settings


def run_one(config, root: pathlib.Path, foundation: pathlib.Path, name: str, seed: int) -> None:
    """One run, to its end; writes peak.json last."""
    place, judge = root / "runs" / f"{name}-{seed}", Judge(foundation)
    held_out = specs.reward_of(rewarded(root / "held_out"))
    if name != WEIGHTED:
        settings = settings_of(config, root, foundation, name, seed)
        online.train(settings, place, held_out=held_out, cache=root / "cache", judge=judge)
    else:
        weigh(config, root, foundation, place, seed, held_out, judge)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    json_files.write(place / "peak.json", {"peak_gib": peak})


def weigh(config, root, foundation, place, seed: int, held_out, judge) -> None:
    """Reward-weighted fine-tuning on the base's own pictures, and the evaluation of its model."""
    settings = config.weighted.copy_and_resolve_references()
    settings.model.folder, settings.seed = str(foundation / "base/model"), seed_of(config, 80 + seed)
    settings.data.images = str(root / "own.parquet")
    settings.reward.source = source = rewarded(foundation / "critic")
    diffusion_train.train(settings, place, cache=root / "cache")
    with checkpoints.manager(place, "checkpoints") as latest:
        seconds = checkpoints.read_metadata(latest, settings.train.num_steps)["processor_seconds"]
    texts = sample.read_prompts(root / "held_out.txt")[: config.eval.prompts]
    texts = [text for text in texts for _ in range(config.eval.images)]
    drawn = stages.drawn(place / "model", texts, 0, config.feedback.sampling, place / "drawn.npy")
    watch = guard.Guard(specs.reward_of(source), held_out=held_out, workdir=place)
    watch.measured(settings.train.num_steps, drawn, texts, more={"processor_seconds": seconds} | judge(drawn, texts))


def runs_of(config) -> list[tuple[str, int]]:
    """All (name, seed); every run's first seed comes first."""
    names = (WEIGHTED, *RUNS)
    return [(name, seed) for seed in range(config.seeds) for name in names if seed == 0 or name in config.seeded]


def in_process(name: str, seed: int) -> None:
    """Runs one run in a process of its own, whose peak of memory is its own."""
    subprocess.run([sys.executable, "-m", "benchmarks.online", *sys.argv[1:], f"--only={name}-{seed}"], check=True)


# ---- Tables, figures ------------------------------------------------------------------------------------------------
COLUMNS = {  # key of an evaluation -> title, factor, decimals
    "judged/no_artifact": ("no artifact, %", 100, 1),
    "judged/right": ("prompt right, %", 100, 1),
    "held_out": ("held-out critic", 1, 3),
    "reward": ("trained critic", 1, 3),
    "judged/fid": ("FID", 1, 0),
    "judged/diversity": ("diversity", 1, 3),
}


def at_seconds(history: list[dict], budget: float) -> dict:
    """The evaluation after the start that is nearest to a number of processor seconds."""
    return min(history[1:] or history, key=lambda entry: abs(entry["processor_seconds"] - budget))


def last_within_fid(history: list[dict], fid: float) -> dict | None:
    """The last evaluation whose FID is at most `fid`; None where none is."""
    return ([None] + [entry for entry in history if entry["judged/fid"] <= fid])[-1]


def row(label: str, entries: list[dict], peaks: list[float]) -> dict[str, str]:
    """A row of a table: means over seeds, ± their standard error, or that over prompts of a single seed."""
    found = {"": label, "seeds": str(len(entries))}
    for key, (title, factor, decimals) in COLUMNS.items():
        values = [factor * entry[key] for entry in entries]
        error = factor * entries[0].get(f"{key}/se", math.nan)
        if len(values) > 1:
            error = np.std(values, ddof=1) / math.sqrt(len(values))
        shown = f" ± {error:.{decimals}f}" if math.isfinite(error) else ""
        found[title] = f"{np.mean(values):.{decimals}f}{shown}"
    found["steps"] = f"{np.mean([entry['step'] for entry in entries]):.0f}"
    found["processor minutes"] = f"{np.mean([entry['processor_seconds'] for entry in entries]) / 60:.1f}"
    found["peak GiB"] = f"{max(peaks):.1f}" if peaks else "-"
    return found


def histories(config, root: pathlib.Path) -> dict[str, list[tuple[list[dict], float]]]:
    """name -> (evaluations, peak of memory in GiB) of each finished seed.

    The processor time of what learns from pictures that the base drew includes theirs.
    """
    found, drawn = {}, json_files.read(root / "own_seconds.json")["processor_seconds"]
    for name, seed in runs_of(config):
        place = root / "runs" / f"{name}-{seed}"
        if (place / "peak.json").is_file():
            peak = json_files.read(place / "peak.json")["peak_gib"]
            history = guard.read_history(epath.Path(place / guard.HISTORY))
            for entry in history:
                if entry["step"] > 0 and (name == WEIGHTED or RUNS[name].method == "dpo"):
                    entry["processor_seconds"] += drawn
            found.setdefault(name, []).append((history, peak))
    return found


def tables(config, found) -> str:
    """At equal pictures, at equal processor time, and what the second critic and FID would keep; as Markdown."""
    markdown = functools.partial(tabulate.tabulate, headers="keys", tablefmt="github", disable_numparse=True)
    base = next(runs[0][0][0] for name, runs in found.items() if name != WEIGHTED)
    budget = min(history[-1]["processor_seconds"] for runs in found.values() for history, _ in runs)
    fid, weighted = base["judged/fid"], np.mean([history[-1]["judged/fid"] for history, _ in found[WEIGHTED]])

    def all_of(choose):
        rows = [row("base", [base], [])]
        for name, runs in found.items():
            label = "reward-weighted" if name == WEIGHTED else RUNS[name].label
            entries = [history[-1] if name == WEIGHTED else choose(history) for history, _ in runs]
            if None not in entries:
                rows.append(row(label, entries, [peak for _, peak in runs]))
        return markdown(rows)

    return (
        f"{config.pictures:,} pictures each:\n\n{all_of(lambda history: history[-1])}\n\n"
        f"The evaluation nearest to {budget / 60:.1f} processor minutes:\n\n"
        f"{all_of(functools.partial(at_seconds, budget=budget))}\n\n"
        f"The evaluation of the highest held-out critic (early stopping):\n\n{all_of(guard.best)}\n\n"
        f"The last evaluation whose FID is at most the base's:\n\n{all_of(functools.partial(last_within_fid, fid=fid))}\n\n"
        f"The last evaluation whose FID is at most that of reward-weighted fine-tuning, {weighted:.0f}:\n\n"
        f"{all_of(functools.partial(last_within_fid, fid=weighted))}\n"
    )


def curves(config, found) -> bytes:
    """A PNG: what the critics and the judges say while each method trains, over the pictures that it has drawn."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 6.8), layout="constrained")
    colours, looks = dict(zip(RATES, matplotlib.colormaps["tab10"].colors, strict=False)), {}
    for name, one in RUNS.items():
        variants = sum(of.method == one.method for of in list(RUNS.values())[: list(RUNS).index(name)])
        looks[name] = {"color": colours[one.method], "linestyle": DASHES[variants]}
    for axes, (key, (title, factor, _)) in zip(drawing.subplots(2, 3).flat, COLUMNS.items(), strict=True):
        for name, runs in found.items():
            if name == WEIGHTED:
                axes.axhline(factor * np.mean([of[-1][key] for of, _ in runs]), color="#999999", linestyle="--", linewidth=1)
                continue
            steps = np.array([entry["step"] for entry in runs[0][0]])
            values = np.mean([[factor * entry[key] for entry in history] for history, _ in runs], axis=0)
            options = {"marker": "o", "markersize": 3, "linewidth": 1.4, "label": RUNS[name].label} | looks[name]
            axes.plot(config.pictures * steps / steps[-1], values, **options)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
    below = "pictures drawn (dpo: its steps, on pictures that the base drew); grey: reward-weighted fine-tuning"
    drawing.supxlabel(below, fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=7, fontsize=8)
    return stages.png_of(drawing, 100)


def look(config, root: pathlib.Path, found, shown: int = 12) -> bytes:
    """A PNG: the same held-out prompts and noise, by the base and after each method."""
    from matplotlib.figure import Figure

    texts = sample.read_prompts(root / "held_out.txt")[: min(shown, 8)]
    rows = {}
    for name in found:
        place = root / "runs" / f"{name}-0"
        if name == WEIGHTED:
            rows["reward-weighted"] = np.load(place / "drawn.npy")[:: config.eval.images][: len(texts)]
            continue
        grids = sorted((place / "samples").glob("step_*.png"))
        if "base" not in rows:
            rows["base"] = tiles(images.read(grids[0]), len(texts))
        rows[RUNS[name].label] = tiles(images.read(grids[-1]), len(texts))
    rows = {"base": rows.pop("base"), **rows}
    drawing = Figure(figsize=(1.25 * len(texts), 1.15 * len(rows)), layout="constrained")
    cells = drawing.subplots(len(rows), len(texts))
    for line, (label, pictures) in zip(cells, rows.items(), strict=True):
        for cell, picture in zip(line, pictures, strict=True):
            cell.imshow(picture, interpolation="nearest")
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=7)
    for cell, text in zip(cells[0], texts, strict=True):
        cell.set_title(textwrap.fill(text, 16), fontsize=6)
    return stages.png_of(drawing, 100)


def tiles(grid: np.ndarray, count: int) -> np.ndarray:
    """uint8[H, W, 3], a grid of `diffusion_train.grid_of` -> its first pictures, uint8[count, S, S, 3]."""
    size = drawings.SIZE
    found = grid.reshape(grid.shape[0] // size, size, grid.shape[1] // size, size, 3).swapaxes(1, 2)
    return found.reshape(-1, size, size, 3)[:count]


def run(config, workdir, foundation, only: str) -> None:
    """Runs all stages."""
    check(config)
    root = pathlib.Path(workdir).absolute()
    foundation = pathlib.Path(foundation or root / "foundation").absolute()
    if only:
        name, _, seed = only.rpartition("-")
        return run_one(config, root, foundation, name, int(seed))
    workdirs.open_workdir(root, config)
    stage = stages.Timed(root / "seconds.json")
    feedback.foundation_of(config.feedback, foundation, stages.Timed(foundation / "seconds.json"))
    stage("prompts", write_prompts, config, root)
    stage("held-out critic", fit_held_out, config, root, foundation)
    stage("own", make_own, config, root, foundation, unless=root / "own.parquet")
    for name, seed in runs_of(config):
        stage(name, in_process, name, seed, unless=root / "runs" / f"{name}-{seed}" / "peak.json")
        report(config, root, stage)


def report(config, root: pathlib.Path, stage: stages.Timed) -> None:
    """Writes the tables and figures of the runs that are finished."""
    found = histories(config, root)
    if not {WEIGHTED, "grpo"} <= found.keys():
        return
    text = f"{tables(config, found)}\n{stage.summary()}\n"
    dropped = "shares", "prompts"
    keep = {
        name: [
            {"peak_gib": peak, "evaluations": [{k: v for k, v in entry.items() if k not in dropped} for entry in history]}
            for history, peak in runs
        ]
        for name, runs in found.items()
    }
    json_files.write(root / "results.json", keep)
    paths.replace(root / "table.md", text.encode())
    paths.replace(root / "curves.png", curves(config, found))
    paths.replace(root / "look.png", look(config, root, found))
    print(f"\n{text}\n{root}: table.md, curves.png, look.png, results.json", flush=True)


def main():
    """The command."""
    run(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.foundation, flags.FLAGS.only)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The folder of all stages; a killed run resumes from it.")
    flags.DEFINE_string("foundation", None, "A workdir of benchmarks.feedback, of the same config, if there is one.")
    flags.DEFINE_string("only", "", "NAME-SEED of one run, such as draft-0; the stages before it must be there.")
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader(default=str(pathlib.Path(__file__).parent / "config.py")))
