"""Rewards and feature networks by name, for commands and configs.

    reward:DIR                        a workdir of rahf.reward.train; reward:DIR:CLIP if its CLIP's folder has moved
    rahf:DIR                          the overall score of a RAHF workdir
    rahf:DIR:plausibility             another score
    rahf:DIR:alignment=0.7,overall=2  a weighted sum of scores
    python:package.module:name        your own: (images, prompts) -> float[B]

Features are clip:DIR, the image embeddings of a folder of `rahf.convert --source=clip-hf`, or python:package.module:name,
(images) -> float[B, D]. Images are B arrays uint8[H, W, 3] of any sizes.

A reward may have an attribute `identity`, a short string that changes whenever the reward can give other numbers. Results
are cached under it, and never without it. A `python:` reward without one gets an identity from the source files of its
module: set the attribute if the reward depends on more, such as weights on disk.
"""

import functools
import importlib
import math
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import rahf
from rahf import checkpoints
from rahf import reward as rahf_reward
from rahf.fingerprint import fingerprint
from richhf_data import schema
from richhf_data.errors import UserError


def reward_of(spec: str) -> Callable:
    """The reward that a spec names, `(images, prompts) -> float32[B]`. Call it through `checked`.

    Raises:
      UserError: a spec of another form, a folder without such a model, an unknown score, a missing module or name.
    """
    kinds = {"reward": lambda rest: rahf_reward.load(*re.split(":(?!//)", rest, maxsplit=1)), "rahf": _rahf}
    return _parsed("reward", spec, kinds | {"python": _python_reward})


def features_of(spec: str) -> Callable:
    """The network that a spec names, `(images) -> float[B, D]`. Raises as `reward_of`."""
    return _parsed("features", spec, {"clip": _clip, "python": functools.partial(_python, "features")})


def identity_of(reward: Callable) -> str | None:
    """The reward's attribute `identity`; None if it has none. Raises UserError if it is not a text."""
    identity = getattr(reward, "identity", None)
    if identity is not None and (not isinstance(identity, str) or not identity):
        raise UserError(f"reward: got the identity {identity!r}, expected a text that differs between rewards, or None")
    return identity


def checked(reward: Callable, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Calls a reward with B images and their prompts: float32[B].

    Raises:
      UserError: different numbers of images and prompts; the reward returns another shape, or values that are not finite
        numbers.
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


def _parsed(name: str, spec: str, kinds: Mapping[str, Callable]) -> Callable:
    kind, colon, rest = spec.partition(":")
    if kind not in kinds or not colon or not rest:
        expected = " or ".join(f"{kind}:..." for kind in kinds)
        raise UserError(f"{name}: got {spec!r}, expected {expected} (python -m pydoc rahf.reward.specs)")
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
    return ScoreReward(rahf.load(folder), weights)


class ScoreReward:
    """A weighted sum of the scores of a RAHF.

    Args:
      model: rahf.predictor.Model. weights: name of a score -> its weight.
    """

    def __init__(self, model, weights: Mapping[str, float]):
        self._model, self._weights = model, weights

    def __call__(self, images, prompts) -> np.ndarray:
        scores = self._model.predict(images, prompts).scores
        return sum(np.float32(weight) * scores[name] for name, weight in self._weights.items())

    @functools.cached_property
    def identity(self) -> str:
        """Depends on the model's parameters, configuration and vocabulary, and on the weights."""
        model = self._model
        lengths = {name: model.config.data[name] for name in ("text_length", "keyword_length")}
        parts = sorted(checkpoints.digests(model.params).items()), model.model_config, lengths, model.vocabulary.digest
        return fingerprint("rahf", *parts, list(self._weights.items()))


def _python_reward(rest: str) -> Callable:
    found = _python("reward", rest)
    modules = dict.fromkeys((rest.partition(":")[0], getattr(found, "__module__", None)))
    files = [pathlib.Path(getattr(sys.modules.get(module), "__file__", None) or "") for module in modules]
    if hasattr(found, "identity") or not all(file.is_file() for file in files):
        return found
    reward = functools.partial(found)  # a partial can have attributes, a bound method cannot
    reward.identity = fingerprint("python", rest, *files)
    return reward


def _python(what: str, rest: str) -> Callable:
    module, colon, name = rest.partition(":")
    if not (module and colon and name):
        raise UserError(f"{what}: got python:{rest}, expected python:package.module:name")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # of something that the module imports
        raise UserError(f"{what}: python:{rest}: {error}; is its folder on PYTHONPATH?") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{what}: python:{rest}: {found!r} has no attribute {part!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{what}: python:{rest} is a {type(found).__name__}, expected a function")
    return found
