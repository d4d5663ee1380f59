"""Label Studio's JSON, from and to the annotation lines that `richhf_data.consolidate` reads.

`LABELLING_CONFIG` is the labelling interface of a project there. Its parts and the keys of a line:

  KeyPointLabels points     points             a label for each map; x and y in percent of width and height
  Labels         words      misaligned         a span of the prompt's characters
  Rating         <score>    scores             1 to 5, a tag for each score
  Choices        nothing    an empty list      what was looked at and is flawless

A line leaves out what its annotator was not asked, and so does Label Studio's result.

Source: labelstud.io/guide/task_format and labelstud.io/tags; label_studio/tasks/serializers.py for what an import takes.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from richhf_data import consolidate, jsonl, keywords, schema
from richhf_data.errors import UserError

WORD_LABEL = "misaligned"
NOTHING = {  # question -> the choice that answers it with an empty list
    "implausibility": "Nothing is implausible",
    "misalignment": "No region is misaligned",
    "words": "No word is misaligned",
}
_ANSWERS = ("points", "misaligned", "labels", "scores")
_POINT_SIZE = 1  # percent of the width: how large Label Studio draws a point
_POINTS = "\n".join(
    f'        <Label value="{name}" background="{colour}"/>'
    for name, colour in zip(schema.HEATMAPS, ("#d55e00", "#0072b2"), strict=True)
)
_CHOICES = "\n".join(f'        <Choice value="{text}"/>' for text in NOTHING.values())
_RATINGS = "\n".join(
    f'      <Header value="{name.capitalize()}, {schema.LIKERT_HIGH} is best" size="5"/>\n'
    f'      <Rating name="{name}" toName="image" maxRating="{schema.LIKERT_HIGH}" required="true"/>'
    for name in schema.SCORES
)
LABELLING_CONFIG = f"""\
<View>
  <View style="display: flex; gap: 2em">
    <View style="flex: 60%">
      <KeyPointLabels name="points" toName="image">
{_POINTS}
      </KeyPointLabels>
      <Image name="image" value="$image" zoom="true"/>
    </View>
    <View style="flex: 40%">
      <Labels name="words" toName="prompt">
        <Label value="{WORD_LABEL}" background="#cc79a7"/>
      </Labels>
      <Text name="prompt" value="$prompt" granularity="word"/>
      <Choices name="nothing" toName="image" choice="multiple">
{_CHOICES}
      </Choices>
{_RATINGS}
    </View>
  </View>
</View>
"""


def to_label_studio(
    lines: Iterable[Mapping],
    url_of: Callable[[str], str] = str,
    size_of: Callable[[str], tuple[int, int]] | None = None,
) -> list[dict]:
    """Annotation lines as Label Studio's tasks, to import there: a task for each uid, in the order of the lines.

    Args:
      lines: {"uid", "annotator", "prompt", "points", "misaligned" or "labels", "scores"}, see `richhf_data.consolidate`.
        One with uid and prompt alone makes a task that is not annotated yet.
      url_of: uid -> where Label Studio finds the picture, such as "/data/local-files/?d=images/cat7.png".
      size_of: uid -> (width, height) in pixels, which some of Label Studio's exports need.

    Returns:
      [{"id", "data": {"image", "prompt", "uid"}, "annotations": [{"completed_by": {"email"}, "result", ...}]}]. The email is
      the annotator's name: Label Studio's import refuses one that none of its users has.

    Raises:
      UserError: a line without uid, prompt, annotator or answers, an answer that `consolidate` would refuse, or two prompts
        of one uid.
    """
    tasks: dict[str, dict] = {}
    for number, line in enumerate(lines, 1):
        uid, prompt = (jsonl.text_of(line, key, "text", f"line {number}", blank=False) for key in ("uid", "prompt"))
        where = f"line {number} (uid {uid!r})"
        task = tasks.get(uid)
        if task is None:
            data = {"image": url_of(uid), "prompt": prompt, "uid": uid}
            task = tasks[uid] = {"id": len(tasks) + 1, "data": data, "annotations": []}
        if task["data"]["prompt"] != prompt:
            raise UserError(f"{where}: prompt: got {prompt!r}, expected that of a line before: {task['data']['prompt']!r}")
        try:
            result = list(_results(line, prompt, size_of and size_of(uid)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if "annotator" not in line and not result:
            continue
        annotator = jsonl.text_of(line, "annotator", "text", where, blank=False)
        if not result:
            raise UserError(
                f"{where}: got no answer of {annotator}, expected some of {', '.join(_ANSWERS)}; remove the line"
            )
        result = [{"id": f"r{place}", **one} for place, one in enumerate(result)]
        author = {"completed_by": {"email": annotator}}
        task["annotations"].append(author | {"was_cancelled": False, "ground_truth": False, "result": result})
    return list(tasks.values())


def _results(line: Mapping, prompt: str, size: tuple[int, int] | None) -> Iterator[dict]:
    points, words, scores = line.get("points", {}), _misaligned(line, prompt), line.get("scores", {})
    given = {"points": points, "scores": scores}
    if words is not None:
        given["labels"] = [int(place not in words) for place in range(len(keywords.tokenize(prompt)))]
    consolidate.check(consolidate.Annotation.from_json(given), len(keywords.tokenize(prompt)))
    more = {"image_rotation": 0}
    if size is not None:
        more |= dict(zip(("original_width", "original_height"), size, strict=True))
    for name in schema.HEATMAPS:
        for x, y in points.get(name, ()):
            value = {"x": 100 * x, "y": 100 * y, "width": _POINT_SIZE, "keypointlabels": [name]}
            yield _result("points", "image", "keypointlabels", value) | more
    spans = list(_spans(prompt))
    for place in sorted(words or ()):
        start, end = spans[place]
        value = {"start": start, "end": end, "text": prompt[start:end], "labels": [WORD_LABEL]}
        yield _result("words", "prompt", "labels", value)
    empty = [name for name in schema.HEATMAPS if name in points and not points[name]]
    if choices := [NOTHING[name] for name in (*empty, *(["words"] if words == set() else []))]:
        yield _result("nothing", "image", "choices", {"choices": choices})
    for name in schema.SCORES:
        if name in scores:
            yield _result(name, "image", "rating", {"rating": scores[name]})


def _result(name: str, of: str, kind: str, value: dict) -> dict:
    return {"from_name": name, "to_name": of, "type": kind, "value": value}


def _misaligned(line: Mapping, prompt: str) -> set[int] | None:
    """The places of the misaligned words; None if the annotator was not asked."""
    tokens = keywords.tokenize(prompt)
    if "labels" in line:
        if "misaligned" in line:
            raise UserError("misaligned: got it beside labels, expected one of them")
        labels = line["labels"]
        if not isinstance(labels, list) or len(labels) != len(tokens) or not all(one in (0, 1) for one in labels):
            raise UserError(f"labels: got {labels!r}, expected 0 or 1 for each of {tokens}")
        return {place for place, label in enumerate(labels) if label == keywords.MISALIGNED}
    if "misaligned" not in line:
        return None
    places = line["misaligned"]
    if not isinstance(places, list) or not all(type(i) is int and 0 <= i < len(tokens) for i in places):
        raise UserError(f"misaligned: got {places!r}, expected places from 0 to {len(tokens) - 1} in {tokens}")
    return set(places)


def _spans(prompt: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each token in the characters of the prompt.

    >>> list(_spans('a "red" cat'))
    [(0, 1), (3, 6), (8, 11)]
    """
    end = 0
    for token in keywords.tokenize(prompt):
        start = prompt.index(token, end)
        end = start + len(token)
        yield start, end


# ----------------------------------------------------------------------------------------------------- Label Studio's export


def from_label_studio(tasks: Iterable[Mapping], asked: Collection[str] = ()) -> list[dict]:
    """The annotation lines in Label Studio's JSON export, one per annotator and task, in its order.

    Skipped annotations (`was_cancelled`), drafts and predictions are left out. A span stands for every word that it touches.

    Args:
      tasks: the parsed export of a project with `LABELLING_CONFIG`.
      asked: of the keys of `NOTHING`, those that every annotator was asked: without marks and without the choice, their list
        is empty. Of others it is absent then, as if they had not been asked.

    Returns:
      lines for `richhf_data.consolidate`: {"uid", "annotator", "prompt", "points", "misaligned", "scores"}, `misaligned`
      ascending. The annotator is the email, or the id where the export has no more.

    Raises:
      UserError: names the task and what was got and expected: a missing prompt, uid or annotator; an annotator twice; no
        answer; an unknown type, label, choice or score; a percentage out of 0 to 100, a rating out of 1 to 5; a rotated
        picture; a span without a word; marks together with the choice that there is nothing to mark.
    """
    if unknown := set(asked) - set(NOTHING):
        raise UserError(f"asked: got {sorted(unknown)}, expected some of {', '.join(NOTHING)}")
    if isinstance(tasks, Mapping | str):
        raise UserError(f"label_studio: got {str(tasks)[:80]}, expected a list of tasks: the export as JSON")
    lines = []
    for place, task in enumerate(tasks, 1):
        if not isinstance(task, Mapping):
            raise UserError(f"label_studio: task number {place}: got {str(task)[:80]!r}, expected an object")
        try:
            lines += _lines(task, asked)
        except UserError as error:
            named = f"task {task['id']}" if "id" in task else f"task number {place}"
            raise UserError(f"label_studio: {named}: {error}") from error
    return lines


def _lines(task: Mapping, asked: Collection[str]) -> Iterator[dict]:
    data = task.get("data")
    if not isinstance(data, Mapping):
        raise UserError(f"data: got {str(data)[:80]}, expected an object with uid, prompt and image")
    for key in ("uid", "prompt"):
        if not jsonl.is_text(data.get(key)) or not data[key].strip():
            raise UserError(f"data: {key}: got {data.get(key)!r}, expected text; the task must be imported with it")
    authors = set()
    for annotation in _objects(task.get("annotations", []), "annotations"):
        if annotation.get("was_cancelled"):
            continue
        author = _author(annotation.get("completed_by"))
        if author in authors:
            raise UserError(f"annotations: got two of {author}, expected one; delete one in Label Studio")
        authors.add(author)
        try:
            answers = _answers(data["prompt"], _objects(annotation.get("result"), "result"), asked)
        except UserError as error:
            raise UserError(f"annotation of {author}: {error}") from error
        yield {"uid": data["uid"], "annotator": author, "prompt": data["prompt"], **answers}


def _objects(value, name: str) -> list:
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise UserError(f"{name}: got {str(value)[:80]}, expected a list of objects")
    return value


def _author(value) -> str:
    if isinstance(value, Mapping):
        value = value.get("email") or value.get("id")
    if type(value) is int:
        return str(value)
    if not jsonl.is_text(value) or not value.strip():
        raise UserError(f"completed_by: got {value!r}, expected an id, or an object with the email")
    return value


def _answers(prompt: str, results: list[Mapping], asked: Collection[str]) -> dict:
    """points, misaligned and scores of one annotation, without what was not answered."""
    marks: dict[str, list] = {name: [] for name in NOTHING}
    scores, nothing = {}, set()
    for result in results:
        kind, value = result.get("type"), result.get("value")
        if not isinstance(value, Mapping):
            raise UserError(f"value: got {str(value)[:80]}, expected an object")
        if kind == "keypointlabels":
            marks[_label(value, kind, schema.HEATMAPS)].append(_point(result, value))
        elif kind == "labels":
            _label(value, kind, (WORD_LABEL,))
            marks["words"] += _touched(prompt, value)
        elif kind == "rating":
            name, rating = result.get("from_name"), value.get("rating")
            if name not in schema.SCORES or name in scores:
                raise UserError(f"rating: got one of {name!r}, expected one each of {', '.join(schema.SCORES)}")
            scores[name] = _number(rating, f"{name} score", schema.LIKERT_LOW, schema.LIKERT_HIGH)
        elif kind == "choices":
            nothing |= _choices(value.get("choices"))
        else:
            expected = "keypointlabels, labels, rating or choices; the project must have our LABELLING_CONFIG"
            raise UserError(f"result: got the type {kind!r}, expected {expected}")
    for name, text in NOTHING.items():
        if marks[name] and name in nothing:
            raise UserError(f"{name}: got {len(marks[name])} marks and {text!r}, expected one of them")
    given = {name: found for name, found in marks.items() if found or name in nothing or name in asked}
    points = {name: given[name] for name in schema.HEATMAPS if name in given}
    answers = {"points": points} if points else {}
    if "words" in given:
        answers["misaligned"] = sorted(set(given["words"]))
    if scores:
        answers["scores"] = {name: scores[name] for name in schema.SCORES if name in scores}
    if not answers:
        raise UserError("got no answer, expected points, words, scores or choices; skip or delete the annotation")
    return answers


def _label(value: Mapping, key: str, known: Collection[str]) -> str:
    labels = value.get(key)
    if not isinstance(labels, list) or len(labels) != 1 or labels[0] not in known:
        raise UserError(f"{key}: got {labels!r}, expected one of {', '.join(known)}")
    return labels[0]


def _point(result: Mapping, value: Mapping) -> list[float]:
    """(x, y) as fractions of width and height."""
    if rotation := result.get("image_rotation", 0):
        raise UserError(f"image_rotation: got {rotation!r} degrees, expected 0: the points count in the rotated picture")
    return [_number(value.get(axis), f"{axis} of a point, in percent", 0, 100) / 100 for axis in ("x", "y")]


def _number(value, name: str, least: int, most: int) -> float:
    if type(value) not in (int, float) or not least <= value <= most:
        raise UserError(f"{name}: got {value!r}, expected {least} to {most}")
    return value


def _choices(texts) -> set[str]:
    questions = {text: name for name, text in NOTHING.items()}
    if not isinstance(texts, list) or not all(isinstance(text, str) and text in questions for text in texts):
        raise UserError(f"choices: got {texts!r}, expected some of {', '.join(questions)}")
    return {questions[text] for text in texts}


def _touched(prompt: str, value: Mapping) -> list[int]:
    """The places of the tokens that a span touches.

    Offsets count characters. Versions of Label Studio count UTF-16 units instead, which differ after an emoji: the text
    in the span tells which.
    """
    start, end, text = value.get("start"), value.get("end"), value.get("text")
    if type(start) is not int or type(end) is not int or not 0 <= start < end:
        raise UserError(f"words: got a span from {start!r} to {end!r}, expected two offsets into the prompt")
    if text is not None:
        encoded = prompt.encode("utf-16-le")
        units = [len(encoded[: 2 * offset].decode("utf-16-le", errors="ignore")) for offset in (start, end)]
        candidates = [one for one in ((start, end), tuple(units)) if prompt[slice(*one)].split() == str(text).split()]
        if not candidates:
            got = f"got {text!r} from {start} to {end}, where the prompt has {prompt[start:end]!r}"
            raise UserError(f"words: {got}; expected the same: was the prompt changed after it was annotated?")
        start, end = candidates[0]
    places = [place for place, (first, last) in enumerate(_spans(prompt)) if first < end and start < last]
    if end > len(prompt) or not places:
        raise UserError(f"words: got a span from {start} to {end}, which has no word of {prompt!r}, expected one or more")
    return places
