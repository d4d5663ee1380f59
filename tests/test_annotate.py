"""The annotation server: its store, its pages, and what it exports."""

import contextlib
import json
import os
import pathlib
import sqlite3
import subprocess
import sys
import types

import cv2
import numpy as np
import pytest
from starlette.testclient import TestClient

from benchmarks import annotate as benchmark
from richhf_data import consolidate, images, schema
from richhf_data.annotate import __main__ as commands
from richhf_data.annotate import export, kinds, overview, pictures, server, store
from richhf_data.errors import UserError

PROMPT = "a yellow cat, on a table"
RICH = {
    "points": {"implausibility": [[0.25, 0.5]], "misalignment": []},
    "words": [1],
    "nothing": [],
    "scores": dict(zip(schema.SCORES, (4, 3, 5, 2), strict=True)),
}
FLAWLESS = RICH | {
    "points": {"implausibility": [], "misalignment": []},
    "words": [],
    "nothing": ["implausibility", "misalignment"],
}


class Clock:
    """A clock that the test turns."""

    def __init__(self):
        self.now = 1e9

    def __call__(self):
        return self.now


def project(folder, items=4, people=("ada", "bob", "eve", "dan"), clock=None, prompts=None, gold=(), **given):
    """A store with pictures and annotators."""
    opened = store.Store(folder, given, clock or Clock())
    new = []
    for number in range(items):
        (folder / store.PICTURES / f"cat{number}.png").write_bytes(
            cv2.imencode(".png", np.full((8, 12, 3), number, np.uint8))[1]
        )
        known = RICH if number in gold else None
        new.append(store.New(f"cat{number}", prompts[number] if prompts else PROMPT, (f"cat{number}.png",), gold=known))
    opened.add(new)
    return opened, [opened.enter(opened.key(opened.invite(name))) for name in people]


def finish(opened, person, value=RICH, seconds=9.0):
    """Answers the person's next item; returns its number."""
    row = opened.next_item(person)
    opened.answer(row["item"], person, value, row["revision"], seconds)
    return row["item"]


# ---- Answers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"points": {"implausibility": [], "misalignment": []}},
            "implausibility: got no answer, expected marks, or that there",
        ),
        ({"words": []}, "misalignment: got no answer"),
        ({"nothing": ["implausibility"]}, "implausibility: got marks and that there is nothing to mark"),
        ({"nothing": ["beauty"]}, "nothing: got 'beauty', expected some of implausibility, misalignment"),
        ({"words": [6]}, "words: got place 6, expected 0 to 5"),
        ({"words": [-1]}, "words: got place -1"),
        ({"words": "cat"}, "words: got"),
        ({"points": {"implausibility": [[1.5, 0]]}}, r"implausibility: got the point \(1.5, 0.0\), expected \[x, y\]"),
        ({"points": {"implausibility": [[float("nan"), 0]]}}, "implausibility"),
        ({"points": {"implausibility": [[0.5]]}}, "implausibility: got the point"),
        ({"points": {"implausibility": [[0.5, 0.5]] * 201}}, "implausibility: got 201 points, expected at most 200"),
        ({"points": {"beauty": []}}, "points: got .*expected an object with keys of implausibility, misalignment"),
        ({"scores": RICH["scores"] | {"overall": 6}}, "overall: got 6, expected 1 to 5"),
        ({"scores": RICH["scores"] | {"overall": True}}, "overall: got True, expected 1 to 5"),
        ({"scores": {"plausibility": 3}}, "alignment: got None, expected 1 to 5"),
        ({"beauty": 5}, "answer: got .*expected an object with keys of points, words, nothing, scores"),
    ],
)
def test_a_wrong_answer_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        kinds.check("rich", kinds.QUESTIONS, PROMPT, RICH | changes)


def test_only_what_is_asked_is_kept():
    assert kinds.check("rich", kinds.QUESTIONS, PROMPT, RICH) == RICH
    found = kinds.check("rich", ("words", "overall"), PROMPT, {"words": [2, 2, 0], "scores": {"overall": 1}})
    assert found == {"points": {}, "nothing": [], "scores": {"overall": 1}, "words": [0, 2]}
    assert kinds.annotation(found) == {"points": {}, "scores": {"overall": 1}, "misaligned": [0, 2]}
    assert kinds.check("binary", (), PROMPT, {"right": False}) == {"right": False}
    for kind, value in (("binary", {"right": 1}), ("binary", None), ("side_by_side", {"response": "left"})):
        with pytest.raises(UserError, match="expected"):
            kinds.check(kind, (), PROMPT, value)


def test_agreement_of_two_answers():
    assert kinds.agreement("rich", RICH, RICH) == 1
    other = {"points": {"implausibility": [[0.3, 0.5], [0.9, 0.9]], "misalignment": []}, "words": [1, 2], "nothing": [],
             "scores": RICH["scores"] | {"overall": 4}}  # fmt: skip
    # Scores: 3 of 4 within a point. Points and words: recall 1, precision 1/2. Misalignment: both empty.
    assert kinds.agreement("rich", other, RICH) == pytest.approx((3 + 2 / 3 + 1 + 2 / 3) / 7)
    assert kinds.agreement("rich", FLAWLESS, RICH) == pytest.approx((4 + 0 + 1 + 0) / 7)
    assert kinds.agreement("binary", {"right": True}, {"right": False}) == 0
    sides = [{"response": name} for name in schema.SIDES]
    assert [kinds.agreement("side_by_side", one, sides[0]) for one in sides] == [1, 0.5, 0, 0, 0]


# ---- Who gets what --------------------------------------------------------------------------------------------------
def test_items_are_finished_before_others_begin_and_nobody_sees_one_twice(tmp_path):
    opened, people = project(tmp_path, items=3, wanted=2)
    ada, bob, eve, dan = people
    assert opened.next_item(ada)["item"] == opened.next_item(ada)["item"] == 1  # what is on the screen stays there
    assert opened.next_item(bob)["item"] == 1
    assert opened.next_item(eve)["item"] == 2  # both places of 1 are taken
    assert [finish(opened, one) for one in (ada, bob, eve)] == [1, 1, 2]
    assert finish(opened, ada) == 2 and finish(opened, ada) == 3
    assert opened.next_item(ada) is None
    assert finish(opened, dan) == 3 and opened.next_item(dan) is None
    assert [row["finished"] for row in opened.items()] == [2, 2, 2]
    assert opened.answered(ada) == (3, [1, 2, 3]) and opened.left(ada) == 0


def test_a_lease_ends_without_a_sign_of_life(tmp_path):
    clock = Clock()
    opened, (ada, bob, *_) = project(tmp_path, items=1, wanted=1, clock=clock, lease_seconds=100.0)
    assert opened.next_item(ada)["item"] == 1 and opened.next_item(bob) is None
    clock.now += 90
    assert opened.draft(1, ada, {"answer": {"words": [1]}}, 0)  # a draft renews it
    clock.now += 90
    assert opened.next_item(bob) is None
    clock.now += 20
    assert opened.next_item(bob)["item"] == 1
    assert not opened.draft(1, ada, None, 0)
    assert opened.answer(1, bob, RICH, 0, 5) == ("done", 1)
    assert opened.answer(1, ada, FLAWLESS, 0, 5) == ("late", 1)  # kept beside the others'
    assert [row["finished"] for row in opened.items()] == [1]
    assert {row["name"]: row["state"] for row in opened.work()} == {"ada": "late", "bob": "done"}


def test_what_was_given_up_comes_back_with_its_draft(tmp_path):
    clock = Clock()
    opened, (ada, bob, *_) = project(tmp_path, clock=clock, lease_seconds=100.0)
    opened.next_item(ada)
    draft = {"answer": {"words": [1]}}
    opened.draft(1, ada, draft, 0)
    clock.now += 1000
    again = opened.next_item(ada)
    assert again["item"] == 1 and json.loads(again["draft"]) == draft
    clock.now += 1000
    opened.next_item(bob)  # finds that ada's lease has ended, and gets the same item, as there is room
    assert opened.draft(1, ada, None, 0)  # a sign of life takes the place again, as long as one is free
    assert opened.item(1, ada)["state"] == "leased" and json.loads(opened.item(1, ada)["draft"]) == draft
    opened.answer(1, ada, RICH, 0, 5)
    opened.draft(1, ada, draft, 0)  # came after the answer
    assert opened.item(1, ada)["draft"] is None and opened.item(1, ada)["state"] == "done"


def test_an_answer_is_kept_once_and_can_be_changed(tmp_path):
    opened, (ada, *_) = project(tmp_path)
    opened.next_item(ada)
    assert opened.answer(1, ada, RICH, 0, 5) == opened.answer(1, ada, RICH, 0, 5) == ("done", 1)  # the reply was lost
    assert opened.answer(1, ada, FLAWLESS, 1, 5) == ("done", 2)
    with pytest.raises(store.Refused, match="another window") as refused:
        opened.answer(1, ada, RICH, 1, 5)
    assert refused.value.status == 409
    assert json.loads(opened.item(1, ada)["answer"]) == FLAWLESS
    with pytest.raises(store.Refused, match="no such picture for you"):
        opened.answer(2, ada, RICH, 0, 5)


def test_gold_comes_first_and_then_now_and_again(tmp_path):
    options = {"gold": (0, 1, 2), "gold_every": 3, "qualify": 2, "qualify_share": 0.8}
    opened, (ada, bob, eve, _) = project(tmp_path, items=12, wanted=9, **options)
    order = [finish(opened, ada) for _ in range(7)]
    assert [item <= 3 for item in order] == [True, True, False, False, True, False, False]
    assert [item for item in order if item > 3] == [4, 5, 6, 7] and len(set(order)) == 7
    first = [finish(opened, bob, FLAWLESS) for _ in range(2)]
    with pytest.raises(store.Refused, match="differ from what this project looks for"):
        opened.next_item(bob)
    opened.answer(first[0], bob, RICH, 1, 5)  # a change comes too late
    for _ in range(2):
        row = opened.next_item(eve)
        opened.skip(row["item"], eve, "broken", 0, 1.0)  # so does nobody pass
    for one in (bob, eve):
        with pytest.raises(store.Refused, match="differ from what this project looks for"):
            opened.next_item(one)
    opened.admit(bob.id)
    assert opened.next_item(bob)["item"] == 4
    row = next(row for row in overview.overview(opened)["annotators"] if row["name"] == "bob")
    assert row["gold"] == pytest.approx((1 + kinds.agreement("rich", FLAWLESS, RICH)) / 2)
    export.export(opened, tmp_path / "out")
    uids = [json.loads(line)["uid"] for line in (tmp_path / "out/annotations.jsonl").read_text().splitlines()]
    assert uids == ["cat3", "cat4", "cat5", "cat6"]  # no gold


def test_a_paused_project_gives_nothing_out_and_takes_what_is_on_screens(tmp_path):
    opened, (ada, bob, *_) = project(tmp_path)
    opened.next_item(ada)
    opened.pause(True)
    with pytest.raises(store.Refused, match="paused"):
        opened.next_item(bob)
    assert finish(opened, ada) == 1
    opened.pause(False)
    assert opened.next_item(bob)["item"] == 1


def test_links_end(tmp_path):
    opened, (ada, bob, *_) = project(tmp_path, items=1, wanted=1)
    key = opened.key(ada.id)
    assert opened.enter(key) == ada and opened.enter(key[:-1] + ("0" if key[-1] != "0" else "1")) is None
    assert opened.enter("") is opened.enter("1-") is opened.enter("ü-") is opened.enter("9" * 30 + "-x") is None
    opened.next_item(ada)
    opened.revoke(ada.id)
    assert opened.enter(key) is None and opened.next_item(bob)["item"] == 1  # what was on ada's screen is free
    opened.renew(ada.id)
    assert opened.enter(key) is None and opened.enter(opened.key(ada.id)).name == "ada"


def test_another_opinion_opens_an_item_again(tmp_path):
    opened, (ada, bob, *_) = project(tmp_path, items=1, wanted=1)
    finish(opened, ada)
    assert opened.next_item(bob) is None
    opened.another_opinion(1)
    assert finish(opened, bob) == 1
    assert [(row["wanted"], row["finished"]) for row in opened.items()] == [(2, 2)]


def test_the_overview_flags_who_works_badly(tmp_path):
    opened, (ada, bob, eve, _) = project(tmp_path, items=12, wanted=3)
    for number in range(12):
        value = RICH | {"scores": {name: 1 + (number + i) % 5 for i, name in enumerate(schema.SCORES)}}
        finish(opened, ada, value)
        finish(opened, bob, FLAWLESS, seconds=0.5)
        finish(opened, eve, value | {"words": list(range(6)), "points": RICH["points"] | {"misalignment": [[0.1, 0.1]] * 9}})
    opened.next_item(opened.enter(opened.key(opened.invite("new"))))
    found = overview.overview(opened, now=opened._clock() + 10)
    flags = {row["name"]: row["flags"] for row in found["annotators"]}
    same = [f"always the same {name}" for name in schema.SCORES]
    assert flags["bob"] == ["too quick", *same, "marks nothing"]
    assert flags["eve"] == ["marks more than twice as much as usual"] and flags["ada"] == flags["new"] == []
    assert (found["count"], found["finished"], found["answers"]) == (12, 12, 36)


# ---- Projects -------------------------------------------------------------------------------------------------------
def test_a_folder_of_another_project_is_refused(tmp_path):
    store.Store(tmp_path / "one", {"kind": "binary", "question": "Which isn't it?"}).close()
    with pytest.raises(UserError, match="kind: got 'rich', expected 'binary', that of the project in"):
        store.Store(tmp_path / "one", {"kind": "rich"})
    with contextlib.closing(store.Store(tmp_path / "one", {"wanted": 5})) as again:
        assert (again.settings.kind, again.settings.wanted) == ("binary", 5)
        assert again.settings.question == "Which isn't it?"
    with contextlib.closing(sqlite3.connect(tmp_path / "one" / store.FILE)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="has version 99, expected 1; use the code that wrote it"):
        store.Store(tmp_path / "one")
    for name, content in (("two", b"x" * 5000), ("three", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / store.FILE).write_bytes(content)
    with pytest.raises(UserError, match="file is not a database; expected a project of this command"):
        store.Store(tmp_path / "two")
    with pytest.raises(UserError, match="is the database of another program"):
        store.Store(tmp_path / "three")
    with pytest.raises(UserError, match=r"has no annotations\.sqlite, expected an annotation project"):
        store.Store(tmp_path / "four")


def write_pictures(folder, prompts, suffix=".png", shade=0):
    folder.mkdir()
    for number in range(len(prompts)):
        cv2.imwrite(str(folder / f"{number}{suffix}"), np.full((9, 16, 3), 20 * number + shade, np.uint8))
    lines = [{"image": f"{number}{suffix}", "prompt": prompt} for number, prompt in enumerate(prompts)]
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "captions.jsonl").write_text(
        "".join(json.dumps({"uid": str(number), "caption": prompt}) + "\n" for number, prompt in enumerate(prompts))
    )


def test_pictures_come_from_every_source(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write_pictures(tmp_path / "in", ["a cat", "a dog"])
    table = {
        "caption": ["a cat", "a dog"],
        "image": [(tmp_path / f"in/{i}.png").read_bytes() for i in range(2)],
        "uid": ["0", "1"],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "table.parquet")
    found = [
        [(one.uid, one.prompt) for one in pictures.find(str(source))]
        for source in (tmp_path / "in", tmp_path / "in/images.jsonl", tmp_path / "in/*.png", tmp_path / "table.parquet")
    ]
    assert found == [[("0", "a cat"), ("1", "a dog")]] * 4
    with contextlib.closing(store.Store(tmp_path / "project", {})) as opened:
        assert pictures.add(opened, pictures.find(str(tmp_path / "in"))) == 2
        assert pictures.add(opened, pictures.find(str(tmp_path / "table.parquet"))) == 0
        (tmp_path / "in/captions.jsonl").write_text('{"uid": "0", "caption": "a cow"}\n{"uid": "1", "caption": "a dog"}\n')
        with pytest.raises(UserError, match="0: got the prompt 'a cow', expected that of the project; name the picture"):
            pictures.add(opened, pictures.find(str(tmp_path / "in/*.png")))
        write_pictures(tmp_path / "other", ["a cat", "a dog"], shade=7)
        with pytest.raises(UserError, match="1: got another picture, expected that of the project; name the picture"):
            pictures.add(opened, pictures.find(str(tmp_path / "other"))[1:])
        lines = [{"image": "0.png", "prompt": "a cat", "priority": 3, "suggestion": {"words": [1]}}]
        (tmp_path / "in/more.jsonl").write_text("".join(map(json.dumps, lines)))
        assert pictures.add(opened, pictures.find(str(tmp_path / "in/more.jsonl")), {"0": RICH}) == 0
        row = opened.items()[0]  # is given what it lacked
        assert row["priority"] == 3 and json.loads(row["gold"]) == RICH and json.loads(row["suggestion"])["words"] == [1]


def test_pictures_that_cannot_be_annotated_are_named(tmp_path):
    write_pictures(tmp_path / "in", ["a cat", "a dog"])
    (tmp_path / "in/1.png").write_bytes(b"no picture")
    with contextlib.closing(store.Store(tmp_path / "project", {})) as opened:
        assert pictures.add(opened, pictures.find(str(tmp_path / "in"))) == 1
        assert opened.refused() == [("1", "no known image format")]
    for source, message in (
        ("none/*.png", "found no picture by"),
        ("in", None),
        ("empty", "has no images.jsonl, expected one, or a pattern such as"),
    ):
        if message:
            (tmp_path / "empty").mkdir(exist_ok=True)
            with pytest.raises(UserError, match=message):
                pictures.find(str(tmp_path / source))
    (tmp_path / "in/captions.jsonl").write_text('{"uid": "0", "caption": "a cat"}\n')
    with pytest.raises(
        UserError, match=r"1 of 2 pictures have no prompt: 1; add them to captions\.jsonl beside the pictures"
    ):
        pictures.find(str(tmp_path / "in/*.png"))
    for uid, message in (
        ("../x", "uid: got '../x', expected a file name"),
        (".x", "uid: got '.x'"),
        ("é" * 101, "uid: got"),
        ("a\0b", "uid: got"),
    ):
        (tmp_path / "list.jsonl").write_text(json.dumps({"image": "in/0.png", "prompt": "a", "uid": uid}))
        with pytest.raises(UserError, match=message):
            pictures.find(str(tmp_path / "list.jsonl"))
    (tmp_path / "list.jsonl").write_text('{"image": "in/0.png", "prompt": "a"}\n{"image": "x/0.png", "prompt": "a"}')
    for row, message in (
        ({"priority": "high"}, "row 1: priority: got 'high', expected a number"),
        ({"suggestion": {"words": [9]}}, "row 1: suggestion: words: got place 9, expected 0 to 0"),
        ({"suggestion": [1]}, r"row 1: suggestion: suggestion: got \[1\], expected an object"),
    ):
        (tmp_path / "list.jsonl").write_text(json.dumps({"image": "in/0.png", "prompt": "a"} | row))
        with pytest.raises(UserError, match=message):
            pictures.find(str(tmp_path / "list.jsonl"))
    twice, opened = [pictures.Source("0", "a", b"")] * 2, store.Store(tmp_path / "new", {})
    with (
        contextlib.closing(opened),
        pytest.raises(UserError, match="got two pictures called '0', expected one; give each a"),
    ):
        pictures.add(opened, twice)


# ---- Export ---------------------------------------------------------------------------------------------------------
def test_rich_answers_are_read_by_consolidate(tmp_path):
    opened, (ada, bob, eve, _) = project(tmp_path, items=2, wanted=2)
    finish(opened, ada)
    finish(opened, bob, FLAWLESS)
    for one in (eve, ada):  # the second item is skipped by most
        row = opened.next_item(one)
        opened.skip(row["item"], one, "inappropriate", 0, 1.0)
    counts = export.export(opened, tmp_path / "out", "/data/")
    assert counts == {"late": 0, "of skipped items": 0, "annotations.jsonl": 2}
    before = (tmp_path / "out/annotations.jsonl").read_bytes()
    export.export(opened, tmp_path / "out", "/data/")
    assert (tmp_path / "out/annotations.jsonl").read_bytes() == before
    (one,) = consolidate.read(str(tmp_path / "out/annotations.jsonl")).values()
    assert one.annotations["ada"].points == (((0.25, 0.5),), ()) and one.annotations["ada"].labels == (1, 0, 1, 1, 1, 1)
    assert one.annotations["bob"].points == ((), ()) and one.annotations["bob"].labels == (1,) * 6
    (task,) = json.loads((tmp_path / "out/label_studio.json").read_text())
    assert task["data"]["image"] == "/data/cat0.png" and len(task["annotations"]) == 2
    (row,) = [row for row in overview.overview(opened)["left_out"]]
    assert row["uid"] == "cat1"


def test_answers_to_suggestions_are_told_apart(tmp_path):
    opened, (ada, bob, *_) = project(tmp_path, items=0, wanted=2, suggest=True)
    opened.add([store.New("a", PROMPT, ("a.png",), suggestion=RICH), store.New("b", PROMPT, ("b.png",))])
    for one in (ada, bob):
        finish(opened, one)
        finish(opened, one)
    assert export.export(opened, tmp_path / "out")["annotations.jsonl"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out/annotations_suggested.jsonl").read_text().splitlines()]
    assert [line["uid"] for line in lines] == ["a", "a"]


def test_the_majority_of_binary_answers_is_a_label(tmp_path):
    from rahf.reward.image_table import LabelledImages

    opened, people = project(tmp_path, items=3, wanted=3, kind="binary")
    for number, votes in enumerate(((True, True, False), (False, False), (True, False))):
        for one, right in zip(people, votes, strict=False):
            row = opened.next_item(one)
            assert row["item"] == number + 1
            opened.answer(row["item"], one, {"right": right}, 0, 1.0)
        for one in people[len(votes) : 3]:
            assert opened.next_item(one)["item"] == number + 1
            opened.skip(number + 1, one, "broken", 0, 1.0)
    export.export(opened, tmp_path / "out")
    table = LabelledImages(tmp_path / "out/feedback.jsonl")
    assert table.labels == [1, 0] and len(list(table.images())) == 2


def test_sides_are_shuffled_kept_and_told_to_nobody(tmp_path):
    from rahf.diffusion import side_by_side

    for name in ("before", "after"):
        write_pictures(tmp_path / name, [f"prompt {i}" for i in range(12)])
    with contextlib.closing(store.Store(tmp_path / "project", {"kind": "side_by_side", "wanted": 2})) as opened:
        sets = {name: pictures.find(str(tmp_path / name)) for name in ("before", "after")}
        assert pictures.add_pairs(opened, sets) == 12 and pictures.add_pairs(opened, sets) == 0
        client = TestClient(server.app(opened, accounts=True))
        people = [opened.enter(opened.key(opened.invite(name, name == "ada"))) for name in ("ada", "bob")]
        swapped = []
        for one in people:
            client.cookies.set(server.cookie_name(opened), opened.key(one.id))
            for _ in range(12):
                shown = client.get("/api/next").json()
                assert "before" not in json.dumps(shown) and "after" not in json.dumps(shown)
                swap = opened.swapped(shown["item"], one.id)
                swapped.append(swap)
                first = json.loads(opened.one(shown["item"])["pictures"])
                assert [opened.picture(shown["item"], side, one).name for side in (0, 1)] == (first[::-1] if swap else first)
                assert opened.original(shown["item"], 0).name == first[0]
                better = "left slightly better" if swap else "right slightly better"  # always the second set
                opened.answer(shown["item"], one, {"response": better}, 0, 1.0)
        assert 4 < sum(swapped) < 20 and swapped[:12] != swapped[12:]
        export.export(opened, tmp_path / "out")
    responses, prompts = side_by_side.read_responses(tmp_path / "out/responses.jsonl", ["before", "after"])["after"]
    assert responses.tolist() == [1] * 24 and len(set(prompts)) == 12
    for line in (tmp_path / "out/responses.jsonl").read_text().splitlines():
        line = json.loads(line)
        for side in ("left", "right"):
            (picture,) = (one for one in sets[line[side]] if one.prompt == line["prompt"])
            assert images.digest(picture.data.read_bytes()) == line[f"{side}_digest"]


# ---- Over HTTP ------------------------------------------------------------------------------------------------------
@pytest.fixture
def site(tmp_path):
    """A project with accounts, and a client of each annotator."""
    opened, people = project(
        tmp_path, prompts=["<script>alert(1)</script> \u202eright", "../../etc/passwd", "😀 " * 5000, PROMPT]
    )
    application = server.app(opened, accounts=True)
    clients = {}
    administrator = opened.enter(opened.key(opened.invite("admin", administrator=True)))
    for one in (*people, administrator):
        clients[one.name] = client = TestClient(application)
        client.get(f"/enter/{opened.key(one.id)}")
        page = client.get("/", headers={"accept": "text/html"}).text
        token = json.loads(page.split('id="setup">')[1].split("</script>")[0])["token"]
        client.headers |= {"x-token": token}
    yield opened, clients, TestClient(application)
    opened.close()


def test_nothing_is_seen_or_changed_without_the_right(site):
    opened, clients, stranger = site
    ada, bob = clients["ada"], clients["bob"]
    for path in ("/", "/api/next", "/api/item/1", "/picture/1/0", "/admin", "/admin/item/1", "/guidelines"):
        assert stranger.get(path).status_code == 401, path
    assert stranger.get("/enter/1-00").status_code == 401
    assert ada.get("/api/next").json()["item"] == 1
    assert ada.get("/picture/1/0").headers["content-type"] == "image/png"
    for path in (
        "/picture/2/0",
        "/picture/1/1",
        "/api/item/2",
        "/picture/1/-1",
        f"/api/item/{10**30}",
        f"/picture/{2**63}/0",
    ):
        assert ada.get(path).status_code == 404, path
    assert bob.get("/picture/1/0").status_code == 404  # before it is given to bob
    for path in ("/admin", "/admin/item/1", "/admin/picture/1/0"):
        assert ada.get(path).status_code == 403
    assert ada.post("/api/admin/pause", json={}).status_code == 403
    body = {"answer": RICH, "revision": 0, "seconds": 3}
    assert bob.post("/api/item/1/answer", json=body).status_code == 404
    without = ada.post("/api/item/1/answer", json=body, headers={"x-token": bob.headers["x-token"]})  # another site has none
    assert without.status_code == 403 and "Reload" in without.json()["error"]
    assert ada.post("/api/item/1/answer", json=body).json()["state"] == "done"
    assert "RICH" not in bob.get("/api/next").text and bob.get("/api/item/1").json()["answer"] is None
    opened.revoke(2)
    assert bob.get("/api/next").status_code == 401


def test_pages_escape_everything_and_let_nothing_in(site):
    _, clients, _ = site
    for path in ("/", "/admin", "/admin/item/1", "/guidelines"):
        reply = clients["admin"].get(path, headers={"accept": "text/html"})
        assert reply.status_code == 200 and "<script>alert" not in reply.text
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert " style=" not in reply.text and " onclick" not in reply.text
    shown = clients["ada"].get("/api/next")
    assert shown.headers["content-type"] == "application/json" and shown.headers["cache-control"] == "no-store"
    assert shown.json()["prompt"].startswith("<script>")


def test_the_cookie_is_for_this_site_alone(tmp_path):
    opened, (ada, *_) = project(tmp_path)
    for url in ("", "https://a.example/"):
        reply = TestClient(server.app(opened, accounts=True, url=url)).get(f"/enter/{opened.key(ada.id)}")
        cookie = reply.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and ("secure" in cookie) == bool(url)
        assert cookie.startswith(server.cookie_name(opened))  # of this project alone
    other, _ = project(tmp_path / "other")
    assert server.cookie_name(other) != server.cookie_name(opened)


def test_requests_are_bounded(site):
    opened, clients, stranger = site
    ada = clients["ada"]
    ada.get("/api/next")
    big = {"answer": "x" * (server.MAX_BODY + 1)}
    assert ada.post("/api/item/1/answer", json=big).status_code == 413
    assert ada.post("/api/item/1/answer", content="x=1").status_code == 415
    for content in ("[1]", "{", "nul"):
        reply = ada.post("/api/item/1/answer", content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 422 and "expected a JSON object" in reply.json()["error"]
    for body in (
        {"revision": -1},
        {"revision": 0, "seconds": -1},
        {"revision": True},
        {"answer": RICH, "revision": 0, "seconds": 1e9},
    ):
        assert ada.post("/api/item/1/answer", json=body).status_code == 422, body
    assert ada.post("/api/item/1/skip", json={"reason": "dull", "revision": 0}).status_code == 422
    assert ada.post("/api/item/1/delete", json={}).status_code == 404
    lone = '{"revision": 0, "answer": {"scores": {"\\ud800": 1}}}'
    assert ada.post("/api/item/1/answer", content=lone, headers={"content-type": "application/json"}).status_code == 422
    stranger.app.state.site.of_address = server.Rate(server.HOST_RATE, server.HOST_BURST, Clock())
    for number in range(server.HOST_BURST + 1):  # another cookie each time makes nobody another one
        stranger.cookies.set(server.cookie_name(opened), f"1-{number}")
        reply = stranger.get("/static/annotate.css")
        if reply.status_code == 429:
            break
    assert reply.headers["retry-after"] == "1" and ada.get("/api/next").status_code == 200


def test_a_rate_recovers():
    clock = Clock()
    rate = server.Rate(3, 5, clock)
    assert not any(rate.wait("a") for _ in range(5))
    assert rate.wait("a") == pytest.approx(1 / 3) and rate.wait("b") == 0
    clock.now += 1
    assert [rate.wait("a") > 0 for _ in range(4)] == [False] * 3 + [True]


def test_a_full_disk_is_said_and_nothing_is_lost(site, monkeypatch):
    _, clients, _ = site
    clients["ada"].get("/api/next")

    def full(*args):
        raise sqlite3.OperationalError("database or disk is full")

    body = {"answer": RICH, "revision": 0, "seconds": 3}
    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "answer", full)
        reply = clients["ada"].post("/api/item/1/answer", json=body)
        assert reply.status_code == 507 and "disk is full; your work is kept" in reply.json()["error"]
    assert clients["ada"].post("/api/item/1/answer", json=body).status_code == 200


def test_the_administrator_acts(site):
    opened, clients, _ = site
    admin = clients["admin"]
    assert admin.post("/api/admin/pause", json={}).json() == {"done": True} and opened.paused
    assert admin.post("/api/admin/resume", json={}).status_code == 200 and not opened.paused
    assert admin.post("/api/admin/invite", json={"name": "<b>zoe"}).status_code == 200
    page = admin.get("/admin").text
    assert "0 of 4 items are finished" in page and "0 of 12 answers" in page
    assert "&lt;b&gt;zoe" in page and f"/enter/{opened.key(opened.annotators()[-1]['id'])}" in page
    assert admin.post("/api/admin/another", json={"id": 1}).status_code == 200
    assert opened.items()[0]["wanted"] == 4
    for action, body in (("invite", {}), ("invite", {"name": ""}), ("revoke", {"id": "1"}), ("drop", {"id": 1})):
        assert admin.post(f"/api/admin/{action}", json=body).status_code in (404, 422), action


def test_without_accounts_only_this_machine_is_served(tmp_path):
    opened, _ = project(tmp_path, people=())
    client = TestClient(server.app(opened, accounts=False, hosts=("127.0.0.1",)), base_url="http://127.0.0.1:8000")
    assert client.get("/api/next").json()["item"] == 1 and client.get("/admin").status_code == 200
    assert client.get("/api/next", headers={"host": "evil.example"}).status_code == 421  # DNS rebinding
    body = {"answer": RICH, "revision": 0, "seconds": 3}
    assert client.post("/api/item/1/answer", json=body).status_code == 403  # another site cannot read the token
    for host, accounts in (("0.0.0.0", False), ("example.com", False)):
        with pytest.raises(
            UserError, match=r"which others can reach, and no annotators; expected 127\.0\.0\.1, or --annotators"
        ):
            server.listen(host, 0, accounts)
    with (
        contextlib.closing(server.listen("127.0.0.1", 0, False)) as bound,
        pytest.raises(UserError, match=r"port: cannot listen on 127\.0\.0\.1:.*in use"),
    ):
        bound.listen()
        server.listen("127.0.0.1", bound.getsockname()[1], False)


def test_gold_is_read_of_both_kinds(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", [PROMPT, PROMPT])
    rich = {"uid": "1", "annotator": "boss", "prompt": PROMPT} | kinds.annotation(RICH)
    for kind, line in (("rich", rich), ("binary", {"uid": "1", "right": True})):
        (tmp_path / "gold.jsonl").write_text(json.dumps(line))
        with contextlib.closing(store.Store(tmp_path / kind, {"kind": kind})) as opened:
            values = types.SimpleNamespace(images=[str(tmp_path / "in")], names=[], gold=str(tmp_path / "gold.jsonl"))
            monkeypatch.setattr(commands.flags, "FLAGS", values)
            commands._add(opened, {str(tmp_path / "in"): pictures.find(str(tmp_path / "in"))})
            known = json.loads(opened.items()[1]["gold"])
        assert known == ({"right": True} if kind == "binary" else {key: RICH[key] for key in ("points", "scores", "words")})


# ---- Commands -------------------------------------------------------------------------------------------------------
def command(*arguments):
    root = pathlib.Path(__file__).parents[1]
    line = [sys.executable, "-m", "richhf_data.annotate", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})


def test_commands_say_what_is_wrong(tmp_path):
    write_pictures(tmp_path / "in", [PROMPT])
    images, port = f"--images={tmp_path}/in", "--port=0"
    for arguments, message in (
        (
            ["serve", f"--workdir={tmp_path}/b", images, port, "--qualify=5"],
            "qualify: got 5 with 0 gold pictures, expected as",
        ),
        (
            ["serve", f"--workdir={tmp_path}/a", images, port, "--annotators=ada,ada"],
            "annotators: got ada, ada, expected differ",
        ),
        (["dance"], "command: got 'dance', expected one of serve, add, export, choose, import"),
        (["serve", f"--workdir={tmp_path}/a", "--port=0"], "images: got none, expected --images=... for a new project"),
        (["export", f"--workdir={tmp_path}/a"], "expected an annotation project; `serve` makes one"),
    ):
        result = command(*arguments)
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "a").exists()


def test_a_team_over_a_server_that_is_killed_loses_nothing(tmp_path):
    """And the records are those that RichHF-Synth writes itself: benchmarks/annotate.py checks it."""
    found = benchmark.run(tmp_path, annotators=4, items=8, kills=2, patience=0.1, lease=1.0)
    assert found["answers"] == 24
