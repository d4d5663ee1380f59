"""The losses of online fine-tuning against numpy, diffusers, torch and finite differences, on one and on eight devices."""

import copy
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_diffusion
import tiny_model
from flax import linen as nn

from rahf import experiments, partitioning
from rahf import program as programs
from rahf.diffusion import finetuning, sample, schedule
from rahf.diffusion.online import backprop, policy, preferences
from rahf.models import cpu
from rahf.reward import differentiable
from richhf_data import checked, schema
from richhf_data.errors import UserError

STEPS, GUIDANCE, ROWS, SEED = 4, 2.0, 8, 3
PROMPTS = ["red cat", "a cat"]
TIMES = [751, 501, 251, 1]  # of four steps of 1,000
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.fixture(scope="module")
def networks(micro):
    """The UNet's prediction for one text each, and the VAE's decoder, jitted. Of inputs in float64 so are the results."""

    @functools.partial(jax.jit, static_argnums=0)
    def unet(config, params, x, times, context):
        return config.modules["unet"].apply({"params": params}, x, times, context)

    @functools.partial(jax.jit, static_argnums=0)
    def decode(config, params, latents):
        return config.modules["vae"].apply({"params": params}, latents, method="decode_latents")

    return unet, decode


def config_of(**changes):
    config = experiments.load("sd_online")
    config.rollout.update(steps=STEPS, guidance_scale=GUIDANCE)
    config.lora.rank = 0
    config.update_from_flattened_dict(changes)
    return config


def velocity(model):
    """The same model, taken for one that predicts the velocity, whose last step reaches alpha = 1."""
    return dataclasses.replace(
        model, schedule=dataclasses.replace(model.schedule, prediction_type="v_prediction", set_alpha_to_one=True)
    )


@pytest.fixture(scope="module")
def contexts():
    """float32[ROWS + 1, 16, 12]: texts, then the empty one."""
    return np.random.default_rng(5).standard_normal((ROWS + 1, 16, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def ways(micro, contexts):
    """(model, regional, devices, parts) -> the way of ROWS pictures, the pictures and whether they are finite."""

    @functools.cache
    def of(name, regional, devices=1, parts=1):
        model = {"noise": micro.config, "velocity": velocity(micro.config)}[name]
        config = config_of(**{"dense.weight": float(regional), "train.accumulation_steps": parts})
        mesh = partitioning.make_mesh(devices=jax.devices()[:devices])
        draw = policy.draw(model, config, policy.steps_of(model.schedule, STEPS), mesh)
        params = {"unet": micro.params["unet"]}
        texts, empty, numbers = contexts[:-1], contexts[-1:], np.arange(ROWS, dtype=np.int32)
        return jax.device_get(draw(params, micro.params["vae"], texts, empty, numbers, sample.seed_data(SEED)))

    return of


def guided(predict, contexts, x, times):
    """Classifier-free guidance in numpy. predict: (x, times, context)."""
    empty = np.broadcast_to(contexts[-1:], contexts[:-1].shape)
    times = np.broadcast_to(np.asarray(times, np.int32), len(x))
    without, found = (np.asarray(predict(x, times, text), np.float64) for text in (empty, contexts[:-1]))
    return without + GUIDANCE * (found - without)


def transition(name, x, prediction, time):
    """Mean and deviation of DDIM's step with eta = 1 (arXiv 2010.02502, equations 12 and 16). time: int, or int[B]."""
    time = np.asarray(time).reshape(-1, 1, 1, 1)
    alpha, before = ALPHAS[time], time - 1000 // STEPS
    last = 1.0 if name == "velocity" else ALPHAS[0]
    to = np.where(before >= 0, ALPHAS[before], last)
    if name == "velocity":
        x0 = np.sqrt(alpha) * x - np.sqrt(1 - alpha) * prediction
        noise = np.sqrt(alpha) * prediction + np.sqrt(1 - alpha) * x
    else:
        x0, noise = (x - np.sqrt(1 - alpha) * prediction) / np.sqrt(alpha), prediction
    sigma = np.sqrt((1 - to) / (1 - alpha)) * np.sqrt(1 - alpha / to)
    return np.sqrt(to) * x0 + np.sqrt(1 - to - sigma**2) * noise, sigma


def normal_log_prob(x, mean, sigma):
    return -np.square(x - mean) / (2 * sigma**2) - np.log(sigma * np.sqrt(2 * np.pi))


# ---- The sampler's transitions --------------------------------------------------------------------------------------
def noise_of_step(i):
    keys = sample.image_keys(sample.seed_data(SEED), np.arange(ROWS))
    return np.asarray(sample.step_noise(keys, i, (4, 4, 4)))


@pytest.mark.parametrize("name", ["noise", "velocity"])
def test_transitions_are_ddims(micro, networks, contexts, ways, name):
    """Means, deviations, samples, log-probabilities. One model's are of pixels, the other's of pictures."""
    regional = name == "velocity"
    way, images, finite = ways(name, regional)
    latents = way["latents"].astype(np.float64)
    assert latents.shape == (ROWS, STEPS + 1, 4, 4, 4) and finite.all()
    model = {"noise": micro.config, "velocity": velocity(micro.config)}[name]
    shapes = policy.way_shapes(model, config_of(**{"dense.weight": float(regional)}), ROWS)
    assert {key: array.shape for key, array in way.items()} == {key: shape for key, (shape, _) in shapes.items()}
    initial = sample.noise(sample.image_keys(sample.seed_data(SEED), np.arange(ROWS)), sample.INITIAL, (4, 4, 4))
    np.testing.assert_array_equal(way["latents"][:, 0], initial)
    predict = functools.partial(networks[0], model, micro.params["unet"])
    for i, time in enumerate(TIMES):
        x, after = latents[:, i], latents[:, i + 1]
        mean, sigma = transition(name, x, guided(predict, contexts, way["latents"][:, i], time), time)
        np.testing.assert_allclose(after, mean + sigma * noise_of_step(i), atol=3e-6 * np.abs(after).max())
        if sigma > 0:
            expected = normal_log_prob(after, mean, sigma).mean((3,) if regional else (1, 2, 3))
            np.testing.assert_allclose(way["log_prob"][:, i], expected, atol=2e-4)
    assert (sigma == 0) == (name == "velocity")
    drawn = networks[1](model, micro.params["vae"], way["latents"][:, -1])
    np.testing.assert_allclose(images.astype(int), sample.to_uint8(np.asarray(drawn)), atol=1)
    assert images.dtype == np.uint8 and images.std() > 1


def test_steps_without_noise_are_not_trained(micro):
    for model, count in ((micro.config, 4), (velocity(micro.config), 3)):
        steps = policy.steps_of(model.schedule, STEPS)
        assert policy.trained_of(config_of(), steps) == np.count_nonzero(steps.noise) == count
    assert policy.trained_of(config_of(**{"policy.steps": 0.5}), steps) == 2
    assert policy.trained_of(config_of(**{"policy.steps": 0.01}), steps) == 1
    with pytest.raises(UserError, match=r"rollout.steps: got 2, expected at least 2 steps that add noise"):
        policy.steps_of(model.schedule, 2)


def test_transitions_are_diffusers(micro_folder, contexts, ways, torch):
    """The whole pipeline with eta = 1 and our noise; and its scheduler's means and deviations on our latents."""
    diffusers = pytest.importorskip("diffusers")
    way, images, _ = ways("noise", False)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(micro_folder)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.check_inputs = lambda *args, **kwargs: None  # refuses pictures of 4 x 4
    kept = []

    def keep(pipe, i, t, values):
        kept.append(tiny_diffusion.nhwc(values["latents"]))
        return {}

    options = {"prompt_embeds": torch.from_numpy(contexts[:-1]), "latents": tiny_diffusion.nchw(way["latents"][:, 0])}
    options["negative_prompt_embeds"] = torch.from_numpy(contexts[-1:]).repeat(ROWS, 1, 1)
    options |= {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "eta": 1.0, "height": 4, "width": 4}
    with tiny_diffusion.drawn(map(noise_of_step, range(STEPS))):
        theirs = pipeline(**options, output_type="np", callback_on_step_end=keep).images
    np.testing.assert_allclose(way["latents"][:, 1:].swapaxes(0, 1), np.stack(kept), atol=2e-5)
    np.testing.assert_allclose(images, theirs * 255, atol=0.6)

    scheduler, unet = pipeline.scheduler, pipeline.unet
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == TIMES
    for i, time in enumerate(TIMES):
        with torch.no_grad():
            prediction = guided(
                lambda x, times, text: tiny_diffusion.nhwc(
                    unet(tiny_diffusion.nchw(x), torch.from_numpy(times.copy()), torch.from_numpy(text.copy())).sample
                ),
                contexts, way["latents"][:, i], time,
            )  # fmt: skip
        x, after = (tiny_diffusion.nchw(way["latents"][:, i + k].astype(np.float64)) for k in (0, 1))
        prediction, still = tiny_diffusion.nchw(prediction), torch.zeros_like(x)
        mean = scheduler.step(prediction, time, x, eta=1.0, variance_noise=still).prev_sample
        sigma = scheduler._get_variance(time, time - 1000 // STEPS) ** 0.5
        expected = torch.distributions.Normal(mean, sigma).log_prob(after).mean((1, 2, 3))
        np.testing.assert_allclose(way["log_prob"][:, i], expected, atol=2e-4)


# ---- Policy gradients -----------------------------------------------------------------------------------------------
NOW, REFERENCE, BETA = 1.03, 0.95, 1.0  # the parameters of the update and of the reference, times those that drew
CLIP = {False: 0.01, True: 0.02}  # by regional; some ratios are beyond it, on both sides
TRAINED = 3  # of four steps


def scaled(factor, params):
    return jax.tree.map(lambda x: np.asarray(x) * np.float32(factor), params)


@pytest.fixture(scope="module")
def recorded(ways, contexts):
    """regional -> a batch: the way of ROWS pictures and three of its steps, advantages of both signs, weights of tokens."""

    @functools.cache
    def of(regional):
        rng, (way, _, _) = np.random.default_rng(1), ways("noise", regional)
        steps = rng.permuted(np.tile(np.arange(STEPS), (ROWS, 1)), axis=1)[:, :TRAINED].astype(np.int32)
        advantage = rng.standard_normal((ROWS, 4, 4) if regional else ROWS).astype(np.float32)
        words = rng.uniform(0, 2, (ROWS, 16)).astype(np.float32)
        batch = way | {"steps": steps, "advantage": advantage, "context": contexts[:-1]}
        return batch | ({"words": words} if regional else {})

    return of


def policy_config(regional, **changes):
    dense = {"dense.weight": 0.5, "dense.words": 0.5} if regional else {}
    options = {"policy.steps": TRAINED / STEPS, "policy.clip": CLIP[regional] / (4 if regional else 1), "beta": BETA}
    return config_of(**dense, **options, **changes)


@pytest.fixture(scope="module")
def policy_gradient(micro, contexts):
    """(regional, params, batch) -> loss, metrics and gradient of all turns; compiled once for each kind."""

    @functools.cache
    def compiled(regional):
        config = policy_config(regional)
        loss_fn = policy.make_loss(micro.config, config, policy.steps_of(micro.config.schedule, STEPS))

        def of(params, fixed, batch, turn):
            def loss(params):
                return loss_fn({"unet": params} | fixed, batch | {"turn": turn}, {"rows": jnp.float32(ROWS)}, None)

            return jax.value_and_grad(loss, has_aux=True)(params)

        return jax.jit(of)

    def total(regional, unet, reference, batch):
        fixed = {"reference": reference, "empty": contexts[-1:]}
        found = [compiled(regional)(unet, fixed, batch, np.int32(turn)) for turn in range(TRAINED)]
        (loss, metrics), gradient = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *found)
        return loss, metrics, gradient

    return total


@pytest.mark.parametrize("regional", [False, True])
def test_the_policys_loss_is_the_papers(micro, networks, contexts, recorded, policy_gradient, regional):
    """With guidance, clipping and KL: PPO's clipped loss, step by step from the UNet's outputs; also of each pixel."""
    batch, params = recorded(regional), micro.params["unet"]
    unet, reference = scaled(NOW, params), scaled(REFERENCE, params)
    loss, metrics, _ = policy_gradient(regional, unet, reference, batch)
    losses, distances, ratios, rows = [], [], [], np.arange(ROWS)
    advantage = batch["advantage"].astype(np.float64)
    for turn in range(TRAINED):
        step = batch["steps"][:, turn]
        x, after = (batch["latents"][rows, step + k] for k in (0, 1))
        time = np.array(TIMES)[step]
        mean, other = (
            transition("noise", x, guided(functools.partial(networks[0], micro.config, of), contexts, x, time), time)[0]
            for of in (unet, reference)
        )
        sigma = transition("noise", x, x, time)[1]
        new = normal_log_prob(after, mean, sigma).mean((3,) if regional else (1, 2, 3))
        ratio = np.exp(new - batch["log_prob"][rows, step])
        clipped = np.clip(ratio, 1 - CLIP[regional], 1 + CLIP[regional])
        losses.append(-np.minimum(advantage * ratio, advantage * clipped))  # PPO maximises the lesser one
        distances.append(np.square(mean - other) / (2 * sigma**2))  # KL of two normal distributions of one deviation
        ratios.append(ratio)
    distance = np.mean(distances)
    share = np.mean(np.abs(np.array(ratios) - 1) > CLIP[regional])
    assert 0.2 < share < 0.8 and np.min(ratios) < 1 - CLIP[regional] and np.max(ratios) > 1 + CLIP[regional]
    np.testing.assert_allclose(metrics["policy"], np.mean(losses), atol=2e-5)
    np.testing.assert_allclose(metrics["kl"], distance, rtol=1e-4)
    np.testing.assert_allclose(metrics["clipped"], share, atol=1e-6)
    np.testing.assert_allclose(metrics["ratio_deviation"], np.mean(np.abs(np.array(ratios) - 1)), rtol=1e-3)
    np.testing.assert_allclose(loss, np.mean(losses) + BETA * distance, atol=2e-5)
    assert BETA * distance > 0.1


@pytest.mark.parametrize("regional", [False, True])
def test_the_policys_gradient_is_that_of_torch(micro, micro_folder, contexts, recorded, policy_gradient, torch, regional):
    """Through diffusers' UNet; with regional advantages, a hook weighs the gradients of the texts' keys and values."""
    diffusers = pytest.importorskip("diffusers")
    batch, params, clip = recorded(regional), micro.params["unet"], CLIP[regional]
    loss, _, gradient = policy_gradient(regional, scaled(NOW, params), scaled(REFERENCE, params), batch)
    unet = diffusers.UNet2DConditionModel.from_pretrained(micro_folder / "unet")
    reference, weights = copy.deepcopy(unet).requires_grad_(False), []
    for network, factor in ((unet, NOW), (reference, REFERENCE)):
        for tensor in network.parameters():
            tensor.data.mul_(factor)

    def weigh(module, given, found):
        return found.detach() + weights[-1][..., None] * (found - found.detach()) if weights else found

    hooked = [module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len(hooked) == 2
    for module in hooked:
        module.register_forward_hook(weigh)
    given = {name: torch.from_numpy(np.array(array)) for name, array in batch.items()}
    texts, rows, losses = torch.from_numpy(contexts), torch.arange(ROWS), []

    def mean_of(network, x, time, alpha, to, sigma):
        x = x.movedim(-1, 1)
        without = network(x, time, texts[-1:].repeat(ROWS, 1, 1)).sample
        if regional:
            weights.append(given["words"])
        found = network(x, time, texts[:-1]).sample
        weights.clear()
        noise = (without + GUIDANCE * (found - without)).movedim(1, -1)
        x0 = (x.movedim(1, -1) - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return to.sqrt() * x0 + (1 - to - sigma**2).sqrt() * noise

    for turn in range(TRAINED):
        step = given["steps"][:, turn].long()
        x, after = (given["latents"][rows, step + k] for k in (0, 1))
        time = torch.tensor(TIMES)[step]
        alphas = torch.from_numpy(ALPHAS)
        alpha, to = (alphas[times.clamp(min=0)].reshape(-1, 1, 1, 1) for times in (time, time - 1000 // STEPS))
        sigma = ((1 - to) / (1 - alpha) * (1 - alpha / to)).sqrt()
        numbers = [value.float() for value in (alpha, to, sigma)]
        mean, other = (mean_of(network, x, time, *numbers) for network in (unet, reference))
        new = torch.distributions.Normal(mean, numbers[2]).log_prob(after).mean((3,) if regional else (1, 2, 3))
        ratio = (new - given["log_prob"][rows, step]).exp()
        gain = torch.minimum(given["advantage"] * ratio, given["advantage"] * ratio.clamp(1 - clip, 1 + clip))
        losses.append(-gain.mean() + BETA * ((mean - other) ** 2 / (2 * numbers[2] ** 2)).mean())
    total = torch.stack(losses).mean()
    total.backward()
    np.testing.assert_allclose(loss, total.item(), atol=2e-5)
    tiny_diffusion.check_gradients(micro.config, gradient, unet, 1e-3)


def test_with_lora_the_reference_is_the_unet_below_it(micro, contexts, recorded, policy_gradient):
    batch, unet, rng = recorded(False), micro.params["unet"], np.random.default_rng(2)
    of = policy.program(micro.config, policy_config(False, **{"lora.rank": 2, "lora.alpha": 4.0}))
    assert of.frozen == ("unet",) and list(of.constants) == ["empty"]
    shapes = jax.eval_shape(of.init, jax.random.key(0))["lora"]
    lora = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), nn.unbox(shapes))
    params, loss = {"unet": unet, "lora": lora, "empty": contexts[-1:]}, jax.jit(of.loss)
    found = [loss(params, batch | {"turn": np.int32(turn)}, of.normalisers(batch), None)[1] for turn in range(TRAINED)]
    _, expected, _ = policy_gradient(False, finetuning.merged(params, 4.0), unet, batch)
    assert expected["kl"] > 1e-3
    for name, value in expected.items():
        np.testing.assert_allclose(sum(metrics[name] for metrics in found), value, rtol=1e-3, atol=1e-5)


def test_one_step_of_each_picture_can_be_trained(micro, recorded):
    """And as many turns as steps."""
    batch = recorded(False)
    for share, turns in ((0.25, 1), (0.5, 2)):
        of = policy.program(micro.config, config_of(**{"policy.steps": share}))
        assert of.turns == turns
        one = batch | {"steps": batch["steps"][:, :turns]} | ({"turn": np.int32(0)} if turns > 1 else {})
        params = {"unet": micro.params["unet"], "empty": batch["context"][:1]}
        loss, _ = jax.eval_shape(of.loss, params, one, of.normalisers(batch), jax.random.key(0))
        assert loss.shape == ()
        shapes = {name: shape for name, (shape, _) in of.batch_shapes(ROWS).items()}
        assert shapes == {name: array.shape for name, array in one.items() if name != "turn"}


# ---- The reward's gradient ------------------------------------------------------------------------------------------
WEIGHTS = np.array([0.7, -0.4, 1.1])  # of the mean colour in the reward
HEATMAP = np.array([[0.1, 0.8], [0.4, 0.0]])


def reward_of(weights, images, rows):
    """Mean colours that a weighted sum of brings near to the prompt's number."""
    return 1 - jnp.square(images.mean((1, 2)) @ weights - rows)


def heatmaps_of(params, images, rows):
    """Of 2 x 2 cells: the darker, the more flawed."""
    cells = images.mean(-1).reshape(-1, 2, 2, 2, 2).mean((2, 4))
    return rows[:, None, None] * params[None] / (1 + jnp.exp(cells))


REWARD = differentiable.Differentiable(reward_of, WEIGHTS, lambda prompts: np.array([len(p) / 9 for p in prompts]))
CRITIC = backprop.Critic(heatmaps_of, HEATMAP, lambda prompts: np.array([0.5 + 0.1 * len(p) for p in prompts]))
METHODS = {
    "draft": {"gradient.last": 2, "rollout.sampler": "dpm++", "gradient.ceiling": 0.9, "beta": 0.5},
    "draft, noised again, where flawed": {"gradient.noisings": 2, "beta": 0.5, "dense.weight": 0.75},
    "refl": {"method": "refl", "gradient.start": 0.5, "data.pretraining": "pairs", "train.beta": 0.3},
}


@pytest.fixture
def in_float64(micro, monkeypatch):
    """The model's configuration and parameters in float64, in which everything computes as long as this is used."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)  # what the modules compute in, beside their dtype
    monkeypatch.setattr(cpu, "computed_once", lambda x: x)  # rounds to float32
    monkeypatch.setattr(checked, "fields", lambda *args: None)  # of a config: float64 is no dtype of ours
    parts = {part: dataclasses.replace(getattr(micro.config, part), dtype="float64") for part in ("unet", "vae")}
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), micro.params)
        yield dataclasses.replace(micro, config=dataclasses.replace(micro.config, **parts), params=params)


def sampled_by_hand(config, model, unet_of, decode, start, now, contexts, rows, key):
    """In numpy, a function of the parameters `now`; `start`: those of the steps without a gradient.

    Returns:
      The loss of the rewards, what is added to it, the rewards, and the pictures [n, B, 4, 4, 3] whose mean they are.
    """
    options, size = config.gradient, (ROWS, 4, 4, 4)
    steps = schedule.plan(model.schedule, config.rollout.sampler, STEPS)
    alphas = ALPHAS[steps.timesteps]
    noise_key, time_key, again_key, pair_key = jax.random.split(key, 4)
    distances = []

    def predicted(params, x, i):
        return guided(functools.partial(unet_of, params), contexts, x, steps.timesteps[i])

    def step(params, x, before, i, measure=False):
        prediction = predicted(params, x, i)
        if measure and config.beta:
            distances.append(np.square(prediction - predicted(scaled_64(REFERENCE, start), x, i)).mean((1, 2, 3)))
        x0 = (x - np.sqrt(1 - alphas[i]) * prediction) / np.sqrt(alphas[i])
        return steps.x[i] * x + steps.x0[i] * x0 + steps.x0_before[i] * before, x0

    x, before = np.asarray(jax.random.normal(noise_key, size)), np.zeros(size)
    if config.method == "refl":
        first = int(jax.random.randint(time_key, (), int(options.start * STEPS), STEPS))
    else:
        first = STEPS if options.noisings > 1 else STEPS - options.last
    for i in range(first):
        x, before = step(start, x, before, i)
    if config.method == "refl":
        finished = [step(now, x, before, first, measure=True)[1]]
    elif options.noisings > 1:
        noises = [np.asarray(jax.random.normal(one, size)) for one in jax.random.split(again_key, options.noisings)]
        level = alphas[-1]
        noised = [np.sqrt(level) * x + np.sqrt(1 - level) * noise for noise in noises]
        finished = [step(now, one, np.zeros(size), STEPS - 1, measure=True)[0] for one in noised]
    else:
        for i in range(first, STEPS):
            x, before = step(now, x, before, i, measure=True)
        finished = [x]
    pictures = [np.asarray(decode(latents)) for latents in finished]
    rewards = np.mean([1 - np.square(p.mean((1, 2)) @ WEIGHTS - rows["scored_0"]) for p in pictures], axis=0)
    added = config.beta * np.mean(distances) if config.beta else 0
    if config.data.pretraining:
        latent_key, time_key, noise_key = jax.random.split(pair_key, 3)
        mean, logvar = np.split(rows["moments"], 2, axis=-1)
        x0 = model.vae.scaling_factor * (mean + np.exp(logvar / 2) * np.asarray(jax.random.normal(latent_key, size)))
        times, noise = jax.random.randint(time_key, (ROWS,), 0, 1000), np.asarray(jax.random.normal(noise_key, size))
        alpha = ALPHAS[np.asarray(times)].reshape(-1, 1, 1, 1)
        noised = np.sqrt(alpha) * x0 + np.sqrt(1 - alpha) * noise
        added += config.train.beta * np.square(unet_of(now, noised, times, rows["pretraining_context"]) - noise).mean()
    return -np.minimum(rewards, options.ceiling).mean(), added, rewards, np.array(pictures)


def scaled_64(factor, params):
    return jax.tree.map(lambda x: np.asarray(x) * factor, params)


@pytest.mark.parametrize("name", METHODS)
def test_the_rewards_gradient_is_that_of_finite_differences(in_float64, networks, contexts, name):
    """In float64: the value by hand, and its change with the parameters of those steps that the gradient passes through."""
    config = config_of(**{"method": "draft"} | METHODS[name])
    model, unet, rng = in_float64.config, in_float64.params["unet"], np.random.default_rng(4)
    texts, key = contexts.astype(np.float64), jax.random.key(7)
    rows = {"context": texts[:-1], "scored_0": rng.uniform(-0.5, 1.5, ROWS), "region_0": rng.uniform(0.5, 1.0, ROWS)}
    rows["moments"], rows["pretraining_context"] = rng.standard_normal((ROWS, 4, 4, 8)), texts[:-1][::-1]
    if not config.data.pretraining:
        del rows["moments"]
    critic = CRITIC if config.dense.weight else None
    loss_fn = backprop.make_loss(model, config, REWARD, critic)
    fixed = {"vae": in_float64.params["vae"], "empty": texts[-1:], "reward": WEIGHTS, "critic": HEATMAP}
    fixed["reference"] = scaled_64(REFERENCE, unet)

    def of(unet, fixed):
        return loss_fn({"unet": unet} | fixed, rows, {"rows": jnp.float32(ROWS)}, key)

    (loss, metrics), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(unet, fixed)
    assert loss.dtype == np.float64 and all(x.dtype == np.float64 for x in jax.tree.leaves(gradient))
    decode = functools.partial(networks[1], model, in_float64.params["vae"])
    by_hand = functools.partial(
        sampled_by_hand, config, model, functools.partial(networks[0], model), decode, unet, contexts=texts, rows=rows,
        key=key,
    )  # fmt: skip
    expected, added, rewards, pictures = by_hand(unet)
    np.testing.assert_allclose([loss, metrics["reward"]], [expected + added, rewards.mean()], rtol=1e-6)
    if config.gradient.ceiling < 1:
        assert 0 < np.sum(rewards > config.gradient.ceiling) < ROWS
    worth = None
    if critic:  # what each pixel's change is worth: its slope, times its share
        up = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
        flaws = np.stack([heatmaps_of(HEATMAP, picture, rows["region_0"]) for picture in pictures])
        share = 1 - 0.75 * (1 - up @ (flaws / flaws.max((2, 3), keepdims=True)) @ up.T)
        slope = -2 * (pictures.mean((2, 3)) @ WEIGHTS - rows["scored_0"])[..., None] * WEIGHTS / 16
        worth = share[..., None] * slope[:, :, None, None] / (ROWS * len(pictures))
        assert share.min() < 0.5 and share.max() == 1

    def value(unet):
        found, added, _, pictures = by_hand(unet)
        return added + (found if worth is None else -np.sum(worth * pictures))

    for seed in range(3):
        rng, h = np.random.default_rng(seed), 1e-5
        way = jax.tree.map(lambda x, rng=rng: rng.standard_normal(np.shape(x)), unet)
        above, below = (value(jax.tree.map(lambda x, d, h=h: x + h * d, unet, way)) for h in (h, -h))
        found = sum(np.sum(a * b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
        np.testing.assert_allclose(found, (above - below) / (2 * h), rtol=1e-5)


def test_flaws_are_the_mean_of_a_critics_heatmaps():
    config = tiny_model.config()
    model, variables = tiny_model.model_and_params(config)
    rows = tiny_model.batch(config, 2)
    texts = dict(zip(PROMPTS, rows["text_ids"], strict=True))
    critic = types.SimpleNamespace(model_config=config, params=variables["params"], text_ids=texts.get)
    flaws = backprop.flaws_of(critic, schema.HEATMAPS)
    found = jax.jit(flaws.heatmaps)(flaws.params, rows["image"] / np.float32(127.5) - 1, flaws.rows(PROMPTS))
    _, heatmaps, _ = tiny_model.predict(model, variables, rows["image"], rows["text_ids"])
    np.testing.assert_allclose(found, heatmaps.mean(-1), atol=1e-6)
    one = backprop.flaws_of(critic, schema.HEATMAPS[1:]).heatmaps
    found = jax.jit(one)(flaws.params, rows["image"] / np.float32(127.5) - 1, flaws.rows(PROMPTS))
    np.testing.assert_allclose(found, heatmaps[..., 1], atol=1e-6)


# ---- Devices --------------------------------------------------------------------------------------------------------
def program_of(kind, micro, recorded, contexts):
    """A program, its config, its constants and a batch whose rows all differ."""
    rng, unet, method = np.random.default_rng(6), micro.params["unet"], {"gradient": "draft", "preferences": "dpo"}
    config = config_of(**{"train.batch_size": ROWS, "method": method.get(kind, "ddpo"), "beta": 0.5, "dense.words": 0.5})
    constants = {"empty": contexts[-1:], "reference": scaled(REFERENCE, unet), "vae": micro.params["vae"]}
    if kind == "policy":
        config = policy_config(True, **{"train.batch_size": ROWS})
        return policy.program(micro.config, config), config, constants, recorded(True)
    if kind == "gradient":
        config.update_from_flattened_dict({"beta": 0.0, "dense.weight": 0.75})
        parts = [dataclasses.replace(part, params=part.params.astype(np.float32)) for part in (REWARD, CRITIC)]
        parts = [dataclasses.replace(part, rows=lambda p, of=part.rows: of(p).astype(np.float32)) for part in parts]
        made = backprop.program(micro.config, config, *parts)
        constants |= {"reward": parts[0].params, "critic": parts[1].params}
    else:
        made = preferences.program(micro.config, config)
    shapes = made.batch_shapes(ROWS)
    batch = {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in shapes.items()}
    return made, config, constants, batch


@pytest.mark.parametrize("kind", ["policy", "gradient", "preferences"])
def test_a_step_is_the_same_on_one_and_on_eight_devices(
    micro, recorded, contexts, policy_gradient, standard_promotion, kind
):
    """Loss, gradient and parameters; the policy's, which draws nothing at random, with its batch in parts too."""
    made, config, constants, batch = program_of(kind, micro, recorded, contexts)
    results = []
    for devices in (1, 8):
        config.train.accumulation_steps = 2 if kind == "policy" and devices == 1 else 1
        mesh = partitioning.make_mesh(devices=jax.devices()[:devices])
        training = programs.assemble(made, config, mesh, optax.sgd(0.1))
        training = training.given({name: constants[name] for name in training.constants})
        params = {"unet": scaled(NOW, micro.params["unet"])}
        params = jax.tree.map(lambda x, to: partitioning.place(x, to.sharding), params, training.params)
        placed = training.place({name: batch[name] for name in training.batch})
        state, metrics = training.step(training.init_state(params), placed)
        results.append(jax.device_get((metrics, state["params"]["unet"])))
    (one, one_params), (eight, eight_params) = results
    assert not one["skipped"] and abs(one["loss"]) > 1e-2
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)
    before = scaled(NOW, micro.params["unet"])
    gradients = [jax.tree.map(lambda x, y: (x - y) / 0.1, before, after) for after in (one_params, eight_params)]
    if kind == "policy":
        loss, _, gradient = policy_gradient(True, before, scaled(REFERENCE, micro.params["unet"]), batch)
        np.testing.assert_allclose(one["loss"], loss, rtol=1e-4)
        gradients.append(gradient)
    for leaves in zip(*map(jax.tree.leaves, gradients), strict=True):
        for found in leaves[1:]:
            np.testing.assert_allclose(found, leaves[0], atol=1e-3 * np.abs(leaves[0]).max() + 1e-5)


@pytest.mark.parametrize(("devices", "parts"), [(8, 1), (2, 2)])
def test_pictures_are_the_same_on_several_devices_and_in_parts(ways, devices, parts):
    (one, images, _), (found, other, finite) = ways("noise", True), ways("noise", True, devices, parts)
    for name in one:
        np.testing.assert_allclose(found[name], one[name], atol=1e-4, err_msg=name)
    np.testing.assert_allclose(images.astype(int), other, atol=1)
    assert finite.shape == (ROWS,)
