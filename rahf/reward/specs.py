"""Rewards and feature networks by name, for commands and configs.

    reward:DIR                        a workdir of rahf.reward.train; reward:DIR:CLIP where its CLIP's folder has moved
    rahf:DIR                          the overall score of a RAHF workdir
    rahf:DIR:plausibility             another score
    rahf:DIR:alignment=0.7,overall=2  a weighted sum of scores
    python:package.module:name        your own: (images, prompts) -> float[B]

Features are clip:DIR, the image embeddings of a folder of `rahf.convert --source=clip-hf`, or python:package.module:name,
(images) -> float[B, D]. Images are B of uint8[H, W, 3], of any sizes.
"""

import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import rahf
from rahf import reward as rahf_reward
from richhf_data import schema
from richhf_data.errors import UserError


def reward_of(spec: str) -> Callable:
    """`(images, prompts) -> float32[B]` of a spec as above; call it through `checked`.

    Raises:
      UserError: another spec, a folder that does not hold it, an unknown score, a module or a name that is not there.
    """
    kinds = {"reward": lambda rest: rahf_reward.load(*re.split(":(?!//)", rest, maxsplit=1)), "rahf": _rahf}
    return _source("reward", spec, kinds | {"python": functools.partial(_python, "reward")})


def features_of(spec: str) -> Callable:
    """`(images) -> float[B, D]` of a spec as above; errors as `reward_of`."""
    return _source("features", spec, {"clip": _clip, "python": functools.partial(_python, "features")})


def checked(reward: Callable, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """A reward's float32[B] for B images and their prompts.

    Raises:
      UserError: not as many images as prompts; the reward gives another shape, no numbers, or some that are not finite.
    """
    if len(images) != len(prompts):
        raise UserError(f"reward: got {len(images)} images and {len(prompts)} prompts, expected as many")
    expected = f"expected {len(prompts)} finite numbers, one an image"
    given = reward(images, prompts)
    try:
        rewards = np.asarray(given)
        if rewards.dtype.kind in "OSUMmc":
            raise TypeError(f"values of type {rewards.dtype}")
        rewards = rewards.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"reward: got {type(given).__name__} ({error}), {expected}") from error
    if rewards.shape != (len(prompts),):
        raise UserError(f"reward: got shape {rewards.shape}, {expected}")
    if len(wrong := np.flatnonzero(~np.isfinite(rewards))):
        first = f"{rewards[wrong[0]]} for {prompts[wrong[0]][:80]!r}"
        raise UserError(f"reward: got {len(wrong)} values that are not finite, the first {first}; {expected}")
    return rewards


def _source(name: str, spec: str, kinds: Mapping[str, Callable]) -> Callable:
    kind, colon, rest = spec.partition(":")
    if kind not in kinds or not colon or not rest:
        expected = " or ".join(f"{kind}:..." for kind in kinds)
        raise UserError(f"{name}: got {spec!r}, expected {expected} (python -m pydoc rahf.reward.sources)")
    return kinds[kind](rest)


def _clip(folder: str) -> Callable:
    from rahf.reward import embed

    return embed.Clip(folder).images


def _rahf(rest: str) -> Callable:
    folder, colon, sum_of = rest.rpartition(":")
    if not colon or "/" in sum_of:  # gs://bucket/run
        folder, sum_of = rest, "overall"
    weights = {}
    for term in sum_of.split(","):
        name, equals, weight = term.partition("=")
        if name not in schema.SCORES or name in weights:
            raise UserError(f"reward: rahf:{rest}: got the score {name!r}, expected some of {schema.SCORES}, each once")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise UserError(f"reward: rahf:{rest}: got {weight!r} times {name}, expected a number")
    model = rahf.load(folder)

    def reward(images, prompts):
        scores = model.predict(images, prompts).scores
        return sum(np.float32(weight) * scores[name] for name, weight in weights.items())

    return reward


def _python(what: str, rest: str) -> Callable:
    module, colon, name = rest.partition(":")
    if not (module and colon and name):
        raise UserError(f"{what}: got python:{rest}, expected python:package.module:name")
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except ImportError as error:
        raise UserError(f"{what}: python:{rest}: {error}; is its folder on PYTHONPATH?") from error
    except AttributeError as error:
        raise UserError(f"{what}: python:{rest}: {error}") from error
    if not callable(found):
        raise UserError(f"{what}: python:{rest} is a {type(found).__name__}, expected a function")
    return found
