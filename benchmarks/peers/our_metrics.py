"""Our side of the row `metrics`, without the imports of the other rows."""

import numpy as np

from benchmarks.peers import inputs
from richhf_data import metrics, schema


def evaluate(place):
    given = inputs.read(place, "metrics")
    others = {"score_mask": np.ones(len(schema.SCORES), bool), "heatmap_mask": np.ones(len(schema.HEATMAPS), bool)}
    others |= {"prompt": "", "labels": None}
    pairs = zip(given["scores"], given["heatmaps"], strict=True)
    targets = [{"scores": scores, "heatmaps": maps} | others for scores, maps in pairs]
    pairs = zip(given["predicted_scores"], given["predicted_heatmaps"], strict=True)
    predictions = [{"scores": scores, "heatmaps": maps, "labelled_prompt": ""} for scores, maps in pairs]

    def call():
        found = metrics.evaluate(targets, predictions)
        kept = [name for name in found if name.startswith(("score/", "heatmap/")) and "empty" not in name]
        return {name: np.asarray(found[name]) for name in kept}

    return call


ROWS = {"metrics": evaluate}
