"""The metrics as a user of numpy, scipy and scikit-learn computes them: one map at a time."""

import numpy as np
import scipy.stats
import sklearn.metrics

from benchmarks.peers import inputs
from richhf_data import schema

EPSILON = 1e-8


def of_maps(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Of two maps float64[h, w]. Judd's curve ends with a straight line from the lowest fixation: half a step more."""
    fixated = truth > 0
    last = np.mean(predicted[~fixated] >= predicted[fixated].min()) / (2 * fixated.sum())
    p, g = predicted / (predicted.sum() + EPSILON), truth / (truth.sum() + EPSILON)
    return {
        "mse": np.mean((predicted - truth) ** 2),
        "cc": np.corrcoef(predicted.ravel(), truth.ravel())[0, 1],
        "kld": np.sum(g * np.log(g / (p + EPSILON) + EPSILON)),
        "sim": np.minimum(p, g).sum(),
        "nss": scipy.stats.zscore(predicted, axis=None, ddof=1)[fixated].mean(),
        "auc_judd": sklearn.metrics.roc_auc_score(fixated.ravel(), predicted.ravel()) + last,
    }


def evaluate(place):
    given = inputs.read(place, "metrics")

    def call():
        out = {}
        for k, name in enumerate(schema.SCORES):
            columns = [given[key][:, k].astype(np.float64) for key in ("scores", "predicted_scores")]
            out[f"score/plcc/{name}"] = scipy.stats.pearsonr(*columns).statistic
            out[f"score/srcc/{name}"] = scipy.stats.spearmanr(*columns).statistic
        for k, name in enumerate(schema.HEATMAPS):
            pairs = zip(given["predicted_heatmaps"][..., k], given["heatmaps"][..., k], strict=True)
            found = [of_maps(predicted.astype(np.float64), truth / 255) for predicted, truth in pairs]
            out |= {f"heatmap/{key}/{name}": np.mean([row[key] for row in found]) for key in found[0]}
        return out

    return call


ROWS = {"metrics": evaluate}
