"""The guard of an online run: what it measures and keeps, when it stops, when it warns of reward hacking."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from rahf.diffusion import evaluate
from rahf.diffusion.online import guard
from rahf.diffusion.online.guard import Guard
from richhf_data.errors import UserError

PROMPTS = ["a cat", "a cat", "a dog", "a dog", "a house", "a house"]
REFERENCE = np.random.default_rng(9).uniform(0, 255, (7, 3))


def red(images, prompts):
    return np.array([image[..., 0].mean() / 255 for image in images])


def green(images, prompts):
    return np.array([image[..., 1].mean() / 255 for image in images])


def colours(images):
    return np.array([image.mean(axis=(0, 1)) for image in images])


def pictures(level_of_red=0.5, level_of_green=0.5, spread=0.0):
    """Pictures of these mean levels, below them for harder prompts; `spread` moves some prompts up and some down."""
    red_green = np.float32([level_of_red, level_of_green]) + np.repeat([[-0.2], [0.0], [0.2]], 2, axis=0)
    red_green = red_green + np.repeat([[-spread], [2 * spread], [-spread]], 2, axis=0)
    noise = np.random.default_rng(0).normal(0, 3, (6, 8, 8, 3))
    noise -= noise.mean((1, 2), keepdims=True)
    levels = np.concatenate([255 * red_green, np.float32([[10], [60], [30], [90], [0], [250]])], axis=1)
    return np.round(noise + levels[:, None, None]).clip(0, 255).astype(np.uint8)


@pytest.fixture
def made(tmp_path):
    """Makes a guard in one workdir; its texts go to `said`."""

    def make(reward=red, said=None, **options):
        options = {"held_out": green, "workdir": tmp_path, "print": (said if said is not None else []).append} | options
        return Guard(reward, **options)

    return make


def lines(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def run(of, levels, first=0):
    """Evaluates at steps 0, 10, ... where the trained and the held-out reward are about `levels`."""
    for number, (trained, held_out, *spread) in enumerate(levels):
        of.measured(10 * number + first, pictures(trained, held_out, *spread), PROMPTS)
    return of


# ---- Values and history ---------------------------------------------------------------------------------------------
def test_it_measures_what_evaluate_does(made, tmp_path):
    of = made(features=colours, reference=REFERENCE)
    found = of.measured(10, pictures(), PROMPTS, more={"kl": np.float32(0.25), "entropy": np.nan})
    expected = evaluate.evaluate(pictures(), PROMPTS, features=colours, reference=REFERENCE, reward=red)
    held_out = evaluate.evaluate(pictures(), PROMPTS, reward=green)
    assert found == {
        "kl": 0.25,
        "reward": expected["reward/all"],
        "reward/se": expected["reward/all/se"],
        "held_out": held_out["reward/all"],
        "held_out/se": held_out["reward/all/se"],
        "diversity": expected["diversity"],
        "fid": expected["fid"],
    }
    assert found["reward/se"] > 0.05 and found["diversity"] > 0
    (line,) = lines(tmp_path)
    assert line == of.history[0] and {name: line[name] for name in found} == found
    assert line["step"] == 10 and line.keys() - found.keys() == {"step", "prompts", "shares"}
    assert sum(value**2 for value in line["shares"]["reward"]) * 3 / 2 == pytest.approx(found["reward/se"] ** 2)
    assert PIL.Image.open(tmp_path / "evaluations.png").size == (960, 1120)


def test_only_what_there_is_is_measured(made, tmp_path):
    of = made(held_out=None)
    assert of.best is None and not of.stop
    assert of.measured(1, pictures(0.5), PROMPTS).keys() == {"reward", "reward/se"}
    assert of.best == (1, of.history[0]["reward"])
    one = made(held_out=None, features=colours, workdir=tmp_path / "one_prompt")
    assert one.measured(1, pictures()[:1], ["a cat"]).keys() == {"reward"}  # no error, no pair
    neither = made(None, workdir=tmp_path / "dpo")
    assert neither.measured(1, pictures(), PROMPTS).keys() == {"held_out", "held_out/se"} and neither.best[0] == 1


def test_a_resumed_run_goes_on_as_one_that_was_never_killed(made, tmp_path):
    levels = [(0.4, 0.4), (0.5, 0.6), (0.6, 0.5), (0.7, 0.4), (0.5, 0.7)]
    said, whole_said = [], []
    whole = run(made(workdir=tmp_path / "whole", said=whole_said, patience=2), levels[:4])
    run(made(said=said, patience=2), levels[:3])  # killed at step 20 and beyond the checkpoint of step 10
    of = made(said=said, patience=2)
    assert [entry["step"] for entry in of.history] == [0, 10, 20]
    of.resume(12)
    of.resume(10)
    assert [entry["step"] for entry in of.history] == [0, 10] and of.best[0] == 10 and not of.stop
    run(of, levels[2:4], first=20)
    assert of.history == whole.history == lines(tmp_path) == lines(tmp_path / "whole")
    assert (tmp_path / "evaluations.png").read_bytes() == (tmp_path / "whole" / "evaluations.png").read_bytes()
    assert of.best == whole.best and of.stop and whole.stop
    assert said == whole_said * 2 and len(whole_said) == 1  # the killed run and the resumed one
    of.measured(30, pictures(*levels[4]), PROMPTS)  # takes the place of step 30
    assert [entry["step"] for entry in lines(tmp_path)] == [0, 10, 20, 30] and of.best[0] == 30 and not of.stop
    of.measured(10, pictures(0.3, 0.3), PROMPTS)  # what came after is void
    assert [entry["step"] for entry in lines(tmp_path)] == [0, 10] and of.best[0] == 0


def test_all_processes_have_the_values_of_process_0_which_alone_writes(made, tmp_path, monkeypatch):
    said = []
    of = made(said=said)
    theirs = run(made(workdir=tmp_path / "theirs"), [(0.4, 0.7), (0.6, 0.4)])
    monkeypatch.setattr(guard.jax, "process_index", lambda: 1)
    for entry in theirs.history:
        numbers = {name: entry[name] for name in ("reward", "reward/se", "held_out", "held_out/se")}
        sent = numbers, {name: np.array(values) for name, values in entry["shares"].items()}
        monkeypatch.setattr(guard.hosts, "agreed", lambda own, sent=sent: sent)
        assert of.measured(entry["step"], pictures(0.1, 0.1), PROMPTS) == numbers
    assert of.best == theirs.best and guard.warning(of.history) == guard.warning(theirs.history) is not None
    assert not (tmp_path / "evaluations.jsonl").exists() and not (tmp_path / "evaluations.png").exists() and not said


# ---- The best step, the end -----------------------------------------------------------------------------------------
def test_the_first_of_the_highest_held_out_rewards_is_the_best(made):
    of = run(made(), [(0.4, 0.5), (0.5, 0.6), (0.9, 0.6), (0.6, 0.55)])
    assert of.best == (10, of.history[1]["held_out"]) and of.history[1]["held_out"] == of.history[2]["held_out"]


def test_it_stops_after_as_many_evaluations_without_an_improvement(made, tmp_path):
    rewards = [(0.5, 0.5), (0.6, 0.4), (0.7, 0.6), (0.8, 0.6), (0.8, 0.5)]
    for patience, held_out, expected in (
        (2, green, [False, False, False, False, True]),
        (1, green, [False, True, False, True, True]),
        (0, green, [False] * 5),
        (1, None, [False, False, False, False, True]),  # the trained reward decides
    ):
        of, found = made(patience=patience, held_out=held_out, workdir=tmp_path / f"{patience}{held_out is None}"), []
        for step, levels in enumerate(rewards):
            of.measured(step, pictures(*levels), PROMPTS)
            found.append(of.stop)
        assert found == expected, (patience, held_out)


# ---- The warning ----------------------------------------------------------------------------------------------------
def test_it_warns_once_where_the_trained_reward_rises_and_the_held_out_one_falls(made):
    said = []
    of = made(said=said)
    run(of, [(0.3, 0.4), (0.4, 0.6), (0.5, 0.5), (0.6, 0.4)])
    assert len(said) == 1
    top, last = of.history[1], of.history[2]
    for part in (
        "reward hacking at step 20? Since step 10, the best one,",
        f"the trained reward rose from {top['reward']:.4g} to {last['reward']:.4g} (by 0.1, standard error ",
        f"the held-out one fell from {top['held_out']:.4g} to {last['held_out']:.4g} (by 0.1, standard error ",
        "Stop and take the model of step 10",
        "larger beta",
        "another reward",
    ):
        assert part in said[0]
    for step, levels in ((40, (0.4, 0.4)), (50, (0.7, 0.3))):  # it passes, and comes again
        of.measured(step, pictures(*levels), PROMPTS)
    assert len(said) == 2 and "at step 50?" in said[1]


@pytest.mark.parametrize(
    ("levels", "warns"),
    [
        ([(0.4, 0.6), (0.5, 0.5)], True),
        ([(0.4, 0.5), (0.5, 0.6)], False),  # both rise
        ([(0.5, 0.6), (0.4, 0.5)], False),  # both fall
        ([(0.5, 0.6), (0.5, 0.5)], False),  # the trained one stays
        ([(0.5, 0.6), (0.52, 0.58)], True),  # by less than the spread of the prompts, but in each of them
        ([(0.5, 0.6), (0.52, 0.58, 0.05)], False),  # by less than the standard error of the differences
        ([(0.5, 0.6), (0.6, 0.58, 0.05)], False),  # the fall alone is
        ([(0.5, 0.6), (0.52, 0.5, 0.05)], False),  # the rise alone is
    ],
)
def test_it_warns_only_beyond_the_standard_errors_of_both_differences(made, levels, warns):
    said = []
    of = run(made(said=said), levels)
    assert bool(said) == warns and of.history[0]["reward/se"] > 0.1


def test_without_two_rewards_or_two_prompts_nothing_warns(made, tmp_path):
    said = []
    run(made(held_out=None, said=said), [(0.4, 0.6), (0.5, 0.5)])
    of = made(said=said, workdir=tmp_path / "one")
    for step, levels in enumerate([(0.4, 0.6), (0.5, 0.5)]):
        of.measured(step, pictures(*levels)[:2], PROMPTS[:2])
    assert not said and guard.warning([]) is None


# ---- The figure -----------------------------------------------------------------------------------------------------
def test_the_figure_has_a_panel_for_each_curve_and_marks_the_best_step(made):
    history = run(made(features=colours, reference=REFERENCE), [(0.4, 0.5), (0.5, 0.6), (0.6, 0.5)]).history
    picture = np.asarray(PIL.Image.open(io.BytesIO(guard.figure(history))))
    assert picture.shape == (1120, 960, 4) and picture[..., 3].min() == 0  # no background
    colored = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in guard.plotting.SCORE_COLORS]
    tops = [np.flatnonzero((picture[..., :3] == color).all(-1).any(1)).min() for color in colored]
    assert tops == sorted(tops) and np.diff(tops).min() > 150
    other = [entry | {"held_out": 1 - entry["held_out"]} for entry in history]
    assert (np.asarray(PIL.Image.open(io.BytesIO(guard.figure(other))))[:200] != picture[:200]).any()  # another best step
    for part in ([entry | {"fid": 3.0} for entry in history[:1]], [{"step": 5, "reward": 0.5}]):
        assert PIL.Image.open(io.BytesIO(guard.figure(part))).width == 960


# ---- Errors ---------------------------------------------------------------------------------------------------------
def nothing(images, prompts):
    return np.full(len(images), np.nan)


def test_a_reward_that_is_no_number_is_named(made, tmp_path):
    for options, message in (
        ({"reward": nothing}, "^trained reward: reward: got 6 values that are not finite, the first nan for 'a cat'"),
        ({"held_out": nothing}, "^held-out reward: reward: got 6 values that are not finite"),
        ({"features": lambda images: np.full((len(images), 2), np.inf)}, "^features: got values that are not finite"),
    ):
        with pytest.raises(UserError, match=message):
            made(**options).measured(1, pictures(), PROMPTS)
    with pytest.raises(UserError, match=r"^trained reward: images: got 6 or more for 5 prompts, expected as many"):
        made().measured(1, pictures(), PROMPTS[:5])
    assert not list(tmp_path.iterdir())


def test_what_cannot_watch_is_refused(made):
    def named(images, prompts):
        return green(images, prompts)

    same = lambda images, prompts: red(images, prompts)  # noqa: E731
    named.identity = same.identity = "one"
    for options, message in (
        ({"held_out": red}, "held_out: got the reward that is trained, expected another"),
        ({"reward": same, "held_out": named}, "held_out: got the reward that is trained"),
        ({"reward": None, "held_out": None}, "reward: got none and none held out"),
        ({"patience": -1}, "patience: got -1, expected a whole number from 0"),
        ({"reference": REFERENCE}, "reference: got one without features"),
        ({"features": colours, "reference": REFERENCE[0]}, r"reference: got shape \(3,\), expected features"),
    ):
        with pytest.raises(UserError, match=message):
            made(**options)


def test_a_history_of_another_run_is_refused(made, tmp_path):
    run(made(), [(0.4, 0.5), (0.5, 0.6)])
    with pytest.raises(UserError, match=r"evaluations.jsonl: step 0 has \['held_out', 'reward'\], this run.*\['reward'\];"):
        made(held_out=None)
    with pytest.raises(UserError, match=r"prompts: got others than at step 10 in .*evaluations.jsonl, expected the same"):
        made().measured(20, pictures(), PROMPTS[::-1])
    made().measured(0, pictures(), PROMPTS[::-1])  # begins anew


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: "{", "evaluations.jsonl line 2: got '{', which is not JSON"),
        (lambda line: line.replace('"step": 10', '"step": "x"'), "line 2: step: got 'x', expected an integer"),
        (lambda line: line.replace('"prompts"', '"other"'), "line 2: prompts: missing, expected a text"),
        (lambda line: line.replace('"reward": 0', '"reward": null, "x": 0'), "line 2: reward: got None, expected a number"),
        (lambda line: line.replace('"reward/se": 0', '"reward/se": "0"'), "line 2: "),
        (lambda line: line.replace('"reward": 0', '"x": 0'), r"step 10 has \['held_out', 'reward'\], this run measures"),
    ],
)
def test_a_damaged_history_is_named(made, tmp_path, change, message):
    run(made(), [(0.4, 0.5), (0.5, 0.6)])
    file = tmp_path / "evaluations.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(f"{first}\n{change(second)}\n")
    with pytest.raises(UserError, match=message):
        made()
