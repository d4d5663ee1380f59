"""Examples per second of a RAHF config's training step on this machine, and of RichHF-Synth's stream, which feeds it here.

    python -m benchmarks.train_step --config=rahf_synth_tiny [--steps=10] [--config.key=value ...]

The step is the one that `rahf.train` compiles, with its sharding.
"""

import pathlib
import tempfile
import time

import jax
import tabulate
from absl import flags

from rahf import experiments, sources, train
from rahf import program as programs
from richhf_data import command, ranges


def main():
    config, steps = flags.FLAGS.config, flags.FLAGS.steps
    config.data.source, config.data.num_workers = "stream", 0
    training = programs.assemble(train.program(config), config)

    with tempfile.TemporaryDirectory() as folder:
        batches = sources.training_batches(config, sources.install_vocabulary(config, pathlib.Path(folder)), start=0)
        rows = next(batches)
        start = time.perf_counter()
        next(batches)
        drawn = time.perf_counter() - start

    state = training.init_state(training.init_params())
    start = time.perf_counter()
    compiled = training.lower().compile()
    compiled_in = time.perf_counter() - start
    batch = training.place(rows)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, training.step_key)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    best, flops = min(seconds[1:]), compiled.cost_analysis()["flops"] * jax.device_count()
    table = [
        ("variant", config.model.variant),
        ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}"),
        ("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(training.params)):,}"),
        ("batch", config.train.batch_size),
        ("seconds per step (best)", f"{best:.3f}"),
        ("examples/s", f"{config.train.batch_size / best:.0f}"),
        ("GFLOP per example", f"{flops / config.train.batch_size / 1e9:.2f}"),
        ("GFLOP/s", f"{flops / best / 1e9:.0f}"),
        ("compilation, s", f"{compiled_in:.1f}"),
        ("stream, examples/s of one process", f"{config.train.batch_size / drawn:.0f}"),
    ]
    print(tabulate.tabulate(table, headers=("", "")))


if __name__ == "__main__":
    ranges.flag("steps", 10, "Timed steps.", ranges.COUNT)
    command.run(main, experiments.reader())
