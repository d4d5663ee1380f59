"""Seconds and memory of `rahf.tables` from kept predictions, and how often its intervals hold the true value.

    python -m benchmarks.tables [--examples=955] [--size=384] [--rows=5]
    python -m benchmarks.tables --coverage [--simulations=1000]

The first writes random targets and predictions into a temporary folder, and runs the command twice. The second draws many
test sets of 955 and of 100 examples from known populations. It counts the 95 % intervals that hold the population's value,
the test sets in which both of two equal rows keep their marks, and, of 5 and of 20 equal rows, those that lose theirs.
"""

import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags
from tabulate import tabulate
from tqdm.auto import tqdm

from benchmarks import metrics as benchmark_of_metrics
from rahf.tables import bootstrap, predictions, targets
from richhf_data import command, json_files, keywords, metrics, ranges
from richhf_data.schema import HEATMAPS, SCORES

PROMPT = "a yellow cat sitting on a table"
CORRELATIONS = dict(zip(SCORES, (0.0, 0.3, 0.6, 0.9), strict=True))
# A prompt has 3 to 19 words. A word is misaligned with a probability that the prompt draws, and 1/7 on average.
FOUND, FALSE, MISALIGNED = 0.4, 0.05, 1 / 7
BATCH = 64


# ------------------------------------------------------------------------------------------------------------- seconds


def write_random(folder: pathlib.Path, count: int, size: int, rows: int) -> list[str]:
    """Writes targets.parquet, references.json and the rows' predictions; returns their specs."""
    rng = np.random.default_rng(0)
    uids = [f"{number:05d}" for number in range(count)]
    labels = [[int(rng.random() < 0.8) for _ in keywords.tokenize(PROMPT)] for _ in uids]
    scores = rng.integers(0, 13, (count, len(SCORES))).astype(np.float32) / 12

    both = [benchmark_of_metrics.random_maps(rng, min(BATCH, count), size) for _ in HEATMAPS]
    maps, truth = (np.stack(side, axis=-1) for side in zip(*both, strict=True))  # of the first; the others have the same

    def pairs(seed):
        """(places, predictions, truths) of some examples at a time, [size, size, 2] each; the noise differs."""
        noise = np.random.default_rng(seed)
        for start in range(0, count, BATCH):
            places = range(start, min(start + BATCH, count))
            yield places, 0.9 * maps[: len(places)] + 0.1 * noise.random(maps[: len(places)].shape, np.float32), truth

    def examples():
        for places, _, truth in pairs(0):
            for place, own in zip(places, truth, strict=False):
                masks = {"score_mask": np.ones(len(SCORES), bool), "heatmap_mask": np.ones(len(HEATMAPS), bool)}
                row = {"uid": uids[place], "prompt": PROMPT, "labels": labels[place], "scores": scores[place]}
                yield row | masks | {"heatmaps": np.round(255 * own).astype(np.uint8)}

    def batches(seed):
        for places, own, _ in pairs(seed):
            noise = 0.1 * rng.standard_normal((len(places), len(SCORES)))
            yield [
                {"uid": uids[place], "labels": labels[place], "scores": scores[place] + noise[i], "heatmaps": own[i]}
                for i, place in enumerate(places)
            ]

    targets.write(folder / "targets.parquet", targets.Header("random", "test", count, size), examples())
    json_files.write(folder / "references.json", {})
    specs = []
    for row in range(rows):
        file = folder / f"{row}.parquet"
        identity = predictions.Identity(str(row), "random", "test", count, False)
        predictions.write(file, identity, lambda _, seed=row + 1: batches(seed))
        specs.append(f"row {row}=predictions:{file}")
    return specs


def measure_seconds(count: int, size: int, rows: int) -> None:
    """Prints seconds and memory of a first and of a second run."""
    with tempfile.TemporaryDirectory() as folder:
        specs = write_random(pathlib.Path(folder), count, size, rows)
        lines = []
        for run in ("the first", "again"):
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-m", "rahf.tables", f"--output={folder}", "--rows", *specs],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
            of_cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            lines.append([run, f"{seconds:.1f}", f"{of_cpu:.1f}", f"{after.ru_maxrss / 2**20:.2f}"])
    headers = ["run", "s", "CPU s", "most memory so far, GiB"]
    print(tabulate(lines, headers, tablefmt="github", disable_numparse=True))


# ------------------------------------------------------------------------------------------------------------ coverage


def simulated(rng: np.random.Generator, n: int, count: int = 2) -> dict[str, metrics.PerExample]:
    """Rows of equal quality on n examples.

    The scores are bivariate normal with `CORRELATIONS`. MSE is log-normal (mean exp(1/2), skewness 6.2) in place of every
    metric of heatmaps. Words are marked with the probabilities above.
    """
    truth = rng.standard_normal((n, len(SCORES)))
    words = rng.integers(3, 20, n)
    shares = rng.beta(0.5, 3.0, n)
    there = np.arange(19) < words[:, None]
    misaligned = there & (rng.random((n, 19)) < shares[:, None])
    rows = {}
    for name in map(str, range(count)):
        rho = np.array(list(CORRELATIONS.values()))
        predicted = rho * truth + np.sqrt(1 - rho**2) * rng.standard_normal(truth.shape)
        marked = there & (rng.random((n, 19)) < np.where(misaligned, FOUND, FALSE))
        counts = [both.sum(axis=1) for both in (misaligned & marked, marked, misaligned)]
        values = np.exp(rng.standard_normal((n, len(HEATMAPS))))
        maps = dict.fromkeys(metrics.HEATMAP_METRICS, values)
        blank = np.zeros((n, len(HEATMAPS)), bool)
        rows[name] = metrics.PerExample(
            truth, predicted, maps, blank, np.stack(counts, axis=1).astype(float), np.full(n, np.nan)
        )
    return rows


def population() -> dict[str, float]:
    """The true value of each metric whose coverage is measured."""
    marked = FOUND * MISALIGNED + FALSE * (1 - MISALIGNED)
    return {
        **{f"score/plcc/{name}": rho for name, rho in CORRELATIONS.items()},
        **{f"score/srcc/{name}": 6 / np.pi * np.arcsin(rho / 2) for name, rho in CORRELATIONS.items()},
        f"heatmap/mse/{HEATMAPS[0]}": np.exp(0.5),
        "keywords/micro/precision": FOUND * MISALIGNED / marked,
        "keywords/micro/recall": FOUND,
        "keywords/micro/f1": 2 * FOUND * MISALIGNED / (marked + MISALIGNED),
    }


def coverage(n: int, simulations: int, resamples: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """{metric: (share of the intervals that hold the true value, share of the two equal rows that are marked as tied)}."""
    rng, expected = np.random.default_rng(seed), population()
    held, tied = (dict.fromkeys(expected, 0) for _ in range(2))
    for number in tqdm(range(simulations), desc=f"{n} examples", dynamic_ncols=True):
        found = bootstrap.estimates(simulated(rng, n), (), resamples, seed=number)
        for key, value in expected.items():
            held[key] += sum(row[key].low <= value <= row[key].high for row in found.values())
            tied[key] += all(row[key].tied for row in found.values())
    return {key: (held[key] / (2 * simulations), tied[key] / simulations) for key in expected}


def lost(rows: int, n: int, simulations: int, resamples: int, seed: int = 0) -> dict[str, float]:
    """{metric: share of equal rows that are marked as worse than the best}."""
    rng, count = np.random.default_rng(seed), dict.fromkeys(population(), 0)
    for number in tqdm(range(simulations), desc=f"{rows} rows", dynamic_ncols=True):
        found = bootstrap.estimates(simulated(rng, n, rows), (), resamples, seed=number)
        for key in count:
            count[key] += sum(not row[key].tied for row in found.values())
    return {key: value / (rows * simulations) for key, value in count.items()}


def main():
    args = flags.FLAGS
    if not args.coverage:
        measure_seconds(args.examples, args.size, args.rows)
        return
    columns = [coverage(n, args.simulations, args.resamples) for n in (955, 100)]
    columns += [lost(rows, 100, args.simulations, args.resamples) for rows in (5, 20)]
    lines = [[key, *(f"{100 * share:.1f}" for column in columns for share in np.ravel(column[key]))] for key in population()]
    headers = ["%", "955: held", "955: tied", "100: held", "100: tied", "100: lost of 5", "100: lost of 20"]
    print(tabulate(lines, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    ranges.flag("examples", 955, "Examples of the split.", ranges.COUNT)
    ranges.flag("size", 384, "Pixels of a side of the maps.", ranges.PIXELS)
    ranges.flag("rows", 5, "Rows of the tables.", ranges.COUNT)
    flags.DEFINE_bool("coverage", False, "Measure the intervals and the marks instead.")
    ranges.flag("simulations", 1000, "Test sets of each size.", ranges.COUNT)
    ranges.flag("resamples", bootstrap.RESAMPLES, "Resamples of the bootstrap.", ranges.COUNT)
    command.run(main)
