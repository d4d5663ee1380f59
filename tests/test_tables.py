"""tables.py: Rapidata's table and captions become examples whose absent targets are absent."""

import collections
import json
import pathlib
import re
import sys

import cv2
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from tiny_data import SCORE_STEPS, image_of, jpg, prompt_of, record_header, write_captions, write_rapidata

from richhf_data import build, builder, keywords, records, schema, tables, tasks, vocabulary
from richhf_data.errors import UserError

PROMPTS = [prompt_of(f"prompt-{i}") + " A cat, a dog" for i in range(40)]
CAPTIONS = [f"a photo of {prompt_of(f'caption-{i}')}" for i in range(40)]


@pytest.fixture(autouse=True)
def _no_bars():
    tfds.disable_progress_bar()


@pytest.fixture(scope="module")
def rapidata(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("rapidata")
    write_rapidata(folder / "train-0.parquet", PROMPTS[:20])
    write_rapidata(folder / "train-1.parquet", PROMPTS[20:], **_images(range(20, 40)))
    return folder


def _images(rows):
    encoded = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    values = [{"bytes": jpg(image_of(f"rapidata-{row}")), "path": f"{row}.jpg"} for row in rows]
    return {"image": pyarrow.array(values, encoded)}


def _items(source):
    """Every item of every split, by its prompt or caption."""
    found = [(split, item) for split in source.splits for item in source.examples(split)]
    return {item.caption or item.prompt: (split, item) for split, item in found}


def test_rapidata_maps_scores_maps_and_words(rapidata):
    items = _items(tables.Rapidata(f"{rapidata}/*.parquet", holdout=0.2))
    assert set(items) == set(PROMPTS)
    _, item = items[PROMPTS[7]]
    example = records.decode(item.raw, allow_absent=True)
    likert = {name: 1 + (7 * step) % 9 / 2 for name, step in SCORE_STEPS.items()}
    expected = [likert["coherence_score"], likert["alignment_score"], likert["style_score"]]
    np.testing.assert_allclose(example["scores"], [*((np.array(expected) - 1) / 4), 0], atol=1e-6)
    assert example["score_mask"].tolist() == [True, True, True, False]  # nobody was asked for `overall`
    assert example["heatmap_mask"].tolist() == [True, True]
    peaks = [np.argwhere(example["heatmaps"][..., i] > 150).mean(axis=0) for i in range(2)]
    np.testing.assert_allclose(peaks, [[16.5 * 8, 44.5 * 8], [40.5 * 8, 20.5 * 8]], atol=6)  # [row, column]
    assert example["heatmaps"].max() == round(0.75 * 255)
    tokens = keywords.tokenize(PROMPTS[7])
    assert keywords.misaligned_words(tokens, example["labels"]) == [token for token in tokens if token == "cat"]
    assert item.image == jpg(image_of("rapidata-7"))


def test_rapidata_leaves_out_what_the_table_lacks(rapidata):
    source = tables.Rapidata(f"{rapidata}/*.parquet", holdout=0.2)
    items = _items(source)
    examples = [records.decode(items[prompt][1].raw, allow_absent=True) for prompt in PROMPTS[:4]]
    assert [example["heatmap_mask"].tolist() for example in examples] == [[False, True]] + 3 * [[True, True]]
    assert not examples[0]["heatmaps"][..., 0].any()
    assert [example["labels"] is None for example in examples] == [False, True, True, False]
    assert examples[3]["score_mask"].tolist() == [True, False, True, False]
    counts = collections.Counter()
    for split in source.splits:
        counts.update({problem: len(uids) for problem, uids in source.notes(split).items()})
    assert counts == {"without_word_scores": 2, "words_unlike_the_prompt": 2}  # one in each file


def test_rapidata_threshold_is_a_share_of_the_weight(rapidata):
    def labels(threshold):
        _, item = _items(tables.Rapidata(f"{rapidata}/*.parquet", word_threshold=threshold))[PROMPTS[7]]
        return records.decode(item.raw, allow_absent=True)["labels"].tolist()

    tokens = keywords.tokenize(PROMPTS[7])  # "cat" has 6 of a weight of 4 + 6, every other word 0.25
    assert labels(0.61) == [1] * len(tokens)
    assert labels(0.59) == [0 if token == "cat" else 1 for token in tokens]
    assert labels(0.02) == [0] * len(tokens)


def test_scores_within_0_and_1_are_taken_as_they_are(tmp_path):
    normalised = pyarrow.array(np.linspace(0, 1, 8), pyarrow.float32())
    names = {"alignment_score": normalised, "coherence_score": normalised, "style_score": normalised}
    write_rapidata(tmp_path / "0.parquet", PROMPTS[:8], **names)
    items = _items(tables.Rapidata(f"{tmp_path}/0.parquet"))
    scores = [records.decode(items[prompt][1].raw, allow_absent=True)["scores"][0] for prompt in PROMPTS[:8]]
    np.testing.assert_allclose(scores, np.linspace(0, 1, 8), atol=1e-6)


def test_splits_are_disjoint_complete_and_the_pictures_own(rapidata):
    splits = {prompt: split for prompt, (split, _) in _items(tables.Rapidata(f"{rapidata}/*.parquet", holdout=0.2)).items()}
    counts = collections.Counter(splits.values())
    assert sum(counts.values()) == 40 and min(counts[split] for split in schema.SPLITS) > 2
    fewer = _items(tables.Rapidata(f"{rapidata}/train-1.parquet", holdout=0.2))  # without the other file
    assert {prompt: split for prompt, (split, _) in fewer.items()} == {prompt: splits[prompt] for prompt in PROMPTS[20:]}
    everything = _items(tables.Rapidata(f"{rapidata}/*.parquet", holdout=0.0))
    assert {split for split, _ in everything.values()} == {"train"}


def test_the_same_picture_and_text_is_taken_once(tmp_path):
    write_rapidata(tmp_path / "0.parquet", PROMPTS[:6])
    write_rapidata(tmp_path / "1.parquet", PROMPTS[:5] + ["another prompt"])  # the same pictures
    source = tables.Rapidata(f"{tmp_path}/*.parquet", holdout=0.0)
    uids = [item.uid for item in source.examples("train")]
    assert len(uids) == len(set(uids)) == 7
    assert len(source.notes("train")["duplicates"]) == 5


def test_rows_without_an_image_are_missing_images(tmp_path):
    write_captions(tmp_path / "0.parquet", CAPTIONS[:4])
    table = pyarrow.parquet.read_table(tmp_path / "0.parquet")
    kept = table["image"].to_pylist()[0]
    table = table.set_column(0, "image", pyarrow.array([kept, None, b"", None], pyarrow.binary()))
    table = table.set_column(1, "caption", pyarrow.array(["the same"] * 4))
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    arguments = (f"captions:{tmp_path}/*.parquet", "", tmp_path / "data")
    with pytest.raises(
        ValueError,
        match=r"3 of 4 records have no usable image \(3 no image, first .*0.parquet row 1, .*row 2, .*row 3; 0 broken"
        r".*see to the images of the rows in the table, or raise --max_missing_share",
    ):
        build.build(*arguments, holdout=0.0)
    report = build.build(*arguments, holdout=0.0, max_missing_share=0.9, vocabulary_size=30)
    assert report["splits"]["train"]["images_missing"]["count"] == 3
    assert "duplicates" not in report["splits"]["train"]
    assert "have each score" not in builder.report_table(report)  # there is none


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"word_scores": None}, r"got columns image \(struct<.*prompt \(string\).*; expected also word_scores \(text\)"),
        ({"prompt": list(range(6))}, r"no column for the prompt, .*--columns=prompt=NAME.*prompt \(int64"),
        ({"image": ["a.jpg"] * 6}, r"0.parquet: no column for the image, .*Columns there: image \(string\)"),
        ({"coherence_heatmap": [[0.5]] * 6}, r"expected also coherence_heatmap \(list of lists of numbers\)"),
        ({"style_score": [0.0, 1, 2, 3, 4, 5]}, "column style_score: got values from 0 to 5, expected all of them from 0"),
        ({"style_score": [1.0, 1, 2, 3, 4, 7]}, "column style_score: got values from 1 to 7"),
        ({"coherence_heatmap": [[[0.0, 2.0]]] * 6}, r"0.parquet row 0: coherence_heatmap: got values from 0.0 to 2.0"),
        ({"coherence_heatmap": [[[0.0, 1.0], [0.5]]] * 6}, r"row 0: coherence_heatmap: got rows of lengths"),
        ({"word_scores": ["cat"] * 6}, r"row 0: word_scores: got 'cat' .*expected JSON such as \[\[\"cat\", 0.5\], ...\]"),
        ({"word_scores": ['[["cat", -1]]'] * 6}, r"row 0: word_scores: got the score -1.0, expected none below 0"),
    ],
)  # fmt: skip
def test_wrong_rapidata_tables_are_named(tmp_path, changes, message):
    write_rapidata(tmp_path / "0.parquet", PROMPTS[:6], **changes)
    with pytest.raises(ValueError, match=message):
        list(tables.Rapidata(f"{tmp_path}/*.parquet", holdout=0.0).examples("train"))


def test_files_that_are_no_tables_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"rapidata: no file matches .*quote the pattern in a shell"):
        tables.Rapidata(f"{tmp_path}/*.parquet")
    (tmp_path / "0.parquet").write_text("<html>sign in</html>")
    with pytest.raises(ValueError, match=r"captions: .*0.parquet is not a readable parquet file .*download it again"):
        tables.Captions(f"{tmp_path}/*.parquet")


@pytest.mark.parametrize("column", ["image", "prompt", "style_score"])
def test_broken_page_is_named_with_its_file(tmp_path, column):
    path = tmp_path / "0.parquet"
    write_rapidata(path, PROMPTS[:6])
    with pyarrow.parquet.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        chunk = next(c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema.split(".")[0] == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = path.read_bytes()
    path.write_bytes(data[:start] + b"\xff" * 60 + data[start + 60 :])
    with pytest.raises(ValueError, match=r"rapidata: .*0.parquet is not a readable parquet file .*download it again"):
        list(tables.Rapidata(str(path), holdout=0.0).examples("train"))


def test_build_of_rapidata_counts_what_it_found(rapidata, tmp_path):
    report = build.build(f"rapidata:{rapidata}/*.parquet", "", tmp_path, vocabulary_size=80, holdout=0.2)
    rows = report["splits"]
    assert sum(row["examples"] for row in rows.values()) == 40
    assert sum(row["targets"]["keywords"] for row in rows.values()) == 36
    assert sum(row["targets"]["implausibility"] for row in rows.values()) == 38
    assert all(row["targets"]["overall"] == 0 and row["score_mean"]["overall"] is None for row in rows.values())
    assert all(row["published_examples"] is None for row in rows.values())
    examples, constants = list(tasks.decoded(tmp_path, "train")[0]), tasks.constants(tmp_path)
    for k, name in enumerate(schema.SCORES):  # means over the examples that have the target
        given = [example["scores"][k] for example in examples if example["score_mask"][k]]
        expected = np.mean(given) if given else np.nan
        assert constants["scores"][k] == pytest.approx(expected, rel=1e-5, nan_ok=True)
        assert rows["train"]["score_mean"][name] == (pytest.approx(expected, rel=1e-5) if given else None)
    for k in range(2):
        given = [example["heatmaps"][..., k].mean() / 255 for example in examples if example["heatmap_mask"][k]]
        assert constants["heatmaps"][..., k].mean() == pytest.approx(np.mean(given), rel=1e-4)
    text = builder.report_table(report)
    assert "without word scores" in text and "overall 0" in text
    assert re.search(r"train +alignment +0\.\d", text) and not re.search(r"train +overall", text)
    assert build.build(f"rapidata:{rapidata}/*.parquet", "", tmp_path, holdout=0.2) == report
    with pytest.raises(ValueError, match="was built from other records"):
        build.build(f"rapidata:{rapidata}/*.parquet", "", tmp_path, holdout=0.1)
    with pytest.raises(ValueError, match=r"images: got 'folder:x', expected none: rapidata:.* holds its images"):
        build.build(f"rapidata:{rapidata}/*.parquet", "folder:x", tmp_path)


def test_captions_are_what_the_decoder_writes(tmp_path):
    write_captions(tmp_path / "0.parquet", [*CAPTIONS, "", None], column="text")
    table = pyarrow.parquet.read_table(tmp_path / "0.parquet")  # what made the picture is not its caption
    pyarrow.parquet.write_table(table.append_column("prompt", [["a prompt"] * len(table)]), tmp_path / "0.parquet")
    report = build.build(
        f"captions:{tmp_path}/*.parquet", "", tmp_path / "data",
        caption_prompt="describe", holdout=0.2, vocabulary_size=90,
    )  # fmt: skip
    assert sum(row["examples"] for row in report["splits"].values()) == 40
    assert sum(row.get("empty_captions", {"count": 0})["count"] for row in report["splits"].values()) == 2
    examples, _ = tasks.decoded(tmp_path / "data", "train")
    for example in examples:
        assert example["prompt"] == "describe"
        assert example["caption"] in CAPTIONS
        assert example["labels"] is None
        assert not example["score_mask"].any() and not example["heatmap_mask"].any()
    pieces = vocabulary.Vocabulary(tmp_path / "data" / "vocabulary.model")  # trained on the captions too
    for text in ("describe", CAPTIONS[0]):
        assert pieces.decode(pieces.encode(text, 99)) == text


class PicturesWithTexts(tfds.core.GeneratorBasedBuilder):
    """A captioning dataset such as TFDS's coco_captions, with several captions a picture."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = pathlib.Path(__file__)

    def _info(self):
        features = {"image": tfds.features.Image(), "captions": tfds.features.Sequence({"text": tfds.features.Text()})}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, caption in enumerate(CAPTIONS):
            yield i, {"image": image_of(f"tfds-{i}"), "captions": [{"text": caption}, {"text": "another"}]}


def test_captions_of_a_tfds_dataset(tmp_path):
    PicturesWithTexts(data_dir=tmp_path).download_and_prepare()
    where = {"columns": {"prompt": "captions/text"}, "tfds_data_dir": str(tmp_path)}
    items = _items(tables.Captions("tfds:pictures_with_texts", **where))
    assert set(items) == set(CAPTIONS)
    source = tables.Captions("tfds:pictures_with_texts", holdout=0, **where)
    assert len(list(source.examples("train"))) == 40
    assert len(source.notes("train")["rows_with_several_texts_of_which_the_first_is_taken"]) == 40
    image = cv2.imdecode(np.frombuffer(items[CAPTIONS[3]][1].image, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(image, image_of("tfds-3"))
    with pytest.raises(ValueError, match=r"captions: no TFDS dataset 'nobody' .*--tfds_data_dir"):
        tables.Captions("tfds:nobody", tfds_data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"(?s)got features .*captions.*expected caption, or --columns=prompt=NAME"):
        tables.Captions("tfds:pictures_with_texts", tfds_data_dir=str(tmp_path))
    (shard,) = tmp_path.glob("pictures_with_texts/1.0.0/*.tfrecord*")
    content = shard.read_bytes()
    for damaged, message in (
        (record_header(1 << 45) + content[12:], f"{shard} record 0 .*it would end at byte"),
        (content[:100] + b"?" + content[101:], f"{shard.parent}: got a damaged example"),
        (None, f"{shard}"),
    ):
        shard.write_bytes(damaged) if damaged else shard.unlink()
        with pytest.raises((UserError, FileNotFoundError), match=message):
            _items(tables.Captions("tfds:pictures_with_texts", **where))


class NestedPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    code_path = pathlib.Path(__file__)

    def _info(self):
        text = tfds.features.Text()
        features = {"a": {"b": tfds.features.Image(), "c": text}, "number": np.int64, "bad": text}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield i, {"a": {"b": image_of(f"nested-{i}"), "c": CAPTIONS[i]}, "number": 7, "bad": b"caf\xe9"}


@pytest.mark.parametrize(
    "feature", [{"pythonClassName": "evil_table.X", "text": {}}, {"type": "evil_table.X", "content": {}}]
)
def test_a_tfds_dataset_runs_no_code(tmp_path, monkeypatch, feature):
    """One that TFDS knows from its files alone; its features.json names a module, which TFDS would import."""
    folder = tmp_path / "others" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(feature))
    info = {"name": "others", "version": "1.0.0", "fileFormat": "tfrecord", "moduleName": "evil_table"}
    info["splits"] = [{"name": "train", "numBytes": "9", "shardLengths": ["1"]}]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "evil_table.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"captions: .*others.*: features.json: got a feature of class 'evil_table.X'"):
        tables.Captions("tfds:others", tfds_data_dir=str(tmp_path))
    (folder / "features.json").write_text('{"pythonClassName": 3}')
    with pytest.raises(UserError, match=r"captions: .*others.*: Failed to parse pythonClassName"):
        tables.Captions("tfds:others", tfds_data_dir=str(tmp_path))
    assert not (tmp_path / "marker").exists() and "evil_table" not in sys.modules


def test_tfds_features_may_be_nested(tmp_path):
    NestedPictures(data_dir=tmp_path).download_and_prepare()
    items = _items(tables.Captions("tfds:nested_pictures", "a", {"image": "a/b", "prompt": "a/c"}, 0.0, str(tmp_path)))
    assert set(items) == set(CAPTIONS[:3])
    image = cv2.imdecode(np.frombuffer(items[CAPTIONS[1]][1].image, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(image, image_of("nested-1"))
    source = tables.Captions("tfds:nested_pictures", "a", {"image": "a/b", "prompt": "bad"}, 0.0, str(tmp_path))
    with pytest.raises(UserError, match=r"captions: nested_pictures/1.0.0 example 0: got 'caf.', which is not UTF-8"):
        _items(source)
    for columns, message in (
        ({"image": "a/b", "prompt": "number"}, "number: got .*int64.*, expected a text or a list of texts"),
        ({"image": "a/b", "prompt": "a"}, "a: got .*, expected a text or a list of texts"),
        ({"image": "number", "prompt": "a/c"}, "number: got .*, expected an image or its bytes"),
    ):
        with pytest.raises(UserError, match=f"captions: 'nested_pictures': {message}; see --columns"):
            tables.Captions("tfds:nested_pictures", "a", columns, 0.0, str(tmp_path))


def test_wrong_captions_tables_are_named(tmp_path):
    write_captions(tmp_path / "0.parquet", CAPTIONS, column="says")
    message = r"captions: .*0.parquet: no column for the prompt, .*--columns=prompt=NAME. Columns there: image \(bin"
    with pytest.raises(ValueError, match=message):
        tables.Captions(f"{tmp_path}/*.parquet")
    with pytest.raises(ValueError, match=r"columns: got uid, expected some of image, prompt"):
        tables.Captions(f"{tmp_path}/*.parquet", columns={"uid": "says"})
    source = tables.Captions(f"{tmp_path}/*.parquet", columns={"prompt": "says"})
    assert json.dumps(source.identity()) and set(_items(source)) == set(CAPTIONS)


@pytest.mark.parametrize("kind", [pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.string_view()], ids=str)
def test_captions_may_be_stored_in_other_ways_and_places(tmp_path, kind):
    write_captions(tmp_path / "0.parquet", CAPTIONS[:5])
    table = pyarrow.parquet.read_table(tmp_path / "0.parquet")
    table = table.set_column(1, "caption", pyarrow.array(CAPTIONS[:5], pyarrow.string()).cast(kind))
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    items = _items(tables.Captions(f"file://{tmp_path}/*.parquet"))
    assert set(items) == set(CAPTIONS[:5])
    assert items[CAPTIONS[2]][1].where == f"{tmp_path}/0.parquet row 2"


def test_a_table_without_held_out_pictures_is_all_train(tmp_path):
    write_captions(tmp_path / "0.parquet", CAPTIONS[:3])
    report = build.build(f"captions:{tmp_path}/*.parquet", "", tmp_path / "data", holdout=0.0, vocabulary_size=60)
    assert {split: row["examples"] for split, row in report["splits"].items()} == {"train": 3}
    with pytest.raises(ValueError, match=r"records: split '(dev|test)': got no example, expected some; raise --holdout"):
        build.build(f"captions:{tmp_path}/*.parquet", "", tmp_path / "other", holdout=0.01)


def test_two_columns_of_one_name_are_refused(tmp_path):
    write_captions(tmp_path / "a.parquet", ["a red cat"])
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table.append_column("image", table.column("image")), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"captions: .*a.parquet: got more than one column image, expected one"):
        tables.Captions(str(tmp_path / "*.parquet"))
