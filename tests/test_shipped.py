"""The critic in the package: found by name, small, never written to, trained on none of the demo's prompts."""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import rahf
from rahf import evaluate, experiments, folders, predict, pretrained, sources, weights, workdirs
from rahf.models import critics
from rahf.models.parameters import param_shapes
from rahf.reward import specs
from richhf_data import synthetic, vocabulary
from richhf_data.synthetic import stream

ROOT = pathlib.Path(__file__).parent.parent
SYNTH = folders.SHIPPED / "synth"
DEMO = {"train": 4800, "dev": 200, "test": 400, "test_novel": 400}  # examples, of the seed 0
MEASURED = {"dev": 500, "test": 1000, "test_novel": 1000}  # in docs/results.md, of the seed 0


def state_of_package():
    """Every file beside the shipped critics: its size, its time and its content."""
    files = sorted(path for path in folders.SHIPPED.rglob("*") if path.is_file())
    return [(path, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


@pytest.fixture(scope="module")
def model():
    return rahf.load("synth")


# ---- The folder -----------------------------------------------------------------------------------------------------
def test_the_folder_is_small_and_whole():
    names = {"README.md", "SHA256SUMS", "config.json", "predict.stablehlo", "vocabulary.model", "weights.safetensors"}
    assert {path.name for path in SYNTH.iterdir()} == names and folders.shipped() == ["synth"]
    assert sum(path.stat().st_size for path in SYNTH.iterdir()) <= 6 * 2**20
    for line in (SYNTH / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((SYNTH / name).read_bytes()).hexdigest() == digest, name
    dtypes = {tensor.dtype for tensor in pretrained.read(SYNTH, "rahf").tensors.values()}
    assert "bfloat16" in dtypes and "float32" not in dtypes


def test_the_card_says_how_it_was_made_and_how_to_load_it():
    text = (SYNTH / "README.md").read_text()
    assert 'rahf.load("synth")' in text and "--workdir=synth" in text
    assert re.search(r"no photographs", text) and "in bfloat16" in text


# ---- The name -------------------------------------------------------------------------------------------------------
def test_it_predicts_by_name_and_writes_nothing_beside_it(model, tmp_path):
    before = state_of_package()
    examples, states = predict.drawn_examples(model.config, "test", 3)
    assert predict.predict(model, examples, states, tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert synthetic.draw_prompt(0, 0, "test").scene.groups[0].colour in page and "annotators, peak" in page
    image = synthetic.draw(0, 0, "test", 64, 32).image
    expected = model.predict([image], ["a red cat"]).scores["overall"]
    np.testing.assert_array_equal(specs.reward_of("rahf:synth")([image], ["a red cat"]), expected)
    np.testing.assert_array_equal(specs.reward_of("rahf:synth:overall=2")([image], ["a red cat"]), 2 * expected)
    assert state_of_package() == before


def test_the_name_is_a_workdir_of_commands(monkeypatch):
    read = experiments.reader(of_workdir=lambda folder: workdirs.read_config(folder))
    monkeypatch.setattr("ml_collections.config_flags.DEFINE_config_dict", lambda *args, **kwargs: None)
    assert read(["predict", "--workdir=synth", "--drawn=2"])[1:] == ["--drawn=2", f"--workdir={SYNTH}"]


def test_a_local_folder_of_that_name_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert folders.local_folder("synth") == folders.local_folder("synth/") == str(SYNTH)
    shutil.copytree(SYNTH, tmp_path / "synth")
    assert folders.local_folder("synth") == "synth"
    assert os.path.samefile(rahf.load("synth").vocabulary.path, "synth/vocabulary.model")
    (tmp_path / "synth/config.json").unlink()
    with pytest.raises(ValueError, match=r"synth has no config.json"):
        rahf.load("synth")


def test_an_unknown_name_gives_the_names_of_the_shipped_critics():
    with pytest.raises(ValueError, match=r"synht has no config.json; expected .*rahf.train`, or a critic that .*: synth"):
        rahf.load("synht")
    with pytest.raises(ValueError, match=r"init.rahf: synht is no folder .*, or a critic that RAHF comes with: synth"):
        pretrained.starting_tensors({"rahf": "synht"}, {}, None)


def test_an_evaluation_does_not_write_into_a_converted_folder():
    before = state_of_package()
    with pytest.raises(ValueError, match=r"synth was written by rahf.convert, expected .*; `python -m rahf.tables .*synth`"):
        evaluate.evaluate(SYNTH, "test", 2)
    assert state_of_package() == before


def test_a_run_that_starts_from_it_has_its_model_and_reads_with_its_vocabulary(tmp_path):
    config = experiments.load("rahf_synth_demo")
    assert config.init.rahf == "synth" and config.model == experiments.load("rahf_synth_shipped").model
    found = sources.install_vocabulary(config, tmp_path)
    assert found.digest == workdirs.vocabulary(SYNTH).digest
    model = critics.config_of(config.model.to_dict())
    ours = param_shapes(critics.module_of(model).init, *critics.dummy_inputs(model))
    assert pretrained.starting_tensors(config.init, unflatten_dict(ours, sep="/"), model).keys() == ours.keys()

    def started(folder, head):
        shapes = dataclasses.replace(model, word_head=head)
        ours = param_shapes(critics.module_of(shapes).init, *critics.dummy_inputs(shapes))
        return pretrained.starting_tensors({"rahf": str(folder)}, unflatten_dict(ours, sep="/"), shapes).keys()

    head = {name for name in ours if name.startswith("word_head/")}
    assert len(head) == 2 and started("synth", head=False) == ours.keys() - head
    shutil.copytree(SYNTH, tmp_path / "headless")
    held = {name: tensor for name, tensor in pretrained.read(SYNTH, "rahf").tensors.items() if name not in head}
    weights.write_safetensors(tmp_path / "headless/weights.safetensors", held)
    assert started(tmp_path / "headless", head=True) == started(tmp_path / "headless", head=False) == ours.keys() - head
    config.init.t5 = "elsewhere"  # whose embeddings are of another vocabulary
    with pytest.raises(ValueError, match=r"data.data_dir: got ''"):
        sources.install_vocabulary(config, tmp_path / "other")


def test_the_makefile_draws_the_demo_that_is_tested_here():
    flags = dict(re.findall(r"--(train|dev|test|seed)=(\d+)", (ROOT / "Makefile").read_text()))
    assert flags == {name: str(DEMO[name]) for name in ("train", "dev", "test")} | {"seed": "0"}


# ---- Prompts that are left out --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def left_out():
    return sources.left_out(experiments.load("rahf_synth_shipped"))


@pytest.fixture(scope="module")
def demos() -> set[str]:
    """The prompts that the demo and docs/results.md use."""
    pairs = [*DEMO.items(), *MEASURED.items()]
    return {synthetic.draw_prompt(0, i, split).text for split, count in pairs for i in range(count)}


def test_the_shipped_critic_sees_no_prompt_of_the_demo(demos, left_out):
    seed = experiments.load("rahf_synth_shipped").seed
    kept = [synthetic.kept_index(seed, index, "train", left_out) for index in range(4000)]
    texts = [synthetic.draw_prompt(seed, index, "train").text for index in kept]
    assert demos.isdisjoint(texts)
    assert sum(synthetic.draw_prompt(seed, index, "train").text in demos for index in range(6000)) > 100
    replaced = [index for index, other in enumerate(kept) if index != other]
    assert 0.05 < len(replaced) / 4000 < 0.2 and len(set(kept)) == 4000
    assert texts == list(synthetic.train_prompts(4000, seed, left_out))  # those of the vocabulary
    assert not sources.left_out(experiments.load("rahf_synth_small"))


def test_batches_leave_out_the_same_with_any_workers_and_from_a_later_start(demos, left_out, tmp_path):
    pieces = vocabulary.train(synthetic.train_prompts(300, 22, left_out), tmp_path / "vocabulary.model", 300)
    sizes = {"image_size": 32, "heatmap_size": 16, "text_length": 48, "keyword_length": 80}

    def drawn(count, **changes):
        arguments = {"seed": 22, "vocabulary": pieces, "variant": "multi_head", "left_out": left_out, "workers": 0, **sizes}
        batches = stream.batches(50, **arguments | changes)
        found = list(itertools.islice(batches, count))
        batches.close()
        return found

    def prompts(batches):
        return {pieces.decode(row[0]) for batch in batches for row in batch["text_ids"]}

    inline = drawn(3)
    assert demos.isdisjoint(prompts(inline)) and not demos.isdisjoint(prompts(drawn(3, left_out=frozenset())))
    for others, expected in ((drawn(2, workers=2), inline[:2]), (drawn(1, start=2), inline[2:])):
        for other, batch in zip(others, expected, strict=True):
            assert all(np.array_equal(other[name], batch[name]) for name in batch)


def test_a_run_from_before_the_option_leaves_out_nothing():
    config = experiments.load("rahf_synth_tiny").to_dict()
    assert config["data"].pop("left_out") == workdirs.LEFT_OUT
    assert workdirs._upgraded(config)["data"]["left_out"] == workdirs.LEFT_OUT
