"""What a row of the tables may be, by its spec, and its predictions for a split.

    DIR, rahf:DIR            a workdir of rahf.train or a folder of rahf.convert: all that it predicts
    clip:DIR                 CLIP score, as the alignment score alone; a long prompt loses its end here
    clip-gradient:DIR        CLIP's gradient, as the misalignment heatmap alone; clip-gradient:DIR:KIND for another kind
    pickscore:DIR, ...       any other reward of rahf/reward/specs.py: one number for the picture, compared with each score
    predictions:FILE         predictions.parquet of anybody's model (see predictions.py)
    A+B+C                    workdirs: the means of their scores and heatmaps, and a vote on each word of the prompt
    isotonic:SPEC            the scores calibrated on dev: the rising steps with the least squared error,
    linear:SPEC              or the line; both cut to [0, 1]

An ensemble's word is misaligned if more than half of the members that predict words mark it, as annotators are consolidated;
so a tie is aligned. It is not copied if no member copied it.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from rahf import ahead
from rahf.fingerprint import fingerprint
from rahf.reward import bert_tokenizer
from rahf.tables import predictions
from rahf.tables.dataset import Dataset
from rahf.tables.predictions import Identity, Predictions
from richhf_data import checked, clip_tokenizer, json_files, keywords, paths, vocabulary
from richhf_data.errors import UserError
from richhf_data.schema import HEATMAPS, SCORES

CALIBRATIONS = ("isotonic", "linear")
CALIBRATION_SPLIT = "dev"
_ONLY = {"clip": (False, True, False, False)}  # the scores that the paper compares a reward with, if not all
_KIND = re.compile(r"([a-z][a-z0-9_-]*):(?!//)(.*)", re.DOTALL)
# What the identity of a model in a folder depends on, besides the files in best/.
_MODEL_FILES = ("config.json", "digests.json", "weights.safetensors", "vocabulary.model")
_MODEL_FILES = sorted({*_MODEL_FILES, *vocabulary.CLIP_FILES, *bert_tokenizer.FILES})
EXPECTED = "NAME=SPEC (python -m pydoc rahf.tables.rows lists the specs)"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
      name: as the user wrote it. spec: without the calibration. calibration: one of `CALIBRATIONS`, or None.
    """

    name: str
    spec: str
    calibration: str | None = None

    @property
    def title(self) -> str:
        """The name in the tables; it says how the row is calibrated."""
        return f"{self.name}, {self.calibration} on {CALIBRATION_SPLIT}" if self.calibration else self.name

    @property
    def folder(self) -> str:
        """The name of the row's folder: the title if it is a plain file name, else one that no other title has."""
        return _file_name(self.title)

    @property
    def file(self) -> pathlib.Path | None:
        """The user's own predictions, if the row is no more than those."""
        kind, rest = kind_of(self.spec)
        return pathlib.Path(rest) if kind == "predictions" and not self.calibration else None


def _file_name(text: str) -> str:
    safe = re.sub(r"[^\w.-]+", "_", text).strip(".")[:60]
    return safe if safe == text else f"{safe or 'row'}-{fingerprint(text)[:8]}"


def folder_of(output, of: Mapping) -> pathlib.Path:
    """The folder in `output` with the rows' folders for a split and a number of examples, so that none replaces another's.

    Args:
      of: `Dataset.of` or `Header.of`.
    """
    return pathlib.Path(output) / "rows" / _file_name(f"{of['split']}-{of['num_examples']}")


def parse(text: str) -> Row:
    """The row of NAME=SPEC. Raises UserError for another form."""
    name, equals, spec = (part.strip() for part in text.partition("="))
    if not equals or not name or not spec or not name.isprintable():
        raise UserError(f"rows: got {text!r}, expected {EXPECTED}")
    kind, rest = kind_of(spec)
    calibration = kind if kind in CALIBRATIONS else None
    if calibration:
        spec = rest
        if not spec or kind_of(spec)[0] in (*CALIBRATIONS, "predictions"):
            expected = f"{kind}: before a model, which can predict {CALIBRATION_SPLIT}"
            raise UserError(f"rows: {name}: got {kind}:{rest}, expected {expected}")
    return Row(name, spec, calibration)


def parse_all(texts: Iterable[str]) -> list[Row]:
    """The rows of the command line. Raises UserError for none, for another form, and for two of one name."""
    rows = [parse(text) for text in texts]
    if not rows:
        raise UserError(f"rows: got none, expected --rows {EXPECTED}")
    titles = [row.title for row in rows]
    if twice := {title for title in titles if titles.count(title) > 1}:
        raise UserError(f"rows: got two rows {sorted(twice)[0]!r}, expected names that differ")
    return rows


def kind_of(spec: str) -> tuple[str, str]:
    """(kind, what follows): ("clip", DIR); the kind of a plain folder is "rahf", of several joined by + "ensemble"."""
    match = None if os.path.exists(spec) else _KIND.fullmatch(spec)
    if match and match[1] != "rahf":
        return match[1], match[2]
    if "+" in spec and not os.path.exists(spec.removeprefix("rahf:")):
        return "ensemble", spec
    folder = spec.removeprefix("rahf:")
    if match and not os.path.exists(folder) and "/" not in folder.rpartition(":")[2] and ":" in folder:
        return "reward", spec  # rahf:DIR:SCORE
    return "rahf", folder


# -------------------------------------------------------------------------------------------------------------- models

# A model has an `identity`, a text or None, whether it is a `reward`, whether it `cuts` a prompt, of which it then reads the
# beginning alone, and `predict`: examples (uid, image, prompt) and a batch size -> batches of predictions as
# `predictions.write` takes them.


def load(spec: str, kept: Mapping[str, Predictions] | None = None):
    """The model of a spec that is not calibrated.

    Args:
      kept: {identity of a row: its predictions}, which are taken in place of the model's.

    Raises:
      UserError: there is no such model.
    """
    kind, rest = kind_of(spec)
    kept = kept or {}
    if kind == "ensemble":
        return Ensemble(rest, kept)
    kinds = {"rahf": Critic, "clip-gradient": Gradient}
    model = kinds[kind](rest) if kind in kinds else Reward(spec, _ONLY.get(kind, (True,) * len(SCORES)))
    found = kept.get(_identity(model))
    return model if found is None else Kept(model, found)


def _identity(model, calibration: str | None = None) -> str | None:
    """The identity of a row."""
    return None if model.identity is None else fingerprint("row", calibration, model.identity)


class Critic:
    """A workdir of rahf.train or a folder of rahf.convert."""

    reward = False

    def __init__(self, folder: str):
        import rahf

        self._model, self._folder = rahf.load(folder), folder

    @functools.cached_property
    def identity(self) -> str:
        return fingerprint("critic", self._model.identity, self._model.truncates)

    def cuts(self, prompt: str) -> bool:
        return self._model.is_too_long(prompt)

    def predict(self, examples: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
        def prepare(example):
            try:
                inputs = self._model.prepare(example["image"], example["prompt"])
            except UserError as error:
                raise UserError(f"rows: {self._folder}: {example['uid']}: {error}") from error
            return {key: example[key] for key in ("uid", "prompt")}, inputs | {"name": example["uid"]}

        def batches(prepared):
            while waiting := list(itertools.islice(prepared, batch_size)):
                yield [example for example, _ in waiting], [inputs for _, inputs in waiting]

        with (
            contextlib.closing(ahead.mapped(prepare, examples, batch_size)) as prepared,
            contextlib.closing(self._model.predict_batches(batches(prepared), batch_size)) as results,
        ):
            for these, rows in results:
                yield [self._prediction(*pair) for pair in zip(these, rows, strict=True)]

    def _prediction(self, example, row):
        text, labels = row["labelled_prompt"], None
        if text is not None:
            labels = keywords.read_labels(text, keywords.tokenize(example["prompt"]), self._model.vocabulary.written)
        shared = {key: row[key] for key in ("scores", "heatmaps", "labelled_prompt")}
        return {"uid": example["uid"], "labels": labels, **shared}


class Reward:
    """A reward: its number stands for each of the scores of `mask`."""

    reward = True

    def __init__(self, spec: str, mask):
        from rahf.reward import preference, specs

        kind, rest = kind_of(spec)
        self._reward = preference.clip_score(rest, cut=True) if kind == "clip" and rest else specs.reward_of(spec)
        self._mask, self._checked = np.array(mask), specs.checked
        self.identity = specs.identity_of(self._reward)
        self.cuts = lambda prompt: False  # the others refuse what is too long, or are the user's
        if isinstance(self._reward, preference.Preference):
            self.cuts = self._reward.cuts
        elif isinstance(self._reward, specs.ScoreReward):
            self.cuts = self._reward.model.is_too_long

    def predict(self, examples: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
        examples = iter(examples)
        while batch := list(itertools.islice(examples, batch_size)):
            values = self._checked(self._reward, [one["image"] for one in batch], [one["prompt"] for one in batch])
            yield [
                {"uid": one["uid"], "scores": np.full(len(SCORES), value), "score_mask": self._mask}
                for one, value in zip(batch, values, strict=True)
            ]


class Gradient:
    """A gradient map of CLIP: the misalignment heatmap."""

    reward = False
    _MASK = np.array([name == "misalignment" for name in HEATMAPS])

    def __init__(self, rest: str):
        from rahf.reward import gradient_map

        folder, _, kind = rest.rpartition(":") if not os.path.exists(rest) and ":" in rest else (rest, "", "gradient")
        self._maps, self._folder = gradient_map.GradientMaps(folder, kind), folder
        self.identity = self._maps.identity

    @functools.cached_property
    def _text(self) -> tuple[clip_tokenizer.Tokenizer, int]:
        from rahf import pretrained
        from rahf.models.clip import CLIPConfig

        config = checked.conform(CLIPConfig, pretrained.read(self._folder, "clip").config["clip"])
        return clip_tokenizer.Tokenizer(self._folder), config.text.length

    def cuts(self, prompt: str) -> bool:
        tokenizer, length = self._text
        return tokenizer.num_ids(prompt) > length

    def predict(self, examples: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
        examples = iter(examples)
        while batch := list(itertools.islice(examples, batch_size)):
            found = self._maps([one["image"] for one in batch], [one["prompt"] for one in batch])
            maps = np.stack([found] * len(HEATMAPS), axis=-1)
            yield [
                {"uid": one["uid"], "heatmaps": own, "heatmap_mask": self._MASK}
                for one, own in zip(batch, maps, strict=True)
            ]


class Kept:
    """A model, some of whose predictions are kept."""

    def __init__(self, model, found: Predictions):
        self._model, self._found = model, found
        self.identity, self.reward, self.cuts = model.identity, model.reward, model.cuts

    def predict(self, examples: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
        examples, places = iter(examples), self._found.places
        while batch := list(itertools.islice(examples, batch_size)):
            if all(one["uid"] in places for one in batch):
                yield [self._found.row(places[one["uid"]]) for one in batch]
            else:
                yield from self._model.predict(batch, batch_size)


class Ensemble:
    """Several workdirs."""

    reward = False

    def __init__(self, spec: str, kept: Mapping[str, Predictions]):
        parts = _members(spec)
        if wrong := [part for part in parts if kind_of(part)[0] != "rahf"]:
            raise UserError(f"rows: {spec}: got {wrong[0]!r} in an ensemble, expected folders of rahf.train or rahf.convert")
        self._members = [load(part, kept) for part in parts]
        self.identity = fingerprint("ensemble", *(member.identity for member in self._members))

    def cuts(self, prompt: str) -> bool:
        return any(member.cuts(prompt) for member in self._members)

    def predict(self, examples: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
        examples = iter(examples)
        while batch := list(itertools.islice(examples, batch_size)):
            found = [itertools.chain.from_iterable(member.predict(batch, batch_size)) for member in self._members]
            yield [combined(rows) for rows in zip(*found, strict=True)]


def _members(spec: str) -> list[str]:
    """The specs of an ensemble; of another spec, itself."""
    return [part.strip() for part in spec.split("+")] if kind_of(spec)[0] == "ensemble" else [spec]


def combined(rows: Iterable[Mapping]) -> dict:
    """The prediction of an ensemble from those of its members for one example."""
    scores, maps, labels = ([row[key] for row in rows if row[key] is not None] for key in ("scores", "heatmaps", "labels"))
    size = max((max(one.shape[:2]) for one in maps), default=0)
    return {
        "uid": rows[0]["uid"],
        "scores": np.mean(scores, axis=0) if scores else None,
        "heatmaps": np.mean([predictions.resized(one, size) for one in maps], axis=0) if maps else None,
        "labels": [_vote(token) for token in zip(*labels, strict=True)] if labels else None,
    }


def _vote(labels) -> int | None:
    """The label of a token from those of the members."""
    if all(label is None for label in labels):
        return None
    marked = sum(label == keywords.MISALIGNED for label in labels)
    return keywords.MISALIGNED if 2 * marked > len(labels) else keywords.ALIGNED


# --------------------------------------------------------------------------------------------------------- calibration


def calibration(kind: str, predicted: np.ndarray, truth: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A map of scores, float[n, 4] -> float32[n, 4] in [0, 1], fitted for each score with the least squared error.

    A score that is not predicted, or that has no truth, stays as it is.

    Args:
      kind: "isotonic" (rising steps) or "linear". predicted, truth: float[n, 4] of dev, nan where there is none.

    Raises:
      UserError: a predicted score has one example with a truth.
    """
    from sklearn.isotonic import IsotonicRegression

    fitted = []
    for i, name in enumerate(SCORES):
        known = np.isfinite(predicted[:, i]) & np.isfinite(truth[:, i])
        x, y = predicted[known, i], truth[known, i]
        if len(x) == 1:
            expected = "two or more to calibrate on, or none"
            raise UserError(f"{CALIBRATION_SPLIT}: got one example with {name}, expected {expected}")
        if not len(x):
            fitted.append(lambda values: values)
        elif kind == "isotonic":
            fitted.append(IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(x, y).predict)
        else:
            slope, offset = np.polyfit(x, y, 1) if np.ptp(x) > 0 else (0.0, y.mean())
            fitted.append(lambda values, slope=slope, offset=offset: np.clip(slope * values + offset, 0, 1))
    return lambda scores: np.stack([fit(scores[:, i]) for i, fit in enumerate(fitted)], axis=1).astype(np.float32)


# ----------------------------------------------------------------------------------------------------- kept predictions


def keep(
    rows: Iterable[Row], dataset: Dataset | None, of: Mapping, folder, batch_size: int
) -> tuple[dict[str, Predictions], dict[str, str | None], set[str]]:
    """The rows' predictions, which are made unless they are kept.

    Args:
      dataset: None to use what is kept. of: what the predictions are of. folder: see `folder_of`.

    Returns:
      {title: predictions} and {title: identity} in the rows' order, and the titles of those that are rewards.

    Raises:
      UserError: there is nothing kept, or of another dataset, and no dataset to predict; a row is calibrated on the split;
        or as `load` and `Predictions`.
    """
    found, identities, kept = {}, {}, {}
    rows = list(rows)
    if of["split"] == CALIBRATION_SPLIT and (calibrated := [row.title for row in rows if row.calibration]):
        raise UserError(f"rows: {calibrated[0]}: got the split {CALIBRATION_SPLIT}, expected one that it is not fitted on")
    for row in sorted(rows, key=lambda row: (row.calibration is not None, kind_of(row.spec)[0] == "ensemble")):
        file = row.file or pathlib.Path(folder) / row.folder / "predictions.parquet"
        if row.file is None:
            _predict(row, file, dataset, of, batch_size, kept)
        found[row.title], identities[row.title] = Predictions(file, row.title), predictions.identity_of(file)
        if row.file is None and identities[row.title].model:
            kept[identities[row.title].model] = found[row.title]
    titles = [row.title for row in rows]
    rewards = {title for title in titles if identities[title] and identities[title].reward}
    names = {title: identities[title] and identities[title].model for title in titles}
    return {title: found[title] for title in titles}, names, rewards


def _predict(row: Row, file, dataset: Dataset | None, of: Mapping, batch_size, kept: Mapping[str, Predictions]) -> None:
    """Writes the predictions of a row, unless the file has them."""
    there, record = predictions.identity_of(file), file.with_name("checked.json")
    now, seen = {"spec": row.spec, "state": _state(row)}, _read_checked(record)
    unchanged = now.items() <= seen.items()
    if dataset is None:
        if there is None:
            raise UserError(f"rows: {row.title}: no predictions in {file}, expected some; pass --data_dir to predict")
        if there != dataclasses.replace(there, **of):
            got = f"got predictions of another dataset in {file}"
            raise UserError(f"rows: {row.title}: {got}; expected that of targets.parquet, or --data_dir to predict")
        if seen.get("spec") != row.spec:
            got = f"got {row.spec}, but {file} is of {seen.get('spec', 'an unknown spec')}"
            raise UserError(f"rows: {row.title}: {got}; expected the same, or --data_dir to predict")
        if not unchanged:
            print(f"WARNING: {row.title}: {row.spec} changed after it was predicted; pass --data_dir to predict again")
        return
    if there and there.model and now["state"] and unchanged and there == dataclasses.replace(there, **of):
        return  # the model need not be loaded to know its identity
    model = load(row.spec, kept)
    identity = Identity(_identity(model, row.calibration), reward=model.reward and not row.calibration, **of)
    if not identity.same(there):
        record.unlink(missing_ok=True)  # of the file that is replaced
        _write(row, model, file, dataset, identity, batch_size)
    prompts = dataset.prompts()
    cut = sum(model.cuts(prompts[uid]) for uid in Predictions(file, row.title).uids)
    json_files.write(record, now | {"cut": cut})


def _write(row, model, file, dataset, identity, batch_size):
    if identity.model is None:
        print(f"{row.title}: {row.spec} has no identity, so it is predicted each time")
    calibrate = _calibration(row, model, dataset, file.parent, batch_size) if row.calibration else None

    def predict(skip):
        with (
            contextlib.closing(model.predict(dataset.examples(skip), batch_size)) as batches,
            tqdm(desc=row.title, total=dataset.num_examples, initial=skip, unit="example", dynamic_ncols=True) as bar,
        ):
            for batch in batches:
                yield _calibrated(batch, calibrate)
                bar.update(len(batch))

    predictions.write(file, identity, predict)


def _read_checked(file) -> dict[str, str | int | None]:
    """The spec, the state of the model's files, and the number of cut prompts, of the predictions beside the file."""
    return json_files.read_as(dict[str, str | int | None], file) if file.is_file() else {}


def notes(rows: Iterable[Row], folder) -> list[str]:
    """What readers of the tables must know of the kept predictions: cut prompts, and scores that are not calibrated."""
    places = {row.title: pathlib.Path(folder) / row.folder for row in rows if row.file is None}
    cut = {title: _read_checked(place / "checked.json").get("cut") for title, place in places.items()}
    found = []
    if any(cut.values()):
        counts = ", ".join(f"{title} {count}" for title, count in cut.items() if count)
        found.append(f"Prompts that are too long for a row, which reads only their beginning: {counts}.")
    for row in rows:
        if row.calibration and (names := _uncalibrated(places[row.title] / f"{CALIBRATION_SPLIT}.parquet")):
            found.append(f"{row.title}: there is no truth of {', '.join(names)}, which stays as predicted.")
    return found


def _uncalibrated(file) -> list[str]:
    """The scores with predictions and no truth in a dev.parquet."""
    if not file.is_file():
        return []
    table = pyarrow.parquet.read_table(file)
    without = {name for name in table.column_names if table[name].null_count == len(table)}
    return [name for name in SCORES if name not in without and f"true_{name}" in without]


def _state(row: Row) -> str | None:
    """Changes with the models' files in the folders that a spec names; None if it names none."""
    places = [place for spec in _members(row.spec) for place in _folders(spec)]
    if not places:
        return None
    found = []
    for place in map(pathlib.Path, places):
        for file in (*(place / name for name in _MODEL_FILES), *sorted((place / "best").rglob("*"))):
            if file.is_file():
                stat = file.stat()
                found.append([os.fspath(file), stat.st_size, stat.st_mtime_ns])
    return fingerprint(row.spec, row.calibration, found)


def _folders(spec: str) -> list[str]:
    """The folders of a spec that is no ensemble: one, or two of reward:DIR:CLIP."""
    kind, rest = kind_of(spec)
    rest = rest.removeprefix("rahf:")  # of rahf:DIR:SCORE
    parts = [rest] if os.path.exists(rest) else rest.rpartition(":")[::2]
    return [part for part in parts if kind != "python" and os.path.isdir(part)]


def _calibrated(batch, calibrate):
    if calibrate is None:
        return batch
    scores = calibrate(np.array([row["scores"] for row in batch]))
    return [row | {"scores": values} for row, values in zip(batch, scores, strict=True)]


def _calibration(row, model, dataset, folder, batch_size):
    """The map that is fitted on dev. The scores there, predicted and true, are written to dev.parquet."""
    dev = Dataset(dataset.data_dir, CALIBRATION_SPLIT)
    uids, truth = dev.scores()
    scores = {}
    with (
        contextlib.closing(model.predict(dev.examples(), batch_size)) as batches,
        tqdm(desc=f"{row.title}: {CALIBRATION_SPLIT}", total=len(uids), unit="example", dynamic_ncols=True) as bar,
    ):
        for batch in batches:
            for one in batch:
                if one.get("scores") is None:
                    raise UserError(f"rows: {row.title}: {row.spec} predicts no scores, expected some to calibrate")
                mask = one.get("score_mask", (True,) * len(SCORES))
                scores[one["uid"]] = np.where(mask, one["scores"], np.nan)
            bar.update(len(batch))
    predicted = np.array([scores[uid] for uid in uids], np.float64)
    columns = {"uid": uids}
    for side, values in (("", predicted), ("true_", truth)):
        columns |= {f"{side}{name}": pyarrow.array(values[:, i], from_pandas=True) for i, name in enumerate(SCORES)}
    with paths.writing(folder / f"{CALIBRATION_SPLIT}.parquet") as partial:
        pyarrow.parquet.write_table(pyarrow.table(columns), partial, compression="zstd")
    return calibration(row.calibration, predicted, truth)
