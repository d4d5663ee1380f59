"""jsonl.py: encodings, ends of lines and values that are not text, in every command that reads lines."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from tiny_data import annotation, image_of, jpg, png

from rahf import predict, predictor
from rahf.diffusion import sample
from rahf.reward.image_table import ImageTable, LabelledImages
from richhf_data import clip_tokenizer, consolidate, image_sources, jsonl, records, schema, tables
from richhf_data.errors import UserError

BOM = b"\xef\xbb\xbf"
SEPARATORS = "a\u2028b\u2029c\x85d\x0ce"


def predicted(path):
    return [prompt for _, prompt in predict.read_inputs(str(path), None)]


def captioned(path):
    uids = [json.loads(line.removeprefix(BOM))["uid"] for line in path.read_bytes().splitlines()]
    return [caption for shard in image_sources.shards(f"folder:{path.parent}", uids) for _, caption, *_ in shard.entries]


def annotated(path):
    return [one.prompt for one in consolidate.read(str(path)).values()]


READERS = {  # what reads prompts from a file: the file's name, the key of its text
    "predict": (predicted, "list.jsonl", "prompt"),
    "sample": (sample.read_prompts, "list.jsonl", "prompt"),
    "pictures": (lambda path: ImageTable(path).prompts, "list.jsonl", "prompt"),
    "feedback": (lambda path: LabelledImages(path).prompts, "list.jsonl", "prompt"),
    "captions": (captioned, "captions.jsonl", "caption"),
    "annotations": (annotated, "list.jsonl", "prompt"),
}


def line(key, value, number, other=False) -> bytes:
    row = {"uid": f"u{number}", "image": f"u{number}.png", "label": 1, key: value}
    if key == "prompt" and other:
        row = {"uid": f"u{number}", "annotator": "ada", "prompt": value, "scores": {"overall": 3}}
    return json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")


def write(folder, reader, values, end=b"\n", start=b""):
    """A file with a line for each text, and a picture beside it for each."""
    _, name, key = READERS[reader]
    for number in range(len(values)):
        (folder / f"u{number}.png").write_bytes(png(image_of(f"u{number}")))
    lines = [line(key, value, number, reader == "annotations") for number, value in enumerate(values)]
    (folder / name).write_bytes(start + end.join(lines) + end)
    return folder / name


@pytest.mark.parametrize("reader", READERS)
def test_bom_and_all_ends_of_lines_are_read(reader, tmp_path):
    texts = ["a red cat", SEPARATORS, "caf\u00e9 \U0001f600"]
    for start, end in ((b"", b"\n"), (BOM, b"\r\n")):
        assert READERS[reader][0](write(tmp_path, reader, texts, end, start)) == texts


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("value", [None, float("nan"), ["a cat", "a dog"], 5, "a red cat \ud83d"], ids=str)
def test_what_is_not_text_is_named(reader, value, tmp_path):
    path = write(tmp_path, reader, ["a cat", value])
    if isinstance(value, str):  # as json.dumps writes it
        path.write_bytes(path.read_bytes().replace(value.encode(errors="surrogatepass"), rb"a red cat \ud83d"))
    with pytest.raises(ValueError, match=rf"(?s){path.name}.*(line|row) 2: .*expected"):
        READERS[reader][0](path)


@pytest.mark.parametrize("reader", READERS)
def test_other_encodings_are_named(reader, tmp_path):
    path = write(tmp_path, reader, ["a cat", "un caf\u00e9"])
    path.write_bytes(path.read_bytes().decode().encode("cp1252"))
    with pytest.raises(ValueError, match=rf"(?s){path.name}.*(line|row) 2: got .*not UTF-8.*save it as UTF-8"):
        if reader == "captions":  # the uids of `captioned` are read as JSON
            list(image_sources.shards(f"folder:{tmp_path}", ["u0", "u1"]))
        READERS[reader][0](path)


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(BOM + f"a red cat\u2028on a mat\r\n\r\n  {SEPARATORS}  \n\u00a0\na dog".encode())
    assert sample.read_prompts(path) == ["a red cat\u2028on a mat", SEPARATORS, "a dog"]
    path.write_bytes(b"a cat\nun caf\xe9\n")
    with pytest.raises(ValueError, match=r"prompts: .*prompts.txt line 2: got 'un caf.', which is not UTF-8"):
        sample.read_prompts(path)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        path.write_bytes("a cat\na dog\n".encode(encoding))
        with pytest.raises(ValueError, match=r"(?s)prompts: .*prompts.txt line 1: got .*, which is not UTF-8"):
            sample.read_prompts(path)


def test_a_prompt_beside_a_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(png(image_of("a")))
    (tmp_path / "a.txt").write_bytes(BOM + b"a cat\r\n")
    assert predicted(tmp_path / "*.png") == ["a cat"]
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"prompt: .*a.txt: got .*not UTF-8"):
        predicted(tmp_path / "*.png")


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{", b"[1]", b'"a"', b"1" * 5000])
def test_what_is_no_object_is_named(text, tmp_path):
    with pytest.raises(ValueError, match=r"place: got .*, which is not (JSON|an object).*, expected a row"):
        jsonl.parse(text, "a row", "place")


def test_annotations_need_text_as_uid_and_annotator(tmp_path):
    for key in ("uid", "annotator"):
        (tmp_path / "a.jsonl").write_text(json.dumps(annotation("u", "ada") | {key: "\ud83d"}))
        with pytest.raises(ValueError, match=rf"a.jsonl line 1: {key}: got .*, expected text"):
            consolidate.read(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400", "-1e999", "9" * 400])
@pytest.mark.parametrize("reader", READERS)
def test_a_number_that_is_none_is_named(reader, number, tmp_path):
    path = write(tmp_path, reader, ["a cat", "a dog"])
    first, second = path.read_text(encoding="utf-8").splitlines()
    path.write_text(f'{first}\n{second[:-1]}, "more": {{"score": [{number}]}}}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=rf"(?s){path.name}.*(line|row) 2: .*{number[:70]}.* is no finite number.*expected"):
        if reader == "captions":
            list(image_sources.shards(f"folder:{tmp_path}", ["u0", "u1"]))
        READERS[reader][0](path)


def test_numbers_are_read_exactly():
    assert jsonl.loads('[1, 1e3, 0.1, -0, 123456789012345678901234567890, "NaN"]') == [
        1, 1000.0, 0.1, 0, 123456789012345678901234567890, "NaN",
    ]  # fmt: skip


def test_prompts_of_a_caller_must_be_text(tmp_path):
    for prompt in (None, float("nan"), ["a cat"], "a red cat \ud83d"):
        with pytest.raises(UserError, match=r"prompt: got .*, expected text"):
            predictor.Model.text_ids(None, prompt)
        with pytest.raises(UserError, match=r"prompt: got .*, expected text"):
            clip_tokenizer.text_of(prompt)
    with pytest.raises(UserError, match=r"prompt: got 'caf\\udce9', which is not UTF-8"):
        predict.read_inputs("*.png", "caf\udce9")


# ------------------------------------------------------------------------------------------------------- parquet and CSV


def strings(values) -> pyarrow.Array:
    """A column of text with any bytes: Arrow does not check them."""
    encoded = pyarrow.array(values, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(encoded), encoded.buffers())


def parquet_table(path, texts, uids=(b"u0", b"u1", b"u2"), **more):
    """Three rows, each with a picture."""
    encoded = pyarrow.array([jpg(image_of(f"u{row}")) for row in range(3)])
    columns = {"uid": strings(uids), "image": encoded, "prompt": texts, "label": [1, 0, 1]} | more
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def joined(path):
    (shard,) = image_sources.shards(f"table:{path}", ["u0", "u1", "u2"])
    return [caption for _, caption, _ in shard.read(["u0", "u1", "u2"], lambda count: None)]


def beside(path):
    for row in range(3):
        (path.parent / f"u{row}.png").write_bytes(png(image_of(f"u{row}")))
    path.rename(path.with_name("captions.parquet"))
    found = image_sources.shards(f"folder:{path.parent}", ["u0", "u1", "u2"])
    return [caption for shard in found for _, caption, *_ in shard.entries]


def rows_of(source):
    return [item.caption or item.prompt for split in source.splits for item in source.examples(split)]


TABLES = {  # what reads prompts from a parquet file: its function, what it makes of null
    "captions": (lambda path: rows_of(tables.Captions(str(path), holdout=0)), "left out"),
    "table": (joined, None),
    "folder": (beside, None),
    "pictures": (lambda path: ImageTable(path).prompts, UserError),
    "feedback": (lambda path: LabelledImages(path).prompts, UserError),
}


@pytest.mark.parametrize("reader", TABLES)
def test_parquet_texts(reader, tmp_path):
    read, null = TABLES[reader]
    assert read(parquet_table(tmp_path / "a.parquet", strings([b"a", b"b\xc2\xa0c", "d\u2028e".encode()]))) == [
        "a",
        "b c" if reader == "captions" else "b\u00a0c",
        "d e" if reader == "captions" else "d\u2028e",
    ]
    table = parquet_table(tmp_path / "a.parquet", strings([b"a", b"un caf\xe9", b"c"]))
    with pytest.raises(UserError, match=r"(?s)(a|captions).parquet.* row (1|2): .*text that is not UTF-8 .*expected UTF-8"):
        read(table)
    table = parquet_table(tmp_path / "a.parquet", strings([b"a", None, b"c"]))
    if null is UserError:
        with pytest.raises(UserError, match="row 2: prompt: got None, expected a text"):
            read(table)
    else:
        assert read(table) == (["a", "c"] if null else ["a", None, "c"])


@pytest.mark.parametrize("reader", ["captions", "table", "folder"])
def test_the_first_of_several_captions_is_taken_and_said(reader, tmp_path, capsys):
    image_sources._say_first.cache_clear()
    texts = pyarrow.array([["a", "A"], ["b"], []], pyarrow.large_list(pyarrow.string()))
    table = parquet_table(tmp_path / "a.parquet", texts)
    if reader == "captions":
        source = tables.Captions(str(table), holdout=0)
        assert rows_of(source) == ["a", "b"]
        notes = {key: len(uids) for key, uids in source.notes("train").items()}
        assert notes == {"rows_with_several_texts_of_which_the_first_is_taken": 1, "empty_captions": 1}
    else:
        for shard in image_sources.shards(f"table:{table}", ["u0"]) if reader == "table" else ():
            shard.check()
        assert TABLES[reader][0](table) == ["a", "b", None]
        assert capsys.readouterr().out == "images: the column 'prompt' holds lists of texts; the first of each is taken\n"
    plain = parquet_table(tmp_path / "b.parquet", texts, text=["x", "y", "z"])  # a column of texts comes first
    assert joined(plain) == ["x", "y", "z"]


def test_a_uid_that_is_not_text(tmp_path):
    good = strings([b"a", b"b", b"c"])
    with pytest.raises(UserError, match=r"a.parquet: got text that is not UTF-8"):
        joined(parquet_table(tmp_path / "a.parquet", good, uids=[b"u0", b"\xff", b"u2"]))
    assert joined(parquet_table(tmp_path / "a.parquet", good, uids=[b"u0", None, b"u2"])) == ["a", "c"]


def test_csv_captions(tmp_path):
    (tmp_path / "u0.png").write_bytes(png(image_of("u0")))

    def read(content):
        (tmp_path / "captions.csv").write_bytes(content)
        (shard,) = image_sources.shards(f"folder:{tmp_path}", ["u0"])
        return shard.entries[0][1]

    assert read(BOM + "uid,caption\r\nu0,a\u2028b\x85c\x0cd \u00e9\r\n".encode()) == "a\u2028b\x85c\x0cd \u00e9"
    with pytest.raises(UserError, match=r"captions.csv line 3: got 'u1,un caf.*', which is not UTF-8 .*save it as UTF-8"):
        read("uid,caption\nu0,a\nu1,un caf\u00e9\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"captions.csv line 1: got .*, which is not UTF-8"):
        read("uid,caption\nu0,a\n".encode("utf-16"))


def test_texts_of_records_are_utf_8(tmp_path):
    for key in (schema.RAW_UID, schema.RAW_LABELS):
        raw = {schema.RAW_UID: "train/u0.png", schema.RAW_LABELS: "1 0"} | {key: b"caf\xe9"}
        with pytest.raises(UserError, match=rf"a.tfrecord record 0.*: key '{key}': got 'caf.', which is not UTF-8"):
            records.parse(records.serialize(raw), "a.tfrecord record 0", allow_absent=True)
