"""What each option of the critic's model and training adds on RichHF-Synth, with the noise over seeds and the cost.

    python -m benchmarks.critic --workdir=DIR [--only=RUN,...]

Sixteen of the 64 combinations of six options are trained, from none (`base`) to `all`. Eight of them have an option, the
other eight do not, and each other option is in half of both. So the gain of an option is the difference of two means over
eight runs; the residuals of the fit give its standard error. No effect of two options together enters a gain: this is a
fractional factorial design of resolution IV. The `augmented` runs are of the other variant, without and with all options.

Each run trains `rahf_synth_tiny` with a seed of its own on the same pictures, each seen once. It is a process of
`rahf.train` and one of `rahf.evaluate`; a killed run resumes, and a finished one is kept.

    records/, data/                         the pictures
    runs/RUN/eval/test.json                 metrics; cost.json: processor seconds of the steps
    table.md, results.json                  all finished runs
"""

import itertools
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import tabulate
from absl import flags

from benchmarks import regression
from benchmarks.alignment import stages
from rahf import checkpoints
from richhf_data import command, json_files, paths, ranges
from richhf_data.errors import UserError

DEV, TEST = 500, 1000  # pictures
BASE = {
    "model.score_head.filters": (64, 32),
    "model.score_head.dense": (128,),
    "model.score_head.pool": "flatten",
    "model.score_head.reads_text": False,
    "model.vit.stem_blocks": 0,
    "model.vit.stem_width": 64,
    "model.vit.depth": 4,
    "model.word_head": False,
    "train.heatmap_loss": "mse",
    "train.loss_weights.heatmap": 40.0,
    "train.marked_weight": 1.0,
    "train.batch_size": 32,
    "optimizer.warmup_steps": 50,
}
OPTIONS = {  # name: (what it is, its changes)
    "text": (
        "score heads pool and read the prompt",
        {
            "model.score_head.filters": (),
            "model.score_head.dense": (128, 64),
            "model.score_head.pool": "mean",
            "model.score_head.reads_text": True,
        },
    ),
    "marks": ("marks count twice", {"train.marked_weight": 2.0}),
    "hybrid": (
        "four narrow convolutions for a layer of the ViT",
        {"model.vit.stem_width": 32, "model.vit.stem_blocks": 4, "model.vit.depth": 3},
    ),
    "words": ("a head for words", {"model.word_head": True}),
    "entropy": (
        "cross-entropy of heatmaps",
        {"train.heatmap_loss": "cross_entropy", "train.loss_weights.heatmap": 5.0},
    ),
    "small": ("batches of 8 for 32, as many pictures", {"train.batch_size": 8, "optimizer.warmup_steps": 200}),
}


def design() -> list[tuple[str, ...]]:
    """The combinations of options that are trained: those with an even number of each of two sets of four options."""
    evens = ({"text", "marks", "hybrid", "entropy"}, {"marks", "hybrid", "words", "small"})
    every = (names for count in range(len(OPTIONS) + 1) for names in itertools.combinations(OPTIONS, count))
    return [names for names in every if all(len(even.intersection(names)) % 2 == 0 for even in evens)]


ALL = tuple(OPTIONS)
RUNS = {{(): "base", ALL: "all"}.get(names, "+".join(names)): names for names in design()}
RUNS |= {"augmented": (), "augmented+all": ALL}
COLUMNS = {
    "plausibility": "score/plcc/plausibility",
    "alignment": "score/plcc/alignment",
    "aesthetics": "score/plcc/aesthetics",
    "overall": "score/plcc/overall",
    "CC implausibility": "heatmap/cc/implausibility",
    "CC misalignment": "heatmap/cc/misalignment",
    "keyword F1": "keywords/micro/f1",
}


def run_module(module: str, *arguments: str) -> None:
    """Runs a command of the repository. UserError if it fails."""
    if status := subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode:
        raise UserError(f"{module}: ended with {status}; its output says why. The same command goes on")


def draw(root: pathlib.Path, count: int) -> None:
    """Draws the pictures, `count` to train on, and builds the dataset."""
    splits = {"train": count, "dev": DEV, "test": TEST, "test_novel": TEST}
    counts = [f"--{name}={count}" for name, count in splits.items()]
    run_module("richhf_data.synthetic", f"--output={root / 'records'}", *counts, "--size=96", "--seed=0")
    images = f"parquet:{root / 'records/images/*.parquet'}"
    run_module("richhf_data.build", f"--records={root / 'records'}", f"--images={images}", f"--data_dir={root / 'data'}")
    json_files.write(root / "pictures.json", splits)


def measure(root: pathlib.Path, run: str, pictures: int) -> None:
    """Trains and evaluates one run."""
    folder, changes = root / "runs" / run, dict(BASE)
    for name in RUNS[run]:
        changes |= OPTIONS[name][1]
    steps = pictures // changes["train.batch_size"]
    changes |= {"seed": list(RUNS).index(run), "train.num_steps": steps, "eval.every": steps}
    changes |= {"data.data_dir": str(root / "data"), "data.decoding": "copy"}
    if run.startswith("augmented"):
        changes["model.variant"] = "augmented_prompt"
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    run_module("rahf.train", "--config=rahf_synth_tiny", f"--workdir={folder}", *overrides)
    with checkpoints.manager(folder, "checkpoints") as latest:
        seconds = checkpoints.read_metadata(latest, steps)["processor_seconds"]
    json_files.write(folder / "cost.json", {"processor_seconds": seconds})
    run_module("rahf.evaluate", f"--workdir={folder}", "--split=test")


def read(root: pathlib.Path) -> dict[str, dict[str, float]]:
    """Of each finished run: the values of `COLUMNS`, the mean PLCC of the four scores, and the processor minutes."""
    found = {}
    for run in RUNS:
        folder = root / "runs" / run
        if (folder / "eval/test.json").is_file():
            metrics, cost = json_files.read(folder / "eval/test.json"), json_files.read(folder / "cost.json")
            plcc = float(np.mean([value for key, value in metrics.items() if key.startswith("score/plcc/")]))
            values = {"mean PLCC": plcc} | {column: metrics[key] for column, key in COLUMNS.items()}
            found[run] = values | {"processor minutes": cost["processor_seconds"] / 60}
    return found


def gains(found: dict[str, dict[str, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The gains of the options over the multi-head runs, by least squares.

    Returns:
      the gain of each option in each value, its standard error (both [options, values]), and the standard deviation of one
      run [values]; None where the runs are too few for them.
    """
    runs = [run for run in found if not run.startswith("augmented")]
    options = np.array([[float(name in RUNS[run]) for name in OPTIONS] for run in runs]).reshape(-1, len(OPTIONS))
    determined = np.linalg.matrix_rank(np.column_stack([np.ones(len(runs)), options])) > len(OPTIONS)
    if len(runs) < len(OPTIONS) + 2 or not determined:
        return None
    return regression.fit(options, np.array([list(found[run].values()) for run in runs]))


def tables_of(found: dict[str, dict[str, float]]) -> str:
    """Tables in Markdown: the runs, and the gain of each option with its standard error."""

    def places(column):
        return 1 if column == "processor minutes" else 3

    def table(rows):
        return tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)

    columns, fitted = list(next(iter(found.values()))), gains(found)
    rows = [{"run": run} | {name: f"{value:.{places(name)}f}" for name, value in found[run].items()} for run in found]
    if fitted is None:
        return table(rows) + "\n"
    gain, error, deviation = fitted
    rows.append({"run": "deviation of one run"} | {c: f"{x:.{places(c)}f}" for c, x in zip(columns, deviation, strict=True)})
    options = [
        {"option": what} | {c: f"{x:+.{places(c)}f} ± {e:.{places(c)}f}" for c, x, e in zip(columns, *pair, strict=True)}
        for (what, _), pair in zip(OPTIONS.values(), zip(gain, error, strict=True), strict=True)
    ]
    return f"{table(options)}\n\n{table(rows)}\n"


def compare(root: pathlib.Path, only: Sequence[str], pictures: int) -> None:
    """Makes the runs that are not finished, all or those of `only`, and writes the tables of all that are.

    Raises:
      UserError: an unknown run, another number of pictures than the folder's, or a command that failed.
    """
    (root / "runs").mkdir(parents=True, exist_ok=True)
    if unknown := [run for run in only if run not in RUNS]:
        raise UserError(f"--only: got {', '.join(unknown)}, expected some of {', '.join(RUNS)}")
    timed = stages.Timed(root / "seconds.json")
    timed("pictures", draw, root, pictures, unless=root / "pictures.json")
    if (had := json_files.read(root / "pictures.json")["train"]) != pictures:
        raise UserError(f"--pictures: got {pictures}, expected {had}, as {root} has so many")
    for run in only or RUNS:
        timed(run, measure, root, run, pictures, unless=root / f"runs/{run}/eval/test.json")
    if found := read(root):
        json_files.write(root / "results.json", found)
        paths.replace(root / "table.md", (table := tables_of(found)).encode())
        print(table)
    print(timed.summary())


def main():
    args = flags.FLAGS
    compare(pathlib.Path(args.workdir), args.only, args.pictures)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "For the pictures, the runs and the table; a killed command goes on.")
    flags.DEFINE_list("only", [], "Runs, by name; all by default.")
    ranges.flag("pictures", 16_000, "To train each run on, each seen once.", ranges.COUNT)
    flags.mark_flag_as_required("workdir")
    command.run(main)
