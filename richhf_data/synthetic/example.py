"""A complete example of RichHF-Synth: prompt, picture, annotations, consolidated targets, and the exact truth."""

import dataclasses
from collections.abc import Iterator, Mapping, Set

import numpy as np

from richhf_data import consolidate, schema
from richhf_data.errors import UserError
from richhf_data.synthetic import annotators, flaws, grammar, render

FAR = 2**40  # no run draws so many examples


@dataclasses.dataclass(frozen=True)
class Example:
    """uid, prompt, image, scores, heatmaps and labels are those of a decoded example (`schema`); the rest is the truth.

    Attributes:
      annotations: of the three annotators.
      latents: float64[4] in [0, 1], order schema.SCORES: the exact scores.
      regions: of each error, at the size of the image.
      word_labels: int32[tokens], exact.
      picture: the plan that the renderer drew.
    """

    uid: str
    prompt: str
    image: np.ndarray
    scores: np.ndarray
    heatmaps: np.ndarray
    labels: np.ndarray
    annotations: list[consolidate.Annotation]
    latents: np.ndarray
    regions: list[render.Region]
    word_labels: np.ndarray
    picture: flaws.Picture

    @property
    def region_maps(self) -> np.ndarray:
        """uint8[H, W, 2], 0 or 255, order schema.HEATMAPS: the exact regions."""
        return render.union(self.regions, self.image.shape[0])

    def decoded(self) -> dict:
        """The example as `schema` describes it, without the truth."""
        return {
            "uid": self.uid,
            "prompt": self.prompt,
            "image": self.image,
            "scores": self.scores,
            "heatmaps": self.heatmaps,
            "labels": self.labels,
            "score_mask": np.ones(len(schema.SCORES), bool),
            "heatmap_mask": np.ones(len(schema.HEATMAPS), bool),
        }


def _split_number(split: str) -> int:
    if split not in grammar.SPLITS:
        raise UserError(f"split: got {split!r}, expected one of {grammar.SPLITS}")
    return grammar.SPLITS.index(split)


def draw_prompt(seed: int, index: int, split: str) -> grammar.Prompt:
    """The prompt of example `index`; a function of the arguments."""
    return grammar.sample(np.random.default_rng((seed, _split_number(split), index)), split)


def scenes(seed: int, counts: Mapping[str, int]) -> frozenset[grammar.Scene]:
    """What the prompts of the first examples of splits describe; draws no picture. counts: split -> how many examples."""
    return frozenset(draw_prompt(seed, i, split).scene for split, count in counts.items() for i in range(count))


def kept_index(seed: int, index: int, split: str, left_out: Set[grammar.Scene]) -> int:
    """The index of the example that takes the place of `index`: another one if its scene is left out.

    It is the first of index, index + FAR, index + 2 * FAR, ... whose scene is not left out: a function of the arguments.
    """
    while left_out and draw_prompt(seed, index, split).scene in left_out:
        index += FAR
    return index


def _plan(seed: int, index: int, split: str, take: int = 0, right: bool = False) -> flaws.Picture:
    prompt = draw_prompt(seed, index, split)
    return flaws.plan(np.random.default_rng((seed, _split_number(split), index, 1, take)), prompt, split, right)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 16:
            raise UserError(f"{name}: got {size}, expected at least 16 pixels")


def draw(seed: int, index: int, split: str, image_size: int, map_size: int, take: int = 0) -> Example:
    """Draws one example; a function of the arguments.

    Args:
      seed, index: at least 0; each index of a split is a different example.
      split: of grammar.SPLITS.
      image_size, map_size: pixels, both sides.
      take: each number is a different picture of the same prompt, with its own errors and annotations.

    Raises:
      UserError: an unknown split, or a size below 16 pixels.
    """
    _check_sizes(image_size=image_size, map_size=map_size)
    picture = _plan(seed, index, split, take)
    prompt = picture.prompt
    image, regions = render.render(picture, image_size)
    word_labels = render.wrong_labels(picture)
    annotations = annotators.annotate(np.random.default_rng((picture.seed, 4)), picture, regions, word_labels)
    targets = consolidate.consolidate(annotations, prompt.text, map_size)
    return Example(
        uid=f"synth-{seed}-{split}-{index:07d}" + (f"-{take}" if take else ""),
        prompt=prompt.text,
        image=image,
        scores=targets["scores"],
        heatmaps=targets["heatmaps"],
        labels=targets["labels"],
        annotations=annotations,
        latents=np.array(picture.latents),
        regions=regions,
        word_labels=word_labels,
        picture=picture,
    )


def draw_captioned(seed: int, index: int, split: str, image_size: int, map_size: int) -> dict:
    """A decoded example (`schema`) of a captioning dataset: a picture that is as a prompt says, and this prompt as caption.

    It has artifacts, and no feedback. Arguments and errors: as those of `draw`.
    """
    _check_sizes(image_size=image_size, map_size=map_size)
    picture = _plan(seed, index, split, right=True)
    return {
        "uid": f"synth-{seed}-{split}-{index:07d}-caption",
        "prompt": schema.CAPTION_PROMPT,
        "image": render.render(picture, image_size)[0],
        "scores": np.zeros(len(schema.SCORES), np.float32),
        "heatmaps": np.zeros((map_size, map_size, len(schema.HEATMAPS)), np.uint8),
        "labels": None,
        "score_mask": np.zeros(len(schema.SCORES), bool),
        "heatmap_mask": np.zeros(len(schema.HEATMAPS), bool),
        "caption": picture.prompt.text,
    }


def examples(split: str, count: int, seed: int, image_size: int, map_size: int) -> Iterator[Example]:
    """The first `count` examples of a split."""
    for index in range(count):
        yield draw(seed, index, split, image_size, map_size)


def train_prompts(count: int, seed: int, left_out: Set[grammar.Scene] = frozenset()) -> Iterator[str]:
    """The texts of the first `count` train prompts, for a vocabulary; draws no picture. left_out: see `kept_index`."""
    for index in range(count):
        yield draw_prompt(seed, kept_index(seed, index, "train", left_out), "train").text
