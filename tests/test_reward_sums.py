"""Sums and ensembles of rewards by name: their numbers, gradients and identities, and what they refuse."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_clip
import tiny_model

import rahf
from rahf import experiments
from rahf.reward import differentiable, specs
from richhf_data.errors import UserError

PROMPTS = ["a red cat", "a house"]
OWN = """
import numpy as np
from rahf.reward.differentiable import Differentiable

def red(images, prompts):
    return [image[..., 0].mean() / 255 for image in images]
def green(images, prompts):
    return [image[..., 1].mean() / 255 for image in images]
def nan(images, prompts):
    return [float("nan")] * len(images)
def faulty(images, prompts):
    raise RuntimeError("mine")
def red_of_pixels(images):
    return images[..., 0].mean((1, 2))
def contrast(images):
    return abs(images).mean((1, 2, 3))
def one_number(images):
    return images.mean()
lengths = Differentiable(lambda params, images, rows: params * rows * images[..., 2].mean((1, 2)), np.float32(2),
                         lambda prompts: np.float32([len(prompt) for prompt in prompts]))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Adds the module `own_sums` of a user."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_sums.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def critic(tmp_path_factory, standard_promotion):
    """A RAHF's workdir, as if it had been trained."""
    folder, config = tmp_path_factory.mktemp("critic"), experiments.load("rahf_ci")
    config.data.source = "stream"
    return tiny_model.workdir(folder, config)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((32, 32), (20, 45))]


def values(spec, images):
    return specs.checked(specs.reward_of(spec), images, PROMPTS)


# ---- Values ---------------------------------------------------------------------------------------------------------
def test_a_sum_weighs_its_members(own, images):
    red, green = values("python:own_sums:red", images), values("python:own_sums:green", images)
    for spec, expected in (
        ("sum:python:own_sums:red|python:own_sums:green", red + green),
        ("sum:0.7*python:own_sums:red|-3*python:own_sums:green", 0.7 * red - 3 * green),
        ("sum:1e-1*python:own_sums:red|python:own_sums:green|.5*python:own_sums:red", 0.6 * red + green),
    ):
        found = values(spec, images)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert specs.reward_of("sum:python:own_sums:red|python:own_sums:green")([], []).shape == (0,)


def test_an_ensemble_is_low_where_its_members_disagree(own, images):
    members = np.stack([values(f"python:own_sums:{name}", images) for name in ("red", "green", "red")])
    found = values("ensemble:1.5:python:own_sums:red|python:own_sums:green|python:own_sums:red", images)
    np.testing.assert_allclose(found, members.mean(0) - 1.5 * members.std(0), atol=1e-6)
    mean = values("ensemble:0:python:own_sums:red|python:own_sums:green", images)
    np.testing.assert_allclose(mean, members[:2].mean(0), atol=1e-6)
    assert (found < members.mean(0)).all()


def test_members_of_all_kinds_combine_and_a_rahf_is_loaded_once(own, critic, clip, images, monkeypatch):
    loaded, load = [], rahf.load
    monkeypatch.setattr(rahf, "load", lambda folder: loaded.append(folder) or load(folder))
    members = [f"rahf:{critic}:alignment", f"clip:{clip}", "python:own_sums:red", f"rahf:{critic}:overall=0.5,aesthetics=-1"]
    singles = np.stack([values(member, images) for member in members])
    loaded.clear()
    found = values(f"sum:2*{members[0]}|-1*{members[1]}|{members[2]}|{members[3]}", images)
    np.testing.assert_allclose(found, np.float32([2, -1, 1, 1]) @ singles, atol=1e-5)
    assert loaded == [str(critic)]


def test_a_star_in_a_folders_name_is_no_weight(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"clip: {tmp_path}/2*3 is no folder that rahf.convert wrote")):
        specs.reward_of(f"sum:clip:{tmp_path}/2*3|clip:b")


# ---- Gradients ------------------------------------------------------------------------------------------------------
def slopes(of, pixels, direction, step=1e-2):
    """The score's derivative along a direction of the pixels: JAX's, and the central difference's."""
    rows = of.rows(PROMPTS)
    score = jax.jit(lambda pixels: of.score(of.placed(None), pixels, rows).sum())
    exact = jnp.sum(jax.grad(score)(pixels) * direction)
    return float(exact), float(score(pixels + step * direction) - score(pixels - step * direction)) / (2 * step)


MIXED = "python:own_sums:red_of_pixels|python:own_sums:lengths|python:own_sums:contrast"


@pytest.mark.parametrize("spec", [f"sum:2*{MIXED}", f"ensemble:1.5:{MIXED}"])
def test_the_gradient_is_that_of_a_finite_difference(own, spec):
    """With functions of the pixels and a user's own `Differentiable`, which has parameters and reads the prompts."""
    rng = np.random.default_rng(1)
    pixels, direction = (rng.uniform(0.2, 0.8, (2, 8, 8, 3)).astype(np.float32) for _ in range(2))
    of = specs.differentiable_of(spec)
    assert of.identity and of.params[1] == 2 and [len(rows) for rows in of.rows(PROMPTS)] == [0, 2, 0]
    exact, approximate = slopes(of, pixels, direction)
    assert abs(exact) > 0.1 and exact == pytest.approx(approximate, rel=1e-3)
    members = np.stack([pixels[..., 0].mean((1, 2)), pixels[..., 2].mean((1, 2)) * 2 * [9, 7], pixels.mean((1, 2, 3))])
    expected = members.mean(0) - 1.5 * members.std(0) if spec.startswith("ensemble") else [2, 1, 1] @ members
    np.testing.assert_allclose(of.score(of.params, pixels, of.rows(PROMPTS)), expected, rtol=1e-5)


def test_networks_guide_by_the_same_numbers(critic, clip):
    """Between a RAHF of 32 pixels and a CLIP of 16, from a picture that neither has to cut."""
    image = np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8)
    spec = f"ensemble:0.5:rahf:{critic}:alignment|clip:{clip}"
    reward, pixels = specs.reward_of(spec), image[None] / np.float32(127.5) - 1
    of = specs.differentiable_of(spec)
    found = jax.jit(of.score)(of.placed(None), pixels, of.rows(PROMPTS[:1]))
    np.testing.assert_allclose(found, specs.checked(reward, [image], PROMPTS[:1]), atol=2e-3)  # scaled pixels round
    assert of.identity == reward.identity == reward.differentiable.identity and len(of.params) == 2


def test_members_that_agree_have_the_gradient_of_one(own):
    """Also where they differ by less than a float's square can hold."""
    pixels = np.full((2, 4, 4, 3), 0.5, np.float32)

    def gradient(score):
        return jax.grad(lambda pixels: score(pixels).sum())(pixels)

    one = gradient(lambda pixels: pixels[..., 0].mean((1, 2)))
    of = specs.differentiable_of("ensemble:4:python:own_sums:red_of_pixels|python:own_sums:red_of_pixels")
    np.testing.assert_allclose(gradient(lambda pixels: of.score(of.params, pixels, of.rows(PROMPTS))), one, rtol=1e-6)
    for apart in (0, 1e-30, 1e-19, 1e-10):

        def score(pixels, apart=apart):
            values = pixels[..., 0].mean((1, 2)) * 0
            values = jnp.stack([values, values + apart])
            return differentiable.pessimistic_mean(jnp.float32([4]), values)

        assert np.isfinite(gradient(score)).all(), apart


# ---- Identities -----------------------------------------------------------------------------------------------------
def test_the_identity_changes_with_all_that_the_values_depend_on(own, critic, clip):
    red, green = "python:own_sums:red", "python:own_sums:green"
    different = [
        f"sum:{red}|{green}",
        f"sum:2*{red}|{green}",
        f"sum:{red}|2*{green}",
        f"sum:{red}|{red}",
        f"sum:{red}|{green}|{green}",
        f"ensemble:1:{red}|{green}",
        f"ensemble:2:{red}|{green}",
        f"sum:{red}|clip:{clip}",
        f"sum:{red}|rahf:{critic}",
        f"sum:{red}|rahf:{critic}:alignment",
    ]
    found = [specs.identity_of(specs.reward_of(spec)) for spec in different]
    assert len(set(found)) == len(found) and all(found)
    assert specs.reward_of(f"sum:1*{red}|1.0*{green}").identity == found[0]
    assert specs.reward_of(f"sum:{red}|python:builtins:max").identity is None
    assert specs.differentiable_of("sum:python:own_sums:red_of_pixels|python:builtins:max").identity is None


# ---- Errors ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sum:", "reward: got 'sum:', expected reward:... or .* or sum:... or ensemble:"),
        ("sum:clip:a", r"reward: sum:clip:a: got one member, 'clip:a', expected two or more with \| between them"),
        ("sum:2*clip:a", r"got one member, 'clip:a', expected two"),
        ("sum:clip:a|", r"reward: sum:clip:a\|: got an empty member, expected a reward on each side of \|"),
        ("sum:2*|clip:a", "got an empty member"),
        ("ensemble:1:clip:a||clip:b", "got an empty member"),
        ("sum:x*clip:a|clip:b", r"reward: sum:.*: got 'x' times 'clip:a', expected a number"),
        ("sum:*clip:a|clip:b", "got '' times 'clip:a', expected a number"),
        ("sum:inf*clip:a|clip:b", "got 'inf' times 'clip:a', expected a number"),
        ("sum:nan*clip:a|clip:b", "got 'nan' times"),
        ("sum:2*score:a|clip:b", "reward: got 'score:a', expected reward:... or .* or python:... "),
        ("sum:clip|clip:b", "reward: got 'clip', expected reward:"),
        ("sum:2*sum:clip:a|clip:b", r"reward: sum:.*: got the member 'sum:clip:a', expected no sum and no ensemble in"),
        ("sum:clip:a|ensemble:1:clip:b|clip:c", "got the member 'ensemble:1:clip:b', expected no sum and no ensemble"),
        ("ensemble:1:sum:clip:a|clip:b", "got the member 'sum:clip:a', expected no sum and no ensemble in another"),
        ("ensemble:clip:a|clip:b", "got 'clip' times the standard deviation, expected a number of 0 or more: ensem"),
        ("ensemble:-1:clip:a|clip:b", "got '-1' times the standard deviation, expected a number of 0 or more"),
        ("ensemble:nan:clip:a|clip:b", "got 'nan' times the standard deviation"),
        ("ensemble:1:clip:a", "reward: ensemble:1:clip:a: got one member, 'clip:a', expected two or more"),
        ("ensemble:1", "reward: ensemble:1: got an empty member"),
        ("sum:rahf:nowhere:beauty|clip:b", "reward: rahf:nowhere:beauty: got the score 'beauty'"),
    ],
)
def test_combinations_name_what_is_wrong(spec, message):
    for of in (specs.reward_of, specs.differentiable_of):
        with pytest.raises(UserError, match=message):
            of(spec)


def test_an_error_names_the_member(own, clip, images, monkeypatch):
    for member, prompts, message in (
        ("python:own_sums:nan", PROMPTS, "^reward python:own_sums:nan: got 2 values that are not finite"),
        ("python:own_sums:faulty", PROMPTS, "^reward: python:own_sums:faulty: this code is yours, and it raised"),
        (f"clip:{clip}", ["a cat", "cat " * 90], rf"^clip:{re.escape(str(clip))}: prompt: 'cat cat .* takes"),
    ):
        with pytest.raises(UserError, match=message):
            specs.reward_of(f"ensemble:1:python:own_sums:red|{member}")(images, prompts)
    with pytest.raises(UserError, match=r"reward: got 2 images and 1 prompts, expected as many"):
        specs.reward_of("sum:python:own_sums:red|python:own_sums:green")(images, PROMPTS[:1])
    monkeypatch.setattr("own_sums.red.identity", 3, raising=False)
    with pytest.raises(UserError, match="reward python:own_sums:red: got the identity 3, expected a text"):
        specs.identity_of(specs.reward_of("sum:python:own_sums:red|python:own_sums:green"))


def test_a_member_that_gives_no_number_for_each_image_cannot_guide(own):
    of = specs.differentiable_of("sum:python:own_sums:red_of_pixels|python:own_sums:one_number")
    with pytest.raises(UserError, match=r"guide: got float32\[\] from python:own_sums:one_number, expected float\[2\]"):
        of.score(of.params, jnp.zeros((2, 4, 4, 3)), of.rows(PROMPTS))
