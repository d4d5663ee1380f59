"""Verdicts on pictures side by side: responses, their intervals and test, and the command's function."""

import json
import types

import numpy as np
import PIL.Image
import pytest
import scipy.stats
from html_page import Page

from rahf.diffusion import evaluate, side_by_side
from rahf.reward.image_table import ImageTable
from richhf_data import schema
from richhf_data.errors import UserError

LINE = {"prompt": "a cat", "left": "before", "right": "after", "response": "about the same"}


def brightness(images, prompts):
    return [image.mean() / 255 for image in images]


@pytest.fixture
def resampled_less(monkeypatch):
    monkeypatch.setattr(side_by_side, "RESAMPLES", 500)


# ---- Responses ------------------------------------------------------------------------------------------------------
def test_a_margin_is_reached_at_its_edge():
    later = np.array([0, 0.24, 0.25, 0.49, 0.5, 3, -0.24, -0.25, -0.49, -0.5, -3]) + 1
    found = side_by_side.from_scores(np.ones(11), later, (0.25, 0.5))
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 0, -1, -1, -2, -2]
    assert side_by_side.from_scores([1, 1, 1], [1, 1.01, 0.99], (0, 0.5)).tolist() == [0, 1, -1]
    first, later = np.float32([0.4, 0.5, 0.6]), np.float32([0.5, 0.6, 0.5])  # as float32, 0.5 - 0.4 is below 0.1
    assert side_by_side.from_scores(first, later).tolist() == [2, 2, -2]
    assert side_by_side.from_scores(first, first + np.float32(0.0999)).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "margins", [(0.1, 0.1), (0.2, 0.1), (-0.1, 0.1), (0, np.inf), (np.nan, 1), (0.1,), ("x", "1"), None]
)
def test_faulty_margins_are_named(margins):
    with pytest.raises(UserError, match=r"margins: got .*, expected two numbers, .*such as 0.02,0.1"):
        side_by_side.from_scores([1.0], [2.0], margins)


def test_faulty_scores_are_named():
    with pytest.raises(UserError, match=r"scores: got shapes \(2,\) and \(1,\), expected one score for each of n pairs"):
        side_by_side.from_scores([1, 2], [1])
    for faulty in (np.nan, np.inf):
        with pytest.raises(UserError, match="scores: got values that are not finite"):
            side_by_side.from_scores([1, 2], [1, faulty])


def test_pictures_of_a_prompt_are_paired_in_order():
    assert side_by_side.paired("aabcb", "bxabbaa") == ([0, 1, 2, 4], [2, 5, 0, 3])
    assert side_by_side.paired("ab", "aab") == ([0, 1], [0, 2])
    with pytest.raises(UserError, match="images: got two sets with no prompt in common"):
        side_by_side.paired("ab", "cd")


def test_a_liking_for_a_side_cancels():
    prompts = [str(i) for i in range(100)]
    first, later = [("first", i) for i in range(100)], [("later", i) for i in range(100)]
    calls = []

    def left(lefts, rights, texts):
        calls.append(texts)
        assert [int(text) for text in texts] == [number for _, number in lefts] == [number for _, number in rights]
        assert all({a, b} == {"first", "later"} for (a, _), (b, _) in zip(lefts, rights, strict=True))
        return [-2] * len(texts)

    found = side_by_side.judged(left, first, later, prompts, seed=3)
    assert found.sum() == 0 and set(found) == {-2, 2} and 10 < np.sum(np.diff(found) != 0) < 90
    assert [text for texts in calls for text in texts] == prompts and max(map(len, calls)) == side_by_side.BATCH
    assert (found == side_by_side.judged(left, first, later, prompts, seed=3)).all()
    assert (found != side_by_side.judged(left, first, later, prompts, seed=4)).any()
    summary = side_by_side.verdict(found, prompts)
    assert summary.mean == 0 and summary.p_value == 1 and (summary.wins, summary.losses) == (50, 50)


def test_a_judge_is_turned_back():
    rng = np.random.default_rng(0)
    first, later = rng.integers(0, 3, (2, 70))

    def right_minus_left(lefts, rights, texts):
        return np.subtract(rights, lefts)

    found = side_by_side.judged(right_minus_left, list(first), list(later), ["a"] * 70, seed=1)
    assert found.tolist() == (later - first).tolist()


@pytest.mark.parametrize(
    "answer", [[0, 0], [[0], [0], [0]], [0, 3, 0], [0, 0.5, 0], [0, np.nan, 0], "yes", [[1], 2]], ids=str
)
def test_a_faulty_judge_is_named(answer):
    with pytest.raises(UserError, match=r"judge: got .*, expected 3 whole numbers from -2 to 2"):
        side_by_side.judged(lambda *_: answer, "abc", "abc", "abc")


def test_a_judge_needs_as_many_of_each():
    with pytest.raises(UserError, match="judge: got 3 and 2 images and 3 prompts, expected as many"):
        side_by_side.judged(lambda *_: [0, 0, 0], "abc", "ab", "abc")


# ---- Responses of people --------------------------------------------------------------------------------------------
def write_lines(path, *rows):
    path.write_text("".join(json.dumps(LINE | row) + "\n" for row in rows))
    return path


def test_responses_speak_of_the_later_set_on_any_side(tmp_path):
    ways = list(schema.SIDES)
    rows = [{"response": way, "prompt": way} for way in ways]
    turned = [row | {"left": "after", "right": "before", "annotator": "ada"} for row in rows]
    path = write_lines(tmp_path / "people.jsonl", *rows, *turned)
    found = side_by_side.read_responses(path, ["before", "after"])
    assert list(found) == ["after"] and found["after"][1] == ways * 2
    assert ways[0] == "left significantly better" and ways[4] == "right significantly better"
    assert found["after"][0].tolist() == [-2, -1, 0, 1, 2, 2, 1, 0, -1, -2]


def test_responses_are_those_of_each_pair_with_the_first_set(tmp_path):
    better = {"response": "right slightly better"}
    path = write_lines(
        tmp_path / "people.jsonl",
        {**better, "prompt": "a"},
        {**better, "prompt": "b", "right": "last"},
        {**better, "prompt": "c", "left": "last"},
        {**better, "prompt": "d", "left": "last", "right": "before"},
    )
    found = side_by_side.read_responses(path, ["before", "after", "last"])
    assert {name: (responses.tolist(), prompts) for name, (responses, prompts) in found.items()} == {
        "after": ([1], ["a"]), "last": ([1, -1], ["b", "d"]),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"left": "befor"}, "left: got 'befor', expected one of the sets before, after, last; --name"),
        ({"right": "other"}, "right: got 'other', expected one of the sets"),
        ({"right": "before"}, "got 'before' on both sides, expected two different sets"),
        ({"response": "after slightly better"}, "response: got 'after slightly better', expected one of left significantly"),
        ({"prompt": " "}, r"prompt: got ' ', expected \{\"prompt\": text"),
        ({"annotator": 5}, "annotator: got 5, expected"),
        ({"left": None}, "left: got None, expected"),
    ],
)
def test_a_faulty_line_is_named_by_its_number(tmp_path, row, message):
    path = write_lines(tmp_path / "people.jsonl", {}, row)
    path.write_text("\n" + path.read_text())  # blank lines count
    with pytest.raises(UserError, match=f"responses: .*people.jsonl line 3: {message}"):
        side_by_side.read_responses(path, ["before", "after", "last"])


def test_a_faulty_file_of_responses_is_named(tmp_path):
    with pytest.raises(UserError, match=r"responses: no file .*none.jsonl"):
        side_by_side.read_responses(tmp_path / "none.jsonl", ["before", "after"])
    (tmp_path / "people.jsonl").write_text('{"prompt": "a cat"}\n')
    with pytest.raises(UserError, match=r"people.jsonl line 1: got no 'left' in"):
        side_by_side.read_responses(tmp_path / "people.jsonl", ["before", "after"])
    for rows in ([], [{"left": "last"}]):
        path = write_lines(tmp_path / "people.jsonl", *rows)
        with pytest.raises(UserError, match=r"people.jsonl has no line that compares 'before' with another set"):
            side_by_side.read_responses(path, ["before", "after", "last"])


# ---- The verdict ----------------------------------------------------------------------------------------------------
def test_a_verdict_of_independent_responses_is_wilsons_and_scipys():
    responses = np.repeat([2, 1, 0, -1, -2], [20, 30, 31, 19, 0])
    found = side_by_side.verdict(responses, range(100))
    assert list(found.counts.items()) == list(zip(side_by_side.RESPONSES, [20, 30, 31, 19, 0], strict=True))
    assert (found.prompts, found.wins, found.ties, found.losses) == (100, 50, 31, 19)
    assert found.mean == pytest.approx((40 + 30 - 19) / 100)
    assert found.p_value == pytest.approx(scipy.stats.binomtest(50, 69).pvalue) and found.p_value < 0.001
    assert found.intervals["better"] == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson's for 50 of 100
    counts = {**found.counts, "better": 50, "worse": 19}
    assert list(found.shares) == list(counts)
    for name, count in counts.items():
        expected = scipy.stats.binomtest(count, 100).proportion_ci(0.95, "wilson")
        assert found.intervals[name] == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert found.shares[name] == count / 100


def test_the_sign_test_is_over_prompts():
    """Of 4 prompts, the first is won by its mean, the second is a tie, and the last two are lost."""
    prompts = ["a"] * 3 + ["b"] * 2 + ["c"] + ["d"] * 6
    found = side_by_side.verdict([2, -1, 0, 1, -1, -1] + [-2] * 6, prompts)
    assert (found.prompts, found.wins, found.ties, found.losses) == (4, 1, 1, 2)
    assert found.p_value == pytest.approx(scipy.stats.binomtest(1, 3).pvalue)
    assert found.counts["significantly worse"] == 6 and found.shares["worse"] == pytest.approx(9 / 12)


def test_intervals_are_as_wide_as_the_prompts_allow(resampled_less):
    """600 responses to 100 prompts say as much as 600 prompts if they are independent, and as 100 if they always agree."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(100), 6)

    def width(responses, texts):
        low, high = side_by_side.verdict(responses, texts).intervals["better"]
        return high - low

    independent = rng.choice([-1, 1], 600)
    assert width(independent, prompts) == pytest.approx(width(independent, range(600)), rel=0.15)
    agreed = rng.choice([-1, 1], 100)
    assert width(np.repeat(agreed, 6), prompts) == pytest.approx(width(agreed, range(100)), rel=0.15)
    assert width(np.repeat(agreed, 6), prompts) > 2 * width(independent, prompts)


def test_intervals_of_several_responses_cover_the_truth(resampled_less):
    """In about 95 % of evaluations, whose prompts are drawn anew and whose annotators often agree."""
    rng, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(200):
        likely = np.repeat(rng.beta(1, 1, 60), 5)
        found = side_by_side.verdict(np.where(rng.random(300) < likely, 1, -1), np.repeat(np.arange(60), 5))
        low, high = found.intervals["better"]
        covered += low <= 0.5 <= high
        low, high = scipy.stats.binomtest(found.counts["slightly better"], 300).proportion_ci(0.95, "wilson")
        naive += low <= 0.5 <= high
    assert 180 <= covered <= 199 and naive < 175


@pytest.mark.filterwarnings("error")
def test_degenerate_responses_have_an_interval(resampled_less):
    for responses, prompts in (([0], "a"), ([2, 2], "aa"), ([1] * 20, "abcde" * 4), ([1, -1] * 5, np.repeat(range(5), 2))):
        found = side_by_side.verdict(responses, prompts)
        for name, share in found.shares.items():
            low, high = found.intervals[name]
            assert 0 <= low <= share <= high <= 1 and high - low > 0.3
        assert 0 < found.p_value <= 1
    assert found.p_value == 1 and found.ties == 5  # no prompt is won or lost
    agreed = side_by_side.verdict([1] * 20, "abcde" * 4)
    expected = scipy.stats.binomtest(5, 5).proportion_ci(0.95, "wilson")
    assert agreed.intervals["better"] == pytest.approx((expected.low, expected.high)) and agreed.p_value == 0.0625


def test_faulty_responses_are_named():
    with pytest.raises(UserError, match="responses: got none, expected one or more"):
        side_by_side.verdict([], [])
    for faulty in ([1], [1, 3], [1, 0.5]):
        with pytest.raises(UserError, match=r"responses: got .*, expected 2 whole numbers from -2 to 2"):
            side_by_side.verdict(faulty, ["a", "b"])


def test_the_table_has_a_column_for_each_verdict():
    responses = np.repeat([2, 1, 0, -1, -2], [20, 30, 31, 19, 0])
    found = side_by_side.verdict(responses, range(100))
    lines = side_by_side.table({"x": found, "y": side_by_side.verdict(-responses, range(100))})
    assert lines[:3] == [
        ["side by side", "x", "y"], ["responses", "100", "100"],
        ["significantly better", "20.0 % (13.3 to 28.9)", "0.0 % (0.0 to 3.7)"],
    ]  # fmt: skip
    assert [line[0] for line in lines[2:9]] == [*side_by_side.RESPONSES, "better", "worse"]
    assert lines[9:] == [
        ["mean response, -2 to 2", "+0.51", "-0.51"], ["prompts", "100", "100"],
        ["prompts better / same / worse", "50 / 31 / 19", "19 / 31 / 50"],
        ["p of the sign test", f"{found.p_value:.2g}", f"{found.p_value:.2g}"],
    ]  # fmt: skip


# ---- The command's function -----------------------------------------------------------------------------------------
def write_set(folder, levels):
    """One-coloured pictures. levels: (prompt, grey) of each."""
    folder.mkdir()
    for i, (_, level) in enumerate(levels):
        PIL.Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "prompt": prompt} for i, (prompt, _) in enumerate(levels)]
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folders(tmp_path):
    """Of 255 greys, the margins are 5.1 and 25.5. The pairs of before and after: 2, 1, 0, -1; "e" has none."""
    before = write_set(tmp_path / "before", [("a", 100), ("b", 100), ("b", 100), ("c", 100), ("c", 250), ("e", 0)])
    after = write_set(tmp_path / "after", [("c", 90), ("b", 110), ("b", 103), ("a", 160)])
    last = write_set(tmp_path / "last", [("a", 0)])
    return {"before": before, "after": after, "last": last}


def tables(folders):
    return {name: ImageTable(folder) for name, folder in folders.items()}


def test_compare_tells_the_verdicts_of_a_score_and_of_people(tmp_path, folders):
    calls = []

    def judge(images, prompts):
        calls.append(len(images))
        return brightness(images, prompts)

    rows = [{"prompt": "a", "response": "right slightly better"}, {"prompt": "b", "response": "left slightly better"}]
    rows.append({"prompt": "b", "left": "after", "right": "before", "response": "left significantly better"})
    path = write_lines(tmp_path / "people.jsonl", *rows)
    out = tmp_path / "out"
    sets = evaluate.compare(tables(folders), out, side_by_side=judge, responses=path)
    assert calls == [6, 4, 1]  # each picture once
    assert [list(one.verdicts) for one in sets] == [[], ["side_by_side", "responses"], ["side_by_side"]]
    assert list(sets[1].verdicts["side_by_side"].counts.values()) == [1, 1, 1, 1, 0]
    assert list(sets[1].verdicts["responses"].counts.values()) == [1, 1, 0, 1, 0]

    results = json.loads((out / "results.json").read_text())
    assert results["before"] == {"num_images": 6}
    assert results["after"] == sets[1].results and not [key for key in results["last"] if key.startswith("responses")]
    got = {key: results["after"][key] for key in results["after"] if key.startswith("side_by_side")}
    ends = ["responses", "prompts", "mean", "wins", "ties", "losses", "p_value"]
    ends += [name + end for name in (*side_by_side.RESPONSES, "better", "worse") for end in ("", "/low", "/high")]
    assert set(got) == {f"side_by_side/{end}" for end in ends}
    assert all(isinstance(value, float) for value in sets[1].results.values())
    expected = {"responses": 4, "prompts": 3, "better": 0.5, "slightly worse": 0.25, "mean": 0.5, "wins": 2, "losses": 1}
    assert {key: got[f"side_by_side/{key}"] for key in expected} == expected
    assert got["side_by_side/better/low"] < 0.5 < got["side_by_side/better/high"]
    assert (results["after"]["responses/wins"], results["after"]["responses/mean"]) == (2, pytest.approx(2 / 3))
    assert results["last"]["side_by_side/significantly worse"] == 1

    page = Page(out / "report.html")
    titles = ["after against before, by score", "after against before, by people", "last against before, by score"]
    assert page.texts("th")[-4:] == ["side by side", *titles]
    cells = page.texts("td")
    first = cells.index("significantly better")
    assert [cell.split(" (")[0] for cell in cells[first : first + 4]] == [
        "significantly better",
        "25.0 %",
        "33.3 %",
        "0.0 %",
    ]
    assert "score 0.39" in page.texts("span")


def test_the_margins_and_the_reward_of_a_comparison_are_used(tmp_path, folders):
    calls = []

    def reward(images, prompts):
        calls.append(len(images))
        return brightness(images, prompts)

    found = evaluate.compare(tables(folders), tmp_path / "out", reward=reward, side_by_side=reward, margins=(0.001, 1))
    assert calls == [6, 4, 1]  # not twice
    assert list(found[1].verdicts["side_by_side"].counts.values()) == [0, 3, 0, 1, 0]
    assert "reward/all/difference" in found[1].results and "side_by_side/all" not in found[1].results
    plain = evaluate.compare(tables(folders), tmp_path / "plain", reward=reward)
    assert plain[1].verdicts == {} and "side by side" not in Page(tmp_path / "plain" / "report.html").texts("th")


def arguments(tmp_path, folders, **values):
    """The command's flags."""
    names = ("reference", "features", "reward", "clip", "config", "side_by_side", "margins", "responses")
    given = {"name": [], "images": list(folders.values()), "output": tmp_path / "out"} | values
    return types.SimpleNamespace(**dict.fromkeys(names) | given)


def test_the_command_takes_a_reward_and_margins(tmp_path, folders, monkeypatch):
    (tmp_path / "own_judge.py").write_text("def bright(images, prompts): return [image.mean() / 255 for image in images]\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = "python:own_judge:bright"
    for margins, counts in ((None, [1, 1, 1, 1, 0]), (["0.001", "0.2"], [1, 2, 0, 1, 0])):
        for reward in (None, spec):
            found = evaluate.run(arguments(tmp_path, folders, side_by_side=spec, margins=margins, reward=reward))
            assert list(found[1].verdicts["side_by_side"].counts.values()) == counts


def test_the_command_names_what_is_wrong(tmp_path, folders):
    people, first = write_lines(tmp_path / "people.jsonl", {}), [folders["before"]]
    unknown = write_lines(tmp_path / "unknown.jsonl", {"left": "x"})
    for values, message in (
        ({"margins": ["1", "2"], "responses": people}, "margins: got some without --side_by_side"),
        ({"margins": ["2", "1"], "side_by_side": "python:math:pow"}, r"margins: got \['2', '1'\], expected two numbers"),
        ({"margins": [], "side_by_side": "python:math:pow"}, r"margins: got \[\], expected two numbers"),
        ({"side_by_side": "x:y"}, "side_by_side: reward: got 'x:y', expected reward:..."),
        ({"side_by_side": "python:builtins:zip"}, "side_by_side: reward python:builtins:zip: got zip .*, expected 6 finite"),
        ({"side_by_side": "python:math:pow", "images": first}, "side_by_side: got 1 set of images, expected two or more"),
        ({"responses": people, "images": first}, "responses: got 1 set of images, expected two or more to compare"),
        ({"responses": unknown}, "unknown.jsonl line 1: left: got 'x', expected one of the sets before, after, last"),
        ({}, "got no reward, CLIP or features, expected one or more: .*--side_by_side, --responses"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.run(arguments(tmp_path, folders, **values))
    assert not list(tmp_path.glob("out/*"))
