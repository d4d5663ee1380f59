"""Time and peak memory of richhf_data.build on generated shards, and which shards it reads again after a kill half way.

    python benchmarks/build.py [--shards=20] [--megabytes=500] [--rows_per_group=25] [--workers=2]

The shards have Pick-a-Pic's columns and hold random noise, which JPEG compresses badly. The records name a third of the
images, some in every shard, so the scan must read all shards. The kernel reports which shards a build opens (inotify). A
build's memory is the sum of the resident memory (RSS) of its processes: shared pages count several times.
"""

import collections
import ctypes
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
import time

import psutil
import tabulate
from absl import flags

from richhf_data import command, ranges

ROOT = pathlib.Path(__file__).parent.parent
SIDE = 512  # pixels
IN_OPEN, NON_BLOCKING = 0x20, 0o4000


def generate(folder: pathlib.Path, num_shards: int, megabytes: int, rows_per_group: int) -> None:
    """Writes shards to images/, and records of a third of their images to records/."""
    import cv2
    import numpy as np
    import pyarrow.parquet

    from richhf_data import records, schema

    rng = np.random.default_rng(0)
    empty = cv2.imencode(".png", np.zeros((schema.RAW_MAP_SIZE, schema.RAW_MAP_SIZE), np.uint8))[1].tobytes()
    (folder / "images").mkdir()
    uids, size = [], 0
    for shard in range(num_shards):
        rows = []
        while size < megabytes * 1e6 * (shard + 1) / num_shards:
            row = {"caption": f"a red cat on table {len(uids)}"}
            for side in (0, 1):
                noise = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                row[f"jpg_{side}"] = cv2.imencode(".jpg", noise)[1].tobytes()
                row[f"image_{side}_uid"] = f"{shard:04d}-{len(uids):06d}"
                uids.append(row[f"image_{side}_uid"])
                size += len(row[f"jpg_{side}"])
            rows.append(row)
        table = pyarrow.Table.from_pylist(rows)
        path = folder / "images" / f"{shard:04d}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group, write_page_checksum=True)
    chosen = {"train": uids[0::3], "dev": uids[1::90], "test": uids[2::90]}
    for split, names in chosen.items():
        records.write(
            folder / "records" / f"{split}.tfrecord",
            (
                {
                    schema.RAW_UID: f"{split}/{uid}.png",
                    **dict.fromkeys(schema.RAW_SCORES.values(), 0.5),
                    **dict.fromkeys(schema.RAW_HEATMAPS.values(), empty),
                    schema.RAW_LABELS: "1 1 1 1 1 1",
                }
                for uid in names
            ),
        )


class Opened:
    """Counts how often each file of a folder is opened, by any process."""

    def __init__(self, folder: pathlib.Path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(NON_BLOCKING)
        assert self._libc.inotify_add_watch(self._fd, os.fsencode(folder), IN_OPEN) >= 0, os.strerror(ctypes.get_errno())
        self.counts = collections.Counter()

    def update(self) -> None:
        try:
            data = os.read(self._fd, 1 << 20)
        except BlockingIOError:
            return
        while data:
            length = struct.unpack("iIII", data[:16])[3]
            name = data[16 : 16 + length].rstrip(b"\0").decode()
            if name:
                self.counts[name] += 1
            data = data[16 + length :]


def contents(data_dir: pathlib.Path) -> dict:
    """path -> bytes of the file; for record files the examples, serialised again with their keys in order."""
    from richhf_data import records

    def read(path):
        if ".tfrecord-" not in path.name:
            return path.read_bytes()
        parsed = map(records.tf.train.Example.FromString, records.RandomAccess([path]))
        return [example.SerializeToString(deterministic=True) for example in parsed]

    return {path.relative_to(data_dir): read(path) for path in sorted(data_dir.rglob("*")) if path.is_file()}


def run(folder: pathlib.Path, data_dir: pathlib.Path, workers: int, num_shards: int, kill_after: int | None = None) -> dict:
    """One build, to its end or killed after `kill_after` finished shards."""
    arguments = [
        sys.executable, "-m", "richhf_data.build", f"--records={folder / 'records'}", f"--data_dir={data_dir}",
        f"--images=parquet:{folder / 'images'}/*.parquet", f"--workers={workers}", "--vocabulary_size=40",
    ]  # fmt: skip
    opened, peaks, seconds, processes = Opened(folder / "images"), collections.Counter(), collections.Counter(), {}
    last = time.monotonic()
    process = psutil.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        resident = []
        for one in (process, *process.children(recursive=True)):
            try:
                resident.append(one.memory_info().rss)
                processes[one.pid] = one
            except psutil.NoSuchProcess:
                pass
        finished = len(list(data_dir.glob("parts/*/*.parquet")))
        opened.update()
        phase = "scan" if opened.counts else "start"
        phase = "dataset" if finished == num_shards or list(data_dir.glob("richhf/*")) else phase
        seconds[phase] += time.monotonic() - last
        last = time.monotonic()
        peaks[phase] = max(peaks[phase], sum(resident))
        if kill_after is not None and finished >= kill_after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    code = process.wait()
    assert code == (0 if kill_after is None else -signal.SIGKILL), process.stderr.read().decode()
    psutil.wait_procs(processes.values(), timeout=30)
    opened.update()
    finished = {path.name[:4] for path in data_dir.glob("parts/*/*.parquet")}
    return {"seconds": seconds, "peaks": peaks, "opened": {name[:4] for name in opened.counts}, "finished": finished}


def main():
    args = flags.FLAGS
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        generate(folder, args.shards, args.megabytes, args.rows_per_group)
        size = sum(path.stat().st_size for path in (folder / "images").iterdir())
        runs = {
            "uninterrupted": run(folder, folder / "whole", args.workers, args.shards),
            "killed half way": run(folder, folder / "killed", args.workers, args.shards, kill_after=args.shards // 2),
        }
        runs["resumed"] = run(folder, folder / "killed", args.workers, args.shards)
        again = runs["resumed"]["opened"] & runs["killed half way"]["finished"]
        outputs = [contents(folder / "whole"), contents(folder / "killed")]
    rows = [
        {
            "": name,
            "s, before the scan": one["seconds"]["start"],
            "s, scan": one["seconds"]["scan"],
            "s, dataset": one["seconds"]["dataset"],
            "shards opened": len(one["opened"]),
            "peak MiB, scan": one["peaks"]["scan"] / 2**20,
            "peak MiB, dataset": one["peaks"]["dataset"] / 2**20 if "dataset" in one["peaks"] else None,
        }
        for name, one in runs.items()
    ]
    print(tabulate.tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"))
    print(f"{args.shards} shards, {size / 1e6:.0f} MB, {args.workers} workers")
    print(f"finished before the kill: {len(runs['killed half way']['finished'])}; opened again: {len(again)}")
    names = outputs[0].keys() | outputs[1].keys()
    differing = [str(name) for name in names if outputs[0].get(name) != outputs[1].get(name)]
    print(f"files of a data folder: {len(names)}; different: {', '.join(differing) or 'none'}")
    sys.exit(bool(again or differing))


if __name__ == "__main__":
    ranges.flag("shards", 20, "Number of generated shards.", ranges.COUNT)
    ranges.flag("megabytes", 500, "Size of all shards together.", ranges.COUNT)
    ranges.flag("rows_per_group", 25, "Rows of a row group; a row has two images.", ranges.COUNT)
    ranges.flag("workers", 2, "The build's --workers.", ranges.PROCESSES)
    command.run(main)
