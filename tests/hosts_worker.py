"""One of two processes: python tests/hosts_worker.py FOLDER DATA_DIR --coordinator=... ; see test_hosts.py."""

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
from absl import app, flags

STEPS = 5
OPTIMIZER = {"kind": "adamw", "schedule": "rsqrt", "learning_rate": 5e-5, "ema_decay": 0.0}


def config(source="stream", data_dir=""):
    """A run of five steps that evaluates at its end."""
    from rahf import experiments

    config = experiments.load("rahf_ci")
    config.model.vit.stem_patch = 0  # its norm amplifies the rounding that another order of sums brings
    config.data.update(source=source, data_dir=data_dir, text_length=60)
    config.optimizer.update(OPTIMIZER)
    config.train.num_steps = STEPS
    config.checkpoint_every = 100
    config.eval.update(every=100, batch_size=8, num_examples=7)  # the last batch is filled up
    return config


def in_turns():
    """The devices of the two processes in turns, as the order of a pod's devices may have them."""
    return np.asarray(jax.devices()).reshape(2, 4).T.ravel()


def across_processes():
    """data=4, model=2, each `model` pair with a device of both processes: both need all rows."""
    from rahf import partitioning

    return partitioning.make_mesh(4, 2, devices=in_turns())


def check_batches(config, folder):
    """This process's devices hold what they should of the batch that one process alone reads."""
    from rahf import partitioning, sources

    interleaved = partitioning.make_mesh(8, 1, devices=in_turns())

    vocabulary = sources.install_vocabulary(config, folder)
    whole = next(sources.training_batches(config, vocabulary, start=3))
    for mesh, count in ((partitioning.make_mesh(), 4), (across_processes(), 8), (interleaved, 4)):
        sharding = partitioning.batch_sharding(mesh)
        rows = partitioning.local_rows(sharding, config.train.batch_size)
        assert len(rows) == count, rows
        local = next(sources.training_batches(config, vocabulary, start=3, rows=rows))
        for name, array in partitioning.shard_batch(local, sharding).items():
            assert array.shape == whole[name].shape
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[name][shard.index], err_msg=name)


def killed_after(batches, count):
    """The batches of a process that is killed when it asks for one more than `count`."""
    for number, batch in enumerate(batches):
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def main(argv):
    folder, data_dir = pathlib.Path(argv[1]), argv[2]
    from rahf import hosts, loop, partitioning, sources, train

    with hosts.joined(preemptible=True):
        results = {"trained": train.train(config(), folder / "two")}
        partitioning.mesh_of, mesh_of = lambda _: across_processes(), partitioning.mesh_of
        results["resumed"] = train.train(config(), folder / "resumed_by_two")
        partitioning.mesh_of = mesh_of
        check_batches(config(), folder / "stream")
        check_batches(config("seqio", data_dir), folder / "seqio")
        (folder / f"results_{jax.process_index()}.json").write_text(json.dumps(results))

        if jax.process_index() == 1:
            drawn = sources.training_batches
            count = 3 + loop.READY  # in the fourth step
            sources.training_batches = lambda *args, **kwargs: killed_after(drawn(*args, **kwargs), count)
        train.train(config(), folder / "killed")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from rahf import hosts

    hosts.define_flags()
    flags.DEFINE_string("workdir", None, "Of the command.")
    app.run(main)
