"""Seconds of the heatmap metrics, and of AUC-Judd in its usual form, a loop over thresholds.

    python benchmarks/metrics.py [--maps=1000] [--size=384]
"""

import time

import numpy as np
from absl import flags
from tabulate import tabulate

from richhf_data import command, metrics, ranges


def random_maps(rng, n, size):
    """(smooth predictions with noise, means of three annotators' disks), [n, size, size] each, in [0, 1]."""
    y, x = np.mgrid[:size, :size]
    truth, prediction = np.zeros((n, size, size)), np.empty((n, size, size), np.float32)
    for i in range(n):
        for _ in range(9):
            row, column = rng.integers(0, size, 2)
            truth[i][(y - row) ** 2 + (x - column) ** 2 < (size / 20) ** 2] += 1 / 3
        row, column = rng.integers(0, size, 2)
        blob = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * (size / 6) ** 2))
        prediction[i] = 0.9 * blob + 0.1 * rng.random((size, size))
    return prediction, np.minimum(truth, 1)


def auc_judd_by_thresholds(prediction, truth):
    """AUC-Judd of each map, by one pass over the map for each fixated pixel."""
    values = []
    for p, g in zip(prediction.reshape(len(prediction), -1), truth.reshape(len(truth), -1), strict=True):
        fixated = g > 0
        thresholds = np.sort(p[fixated])[::-1]
        negatives = np.array([((p >= threshold) & ~fixated).sum() for threshold in thresholds]) / (~fixated).sum()
        positives = np.arange(1, len(thresholds) + 1) / len(thresholds)
        values.append(np.trapezoid([0, *positives, 1], [0, *negatives, 1]))
    return np.array(values)


def main():
    args = flags.FLAGS
    rng = np.random.default_rng(0)
    functions = (metrics.mse, metrics.cc, metrics.kld, metrics.sim, metrics.nss, metrics.auc_judd)
    seconds = dict.fromkeys(functions, 0.0)
    for start in range(0, args.maps, args.batch):
        prediction, truth = random_maps(rng, min(args.batch, args.maps - start), args.size)
        step = max(1, metrics._CHUNK_PIXELS // args.size**2)  # as in metrics.evaluate
        for function in functions:
            began = time.perf_counter()
            for at in range(0, len(prediction), step):
                function(prediction[at : at + step], truth[at : at + step])
            seconds[function] += time.perf_counter() - began

    began = time.perf_counter()
    slow = auc_judd_by_thresholds(prediction[: args.slow_maps], truth[: args.slow_maps])
    slow_seconds = (time.perf_counter() - began) * args.maps / args.slow_maps
    np.testing.assert_allclose(slow, metrics.auc_judd(prediction[: args.slow_maps], truth[: args.slow_maps]), atol=1e-5)

    lines = [[function.__name__, f"{seconds[function]:.2f}"] for function in functions]
    lines.append(["all of them", f"{sum(seconds.values()):.2f}"])
    lines.append([f"auc_judd, loop over thresholds ({args.slow_maps} measured, scaled)", f"{slow_seconds:.0f}"])
    print(tabulate(lines, ["metric", f"s for {args.maps} maps of {args.size}x{args.size}"], tablefmt="github"))


if __name__ == "__main__":
    ranges.flag("maps", 1000, "Number of maps.", ranges.COUNT)
    ranges.flag("size", 384, "Height and width in pixels.", ranges.Range(16, 2**13, whole=True))
    ranges.flag("batch", 50, "Maps in memory at a time.", ranges.COUNT)
    ranges.flag("slow_maps", 1, "Maps for the loop over thresholds, at most --batch.", ranges.COUNT)
    command.run(main)
