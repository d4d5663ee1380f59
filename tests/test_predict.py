"""From a workdir to feedback, files and a page."""

import json

import cv2
import jax
import numpy as np
import pytest
import tiny_model

import rahf
from rahf import checkpoints, convert, experiments, predict, predictor, train, workdirs
from rahf.reward import specs
from richhf_data import images as image_files
from richhf_data import schema

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module", params=tiny_model.VARIANTS)
def workdir(request, tmp_path_factory, standard_promotion):
    folder = tmp_path_factory.mktemp(request.param)
    config = experiments.load("rahf_ci")
    config.model.variant = request.param
    config.data.source = "stream"
    train.train(config, folder)
    return folder


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((32, 32), (50, 40), (20, 90))]


PROMPTS = ["a red cat", "two blue dogs in the forest", "a house"]


def test_predict_gives_every_kind_of_feedback(workdir, images):
    feedback = rahf.load(workdir).predict(images, PROMPTS)
    assert set(feedback.scores) == set(schema.SCORES)
    assert set(feedback.heatmaps) == set(schema.HEATMAPS)
    for values in feedback.scores.values():
        assert values.shape == (3,)
        assert ((values >= 0) & (values <= 1)).all()
    for maps in feedback.heatmaps.values():
        assert maps.shape == (3, 16, 16)
        assert ((maps >= 0) & (maps <= 1)).all()
    assert len(feedback.labelled_prompts) == len(feedback.keywords) == 3


def test_a_score_and_a_weighted_sum_of_scores_are_rewards(workdir, images):
    scores, identities = rahf.load(workdir).predict(images, PROMPTS).scores, set()
    for spec, expected in (
        ("", scores["overall"]),
        (":plausibility", scores["plausibility"]),
        (":alignment=0.7,aesthetics=-3", 0.7 * scores["alignment"] - 3 * scores["aesthetics"]),
    ):
        reward = specs.reward_of(f"rahf:{workdir}{spec}")
        np.testing.assert_allclose(specs.checked(reward, images, PROMPTS), expected, atol=1e-6)
        identities.add(specs.identity_of(reward))
    model = rahf.load(workdir)
    model.params["vit"]["pos_embedding"] += 1e-6
    identities.add(specs.ScoreReward(model, {"overall": 1.0}).identity)
    assert len(identities) == 4


def test_a_converted_workdir_is_read_anywhere(workdir, tmp_path):
    convert.convert("workdir", workdir, tmp_path)
    assert not (tmp_path / "best").exists()
    jax.tree.map(np.testing.assert_array_equal, rahf.load(workdir).params, rahf.load(tmp_path).params)
    assert specs.reward_of(f"rahf:{workdir}").identity == specs.reward_of(f"rahf:{tmp_path}").identity
    tiny_model.check_stablehlo(tmp_path)


def test_an_image_alone_is_predicted_as_in_company(workdir, images):
    model = rahf.load(workdir)
    together = model.predict(images, PROMPTS, batch_size=2)
    alone = model.predict(images[2:], PROMPTS[2:])
    np.testing.assert_allclose(alone.scores["overall"][0], together.scores["overall"][2], atol=1e-6)
    np.testing.assert_allclose(
        alone.heatmaps["implausibility"][0], together.heatmaps["implausibility"][2], atol=1e-6
    )
    assert alone.labelled_prompts[0] == together.labelled_prompts[2]


def test_refuses_what_it_cannot_read(workdir, images):
    model = rahf.load(workdir)
    with pytest.raises(ValueError, match=r"prompts: got 1 for 3 images"):
        model.predict(images, PROMPTS[:1])
    with pytest.raises(ValueError, match=r"image: got float64\[4, 4, 3\], expected uint8\[H, W, 3\], RGB"):
        model.predict([np.zeros((4, 4, 3))], ["a cat"])
    with pytest.raises(ValueError, match=r"the model reads data.text_length=24; shorten it"):
        model.predict(images[:1], ["zebra " * 30])


def test_a_prediction_that_is_not_finite_names_its_image(workdir, images):
    model = rahf.load(workdir)
    head = next(name for name in model.params if name.startswith("score_head"))
    model.params[head]["output"]["bias"] *= np.nan
    with pytest.raises(ValueError, match=r"prediction: got scores or heatmaps that are not finite for images\[0\]; the"):
        model.predict(images, PROMPTS)
    items = [{"image": image, "prompt": "a cat", "name": f"{i}.png"} for i, image in enumerate(images)]
    with pytest.raises(ValueError, match=r"prediction: got .* that are not finite for 0.png; the weights"):
        list(predict.predict_items(model, items, 3))


def test_weights_that_are_not_finite_are_refused_on_load(workdir, monkeypatch):
    restore = checkpoints.restore_params

    def damaged(*args):
        params = restore(*args)
        params["vit"]["pos_embedding"] *= np.inf
        return params

    monkeypatch.setattr(checkpoints, "restore_params", damaged)
    with pytest.raises(ValueError, match=r"workdir: .*: the parameter vit/pos_embedding holds \d+ numbers that are not"):
        rahf.load(workdir)


def test_write_makes_lines_heatmaps_and_a_page(workdir, images, tmp_path):
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        cv2.imwrite(str(paths[-1]), image[..., ::-1])
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps({"image": path.name, "prompt": p}) for path, p in zip(paths, PROMPTS, strict=True))
    )
    inputs = predict.read_inputs(str(tmp_path / "list.jsonl"), None)
    model = rahf.load(workdir)
    examples = ({"name": path, "image": image_files.read(path), "prompt": prompt} for path, prompt in inputs)
    predict.write(tmp_path / "out", predict.predict_items(model, examples, 2), len(inputs))

    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    expected = model.predict(images, PROMPTS)
    assert [line["prompt"] for line in lines] == PROMPTS
    np.testing.assert_allclose(
        [line["scores"]["overall"] for line in lines], expected.scores["overall"], atol=2e-6
    )
    heatmap = cv2.imread(str(tmp_path / "out" / lines[1]["heatmaps"]["misalignment"]), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(heatmap / 255, expected.heatmaps["misalignment"][1], atol=0.5 / 255 + 1e-6)
    assert "two blue dogs" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "*.nothing", r"images: nothing matches"),
        (lambda folder: "list.jsonl", r"images: no file"),
    ],
)
def test_read_inputs_refuses_nothing(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        predict.read_inputs(str(tmp_path / make(tmp_path)), "a cat")


def test_read_inputs_names_the_faulty_line(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text('{"image": "a.png", "prompt": "a cat"}\n{"image": "b.png"}\n')
    with pytest.raises(ValueError, match=r"list.jsonl line 2: got .*, expected \{\"image\": path, \"prompt\": text\}"):
        predict.read_inputs(str(path), None)


def test_a_globbed_image_takes_the_prompt_beside_it_or_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a.png has no prompt; pass --prompt, write a.txt beside it"):
        predict.read_inputs(str(tmp_path / "*.png"), None)
    (tmp_path / "a.txt").write_text("a cat\n")
    assert predict.read_inputs(str(tmp_path / "*.png"), None) == [(str(tmp_path / "a.png"), "a cat")]


def test_read_image_names_what_is_not_an_image(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"image: .*a.jpg is missing or is not a readable image"):
        image_files.read(tmp_path / "a.jpg")


def test_load_refuses_what_is_no_workdir(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; expected a folder written by `python -m rahf.train`"):
        rahf.load(tmp_path)


def test_load_refuses_a_run_without_a_checkpoint(workdir, tmp_path):
    for name in ("config.json", "vocabulary.model"):
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    with pytest.raises(ValueError, match=r"has no finished evaluation yet"):
        rahf.load(tmp_path)


def test_the_vocabulary_must_fit_the_embeddings(workdir):
    model = rahf.load(workdir)
    config = workdirs.read_config(workdir).copy_and_resolve_references()
    config.model.t5.vocab_size = 5
    small = predictor.Predictor(config, model.vocabulary).model_config
    with pytest.raises(ValueError, match=r"pieces, the model embeds model.t5.vocab_size=5"):
        predictor.check_vocabulary(small, model.vocabulary)
