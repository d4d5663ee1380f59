"""Examples per second of the seqio input pipeline on this machine, from a built dataset to augmented batches.

    python benchmarks/input_pipeline.py --data_dir=DIR [--image_size=224] [--heatmap_size=224] [--num_shards=32]

The first table measures the batches that training reads (`rahf.features.training_batches`), the second each step.
"""

import os
import time
from collections.abc import Iterator

import tabulate
from absl import flags

from rahf import features
from richhf_data import command, ranges, tasks
from richhf_data.tensorflow_cpu import seqio, tf


def seconds(batches: Iterator, count: int) -> tuple[float, float]:
    """(wall, CPU) seconds of `count` batches."""
    for _ in range(3):  # starts the threads and fills the buffers
        next(batches)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - start, time.process_time() - cpu


def stages(task: seqio.Task, batch_size: int, count: int) -> Iterator[tuple[str, float]]:
    """(step, CPU milliseconds per example up to and including it): reading, then each preprocessor of the task."""
    dataset = task.source.get_dataset("train", shuffle=False).cache().repeat()
    steps = [step for step in task.preprocessors if not isinstance(step, seqio.CacheDatasetPlaceholder)]
    with seqio.utils.map_seed_manager(0):
        for step in [None, *steps]:
            dataset = dataset if step is None else step(dataset)
            # Batch the sizes only: images of different sizes cannot be stacked.
            sizes = dataset.map(lambda example: [tf.size(value) for value in example.values()], tf.data.AUTOTUNE)
            _, cpu = seconds(iter(sizes.batch(batch_size)), count)
            name = "read" if step is None else getattr(step, "func", step).__name__
            yield name, 1000 * cpu / (count * batch_size)


def main():
    args = flags.FLAGS
    per_host, rows = args.batch_size // args.num_shards, []
    count = max(1, args.examples // per_host)
    for augment in (False, True):
        task = tasks.register(args.data_dir, image_size=args.image_size, heatmap_size=args.heatmap_size, augment=augment)
        batches = features.training_batches(task, args.batch_size, seed=0, rows=range(per_host))
        wall, cpu = (time / (count * per_host) for time in seconds(batches, count))
        rows.append(("crop and colour" if augment else "resize only", 1 / wall, 1 / cpu))
    headers = ("augmentation", f"examples/s ({os.cpu_count()} cores)", "examples per CPU-second")
    print(tabulate.tabulate(rows, headers=headers, floatfmt=".0f"))

    before, rows = 0, []
    for name, total in stages(task.seqio_task, 64, max(1, args.examples // 64)):
        rows.append((name, total - before, total))
        before = total
    print()
    print(tabulate.tabulate(rows, headers=("step", "CPU-ms per example", "cumulative"), floatfmt=".2f"))


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", None, "What richhf_data.build wrote.")
    ranges.flag("image_size", 224, "Side in pixels.", ranges.PIXELS)
    ranges.flag("heatmap_size", 224, "Side in pixels.", ranges.PIXELS)
    ranges.flag("batch_size", 64, "Rows of the global batch.", ranges.ROWS)
    ranges.flag("num_shards", 1, "Hosts that share a batch; the first one is measured.", ranges.ROWS)
    ranges.flag("examples", 2000, "Number of timed examples.", ranges.COUNT)
    flags.mark_flag_as_required("data_dir")
    command.run(main)
