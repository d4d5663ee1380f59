"""Chooses the pictures to annotate, by the filters of paper A (section 8).

    python -m richhf_data.annotate choose --images=TABLE --output=chosen.jsonl --count=1000 --pictures_per_prompt=1

A table has a line {"image": path, "prompt": text} for each picture, or {"image", "caption"}, and any more columns. It is a
.jsonl file, a folder with images.jsonl, such as `rahf.diffusion.sample` writes, or a .parquet file, whose column image holds
paths, encoded pictures, or Hugging Face's struct of bytes and path. Paths are relative to the folder of the table.

The paper balances human, animal, object, indoor scene and outdoor scene, and wants mostly photorealistic pictures:
`python -m rahf.reward.categories` adds the columns category and photorealistic, for --balance=category and --photorealistic.

With --highest=COLUMN the pictures with the highest numbers there are chosen, in place of random ones.
`python -m rahf.suggest` adds the column priority, which is high where a critic is not sure. A dot names a number within a
column of a .jsonl file: --highest=deviations.overall, in a predictions.jsonl.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet
from absl import flags
from tabulate import tabulate

from richhf_data import images, input_files, jsonl, parquet, paths, ranges
from richhf_data.errors import UserError

CATEGORIES = ("human", "animal", "object", "indoor scene", "outdoor scene")  # of paper A
CATEGORY, PHOTOREALISTIC = "category", "photorealistic"  # columns
_EXPECTED = '{"image": path, "prompt": text}'
_NAMED = 5  # faults that a message lists
_ROWS_AT_ONCE = 32  # pictures in memory
_LATIN = 0.9  # share of ASCII letters in an English prompt
_FUNCTION_WORDS = {
    "English": "a an and are as at by for from has her his in is it its of on that the their this to with",
    "German": "der die das dem den ein eine einem einen einer und mit auf im von ist nicht",
    "French": "le la les un une de du des et avec dans sur est au aux en",
    "Spanish": "el la un una de del y con en por sobre que",
    "Italian": "il lo la gli un una di del della che con nel sul su",
    "Portuguese": "os uma um de da dos das com em na que",
    "Dutch": "de het een van met op en",
}
# Of Unicode's blocks of emoji, with the other symbols and dingbats there.
_EMOJI = re.compile(
    "[\U0001f000-\U0001faff\u2600-\u27bf\u2b1b\u2b1c\u2b50\u2b55\u231a\u231b\u23e9-\u23f3\u23f8-\u23fa\ufe0f\u20e3]"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is chosen. The defaults of the filters are paper A's.

    Attributes:
      least_words, most_words: of a prompt, separated by white space.
      english: leave out prompts that `is_english` denies. no_emoji: and those with emoji.
      photorealistic: leave out pictures whose column photorealistic is false.
      pictures_per_prompt: at most as many of one prompt, apart from case and white space; 0 = any number.
      count: how many to choose; 0 = all that are left.
      balance: a column; equally many of each of its values, as far as there are. None = no balance.
      highest: a column; its highest numbers first, and drawn among equal ones. None = drawn.
      seed: draws among the pictures that are left.
    """

    least_words: int = 3
    most_words: int = 20
    english: bool = True
    no_emoji: bool = True
    photorealistic: bool = False
    pictures_per_prompt: int = 0
    count: int = 0
    balance: str | None = None
    highest: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """What `choose` did, in numbers of pictures.

    Attributes:
      read: of all. removed: by each filter, in order; the first that fails a picture counts. left: after the filters.
      chosen: of those.
      values: value of the column of `Options.balance` -> (left, chosen).
    """

    read: int
    removed: dict[str, int]
    left: int
    chosen: int
    values: dict[str, tuple[int, int]]

    def __str__(self):
        removed = [(f"- {name}", count) for name, count in self.removed.items()]
        text = tabulate([("read", self.read), *removed, ("left", self.left), ("chosen", self.chosen)], ("", "pictures"))
        if not self.values:
            return text
        return f"{text}\n\n{tabulate([(name, *counts) for name, counts in self.values.items()], ('', 'left', 'chosen'))}"


def is_english(prompt: str) -> bool:
    """Whether a prompt may be English, by its letters and a few words. No model; it errs on short prompts.

    False if it has no letter, if more than a tenth of its letters are not ASCII, or if it has two or more different function
    words of German, French, Spanish, Italian, Portuguese or Dutch, and more of them than of English. So it catches other
    scripts and most sentences of these languages. It lets pass other languages in plain Latin letters and phrases with a
    single function word ("eine rote Katze"), and denies some English lists of foreign names ("Oscar de la Renta dress").

    >>> [is_english(text) for text in ("a cat in a café", "un gato en la playa", "рыжий кот", "die Katze")]
    [True, False, False, True]
    """
    letters = [letter for letter in prompt if letter.isalpha()]
    if not letters or sum(map(str.isascii, letters)) < _LATIN * len(letters):
        return False
    words = set(re.findall(r"[^\W\d_]+", prompt.casefold()))
    counts = {language: len(words.intersection(text.split())) for language, text in _FUNCTION_WORDS.items()}
    return max(counts.values()) < 2 or counts["English"] == max(counts.values())


def has_emoji(prompt: str) -> bool:
    """Whether a prompt has emoji, or other symbols and dingbats."""
    return bool(_EMOJI.search(prompt))


def choose(rows: Iterable[dict], options: Options) -> tuple[list[dict], Report]:
    """Filters pictures and draws among those that are left.

    The drawn order depends on the seed, and on the file names and prompts alone: other orders and folders of the same rows
    give the same choice, and a smaller `count` the beginning of it, with the balance. The values of a balanced column take
    turns; where the count does not divide, or a value has too few, the others get the remainder. With `Options.highest` the
    drawn order is that of falling numbers.

    Args:
      rows: {"image": path, "prompt": text} and any more columns.

    Returns:
      the chosen rows in the drawn order, and the counts.

    Raises:
      UserError: a row without image or prompt, a column that is missing or has unfit values, no row left, or fewer rows left
        than `count`.
    """
    rows, removed = list(rows), {}
    if options.least_words > options.most_words:
        raise UserError(f"least_words: got {options.least_words}, expected at most most_words, {options.most_words}")
    for number, row in enumerate(rows, 1):
        for name in ("image", "prompt"):
            if not jsonl.is_text(row.get(name)) or not row[name].strip():
                raise UserError(f"images: row {number}: {name}: got {row.get(name)!r}, expected text, in {_EXPECTED}")
    if options.photorealistic:
        _check_column(rows, PHOTOREALISTIC, bool, "true or false")
    if options.balance:
        _check_column(rows, options.balance, (str, int, bool), "text, a whole number, true or false")
    left = sorted(rows, key=functools.partial(_order, options.seed))
    if options.highest:
        numbers = {id(row): _number(number, row, options.highest) for number, row in enumerate(rows, 1)}
        left.sort(key=lambda row: -numbers[id(row)])
    for name, fails in _filters(options).items():
        kept = [row for row in left if not fails(row)]
        removed[name], left = len(left) - len(kept), kept
    counts = ", ".join(f"{name} {count}" for name, count in removed.items() if count)
    if not left:
        raise UserError(f"images: got {len(rows)} rows and none is left (removed: {counts}), expected some; loosen a filter")
    if options.count > len(left):
        got = f"got {options.count}, but {len(left)} of {len(rows)} rows are left" + (
            f" (removed: {counts})" if counts else ""
        )
        raise UserError(f"count: {got}; expected at most {len(left)}: choose fewer, loosen a filter, or add pictures")
    turns, seen = [], collections.Counter()
    for row in left:
        value = str(row[options.balance]) if options.balance else ""
        turns.append(seen[value])
        seen[value] += 1
    drawn = [left[place] for place in sorted(range(len(left)), key=turns.__getitem__)]  # stable: each turn in drawn order
    chosen = drawn[: options.count or None]
    values = {}
    if options.balance:
        taken = collections.Counter(str(row[options.balance]) for row in chosen)
        values = {name: (count, taken[name]) for name, count in sorted(seen.items())}
    return chosen, Report(len(rows), removed, len(left), len(chosen), values)


def _filters(options: Options) -> dict[str, Callable[[dict], bool]]:
    """What removes a row, by name. They see the rows in the drawn order, so that it decides which of several stay."""
    filters = {
        f"fewer than {options.least_words} words": lambda row: len(row["prompt"].split()) < options.least_words,
        f"more than {options.most_words} words": lambda row: len(row["prompt"].split()) > options.most_words,
    }
    if options.english:
        filters["not English"] = lambda row: not is_english(row["prompt"])
    if options.no_emoji:
        filters["emoji"] = lambda row: has_emoji(row["prompt"])
    if options.photorealistic:
        filters["not photorealistic"] = lambda row: not row[PHOTOREALISTIC]
    filters["same picture and prompt again"] = _beyond(1, lambda row: (row["image"], row["prompt"]))
    if number := options.pictures_per_prompt:
        name = f"more than {number} of a prompt"
        filters[name] = _beyond(number, lambda row: " ".join(row["prompt"].casefold().split()))
    return filters


def _beyond(number: int, key: Callable[[dict], object]) -> Callable[[dict], bool]:
    seen = collections.Counter()

    def fails(row: dict) -> bool:
        seen[key(row)] += 1
        return seen[key(row)] > number

    return fails


def _order(seed: int, row: dict) -> tuple:
    name = pathlib.PurePath(row["image"]).name
    drawn = hashlib.sha256(json.dumps([seed, name, row["prompt"]]).encode()).digest()
    return drawn, row["image"], json.dumps(row, sort_keys=True, default=str)


def _number(number: int, row: dict, name: str) -> float:
    """The number in a column of row `number`, or within it: "deviations.overall" is row["deviations"]["overall"]."""
    column, _, inside = name.partition(".")
    value = row.get(name)
    if name not in row and isinstance(row.get(column), dict):
        value = row[column].get(inside)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"images: row {number}: {name}: got {value!r}, expected a number; the columns are {', '.join(row)}")
    return value


def _check_column(rows: Sequence[dict], name: str, kinds, expected: str) -> None:
    for number, row in enumerate(rows, 1):
        if name not in row:
            raise UserError(
                f"images: row {number}: got the columns {', '.join(row)}, expected {name}, {expected}; "
                "python -m rahf.reward.categories adds category and photorealistic"
            )
        if not isinstance(row[name], kinds):
            raise UserError(f"images: row {number}: {name}: got {row[name]!r}, expected {expected}")


# ------------------------------------------------------------------------------------------------------------------- tables


class PictureTable:
    """A table of pictures and prompts (see the module).

    Attributes:
      path: the file.
      rows: {"image", "prompt", and the other columns of text, numbers and booleans}, in the table's order. `image` is the
        picture's path, or for a picture in the table its number, "000012".

    Raises:
      UserError: no such file, another format, no column image, prompt or caption; a row without them; no row.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if self.path.is_dir():
            self.path /= "images.jsonl"
        readers = {".jsonl": self._json_rows, ".parquet": self._parquet_rows}
        if self.path.suffix not in readers:
            raise UserError(
                f"images: {path} ends in {self.path.suffix!r}, expected one of {', '.join(readers)}, or a folder"
            )
        paths.check_file("images", self.path, f"a table with lines {_EXPECTED}")
        self._stored = False
        self.rows = list(readers[self.path.suffix]())
        if not self.rows:
            raise UserError(f"images: {self.path} has no rows, expected one for each picture, {_EXPECTED}")

    def encoded(self, rows: Sequence[dict]) -> Iterator[tuple[dict, bytes]]:
        """Yields each of some of the rows, in the table's order, with its picture, encoded.

        Raises:
          UserError: a picture that cannot be read.
        """
        wanted = {id(row) for row in rows}
        if not self._stored:
            yield from ((row, images.read_bytes(row["image"])) for row in self.rows if id(row) in wanted)
            return
        for row, value in zip(self.rows, self._values(["image"], _ROWS_AT_ONCE), strict=True):
            if id(row) in wanted:
                yield row, self._bytes(row, value["image"])

    def batches(self) -> Iterator[tuple[list[dict], list[np.ndarray]]]:
        """Yields a few rows at a time with their pictures, each uint8[H, W, 3].

        Raises:
          UserError: a picture that cannot be read or does not decode.
        """
        waiting = []
        for row, data in self.encoded(self.rows):
            waiting.append((row, images.decode(data, f"images: {self.path}: {row['image']}")))
            if len(waiting) == _ROWS_AT_ONCE:
                yield tuple(map(list, zip(*waiting, strict=True)))
                waiting = []
        if waiting:
            yield tuple(map(list, zip(*waiting, strict=True)))

    def classify(self, function: Callable[[list[np.ndarray]], Sequence[str]], column: str = CATEGORY) -> None:
        """Adds a column to the rows.

        Args:
          function: (B pictures, each uint8[H, W, 3]) -> B names, such as some of `CATEGORIES`.

        Raises:
          UserError: another number of names; as `batches`.
        """
        for rows, pictures in self.batches():
            names = list(function(pictures))
            if len(names) != len(rows):
                raise UserError(f"classify: got {len(names)} names for {len(rows)} pictures, expected one each")
            for row, name in zip(rows, names, strict=True):
                row[column] = name

    def checked_output(self, output) -> pathlib.Path:
        """The path of a file to write. Raises UserError if it is the table, or does not end in .jsonl."""
        output = pathlib.Path(output)
        if output.suffix != ".jsonl":
            raise UserError(f"output: got {output}, expected a name that ends in .jsonl")
        if output.resolve() == self.path.resolve():
            raise UserError(f"output: got {output}, which is the table that is read; expected another file")
        return output

    def write(self, rows: Sequence[dict], output) -> None:
        """Writes some of the rows as .jsonl, whole or not at all, with paths relative to its folder.

        Pictures in the table become files of a folder beside it, OUTPUT_images.

        Raises:
          UserError: the output is the table, or does not end in .jsonl; a picture is missing or cannot be read; a file of
            another content is where a picture would be written.
        """
        output = self.checked_output(output)
        if self._stored:
            names = {}
            for row, data in self.encoded(rows):
                names[id(row)] = name = pathlib.Path(f"{output.stem}_images", f"{row['image']}.{self._extension(row, data)}")
                _write_picture(output.parent / name, data)
        else:
            faults = [row["image"] for row in rows if input_files.not_a_file(row["image"])]
            if faults:
                more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
                raise UserError(f"images: {self.path}: no file {', '.join(faults[:_NAMED])}{more}; expected pictures there")
            names = {id(row): os.path.relpath(row["image"], output.parent) for row in rows}
        jsonl.write(output, (row | {"image": os.fspath(names[id(row)])} for row in rows))

    def _extension(self, row: dict, data: bytes) -> str:
        try:
            images.stored_size(data)
        except UserError as error:
            raise UserError(f"images: {self.path}: {row['image']}: {error}; expected a picture") from error
        return images.extension(data)

    def _bytes(self, row: dict, value) -> bytes:
        if isinstance(value, dict):  # Hugging Face's
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            return images.read_bytes(self.path.parent / value)
        if not isinstance(value, bytes) or not value:
            raise UserError(f"images: {self.path}: {row['image']}: got no picture, expected its bytes or path")
        return value

    def _json_rows(self) -> Iterator[dict]:
        with self.path.open("rb") as file:
            for number, line in jsonl.lines(file):
                where = f"images: {self.path} line {number}"
                yield self._row(jsonl.parse(line, _EXPECTED, where), where)

    def _row(self, row: dict, where: str) -> dict:
        """The row with a column prompt, and with the path of its picture."""
        row = dict(row)
        if "prompt" not in row and "caption" in row:
            row["prompt"] = row.pop("caption")
        prompt = jsonl.text_of(row, "prompt", _EXPECTED, where, blank=False)
        image = jsonl.text_of(row, "image", _EXPECTED, where, blank=False)
        image = image if self._stored else os.fspath(self.path.parent / image)
        return {"image": image, "prompt": prompt} | {name: row[name] for name in row if name not in ("image", "prompt")}

    def _parquet_rows(self) -> Iterator[dict]:
        with parquet.open_file("images", os.fspath(self.path)) as file:
            kinds = {field.name: field.type for field in file.schema_arrow}
        if "image" not in kinds or not kinds.keys() & {"prompt", "caption"}:
            has = parquet.listed(kinds)
            raise UserError(f"images: {self.path}: expected the columns image, and prompt or caption; it has {has}")
        self._stored = not parquet.is_text(kinds["image"])
        plain = (parquet.is_text, pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_boolean)
        columns = [name for name, kind in kinds.items() if any(fits(kind) for fits in plain)]
        for number, row in enumerate(self._values(columns, 2**14)):
            row |= {name: None for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
            if self._stored:
                row["image"] = f"{number:06d}"
            yield self._row(row, f"images: {self.path} row {number + 1}")

    def _values(self, columns: list[str], rows_at_once: int) -> Iterator[dict]:
        try:
            with parquet.open_file("images", os.fspath(self.path)) as file:
                for batch in file.iter_batches(rows_at_once, columns=columns):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise parquet.unreadable("images", os.fspath(self.path), error) from error


def _write_picture(path: pathlib.Path, data: bytes) -> None:
    if os.path.lexists(path):
        if path.is_file() and path.read_bytes() == data:
            return
        raise UserError(f"output: {path} is there with another content, expected none; move it or choose another output")
    paths.replace(path, data)


# ------------------------------------------------------------------------------------------------------------------ command


def define_flags() -> None:
    """Defines the flags of `main`."""
    plain = Options()
    flags.DEFINE_string("images", None, "Table of pictures and prompts: .jsonl, .parquet, or a folder with images.jsonl.")
    flags.DEFINE_string("output", None, "The .jsonl file to write.")
    ranges.flag("least_words", plain.least_words, "Fewest words of a prompt.", ranges.NUMBER)
    ranges.flag("most_words", plain.most_words, "Most words of a prompt.", ranges.NUMBER)
    flags.DEFINE_boolean("english", plain.english, "Leave out prompts that do not look English (no model is asked).")
    flags.DEFINE_boolean("no_emoji", plain.no_emoji, "Leave out prompts with emoji.")
    text = "Leave out pictures whose column photorealistic is false."
    flags.DEFINE_boolean("photorealistic", plain.photorealistic, text)
    ranges.flag("pictures_per_prompt", plain.pictures_per_prompt, "Most pictures of one prompt; 0 = any.", ranges.NUMBER)
    ranges.flag("count", plain.count, "How many pictures to choose; 0 = all that are left.", ranges.NUMBER)
    flags.DEFINE_string("balance", plain.balance, "A column: equally many of each value, such as --balance=category.")
    flags.DEFINE_string("highest", plain.highest, "A column of numbers: the highest, such as --highest=priority.")
    ranges.flag("seed", plain.seed, "Draws among the pictures.", ranges.SEED)
    flags.mark_flags_as_required(["images", "output"])


def main() -> None:
    """The command."""
    args = flags.FLAGS
    table = PictureTable(args.images)
    options = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
    table.checked_output(args.output)
    chosen, report = choose(table.rows, options)
    table.write(chosen, args.output)
    print(report)
    print(f"{args.output}: {len(chosen)} pictures")
