"""From a workdir to feedback, files and a page."""

import dataclasses
import gc
import json
import os
import pathlib
import re
import threading
import types

import cv2
import jax
import numpy as np
import pytest
import tiny_model

import rahf
from rahf import checkpoints, convert, experiments, partitioning, predict, predictor, suggest, workdirs
from rahf.diffusion import inputs, select
from rahf.models import rahf as rahf_model
from rahf.reward import specs
from richhf_data import images as image_files
from richhf_data import schema
from richhf_data import vocabulary as vocabularies
from richhf_data.annotate import pictures as annotated_pictures
from richhf_data.annotate.choose import PictureTable
from richhf_data.errors import UserError

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module", params=tiny_model.VARIANTS)
def workdir(request, tmp_path_factory, standard_promotion):
    folder = tmp_path_factory.mktemp(request.param)
    config = experiments.load("rahf_ci")
    config.model.variant = request.param
    config.data.source = "stream"
    return tiny_model.workdir(folder, config)


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


def test_a_critic_prepares_pictures_for_annotators(workdir, images, tmp_path):
    lines = [{"image": f"{number}.png", "prompt": prompt, "kind": "x"} for number, prompt in enumerate(PROMPTS)]
    for line, image in zip(lines, images, strict=True):
        cv2.imwrite(str(tmp_path / line["image"]), image[..., ::-1])
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table, model = PictureTable(tmp_path / "in.jsonl"), rahf.load(workdir)
    feedback = model.predict(images, PROMPTS)
    changed = dataclasses.replace(feedback, scores={name: 1 - values for name, values in feedback.scores.items()})
    other = types.SimpleNamespace(predict=lambda images, prompts: changed)
    suggest.suggest(table, model, other, threshold=0.0)
    for number, row in enumerate(table.rows):
        for name, maps in feedback.heatmaps.items():
            (x, y), *_ = marks = row["suggestion"]["points"][name]
            assert maps[number][int(y * 16), int(x * 16)] == maps[number].max() and len(marks) <= suggest.MOST_POINTS
        difference = np.mean([abs(1 - 2 * values[number]) for values in feedback.scores.values()])
        assert row["priority"] == pytest.approx(difference / 2, rel=1e-5)
    table.write(table.rows, tmp_path / "out.jsonl")
    assert [one.more.keys() for one in annotated_pictures.find(str(tmp_path / "out.jsonl"))] == [
        {"suggestion", "priority"}
    ] * 3


def test_points_mark_a_heatmap_where_it_is_high():
    heatmap = np.zeros((20, 20))
    heatmap[4, 5], heatmap[4, 6], heatmap[15, 2], heatmap[9, 9] = 0.9, 0.8, 0.5, 0.2
    assert list(suggest.points(heatmap)) == [[0.275, 0.225], [0.125, 0.775]]
    assert list(suggest.points(heatmap, aspect=2)) == [[0.275, 0.225], [0.325, 0.225], [0.125, 0.775]]
    assert not list(suggest.points(heatmap, threshold=0.95))


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


def test_a_reward_guides_by_the_same_numbers(workdir, images):
    spec, floats = f"rahf:{workdir}:plausibility,implausibility=-2", images[0][None] / np.float32(127.5) - 1
    reward, of = specs.reward_of(spec), specs.differentiable_of(spec)
    expected = specs.checked(reward, [images[0]], PROMPTS[:1])
    found = jax.jit(of.score)(of.placed(None), floats, of.rows(PROMPTS[:1]))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert of.identity == reward.identity


def test_one_device_selects_as_eight_do(workdir, images):
    model, prompts = rahf.load(workdir), ["a cat", "a dog", "a cat"]
    alone = predictor.Predictor(model.config, model.vocabulary, partitioning.make_mesh(devices=jax.devices()[:1]))
    places = jax.tree.map(lambda leaf: leaf.sharding, alone.params)
    other = predictor.Model(alone, jax.device_put(jax.device_get(model.params), places))
    eight, one = (specs.ScoreReward(each, {"plausibility": 1.0})(images, prompts) for each in (model, other))
    np.testing.assert_allclose(one, eight, atol=1e-6)
    assert select.best(prompts, one, 0.0) == select.best(prompts, eight, 0.0)


def test_a_rahf_is_a_critic_of_regions(workdir, images):
    assert specs.critic_of(f"rahf:{workdir}", "plausibility,alignment").weights == {"plausibility": 1, "alignment": 1}
    assert specs.critic_of(f"rahf:{workdir}:aesthetics", "plausibility").weights == {"aesthetics": 1}
    critic, images = specs.critic_of(f"rahf:{workdir}").model, np.stack([images[0]] * 3)
    maps = rahf.load(workdir).predict(images, PROMPTS).heatmaps
    expected = np.stack([maps[name].reshape(3, 4, 4, 4, 4).mean((2, 4)) for name in schema.HEATMAPS], axis=-1)
    np.testing.assert_allclose(inputs.heatmaps_of(critic, images, PROMPTS, 4), expected, atol=1e-6)


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
    np.testing.assert_allclose(alone.heatmaps["implausibility"][0], together.heatmaps["implausibility"][2], atol=1e-6)
    assert alone.labelled_prompts[0] == together.labelled_prompts[2]


@pytest.fixture(scope="module")
def one_device():
    """A predictor of the tiny model on one device, its parameters, and seven rows."""
    config = experiments.load("rahf_ci")
    with config.unlocked():
        config.model = dataclasses.asdict(tiny_model.config())
    config.data.update(text_length=6, keyword_length=5)
    vocabulary = types.SimpleNamespace(decode=lambda ids: str(ids.tolist()))
    made = predictor.Predictor(config, vocabulary, partitioning.make_mesh(devices=jax.devices()[:1]))
    _, params = tiny_model.model_and_params(made.model_config)
    batch = tiny_model.batch(made.model_config, 7)
    return made, params["params"], [{name: batch[name][i] for name in ("image", "text_ids")} for i in range(7)]


def test_batches_run_in_buckets_and_rows_do_not_depend_on_them(one_device):
    """The sizes of the programs are powers of two, so that many numbers of rows share one."""
    made, params, rows = one_device
    assert [made.bucket(count, 12) for count in (1, 2, 3, 5, 7, 8, 9, 12)] == [1, 2, 4, 8, 8, 8, 12, 12]
    eight = predictor.Predictor(made.config, None)
    assert [eight.bucket(count, 20) for count in (1, 8, 9, 17, 20)] == [8, 8, 16, 24, 24]
    together = list(made.predict_rows(params, rows, 8))
    for count, batch_size in ((5, 8), (6, 8), (3, 2), (7, 2)):  # 8; 8; 2, 1; 2, 2, 2, 1
        for row, expected in zip(made.predict_rows(params, rows[:count], batch_size), together[:count], strict=True):
            for name in ("scores", "heatmaps", "keyword_ids"):
                np.testing.assert_allclose(row[name], expected[name], atol=1e-6)
    assert made._forward._jitted._cache_size() == 3
    assert not re.search("callback|infeed|outfeed", made.lower(2).as_text())  # the decoder's loop is the device's


class Delayed:
    """An array of the device that is computed once `event` is set."""

    def __init__(self, array, event):
        self.array, self.event = array, event

    def __array__(self, *args, **kwargs):
        assert self.event.wait(60)
        return self.array


def begun(made, monkeypatch, scores=0.5):
    """Numbers of batches, as they are handed to the device; each is computed when the next one is there."""
    events, numbers = [threading.Event() for _ in range(5)], []

    def forward(params, image, text_ids):
        number, rows = len(numbers), len(image)
        numbers.append(number)
        events[number].set()
        outputs = np.full((rows, 4), scores), np.zeros((rows, 8, 8, 2)), np.zeros((rows, 5), int)
        return tuple(Delayed(array, events[number + (rows == 2)]) for array in outputs)

    monkeypatch.setattr(made, "_forward", forward)
    return numbers


def test_a_batch_is_begun_before_the_results_of_the_one_before_are_there(one_device, monkeypatch):
    made, _, rows = one_device
    numbers, threads = begun(made, monkeypatch), set()

    def examples():
        for row in rows:
            threads.add(threading.current_thread())
            yield row

    assert len(list(made.predict_rows(None, examples(), 2))) == 7 and numbers == [0, 1, 2, 3]  # the last of one row
    assert len(threads) == 1 and not threads.pop().is_alive()


def test_errors_come_in_the_order_of_the_rows(one_device, monkeypatch):
    made, _, rows = one_device

    def torn():
        yield from rows[:4]
        raise UserError("the fifth image is torn")

    begun(made, monkeypatch)
    found = made.predict_rows(None, torn(), 4)
    assert len([next(found) for _ in range(4)]) == 4
    with pytest.raises(UserError, match="the fifth image is torn"):
        next(found)
    begun(made, monkeypatch, np.nan)
    with pytest.raises(UserError, match=r"not finite for row 0; the weights"):
        list(made.predict_rows(None, torn(), 4))


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


@pytest.mark.parametrize("variant", schema.VARIANTS)
def test_long_prompts_are_cut_where_training_cut_them(variant, images, tmp_path):
    config = experiments.load("rahf_ci")
    config.model.variant = variant
    vocabulary = vocabularies.train(["a red cat", "two blue dogs"], tmp_path / "vocabulary.model", 60)
    model_config = rahf_model.RAHFConfig.from_dict(config.model.to_dict())
    parts = types.SimpleNamespace(config=config, model_config=model_config, vocabulary=vocabulary)
    model = predictor.Model(parts, None)
    model.predict_rows = FakeModel().predict_rows
    with pytest.raises(UserError, match=r"the model reads data.text_length=24; shorten it"):
        model.prepare(images[0], "red " * 40)
    config.data.truncate_long_prompts = True
    ids = model.prepare(images[0], "red " * 40)["text_ids"]
    assert ids.shape == (len(schema.task_prompts("", variant)), 24) and (ids[:, -1] == schema.EOS_ID).all()
    np.testing.assert_array_equal(ids, model.prepare(images[0], "red " * 60)["text_ids"])
    model.prepare = lambda image, prompt: {"mean": 0.5}
    with pytest.warns(UserWarning, match=r"prompts of more than 24 ids lose their ends"):
        model.predict(images[:2], ["red " * 40, "a cat"])


def test_prompts_that_lose_their_ends_are_counted(tmp_path, capsys):
    model = FakeModel()
    model.prepare = lambda image, prompt: {"mean": 0.5}
    names = [f"{i}" for i in range(12)]
    examples = [{"name": name, "image": np.zeros((4, 4, 3), np.uint8), "prompt": "a long prompt"} for name in names]
    examples[3]["prompt"] = "short"
    assert predict.predict(model, examples, names, tmp_path) == 0
    said = "images: 11 ('0', '1', '2', '4', '5', ...): prompts longer than data.text_length=9, which lost their ends"
    assert said in capsys.readouterr().out


class FakeModel:
    """Predicts the mean of an image. Raises `Killed` before the row with number `dies`."""

    identity, truncates, vocabulary = "fake", False, types.SimpleNamespace(written=str)
    config = types.SimpleNamespace(data=types.SimpleNamespace(text_length=9))

    def __init__(self, dies=None):
        self.dies, self.rows = dies, 0

    def is_too_long(self, prompt):
        return len(prompt) > 9

    def prepare(self, image, prompt):
        if self.is_too_long(prompt):
            raise UserError("too long")
        return {"mean": image.mean() / 255}

    def predict_batches(self, batches, batch_size):
        for key, rows in batches:
            yield key, list(self.predict_rows(rows, batch_size))

    def predict_rows(self, rows, batch_size):
        for row in rows:
            if self.rows == self.dies:
                raise Killed
            self.rows += 1
            heatmaps = np.full((4, 4, 2), row["mean"], np.float32)
            yield {"scores": np.full(4, row["mean"], np.float32), "heatmaps": heatmaps, "labelled_prompt": "a cat_0"}


class Killed(BaseException):
    pass


def pictures(folder, count, bad=()):
    """A pattern of pictures, of which some do not decode."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((6, 5, 3), 20 * i, np.uint8))
        if i in bad:
            (folder / f"{i}.png").write_bytes(b"no picture")
    return str(folder / "*.png")


def run(spec, output, model=None, prompt="a cat", **options):
    inputs = predict.read_inputs(spec, prompt)
    return predict.predict(model or FakeModel(), *predict.image_examples(inputs, output), output, batch_size=2, **options)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_bad_picture_is_left_out_and_listed(tmp_path, capsys):
    spec = pictures(tmp_path / "photos", 5, bad=(1, 4))
    os.mkfifo(tmp_path / "photos" / "6.png")
    assert run(spec, tmp_path / "out") == 3
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert [pathlib.Path(row["image"]).name for row in failed] == ["1.png", "4.png", "6.png"]
    assert {row["prompt"] for row in failed} == {"a cat"}
    assert "no known image format" in failed[0]["reason"] and "(a named pipe)" in failed[2]["reason"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [pathlib.Path(row["image"]).name for row in lines] == ["0.png", "2.png", "3.png"]
    assert lines[1]["heatmaps"]["misalignment"] == "heatmaps/00002_misalignment.png"
    assert all(cv2.imread(str(tmp_path / "out" / file)) is not None for row in lines for file in row["heatmaps"].values())
    assert re.search(r"images: 3 \('.*1.png', '.*6.png'\): failed, see .*failed.jsonl", capsys.readouterr().out)
    for i in (1, 4):  # mended: the same command predicts all, and the list is gone
        cv2.imwrite(str(tmp_path / "photos" / f"{i}.png"), np.zeros((6, 5, 3), np.uint8))
    (tmp_path / "photos" / "6.png").unlink()
    assert run(spec, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "failed.jsonl").exists()


def test_a_picture_that_another_host_cannot_read_is_left_out_by_all(tmp_path, monkeypatch):
    def another(flags):
        return [flag or (len(flags) == 2 and i == 1) for i, flag in enumerate(flags)]  # the second of each pair

    spec = pictures(tmp_path / "photos", 6, bad=(0,))
    monkeypatch.setattr(predict, "_on_any_host", another)
    assert run(spec, tmp_path / "out") == 4
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert [pathlib.Path(row["image"]).name for row in failed] == ["0.png", "1.png", "3.png", "5.png"]
    assert failed[1]["reason"] == "image: another process cannot read it" and "no known" in failed[0]["reason"]


def test_strict_ends_at_the_first_bad_picture_and_goes_on_when_it_is_mended(tmp_path):
    spec = pictures(tmp_path / "photos", 5, bad=(3,))
    with pytest.raises(UserError, match=r"3.png is missing or is not a readable image"):
        run(spec, tmp_path / "out", strict=True)
    cv2.imwrite(str(tmp_path / "photos" / "3.png"), np.zeros((6, 5, 3), np.uint8))
    model = FakeModel()
    assert run(spec, tmp_path / "out", model, strict=True) == 0 and model.rows == 3


def test_pictures_that_all_fail_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none of the 2 images was predicted; the first: image: .*0.png is missing"):
        run(pictures(tmp_path / "photos", 2, bad=(0, 1)), tmp_path / "out")
    with pytest.raises(UserError, match=r"the first: too long"):
        run(pictures(tmp_path / "photos", 2), tmp_path / "out", prompt="a very long prompt")
    assert sorted(contents(tmp_path / "out")) == ["failed.jsonl", *(n for n in contents(tmp_path / "out") if "unfin" in n)]


@pytest.mark.parametrize("dies", [0, 1, 3, 6])
def test_a_killed_run_continues_to_the_same_bytes(tmp_path, dies, capsys):
    spec = pictures(tmp_path / "photos", 8, bad=(2,))
    run(spec, tmp_path / "whole")
    output = tmp_path / "out"
    run(pictures(tmp_path / "others", 11), output)  # an earlier run
    with pytest.raises(Killed):
        run(spec, output, FakeModel(dies))
    assert (output / "predictions.jsonl").exists() == (dies < 2)  # those of the earlier run, until a batch is written
    (output / "heatmaps" / f"00000_misalignment.png.{'a' * 16}.partial").write_bytes(b"left")
    model = FakeModel()
    assert run(spec, output, model) == 1
    assert model.rows == 7 - [0, 0, 0, 3, 0, 0, 5][dies]
    assert contents(output) == contents(tmp_path / "whole")


def test_another_run_begins_anew(tmp_path, capsys):
    spec, output = pictures(tmp_path / "photos", 6), tmp_path / "out"
    with pytest.raises(Killed):
        run(spec, output, FakeModel(4))
    for change in ("prompt", "weights", "picture", "damage"):
        model, prompt = FakeModel(), "a dog" if change == "prompt" else "a cat"
        if change == "weights":
            model.identity = "other"
        if change == "picture":
            cv2.imwrite(str(tmp_path / "photos" / "0.png"), np.full((6, 5, 3), 99, np.uint8))
        if change == "damage":
            (file,) = (output / "unfinished").glob("000000-*")
            file.write_bytes(file.read_bytes()[:50])
        model.dies = 2 if change == "damage" else 4
        with pytest.raises(Killed):
            run(spec, output, model, prompt)
        assert ("unfinished batches of other images" in capsys.readouterr().out) == (change != "damage")
    model = FakeModel()
    run(spec, output, model)
    assert model.rows == 2
    run(spec, tmp_path / "whole")
    assert contents(output) == contents(tmp_path / "whole")


def test_nothing_is_written_through_links(tmp_path):
    spec, output = pictures(tmp_path / "photos", 2), tmp_path / "out"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    for name in ("heatmaps", "unfinished"):
        output.mkdir(exist_ok=True)
        (output / name).symlink_to(tmp_path / "mine")
        with pytest.raises(UserError, match=rf"output: .*{name} is a link, expected a folder"):
            run(spec, output)
        (output / name).unlink()
    (output / "heatmaps").mkdir(exist_ok=True)
    for name in ("predictions.jsonl", "report.html", "failed.jsonl", "heatmaps/00000_misalignment.png"):
        (output / name).symlink_to(tmp_path / "mine" / "file")
    with pytest.raises(Killed):
        run(pictures(tmp_path / "more", 4), tmp_path / "killed", FakeModel(2))
    (batch,) = (tmp_path / "killed" / "unfinished").iterdir()
    batch.unlink()
    os.mkfifo(batch)
    run(str(tmp_path / "more" / "*.png"), tmp_path / "killed")
    run(spec, output)
    assert contents(tmp_path / "mine") == {"file": b"mine"}
    assert not any(path.is_symlink() for path in output.rglob("*"))


def test_pictures_in_the_own_output_are_refused(tmp_path):
    spec, output = pictures(tmp_path / "photos", 2), tmp_path / "out"
    run(spec, output)
    (tmp_path / "link.png").symlink_to(output / "heatmaps" / "00000_misalignment.png")
    before = contents(output)
    for spec in (str(output / "heatmaps" / "*.png"), str(tmp_path / "link.png")):
        with pytest.raises(UserError, match=r"images: .*png is in .*out/heatmaps, where this command writes; choose"):
            run(spec, output)
    assert contents(output) == before


def test_a_report_of_large_pictures_keeps_thumbnails(tmp_path):
    spec = pictures(tmp_path / "photos", 2)
    cv2.imwrite(str(tmp_path / "photos" / "0.png"), np.zeros((1200, 900, 3), np.uint8))
    kept = []

    class Model(FakeModel):
        def predict_rows(self, rows, batch_size):
            kept.extend(gc.get_objects())
            return super().predict_rows(rows, batch_size)

    run(spec, tmp_path / "out", Model())
    assert not any(isinstance(one, np.ndarray) and one.shape == (1200, 900, 3) for one in kept)
    assert "900 x 1200" in (tmp_path / "out" / "report.html").read_text()


def test_read_inputs_takes_what_exists_literally(tmp_path):
    names = ["a::b.png", "c[1].png", "d].png", "e?.png", "f*.png"]
    folder = tmp_path / "run[lr=1e-3]*::?"
    folder.mkdir()
    for name in (*names, "c1.png", "ex.png", "fx.png", "notes.txt"):
        (folder / name).write_bytes(b"")
    for name in names:
        assert predict.read_inputs(str(folder / name), "x") == [(str(folder / name), "x")]
    assert len(predict.read_inputs(str(folder / "*"), "x")) == 8
    found = [path for path, _ in predict.read_inputs(str(folder / "c*"), "x")]
    assert found == [str(folder / "c1.png"), str(folder / "c[1].png")]
    with pytest.raises(UserError, match=r"nothing matches .*, which is a folder"):
        predict.read_inputs(str(folder), "x")


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
    examples, states = predict.image_examples(inputs, tmp_path / "out")
    assert predict.predict(model, examples, states, tmp_path / "out", batch_size=2) == 0

    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    expected = model.predict(images, PROMPTS)
    assert [line["prompt"] for line in lines] == PROMPTS
    np.testing.assert_allclose([line["scores"]["overall"] for line in lines], expected.scores["overall"], atol=2e-6)
    heatmap = cv2.imread(str(tmp_path / "out" / lines[1]["heatmaps"]["misalignment"]), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(heatmap / 255, expected.heatmaps["misalignment"][1], atol=0.5 / 255 + 1e-6)
    assert "two blue dogs" in (tmp_path / "out" / "report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["heatmaps", "predictions.jsonl", "report.html"]


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
        predictor.check_vocabulary(small, model.vocabulary, 24)
