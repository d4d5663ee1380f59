"""Sorts pictures into the categories of paper A with CLIP, for `python -m richhf_data.annotate choose`.

    python -m rahf.reward.categories --clip=DIR --images=TABLE --output=FILE.jsonl

writes the table again with two more columns:

  category        human, animal, object, indoor scene or outdoor scene
  photorealistic  true or false

The paper asks a visual question answering model (section 8). Here it is zero-shot classification: the name whose texts are
nearest to the picture, by the mean cosine of CLIP's embeddings. DIR is a folder of `rahf.convert --source=clip-hf`, TABLE as
in `richhf_data.annotate.choose`.
"""

import collections
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import flags
from tabulate import tabulate
from tqdm.auto import tqdm

from rahf.reward import embed
from richhf_data import command
from richhf_data.annotate.choose import CATEGORIES, CATEGORY, PHOTOREALISTIC, PictureTable

TEXTS = {
    "human": ("a photo of a person", "a picture of people", "a portrait of a man or a woman"),
    "animal": ("a photo of an animal", "a picture of an animal"),
    "object": ("a photo of an object", "a picture of a thing", "a product photo"),
    "indoor scene": ("a photo of an indoor scene", "a picture of a room", "the inside of a building"),
    "outdoor scene": ("a photo of an outdoor scene", "a picture of a landscape", "a view of a city"),
}
STYLES = {
    "photo": ("a photo", "a photograph", "a realistic photo"),
    "other": ("a drawing", "a painting", "a cartoon", "a 3D render", "digital art"),
}
assert tuple(TEXTS) == CATEGORIES


def zero_shot(embed_texts: Callable, texts: Mapping[str, Sequence[str]]) -> Callable[[np.ndarray], list[str]]:
    """A function of embeddings of pictures, float32[B, E]: for each the name with the highest mean cosine of its texts.

    Args:
      embed_texts: texts -> float32[n, E] of unit length. texts: name -> its texts.
    """
    means = np.stack([embed_texts(every).mean(axis=0) for every in texts.values()])  # [names, E]
    return lambda embeddings: [tuple(texts)[place] for place in (embeddings @ means.T).argmax(axis=1)]


def classify(clip: embed.Clip, table: PictureTable) -> None:
    """Adds the columns category and photorealistic to the rows of a table. Raises UserError for what is no picture."""
    category_of, style_of = zero_shot(clip.texts, TEXTS), zero_shot(clip.texts, STYLES)
    with tqdm(total=len(table.rows), desc="categories", unit="picture", dynamic_ncols=True) as bar:
        for rows, pictures in table.batches():
            embeddings = clip.images(pictures, [row["image"] for row in rows])
            for row, category, style in zip(rows, category_of(embeddings), style_of(embeddings), strict=True):
                row |= {CATEGORY: category, PHOTOREALISTIC: style == "photo"}
            bar.update(len(rows))


def main() -> None:
    """The command."""
    args = flags.FLAGS
    table = PictureTable(args.images)
    output = table.checked_output(args.output)
    classify(embed.Clip(args.clip), table)
    table.write(table.rows, output)
    every = collections.Counter(row[CATEGORY] for row in table.rows)
    photos = collections.Counter(row[CATEGORY] for row in table.rows if row[PHOTOREALISTIC])
    print(tabulate([(name, every[name], photos[name]) for name in CATEGORIES], ("", "pictures", "photorealistic")))
    print(f"{output}: {len(table.rows)} pictures")


if __name__ == "__main__":
    flags.DEFINE_string("clip", None, "A folder of rahf.convert --source=clip-hf.")
    flags.DEFINE_string("images", None, "Table of pictures and prompts: .jsonl, .parquet, or a folder with images.jsonl.")
    flags.DEFINE_string("output", None, "The .jsonl file to write.")
    flags.mark_flags_as_required(["clip", "images", "output"])
    command.run(main)
