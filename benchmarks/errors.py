"""Where a critic's errors on RichHF-Synth sit: which flaws its scores, heatmaps and keywords see, which scenes are hard.

    python -m benchmarks.errors --workdir=synth [--count=1000] [--split=test] [--seed=0]

Each flaw lowers a score by a known cost. A regression of the critic's scores on the costs of each kind of flaw gives the
share of the cost that the critic sees: 1 is all of it, 0 is none. Beside it stands the share that the labels show.
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import tabulate
from absl import flags
from scipy import stats
from tqdm.auto import tqdm

from benchmarks import regression
from rahf import predictor
from richhf_data import command, keywords, ranges, schema, synthetic
from richhf_data.synthetic import flaws

SCORES = ("plausibility", "alignment")  # of artifacts, of wrong facts; heatmaps are in the same order


def mean_heat(heatmap: np.ndarray, mask: np.ndarray) -> float:
    """The mean of a heatmap float[h, w] on a region bool[H, W]."""
    return float(cv2.resize(heatmap, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)[mask].mean())


def flaws_of(example: synthetic.Example, score: str) -> list[tuple[str, float]]:
    """The kind and the cost of each flaw that lowers `score`, of `SCORES`."""
    if score == "plausibility":
        return [(artifact.kind, artifact.severity) for artifact in example.picture.artifacts]
    return [(fact.kind, flaws.FACT_COST[fact.kind]) for fact in example.picture.wrong]


def table_of_flaws(score: str, kinds: Sequence[str], examples, rows, written: Callable[[str], str]) -> list[dict]:
    """A line for each kind of flaw that lowers `score`; `rows` are the predictions (`predictor.Predictor.predict_rows`)."""
    place, heatmap = schema.SCORES.index(score), SCORES.index(score)
    costs = np.zeros((len(examples), len(kinds)))
    heat, words = ({kind: [] for kind in kinds} for _ in range(2))
    for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
        for kind, cost in flaws_of(example, score):
            costs[i, kinds.index(kind)] += cost
        for region in example.regions:
            if region.heatmap == heatmap and region.kind in heat and region.mask.any():
                maps = example.heatmaps[..., heatmap].astype(np.float32) / 255, np.asarray(row["heatmaps"])[..., heatmap]
                heat[region.kind].append([mean_heat(one, region.mask) for one in maps])
        if score == "alignment":
            tokens = keywords.tokenize(example.prompt)
            marked = keywords.read_labels(row["labelled_prompt"], tokens, written)
            for fact in example.picture.wrong:
                token = example.picture.prompt.facts[fact]
                words[fact.kind].append([labels[token] == keywords.MISALIGNED for labels in (example.labels, marked)])
    scores = np.array([[example.scores[place], row["scores"][place]] for example, row in zip(examples, rows, strict=True)])
    shares, errors, _ = regression.fit(-costs, scores)  # [K, 2]: of the labels, of the critic

    def means(values):
        return [f"{value:.2f}" for value in np.mean(values, axis=0)] if values else ["", ""]

    return [
        {
            score: kind,
            "pictures": f"{np.mean(costs[:, k] > 0):.1%}",
            **{
                f"cost seen, {who}": f"{shares[k, i]:.2f} ± {errors[k, i]:.2f}" for i, who in enumerate(("labels", "critic"))
            },
            **dict(zip(("heat, labels", "heat, critic"), means(heat[kind]), strict=True)),
            **(
                dict(zip(("words, labels", "words, critic"), means(words[kind]), strict=True))
                if score == "alignment"
                else {}
            ),
        }
        for k, kind in enumerate(kinds)
    ]


def table_of_scenes(examples, rows) -> list[dict]:
    """PLCC of both scores, over groups of pictures with about as many things, and over prompts of one group and of two."""
    things = np.array([len(example.picture.objects) for example in examples])
    groups = np.array([len(example.picture.prompt.scene.groups) for example in examples])
    chosen = {
        "all": things > 0,
        "one or two things": things <= 2,
        "three to five": (things > 2) & (things <= 5),
        "six or more": things > 5,
        "a prompt of one group": groups == 1,
        "of two": groups == 2,
    }
    found = []
    for name, mask in chosen.items():
        line = {"scenes": name, "pictures": f"{np.mean(mask):.1%}"}
        for score in SCORES:
            place = schema.SCORES.index(score)
            labels, truth, predicted = (
                np.array([values[place] for values in of])[mask]
                for of in ([e.scores for e in examples], [e.latents for e in examples], [row["scores"] for row in rows])
            )
            line[f"PLCC {score}"] = f"{stats.pearsonr(predicted, labels)[0] if mask.sum() > 2 else math.nan:.3f}"
            line[f"{score}, ceiling"] = f"{stats.pearsonr(truth, labels)[0] if mask.sum() > 2 else math.nan:.3f}"
        found.append(line)
    return found


def main():
    args = flags.FLAGS
    model = predictor.load(args.workdir)
    model.require("workdir", *schema.PARTS)
    drawn = synthetic.examples(
        args.split, args.count, args.seed, model.model_config.image_size, model.model_config.heatmap_size
    )
    examples = list(tqdm(drawn, total=args.count, desc="draw", unit="picture"))
    inputs = (model.prepare(example.image, example.prompt) for example in examples)
    rows = list(tqdm(model.predict_rows(inputs, 100), total=args.count, desc="predict", unit="picture"))
    for score, kinds in zip(SCORES, (flaws.ARTIFACTS, tuple(flaws.FACT_COST)), strict=True):
        found = table_of_flaws(score, kinds, examples, rows, model.vocabulary.written)
        print("\n" + tabulate.tabulate(found, headers="keys", tablefmt="github", disable_numparse=True))
    print(
        "\n" + tabulate.tabulate(table_of_scenes(examples, rows), headers="keys", tablefmt="github", disable_numparse=True)
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A run, a folder that rahf.convert wrote, or a critic that RAHF comes with.")
    flags.DEFINE_string("split", "test", "Of RichHF-Synth.")
    ranges.flag("count", 1000, "Pictures, the first so many.", ranges.COUNT)
    ranges.flag("seed", 0, "Of the pictures.", ranges.SEED)
    flags.mark_flag_as_required("workdir")
    command.run(main)
