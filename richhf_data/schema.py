"""The names, order, ranges and polarity of every field, and the keys of the published records.

Source of the raw keys: the google-research-datasets/richhf-18k record files ("Rich Human Feedback for Text-to-Image
Generation", arXiv 2312.10240).

A decoded example is a dictionary with

  uid:        str, the image's id in its collection
  prompt:     str
  image:      uint8[H, W, 3], RGB
  scores:     float32[4] in [0, 1], order `SCORES`, higher is better for all four
  heatmaps:   uint8[h, w, 2], order `HEATMAPS`, 255 = every annotator marked the pixel
  labels:     int32[number of prompt tokens], 0 = misaligned, 1 = aligned (see keywords.py); None if unknown
  score_mask, heatmap_mask: bool[4], bool[2], True = the target exists; an absent score or map is 0
  caption:    str, what the decoder writes in place of the labelled prompt; None except in captioning datasets

A batch for the model is a dictionary of numpy arrays (letters as in the README's table of names):

  image        uint8[B, H, W, 3]
  text_ids     int32[B, R, L], R = 1, or 7 in the augmented-prompt variants (order `TASKS`); 0 = padding, 1 = end
  keyword_ids  int32[B, T], the labelled prompt ("a yellow_0 cat") or the caption, ending in 1; all 0 without
  scores       float32[B, 4]          score_mask    bool[B, 4]
  heatmaps     uint8[B, h, w, 2]      heatmap_mask  bool[B, 2]

A row that pads a training or evaluation batch is all zeros, masks included.
"""

import hashlib

import numpy as np

from richhf_data import ranges
from richhf_data.errors import UserError

CAPTION_PROMPT = "image caption"  # the prompt of every example whose target is a caption
SCORES = ("plausibility", "alignment", "aesthetics", "overall")
HEATMAPS = ("implausibility", "misalignment")
DEVIATIONS = tuple(f"{name}_deviation" for name in SCORES)  # predicted, of labels from scores: columns, terms of rewards
PARTS = ("scores", "heatmaps", "keywords")  # of a prediction

# The seven predictions, as the augmented prompt names them. The paper shows `implausibility heatmap` alone; the others
# follow its pattern.
TASKS = (
    *(f"{name} score" for name in SCORES),
    *(f"{name} heatmap" for name in HEATMAPS),
    "misalignment sequence",
)
# The same in the single-head models of the first author's PyTorch release; the decoder reads the plain prompt.
PYTORCH_TASKS = (
    *(f"<output> SCORE: {name} </output> " for name in SCORES),
    *(f"<output> HEATMAP: {name} </output> " for name in HEATMAPS),
    "",
)
VARIANTS = ("multi_head", "augmented_prompt", "augmented_prompt_pytorch")

SPLITS = ("train", "dev", "test")
PUBLISHED_COUNTS = {"train": 15_810, "dev": 995, "test": 955}

# Keys of a published record (tf.train.Example). All four scores are higher-is-better, `artifact_score` included.
RAW_UID = "filename"
RAW_LABELS = "prompt_misalignment_label"
RAW_SCORES = {
    "plausibility": "artifact_score",
    "alignment": "misalignment_score",
    "aesthetics": "aesthetics_score",
    "overall": "overall_score",
}
RAW_HEATMAPS = {"implausibility": "artifact_map", "misalignment": "misalignment_map"}
RAW_MAP_SIZE = 512  # pixels, both sides

LIKERT_LOW, LIKERT_HIGH = 1, 5
RATERS_EQUAL, RATERS_WITHIN_ONE = 0.25, 0.85  # about: shares of pictures with three equal scores, within a point (3.4)
POINT_RADIUS = 1 / 20  # of the image height: radius of the disk around an annotator's point (paper section 3.1)

SIDES = {  # responses to two pictures side by side; positive: the right one is better
    "left significantly better": -2,
    "left slightly better": -1,
    "about the same": 0,
    "right slightly better": 1,
    "right significantly better": 2,
}

HOLDOUT = 0.05  # the share of dev, and of test, in a dataset without splits

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


def split_of(uid: str, holdout: float = HOLDOUT, seed: int = 0) -> str:
    """The split of an image whose dataset has no splits: a function of uid, share and seed alone.

    Args:
      holdout: the share of dev, and of test, in `ranges.HOLDOUT`.

    Raises:
      UserError: another share.

    >>> split_of("cat7"), split_of("cat7", holdout=0.45)
    ('train', 'test')
    """
    if holdout not in ranges.HOLDOUT:
        raise UserError(f"holdout: got {holdout}, expected {ranges.HOLDOUT}")
    digest = hashlib.sha256(f"{seed} {uid}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "dev" if place < holdout else "test" if place < 2 * holdout else "train"


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """An array [n, ...] as [rows, ...]: its last row is repeated, so that a compiled program sees one shape."""
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (np.ndim(array) - 1), mode="edge")


def num_texts(variant: str) -> int:
    """R, the texts that the model reads for one prompt.

    >>> [num_texts(variant) for variant in VARIANTS]
    [1, 7, 7]
    """
    return len(task_prompts("", variant))


def task_prompts(prompt: str, variant: str) -> list[str]:
    """The texts that the model reads for one prompt: the prompt, or the prompt after the name of each task of `TASKS`.

    >>> task_prompts("a cat", "multi_head")
    ['a cat']
    >>> task_prompts("a cat", "augmented_prompt")[4]
    'implausibility heatmap a cat'
    >>> texts = task_prompts("a cat", "augmented_prompt_pytorch")
    >>> texts[4], texts[-1]
    ('<output> HEATMAP: implausibility </output> a cat', 'a cat')
    """
    if variant == "multi_head":
        return [prompt]
    if variant == "augmented_prompt":
        return [f"{task} {prompt}" for task in TASKS]
    if variant == "augmented_prompt_pytorch":
        return [task + prompt for task in PYTORCH_TASKS]
    raise UserError(f"variant: got {variant!r}, expected one of {VARIANTS}")
