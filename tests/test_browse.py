"""browse.py: the page shows each annotation, absent ones as absent, and its filters and statistics are right."""

import base64
import itertools
import json
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import pytest
import skimage.data
from html_page import Page
from tiny_data import built, prompt_of, raw_record

from richhf_data import browse, keywords, records
from richhf_data.schema import HEATMAPS, SCORES

ROOT = pathlib.Path(__file__).parents[1]
EVIL = "</p><script>alert('x')</script> & \"'><img src=x onerror=alert(1)>"


def _example(uid, scores=(0.25, 0.5, 0.75, 1.0), prompt="a red cat", labels=(1, 0, 1), marked=(0.25, 0.0), **changes):
    """A decoded example; of each map the top `marked` share is marked."""
    heatmaps = np.zeros((64, 64, 2), np.uint8)
    for i, share in enumerate(marked):
        heatmaps[: round(64 * share), :, i] = 255
    return {
        "uid": uid,
        "prompt": prompt,
        "image": np.full((60, 80, 3), (250, 120, 10), np.uint8),
        "scores": np.float32(scores),
        "score_mask": np.ones(4, bool),
        "heatmaps": heatmaps,
        "heatmap_mask": np.ones(2, bool),
        "labels": None if labels is None else list(labels),
        "caption": None,
    } | changes


def test_a_caption_is_shown_and_searched():
    captioned = _example("c", prompt="image caption", labels=None, caption="a tram <b>at</b> dusk")
    cards, _ = browse.select([captioned, _example("d")], limit=9, text="tram")
    assert _uids(cards) == ["c"]
    page = browse._TEMPLATES.get_template("browse.html.jinja").render(
        title="", subtitle="", cards=cards, plots=[], scores=SCORES, fields=browse.FIELDS
    )
    assert "image caption: a tram &lt;b&gt;at&lt;/b&gt; dusk" in page and "no word labels" not in page


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    return [_example(f"u{i:02d}", rng.random(4), marked=(rng.random(), 0.0)) for i in range(30)]


@pytest.fixture
def bare():
    """Nothing is known of it but the plausibility."""
    masks = {"score_mask": np.array([True, False, False, False]), "heatmap_mask": np.zeros(2, bool)}
    return _example("bare", labels=None, **masks)


def _uids(cards):
    return [card["uid"] for card in cards]


def test_facts_are_the_annotations(bare):
    assert browse.facts(_example("u", marked=(0.25, 0.0))) == {
        **dict(zip(SCORES, (0.25, 0.5, 0.75, 1.0), strict=True)),
        "implausibility_area": 0.25,
        "misalignment_area": 0.0,
        "words": 3,
        "misaligned_words": 1,
    }
    present = {name for name, value in browse.facts(bare).items() if not np.isnan(value)}
    assert present == {"plausibility", "words"}


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("plausibility<0.5", True),
        ("plausibility < 0.25", False),
        ("plausibility<=.25", True),
        ("overall>0.99", True),
        ("overall>=1.5", False),
        ("misaligned_words==1", True),
        ("implausibility_area>2e-1", True),
    ],
)
def test_filter_compares_a_field(text, met):
    assert browse.parse_filter(text)(browse.facts(_example("u"))) is met


@pytest.mark.parametrize("text", ["", "plausibility", "beauty>0.5", "plausibility=0.5", "overall>good", "overall>1;words<3"])
def test_filter_refuses_what_it_cannot_read(text):
    with pytest.raises(ValueError, match=r"filter: got .*expected FIELD<NUMBER.*plausibility, alignment"):
        browse.parse_filter(text)


@pytest.mark.parametrize("sort", ["", "overall", "-implausibility_area"])
@pytest.mark.parametrize("limit", [1, 7, 100])
def test_select_keeps_the_first_in_order(examples, sort, limit):
    cards, statistics = browse.select(examples, limit=limit, sort=sort)
    key = {
        "": lambda example: 0,
        "overall": lambda example: example["scores"][3],
        "-implausibility_area": lambda example: -int(example["heatmaps"][..., 0].sum()),
    }[sort]
    assert _uids(cards) == [example["uid"] for example in sorted(examples, key=key)][:limit]
    assert len(statistics) == 30


@pytest.mark.parametrize("sort", ["alignment", "-alignment"])
def test_select_puts_what_is_absent_last(examples, bare, sort):
    assert _uids(browse.select([bare, *examples], limit=100, sort=sort)[0])[-1] == "bare"
    assert "bare" not in _uids(browse.select([bare, *examples], limit=100, filters=["alignment>=0"])[0])


def test_select_filters_by_scores_text_and_uid(examples):
    examples[4] = _example("u04", prompt="A Blue dog")
    cards, statistics = browse.select(examples, limit=100, filters=["plausibility<0.5", "overall>=0.5"])
    expected = [one["uid"] for one in examples if one["scores"][0] < 0.5 and one["scores"][3] >= 0.5]
    assert _uids(cards) == expected and 0 < len(expected) < 20
    assert len(statistics) == len(expected)
    assert _uids(browse.select(examples, limit=100, text="blue")[0]) == ["u04"]
    assert _uids(browse.select(examples, limit=100, uids=["u20", "u03"])[0]) == ["u03", "u20"]


def test_select_refuses_what_shows_nothing(examples):
    with pytest.raises(ValueError, match=r"no example passes overall>2 and text 'x' and uid u01, expected at least one"):
        browse.select(examples, limit=1, filters=["overall>2"], text="x", uids=["u01"])
    with pytest.raises(ValueError, match=r"uid: got u88, u99, expected some of the split's"):
        browse.select(examples, limit=1, uids=["u99", "u01", "u88"])
    with pytest.raises(ValueError, match=r"sort: got '-beauty', expected one of plausibility, .* with - before it"):
        browse.select(examples, limit=1, sort="-beauty")


def test_statistics_are_over_what_is_labelled(examples, bare):
    _, statistics = browse.select([bare, *examples], limit=1)
    scores = np.array([example["scores"] for example in examples], np.float64)
    np.testing.assert_allclose(statistics.values("overall"), scores[:, 3])
    np.testing.assert_allclose(statistics.values("plausibility"), [0.25, *scores[:, 0]])
    assert len(statistics.values("misaligned_words")) == 30
    table = statistics.correlations()
    np.testing.assert_allclose(table[1:, 1:], np.corrcoef(scores[:, 1:].T), atol=1e-12)
    np.testing.assert_allclose(table[0, 3], np.corrcoef(scores[:, 0], scores[:, 3])[0, 1], atol=1e-12)
    mean = np.mean([example["heatmaps"][..., 0] / 255 for example in examples], axis=0)
    np.testing.assert_allclose(statistics.mean_heatmap("implausibility"), mean, atol=1e-6)
    assert not statistics.mean_heatmap("misalignment").any()


def test_plots_are_drawn_of_anything(examples, bare):
    for some in (examples, [bare], [_example("u")] * 3, [bare, *examples]):
        plots = browse.select(some, limit=1)[1].plots()
        assert [plot["title"] for plot in plots[:4]] == list(SCORES)
        assert len(plots) == 10
        assert all(plot["uri"].startswith("data:image/svg+xml;base64,") for plot in plots)
    notes = {plot["title"]: plot["note"] for plot in browse.select([bare], limit=1)[1].plots()}
    assert notes["plausibility"] == "0.25 ± 0.00"
    assert notes["alignment"] == "no labels"


def _page(path, examples, **arguments):
    cards, statistics = browse.select(examples, **{"limit": 100} | arguments)
    browse.write(path, cards, statistics, title=EVIL, subtitle="some")
    return Page(path)


def _decoded(uri):
    return cv2.imdecode(np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def test_page_shows_pictures_words_and_scores(tmp_path):
    page = _page(tmp_path / "page.html", [_example("u1"), _example("u2", marked=(0.0, 0.5))], thumbnail=40)
    assert [text for text in page.texts("mark") if text != "Marked"] == ["red", "red"]
    facts = [json.loads(attributes["data-facts"]) for tag, attributes, _ in page.elements if tag == "article"]
    assert [fact["misalignment_area"] for fact in facts] == [0, 0.5]
    assert [facts[0][name] for name in SCORES] == [0.25, 0.5, 0.75, 1]
    assert page.texts("div", "none") == ["nothing marked"] * 2
    jpegs = [one["src"] for tag, one, _ in page.elements if tag == "img" and one["src"].startswith("data:image/jpeg")]
    image, heat, _, misaligned = map(_decoded, jpegs)
    assert image.shape == (30, 40, 3)
    np.testing.assert_allclose(image.mean(axis=(0, 1)), (250, 120, 10), atol=4)
    colourful = [np.ptp(picture.astype(int), axis=2) > 60 for picture in (heat, misaligned)]
    assert colourful[0][:6].all() and not colourful[0][10:].any()
    assert colourful[1][:13].all() and not colourful[1][18:].any()


def test_page_shows_what_is_absent_as_absent(bare, tmp_path):
    page = _page(tmp_path / "page.html", [bare])
    assert page.texts("div", "none absent") == ["no label"] * len(HEATMAPS)
    assert page.texts("span", "unknown") == ["no word labels"]
    assert page.texts("b") == ["0.25", "-", "-", "-"]
    assert [text for text in page.texts("mark") if text != "Marked"] == []


def test_page_is_escaped_and_needs_nothing_from_outside(tmp_path):
    evil = _example(EVIL, prompt=EVIL, labels=[0] * len(keywords.tokenize(EVIL)))
    page = _page(tmp_path / "page.html", [evil])
    text = (tmp_path / "page.html").read_text()
    assert "http:" not in text and "https:" not in text and "url(" not in text and "default-src 'none'" in text
    assert len(page.texts("script")) == 1 and "alert" not in page.texts("script")[0]
    assert page.texts("h1") == page.texts("title") == [EVIL]
    for tag, attributes, _ in page.elements:
        assert tag != "link" and not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:") and attributes.get("href", "#").startswith("#")


def test_page_of_200_stays_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 2), np.uint8)
    example = _example("u", image=skimage.data.astronaut(), heatmaps=cv2.resize(noise, (512, 512)))
    cards, statistics = browse.select([example] * 40, limit=40)
    browse.write(tmp_path / "page.html", cards, statistics, title="")
    assert (tmp_path / "page.html").stat().st_size < 10e6 / 5


def test_browse_writes_a_built_split(tmp_path):
    path = browse.browse(built(), "dev", tmp_path, limit=5, sort="-overall")
    assert path == tmp_path / "dev.html"
    page = Page(path)
    truth = {f"dev-{i:03d}": records.decode(raw_record(f"dev-{i:03d}")) for i in range(9)}
    uids = page.texts("a")
    assert uids == sorted(truth, key=lambda uid: -truth[uid]["scores"][3])[:5]
    misaligned = [
        keywords.misaligned_words(keywords.tokenize(prompt_of(uid)), truth[uid]["labels"].tolist()) for uid in uids
    ]
    assert [text for text in page.texts("mark") if text != "Marked"] == list(itertools.chain(*misaligned))
    assert browse.browse(built(), "dev", tmp_path / "new" / "a.html", limit=1).name == "a.html"
    with pytest.raises(ValueError, match=r"split: got 'test', expected one of the dataset's"):
        browse.browse(built(), "test", tmp_path, limit=1)


def test_command_says_what_is_wrong_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "richhf_data.browse", f"--output={tmp_path}", f"--data_dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "error: data_dir: no dataset in" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
