"""Pictures of RichHF-Synth that show exactly what a prompt says, with captions that are wrong at a known rate.

A table of pictures is a .parquet file with the columns prompt, image (a PNG) and shown: the prompt that describes
the picture completely and correctly.
"""

import concurrent.futures
import functools
import io
import multiprocessing
import os
import pathlib
import zlib

import cv2
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from rahf.reward import prompts
from richhf_data import paths
from richhf_data.synthetic import flaws, grammar, layout, render, stream

SIZE = 32  # pixels, both sides
OVERSAMPLING = 2  # factor of the size at which a picture is rendered, before it is averaged
WRONG_RATE = 0.15  # of each category that a caption names, the share that is wrong
WORDS = prompts.Words(  # words of RichHF-Synth whose pictures differ clearly at 32 pixels
    count=grammar.NUMBERS[:4],
    colour=("red", "yellow", "green", "blue", "purple", "pink", "white"),
    thing=("cat", "fish/fish", "butterfly/butterflies", "mushroom", "house", "car", "rocket", "cup"),
    background=("in the forest", "in the city", "in the desert", "in the snow", "on the moon", "in the sea"),
)
KINDS = tuple(  # the categories that a caption may name
    tuple(name for i, name in enumerate(("count", "colour", "background")) if bits >> i & 1) + ("thing",)
    for bits in range(1, 8)
)
_BACKGROUND = {wording.replace("*", ""): name for name, wording in grammar.BACKGROUNDS.items()}
_FLAWLESS = flaws.Style(0.0, 0.0, 0.0, 0.0)


def draw(
    prompt: prompts.ParsedPrompt, seed, words: prompts.Words = WORDS, size: int = SIZE
) -> tuple[np.ndarray, prompts.ParsedPrompt]:
    """A flawless picture of the prompt; what the prompt leaves open is drawn from the lists. A pure function.

    Args:
      prompt: of words that RichHF-Synth knows. seed: a number, or a tuple of numbers.

    Returns:
      uint8[size, size, 3], and the prompt that describes it completely.
    """
    rng = np.random.default_rng(seed)
    drawn = {name: grammar.pick(rng, getattr(words, name)) for name in prompts.CATEGORIES}
    shown = prompts.ParsedPrompt(**{name: getattr(prompt, name) or word for name, word in drawn.items()})
    group = grammar.Group(shown.thing.partition("/")[0], shown.colour, 1 + grammar.NUMBERS.index(shown.count))
    background = _BACKGROUND[shown.background]
    picture = flaws.Picture(
        prompt=grammar.write(rng, grammar.Scene((group,), None, background)),
        wrong=(),
        objects=layout.arrange(rng, [(0, group)], None),
        background=background,
        artifacts=(),
        style=_FLAWLESS,
        latents=(1.0,) * 4,
        seed=int(rng.integers(2**31)),
    )
    image, _ = render.render(picture, OVERSAMPLING * size)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA), shown


def caption(shown: prompts.ParsedPrompt, kind: tuple[str, ...], wrong_rate: float, seed, words: prompts.Words = WORDS):
    """A prompt that names the categories of `kind` only; each word is replaced by a wrong one at `wrong_rate`."""
    rng, chosen = np.random.default_rng(seed), {}
    for name in prompts.CATEGORIES:
        others = [word for word in getattr(words, name) if word != getattr(shown, name)]
        wrong, other = rng.random() < wrong_rate, grammar.pick(rng, others)
        chosen[name] = (other if wrong else getattr(shown, name)) if name in kind else None
    return prompts.ParsedPrompt(**chosen)


def captioned(
    number: int,
    seed: int,
    wrong_rate: float = WRONG_RATE,
    words: prompts.Words = WORDS,
    size: int = SIZE,
    workers: int | None = None,
) -> pyarrow.Table:
    """`number` random pictures, with captions in which each category is wrong at `wrong_rate`.

    A caption names the thing and some other categories; each combination is equally frequent. Row i depends on the
    arguments other than `number`, and on i.

    Args:
      workers: processes; None = one per core, 0 = none but this one.

    Returns:
      A table of pictures, as the module describes it.
    """
    make = functools.partial(_row, seed=seed, wrong_rate=wrong_rate, words=words, size=size)
    bar = functools.partial(tqdm, desc="pictures", unit="picture", total=number, dynamic_ncols=True)
    if workers == 0:
        return pyarrow.Table.from_pylist(list(bar(map(make, range(number)))))
    context = multiprocessing.get_context("spawn")
    workers = workers or os.cpu_count()
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=stream.start_drawing) as pool:
        return pyarrow.Table.from_pylist(list(bar(pool.map(make, range(number), chunksize=50))))


def _row(i, *, seed, wrong_rate, words, size):
    image, shown = draw(prompts.ParsedPrompt(None, None, None, None), (seed, i), words, size)
    given = caption(shown, KINDS[i % len(KINDS)], wrong_rate, (seed, i, 1), words)
    return {"prompt": prompts.text(given), "image": png(image), "shown": prompts.text(shown)}


def png(image: np.ndarray) -> bytes:
    """A picture, uint8[H, W, 3], encoded."""
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write(table: pyarrow.Table, file) -> None:
    """Writes the table as .parquet; the file appears only when it is complete."""
    encoded = io.BytesIO()
    pyarrow.parquet.write_table(table, encoded, write_page_checksum=True)
    paths.replace(file, encoded.getvalue())


def read(file) -> pyarrow.Table:
    """A table that `write` wrote."""
    return pyarrow.parquet.read_table(pathlib.Path(file), page_checksum_verification=True)


def images(table: pyarrow.Table) -> np.ndarray:
    """uint8[n, size, size, 3], the pictures of a table."""
    return np.stack([np.asarray(PIL.Image.open(io.BytesIO(encoded))) for encoded in table["image"].to_pylist()])


def split_prompts(
    held_out: float = 0.2, words: prompts.Words = WORDS
) -> tuple[list[prompts.ParsedPrompt], list[prompts.ParsedPrompt]]:
    """All prompts of the lists as (training, held out), split by a hash of the text."""
    parts = [], []
    for prompt in words.all():
        parts[zlib.crc32(prompts.text(prompt).encode()) < held_out * 2**32].append(prompt)
    return parts
