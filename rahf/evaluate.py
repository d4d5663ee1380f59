"""Evaluates a run on a split with the papers' metrics, beside the constant predictor and the ceiling.

    python -m rahf.evaluate --config=configs/X.py --workdir=DIR --split=test [--config.data.data_dir=DIR]

writes into DIR/eval: <split>.json (one flat object), <split>.references.json (an object for each reference row) and
<split>.md (the papers' tables), and prints the tables.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np
from absl import flags
from tqdm.auto import tqdm

from rahf import checkpoints, experiments, hosts, predict, sources
from richhf_data import command, metrics, paths, schema
from richhf_data.errors import UserError

CONSTANT_EXAMPLES = 500  # of the stream's training split, for the constant predictor's means


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A split, ready to evaluate models on.

    Attributes:
      run: `predict.Model` -> flat metrics (DESIGN's keys).
      references: () -> rows to compare with, {name: metrics}: the constant predictor, and what came with the data.
    """

    run: Callable[[predict.Model], dict[str, float]]
    references: Callable[[], dict[str, dict[str, float]]]


def prepare(config, vocabulary, split: str, num_examples: int | None = None) -> Evaluation:
    """Reads a split once: through seqio's Evaluator where there is a built dataset, else drawn from the stream.

    Raises:
      UserError: no such dataset or split.
    """
    if config.data.source == "seqio" or config.data.data_dir:
        return _from_seqio(config, vocabulary, split, num_examples)
    return _from_stream(config, vocabulary, split, num_examples or config.eval.num_examples)


def _from_seqio(config, vocabulary, split, num_examples):
    from rahf import features
    from richhf_data import tasks

    task = sources.register_task(config, vocabulary, augment=False)
    evaluator = features.evaluator(task, split, num_examples)

    def run(model):
        def predict_with_aux(dataset, model_feature_shapes=None):
            del model_feature_shapes
            examples = list(dataset.as_numpy_iterator())
            rows = _predict_all(model, (features for _, features in examples), len(examples), config.eval.batch_size)
            ids = [(int(index), row["keyword_ids"]) for (index, _), row in zip(examples, rows, strict=True)]
            return ids, {name: [row[name] for row in rows] for name in ("scores", "heatmaps")}

        future, _ = evaluator.evaluate(compute_metrics=True, predict_with_aux_fn=predict_with_aux)
        return {name: float(value) for name, value in future.result()[task].items()}

    def references():
        rows = {}
        data_dir = sources.evaluation_dir(config)
        if (constants := tasks.constants(data_dir)) is not None:
            targets = features.targets(evaluator, task)
            predictions = metrics.constant_predictions(constants["scores"], constants["heatmaps"], targets)
            rows["constant predictor"] = metrics.evaluate(targets, predictions)
        return rows | tasks.references(data_dir).get(split, {})

    return Evaluation(run, references)


def _from_stream(config, vocabulary, split, num_examples):
    from richhf_data import synthetic
    from richhf_data.synthetic import ceiling, stream

    sizes = tuple(sources.image_arguments(config).values())
    examples = list(synthetic.examples(split, num_examples, config.seed, *sizes))
    targets = [example.decoded() for example in examples]
    batch = stream.make_batch(targets, vocabulary=vocabulary, **sources.text_arguments(config))

    def run(model):
        inputs = ({name: batch[name][i] for name in ("image", "text_ids")} for i in range(num_examples))
        return metrics.evaluate(targets, _predict_all(model, inputs, num_examples, config.eval.batch_size))

    def references():
        train = list(synthetic.examples("train", CONSTANT_EXAMPLES, config.seed, *sizes))
        scores = np.mean([example.scores for example in train], axis=0)
        heatmaps = np.mean([example.heatmaps for example in train], axis=0) / 255
        constant = metrics.evaluate(targets, metrics.constant_predictions(scores, heatmaps, targets))
        return {"constant predictor": constant} | ceiling.references([ceiling.evidence(one) for one in examples])

    return Evaluation(run, references)


def _predict_all(model, examples: Iterable[dict], count: int, batch_size: int) -> list[dict]:
    rows = model.predict_rows(examples, batch_size)
    silent = jax.process_index() > 0
    return list(tqdm(rows, total=count, desc="evaluate", unit="example", leave=False, disable=silent))


def selection(results: dict[str, float]) -> float:
    """What the best checkpoint is best in: the mean of PLCC and SRCC over the scores that the dataset has.

    Where it has none, it is the mean correlation of heatmaps; without these, the F1 of keywords, then of captions.

    Raises:
      UserError: none of them was measured.
    """
    groups = (
        [f"score/{kind}/{name}" for kind in ("plcc", "srcc") for name in schema.SCORES],
        [f"heatmap/cc/{name}" for name in schema.HEATMAPS],
        ["keywords/micro/f1"],
        ["caption/word_f1"],
    )
    for names in groups:
        if measured := [results[name] for name in names if np.isfinite(results.get(name, np.nan))]:
            return float(np.mean(measured))
    raise UserError(
        f"evaluation: got {results['num_examples']:.0f} examples without a target to compare with (scores need two "
        "examples), expected some; see the build's report, and raise eval.num_examples"
    )


def summary(results: dict[str, float]) -> str:
    """A periodic evaluation in one line, of what was measured."""
    shown = {
        **{f"PLCC {name}": f"score/plcc/{name}" for name in schema.SCORES},
        "implausibility AUC": "heatmap/auc_judd/implausibility",
        "CC": "heatmap/cc/implausibility",
        "keywords F1": "keywords/micro/f1",
        "captions F1": "caption/word_f1",
    }
    values = {label: results.get(name, np.nan) for label, name in shown.items()}
    return ", ".join(f"{label} {value:.3f}" for label, value in values.items() if np.isfinite(value))


def evaluate(config, workdir, split: str, num_examples: int | None = None) -> dict[str, float]:
    """Evaluates a workdir's best checkpoint, writes the files of eval/, prints the tables, returns the metrics.

    On several hosts each has every example and predicts its share of each batch; all return the same, one writes.
    """
    model = predict.load(workdir)
    evaluation = prepare(config, model.vocabulary, split, num_examples)
    results = evaluation.run(model)
    if jax.process_index() > 0:
        return results
    references = evaluation.references()
    table = metrics.table({"this model": results} | references)
    folder = paths.absolute(workdir) / "eval"
    checkpoints.write_json(folder / f"{split}.json", results)
    checkpoints.write_json(folder / f"{split}.references.json", references)
    paths.replace(folder / f"{split}.md", f"{table}\n".encode())
    print(f"\n{split}: {results['num_examples']:.0f} examples, {workdir}\n\n{table}\n\nwritten to {folder / split}.json")
    return results


def main():
    """The command."""
    args = flags.FLAGS
    with hosts.joined():
        evaluate(args.config, args.workdir, args.split, args.num_examples)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The training run.")
    flags.DEFINE_string("split", "test", "Which split of the dataset.")
    flags.DEFINE_integer("num_examples", None, "The first so many only; all by default.", lower_bound=1)
    hosts.define_flags()
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader(of_workdir=checkpoints.read_config))
