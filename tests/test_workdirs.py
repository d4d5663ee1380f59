"""Workdirs: older ones are read and resumed, and no run goes on with another config or other data."""

import json
import shutil

import cv2
import ml_collections
import numpy as np
import pytest
import tiny_data

import rahf
from rahf import convert, evaluate, experiments, readers, sources, train, weights, workdirs
from rahf.diffusion import train as diffusion_train
from richhf_data import build, builder, json_files, records

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def older(unpacked, tmp_path):
    """A workdir and a converted folder with `mesh.rules`, without data.json and without the options that came later."""
    shutil.copytree(unpacked("older_workdirs"), tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "run/vocabulary.model", tmp_path / "converted/vocabulary.model")
    assert "rules" in json.loads((tmp_path / "run/config.json").read_text())["mesh"]
    return tmp_path


@pytest.mark.parametrize("name", ["run", "converted"])
def test_an_older_folder_predicts_what_it_predicted(older, name):
    golden = json.loads((older / "run/golden.json").read_text())
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    model = rahf.load(older / name)
    assert model.identity == "c6c71501c860d3c8"  # under which results of those days are kept
    feedback = model.predict([image], ["two red cats on a table"])
    for score, value in golden["scores"].items():
        np.testing.assert_allclose(feedback.scores[score][0], value, atol=1e-6)
    for heatmap, mean in golden["mean_heatmaps"].items():
        np.testing.assert_allclose(feedback.heatmaps[heatmap].mean(), mean, atol=1e-6)
    assert feedback.labelled_prompts == [golden["labelled_prompt"]]


def test_an_older_run_resumes_and_its_data_are_recorded(older, capsys):
    results = train.train(workdirs.read_config(older / "run"), older / "run")
    assert "resumed from step 4" in capsys.readouterr().out
    assert results["num_examples"] == 8
    assert set(json_files.read(older / "run/data.json")) == {"datasets", "vocabulary"}


def test_the_way_of_decoding_is_kept_and_checked(older):
    run = older / "run"
    assert workdirs.read_config(run).data.decoding == workdirs.read_config(older / "converted").data.decoding == "free"
    values = json_files.read(run / "config.json")
    for decoding in ("copy", "beam"):
        values["data"]["decoding"] = decoding
        json_files.write(run / "config.json", values)
        if decoding == "copy":
            assert readers.rahf_workdir(run).config["data"]["decoding"] == workdirs.read_config(run).data.decoding == "copy"
        else:
            with pytest.raises(ValueError, match=r"run/config.json: data.decoding: got 'beam', expected one of"):
                workdirs.read_config(run)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.model"])
def test_a_changed_file_of_a_workdir_is_refused_on_load_and_on_resume(name, older):
    run, config = older / "run", workdirs.read_config(older / "run")
    workdirs.seal(run / name)
    content = (run / name).read_bytes()
    (run / name).write_bytes(content.replace(b"0", b"1", 1) if name == "config.json" else content[:-9] + b"x" + content[-8:])
    message = rf"workdir: .*run/{name} is damaged: .* put a copy back, or delete .*digests.json"
    for read in (rahf.load, lambda run: train.train(config, run), lambda run: convert.convert("workdir", run, older / "a")):
        with pytest.raises(ValueError, match=message):
            read(run)
    (run / name).write_bytes(content)
    workdirs.verified(run / name)


def test_what_a_run_writes_is_sealed(tmp_path):
    workdir = workdirs.open_workdir(tmp_path, ci_config())
    sources.install_vocabulary(ci_config(), workdir)
    assert set(json_files.read(tmp_path / "digests.json")) == {"config.json", "vocabulary.model"}
    sources.install_vocabulary(ci_config(), workdirs.open_workdir(tmp_path, ci_config()))


def test_a_damaged_best_checkpoint_is_not_converted(older):
    path = max((older / "run/best").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint: .*run/best/2 is damaged: .* does not read as it was saved"):
        dict(weights.read_all(readers.rahf_workdir(older / "run").tensors))


def test_a_path_that_orbax_takes_for_a_pattern_is_refused_before_anything_is_written(tmp_path):
    for command, name in ((train, "rahf_ci"), (diffusion_train, "sd_reward")):
        with pytest.raises(ValueError, match=r"has a \[ in its path"):
            command.train(experiments.load(name), tmp_path / "run[lr=1e-3]")
    assert list(tmp_path.iterdir()) == []


def ci_config(**data):
    config = experiments.load("rahf_ci")
    config.data.update(source="stream", **data)
    return config


def test_another_config_is_refused_key_by_key(tmp_path):
    config = ci_config()
    workdirs.open_workdir(tmp_path, config)
    workdirs.open_workdir(tmp_path, config)
    config.optimizer.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: the workdir has 0.002, this run 0.5"):
        workdirs.open_workdir(tmp_path, config)
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: the workdir has 0.002, this run 0.5"):
        evaluate.evaluate(tmp_path, "test", config=config)


def test_what_may_differ_is_named_in_full(tmp_path):
    config = ci_config()
    workdirs.open_workdir(tmp_path, config)
    config.mesh.model, config.log_every = 2, 7
    workdirs.open_workdir(tmp_path, config, train.RESUME_MAY_DIFFER)
    with pytest.raises(ValueError, match=r"log_every: the workdir has 1, this run 7"):
        workdirs.open_workdir(tmp_path, config, ("mesh", "log"))  # a prefix of a name is another name


def test_a_run_goes_on_with_the_data_that_it_began_with_alone(tmp_path):
    """Datasets are compared by name, version and content, wherever they lie; vocabularies by content."""
    first, other, moved = tiny_data.built(), tiny_data.built(train=25), tmp_path / "moved"
    shutil.copytree(first, moved)

    def identity(data_dir):
        config = experiments.load("rahf_ci")
        config.data.data_dir = str(data_dir)
        return sources.identity(config)

    file = tmp_path / "data.json"
    workdirs.record(file, identity(first), "data")
    workdirs.record(file, identity(moved), "data")
    with pytest.raises(ValueError, match=r"(?s)holds a run with other data:.*datasets.0.splits.train.*Take another"):
        workdirs.record(file, identity(other), "data")


def test_other_images_of_the_same_records_and_sizes_are_other_data(tmp_path):
    """The counts, bytes and records of the two datasets are equal."""
    uids, found = [f"train-{i}" for i in range(3)], []
    records.write(tmp_path / "records" / "train.tfrecord", map(tiny_data.raw_record, uids))
    for value in (1, 2):
        image = cv2.imencode(".png", np.full((8, 8, 3), value, np.uint8), (cv2.IMWRITE_PNG_COMPRESSION, 0))[1].tobytes()
        rows = [(uid, f"unused-{uid}") for uid in uids]
        tiny_data.write_parquet(tmp_path / "images" / "0.parquet", rows, dict.fromkeys(uids, image))
        images, data_dir = f"parquet:{tmp_path}/images/*.parquet", tmp_path / f"data_{value}"
        build.build(tmp_path / "records", images, data_dir, vocabulary_size=60)
        config = experiments.load("rahf_ci")
        config.data.data_dir = str(data_dir)
        found.append(sources.identity(config))
    file = tmp_path / "data.json"
    workdirs.record(file, found[0], "data")
    with pytest.raises(ValueError, match=r"other data:\n  datasets.0.shards.train: .*\n  Take another"):
        workdirs.record(file, found[1], "data")
    (builder.dataset_dir(data_dir) / "digests.json").unlink()  # as an earlier version built it
    assert "shards" not in sources.identity(config)["datasets"]["0"]


def test_a_mixtures_identity_holds_what_it_evaluates_on(tmp_path):
    config = experiments.load("rahf_ci")
    config.data.mixture = ((tiny_data.built(), 0.5), (tiny_data.built(train=25), 0.5))
    assert len(sources.identity(config)["datasets"]) == 2
    shutil.copytree(tiny_data.built(), tmp_path / "dev")
    config.data.data_dir = str(tmp_path / "dev")
    assert len(sources.identity(config)["datasets"]) == 3


def test_what_may_differ_on_resume_may_differ_in_an_evaluation():
    assert set(train.RESUME_MAY_DIFFER) <= set(evaluate.EVALUATE_MAY_DIFFER)


def test_the_old_name_of_a_nested_mesh_is_renamed(tmp_path):
    config = ml_collections.ConfigDict({"kind": "other", "base": {"mesh": {"data": -1, "sharding": "fully_sharded"}}})
    json_files.write(tmp_path / "config.json", {"kind": "other", "base": {"mesh": {"data": -1, "rules": "fully_sharded"}}})
    workdirs.check_config(tmp_path, config)
