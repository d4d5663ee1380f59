"""The page is self-contained, escaped and complete; the overlay's colours are where the heatmap is."""

import base64
import pathlib
import re
import runpy
import subprocess
import sys

import cv2
import numpy as np
import pytest
from html_page import Page

from rahf import report
from richhf_data import metrics
from richhf_data.schema import HEATMAPS, SCORES

ROOT = pathlib.Path(__file__).parent.parent
draw_predictions = runpy.run_path(str(ROOT / "docs/figures.py"))["predictions"]


@pytest.fixture
def item():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (40, 60, 3), dtype=np.uint8),
        "prompt": "a yellow cat, sitting",
        "scores": dict(zip(SCORES, (0.1, 0.25, 0.5, 0.875), strict=True)),
        "heatmaps": {name: rng.random((8, 8)).astype(np.float32) for name in HEATMAPS},
        "labelled_prompt": "a yellow_0 cat",
        "name": "cat.png",
    }


@pytest.fixture
def truth():
    return {
        "scores": dict(zip(SCORES, (0.2, 0.25, 0.75, 1.0), strict=True)),
        "heatmaps": {name: np.eye(16, dtype=np.float32) for name in HEATMAPS},
        "labels": [1, 1, 0, 1],
    }


def test_write_shows_scores_words_and_pictures(item, tmp_path):
    report.write(tmp_path / "new" / "report.html", [item], title="Predictions")
    page = Page(tmp_path / "new" / "report.html")
    assert page.texts("h1") == ["Predictions"]
    assert [text for text in page.texts("mark") if text != "Marked"] == ["yellow"]
    assert page.texts("span", "missing") == ["dotted", "sitting"]
    assert page.texts("span", "value") == ["0.10", "0.25", "0.50", "0.88"]
    widths = [attributes["style"] for tag, attributes, _ in page.elements if tag == "i"]
    assert widths == ["width: 10.0%", "width: 25.0%", "width: 50.0%", "width: 87.5%"]
    assert len(page.texts("img")) == 3
    assert "annotators" not in (tmp_path / "new" / "report.html").read_text()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_write_shows_deviations_and_sorts_by_them(item, tmp_path):
    sure = item | {"deviations": dict(zip(SCORES, (0.08, 0.1, 0.0049, 0.2), strict=True))}
    report.write(tmp_path / "report.html", [sure, item], title="Predictions")
    page = Page(tmp_path / "report.html")
    assert page.texts("span", "value")[:4] == ["0.10 ± 0.08", "0.25 ± 0.10", "0.50 ± 0.00", "0.88 ± 0.20"]
    assert page.texts("span", "value")[4:] == ["0.10", "0.25", "0.50", "0.88"]
    unsure = [float(attributes["data-unsure"]) for tag, attributes, _ in page.elements if tag == "article"]
    assert unsure == [pytest.approx(0.3849 / 4), 0]
    assert "least sure first" in page.texts("option")
    report.write(tmp_path / "plain.html", [item, item], title="Predictions")
    assert "sure" not in " ".join(Page(tmp_path / "plain.html").texts("option"))
    for wrong in (0.0, float("nan")):
        with pytest.raises(ValueError, match=r"items\[0\]\['deviations'\]\['overall'\]: got .*, expected a number above 0"):
            report.write(tmp_path / "a.html", [item | {"deviations": {"overall": wrong}}], title="a")


def test_write_shows_the_truth_beside(item, truth, tmp_path):
    truth["scores"]["overall"] = float("nan")  # an example without that label
    report.write(tmp_path / "r.html", [{**item, "truth": truth}, item], title="Test")
    page = Page(tmp_path / "r.html")
    assert [text for text in page.texts("mark") if text != "Marked"] == ["yellow", "cat", "yellow"]
    assert len(page.texts("img")) == 5 + 3
    ticks = [attributes["style"] for tag, attributes, _ in page.elements if tag == "b" and attributes]
    assert ticks == ["left: 20.0%", "left: 25.0%", "left: 75.0%"]
    errors = [attributes["data-error"] for tag, attributes, _ in page.elements if tag == "article"]
    assert [float(error) for error in errors] == [pytest.approx((0.1 + 0 + 0.25) / 3), 0]
    assert "implausibility, annotators, peak 1.00" in (tmp_path / "r.html").read_text()


def test_write_escapes_everything_that_others_wrote(item, truth, tmp_path):
    evil = "</p><script>alert('x')</script> & \"><img src=x onerror=alert(1)>"
    item.update(prompt=evil, name=evil, labelled_prompt=evil.replace("&", "&_0"), scores={evil: 0.5})
    item["heatmaps"] = {evil: np.zeros((4, 4))}
    truth = {"labels": [0] * len(re.findall(r'[^,.?!":; ]+', evil))}
    rows = {evil: {"score/plcc/overall": 0.5}}
    items = [{**item, "truth": truth}, item]
    report.write(tmp_path / "r.html", items, title=evil, tables=metrics.tables(rows))
    page = Page(tmp_path / "r.html")
    assert len(page.texts("script")) == 1 and "alert" not in page.texts("script")[0]
    assert all(attributes["src"].startswith("data:image/jpeg") for tag, attributes, _ in page.elements if tag == "img")
    assert not any(name.startswith("on") for _, attributes, _ in page.elements for name in attributes)
    assert page.texts("h1") == page.texts("title") == [evil]
    assert evil in page.texts("td") and "&" in page.texts("mark")


def test_write_needs_nothing_from_outside(item, tmp_path):
    report.write(tmp_path / "r.html", [item], title="Test")
    text = (tmp_path / "r.html").read_text()
    assert "http:" not in text and "https:" not in text and "url(" not in text and "default-src 'none'" in text
    for tag, attributes, _ in Page(tmp_path / "r.html").elements:
        assert tag != "link" and (tag != "script" or not attributes)
        assert attributes.get("src", "data:").startswith("data:") and attributes.get("href", "#").startswith("#")


def test_write_inlines_images_that_decode_to_the_picture(item, tmp_path):
    item["image"] = np.full((800, 400, 3), (250, 120, 10), np.uint8)
    report.write(tmp_path / "r.html", [item], title="Test")
    uris = [attributes["src"] for tag, attributes, _ in Page(tmp_path / "r.html").elements if tag == "img"]
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(uris[0].partition(",")[2]), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (384, 192, 3)  # shrunk
    np.testing.assert_allclose(decoded[..., ::-1].mean(axis=(0, 1)), (250, 120, 10), atol=4)


def test_write_shows_tables_and_no_items(tmp_path):
    tables = metrics.tables({"this model": {"score/plcc/overall": 0.5, "score/srcc/overall": 0.25}})
    report.write(tmp_path / "r.html", [], title="Test", tables=tables)
    page = Page(tmp_path / "r.html")
    assert len(page.texts("table")) == 4
    assert {"this model", "0.500 / 0.250"} <= set(page.texts("td"))


def test_write_that_fails_leaves_the_old_page(item, tmp_path):
    report.write(tmp_path / "r.html", [item], title="Old")
    with pytest.raises(ValueError, match="items"):
        report.write(tmp_path / "r.html", [item, {**item, "image": item["image"] / 255}], title="New")
    assert Page(tmp_path / "r.html").texts("h1") == ["Old"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_figure_draws_a_row_per_item(item, truth, tmp_path):
    heights = []
    for n in (1, 3):
        draw_predictions([{**item, "truth": truth}] + [item] * (n - 1), tmp_path / "figure.png")
        drawn = cv2.imread(str(tmp_path / "figure.png"))
        heights.append(len(drawn))
        assert np.ptp(drawn) > 200
    assert heights[1] > 2 * heights[0]
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_figure_takes_any_prompt(item, tmp_path):
    draw_predictions([{**item, "prompt": r"$\frac{1}$ " + "many words " * 40}], tmp_path / "figure.png")
    assert cv2.imread(str(tmp_path / "figure.png")) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4), np.uint8)}, r"items\[0\]\['image'\]: got uint8\[4, 4\], expected uint8\[H, W, 3\]"),
        ({"heatmaps": {"implausibility": np.zeros(3)}}, r"\['implausibility'\]: got shape \(3,\), expected \[h, w\]"),
        (
            {"heatmaps": {"misalignment": np.full((2, 2), 200)}},
            r"got values from 200.0 to 200.0, .*divide uint8 by 255",
        ),
        ({"heatmaps": {"misalignment": np.full((2, 2), np.nan)}}, r"got values from nan to nan, expected \[0, 1\]"),
        ({"scores": {"overall": float("nan")}}, r"items\[0\]\['scores'\]\['overall'\]: got nan, expected a number"),
        ({"truth": {"labels": [1]}}, r"items\[0\]\['truth'\]\['labels'\]: got 1 for the 4 tokens of prompt 'a yellow"),
        (
            {"truth": {"heatmaps": {"x": np.ones((2, 2)) * 2}}},
            r"items\[0\]\['truth'\]\['heatmaps'\]\['x'\]: got values",
        ),
    ],
)
def test_write_and_figure_name_what_is_wrong(item, tmp_path, change, message):
    for draw in (lambda items: report.write(tmp_path / "r", items, title=""), lambda items: draw_predictions(items, "r")):
        with pytest.raises(ValueError, match=message):
            draw([{**item, **change}])
    assert not list(tmp_path.iterdir())


def test_figure_without_items_is_refused(tmp_path):
    with pytest.raises(ValueError, match="items: got none, expected at least one"):
        draw_predictions([], tmp_path / "figure.png")


def test_report_imports_without_tensorflow_and_jax():
    code = """
import sys
for name in ("tensorflow", "jax", "flax", "seqio"):
    sys.modules[name] = None
import rahf.report
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
