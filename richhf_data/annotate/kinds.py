"""What annotators are asked, and what an answer is.

An answer is a JSON object. Its keys depend on the kind of the project:

  rich          {"points": {"implausibility": [[0.25, 0.5]], "misalignment": []},   fractions of width and height
                 "words": [1],                                                       places of misaligned words
                 "nothing": ["misalignment"],                                        what was marked as flawless
                 "scores": {"plausibility": 4, ...}}                                 1 to 5
  binary        {"right": true}
  side_by_side  {"response": "left slightly better"}                                 one of `schema.SIDES`, as it was seen
"""

import math
from collections.abc import Mapping, Sequence

from richhf_data import checked, keywords, ranges, schema
from richhf_data.errors import UserError

KINDS = ("rich", "binary", "side_by_side")
WORDS = "words"
QUESTIONS = (*schema.HEATMAPS, WORDS, *schema.SCORES)  # of the kind "rich", in the order in which they are asked
SKIPS = {
    "inappropriate": "It is inappropriate",
    "broken": "The picture is broken",
    "not understood": "I do not understand it",
}
MAX_POINTS = 200  # of a kind in a picture
_NOTHING = {"implausibility": ("implausibility",), "misalignment": ("misalignment", WORDS)}  # what it answers


def check(kind: str, questions: Sequence[str], prompt: str, value) -> dict:
    """An answer without what was not asked; points in the order in which they were given.

    Args:
      kind: one of `KINDS`. questions: of the kind "rich", some of `QUESTIONS`. value: what the browser sent.

    Raises:
      UserError: a missing answer, an unknown key, a value of another type or out of its range, a contradiction.
    """
    return {"rich": _rich, "binary": _binary, "side_by_side": _side_by_side}[kind](questions, prompt, value)


def _object(value, name: str, keys: Sequence[str]) -> dict:
    if not isinstance(value, dict) or set(value) - set(keys):
        raise UserError(f"{name}: got {str(value)[:80]}, expected an object with keys of {', '.join(keys)}")
    return value


def _binary(questions, prompt, value) -> dict:
    del questions, prompt
    right = _object(value, "answer", ("right",)).get("right")
    if not isinstance(right, bool):
        raise UserError(f"right: got {right!r}, expected true or false")
    return {"right": right}


def _side_by_side(questions, prompt, value) -> dict:
    del questions, prompt
    response = _object(value, "answer", ("response",)).get("response")
    if response not in tuple(schema.SIDES):
        raise UserError(f"response: got {str(response)[:80]!r}, expected one of {', '.join(schema.SIDES)}")
    return {"response": response}


def _rich(questions, prompt, value) -> dict:
    value = _object(value, "answer", ("points", WORDS, "nothing", "scores"))
    given = _object(value.get("points", {}), "points", schema.HEATMAPS)
    points = {name: _points(given.get(name, []), name) for name in schema.HEATMAPS if name in questions}
    words = _places(prompt, value.get(WORDS, [])) if WORDS in questions else []
    nothing = checked.conform(list[str], value.get("nothing", []), "nothing")
    for name in nothing:
        if name not in schema.HEATMAPS:
            raise UserError(f"nothing: got {name[:80]!r}, expected some of {', '.join(schema.HEATMAPS)}")
    marked = {name: bool(points.get(name)) or (name == "misalignment" and bool(words)) for name in schema.HEATMAPS}
    for name in schema.HEATMAPS:
        asked = any(question in questions for question in _NOTHING[name])
        if marked[name] and name in nothing:
            raise UserError(f"{name}: got marks and that there is nothing to mark, expected one of them")
        if asked and not marked[name] and name not in nothing:
            raise UserError(f"{name}: got no answer, expected marks, or that there is nothing to mark")
    likert = _object(value.get("scores", {}), "scores", schema.SCORES)
    scores = {}
    for name in schema.SCORES:
        if name in questions:
            score = likert.get(name)
            if isinstance(score, bool) or score not in range(schema.LIKERT_LOW, schema.LIKERT_HIGH + 1):
                raise UserError(f"{name}: got {str(score)[:80]}, expected {schema.LIKERT_LOW} to {schema.LIKERT_HIGH}")
            scores[name] = int(score)
    answer = {"points": points, "nothing": [name for name in schema.HEATMAPS if name in nothing], "scores": scores}
    return answer | ({WORDS: words} if WORDS in questions else {})


def _places(prompt: str, value) -> list[int]:
    places, count = checked.conform(list[int], value, WORDS), len(keywords.tokenize(prompt))
    if wrong := [place for place in places if not 0 <= place < count]:
        raise UserError(f"words: got place {wrong[0]}, expected 0 to {count - 1}")
    return sorted(set(places))


def _points(value, name: str) -> list[list[float]]:
    points = checked.conform(list[tuple[float, ...]], value, name)
    if len(points) > MAX_POINTS:
        raise UserError(f"{name}: got {len(points)} points, expected at most {MAX_POINTS}")
    for point in points:
        if len(point) != 2 or not all(0 <= place <= 1 for place in point):
            raise UserError(f"{name}: got the point {str(point)[:80]}, expected [x, y], fractions in [0, 1]")
    return [list(point) for point in points]


def checked_suggestion(prompt: str, value) -> dict:
    """A model's suggestion: points of each map, and places of words. Raises UserError for another form."""
    value = _object(value, "suggestion", ("points", WORDS))
    given = _object(value.get("points", {}), "points", schema.HEATMAPS)
    points = {name: _points(given.get(name, []), name) for name in schema.HEATMAPS}
    return {"points": points, WORDS: _places(prompt, value.get(WORDS, []))}


def checked_questions(questions: Sequence[str]) -> tuple[str, ...]:
    """The questions in the order of `QUESTIONS`. Raises UserError for an unknown one, and for none."""
    if unknown := [name for name in questions if name not in QUESTIONS]:
        raise UserError(f"questions: got {unknown[0]!r}, expected some of {', '.join(QUESTIONS)}")
    if not questions:
        raise UserError(f"questions: got none, expected some of {', '.join(QUESTIONS)}")
    return tuple(name for name in QUESTIONS if name in questions)


def annotation(answer: Mapping) -> dict:
    """The keys points, misaligned and scores of a line that `richhf_data.consolidate` reads, of a rich answer.

    Points and words that were not asked are absent.
    """
    line = {"points": answer["points"], "scores": answer["scores"]}
    return line | ({"misaligned": answer[WORDS]} if WORDS in answer else {})


def agreement(kind: str, answer: Mapping, known: Mapping) -> float:
    """How well an answer agrees with a known one, in [0, 1].

    Binary and side by side: 1 if they are equal, and one half for a response that is one step off. Rich: the mean over the
    questions that both answer. A score within one point counts 1, a score further off 0; a map counts the F1 of points that
    lie within two radii of one of the other's; words count their F1. Two empty sets agree.
    """
    if kind == "binary":
        return float(answer["right"] == known["right"])
    if kind == "side_by_side":
        steps = abs(schema.SIDES[answer["response"]] - schema.SIDES[known["response"]])
        return max(0.0, 1 - steps / 2)
    scores = {name: score for name, score in known["scores"].items() if name in answer["scores"]}
    parts = [float(abs(score - answer["scores"][name]) <= 1) for name, score in scores.items()]
    for name, points in known["points"].items():
        if (mine := answer["points"].get(name)) is None:
            continue
        parts.append(_f1(_near(points, mine), len(points), _near(mine, points), len(mine)))
    if WORDS in known and WORDS in answer:
        both = len(set(known[WORDS]) & set(answer[WORDS]))
        parts.append(_f1(both, len(known[WORDS]), both, len(answer[WORDS])))
    return sum(parts) / len(parts) if parts else 1.0


def _near(points, others) -> int:
    reach = 2 * schema.POINT_RADIUS
    return sum(any(math.dist(point, other) <= reach for other in others) for point in points)


def _f1(found: int, wanted: int, right: int, given: int) -> float:
    if not wanted and not given:
        return 1.0
    recall, precision = found / wanted if wanted else 0.0, right / given if given else 0.0
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0


SECONDS = ranges.Range(0, 1e6)  # that an answer may say it took
