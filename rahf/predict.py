"""Predicts rich feedback for images and their prompts, from a workdir; needs no TensorFlow.

    python -m rahf.predict --workdir=DIR --images='photos/*.jpg' --prompt='a yellow cat' --output=DIR
    python -m rahf.predict --workdir=DIR --images=list.jsonl --output=DIR       one {"image": path, "prompt": text} a line

writes predictions.jsonl, heatmaps/*.png and report.html into the output folder. In Python: predictor.py.
"""

import collections
import glob
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import cv2
import jax
import numpy as np
from absl import flags
from tqdm.auto import tqdm

from rahf import evaluate, experiments, hosts, predictor, report, workdirs
from richhf_data import checked, command, images, json_files, jsonl, keywords, metrics, paths, ranges, schema
from richhf_data.errors import UserError


def read_inputs(spec: str, prompt: str | None) -> list[tuple[str, str]]:
    """(path, prompt) of every image of a glob or a .jsonl file.

    Raises:
      UserError: nothing matches; a line is not {"image": ..., "prompt": ...}; an image without a prompt.
    """
    if prompt is not None and not jsonl.is_text(prompt):
        raise UserError(f"prompt: got {prompt!r}, which is not UTF-8, expected UTF-8")
    if spec.endswith(".jsonl"):
        rows = jsonl.read(spec, "images", '{"image": path, "prompt": text}', texts=("image", "prompt"))
        inputs = [(str(pathlib.Path(spec).parent / row["image"]), row["prompt"]) for row in rows]
    else:
        inputs = []
        for path in sorted(glob.glob(spec, recursive=True)):
            beside = pathlib.Path(path).with_suffix(".txt")
            if prompt is None and not beside.is_file():
                raise UserError(
                    f"images: {path} has no prompt; pass --prompt, write {beside.name} beside it, or use .jsonl"
                )
            text = jsonl.decode(beside.read_bytes(), f"prompt: {beside}").strip() if prompt is None else prompt
            inputs.append((path, text))
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
    with paths.writing(output / "predictions.jsonl") as partial, partial.open("w", encoding="utf-8") as lines:
        for index, item in enumerate(tqdm(items, total=count, desc="predict", unit="image")):
            files = {name: f"heatmaps/{index:05d}_{name}.png" for name in item["heatmaps"]}
            for name, file in files.items():
                image = np.round(item["heatmaps"][name] * 255).astype(np.uint8)
                paths.replace(output / file, cv2.imencode(".png", image)[1].tobytes())
            tokens = keywords.tokenize(item["prompt"])
            row = {
                "image": item["name"],
                "prompt": item["prompt"],
                "scores": {name: round(float(value), 6) for name, value in item["scores"].items()},
                "labelled_prompt": item["labelled_prompt"],
                "keywords": keywords.misaligned_words(tokens, report.predicted_labels(item)),
                "heatmaps": files,
            }
            lines.write(json.dumps(row) + "\n")
            if index < REPORT_IMAGES:
                shown.append(item)
    title = "RAHF: rich feedback" + (f" (the first {len(shown)} of {count} images)" if count > len(shown) else "")
    report.write(output / "report.html", shown, title=title, tables=tables)
    print(f"{count} images: {output / 'report.html'}, predictions.jsonl, heatmaps/")


def predict_items(model: predictor.Model, examples: Iterable[dict], batch_size: int) -> Iterator[dict]:
    """Items of rahf/report.py from examples: dictionaries of `image` (RGB, any size), `prompt`, `name`, maybe `truth`."""
    shown, prepared = itertools.tee(examples)
    inputs = (model.prepare(item["image"], item["prompt"]) | {"name": item["name"]} for item in prepared)
    rows = model.predict_rows(inputs, batch_size)
    for example, row in zip(shown, rows, strict=True):
        yield example | {
            "scores": dict(zip(schema.SCORES, row["scores"].tolist(), strict=True)),
            "heatmaps": {name: row["heatmaps"][..., i] for i, name in enumerate(schema.HEATMAPS)},
            "labelled_prompt": row["labelled_prompt"],
            "labels": keywords.read_labels(
                row["labelled_prompt"], keywords.tokenize(example["prompt"]), model.vocabulary.written
            ),
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
    results = json_files.read_as(dict[str, checked.Metric | None], folder / f"{split}.json")
    references = json_files.read_as(dict[str, dict[str, checked.Metric | None]], folder / f"{split}.references.json")
    return metrics.tables({"this model": results} | references)


def main():
    """The command."""
    args = flags.FLAGS
    with hosts.joined(), hosts.locked(args.output, ".predict.lock"):
        if (args.images is None) == (args.data_dir is None):
            raise UserError("pass either --images=GLOB|JSONL or --data_dir=DIR")
        workdirs.check_config(args.workdir, args.config, evaluate.EVALUATE_MAY_DIFFER)
        model = predictor.load(args.workdir, args.config)
        tables = []
        if args.data_dir:
            examples, count = dataset_examples(args.data_dir, args.split, args.limit)
            tables = evaluation_tables(args.workdir, args.split)
        else:
            inputs = read_inputs(args.images, args.prompt)[: args.limit]
            count = len(inputs)
            examples = ({"name": path, "image": images.read(path), "prompt": prompt} for path, prompt in inputs)
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
    ranges.flag("limit", None, "Predict the first so many only.", ranges.COUNT)
    flags.DEFINE_string("output", None, "The folder to write to.")
    ranges.flag("batch_size", 32, "Images at a time.", ranges.ROWS)
    hosts.define_flags()
    flags.mark_flags_as_required(["workdir", "output"])
    command.run(main, experiments.reader(of_workdir=workdirs.read_config))
