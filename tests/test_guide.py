"""Universal guidance: its gradient, its independence of batch and devices, and a PyTorch implementation as the referee."""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion
import tiny_model
from tiny_diffusion import GUIDANCE, NEGATIVE, PROMPTS, SAMPLERS, SEED

from rahf import partitioning
from rahf.diffusion import folder, guide, sample
from rahf.diffusion.schedule import plan
from rahf.models import cpu
from rahf.reward import differentiable, specs
from richhf_data.errors import UserError

STEPS = 4
WAVES = np.linspace(0.5, 4, 3, dtype=np.float32)


def wavy(images):
    """A smooth score with a gradient everywhere."""
    return jnp.sin(images * jnp.asarray(WAVES, images.dtype)[None, None, None]).mean((1, 2, 3))


SCORE = differentiable.of_function(wavy)


def drawn(model, prompts=PROMPTS, **options):
    given = {"seed": SEED, "negative_prompt": NEGATIVE, "steps": STEPS, "guidance_scale": GUIDANCE} | options
    return sample.generate(model, prompts, **given)


def critic(dtype="float32"):
    """A tiny RAHF's score of images: plausibility, less the mean of the implausibility map."""
    config = tiny_model.config()
    _, variables = tiny_model.model_and_params(config)
    ids = tiny_model.batch(config, 2)["text_ids"]
    object.__setattr__(config, "dtype", dtype)
    score = differentiable.rahf_score(config, {"plausibility": 1.0, "implausibility": -2.0})
    return differentiable.Differentiable(score, variables["params"], lambda prompts: ids[: len(prompts)])


# ---- The gradient ---------------------------------------------------------------------------------------------------
def test_the_gradient_is_that_of_a_finite_difference(micro, monkeypatch, standard_promotion):
    """In float64: of the score of the decoded clean picture, with respect to the noised latents, with guidance."""
    of_critic = critic("float64")
    monkeypatch.setattr(jnp, "float32", jnp.float64)  # what the modules compute in, beside their dtype
    monkeypatch.setattr(cpu, "computed_once", lambda x: x)  # rounds to float32
    with jax.enable_x64(True):
        parts = {}
        for name in ("unet", "vae", "text"):
            parts[name] = dataclasses.replace(getattr(micro.config, name))
            object.__setattr__(parts[name], "dtype", "float64")
        config = dataclasses.replace(micro.config, **parts)
        params, of_score = jax.tree.map(lambda x: np.asarray(x, np.float64), (micro.params, of_critic.params))
        ids, negative = micro.text_ids(PROMPTS), micro.text_ids([NEGATIVE])
        x = np.random.default_rng(0).standard_normal((2, 4, 4, 4))
        steps = plan(config.schedule, "ddim", STEPS)
        now = jax.tree.map(lambda row: row[1], steps)
        alpha = np.float64(now.alpha)
        predict_noise = sample.guided(config, params, ids, negative, np.float64(GUIDANCE))
        vae = functools.partial(config.modules["vae"].apply, {"params": params["vae"]}, method="decode_latents")

        def score(latents):
            return of_critic.score(of_score, vae(latents), of_critic.rows(PROMPTS))

        def clean(x):
            return config.schedule.x0(x, predict_noise(x, now.timesteps), alpha)

        form = guide.Form(of_critic.score, True, 0, 1, True)
        one = guide.Guide(form, score, np.float64(1.0), np.float64(1.0), np.ones(STEPS, bool))
        whole = jax.jit(lambda x: (one.clean(clean, x, alpha), clean(x), score(clean(x)).sum()))
        (guided, largest), plain, _ = whole(x)
        assert guided.dtype == np.float64 and largest > 0
        gradient = (guided - plain) * np.sqrt(alpha) / (1 - alpha)
        for seed in range(3):
            way, h = np.random.default_rng(seed + 1).standard_normal(x.shape), 1e-4
            expected = (whole(x + h * way)[2] - whole(x - h * way)[2]) / (2 * h)
            np.testing.assert_allclose(np.sum(gradient * way), expected, rtol=1e-4)


def test_a_score_is_that_of_the_reward(tmp_path):
    """The differentiable sum of a critic, at its own size and at a larger one, and its terms."""
    config = tiny_model.config()
    model, variables = tiny_model.model_and_params(config)
    rows = tiny_model.batch(config, 2)
    scores, heatmaps, _ = tiny_model.predict(model, variables, rows["image"], rows["text_ids"])
    score = jax.jit(differentiable.rahf_score(config, {"overall": 0.5, "misalignment": -1.0}))
    images = rows["image"] / np.float32(127.5) - 1
    expected = 0.5 * scores[:, 3] - heatmaps[..., 1].mean((1, 2))
    np.testing.assert_allclose(score(variables["params"], images, rows["text_ids"]), expected, atol=1e-6)
    larger = images.repeat(2, axis=1).repeat(2, axis=2)
    assert score(variables["params"], larger, rows["text_ids"]).shape == (2,)


# ---- Sampling -------------------------------------------------------------------------------------------------------
def test_without_a_scale_the_pictures_are_those_of_no_guide(micro):
    plain = drawn(micro)
    np.testing.assert_array_equal(drawn(micro, guide=guide.Guidance(SCORE, scale=0.0)), plain)
    assert np.abs(drawn(micro, guide=guide.Guidance(SCORE, scale=10.0)) - plain).max() > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_raises_the_score(micro, sampler):
    plain = drawn(micro, sampler=sampler)
    for options in ({"scale": 200.0}, {"scale": 0.0, "backward_steps": 3, "backward_rate": 30.0}):
        guided = drawn(micro, sampler=sampler, guide=guide.Guidance(SCORE, **options))
        assert (wavy(guided) > wavy(plain)).all(), options


def test_the_velocity_and_no_classifier_free_guidance_are_guided_too(micro):
    schedule = dataclasses.replace(micro.config.schedule, prediction_type="v_prediction")
    model = dataclasses.replace(micro, config=dataclasses.replace(micro.config, schedule=schedule))
    little, much = (drawn(model, guidance_scale=1.0, guide=guide.Guidance(SCORE, scale=scale)) for scale in (1e-6, 50.0))
    assert (wavy(much) > wavy(little)).all()


def test_steps_outside_of_the_span_are_not_guided(micro):
    half = guide.Guidance(SCORE, scale=10.0, recurrence=2, start=0.5, end=0.75)
    assert half.active(STEPS).tolist() == [False, False, True, False]
    plain, part, whole = (drawn(micro, guide=one) for one in (None, half, guide.Guidance(SCORE, scale=10.0)))
    assert np.abs(part - plain).max() > 1e-4 and np.abs(part - whole).max() > 1e-4


def test_images_do_not_depend_on_the_devices(micro):
    ids = critic().rows(PROMPTS)
    score = dataclasses.replace(critic(), rows=lambda prompts: np.stack([ids[PROMPTS.index(p)] for p in prompts]))
    of_critic = guide.Guidance(score, scale=30.0)
    mesh, prompts = partitioning.make_mesh(), PROMPTS * 4
    one = drawn(micro, prompts, guide=of_critic, sampler="ddpm")
    placed = jax.tree.map(lambda x: partitioning.place(np.asarray(x), partitioning.replicated(mesh)), micro.params)
    eight = drawn(dataclasses.replace(micro, params=placed), prompts, guide=of_critic, sampler="ddpm", mesh=mesh)
    np.testing.assert_allclose(one, eight, atol=2e-5)


# ---- The referee ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_pytorch_implementation_draws_the_same(tmp_path, sampler, torch, standard_promotion):
    """Bansal et al.'s algorithm 1, written for diffusers' parts, from the same noise."""
    diffusers = pytest.importorskip("diffusers")
    made = tiny_diffusion.make_folder(tmp_path / "first", "first")
    one = guide.Guidance(SCORE, scale=40.0, backward_steps=2, backward_rate=5.0, recurrence=2)
    ours = drawn(folder.read(made), sampler=sampler, guide=one)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(made, safety_checker=None)
    unet, vae = pipeline.unet, pipeline.vae
    tokens = pipeline.tokenizer([*PROMPTS, NEGATIVE], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        context = pipeline.text_encoder(tokens.input_ids)[0]
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    keys, shape = sample.image_keys(sample.seed_data(SEED), np.arange(2)), (8, 8, 4)

    def ours_as_torch(x):
        return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)

    def score(z):
        picture = vae.decode(z / vae.config.scaling_factor).sample
        return torch.sin(picture * torch.from_numpy(WAVES)[:, None, None]).mean((1, 2, 3)).sum()

    def uphill(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(score(z), z)[0]

    times = [int(t) for t in plan(folder.read(made).config.schedule, sampler, STEPS).timesteps]
    z = ours_as_torch(sample.noise(keys, sample.INITIAL, shape))
    for number, t in enumerate(times):
        a = float(alphas[t])
        next_a = float(alphas[times[number + 1]]) if number + 1 < STEPS else 1.0
        if sampler == "ddim":  # to the timestep of the regular grid, as diffusers
            next_a = float(alphas[max(t - 1000 // STEPS, 0)])
        for again in range(2):
            z = z.detach().requires_grad_()
            with_text, without = unet(z, t, context[:2]).sample, unet(z, t, context[2:].expand(2, -1, -1)).sample
            noise = without + GUIDANCE * (with_text - without)
            z0 = (z - (1 - a) ** 0.5 * noise) / a**0.5
            (gradient,) = torch.autograd.grad(score(z0), z)
            delta = torch.zeros_like(z0)
            for _ in range(2):
                delta = delta + 5.0 * uphill(z0 + delta)
            noise = noise - 40.0 * (1 - a) ** 0.5 * gradient - (a / (1 - a)) ** 0.5 * delta
            noise, at = noise.detach(), z.detach()
            z0 = (at - (1 - a) ** 0.5 * noise) / a**0.5
            drawn_noise = ours_as_torch(sample.step_noise(keys, number, shape, None if again else 0))
            if sampler == "ddim":
                after = next_a**0.5 * z0 + (1 - next_a) ** 0.5 * noise
            else:
                beta = 1 - a / next_a
                after = (next_a**0.5 * beta * z0 + (a / next_a) ** 0.5 * (1 - next_a) * at) / (1 - a)
                after = after + ((1 - next_a) / (1 - a) * beta) ** 0.5 * drawn_noise
            if again == 0:
                more = ours_as_torch(sample.step_noise(keys, number, shape, 0, sample.AGAIN))
                z = (a / next_a) ** 0.5 * after + (1 - a / next_a) ** 0.5 * more
        z = after
    with torch.no_grad():
        theirs = vae.decode(z / vae.config.scaling_factor).sample.permute(0, 2, 3, 1).numpy()
    difference = np.abs(ours - np.clip(theirs, -1, 1)).max()
    assert difference < 1e-4, difference


# ---- Errors ---------------------------------------------------------------------------------------------------------
def constant(images):
    return jnp.zeros(len(images)) + 0.5


def test_what_cannot_guide_is_refused(micro):
    with pytest.raises(UserError, match="guide: the gradient of the score is 0 in all 4 guided steps"):
        drawn(micro, guide=guide.Guidance(differentiable.of_function(constant), scale=5.0))
    with pytest.raises(UserError, match=r"guide: got float32\[\] from the score, expected float\[2\], one number an"):
        drawn(micro, guide=guide.Guidance(differentiable.of_function(jnp.mean), scale=5.0))
    with pytest.raises(UserError, match=r"guide: got int\[\] from the score, expected float\[2\]"):
        drawn(micro, guide=guide.Guidance(differentiable.of_function(len), scale=5.0))
    for options, message in (
        ({"scale": np.nan}, "guide.scale: got nan"),
        ({"start": 0.5, "end": 0.5}, "guide: got start 0.5 and end 0.5, expected a start before the end"),
        ({"recurrence": 0}, "guide.recurrence: got 0"),
        ({"backward_rate": -1.0}, "guide.backward_rate: got -1.0"),
    ):
        with pytest.raises(UserError, match=message):
            guide.Guidance(SCORE, **options)
    with pytest.raises(UserError, match=r"guide: got start 0\.3 and end 0\.4 of 4 steps, expected one step or more"):
        drawn(micro, guide=guide.Guidance(SCORE, start=0.3, end=0.4))


def test_flags_say_how_to_guide():
    given = argparse.Namespace(guide="python:test_guide:SCORE", **dict.fromkeys(f"guide_{name}" for name in sample.GUIDE))
    with pytest.raises(UserError, match="guide: got no --guide_scale, expected one"):
        sample.guidance_of(given)
    given.guide_backward_steps = 2
    found = sample.guidance_of(given)
    assert (found.scale, found.backward_steps, found.end) == (0, 2, 1)
    given.guide = None
    with pytest.raises(UserError, match="guide: got --guide_backward_steps without --guide; add"):
        sample.guidance_of(given)
    given.guide_backward_steps = None
    assert sample.guidance_of(given) is None


def test_a_guide_has_a_name():
    found = specs.differentiable_of("python:test_guide:wavy")
    assert found.score((), np.zeros((2, 4, 4, 3), np.float32), ()).tolist() == [0, 0]
    found = specs.differentiable_of("python:test_guide:SCORE")
    assert found.identity and found.score((), np.ones((2, 4, 4, 3), np.float32), found.rows(PROMPTS)).shape == (2,)
    with pytest.raises(UserError, match=r"got the score 'beauty', expected some of plausibility, .* misalignment"):
        specs.differentiable_of("rahf:nowhere:beauty")
