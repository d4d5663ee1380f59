"""Draws endless batches of RichHF-Synth in worker processes, for training without repetition and without TensorFlow."""

import collections
import concurrent.futures
import functools
import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence, Set

import cv2
import numpy as np

from richhf_data import keywords, paths, schema
from richhf_data.errors import UserError
from richhf_data.synthetic import example, grammar
from richhf_data.vocabulary import Vocabulary
from richhf_data.workers import start_worker

AHEAD = 2  # batches per worker that are submitted


def batches(
    batch_size: int,
    *,
    seed: int,
    vocabulary: Vocabulary,
    variant: str,
    image_size: int,
    heatmap_size: int,
    text_length: int,
    keyword_length: int,
    start: int = 0,
    workers: int | None = None,
    split: str = "train",
    rows: Sequence[int] | None = None,
    left_out: Set[grammar.Scene] = frozenset(),
    captions: float = 0.0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches as `schema` describes them, in order, from number `start` on.

    Batch k holds the examples k * batch_size ... (k + 1) * batch_size - 1 of the split: a function of the arguments and k
    alone, whatever the number of workers.

    Args:
      rows: the rows of each batch to draw and yield, in this order; all by default.
      left_out: scenes that no example may have; others take the places of those that do (`example.kept_index`).
      captions: this share of the examples, evenly spread, are captions (`example.draw_captioned`).
      workers: number of processes that draw; None = one per core, 0 = this process. They end with the generator
        (`close`), with this process, and on an error of a worker, which is raised here.

    Raises:
      UserError: a size, split or variant that `example.draw` or `make_batch` refuses.
    """
    draw = functools.partial(
        _batch,
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else [int(row) for row in rows],
        seed=seed,
        split=split,
        left_out=left_out,
        captions=captions,
        vocabulary=vocabulary,
        sizes=(image_size, heatmap_size),
        variant=variant,
        text_length=text_length,
        keyword_length=keyword_length,
    )
    return _drawn(draw, start, os.cpu_count() if workers is None else workers)


def _drawn(draw, start, workers):
    if workers == 0:
        for number in itertools.count(start):
            yield draw(number)
    context = multiprocessing.get_context("spawn")
    with paths.naming("/dev/shm"):  # their semaphores
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_batches, initargs=(draw,)
        )
    try:
        pending = collections.deque(pool.submit(_draw, start + k) for k in range(AHEAD * workers))
        for number in itertools.count(start + AHEAD * workers):
            yield pending.popleft().result()
            pending.append(pool.submit(_draw, number))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def start_drawing() -> None:
    """The initializer of a worker process that draws: calls `start_worker` and sets one OpenCV thread.

    A picture is too small for several threads, and the threads of all workers would compete for the cores.
    """
    start_worker()
    cv2.setNumThreads(1)


def _start_batches(draw) -> None:
    global _draw_batch
    start_drawing()
    _draw_batch = draw


def _draw(number):
    return _draw_batch(number)


def _batch(number, *, batch_size, rows, seed, split, left_out, captions, sizes, **arguments):
    drawn = []
    for place in (number * batch_size + row for row in rows):
        index = example.kept_index(seed, place, split, left_out)
        if math.floor((place + 1) * captions) > math.floor(place * captions):
            drawn.append(example.draw_captioned(seed, index, split, *sizes))
        else:
            drawn.append(example.draw(seed, index, split, *sizes).decoded())
    return make_batch(drawn, **arguments)


def make_batch(
    examples: Sequence[Mapping],
    *,
    vocabulary: Vocabulary,
    variant: str,
    text_length: int,
    keyword_length: int,
) -> dict[str, np.ndarray]:
    """Decoded examples (see `schema`), images and maps at their final sizes, as one batch.

    Raises:
      UserError: a prompt or a labelled prompt has more ids than its length allows.
    """

    def encode(text, length, name):
        if (count := vocabulary.num_ids(text)) > length:
            raise UserError(f"{name}: got {length}, expected at least {count}, the ids of {text!r} and its end; raise it")
        return vocabulary.encode(text, length)

    text_ids, keyword_ids = [], []
    for row in examples:
        texts = schema.task_prompts(row["prompt"], variant)
        text_ids.append(np.stack([encode(text, text_length, "text_length") for text in texts]))
        written = row.get("caption")
        if row["labels"] is not None:
            written = keywords.label_prompt(keywords.tokenize(row["prompt"]), row["labels"])
        if written is None:
            keyword_ids.append(np.zeros(keyword_length, np.int32))
        else:
            keyword_ids.append(encode(written, keyword_length, "keyword_length"))
    stacked = ("image", "scores", "score_mask", "heatmaps", "heatmap_mask")
    return {name: np.stack([row[name] for row in examples]) for name in stacked} | {
        "text_ids": np.stack(text_ids),
        "keyword_ids": np.stack(keyword_ids),
    }
