"""Trains paper B's reward model on binary feedback and compares it with CLIP score.

    python -m rahf.reward.train --config=reward_clip --feedback=FILE --clip=DIR --workdir=DIR

    workdir/config.json, weights.safetensors    the weights of the best validation, for `rahf.reward.load`
    workdir/results.json, data_size.png         accuracy, F1 and AUC on the validation part, by number of training images
    workdir/tensorboard/                        the losses of each training, and the results; see rahf.trackers
    workdir/embeddings/                         CLIP's embeddings; with --cache in another folder, which runs can share

Give the same command again to continue a killed run. Cached embeddings and finished trainings are kept; an unfinished
training starts again and has the same result.
"""

import dataclasses
import functools
import io
import os
from typing import Any

import numpy as np
import sklearn.metrics
from absl import flags
from tabulate import tabulate

from rahf import experiments, trackers, workdirs
from rahf.reward import embed, model, predict, prompts
from rahf.reward.image_table import LabelledImages
from richhf_data import command, images, json_files, paths, ranges
from richhf_data.errors import UserError

# Of a config, for `experiments.check_ranges`.
RANGES = model.RANGES | {
    "eval.validation": ranges.Range(0, 1, without=(0, 1)),
    "eval.data_sizes": ranges.Each(ranges.SOME_SHARE),
}
# Of the workdir's config and a resumed run's; the digest of CLIP's files must be equal.
RESUME_MAY_DIFFER = ("clip.folder", "tracker")
METRICS = ("accuracy", "f1", "auc")


def make_features(
    feedback: LabelledImages, clip: embed.Clip, words: prompts.Words, change, cache
) -> tuple[model.Features, list[str]]:
    """CLIP's embeddings of the images, the prompts and the prompts' negatives; and the images' cache keys.

    Args:
      change: the categories in which negatives differ; all that a prompt has are equally likely.
    """
    texts = {text: i for i, text in enumerate(dict.fromkeys(feedback.prompts))}
    negatives, odds = [], []  # for each prompt
    for text in list(texts):
        parsed = words.parse(text)
        changed = words.negatives(parsed, change) if parsed else {}
        negatives.append([prompts.text(other) for others in changed.values() for other in others])
        odds.append([1 / len(others) for others in changed.values() for _ in others])
    for text in (text for others in negatives for text in others):
        texts.setdefault(text, len(texts))
    table = np.zeros((len(texts), max(1, *map(len, negatives))), np.int32)
    table_odds = np.zeros(table.shape, np.float32)
    for i, (others, chances) in enumerate(zip(negatives, odds, strict=True)):
        table[i, : len(others)], table_odds[i, : len(others)] = [texts[text] for text in others], chances
    text_features = embed.embed_texts(clip, list(texts), cache)
    keys, image_features = embed.embed_images(clip, feedback.images(), cache, len(feedback))
    own = np.array([texts[text] for text in feedback.prompts], np.int32)
    labels = np.array(feedback.labels, np.float32)
    return model.Features(image_features, labels, own, text_features, table, table_odds), keys


def split(keys, validation: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the validation part. The split is by image content: equal images are in one part.

    The training rows are in random order, so that the first n are a sample.

    Args:
      keys: of the images (`embed.key`). validation: the share of the validation part.
    """
    place = np.array([int(key[:13], 16) / 16**13 for key in keys])
    rows = np.argsort(place, kind="stable")
    return rows[place[rows] >= validation], rows[place[rows] < validation]


def auc(values: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of float[n] for labels 0 and 1, int[n]; nan if all labels are equal."""
    good = np.asarray(labels) == 1
    return float(sklearn.metrics.roc_auc_score(good, values)) if 0 < good.sum() < len(good) else float("nan")


def binary_metrics(values: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    """accuracy and f1 of `values >= threshold`, and auc. f1 is nan if no label and no prediction is 1."""
    labels, predicted = np.asarray(labels) == 1, np.asarray(values) >= threshold
    return {
        "accuracy": float(sklearn.metrics.accuracy_score(labels, predicted)),
        "f1": float(sklearn.metrics.f1_score(labels, predicted, zero_division=np.nan)),
        "auc": auc(values, labels),
    }


def best_threshold(values: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the highest accuracy, halfway between two values; the lowest if there are several."""
    order = np.argsort(values, kind="stable")
    ordered, good = np.asarray(values, np.float64)[order], (np.asarray(labels) == 1)[order]
    ends = np.flatnonzero(np.diff(ordered)) + 1  # equal values are on one side of a threshold
    cuts = np.concatenate([[0], ends, [len(ordered)]])  # numbers of values below a threshold
    right = np.concatenate([[0], np.cumsum(~good)])[cuts] + good.sum() - np.concatenate([[0], np.cumsum(good)])[cuts]
    padded = np.concatenate([[-np.inf], ordered, [np.inf]])
    cut = cuts[np.argmax(right)]
    below, above = padded[cut], padded[cut + 1]
    return float(above if np.isinf(below) else np.nextafter(below, np.inf) if np.isinf(above) else (below + above) / 2)


def evaluate(features: model.Features, train, validation, mlp, params) -> dict[str, dict[str, float]]:
    """Metrics on the validation part: {"reward", "clip_score"} -> accuracy, f1, auc.

    The reward's threshold is 0.5. CLIP score is no probability: its threshold is the most accurate one on the training part.
    """
    text, labels = features.text[features.prompt], features.label
    clip_score = np.sum(features.image * text, axis=1)
    reward = model.predict(mlp, params, features.image[validation], text[validation])
    threshold = best_threshold(clip_score[train], labels[train])
    return {
        "reward": binary_metrics(reward, labels[validation], 0.5),
        "clip_score": binary_metrics(clip_score[validation], labels[validation], threshold),
    }


def plot(results: list[dict]) -> bytes:
    """Draws each metric of both predictors against the number of training images; returns a PNG."""
    from matplotlib.figure import Figure

    figure, sizes = Figure(figsize=(11, 3.4), layout="constrained"), [entry["train"] for entry in results]
    for axes, name in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        for predictor, label in (("reward", "reward model"), ("clip_score", "CLIP score")):
            axes.plot(sizes, [entry[predictor][name] for entry in results], "o-", label=label)
        axes.set(xlabel="training images", ylabel={"auc": "AUC", "f1": "F1"}.get(name, name), xscale="log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def train(config, feedback_file, clip_folder, workdir, cache=None) -> list[dict]:
    """Runs `config`. Returns the results in results.json, one for each size of the training part, the whole part last.

    Raises:
      UserError: a number out of its range, faulty feedback, a folder without a CLIP, a workdir of another run, a prompt
        that the config's words do not make.
    """
    # ---- Feedback, prompts, CLIP ------------------------------------------------------------------------------------
    experiments.check_ranges(config, RANGES)
    trackers.check(config)
    words, change = prompts.words_of(config.prompts), tuple(config.loss.change)
    if unknown := sorted(set(change) - set(prompts.CATEGORIES)):
        raise UserError(f"loss.change: got {unknown}, expected some of {list(prompts.CATEGORIES)}")
    sizes = sorted(set(config.eval.data_sizes))
    if sizes[-1] != 1:
        raise UserError(f"eval.data_sizes: got {sizes}, expected 1.0 as the largest")
    for name, folder in (("workdir", workdir), ("cache", cache)):
        if "://" in str(folder):
            raise UserError(f"{name}: got {folder}, expected a folder on a disk")
    feedback = LabelledImages(feedback_file)
    foreign = sorted({text for text in feedback.prompts if words.parse(text) is None})
    if foreign and config.loss.classification_weight:
        raise UserError(
            f"feedback: {feedback.path}: {len(foreign)} prompts cannot be made of the config's lists, such as "
            f"{foreign[0]!r}, and therefore have no negatives; add their words to the config's prompts, or pass "
            "--config.loss.classification_weight=0"
        )
    clip = embed.Clip(clip_folder)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.clip = {"folder": os.path.abspath(clip_folder), "digest": clip.digest}
    workdir = workdirs.open_workdir(workdir, config, RESUME_MAY_DIFFER)

    # ---- Features, parts --------------------------------------------------------------------------------------------
    features, keys = make_features(feedback, clip, words, change, cache or workdir / "embeddings")
    rows, validation = split(keys, config.eval.validation)
    identity = embed.key(repr((keys, feedback.prompts, feedback.labels)).encode())
    file = workdir / "results.json"
    stored = json_files.read_as(Results, file) if file.exists() else Results(identity, [])
    if stored.feedback != identity:
        raise UserError(f"workdir: {workdir} holds a run on other feedback than {feedback.path}; take another --workdir")
    print(f"{len(rows)} training and {len(validation)} validation images, {len(set(feedback.prompts))} prompts", flush=True)

    # ---- A training for each size; the whole part's weights are written ---------------------------------------------
    results, mlp = stored.results, model.RewardMLP(tuple(config.model.hidden))
    with trackers.opened(workdir, config) as writer:
        for share in sizes[len(results) :]:
            part, whole = rows[: max(1, round(share * len(rows)))], share == 1

            def keep(params, _):
                if whole:
                    workdirs.check_config(workdir, config, RESUME_MAY_DIFFER)  # a folder that was removed is not made anew
                    predict.write_params(params, workdir / "weights.safetensors")

            log = functools.partial(writer.scalars, f"share_{share:g}")
            params, best = model.fit(features, part, validation, config, keep, log)
            found = evaluate(features, part, validation, mlp, params)
            results.append({"share": share, "train": len(part), **best, **found})
            workdirs.check_config(workdir, config, RESUME_MAY_DIFFER)
            json_files.write(file, {"feedback": identity, "results": results})
            for predictor, values in found.items():
                known = {name: value for name, value in values.items() if value == value}
                writer.scalars(f"data_size/{predictor}", known, len(part))
        drawn = plot(results)
        paths.replace(workdir / "data_size.png", drawn)
        writer.image("data_size", images.decode(drawn, "data_size.png"), len(rows))
    return results


@dataclasses.dataclass(frozen=True)
class Results:
    """results.json: which feedback, and for each size of the data the metrics of a training with it."""

    feedback: str
    results: list[dict[str, Any]]


def table(results) -> str:
    """A table of both predictors' metrics for each size, to print."""
    headers = ["training images", *(f"{who} {name}" for name in METRICS for who in ("reward", "CLIP score"))]
    lines = [
        [entry["train"], *(entry[who][name] for name in METRICS for who in ("reward", "clip_score"))] for entry in results
    ]
    return tabulate(lines, headers, floatfmt=".3f", missingval="nan")


def main():
    """The command."""
    args = flags.FLAGS
    with paths.locked(args.workdir):
        results = train(args.config, args.feedback, args.clip, args.workdir, args.cache)
    print(table(results))
    print(f"{args.workdir}: weights.safetensors, results.json, data_size.png")


if __name__ == "__main__":
    flags.DEFINE_string("feedback", None, "A .jsonl or .parquet file of prompt, image and label.")
    flags.DEFINE_string("clip", None, "A CLIP, a folder that rahf.convert --source=clip-hf wrote.")
    flags.DEFINE_string("workdir", None, "For the weights, results and embeddings; a killed run continues from it.")
    flags.DEFINE_string("cache", None, "The folder for CLIP's embeddings; by default in the workdir.")
    flags.mark_flags_as_required(["feedback", "clip", "workdir"])
    command.run(main, experiments.reader(kinds=("reward",), default="reward_clip"))
