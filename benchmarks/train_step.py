"""Examples per second of a config's training step on this machine, its memory, and its share of the device's peak (MFU).

    python -m benchmarks.train_step --config=rahf_synth_tiny [--steps=10] [--config.key=value ...]
    python -m benchmarks.train_step --config=sd_reward --config.train.batch_size=16

The step is the one that `rahf.train` or `rahf.diffusion.train` compiles, with its sharding. A RAHF is fed by the stream of
RichHF-Synth, whose speed is stated too; Stable Diffusion, from random parameters, by random latents. FLOPs are those of the
step with plain attention, before the compiler changes it, without what `remat` computes again.
"""

import pathlib
import tempfile
import time

import jax
import numpy as np
import tabulate
from absl import flags

from benchmarks import peaks
from rahf import compile as compiling
from rahf import experiments, partitioning, sources
from rahf import program as programs
from richhf_data import command, ranges


def rahf_batches(config):
    """Batches of RichHF-Synth, which never end."""
    config.data.source, config.data.num_workers = "stream", 0
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = sources.install_vocabulary(config, pathlib.Path(folder))
        yield from sources.training_batches(config, vocabulary, start=0)


def random_batches(training):
    """A batch of random numbers, again and again."""
    rng = np.random.default_rng(0)
    batch = {name: rng.random(leaf.shape).astype(leaf.dtype) for name, leaf in training.batch.items()}
    while True:
        yield batch


def counted(config) -> float:
    """FLOPs of a step. JAX counts those of a CPU's program before it is compiled, of a GPU's it does not."""
    plain = config.copy_and_resolve_references()
    plain.mesh.attention = "plain"
    program = compiling.program_of(plain)
    plain.update_from_flattened_dict(dict.fromkeys(program.remat, False))
    mesh = partitioning.make_mesh(devices=jax.devices("cpu")[:1])
    return programs.assemble(compiling.program_of(plain), plain, mesh).lower().cost_analysis()["flops"]


def main():
    config, steps = flags.FLAGS.config, flags.FLAGS.steps
    training = programs.assemble(compiling.program_of(config), config)
    of_rahf = config.get("kind", "rahf") == "rahf"
    batches = rahf_batches(config) if of_rahf else random_batches(training)
    rows = next(batches)
    start = time.perf_counter()
    next(batches)
    drawn = time.perf_counter() - start

    flops = counted(config)
    state = training.init_state(training.init_params())
    start = time.perf_counter()
    compiled = training.lower().compile()
    compiled_in = time.perf_counter() - start
    batch = training.place(rows)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, training.step_key, training.constants)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    best, size, device = min(seconds[1:]), config.train.batch_size, jax.devices()[0]
    peak, memory = peaks.flops(device.device_kind), device.memory_stats()
    table = [
        ("config", config.model.get("variant") or config.model.get("architecture", "Stable Diffusion")),
        ("devices", f"{jax.device_count()} x {device.device_kind}"),
        ("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(training.params)):,}"),
        ("batch", size),
        ("seconds per step (best)", f"{best:.3f}"),
        ("examples/s", f"{size / best:.3g}"),
        ("GFLOP per example", f"{flops / size / 1e9:.2f}"),
        ("TFLOP/s", f"{flops / best / 1e12:.3g}"),
        ("share of the peak (MFU)", f"{flops / best / jax.device_count() / peak:.1%}" if peak else "-"),
        ("GiB of a device at most", f"{memory['peak_bytes_in_use'] / 2**30:.2f}" if memory else "-"),
        ("compilation, s", f"{compiled_in:.1f}"),
        ("loss", f"{float(metrics['loss']):.4f}"),
    ]
    if of_rahf:
        table.append(("stream, examples/s of one process", f"{size / drawn:.0f}"))
    print(tabulate.tabulate(table, headers=("", "")))


if __name__ == "__main__":
    ranges.flag("steps", 10, "Timed steps.", ranges.COUNT)
    command.run(main, experiments.reader(kinds=("rahf", "diffusion")))
