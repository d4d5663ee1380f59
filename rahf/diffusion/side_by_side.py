"""Verdicts on two sets of pictures, seen side by side: how often the later set's picture is better than the first's.

A response is one of `RESPONSES`, of the later picture against the first picture of the same prompt. It comes from a score's
differences (`from_scores`), from people (`read_responses`) or from a function that sees both pictures (`judged`). `verdict`
summarises responses as Table 5 of paper A does.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from rahf.reward import specs
from richhf_data import jsonl, paths, schema
from richhf_data.errors import UserError

RESPONSES = {
    "significantly better": 2,
    "slightly better": 1,
    "about the same": 0,
    "slightly worse": -1,
    "significantly worse": -2,
}
MARGINS = (0.02, 0.1)
BATCH = 32  # pairs at a time
RESAMPLES = 10_000
_DIGESTS = ("left_digest", "right_digest")
_LINE = '{"prompt": text, "left": name, "right": name, "response": text}'
_VALUES = list(RESPONSES.values())
_Z = statistics.NormalDist().inv_cdf(0.975)


@dataclasses.dataclass(frozen=True)
class Response:
    """What one person said of two pictures.

    Attributes:
      where: the file and line, for errors. prompt: of both pictures. left, right: the sets that they are of.
      value: -2 to 2, positive: the right one is better.
      digests: of the left and the right picture (`richhf_data.images.digest`); None if the line does not tell.
    """

    where: str
    prompt: str
    left: str
    right: str
    value: int
    digests: tuple[str, str] | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the responses say.

    Attributes:
      counts: each of `RESPONSES` -> how many. prompts: how many.
      shares: each of `RESPONSES`, "better" and "worse" (both kinds each) -> its share. intervals: the same -> (low, high) of
        the share's 95 % confidence interval.
      mean: response, -2 to 2. wins, ties, losses: prompts whose mean response is above 0, 0 and below 0.
      p_value: of the two-sided sign test: that wins and losses differ so much if both are as likely. Ties are left out.
    """

    counts: Mapping[str, int]
    prompts: int
    shares: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    mean: float
    wins: int
    ties: int
    losses: int
    p_value: float

    def flat(self, prefix: str) -> dict[str, float]:
        """prefix/<response>, .../low, .../high, and prefix/ with responses, prompts, mean, wins, ties, losses, p_value."""
        found = {"responses": sum(self.counts.values())}
        found |= {name: getattr(self, name) for name in ("prompts", "mean", "wins", "ties", "losses", "p_value")}
        for name, share in self.shares.items():
            low, high = self.intervals[name]
            found |= {name: share, f"{name}/low": low, f"{name}/high": high}
        return {f"{prefix}/{name}": float(value) for name, value in found.items()}


# ---- Responses ------------------------------------------------------------------------------------------------------
def paired(first: Sequence[str], later: Sequence[str]) -> tuple[list[int], list[int]]:
    """Pairs the pictures of the same prompt in their order, the i-th with the i-th. A picture without a partner is left out.

    Args:
      first, later: the prompts of the pictures of both sets.

    Returns:
      The rows of the pairs in the first set, and in the later one.

    Raises:
      UserError: the sets have no prompt in common.
    """
    left = collections.defaultdict(collections.deque)
    for row, prompt in enumerate(later):
        left[prompt].append(row)
    pairs = [(row, left[prompt].popleft()) for row, prompt in enumerate(first) if left[prompt]]
    if not pairs:
        raise UserError("images: got two sets with no prompt in common, expected some; use the same prompts for both")
    of_first, of_later = zip(*pairs, strict=True)
    return list(of_first), list(of_later)


def checked_margins(margins: Sequence) -> tuple[float, float]:
    """(slight, significant) as numbers. Raises UserError if they are not two finite ones, 0 <= slight < significant."""
    try:
        slight, significant = map(float, margins)
    except (TypeError, ValueError):
        slight = significant = math.nan
    if not 0 <= slight < significant < math.inf:
        expected = f"two numbers, 0 or more and the second larger, such as {MARGINS[0]},{MARGINS[1]}"
        raise UserError(f"margins: got {margins!r}, expected {expected}")
    return slight, significant


def from_scores(first: np.ndarray, later: np.ndarray, margins: Sequence[float] = MARGINS) -> np.ndarray:
    """The responses of a score, int[n].

    Args:
      first, later: float[n], the scores of both pictures of each pair, higher is better.
      margins: the least difference of a slightly, and of a significantly better picture.

    Raises:
      UserError: different numbers of scores, scores that are not finite, faulty margins.
    """
    slight, significant = checked_margins(margins)
    first, later = np.asarray(first, np.float64), np.asarray(later, np.float64)
    if first.ndim != 1 or first.shape != later.shape:
        raise UserError(f"scores: got shapes {first.shape} and {later.shape}, expected one score for each of n pairs")
    if not (np.isfinite(first).all() and np.isfinite(later).all()):
        raise UserError("scores: got values that are not finite, expected a finite score for each picture")
    rounding = 2.0**-22 * np.maximum(abs(first), abs(later))  # of float32: 0.5 - 0.4 reaches a margin of 0.1
    size = abs(later - first) + rounding
    return np.sign(later - first).astype(int) * ((size >= slight).astype(int) + (size >= significant))


def judged(judge: Callable, first: Sequence, later: Sequence, prompts: Sequence[str], seed: int = 0) -> np.ndarray:
    """The responses of a function that sees both pictures at once, int[n].

    The later picture is on the left in one half of the pairs, drawn at random, so that a liking for one side cancels.

    Args:
      judge: (left images, right images, prompts) -> int[B] in -2..2, positive: the right one is better. Called with at most
        `BATCH` pairs.
      first, later: the n pairs' pictures. seed: of the sides.

    Raises:
      UserError: different numbers of pictures and prompts, a judge that returns another shape or other values.
    """
    if not len(first) == len(later) == len(prompts):
        got = f"{len(first)} and {len(later)} images and {len(prompts)} prompts"
        raise UserError(f"judge: got {got}, expected as many of each")
    turned = np.random.default_rng(seed).permutation(len(prompts)) % 2 == 1
    found = np.zeros(len(prompts), int)
    for start in range(0, len(prompts), BATCH):
        rows = range(len(prompts))[start : start + BATCH]
        lefts, rights = ([(later if turned[row] == on_left else first)[row] for row in rows] for on_left in (True, False))
        found[start : start + BATCH] = _checked("judge", judge(lefts, rights, [prompts[row] for row in rows]), len(rows))
    return np.where(turned, -found, found)


def responses_of(path, names: Sequence[str], hint: str = "--name names the sets") -> Iterator[Response]:
    """Reads people's responses from a .jsonl file, line by line.

        {"prompt": "a cat", "left": "after", "right": "before", "response": "left slightly better", "annotator": "ada"}

    "left" and "right" are names of sets, on any side, and "response" is one of `schema.SIDES`. "annotator" is optional, and
    so are "left_digest" and "right_digest", which the annotation server writes.

    Args:
      names: of all sets. hint: how to give others, for errors.

    Raises:
      UserError: no such file, a line of another form (names its number).
    """
    paths.check_file("responses", path, "a .jsonl file")
    with open(path, "rb") as file:
        for number, line in jsonl.lines(file):
            where = f"responses: {path} line {number}"
            row = jsonl.parse(line, _LINE, where)
            keys = ["prompt", "left", "right", "response", *(["annotator"] if "annotator" in row else [])]
            keys += _DIGESTS if row.keys() & set(_DIGESTS) else ()
            found = {key: jsonl.text_of(row, key, _LINE, where, blank=False) for key in keys}
            prompt, left, right, response = (found[key] for key in keys[:4])
            for side, name in (("left", left), ("right", right)):
                if name not in names:
                    expected = f"one of the sets {', '.join(names)}"
                    raise UserError(f"{where}: {side}: got {name!r}, expected {expected}; {hint}")
            if left == right:
                raise UserError(f"{where}: got {left!r} on both sides, expected two different sets")
            if response not in schema.SIDES:
                raise UserError(f"{where}: response: got {response!r}, expected one of {', '.join(schema.SIDES)}")
            digests = tuple(found[key] for key in _DIGESTS) if _DIGESTS[0] in found else None
            yield Response(where, prompt, left, right, schema.SIDES[response], digests)


def read_responses(path, names: Sequence[str]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Reads people's responses (`responses_of`) to the pairs with a picture of the first set.

    Args:
      names: of all sets.

    Returns:
      name of a later set -> (its responses against the first set, int[n]; their prompts). Sets that no line compares with
      the first are absent, and lines that compare two later sets are left out.

    Raises:
      UserError: as `responses_of`; no line that compares a set with the first.
    """
    first, found = names[0], {}
    for one in responses_of(path, names):
        if first in (one.left, one.right):
            later, sign = (one.right, 1) if one.left == first else (one.left, -1)
            responses, prompts = found.setdefault(later, ([], []))
            responses.append(sign * one.value)
            prompts.append(one.prompt)
    if not found:
        raise UserError(f"responses: {path} has no line that compares {first!r} with another set, expected one or more")
    return {later: (np.array(responses), prompts) for later, (responses, prompts) in found.items()}


# ---- The verdict ----------------------------------------------------------------------------------------------------
def verdict(responses: np.ndarray, prompts: Sequence[str]) -> Verdict:
    """Summarises responses, int[n] in -2..2, to pairs with the n prompts.

    Prompts are independent, responses to one prompt are not. If each prompt has one response, the intervals are Wilson's. If
    not, they are the percentiles of `RESAMPLES` bootstrap samples of the prompts; a share that is the same in every prompt
    (0 %, for example), which these samples cannot vary, has Wilson's interval with as many responses as prompts.

    Raises:
      UserError: different numbers of responses and prompts, none, other values.
    """
    import scipy.stats  # a second: every command would pay for it

    responses = _checked("responses", responses, len(prompts))
    if not len(prompts):
        raise UserError("responses: got none, expected one or more")
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    rows = np.array([numbers[prompt] for prompt in prompts])
    kinds = {name: responses == value for name, value in RESPONSES.items()}
    kinds |= {"better": responses > 0, "worse": responses < 0}
    counts = np.stack([np.bincount(rows, kind, len(numbers)) for kind in kinds.values()], axis=1)  # [prompts, kinds]
    sums = np.bincount(rows, responses)
    wins, losses = int(np.sum(sums > 0)), int(np.sum(sums < 0))
    return Verdict(
        counts={name: int(kinds[name].sum()) for name in RESPONSES},
        prompts=len(numbers),
        shares={name: float(kind.mean()) for name, kind in kinds.items()},
        intervals=dict(zip(kinds, _intervals(counts), strict=True)),
        mean=float(responses.mean()),
        wins=wins,
        ties=len(numbers) - wins - losses,
        losses=losses,
        p_value=float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
    )


def table(verdicts: Mapping[str, Verdict]) -> list[list[str]]:
    """Lines of cells, header first: a column for each verdict, by its title."""
    found = list(verdicts.values())
    lines = [["side by side", *verdicts], ["responses", *(str(sum(one.counts.values())) for one in found)]]
    for name in found[0].shares:
        intervals = [tuple(100 * bound for bound in one.intervals[name]) for one in found]
        shares = [f"{100 * one.shares[name]:.1f} %" for one in found]
        cells = [f"{share} ({low:.1f} to {high:.1f})" for share, (low, high) in zip(shares, intervals, strict=True)]
        lines.append([name, *cells])
    lines.append(["mean response, -2 to 2", *(f"{one.mean:+.2f}" for one in found)])
    lines.append(["prompts", *(str(one.prompts) for one in found)])
    lines.append(["prompts better / same / worse", *(f"{one.wins} / {one.ties} / {one.losses}" for one in found)])
    lines.append(["p of the sign test", *(f"{one.p_value:.2g}" for one in found)])
    return lines


def _intervals(counts: np.ndarray) -> list[tuple[float, float]]:
    """The intervals of `verdict` for float[prompts, kinds], how often each kind of response was given to each prompt."""
    of_prompts = counts[:, : len(RESPONSES)].sum(axis=1)
    low, high = wilson = _wilson(counts.sum(axis=0) / of_prompts.sum(), len(counts))
    if of_prompts.max() > 1:
        rng, samples = np.random.default_rng(0), np.zeros((RESAMPLES, counts.shape[1]))
        for sample in samples:
            times = np.bincount(rng.integers(len(counts), size=len(counts)), minlength=len(counts))
            sample[:] = times @ counts
        samples /= samples[:, : len(RESPONSES)].sum(axis=1, keepdims=True)
        found = np.percentile(samples, (2.5, 97.5), axis=0)
        low, high = np.where(found[0] < found[1], found, wilson)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _wilson(shares: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % intervals of shares of `count` independent responses, as scipy.stats.binomtest computes them."""
    square = _Z**2 / count
    centre = shares + square / 2
    half = _Z * np.sqrt(shares * (1 - shares) / count + square / (4 * count))
    low, high = (centre - half) / (1 + square), (centre + half) / (1 + square)
    return np.clip(low, 0, shares), np.clip(high, shares, 1)  # at 0 and 1, where rounding leaves 1e-17


def _checked(name: str, responses, count: int) -> np.ndarray:
    expected = f"expected {count} whole numbers from -2 to 2"
    found = specs.as_floats(name, responses, expected)
    if found.shape != (count,) or not np.isin(found, _VALUES).all():
        got = f"shape {found.shape}" if found.shape != (count,) else found[~np.isin(found, _VALUES)][0]
        raise UserError(f"{name}: got {got}, {expected}")
    return found.astype(int)
