"""Scans an image source for wanted uids: each shard becomes a part file with its wanted images, and `Found` indexes them.

A part appears under its name when it is complete, so that the next run skips the shards whose parts exist. The function
`scan` does the work: in this process, in worker processes, or in an Apache Beam pipeline.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import multiprocessing
import shlex
from collections.abc import Callable, Collection, Iterator

import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from richhf_data import image_sources, images, input_files, keywords, parquet, paths
from richhf_data.errors import UserError
from richhf_data.workers import start_worker

_FORMAT = 3  # of the parts; a change of it, or of what images.py does to a picture, needs another number
_SCHEMA = pyarrow.schema(
    [
        ("uid", pyarrow.string()),
        ("caption", pyarrow.string()),
        ("image", pyarrow.binary()),  # empty if an earlier row of the part has the image
        ("changes", pyarrow.string()),
        ("fault", pyarrow.string()),  # why the row cannot be used, or empty
        ("look", pyarrow.binary()),  # the thumbnail of `images.plain`
    ]
)
_BYTES_AT_ONCE = 8 << 20
_AHEAD = 2  # shards per worker that are submitted
_NAMED = 5  # how many faulty shards an error names


def scan(shard, wanted: Collection[str], folder: str, max_pixels: int, advance: Callable[[int], object] = lambda n: None):
    """Reads one `image_sources.Shard` and writes its part to `folder`. Calls `advance` with the number of bytes read."""
    with (
        paths.writing_url(_part(folder, shard)) as file,
        pyarrow.parquet.ParquetWriter(file, _SCHEMA, compression="NONE", write_page_checksum=True) as out,
    ):
        rows, size = [], 0
        for row in _rows(shard.read(wanted, advance), max_pixels):
            rows.append(row)
            size += len(row["image"])
            if size > _BYTES_AT_ONCE:
                out.write_table(pyarrow.Table.from_pylist(rows, _SCHEMA))
                rows, size = [], 0
        out.write_table(pyarrow.Table.from_pylist(rows, _SCHEMA))


def _rows(found: Iterator[image_sources.Row], max_pixels: int) -> Iterator[dict]:
    """Rows of `_SCHEMA`, without exact repetitions."""
    seen, have = set(), set()
    for uid, caption, encoded in found:
        encoded = encoded or b""
        content = hashlib.sha256(encoded).digest()
        if (uid, caption, content) in seen:
            continue
        seen.add((uid, caption, content))
        row = {"uid": uid, "caption": caption or "", "image": b"", "changes": "", "fault": "", "look": b""}
        try:
            if not (caption and caption.strip()):
                raise UserError("no caption")
            image, row["changes"], row["look"] = images.plain(encoded, max_pixels)
        except UserError as error:
            yield row | {"fault": str(error)}
            continue
        yield row if uid in have else row | {"image": image}
        have.add(uid)


class Found:
    """An index of part files: the images of a source by uid.

    Attributes:
      faults: {uid: reason} of the uids that have images, but no usable one.
      ambiguous: {uid: reason} of the uids with two different pictures or captions. They are not used, because it is
        unknown which one the annotators saw.
      changes: {uid: what `images.plain` changed}.
    """

    def __init__(self):
        self.faults, self.ambiguous, self.changes = {}, {}, {}
        self._where, self._first = {}, {}  # uid -> part; uid -> (tokens of its caption, thumbnail)

    def __len__(self) -> int:
        """The number of uids with a usable image, ambiguous ones included."""
        return len(self._where)

    def add(self, part: str) -> None:
        """Indexes a part. If an earlier part has a uid too, the image of the earlier part counts."""
        with _opened(part) as rows:
            table = rows.read([name for name in _SCHEMA.names if name != "image"])
        for row in table.to_pylist():
            uid = row["uid"]
            if row["fault"]:
                if uid not in self._where:
                    self.faults.setdefault(uid, row["fault"])
                continue
            tokens = keywords.tokenize(row["caption"])
            if uid not in self._where:
                self.faults.pop(uid, None)
                self._where[uid], self._first[uid] = part, (tokens, row["look"])
                if row["changes"]:
                    self.changes[uid] = row["changes"]
            elif tokens != self._first[uid][0]:
                self.ambiguous.setdefault(uid, "two captions")
            elif not images.same_picture(row["look"], self._first[uid][1]):
                self.ambiguous.setdefault(uid, "two pictures")

    def read(self, uids: Collection[str]) -> Iterator[tuple[str, str, bytes]]:
        """Yields (uid, caption, encoded image) of those of `uids` that were found, once each; holds a few in memory."""
        wanted = collections.defaultdict(set)
        for uid in uids:
            if uid in self._where and uid not in self.ambiguous:
                wanted[self._where[uid]].add(uid)
        for part in dict.fromkeys(self._where.values()):
            if not wanted[part]:
                continue
            with _opened(part) as rows:
                for batch in rows.iter_batches(16, columns=["uid", "caption", "image"]):
                    for row in batch.to_pylist():
                        if row["uid"] in wanted[part] and row["image"]:
                            wanted[part].discard(row["uid"])
                            yield row["uid"], row["caption"], row["image"]


@contextlib.contextmanager
def _opened(part: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A part file, open to be read. Raises UserError if it is damaged."""
    try:
        filesystem, path = input_files.open_url(part)
        with (
            filesystem.open(path) as file,
            pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as rows,
        ):
            yield rows
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # of the machine, not of the file
            raise
        raise UserError(f"images: {part} is damaged ({error}); delete it and run the command again") from error


def gather(
    spec: str,
    wanted: Collection[str],
    parts: str,
    *,
    columns: dict[str, str] | None = None,
    max_pixels: int = images.MAX_PIXELS,
    workers: int = 0,
    beam: str | None = None,
) -> tuple[Found, str]:
    """Scans a source for the wanted uids; resumes an earlier scan for the same uids.

    Shards are used in their order, until every uid is found. The result is the same for any number of workers and
    interruptions. The remaining shards are not read, and their number is printed: if one of them has another picture or
    caption of a uid, the uid does not become ambiguous.

    Args:
      spec, columns: see image_sources.py.
      parts: a folder, or a URL that fsspec knows, for the folder of the part files.
      max_pixels: larger images are scaled down.
      workers: number of processes; 0 = this process.
      beam: options of an Apache Beam pipeline ("--runner=..."), which then reads all shards; its workers and this process
        must see `parts`.

    Returns:
      the images, and the folder of the part files, which must exist while the images are read.

    Raises:
      UserError: what image_sources.py refuses, for the first faulty shards; no wanted uid is in the source.
    """
    wanted = frozenset(wanted)
    shards = image_sources.shards(spec, wanted, columns)
    what = json.dumps([_FORMAT, sorted(wanted), columns, max_pixels])
    folder = f"{str(parts).rstrip('/')}/{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    filesystem, path = parquet.open_url("parts", folder)
    filesystem.makedirs(path, exist_ok=True)
    todo = [shard for shard in shards if not filesystem.exists(_part(path, shard))]
    _check(todo)
    if len(todo) < len(shards):
        print(f"images: {len(shards) - len(todo)} of {len(shards)} shards were read before")
    job = functools.partial(scan, wanted=wanted, folder=folder, max_pixels=max_pixels)
    if beam is not None:
        _run_pipeline(todo, job, beam)
        todo = []
    found, looked = Found(), 0
    left = {shard.name for shard in todo}
    total = sum(shard.size for shard in todo)
    with tqdm(total=total, desc="images", unit="B", unit_scale=True, disable=not todo) as bar:
        scanned = _scanned(shards, left, job, workers, bar)
        for shard in scanned:
            looked += 1
            found.add(_part(folder, shard))
            bar.set_postfix_str(f"{len(found)} of {len(wanted)} found")
            if len(found) == len(wanted):
                break
        scanned.close()
    if looked < len(shards):
        print(f"images: all found; {len(shards) - looked} of {len(shards)} shards were not read")
    if not found and not found.faults:
        raise UserError(
            f"images: {spec!r} has none of the {len(wanted)} uids, expected such as {_some(wanted)}; got such as "
            f"{_some(shards[0].sample())}; point --images at the right images, or --columns=uid=NAME at the right column"
        )
    return found, folder


def remove(folder: str) -> None:
    """Removes a folder of part files, and its parent folder if that is empty then."""
    filesystem, path = input_files.open_url(folder)
    filesystem.rm(path, recursive=True)
    parent = path.rpartition("/")[0]
    if filesystem.exists(parent) and not filesystem.ls(parent):
        filesystem.rmdir(parent)


def _check(todo) -> None:
    faults = []
    for shard in todo:
        try:
            shard.check()
        except UserError as error:
            faults.append(str(error))
    if faults:
        more = f"\n  and {len(faults) - _NAMED} more faulty files" if len(faults) > _NAMED else ""
        raise UserError("\n  ".join(faults[:_NAMED]) + more)


def _scanned(shards, left: set[str], job, workers: int, bar) -> Iterator:
    """Yields each shard in order as soon as its part exists; scans those named in `left`."""
    if not workers or not left:
        for shard in shards:
            if shard.name in left:
                job(shard, advance=bar.update)
            yield shard
        return
    context = multiprocessing.get_context("spawn")
    with paths.naming("/dev/shm"):  # their semaphores
        counter = context.Value("q", 0)
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, len(left)), mp_context=context, initializer=_start_worker, initargs=(job, counter)
        )
    try:
        ahead, waiting = collections.deque(), iter(shards)
        while True:
            while len(ahead) < _AHEAD * workers and (shard := next(waiting, None)) is not None:
                ahead.append((shard, pool.submit(_work, shard) if shard.name in left else None))
            if not ahead:
                return
            shard, future = ahead.popleft()
            while future is not None and not future.done():
                concurrent.futures.wait([future], timeout=0.5)
                bar.update(counter.value - bar.n)
            if future is not None:
                future.result()
            yield shard
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "images: a worker process died, most likely for want of memory; run the command again with fewer --workers "
            f"(now {workers}), and it resumes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(job, counter) -> None:
    start_worker()

    def advance(count):
        with counter.get_lock():
            counter.value += count

    _work.job = functools.partial(job, advance=advance)


def _work(shard) -> None:
    _work.job(shard)


def _run_pipeline(shards, job, options: str) -> None:
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("beam: Apache Beam is not installed; pip install 'rahf[beam]'") from error
    with apache_beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        _ = pipeline | apache_beam.Create(shards) | apache_beam.Reshuffle() | apache_beam.Map(job)


def _part(folder: str, shard) -> str:
    return f"{folder}/{shard.name}.parquet"


def _some(uids) -> str:
    return ", ".join(sorted(uids)[:_NAMED]) or "none"
