"""JSON files, and values checked against annotations."""

import dataclasses
import os
from typing import Annotated, Any, Literal

import pytest

from richhf_data import checked, json_files
from richhf_data.checked import Layers, Range, Share
from richhf_data.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    depth: Layers
    style: Literal["paper", "pytorch"] = "paper"

    def __post_init__(self):
        checked.fields(self, "part")


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part
    dropout: Share = 0.0
    sizes: Annotated[tuple[Layers, ...], Range(1, 3)] = (1,)
    pair: tuple[str, float] | None = None
    names: dict[str, int] = dataclasses.field(default_factory=dict)
    free: Any = None
    wide: bool = False


# ---- Values against annotations -------------------------------------------------------------------------------------
def test_a_value_becomes_what_the_annotation_says():
    found = checked.conform(Whole, {"part": {"depth": 3}, "dropout": 0, "sizes": [2, 256], "pair": ["a", 2]})
    assert found == Whole(Part(3), 0.0, (2, 256), ("a", 2.0)) and type(found.dropout) is type(found.pair[1]) is float
    assert checked.conform(Whole, {"part": {"depth": 3}, "pair": None, "names": {"a": 1}, "free": [{}]}).free == [{}]
    assert checked.conform(Whole, {"part": {"depth": 3, "other": 1}, "x": 2}, extra=True) == Whole(Part(3))
    assert checked.conform(Whole, {"part": Part(3)}) == Whole(Part(3))
    assert checked.conform(int | tuple[int, ...], 3) == 3 and checked.conform(int | tuple[int, ...], [3]) == (3,)
    assert checked.conform(dict[str, list[tuple[str, str]]], {"a": [["b", "c"]]}) == {"a": [("b", "c")]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"^part: missing, expected an object with keys of \['depth', 'style'\]"),
        ({"part": {}}, r"^part.depth: missing, expected an integer from 1 to 256"),
        ({"part": []}, r"^part: got \[\], expected an object with keys"),
        ({"part": {"depth": 0}}, r"^part.depth: got 0, expected an integer from 1 to 256"),
        ({"part": {"depth": -3}}, r"^part.depth: got -3, expected"),
        ({"part": {"depth": 10_000_000}}, r"^part.depth: got 10000000, expected an integer from 1 to 256"),
        ({"part": {"depth": 10**5000}}, r"^part.depth: got an integer of 16610 bits, expected"),
        ({"part": {"depth": True}}, r"^part.depth: got True, expected"),
        ({"part": {"depth": 3.0}}, r"^part.depth: got 3.0, expected"),
        ({"part": {"depth": "3"}}, r"^part.depth: got '3', expected"),
        ({"part": {"depth": None}}, r"^part.depth: got None, expected"),
        ({"part": {"depth": 3, "style": "papre"}}, r"^part.style: got 'papre', expected one of \('paper', 'pytorch'\)"),
        ({"part": {"depth": 3, "style": [1]}}, r"^part.style: got \[1\], expected one of"),
        ({"part": {"depth": 3, "styl": 1}}, r"^unknown option 'part.styl'; did you mean 'part.style'\?"),
        ({"dropout": 1}, r"^dropout: got 1, expected a number of 0 or more and below 1"),
        ({"dropout": float("nan")}, r"^dropout: got nan, expected a number"),
        ({"dropout": 10**400}, r"^dropout: got an integer of 1329 bits, expected a number"),
        ({"dropout": False}, r"^dropout: got False, expected a number"),
        ({"sizes": []}, r"^sizes: got \[\], expected a list \(each entry an integer from 1 to 256\), from 1 to 3 entries"),
        ({"sizes": [1, 0]}, r"^sizes\[1\]: got 0, expected an integer"),
        ({"sizes": [1] * 4}, r"^sizes: got \[1, 1, 1, 1\], expected a list"),
        ({"sizes": "123"}, r"^sizes: got '123', expected a list"),
        ({"pair": ["a"]}, r"^pair: got \['a'\], expected a list of 2: a text, a number"),
        ({"pair": 3}, r"^pair: got 3, expected a list of 2: a text, a number or null"),
        ({"names": {"a": "b"}}, r"^names.a: got 'b', expected an integer"),
        ({"wide": 1}, r"^wide: got 1, expected true or false"),
        ({"free": 1, "zzz": 2}, r"^unknown option 'zzz'; expected one of \['dropout'"),
    ],
)
def test_an_error_names_the_key_and_what_is_expected(values, message):
    with pytest.raises(UserError, match=message):
        checked.conform(Whole, values if "part" in values or not values else {"part": {"depth": 1}} | values)


def test_what_a_file_says_cannot_control_the_terminal():
    with pytest.raises(UserError, match=r"unknown option \"'\\\\x1b\[31mred'\";") as raised:
        checked.conform(Part, {"depth": 1, "\x1b[31mred": 1})
    assert str(raised.value).isprintable()


def test_a_long_value_is_shortened():
    with pytest.raises(UserError, match=r"^free: got 'a{79}\.\.\., expected an integer$"):
        checked.conform(int, "a" * 1000, "free")


def test_a_dataclass_checks_itself_however_it_is_made():
    with pytest.raises(UserError, match=r"^part.depth: got 0, expected an integer from 1 to 256"):
        Part(0)


# ---- Files ----------------------------------------------------------------------------------------------------------
def test_a_file_is_read_with_and_without_a_byte_order_mark(tmp_path):
    for content in (b'{"part": {"depth": 3}, "free": -Infinity}', b'\xef\xbb\xbf{"part": {"depth": 3}, "free": 1e400}'):
        (tmp_path / "a.json").write_bytes(content)
        assert json_files.read_as(Whole, tmp_path / "a.json").part == Part(3)
    assert json_files.read(tmp_path / "a.json")["free"] == float("inf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a.json: damaged, expected JSON in UTF-8 \(Expecting value"),
        (b"{", r"a.json: damaged"),
        (b"[]", r"a.json: got a JSON list, expected an object"),
        (b"null", r"a.json: got a JSON NoneType, expected an object"),
        ('{"a": "é"}'.encode("latin-1"), r"a.json: damaged, expected JSON in UTF-8 \('utf-8' codec"),
        ("{}".encode("utf-16"), r"a.json: damaged, expected JSON in UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"a.json: damaged, expected JSON in UTF-8 \(Exceeds the limit"),
        *((b'{"a": ' + b"[" * n + b"]" * n + b"}", r"a.json: got more than 100 levels") for n in (100, 1000, 300_000)),
        (b'{"a": ' * 1000 + b"0" + b"}" * 1000, r"a.json: got more than 100 levels"),
        (b'{"a": "' + b" " * 1000 + b'"}', r"a.json: got more than 1,000 bytes"),
        (b'{"part": {"depth": 0}}', r"a.json: part.depth: got 0, expected"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        json_files.read_as(Whole, tmp_path / "a.json", max_bytes=1000 if b" " * 1000 in content else 2**20)


def test_99_levels_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ' + "[" * 99 + "]" * 99 + "}")
    assert json_files.read(tmp_path / "a.json")["a"]


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name, message in (("", "is a folder"), ("none.json", "does not exist"), ("pipe.json", "is no file")):
        with pytest.raises(UserError, match=rf"{name}: {message}, expected a JSON file"):
            json_files.read(tmp_path / name)
