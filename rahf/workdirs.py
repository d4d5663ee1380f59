"""A workdir: the folder of one run, and the checks that no other run continues in it.

    workdir/config.json          the config that the run was started with
    workdir/data.json            which data it reads: datasets and vocabulary (rahf.train)
    workdir/rewards.json         what weights its images and their pixels (rahf.diffusion.train)
    workdir/vocabulary.model     the SentencePiece model that maps its text to ids
    workdir/tokenizer.json, ...  in place of it, the tokenizer of a CLIP that is fine-tuned
    workdir/digests.json         SHA-256 of config.json and of the vocabulary's files
    workdir/tensorboard/         the numbers and pictures of the run; see trackers.py
    workdir/tracker.json         what the run is called at a tracker, if `config.tracker` names one
    workdir/checkpoints/, best/  see checkpoints.py
    workdir/damaged/             checkpoints whose contents changed after they were saved
    workdir/bad_batches/         batches whose loss or gradient was not finite
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import flax.traverse_util
import jax
import ml_collections
from etils import epath

from rahf import experiments, folders, hosts
from rahf.models import critics
from richhf_data import checked, json_files, paths
from richhf_data import vocabulary as vocabularies
from richhf_data.errors import UserError
from richhf_data.ranges import Range

# How a run is divided, logged and saved: no result depends on it.
CONDUCT = ("mesh", "log_every", "checkpoint_every", "train.max_bad_steps", "tracker")
DECODINGS = ("free", "copy")  # of `data.decoding`
LEFT_OUT = {"seed": 0, "train": 0, "dev": 0, "test": 0, "test_novel": 0}  # the default of `data.left_out`
# Architecture -> the config that has every key.
BASES = {"rahf": "rahf_base", "resnet": "baseline_resnet50", "clip": "baseline_clip"}


def is_new(workdir) -> bool:
    """Whether no run has begun there."""
    return not (epath.Path(workdir) / "config.json").exists()


def open_workdir(workdir, config: ml_collections.ConfigDict, may_differ: Sequence[str] = ()) -> epath.Path:
    """Makes the folder and writes its config, or checks that the config it holds is this one. Process 0 does it for all.

    Args:
      may_differ: keys and sections that may have other values than the workdir's.

    Raises:
      UserError: the folder holds another config; names each key that differs. Or the processes do not share the folder.
    """
    workdir = paths.absolute(workdir)
    path = workdir / "config.json"
    if jax.process_index() == 0 and is_new(workdir):
        json_files.write(path, config.to_dict())
        seal(path)
    hosts.wait("workdir")
    if is_new(workdir):
        raise UserError(
            f"workdir: process {jax.process_index()} finds no {path}, which process 0 has; expected one folder that all "
            "machines share: gs://BUCKET/FOLDER, or on a file system that all have mounted"
        )
    check_config(workdir, config, may_differ)
    return workdir


def seal(file: epath.Path) -> None:
    """Records the digest of a file that was written into a workdir, for `verified`."""
    record = file.parent / "digests.json"
    json_files.write(record, _sealed(file) | {file.name: hashlib.sha256(file.read_bytes()).hexdigest()})


def is_sealed(file: epath.Path) -> bool:
    """Whether `seal` recorded the digest of a file of this name."""
    return file.name in _sealed(file)


def _sealed(file: epath.Path) -> dict[str, str]:
    record = file.parent / "digests.json"
    return json_files.read_as(dict[str, str], record) if record.exists() else {}


def verified(file: epath.Path) -> epath.Path:
    """A file of a workdir. What was not sealed, as in an older workdir, passes.

    Raises:
      UserError: its content is not what was written.
    """
    record = file.parent / "digests.json"
    written = _sealed(file).get(file.name) if file.exists() else None
    if written is not None and hashlib.sha256(file.read_bytes()).hexdigest() != written:
        raise UserError(
            f"workdir: {file} is damaged: its content is not what was written; put a copy back, or delete {record} if you "
            "changed it yourself"
        )
    return file


def vocabulary(workdir) -> vocabularies.Vocabulary | vocabularies.CLIPVocabulary:
    """The vocabulary of a workdir or of a folder that rahf.convert wrote.

    Raises:
      UserError: there is none, or it is damaged.
    """
    workdir = epath.Path(workdir)
    if not (files := [workdir / name for name in vocabularies.CLIP_FILES if (workdir / name).is_file()]):
        return vocabularies.Vocabulary(verified(workdir / "vocabulary.model"))
    for file in files:
        verified(file)
    return vocabularies.CLIPVocabulary(workdir)


def check_config(workdir, config: ml_collections.ConfigDict, may_differ: Sequence[str] = ()) -> None:
    """Refuses a config that contradicts the workdir's: UserError that names each key that differs.

    Raises UserError too where there is no run.
    """
    differences = [
        f"  {key}: the workdir has {old!r}, this run {new!r}"
        for key, old, new in _differences(_upgraded(_read(workdir)), _upgraded(config.to_dict()))
        if not any(key == name or key.startswith(f"{name}.") for name in may_differ)
    ]
    if differences:
        raise UserError(
            f"workdir: {workdir} holds a run with another config:\n"
            + "\n".join(differences)
            + "\n  Take another --workdir, or pass the config that the workdir holds."
        )


def record(file: epath.Path, found: Mapping, what: str) -> None:
    """Writes what a run reads, or refuses to go on with something else than the file says.

    Process 0 writes. A workdir from before this file existed gets one, unchecked.

    Args:
      found: JSON. what: names it in errors: "data", "reward".
    """
    if jax.process_index() == 0 and not file.exists():
        json_files.write(file, found)
    hosts.wait(f"record {file}")
    differences = [
        f"  {key}: it began with {old!r}, this is {new!r}" for key, old, new in _differences(json_files.read(file), found)
    ]
    if differences:
        raise UserError(
            f"{what}: {file.parent} holds a run with other {what}:\n"
            + "\n".join(differences)
            + f"\n  Take another --workdir, or the {what} that the run began with."
        )


def read_config(workdir) -> ml_collections.ConfigDict:
    """The locked config of a critic's workdir, or of a folder that rahf.convert wrote.

    Raises:
      UserError: the folder is neither; a value of its config.json is missing, or of another type than in its architecture's
        config of `BASES`.
    """
    config = _read(workdir)
    if (kind := config.get("kind", "rahf")) != "rahf":
        raise UserError(f"workdir: {workdir} holds the weights of a {kind}, expected those of a whole RAHF")
    with json_files.named(epath.Path(workdir) / "config.json"):
        checked.conform(PredictorConfig, config, extra=True)
        config = _upgraded(config)
        base = experiments.load(BASES[config["model"]["architecture"]]).to_dict()
        _check_types(config, base, whole="kind" not in config)
    return ml_collections.ConfigDict(_with_tuples(config)).lock()


@dataclasses.dataclass(frozen=True)
class Texts:
    """The most ids of a prompt and of a keyword sequence, and what the decoder may write."""

    text_length: Annotated[int, Range(1, 2**14)]
    keyword_length: Annotated[int, Range(1, 2**14)]
    decoding: Literal[DECODINGS] = "free"


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """What every config of a critic holds. A folder that rahf.convert wrote holds no more."""

    model: dict[str, Any]
    data: Texts


def _check_types(config: Mapping, example: Mapping, whole: bool, name: str = "") -> None:
    """Refuses values of other types than in `example`; with `whole`, missing keys too. Other keys are not checked."""
    for key, like in example.items():
        full = checked.join(name, key)
        if key not in config:
            if whole:
                raise UserError(f"{full}: missing, expected a value such as {checked.shown(like)}")
        elif isinstance(like, Mapping):
            _check_types(checked.conform(dict[str, Any], config[key], full), like, whole, full)
        else:
            checked.conform(tuple[Any, ...] if isinstance(like, tuple) else type(like), config[key], full)


def _read(workdir) -> dict:
    if is_new(workdir):
        raise UserError(
            f"workdir: {workdir} has no config.json; expected a folder written by `python -m rahf.train`, or a critic that "
            f"RAHF comes with: {', '.join(folders.shipped())}"
        )
    return json_files.read(verified(epath.Path(workdir) / "config.json"))


def _differences(old: Mapping, new: Mapping) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of each entry that differs, sorted by key; "(nothing)" for a missing one."""
    old, new = _flat(old), _flat(new)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [(key, old.get(key, "(nothing)"), new.get(key, "(nothing)")) for key in keys]


def _upgraded(config: Mapping) -> dict:
    """A config with the names and the options of today; an option that an older config lacks has its default."""
    config = _renamed(config)
    if config.get("kind", "rahf") == "rahf" and "model" in config:
        config["model"] = dataclasses.asdict(critics.config_of(config["model"]))
        if isinstance(config.get("data"), dict):
            config["data"].setdefault("decoding", "free")
            config["data"].setdefault("left_out", dict(LEFT_OUT))
            config["data"].setdefault("captions", 0.0)
        if isinstance(config.get("train"), dict):
            config["train"].setdefault("marked_weight", 1.0)
            config["train"].setdefault("heatmap_loss", "mse")
            config["train"].setdefault("word_weight", 1.0)
    if isinstance(config.get("mesh"), dict):
        config["mesh"].setdefault("attention", "auto")
    if "train" in config:  # a folder that rahf.convert wrote has none
        config.setdefault("tracker", "tensorboard")
    return config


def _renamed(config: Mapping) -> dict:
    """`mesh.rules` is `mesh.sharding`, in nested configs too."""
    renamed = {key: _renamed(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    if "rules" in (mesh := renamed.get("mesh") if isinstance(renamed.get("mesh"), dict) else {}):
        mesh["sharding"] = mesh.pop("rules")
    return renamed


def _flat(config: Mapping) -> dict:
    """{"optimizer.learning_rate": value}, the values as JSON has them."""
    return flax.traverse_util.flatten_dict(json.loads(json.dumps(config)), keep_empty_nodes=True, sep=".")


def _with_tuples(value):
    """A config's sequences are tuples, which the command line can override."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(entry) for key, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value
