"""The tables of benchmarks.errors: of a critic that knows the truth, and of one that is blind to some flaws."""

import functools

import numpy as np
import pytest

from benchmarks import errors
from richhf_data import keywords, synthetic
from richhf_data.synthetic import flaws


@functools.cache
def drawn():
    return list(synthetic.examples("test", 150, 0, 64, 32))


def knowing(example, blind=()):
    """The prediction of a critic that knows the exact truth but for flaws of some kinds."""
    scores = list(example.latents)
    for place, score in enumerate(errors.SCORES):
        scores[place] = 1 - sum(cost for kind, cost in errors.flaws_of(example, score) if kind not in blind)
    maps = np.zeros((32, 32, 2), np.float32)
    labels = np.ones(len(example.word_labels), int)
    for region in example.regions:
        if region.kind not in blind:
            maps[..., region.heatmap] = np.maximum(maps[..., region.heatmap], region.mask.reshape(32, 2, 32, 2).max((1, 3)))
    for fact in example.picture.wrong:
        labels[example.picture.prompt.facts[fact]] = fact.kind in blind
    return {
        "scores": np.array(scores),
        "heatmaps": maps,
        "labelled_prompt": keywords.label_prompt(keywords.tokenize(example.prompt), labels),
    }


@pytest.mark.parametrize("blind", [(), ("blur", "colour")])
def test_a_critic_sees_all_flaws_but_those_that_it_is_blind_to(blind):
    rows = [knowing(example, blind) for example in drawn()]
    for score, kinds in zip(errors.SCORES, (flaws.ARTIFACTS, tuple(flaws.FACT_COST)), strict=True):
        for line in errors.table_of_flaws(score, kinds, drawn(), rows, str):
            sees = line[score] not in blind
            assert line["cost seen, critic"].lstrip("-") == ("1.00 ± 0.00" if sees else "0.00 ± 0.00"), line
            labels, error = map(float, line["cost seen, labels"].split(" ± "))
            assert 0.5 < labels < 1.4 and 0 < error < 0.3
            if line["heat, critic"]:
                assert float(line["heat, critic"]) > 0.8 if sees else float(line["heat, critic"]) < 0.5, line
                assert float(line["heat, labels"]) > 0.1
            if score == "alignment":
                assert line["words, critic"] == ("1.00" if sees else "0.00") and float(line["words, labels"]) > 0.6


def test_the_table_of_scenes_has_the_correlations_of_each_group():
    found = errors.table_of_scenes(drawn(), [{"scores": example.latents} for example in drawn()])
    assert found[0]["pictures"] == "100.0%" and [line["scenes"] for line in found][-2:] == [
        "a prompt of one group",
        "of two",
    ]
    for line in found:
        assert line["PLCC plausibility"] == line["plausibility, ceiling"] > "0.7"
        assert line["PLCC alignment"] == line["alignment, ceiling"] > "0.7"
