"""Where a run's batches and vocabulary come from: a built dataset through seqio, or RichHF-Synth drawn endlessly.

`data.source` = "seqio" reads `data.data_dir`, which `richhf_data.build` wrote. "stream" needs no files and no TensorFlow.
"""

import pathlib
from collections.abc import Iterator

import numpy as np

from rahf.models.rahf import RAHFConfig
from richhf_data import synthetic
from richhf_data import vocabulary as vocabularies
from richhf_data.synthetic import stream

VOCABULARY_PROMPTS = 4000  # drawn to train the vocabulary of a run from `stream`


def install_vocabulary(config, workdir) -> vocabularies.Vocabulary:
    """The run's vocabulary, copied or trained into the workdir, so that the workdir alone can predict.

    Raises:
      ValueError: `data.vocabulary`, or the dataset's own, is missing.
    """
    path = pathlib.Path(workdir) / "vocabulary.model"
    if not path.exists():
        if config.data.vocabulary or config.data.source == "seqio":
            source = config.data.vocabulary or pathlib.Path(config.data.data_dir) / "vocabulary.model"
            vocabularies.Vocabulary(source).copy(path)
        else:
            prompts = synthetic.train_prompts(VOCABULARY_PROMPTS, seed=config.seed)
            vocabularies.train(prompts, path, config.model.t5.vocab_size)
    return vocabularies.Vocabulary(path)


def training_batches(config, vocabulary: vocabularies.Vocabulary, start: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches (schema.py) from step `start` on; the batch of a step depends on the seed and the step alone.

    Raises:
      ValueError: an unknown `data.source`.
    """
    if config.data.source == "seqio":
        from rahf import features

        task = register_task(config, vocabulary, augment=config.data.augment)
        batches = features.training_batches(task, config.train.batch_size, seed=config.seed, start_step=start)
        return (batch for batch in batches)  # a generator, as the stream's is: it can be closed
    if config.data.source == "stream":
        return stream.batches(
            config.train.batch_size,
            seed=config.seed,
            vocabulary=vocabulary,
            start=start,
            workers=config.data.num_workers,
            **image_arguments(config),
            **text_arguments(config),
        )
    raise ValueError(f"data.source: got {config.data.source!r}, expected 'seqio' or 'stream'")


def image_arguments(config) -> dict:
    """The sizes that the model sees and predicts, pixels."""
    model = RAHFConfig.from_dict(config.model.to_dict())
    return {"image_size": model.image_size, "heatmap_size": model.heatmap_size}


def text_arguments(config) -> dict:
    """What tokenising has to know."""
    return {
        "variant": config.model.variant,
        "text_length": config.data.text_length,
        "keyword_length": config.data.keyword_length,
    }


def register_task(config, vocabulary: vocabularies.Vocabulary, augment: bool) -> str:
    """The seqio task of `data.data_dir` for this config's model."""
    from richhf_data import tasks

    if not config.data.data_dir:
        raise ValueError(
            "data.data_dir: got '', expected the folder that richhf_data.build wrote: --config.data.data_dir=DIR"
        )
    return tasks.register(
        config.data.data_dir,
        vocabulary_path=vocabulary.path,
        augment=augment,
        truncate_long_prompts=config.data.truncate_long_prompts,
        **image_arguments(config),
        **text_arguments(config),
    )
