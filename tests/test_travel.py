"""Folders at addresses: sent, fetched, checked; the hub's real client against tests/hub.py, gcsfs against tests/gcs.py."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import cv2
import fsspec
import gcs
import hub
import huggingface_hub
import jax
import numpy as np
import pytest
import quick_xla
import safetensors.numpy
import tiny_clip
import tiny_data
import tiny_model

import rahf
from rahf import card, convert, experiments, folders, pretrained, readers, workdirs
from rahf.reward import embed, specs
from richhf_data import images, json_files, metrics, schema

ROOT = pathlib.Path(__file__).parent.parent
URL = "memory://bucket/folder"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("RAHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory():
    """An empty file system in memory."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield memory
    memory.store.clear()


def send(url=URL, **files):
    """Sends files; a name's underscore stands for a dot."""
    with folders.writing(url, ["weights.safetensors", "config.json", "vocabulary.model"]) as folder:
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_bytes(content)
        folders.write_sums(folder)


def held(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()}


def same(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Whether two conversions of a run wrote the same. An exported function has other bytes each time."""
    varies = {"README.md", "predict.stablehlo", "SHA256SUMS"}
    return one.keys() == other.keys() and all(one[name] == other[name] for name in one.keys() - varies)


# ---- Fetching -------------------------------------------------------------------------------------------------------
def test_a_folder_is_fetched_once_and_again_when_it_has_changed(memory):
    send(config_json=b"1", weights_safetensors=b"w" * 1000)
    first = folders.local_folder(URL)
    assert held(first) == {"config.json": b"1", "weights.safetensors": b"w" * 1000}
    memory.rm_file("/bucket/folder/weights.safetensors")
    assert folders.local_folder(f"{URL}/") == first  # nothing is read but SHA256SUMS
    send(config_json=b"2", weights_safetensors=b"v" * 1000)
    second = folders.local_folder(URL)
    assert second != first and held(second) == {"config.json": b"2", "weights.safetensors": b"v" * 1000}


def test_the_sums_are_those_of_the_command_sha256sum(memory, tmp_path):
    send(config_json=b"1", weights_safetensors=b"w", README_md=b"edited on the hub")
    folder = folders.local_folder(URL)
    (pathlib.Path(folder) / "SHA256SUMS").write_bytes(memory.cat_file("/bucket/folder/SHA256SUMS"))
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "config.json: OK\nweights.safetensors: OK\n" and done.returncode == 0


def test_a_file_that_differs_from_its_sum_is_refused_and_not_kept(memory, cache):
    send(config_json=b"1", weights_safetensors=b"weights")
    memory.pipe_file("/bucket/folder/weights.safetensors", b"weighty")
    with pytest.raises(ValueError, match=r"folder/weights.safetensors: got a file with SHA-256 \w+..., expected \w+... as"):
        folders.local_folder(URL)
    assert not list(cache.rglob("weights*"))
    memory.pipe_file("/bucket/folder/weights.safetensors", b"weights")
    assert held(folders.local_folder(URL))["weights.safetensors"] == b"weights"


def test_a_damaged_file_of_the_cache_is_removed_and_fetched_again(memory):
    send(config_json=b"1", weights_safetensors=b"weights")
    file = pathlib.Path(folders.local_folder(URL), "weights.safetensors")
    file.write_bytes(b"weighty")
    with pytest.raises(ValueError, match=r"weights.safetensors in the cache was damaged, and is removed; call again"):
        folders.local_folder(URL)
    assert not file.exists()
    folders.local_folder(URL)
    assert file.read_bytes() == b"weights"


def test_a_fetch_that_was_cut_short_goes_on(memory, cache):
    send(config_json=b"1", weights_safetensors=b"weights")
    memory.rm_file("/bucket/folder/weights.safetensors")
    with pytest.raises(ValueError, match=r"weights.safetensors: could not be fetched .*; call again to go on"):
        folders.local_folder(URL)
    assert [file.name for file in cache.glob("*/*")] == ["config.json"]
    memory.pipe_file("/bucket/folder/weights.safetensors", b"weights")
    memory.rm_file("/bucket/folder/config.json")
    assert held(folders.local_folder(URL)) == {"config.json": b"1", "weights.safetensors": b"weights"}


def test_many_may_ask_at_a_time(memory, cache):
    send(config_json=b"1", weights_safetensors=b"w" * 100_000)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = set(pool.map(folders.local_folder, [URL] * 16))
    assert len(found) == 1 and held(*found) == {"config.json": b"1", "weights.safetensors": b"w" * 100_000}
    assert not list(cache.glob("*.lock")) + list(cache.glob(".*"))


@pytest.mark.parametrize("line", ["0" * 64 + "  ../config.json", "0" * 64 + "  .hidden", "config.json", "0" * 64 + "  a/b"])
def test_sums_that_name_no_plain_file_are_refused(line, memory):
    memory.pipe_file("/bucket/folder/SHA256SUMS", line.encode())
    with pytest.raises(ValueError, match=r"SHA256SUMS: got the line .*, expected a SHA-256 and a file's name"):
        folders.local_folder(URL)


def test_paths_and_addresses_without_sums_stay_as_they_are(memory, tmp_path):
    assert folders.local_folder(tmp_path) == str(tmp_path)
    assert folders.local_folder("a/run") == "a/run"
    memory.pipe_file("/bucket/run/config.json", b"{}")
    assert folders.local_folder("memory://bucket/run") == "memory://bucket/run"


@pytest.mark.parametrize(
    "url, message",
    [
        ("hf://name", "expected hf://owner/name, hf://owner/name@revision"),
        ("nowhere://bucket/folder", "cannot be opened .*nowhere"),
        ("hf://owner/name", "hf://owner/name: cannot be read .*offline.*, and the cache .* does not hold it"),  # conftest.py
    ],
)
def test_an_address_that_cannot_be_read_is_named(url, message):
    with pytest.raises(ValueError, match=message):
        folders.local_folder(url)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match="s3://bucket/folder: needs the package s3fs; pip install s3fs"):
        folders.local_folder("s3://bucket/folder")


# ---- Sending --------------------------------------------------------------------------------------------------------
def test_files_of_ours_are_replaced_and_the_readers_own_stay(memory):
    send(config_json=b"1", vocabulary_model=b"v", README_md=folders.MARK.encode())
    memory.pipe_file("/bucket/folder/notes.txt", b"mine")
    send(config_json=b"2", README_md=folders.MARK.encode() + b" new")
    there = {name.rpartition("/")[2] for name in memory.ls("/bucket/folder", detail=False)}
    assert there == {"config.json", "SHA256SUMS", "README.md", "notes.txt"}
    assert memory.cat_file("/bucket/folder/README.md").endswith(b" new")
    memory.pipe_file("/bucket/folder/README.md", b"mine")
    send(config_json=b"3", README_md=folders.MARK.encode())
    assert memory.cat_file("/bucket/folder/README.md") == b"mine"
    assert held(folders.local_folder(URL)) == {"config.json": b"3"}


def test_an_address_that_holds_something_else_is_not_written(memory):
    memory.pipe_file("/bucket/folder/config.json", b"mine")
    with pytest.raises(ValueError, match=f"output: {URL} holds a config.json that rahf.convert did not write"):
        send(config_json=b"1")
    assert memory.cat_file("/bucket/folder/config.json") == b"mine"


# ---- A run ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def workdir(unpacked, tmp_path_factory):
    """A run of rahf_ci, with an evaluation."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(unpacked("older_workdirs") / "run", folder)
    (folder / "eval").mkdir()
    plcc = {f"score/plcc/{name}": 0.25 for name in schema.SCORES}
    json_files.write(folder / "eval/test.json", plcc | {"num_examples": 3.0, "heatmap/cc/misalignment": None})
    json_files.write(folder / "eval/test.references.json", {"constant predictor": {"num_examples": 3.0}})
    json_files.write(folder / "data.json", {"datasets": {"0": {"name": "richhf", "version": "1.2.0", "records": "ab12"}}})
    return folder


@pytest.fixture(scope="module")
def converted(workdir, tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert.convert("workdir", workdir, folder, license="cc-by-4.0")
    return folder


def test_the_card_says_what_the_model_is(workdir, converted):
    text = (converted / "README.md").read_text()
    _, _, body = text.split("---\n", 2)
    assert huggingface_hub.ModelCard(text).data.to_dict() == {
        "library_name": "rahf",
        "license": "cc-by-4.0",
        "pipeline_tag": "image-text-to-text",
        "tags": list(card.TAGS),
    }
    tensors = safetensors.numpy.load_file(converted / "weights.safetensors")
    count = sum(array.size for array in tensors.values())
    assert f"\n{count:,} parameters, architecture `rahf`, variant `multi_head`." in body
    assert "resized to 32 x 32 pixels" in body and "more than 24 ids, its end counted, is refused" in body
    assert "- Step 2 of 4, in batches of 8: the best" in body
    assert "on the dataset `richhf` 1.2.0, built from the records ab12." in body and "Started from random weights" in body
    results = {f"score/plcc/{name}": 0.25 for name in schema.SCORES}
    assert metrics.table({"this model": results, "constant predictor": {}}) in body
    assert "`python -m rahf.evaluate --split=test`, 3 examples:" in body
    assert body.count("| `") == len(os.listdir(converted)) - 1  # all files but the card
    assert str(workdir) not in text and str(converted.parent) not in text


def test_a_run_without_an_evaluation_or_a_licence_says_so(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    with pytest.raises(ValueError, match="license: got 'My: Licence', expected an identifier"):
        convert.convert("workdir", tmp_path / "run", tmp_path / "out", license="My: Licence")
    read = readers.rahf_workdir(tmp_path / "run")
    text = card.model_card(tmp_path / "run", read, "hf://owner/name", None, ["config.json"])
    assert "license:" not in text and "The licence is not stated" in text and "# name\n" in text
    assert "Not measured: `python -m rahf.evaluate` was not run" in text
    assert 'rahf.load("hf://owner/name")' in text and "--workdir=hf://owner/name" in text


def test_the_card_says_how_a_run_was_trained(tmp_path):
    config = experiments.load("rahf_ci")
    config.data.data_dir = str(tiny_data.built())
    text = card.model_card(*written(tmp_path / "run", config), "name", None, ["weights.safetensors"], "bfloat16")
    assert "Trained by `python -m rahf.train --config=rahf_ci --workdir=RUN --config.data.data_dir=DATA`." in text
    assert "1.5 hours of the host's processor time" in text and "The parameters, in bfloat16." in text
    assert "no scene of" not in text and "captions" not in text and config.data.data_dir not in text
    config.data.update(source="stream", data_dir="", captions=0.25, left_out=dict(train=1200, test=7))
    text = card.model_card(*written(tmp_path / "drawn", config), str(folders.SHIPPED / "tiny"), None, [])
    assert "Trained by" not in text and 'rahf.load("tiny")' in text and "knows no photographs" in text
    assert "Of the pictures, 25% were captions for the decoder, without feedback." in text
    assert "no scene of these first examples of seed 0, whatever the wording: 7 of test, 1,200 of train." in text


def written(folder, config):
    """A run of the tiny model with this config: its folder, and what is read of it."""
    return tiny_model.workdir(folder, config), readers.rahf_workdir(folder)


def test_long_prompts_lose_their_ends_after_a_journey_as_before(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    config = json_files.read(tmp_path / "run/config.json")
    for value, says in ((True, "loses its end."), (False, "is refused.")):
        config["data"]["truncate_long_prompts"] = value
        json_files.write(tmp_path / "run/config.json", config)
        read = readers.rahf_workdir(tmp_path / "run")
        pretrained.write(read, tmp_path / "out")
        assert workdirs.read_config(tmp_path / "out").data.truncate_long_prompts is value
        assert says in card.model_card(tmp_path / "run", read, "name", None, [])


def test_gs_without_gcsfs_is_left_to_tensorflow(monkeypatch):
    monkeypatch.setattr(folders.importlib.util, "find_spec", lambda name: None)
    assert folders.local_folder("gs://bucket/run") == "gs://bucket/run"


def test_a_card_of_the_users_stays_in_a_folder_too(workdir, converted, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(converted, folder)
    (folder / "README.md").write_text("mine")
    convert.convert("workdir", workdir, folder)
    assert (folder / "README.md").read_text() == "mine" and "README.md there is yours, and stays" in capsys.readouterr().out
    assert same(held(folder), held(converted))


def test_a_model_loads_from_an_address_and_is_a_reward(converted, memory):
    memory.put(str(converted), "/bucket/model", recursive=True)
    ours, there = rahf.load(converted), rahf.load("memory://bucket/model")
    jax.tree.map(np.testing.assert_array_equal, ours.params, there.params)
    assert there.vocabulary.digest == ours.vocabulary.digest and there.config == ours.config
    for spec, weights in (("", {"overall": 1.0}), (":plausibility", {"plausibility": 1.0})):
        reward = specs.reward_of(f"rahf:memory://bucket/model{spec}")
        assert reward.weights == weights and reward.model.vocabulary.digest == ours.vocabulary.digest
    terms = "sum:0.5*rahf:memory://bucket/model:alignment|rahf:memory://bucket/model"
    assert [member.weights for _, member in specs.reward_of(terms).members] == [{"alignment": 1.0}, {"overall": 1.0}]


def test_training_starts_from_an_address(converted, memory):
    memory.put(str(converted), "/bucket/model", recursive=True)
    model = rahf.load(converted)
    init = {"rahf": "memory://bucket/model"}
    tensors = pretrained.starting_tensors(init, model.params, model.model_config)
    assert len(tensors) == len(jax.tree.leaves(model.params))


def test_a_clip_at_an_address_is_a_reward(memory, tmp_path):
    tiny_clip.write(tmp_path / "clip")
    folders.write_sums(tmp_path / "clip")
    memory.put(str(tmp_path / "clip"), "/bucket/clip", recursive=True)
    assert embed.Clip("memory://bucket/clip").digest == embed.Clip(tmp_path / "clip").digest


# ---- The hub and a bucket, through their own clients ----------------------------------------------------------------
def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_travels_over_the_hub(workdir, converted, tmp_path, cache):
    server = hub.Server()
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # the hub's other way of storing large files, which this server does not have
        "HF_TOKEN": "hf_of_the_tests",
        "HF_HOME": str(tmp_path / "home"),
        "XLA_FLAGS": quick_xla.FLAGS,
    }
    convert_it = ("-m", "rahf.convert", "--source=workdir", f"--input={workdir}", "--output=hf://owner/name")
    run(*convert_it, "--license=cc-by-4.0", **environment)
    assert server.commits == [("owner/name", "main")]
    there, local = server.repositories["owner/name"]["main"], held(converted)
    assert same(there, local)
    assert b'rahf.load("hf://owner/name")' in there["README.md"]

    cv2.imwrite(str(tmp_path / "a.png"), np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    predict_it = ("-m", "rahf.predict", "--workdir=hf://owner/name", f"--images={tmp_path / 'a.png'}", "--prompt=a red cat")
    run(*predict_it, f"--output={tmp_path / 'out'}", **environment)
    [line] = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    feedback = rahf.load(converted).predict([images.read(tmp_path / "a.png")], ["a red cat"])
    expected = {name: round(float(values[0]), 6) for name, values in feedback.scores.items()}
    assert json.loads(line)["scores"] == pytest.approx(expected, abs=2e-6)

    server.shutdown()
    with pytest.warns(UserWarning, match=r"hf://owner/name cannot be read .*: what was fetched last is used"):
        model = rahf.load("hf://owner/name")  # HF_HUB_OFFLINE of conftest.py
    jax.tree.map(np.testing.assert_array_equal, model.params, rahf.load(converted).params)


TRAVEL = """
import pathlib, sys
from rahf import folders

url, source = sys.argv[1], pathlib.Path(sys.argv[2])
for content in (b"1", b"2"):
    with folders.writing(url, ["config.json", "vocabulary.model"]) as folder:
        (folder / "config.json").write_bytes(content)
        (folder / "weights.safetensors").write_bytes(source.read_bytes())
        if content == b"1":
            (folder / "vocabulary.model").write_bytes(b"old")
        folders.write_sums(folder)
    found = pathlib.Path(folders.local_folder(url))
    assert (found / "config.json").read_bytes() == content
    assert (found / "weights.safetensors").read_bytes() == source.read_bytes()
print(sorted(file.name for file in found.iterdir()))
print(folders.local_folder("gs://bucket/run"))
"""


def test_a_folder_travels_over_a_bucket(tmp_path):
    server = gcs.Server()
    (tmp_path / "weights").write_bytes(np.random.default_rng(0).bytes(100_000))
    environment = {
        "STORAGE_EMULATOR_HOST": server.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    out = run("-c", TRAVEL, "gs://bucket/folder", tmp_path / "weights", **environment)
    assert out.splitlines() == ["['config.json', 'weights.safetensors']", "gs://bucket/run"]
    names = {name for _, name in server.objects}
    assert names == {"folder/SHA256SUMS", "folder/config.json", "folder/weights.safetensors"}


# ---- ONNX -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", tiny_model.VARIANTS)
def test_an_onnx_runtime_predicts_the_same(variant, tmp_path):
    pytest.importorskip("jax2onnx")
    import onnxruntime

    config = experiments.load("rahf_ci")
    config.data.source = "stream"
    with config.unlocked():
        config.model = dataclasses.asdict(tiny_model.config(variant))
        config.model.t5.vocab_size = 512
    tiny_model.workdir(tmp_path / "run", config)
    convert.convert("workdir", tmp_path / "run", tmp_path / "out", onnx=True)
    assert (tmp_path / "out/predict.onnx").stat().st_size < 2**20
    model = rahf.load(tmp_path / "out")
    pictures = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    rows = [model.prepare(picture, f"a {word} cat") for picture, word in zip(pictures, "abcde", strict=True)]
    session = onnxruntime.InferenceSession(tmp_path / "out/predict.onnx")
    for count in (1, 5):
        inputs = {name: np.stack([row[name] for row in rows[:count]]) for name in ("image", "text_ids")}
        outputs = dict(zip(("scores", "heatmaps", "keyword_ids"), session.run(None, inputs), strict=True))
        for i, expected in enumerate(model.predict_rows(rows[:count], count)):
            np.testing.assert_allclose(outputs["scores"][i], expected["scores"], atol=1e-5)
            np.testing.assert_allclose(outputs["heatmaps"][i], expected["heatmaps"], atol=1e-5)
            np.testing.assert_array_equal(outputs["keyword_ids"][i], expected["keyword_ids"])
    assert len({tuple(ids) for ids in outputs["keyword_ids"]}) > 1


def test_onnx_of_what_is_no_rahf_or_without_its_package_is_refused(workdir, tmp_path, monkeypatch):
    tiny_clip.write(tmp_path / "clip")
    monkeypatch.setitem(readers.READERS, "clip-hf", lambda path: pretrained.read(path, "clip"))
    monkeypatch.setitem(sys.modules, "jax2onnx", types.ModuleType("jax2onnx"))
    with pytest.raises(ValueError, match="onnx: got a clip, expected a whole RAHF"):
        convert.convert("clip-hf", tmp_path / "clip", tmp_path / "out", onnx=True)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ValueError, match=r"onnx: needs the package jax2onnx; pip install 'rahf\[onnx\]'"):
        convert.convert("workdir", workdir, tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()
