"""The results of the papers on RichHF-18K's test split, to print beside ours.

Sources: "Rich Human Feedback for Text-to-Image Generation" (arXiv 2312.10240), tables 1 to 4, and the README of the first
author's PyTorch release (https://github.com/youweiliang/RichHF). Keys and units are those of `richhf_data.metrics.evaluate`.
"""

import numpy as np

from richhf_data import schema
from richhf_data.metrics import HEATMAP_METRICS, KEYWORD_METRICS

# How many of the pictures have each plausibility, in twelfths, as the annotators' three five-point answers give them.
TEST_PLAUSIBILITY = {1: 7, 2: 12, 3: 26, 4: 50, 5: 87, 6: 147, 7: 143, 7.5: 1, 8: 144, 9: 113, 10: 90, 11: 66, 12: 69}
_SCORES = ("plausibility", "aesthetics", "alignment", "overall")  # the columns of the paper
_EXAMPLES = schema.PUBLISHED_COUNTS["test"]


def is_test_of_richhf_18k(split: str, scores: np.ndarray) -> bool:
    """Whether a split is RichHF-18K's test, which the published results are of.

    It is if it is called test, has all 955 pictures, and as many with each plausibility as RichHF-18K's: its uids are not
    ours to keep, and a dataset of another origin does not have the same counts.

    Args:
      scores: float[n, 4] of the annotators, nan where there is none.
    """
    if split != "test" or len(scores) != _EXAMPLES or not np.isfinite(scores).all():
        return False
    values, counts = np.unique(np.round(24 * scores[:, 0]) / 2, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True)) == TEST_PLAUSIBILITY


def rows() -> dict[str, dict[str, float]]:
    """{name of the model and its source: {metric: value}}."""
    paper, release = "paper", "PyTorch release"
    found = {
        f"ResNet-50 ({paper})": _plcc_srcc((0.495, 0.370, 0.108, 0.337), (0.487, 0.363, 0.119, 0.308))
        | _heatmap("implausibility", 0.00996, 0.00093, 0.506, 1.669, 0.338, 2.924, 0.909),
        f"PickScore, off the shelf ({paper})": _plcc_srcc((0.010, 0.131, 0.346, 0.202), (0.028, 0.140, 0.340, 0.226)),
        f"CLIP, off the shelf ({paper})": {"score/plcc/alignment": 0.185, "score/srcc/alignment": 0.130},
        f"CLIP, fine-tuned ({paper})": _plcc_srcc((0.390, 0.357, 0.398, 0.353), (0.378, 0.360, 0.390, 0.352)),
        f"CLIP gradient ({paper})": _heatmap("misalignment", 0.00817, 0.00551, 0.015, 3.844, 0.041, 0.143, 0.643),
        f"RAHF multi-head ({paper})": _plcc_srcc((0.666, 0.605, 0.487, 0.582), (0.654, 0.591, 0.500, 0.561))
        | _heatmap("implausibility", 0.01216, 0.00141, 0.425, 1.971, 0.302, 2.330, 0.877)
        | _heatmap("misalignment", 0.00303, 0.00015, 0.206, 2.932, 0.093, 1.335, 0.838)
        | _keywords("micro", 62.9, 33.0, 43.3),
        f"RAHF augmented prompt ({paper})": _plcc_srcc((0.693, 0.600, 0.474, 0.580), (0.681, 0.589, 0.496, 0.562))
        | _heatmap("implausibility", 0.00920, 0.00095, 0.556, 1.652, 0.409, 3.085, 0.913)
        | _heatmap("misalignment", 0.00304, 0.00006, 0.212, 2.933, 0.106, 1.411, 0.841)
        | _keywords("micro", 61.3, 34.1, 43.9),
        f"RAHF multi-head, ViT-L/16-384 ({release})": _plcc_srcc((0.739, 0.629, 0.565, 0.642), (0.726, 0.621, 0.564, 0.634))
        | _heatmap("implausibility", 0.00724, 0.00078, 0.525, 1.649, 0.339, 2.029, 0.905)
        | _heatmap("misalignment", 0.00324, 0.00035, 0.232, 2.848, 0.104, 1.256, 0.797)
        | _keywords("per_prompt", 56.5, 45.2, 47.5),
    }
    for row in found.values():
        for key in ("plcc", "srcc"):
            values = [row.get(f"score/{key}/{name}") for name in schema.SCORES]
            if None not in values:
                row[f"score/{key}/mean"] = float(np.mean(values))
    return found


def _plcc_srcc(plcc, srcc):
    return {
        f"score/{key}/{name}": value
        for key, values in (("plcc", plcc), ("srcc", srcc))
        for name, value in zip(_SCORES, values, strict=True)
    }


def _heatmap(name, *values):
    return {f"heatmap/{key}/{name}": value for key, value in zip(HEATMAP_METRICS, values, strict=True)}


def _keywords(kind, *percent):
    return {f"keywords/{kind}/{key}": value / 100 for key, value in zip(KEYWORD_METRICS, percent, strict=True)}
