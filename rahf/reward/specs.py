"""Rewards and feature networks by name, for commands and configs.

    reward:DIR                        a workdir of rahf.reward.train; reward:DIR:CLIP if its CLIP's folder has moved
    rahf:DIR                          the overall score of a RAHF workdir
    rahf:DIR:plausibility             another score
    rahf:DIR:alignment=0.7,overall=2  a weighted sum of scores
    rahf:DIR:implausibility=-1        a heatmap's mean over the picture, in such a sum as well
    rahf:DIR:overall,overall_deviation=-1.5
                                      the score minus 1.5 times its deviation, of a RAHF that predicts it
    clip:DIR                          CLIP score: the cosine of the embeddings of image and prompt
    pickscore:DIR                     PickScore (preference.py), as all of these from a folder of rahf.convert
    hpsv2:DIR                         HPSv2 or HPSv2.1
    aesthetic:DIR                     LAION's aesthetic predictor
    imagereward:DIR                   ImageReward
    python:package.module:name        your own: (images, prompts) -> float[B]

Two combine several of these, which | separates (quote it in a shell):

    sum:0.7*pickscore:DIR|0.3*rahf:DIR:alignment    a weighted sum; a reward without a number counts 1
    ensemble:1.5:rahf:DIR1|rahf:DIR2                the members' mean minus 1.5 times their standard deviation

An ensemble is low where its members disagree, after arXiv 2310.02743, which subtracts the variance. Its members should be on
one scale. The standard deviation is the population's: of two members, half their difference. A score minus its deviation is
low where the critic is not sure. Combinations do not nest. Several scores of one RAHF cost least as one member:
rahf:DIR:alignment=0.7,overall=2.

To guide sampling, a reward must be differentiable: any of these without deviations, where python: names a function or an
object that differentiable.py describes.

DIR may be an address, hf://owner/name for example: see rahf/folders.py.

Features are clip:DIR, the image embeddings of a CLIP in a folder of rahf.convert, or python:package.module:name,
(images) -> float[B, D]. Images are B arrays uint8[H, W, 3] of any sizes.

A reward may have an attribute `identity`, a short string that changes whenever the reward can give other numbers. Results
are cached under it, and never without it. A `python:` reward without one gets an identity from the source files of its
module and of those that it imports, installed packages apart: set the attribute if the reward depends on more, such as
weights on disk.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.machinery
import importlib.util
import itertools
import math
import pathlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

import rahf
from rahf import reward as rahf_reward
from rahf.fingerprint import fingerprint
from rahf.reward import differentiable, embed, preference
from rahf.reward.differentiable import Differentiable
from richhf_data import json_files, schema
from richhf_data.errors import UserError, in_code_of_the_user

_STANDARD, _INSTALLED = sysconfig.get_paths()["stdlib"], {"site-packages", "dist-packages"}


def reward_of(spec: str) -> Callable:
    """The reward that a spec names, `(images, prompts) -> float32[B]`. Call it through `checked`.

    Raises:
      UserError: a spec of another form, a folder without such a model, an unknown score, a missing module or name.
    """
    return _reward_of(spec, "reward")


def named(given: Sequence[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """name -> spec, of SPEC or NAME=SPEC each; without a name, that of the spec's kind, as clip of clip:DIR.

    Raises:
      UserError: a name twice, or one of `taken`.
    """
    found, taken = {}, {*taken}
    for text in given:
        match = re.fullmatch(r"(\w+)=(.*)", text, re.DOTALL)
        name, spec = match.groups() if match else (text.partition(":")[0], text)
        if name in taken or name in found:
            raise UserError(f"reward: got {text!r} for the name {name!r}, which is taken, expected another NAME=SPEC")
        found[name] = spec
    return found


def differentiable_of(spec: str) -> Differentiable:
    """The reward that a spec names, differentiable with respect to the pixels. Raises as `reward_of`."""
    return _reward_of(spec, "guide").differentiable


def critic_of(spec: str, scores: str = "overall") -> "ScoreReward":
    """The RAHF of a spec `rahf:DIR`; its `model` predicts heatmaps. Raises as `reward_of`, and for another kind of spec.

    scores: what it rewards if the spec names no score: "plausibility,alignment".
    """
    kind, _, rest = spec.partition(":")
    if kind != "rahf" or not rest:
        raise UserError(
            f"critic: got {spec!r}, expected rahf:DIR, a RAHF with heatmaps: a folder of rahf.train or rahf.convert"
        )
    critic = _rahf(rahf.load, rest, scores)
    critic.model.require(f"critic: {spec}", "heatmaps")
    return critic


def features_of(spec: str) -> Callable:
    """The network that a spec names, `(images) -> float[B, D]`. Raises as `reward_of`."""
    return _parsed("features", spec, {"clip": _clip, "python": functools.partial(Own, "features")})


def identity_of(reward, name: str = "reward") -> str | None:
    """The attribute `identity` of a reward or a critic; None if it has none. Raises UserError if it is not a text."""
    identity = getattr(reward, "identity", None)
    if identity is not None and (not isinstance(identity, str) or not identity):
        raise UserError(f"{name}: got the identity {identity!r}, expected a text that differs between {name}s, or None")
    return identity


def check_prompts(reward: Callable, prompts: Sequence[str]) -> None:
    """Refuses a prompt that a RAHF in a reward cannot read: UserError. Other rewards may refuse one when they are called."""
    for _, member in getattr(reward, "members", [("", reward)]):
        if isinstance(member, ScoreReward):
            for prompt in dict.fromkeys(prompts):
                member.model.text_ids(prompt)


def checked(reward: Callable, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """Calls a reward with B images and their prompts: float32[B].

    Raises:
      UserError: different numbers of images and prompts; the reward returns another shape, or values that are not finite
        numbers.
    """
    if len(images) != len(prompts):
        raise UserError(f"reward: got {len(images)} images and {len(prompts)} prompts, expected as many")
    name = f"reward {reward.spec}" if isinstance(reward, Own) else "reward"
    expected = f"expected {len(prompts)} finite numbers, one an image"
    rewards = as_floats(name, reward(images, prompts), expected)
    if rewards.shape != (len(prompts),):
        raise UserError(f"{name}: got shape {rewards.shape}, {expected}")
    if len(wrong := np.flatnonzero(~np.isfinite(rewards))):
        first = f"{rewards[wrong[0]]} for {prompts[wrong[0]][:80]!r}"
        raise UserError(f"{name}: got {len(wrong)} values that are not finite, the first {first}; {expected}")
    return rewards


def as_floats(name: str, given, expected: str) -> np.ndarray:
    """What a function returned as float32. Raises UserError with its name if it is not numbers in one shape."""
    try:
        found = np.asarray(given)
        if found.dtype.kind in "OSUMmc":
            raise TypeError(f"values of type {found.dtype}")
        return found.astype(np.float32)
    except (Exception, SystemExit) as error:  # an array of another library raises its own
        raise UserError(f"{name}: got {type(given).__name__} ({error}), {expected}") from error


def _parsed(name: str, spec: str, kinds: Mapping[str, Callable]) -> Callable:
    kind, colon, rest = spec.partition(":")
    if kind not in kinds or not colon or not rest:
        expected = " or ".join(f"{kind}:..." for kind in kinds)
        raise UserError(f"{name}: got {spec!r}, expected {expected} (python -m pydoc rahf.reward.specs)")
    return kinds[kind](rest)


def _clip(folder: str) -> Callable:
    return embed.Clip(folder).images


def _reward_of(spec: str, what: str) -> Callable:
    """what: the role of a user's function, see `Own`."""
    combinations = {"sum": functools.partial(_sum, what), "ensemble": functools.partial(_ensemble, what)}
    return _parsed("reward", spec, _single(what, rahf.load) | combinations)


def _single(what: str, load: Callable) -> dict[str, Callable]:
    """The rewards that combine no others: kind -> reader of what follows its colon. load: `rahf.load`."""
    return {
        "reward": lambda rest: rahf_reward.load(*re.split(":(?!//)", rest, maxsplit=1)),
        "rahf": functools.partial(_rahf, load),
        "clip": preference.clip_score,
        "pickscore": preference.pickscore,
        "hpsv2": preference.hpsv2,
        "aesthetic": preference.aesthetic,
        "imagereward": preference.imagereward,
        "python": functools.partial(Own, what),
    }


def _sum(what: str, rest: str) -> "Combination":
    name, weights, members = f"reward: sum:{rest}", [], []
    for term in rest.split("|"):
        number, star, member = term.partition("*")
        if not star or ":" in number:  # a * of a folder's name
            number, member = "1", term
        weights.append(_number(number, f"{name}: got {number!r} times {member!r}, expected a number"))
        members.append(member)
    return Combination("sum", weights, _members(what, name, members))


def _ensemble(what: str, rest: str) -> "Combination":
    number, _, members = rest.partition(":")
    name = f"reward: ensemble:{rest}"
    wrong = f"{name}: got {number!r} times the standard deviation, expected a number of 0 or more: ensemble:1.5:SPEC|SPEC"
    if (penalty := _number(number, wrong)) < 0:
        raise UserError(wrong)
    return Combination("ensemble", [penalty], _members(what, name, members.split("|")))


def _members(what: str, name: str, members: Sequence[str]) -> list[tuple[str, Callable]]:
    """(spec, reward) of each member of a combination. A RAHF that several members name is loaded once."""
    if "" in members:
        raise UserError(f"{name}: got an empty member, expected a reward on each side of |")
    if nested := [member for member in members if member.startswith(("sum:", "ensemble:"))]:
        raise UserError(f"{name}: got the member {nested[0]!r}, expected no sum and no ensemble in another")
    if len(members) < 2:
        raise UserError(f"{name}: got one member, {members[0]!r}, expected two or more with | between them")
    kinds = _single(what, functools.cache(rahf.load))
    return [(member, _parsed("reward", member, kinds)) for member in members]


def _number(text: str, wrong: str) -> float:
    """A finite number of a spec. Raises UserError `wrong` for another text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(wrong)
    return value


def _rahf(load: Callable, rest: str, default: str = "overall") -> "ScoreReward":
    folder, colon, sum_of = rest.rpartition(":")
    if not colon or "/" in sum_of:  # gs://bucket/run
        folder, sum_of = rest, default
    weights = {}
    for term in sum_of.split(","):
        name, equals, weight = term.partition("=")
        if name not in (known := (*differentiable.TERMS, *schema.DEVIATIONS)) or name in weights:
            expected = f"some of {', '.join(known)}, each once"
            raise UserError(f"reward: rahf:{rest}: got the score {name!r}, expected {expected}")
        wrong = f"reward: rahf:{rest}: got {weight!r} times {name}, expected a number"
        weights[name] = _number(weight, wrong) if equals else 1.0
    model = load(folder)
    if (deviations := weights.keys() & schema.DEVIATIONS) and not model.model_config.deviations:
        raise UserError(
            f"reward: rahf:{rest}: got {min(deviations)}, the model predicts no deviations, expected one trained with "
            "--config.model.score_head.deviation=True"
        )
    kinds = {"scores": schema.SCORES, "heatmaps": schema.HEATMAPS}
    model.require(f"reward: rahf:{rest}", *(part for part, names in kinds.items() if not weights.keys().isdisjoint(names)))
    return ScoreReward(model, weights)


class ScoreReward:
    """A weighted sum of the scores of a RAHF, of its heatmaps' means, and of its scores' deviations.

    Attributes:
      model: rahf.predictor.Model. weights: name of `differentiable.TERMS` or `schema.DEVIATIONS` -> its weight.
    """

    def __init__(self, model, weights: Mapping[str, float]):
        self.model, self.weights = model, weights

    def __call__(self, images, prompts) -> np.ndarray:
        return self.of_feedback(self.model.predict(images, prompts))

    def of_feedback(self, feedback) -> np.ndarray:
        """The reward of what the model predicted, `rahf.predictor.Feedback`: float32[B]."""
        terms = feedback.scores | {name: maps.mean((1, 2)) for name, maps in feedback.heatmaps.items()}
        terms |= {f"{name}_deviation": values for name, values in feedback.deviations.items()}
        return sum(np.float32(weight) * terms[name] for name, weight in self.weights.items())

    @functools.cached_property
    def differentiable(self) -> Differentiable:
        """The same reward as a JAX function of the pixels. Raises UserError for deviations, which have no gradient."""
        if deviations := sorted(self.weights.keys() & schema.DEVIATIONS):
            raise UserError(f"guide: got {deviations[0]}, which has no gradient, expected scores and heatmaps alone")
        return differentiable.of_rahf(self.model, self.weights, self.identity)

    @functools.cached_property
    def identity(self) -> str:
        """Depends on the model's parameters, configuration and vocabulary, and on the weights."""
        return fingerprint("rahf", *self.model.identity_parts(), list(self.weights.items()))


class Combination:
    """A sum or an ensemble of rewards.

    Attributes:
      kind: "sum" or "ensemble". numbers: the weight of each member, or what the standard deviation counts.
      members: (spec, reward) of each.
    """

    def __init__(self, kind: str, numbers: Sequence[float], members: Sequence[tuple[str, Callable]]):
        self.kind, self.numbers, self.members = kind, numbers, members
        combine = {"sum": differentiable.weighted_sum, "ensemble": differentiable.pessimistic_mean}[kind]
        self._combine = functools.partial(combine, np.asarray(numbers, np.float32))

    def __call__(self, images, prompts) -> np.ndarray:
        """Raises UserError that names the member: as `checked`, or the member's own."""
        values = []
        for spec, member in self.members:
            with contextlib.nullcontext() if isinstance(member, Own) else json_files.named(spec):  # `Own` names itself
                values.append(checked(member, images, prompts))
        return np.asarray(self._combine(np.stack(values)))

    @functools.cached_property
    def differentiable(self) -> Differentiable:
        """The same reward as a JAX function of the pixels."""
        members = [(spec, member.differentiable) for spec, member in self.members]
        return differentiable.combined(members, self._combine, self.identity)

    @functools.cached_property
    def identity(self) -> str | None:
        """Depends on the kind, the numbers and the members' identities; None if a member has none."""
        identities = [identity_of(member, f"reward {spec}") for spec, member in self.members]
        return None if None in identities else fingerprint(self.kind, self.numbers, identities)


class Own:
    """A user's function, whose errors are the user's.

    Args:
      what: reward, features or guide. rest: package.module:name.

    Attributes:
      spec: python:package.module:name. function: the user's.

    Raises:
      UserError: there is no such module or name, or the module raises an error.
    """

    def __init__(self, what: str, rest: str):
        module, colon, name = rest.partition(":")
        if not (module and colon and name) or module.startswith("."):
            raise UserError(f"{what}: got python:{rest}, expected python:package.module:name")
        self.spec, self._name = f"python:{rest}", f"{what}: python:{rest}"
        with in_code_of_the_user(self._name):
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError as error:
                if not f"{module}.".startswith(f"{error.name}."):
                    raise  # of something that the module imports
                found = error
        if isinstance(found, ModuleNotFoundError):
            raise UserError(f"{self._name}: {found}; is its folder on PYTHONPATH?") from found
        for part in name.split("."):
            with in_code_of_the_user(self._name):  # a module's own __getattr__
                inner = getattr(found, part, self)
            if inner is self:
                raise UserError(f"{self._name}: {found!r} has no attribute {part!r}")
            found = inner
        if not callable(found) and not (what == "guide" and isinstance(found, Differentiable)):
            raise UserError(f"{self._name} is a {type(found).__name__}, expected a function")
        self.function, self._module = found, module

    def __call__(self, *arguments):
        return self.guarded(self.function)(*arguments)

    def guarded(self, function: Callable) -> Callable:
        """The function; its errors are shown as the user's."""

        def call(*arguments):
            with in_code_of_the_user(self._name):
                return function(*arguments)

        return call

    @functools.cached_property
    def differentiable(self) -> Differentiable:
        """The function, one of images alone or a `Differentiable`, as the latter."""
        if not isinstance(self.function, Differentiable):
            return differentiable.of_function(self, self.identity)
        score, rows = self.guarded(self.function.score), self.guarded(self.function.rows)
        return dataclasses.replace(self.function, score=score, rows=rows, identity=self.identity)

    @functools.cached_property
    def identity(self) -> str | None:
        """The function's own; or of the source files that its module imports; None if the module has none."""
        with in_code_of_the_user(self._name):
            has_one = hasattr(self.function, "identity")
            if has_one and not (isinstance(self.function, Differentiable) and self.function.identity is None):
                return self.function.identity
        modules = filter(None, (self._module, getattr(self.function, "__module__", None)))
        if (files := _own_files(modules)) is None:
            return None
        return fingerprint("python", self.spec.removeprefix("python:"), *files)


def _own_files(modules: Iterable[str]) -> list[pathlib.Path] | None:
    """The files of modules and of the user's modules that they import; None if one of `modules` has none. Runs no code."""
    found = {module: _file(module) for module in modules}
    if None in found.values():
        return None
    left = list(found)
    while left:
        for name in sorted(_imports(module := left.pop(0), found[module])):
            file = _file(name)
            if file and name not in found and not _INSTALLED & set(file.parts) and not file.is_relative_to(_STANDARD):
                found[name] = file
                left.append(name)
    return list(found.values())


def _imports(module: str, file: pathlib.Path) -> set[str]:
    """The names that a module's source imports, and their packages; none of ours."""
    names = {module}
    with contextlib.suppress(SyntaxError, ValueError, ImportError):  # of a file that is not source text, or in no package
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    parents = {name[:end] for name in names for end, letter in enumerate(name) if letter == "."}
    return {name for name in names | parents if name.partition(".")[0] not in ("rahf", "richhf_data")}


def _file(module: str) -> pathlib.Path | None:
    """The file of a module, which is not imported for it; None if there is none."""
    folders = None
    for name in itertools.accumulate(module.split("."), "{}.{}".format):
        if name != module.partition(".")[0] and folders is None:  # its parent is no package
            return None
        spec = getattr(sys.modules.get(name), "__spec__", None)
        with contextlib.suppress(ImportError, ValueError):
            spec = spec or importlib.machinery.PathFinder.find_spec(name, folders)
        if spec is None:
            return None
        folders = spec.submodule_search_locations
    return pathlib.Path(spec.origin) if spec.has_location else None
