"""Pictures with artifacts at a known rate, captions that are wrong at a known rate, and annotations of both.

They have the prompts of `benchmarks.alignment`. A table of pictures is a .parquet file with the columns prompt, image (a
PNG), shown (the prompt that describes the picture completely and correctly) and artifact (whether it has one).
"""

import concurrent.futures
import dataclasses
import functools
import io
import multiprocessing
import pathlib
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from benchmarks.alignment import drawings
from rahf.reward import prompts
from richhf_data import consolidate, keywords, paths, records, schema
from richhf_data.synthetic import annotators, flaws, grammar, layout, render, stream

SIZE = drawings.SIZE
RENDERED = drawings.OVERSAMPLING * SIZE
KINDS = ("noise patch", "nonsense text")  # artifacts that are clearly visible at 32 pixels
RADIUS = (0.15, 0.21)  # of an artifact, as a fraction of the picture
SECOND = 0.15  # the share of pictures with an artifact that have another
STYLE = flaws.Style(0.0, 0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture, uint8[SIZE, SIZE, 3], with all that is known of it.

    Attributes:
      shown: what it shows. caption: what it is said to show.
      regions: of its errors, at RENDERED pixels. picture: as the renderer drew it.
    """

    image: np.ndarray
    shown: prompts.ParsedPrompt
    caption: prompts.ParsedPrompt
    regions: list[render.Region]
    picture: flaws.Picture


def _artifacts(rng: np.random.Generator, rate: float) -> tuple[flaws.Artifact, ...]:
    found = []
    count = (rng.random() < rate) * (1 + (rng.random() < SECOND))
    for _ in range(count):
        (x, y), radius = 0.18 + 0.64 * rng.random(2), RADIUS[0] + (RADIUS[1] - RADIUS[0]) * rng.random()
        severity = flaws._SEVERITY * radius
        found.append(flaws.Artifact(grammar.pick(rng, KINDS), x, y, radius, severity, int(rng.integers(2**31))))
    return tuple(found)


def draw(kind: tuple[str, ...], artifact_rate: float, wrong_rate: float, seed) -> Drawn:
    """A random picture and its caption, which names the categories of `kind`. A pure function."""
    rng, words = np.random.default_rng(seed), drawings.WORDS
    shown = prompts.ParsedPrompt(**{name: grammar.pick(rng, getattr(words, name)) for name in prompts.CATEGORIES})
    caption = drawings.caption(shown, kind, wrong_rate, (*seed, 1))
    background = drawings._BACKGROUND[shown.background]
    group = grammar.Group(shown.thing.partition("/")[0], shown.colour, 1 + grammar.NUMBERS.index(shown.count))
    facts, wrong = {}, []
    for name in kind:  # the token of the caption that states it
        tokens = keywords.tokenize(prompts.text(caption))
        named = 1 + (caption.colour is not None)
        token = {"count": 0, "colour": 1, "thing": named, "background": len(tokens) - 1}[name]
        facts[grammar.Fact(name)] = token
        if getattr(caption, name) != getattr(shown, name):
            wrong.append(grammar.Fact(name))
    artifacts = _artifacts(rng, artifact_rate)
    plausibility = max(0.0, 1 - sum(artifact.severity for artifact in artifacts))
    alignment = max(0.0, 1 - sum(flaws.FACT_COST[fact.kind] for fact in wrong))
    overall = flaws.OVERALL[0] * plausibility + flaws.OVERALL[1] * alignment + flaws.OVERALL[2]
    picture = flaws.Picture(
        prompt=grammar.Prompt(prompts.text(caption), grammar.Scene((group,), None, background), facts),
        wrong=tuple(wrong),
        objects=layout.arrange(rng, [(0, group)], None),
        background=background,
        artifacts=artifacts,
        style=STYLE,
        latents=(plausibility, alignment, 1.0, overall),
        seed=int(rng.integers(2**31)),
    )
    image, regions = render.render(picture, RENDERED)
    image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return Drawn(image, shown, caption, regions, picture)


def _row(i: int, artifact_rate: float, wrong_rate: float, seed: int) -> dict:
    drawn = draw(drawings.KINDS[i % len(drawings.KINDS)], artifact_rate, wrong_rate, (seed, i))
    texts = {"prompt": prompts.text(drawn.caption), "shown": prompts.text(drawn.shown)}
    return texts | {"image": drawings.png(drawn.image), "artifact": bool(drawn.picture.artifacts)}


def _record(i: int, artifact_rate: float, wrong_rate: float, seed: int) -> tuple[dict, dict]:
    """The row of one picture, and its raw record without the file's name."""
    drawn = draw(drawings.KINDS[i % len(drawings.KINDS)], artifact_rate, wrong_rate, (seed, i))
    labels, text = render.wrong_labels(drawn.picture), prompts.text(drawn.caption)
    given = annotators.annotate(np.random.default_rng((seed, i, 2)), drawn.picture, drawn.regions, labels)
    record = consolidate.raw_record("", consolidate.consolidate(given, text, schema.RAW_MAP_SIZE))
    return {"prompt": text, "image": drawings.png(drawn.image)}, record


def _drawn(make: Callable, number: int, desc: str) -> Iterator:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context, initializer=stream.start_drawing) as pool:
        yield from tqdm(pool.map(make, range(number), chunksize=50), desc=desc, total=number, dynamic_ncols=True)


def table(number: int, seed: int, artifact_rate: float, wrong_rate: float) -> pyarrow.Table:
    """`number` random pictures as a table. Row i depends on the other arguments and on i."""
    make = functools.partial(_row, artifact_rate=artifact_rate, wrong_rate=wrong_rate, seed=seed)
    return pyarrow.Table.from_pylist(list(_drawn(make, number, "pictures")))


def write_annotated(output, split: str, number: int, seed: int, rates: tuple[float, float], through: Callable) -> None:
    """Writes one split of annotated pictures in the published formats: `split`.tfrecord and images/`split`.parquet.

    Args:
      rates: of artifacts, and of wrong words in each category.
      through: uint8[n, S, S, 3] -> the same, what a generator's decoder makes of them; applied to every second picture.
    """
    output = pathlib.Path(output)
    make = functools.partial(_record, artifact_rate=rates[0], wrong_rate=rates[1], seed=seed)
    rows, raw = map(list, zip(*_drawn(make, number, f"annotate {split}"), strict=True))
    images = half_through(np.stack([np.asarray(PIL.Image.open(io.BytesIO(row["image"]))) for row in rows]), through)
    uids = [f"{split}-{i:06d}" for i in range(number)]
    columns = {"uid": uids, "caption": [row["prompt"] for row in rows], "image": list(map(drawings.png, images))}
    (output / "images").mkdir(parents=True, exist_ok=True)
    drawings.write(pyarrow.table(columns), output / f"images/{split}.parquet")
    named = ({**one, schema.RAW_UID: f"{uid}.png"} for uid, one in zip(uids, raw, strict=True))
    with paths.writing(output / f"{split}.tfrecord") as partial:
        records.write(partial, named)


def half_through(images: np.ndarray, through: Callable) -> np.ndarray:
    """The pictures, every second one passed through `through`."""
    images = images.copy()
    images[1::2] = through(images[1::2])
    return images
