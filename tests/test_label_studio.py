"""Label Studio's JSON: hand-written exports, round trips, errors."""

import copy
import json
import xml.etree.ElementTree

import numpy as np
import pytest

from richhf_data import consolidate, keywords, schema
from richhf_data.annotate import label_studio
from richhf_data.annotate.label_studio import NOTHING, from_label_studio, to_label_studio
from richhf_data.errors import UserError

PROMPT = 'a yellow cat, "sitting" on 2 mats'
LINE = {
    "uid": "cat7",
    "annotator": "ada@lab.org",
    "prompt": PROMPT,
    "points": {"implausibility": [[0.25, 0.5], [1, 0]], "misalignment": []},
    "misaligned": [1, 3],
    "scores": {"plausibility": 4, "overall": 3},
}


def keypoint(x, y, label, **more):
    value = {"x": x, "y": y, "width": 1, "keypointlabels": [label]}
    result = {"from_name": "points", "to_name": "image", "type": "keypointlabels", "value": value, "image_rotation": 0}
    return result | more


def span(start, end, text=None, label="misaligned"):
    value = {"start": start, "end": end, "labels": [label]} | ({} if text is None else {"text": text})
    return {"from_name": "words", "to_name": "prompt", "type": "labels", "value": value}


def rating(name, value):
    return {"from_name": name, "to_name": "image", "type": "rating", "value": {"rating": value}}


def choices(*texts):
    return {"from_name": "nothing", "to_name": "image", "type": "choices", "value": {"choices": list(texts)}}


def exported(*results, prompt=PROMPT, completed_by=7, **more):
    annotation = {"id": 1, "completed_by": completed_by, "was_cancelled": False, "result": list(results)}
    data = {"image": "/data/upload/1/cat7.png", "prompt": prompt, "uid": "cat7"}
    return {"id": 31, "data": data, "annotations": [annotation | more], "predictions": []}


def answers(*results, asked=(), **task):
    (line,) = from_label_studio([exported(*results, **task)], asked)
    return {key: value for key, value in line.items() if key not in ("uid", "annotator", "prompt")}


def test_a_line_becomes_a_task():
    (task,) = to_label_studio([LINE], "/local/{}.png".format, lambda uid: (640, 480))
    (annotation,) = task.pop("annotations")
    assert task == {"id": 1, "data": {"image": "/local/cat7.png", "prompt": PROMPT, "uid": "cat7"}}
    results = annotation.pop("result")
    assert annotation == {"completed_by": {"email": "ada@lab.org"}, "was_cancelled": False, "ground_truth": False}
    assert [one.pop("id") for one in results] == ["r0", "r1", "r2", "r3", "r4", "r5", "r6"]
    size = {"original_width": 640, "original_height": 480}
    assert results == [
        keypoint(25, 50, "implausibility", **size),
        keypoint(100, 0, "implausibility", **size),
        span(2, 8, "yellow"),
        span(15, 22, "sitting"),
        choices("No region is misaligned"),
        rating("plausibility", 4),
        rating("overall", 3),
    ]


def test_an_export_becomes_a_line():
    results = [
        span(2, 12, "yellow cat"),
        rating("overall", 3),
        keypoint(25, 50, "misalignment"),
        keypoint(12.5, 0, "misalignment"),
        choices("Nothing is implausible"),
    ]
    (line,) = from_label_studio([exported(*results, completed_by={"id": 3, "email": "ada@lab.org"})])
    assert line == {
        "uid": "cat7",
        "annotator": "ada@lab.org",
        "prompt": PROMPT,
        "points": {"implausibility": [], "misalignment": [[0.25, 0.5], [0.125, 0.0]]},
        "misaligned": [1, 2],
        "scores": {"overall": 3},
    }
    assert list(line["points"]) == list(schema.HEATMAPS)


def test_round_trip_of_random_lines_through_json(tmp_path):
    rng = np.random.default_rng(0)
    words = ["cat", "a", "a.b", '"red"', "2,", "é", "\U0001f600", "on  ", "x;y", "cat"]
    lines = []
    for number in range(120):
        prompt = " ".join(rng.choice(words, rng.integers(1, 9)))
        tokens = len(keywords.tokenize(prompt))
        for annotator in rng.choice(["ada", "bob", "7", "eve@lab.org"], rng.integers(1, 4), replace=False).tolist():
            line = {"uid": f"u{number}", "annotator": annotator, "prompt": prompt}
            points = {name: rng.random((rng.integers(0, 4), 2)).tolist() for name in schema.HEATMAPS if rng.random() < 0.7}
            if points:
                line["points"] = points
            if rng.random() < 0.7:
                line["misaligned"] = [place for place in range(tokens) if rng.random() < 0.3]
            scores = {name: int(rng.integers(1, 6)) for name in schema.SCORES if rng.random() < 0.6}
            if scores or len(line) == 3:
                line["scores"] = scores or {"overall": 2.5}
            lines.append(line)
    again = from_label_studio(json.loads(json.dumps(to_label_studio(lines))))
    assert len(again) == len(lines) and len({line["uid"] for line in lines}) == 120
    for line, other in zip(lines, again, strict=True):
        for name, points in line.get("points", {}).items():
            np.testing.assert_allclose(np.array(other["points"][name]), points, rtol=0, atol=1e-12)
            other["points"][name] = points
        assert other == line
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, again)))
    assert len(consolidate.read(str(tmp_path / "lines.jsonl"))) == 120


def test_lines_of_one_uid_share_a_task_and_labels_become_places():
    other = {"uid": "cat7", "annotator": "bob", "prompt": PROMPT, "labels": [1, 0, 1, 1, 1, 1, 0]}
    dog = {"uid": "dog", "annotator": "bob", "prompt": "a dog", "labels": [1, 1]}
    tasks = to_label_studio([LINE, dog, other])
    assert [(task["id"], task["data"]["uid"], len(task["annotations"])) for task in tasks] == [(1, "cat7", 2), (2, "dog", 1)]
    first, second, third = from_label_studio(tasks)
    assert first == LINE
    assert second == {"uid": "cat7", "annotator": "bob", "prompt": PROMPT, "misaligned": [1, 6]}
    assert third == {"uid": "dog", "annotator": "bob", "prompt": "a dog", "misaligned": []}


def test_a_line_without_answers_and_annotator_is_a_task_to_annotate():
    (task,) = to_label_studio([{"uid": "cat7", "prompt": PROMPT}])
    assert task == {"id": 1, "data": {"image": "cat7", "prompt": PROMPT, "uid": "cat7"}, "annotations": []}
    assert from_label_studio([task]) == []


def test_absent_is_not_empty():
    assert answers(rating("overall", 1)) == {"scores": {"overall": 1}}
    assert answers(choices(*NOTHING.values())) == {
        "points": {"implausibility": [], "misalignment": []},
        "misaligned": [],
    }
    assert answers(span(0, 1)) == {"misaligned": [0]}
    assert answers(keypoint(0, 100, "implausibility")) == {"points": {"implausibility": [[0, 1]]}}


def test_what_was_asked_and_not_marked_is_empty():
    assert answers(span(0, 1), asked=("misalignment", "words")) == {"points": {"misalignment": []}, "misaligned": [0]}
    assert answers(asked=("words",)) == {"misaligned": []}
    with pytest.raises(UserError, match=r"asked: got \['scores'\], expected some of implausibility, misalignment, words"):
        from_label_studio([], ("scores",))


@pytest.mark.parametrize(
    ("start", "end", "places"),
    [
        (0, 33, [0, 1, 2, 3, 4, 5, 6]),
        (1, 9, [1]),
        (7, 10, [1, 2]),
        (12, 15, None),
        (13, 16, [3]),
        (14, 22, [3]),
        (32, 33, [6]),
    ],
)
def test_a_span_stands_for_the_words_that_it_touches(start, end, places):
    if places is None:
        with pytest.raises(UserError, match="task 31: annotation of 7: words: got a span from 12 to 15, which has no word"):
            answers(span(start, end))
    else:
        assert answers(span(start, end)) == {"misaligned": places}
        assert answers(span(start, end, PROMPT[start:end])) == {"misaligned": places}


def test_offsets_after_an_emoji_in_characters_and_in_utf_16():
    prompt = "\U0001f600 red \U0001f600 cat"
    assert answers(span(8, 11, "cat"), prompt=prompt) == {"misaligned": [3]}
    assert answers(span(10, 13, "cat"), prompt=prompt) == {"misaligned": [3]}
    assert answers(span(3, 6, "red"), prompt=prompt) == {"misaligned": [1]}
    with pytest.raises(UserError, match="words: got 'dog' from 8 to 11, where the prompt has 'cat'"):
        answers(span(8, 11, "dog"), prompt=prompt)


def test_skipped_annotations_drafts_and_predictions_are_left_out():
    task = exported(rating("overall", 1), was_cancelled=True)
    task |= {"drafts": [{"result": []}], "predictions": [{"result": [rating("overall", 2)]}]}
    assert from_label_studio([task]) == []
    task["annotations"].append({"completed_by": 7, "result": [rating("overall", 3)]})
    (line,) = from_label_studio([task])
    assert (line["annotator"], line["scores"]) == ("7", {"overall": 3})


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([keypoint(5, 5, "artifact")], r"keypointlabels: got \['artifact'\], expected one of implausibility, misalignment"),
        ([keypoint(5, 100.1, "misalignment")], r"y of a point, in percent: got 100.1, expected 0 to 100"),
        ([keypoint(-1, 5, "misalignment")], r"x of a point, in percent: got -1, expected 0 to 100"),
        ([keypoint(float("nan"), 5, "misalignment")], r"x of a point, in percent: got nan"),
        ([keypoint("5", 5, "misalignment")], r"x of a point, in percent: got '5'"),
        ([keypoint(5, 5, "misalignment", image_rotation=90)], r"image_rotation: got 90 degrees, expected 0"),
        ([span(2, 8, label="wrong")], r"labels: got \['wrong'\], expected one of misaligned"),
        ([span(8, 9)], r"words: got a span from 8 to 9, which has no word of .*, expected one or more"),
        ([span(30, 40)], r"words: got a span from 30 to 40, which has no word"),
        ([span(5, 2)], r"words: got a span from 5 to 2, expected two offsets"),
        ([span("/p[1]", 2)], r"words: got a span from '/p\[1\]' to 2, expected two offsets"),
        ([rating("overall", 0)], r"overall score: got 0, expected 1 to 5"),
        ([rating("overall", 6)], r"overall score: got 6, expected 1 to 5"),
        ([rating("beauty", 3)], r"rating: got one of 'beauty', expected one each of plausibility"),
        ([rating("overall", 3), rating("overall", 4)], r"rating: got one of 'overall', expected one each"),
        ([choices("All is well")], r"choices: got \['All is well'\], expected some of Nothing is implausible"),
        ([choices(NOTHING["words"]), span(0, 1)], r"words: got 1 marks and 'No word is misaligned', expected one of them"),
        (
            [{"type": "textarea", "value": {}}],
            r"result: got the type 'textarea', expected keypointlabels, labels, rating or",
        ),
        ([{"type": "rating"}], r"value: got None, expected an object"),
        ([], r"got no answer, expected points, words, scores or choices; skip or delete the annotation"),
    ],
)
def test_errors_name_the_task_and_the_annotator(results, message):
    with pytest.raises(UserError, match=f"label_studio: task 31: annotation of 7: {message}"):
        from_label_studio([exported(*results)])


def test_errors_of_a_task():
    good = exported(rating("overall", 1))
    for key, value in (("prompt", None), ("prompt", " "), ("uid", 5)):
        with pytest.raises(UserError, match=f"label_studio: task 31: data: {key}: got {value!r}, expected text"):
            from_label_studio([good | {"data": good["data"] | {key: value}}])
    for value in (None, {}, {"email": " "}, True, 1.5):
        with pytest.raises(UserError, match=r"task 31: completed_by: got .*, expected an id, or an object with the email"):
            from_label_studio([exported(rating("overall", 1), completed_by=value)])
    with pytest.raises(UserError, match="task 31: annotations: got two of 7, expected one; delete one in Label Studio"):
        from_label_studio([good | {"annotations": good["annotations"] * 2}])
    with pytest.raises(UserError, match="task number 2: data: got None, expected an object with uid, prompt and image"):
        from_label_studio([good, {}])
    with pytest.raises(UserError, match="task number 1: got '5', expected an object"):
        from_label_studio([5])
    with pytest.raises(UserError, match="expected a list of tasks: the export as JSON"):
        from_label_studio(good)
    with pytest.raises(UserError, match="task 31: annotations: got None, expected a list of objects"):
        from_label_studio([good | {"annotations": None}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, r"line 1: prompt: got None, expected text"),
        ({"annotator": ""}, r"line 1 \(uid 'cat7'\): annotator: got '', expected text"),
        ({"misaligned": [7]}, r"line 1 \(uid 'cat7'\): misaligned: got \[7\], expected places from 0 to 6"),
        ({"labels": [1] * 7}, r"misaligned: got it beside labels, expected one of them"),
        ({"points": {"implausibility": [[2, 0]]}}, r"implausibility point: got \(2.0, 0.0\), expected \(x, y\)"),
        ({"points": {"artifact": []}}, r"annotation points: got .*, expected only implausibility, misalignment"),
        ({"scores": {"overall": 6}}, r"overall score: got 6.0, expected 1 .. 5"),
    ],
)
def test_errors_of_a_line(change, message):
    with pytest.raises(UserError, match=message):
        to_label_studio([LINE | change])


def test_errors_of_several_lines():
    with pytest.raises(UserError, match=r"line 2 \(uid 'cat7'\): prompt: got 'a dog', expected that of a line before: 'a y"):
        to_label_studio([LINE, LINE | {"annotator": "bob", "prompt": "a dog", "misaligned": []}])
    bare = {key: LINE[key] for key in ("uid", "annotator", "prompt")}
    with pytest.raises(UserError, match=r"line 1 \(uid 'cat7'\): got no answer of ada@lab.org, expected some of points"):
        to_label_studio([bare])
    with pytest.raises(UserError, match=r"line 1 \(uid 'cat7'\): got no 'annotator'"):
        to_label_studio([{key: value for key, value in LINE.items() if key != "annotator"}])
    with pytest.raises(UserError, match=r"labels: got \[1\], expected 0 or 1 for each of"):
        to_label_studio([bare | {"labels": [1]}])


def test_the_labelling_config_has_what_results_name():
    root = xml.etree.ElementTree.fromstring(label_studio.LABELLING_CONFIG)
    tags = {one.get("name"): one for one in root.iter() if one.get("name")}
    line = copy.deepcopy(LINE) | {"scores": dict.fromkeys(schema.SCORES, 5)}
    line["points"]["misalignment"] = [[0.5, 0.5]]
    empty = LINE | {"points": {name: [] for name in schema.HEATMAPS}, "misaligned": [], "annotator": "bob"}
    (task,) = to_label_studio([line, empty])
    used = set()
    for result in (result for annotation in task["annotations"] for result in annotation["result"]):
        tag = tags[result["from_name"]]
        assert tag.tag.lower() == result["type"] and tag.get("toName") == result["to_name"]
        used |= {result["from_name"], result["to_name"]}
        if result["type"] != "rating":
            assert set(result["value"][result["type"]]) <= {one.get("value") for one in tag}
    assert used == set(tags)
    assert {one.get("value") for one in tags["nothing"]} == set(NOTHING.values())
    assert [tags[name].get("maxRating") for name in schema.SCORES] == ["5"] * 4
    assert (tags["image"].get("value"), tags["prompt"].get("value")) == ("$image", "$prompt")
    assert {"image", "prompt", "uid"} == set(task["data"])
