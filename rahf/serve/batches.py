"""One queue for the pictures of all requests, and the thread that predicts them in batches."""

import asyncio
import collections
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from rahf.serve.scoring import Row, Scorer


class Batches:
    """The queue and its thread.

    A batch takes what waits, see `Scorer.take`; before a small batch, the first row waits up to `wait` seconds for others.
    While the devices compute a batch, the next one is handed to them if it is full.

    Args:
      observe: called in the event loop with the rows and the seconds of each batch.
    """

    def __init__(self, scorer: Scorer, wait: float, observe: Callable[[int, float], None] = lambda rows, seconds: None):
        self._scorer, self._wait, self._observe = scorer, wait, observe
        self._rows, self._changed, self._closed = collections.deque(), threading.Condition(), False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    async def predict(self, rows: Sequence[Row]) -> list:
        """The outcomes of rows, see `Row.future`."""
        for row in rows:
            row.future = self._loop.create_future()
        with self._changed:
            self._rows.extend(rows)
            self._changed.notify()
        return await asyncio.gather(*(row.future for row in rows), return_exceptions=True)

    def close(self) -> None:
        """Ends the thread when the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        begun = None
        while (rows := self._take(only_full=begun is not None)) is not None:
            now = time.monotonic()
            try:
                next_one = (rows, self._scorer.begin(rows), now) if rows else None
            except Exception as error:
                next_one = None
                self._fail(rows, error)
            if begun:
                self._finish(*begun)
            begun = next_one

    def _take(self, only_full: bool) -> list[Row] | None:
        """The rows of the next batch; none if `only_full` and it is not full; None when the queue has ended."""
        most = self._scorer.most
        with self._changed:
            if only_full:
                return self._popped() if len(self._rows) >= most else []
            while not self._rows and not self._closed:
                self._changed.wait()
            end = time.monotonic() + self._wait
            while len(self._rows) < most and not self._closed and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._popped() if self._rows or not self._closed else None

    def _popped(self) -> list[Row]:
        """The next rows, without those whose request was given up; maybe none."""
        count = self._scorer.take(len(self._rows)) if self._rows else 0
        return [row for row in (self._rows.popleft() for _ in range(count)) if not row.future.cancelled()]

    def _finish(self, rows: Sequence[Row], begun, start: float) -> None:
        try:
            outcomes = self._scorer.finish(begun)
        except Exception as error:
            self._fail(rows, error)
        else:
            self._loop.call_soon_threadsafe(self._deliver, rows, outcomes, time.monotonic() - start)

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        traceback.print_exception(error)
        self._loop.call_soon_threadsafe(self._deliver, rows, [error] * len(rows), 0.0)

    def _deliver(self, rows: Sequence[Row], outcomes: Sequence, seconds: float) -> None:
        self._observe(len(rows), seconds)
        for row, outcome in zip(rows, outcomes, strict=True):
            if row.future.done():  # its request was given up
                continue
            if isinstance(outcome, Exception):
                row.future.set_exception(outcome)
            else:
                row.future.set_result(outcome)
