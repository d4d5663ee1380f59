"""Other people's feedback, your own and captions, from files as they come to a training step and an evaluation."""

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tiny_data import annotation, built, prompt_of, write_annotations, write_captions, write_rapidata

from rahf import evaluate, experiments, predictor, sources, train
from richhf_data import build, builder, consolidate, metrics, schema, tasks, vocabulary

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory) -> dict[str, str]:
    """A built dataset of each kind, with the vocabulary of the first."""
    tfds.disable_progress_bar()
    folder = tmp_path_factory.mktemp("feedback")
    found, options = {"richhf": built()}, {"vocabulary_path": f"{built()}/vocabulary.model"}

    write_rapidata(folder / "rapidata" / "0.parquet", [prompt_of(f"rapidata-{i}") + " cat" for i in range(32)])
    found["rapidata"] = str(folder / "rapidata" / "data")
    build.build(f"rapidata:{folder}/rapidata/*.parquet", "", found["rapidata"], holdout=0.25, **options)

    uids = [f"own-{i}" for i in range(32)]
    lines = [annotation(uid, name, points=None) for name in ("ada", "ben") for uid in uids]  # nobody marked points
    lines[0]["scores"] = lines[32]["scores"] = {"overall": 4}
    consolidate.write(*write_annotations(folder / "own", lines), folder / "own" / "out", holdout=0.25)
    found["own"] = str(folder / "own" / "data")
    own = folder / "own" / "out", f"folder:{folder}/own/out/images", found["own"]
    with pytest.raises(ValueError, match=r"got no such key, .*--allow_absent takes records of other annotations"):
        build.build(*own, **options)
    build.build(*own, allow_absent=True, **options)

    write_captions(folder / "captions" / "0.parquet", [f"the {prompt_of(f'caption-{i}')}" for i in range(32)])
    found["captions"] = str(folder / "captions" / "data")
    build.build(f"captions:{folder}/captions/*.parquet", "", found["captions"], holdout=0.25, **options)
    return found


def _config(**data):
    config = experiments.load("rahf_ci")
    config.data.update(source="seqio", text_length=60, keyword_length=60, **data)
    config.train.update(num_steps=1, batch_size=16)
    config.eval.update(every=1, num_examples=6)
    return config


@pytest.fixture(scope="module")
def run(data_dirs, tmp_path_factory, standard_promotion):
    """A workdir after one step on a mixture of all four."""
    rates = {"richhf": 0.25, "rapidata": 0.25, "own": 0.25, "captions": 0.25}
    config = _config(mixture=tuple((data_dirs[kind], rate) for kind, rate in rates.items()))
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train.train(config, workdir)


# Whether a kind of feedback has: each score, each heatmap, words.
TARGETS = {
    "richhf": ([True] * 4, [True] * 2, True),
    "rapidata": ([True, True, True, False], [True] * 2, True),
    "own": ([True] * 4, [False] * 2, True),
    "captions": ([False] * 4, [False] * 2, False),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_each_kind_of_feedback_is_evaluated_on_what_it_has(kind, run, data_dirs):
    workdir, first = run
    model = predictor.load(workdir)
    predict = predictor.Predictor(_config(data_dir=data_dirs[kind]), model.vocabulary)
    evaluation = evaluate.Evaluation(predict, "dev", 6)
    results = evaluation.run(model.params)
    rows = {"this model": results} | evaluation.references()
    assert results["num_examples"] == 6
    scores, maps, words = TARGETS[kind]
    for name, present in zip(schema.SCORES, scores, strict=True):
        assert np.isfinite(results[f"score/plcc/{name}"]) == present
    for name, present in zip(schema.HEATMAPS, maps, strict=True):
        assert np.isfinite(results[f"heatmap/mse/{name}"]) == present
        assert np.isfinite(rows["constant predictor"][f"heatmap/mse/{name}"]) == present
    assert np.isfinite(results["keywords/micro/f1"]) == words
    assert ("caption/word_f1" in results) == (kind == "captions")
    assert np.isfinite(evaluate.selection(results))
    assert "nan" not in metrics.table(rows) + evaluate.summary(results)
    if kind == "richhf":  # what training evaluated on: the mixture's first
        assert first == pytest.approx(results, nan_ok=True)


def test_captions_are_not_evaluated_by_a_decoder_that_copies(run, data_dirs):
    config = _config(data_dir=data_dirs["captions"], decoding="copy")
    predict = predictor.Predictor(config, predictor.load(run[0]).vocabulary)
    with pytest.raises(ValueError, match=r"^data.decoding: got 'copy', expected 'free' for .*captions.*; set --config"):
        evaluate.Evaluation(predict, "dev", 6)


def test_training_reads_each_dataset_of_the_mixture(data_dirs, tmp_path):
    config = _config(mixture=tuple((folder, 1) for folder in data_dirs.values()), augment=True)
    pieces = sources.install_vocabulary(config, tmp_path)
    batch = next(sources.training_batches(config, pieces, start=3))
    counts = _targets_of(batch)
    assert counts.count((4, 2)) == 4  # RichHF's
    assert counts.count((4, 0)) + counts.count((1, 0)) == 4  # our own annotations
    captions = [row for row in range(16) if not batch["score_mask"][row].any() and not batch["heatmap_mask"][row].any()]
    assert len(captions) == 4
    for row in captions:
        assert pieces.decode(batch["text_ids"][row, 0]) == "image caption"
        assert pieces.decode(batch["keyword_ids"][row]).startswith("the ")
        assert not batch["heatmaps"][row].any()


def _targets_of(batch) -> list[tuple[int, int]]:
    """How many scores and maps each row has."""
    return list(zip(batch["score_mask"].sum(1).tolist(), batch["heatmap_mask"].sum(1).tolist(), strict=True))


def test_the_own_vocabulary_of_captions_writes_them(data_dirs, tmp_path):
    captions = tasks.prompts(data_dirs["captions"])["train"]
    assert all(prompt == "image caption" and written.startswith("the ") for _, prompt, written in captions)
    pieces = vocabulary.train(build._vocabulary_texts([list(row) for row in captions]), tmp_path / "v.model", 90)
    for text in ("image caption", captions[0][2]):
        assert pieces.decode(pieces.encode(text, 99)) == text


def test_faulty_mixtures_are_named():
    with pytest.raises(ValueError, match=r"data.mixture: got 'data/a', expected pairs of a folder .* and a rate"):
        sources.evaluation_dir(_config(mixture=("data/a", "data/b")))
    with pytest.raises(ValueError, match=r"data.mixture: got .*, expected each folder once"):
        sources.evaluation_dir(_config(mixture=(("data/a", 1), ("data/a", 2))))
    with pytest.raises(ValueError, match=r"data.data_dir: got '', expected the folder that richhf_data.build wrote"):
        sources.evaluation_dir(_config())
    mixture = (("data/a", 0.5), ("data/b", 0.5))
    assert sources.evaluation_dir(_config(mixture=mixture)) == "data/a"
    assert sources.evaluation_dir(_config(mixture=mixture, data_dir="data/b")) == "data/b"
    read = json.loads(json.dumps(_config(mixture=mixture).to_dict()))["data"]["mixture"]
    assert sources.evaluation_dir(_config(mixture=read)) == "data/a"  # as a workdir's config.json has it


def test_selection_is_of_what_the_dataset_has():
    nothing = {f"score/{kind}/{name}": float("nan") for kind in ("plcc", "srcc") for name in schema.SCORES}
    nothing |= {f"heatmap/cc/{name}": float("nan") for name in schema.HEATMAPS} | {"keywords/micro/f1": float("nan")}
    assert evaluate.selection(nothing | {"score/plcc/overall": 0.4, "score/srcc/overall": 0.2}) == pytest.approx(0.3)
    assert evaluate.selection(nothing | {"heatmap/cc/misalignment": 0.5}) == 0.5
    assert evaluate.selection(nothing | {"keywords/micro/f1": 0.25, "caption/word_f1": 0.1}) == 0.25
    assert evaluate.selection(nothing | {"caption/word_f1": 0.1}) == 0.1
    with pytest.raises(ValueError, match="evaluation: got 1 examples without a target to compare with"):
        evaluate.selection(nothing | {"num_examples": 1.0})


def test_a_dataset_without_dev_is_refused_before_a_workdir_is_made(tmp_path):
    folder = builder.dataset_dir(tmp_path / "data")
    shutil.copytree(built(), tmp_path / "data")
    for name in ("report.json", "dataset_info.json"):
        found = json.loads((folder / name).read_text())
        splits = found["splits"]
        found["splits"] = (
            {"train": splits["train"]} if name == "report.json" else [one for one in splits if one["name"] == "train"]
        )
        (folder / name).write_text(json.dumps(found))
    config = _config(data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"data has the splits train, training needs dev too; .*larger --holdout"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    mixture = ((f"{tmp_path}/data", 0.5), (f"{tmp_path}/x/../data", 0.5))
    with pytest.raises(ValueError, match=r"data.mixture: .* expected each folder once"):
        sources.check_splits(_config(mixture=mixture))
