"""Draws the figures of the README.

    python docs/figures.py --workdir=RUN --data_dir=demo/data      RUN: a run of rahf_synth_small
"""

import itertools
import pathlib
import textwrap

import matplotlib.figure
import numpy as np
from absl import flags

from rahf import predict, predictor, report
from richhf_data import command, drawing, keywords, schema, synthetic

HERE = pathlib.Path(__file__).parent


def annotated(path, count=16, columns=4, size=192):
    """Draws RichHF-Synth examples: the image, both heatmaps over it, the labelled prompt above and the scores below."""
    rows = -(-count // columns)
    figure = matplotlib.figure.Figure(figsize=(5.2 * columns, 2.5 * rows))
    for index, example in enumerate(synthetic.examples("train", count, 1, size, size)):
        axes = figure.add_subplot(rows, columns, index + 1)
        maps = np.moveaxis(example.heatmaps.astype(np.float32) / 255, -1, 0)
        axes.imshow(np.hstack([example.image, *(drawing.overlay(example.image, heatmap) for heatmap in maps)]))
        axes.set_axis_off()
        text = keywords.label_prompt(keywords.tokenize(example.prompt), example.labels)
        axes.set_title("\n".join(textwrap.wrap(text, 58)), fontsize=9)
        scores = "   ".join(f"{name} {score:.2f}" for name, score in zip(schema.SCORES, example.scores, strict=True))
        axes.text(0.5, -0.04, scores, transform=axes.transAxes, ha="center", va="top", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=60)


def main():
    annotated(HERE / "richhf_synth.png")
    model = predictor.load(flags.FLAGS.workdir)
    examples, _ = predict.dataset_examples(flags.FLAGS.data_dir, "test", 40)
    items = list(predict.predict_items(model, examples, 40))
    picked = [items[index] for index in map(int, flags.FLAGS.indices)]
    report.figure(list(itertools.islice(picked, 4)), HERE / "predictions.png")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "demo/run", "A training run.")
    flags.DEFINE_string("data_dir", "demo/data", "The demo's dataset.")
    flags.DEFINE_list("indices", ["2", "6", "7"], "Which test examples to show.")
    command.run(main)
