"""Predicts rich feedback for images and their prompts, from a workdir; needs no TensorFlow.

    python -m rahf.predict --workdir=DIR --images='photos/*.jpg' --prompt='a yellow cat' --output=DIR
    python -m rahf.predict --workdir=DIR --images=list.jsonl --output=DIR       one {"image": path, "prompt": text} a line

writes predictions.jsonl, heatmaps/*.png and report.html into the output folder. In Python:

    model = rahf.load(DIR)
    feedback = model.predict(images, prompts)
"""

import collections
import dataclasses
import functools
import glob
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import cv2
import flax.traverse_util
import jax
import numpy as np
import PIL.Image
from absl import flags
from flax import linen as nn
from tqdm.auto import tqdm

from rahf import checkpoints, hosts, partitioning, report, weights
from rahf.models import rahf as rahf_model
from richhf_data import command, keywords, metrics, paths, schema
from richhf_data import vocabulary as vocabularies
from richhf_data.errors import UserError


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What RAHF says of B images.

    Attributes:
      scores: name of `schema.SCORES` -> float32[B] in [0, 1], higher is better.
      heatmaps: name of `schema.HEATMAPS` -> float32[B, h, w] in [0, 1], the model's heatmap resolution.
      labelled_prompts: B keyword sequences as the decoder wrote them ("a yellow_0 cat").
      keywords: for each image the prompt's words that it contradicts.
    """

    scores: dict[str, np.ndarray]
    heatmaps: dict[str, np.ndarray]
    labelled_prompts: list[str]
    keywords: list[list[str]]


class Model:
    """A RAHF with its parameters and vocabulary, ready to predict."""

    def __init__(self, config, params, vocabulary: vocabularies.Vocabulary, mesh=None):
        self.config = config
        self.params = params
        self.vocabulary = vocabulary
        self.model_config = rahf_model.RAHFConfig.from_dict(config.model.to_dict())
        self.mesh = partitioning.make_mesh() if mesh is None else mesh
        self._sharding = partitioning.batch_sharding(self.mesh)
        module = rahf_model.RAHF(self.model_config)

        @functools.partial(jax.jit, out_shardings=partitioning.replicated(self.mesh))  # every process has every row
        def forward(params, image, text_ids):
            length = config.data.keyword_length
            return module.apply({"params": params}, image, text_ids, length, method=module.predict)

        self.forward = forward

    def predict_batch(self, batch) -> list[dict]:
        """One dictionary a row: scores float32[4] and heatmaps float32[h, w, 2], both in [0, 1], keyword_ids int32[T]
        and the labelled_prompt that they spell.

        Args:
          batch: `image` uint8[B, H, W, 3] at the model's size and `text_ids`, as schema.py describes. Any B: rows are
            added up to a multiple of the devices and taken off again. On several hosts each is given the same rows.
        """
        rows = len(batch["image"])
        padding = -rows % partitioning.sizes(self.mesh)["data"]
        inputs = {
            name: np.pad(batch[name], [(0, padding)] + [(0, 0)] * (batch[name].ndim - 1))
            for name in ("image", "text_ids")
        }
        local = partitioning.local_rows(self._sharding, rows + padding)
        inputs = partitioning.shard_batch({name: array[local] for name, array in inputs.items()}, self._sharding)
        with partitioning.activate(self.mesh):
            outputs = self.forward(self.params, inputs["image"], inputs["text_ids"])
        scores, heatmaps, keyword_ids = (np.asarray(array)[:rows] for array in outputs)
        return [
            {"scores": s, "heatmaps": m, "keyword_ids": ids, "labelled_prompt": self.vocabulary.decode(ids)}
            for s, m, ids in zip(scores, heatmaps, keyword_ids, strict=True)
        ]

    def prepare(self, image: np.ndarray, prompt: str) -> dict:
        """One row of a batch from an RGB image uint8[H, W, 3] of any size and its prompt.

        Raises:
          UserError: the image is not uint8[H, W, 3], or the prompt is longer than the model's text length.
        """
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise UserError(f"image: got {image.dtype}{list(image.shape)}, expected uint8[H, W, 3], RGB")
        length = self.config.data.text_length
        texts = schema.task_prompts(prompt, self.model_config.variant)
        if (longest := max(map(self.vocabulary.num_ids, texts))) > length:
            raise UserError(
                f"prompt: {prompt[:80]!r} takes {longest} ids with its end, the model reads data.text_length={length}; "
                "shorten it"
            )
        text_ids = np.stack([self.vocabulary.encode(text, length) for text in texts])
        if self.model_config.variant == "multi_head":
            text_ids = text_ids[0]
        return {"image": resize(image, self.model_config.image_size), "text_ids": text_ids}

    def predict(self, images: Sequence[np.ndarray], prompts: Sequence[str], batch_size: int = 32) -> Feedback:
        """Feedback for B RGB images, uint8[H, W, 3] of any sizes, and their B prompts.

        Raises:
          UserError: different numbers of images and prompts; an image or a prompt that `prepare` refuses.
        """
        if len(images) != len(prompts):
            raise UserError(f"prompts: got {len(prompts)} for {len(images)} images, expected one each")
        inputs = (self.prepare(image, prompt) for image, prompt in zip(images, prompts, strict=True))
        return _feedback(list(self.predict_rows(inputs, min(batch_size, len(images)))), prompts)

    def predict_rows(self, examples: Iterable[dict], batch_size: int) -> Iterator[dict]:
        """`predict_batch` over any number of rows, each a dictionary of `image` and `text_ids`.

        The last batch is filled up to the one compiled shape, and cut again.
        """
        examples = iter(examples)
        while part := list(itertools.islice(examples, batch_size)):
            filled = part + [part[-1]] * (batch_size - len(part))
            yield from self.predict_batch(
                {name: np.stack([example[name] for example in filled]) for name in ("image", "text_ids")}
            )[: len(part)]


def _feedback(rows: Sequence[dict], prompts: Sequence[str]) -> Feedback:
    """Collects `predict_batch`'s rows."""
    size = rows[0]["heatmaps"].shape[:2] if rows else (0, 0)
    scores = np.asarray([row["scores"] for row in rows], np.float32).reshape(-1, len(schema.SCORES))
    heatmaps = np.asarray([row["heatmaps"] for row in rows], np.float32).reshape(-1, *size, len(schema.HEATMAPS))
    words = []
    for row, prompt in zip(rows, prompts, strict=True):
        tokens = keywords.tokenize(prompt)
        words.append(keywords.misaligned_words(tokens, keywords.read_labels(row["labelled_prompt"], tokens)))
    return Feedback(
        scores={name: scores[:, i] for i, name in enumerate(schema.SCORES)},
        heatmaps={name: heatmaps[..., i] for i, name in enumerate(schema.HEATMAPS)},
        labelled_prompts=[row["labelled_prompt"] for row in rows],
        keywords=words,
    )


def load(workdir) -> Model:
    """The model of a workdir, as its best evaluation so far found it; or of a folder that rahf.convert wrote.

    Raises:
      UserError: the folder holds no run, or no checkpoint, or one of another architecture.
    """
    workdir = paths.absolute(workdir)
    config = checkpoints.read_config(workdir)
    vocabulary = vocabularies.Vocabulary(workdir / "vocabulary.model")
    model = Model(config, None, vocabulary)
    module = rahf_model.RAHF(model.model_config)
    inputs = rahf_model.dummy_inputs(model.model_config, config.data.text_length)
    boxed = jax.eval_shape(lambda key: module.init(key, *inputs)["params"], jax.random.key(0))
    shardings = partitioning.param_shardings(model.mesh, boxed)
    targets = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings)
    if (file := workdir / "weights.safetensors").is_file():
        if "://" in str(workdir):
            raise UserError(f"workdir: {workdir} holds weights of rahf.convert, expected them on a disk; copy the folder")
        model.params = _read_params(file, targets)
    else:
        model.params = checkpoints.restore_params(workdir, targets)
    return model


def _read_params(file, targets):
    """Parameters of a safetensors file with our names, placed as `targets` says, one tensor at a time."""
    tensors, targets = weights.open_safetensors(file), flax.traverse_util.flatten_dict(targets, sep="/")
    shapes = ({name: tuple(value.shape) for name, value in side.items()} for side in (tensors, targets))
    checkpoints.check_shapes(*shapes, file)
    params = {name: partitioning.place(array, targets[name].sharding) for name, array in weights.read_all(tensors)}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def check_vocabulary(model_config: rahf_model.RAHFConfig, vocabulary: vocabularies.Vocabulary) -> None:
    """Refuses a vocabulary with more pieces than the model has embeddings."""
    if vocabulary.size > model_config.t5.vocab_size:
        raise UserError(
            f"vocabulary: {vocabulary.path} has {vocabulary.size} pieces, the model embeds "
            f"model.t5.vocab_size={model_config.t5.vocab_size}; raise it, or train a smaller vocabulary"
        )


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8[H, W, 3] -> uint8[size, size, 3], antialiased bilinear: as `richhf_data.preprocessors.resize`, to one level."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BILINEAR))


def read_image(path) -> np.ndarray:
    """An image file as uint8[H, W, 3], RGB.

    Raises:
      UserError: the file is missing or does not decode.
    """
    data = np.fromfile(path, np.uint8) if pathlib.Path(path).is_file() else np.zeros(0, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None:
        raise UserError(f"image: {path} is missing or is not a readable image (JPEG, PNG, WebP)")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_inputs(spec: str, prompt: str | None) -> list[tuple[str, str]]:
    """(path, prompt) of every image of a glob or a .jsonl file.

    Raises:
      UserError: nothing matches; a line is not {"image": ..., "prompt": ...}; an image without a prompt.
    """
    if spec.endswith(".jsonl"):
        folder, inputs = pathlib.Path(spec).parent, []
        if not pathlib.Path(spec).is_file():
            raise UserError(f"images: no file {spec}")
        for number, line in enumerate(pathlib.Path(spec).read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                inputs.append((str(folder / row["image"]), str(row["prompt"])))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f'images: {spec} line {number}: got {line[:80]!r}, expected {{"image": path, "prompt": text}}'
                ) from error
    else:
        inputs = []
        for path in sorted(glob.glob(spec, recursive=True)):
            beside = pathlib.Path(path).with_suffix(".txt")
            if prompt is None and not beside.is_file():
                raise UserError(
                    f"images: {path} has no prompt; pass --prompt, write {beside.name} beside it, or use .jsonl"
                )
            inputs.append((path, prompt if prompt is not None else beside.read_text().strip()))
    if not inputs:
        raise UserError(f"images: nothing matches {spec}")
    return inputs


REPORT_IMAGES = 200  # the page holds its pictures itself; predictions.jsonl and heatmaps/ have them all


def write(output, items: Iterable[dict], count: int, tables: Sequence[Sequence[Sequence[str]]] = ()) -> None:
    """Writes predictions.jsonl, heatmaps/*.png and report.html, which shows the first `REPORT_IMAGES` of `count` images.

    Args:
      items: dictionaries as rahf/report.py describes, with `name`.
      tables: what `evaluation_tables` gives, for the top of the report.
    """
    output = paths.absolute(output)
    (output / "heatmaps").mkdir(parents=True, exist_ok=True)
    shown = []
    partial = output / "predictions.jsonl.partial"
    with partial.open("w") as lines:
        for index, item in enumerate(tqdm(items, total=count, desc="predict", unit="image")):
            files = {name: f"heatmaps/{index:05d}_{name}.png" for name in item["heatmaps"]}
            for name, file in files.items():
                image = np.round(item["heatmaps"][name] * 255).astype(np.uint8)
                (output / file).write_bytes(cv2.imencode(".png", image)[1].tobytes())
            tokens = keywords.tokenize(item["prompt"])
            row = {
                "image": item["name"],
                "prompt": item["prompt"],
                "scores": {name: round(float(value), 6) for name, value in item["scores"].items()},
                "labelled_prompt": item["labelled_prompt"],
                "keywords": keywords.misaligned_words(tokens, keywords.read_labels(item["labelled_prompt"], tokens)),
                "heatmaps": files,
            }
            lines.write(json.dumps(row) + "\n")
            if index < REPORT_IMAGES:
                shown.append(item)
    partial.replace(output / "predictions.jsonl")
    title = "RAHF: rich feedback" + (f" (the first {len(shown)} of {count} images)" if count > len(shown) else "")
    report.write(output / "report.html", shown, title=title, tables=tables)
    print(f"{count} images: {output / 'report.html'}, predictions.jsonl, heatmaps/")


def predict_items(model: Model, examples: Iterable[dict], batch_size: int) -> Iterator[dict]:
    """Items of rahf/report.py from examples: dictionaries of `image` (RGB, any size), `prompt`, `name`, maybe `truth`."""
    shown, prepared = itertools.tee(examples)
    rows = model.predict_rows((model.prepare(example["image"], example["prompt"]) for example in prepared), batch_size)
    for example, row in zip(shown, rows, strict=True):
        yield example | {
            "scores": dict(zip(schema.SCORES, row["scores"].tolist(), strict=True)),
            "heatmaps": {name: row["heatmaps"][..., i] for i, name in enumerate(schema.HEATMAPS)},
            "labelled_prompt": row["labelled_prompt"],
        }


def dataset_examples(data_dir, split: str, limit: int | None) -> tuple[Iterator[dict], int]:
    """A built dataset's examples with their truth, and how many; this alone needs TensorFlow."""
    from richhf_data import tasks

    examples, count = tasks.decoded(data_dir, split, limit)

    def items():
        for example in examples:
            heatmaps = example["heatmaps"].astype(np.float32) / 255
            yield {
                "name": example["uid"],
                "image": example["image"],
                "prompt": example["prompt"],
                "truth": {
                    "scores": {
                        name: float(example["scores"][i])
                        for i, name in enumerate(schema.SCORES)
                        if example["score_mask"][i]
                    },
                    "heatmaps": {
                        name: heatmaps[..., i] for i, name in enumerate(schema.HEATMAPS) if example["heatmap_mask"][i]
                    },
                    "labels": example["labels"],
                },
            }

    return items(), count


def evaluation_tables(workdir, split: str) -> list[list[list[str]]]:
    """The papers' tables of what `rahf.evaluate` found on this split; none when it was not run."""
    folder = paths.absolute(workdir) / "eval"
    if not (folder / f"{split}.references.json").is_file():
        return []
    results, references = (json.loads((folder / f"{split}{end}.json").read_text()) for end in ("", ".references"))
    return metrics.tables({"this model": results} | references)


def main():
    """The command."""
    args = flags.FLAGS
    with hosts.joined():
        if (args.images is None) == (args.data_dir is None):
            raise UserError("pass either --images=GLOB|JSONL or --data_dir=DIR")
        model = load(args.workdir)
        tables = []
        if args.data_dir:
            examples, count = dataset_examples(args.data_dir, args.split, args.limit)
            tables = evaluation_tables(args.workdir, args.split)
        else:
            inputs = read_inputs(args.images, args.prompt)[: args.limit]
            count = len(inputs)
            examples = ({"name": path, "image": read_image(path), "prompt": prompt} for path, prompt in inputs)
        items = predict_items(model, examples, min(args.batch_size, count))
        if jax.process_index() == 0:
            write(args.output, items, count, tables)
        else:
            collections.deque(items, maxlen=0)  # its devices compute their share


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The folder of a training run, or one that rahf.convert wrote.")
    flags.DEFINE_string("images", None, "A glob of image files, or a .jsonl file of {image, prompt} lines.")
    flags.DEFINE_string("prompt", None, "The prompt of all images of a glob; else each image's own NAME.txt.")
    flags.DEFINE_string("data_dir", None, "Instead of --images: a built dataset; the report shows its truth.")
    flags.DEFINE_string("split", "test", "The split of --data_dir.")
    flags.DEFINE_integer("limit", None, "Predict the first so many only.", lower_bound=1)
    flags.DEFINE_string("output", None, "The folder to write to.")
    flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1)
    hosts.define_flags()
    flags.mark_flags_as_required(["workdir", "output"])
    command.run(main)
