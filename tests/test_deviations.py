"""Predicted deviations of labels from scores: they disturb nothing, are learnt, calibrated on dev, and travel."""

import types

import cv2
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet
import pytest
import scipy.stats
import tiny_model

import rahf
from rahf import (
    checkpoints,
    convert,
    evaluate,
    experiments,
    losses,
    partitioning,
    predict,
    pretrained,
    suggest,
    train,
    weights,
    workdirs,
)
from rahf import program as programs
from rahf.models import critics, heads
from rahf.models.parameters import param_shapes
from rahf.models.rahf import RAHFConfig
from rahf.reward import specs
from rahf.score import job as jobs
from rahf.score import parts
from rahf.serve import scoring, server
from richhf_data import images, json_files, jsonl, metrics, picture_shards, schema
from richhf_data.annotate import choose

pytestmark = pytest.mark.usefixtures("standard_promotion")
HEAD = {"filters": (8, 4), "dense": (8,)}


def own(path) -> bool:
    """Whether a parameter is one that the option adds."""
    return any(key.key in ("deviation", "deviation_factors") for key in path)


def flat(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (own(path), np.asarray(leaf)) for path, leaf in leaves}


def without(tree):
    """A tree of parameters without those of the option."""
    if not isinstance(tree, dict):
        return tree
    return {name: without(leaf) for name, leaf in tree.items() if name not in ("deviation", "deviation_factors")}


@pytest.mark.parametrize("variant", tiny_model.VARIANTS)
def test_predictions_and_gradients_of_all_else_are_those_without(variant):
    sure, plain = (tiny_model.config(variant, score_head=HEAD | {"deviation": on}) for on in (True, False))
    model, params = tiny_model.model_and_params(sure)
    params["params"]["deviation_factors"] = np.full(4, 1.5, np.float32)
    batch, weights = tiny_model.batch(sure, 4), {"score": 3.0, "heatmap": 2.0, "keyword": 0.5}

    def value_and_gradient(model, params):
        def loss(params):
            outputs = model.apply(params, *(batch[name] for name in tiny_model.INPUTS))
            value, found = losses.rahf_loss(outputs, batch, losses.loss_normalisers(batch), weights)
            return value, (found, outputs)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (value, (found, outputs)), gradient = value_and_gradient(model, params)
    (expected, (_, others)), wanted = value_and_gradient(type(model)(plain), without(params))
    assert others.deviations is None and outputs.deviations.shape == (4, 4) and (outputs.deviations > 0).all()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), outputs[:3], others[:3])
    np.testing.assert_allclose(value - found["loss_deviation"], expected, rtol=1e-5)
    wanted = flat(wanted)
    for name, (is_own, found) in flat(gradient).items():
        if is_own:
            assert ("factors" in name) == (not found.any()), name
        else:
            np.testing.assert_allclose(found, wanted[name][1], rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_other_parameters_begin_as_without():
    sure, plain = (heads.ScoreHead(heads.ScoreHeadConfig(**HEAD, deviation=on)) for on in (True, False))
    x = np.zeros((1, 4, 4, 3), np.float32)
    found, expected = (flat(nn.unbox(jax.jit(head.init)(jax.random.key(0), x))) for head in (sure, plain))
    assert len(found) == len(expected) + 2
    for name, (_, leaf) in expected.items():
        np.testing.assert_array_equal(leaf, found[name][1], err_msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_other_parameters_are_clipped_and_updated_as_without(kind):
    def loss(params, rows, normalisers, key):
        value = sum((scales[name] * layer["kernel"]).sum() for name, layer in params["head"].items())
        return value * rows["x"].mean(), {"loss": value}

    scales, moved = {"output": 1.0, "deviation": 1e4}, {}
    for names in (("output", "deviation"), ("output",)):
        program = programs.Program(
            init=lambda key, names=names: {"head": {name: {"kernel": jnp.ones((4, 3))} for name in names}},
            loss=loss,
            normalisers=lambda batch: {},
            batch_shapes=lambda rows: {"x": ((rows,), "float32")},
            remat=(),
        )
        config = experiments.load("rahf_ci")
        config.optimizer.update(kind=kind, clip_norm=1e-8)
        config.optimizer.learning_rate_multipliers = {"heads": 1.0}
        training = programs.assemble(program, config, partitioning.make_mesh(devices=jax.devices()[:1]))
        batch = training.place({"x": np.ones(config.train.batch_size, np.float32)})
        state, measured = training.step(training.init_state(training.init_params()), batch)
        assert measured["gradient_norm"] == pytest.approx(np.sqrt(12))
        moved[names] = jax.device_get(state["params"]["head"])
    both, alone = moved.values()
    assert (both["deviation"]["kernel"] != 1).all()
    assert (both["output"]["kernel"] != 1).all()
    np.testing.assert_array_equal(both["output"]["kernel"], alone["output"]["kernel"])


def test_the_loss_is_the_likelihood_of_scipy():
    rng = np.random.default_rng(0)
    deviation, predicted, target = (rng.uniform(0.05, 1, (3, 4)).astype(np.float32) for _ in range(3))
    mask = rng.random((3, 4)) < 0.7
    target[~mask] = np.nan
    expected = -scipy.stats.norm.logpdf(target[mask], predicted[mask], deviation[mask]).sum()
    loss, gradients = jax.value_and_grad(losses.deviation_loss_sum, (0, 1))(deviation, predicted, target, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    slopes = 1 / deviation - (target - predicted) ** 2 / deviation**3
    np.testing.assert_allclose(gradients[0], np.where(mask, slopes, 0), rtol=1e-4, atol=1e-6)
    assert not gradients[1].any()


def test_the_deviation_of_labels_is_learnt_where_it_shows():
    config = heads.ScoreHeadConfig(filters=(), dense=(16,), pool="mean", deviation=True)
    module, noise = heads.ScoreHead(config), np.array([0.05, 0.1, 0.25], np.float32)

    def batch(key, rows=64):
        groups, size, kind = jax.random.split(key, 3)
        group = jax.random.randint(groups, (rows,), 0, 3)
        x = jax.nn.one_hot(group, 3)[:, None, None] + 0.1 * jax.random.normal(kind, (rows, 2, 2, 3))
        return x, group, 0.5 + jnp.asarray(noise)[group] * jax.random.normal(size, (rows,))

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 1500))

    def step(state, key):
        params, moments = state
        x, _, label = batch(key)

        def loss(params):
            score, deviation = jnp.split(module.apply({"params": params}, x), 2, axis=1)
            everything = jnp.ones(score.shape, bool)
            parts = losses.score_loss_sum(score, label[:, None], everything)
            return parts + losses.deviation_loss_sum(deviation, score, label[:, None], everything)

        updates, moments = optimizer.update(jax.grad(loss)(params), moments)
        return (optax.apply_updates(params, updates), moments), None

    params = tiny_model.random_params(module, np.zeros((1, 2, 2, 3), np.float32))
    state = params, optimizer.init(params)
    (params, _), _ = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 1500)))(state)
    x, group, _ = batch(jax.random.key(1), 300)
    found = module.apply({"params": params}, x)
    assert found.shape == (300, 2)
    for i, wanted in enumerate(noise):
        np.testing.assert_allclose(found[group == i, 1].mean(), wanted, rtol=0.15)
        np.testing.assert_allclose(found[group == i, 0].mean(), 0.5, atol=0.06)


def rows_of(rng, count):
    """Targets without maps or words, and predictions whose deviations are half of the true ones."""
    deviations = rng.uniform(0.02, 0.3, (count, 4))
    scores = rng.uniform(0.2, 0.8, (count, 4))
    truth = scores + 2 * deviations * rng.normal(size=(count, 4))
    absent = {"heatmap_mask": np.zeros(2, bool), "heatmaps": None, "labels": None, "prompt": "a cat"}
    targets = [absent | {"scores": row, "score_mask": np.ones(4, bool)} for row in truth]
    predictions = [
        {"scores": score, "heatmaps": None, "labelled_prompt": None, "deviations": deviation}
        for score, deviation in zip(scores, deviations, strict=True)
    ]
    return targets, predictions


def test_metrics_of_deviations_equal_scipy_where_the_mask_allows():
    targets, predictions = rows_of(np.random.default_rng(0), 40)
    for i in (3, 5):
        targets[i] |= {"score_mask": np.array([False, True, True, True])}
    for target in targets:
        target["score_mask"] = target["score_mask"] & np.array([True, True, True, False])
    found = metrics.evaluate(targets, predictions)
    plain = metrics.evaluate(targets, [row | {"deviations": None} for row in predictions])
    assert found.keys() - plain.keys() == {f"score/{k}/{name}" for k in metrics.DEVIATION_METRICS for name in schema.SCORES}
    assert {key: found[key] for key in plain} == pytest.approx(plain, nan_ok=True)
    for k, name in enumerate(schema.SCORES[:3]):
        kept = [i for i in range(40) if k or i not in (3, 5)]
        truth, score = (np.array([rows[i]["scores"][k] for i in kept]) for rows in (targets, predictions))
        deviation = np.array([predictions[i]["deviations"][k] for i in kept])
        z2 = np.mean((truth - score) ** 2 / deviation**2)
        assert found[f"score/z2/{name}"] == pytest.approx(z2)
        assert found[f"score/nll/{name}"] == pytest.approx(-scipy.stats.norm.logpdf(truth, score, deviation).mean())
        srcc = scipy.stats.spearmanr(np.abs(truth - score), deviation).statistic
        assert found[f"score/error_srcc/{name}"] == pytest.approx(srcc)
        weighed = (len(kept) * z2 + metrics.PRIOR) / (len(kept) + metrics.PRIOR)
        assert found[f"score/factor/{name}"] == pytest.approx(np.sqrt(weighed))
    assert all(np.isnan(found[f"score/{key}/overall"]) for key in metrics.DEVIATION_METRICS)
    assert "deviations: NLL / z2" in metrics.table({"this model": found})
    assert "z2" not in metrics.table({"this model": plain})
    one = metrics.evaluate(targets[:1], predictions[:1])
    assert np.isnan(one["score/error_srcc/alignment"]) and np.isfinite(one["score/nll/alignment"])


def test_the_factor_calibrates_and_few_examples_change_less():
    targets, predictions = rows_of(np.random.default_rng(1), 2000)
    factors = np.array([metrics.evaluate(targets, predictions)[f"score/factor/{name}"] for name in schema.SCORES])
    np.testing.assert_allclose(factors, 2, rtol=0.05)
    better = [row | {"deviations": row["deviations"] * factors} for row in predictions]
    again = metrics.evaluate(targets, better)
    for name in schema.SCORES:
        assert again[f"score/z2/{name}"] == pytest.approx(1, abs=0.01)
    targets[0]["scores"] = predictions[0]["scores"] + 20 * predictions[0]["deviations"]
    assert metrics.evaluate(targets[:1], predictions[:1])["score/factor/overall"] == pytest.approx(np.sqrt(403 / 4))


@pytest.mark.parametrize("deviations", [np.ones(3), np.array([1, 1, 0, 1.0]), np.array([1, 1, np.nan, 1])])
def test_faulty_deviations_are_named(deviations):
    targets, predictions = rows_of(np.random.default_rng(2), 2)
    predictions[1]["deviations"] = deviations
    with pytest.raises(ValueError, match=r"predictions\[1\]\['deviations'\]: got .*, expected 4 finite numbers above 0"):
        metrics.evaluate(targets, predictions)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with deviations, of the augmented variant, and its last evaluation."""
    workdir = tmp_path_factory.mktemp("sure") / "run"
    config = experiments.load("rahf_ci")
    config.data.source, config.model.variant, config.model.score_head.deviation = "stream", "augmented_prompt", True
    config.train.num_steps, config.eval.num_examples = 2, 24
    return workdir, train.train(config, workdir)


def test_the_best_parameters_are_calibrated_on_dev_and_the_training_state_is_not(run):
    workdir, last = run
    factors = np.array([last[f"score/factor/{name}"] for name in schema.SCORES])
    assert (np.abs(factors - 1) > 0.01).all()
    model = rahf.load(workdir)
    np.testing.assert_allclose(model.params["deviation_factors"], factors, rtol=1e-6)
    found = evaluate.evaluate(workdir, "dev")
    for name, factor in zip(schema.SCORES, factors, strict=True):
        assert found[f"score/z2/{name}"] == pytest.approx(last[f"score/z2/{name}"] / factor**2, rel=1e-4)
        assert abs(found[f"score/z2/{name}"] - 1) < abs(last[f"score/z2/{name}"] - 1)
    assert found["score/plcc/overall"] == pytest.approx(last["score/plcc/overall"], abs=1e-5)
    assert set(json_files.read(workdir / "eval/dev.json")) == set(found)
    training = programs.assemble(train.program(model.config), model.config)
    with checkpoints.manager(workdir, "checkpoints") as latest:
        state, _ = checkpoints.restore_latest(latest, training.state)
    assert (np.asarray(state["params"]["deviation_factors"]) == 1).all()


def test_scores_without_a_label_keep_their_factors():
    results = {f"score/factor/{name}": 2.0 for name in schema.SCORES} | {"score/factor/overall": np.nan}
    params = {"deviation_factors": jnp.array([1.0, 2, 3, 4]), "other": jnp.zeros(2)}
    np.testing.assert_array_equal(evaluate.calibrated(params, results)["deviation_factors"], [2, 4, 6, 4])
    plain = {"other": params["other"]}
    assert evaluate.calibrated(plain, {}) is plain


def test_a_converted_folder_says_the_same_and_identities_depend_on_the_factors(run, tmp_path):
    model = rahf.load(run[0])
    convert.convert("workdir", run[0], tmp_path / "folder")
    folder = rahf.load(tmp_path / "folder")
    assert folder.identity == model.identity
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    expected, found = (one.predict(pictures, ["a red cat"] * 3) for one in (model, folder))
    assert list(found.deviations) == list(schema.SCORES)
    for name, values in found.deviations.items():
        assert values.shape == (3,) and values.dtype == np.float32
        np.testing.assert_allclose(values, expected.deviations[name], rtol=1e-5)
    exported = jax.export.deserialize((tmp_path / "folder/predict.stablehlo").read_bytes())
    held = {"/".join(key.key for key in path): x for path, x in jax.tree_util.tree_leaves_with_path(folder.params)}
    texts = np.stack([folder.text_ids("a red cat")] * 3)
    *_, deviations = exported.call(held, pictures, texts)
    np.testing.assert_allclose(deviations, np.stack(list(found.deviations.values()), 1), rtol=1e-5)

    other = rahf.predictor.Model(folder.predictor, folder.params | {"deviation_factors": jnp.ones(4)})
    assert other.identity != folder.identity
    config = RAHFConfig.from_dict({"score_head": {"deviation": True}})
    assert config.deviations and not RAHFConfig().deviations


def test_a_run_starts_from_a_critic_with_and_without_deviations(run, tmp_path):
    folder = tmp_path / "folder"
    convert.convert("workdir", run[0], folder)
    tensors, config = pretrained.read(folder, "rahf").tensors, workdirs.read_config(run[0]).model.to_dict()
    added = {name for name in tensors if "deviation" in name}
    assert len(added) == 3

    def started(on):
        critic = critics.config_of(config | {"score_head": config["score_head"] | {"deviation": on}})
        ours = param_shapes(critics.module_of(critic).init, *critics.dummy_inputs(critic))
        return set(pretrained.starting_tensors({"rahf": folder}, flax.traverse_util.unflatten_dict(ours, sep="/"), critic))

    assert started(True) == set(tensors) and started(False) == set(tensors) - added
    for left in (set(tensors) - added, set(tensors) - {"deviation_factors"}):
        held = {name: tensors[name] for name in tensors if name in left}
        weights.write_safetensors(folder / "weights.safetensors", held)
        if left & added:
            with pytest.raises(ValueError, match=r"deviation_factors \(4,\): missing"):
                started(True)
        else:
            assert started(True) == started(False) == left


def test_selection_and_annotation_order_use_deviations(run, tmp_path):
    reward, plain = (specs.reward_of(f"rahf:{run[0]}:{terms}") for terms in ("overall,overall_deviation=-1.5", "overall"))
    rng, prompts = np.random.default_rng(0), ["a red cat on a table", "a blue dog on the moon"]
    pictures = [rng.integers(0, 256, (40, 40, 3), np.uint8) for _ in prompts]
    found = reward.model.predict(pictures, prompts)
    expected = found.scores["overall"] - 1.5 * found.deviations["overall"]
    np.testing.assert_allclose(specs.checked(reward, pictures, prompts), expected, atol=1e-6)
    assert reward.identity != plain.identity
    with pytest.raises(ValueError, match=r"guide: got overall_deviation, which has no gradient, expected scores"):
        _ = reward.differentiable

    for name, picture in zip("ab", pictures, strict=True):
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture[..., ::-1])
    lines = [{"image": f"{name}.png", "prompt": prompt} for name, prompt in zip("ab", prompts, strict=True)]
    jsonl.write(tmp_path / "in.jsonl", lines)
    table = choose.PictureTable(tmp_path / "in.jsonl")
    suggest.suggest(table, reward.model, None, 0.3)
    priorities = np.mean(list(found.deviations.values()), axis=0)
    np.testing.assert_allclose([row["priority"] for row in table.rows], priorities, rtol=1e-5)
    (first, _), _ = choose.choose(table.rows, choose.Options(highest="priority"))
    assert first["prompt"] == prompts[priorities.argmax()]


def test_a_reward_of_deviations_needs_a_model_that_predicts_them():
    plain = types.SimpleNamespace(model_config=RAHFConfig())
    with pytest.raises(ValueError, match=r"reward: rahf:run:overall_deviation: got overall_deviation, the model predicts"):
        specs._rahf(lambda folder: plain, "run:overall_deviation")


def test_commands_write_what_python_says(run, tmp_path):
    model, rng = rahf.load(run[0]), np.random.default_rng(0)
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 256, (40, 40, 3), np.uint8))
    inputs = predict.read_inputs(str(tmp_path / "*.png"), "a red cat")
    expected = model.predict([images.read(path) for path, _ in inputs], ["a red cat"] * 3).deviations
    assert predict.predict(model, *predict.image_examples(inputs, tmp_path / "out"), tmp_path / "out") == 0
    lines = list(jsonl.read(str(tmp_path / "out/predictions.jsonl"), "a", "a", texts=()))
    assert "± {:.2f}".format(expected["overall"][0]) in (tmp_path / "out/report.html").read_text(encoding="utf-8")

    shards = picture_shards.shards(str(tmp_path / "*.png"), 10, "a red cat", None)
    job = jobs.job_of(model, tmp_path / "scored", {}, {}, 4)
    parts.begin(job, len(shards))
    jobs.score(model, {}, job, shards, 0)
    table = pyarrow.parquet.read_table(tmp_path / "scored/part-00000.parquet")

    scorer = scoring.Scorer(model, {}, [4])
    rows = [scoring.Row(model.prepare(images.read(path), text), text, None, [], None) for path, text in inputs]
    service = types.SimpleNamespace(scorer=scorer)
    served = [server._Service._result(service, outcome, None) for outcome in scorer.finish(scorer.begin(rows))]
    for name, values in expected.items():
        for found in (
            [line["deviations"][name] for line in lines],
            table[f"{name}_deviation"].to_pylist(),
            [one["deviations"][name] for one in served],
        ):
            np.testing.assert_allclose(found, values, atol=2e-6)
    with pytest.raises(ValueError, match=r"for the name 'overall_deviation', which is taken"):
        jobs.reward_specs(["overall_deviation=python:a:b"])


def test_a_model_without_says_none_of_it():
    config = experiments.load("rahf_ci")
    made = rahf.predictor.Predictor(config, None)
    row = {"scores": np.zeros(4), "heatmaps": np.zeros((2, 2, 2)), "labelled_prompt": "a", "deviations": None}

    class Plain:
        model_config, vocabulary = made.model_config, type("V", (), {"written": staticmethod(str)})

    assert rahf.predictor.feedback_of([row], ["a"], Plain).deviations == {}
