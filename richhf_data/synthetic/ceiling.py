"""Reference results: the metrics of the noise-free truth (the ceiling of any model) and of one annotator as predictors."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from richhf_data import consolidate, keywords, metrics
from richhf_data.synthetic import annotators, example

CEILING, ONE_ANNOTATOR = "ceiling (noise-free latents)", "one annotator vs the others"
MAP_SIZE = 64  # pixels of the compared heatmaps


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the references need of one example, without its picture. Each pair is (target, prediction)."""

    ceiling: tuple[dict, dict]
    annotator: tuple[dict, dict]


def evidence(drawn: example.Example, size: int = MAP_SIZE) -> Evidence:
    """The two pairs of one example, maps at `size` pixels."""
    tokens = keywords.tokenize(drawn.prompt)

    def target(annotations):
        return consolidate.consolidate(annotations, drawn.prompt, size) | {"prompt": drawn.prompt}

    first, *others = drawn.annotations
    alone = consolidate.consolidate([first], drawn.prompt, size)
    return Evidence(
        ceiling=(
            target(drawn.annotations),
            {
                "scores": drawn.latents.astype(np.float32),
                "heatmaps": annotators.expected_heatmaps(drawn.regions, size),
                "labelled_prompt": keywords.label_prompt(tokens, drawn.word_labels),
            },
        ),
        annotator=(
            target(others),
            {
                "scores": alone["scores"],
                "heatmaps": alone["heatmaps"].astype(np.float32) / 255,
                "labelled_prompt": keywords.label_prompt(tokens, alone["labels"]),
            },
        ),
    )


def references(found: Sequence[Evidence]) -> dict[str, dict[str, float]]:
    """The metrics (`metrics.evaluate`) of both references, by their rows' names."""
    pairs = {CEILING: [one.ceiling for one in found], ONE_ANNOTATOR: [one.annotator for one in found]}
    return {name: metrics.evaluate(*map(list, zip(*rows, strict=True))) for name, rows in pairs.items()}
