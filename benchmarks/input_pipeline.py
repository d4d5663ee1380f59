"""Examples per second of the seqio input pipeline: a built dataset to augmented batches, on this machine.

    python benchmarks/input_pipeline.py --data_dir=demo/data --image_size=96 --heatmap_size=32 [--batches=30]
"""

import os
import time

import tabulate
from absl import app, flags

from rahf import features
from richhf_data import tasks


def main(argv):
    del argv
    args = flags.FLAGS
    rows = []
    for augment in (False, True):
        task = tasks.register(
            args.data_dir, image_size=args.image_size, heatmap_size=args.heatmap_size, augment=augment
        )
        batches = features.training_batches(task, args.batch_size, seed=0)
        for _ in range(3):  # starts the threads and fills the buffers
            next(batches)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(args.batches):
            next(batches)
        count = args.batches * args.batch_size
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        rows.append(("crop and colour" if augment else "resize only", count / seconds, count / cpu))
    headers = ("augmentation", f"examples/s ({os.cpu_count()} cores)", "examples per CPU-second")
    print(tabulate.tabulate(rows, headers=headers, floatfmt=".0f"))


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", None, "What richhf_data.build wrote.")
    flags.DEFINE_integer("image_size", 224, "Pixels.")
    flags.DEFINE_integer("heatmap_size", 224, "Pixels.")
    flags.DEFINE_integer("batch_size", 64, "Rows.")
    flags.DEFINE_integer("batches", 30, "Timed batches.")
    flags.mark_flag_as_required("data_dir")
    app.run(main)
