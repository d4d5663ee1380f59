"""Examples per second of a config's training step, and of the stream that feeds it, on this machine.

    python benchmarks/train_step.py --config=configs/rahf_synth_tiny.py [--steps=10] [--config.key=value ...]
"""

import pathlib
import tempfile
import time

import jax
import tabulate
from absl import flags
from flax import linen as nn

from rahf import experiments, optimizers, partitioning, sources, train
from rahf.models.rahf import RAHF, RAHFConfig
from richhf_data import command


def main():
    config, steps = flags.FLAGS.config, flags.FLAGS.steps
    config.data.source, config.data.num_workers = "stream", 0
    mesh = partitioning.mesh_of(config.mesh)
    model = RAHF(RAHFConfig.from_dict(config.model.to_dict()))
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.num_steps)
    schedule = optimizers.make_schedule(config.optimizer, config.train.num_steps)
    abstract, shardings = train.state_shardings(model, optimizer, config, mesh, jax.random.key(0))
    sharding = partitioning.batch_sharding(mesh)

    with tempfile.TemporaryDirectory() as folder:
        batches = sources.training_batches(config, sources.install_vocabulary(config, pathlib.Path(folder)), start=0)
        batch = next(batches)
        start = time.perf_counter()
        next(batches)
        drawn = time.perf_counter() - start

    init = jax.jit(lambda key: nn.unbox(train.initial_state(model, optimizer, config, key)), out_shardings=shardings)
    state, key = init(jax.random.key(0)), jax.random.key(1)
    with jax.set_mesh(mesh), nn.logical_axis_rules(partitioning.RULES):
        batch = partitioning.shard_batch(batch, sharding)
        step = jax.jit(
            train.make_train_step(model, optimizer, schedule, config, mesh),
            in_shardings=(shardings, sharding, None),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )
        start = time.perf_counter()
        compiled = step.lower(state, batch, key).compile()
        compiled_in = time.perf_counter() - start
        seconds = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            state, metrics = compiled(state, batch, key)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
    best, flops = min(seconds[1:]), compiled.cost_analysis()["flops"] * jax.device_count()
    rows = [
        ("variant", config.model.variant),
        ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}"),
        ("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(abstract['params'])):,}"),
        ("batch", config.train.batch_size),
        ("seconds per step (best)", f"{best:.3f}"),
        ("examples/s", f"{config.train.batch_size / best:.0f}"),
        ("GFLOP per example", f"{flops / config.train.batch_size / 1e9:.2f}"),
        ("GFLOP/s", f"{flops / best / 1e9:.0f}"),
        ("compilation, s", f"{compiled_in:.1f}"),
        ("stream, examples/s of one process", f"{config.train.batch_size / drawn:.0f}"),
    ]
    print(tabulate.tabulate(rows, headers=("", "")))


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 10, "Timed steps.")
    command.run(main, experiments.reader())
