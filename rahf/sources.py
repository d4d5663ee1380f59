"""Where a run's batches and vocabulary come from: a built dataset through seqio, or RichHF-Synth drawn endlessly.

`data.source` = "seqio" reads `data.data_dir`, which `richhf_data.build` wrote; or, to train, the datasets of
`data.mixture` at their rates. "stream" needs no files and no TensorFlow.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath

from rahf import folders, hosts, workdirs
from rahf.fingerprint import fingerprint
from rahf.models import critics
from richhf_data import json_files, keywords, paths, ranges, schema, synthetic
from richhf_data import vocabulary as vocabularies
from richhf_data.errors import UserError
from richhf_data.synthetic import stream

SOURCES = ranges.OneOf(("seqio", "stream"))
VOCABULARY_PROMPTS = 4000  # drawn to train the vocabulary of a run from `stream`
VOCABULARY_SIZE = 512  # ids of it at most: the prompts have no more


def install_vocabulary(config, workdir) -> vocabularies.Vocabulary | vocabularies.CLIPVocabulary:
    """The run's vocabulary, copied or trained into the workdir, so that the workdir alone can predict.

    It is `data.vocabulary`; or that of the CLIP or of the whole critic that the run starts from; or the dataset's.

    Raises:
      UserError: it is missing; the workdir's is damaged.
    """
    workdir = paths.absolute(workdir)
    files = [workdir / name for name in (*vocabularies.CLIP_FILES, "vocabulary.model")]
    complete = (workdir / "vocabulary.model").exists() or any(map(workdirs.is_sealed, files))
    if jax.process_index() == 0 and not complete:
        if given := given_vocabulary(config):
            given.copy(workdir)
        else:
            prompts = list(synthetic.train_prompts(VOCABULARY_PROMPTS, config.seed, left_out(config)))
            prompts += [schema.CAPTION_PROMPT] * (config.data.captions > 0)
            model = critics.config_of(config.model.to_dict())
            size = min(VOCABULARY_SIZE, model.vocab_size or VOCABULARY_SIZE)
            vocabularies.train(prompts, workdir / "vocabulary.model", size)
        for file in files:
            if file.exists():
                workdirs.seal(file)
    hosts.wait("vocabulary")
    return workdirs.vocabulary(workdir)


def given_vocabulary(config) -> vocabularies.Vocabulary | vocabularies.CLIPVocabulary | None:
    """The vocabulary that `install_vocabulary` copies; None where it trains one. UserError where it is missing."""
    if given := config.data.vocabulary or config.init.get("clip"):
        return vocabularies.of(folders.local_folder(given))
    if config.init.rahf and not config.init.get("t5"):
        return workdirs.vocabulary(folders.local_folder(config.init.rahf))
    if config.data.source == "seqio":
        return vocabularies.of(epath.Path(evaluation_dir(config)) / "vocabulary.model")
    return None


def training_batches(
    config, vocabulary: vocabularies.Vocabulary, start: int, rows: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches (schema.py) from step `start` on; the batch of a step depends on the seed and the step alone.

    With a `train.marked_weight` other than 1, a batch has `keyword_weights` float32[B, T] too: that weight for the ids of a
    suffix, which marks a misaligned word, and 1 for all others. With a `model.word_head` it has `word_labels` and
    `word_weights` (`labelled_words`).

    Args:
      config: its `data.source` is one of `SOURCES`.
      rows: which rows of each global batch this process reads; all by default.
    """
    batches = _plain_batches(config, vocabulary, start, rows)
    weighs, labels = _weighs_keywords(config), _labels_words(config)
    if not weighs and not labels:
        return batches
    weight, suffix = config.train.marked_weight, vocabulary.pieces_of_suffix() if weighs else ()

    def with_labels():
        with contextlib.closing(batches):
            for batch in batches:
                if weighs:
                    batch |= {"keyword_weights": marked_weights(batch["keyword_ids"], suffix, weight)}
                if labels:
                    batch |= labelled_words(batch["text_ids"][:, -1], batch["keyword_ids"], vocabulary, weight)
                yield batch

    return with_labels()


def _labels_words(config) -> bool:
    model = critics.config_of(config.model.to_dict())
    return model.architecture == "rahf" and model.word_head


def _weighs_keywords(config) -> bool:
    """Whether the ids of the keywords count differently. A converted folder has no section train."""
    weight = config.get("train", {}).get("marked_weight", 1.0)
    return weight != 1 and "keywords" in critics.config_of(config.model.to_dict()).parts


def marked_weights(keyword_ids: np.ndarray, suffix: Sequence[int], weight: float) -> np.ndarray:
    """float32[B, T]: `weight` where int32[B, T] has the ids of `suffix`, one after another, and 1 elsewhere."""
    windows = np.lib.stride_tricks.sliding_window_view(keyword_ids, len(suffix), axis=1)  # [B, T - len + 1, len]
    found = np.all(windows == suffix, axis=-1)
    weights = np.ones(keyword_ids.shape, np.float32)
    for place in range(len(suffix)):
        weights[:, place : place + found.shape[1]][found] = weight
    return weights


def labelled_words(text_ids: np.ndarray, keyword_ids: np.ndarray, vocabulary, weight: float) -> dict[str, np.ndarray]:
    """What `losses.word_loss_sum` reads: which words of each text its keywords mark.

    A text ends with its prompt. Where the characters of its words are not those of the keywords without suffixes, as they
    are not where one of both was cut, the row has no labels.

    Args:
      text_ids: int32[B, L]. keyword_ids: int32[B, T], the labelled prompts. weight: of misaligned words.

    Returns:
      word_labels bool[B, L]: True for the ids of a misaligned word. word_weights float32[B, L]: `weight` for them, 1 for
      those of an aligned word, 0 for the rest.
    """
    labels, weights = np.zeros(text_ids.shape, bool), np.zeros(text_ids.shape, np.float32)
    for row, (text, ids) in enumerate(zip(text_ids, keyword_ids, strict=True)):
        words = keywords.read_words(vocabulary.decode(ids))
        pieces = ["".join(keywords.tokenize(piece)) for piece in vocabulary.spellings(text[text > schema.EOS_ID])]
        written, prompt = "".join(pieces), "".join(word for word, _ in words)
        if prompt and written.endswith(prompt):
            marked = np.repeat([label == keywords.MISALIGNED for _, label in words], [len(word) for word, _ in words])
            lengths = np.array([len(piece) for piece in pieces])
            begins = np.cumsum(lengths) - lengths - len(written) + len(prompt)  # each piece's first character in the prompt
            of_prompt = np.flatnonzero((begins >= 0) & (lengths > 0))
            labels[row, of_prompt] = marked[begins[of_prompt]]
            weights[row, of_prompt] = np.where(labels[row, of_prompt], weight, 1)
    return {"word_labels": labels, "word_weights": weights}


def _plain_batches(config, vocabulary, start, rows) -> Iterator[dict[str, np.ndarray]]:
    if config.data.source == "seqio":
        from rahf import features

        folders = _mixture(config) or {evaluation_dir(config): 1.0}
        rates = {_register(config, folder, vocabulary, config.data.augment): rate for folder, rate in folders.items()}
        return features.training_batches(rates, config.train.batch_size, seed=config.seed, start_step=start, rows=rows)
    return stream.batches(
        config.train.batch_size,
        seed=config.seed,
        vocabulary=vocabulary,
        start=start,
        workers=config.data.num_workers,
        rows=rows,
        left_out=left_out(config),
        captions=config.data.captions,
        **image_arguments(config),
        **text_arguments(config),
    )


def left_out(config) -> frozenset:
    """The scenes that a run from `stream` does not draw: those of `data.left_out`."""
    counts = dict(config.data.left_out)
    return synthetic.scenes(counts.pop("seed"), counts)


def image_arguments(config) -> dict:
    """The sizes that the model sees and predicts, pixels."""
    model = critics.config_of(config.model.to_dict())
    return {"image_size": model.image_size, "heatmap_size": model.heatmap_size}


def text_arguments(config) -> dict:
    """The variant and the lengths that texts are tokenised for."""
    return {
        "variant": critics.config_of(config.model.to_dict()).variant,
        "text_length": config.data.text_length,
        "keyword_length": config.data.keyword_length,
    }


def check_captions(config) -> None:
    """Refuses `data.captions` with a source or a model that has no use for them: UserError."""
    if not config.data.captions:
        return
    if config.data.source != "stream":
        raise UserError(
            f"data.captions: got {config.data.captions:g} with data.source={config.data.source}, expected 0: captions are "
            "a dataset of their own there, one of data.mixture"
        )
    if "keywords" not in critics.config_of(config.model.to_dict()).parts:
        raise UserError(f"data.captions: got {config.data.captions:g}, expected 0: this model has no decoder to write them")


def batch_shapes(config, batch_size: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} of a training batch (schema.py)."""
    sizes, texts = image_arguments(config), schema.num_texts(text_arguments(config)["variant"])
    image, maps, rows = sizes["image_size"], sizes["heatmap_size"], batch_size
    labels = {"keyword_weights": ((rows, config.data.keyword_length), "float32")} if _weighs_keywords(config) else {}
    if _labels_words(config):
        words = rows, config.data.text_length
        labels |= {"word_labels": (words, "bool"), "word_weights": (words, "float32")}
    return labels | {
        "image": ((rows, image, image, 3), "uint8"),
        "text_ids": ((rows, texts, config.data.text_length), "int32"),
        "keyword_ids": ((rows, config.data.keyword_length), "int32"),
        "scores": ((rows, len(schema.SCORES)), "float32"),
        "score_mask": ((rows, len(schema.SCORES)), "bool"),
        "heatmaps": ((rows, maps, maps, len(schema.HEATMAPS)), "uint8"),
        "heatmap_mask": ((rows, len(schema.HEATMAPS)), "bool"),
    }


def register_task(config, vocabulary: vocabularies.Vocabulary, augment: bool):
    """The `tasks.RichhfTask` of the dataset to evaluate on, for this config's model."""
    return _register(config, evaluation_dir(config), vocabulary, augment)


def check_splits(config) -> None:
    """Refuses datasets without a train split, or without the dev split that training evaluates on."""
    if config.data.source != "seqio" and not config.data.data_dir:
        return
    from richhf_data import tasks

    needed = {evaluation_dir(config): {"dev"}}
    if config.data.source == "seqio":
        for folder in _mixture(config) or needed:
            needed.setdefault(folder, set()).add("train")
    for folder, splits in needed.items():
        if missing := sorted(splits - (found := tasks.report(folder)["splits"]).keys()):
            raise UserError(
                f"data: {folder} has the splits {', '.join(found)}, training needs {', '.join(missing)} too; build it again "
                "with such a record file, or with a larger --holdout"
            )


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """What is read of a split in TFDS's dataset_info.json; all its keys count for the identity of the data."""

    name: str


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is read of TFDS's dataset_info.json."""

    name: str
    version: str
    splits: list[SplitInfo]


def identity(config) -> dict:
    """Which datasets a run reads, in JSON: name, version, digests of each split's infos and shards, and of the records.

    The folder does not matter: a copy of a dataset is the same dataset. The digests of the shards are those that the build
    wrote, which reading compares (`builder.Richhf.verify`); a dataset that an earlier version built has none.

    Raises:
      UserError: there is no dataset.
    """
    if config.data.source != "seqio" and not config.data.data_dir:
        return {"datasets": {}}
    from richhf_data import builder, tasks

    found = {}
    trained_on = _mixture(config) if config.data.source == "seqio" else {}
    for folder in dict.fromkeys((*trained_on, evaluation_dir(config))):
        records = tasks.report(folder)["records"]  # digests of the record files or tables that it was built from
        file = builder.dataset_dir(folder) / "dataset_info.json"
        info = json_files.read(file)
        json_files.conform(DatasetInfo, info, file, extra=True)
        splits = {split["name"]: fingerprint(split) for split in info["splits"]}
        about = {"name": info["name"], "version": info["version"], "splits": splits, "records": fingerprint(records)}
        if digests := builder.open_built(folder).digests():
            about["shards"] = {split: fingerprint(shards) for split, shards in digests.items()}
        found[str(len(found))] = about
    return {"datasets": found}


def evaluation_dir(config) -> str:
    """The dataset that evaluation reads, and whose vocabulary a run has: `data.data_dir`, or the mixture's first.

    Raises:
      UserError: neither is given, or the mixture is not of (folder, rate) pairs, each rate above 0.
    """
    mixture = _mixture(config)
    if not config.data.data_dir and not mixture:
        raise UserError(
            "data.data_dir: got '', expected the folder that richhf_data.build wrote: --config.data.data_dir=DIR"
        )
    return config.data.data_dir or next(iter(mixture))


def _mixture(config) -> dict[str, float]:
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else pair for pair in config.data.mixture]
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or type(pair[0]) is not str or pair[1] not in ranges.POSITIVE:
            raise UserError(
                f"data.mixture: got {pair!r}, expected pairs of a folder that richhf_data.build wrote and a rate above 0: "
                "--config.data.mixture=\"(('data/a', 0.8), ('data/b', 0.2))\""
            )
    if len({paths.absolute(folder) for folder, _ in pairs}) < len(pairs):
        raise UserError(f"data.mixture: got {config.data.mixture}, expected each folder once; add up its rates")
    return dict(pairs)


def _unread(config) -> tuple[str, ...]:
    """The lengths of texts that the model does not read."""
    model = critics.config_of(config.model.to_dict())
    reads = {"text_length": model.vocab_size is not None, "keyword_length": "keywords" in model.parts}
    return tuple(name for name, is_read in reads.items() if not is_read)


def _register(config, data_dir, vocabulary, augment: bool):
    from richhf_data import tasks

    return tasks.register(
        data_dir,
        vocabulary_path=vocabulary.path,
        augment=augment,
        truncate_long_prompts=config.data.truncate_long_prompts,
        unread=_unread(config),
        **image_arguments(config),
        **text_arguments(config),
    )
