"""The service under load: latency and throughput over concurrency, beside the model called directly; and its memory.

    python -m benchmarks.serve --workdir=DIR [--pictures=5000]

The pictures are RichHF-Synth's, as PNG, of the model's size. The model is called directly on decoded pictures, in one
process and in batches of the service's largest size; then from the encoded pictures, as `rahf.predict` reads them. The
clients of the service run in one more process of this machine, and share its cores. Every answer is compared with the
model's own.
"""

import asyncio
import base64
import contextlib
import itertools
import multiprocessing
import subprocess
import sys
import time

import aiohttp
import cv2
import numpy as np
import psutil
import tabulate
from absl import flags

import rahf
from rahf import ahead
from richhf_data import command, images, ranges, schema
from richhf_data.synthetic import example

_FEW = ((1, 300, 1), (4, 600, 1), (16, 1000, 1))  # requests at once, pictures, pictures a request


def draw(model, count: int) -> tuple[list[bytes], list[str]]:
    """Encoded pictures of the model's size, and their prompts, which it can read."""
    size = model.model_config.image_size
    drawn = example.examples("test", 2 * count, seed=1, image_size=size, map_size=16)
    drawn = list(itertools.islice((one for one in drawn if not model.is_too_long(one.prompt)), count))
    return [cv2.imencode(".png", one.image[..., ::-1])[1].tobytes() for one in drawn], [one.prompt for one in drawn]


async def _ask(url: str, data: list[bytes], prompts: list[str], level: int, together: int):
    """(seconds of each request, scores of each picture float64[B, 4], seconds of all) with `level` requests at once."""
    starts = iter(range(0, len(data), together))
    seconds, scores = [], np.zeros((len(data), len(schema.SCORES)))

    async def client(session):
        for start in starts:
            part = slice(start, start + together)
            body = {"images": [base64.b64encode(one).decode() for one in data[part]], "prompts": prompts[part]}
            begun = time.perf_counter()
            async with session.post(f"{url}/v1/feedback", json=body) as response:
                found = (await response.json())["results"]
            seconds.append(time.perf_counter() - begun)
            scores[part] = [[one["scores"][name] for name in schema.SCORES] for one in found]

    begun = time.perf_counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        await asyncio.gather(*(client(session) for _ in range(level)))
    return seconds, scores, time.perf_counter() - begun


def _ask_in_process(pipe, *arguments) -> None:
    pipe.send(asyncio.run(_ask(*arguments)))


def ask(*arguments):
    """`_ask` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_ask_in_process, args=(theirs, *arguments))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def memory(pid: int) -> float:
    """MiB that a process and its children use and share with no other."""
    one = psutil.Process(pid)
    return sum(process.memory_full_info().uss for process in (one, *one.children(recursive=True))) / 2**20


@contextlib.contextmanager
def serving(workdir: str, batch_size: int):
    """The service, started on any port: (address, process)."""
    sizes = ",".join(str(1 << power) for power in range(batch_size.bit_length()))
    given = [f"--workdir={workdir}", "--port=0", f"--batch_sizes={sizes}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rahf.serve", *given], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        yield process.stdout.readline().split()[0], process.pid
    finally:
        process.terminate()
        process.wait()


def direct(model, data: list[bytes], prompts: list[str], batch_size: int) -> tuple[np.ndarray, float, float]:
    """Scores of the model itself, its pictures a second of decoded pictures, and of encoded ones."""
    decoded = [images.decode(one, "picture") for one in data]
    rows = [model.prepare(image, prompt) for image, prompt in zip(decoded, prompts, strict=True)]
    for count in (batch_size, len(rows) % batch_size):  # compiles
        list(model.predict_rows(rows[:count], batch_size))
    start = time.perf_counter()
    scores = np.stack([row["scores"] for row in model.predict_rows(rows, batch_size)])
    of_decoded = len(data) / (time.perf_counter() - start)

    def prepare(pair):
        return model.prepare(images.decode(pair[0], "picture"), pair[1])

    start = time.perf_counter()
    with contextlib.closing(ahead.mapped(prepare, zip(data, prompts, strict=True), batch_size)) as inputs:
        list(model.predict_rows(inputs, batch_size))
    return scores, of_decoded, len(data) / (time.perf_counter() - start)


def main() -> None:
    """Prints the tables."""
    args, model = flags.FLAGS, rahf.load(flags.FLAGS.workdir)
    data, prompts = draw(model, args.pictures)
    expected, of_decoded, of_encoded = direct(model, data, prompts, args.batch_size)
    print(f"the model itself: {of_decoded:.1f} pictures a second decoded, {of_encoded:.1f} encoded")
    rows, used = [], []
    with serving(args.workdir, args.batch_size) as (url, pid):
        ask(url, data[:64], prompts[:64], 8, 8)
        used.append(memory(pid))
        for level, count, together in [*_FEW, (64, args.pictures, 1), (8, args.pictures, 16)]:
            count = min(count, args.pictures)
            seconds, scores, total = ask(url, data[:count], prompts[:count], level, together)
            np.testing.assert_allclose(scores, expected[:count], atol=1e-5)
            p50, p99 = np.percentile(seconds, [50, 99]) * 1000
            rate = count / total
            rows.append([level, together, count, p50, p99, rate, rate / of_decoded, rate / of_encoded])
            used.append(memory(pid))
    headers = [
        "requests at once",
        "pictures each",
        "pictures",
        "p50 ms",
        "p99 ms",
        "pictures / s",
        "of decoded",
        "of encoded",
    ]
    print(tabulate.tabulate(rows, headers, "github", floatfmt=("d", "d", "d", ".0f", ".0f", ".1f", ".2f", ".2f")))
    print("MiB after each line, before the first: " + ", ".join(f"{value:.0f}" for value in used))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The critic.", required=True)
    ranges.flag("pictures", 5000, "Pictures of the last lines.", ranges.COUNT)
    ranges.flag("batch_size", 32, "The largest batch.", ranges.ROWS)
    command.run(main)
