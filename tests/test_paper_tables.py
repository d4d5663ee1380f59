"""`python -m rahf.tables`: rows, kept predictions, every error, the tables and the page."""

import json
import os
import pathlib
import re
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import test_bootstrap
import tiny_data
import tiny_model
import tiny_preference
from html_page import Page

from rahf import convert, evaluate, experiments, predictor
from rahf.fingerprint import fingerprint
from rahf.reward import preference, specs
from rahf.tables import __main__ as tables
from rahf.tables import bootstrap, dataset, layout, measure, page, predictions, published, rows, targets
from richhf_data import metrics
from richhf_data.errors import UserError
from richhf_data.schema import HEATMAPS, SCORES

pytestmark = pytest.mark.usefixtures("standard_promotion")
SPLIT = "train"  # of tiny_data: 23 examples; dev has 9
OWN_REWARD = """
def brightness(images, prompts):
    return [float(image.mean()) for image in images]
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, standard_promotion):
    """A workdir as if it had been trained on the tiny dataset."""
    folder = tmp_path_factory.mktemp("run")
    config = experiments.load("rahf_ci")
    config.data.data_dir = tiny_data.built()
    return tiny_model.workdir(folder, config)


@pytest.fixture(scope="module")
def made(workdir, tmp_path_factory):
    """The tables of several kinds of rows: (their folder, tables.json)."""
    output = tmp_path_factory.mktemp("tables")  # the rows' names are in the order of tables.json
    code = tmp_path_factory.mktemp("code")
    (code / "own_reward_of_tables.py").write_text(OWN_REWARD)
    sys.path.insert(0, str(code))
    wanted = [f"A & <B>=isotonic:{workdir}", f"RAHF={workdir}", f"two={workdir}+{workdir}"]
    wanted.insert(2, "own=python:own_reward_of_tables:brightness")
    tables.make(wanted, tables.Options(str(output), tiny_data.built(), SPLIT, resamples=100, batch_size=8))
    sys.path.remove(str(code))
    return output, json.loads((output / "tables.json").read_text())


# ---------------------------------------------------------------------------------------------------------------- rows


def kept(made, name):
    """The folder of a row of `made`."""
    return made[0] / "rows" / f"{SPLIT}-23" / rows.parse(f"{name}=x").folder


def test_a_workdir_has_the_metrics_of_rahf_evaluate(workdir, made):
    expected = evaluate.evaluate(workdir, SPLIT)
    references = json.loads((workdir / "eval" / f"{SPLIT}.references.json").read_text())
    found = made[1]["rows"]["RAHF"]
    assert made[1]["num_examples"] == expected.pop("num_examples") == 23 and made[1]["heatmap_size"] == 16
    for key, value in expected.items():
        if found[key]["undefined"]:
            assert value == 0, key
        else:
            # Images differ by up to a level, as they are resized by another library; this model's scores hardly vary.
            assert found[key]["value"] == pytest.approx(value, rel=2e-3, abs=2e-2 if "score/" in key else 2e-3), key
            assert found[key]["low"] <= found[key]["value"] <= found[key]["high"], key
    constant = made[1]["references"][dataset.CONSTANT]
    for key, value in references["constant predictor"].items():
        if key != "num_examples" and constant[key] is not None:
            assert constant[key] == pytest.approx(value, abs=1e-6), key
    assert constant["score/plcc/overall"] is None  # undefined


def test_an_ensemble_of_a_workdir_and_itself_is_that_workdir(made):
    found = made[1]["rows"]
    for key, one in found["RAHF"].items():
        assert found["two"][key]["value"] == pytest.approx(one["value"], abs=1e-4, nan_ok=True), key


def test_a_calibrated_row_says_so_and_is_fitted_on_dev(made):
    row = rows.Row("A & <B>", "", "isotonic")
    dev = pyarrow.parquet.read_table(kept(made, row.title) / "dev.parquet")
    assert dev.num_rows == 9
    predicted, truth = (np.stack([dev[f"{side}{name}"].to_numpy() for name in SCORES], axis=1) for side in ("", "true_"))
    plain, own = (predictions.Predictions(kept(made, name) / "predictions.parquet", "") for name in ("RAHF", row.title))
    np.testing.assert_allclose(own.scores, rows.calibration("isotonic", predicted, truth)(plain.scores), atol=2e-6)
    np.testing.assert_array_equal(own.maps(5), plain.maps(5))
    assert made[1]["rows"]["A & <B>, isotonic on dev"]["score/rmse/overall"]["value"] > 0
    assert made[1]["specs"][row.title].startswith("isotonic:")
    with pytest.raises(UserError, match=r"rows: A & <B>, isotonic on dev: got the split dev, expected one that it is not"):
        rows.keep([row], None, {"split": "dev"}, made[0], 8)


def test_calibrations_hand_computed():
    predicted, truth = np.zeros((4, 4)), np.full((4, 4), np.nan)
    predicted[:, 0], truth[:, 0] = [0.1, 0.2, 0.3, 0.4], [0.0, 0.6, 0.2, 1.0]
    predicted[:, 1:], truth[:2, 1:] = np.array([[0.5], [0.5], [0.5], [0.5]]), [[0.2] * 3, [0.4] * 3]
    found = rows.calibration("isotonic", predicted, truth)(np.array([[0.0, 0.5, 0.5, 0.9], [0.35, 0, 0, 0], [9, 1, 1, 1]]))
    np.testing.assert_allclose(found[:, 0], [0.0, 0.7, 1.0], atol=1e-6)  # 0.6 and 0.2 pool to 0.4
    np.testing.assert_allclose(found[:, 1:], 0.3, atol=1e-6)
    line = rows.calibration("linear", predicted, truth)(np.array([[0.25, 0, 0, 0], [0.3, 0, 0, 0], [5, 0, 0, 0]]))
    np.testing.assert_allclose(line[:, 0], [0.45, 0.45 + 0.05 * 2.6, 1.0], atol=1e-6)
    np.testing.assert_allclose(line[:, 1:], 0.3, atol=1e-6)
    with pytest.raises(UserError, match=r"dev: got one example with plausibility, expected two or more .* or none"):
        rows.calibration("linear", predicted[:1], truth[:1])


@pytest.mark.parametrize("kind", rows.CALIBRATIONS)
def test_a_score_without_a_truth_is_not_calibrated(kind, tmp_path):
    predicted, truth = np.random.default_rng(0).random((2, 9, 4))
    truth[:, 3], predicted[:, 2] = np.nan, np.nan
    found = rows.calibration(kind, predicted, truth)(predicted)
    np.testing.assert_array_equal(found[:, 2:], predicted[:, 2:].astype(np.float32))
    assert (found[:, :2] != predicted[:, :2]).any(axis=0).all()
    row = rows.Row("A", "run", kind)
    sides = {"": predicted, "true_": truth}.items()
    columns = {f"{side}{name}": x[:, i] for side, x in sides for i, name in enumerate(SCORES)}
    columns = {name: pyarrow.array(values, from_pandas=True) for name, values in columns.items()}
    (tmp_path / row.folder).mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / row.folder / "dev.parquet")
    assert rows.notes([row], tmp_path) == [f"A, {kind} on dev: there is no truth of overall, which stays as predicted."]


def test_members_of_an_ensemble_are_averaged_and_vote():
    def member(score, level, labels, size=2):
        maps = None if level is None else np.full((size, size, 2), level, np.float32)
        return {"uid": "a", "scores": score and np.full(4, score), "heatmaps": maps, "labels": labels}

    three = [member(0.2, 0.5, [0, 0, None, None]), member(0.4, 1.0, [0, 1, 0, None], 4), member(None, None, [1, 1, 0, None])]
    found = rows.combined(three)
    np.testing.assert_allclose(found["scores"], 0.3)
    np.testing.assert_allclose(found["heatmaps"], np.full((4, 4, 2), 0.75))
    assert found["labels"] == [0, 1, 0, None]
    assert rows.combined(three[:2])["labels"] == [0, 1, 1, None]  # one of two is no majority
    assert rows.combined([member(0.2, None, None)] * 2)["labels"] is None


def test_a_reward_is_compared_with_each_score_and_has_no_errors(made):
    found = made[1]["rows"]
    own = predictions.Predictions(kept(made, "own") / "predictions.parquet", "")
    assert (own.scores == own.scores[:, :1]).all() and own.scores.max() > 1 and not own.heatmap_mask.any()
    assert {key for key in found["own"] if not key.startswith(("score/plcc/", "score/srcc/"))} == set()
    assert "score/mae/overall" in found["RAHF"]


def batch(count=2, size=6):
    images = [np.full((size, size, 3), 10 * i, np.uint8) for i in range(count)]
    return [{"uid": f"u{i}", "prompt": "a cat", "image": image} for i, image in enumerate(images)]


def test_clip_score_stands_for_alignment_alone(monkeypatch):
    def score(images, prompts):
        return [0.25] * len(images)

    monkeypatch.setattr(specs, "reward_of", lambda spec: score)
    monkeypatch.setattr(preference, "clip_score", lambda folder, cut: score)
    for spec, mask in (("clip:DIR", [False, True, False, False]), ("pickscore:DIR", [True] * 4)):
        model = rows.load(spec)
        (found,) = model.predict(batch(), 2)
        columns = predictions.table(found).to_pydict()
        assert model.reward and [columns[name][0] == 0.25 for name in SCORES] == mask
        assert [columns[name][0] is None for name in SCORES] == [not there for there in mask]


def test_long_prompts_are_cut_for_clip_and_counted(unpacked, tmp_path):
    data = unpacked("preference_tiny")
    for name, source in (("open_clip", "open-clip"), ("image_reward", "image-reward")):
        convert.convert(source, tiny_preference.write(data, name), tmp_path / name)
    clip = rows.load(f"clip:{tmp_path / 'open_clip'}")
    examples = [one | {"prompt": prompt} for one, prompt in zip(batch(4), tiny_preference.PROMPTS, strict=True)]
    (found,) = clip.predict(examples, 4)
    assert np.isfinite([row["scores"] for row in found]).all()
    others = [f"hpsv2:{tmp_path / 'open_clip'}", f"clip-gradient:{tmp_path / 'open_clip'}:gradcam"]
    for model in (clip, *map(rows.load, (*others, f"imagereward:{tmp_path / 'image_reward'}"))):
        assert [model.cuts(prompt) for prompt in tiny_preference.PROMPTS] == [False, False, False, True]


def test_a_gradient_map_is_the_misalignment_heatmap_alone(monkeypatch):
    calls = []

    class GradientMaps:
        identity = "maps"

        def __init__(self, *arguments):
            calls.append(arguments)

        def __call__(self, images, prompts):
            return np.full((len(images), 3, 5), 0.5, np.float32)

    monkeypatch.setitem(sys.modules, "rahf.reward.gradient_map", types.SimpleNamespace(GradientMaps=GradientMaps))
    monkeypatch.setattr("rahf.reward.gradient_map", sys.modules["rahf.reward.gradient_map"], raising=False)
    model = rows.load("clip-gradient:DIR:smoothgrad")
    rows.load("clip-gradient:DIR")
    assert [folder for folder, *_ in calls] == ["DIR", "DIR"] and calls[0][1] == "smoothgrad"
    ((first, _),) = model.predict(batch(), 2)
    columns = predictions.table([first]).to_pydict()
    assert columns["implausibility"] == columns["overall"] == columns["labels"] == [None]
    assert np.frombuffer(columns["misalignment"][0], "<f2").tolist() == [0.5] * 15
    assert (columns["height"], columns["width"]) == ([3], [5])


def test_a_critic_may_predict_some_of_the_targets(workdir, monkeypatch):
    critic = rows.load(str(workdir))
    row = {"scores": np.full(4, 0.5, np.float32), "heatmaps": None, "labelled_prompt": None}
    monkeypatch.setattr(
        critic._model, "predict_batches", lambda pairs, size: ((key, [row] * len(own)) for key, own in pairs)
    )
    (found,) = critic.predict(batch(), 2)
    columns = predictions.table(found).to_pydict()
    assert columns["uid"] == ["u0", "u1"] and columns["overall"] == [0.5, 0.5]
    assert all(columns[name] == [None, None] for name in (*HEATMAPS, "height", "labelled_prompt", "labels"))


def test_an_image_that_a_critic_refuses_is_named(workdir):
    with pytest.raises(UserError, match=rf"rows: {workdir}: u0: prompt: .* shorten it"):
        list(rows.load(str(workdir)).predict([batch(1)[0] | {"prompt": "cat " * 99}], 2))


def test_specs_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "a+b"):
        (tmp_path / name).mkdir()
    for spec, kind in (
        ("run", ("rahf", "run")),
        ("rahf:run", ("rahf", "run")),
        ("rahf:gs://bucket/run", ("rahf", "gs://bucket/run")),
        ("gs://bucket/run", ("rahf", "gs://bucket/run")),
        ("rahf:run:overall", ("reward", "rahf:run:overall")),
        ("a+b", ("rahf", "a+b")),
        ("run+other", ("ensemble", "run+other")),
        ("clip:a+b", ("clip", "a+b")),
        ("python:a.b:c", ("python", "a.b:c")),
    ):
        assert rows.kind_of(spec) == kind, spec
    assert rows.parse("Our RAHF = linear:rahf:run:a=2,b=1") == rows.Row("Our RAHF", "rahf:run:a=2,b=1", "linear")
    assert rows.parse("a=run").folder == "a" and rows.parse("A=run").file is None
    folders = {rows.parse(f"{name}=run").folder for name in ("..", "../x", "a/b", "a b", "a_b", ".hidden", "é" * 99)}
    assert rows.folder_of("out", {"split": "../x", "num_examples": 20}).parent == pathlib.Path("out/rows")
    assert len(folders) == 7 and all(set(name) <= set("abhidenxrowé_-0123456789cf") for name in folders)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"rows: got none, expected --rows NAME=SPEC"),
        (["run"], r"rows: got 'run', expected NAME=SPEC"),
        (["=run"], r"rows: got '=run'"),
        (["a=x", "a=y"], r"rows: got two rows 'a', expected names that differ"),
        (["a=linear:isotonic:x"], r"rows: a: got linear:isotonic:x, expected linear: before a model"),
        (["a=linear:predictions:x"], r"expected linear: before a model, which can predict dev"),
    ],
)
def test_a_row_of_another_form_is_refused(texts, message):
    with pytest.raises(UserError, match=message):
        rows.parse_all(texts)


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"reward: got 'clop:x', expected"):
        rows.load("clop:x")
    with pytest.raises(UserError, match=r"got 'clip:x' in an ensemble, expected folders"):
        rows.load(f"{tmp_path}+clip:x")
    with pytest.raises(UserError, match=r"config\.json"):
        rows.load(str(tmp_path))


def test_arguments_after_rows_are_rows():
    given = ["tables", "--data_dir=d", "--rows", "A=x", "B=y:z", "--split=test", "--rows=C=w", "D=v", "--output", "out"]
    assert tables.read_rows(given) == [
        *("tables", "--data_dir=d", "--rows=A=x", "--rows=B=y:z"),
        *("--split=test", "--rows=C=w", "--rows=D=v", "--output", "out"),
    ]


# ------------------------------------------------------------------------------------------------------ what is kept


def again(made, wanted=None, **options):
    wanted = wanted or [f"{title.partition(',')[0]}={spec}" for title, spec in made[1]["specs"].items()]
    return tables.make(wanted, tables.Options(str(made[0]), split=SPLIT, resamples=100, **options))


def test_tables_are_made_again_from_what_is_kept(workdir, made, monkeypatch):
    files = ("tables.md", "tables.tex", "tables.json")
    before = [(made[0] / name).read_bytes() for name in files]
    html = (made[0] / "report.html").read_bytes()
    monkeypatch.setattr(rows, "load", None)
    monkeypatch.setattr(metrics, "per_example", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert again(made).encode() == before[0]
    assert [(made[0] / name).read_bytes() for name in files] == before
    texts = Page(made[0] / "report.html").texts("p", "note")
    assert texts.count("Without --data_dir there are no pictures.") == 4
    (made[0] / "report.html").write_bytes(html)
    for options, message in (
        ({"split": "test"}, r"split: got test, but .* holds train; pass --data_dir"),
        ({"heatmap_size": 8}, r"heatmap_size: got 8, but .* holds maps of 16 pixels"),
        ({"num_examples": 8}, r"num_examples: got 8, but .* holds 23 examples"),
    ):
        with pytest.raises(UserError, match=message):
            tables.make([f"RAHF={workdir}"], tables.Options(**{"output": str(made[0]), "split": SPLIT} | options))
    with pytest.raises(UserError, match=r"rows: new: no predictions in .*, expected some; pass --data_dir to predict"):
        again(made, ["new=x"])
    wanted = rf"rows: RAHF: got x, but .*predictions.parquet is of {re.escape(str(workdir))}; expected the same"
    with pytest.raises(UserError, match=wanted):
        again(made, ["RAHF=x"])
    with pytest.raises(UserError, match=r"data_dir: got none, and there is no .*targets.parquet"):
        tables.make(["A=x"], tables.Options(str(made[0] / "other")))


def test_a_model_is_loaded_again_only_if_its_files_changed(workdir, made, monkeypatch):
    loaded, load = [], rows.load
    monkeypatch.setattr(rows, "load", lambda spec, kept=None: loaded.append(spec) or load(spec, kept))
    monkeypatch.setattr(predictor.Model, "predict_batches", None)
    row, data = rows.parse(f"RAHF={workdir}"), dataset.Dataset(tiny_data.built(), SPLIT)
    (workdir / "tables").mkdir(exist_ok=True)
    (workdir / "tables" / "config.json").write_text("{}")  # of no model
    rows.keep([row], data, data.of, kept(made, "RAHF").parent, 8)
    assert loaded == []
    os.utime(workdir / "config.json", (0, 0))
    for _ in range(3):  # another time, the same model: it is loaded once, and nothing is predicted
        found, identities, _ = rows.keep([row], data, data.of, kept(made, "RAHF").parent, 8)
    assert loaded == [str(workdir)] and identities == {"RAHF": made[1]["identities"]["RAHF"]}
    assert sorted(found["RAHF"].uids) == sorted(data.prompts())


def test_the_files_of_a_spec_are_those_of_its_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rahf", "run", "clip", "overall"):
        (tmp_path / name).mkdir()
    for spec, folders in (
        ("rahf:run", ["run"]),
        ("rahf:run:alignment", ["run"]),
        ("reward:run:clip", ["run", "clip"]),
        ("clip-gradient:clip:gradcam", ["clip"]),
        ("python:rahf:run", []),
    ):
        assert rows._folders(spec) == folders, spec
    before = rows._state(rows.parse("A=run+clip"))
    (tmp_path / "run" / "events.out").write_text("x")
    assert rows._state(rows.parse("A=run+clip")) == before
    (tmp_path / "clip" / "best").mkdir()
    (tmp_path / "clip" / "best" / "x").write_text("x")
    assert rows._state(rows.parse("A=run+clip")) != before


def test_a_killed_run_leaves_no_record_of_another_spec(made, monkeypatch):
    row, data = rows.parse("killed=python:x:y"), dataset.Dataset(tiny_data.built(), SPLIT)
    folder = kept(made, "killed")
    folder.mkdir()
    (folder / "checked.json").write_text('{"spec": "another", "state": null}')
    model = types.SimpleNamespace(identity="m", reward=False, cuts=lambda prompt: False)
    model.predict = lambda examples, size: ([{"uid": one["uid"]}] for one in examples)
    monkeypatch.setattr(rows, "load", lambda *_: model)
    monkeypatch.setattr(rows.Predictions, "__init__", None)  # a kill after the predictions are written
    with pytest.raises(TypeError):
        rows.keep([row], data, data.of, folder.parent, 8)
    assert {path.name for path in folder.iterdir()} == {"predictions.parquet"}
    with pytest.raises(UserError, match=r"rows: killed: got python:x:y, but .* is of an unknown spec; expected the same"):
        rows.keep([row], None, data.of, folder.parent, 8)
    with pytest.raises(UserError, match=r"rows: killed: got predictions of another dataset in .*; expected that of targets"):
        rows.keep([row], None, data.of | {"dataset": "other"}, folder.parent, 8)


def test_rows_tell_how_many_prompts_they_cut(tmp_path):
    for name, cut in (("A", 3), ("B", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checked.json").write_text(json.dumps({"spec": "x", "state": None, "cut": cut}))
    wanted = rows.parse_all(["A=x", "B=x", "C=predictions:x"])
    (note,) = rows.notes(wanted, tmp_path)
    assert note == "Prompts that are too long for a row, which reads only their beginning: A 3."


def test_predictions_of_a_killed_run_are_continued(tmp_path):
    identity, file = predictions.Identity("m", "d", "test", 5, False), tmp_path / "x" / "predictions.parquet"
    taken = []

    def predict(skip, end=9):
        for start in range(skip, 5, 2):
            if start >= end:
                raise KeyboardInterrupt
            taken.append(start)
            yield [{"uid": f"u{i}", "scores": np.full(4, i / 5)} for i in range(start, min(start + 2, 5))]

    with pytest.raises(KeyboardInterrupt):
        predictions.write(file, identity, lambda skip: predict(skip, 4))
    assert predictions.identity_of(file) is None
    predictions.write(file, identity, predict)
    assert taken == [0, 2, 4] and predictions.identity_of(file) == identity
    assert [path.name for path in file.parent.iterdir()] == ["predictions.parquet"]
    found = predictions.Predictions(file, "x")
    assert found.uids == [f"u{i}" for i in range(5)] and found.scores[3, 0] == pytest.approx(0.6)
    other = predictions.Identity("n", "d", "test", 5, False)
    with pytest.raises(KeyboardInterrupt):
        predictions.write(file, identity, lambda skip: predict(skip, 4))
    taken.clear()
    predictions.write(file, other, predict)  # of another model: from the start
    assert taken == [0, 2, 4] and not identity.same(predictions.identity_of(file))
    assert not predictions.Identity(None, "d", "test", 5, False).same(other)


# ------------------------------------------------------------------------------------------------------------ formats

UIDS = [f"u{i}" for i in range(5)]


def columns(size=4, **changes):
    """Good predictions of `UIDS`, as the columns of a file."""
    rng = np.random.default_rng(0)
    maps = {name: [rng.random((size, size)).astype("<f2").tobytes() for _ in UIDS] for name in HEATMAPS}
    found = {"uid": UIDS, **{name: rng.random(5).astype(np.float32) for name in SCORES}, **maps}
    found |= {"height": [size] * 5, "width": [size] * 5, "labelled_prompt": ["a_0 cat"] * 5} | changes
    return {name: values for name, values in found.items() if values is not None}


def write(tmp_path, **changes):
    pyarrow.parquet.write_table(pyarrow.table(columns(**changes)), tmp_path / "p.parquet", row_group_size=2)
    return predictions.Predictions(tmp_path / "p.parquet", "mine")


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Targets of `UIDS`: `targets.Targets`."""
    file = tmp_path_factory.mktemp("truth") / "targets.parquet"
    rng = np.random.default_rng(1)
    examples = [
        {
            "uid": uid,
            "prompt": "a cat",
            "scores": rng.random(4).astype(np.float32),
            "score_mask": np.arange(4) != 3 if i == 0 else np.ones(4, bool),
            "heatmaps": (rng.integers(0, 2, (4, 4, 2)) * 255).astype(np.uint8),
            "heatmap_mask": np.array([True, i != 1]),
            "labels": [i % 2, 1] if i else None,
        }
        for i, uid in enumerate(UIDS)
    ]
    targets.write(file, targets.Header("d", "test", 5, 4), examples)
    found = targets.Targets(file)
    for example, read in zip(examples, found.rows(range(5)), strict=True):
        masked = example["heatmaps"] * example["heatmap_mask"].astype(np.uint8)
        np.testing.assert_array_equal(read["heatmaps"], masked)
        np.testing.assert_array_equal(read["scores"], np.where(example["score_mask"], example["scores"], 0))
        assert all(np.array_equal(read[key], example[key]) for key in ("score_mask", "heatmap_mask", "labels"))
    return found


def test_the_order_of_predictions_does_not_matter(tmp_path, truth):
    order = [3, 0, 4, 2, 1]
    first = measure.measure(write(tmp_path), truth, tmp_path / "a.npz")
    shuffled = {name: [values[i] for i in order] for name, values in columns().items()}
    second = measure.measure(write(tmp_path, **shuffled), truth, tmp_path / "b.npz")
    for name, values in measure._arrays(first).items():
        np.testing.assert_array_equal(measure._arrays(second)[name], values)
    assert np.isnan(first.predicted_scores[0, 3]) and np.isnan(first.keywords[0]).all()
    kept = measure.measure(write(tmp_path), truth, tmp_path / "b.npz")  # of other bytes: measured again
    np.testing.assert_array_equal(kept.heatmaps["cc"], first.heatmaps["cc"])


def test_maps_of_other_sizes_are_resized(tmp_path, truth):
    found = write(tmp_path, size=8)
    maps = [one for _, several in found.batches(4) for one in several]
    np.testing.assert_array_equal(found.maps(3), found.row(3)["heatmaps"])
    np.testing.assert_allclose(maps[1][0, 0], found.maps(1)[:2, :2].mean(axis=(0, 1)), atol=1e-6)
    assert np.isfinite(measure.measure(found, truth, tmp_path / "a.npz").heatmaps["mse"][:, 0]).all()
    assert predictions.resized(np.zeros((3, 5, 2), np.float32), 6).shape == (6, 6, 2)


def test_what_a_file_lacks_was_not_predicted(tmp_path, truth):
    nothing = dict.fromkeys(("height", "width", *HEATMAPS, "labelled_prompt"))
    found = write(tmp_path, **nothing, overall=pyarrow.nulls(5), labels=[[0, -1]] * 5)
    assert found.score_mask.tolist() == [True, True, True, False] and found.size == 0
    values = measure.measure(found, truth, tmp_path / "a.npz")
    assert np.isnan(values.predicted_scores[:, 3]).all() and np.isnan(values.heatmaps["mse"]).all()
    assert values.keywords[1:, 1].tolist() == [1.0] * 4
    estimates = bootstrap.estimates({"mine": values}, (), 100)["mine"]
    assert "score/plcc/mean" not in estimates and "heatmap/mse/misalignment" not in estimates
    titles = [one.title for one in layout.tables({"mine": estimates}, {}, {})]
    assert titles == ["Scores", "Scores: errors, of values in [0, 1]", "Misaligned words, %"]
    assert layout.tables({"mine": estimates}, {}, {})[0].lines[0].cells[-1].text == "-"


half = np.full((4, 4), 0.5, "<f2")


def some(column, place, value):
    """The column with another value in one place."""
    values = list(columns()[column])
    return {column: [*values[:place], value, *values[place + 1 :]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uid": None}, r"no column uid, expected the examples' ids; it has plausibility \(float\)"),
        ({"uid": [1, 2, 3, 4, 5]}, r"column uid is int64, expected strings"),
        ({"uid": pyarrow.nulls(5, pyarrow.string())}, r"uid is null in every row, expected the examples' ids"),
        ({"labels": [[[1]]] * 5}, r"column labels is list<.*list<.*>, expected lists of integers"),
        ({"overall": ["x"] * 5}, r"column overall is string, expected numbers"),
        ({"implausibility": ["x"] * 5}, r"column implausibility is string, expected binary"),
        ({"height": None}, r"got maps without the columns height, expected both"),
        (some("height", 2, 0), r"height or width is not from 1 to 8192 in 1 of 5 rows, the first 'u2'"),
        (some("uid", 4, "u1"), r"uid is there more than once in 1 of 5 rows, the first 'u1'; expected each picture once"),
        (some("uid", 4, None), r"uid is null in 1 of 5 rows, the first 'row 4'"),
        (some("alignment", 3, None), r"alignment is null in 1 of 5 rows, the first 'u3'; expected a value in every row"),
        (some("alignment", 3, np.nan), r"alignment is NaN or infinite in 1 of 5 rows, the first 'u3'; expected finite"),
        (some("misalignment", 1, None), r"misalignment is null in 1 of 5 rows, the first 'u1'"),
        (some("labelled_prompt", 1, None), r"labelled_prompt is null in 1 of 5 rows, the first 'u1'"),
        ({"labels": [[0, 2]] + [[1, 1]] * 4}, r"labels holds other values than 0, 1 and -1 in 1 of 5 rows, the first 'u0'"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"rows: mine: {tmp_path}/p.parquet: {message}"):
        write(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (some("uid", 2, "v"), r"1 of the split's 5 examples are missing, the first 'u2'; expected every example"),
        ({"uid": UIDS[:4] + ["v"]}, r"1 of the split's 5 examples are missing, the first 'u4'"),
        (some("misalignment", 4, b"abc"), r"misalignment does not have 2 \* height \* width bytes in 1 of 5 rows, the fi"),
        (some("misalignment", 4, (3 * half).tobytes()), r"misalignment has NaN or a value out of \[0, 1\] in 1 of 5 rows"),
        (
            some("implausibility", 0, (np.nan * half).tobytes()),
            r"NaN or a value out of \[0, 1\] in 1 of 5 rows, the first 'u0'",
        ),
        ({"labels": [[1]] * 5}, r"predicted labels: got 1 for the 2 tokens of prompt 'a cat'"),
        ({"labels": [[1]] + [[1, 1]] * 4}, r"predicted labels: got 1 for the 2 tokens of prompt 'a cat'"),  # u0 has none
    ],
)
def test_predictions_that_do_not_fit_the_split_are_refused(tmp_path, truth, changes, message):
    with pytest.raises(UserError, match=rf"rows: mine: {tmp_path}/p.parquet: .*{message}"):
        measure.measure(write(tmp_path, **changes), truth, tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


def test_an_example_too_many_is_refused(tmp_path, truth):
    more = {name: [*values, values[0]] for name, values in columns().items()} | {"uid": [*UIDS, "v"]}
    with pytest.raises(UserError, match=r"uid is not in the split in 1 of 6 rows, the first 'v'; expected its 5 examples"):
        measure.measure(write(tmp_path, **more), truth, tmp_path / "a.npz")


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"rows: mine: no file .*p.parquet; expected a parquet file of predictions"):
        predictions.Predictions(tmp_path / "p.parquet", "mine")
    (tmp_path / "p.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"is not a readable parquet file"):
        predictions.Predictions(tmp_path / "p.parquet", "mine")
    with pytest.raises(UserError, match=r"has no rows, expected one for each example"):
        write(tmp_path, **{name: values[:0] for name, values in columns().items()})
    write(tmp_path)
    with pytest.raises(UserError, match=r"targets: .*p.parquet is of another version"):
        targets.Targets(tmp_path / "p.parquet")


def test_a_damaged_page_is_named(tmp_path):
    write(tmp_path)
    tiny_data.flip(tmp_path / "p.parquet", "misalignment")
    with pytest.raises(UserError, match=r"rows: .*p.parquet is not a readable parquet file"):
        list(predictions.Predictions(tmp_path / "p.parquet", "mine").batches(4))


# ------------------------------------------------------------------------------------------------- tables and the page


def test_richhf_18k_is_known_by_its_scores():
    counts = published.TEST_PLAUSIBILITY
    scores = np.tile((np.repeat(list(counts), list(counts.values())) / 12)[:, None], (1, 4)).astype(np.float32)
    scores = np.random.default_rng(0).permutation(scores).astype(np.float64)
    assert published.is_test_of_richhf_18k("test", scores)
    assert not published.is_test_of_richhf_18k("dev", scores)
    assert not published.is_test_of_richhf_18k("test", scores[1:])
    other = scores.copy()
    other[0, 0] = 0
    assert not published.is_test_of_richhf_18k("test", other)


def test_published_rows_stand_beside_ours_without_marks():
    rng = np.random.default_rng(0)
    ours = bootstrap.estimates({"ours": test_bootstrap.row(rng, rng.random((30, 4)))}, (), 100)
    found = layout.tables(ours, {}, published.rows())
    lines = {line.name: line for line in found[0].lines}
    assert [cell.text for cell in lines["RAHF multi-head (paper)"].cells[:2]] == ["0.666", "0.654"]
    assert lines["CLIP, off the shelf (paper)"].cells[4].text == "0.185" and lines["ours"].section == 0
    assert [cell.text for cell in lines["CLIP, off the shelf (paper)"].cells].count("-") == 8
    assert "CLIP gradient (paper)" not in lines  # it has no scores
    words = {line.name: [cell.text for cell in line.cells] for line in found[4].lines}
    assert words["RAHF augmented prompt (paper)"][:3] == ["61.3", "34.1", "43.9"]
    assert words["RAHF multi-head, ViT-L/16-384 (PyTorch release)"][3:] == ["56.5", "45.2", "47.5"]
    misalignment = {line.name: [cell.text for cell in line.cells] for line in found[3].lines}
    assert misalignment["CLIP gradient (paper)"] == ["0.00817", "0.00551", "0.015", "3.844", "0.041", "0.143", "0.643"]
    assert not any(cell.best or cell.interval for line in found[0].lines if line.section for cell in line.cells)


def test_markdown_and_latex_show_marks_and_escape():
    def one(value, **marks):
        return bootstrap.Estimate(value, value - 0.1, value + 0.1, **marks)

    key, undefined = "score/plcc/plausibility", bootstrap.Estimate(np.nan, np.nan, np.nan)
    ours = {"[A]*|_&": {key: one(0.5, best=True, tied=True)}, "B": {key: one(0.45, tied=True)}, "C": {key: undefined}}
    found = layout.tables(ours, {"D": {key: None}}, {"E": {key: 0.7}})
    text = layout.markdown("a <b>", ["n"], found)
    assert r"a \<b>" in text and r"| \[A]\*\|_&" in text and "**0.500** [0.400, 0.600]" in text
    assert "0.450† [0.350, 0.550]" in text and text.count("undefined") == 2 and "| 0.700 " in text
    latex = layout.latex("title", ["5 %"], found)
    assert "\n{[}A]{*}$|$\\_\\& &" in latex and r"\shortstack{\textbf{0.500}\\{\tiny [0.400, 0.600]}}" in latex
    assert r"\shortstack{0.450$^\dagger$\\" in latex and r"5 \%" in latex and latex.count(r"\midrule") == 3
    assert latex.count("{") == latex.count("}")
    shown = layout.as_json(ours)
    assert shown["C"][key]["undefined"] and shown["B"][key]["tied"] and not shown["B"][key]["best"]


def test_the_page_shows_plots_and_pictures_and_escapes(made):
    found = Page(made[0] / "report.html")
    assert found.texts("h1") == ["train: 23 examples"]
    assert found.texts("h2")[-4:] == ["A & <B>, isotonic on dev", "RAHF", "own", "two"]
    images = [attributes for tag, attributes, _ in found.elements if tag == "img"]
    assert len(images) > 60 and all(one["src"].startswith("data:image/") for one in images)
    titles = {one["alt"].partition(",")[0] for one in images if one["alt"].startswith("RAHF: ")}
    expected = {*SCORES, "Calibration", "Error of the scores by length", *(f"{name} heatmap" for name in HEATMAPS)}
    assert titles == {f"RAHF: {title}" for title in expected}
    assert {"Best scores, by mean absolute error", "Worst implausibility heatmap, by CC"} <= set(found.texts("h3"))
    assert any("undefined" in text for text in found.texts("td"))


def test_categories_are_joined_by_uid_or_image(tmp_path):
    file, lines = tmp_path / "c.jsonl", [{"uid": "u0", "category": "human"}, {"image": "x/u1.png", "category": "object"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert page.read_categories(file, ["u1", "u0"]) == ["object", "human"]
    with pytest.raises(UserError, match=r"categories: .*: 1 of 2 examples have none, the first 'u9'; expected one each"):
        page.read_categories(file, ["u0", "u9"])
    file.write_text('{"category": "x"}')
    with pytest.raises(UserError, match=r"categories: .*: got .*, expected {\"uid\": text, \"category\": text}"):
        page.read_categories(file, ["u0"])
    with pytest.raises(UserError, match="categories: no file"):
        page.read_categories(tmp_path / "none", ["u0"])


def test_errors_are_shown_by_category(workdir, made, tmp_path):
    truth = targets.Targets(made[0] / "targets.parquet")
    lines = [{"uid": uid, "category": (r"$\x$", "b")[i % 2]} for i, uid in enumerate(truth.uids)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    html = (made[0] / "report.html").read_bytes()
    again(made, [f"RAHF={workdir}"], categories=str(tmp_path / "c.jsonl"))
    alts = [attributes["alt"] for tag, attributes, _ in Page(made[0] / "report.html").elements if tag == "img"]
    assert "RAHF: Error of the scores by category, mean and 95 % interval" in alts
    (made[0] / "report.html").write_bytes(html)


def test_identities_are_of_the_row_and_not_of_its_name(made):
    found = made[1]["identities"]
    assert len(set(found.values())) == len(found) == 4 and all(len(one) == len(fingerprint()) for one in found.values())
