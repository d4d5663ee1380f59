"""The model card of a converted run, README.md: what it predicts, what it was trained on, its tables, its limits."""

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable

from rahf import checkpoints, experiments, folders, train, workdirs
from rahf.models import critics
from rahf.pretrained import Pretrained
from richhf_data import checked, json_files, metrics, schema
from richhf_data.errors import UserError

TAGS = ("jax", "flax", "text-to-image", "human-feedback", "image-quality", "reward-model")
PARTS = {
    "scores": f"four scores in [0, 1], higher is better: {', '.join(schema.SCORES)};",
    "heatmaps": "two heatmaps in [0, 1]: where the picture is implausible, and where it contradicts the prompt;",
    "keywords": "the words of the prompt that the picture contradicts.",
}
FILES = {
    "weights.safetensors": "The parameters, in {dtype}.",
    "config.json": "The model's configuration.",
    "vocabulary.model": "The SentencePiece model of its texts.",
    "tokenizer.json": "The tokenizer of its texts.",
    "vocab.json": "The same.",
    "merges.txt": "The same.",
    "predict.stablehlo": "The prediction as a function for `jax.export`; the weights are an argument.",
    "predict.onnx": "The prediction for ONNX Runtime; it reads `weights.safetensors` beside it.",
    "SHA256SUMS": "The files' digests, which `rahf.load` compares.",
}
PREDICTS = """
A model of rich human feedback on generated pictures, [RAHF](https://arxiv.org/abs/2312.10240). For a picture and its prompt
it predicts
"""
LOAD = """
```python
import rahf

model = rahf.load("{address}")
feedback = model.predict(images, prompts)  # RGB uint8 arrays of any size, and as many prompts
```

```
python -m rahf.predict --workdir={address} --images='photos/*.jpg' --prompt='a yellow cat' --output=out
```
"""
USE = """
It is made to rate and to compare pictures of text-to-image models, to select, repair or guide them, and to reward them in
training.

- It repeats what its annotators said, with their tastes and errors. It is no judge of people, of facts, of safety or of
  whether a picture is real.
- It knows the kinds of pictures and prompts that it was trained on. Other ones, photographs and other languages among them,
  were not measured unless a table above says so.
- A generator that is trained or guided by it long enough finds pictures that it likes and people do not. Measure such a
  generator with people or with another judge.
"""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a card shows of `sources.identity`."""

    name: str
    version: str
    records: str  # a fingerprint


@dataclasses.dataclass(frozen=True)
class Data:
    """Of a workdir's data.json."""

    datasets: dict[str, Dataset] = dataclasses.field(default_factory=dict)


def check_license(license: str | None) -> None:
    """Refuses what is no identifier of a licence: UserError."""
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UserError(f"license: got {license!r}, expected an identifier as the Hugging Face hub has, apache-2.0 or mit")


def model_card(
    workdir, converted: Pretrained, where: str, license: str | None, files: Iterable[str], dtype: str = "float32"
) -> str:
    """Markdown with a YAML header as the Hugging Face hub reads it.

    Args:
      where: the address or folder of the card. license: an identifier of the hub. files: the names in the folder.
      dtype: of the weights in the folder.

    Raises:
      UserError: a file of the workdir is damaged.
    """
    model, data = critics.config_of(converted.config["model"]), converted.config["data"]
    name = pathlib.PurePosixPath(where).name or "model"
    is_shipped = pathlib.Path(where).absolute().parent == folders.SHIPPED
    address = where if "://" in where else name if is_shipped else "DIR"
    parameters = sum(math.prod(tensor.shape) for tensor in converted.tensors.values())
    about = [
        f"{parameters:,} parameters, architecture `{model.architecture}`"
        + (f", variant `{model.variant}`." if model.architecture == "rahf" else "."),
        f"A picture is resized to {model.image_size} x {model.image_size} pixels, whatever its shape.",
    ]
    if model.vocab_size is not None:
        longer = "loses its end" if data.get("truncate_long_prompts") else "is refused"
        about.append(f"A prompt of more than {data['text_length']} ids, its end counted, {longer}.")
    licence = f"Licence: {license}." if license else "The licence is not stated: ask whoever published this."
    header = ["library_name: rahf", *([f"license: {license}"] if license else []), "pipeline_tag: image-text-to-text"]
    lines = ["---", *header, "tags:", *(f"- {tag}" for tag in TAGS), "---", folders.MARK, "", f"# {name}", PREDICTS]
    lines += [f"- {PARTS[part]}" for part in model.parts]
    lines += ["", *about, "", "## Load", LOAD.format(address=address), "## Training", "", *_training(workdir), ""]
    lines += ["## Evaluation", "", *_evaluation(workdir), "", "## Intended use and limits", USE, "## Files", ""]
    lines += ["| file | what it holds |", "|---|---|"]
    lines += [f"| `{file}` | {FILES[file].format(dtype=dtype)} |" for file in FILES if file in files]
    return "\n".join([*lines, "", "## Licence", "", licence, ""])


def _training(workdir) -> list[str]:
    config, record = workdirs.read_config(workdir), pathlib.Path(workdir) / "data.json"
    data = json_files.read_as(Data, record, extra=True) if record.is_file() else Data()
    with checkpoints.manager(workdir, "best") as best:
        step = checkpoints.best_step(best)
        metadata = checkpoints.read_metadata(best, step)
    batch, value, seconds = config.train.batch_size, metadata["value"], metadata.get("processor_seconds")
    lines = [
        f"- Step {step:,} of {config.train.num_steps:,}, in batches of {batch:,}: the best of its evaluations, {value:.4f} "
        "by `rahf.evaluate.selection` (the mean of PLCC and SRCC, where the data have scores)."
    ]
    if name := _name_of(workdir):
        data_dir = " --config.data.data_dir=DATA" if config.data.source == "seqio" else ""
        lines.append(f"- Trained by `python -m rahf.train --config={name} --workdir=RUN{data_dir}`.")
    if seconds:
        took = f"{seconds / 3600:.1f} hours of the host's processor time"
        lines.append(f"- These steps took {took}, without evaluations and without processes that draw pictures.")
    for dataset in data.datasets.values():
        records = f"built from the records {dataset.records}"
        lines.append(f"- Trained or evaluated on the dataset `{dataset.name}` {dataset.version}, {records}.")
    if config.data.source == "stream":
        lines.append(
            f"- The data: RichHF-Synth, drawn shapes with simulated annotators, seed {config.seed}. The model knows no "
            "photographs, no paintings, and no prompts but those of this dataset."
        )
        counts = dict(config.data.left_out)
        seed = counts.pop("seed")
        if config.data.captions:
            lines.append(f"- Of the pictures, {config.data.captions:.0%} were captions for the decoder, without feedback.")
        if left_out := ", ".join(f"{count:,} of {split}" for split, count in counts.items() if count):
            lines.append(f"- It saw no scene of these first examples of seed {seed}, whatever the wording: {left_out}.")
    if starts := [part for part, folder in config.init.to_dict().items() if folder]:
        lines.append(f"- Started from pretrained weights, whose licences hold as well: {', '.join(starts)}.")
    else:
        lines.append("- Started from random weights.")
    return lines


def _name_of(workdir) -> str | None:
    """The name of RAHF's config that a run has, if it has one."""
    for name in experiments.names():
        config = experiments.load(name)
        if config.get("kind", "rahf") == "rahf":
            with contextlib.suppress(UserError):
                workdirs.check_config(workdir, config, train.RESUME_MAY_DIFFER)
                return name
    return None


def _evaluation(workdir) -> list[str]:
    """The tables of rahf.evaluate, a paragraph for each split."""
    lines = []
    for file in sorted((pathlib.Path(workdir) / "eval").glob("*.references.json")):
        split = file.name.removesuffix(".references.json")
        results = json_files.read_as(dict[str, checked.Metric | None], file.with_name(f"{split}.json"))
        rows = json_files.read_as(dict[str, dict[str, checked.Metric | None]], file)
        count = results.get("num_examples") or 0
        lines += [f"`python -m rahf.evaluate --split={split}`, {count:.0f} examples:", ""]
        lines += [metrics.table({"this model": results} | rows), ""]
    return lines[:-1] or ["Not measured: `python -m rahf.evaluate` was not run before the conversion."]
