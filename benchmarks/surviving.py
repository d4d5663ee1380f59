"""Kills training runs and corrupts their checkpoints, and checks that they end in the same state, bit for bit.

    python -m benchmarks.surviving [--times=20] [--steps=600]

1. One run is killed (SIGKILL) `times` times, at a random moment while it trains and saves, and started again by the same
   command. Its last training state is compared with that of an undisturbed run.
2. `times` times, a random file of the finished run's newest checkpoint is truncated, or one random bit of it is flipped;
   then the run is resumed. It must end in the same state, from this checkpoint or from the one before.
3. The time of the digests of the base config's training state, estimated from an array of 100 million numbers.
"""

import contextlib
import io
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import tabulate
from absl import flags

from richhf_data import command, ranges

ROOT = pathlib.Path(__file__).parent.parent
CHECKPOINT_EVERY = 3  # steps; a save is in progress nearly all the time


def overrides(steps: int) -> dict:
    return {
        "data.source": "stream",
        "train.num_steps": steps,
        "eval.every": steps,
        "checkpoint_every": CHECKPOINT_EVERY,
        "log_every": 50,
        "optimizer.ema_decay": 0.9,
    }


def start(workdir, steps: int, log) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "rahf.train", "--config=rahf_ci", f"--workdir={workdir}"]
    arguments += [f"--config.{key}={value}" for key, value in overrides(steps).items()]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finish(workdir, steps: int) -> str:
    """Runs to the end; returns the printed text."""
    with tempfile.TemporaryFile("w+") as log:
        code = start(workdir, steps, log).wait()
        log.seek(0)
        printed = log.read()
    assert code == 0, printed
    return printed


def resumed_from(printed: str) -> int:
    """The step that a run resumed from, by its printed text; 0 for a start from scratch."""
    return int(printed.split("resumed from step ")[1].split()[0]) if "resumed from step " in printed else 0


def entries(workdir) -> tuple[set[int], bool]:
    """(the saved steps, whether a save is in progress)."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return {int(name) for name in names if name.isdigit()}, any("tmp" in name for name in names)


def kill(workdir, steps: int, rng) -> dict:
    """Starts the run and kills it at a random moment after its first save has begun."""
    before, _ = entries(workdir)
    with tempfile.TemporaryFile("w+") as log:
        process = start(workdir, steps, log)
        while process.poll() is None and entries(workdir) in ((before, False), (before, True)):
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 1.5))
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        log.seek(0)
        printed = log.read()
    assert code == -signal.SIGKILL, f"ended before it was killed; raise --steps: {printed}"
    complete, saving = entries(workdir)
    return {"resumed from": resumed_from(printed), "killed after saving": max(complete), "while saving": saving}


def damage(folder: pathlib.Path, rng) -> str:
    """Flips one bit of one file, or truncates the file; returns a description."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
    data = bytearray(path.read_bytes())
    where = rng.randrange(len(data))
    kind = rng.choice(["flipped", "truncated"])
    if kind == "flipped":
        data[where] ^= 1 << rng.randrange(8)
    path.write_bytes(data if kind == "flipped" else data[:where])
    return f"{kind} {path.relative_to(folder)} at {where}"


def final_state(workdir, steps: int) -> list[np.ndarray]:
    """The arrays of the last training state."""
    import jax

    from rahf import checkpoints

    with checkpoints.manager(workdir, "checkpoints") as manager:
        tree = manager.item_metadata(steps)["state"].tree
        state = checkpoints.restore(manager, steps, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Whether all arrays are equal, bit for bit."""
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def resume(workdir, steps: int) -> tuple[str, str]:
    """Trains to the end in this process; returns what went to (standard output, standard error)."""
    from rahf import experiments, train

    config = experiments.load("rahf_ci")
    config.update_from_flattened_dict(overrides(steps))
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as warned:
        train.train(config, workdir)
    return printed.getvalue(), warned.getvalue()


def digest_seconds() -> float:
    """Seconds for 100 million float32."""
    import jax.numpy as jnp

    from rahf import checkpoints

    tree = {"array": jnp.ones((100, 1000, 1000), jnp.float32)}
    checkpoints.digests(tree)
    started = time.monotonic()
    checkpoints.digests(tree)
    return time.monotonic() - started


def main():
    times, steps = flags.FLAGS.times, flags.FLAGS.steps
    rng = random.Random(flags.FLAGS.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        os.environ["JAX_PLATFORMS"] = "cpu"
        finish(folder / "whole", steps)
        whole = final_state(folder / "whole", steps)

        rows = []
        for number in range(times):
            rows.append({"kill": number + 1, **kill(folder / "killed", steps, rng)})
            print(rows[-1], flush=True)
        printed = finish(folder / "killed", steps)
        print(tabulate.tabulate(rows, headers="keys", tablefmt="github"))
        for row, after in zip(rows, [*(row["resumed from"] for row in rows[1:]), resumed_from(printed)], strict=True):
            assert after == row["killed after saving"], f"{row}, then resumed from {after}"
        same = equal(whole, final_state(folder / "killed", steps))
        print(f"{times} kills, each resumed from the newest checkpoint: last state equal bit for bit: {same}\n", flush=True)
        assert same

        rows = []
        for number in range(times):
            workdir = folder / "damaged"
            shutil.copytree(folder / "whole", workdir)
            done = damage(workdir / "checkpoints" / str(steps), rng)
            printed, warned = resume(workdir, steps)
            row = {"": number + 1, "damage": done, "resumed from": resumed_from(printed), "warned": "WARNING" in warned}
            row["equal"] = equal(whole, final_state(workdir, steps))
            print(row, flush=True)
            assert row["equal"] and row["resumed from"] in (steps, steps - CHECKPOINT_EVERY), row
            assert row["warned"] == (row["resumed from"] != steps), row
            rows.append(row)
            shutil.rmtree(workdir)
        print(tabulate.tabulate(rows, headers="keys", tablefmt="github"))
    seconds, numbers = digest_seconds(), 3 * 473_705_350  # parameters and Adam's two moments
    print(f"\ndigests: {seconds:.2f} s for 100 million numbers, so {seconds * numbers / 1e8:.1f} s for {numbers:,}")


if __name__ == "__main__":
    ranges.flag("times", 20, "Number of kills, and of corruptions.", ranges.COUNT)
    ranges.flag("steps", 600, "Steps of the run, a multiple of 3.", ranges.Range(3, 2**31 - 1, whole=True))
    ranges.flag("seed", 0, "Seed of the moments, files and positions.", ranges.SEED)
    command.run(main)
