"""Decoding that may only copy the prompt (data.decoding=copy) beside free decoding: speed, and what is copied exactly.

    python -m benchmarks.decoding --workdir=DIR [--split=test] [--limit=1000] [--batch_size=32] [--config.key=value ...]
    python -m benchmarks.decoding --config=rahf_synth_tiny

A trained run, on a split of its dataset or of RichHF-Synth; or a config with random weights, for the speed alone. Free
decoding with random weights seldom ends before data.keyword_length ids, so compare the times of a step of the decoder.
"""

import functools
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import tabulate
from absl import flags
from flax import linen as nn

from rahf import experiments, predictor, sources, workdirs
from rahf.models import critics
from richhf_data import command, copying, keywords, metrics, ranges, synthetic


def examples_of(config, split: str, limit: int) -> list[dict]:
    """The first examples of a split, with images of the model's size or larger."""
    if config.data.source == "seqio" or config.data.data_dir:
        from richhf_data import tasks

        return list(tasks.decoded(sources.evaluation_dir(config), split, limit)[0])
    size = config.model.image_size
    return [example.decoded() for example in synthetic.examples(split, limit, config.seed, size, size)]


def random_model(config) -> predictor.Model:
    """A model of random weights, with a vocabulary of RichHF-Synth."""
    config.data.source = "stream"
    with tempfile.TemporaryDirectory() as folder:
        made = predictor.Predictor(config, sources.install_vocabulary(config, pathlib.Path(folder)))
    module, inputs = critics.module_of(made.model_config), critics.dummy_inputs(made.model_config)
    params = jax.jit(lambda key: nn.unbox(module.init(key, *inputs)["params"]))(jax.random.key(0))
    return predictor.Model(made, made.gather(params))


def decoder_of(model: predictor.Model, rows: list[dict], tables: np.ndarray) -> dict[str, Callable]:
    """Each way of decoding -> a function that writes the keyword ids of a batch, which the encoder has read already."""
    module, length = critics.module_of(model.model_config), model.config.data.keyword_length

    def decode(module, fused, mask, copy):
        return module.t5.greedy_decode(*module._for_decoder(fused, mask), length, copy)

    perceive = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, method=module.perceive)[2:])
    read = perceive(model.params, *(np.stack([row[name] for row in rows]) for name in ("image", "text_ids")))
    decode = jax.jit(nn.apply(decode, module))
    given = {"free": None, "copy": jax.device_put(tables)}
    return {name: functools.partial(decode, {"params": model.params}, *read, copy) for name, copy in given.items()}


def main():
    args = flags.FLAGS
    free = predictor.load(args.workdir, args.config) if args.workdir else random_model(args.config)
    config = free.config.copy_and_resolve_references().unlock()
    config.data.decoding = "copy"
    models = {"free": free, "copy": predictor.Model(predictor.Predictor(config, free.vocabulary), free.params)}

    examples, size = examples_of(free.config, args.split, args.limit), args.batch_size
    examples = examples[: len(examples) // size * size] or examples
    rows, size = [free.prepare(example["image"], example["prompt"]) for example in examples], min(size, len(examples))
    written = free.vocabulary.written
    automata = copying.Copies(free.vocabulary, config.data.keyword_length)
    start = time.perf_counter()
    for prompt in (prompts := {example["prompt"] for example in examples}):
        automata.table(prompt)
    made_in = (time.perf_counter() - start) / len(prompts)

    found, seconds, in_decoder = {}, {name: [] for name in models}, {name: [] for name in models}
    for _, (name, model) in itertools.product(range(args.repeats + 1), models.items()):
        start = time.perf_counter()
        found[name] = list(model.predict_rows(rows, size))
        seconds[name].append(time.perf_counter() - start)
    decoders = decoder_of(free, rows[:size], np.stack([automata.table(example["prompt"]) for example in examples[:size]]))
    for _, (name, decode) in itertools.product(range(10 * args.repeats + 1), decoders.items()):
        start = time.perf_counter()
        ids = jax.block_until_ready(decode())
        in_decoder[name].append((time.perf_counter() - start) / np.count_nonzero(ids, axis=1).max())

    def is_exact(prediction, example):
        """Whether a keyword sequence has the prompt's words and no others, in order."""
        tokens = keywords.tokenize(example["prompt"])
        expected = [word for token in tokens for word in keywords.written_words(token, written)]
        return [word for word, _ in keywords.read_words(prediction["labelled_prompt"])] == expected

    table = []
    for name, predictions in found.items():
        lengths = np.count_nonzero([row["keyword_ids"] for row in predictions], axis=1).reshape(-1, size)  # of each batch
        results = metrics.evaluate(examples, [row | {"heatmaps": None} for row in predictions], written)
        table.append(
            {
                "decoding": name,
                "pictures/s": f"{len(rows) / min(seconds[name][1:]):.4g}",
                "steps a batch": f"{lengths.max(axis=1).mean():.1f}",
                "ms a step": f"{min(in_decoder[name][1:]) * 1e3:.3f}",
                "copied exactly": f"{sum(map(is_exact, predictions, examples)):,} of {len(rows):,}",
                **{key: f"{results[f'keywords/micro/{key}']:.3f}" for key in ("precision", "recall", "f1")},
            }
        )
    print(tabulate.tabulate(table, headers="keys", disable_numparse=True))
    pairs = list(zip(found["free"], found["copy"], examples, strict=True))
    right = [(one, other) for one, other, example in pairs if is_exact(one, example)]
    equal = sum(np.array_equal(one["keyword_ids"], other["keyword_ids"]) for one, other in right)
    print(f"equal where free decoding copies exactly: {equal:,} of {len(right):,}")
    print(f"an automaton is made in {made_in * 1e6:.0f} us on the host (of {len(prompts):,} prompts)")
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, batches of {size}, best of {args.repeats}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A trained run, or a folder that rahf.convert wrote.")
    flags.DEFINE_string("split", "test", "Which split.")
    ranges.flag("limit", 1000, "Examples, the first so many.", ranges.COUNT)
    ranges.flag("batch_size", 32, "Pictures at a time.", ranges.ROWS)
    ranges.flag("repeats", 3, "Timed repetitions.", ranges.COUNT)
    command.run(main, experiments.reader(kinds=("rahf",), of_workdir=workdirs.read_config))
