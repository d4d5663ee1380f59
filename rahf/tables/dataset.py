"""A split of a built dataset: what the rows predict, and the annotators' answers. This alone needs TensorFlow."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from tqdm.auto import tqdm

from rahf import ahead
from rahf.fingerprint import fingerprint
from rahf.tables import bootstrap, predictions, targets
from richhf_data import json_files, metrics, paths
from richhf_data.errors import UserError

CONSTANT = "constant predictor"


class Dataset:
    """A split of a built dataset, or the first examples of it.

    Args:
      data_dir: as given to `richhf_data.build`. num_examples: the first so many; None for all.

    Attributes:
      data_dir: absolute. identity: changes with the dataset's files. split: str. num_examples: int.

    Raises:
      UserError: no dataset or no such split there.
    """

    def __init__(self, data_dir, split: str, num_examples: int | None = None):
        from richhf_data import builder, tasks

        self.data_dir, self.split, self._limit = paths.absolute(data_dir), split, num_examples
        _, self.num_examples = tasks.decoded(data_dir, split, num_examples)
        built = builder.open_built(data_dir)
        digests = built.digests() or [[path.name, path.stat().length, path.stat().mtime] for path in built.folder.iterdir()]
        self.identity = fingerprint(sorted(digests.items()) if isinstance(digests, dict) else sorted(digests))

    @property
    def of(self) -> dict[str, str | int]:
        """What predictions and targets of it say that they are of (`predictions.Identity`, `targets.Header`)."""
        return {"dataset": self.identity, "split": self.split, "num_examples": self.num_examples}

    def examples(self, skip: int = 0) -> Iterator[dict]:
        """Yields the examples from number `skip` on, as `richhf_data.tasks.decoded` does."""
        from richhf_data import tasks

        for number, example in enumerate(tasks.decoded(self.data_dir, self.split, self._limit)[0]):
            if number >= skip:
                yield example

    def write_targets(self, output, size: int) -> None:
        """Writes targets.parquet and references.json into a folder, unless it has those of this split and size.

        Maps are resized as for training and evaluation. The references are the constant predictor's metrics and those that
        came with the dataset: {row: {metric: value}}, null for what a constant prediction leaves undefined.
        """
        output = pathlib.Path(output)
        header = targets.Header(**self.of, heatmap_size=size)
        if targets.header_of(output / "targets.parquet") == header and (output / "references.json").is_file():
            return
        from richhf_data import preprocessors, tasks

        constants, parts = tasks.constants(self.data_dir), []
        count = max(1, min(256, predictions.CHUNK_PIXELS // size**2))

        def chunks():
            start, waiting = 0, []
            for example in self.examples():
                maps = np.asarray(preprocessors.resize_maps(example["heatmaps"], size))
                waiting.append({key: value for key, value in example.items() if key != "image"} | {"heatmaps": maps})
                if len(waiting) == count or start + len(waiting) == self.num_examples:
                    yield start, waiting
                    start, waiting = start + len(waiting), []

        def measured(chunk):
            start, examples = chunk
            if constants is None:
                return examples, None
            constant = metrics.constant_predictions(constants["scores"], constants["heatmaps"], examples)
            return examples, metrics.per_example(examples, constant, range(start, start + len(examples)))

        def examples():
            with (
                contextlib.closing(ahead.mapped(measured, chunks(), 2)) as results,
                tqdm(total=self.num_examples, desc="targets", unit="example", dynamic_ncols=True) as bar,
            ):
                for examples, values in results:
                    parts.append(values)
                    yield from examples
                    bar.update(len(examples))

        for name in ("references.json", "targets.parquet"):
            (output / name).unlink(missing_ok=True)
        targets.write(output / "targets.parquet", header, examples())
        references = {}
        if constants is not None:
            values = metrics.concatenate(parts)
            found = bootstrap.figures(values, np.ones((1, len(values))))
            measurable = {key: value[0] for key, value in found.items() if bootstrap.measured(values, key)}
            references[CONSTANT] = {key: None if np.isnan(value) else float(value) for key, value in measurable.items()}
        for name, row in tasks.references(self.data_dir).get(self.split, {}).items():
            references[name] = {key: value for key, value in row.items() if value is not None and np.isfinite(value)}
        json_files.write(output / "references.json", references)

    def scores(self) -> tuple[list[str], np.ndarray]:
        """The uids of the split, and the annotators' scores: float64[n, 4], nan where there is none."""
        rows = [(one["uid"], np.where(one["score_mask"], one["scores"], np.nan)) for one in self.examples()]
        return [uid for uid, _ in rows], np.array([scores for _, scores in rows], np.float64)

    def prompts(self) -> dict[str, str]:
        """{uid: prompt} of the whole split."""
        from richhf_data import tasks

        return {uid: prompt for uid, prompt, _ in tasks.prompts(self.data_dir)[self.split]}

    def images(self, uids) -> dict[str, np.ndarray]:
        """The images of some uids, uint8[H, W, 3] each."""
        return {one["uid"]: one["image"] for one in self.examples() if one["uid"] in uids}


def read_references(output) -> dict[str, dict[str, float | None]]:
    """What `Dataset.write_targets` wrote of rows to compare with."""
    file = os.path.join(output, "references.json")
    if not os.path.isfile(file):
        raise UserError(f"targets: no file {file}, expected it beside targets.parquet; pass --data_dir")
    return json_files.read_as(dict[str, dict[str, float | None]], file)
