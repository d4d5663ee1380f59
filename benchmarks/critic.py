"""What each option of the critic's model and loss adds on RichHF-Synth, with the noise over seeds and the cost.

    python -m benchmarks.critic --workdir=DIR [--seeds=3] [--only=NAME-SEED,...]

Each run trains `rahf_synth_tiny` with the changes of `RUNS` on the same pictures, each seen once, and is then evaluated. A
run is a process of `rahf.train` and one of `rahf.evaluate`; it resumes, and a finished one is kept.

    records/, data/                         the pictures
    runs/NAME-SEED/eval/test.json           metrics; cost.json: processor seconds of the steps
    table.md, results.json                  all finished runs
"""

import pathlib
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import tabulate
from absl import flags

from benchmarks.alignment import stages
from rahf import checkpoints
from richhf_data import command, json_files, paths, ranges
from richhf_data.errors import UserError

BATCH = 32
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
}
POOLED = {"model.score_head.filters": (), "model.score_head.dense": (128, 64), "model.score_head.pool": "mean"}
TEXT = POOLED | {"model.score_head.reads_text": True}
MARKS = {"train.marked_weight": 2.0}
STEM = {"model.vit.stem_blocks": 1}
HYBRID = {"model.vit.stem_width": 32, "model.vit.stem_blocks": 4, "model.vit.depth": 3}
WORDS = {"model.word_head": True}
ENTROPY = {"train.heatmap_loss": "cross_entropy", "train.loss_weights.heatmap": 5.0}
RUNS = {
    "base": ("base", {}),
    "pooled": ("score heads pool", POOLED),
    "text": ("score heads pool and read the prompt", TEXT),
    "marks": ("marks count twice", MARKS),
    "stem": ("a convolution in the stem", STEM),
    "hybrid": ("four narrow convolutions for a layer of the ViT", HYBRID),
    "words": ("a head for words", WORDS),
    "entropy": ("cross-entropy of heatmaps", ENTROPY),
    "all": ("text, marks, hybrid, words and cross-entropy", TEXT | MARKS | HYBRID | WORDS | ENTROPY),
}
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


def measure(root: pathlib.Path, name: str, seed: int, steps: int) -> None:
    """Trains and evaluates one run."""
    folder = root / f"runs/{name}-{seed}"
    changes = {"seed": seed, "train.num_steps": steps, "train.batch_size": BATCH, "eval.every": steps}
    changes |= {"data.data_dir": str(root / "data"), "data.decoding": "copy"} | BASE | RUNS[name][1]
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    run_module("rahf.train", "--config=rahf_synth_tiny", f"--workdir={folder}", *overrides)
    with checkpoints.manager(folder, "checkpoints") as latest:
        seconds = checkpoints.read_metadata(latest, steps)["processor_seconds"]
    json_files.write(folder / "cost.json", {"processor_seconds": seconds})
    run_module("rahf.evaluate", f"--workdir={folder}", "--split=test")


def read(root: pathlib.Path) -> dict[str, list[dict[str, float]]]:
    """The metrics and the processor minutes of the finished runs of each name, by seed."""
    found = {name: [] for name in RUNS}
    for name, rows in found.items():
        for file in sorted((root / "runs").glob(f"{name}-*/eval/test.json")):
            cost = json_files.read(file.parent.parent / "cost.json")["processor_seconds"]
            rows.append(json_files.read(file) | {"minutes": cost / 60})
    return {name: rows for name, rows in found.items() if rows}


def mean_plcc(row: dict[str, float]) -> float:
    """Over the four scores."""
    return float(np.mean([value for key, value in row.items() if key.startswith("score/plcc/")]))


def table_of(found: dict[str, list[dict[str, float]]]) -> str:
    """A table in Markdown: means over the seeds, and the gain over the base with its standard error."""

    def moments(rows):
        values = [mean_plcc(row) for row in rows]
        return np.mean(values), np.std(values, ddof=1) ** 2 / len(values) if len(values) > 1 else np.nan

    lines, (base, of_base) = [], moments(found["base"])
    for name, rows in found.items():
        mean, variance = moments(rows)
        gain = "" if name == "base" else f"{mean - base:+.3f} ± {np.sqrt(variance + of_base):.3f}"
        values = {column: f"{np.mean([row[key] for row in rows]):.3f}" for column, key in COLUMNS.items()}
        minutes = f"{np.mean([row['minutes'] for row in rows]):.1f}"
        line = {"": RUNS[name][0], "seeds": len(rows), **values, "mean PLCC": f"{mean:.3f} ± {np.sqrt(variance):.3f}"}
        lines.append(line | {"gain": gain, "processor minutes": minutes})
    return tabulate.tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def compare(root: pathlib.Path, only: Sequence[str], seeds: int, steps: int) -> None:
    """Makes the runs that are not finished, all or those of `only`, and writes the table of all that are.

    Raises:
      UserError: an unknown run, another number of steps than the folder's, or a command that failed.
    """
    (root / "runs").mkdir(parents=True, exist_ok=True)
    every = [f"{name}-{seed}" for seed in range(seeds) for name in RUNS]
    if unknown := [run for run in only if run not in every]:
        raise UserError(f"--only: got {', '.join(unknown)}, expected some of {', '.join(every)}")
    timed = stages.Timed(root / "seconds.json")
    timed("pictures", draw, root, steps * BATCH, unless=root / "pictures.json")
    if (had := json_files.read(root / "pictures.json")["train"]) != steps * BATCH:
        raise UserError(f"--steps: got {steps}, expected {had // BATCH}, as {root} has {had:,} pictures")
    for run in only or every:
        name, _, seed = run.rpartition("-")
        timed(run, measure, root, name, int(seed), steps, unless=root / f"runs/{run}/eval/test.json")
    if found := read(root):
        json_files.write(root / "results.json", found)
        if "base" in found:
            paths.replace(root / "table.md", (table := table_of(found) + "\n").encode())
            print(table)
    print(timed.summary())


def main():
    args = flags.FLAGS
    compare(pathlib.Path(args.workdir), args.only, args.seeds, args.steps)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "For the pictures, the runs and the table; a killed command goes on.")
    flags.DEFINE_list("only", [], "Runs, as NAME-SEED; all by default.")
    ranges.flag("seeds", 3, "Of each row.", ranges.COUNT)
    ranges.flag("steps", 1650, f"Of each run, {BATCH} pictures each.", ranges.COUNT)
    flags.mark_flag_as_required("workdir")
    command.run(main)
