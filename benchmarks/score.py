"""Scores 20,000 small pictures while the command is killed again and again: is the output that of an uninterrupted run?

    python -m benchmarks.score [--pictures=20000 --shards=40 --broken=200 --kills=20 --workers=1]

The pictures are RichHF-Synth's, 2,000 of them again and again, in parquet files; the model is that of `rahf_ci`, with random
weights. `rahf.score` writes them once without interruption. Then it is killed (SIGKILL) at random moments, each time given
again, and the output compared byte by byte. At the end the throughput: of `rahf.score`, and of `rahf.predict` on the same
pictures as files.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

import tabulate
from absl import flags

from richhf_data import command, jsonl, ranges

SIDE = 32  # pixels
DISTINCT = 2_000  # pictures that are drawn; then they repeat
SPEED = re.compile(r"speed: ([\d,.]+) images/s; the devices had a batch for ([\d.]+%)")
ROOT = pathlib.Path(__file__).parent.parent


def generate(folder: pathlib.Path, pictures: int, shards: int, broken: int) -> None:
    """Writes the parquet files, of which `broken` rows hold no picture, and a workdir with random weights."""
    import jax
    import numpy as np
    import pyarrow.parquet
    from flax import linen as nn

    from rahf import checkpoints, experiments, sources, workdirs
    from rahf.models import critics
    from richhf_data import images
    from richhf_data.synthetic import example

    rng, drawn = np.random.default_rng(0), []
    of = [(images.png(one.image), one.prompt) for one in example.examples("train", min(DISTINCT, pictures), 0, SIDE, SIDE)]
    for number in range(pictures):
        image, prompt = of[number % len(of)]
        drawn.append({"image": image, "prompt": prompt, "name": f"{number:06d}"})
    for number in rng.choice(pictures, broken, replace=False):
        drawn[number]["image"] = drawn[number]["image"][: rng.integers(0, 60)]
    (folder / "in").mkdir()
    for shard in range(shards):
        rows = drawn[pictures * shard // shards : pictures * (shard + 1) // shards]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "in" / f"{shard:03d}.parquet")
    config = experiments.load("rahf_ci")
    config.data.source = "stream"
    workdirs.open_workdir(folder / "run", config)
    sources.install_vocabulary(config, folder / "run")
    model_config = critics.config_of(config.model.to_dict())
    inputs = critics.dummy_inputs(model_config, config.data.text_length)
    params = nn.unbox(critics.module_of(model_config).init(jax.random.key(0), *inputs)["params"])
    with checkpoints.manager(folder / "run", "best") as best:
        checkpoints.save(best, 1, params, {"value": 0.5})


def start(folder: pathlib.Path, output: pathlib.Path, images: str, module: str = "rahf.score", *more) -> subprocess.Popen:
    """The command."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", module, f"--workdir={folder / 'run'}", f"--output={output}", f"--images={images}", *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("wb"),
        text=True,
        encoding="utf-8",
    )


def score(folder: pathlib.Path, output: pathlib.Path, workers: int, files: str = "*.parquet", *more) -> subprocess.Popen:
    """`rahf.score` of the parquet files."""
    return start(folder, output, f"{folder}/in/{files}", "rahf.score", f"--workers={workers}", *more)


def contents(output: pathlib.Path) -> dict[str, str]:
    """name -> digest of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.iterdir())}


def first_part(process: subprocess.Popen, output: pathlib.Path) -> float:
    """Seconds until a part is there, or the process has ended."""
    begun = time.monotonic()
    while process.poll() is None and not list(output.glob("part-*.parquet")):
        time.sleep(0.01)
    return time.monotonic() - begun


def kill_again_and_again(
    folder: pathlib.Path, least: float, most: float, kills: int, workers: int
) -> list[tuple[float, int]]:
    """(seconds that the process lived, parts that were there) of each kill, `least` to `most` seconds after its start.

    The last run is left to its end; there are fewer kills if one ends before.
    """
    rng, output, found = random.Random(0), folder / "killed", []
    while True:
        begun, process = time.monotonic(), score(folder, output, workers)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(None if len(found) == kills else rng.uniform(least, most))
        if process.poll() is not None:
            process.communicate()
            check(process, folder, 3)
            return found
        process.kill()
        process.communicate()
        found.append((time.monotonic() - begun, len(list(output.glob("part-*.parquet")))))


def check(process: subprocess.Popen, folder: pathlib.Path, *codes: int) -> None:
    """Raises RuntimeError if a command ended with another exit code; 3 counts pictures that failed."""
    if process.returncode not in codes:
        raise RuntimeError(f"exit code {process.returncode}: {(folder / 'stderr').read_text(encoding='utf-8')[-2000:]}")


def predict_rate(folder: pathlib.Path, count: int) -> float:
    """Pictures per second of `rahf.predict` on the first so many, as files, after its program is compiled."""
    import pyarrow.parquet

    files = folder / "files"
    files.mkdir()
    lines, table = [], pyarrow.parquet.read_table(sorted((folder / "in").iterdir())).slice(0, count)
    for row in table.to_pylist():
        (files / f"{row['name']}.png").write_bytes(row["image"])
        lines.append({"image": f"files/{row['name']}.png", "prompt": row["prompt"]})
    seconds = {}
    for part in (64, 128, len(lines)):  # the first compiles
        jsonl.write(folder / "list.jsonl", lines[:part])
        begun = time.monotonic()
        process = start(folder, folder / f"predicted_{part}", folder / "list.jsonl", "rahf.predict")
        process.communicate()
        seconds[part] = time.monotonic() - begun
        check(process, folder, 0, 3)
    return (len(lines) - 128) / (seconds[len(lines)] - seconds[128])


def main() -> None:
    """The benchmark."""
    args = flags.FLAGS
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        generate(folder, args.pictures, args.shards, args.broken)
        score(folder, folder / "warm", args.workers, "000.parquet").communicate()  # compiles
        begun, process = time.monotonic(), score(folder, folder / "whole", args.workers)
        starting = first_part(process, folder / "whole")
        said = process.communicate()[0]
        check(process, folder, 3)
        seconds = time.monotonic() - begun
        rate, share = SPEED.search(said).groups()
        index = json.loads((folder / "whole" / "index.json").read_bytes())
        size = sum(path.stat().st_size for path in (folder / "whole").glob("*.parquet")) / index["rows"]
        say(f"{index['rows']} rows of {size:.0f} bytes, {index['failed']} failed, {len(index['shards'])} parts")
        say(f"uninterrupted: {seconds:.1f} s, {rate} images/s, the device had a batch for {share} of the time")
        work = args.pictures / float(rate.replace(",", ""))
        most = starting + 1.2 * work / max(args.kills, 1)
        found = kill_again_and_again(folder, starting / 2, most, args.kills, args.workers)
        say(tabulate.tabulate([[f"{lived:.1f}", parts] for lived, parts in found], ["s until the kill", "parts there"]))
        same = contents(folder / "killed") == contents(folder / "whole")
        say(f"after {len(found)} kills the output is {'the same' if same else 'ANOTHER'}, byte for byte")
        said = score(folder, folder / "maps", args.workers, "00?.parquet", "--heatmaps").communicate()[0]
        say(f"with heatmaps: {SPEED.search(said)[1]} images/s")
        rate = predict_rate(folder, min(args.pictures, args.predicted))
        say(f"rahf.predict, which writes heatmaps and a report: {rate:.1f} images/s")
    if not same:
        raise SystemExit(1)


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


if __name__ == "__main__":
    ranges.flag("pictures", 20_000, "How many.", ranges.COUNT)
    ranges.flag("shards", 40, "Parquet files.", ranges.COUNT)
    ranges.flag("broken", 200, "Pictures that are cut.", ranges.NUMBER)
    ranges.flag("kills", 20, "SIGKILLs.", ranges.NUMBER)
    ranges.flag("workers", 1, "Of rahf.score.", ranges.NUMBER_OF_PROCESSES)
    ranges.flag("predicted", 2_000, "Pictures for rahf.predict.", ranges.COUNT)
    command.run(main)
