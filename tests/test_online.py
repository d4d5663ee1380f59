"""Online fine-tuning: advantages and rounds by hand, whole runs that reach a known optimum, kills, bad input."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from rahf import checkpoints, experiments, loop, partitioning
from rahf.diffusion import folder, inputs
from rahf.diffusion.online import __main__ as online
from rahf.diffusion.online import advantages, backprop, deals, policy, preferences, rounds
from rahf.predictor import Feedback
from rahf.reward import differentiable
from rahf.reward.image_table import ImageTable
from richhf_data.errors import UserError

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax promotes freely


# ---- Advantages -----------------------------------------------------------------------------------------------------
def test_a_prompts_history_normalises_its_rewards():
    """Of four entries: prompt 0 has two before this round, prompt 1 none, prompt 2 more than fit."""
    history = advantages.History.empty(3, 4).with_rewards(np.array([0, 0, *[2] * 6]), np.float32([1, 2, *range(6)]))
    np.testing.assert_array_equal(history.count, [2, 0, 4])
    np.testing.assert_array_equal(history.rewards[[0, 2]], [[0, 0, 1, 2], [2, 3, 4, 5]])
    prompts, rewards = np.array([0, 1, 2, 2]), np.float32([6, 10, 1, 3])
    history = history.with_rewards(prompts, rewards)
    np.testing.assert_array_equal(history.rewards, [[0, 1, 2, 6], [0, 0, 0, 10], [4, 5, 1, 3]])
    found = advantages.of_prompts(prompts, rewards, history)
    assert found.dtype == np.float32
    expected = [(6 - 3) / np.std([1, 2, 6]), (10 - 5) / np.std(rewards), *((np.array([1, 3]) - 3.25) / np.std([4, 5, 1, 3]))]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_group_normalises_its_rewards():
    prompts, rewards = np.array([4, 1, 4, 1, 2, 2]), np.float32([1, 7, 3, 7, 0, 1e-3])
    found, equal = advantages.of_groups(prompts, rewards)
    np.testing.assert_allclose(found, [-1, 0, 1, 0, -1, 1], rtol=3e-3)
    assert equal == 1 and not found[[1, 3]].any() and found.dtype == np.float32


def test_regional_advantages_are_higher_where_there_are_fewer_flaws():
    rng = np.random.default_rng(0)
    of_pictures, flaws = rng.standard_normal(5).astype(np.float32), rng.random((5, 4, 4)).astype(np.float32)
    found = advantages.regional(of_pictures, flaws, 0.5)
    np.testing.assert_allclose(found.mean((1, 2)), of_pictures, atol=1e-6)
    added = found - of_pictures[:, None, None]
    np.testing.assert_allclose(added.std(), 0.5, rtol=1e-4)
    for one, of_one in zip(added, flaws, strict=True):
        np.testing.assert_allclose(np.corrcoef(one.ravel(), of_one.ravel())[0, 1], -1, atol=1e-5)
    np.testing.assert_array_equal(advantages.regional(of_pictures, np.ones((5, 4, 4)), 0.5)[:, 1, 2], of_pictures)


def test_each_text_is_dealt_once_an_epoch():
    whole = np.concatenate([deals.dealt(3, 5, first, 4) for first in range(0, 40, 4)])
    epochs = whole.reshape(8, 5)
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(map(tuple, epochs))) > 4
    np.testing.assert_array_equal(deals.dealt(3, 5, 7, 20), whole[7:27])
    assert not np.array_equal(deals.dealt(4, 5, 0, 40), whole)


# ---- Rounds, with a drawing program that writes a picture's number into it ------------------------------------------
PROMPTS = ["red cat", "a cat", "a red cat", "cat", "cat cat"]
HELD_OUT = ["red red cat", "cat red"]


@pytest.fixture(scope="module")
def place(micro_folder):
    """The model's folder, with prompts beside it."""
    for name, prompts in (("prompts.txt", PROMPTS), ("held_out.txt", HELD_OUT)):
        (micro_folder.parent / name).write_text("".join(f"{prompt}\n" for prompt in prompts))
    return micro_folder


def config_of(place, method="ddpo", **changes):
    config = experiments.load("sd_online")
    config.method = method
    config.model.update(folder=str(place), dtype="float32", remat=False)
    config.data.update(prompts=str(place.parent / "prompts.txt"), held_out=str(place.parent / "held_out.txt"))
    config.data.prompts = "" if method == "dpo" else config.data.prompts
    config.rollout.update(steps=4, guidance_scale=1.0)
    config.sample.update(steps=4, guidance_scale=1.0, sampler="ddim")
    config.policy.update(pictures=64, epochs=2, clip=1.0, group=0 if method == "ddpo" else 16)
    config.train.update(batch_size=32, num_steps=16)
    config.eval.update(every=8, prompts=2, images=32)
    config.optimizer.update(learning_rate=3e-2, final_learning_rate=3e-2)
    config.lora.rank, config.log_every, config.checkpoint_every = 0, 4, 100
    config.update_from_flattened_dict(changes)
    return config


def rate(value):
    return {"optimizer.learning_rate": value, "optimizer.final_learning_rate": value}


class Critic:
    """A picture's number decides where it is flawed; "red" is misaligned in odd ones."""

    vocabulary = types.SimpleNamespace(written=str)

    def predict(self, images, prompts):
        numbers = np.asarray(images)[:, 0, 0, 0].astype(int)
        flaws = np.zeros((len(images), 4, 4), np.float32)
        flaws[np.arange(len(images)), numbers % 4] = 0.5
        labelled = [p.replace("red", "red_0") if n % 2 else p for n, p in zip(numbers, prompts, strict=True)]
        return Feedback({}, {"implausibility": flaws, "misalignment": np.ones_like(flaws)}, labelled, [])


@pytest.fixture
def rounds_of(place, micro, monkeypatch):
    """(config, reward, critic) -> a generator of batches, and the run that it reads."""

    def draw(params, vae, context, empty, numbers, seed):
        assert seed.dtype == np.uint32 and empty.shape == (1, 16, 12)
        pixels = np.broadcast_to(numbers.reshape(-1, 1, 1, 1), (len(numbers), 4, 4, 3)).astype(np.uint8)
        return {"numbers": numbers}, pixels, numbers != params.get("broken", -1)

    def make(config, reward, critic=None):
        monkeypatch.setattr(policy, "draw", lambda *args: draw)
        contexts = np.broadcast_to(np.arange(6, dtype=np.float32).reshape(-1, 1, 1), (6, 16, 12))
        training = types.SimpleNamespace(
            own_rows=np.arange(config.train.batch_size), place=dict, constants={"empty": contexts[-1:]}, batch={},
            mesh=partitioning.make_mesh(devices=jax.devices()[:1]),
        )  # fmt: skip
        made = rounds.Rounds(config, micro.config, training, PROMPTS, contexts, micro.tokenizer, {}, reward, critic)
        run = types.SimpleNamespace(step=0, state={"params": {}}, kept=made.rollouts().empty(), logged=[])
        run.stop_between, run.print = (lambda: None), (lambda text: None)
        run.log = lambda section, values: run.logged.append(values)
        return made.rollouts().batches(run), run

    return make


def score(images, prompts):
    """A sum of the picture's number and the prompt's."""
    return np.sin(np.asarray(images)[:, 0, 0, 0].astype(float)) + [PROMPTS.index(prompt) for prompt in prompts]


def taken(batches, run, count):
    """The next batches, and the pictures' numbers, prompts and advantages of each."""
    found = []
    for _ in range(count):
        rows, batch = next(batches)
        assert rows == {}
        found.append(batch)
        run.step += 1
    return found


def test_a_round_deals_groups_and_uses_its_pictures_again(place, rounds_of):
    """GRPO: two rounds of three batches of four, each used twice; groups of three pictures that batches divide."""
    config = config_of(place, "grpo", **{"policy.pictures": 12, "policy.group": 3, "train.batch_size": 4})
    config.policy.steps = 0.5
    batches, run = rounds_of(config, score)
    found = taken(batches, run, 12)
    for first in (0, 6):
        for one, again in zip(found[first : first + 3], found[first + 3 : first + 6], strict=True):
            assert one is again
    for number, first in enumerate((0, 6)):
        whole = {name: np.concatenate([batch[name] for batch in found[first : first + 3]]) for name in found[0]}
        np.testing.assert_array_equal(whole["numbers"], 12 * number + np.arange(12))
        texts = whole["context"][:, 0, 0].astype(int)
        chosen = np.unique(texts)
        assert (np.bincount(texts)[chosen] % 3 == 0).all() and (number or len(chosen) == 4)  # the fifth prompt comes first
        rewards = np.sin(whole["numbers"]) + texts
        for text in np.flatnonzero(np.bincount(texts) == 3):
            own = rewards[texts == text]
            np.testing.assert_allclose(whole["advantage"][texts == text], (own - own.mean()) / own.std(), rtol=1e-4)
        assert whole["steps"].shape == (12, 2) and (whole["steps"][:, 0] != whole["steps"][:, 1]).all()
        assert set(whole["steps"].ravel()) == {0, 1, 2, 3}
        np.testing.assert_allclose(run.logged[number]["reward"], rewards.mean(), rtol=1e-6)
        assert run.logged[number]["equal_groups"] == 0
    assert not run.kept["history"]["count"].any()


def test_groups_of_one_prompt_are_normalised_apart(place, rounds_of):
    """Five prompts in ten groups of two: the better one has an advantage of 1, the other one of -1."""
    config = config_of(place, "grpo", **{"policy.pictures": 20, "policy.group": 2, "train.batch_size": 20})
    (batch,) = taken(*rounds_of(config, score), 1)
    np.testing.assert_allclose(np.sort(batch["advantage"]), np.repeat([-1, 1], 10), rtol=1e-3)


def test_rounds_remember_each_prompts_rewards(place, rounds_of):
    """DDPO: the history of the round before is in the advantages; a killed run finds it in what is kept."""
    options = {"policy.pictures": 10, "train.batch_size": 10, "policy.epochs": 1, "policy.history": 4}
    config = config_of(place, **options, **{"policy.max_advantage": 1.2})
    batches, run = rounds_of(config, score)
    (first,) = taken(batches, run, 1)
    kept = run.kept
    (second,) = taken(batches, run, 1)
    history = {text: [] for text in range(5)}
    for batch in (first, second):
        texts = batch["context"][:, 0, 0].astype(int)
        assert sorted(texts) == sorted([*range(5)] * 2)
        rewards = np.sin(batch["numbers"]) + texts
        for text, reward in zip(texts, rewards, strict=True):
            history[text].append(reward)
        means, deviations = (np.array([of(history[text]) for text in texts]) for of in (np.mean, np.std))
        expected = (rewards - means) / deviations
        np.testing.assert_allclose(batch["advantage"], np.clip(expected, -1.2, 1.2), rtol=1e-3, atol=1e-4)
        assert (np.abs(batch["advantage"]) == np.float32(1.2)).any() or batch is first
    resumed, again = rounds_of(config, score)
    again.step, again.kept = 1, kept
    np.testing.assert_array_equal(taken(resumed, again, 1)[0]["advantage"], second["advantage"])


def test_a_critic_says_which_regions_and_words_earned_the_reward(place, rounds_of):
    options = {"policy.pictures": 16, "train.batch_size": 8, "dense.weight": 0.5, "dense.words": 0.75}
    batches, run = rounds_of(config_of(place, "grpo", **options, **{"policy.group": 8}), score, Critic())
    found = taken(batches, run, 2)
    whole = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
    texts, numbers = whole["context"][:, 0, 0].astype(int), whole["numbers"]
    of_pictures, _ = advantages.of_groups(texts, np.sin(numbers) + texts)
    flaws = np.zeros((16, 4, 4), np.float32)
    flaws[np.arange(16), numbers % 4] = 0.5
    np.testing.assert_allclose(whole["advantage"], advantages.regional(of_pictures, flaws, 0.5), atol=1e-5)
    for text, number, advantage, weights in zip(texts, numbers, of_pictures, whole["words"], strict=True):
        expected, words = np.ones(16), PROMPTS[text].split()
        if number % 2 and "red" in words:  # "a" and "cat" are one token, "red" two; after the start
            first = 1 + words.index("red")
            expected[first : first + 2] = 0.25 if advantage > 0 else 1.75
        np.testing.assert_array_equal(weights, expected)
    assert len(np.unique(whole["words"])) == 3  # of both signs


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: np.zeros(len(images)), "reward: got 0 for all 10 pictures of the first round"),
        (lambda images, prompts: np.full(len(images), np.nan), "reward: got 5 values that are not finite, the first nan"),
        (lambda images, prompts: np.zeros(3), r"reward: got shape \(3,\), expected 5 finite numbers"),
    ],
)
def test_rewards_that_teach_nothing_are_refused(place, rounds_of, reward, message):
    config = config_of(place, **{"policy.pictures": 10, "train.batch_size": 5, "policy.epochs": 1})
    with pytest.raises(UserError, match=message):
        taken(*rounds_of(config, reward), 1)


def test_equal_rewards_of_a_later_round_teach_nothing(place, rounds_of):
    config = config_of(place, "grpo", **{"policy.pictures": 8, "train.batch_size": 8, "policy.epochs": 1, "policy.group": 4})
    batches, run = rounds_of(config, lambda images, prompts: np.minimum(np.asarray(images)[:, 0, 0, 0], 7))
    first, second = taken(batches, run, 2)
    assert first["advantage"].any() and not second["advantage"].any()
    assert [values["equal_groups"] for values in run.logged] == [0, 2]


def test_a_picture_that_is_not_finite_is_named(place, rounds_of):
    batches, run = rounds_of(config_of(place, **{"policy.pictures": 10, "train.batch_size": 5}), score)
    run.state = {"params": {"broken": 7}}
    with pytest.raises(UserError, match=r"rollout: picture 7, of the prompt '.*', is not finite at step 0; lower"):
        next(batches)


# ---- Runs -----------------------------------------------------------------------------------------------------------
TARGET = 0.594  # of the mean brightness; the model's own pictures have 0.58


@pytest.fixture
def one_device(monkeypatch):
    """Runs on one device, for which programs compile sooner."""
    monkeypatch.setattr(partitioning, "mesh_of", lambda config: partitioning.make_mesh(devices=jax.devices()[:1]))


def brightness(images, prompts):
    return np.asarray(images, np.float32).mean((1, 2, 3)) / 255


def left(images, prompts):
    return brightness(np.asarray(images)[:, :, :2], prompts)


def near(images, prompts):
    return -100 * np.square(brightness(images, prompts) - TARGET)


SMOOTH = differentiable.of_function(lambda images: -100 * jnp.square((images.mean((1, 2, 3)) + 1) / 2 - TARGET), "near")


def evaluations(workdir):
    return [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]


def distances(workdir):
    """From the target: of the mean brightness of held-out prompts' pictures, at each evaluation."""
    return [abs(entry["held_out"] - TARGET) for entry in evaluations(workdir)]


def check_optimum(workdir):
    first, *_, last = distances(workdir)
    assert first > 0.008 and last < 0.4 * first, distances(workdir)


def unet_of(workdir):
    return (workdir / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def ddpo_run(place, tmp_path_factory, standard_promotion):
    """Four rounds of two batches, each used twice; evaluated as it is trained, with the noise of eta = 1."""
    workdir, config = tmp_path_factory.mktemp("ddpo") / "run", config_of(place, **{"sample.sampler": "ddpm"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitioning, "mesh_of", lambda config: partitioning.make_mesh(devices=jax.devices()[:1]))
        online.train(config, workdir, near, held_out=brightness)
    return workdir


def test_ddpo_reaches_a_known_optimum(ddpo_run):
    check_optimum(ddpo_run)


def test_grpo_reaches_a_known_optimum(place, tmp_path, one_device):
    """With a penalty for leaving the model at the start."""
    config = config_of(place, "grpo", **{"sample.sampler": "ddpm", "beta": 1e-4})
    online.train(config, tmp_path / "run", near, held_out=brightness)
    check_optimum(tmp_path / "run")


@pytest.mark.parametrize("method", ["draft", "refl"])
def test_the_rewards_gradient_leads_to_a_known_optimum(place, tmp_path, one_device, method):
    options = {"train.batch_size": 8, "train.num_steps": 30, "eval.every": 15}
    config = config_of(place, method, **options, **rate(5e-3), **{"gradient.last": 2 if method == "draft" else 1})
    online.train(config, tmp_path / "run", SMOOTH, held_out=brightness)
    check_optimum(tmp_path / "run")


def table(folder, seed):
    """Pictures that are brighter on the left or on the right, two of each of 27 prompts."""
    folder.mkdir()
    rng, rows = np.random.default_rng(seed), []
    for number, words in enumerate(2 * list(itertools.product(("a", "red", "cat"), repeat=3))):
        side = 60 if number < 27 else -60
        pixels = np.clip(128 + np.array([side, side, -side, -side])[None, :, None] + rng.normal(0, 20, (4, 4, 3)), 0, 255)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append({"prompt": " ".join(words), "image": f"{number}.png"})
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ImageTable(folder)


def test_dpo_reaches_a_known_optimum(place, micro, tmp_path, one_device):
    """A reward makes the pairs. Of other pictures, with other noise, all are told apart, and the loss is near 0."""
    vae = micro.params["vae"] | {"quant_conv": {"bias": np.repeat(np.float32([0, -20]), 4)}}  # latents of no variance,
    vae["quant_conv"]["kernel"] = micro.params["vae"]["quant_conv"]["kernel"] * np.repeat(np.float32([20, 0]), 4)  # near 1
    folder.write(dataclasses.replace(micro, params=micro.params | {"vae": vae}), tmp_path / "base")
    held, own, others = folder.read(tmp_path / "base"), table(tmp_path / "own", 0), table(tmp_path / "others", 1)
    options = {"data.images": str(own.path), "data.held_out": "", "eval.prompts": 1, "eval.images": 1}
    options |= {"train.num_steps": 30, "eval.every": 30, "preference.beta": 100.0}
    config = config_of(tmp_path / "base", "dpo", **options, **rate(1e-2))
    online.train(config, tmp_path / "run", left)
    trained, cache = folder.read(tmp_path / "run/model"), tmp_path / "cache"
    pairs = preferences.of_rewards(others, inputs.rewards_of(others, "", left, cache), 0)
    tables = {"preferred": pairs.preferred, "other": pairs.other}
    data, mesh = inputs.Inputs.of_tables(config, held, tables), partitioning.mesh_of(config.mesh)
    batch = {name: np.asarray(data.moments(name, cache, mesh)) for name in tables}
    batch["context"] = data.contexts(cache, mesh)[data.rows("other", batch["other"], np.ones(len(pairs))).text]
    loss = jax.jit(preferences.make_loss(held.config, config.preference.beta, 1.0))
    losses = {}
    for name, model in (("start", held), ("end", trained)):
        params = {"unet": model.params["unet"], "reference": held.params["unet"]}
        metrics = [loss(params, batch, preferences.normalisers_of(batch), jax.random.key(key))[1] for key in range(4)]
        losses[name] = np.mean([one["loss"] for one in metrics])
    np.testing.assert_allclose(losses["start"], np.log(2), rtol=1e-4)
    assert losses["end"] < 0.1 and min(one["accuracy"] for one in metrics) > 0.9


def measured(workdir):
    """What was measured, without the time that it took."""
    return [{key: value for key, value in entry.items() if key != "processor_seconds"} for entry in evaluations(workdir)]


def test_a_killed_run_ends_with_the_same_bits(place, ddpo_run, tmp_path, one_device, monkeypatch, capsys):
    """SIGTERM comes while the second round is drawn; the next life ends with a checkpoint from the middle of that round.

    A life before both left nothing but the parameters of its best step, a late one.
    """
    workdir, calls, drawn, draw = tmp_path / "run", [], [], rounds.Rounds._draw
    config = config_of(place, **{"sample.sampler": "ddpm", "checkpoint_every": 7})
    shutil.copytree(ddpo_run / "best", workdir / "best")

    def reward(images, prompts):
        calls.append(prompts[0] in PROMPTS)  # and not of an evaluation
        if sum(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return near(images, prompts)

    with pytest.raises(SystemExit) as stopped:
        online.train(config, workdir, reward, held_out=brightness)
    assert stopped.value.code == os.EX_TEMPFAIL and sum(calls) == 3
    assert "SIGTERM: saved step 4 in" in capsys.readouterr().out

    def noted(self, run, *args):
        drawn.append(run.step)
        if run.step == 12 and drawn.count(12) == 1:
            raise KeyboardInterrupt
        return draw(self, run, *args)

    monkeypatch.setattr(rounds.Rounds, "_draw", noted)
    with pytest.raises(KeyboardInterrupt):
        online.train(config, workdir, near, held_out=brightness)
    assert "resumed from step 4" in capsys.readouterr().out and drawn == [4, 4, 8, 8, 12]
    drawn[:] = [12]
    online.train(config, workdir, near, held_out=brightness)
    assert "resumed from step 7" in capsys.readouterr().out and drawn == [12, 8, 8, 12, 12]

    assert unet_of(workdir) == unet_of(ddpo_run)
    assert measured(workdir) == measured(ddpo_run)
    digests = []
    for place in (workdir, ddpo_run):
        with checkpoints.manager(place, "checkpoints") as latest:
            digests.append(checkpoints.read_metadata(latest, 16)["digests"])
    assert digests[0] == digests[1]  # parameters, moments, the last round's pictures, the history of rewards
    assert {"kept/history/rewards", "kept/batches/0001/latents", "step"} < digests[0].keys()


def test_a_run_ends_early_and_keeps_the_best_model(place, tmp_path, one_device, monkeypatch):
    """The held-out reward falls from the start. With more patience, the same command goes on."""
    workdir, said = tmp_path / "run", []
    monkeypatch.setattr(loop.Run, "print", lambda self, text: said.append(text))
    options = {"train.batch_size": 8, "train.num_steps": 30, "eval.every": 5, "eval.patience": 1, "gradient.last": 2}
    config = config_of(place, "draft", **options, **rate(5e-3))
    base = place / "unet/diffusion_pytorch_model.safetensors"
    for patience, steps in ((1, [0, 5]), (2, [0, 5, 10])):
        config.eval.patience = patience
        online.train(config, workdir, SMOOTH, held_out=lambda images, prompts: -brightness(images, prompts))
        found = evaluations(workdir)
        assert [entry["step"] for entry in found] == steps
        assert said[-2:] == [
            f"step {steps[-1]}: {patience} evaluations without a better one: the run ends",
            f"{workdir}/model: the model of step 0",
        ]
        assert all(a["held_out"] > b["held_out"] and a["reward"] < b["reward"] for a, b in itertools.pairwise(found))
        trained, start = (safetensors.numpy.load_file(file) for file in (workdir / "model/unet" / base.name, base))
        for name, tensor in start.items():
            np.testing.assert_array_equal(trained[name], tensor)
    assert said[0].startswith("WARNING: reward hacking at step 5? Since step 0, the best one, the trained reward rose")
    for name in ("evaluations.png", "samples/step_00000010.png"):
        assert min(PIL.Image.open(workdir / name).size) >= 4
    assert checkpoints_of(workdir) == [5, 10]


def checkpoints_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


# ---- Bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("ppo", {}, "method: got 'ppo', expected one of ddpo, grpo, refl, draft, dpo"),
        ("ddpo", {"policy.pictures": 48}, r"policy.pictures: got 48, expected a multiple of 32 \(train.batch_size\)"),
        ("grpo", {"policy.group": 12}, r"policy.pictures: got 64, expected a multiple of 12 \(policy.group\)"),
        ("grpo", {"policy.group": 1}, "policy.group: got 1 for grpo, expected 2 or more pictures of a prompt"),
        ("draft", {"gradient.last": 5}, "gradient.last: got 5, expected at most rollout.steps=4"),
        ("draft", {"gradient.noisings": 2, "gradient.last": 2}, "got 2 with method=draft and gradient.last=2, expected 1"),
        ("refl", {"gradient.noisings": 2}, "gradient.noisings: got 2 with method=refl .*, expected 1, or draft"),
        ("ddpo", {"dense.weight": 0.5}, "dense.source: got '' with dense.weight=0.5 and dense.words=0.0, expected a critic"),
        ("dpo", {"dense.words": 0.5}, "dense.source: got '' with dense.weight=0.0 and dense.words=0.5, expected a critic"),
        ("grpo", {"dense.source": "rahf:run"}, "dense.source: got 'rahf:run' with dense.weight=0.0 .* one of them above 0"),
        ("draft", {"dense.weight": 1.5}, "dense.weight: got 1.5, expected 0 to 1 with refl and draft"),
        ("dpo", {"dense.weight": 0.5}, "dense.weight: got 0.5, expected 0 with dpo, which has no regions"),
        ("refl", {"dense.words": 0.5}, "dense.words: got 0.5 with refl, expected 0, or ddpo, grpo, dpo"),
        ("draft", {"dense.heatmaps": ("flaws",)}, r"dense.heatmaps: got \('flaws',\), expected one or more of .* once"),
        ("ddpo", {"dense.heatmaps": ()}, r"dense.heatmaps: got \(\), expected one or more"),
        ("ddpo", {"data.prompts": ""}, "data.prompts: got '' for ddpo, expected a file"),
        ("grpo", {"data.pretraining": "pairs"}, "data.pretraining: got 'pairs' with grpo .*, which does not read"),
        ("refl", {"data.pretraining": "pairs", "train.beta": 0.0}, "data.pretraining: .* with refl and train.beta=0.0"),
        ("draft", {"data.pairs": "p.jsonl"}, "data.pairs: got 'p.jsonl' with draft, which does not read it"),
        ("dpo", {"data.prompts": "p.txt", "data.pairs": "p.jsonl"}, "data.prompts: got 'p.txt' with dpo, which does not"),
        ("dpo", {"data.pairs": "p.jsonl", "beta": 0.5}, "beta: got 0.5 with dpo, expected 0: preference.beta holds"),
        ("dpo", {"data.pairs": "p.jsonl", "reward.margin": 0.5}, "reward.margin: got 0.5 without data.images, expected 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(place, tmp_path, method, changes, message):
    with pytest.raises(UserError, match=message):
        online.train(config_of(place, method, **changes), tmp_path / "run", near)
    assert not (tmp_path / "run").exists()


def numpy_brightness(pictures):
    return jnp.asarray(np.asarray(pictures).mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda pictures: numpy_brightness(pictures), "reward: its gradient cannot be computed .*expected a JAX function"),
        (lambda pictures: jnp.ones(len(pictures)), "reward: its gradient is 0 everywhere on pictures of noise"),
        (lambda pictures: jnp.sqrt(pictures - 9).mean((1, 2, 3)), "reward: its gradient is not finite on pictures of noise"),
        (lambda pictures: pictures.mean(), r"reward: got shape \(\), expected \[2\], one number an image"),
    ],
)
def test_a_reward_without_a_gradient_is_refused(micro, reward, message):
    with pytest.raises(UserError, match=message):
        backprop.check_gradient(differentiable.of_function(reward), PROMPTS[:2], micro.config)


@pytest.mark.parametrize(
    ("method", "changes", "reward", "message"),
    [
        ("draft", {}, near, "reward: got a function for draft, expected a Differentiable"),
        ("draft", {}, differentiable.of_function(numpy_brightness), "reward: its gradient cannot be computed"),
        ("refl", {}, None, "reward.source: got '' for refl, expected a reward: --config.reward.source=rahf:DIR:overall"),
        ("dpo", {}, None, "preferences: got data.pairs='' and data.images='', expected one of them"),
        ("ddpo", {}, SMOOTH, "reward: got a Differentiable for ddpo, expected a function"),
        ("ddpo", {"model.folder": ""}, near, "model.folder: got '', expected a diffusers folder"),
        ("ddpo", {"train.batch_size": 4}, near, "train.batch_size: got 4, expected a multiple of 8"),
        ("ddpo", {"rollout.steps": 1}, near, "rollout.steps: got 1, expected at least 2 steps that add noise"),
        ("ddpo", {"data.held_out": "", "eval.prompts": 5}, near, "data.prompts: got 5 different prompts, expected more"),
    ],
)
def test_runs_that_cannot_be_are_refused(place, tmp_path, method, changes, reward, message):
    with pytest.raises(UserError, match=message):
        online.train(config_of(place, method, **changes), tmp_path / "run", reward)
    assert not (tmp_path / "run/config.json").exists()  # so that the mended command can be given


def test_prompts_are_held_out(place, tmp_path):
    """Of a file, or by chance, the same for a seed; none is trained on."""
    config = config_of(place, **{"eval.prompts": 1})
    assert online.texts_of(config, PROMPTS + PROMPTS[:2]) == online.Texts(PROMPTS, HELD_OUT[:1])
    (tmp_path / "some.txt").write_text("dog\na red cat\ncat\n")
    config.data.held_out = str(tmp_path / "some.txt")
    with pytest.raises(UserError, match=r"data.held_out: .*some.txt: 'a red cat' and 1 more are training prompts too"):
        online.texts_of(config, PROMPTS)
    config.data.held_out, config.eval.prompts = "", 2
    found = online.texts_of(config, PROMPTS)
    assert found == online.texts_of(config, PROMPTS) and len(found.held_out) == 2
    assert sorted(found.trained + found.held_out) == sorted(PROMPTS)
    config.seed = 1
    assert online.texts_of(config, PROMPTS) != found


def test_another_reward_cannot_go_on(place, ddpo_run, one_device):
    config = config_of(place, **{"sample.sampler": "ddpm"})
    other = lambda images, prompts: near(images, prompts)  # noqa: E731
    other.identity = "another"
    with pytest.raises(UserError, match=r"(?s)rewards: .* a run with other rewards:.*began with None, this is 'anoth"):
        online.train(config, ddpo_run, other, held_out=brightness)
