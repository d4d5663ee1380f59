"""jsonl.py: encodings, ends of lines and values that are not text, in every command that reads lines."""

import json

import pytest
from tiny_data import annotation, image_of, png

from rahf import predict
from rahf.diffusion import sample
from rahf.reward.image_table import ImageTable, LabelledImages
from richhf_data import consolidate, image_sources, jsonl

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
