"""Every kind of config that is read from JSON: each key with wrong types, zeros, negatives, huge values, or missing."""

import copy
import functools
import itertools
import json
import pathlib
import random
import zipfile

import pytest
from etils import epath

from rahf import experiments, pretrained, readers, sources, trackers, weights, workdirs
from rahf.diffusion import folder as diffusers
from rahf.reward import predict as reward
from richhf_data import builder, json_files, schema
from richhf_data.errors import UserError

WRONG = ("x", None, [], {}, [[]], {"a": [1]}, True, 0, -1, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**7, 10**400, "")
MOST = 200  # changes of a file that are tried, chosen by a fixed seed
VIT = {"patch_size": 16, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 30}
T5 = {"vocab_size": 60, "d_model": 8, "num_heads": 2, "d_kv": 4, "num_layers": 1, "d_ff": 8, "num_decoder_layers": 2}
CLIP = {"text_config": {"hidden_size": 64, "eos_token_id": 2}, "vision_config_dict": {"image_size": 64}, "projection_dim": 8}
MODEL = experiments.load("rahf_ci").model.to_dict()
HEADS = {"num_attention_heads": 4}
RELEASE = {"vit": {**HEADS, "layer_norm_eps": 1e-12}, "t5": {"relative_attention_max_distance": 128}, "multi_heads": True}
ARGUMENTS = {"vit_model": "google/vit-base", "t5_model": "t5-base", "multi_heads": True}
PIXELS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_normalize": True, "rescale_factor": 1 / 255}
DATA = pathlib.Path(__file__).parent / "data"
REWARD = {"kind": "reward", "clip": {"folder": "clip", "digest": "0"}, "model": {"hidden": [8, 8]}}
INFO = {"name": "richhf", "version": "2.0.0", "splits": [{"name": "train", "numBytes": "3", "shardLengths": ["1"]}]}
NONE = {"count": 0, "first": []}
NOTES = dict.fromkeys(("images_missing", "images_undecodable", "images_ambiguous", "images_normalised"), NONE)
SPLIT = NOTES | {"label_mismatches": {"count": 1, "first": ["u"], "reasons": {"cut": 1}}, "examples": 2}
SPLIT |= {"published_examples": None, "empty_maps_share": {"misalignment": 0.5, "implausibility": None}}
SPLIT |= {name: dict.fromkeys(schema.SCORES, 1) for name in ("targets", "score_mean", "score_std")}
SPLIT |= {"score_histogram": {name: [0, 1] for name in schema.SCORES}}
REPORT = {"records": {"train": "0"}, "splits": {"train": SPLIT}}


def converted(file, kind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "open_safetensors", lambda path: {})
        return pretrained.read(file.parent, kind)


def loaded_reward(file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rahf.reward.embed.Clip", lambda path: pytest.skip())
        (file.parent / "weights.safetensors").touch()
        try:
            return reward.load(file.parent)
        except pytest.skip.Exception:
            return None


@functools.cache
def release_tensors():
    files = [DATA / f"richhf_pytorch_tiny_{part}.npz" for part in ("trunk", "scores", "heatmaps")]
    return dict(itertools.chain.from_iterable(weights.open_npz(file).items() for file in files))


def release(file):
    """The release's config from its tensors and from what the files beside it say. No values are read."""
    notes = readers.release.release_notes(file.parent)
    notes["vit"] = HEADS | notes["vit"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers.release, "param_shapes", lambda *arguments: {})
        patch.setattr(readers.release, "matched", lambda *arguments: {})
        return readers.release.rahf_from_release(release_tensors(), notes, f"RAHF {file.parent}")


VIT_OURS = pretrained.ViTConfig(patch_size=8, width=24, num_heads=2)
CONFIGS = {  # name -> the file's values, what reads the file
    "vit": (
        VIT | {"layer_norm_eps": 1e-12},
        lambda file: readers.encoders.vit_config_from_hugging_face(*hugging_face(file, "vit")),
    ),
    "t5": (T5 | {"tie_word_embeddings": False, "relative_attention_num_buckets": 8}, lambda file: t5(file)),
    "clip": (CLIP, lambda file: readers.clip.clip_config_from_hugging_face(*hugging_face(file, "clip"))),
    "release": (RELEASE, lambda file: release(file)),
    "release, pixels": (PIXELS, lambda file: release(file)),
    "release, arguments": (ARGUMENTS, lambda file: release(file)),
    "our vit": ({"kind": "vit", "vit": vars(VIT_OURS), "image_size": 32}, lambda file: converted(file, "vit")),
    "our rahf": (
        {"kind": "rahf", "model": MODEL, "data": {"text_length": 8, "keyword_length": 8}},
        lambda file: (converted(file, "rahf"), workdirs.read_config(file.parent)),
    ),
    "workdir": (experiments.load("rahf_ci").to_dict(), lambda file: workdirs.read_config(file.parent)),
    "reward": (REWARD, loaded_reward),
    "dataset_info": (INFO, lambda file: json_files.read_as(sources.DatasetInfo, file, extra=True)),
    "report": (REPORT, lambda file: builder.read_report(file.parent)),
    "tracker": ({"run": "run-00000000"}, lambda file: trackers.name_of(epath.Path(file.parent))),
    "prompts": ({"train": [["a", "b", "c"]]}, lambda file: builder.read_prompts(file.parent)),
    "references": ({"train": {"row": {"metric": 1.5}}}, builder.read_references),
}
FILES = {"report": "report.json", "prompts": "prompts.json", "release, pixels": "preprocessor_config.json"}
FILES |= {"release, arguments": "args_config.json", "tracker": "tracker.json"}


def hugging_face(file, kind):
    return readers.files.hugging_face_config(file.parent, kind)


def t5(file):
    return readers.encoders.t5_config_from_hugging_face(*hugging_face(file, "t5"))


def keys(values, path=()):
    """The path of every key and entry."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from keys(value, (*path, key))


def changed(values):
    """(path, its new value or "missing", all values) for each key and each of `WRONG`."""
    for path in keys(values):
        for wrong in (*WRONG, "missing"):
            made = copy.deepcopy(values)
            node = made
            for key in path[:-1]:
                node = node[key]
            if wrong == "missing":
                del node[path[-1]]
            else:
                node[path[-1]] = wrong
            yield path, wrong, made


def refused(values, file: pathlib.Path, read, folder) -> int:
    """How many changes `read` refuses with a UserError that names the file or the folder. Another exception is a failure."""
    count, changes = 0, list(changed(json.loads(json.dumps(values))))  # a tuple becomes a list
    for path, wrong, made in random.Random(0).sample(changes, min(MOST, len(changes))):
        file.write_text(json.dumps(made))
        try:
            read(file)
        except UserError as error:
            count += 1
            assert any(str(named) in str(error) for named in (file.parent, folder)), (path, wrong, error)
            assert len(str(error)) < 1500, (path, wrong, error)
        except Exception as error:
            raise AssertionError(f"{path} = {wrong!r}: {type(error).__name__}: {error}") from error
    return count


@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_config_is_read_or_refused_by_name(name, tmp_path):
    values, read = CONFIGS[name]
    file = tmp_path / FILES.get(name, "config.json")
    file.write_text(json.dumps(values))
    read(file)
    assert refused(values, file, read, tmp_path) >= len(WRONG) / 2
    for content in ('{"a": ' * 1000 + "1" + "}" * 1000, "", "[]", "\x00"):
        file.write_text(content)
        with pytest.raises(UserError, match=file.name):
            read(file)


DIFFUSERS = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("part", [*DIFFUSERS, "text_encoder/config.json"])
def test_a_changed_part_of_a_diffusers_folder_is_read_or_refused_by_name(part, tmp_path):
    with zipfile.ZipFile(DATA / "diffusion_tiny.zip") as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.endswith(".json") and "first/" in name])
    file = tmp_path / "first" / part
    root = tmp_path / "first"
    assert refused(json.loads(file.read_text()), file, lambda file: diffusers.read_config(root), root) > 20


def test_a_number_far_too_large_is_refused_with_its_key(tmp_path):
    for name, key, value in (("vit", "num_hidden_layers", 10_000_000), ("t5", "num_layers", 10_000_000)):
        values, read = CONFIGS[name]
        (tmp_path / "config.json").write_text(json.dumps(values | {key: value}))
        with pytest.raises(UserError, match=rf"config.json: {key}: got 10000000, expected an integer from 1 to 256"):
            read(tmp_path / "config.json")
