"""What is done to an input: each mutator changes one file of a good one, by a random generator, and says what it did."""

import dataclasses
import json
import math
import os
import pathlib
import pickle
import random
import shutil
import struct
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image

MARKER = "CODE_RAN"  # the file that a hostile input's code would write into the current folder
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".bmp"}
TEXTS = {".txt", ".jsonl", ".csv"}
JSON = {".json", ".jsonl", ".zarray"}
WRONG = (None, True, "", "x", "1", [], {}, [None], {"a": 1}, ["\u202e"], "\x00", "../../x", "9" * 400)
NUMBERS = (0, -1, 1, 2**31, 2**63, 10**30, -(2**31), 0.5, 1e38, -1e308, math.nan, math.inf, 1e-45)
CHARACTERS = ("\u2028", "\u2029", "\x85", "\x0c", "\x00", "\x1b[31m", "\u200b", "\ufdd0", "\U0001f408", "ﬁ", "\u202e")
BOMBS = ((40_000, 40_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 5), (2**32 - 1, 2**32 - 1), (20_000, 20_000))
CLASSES = ("evil.Evil", "os.system", "builtins.eval", "evil:Evil", "__main__.Evil")


@dataclasses.dataclass(frozen=True)
class Mutator:
    """A way to break a file.

    Attributes:
      kind: the row of the table.
      suffixes: of the files that it can change; None: of all.
      change: (random numbers, file) -> what was done.
      same: whether the result must equal that of the good input.
    """

    kind: str
    suffixes: set[str] | None
    change: Callable[[random.Random, pathlib.Path], str]
    same: bool = False


# ---- Bytes and files ------------------------------------------------------------------------------------------------
def _flip(rng, path):
    data = bytearray(path.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 4, 32)))] if data else []
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits flipped at {places[:4]}"


def _truncate(rng, path):
    size = rng.choice((1, 8, path.stat().st_size // 2, max(0, path.stat().st_size - rng.choice((1, 7, 100)))))
    os.truncate(path, min(size, path.stat().st_size))
    return f"cut to {size} bytes"


def _garbage(rng, path):
    path.write_bytes(rng.randbytes(rng.choice((3, 100, 5000))))
    return "random bytes"


def _grown(rng, path):
    with path.open("ab") as file:
        file.write(rng.choice((b"\0" * 100, b"}", rng.randbytes(50))))
    return "bytes added at the end"


def _empty(rng, path):
    path.write_bytes(b"")
    return "empty"


def _folder(rng, path):
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def _missing(rng, path):
    path.unlink()
    return "missing"


def _pipe(rng, path):
    path.unlink()
    os.mkfifo(path)
    return "a named pipe in its place"


def _loop(rng, path):
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself in its place"


# ---- JSON -----------------------------------------------------------------------------------------------------------
def _in_json(edit):
    """Of an edit (rng, value) -> (value, what was done): the mutator of a file, or of one line of a .jsonl."""

    def change(rng, path):
        lines = path.read_bytes().splitlines(keepends=True) if path.suffix == ".jsonl" else [path.read_bytes()]
        number = rng.randrange(len(lines))
        value, done = edit(rng, json.loads(lines[number]))
        text = value if isinstance(value, str) else json.dumps(value)
        lines[number] = (text + "\n").encode(errors="surrogatepass")
        path.write_bytes(b"".join(lines))
        return done

    return change


def _places(value, place=()):
    """Every (container, key) of a JSON value, with the path to it."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key, (*place, key)
        yield from _places(value[key], (*place, key))


def _replaced(choices):
    def edit(rng, value):
        new = rng.choice(choices)
        places = list(_places(value))
        if not places or rng.random() < 0.03:
            return new if not isinstance(new, str) else json.dumps(new), f"{new!r:.40} instead of everything"
        container, key, place = rng.choice(places)
        container[key] = new
        return value, f"{'.'.join(map(str, place))} = {new!r:.40}"

    return edit


def _numbers(rng, value):
    places = [place for place in _places(value) if type(place[0][place[1]]) in (int, float)]
    if not places:
        return _replaced(NUMBERS)(rng, value)
    container, key, place = rng.choice(places)
    container[key] = rng.choice(NUMBERS)
    return value, f"{'.'.join(map(str, place))} = {container[key]!r}"


def _keys(rng, value):
    places = [place for place in _places(value) if isinstance(place[0], dict)]
    if not places:
        return {}, "an empty object"
    container, key, place = rng.choice(places)
    old = container.pop(key)
    if rng.random() < 0.4:
        container[rng.choice((f"{key}s", "", "__class__", "é"))] = old
        return value, f"{'.'.join(map(str, place))} renamed"
    return value, f"{'.'.join(map(str, place))} taken out"


def _deep(rng, value):
    depth = rng.choice((200, 1000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    nest = opening * depth + "1" + closing * depth
    if rng.random() < 0.5 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        rest = {name: entry for name, entry in value.items() if name != key}
        text = json.dumps(rest).removesuffix("}") + (", " if rest else "") + f"{json.dumps(key)}: {nest}}}"
        return text, f"{key}: {depth} levels"
    return nest, f"{depth} levels"


def _twice(rng, value):
    if not isinstance(value, dict) or not value:
        return [], "a list"
    key = rng.choice(list(value))
    text = json.dumps(value)
    return text.removesuffix("}") + f", {json.dumps(key)}: null}}", f"{key} twice"


# ---- Texts ----------------------------------------------------------------------------------------------------------
def _bom(rng, path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return "a byte order mark"


def _encoded(encoding):
    def change(rng, path):
        text = path.read_text(encoding="utf-8").replace("a", "é", 2)
        path.write_bytes(text.encode(encoding, errors="replace"))
        return f"saved as {encoding}"

    return change


def _characters(rng, path):
    new = rng.choice(CHARACTERS)
    text = path.read_text(encoding="utf-8")
    places = [i for i, char in enumerate(text) if char.isalpha()] or [0]
    place = rng.choice(places)
    path.write_bytes((text[:place] + new + text[place:]).encode())
    return f"{new!r} at {place}"


def _surrogate(rng, path):
    data = path.read_bytes()
    lone = b"\\ud83d" if path.suffix in JSON else b"\xed\xa0\xbd"
    places = [i for i in range(len(data)) if data[i : i + 1].isalpha()] or [0]
    place = rng.choice(places)
    path.write_bytes(data[:place] + lone + data[place:])
    return f"a lone surrogate at {place}"


def _lines(rng, path):
    data, kind = path.read_bytes(), rng.choice(("crlf", "cr", "blank", "long", "quote", "comma"))
    lines = data.splitlines()
    if kind == "crlf":
        data = b"\r\n".join(lines) + b"\r\n"
    elif kind == "cr":
        data = b"\r".join(lines)
    elif kind == "blank":
        data = b"\n\n".join(lines) + b"\n  \n"
    elif kind == "long":
        data = data + b"cat " * 100_000
    else:
        data = data + {"quote": b'"', "comma": b",,,"}[kind] + b"\n"
    path.write_bytes(data)
    return f"lines: {kind}"


# ---- Pictures -------------------------------------------------------------------------------------------------------
def _picture(rng, path):
    with PIL.Image.open(path) as opened:
        image = opened.convert("RGB")
    kinds = {
        "transparent": (image.convert("RGBA"), "PNG", {}),
        "grey with alpha": (image.convert("LA"), "PNG", {}),
        "palette": (image.quantize(8), "PNG", {"transparency": 0}),
        "CMYK": (image.convert("CMYK"), "JPEG", {}),
        "grey": (image.convert("L"), "JPEG", {}),
        "one bit": (image.convert("1"), "PNG", {}),
        "16 bit": (PIL.Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), "PNG", {}),
        "floats": (image.convert("F"), "TIFF", {}),
        "animated": (image.convert("P"), "GIF", {"save_all": True, "append_images": [image.convert("P")] * 3}),
        "WebP": (image, "WEBP", {}),
        "BMP": (image, "BMP", {}),
        "TIFF": (image, "TIFF", {}),
        "JPEG 2000": (image, "JPEG2000", {}),
        "one pixel": (image.resize((1, 1)), "PNG", {}),
        "a line": (image.resize((3000, 1)), "PNG", {}),
    }
    name = rng.choice(sorted(kinds))
    picture, form, options = kinds[name]
    picture.save(path, form, **options)
    return name


def _bomb(rng, path):
    width, height = rng.choice(BOMBS)
    if 0 < width * height <= 20_000**2:  # a whole one, of one bit a pixel
        rows = zlib.compress((b"\0" + b"\0" * (width // 8)) * height, 9)
        depth = 1, 0
    else:
        rows, depth = zlib.compress(b"\0" * 1000), (8, 2)
    header = struct.pack(">IIBBBBB", width, height, *depth, 0, 0, 0)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return f"a PNG of {width} x {height}"


# ---- Weights --------------------------------------------------------------------------------------------------------
def _safetensors(rng, path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.choice(("header", "offsets", "dtype", "shape", "nan", "inf", "name", "missing", "negative"))
    if kind == "header":
        path.write_bytes(struct.pack("<Q", rng.choice((2**63, 2**40, 0, size + 5))) + data[8:])
        return "a wrong length of the header"
    entry = header[name]
    if kind == "offsets":
        entry["data_offsets"] = [0, rng.choice((2**40, 1))]
    elif kind == "dtype":
        entry["dtype"] = rng.choice(("F8_E4M3", "I64", "BOOL", "C64", "X", "F64"))
    elif kind == "shape":
        entry["shape"] = rng.choice(([], [2**40, 2**40], [0], [1, *entry["shape"]], entry["shape"][::-1]))
    elif kind == "negative":
        entry["shape"] = [-1]
    elif kind in ("nan", "inf"):
        value = np.array([math.nan if kind == "nan" else math.inf], np.float32).tobytes()
        start = entry["data_offsets"][0]
        body[start : start + 4] = value
    elif kind == "name":
        header[rng.choice(("", "../x", f"{name}.x", "\x00"))] = header.pop(name)
    else:
        header.pop(name)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return f"{name}: {kind}"


class _Payload:
    def __reduce__(self):
        return exec, (f"open({MARKER!r}, 'w')",)


def _npz(rng, path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = rng.choice(sorted(arrays))
    kind = rng.choice(("nan", "int", "bool", "complex", "0-d", "pickle", "missing", "text", "shape", "float16"))
    array = arrays[name]
    if kind == "missing":
        del arrays[name]
    elif kind == "nan":
        arrays[name] = np.full_like(array, math.nan)
    elif kind == "0-d":
        arrays[name] = np.float32(1)
    elif kind == "pickle":
        arrays[name] = np.array([_Payload()], object)
    elif kind == "text":
        arrays[name] = np.array(["evil"])
    elif kind == "shape":
        arrays[name] = array[None]
    else:
        arrays[name] = array.astype({"int": np.int64, "bool": bool, "complex": np.complex64, "float16": np.float16}[kind])
    np.savez(path, **arrays)
    return f"{name}: {kind}"


def _pickle(rng, path):
    path.write_bytes(pickle.dumps({"a": _Payload()}))
    return "a pickle that runs code"


# ---- Records, tables ------------------------------------------------------------------------------------------------
def _record(rng, path):
    data = bytearray(path.read_bytes())
    masked = _masked_crc(struct.pack("<Q", 2**62))
    data[:12] = struct.pack("<Q", 2**62) + struct.pack("<I", masked)
    path.write_bytes(data)
    return "a record of 2^62 bytes, with a right checksum"


def _masked_crc(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table(rng, path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    place = rng.randrange(table.num_columns)
    name, kind = table.column_names[place], rng.choice(("missing", "null", "numbers", "lists", "twice", "no rows", "texts"))
    if kind == "missing":
        table = table.drop_columns([name])
    elif kind == "no rows":
        table = table.slice(0, 0)
    elif kind == "twice":
        table = table.append_column(name, table.column(place))
    else:
        column = {
            "null": pyarrow.nulls(table.num_rows),
            "numbers": pyarrow.array([math.nan] * table.num_rows),
            "lists": pyarrow.array([["a", "b"]] * table.num_rows),
            "texts": pyarrow.array(["\u2028x"] * table.num_rows),
        }[kind]
        table = table.set_column(place, name, column)
    pyarrow.parquet.write_table(table, path)
    return f"column {name}: {kind}"


ALL = [
    Mutator("flipped bits", None, _flip),
    Mutator("cut", None, _truncate),
    Mutator("random bytes", None, _garbage),
    Mutator("random bytes", None, _grown),
    Mutator("empty", None, _empty),
    Mutator("folder, pipe, loop", None, _folder),
    Mutator("folder, pipe, loop", None, _pipe),
    Mutator("folder, pipe, loop", None, _loop),
    Mutator("missing part", None, _missing),
    Mutator("JSON: types", JSON, _in_json(_replaced(WRONG))),
    Mutator("JSON: numbers", JSON, _in_json(_numbers)),
    Mutator("JSON: keys", JSON, _in_json(_keys)),
    Mutator("JSON: keys", JSON, _in_json(_twice)),
    Mutator("JSON: depth", JSON, _in_json(_deep)),
    Mutator("class names", {".json"}, _in_json(_replaced(CLASSES))),
    Mutator("encodings", TEXTS, _bom, same=True),
    Mutator("encodings", TEXTS | JSON, _encoded("cp1252")),
    Mutator("encodings", TEXTS | JSON, _encoded("utf-16")),
    Mutator("encodings", TEXTS | JSON, _surrogate),
    Mutator("characters", TEXTS, _characters),
    Mutator("characters", TEXTS, _lines),
    Mutator("picture kinds", PICTURES, _picture),
    Mutator("picture bombs", PICTURES, _bomb),
    Mutator("tensors", {".safetensors"}, _safetensors),
    Mutator("tensors", {".npz"}, _npz),
    Mutator("pickles", {".npz", ".safetensors", ".pt", ".bin", ".json", ".model"}, _pickle),
    Mutator("records, columns", {".tfrecord"}, _record),
    Mutator("records, columns", {".parquet"}, _table),
]
PATHS = ("run[1]", "run[lr=1e-3]", "a*b", "what?", "a::b", "a b", "ünï", "-x", "{a,b}", "%d", "#x", "a:b", "~x", "'\"")
FLAGS = ("nan", "inf", "-inf", "-1", "0", "1e38", "1e400", "9" * 20, "", "x", "1.5", "None", "0x10", "True", "٣")


def rename(rng: random.Random, folder: pathlib.Path) -> pathlib.Path:
    """The folder under a name that means something to a shell, to glob or to a library."""
    return pathlib.Path(shutil.move(folder, folder.with_name(rng.choice(PATHS))))
