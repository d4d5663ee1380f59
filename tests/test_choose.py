"""Choosing pictures to annotate: filters, balance, tables, the command, and CLIP's categories."""

import collections
import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_clip
from tiny_data import png

from rahf.reward import categories, embed
from richhf_data.annotate.choose import CATEGORIES, Options, PictureTable, choose, has_emoji, is_english
from richhf_data.errors import UserError

ANY = {"least_words": 0, "most_words": 1000, "english": False, "no_emoji": False}


def rows_of(*prompts, **columns):
    rows = [{"image": f"{number}.png", "prompt": prompt} for number, prompt in enumerate(prompts)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


def names(rows):
    return sorted(row["image"] for row in rows)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def table_in(folder, rows):
    """Writes pictures and a .jsonl table of them."""
    (folder / "pictures").mkdir(parents=True)
    lines = [row | {"image": f"pictures/{row['image']}"} for row in rows]
    for number, row in enumerate(lines):
        (folder / row["image"]).write_bytes(png(picture(number)))
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder / "table.jsonl"


def test_filters_count_what_the_first_of_them_removes():
    prompts = [
        "a cat",  # 2 words
        "  a   red cat ",  # 3 words
        " ".join(["word"] * 20),
        " ".join(["word"] * 21),
        "eine Katze und ein Hund auf dem Sofa",
        "a cat on a mat \U0001f600",
        "\U0001f600 cat",  # 2 words, and emoji
    ]
    chosen, report = choose(rows_of(*prompts), Options())
    assert names(chosen) == ["1.png", "2.png"]
    assert (report.read, report.left, report.chosen, report.values) == (7, 2, 2, {})
    assert report.removed == {
        "fewer than 3 words": 2,
        "more than 20 words": 1,
        "not English": 1,
        "emoji": 1,
        "same picture and prompt again": 0,
    }
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert lines[2:5] == ["read 7", "- fewer than 3 words 2", "- more than 20 words 1"] and lines[-2:] == [
        "left 2",
        "chosen 2",
    ]
    assert names(choose(rows_of(*prompts), Options(**ANY))[0]) == [f"{number}.png" for number in range(7)]


def test_the_highest_numbers_are_chosen_before_filters_and_balance_draw():
    values = [0.1, 5, 0.3, -2.0, 0.3, 4]
    rows = rows_of(*(["a red cat"] * 3 + ["a blue dog"] * 3), priority=values, kind=list("aaabbb"))
    chosen, _ = choose(rows, Options(highest="priority"))
    assert [row["priority"] for row in chosen] == sorted(values, reverse=True)
    equal = [[row["image"] for row in choose(rows, Options(highest="priority", seed=seed))[0][2:4]] for seed in range(20)]
    assert {tuple(pair) for pair in equal} == {("2.png", "4.png"), ("4.png", "2.png")}
    chosen, _ = choose(rows, Options(highest="priority", count=2, pictures_per_prompt=1))
    assert [row["image"] for row in chosen] == ["1.png", "5.png"]
    chosen, _ = choose(rows, Options(highest="priority", count=4, balance="kind"))
    assert [row["image"] for row in chosen[:2]] == ["1.png", "5.png"] and names(chosen[2:]) == ["2.png", "4.png"]
    nested = [row | {"deviations": {"overall": row["priority"]}} for row in rows]
    assert choose(nested, Options(highest="deviations.overall", count=1))[0][0]["image"] == "1.png"


@pytest.mark.parametrize("value", ["high", None, True, float("nan")])
def test_a_column_that_is_no_number_is_named(value):
    with pytest.raises(UserError, match=r"images: row 2: priority: got .*, expected a number; the columns are image"):
        choose(rows_of("a red cat", "a red dog", priority=[1, value]), Options(highest="priority"))


@pytest.mark.parametrize(
    ("prompt", "english"),
    [
        ("a yellow cat sitting on a table", True),
        ("portrait, 8k, artstation, trending", True),
        ("Ana de Armas as a knight", True),
        ("a café in Paris", True),
        ("Leonardo da Vinci drawing a helicopter", True),
        ("la la land poster", True),
        ("Las Vegas at night", True),
        ("un gato negro en la playa", False),
        ("retrato de una mujer con sombrero", False),
        ("ein Hund mit einem Hut", False),
        ("un chat noir avec un chapeau dans la rue", False),
        ("una donna che mangia la pizza nel parco", False),
        ("um gato com uma bola na praia", False),
        ("een kat met een hoed op het strand", False),
        ("рыжий кот на столе", False),
        ("一只猫坐在桌子上", False),
        ("el niño está aquí", False),  # 11 of 14 letters are ASCII
        ("12345 !!! ???", False),
        ("eine rote Katze", True),  # wrong, as documented
        ("Oscar de la Renta dress", False),  # wrong, as documented
    ],
)
def test_english(prompt, english):
    assert is_english(prompt) is english


def test_emoji():
    assert all(
        map(has_emoji, ("\U0001f600", "a \u2764\ufe0f b", "\U0001f1eb\U0001f1f7", "1\ufe0f\u20e3", "\u2b50", "\u231a"))
    )
    assert not any(
        map(has_emoji, ("a cat :-)", "caf\u00e9 \u00a9 \u2122", "\u732b", "5 \u20ac \u2192 \u2026 \u201cx\u201d"))
    )


def test_prompts_that_repeat_and_pictures_that_repeat():
    rows = rows_of(*["a red cat", "A  red CAT", "a red cat ", "a blue dog"])
    rows.append(dict(rows[0]))
    chosen, report = choose(rows, Options(pictures_per_prompt=2))
    assert collections.Counter(row["prompt"].lower().split()[2] for row in chosen) == {"cat": 2, "dog": 1}
    assert report.removed["same picture and prompt again"] == 1 and report.removed["more than 2 of a prompt"] == 1
    assert len(choose(rows, Options(pictures_per_prompt=1))[0]) == 2
    assert len(choose(rows, Options())[0]) == 4


def test_balance_by_hand():
    kinds = ["animal"] * 10 + ["human"] * 2 + ["object"] * 5
    rows = rows_of(*(f"the picture {number}" for number in range(17)), kind=kinds)
    for count, expected in (
        (6, {"animal": 2, "human": 2, "object": 2}),
        (9, {"animal": 3.5, "human": 2, "object": 3.5}),  # 4 and 3, either way
        (12, {"animal": 5, "human": 2, "object": 5}),
        (15, {"animal": 8, "human": 2, "object": 5}),
        (0, {"animal": 10, "human": 2, "object": 5}),
    ):
        chosen, report = choose(rows, Options(count=count, balance="kind"))
        found = collections.Counter(row["kind"] for row in chosen)
        assert all(abs(found[name] - number) <= 0.5 for name, number in expected.items()), (count, found)
        assert len(chosen) == (count or 17)
        assert report.values == {name: (kinds.count(name), found[name]) for name in sorted(set(kinds))}
    assert str(report).split("\n\n")[1].split("\n")[2:] == [
        "animal      10        10",
        "human        2         2",
        "object       5         5",
    ]


@pytest.mark.parametrize("balance", [None, "kind"])
def test_the_choice_does_not_depend_on_order_or_folder_and_grows_with_count(balance):
    rows = rows_of(*(f"the picture {number % 40}" for number in range(60)), kind=["a", "b", "b"] * 20)
    options = Options(count=20, balance=balance, pictures_per_prompt=1, seed=3)
    chosen, _ = choose(rows, options)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert choose(shuffled, options)[0] == chosen
    moved = [row | {"image": f"elsewhere/{row['image']}"} for row in rows]
    assert [pathlib.Path(row["image"]).name for row in choose(moved, options)[0]] == [row["image"] for row in chosen]
    for count in (1, 7, 33):
        some = choose(rows, Options(count=count, balance=balance, pictures_per_prompt=1, seed=3))[0]
        assert some[:20] == chosen[:count]
    assert choose(rows, Options(count=20, balance=balance, pictures_per_prompt=1, seed=4))[0] != chosen


def test_photorealistic():
    rows = rows_of("a red cat", "a blue dog", "a green bird", photorealistic=[True, False, True])
    chosen, report = choose(rows, Options(photorealistic=True))
    assert names(chosen) == ["0.png", "2.png"] and report.removed["not photorealistic"] == 1
    for value in (None, 1, "true"):
        with pytest.raises(UserError, match=f"images: row 2: photorealistic: got {value!r}, expected true or false"):
            choose([rows[0], rows[1] | {"photorealistic": value}], Options(photorealistic=True))


def test_errors_of_a_choice():
    rows = rows_of("a red cat", "a cat", "a blue dog")
    expected = r"count: got 3, but 2 of 3 rows are left \(removed: fewer than 3 words 1\); expected at most 2: choose fewer"
    with pytest.raises(UserError, match=expected):
        choose(rows, Options(count=3))
    with pytest.raises(UserError, match="count: got 4, but 3 of 3 rows are left; expected at most 3"):
        choose(rows, Options(count=4, least_words=1))
    expected = r"images: got 3 rows and none is left \(removed: fewer than 4 words 3\), expected some; loosen a filter"
    with pytest.raises(UserError, match=expected):
        choose(rows, Options(least_words=4))
    expected = "images: row 1: got the columns image, prompt, expected category, text.*rahf.reward.categories adds category"
    with pytest.raises(UserError, match=expected):
        choose(rows, Options(balance="category"))
    with pytest.raises(UserError, match=r"images: row 1: category: got 0.5, expected text, a whole number, true or false"):
        choose(rows_of("a red cat", category=[0.5]), Options(balance="category"))
    with pytest.raises(UserError, match="least_words: got 5, expected at most most_words, 4"):
        choose(rows, Options(least_words=5, most_words=4))
    with pytest.raises(UserError, match="images: row 1: prompt: got None, expected text"):
        choose([{"image": "a.png"}], Options())


def test_a_table_is_read_and_written_with_paths_relative_to_each(tmp_path):
    path = table_in(tmp_path / "in", rows_of("a red cat", "a blue dog", uid=["x", "y"], more=[[1], None]))
    table = PictureTable(path)
    chosen, _ = choose(table.rows, Options())
    table.write(chosen, tmp_path / "out" / "deep" / "chosen.jsonl")
    again = PictureTable(tmp_path / "out" / "deep" / "chosen.jsonl")
    written = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert written[0]["image"].startswith("../../in/pictures/")
    assert sorted((row["prompt"], row["uid"], row["more"]) for row in written) == [
        ("a blue dog", "y", None),
        ("a red cat", "x", [1]),
    ]
    assert choose(again.rows, Options())[0] == again.rows
    for row, data in again.encoded(again.rows):
        assert data == png(picture(int(pathlib.Path(row["image"]).stem)))


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_a_parquet_table(kind, tmp_path):
    encoded = [png(picture(number)) for number in range(40)]
    for number, data in enumerate(encoded):
        (tmp_path / f"{number}.png").write_bytes(data)
    column = {
        "bytes": encoded,
        "struct": [{"bytes": data if i % 2 else None, "path": f"{i}.png"} for i, data in enumerate(encoded)],
        "path": [f"{number}.png" for number in range(40)],
    }[kind]
    columns = {
        "caption": [f"the picture {number}" for number in range(40)],
        "image": column,
        "score": [float("nan"), *range(39)],
        "lists": [[1]] * 40,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    table = PictureTable(tmp_path / "table.parquet")
    assert table.rows[0].keys() == {"image", "prompt", "score"} and table.rows[0]["score"] is None
    chosen, _ = choose(table.rows, Options(count=5))
    output = tmp_path / "out" / "few.jsonl"
    for _ in range(2):
        table.write(chosen, output)
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in chosen]
    for row in written:
        number = int(row["prompt"].split()[2])
        assert (output.parent / row["image"]).read_bytes() == encoded[number]
        assert row["image"] == (f"../{number}.png" if kind == "path" else f"few_images/{number:06d}.png")
    if kind != "path":
        (output.parent / written[0]["image"]).write_bytes(b"mine")
        with pytest.raises(UserError, match=r"output: .*few_images/.*png is there with another content, expected none"):
            table.write(chosen, output)


def test_errors_of_a_table(tmp_path):
    path = table_in(tmp_path / "in", rows_of("a red cat", "a blue dog"))
    with pytest.raises(UserError, match=r"images: .*a.csv ends in '.csv', expected one of .jsonl, .parquet, or a folder"):
        PictureTable(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"images: no file .*none.jsonl; expected a table"):
        PictureTable(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"output: got .*table.jsonl, which is the table that is read"):
        PictureTable(path).write([], path)
    with pytest.raises(UserError, match=r"output: got chosen.json, expected a name that ends in .jsonl"):
        PictureTable(path).write([], "chosen.json")
    (tmp_path / "in" / "pictures" / "1.png").unlink()
    table = PictureTable(path)
    with pytest.raises(UserError, match=r"images: .*table.jsonl: no file .*pictures/1.png; expected pictures there"):
        table.write(table.rows, tmp_path / "chosen.jsonl")
    assert not (tmp_path / "chosen.jsonl").exists()
    for text, message in (
        ("\n", "has no rows, expected one for each picture"),
        ('{"image": "a.png"}', "line 1: got no 'prompt' in .*expected"),
        ('{"prompt": "a cat"}', "line 1: got no 'image' in .*expected"),
        ('{"prompt": "a cat", "image": ""}', "line 1: image: got '', expected"),
        ("cat", "line 1: got 'cat', which is not JSON"),
    ):
        (tmp_path / "images.jsonl").write_text(text)
        with pytest.raises(UserError, match=f"images: .*images.jsonl.*{message}"):
            PictureTable(tmp_path)
    for columns, message in (
        ({"image": ["a.png"]}, r"expected the columns image, and prompt or caption; it has image \(string\)"),
        ({"prompt": ["a cat"]}, "expected the columns image, and prompt or caption"),
        ({"prompt": ["a cat", None], "image": ["a.png"] * 2}, "row 2: prompt: got None, expected"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
        with pytest.raises(UserError, match=f"images: .*table.parquet.*{message}"):
            PictureTable(tmp_path / "table.parquet")
    for value, message in ((None, "got no picture, expected its bytes or path"), (b"text", "expected a picture")):
        columns = {"prompt": ["a red cat", "x"], "image": [value, b"more"]}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
        table = PictureTable(tmp_path / "table.parquet")
        with pytest.raises(UserError, match=f"table.parquet: 000000: .*{message}"):
            table.write(table.rows[:1], tmp_path / "chosen.jsonl")


def test_pictures_are_classified_by_a_function(tmp_path):
    table = PictureTable(table_in(tmp_path, rows_of(*(f"the picture {number}" for number in range(35)))))
    sizes = []

    def brightness(pictures):
        sizes.append(len(pictures))
        return ["odd" if one[0, 0, 0] % 2 else "even" for one in pictures]

    table.classify(brightness)
    assert sizes == [32, 3]
    blue_last = [picture(number)[0, 0, 2] for number in range(35)]  # OpenCV writes BGR
    assert [row["category"] for row in table.rows] == ["odd" if value % 2 else "even" for value in blue_last]
    with pytest.raises(UserError, match="classify: got 1 names for 32 pictures, expected one each"):
        table.classify(lambda pictures: ["odd"])


def test_the_command(tmp_path):
    prompts = ["a cat", *(f"the picture {number}" for number in range(6))]
    path = table_in(tmp_path / "in", rows_of(*prompts, kind=["a", "a", "a", "a", "b", "b", "b"]))
    output = tmp_path / "out.jsonl"
    options = f"--images={path} --output={output} --count=4 --balance=kind --noenglish --seed=1".split()
    line = [sys.executable, "-m", "richhf_data.annotate", "choose", *options]
    result = subprocess.run(line, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert collections.Counter(row["kind"] for row in rows) == {"a": 2, "b": 2}
    assert all((tmp_path / row["image"]).is_file() for row in rows)
    printed = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "- fewer than 3 words 1" in printed and not any("English" in line for line in printed)
    assert printed[-3:] == ["a 3 2", "b 3 2", f"{output}: 4 pictures"]


def test_clip_sorts_pictures_and_the_choice_is_balanced(tmp_path):
    clip = embed.Clip(tiny_clip.write(tmp_path / "clip"))
    path = table_in(tmp_path / "in", rows_of(*(f"the picture {number}" for number in range(34)), uid=range(34)))
    table = PictureTable(path)
    categories.classify(clip, table)
    means = [clip.texts(texts).mean(axis=0) for texts in (*categories.TEXTS.values(), *categories.STYLES.values())]
    for row in table.rows[::11]:
        cosines = np.array(means) @ clip.images([picture(row["uid"])[..., ::-1]])[0]
        assert row["category"] == CATEGORIES[int(cosines[:5].argmax())]
        assert row["photorealistic"] is bool(cosines[5] > cosines[6])
    table.write(table.rows, tmp_path / "sorted.jsonl")
    again = PictureTable(tmp_path / "sorted.jsonl")
    assert [row["uid"] for row in again.rows] == list(range(34)) and again.rows[0].keys() == table.rows[0].keys()
    _, report = choose(again.rows, Options(balance="category"))
    assert sum(left for left, _ in report.values.values()) == 34 and report.values.keys() <= set(CATEGORIES)


def test_nearest_is_the_mean_over_the_texts_of_a_name():
    def texts(names):
        return np.array([{"a": [1, 0], "b": [0, 1], "c": [0.8, 0.6]}[name] for name in names], np.float32)

    embeddings = np.array([[1, 0], [0, 1], [0.8, 0.6]], np.float32)
    # Means of "first": (0.5, 0.5); of "second": (0.8, 0.6). Cosines: 0.5 and 0.8; 0.5 and 0.6; 0.7 and 1.
    assert categories.zero_shot(texts, {"first": ("a", "b"), "second": ("c",)})(embeddings) == ["second"] * 3
    assert categories.zero_shot(texts, {"first": ("a",), "second": ("b",)})(embeddings) == ["first", "second", "first"]


def test_choosing_imports_no_model():
    code = "import sys, richhf_data.annotate.choose, richhf_data.annotate.label_studio\n"
    code += "assert not {'jax', 'tensorflow', 'rahf'} & set(sys.modules)"
    root = os.fspath(pathlib.Path(__file__).parent.parent)
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
