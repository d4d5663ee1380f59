"""Predicts rich feedback for images and their prompts, from a workdir; needs no TensorFlow.

    python -m rahf.predict --workdir=DIR --images='photos/*.jpg' --prompt='a yellow cat' --output=DIR
    python -m rahf.predict --workdir=DIR --images=list.jsonl --output=DIR       one {"image": path, "prompt": text} a line
    python -m rahf.predict --workdir=synth --drawn=24 --output=DIR              24 pictures of RichHF-Synth, with their truth

writes predictions.jsonl, heatmaps/*.png and report.html into the output folder. In Python: predictor.py.

An image that cannot be read, or whose prompt is too long, is left out: failed.jsonl lists it with the reason, and the exit
code is 3. With --strict the first one ends the command. Long prompts lose their ends if the workdir's config says
data.truncate_long_prompts.

Give the same command again to continue a killed run: finished batches are kept in OUTPUT/unfinished until the end. Other
images, prompts, weights or batch sizes begin anew, and take the place of what the command wrote there before.
"""

import collections
import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from rahf import ahead, evaluate, experiments, hosts, predictor, report, sources, workdirs
from rahf.fingerprint import fingerprint
from richhf_data import (
    checked,
    command,
    drawing,
    images,
    input_files,
    json_files,
    jsonl,
    keywords,
    metrics,
    paths,
    ranges,
    schema,
    synthetic,
)
from richhf_data.errors import UserError

FAILED = 3  # the exit code if images were left out
AHEAD = 32  # images that are read before they are asked for
REPORT_IMAGES = 200  # the page holds its pictures itself; predictions.jsonl and heatmaps/ have them all
_RESULTS = ("predictions.jsonl", "failed.jsonl", "report.html")
_PARTIAL = r"(\.[0-9a-f]{16}\.partial)"  # the end of what a killed run of `paths.writing` leaves
_HEATMAP = re.compile(rf"\d{{5,}}_({'|'.join(schema.HEATMAPS)})\.png{_PARTIAL}?")
_BATCH = re.compile(rf"\d{{6,}}-[0-9a-f]{{16}}\.jsonl{_PARTIAL}?")
_LEFT = re.compile(rf"({'|'.join(map(re.escape, _RESULTS))}){_PARTIAL}")
_NAMED = 5  # names in a message


def read_inputs(spec: str, prompt: str | None) -> list[tuple[str, str]]:
    """(path, prompt) of every image of a path, a pattern or a .jsonl file. A pattern leaves out folders and .txt files.

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
        for path in input_files.matches(spec):
            beside = pathlib.Path(path).with_suffix(".txt")
            if os.path.isdir(path) or path.endswith(".txt"):
                continue
            if prompt is None and not beside.is_file():
                raise UserError(
                    f"images: {path} has no prompt; pass --prompt, write {beside.name} beside it, or use .jsonl"
                )
            text = jsonl.decode(beside.read_bytes(), f"prompt: {beside}").strip() if prompt is None else prompt
            inputs.append((path, text))
    if not inputs:
        raise UserError(f"images: nothing matches {spec}" + (", which is a folder" if os.path.isdir(spec) else ""))
    return inputs


def image_examples(inputs: Sequence[tuple[str, str]], output) -> tuple[list[dict], list]:
    """Examples of `read_inputs`' images, and the state of each: JSON that changes with its file or its prompt.

    Raises:
      UserError: an image is among the files that the command writes to `output`.
    """
    own, examples, states = f"{output}/heatmaps", [], []
    for path, prompt in inputs:
        examples.append({"name": path, "image": path, "prompt": prompt})
        states.append([path, prompt, None])
        if input_files.not_a_file(path) is None:
            if paths.contains(own, path):
                raise UserError(f"images: {path} is in {own}, where this command writes; choose another --output")
            found = os.stat(path)
            states[-1][-1] = [found.st_size, found.st_mtime_ns]
    return examples, states


def predict(
    model: predictor.Model,
    examples: Iterable[dict],
    states: Sequence,
    output,
    *,
    batch_size: int = 32,
    strict: bool = False,
    tables: Sequence[Sequence[Sequence[str]]] = (),
) -> int:
    """Predicts examples and writes predictions.jsonl, failed.jsonl, heatmaps/*.png and report.html; returns how many failed.

    The report shows those of the first `REPORT_IMAGES` examples. Process 0 writes.

    Args:
      examples: dictionaries of `image` (RGB, uint8[H, W, 3], or a path), `prompt`, `name`, maybe `truth`.
      states: one for each example, JSON that changes with it: a batch with other states than before is predicted again.
      strict: an example that fails ends it all.
      tables: what `evaluation_tables` gives, for the top of the report.

    Raises:
      UserError: every example fails; or one does, and `strict`.
    """
    examples, size = iter(examples), min(batch_size, len(states))
    starts = range(0, len(states), size)
    model_state = model.identity, model.truncates, size
    names = [f"{start // size:06d}-{fingerprint(*model_state, states[start : start + size])}.jsonl" for start in starts]
    writer = _Writer(output, names) if jax.process_index() == 0 else None
    counts = [min(size, len(states) - start) for start in starts]
    done = [writer is not None and writer.has(*batch, strict) for batch in zip(names, counts, strict=True)]
    done = _on_any_host(done)
    if writer and any(done):
        print(f"output: {sum(done)} of {len(names)} batches were predicted before")

    def prepared():
        for name, start, is_done in zip(names, starts, done, strict=True):
            batch = itertools.islice(examples, size)
            if is_done:
                collections.deque(batch, maxlen=0)
            else:
                items = _prepared(model, batch, start, strict)
                good = [item for item in items.values() if "failed" not in item]
                yield (name, items), [item["inputs"] | {"name": item["name"]} for item in good]

    finished = sum(itertools.compress(counts, done))
    with (
        tqdm(desc="predict", total=len(states), initial=finished, unit="image", dynamic_ncols=True) as bar,
        contextlib.closing(model.predict_batches(prepared(), size)) as results,
    ):
        for (name, items), rows in results:
            good = [number for number, item in items.items() if "failed" not in item]
            predicted = {number: item_of(model, items[number], row) for number, row in zip(good, rows, strict=True)}
            if writer:
                writer.write(name, items | predicted)
            bar.update(len(items))
    failed = writer.finish(model, tables) if writer else 0
    return int(hosts.agreed(np.int32(failed)))


def _prepared(model, examples: Iterable[dict], start: int, strict: bool) -> dict[int, dict]:
    """number -> an item of rahf/report.py before its prediction, with the model's `inputs`; or {"failed": reason} with its
    name and prompt. `start`: the first number.
    """

    def prepare(numbered):
        number, example = numbered
        item = {key: example[key] for key in ("name", "prompt")}
        try:
            image = images.read(example["image"]) if isinstance(example["image"], str) else example["image"]
            item["inputs"] = model.prepare(image, example["prompt"])
            if number < REPORT_IMAGES:
                item |= {"image": drawing.shrink(image, report.INLINED_SIDE), "size": image.shape[1::-1]}
                item["truth"] = example.get("truth")
        except UserError as error:
            if strict:
                raise
            item["failed"] = str(error)
        return number, item

    with contextlib.closing(ahead.mapped(prepare, enumerate(examples, start), AHEAD)) as results:
        items = dict(results)
    failed = _on_any_host(["failed" in item for item in items.values()])
    for item in itertools.compress(items.values(), failed):
        item.setdefault("failed", "image: another process cannot read it")
    return items


def predict_items(model: predictor.Model, examples: Iterable[dict], batch_size: int) -> Iterator[dict]:
    """Items of rahf/report.py from examples: dictionaries of `image` (RGB, any size), `prompt`, `name`, maybe `truth`."""
    examples = list(examples)
    inputs = (model.prepare(item["image"], item["prompt"]) | {"name": item["name"]} for item in examples)
    return map(functools.partial(item_of, model), examples, model.predict_rows(inputs, batch_size))


def item_of(model: predictor.Model, example: dict, row: dict) -> dict:
    """An item of rahf/report.py: an example with a row of `Predictor.predict_rows`."""
    scores, heatmaps, labelled = (row[name] for name in ("scores", "heatmaps", "labelled_prompt"))
    deviations = row.get("deviations")
    said = {} if deviations is None else {"deviations": dict(zip(schema.SCORES, deviations.tolist(), strict=True))}
    tokens = keywords.tokenize(example["prompt"])
    labels = [keywords.ALIGNED] * len(tokens)
    return example | said | {
        "scores": {} if scores is None else dict(zip(schema.SCORES, scores.tolist(), strict=True)),
        "heatmaps": {} if heatmaps is None else {name: heatmaps[..., i] for i, name in enumerate(schema.HEATMAPS)},
        "labelled_prompt": labelled,
        "labels": labels if labelled is None else keywords.read_labels(labelled, tokens, model.vocabulary.written),
    }


def _on_any_host(flags: Sequence[bool]) -> list[bool]:
    """Each flag: whether it is true on any process."""
    if jax.process_count() == 1:
        return list(flags)
    return multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist()


class _Writer:
    """Writes the output folder. A batch is a file in `unfinished` until all are there.

    A line of it is {"line": of predictions.jsonl, "view": of the report, or None} or {"failed": of failed.jsonl}.

    Args:
      names: of the batches' files. Those of other batches are removed.

    Raises:
      UserError: a folder to write to is a link.
    """

    def __init__(self, output, names: Sequence[str]):
        self._output, self._names, self._begun = paths.absolute(output), names, False
        self._heatmaps, self._unfinished = self._output / "heatmaps", self._output / "unfinished"
        for folder in (self._heatmaps, self._unfinished):
            if os.path.islink(folder):
                raise UserError(f"output: {folder} is a link, expected a folder; remove it, or choose another --output")
            folder.mkdir(parents=True, exist_ok=True)
        self._remove_all(self._output, _LEFT, ())
        if others := self._remove_all(self._unfinished, _BATCH, names):
            print(f"output: {others} unfinished batches of other images, prompts, weights or batch sizes were removed")

    def has(self, name: str, count: int, strict: bool) -> bool:
        """Whether a batch of `count` examples is there with its heatmaps and, if `strict`, without a failure."""
        try:
            rows = self._read(name)
            files = [file for row in rows if "failed" not in row for file in row["line"]["heatmaps"].values()]
            failed = any("failed" in row for row in rows)
            whole = len(rows) == count and all((self._output / file).is_file() for file in files)
            return whole and not (strict and failed)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not there, or damaged
            return False

    def write(self, name: str, items: dict[int, dict]) -> None:
        """Writes a batch: what `_prepared` gives, predicted. The first one removes the results of an earlier run."""
        if not self._begun:
            self._begun = True
            for result in _RESULTS:
                (self._output / result).unlink(missing_ok=True)
        rows = [self._failed(item) if "failed" in item else self._row(number, item) for number, item in items.items()]
        jsonl.write(self._unfinished / name, rows)

    def _failed(self, item: dict) -> dict:
        return {"failed": {"image": item["name"], "prompt": item["prompt"], "reason": item["failed"]}}

    def _row(self, number: int, item: dict) -> dict:
        files = {name: f"heatmaps/{number:05d}_{name}.png" for name in item["heatmaps"]}
        for name, file in files.items():
            image = np.round(item["heatmaps"][name] * 255).astype(np.uint8)
            paths.replace(self._output / file, images.png(image))
        words = keywords.misaligned_words(keywords.tokenize(item["prompt"]), report.predicted_labels(item))
        numbers = {
            key: {name: round(float(value), 6) for name, value in item[key].items()}
            for key in ("scores", "deviations")
            if key in item
        }
        line = {
            "image": item["name"],
            "prompt": item["prompt"],
            **numbers,
            "labelled_prompt": item["labelled_prompt"],
            "keywords": words if item["labelled_prompt"] is not None else None,
            "heatmaps": files,
        }
        return {"line": line, "view": report.view(number, item) if "image" in item else None}

    def finish(self, model: predictor.Model, tables) -> int:
        """Joins the batches, removes what is left of earlier runs, and prints what was written; returns how many failed."""
        failed, too_long, views, count, heatmaps = [], [], [], 0, set()
        with paths.writing(self._output / "predictions.jsonl") as partial, partial.open("w", encoding="utf-8") as lines:
            for row in itertools.chain.from_iterable(map(self._read, self._names)):
                if "failed" in row:
                    failed.append(row["failed"])
                    continue
                line, count = row["line"], count + 1
                lines.write(json.dumps(line) + "\n")
                heatmaps |= {pathlib.PurePosixPath(file).name for file in line["heatmaps"].values()}
                views += [row["view"]] if row["view"] else []
                too_long += [line["image"]] if model.is_too_long(line["prompt"]) else []
            if failed:
                jsonl.write(self._output / "failed.jsonl", failed)
            if not count:
                raise UserError(f"none of the {len(failed)} images was predicted; the first: {failed[0]['reason']}")
        self._remove_all(self._heatmaps, _HEATMAP, heatmaps)
        title = "RAHF: rich feedback" + (f" (the first {len(views)} of {count} images)" if count > len(views) else "")
        report.write_views(self._output / "report.html", views, title=title, tables=tables)
        self._remove_all(self._unfinished, _BATCH, ())
        with contextlib.suppress(OSError):  # other files are there, or the bucket has no folders
            self._unfinished.rmdir()
        print(f"images: {count} predicted: {self._output / 'report.html'}, predictions.jsonl, heatmaps/")
        if too_long:
            length = model.config.data.text_length
            print(f"{_some(too_long)}: prompts longer than data.text_length={length}, which lost their ends as in training")
        if failed:
            print(f"{_some([row['image'] for row in failed])}: failed, see {self._output / 'failed.jsonl'}")
        return len(failed)

    def _read(self, name: str) -> list[dict]:
        file = self._unfinished / name
        if "://" not in str(file) and (os.path.islink(file) or input_files.not_a_file(file)):
            raise FileNotFoundError(file)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]

    def _remove_all(self, folder: epath.Path, pattern: re.Pattern, kept) -> int:
        """Removes the files of a folder with such names, except those that are kept; returns how many."""
        there = folder.iterdir() if folder.exists() else ()  # a bucket has no empty folders
        names = [path.name for path in there if pattern.fullmatch(path.name) and path.name not in kept]
        for name in names:
            (folder / name).unlink()
        return len(names)


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NAMED else ""
    return f"images: {len(names)} ({', '.join(map(repr, names[:_NAMED]))}{more})"


def dataset_examples(data_dir, split: str, limit: int | None) -> tuple[Iterator[dict], list]:
    """A built dataset's examples with their truth, and the state of each; this alone needs TensorFlow."""
    from richhf_data import builder, tasks

    examples, count = tasks.decoded(data_dir, split, limit)
    files = [(path.name, path.stat()) for path in builder.dataset_dir(data_dir).iterdir()]
    state = fingerprint(sorted([name, found.length, found.mtime] for name, found in files))

    return map(_with_truth, examples), [[state, split, number] for number in range(count)]


def drawn_examples(config, split: str, count: int) -> tuple[Iterator[dict], list]:
    """The first examples of RichHF-Synth, seed 0, at a model's sizes, with their truth, and the state of each."""
    sizes = sources.image_arguments(config)
    examples = synthetic.examples(split, count, 0, sizes["image_size"], sizes["heatmap_size"])
    return (_with_truth(example.decoded()) for example in examples), [["drawn", split, number] for number in range(count)]


def _with_truth(example: Mapping) -> dict:
    heatmaps = example["heatmaps"].astype(np.float32) / 255
    scores = zip(schema.SCORES, example["scores"].tolist(), example["score_mask"], strict=True)
    return {
        "name": example["uid"],
        "image": example["image"],
        "prompt": example["prompt"],
        "truth": {
            "scores": {name: score for name, score, is_known in scores if is_known},
            "heatmaps": {name: heatmaps[..., i] for i, name in enumerate(schema.HEATMAPS) if example["heatmap_mask"][i]},
            "labels": example["labels"],
        },
    }


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
        if sum(given is not None for given in (args.images, args.data_dir, args.drawn)) != 1:
            raise UserError("pass one of --images=GLOB|JSONL, --data_dir=DIR and --drawn=COUNT")
        workdirs.check_config(args.workdir, args.config, evaluate.EVALUATE_MAY_DIFFER)
        tables = []
        if args.images:
            own = [os.path.realpath(pathlib.Path(args.output) / name) for name in _RESULTS]
            if os.path.realpath(args.images) in own:
                raise UserError(f"images: got {args.images}, which this command writes; choose another --output")
            inputs = read_inputs(args.images, args.prompt)[: args.limit]
            examples, states = image_examples(inputs, args.output)
        elif args.drawn:
            examples, states = drawn_examples(args.config, args.split, min(args.drawn, args.limit or args.drawn))
        else:
            examples, states = dataset_examples(args.data_dir, args.split, args.limit)
            tables = evaluation_tables(args.workdir, args.split)
        model = predictor.load(args.workdir, args.config)
        options = {"batch_size": args.batch_size, "strict": args.strict, "tables": tables}
        failed = predict(model, examples, states, args.output, **options)
    if failed:
        raise SystemExit(FAILED)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The folder of a training run, or one that rahf.convert wrote.")
    flags.DEFINE_string("images", None, "Image files, a path or a pattern; or a .jsonl file of {image, prompt} lines.")
    flags.DEFINE_string("prompt", None, "The prompt of all images of a glob; else each image's own NAME.txt.")
    flags.DEFINE_string("data_dir", None, "Instead of --images: a built dataset; the report shows its truth.")
    ranges.flag("drawn", None, "Instead of --images: so many pictures of RichHF-Synth, with their truth.", ranges.COUNT)
    flags.DEFINE_string("split", "test", "The split of --data_dir or --drawn.")
    ranges.flag("limit", None, "Predict the first so many only.", ranges.COUNT)
    flags.DEFINE_string("output", None, "The folder to write to.")
    flags.DEFINE_bool("strict", False, "End at the first image that fails.")
    ranges.flag("batch_size", 32, "Images at a time.", ranges.ROWS)
    hosts.define_flags()
    flags.mark_flags_as_required(["workdir", "output"])
    command.run(main, experiments.reader(of_workdir=workdirs.read_config))
