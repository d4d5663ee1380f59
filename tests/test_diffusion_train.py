"""Reward-weighted fine-tuning: the loss, the weights, the data, and whole runs of a tiny Stable Diffusion."""

import json
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import tiny_diffusion
from flax import linen as nn

from rahf import checkpoints, experiments, partitioning
from rahf import program as programs
from rahf.diffusion import finetuning, folder, inputs, sample, train
from rahf.predictor import Feedback
from rahf.reward.image_table import ImageTable
from richhf_data import schema

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax promotes freely
PROMPTS = ["red cat", "a cat", "a red cat"]


@pytest.fixture(scope="module")
def model_folder(unpacked):
    return tiny_diffusion.write_weights(unpacked("diffusion_tiny") / "first")


def table(place: pathlib.Path, count: int, seed: int, prompts=PROMPTS, size=16) -> str:
    place.mkdir()
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        PIL.Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(place / f"{i}.png")
        rows.append({"prompt": prompts[i % len(prompts)], "image": f"{i}.png"})
    (place / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place)


def brightness(images, prompts):
    return np.asarray(images, np.float32).mean((1, 2, 3)) / 255


class Critic:
    """Dark pixels are implausible, all equally misaligned. A pixel of its heatmaps is the mean of `by` x `by`."""

    def __init__(self, identity="critic", by=1, misaligned=0.5):
        self.identity, self.by, self.misaligned, self.calls = identity, by, misaligned, 0

    def predict(self, images, prompts):
        self.calls += 1
        dark = blocks(1 - np.asarray(images, np.float32).mean(-1) / 255, self.by)
        return Feedback({}, {"implausibility": dark, "misalignment": np.full_like(dark, self.misaligned)}, [], [])


def blocks(maps, by):
    """float32[B, h, w] -> the means of `by` x `by` pixels."""
    rows, height, width = maps.shape
    return maps.reshape(rows, height // by, by, width // by, by).mean((2, 4))


def config_of(model_folder, tmp_path, size=16, **changes):
    """A run of six steps on both kinds of rows, of pictures as large as the model's."""
    config = experiments.load("sd_reward")
    config.model.update(folder=str(model_folder), dtype="float32", remat=False)
    for name, count in (("images", 10), ("pretraining", 6)):
        place = tmp_path / name
        config.data[name] = str(place) if place.exists() else table(place, count, count, size=size)
    config.train.update(batch_size=8, num_steps=6)
    config.optimizer.update(warmup_steps=1, learning_rate=1e-2)
    config.sample.update(every=3, steps=2, prompts=("a red cat",))
    config.log_every, config.checkpoint_every, config.mesh.data = 2, 3, -1
    config.update_from_flattened_dict(changes)
    return config


# ---- Weights, loss --------------------------------------------------------------------------------------------------
def test_weights_follow_the_weighting():
    config, rewards = experiments.load("sd_reward").reward, np.array([0.1, 0.8, 0.4, 0.4])
    np.testing.assert_allclose(finetuning.weights_of(rewards, config), rewards / 0.8, rtol=1e-6)
    config.update(weighting="exponential", temperature=0.5)
    weights = finetuning.weights_of(rewards - 5, config)
    np.testing.assert_allclose(weights / weights[0], np.exp((rewards - 0.1) / 0.5), rtol=1e-5)
    config.update(weighting="top", fraction=0.5)
    np.testing.assert_array_equal(finetuning.weights_of(rewards, config), [0, 1, 1, 0])
    config.update(weighting="threshold", threshold=0.4)
    np.testing.assert_array_equal(finetuning.weights_of(rewards, config), [0, 1, 1, 1])


@pytest.mark.parametrize(
    ("rewards", "changes", "message"),
    [
        ([0.5, np.nan, np.inf], {}, "got 2 of 3 not finite"),
        ([0.5, 0.5], {}, "got 0.5 for all 2 images"),
        ([-0.5, 0.5], {}, "got -0.5, expected at least 0 .* take exponential"),
        ([0.1, 0.2], {"weighting": "threshold"}, "reward.threshold: got 0.5, expected at most 0.2"),
        ([0.1, 0.2], {"weighting": "softmax"}, "reward.weighting: got 'softmax', expected one of"),
    ],
)
def test_rewards_that_weight_nothing_are_refused(rewards, changes, message):
    config = experiments.load("sd_reward").reward
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        finetuning.weights_of(np.array(rewards), config)


def batch_of(config, size, seed=0):
    """Rows whose weights differ from device to device and from pixel to pixel, the last quarter pre-training pairs."""
    rng, shapes = np.random.default_rng(seed), inputs.batch_shapes(config, size, regions=True)
    batch = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    batch["region"] = rng.random(batch["region"].shape, np.float32) ** 4
    batch["pretraining"] = (np.arange(size) >= 3 * size // 4).astype(np.float32)
    batch["weight"] = (np.arange(size) ** 2 * (1 - batch["pretraining"])).astype(np.float32)
    return batch


def test_loss_is_the_weighted_denoising_error(model_folder):
    """Row by row and pixel by pixel, as the formula says, from the same random numbers."""
    held = folder.read(model_folder)
    batch, key, params = batch_of(held.config, 8), jax.random.key(1), {"unet": held.params["unet"]}
    region = batch.pop("region")
    loss_fn = jax.jit(finetuning.make_loss(held.config, beta=0.5, lora_alpha=1.0))

    def loss_of(batch):
        return loss_fn(params, batch, finetuning.normalisers_of(batch), key)[1]

    latent_key, time_key, noise_key = jax.random.split(key, 3)
    mean, logvar = batch["moments"][..., :4], batch["moments"][..., 4:]
    x0 = held.config.vae.scaling_factor * (mean + np.exp(logvar / 2) * np.asarray(jax.random.normal(latent_key, mean.shape)))
    noise, times = np.asarray(jax.random.normal(noise_key, x0.shape)), jax.random.randint(time_key, (8,), 0, 1000)
    alpha = held.config.schedule.alphas_cumprod[np.asarray(times)].reshape(8, 1, 1, 1)
    noised = (np.sqrt(alpha) * x0 + np.sqrt(1 - alpha) * noise).astype(np.float32)
    unet = jax.jit(lambda params, *args: held.config.modules["unet"].apply({"params": params}, *args))
    pixels = np.square(np.asarray(unet(params["unet"], noised, times, batch["context"])) - noise).mean(3)
    errors, weight, found = pixels.mean((1, 2)), batch["weight"], loss_of(batch)
    np.testing.assert_allclose(found["reward_weighted"], np.sum(weight * errors) / weight.sum(), rtol=1e-5)
    np.testing.assert_allclose(found["pretraining"], errors[6:].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["loss"], found["reward_weighted"] + 0.5 * errors[6:].mean(), rtol=1e-5)

    regional, both = loss_of(batch | {"region": region}), weight[:, None, None] * region
    np.testing.assert_allclose(regional["reward_weighted"], np.sum(both * pixels) / both.sum(), rtol=1e-5)
    assert abs(regional["reward_weighted"] / found["reward_weighted"] - 1) > 1e-3
    np.testing.assert_allclose(regional["pretraining"], found["pretraining"], rtol=1e-6)
    same = loss_of(batch | {"region": np.ones_like(region)})
    np.testing.assert_allclose(same["reward_weighted"], found["reward_weighted"], rtol=1e-6)
    assert loss_of(batch | {"region": np.zeros_like(region)})["reward_weighted"] == 0


def test_a_step_is_the_same_on_one_and_on_eight_devices(micro_folder, micro, tmp_path):
    """Each device has other weights of rows and pixels: an average of averages would differ. So must a step's moments."""
    config, results = config_of(micro_folder, tmp_path, **{"train.beta": 0.5}), []
    batch = batch_of(micro.config, 16)
    per_device = [np.sum(part["weight"]) for part in (jax.tree.map(lambda x, i=i: x[2 * i :][:2], batch) for i in range(8))]
    assert len(set(per_device)) > 4
    for devices, model_axis in ((1, 1), (8, 2)):
        config.mesh.model = model_axis
        mesh = partitioning.mesh_of(config.mesh, jax.devices()[:devices])
        training = programs.assemble(finetuning.program(micro.config, config, regions=True), config, mesh)
        params = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), {"unet": micro.params["unet"]}, training.params)
        step = jax.device_put(np.int32(2), training.state["step"].sharding)
        state, metrics = training.step(training.init_state(params) | {"step": step}, training.place(batch))
        results.append(jax.device_get((metrics, state["opt_state"][1][0].mu["unet"])))
    (one, one_moments), (eight, eight_moments) = results
    for name in ("loss", "reward_weighted", "pretraining", "gradient_norm"):
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(eight_moments), jax.tree.leaves(one_moments), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(np.abs(theirs).max(), 1e-4))


def test_lora_begins_as_nothing_and_adds_a_product(model_folder):
    held = folder.read(model_folder)
    lora = jax.jit(lambda key: nn.unbox(finetuning.initial_params(held.config, 2, key))["lora"])(jax.random.key(0))
    params = {"unet": held.params["unet"], "lora": lora}
    same = finetuning.merged(params, alpha=4.0)
    jax.tree.map(np.testing.assert_array_equal, same, params["unet"])
    assert len(params["lora"]) == sum("/to_" in "/" + name for name in params["lora"]) > 0
    name, added = next(iter(params["lora"].items()))
    added["up"] = added["up"] + 1
    kernel, before = finetuning.merged(params, alpha=4.0), params["unet"]
    for part in name.split("/"):
        kernel, before = kernel[part], before[part]
    product = np.asarray(added["down"]) @ np.asarray(added["up"])
    np.testing.assert_allclose(kernel["kernel"], before["kernel"] + 4.0 / 2 * product, rtol=1e-5, atol=1e-6)


# ---- Data -----------------------------------------------------------------------------------------------------------
def rows_of(weight, moments=0.0, region=None):
    weight = np.array(weight, np.float32)
    moments = np.full((len(weight), 2, 2, 8), moments, np.float32)
    return inputs.Rows(moments, np.zeros(len(weight), np.int32), weight, region)


def test_each_row_comes_once_an_epoch_and_weightless_ones_never():
    rows = rows_of([1, 0, 2, 3, 0, 1])
    drawn = np.concatenate([rows.drawn(0, 0, first, 2) for first in range(0, 12, 2)])
    for epoch in np.split(drawn, 3):
        assert sorted(epoch) == [0, 2, 3, 5]
    assert len({tuple(epoch) for epoch in np.split(drawn, 3)}) > 1


def test_batches_are_a_function_of_the_step_and_divide_among_processes(model_folder, tmp_path):
    config = config_of(model_folder, tmp_path, **{"train.pretraining_share": 0.25, "train.text_dropout": 0.5})
    region = np.repeat(np.array([1, 2, 3], np.float32) / 4, 4).reshape(3, 2, 2)
    own, pretraining = rows_of([1, 2, 3], 1.0, region), rows_of([1] * 5, 2.0)
    contexts = np.arange(2, dtype=np.float32).reshape(2, 1, 1)

    def take(rows, start):
        return next(inputs.batches(own, pretraining, contexts, config, np.array(rows), start))

    whole, halves = take(range(8), 3), [take(range(4), 3), take(range(4, 8), 3)]
    stream = inputs.batches(own, pretraining, contexts, config, np.arange(8), 0)
    fourth = [next(stream) for _ in range(4)][3]
    for name in whole:
        np.testing.assert_array_equal(whole[name], fourth[name])
        np.testing.assert_array_equal(whole[name], np.concatenate([half[name] for half in halves]))
    np.testing.assert_array_equal(whole["pretraining"], [0] * 6 + [1] * 2)
    np.testing.assert_array_equal(whole["moments"][:, 0, 0, 0], [1] * 6 + [2] * 2)
    assert (whole["weight"][:6] > 0).all() and not whole["weight"][6:].any()
    np.testing.assert_array_equal(whole["region"][:, 1, 1], [*whole["weight"][:6] / 4, 1, 1])
    assert "region" not in next(inputs.batches(rows_of([1, 2, 3]), pretraining, contexts, config, np.arange(8), 3))
    dropped = np.mean([next(stream)["context"].mean() for _ in range(100)])  # the last text, 1, is the empty prompt
    assert abs(dropped - 0.5) < 0.1


def test_kept_arrays_go_on_where_a_killed_run_left_them(tmp_path):
    computed = []

    def parts(done, until):
        for row in range(done, 20):
            if row == until:
                raise KeyboardInterrupt
            computed.append(row)
            yield np.full((1, 2), row, np.float32)

    with pytest.raises(KeyboardInterrupt):
        inputs.kept(tmp_path / "rows.npy", (20, 2), lambda done: parts(done, 13))
    array = inputs.kept(tmp_path / "rows.npy", (20, 2), lambda done: parts(done, None))
    np.testing.assert_array_equal(array[:, 0], np.arange(20))
    assert computed == [*range(13), *range(inputs.SAVE_EVERY, 20)]
    assert inputs.kept(tmp_path / "rows.npy", (20, 2), None).shape == (20, 2)  # whole: nothing is asked for


@pytest.mark.parametrize("damage", ["truncated", "deleted", "untold", "another_shape"])
def test_kept_arrays_that_are_not_whole_are_made_anew(tmp_path, damage):
    place, rows = tmp_path / "rows.npy", np.arange(1, 41, dtype=np.float32).reshape(20, 2)
    inputs.kept(place, (20, 2), lambda done: iter(rows[done:, None]))
    if damage == "truncated":
        place.write_bytes(place.read_bytes()[:-40])
    elif damage == "deleted":
        place.unlink()
    elif damage == "untold":
        place.with_suffix(".json").unlink()
    else:
        rows = rows[:10]
    np.testing.assert_array_equal(inputs.kept(place, rows.shape, lambda done: iter(rows[done:, None])), rows)


def test_kept_arrays_are_not_written_through_links(tmp_path):
    mine, rows = tmp_path / "mine", np.ones((20, 2), np.float32)
    mine.write_bytes(b"mine")
    for name, message in (("rows.npy", r"cache: .*rows.npy is a link, expected a file; delete it"), ("rows.lock", "links")):
        (tmp_path / name).symlink_to(mine)
        with pytest.raises((ValueError, OSError), match=message):
            inputs.kept(tmp_path / "rows.npy", rows.shape, lambda done: iter(rows[done:, None]))
        (tmp_path / name).unlink()
    (tmp_path / "rows.npy").hardlink_to(mine)
    inputs.kept(tmp_path / "rows.npy", rows.shape, lambda done: iter(rows[done:, None]))
    assert mine.read_bytes() == b"mine"


class Identified:
    """Brightness for the first images, another number from image `first` on."""

    def __init__(self, identity, first=1000):
        self.identity, self.first, self.calls, self._seen = identity, first, 0, 0

    def __call__(self, images, prompts):
        numbers = self._seen + np.arange(len(images))
        self.calls, self._seen = self.calls + 1, self._seen + len(images)
        return np.where(numbers < self.first, brightness(images, prompts), 0.25)


def test_other_images_do_not_share_a_cache(model_folder, tmp_path):
    """Tables of the same text hold other images."""
    held, mesh, found = folder.read(model_folder), partitioning.make_mesh(), []
    for seed in (10, 11):
        path = table(tmp_path / f"images_{seed}", 10, seed)
        data = inputs.Inputs.of(config_of(model_folder, tmp_path, **{"data.images": path}), held)
        moments = data.moments("images", tmp_path / "cache", mesh)
        found.append((np.asarray(moments), data.rewards(Identified("brightness"), tmp_path / "cache")))
    assert (tmp_path / "images_10/images.jsonl").read_text() == (tmp_path / "images_11/images.jsonl").read_text()
    assert not np.allclose(found[0][0], found[1][0]) and not np.allclose(found[0][1], found[1][1])


def test_rewards_are_cached_by_their_identity(model_folder, tmp_path, capfd):
    """Rewards that differ only after the first batch do not share a cache, and those without an identity have none."""
    count, cache = inputs.REWARDED_AT_ONCE + 6, tmp_path / "cache"
    config = config_of(model_folder, tmp_path, **{"data.images": table(tmp_path / "many", count, 0)})
    data = inputs.Inputs.of(config, folder.read(model_folder))
    one, again = (Identified("one") for _ in range(2))
    other = Identified("other", first=inputs.REWARDED_AT_ONCE)
    found = [data.rewards(reward, cache) for reward in (one, other, again)]
    np.testing.assert_array_equal(found[0][: inputs.REWARDED_AT_ONCE], found[1][: inputs.REWARDED_AT_ONCE])
    assert (found[0] != found[1])[inputs.REWARDED_AT_ONCE :].all()
    np.testing.assert_array_equal(found[0], found[2])
    assert (one.calls, other.calls, again.calls) == (2, 2, 0)

    files = sorted(cache.iterdir())
    capfd.readouterr()
    np.testing.assert_array_equal(data.rewards(brightness, cache), found[0])
    assert sorted(cache.iterdir()) == files and "rewards: 100%" in capfd.readouterr().err


def test_heatmaps_are_of_what_the_unet_sees_and_cached_by_the_critics_identity(model_folder, tmp_path, capsys):
    """Pictures of other sizes are cut first; heatmaps are averaged over the grid's cells, or interpolated."""
    cache, large = tmp_path / "cache", table(tmp_path / "large", 10, 0, size=20)
    config = config_of(model_folder, tmp_path, **{"data.images": large, "data.resize": True})
    data = inputs.Inputs.of(config, folder.read(model_folder))
    one, other, again, nameless = Critic("one"), Critic("other", by=4), Critic("one"), Critic(None)
    found = [data.heatmaps(critic, cache) for critic in (one, other, again)]
    files = sorted(cache.iterdir())
    np.testing.assert_array_equal(data.heatmaps(nameless, cache), found[0])
    assert [critic.calls for critic in (one, other, again, nameless)] == [1, 1, 0, 1] and sorted(cache.iterdir()) == files
    seen = np.stack(list(inputs.decoded(data.tables["images"], 16, resize=True)))
    dark = 1 - seen.astype(np.float32).mean(-1) / 255
    np.testing.assert_allclose(found[0][..., 0], blocks(dark, 2), atol=1e-6)
    np.testing.assert_array_equal(found[2], found[0])
    np.testing.assert_allclose(found[1][:, ::7, ::7, 0], blocks(dark, 4)[:, ::3, ::3], atol=1e-6)  # the corners stay
    assert all((maps[..., 1] == 0.5).all() for maps in found)

    config.region.update(heatmaps=schema.HEATMAPS, power=2.0)
    weight, region, record = train.weights_of(config, data, None, one, cache)
    np.testing.assert_allclose(region, (1 - found[0][..., 0]) ** 2 / 4, rtol=1e-5)
    assert (weight == 1).all() and set(record) == {"images", "regions"}
    printed = capsys.readouterr().out
    assert "weights of 10 images: 1 each, without a reward\nregions of 10 images: mean weight 0.0" in printed
    assert ", 100.0% of the pixels below one half" in printed
    with pytest.raises(ValueError, match="region: got weights of 0 for all pixels of 10 images"):
        train.weights_of(config, data, None, Critic("hopeless", misaligned=1.0), cache)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((1, 8, 8)), r"critic: misalignment: got shape \(1, 8, 8\), expected float\[2, h, w\] in \[0, 1\]"),
        (np.full((2, 8, 8), np.nan), "critic: misalignment: got values from nan to nan"),
        (np.full((2, 8, 8), 1.5), "critic: misalignment: got values from 1.5 to 1.5"),
        (None, "critic: misalignment: got NoneType"),
    ],
)
def test_a_critic_that_gives_no_heatmaps_is_refused(maps, message):
    class Faulty:
        def predict(self, images, prompts):
            return Feedback({}, {"implausibility": np.zeros((2, 8, 8)), "misalignment": maps}, [], [])

    with pytest.raises(ValueError, match=message):
        inputs.heatmaps_of(Faulty(), np.zeros((2, 16, 16, 3), np.uint8), PROMPTS[:2], 8)


# ---- Runs -----------------------------------------------------------------------------------------------------------
def test_a_killed_run_ends_with_the_same_bits(micro_folder, tmp_path, monkeypatch, capsys):
    config = config_of(micro_folder, tmp_path, size=4)
    train.train(config, tmp_path / "whole", brightness, critic=Critic())
    printed = capsys.readouterr().out
    means = [np.asarray(PIL.Image.open(picture)).mean() / 255 for picture in (tmp_path / "images").glob("*.png")]
    mean = np.mean(means)
    assert f"rewards of 10 images: mean {mean:.4g}, {min(means):.4g} to {max(means):.4g}; raw weights" in printed
    assert f"regions of 10 images: mean weight {mean:.4g}, " in printed

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sample, "generate", killed)  # what follows the checkpoint of step 3
        train.train(config, tmp_path / "killed", brightness, critic=Critic())
    train.train(config, tmp_path / "killed", brightness, critic=Critic())
    assert "resumed from step 3" in capsys.readouterr().out
    other = rf"(?s)other rewards or regions:.*mean: it began with {mean:.3f}.*this is {2 * mean:.3f}"
    with pytest.raises(ValueError, match=other):
        train.train(config, tmp_path / "killed", lambda images, prompts: 2 * brightness(images, prompts), critic=Critic())
    for critic in (Critic("other", by=4), None):
        with pytest.raises(ValueError, match=r"(?s)a run with other rewards.*regions: it began with '[0-9a-f]{16}', this"):
            train.train(config, tmp_path / "killed", brightness, critic=critic)
    unets = [tmp_path / name / "model/unet/diffusion_pytorch_model.safetensors" for name in ("whole", "killed")]
    assert unets[0].read_bytes() == unets[1].read_bytes()

    trained, start = folder.read(tmp_path / "whole/model"), folder.read(micro_folder)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), trained.params, start.params)
    assert all(jax.tree.leaves(changed["unet"])) and not any(jax.tree.leaves([changed["vae"], changed["text_encoder"]]))
    grids = [PIL.Image.open(tmp_path / "whole/samples" / f"step_0000000{step}.png") for step in (3, 6)]
    images = sample.to_uint8(sample.generate(trained, ["a red cat"], seed=0, steps=2, sampler="dpm++"))
    np.testing.assert_allclose(np.asarray(grids[1], int), images[0], atol=1)  # the last grid shows the model that is written
    assert (np.asarray(grids[0]) != np.asarray(grids[1])).any()


def test_pairs_alone_train_and_lora_is_written_merged(micro_folder, tmp_path):
    """And it changes the attention alone."""
    config = config_of(micro_folder, tmp_path, size=4, **{"lora.rank": 2, "data.images": ""})
    config.train.num_steps = 3
    train.train(config, tmp_path / "run")
    before, after = (
        safetensors.numpy.load_file(pathlib.Path(place) / "unet/diffusion_pytorch_model.safetensors")
        for place in (micro_folder, tmp_path / "run/model")
    )
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all(any(f".{part}." in name for part in finetuning.ADAPTED) for name in changed)


def test_an_opened_model_reads_as_the_whole_one(model_folder):
    held, opened = folder.read(model_folder), folder.opened(model_folder)
    for part in ("unet", "vae", "text_encoder"):
        read = jax.tree.map(lambda tensor: tensor.read(), opened.params[part])
        jax.tree.map(np.testing.assert_array_equal, read, held.params[part])
    text = "text_encoder"
    assert inputs.digests(opened.params[text]) == sorted(checkpoints.digests(held.params[text]).items())


@pytest.mark.parametrize(
    ("changes", "reward", "message"),
    [
        ({"model.folder": ""}, brightness, "model.folder: got '', expected a diffusers folder"),
        ({"data.images": "", "data.pretraining": ""}, brightness, "data: got neither images nor pretraining"),
        ({"train.beta": 0.0}, brightness, "train.beta: got 0.0 with data.pretraining="),
        ({"train.batch_size": 9}, brightness, "train.batch_size: got 9, expected a multiple of 8"),
        ({"train.text_dropout": 1.0}, brightness, "train.text_dropout: got 1.0"),
        ({"train.pretraining_share": 0.01}, brightness, "train.pretraining_share: got 0.01, 0 rows of train.batch_size=8"),
        ({"model.dtype": "float16"}, brightness, "model.dtype: got 'float16'"),
        ({"sample.steps": 2000}, brightness, "steps: got 2000 for dpm"),
        ({"optimizer.freeze": ("unett",)}, brightness, "optimizer.freeze: nothing lies under 'unett'"),
        ({}, None, "reward.source: got '' for data.images, expected .* or a critic: --config.region.source=rahf:DIR"),
        ({"region.source": "reward:run"}, None, "critic: got 'reward:run', expected rahf:DIR, a RAHF with heatmaps"),
        ({"region.source": "rahf:nowhere"}, None, "nowhere has no config.json"),
        ({"region.source": "rahf:run", "data.images": ""}, None, "region: got a critic, but no data.images"),
        ({"region.heatmaps": ("implausible",)}, brightness, r"region.heatmaps: got \('implausible',\), expected one"),
        ({"region.heatmaps": ("misalignment",) * 2}, brightness, r"region.heatmaps: got .*, each once"),
        ({"region.heatmaps": ()}, brightness, r"region.heatmaps: got \(\), expected one or more"),
        ({"reward.source": "reward:nowhere"}, None, "nowhere"),
        ({}, lambda images, prompts: np.ones((len(images), 2)), r"shape .*\(10, 2\)|\[10, 2\]"),
        ({}, lambda images, prompts: np.full(len(images), np.nan), "finite"),
        ({}, lambda images, prompts: np.ones(len(images)), "got 1 for all 10 images"),
    ],
)
def test_runs_that_cannot_be_are_refused(model_folder, tmp_path, changes, reward, message):
    with pytest.raises(ValueError, match=message):
        train.train(config_of(model_folder, tmp_path, **changes), tmp_path / "run", reward)
    assert not (tmp_path / "run/config.json").exists()  # so that the mended command can be given


def test_pictures_and_captions_that_do_not_fit_are_named(model_folder, tmp_path):
    long = ["a cat", "cat " * 80]
    config = config_of(model_folder, tmp_path, **{"data.images": table(tmp_path / "long", 2, 0, prompts=long)})
    with pytest.raises(ValueError, match=r"images.jsonl: row 2: prompt: 'cat cat.* 77; shorten it.*truncate_long_prompts"):
        train.train(config, tmp_path / "run", brightness)
    config.data.images = table(tmp_path / "large", 2, 0, size=24)
    with pytest.raises(ValueError, match=r"row 1: image: got 24 x 24 pixels, expected 16 x 16.*--config.data.resize=True"):
        train.train(config, tmp_path / "run", brightness)
    assert next(inputs.decoded(ImageTable(config.data.images), 16, resize=True)).shape == (16, 16, 3)
    with pytest.raises(ValueError, match="inpainting model"):
        finetuning.model_config(config, folder.Config(unet=folder.UNetConfig(in_channels=9)))
