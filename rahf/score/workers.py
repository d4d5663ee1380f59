"""Worker processes: each reads, decodes and writes one shard at a time, so that this process only feeds the devices."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

from rahf.score import parts
from richhf_data import paths, vocabulary
from richhf_data.errors import UserError
from richhf_data.workers import start_worker

_AHEAD = 2  # batches that a worker has decoded before they are asked for


class _Shards:
    """What a worker holds: the shard that it reads, and of this and earlier ones the rows that are not yet written."""

    def __init__(self, job: parts.Job):
        self._job, self._written = job, vocabulary.of(job.vocabulary).written
        self._index, self._left = None, iter(())  # the shard that is read
        self._heads, self._waiting, self._found = {}, {}, {}  # number of a shard -> header, batches to predict, rows

    def next(self, index: int, shard) -> parts.Batch | None:
        """The next batch of a shard; None at its end, and at once if its part is done."""
        if index != self._index:
            head = parts.header(self._job, shard)
            self._index, self._left = index, iter(())
            if not parts.is_done(self._job, index, head):
                self._left = parts.batches(self._job, shard)
                self._heads[index], self._waiting[index], self._found[index] = head, collections.deque(), []
        if (batch := next(self._left, None)) is not None:
            self._waiting[index].append(parts.Batch(batch.names, batch.prompts, {}, {}, {}))
        return batch

    def predicted(self, index: int, predictions: parts.Predictions) -> None:
        """Takes the predictions of the first batch that waits for them."""
        batch = self._waiting[index].popleft()
        self._found[index].append(parts.rows(self._job, batch, predictions, self._written))

    def write(self, index: int) -> None:
        """Writes the part of a shard whose batches are all predicted."""
        assert not self._waiting.pop(index)
        parts.write(self._job, index, self._heads.pop(index), self._found.pop(index))


_shards = None  # of a worker process


def _start(job: parts.Job) -> None:
    global _shards
    start_worker()
    _shards = _Shards(job)


def _call(name: str, *arguments):
    return getattr(_shards, name)(*arguments)


class Worker:
    """One worker process; or this process itself. `call` takes the name of a method of `_Shards`."""

    def __init__(self, job: parts.Job, own_process: bool):
        self._pool, self._here = None, None if own_process else _Shards(job)
        if own_process:
            with paths.naming("/dev/shm"):  # its semaphores
                context = multiprocessing.get_context("spawn")
                self._pool = concurrent.futures.ProcessPoolExecutor(1, context, initializer=_start, initargs=(job,))

    def call(self, name: str, *arguments) -> concurrent.futures.Future:
        """Begins a call. Calls are done in their order."""
        if self._pool is not None:
            return self._pool.submit(_call, name, *arguments)
        done = concurrent.futures.Future()
        try:
            done.set_result(getattr(self._here, name)(*arguments))
        except Exception as error:  # of a shard: its result raises it
            done.set_exception(error)
        return done

    def close(self) -> None:
        """Ends the process, after the call that it has begun."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def started(job: parts.Job, count: int) -> Iterator[list[Worker]]:
    """Starts worker processes; none: this process does their work. UserError if one dies in the block."""
    workers = [Worker(job, own_process=count > 0) for _ in range(max(count, 1))]
    try:
        yield workers
    except BrokenProcessPool as error:
        raise UserError(
            "images: a worker process died, most likely for want of memory; run the command again with fewer --workers "
            f"(now {count}), and it resumes"
        ) from error
    finally:
        for worker in workers:
            worker.close()


def read(workers: list[Worker], shards: Iterable[tuple[int, object]]) -> Iterator[tuple[Worker, int, parts.Batch | None]]:
    """Yields (worker, number of the shard, batch) as batches are decoded; the batch None at the end of each shard.

    Each worker reads one shard at a time, and shards are begun in their order. A shard whose part is done yields None alone.
    """
    shards = iter(shards)
    busy = {}  # worker -> the shard that it reads, and the calls that are not done
    for worker in workers:
        _begin(worker, shards, busy)
    while busy:
        heads = {calls[0]: worker for worker, (_, _, calls) in busy.items()}
        done, _ = concurrent.futures.wait(heads, return_when=concurrent.futures.FIRST_COMPLETED)
        for worker in [worker for call, worker in heads.items() if call in done]:
            index, shard, calls = busy[worker]
            batch = calls.popleft().result()
            if batch is None:
                _begin(worker, shards, busy)
            else:
                calls.append(worker.call("next", index, shard))
            yield worker, index, batch


def _begin(worker: Worker, shards: Iterator, busy: dict) -> None:
    """Lets a worker read the next shard, if there is one."""
    busy.pop(worker, None)
    if (numbered := next(shards, None)) is not None:
        calls = collections.deque(worker.call("next", *numbered) for _ in range(_AHEAD))
        busy[worker] = (*numbered, calls)
