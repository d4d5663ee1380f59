"""Work in threads, ahead of its use: the host prepares what the device computes next."""

import collections
import concurrent.futures
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator

THREADS = min(8, os.cpu_count())  # each may hold an image of full size


def mapped(function: Callable, items: Iterable, count: int, threads: int = THREADS) -> Iterator:
    """Yields function(item) of each item, in order, computed in threads up to `count` items ahead of their use.

    The items are taken in the caller's thread. An error is raised in its item's turn. Close the generator to end its
    threads: it waits for the items that they have begun.
    """
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            waiting = collections.deque(pool.submit(function, item) for item in itertools.islice(items, count + 1))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def taken(items: Iterable, count: int) -> Iterator:
    """Yields the same items, taken in one thread up to `count` ahead of their use; else as `mapped`."""
    items, end = iter(items), object()
    with contextlib.closing(mapped(lambda items: next(items, end), itertools.repeat(items), count, 1)) as results:
        for item in results:
            if item is end:
                return
            yield item
