"""Evaluates a run on a split with the papers' metrics, beside the constant predictor and the ceiling.

    python -m rahf.evaluate --workdir=DIR --split=test [--config.data.data_dir=DIR]

writes into DIR/eval: <split>.json (one flat object), <split>.references.json (an object for each reference row) and
<split>.md (the papers' tables), and prints the tables. The config is the workdir's; --config.KEY=VALUE overrides what
`EVALUATE_MAY_DIFFER` names.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from rahf import experiments, hosts, predictor, sources, workdirs
from richhf_data import command, json_files, metrics, paths, ranges, schema
from richhf_data.errors import UserError

CONSTANT_EXAMPLES = 500  # of the stream's training split, for the constant predictor's means
# Of what an evaluation reads of a config; for `experiments.check_ranges`.
RANGES = {
    "seed": ranges.SEED,
    "data.source": sources.SOURCES,
    "data.text_length": ranges.LENGTH,
    "data.keyword_length": ranges.LENGTH,
    "data.decoding": ranges.OneOf(workdirs.DECODINGS),
    "eval.batch_size": ranges.ROWS,
    "eval.num_examples": ranges.COUNT,
}
# What may differ from the workdir's config: which data are read and how the model computes, not what was trained.
EVALUATE_MAY_DIFFER = (
    *workdirs.CONDUCT,  # not read: a batch is divided over all devices
    "data.data_dir",
    "data.decoding",
    "data.mixture",
    "data.num_workers",
    "data.source",
    "data.truncate_long_prompts",
    "data.vocabulary",  # not read: the workdir has its own
    "eval",
    "model.dtype",
    "model.heatmap_head.remat",
    "model.heatmap_head.strips",
    "model.t5.remat",
    "model.vit.remat",
    "seed",  # of the pictures that are drawn where there is no dataset
)


class Evaluation:
    """A split that parameters are evaluated on, read once.

    Args:
      predict: the forward pass, with the run's config. split: of the built dataset where the config names one, else of
        RichHF-Synth.
      num_examples: the first so many; by default all, or `eval.num_examples` of RichHF-Synth.

    Raises:
      UserError: no such dataset or split; captions, where the decoder may only copy.
    """

    def __init__(self, predict: predictor.Predictor, split: str, num_examples: int | None = None):
        config, vocabulary = predict.config, predict.vocabulary
        self._predictor, self._batch_size = predict, config.eval.batch_size
        if config.data.source == "seqio" or config.data.data_dir:
            self._split = _DatasetSplit(config, vocabulary, split, num_examples, predict.copies)
        else:
            self._split = _StreamSplit(config, vocabulary, split, num_examples or config.eval.num_examples)

    def run(self, params) -> dict[str, float]:
        """Every metric of these parameters; keys as `richhf_data.metrics.evaluate`.

        Args:
          params: RAHF's, on any mesh; each process gives its part.
        """
        params = self._predictor.gather(params)

        def predict(examples: Iterable[dict], count: int) -> list[dict]:
            rows = self._predictor.predict_rows(params, examples, self._batch_size)
            silent = jax.process_index() > 0
            return list(tqdm(rows, total=count, desc="evaluate", unit="example", leave=False, disable=silent))

        return self._split.evaluate(predict)

    def references(self) -> dict[str, dict[str, float]]:
        """Rows to compare with, {name: metrics}: the constant predictor, and what came with the data."""
        return self._split.references()


class _DatasetSplit:
    """A split of a built dataset, through seqio's Evaluator."""

    def __init__(self, config, vocabulary, split, num_examples, copies):
        from rahf import features

        self._data_dir, self._name = sources.evaluation_dir(config), split
        self._task = sources.register_task(config, vocabulary, augment=False)
        self._evaluator = features.evaluator(self._task, split, num_examples)
        targets = features.targets(self._evaluator, self._task) if copies else []
        if any(target["caption"] for target in targets):
            raise UserError(
                f"data.decoding: got 'copy', expected 'free' for {self._data_dir}, whose captions are no copies of their "
                "prompts; set --config.data.decoding=free"
            )
        self._prompts = [target["prompt"] for target in targets]

    def evaluate(self, predict) -> dict[str, float]:
        def predict_with_aux(dataset, model_feature_shapes=None):
            del model_feature_shapes
            examples = list(dataset.as_numpy_iterator())
            if self._prompts:
                examples = [(index, features | {"prompt": self._prompts[int(index)]}) for index, features in examples]
            rows = predict((features for _, features in examples), len(examples))
            ids = [(int(index), ()) for index, _ in examples]  # for seqio to decode; the text comes with the others
            names = ("scores", "heatmaps", "labelled_prompt", "deviations")
            return ids, {name: [row[name] for row in rows] for name in names}

        future, _ = self._evaluator.evaluate(compute_metrics=True, predict_with_aux_fn=predict_with_aux)
        return {name: float(value) for name, value in future.result()[self._task.name].items()}

    def references(self) -> dict[str, dict[str, float]]:
        from rahf import features
        from richhf_data import tasks

        rows = {}
        if (constants := tasks.constants(self._data_dir)) is not None:
            targets = features.targets(self._evaluator, self._task)
            predictions = metrics.constant_predictions(constants["scores"], constants["heatmaps"], targets)
            rows["constant predictor"] = metrics.evaluate(targets, predictions)
        return rows | tasks.references(self._data_dir).get(self._name, {})


class _StreamSplit:
    """The first examples of a split of RichHF-Synth."""

    def __init__(self, config, vocabulary, split, num_examples):
        from richhf_data import synthetic
        from richhf_data.synthetic import stream

        sizes = sources.image_arguments(config)
        self._written = vocabulary.written
        self._seed, self._sizes = config.seed, (sizes["image_size"], sizes["heatmap_size"])
        self._examples = list(synthetic.examples(split, num_examples, self._seed, *self._sizes))
        self._targets = [example.decoded() for example in self._examples]
        self._batch = stream.make_batch(self._targets, vocabulary=vocabulary, **sources.text_arguments(config))

    def evaluate(self, predict) -> dict[str, float]:
        count = len(self._examples)
        inputs = (
            {name: self._batch[name][i] for name in ("image", "text_ids")} | {"prompt": self._targets[i]["prompt"]}
            for i in range(count)
        )
        return metrics.evaluate(self._targets, predict(inputs, count), self._written)

    def references(self) -> dict[str, dict[str, float]]:
        from richhf_data import synthetic
        from richhf_data.synthetic import ceiling

        train = list(synthetic.examples("train", CONSTANT_EXAMPLES, self._seed, *self._sizes))
        scores = np.mean([example.scores for example in train], axis=0)
        heatmaps = np.mean([example.heatmaps for example in train], axis=0) / 255
        constant = metrics.evaluate(self._targets, metrics.constant_predictions(scores, heatmaps, self._targets))
        evidence = [ceiling.evidence(one) for one in self._examples]
        return {"constant predictor": constant} | ceiling.references(evidence)


def calibrated(params, results: dict[str, float]):
    """Parameters whose deviations are calibrated on the split that they were evaluated on; others stay as they are.

    Args:
      results: of `Evaluation.run` with these parameters. A score without a label there keeps its factor.
    """
    if (factors := params.get("deviation_factors")) is None:
        return params
    by = np.array([results[f"score/factor/{name}"] for name in schema.SCORES], np.float32)
    by = multihost_utils.broadcast_one_to_all(np.nan_to_num(by, nan=1.0))
    multiplied = jax.jit(jnp.multiply, out_shardings=factors.sharding)
    return params | {"deviation_factors": multiplied(factors, by)}


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


def config_of_run(workdir):
    """The config of a workdir. Raises UserError for a folder that rahf.convert wrote, and as `workdirs.read_config`."""
    config = workdirs.read_config(workdir)
    if "kind" in config:
        raise UserError(
            f"workdir: {workdir} was written by rahf.convert, expected the workdir of a run, into which eval/ is written; "
            f"`python -m rahf.tables --data_dir=DATA --rows NAME={workdir}` evaluates this one"
        )
    return config


def evaluate(workdir, split: str, num_examples: int | None = None, config=None) -> dict[str, float]:
    """Evaluates a workdir's best checkpoint, writes the files of eval/, prints the tables, returns the metrics.

    On several hosts each has every example and predicts its share of each batch; all return the same, one writes.

    Args:
      config: the workdir's by default, or one that differs in what `EVALUATE_MAY_DIFFER` names.

    Raises:
      UserError: no run or no evaluation there, no such split, a number out of its range, or a config that contradicts the
        workdir's.
    """
    config = config_of_run(workdir) if config is None else config
    experiments.check_ranges(config, RANGES)
    workdirs.check_config(workdir, config, EVALUATE_MAY_DIFFER)
    model = predictor.load(workdir, config)
    evaluation = Evaluation(model.predictor, split, num_examples)
    results = evaluation.run(model.params)
    if jax.process_index() > 0:
        return results
    references = evaluation.references()
    if "heatmaps" not in model.model_config.parts:  # the targets' size is arbitrary
        references = {row: {k: v for k, v in of.items() if not k.startswith("heatmap/")} for row, of in references.items()}
    table = metrics.table({"this model": results} | references)
    folder = paths.absolute(workdir) / "eval"
    json_files.write(folder / f"{split}.json", results)
    json_files.write(folder / f"{split}.references.json", references)
    paths.replace(folder / f"{split}.md", f"{table}\n".encode())
    print(f"\n{split}: {results['num_examples']:.0f} examples, {workdir}\n\n{table}\n\nwritten to {folder / split}.json")
    return results


def main():
    """The command."""
    args = flags.FLAGS
    with hosts.joined():
        evaluate(args.workdir, args.split, args.num_examples, args.config)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The training run.")
    flags.DEFINE_string("split", "test", "Which split of the dataset.")
    ranges.flag("num_examples", None, "The first so many only; all by default.", ranges.COUNT)
    hosts.define_flags()
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader(of_workdir=config_of_run))
