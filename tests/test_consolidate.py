"""Consolidation against cases worked out by hand."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny_data import annotation, image_of, png, prompt_of, write_annotations

from richhf_data import consolidate, keywords, records, schema
from richhf_data.consolidate import Annotation

PLAIN = Annotation(points=((), ()), labels=(1, 1, 1), scores=(1, 2, 3, 5))
PROMPT = "a yellow cat"


def _changed(**changes):
    return dataclasses.replace(PLAIN, **changes)


def test_scores_are_the_mean_standardised():
    others = [_changed(scores=(2, 2, 5, 5)), _changed(scores=(3, 5, 4, 5))]
    scores = consolidate.consolidate([PLAIN, *others], PROMPT)["scores"]
    np.testing.assert_allclose(scores, [1 / 4, 2 / 4, 3 / 4, 1])
    assert scores.dtype == np.float32


def test_labels_are_the_majority():
    annotators = [_changed(labels=(1, 0, 0)), _changed(labels=(1, 0, 1)), _changed(labels=(0, 1, 1))]
    labels = consolidate.consolidate(annotators, PROMPT)["labels"]
    assert labels.tolist() == [1, 0, 1] and labels.dtype == np.int32
    assert consolidate.consolidate(annotators[1:], PROMPT)["labels"].tolist() == [1, 1, 1]  # a tie is aligned


def test_disk_is_the_pixels_whose_centres_are_near():
    marked = consolidate.disks([(0.5, 0.5)], 4, radius=0.25)  # of the 4 x 4 centres only the inner ones are within 1 px
    assert marked.tolist() == [[False] * 4, [False, True, True, False], [False, True, True, False], [False] * 4]
    marked = consolidate.disks([(0.125, 0.875)], 4, radius=0.25)  # the centre of the lower left pixel
    assert np.argwhere(marked).tolist() == [[2, 0], [3, 0], [3, 1]]


@pytest.mark.parametrize("size", [32, 64, 512])
@pytest.mark.parametrize("point", [(0.31, 0.62), (0.0, 1.0), (1.0, 0.49)])
def test_disk_equals_the_distance_of_every_pixel(size, point):
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    near = (x - point[0]) ** 2 + (y - point[1]) ** 2 <= schema.POINT_RADIUS**2
    differ = near != consolidate.disks([point], size)
    assert near.any() and differ.sum() <= 2  # rounding on the rim


def test_disk_is_round_in_a_wide_picture():
    height, width, size = 40, 120, 512
    marked = consolidate.disks([(0.5, 0.5)], size, aspect=width / height)
    rows, columns = np.argwhere(marked).T
    spread = np.ptp(rows) / size * height, np.ptp(columns) / size * width  # in the picture's pixels
    np.testing.assert_allclose(spread, 2 * schema.POINT_RADIUS * height, atol=0.3)


def test_heatmaps_are_the_mean_of_binary_maps():
    twice = _changed(points=(((0.5, 0.5), (0.51, 0.5)), ()))  # one annotator counts once, however often they click
    once = _changed(points=(((0.5, 0.5),), ((0.25, 0.75),)))
    heatmaps = consolidate.consolidate([twice, once, PLAIN], PROMPT, size=64)["heatmaps"]
    assert heatmaps.shape == (64, 64, 2) and heatmaps.dtype == np.uint8
    assert heatmaps[32, 32].tolist() == [170, 0]
    assert heatmaps[48, 16].tolist() == [0, 85]
    assert set(np.unique(heatmaps)) == {0, 85, 170}


def test_maps_of_two_sizes_mark_the_same_area():
    one = _changed(points=(((0.3, 0.4), (0.7, 0.72)), ()))
    small, large = (consolidate.consolidate([one], PROMPT, size)["heatmaps"].mean() for size in (64, 512))
    assert abs(small - large) < 0.05 * large


def test_annotation_survives_json():
    annotation = _changed(points=(((0.25, 0.5),), ()), labels=(1, 0, 1))
    value = json.loads(json.dumps(annotation.to_json()))
    assert value["scores"]["overall"] == 5 and value["points"]["implausibility"] == [[0.25, 0.5]]
    assert Annotation.from_json(value) == annotation
    value["scores"]["beauty"] = 3
    with pytest.raises(ValueError, match=r"annotation scores: got .*beauty.*, expected only plausibility, alignment"):
        Annotation.from_json(value)
    partial = Annotation(points=(None, ((0.1, 0.2),)), labels=None, scores=(None, 2, None, 4))
    assert partial.to_json() == {"points": {"misalignment": [[0.1, 0.2]]}, "scores": {"alignment": 2, "overall": 4}}
    assert Annotation.from_json(partial.to_json()) == partial


def test_a_target_is_that_of_the_annotators_who_gave_it():
    some = Annotation(points=(None, ((0.5, 0.5),)), labels=None, scores=(None, 3, None, 5))
    targets = consolidate.consolidate([some, some, _changed(labels=(1, 0, 1), scores=(2, 5, None, 1))], PROMPT, size=64)
    np.testing.assert_allclose(targets["scores"], [1 / 4, (3 + 3 + 5 - 3) / 12, 0, (5 + 5 + 1 - 3) / 12], rtol=1e-6)
    assert targets["score_mask"].tolist() == [True, True, False, True]
    assert targets["heatmap_mask"].tolist() == [True, True]  # an empty list of points is an answer
    assert not targets["heatmaps"][..., 0].any()
    assert targets["heatmaps"][32, 32, 1] == 170
    assert targets["labels"].tolist() == [1, 0, 1]
    alone = consolidate.consolidate([some], PROMPT, size=64)
    assert alone["heatmap_mask"].tolist() == [False, True]
    assert alone["labels"] is None
    assert set(consolidate.raw_record("u0.png", alone)) == {
        "filename", "misalignment_score", "overall_score", "misalignment_map"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": (1, 2, 3)}, "scores: got 3, expected 4"),
        ({"scores": (1, 2, 6, 3)}, "aesthetics score: got 6, expected 1 .. 5"),
        ({"scores": (0, 2, 3, 3)}, "plausibility score: got 0, expected 1 .. 5"),
        ({"scores": (float("nan"), 2, 3, 3)}, "plausibility score: got nan, expected 1 .. 5"),
        ({"points": ((),)}, "points: got 1 lists, expected one for each"),
        ({"points": ((), ((0.5, 1.2),))}, r"misalignment point: got \(0.5, 1.2\), expected \(x, y\) as fractions"),
        ({"points": (((0.5,),), ())}, r"implausibility point: got \(0.5,\), expected \(x, y\)"),
        ({"labels": (1, 1)}, "labels: got 2, expected 3, one for each prompt token"),
        ({"labels": (1, 2, 1)}, "labels: got 2, expected 0 or 1"),
    ],
)
def test_faults_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        consolidate.consolidate([PLAIN, _changed(**changes)], PROMPT)


def test_no_annotation_and_no_pixel_are_refused():
    with pytest.raises(ValueError, match="annotations: got none, expected at least one"):
        consolidate.consolidate([], PROMPT)
    with pytest.raises(ValueError, match="size: got 0"):
        consolidate.consolidate([PLAIN], PROMPT, size=0)


def _raws(output):
    paths = sorted(pathlib.Path(output).glob("*.tfrecord"))
    return {records.uid_of(raw): (path.stem, raw) for path in paths for raw in records.read(path, allow_absent=True)}


def test_written_annotations_equal_their_consolidation(tmp_path):
    uids = [f"picture-{i}" for i in range(40)]
    lines = [annotation(uid, name) for name in ("ada", "ben", "cleo") for uid in uids]
    lines += [annotation("words", "ada", points=None, scores=None), annotation("words", "ben", scores={"overall": 4})]
    sources = write_annotations(tmp_path, lines)
    counts = consolidate.write(*sources, tmp_path / "out", holdout=0.2)
    raws = _raws(tmp_path / "out")
    assert set(raws) == {*uids, "words"}
    assert {uid: split for uid, (split, _) in raws.items()} == {uid: schema.split_of(uid, 0.2) for uid in raws}
    assert {split: sum(one == split for one, _ in raws.values()) for split in schema.SPLITS} == {
        split: counts[split] for split in schema.SPLITS
    }
    for uid in uids:
        tokens = keywords.tokenize(prompt_of(uid))
        given = [
            Annotation.from_json(line | {"labels": [int(i not in line["misaligned"]) for i in range(len(tokens))]})
            for line in lines
            if line["uid"] == uid
        ]
        expected = consolidate.consolidate(given, prompt_of(uid), aspect=48 / 40)
        found = records.decode(raws[uid][1])  # complete: the published form
        np.testing.assert_array_equal(found["heatmaps"], expected["heatmaps"])
        np.testing.assert_array_equal(found["scores"], expected["scores"])
        np.testing.assert_array_equal(found["labels"], expected["labels"])
    words = records.decode(raws["words"][1], allow_absent=True)
    assert words["score_mask"].tolist() == [False, False, False, True]
    assert words["heatmap_mask"].tolist() == [True, True]
    assert counts["pictures"] == 41 and counts["annotations"] == 122
    assert counts["overall"] == 41 and counts["alignment"] == 40 and counts["partly answered"] == 1
    assert (tmp_path / "out" / "images" / "picture-3.png").read_bytes() == png(image_of("picture-3"))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    mine = tmp_path / "out" / "images" / "picture-3.jpg"
    mine.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"output: .*out holds images/picture-3.jpg, which this command did not write"):
        consolidate.write(*sources, tmp_path / "out", holdout=0.2)
    assert mine.read_bytes() == b"mine"
    mine.unlink()
    (tmp_path / "out/notes.txt").write_text("mine")
    consolidate.write(*sources, tmp_path / "out", holdout=0.2)
    (tmp_path / "out/notes.txt").unlink()
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    consolidate.write(*write_annotations(tmp_path, lines[:1]), tmp_path / "out", holdout=0)
    assert sorted(os.listdir(tmp_path / "out")) == ["consolidated.json", "images", "train.tfrecord"]
    assert sorted(os.listdir(tmp_path / "out" / "images")) == ["captions.jsonl", "picture-0.png"]


BAD_LINES = [
    ("not json", "got 'not json', which is not JSON"),
    ([1, 2], r"got '\[1, 2\]', which is not an object, expected an object with keys"),
    (annotation("u", "a", colour="red"), r"got \['colour'\], expected an object with keys of annotator, labels, misaligned"),
    (annotation("u", "a") | {"annotator": None}, "annotator: got None, expected text"),
    (annotation("../u", "a"), "uid: got '../u', expected the picture's file name"),
    (annotation("u", "a", misaligned=[99]), r"misaligned: got \[99\], expected places from 0 to"),
    (annotation("u", "a", labels=[1]), "misaligned: got it beside labels"),
    (annotation("u", "a", misaligned=None, labels=[1]), "labels: got 1, expected"),
    (annotation("u", "a", points={"implausibility": [[0.5]]}), r"implausibility point: got \(0.5,\)"),
    (annotation("u", "a", points={"glitches": []}), "annotation points: got .*glitches.*, expected only implausibility"),
    (annotation("u", "a", scores={"overall": 6}), "overall score: got 6.0, expected 1 .. 5"),
    (annotation("u", "a", scores={"overall": "good"}), "annotation: scores.overall: got 'good', expected a number"),
    (annotation("u", "a", scores={"overall": True}), "annotation: scores.overall: got True, expected a number"),
    (annotation("u", "a", points={"implausibility": ""}), "annotation: points.implausibility: got '', expected a list"),
    (annotation("u", "a", points={"implausibility": {}}), "annotation: points.implausibility: got {}, expected a list"),
    (annotation("u", "a", misaligned=None, labels=[True, False]), r"annotation: labels\[0\]: got True, expected an integer"),
    (annotation("u", "a", scores={}, points={}, misaligned=None), "got no answer, expected at least one of points"),
    (annotation("u", "a", prompt="another", misaligned=[0]), "prompt: got 'another', expected that of uid 'u' in .*line 1"),
    (annotation("u", "ada"), "annotator 'ada' has annotated uid 'u' before, expected once"),
]


def test_every_bad_line_is_named_with_file_and_number(tmp_path):
    path = tmp_path / "lines.jsonl"
    good = json.dumps(annotation("u", "ada"))
    path.write_text("\n".join([good] + [line if isinstance(line, str) else json.dumps(line) for line, _ in BAD_LINES]))
    with pytest.raises(ValueError, match=f"annotations: {len(BAD_LINES)} bad lines") as caught:
        consolidate.read(str(path))
    reported = str(caught.value).splitlines()[1:]
    assert len(reported) == len(BAD_LINES)
    for number, (line, (_, message)) in enumerate(zip(reported, BAD_LINES, strict=True), start=2):
        with pytest.raises(ValueError, match=rf"lines.jsonl line {number}: .*{message}"):
            raise ValueError(line)


def test_faulty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"annotations: no file matches .*quote the pattern"):
        consolidate.read(str(tmp_path / "*.jsonl"))
    lines, pictures = write_annotations(tmp_path, [annotation("u0", "ada"), annotation("u1", "ada")])
    (tmp_path / "pictures" / "u1.png").unlink()
    with pytest.raises(ValueError, match=r"pictures lacks the pictures of 1 of 2 uids, first u1; expected <uid>.jpg"):
        consolidate.write(lines, pictures, tmp_path / "out")
    (tmp_path / "pictures" / "u1.png").write_bytes(png(image_of("u1")))
    (tmp_path / "pictures" / "u1.jpg").write_bytes(png(image_of("u1")))
    with pytest.raises(ValueError, match=r"images: got .*u1.jpg and .*u1.png for one uid, expected one"):
        consolidate.write(lines, pictures, tmp_path / "out")
    (tmp_path / "pictures" / "u1.jpg").unlink()
    (tmp_path / "pictures" / "u1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"images: .*u1.png is not a readable image"):
        consolidate.write(lines, pictures, tmp_path / "out")
    (tmp_path / "pictures" / "u1.png").write_bytes(png(image_of("u1")))
    official = tmp_path / "richhf-18k"
    official.mkdir()
    (official / "train.tfrecord").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"output: .*richhf-18k holds other files, expected a new folder"):
        consolidate.write(lines, pictures, official)
    assert (official / "train.tfrecord").read_bytes() == b"precious"


def test_pictures_that_are_read_are_not_replaced(tmp_path):
    lines, pictures = write_annotations(tmp_path, [annotation("u0", "ada")])
    consolidate.write(lines, pictures, tmp_path / "out")
    inside = tmp_path / "out/images/sub"
    shutil.move(pictures, inside)
    (tmp_path / "link").symlink_to(inside)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/u0.png").symlink_to(inside / "u0.png")
    for folder in (inside, tmp_path / "link", tmp_path / "out/images", tmp_path / "linked"):
        with pytest.raises(ValueError, match=r"output: got .*out, whose images hold .*, which is read; expected another"):
            consolidate.write(lines, folder, tmp_path / "out")
    assert (inside / "u0.png").read_bytes() == png(image_of("u0"))


def test_a_consolidation_that_fails_leaves_the_earlier_one_as_it_was(tmp_path, monkeypatch):
    sources = write_annotations(tmp_path, [annotation("u0", "ada")])
    consolidate.write(*sources, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(consolidate, "CAPTIONS", "x" * 300)
    with pytest.raises(OSError, match="File name too long"):
        consolidate.write(*sources, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_command_line(tmp_path):
    lines, pictures = write_annotations(tmp_path, [annotation("u0", "ada")])
    command = [sys.executable, "-m", "richhf_data.consolidate", f"--images={pictures}", f"--output={tmp_path / 'out'}"]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([*command, f"--annotations={lines}"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python -m richhf_data.build --records=" in done.stdout and "--allow_absent" in done.stdout
    assert "dev has no picture, and training evaluates on dev" in done.stdout
    (tmp_path / "lines.jsonl").write_text("{")
    failed = subprocess.run([*command, f"--annotations={lines}"], cwd=root, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "error: annotations: 1 bad lines:" in failed.stderr and "lines.jsonl line 1" in failed.stderr
    assert "Traceback" not in failed.stderr
