"""image_sources.py: each source gives the wanted rows and names its faults. images.py: all readers decode alike."""

import contextlib
import csv
import io
import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageCms
import pyarrow
import pyarrow.parquet
import pytest
from tiny_data import image_of, jpg, png_bomb, prompt_of, write_parquet, write_table

from richhf_data import consolidate, image_sources, images, scan


def find(spec, wanted, columns=None):
    return [
        row
        for shard in image_sources.shards(spec, wanted, columns)
        if not shard.check()
        for row in shard.read(frozenset(wanted), lambda count: None)
    ]


def test_parquet_yields_the_wanted_images_alone(tmp_path):
    write_parquet(tmp_path / "a" / "0.parquet", [(f"a{i}", f"b{i}") for i in range(10)])
    write_parquet(tmp_path / "a" / "1.parquet", [("a3", "c0"), ("c1", "b4"), ("c1", "c2")])
    rows = find(f"parquet:{tmp_path}/a/*.parquet", ["a3", "b7", "c1", "absent"])
    assert sorted(uid for uid, _, _ in rows) == ["a3", "a3", "b7", "c1", "c1"]
    assert ("b7", prompt_of("a7"), jpg(image_of("b7"))) in rows  # a pair has one caption, its first uid's here


def test_parquet_reads_images_only_where_a_uid_is(tmp_path, monkeypatch):
    write_parquet(tmp_path / "0.parquet", [(f"a{i}", f"b{i}") for i in range(12)], row_group_size=3)
    read = []
    original = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self, *args, row_groups, columns, **options):
        read.append((row_groups[0], columns[1]))
        return original(self, *args, row_groups=row_groups, columns=columns, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    assert len(find(f"parquet:{tmp_path}/0.parquet", ["b4", "a11"])) == 2
    assert read == [(1, "jpg_1"), (3, "jpg_0")]


def test_progress_adds_up_to_the_bytes(tmp_path):
    write_parquet(tmp_path / "0.parquet", [(f"a{i}", f"b{i}") for i in range(7)], row_group_size=3)
    (shard,) = image_sources.shards(f"parquet:{tmp_path}/0.parquet", ["a1"])
    counts = []
    list(shard.read({"a1"}, counts.append))
    assert len(counts) == 3 and sum(counts) == (tmp_path / "0.parquet").stat().st_size == shard.size


HF_IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


@pytest.mark.parametrize(
    ("columns", "given"),
    [
        ({"uid": "UID", "prompt": "Caption", "image": "JPG"}, None),
        ({"uid": "filename", "prompt": "prompt", "image": "image"}, None),
        ({"uid": "image.path", "prompt": "text", "image": "image"}, None),
        ({"uid": "a", "prompt": "b", "image": "c"}, {"uid": "a", "prompt": "b", "image": "c"}),
        ({"uid": "number", "prompt": "prompt", "image": "image_bytes"}, {"uid": "number"}),
    ],
)
def test_table_columns_are_guessed_or_given(tmp_path, columns, given):
    uids = [str(i) for i in range(6)]
    write_table(tmp_path / "0.parquet", uids, columns)
    rows = find(f"table:{tmp_path}/*.parquet", ["2", "5"], given)
    assert rows == [(uid, prompt_of(uid), jpg(image_of(uid))) for uid in ("2", "5")]


def test_only_an_image_extension_is_not_of_the_uid(tmp_path):
    values = ["cat.v2", "cat.PNG", "a/dog.jpeg", "b/bird", "cat.v2.webp"]
    write_table(tmp_path / "0.parquet", values, {"uid": "path", "prompt": "prompt", "image": "image"})
    for wanted, expected in ((["cat", "dog", "bird"], ["cat", "dog", "bird"]), (["cat.v2"], ["cat.v2", "cat.v2"])):
        assert [uid for uid, _, _ in find(f"table:{tmp_path}/0.parquet", wanted)] == expected


def test_table_that_tells_nothing_prints_its_columns(tmp_path):
    table = {"picture": [b"x"], "says": ["y"], "uid": [1.5]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "0.parquet")
    with pytest.raises(
        ValueError,
        match=r"0.parquet: no column for the uid, expected a string called uid, .*; no column for the prompt, .*; no column "
        r"for the image, expected binary .*--columns=image=NAME. Columns there: picture \(binary\), says \(string\), uid "
        r"\(double\)",
    ):
        find(f"table:{tmp_path}/0.parquet", ["u0"])
    with pytest.raises(ValueError, match=r"no column 'id'; column 'picture' is binary, expected a string or a list"):
        find(f"table:{tmp_path}/0.parquet", ["u0"], {"uid": "id", "prompt": "picture", "image": "says"})


def test_given_columns_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"columns: got caption, expected some of uid, prompt, image"):
        find("table:x", ["u0"], {"caption": "text"})
    with pytest.raises(ValueError, match=r"columns: Pick-a-Pic's are known"):
        find("parquet:x", ["u0"], {"uid": "text"})


def write_folder(path: pathlib.Path, table: str, columns=("uid", "caption")) -> str:
    (path / "inner").mkdir(parents=True)
    for uid, suffix in (("u0", ".jpg"), ("u1", ".PNG"), ("u2", ".webp"), ("inner/u3", ".jpeg"), ("other", ".png")):
        encoded = cv2.imencode(suffix.lower(), image_of(uid))[1].tobytes()
        (path / f"{uid}{suffix}").write_bytes(encoded)
    captions = {uid: f'{uid}, "quoted"' for uid in ("u0", "u1", "u2", "u3", "no-image")}
    rows = [("x", *item) for item in captions.items()]
    names = ("extra", *columns)
    if table.endswith("parquet"):
        rows = [dict(zip(names, row, strict=True)) for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / table)
        return f"folder:{path}"
    with open(path / table, "w", newline="", encoding="utf-8-sig") as file:
        if table.endswith("csv"):
            csv.writer(file).writerows([names, *rows])
        else:
            file.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n\n" for row in rows)
    return f"folder:{path}"


@pytest.mark.parametrize("table", ["captions.csv", "captions.jsonl", "captions.parquet", "metadata.csv"])
def test_folder_yields_the_wanted_images(tmp_path, table):
    spec = write_folder(tmp_path / "images", table, ("file_name", "text") if table == "metadata.csv" else ("uid", "caption"))
    found = {u: (c, i) for u, c, i in find(spec, ["u0", "u1", "u2", "u3", "no-image", "other", "absent"])}
    assert sorted(found) == ["other", "u0", "u1", "u2", "u3"]
    assert found["other"][0] is None  # it has no caption
    assert found["u1"][0] == 'u1, "quoted"'
    assert (cv2.imdecode(np.frombuffer(found["u1"][1], np.uint8), cv2.IMREAD_COLOR) == image_of("u1")).all()


def test_folder_is_read_in_shards_that_know_their_files(tmp_path, monkeypatch):
    spec = write_folder(tmp_path / "images", "captions.csv")
    monkeypatch.setattr(image_sources, "_FILES_AT_ONCE", 2)
    uids = ["u0", "u1", "u2", "u3"]
    shards = image_sources.shards(spec, uids)
    assert [len(shard.entries) for shard in shards] == [2, 2]
    assert image_sources.shards(spec, uids) == shards
    (tmp_path / "images" / "u2.webp").write_bytes(b"changed")
    again = image_sources.shards(spec, uids)
    assert sum(a.name != b.name for a, b in zip(again, shards, strict=True)) == 1


@pytest.mark.parametrize("spec", ["", "parquet", "parquet:", "zip:x", "/data/*.parquet"])
def test_unknown_spec_is_named(spec):
    with pytest.raises(ValueError, match=r"images: got .*expected parquet:GLOB, table:GLOB or folder:DIR"):
        find(spec, ["u0"])


@pytest.mark.parametrize("kind", ["parquet", "table"])
def test_no_matching_shard_is_named(tmp_path, kind):
    with pytest.raises(ValueError, match=r"no file matches '.*nothing-\*.parquet'.*quote the pattern"):
        find(f"{kind}:{tmp_path}/nothing-*.parquet", ["u0"])


def test_parquet_without_the_columns_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a"], "image": [b""]}), tmp_path / "0.parquet")
    with pytest.raises(
        ValueError, match=r"0.parquet: no column 'image_0_uid'; no column 'jpg_0'. Columns there: caption .* is table:GLOB"
    ):
        find(f"parquet:{tmp_path}/0.parquet", ["u0"])
    table = {"caption": ["a"], "image_0_uid": [1.0], "image_1_uid": ["b"], "jpg_0": ["text"], "jpg_1": [b""]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"'image_0_uid' is double, expected a string; column 'jpg_0' is string, expected"):
        find(f"parquet:{tmp_path}/0.parquet", ["u0"])


def test_broken_parquet_is_named(tmp_path):
    path = tmp_path / "0.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"0.parquet is not a readable parquet file .*download it again .*git lfs pull"):
        find(f"parquet:{path}", ["a"])
    write_parquet(path, [(f"a{i}", f"b{i}") for i in range(40)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0.parquet is not a readable parquet file"):
        find(f"parquet:{path}", ["a1"])
    start = pyarrow.parquet.ParquetFile(io.BytesIO(whole)).metadata.row_group(2).column(1).data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 400 + whole[start + 400 :])  # the footer is whole, a page is not
    with pytest.raises(ValueError, match=r"0.parquet is not a readable parquet file"):
        find(f"parquet:{path}", [f"a{i}" for i in range(40)])


def test_folder_faults_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*absent is there or can be reached, expected images named by uid"):
        find(f"folder:{tmp_path}/absent", ["u0"])
    with pytest.raises(ValueError, match=r"got none, expected one of captions.csv, captions.jsonl"):
        find(f"folder:{tmp_path}", ["u0"])
    (tmp_path / "captions.csv").write_text("number,words\nu0,a\n")
    with pytest.raises(ValueError, match=r"captions.csv: no column for the uid, .*Columns there: number \(string\), words"):
        find(f"folder:{tmp_path}", ["u0"])
    (tmp_path / "captions.csv").write_text("uid,caption\nu0,a\nu0,b\n")
    with pytest.raises(ValueError, match=r"captions.csv entry 2: uid 'u0' has the captions 'a' and 'b', expected one"):
        find(f"folder:{tmp_path}", ["u0"])
    (tmp_path / "captions.csv").write_bytes(b"uid,caption\nu0,\xff\n")
    with pytest.raises(ValueError, match=r"captions.csv line 2: got 'u0,.*', which is not UTF-8"):
        find(f"folder:{tmp_path}", ["u0"])
    (tmp_path / "captions.jsonl").write_text('{"uid": "u0", "caption": "a"}\n{"uid": "u1"}\n')
    with pytest.raises(ValueError, match=r"got .*captions.csv and .*captions.jsonl, expected one of"):
        find(f"folder:{tmp_path}", ["u0"])
    (tmp_path / "captions.csv").unlink()
    with pytest.raises(ValueError, match=r'captions.jsonl line 2: got .*expected \{"uid"'):
        find(f"folder:{tmp_path}", ["u0"])
    (tmp_path / "captions.jsonl").write_text('{"uid": "u0", "caption": "a"}\n')
    with pytest.raises(ValueError, match=r"has no image called by a uid of the records, such as u0.jpg"):
        find(f"folder:{tmp_path}", ["u0"])


@pytest.mark.parametrize(
    ("lines", "got"),
    [
        (["u0,a", "u1,a cat, on a table"], "line 3: got 3 fields"),
        (["u0"], "line 2: got 1 fields"),
        (['u0,"a', "u1,b"], "line 2: got unexpected end of data"),
        (['u0,"a" cat'], "line 2: got ',' expected after"),
        (["u0," + "a" * 140_000], "line 2: got field larger than field limit"),
    ],
    ids=["long", "short", "open quote", "loose quote", "huge"],
)
def test_csv_captions_are_never_cut(tmp_path, lines, got):
    spec = write_folder(tmp_path / "images", "captions.csv")
    (tmp_path / "images" / "captions.csv").write_text("\n".join(["uid,caption", *lines]))
    with pytest.raises(ValueError, match=rf"images: .*captions.csv {got}.*expected as many fields .* in quotes, such as"):
        find(spec, ["u0", "u1"])


@pytest.mark.parametrize("line", ['{"uid": "u1", "caption": 5}', "[1, 2]", '"u1"', "{"])
def test_jsonl_captions_of_another_kind_are_named(tmp_path, line):
    spec = write_folder(tmp_path / "images", "captions.jsonl")
    path = tmp_path / "images" / "captions.jsonl"
    for number, lines in ((1, [line]), (2, ['{"uid": "u0", "caption": "a"}', line])):
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=rf"captions.jsonl line {number}: .*got .*expected \{{\"uid\": \"...\", \"cap"):
            find(spec, ["u0", "u1"])


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("gs://bucket/*.parquet", "ImportError: Please install gcsfs"),
        ("hf://datasets/nobody/nothing/*.parquet", "OfflineModeIsEnabled: Cannot reach"),  # see conftest.py
        ("nonsense://x", "Protocol not known: nonsense"),
    ],
)
def test_url_that_cannot_be_reached_is_named(monkeypatch, kind, url, reason):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = rf"images: cannot reach {re.escape(url)} \(.*{reason}.*install what its file system needs"
    if kind == "folder" and url.startswith("hf:"):
        message = "images: no folder .* is there or can be reached"
    with pytest.raises(ValueError, match=message):
        find(f"{kind}:{url}", ["u0"])


def test_file_that_has_gone_is_named(tmp_path):
    (shard,) = image_sources.shards(write_folder(tmp_path / "images", "captions.csv"), ["u0"])
    (tmp_path / "images" / "u0.jpg").unlink()
    with pytest.raises(ValueError, match=r"images: cannot reach .*u0.jpg \(FileNotFoundError"):
        list(shard.read({"u0"}, lambda count: None))


def encoded(image: PIL.Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """As training decodes it."""
    from richhf_data.tensorflow_cpu import tf

    return tf.io.decode_image(data, channels=3, expand_animations=False).numpy()


PICTURE = image_of("picture")[..., ::-1]  # RGB
RGB = PIL.Image.fromarray(np.ascontiguousarray(PICTURE))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_keeps_what_training_reads(kind, mode):
    data = encoded(RGB.convert(mode), kind)
    kept, changes, _ = images.plain(data)
    assert kept == data and changes == ""
    expected = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_allclose(decoded(kept).astype(int), expected, atol=4)  # two inverse cosine transforms


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_plain_keeps_what_exif_does_not_turn(orientation):
    data = encoded(RGB, "JPEG", exif=exif(orientation))
    assert images.plain(data)[:2] == (data, "")


def test_plain_keeps_the_jpegs_of_telephones():
    data = encoded(RGB, "MPO", save_all=True, append_images=[RGB.resize((9, 9))])  # a preview after the picture
    with PIL.Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert images.plain(data)[:2] == (data, "")
    np.testing.assert_allclose(decoded(data).astype(int), PIL.Image.open(io.BytesIO(data)), atol=4)


def exif(orientation):
    tags = PIL.Image.Exif()
    tags[0x0112] = orientation
    return tags


def rgba():
    alpha = np.full((*PICTURE.shape[:2], 1), 255, np.uint8)
    alpha[:20], alpha[20:30] = 0, 51
    return np.concatenate([PICTURE, alpha], -1)


def over_white():
    share = rgba()[..., 3:] / 255
    return PICTURE * share + 255 * (1 - share)


def sixteen_bits() -> bytes:
    return cv2.imencode(".png", (PICTURE[..., ::-1].astype(np.uint16) << 8) + 77)[1].tobytes()


GREY = np.asarray(RGB.convert("L"))
TWO = [RGB, PIL.Image.fromarray(255 - PICTURE)]
ODD_IMAGES = {
    "alpha": (lambda: encoded(PIL.Image.fromarray(rgba()), "PNG"), over_white, 1, "alpha"),
    "palette": (
        lambda: encoded(RGB.quantize(64), "PNG"), lambda: np.asarray(RGB.quantize(64).convert("RGB")), 0, "palette",
    ),
    "transparent palette": (
        lambda: encoded(PIL.Image.fromarray(rgba()).quantize(256), "PNG"), over_white, 40, "alpha, palette",
    ),
    "CMYK": (lambda: encoded(RGB.convert("CMYK"), "JPEG", quality=100, subsampling=0), lambda: PICTURE, 8, "CMYK"),
    "16 bits": (sixteen_bits, lambda: PICTURE, 0, "bit depth"),
    "16 bits grey": (
        lambda: encoded(PIL.Image.fromarray(GREY.astype(np.uint16) << 8), "PNG"),
        lambda: np.repeat(GREY[..., None], 3, -1), 0, "bit depth",
    ),
    "1 bit": (lambda: encoded(RGB.convert("1"), "PNG"), lambda: np.asarray(RGB.convert("1").convert("RGB")), 0, "bit depth"),
    "EXIF, a quarter": (lambda: encoded(RGB, "PNG", exif=exif(6)), lambda: np.rot90(PICTURE, -1), 0, "EXIF rotation"),
    "EXIF, a mirror": (lambda: encoded(RGB, "PNG", exif=exif(2)), lambda: PICTURE[:, ::-1], 0, "EXIF rotation"),
    "EXIF, JPEG": (
        lambda: encoded(RGB, "JPEG", quality=100, subsampling=0, exif=exif(8)),
        lambda: np.rot90(PICTURE), 5, "EXIF rotation",
    ),
    "WebP": (lambda: encoded(RGB, "WEBP", lossless=True), lambda: PICTURE, 0, "WEBP"),
    "BMP": (lambda: encoded(RGB, "BMP"), lambda: PICTURE, 0, "BMP"),
    "TIFF": (lambda: encoded(RGB, "TIFF"), lambda: PICTURE, 0, "TIFF"),
    "GIF": (
        lambda: encoded(RGB.quantize(64), "GIF", save_all=True, append_images=[TWO[1].quantize(64)]),
        lambda: np.asarray(RGB.quantize(64).convert("RGB")), 0, "GIF, animation, palette",
    ),
    "animated PNG": (lambda: encoded(RGB, "PNG", save_all=True, append_images=TWO[1:]), lambda: PICTURE, 0, "animation"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_plain_makes_any_image_rgb(name):
    make, expected, tolerance, reason = ODD_IMAGES[name]
    data, changes, _ = images.plain(make())
    assert changes == reason
    assert data[:4] == b"\x89PNG" and images.plain(data)[:2] == (data, "")
    np.testing.assert_allclose(decoded(data).astype(int), expected(), atol=tolerance)


def test_plain_takes_one_pixel():
    for data in (encoded(RGB.resize((1, 1)), "PNG"), encoded(RGB.resize((1, 1)), "JPEG")):
        assert images.plain(data)[0] == data
    assert decoded(images.plain(encoded(RGB.resize((1, 1)), "WEBP"))[0]).shape == (1, 1, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_plain_scales_down_what_is_too_large(kind):
    large = RGB.resize((480, 400), PIL.Image.Resampling.BICUBIC)
    data, changes, _ = images.plain(encoded(large, kind, exif=exif(6)), max_pixels=48_000)
    assert changes == "EXIF rotation, over 0.048 megapixels"
    assert decoded(data).shape == (240, 200, 3)
    expected = np.rot90(np.asarray(large.resize((240, 200), PIL.Image.Resampling.BOX)), -1)
    assert np.abs(decoded(data).astype(int) - expected).mean() < 2
    assert images.plain(encoded(large, kind))[1] == ""


def test_plain_scales_21_megapixels_by_default():
    picture = np.broadcast_to(np.uint8([10, 20, 30]), (4200, 5000, 3))
    data, changes, _ = images.plain(cv2.imencode(".jpg", picture)[1].tobytes())
    assert changes == "over 20 megapixels"
    height, width, _ = decoded(data).shape
    assert 19e6 < height * width <= 20e6


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"nothing", "no known image format"),
        (jpg(image_of("a"))[:300], "truncated"),
        (encoded(RGB, "PNG")[:300], "truncated"),
        (png_bomb(100_000), "more than 100 megapixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known image format"),
        (encoded(PIL.Image.fromarray(np.float32(GREY)), "TIFF"), "more than 16 bits"),
    ],
    ids=["empty", "text", "jpeg", "png", "bomb", "eps", "float"],
)
def test_plain_says_why_not(data, reason):
    limit = PIL.Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match=f"^{reason}$"):
        images.plain(data)
    assert limit == PIL.Image.MAX_IMAGE_PIXELS


def test_looks_tell_pictures_apart_and_not_encodings():
    look = images.plain(encoded(RGB, "PNG"))[2]
    assert images.same_picture(look, images.plain(encoded(RGB, "JPEG", quality=60))[2])
    assert images.same_picture(look, images.plain(encoded(RGB.resize((96, 80)), "WEBP"))[2])
    assert not images.same_picture(look, images.plain(jpg(image_of("another")))[2])
    assert not images.same_picture(look, images.plain(encoded(RGB.transpose(PIL.Image.Transpose.ROTATE_180), "PNG"))[2])


def profile(gamma: float, primaries: list[tuple[float, float]]) -> bytes:
    """A matrix and gamma ICC profile, version 2, of a display with these chromaticities and the white D65."""

    def xyz(x, y):
        return np.array([x / y, 1, (1 - x - y) / y])

    # Bradford's adaptation from D65 to the profile connection space's D50.
    adapt = np.array([[1.0479, 0.0229, -0.0502], [0.0296, 0.9904, -0.0171], [-0.0092, 0.0151, 0.7519]])
    columns = np.stack([xyz(*one) for one in primaries], 1)
    columns = adapt @ (columns * np.linalg.solve(columns, xyz(0.3127, 0.3290)))

    def fixed(values):
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)}
    tags |= {b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": b"XYZ " + bytes(4) + fixed([0.9642, 1, 0.8249])}
    tags |= {name: b"XYZ " + bytes(4) + fixed(columns[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 132 + len(table) + len(body)
    header = struct.pack(">I4sI", size, b"test", 0x02400000) + b"mntrRGB XYZ " + struct.pack(">6H", 2024, 1, 1, 0, 0, 0)
    header += b"acsp" + bytes(28) + fixed([0.9642, 1, 0.8249]) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


ADOBE = profile(563 / 256, [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)])
SRGB = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
FLAT = PIL.Image.fromarray(np.full((8, 8, 3), (200, 60, 60), np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colour_profiles_become_srgb(kind):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(FLAT, kind, icc_profile=ADOBE, **options)
    kept, changes, _ = images.plain(data)
    assert "colour profile" in changes and images.plain(kept)[:2] == (kept, "")
    np.testing.assert_allclose(images.decode(data, "x")[0, 0].astype(int), [231, 57, 57], atol=2)  # littleCMS's value
    np.testing.assert_array_equal(decoded(kept), images.decode(data, "x"))


@pytest.mark.parametrize("icc", [SRGB, b"no profile", profile(2.2, [(0.64, 0.33), (0.3, 0.6), (0.15, 0.06)])[:200]])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_srgb_and_unreadable_profiles_change_nothing(kind, icc):
    for mode in ("RGB", "L"):
        data = encoded(FLAT.convert(mode), kind, icc_profile=icc)
        assert images.plain(data)[:2] == (data, "")


def test_profile_is_of_the_colours_under_the_transparency():
    image = FLAT.convert("RGBA")
    image.putalpha(PIL.Image.fromarray(np.repeat(np.uint8([[0], [255]]), 8, 1).repeat(4, 0)))
    data = encoded(image, "PNG", icc_profile=ADOBE)
    assert images.plain(data)[1] == "alpha, colour profile"
    found = images.decode(data, "x").astype(int)
    assert (found[:4] == 255).all()
    np.testing.assert_allclose(found[4:], np.broadcast_to([231, 57, 57], (4, 8, 3)), atol=2)


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_all_readers_give_the_pixels_of_a_build(name, tmp_path):
    data = ODD_IMAGES[name][0]()
    (tmp_path / "a").write_bytes(data)
    built = decoded(images.plain(data)[0])
    np.testing.assert_array_equal(images.decode(data, "x"), built)
    np.testing.assert_array_equal(images.read(tmp_path / "a"), built)
    assert images.size(tmp_path / "a") == built.shape[1::-1]


def packed(depth: int, colour: int, row: bytes, transparent: tuple[int, ...], width: int) -> bytes:
    """A PNG of one row with a transparent colour."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    transparency = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return b"\x89PNG\r\n\x1a\n" + header + transparency + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (packed(1, 0, bytes([0b01000000]), (0,), 2), [255, 255]),
        (packed(1, 0, bytes([0b01000000]), (1,), 2), [0, 255]),
        (packed(2, 0, bytes([0b00011011]), (2,), 4), [0, 85, 255, 255]),
        (packed(4, 0, bytes([0x02, 0x7F]), (7,), 4), [0, 34, 255, 255]),
        (packed(8, 0, bytes([0, 7, 9]), (7,), 3), [0, 255, 9]),
        (packed(16, 0, struct.pack(">4H", 0, 5000, 5001, 65535), (5000,), 4), [0, 255, 19, 255]),
        (packed(8, 2, bytes([1, 2, 3, 4, 5, 6]), (1, 2, 3), 2), [[255, 255, 255], [4, 5, 6]]),
        (packed(16, 2, struct.pack(">6H", 5000, 65000, 7, 65000, 5000, 7), (5000, 65000, 7), 2), [[255] * 3, [253, 19, 0]]),
    ],
    ids=["1 bit, 0", "1 bit, 1", "2 bits", "4 bits", "8 bits", "16 bits", "8 bits RGB", "16 bits RGB"],
)
def test_a_transparent_colour_has_the_depth_of_the_picture(data, expected):
    found = images.decode(data, "x")[0]
    np.testing.assert_array_equal(found, np.array(expected).reshape(len(found), -1) * np.ones((1, 3), int))
    np.testing.assert_array_equal(decoded(images.plain(data)[0])[0], found)


ALPHA = PIL.Image.fromarray(rgba())
MODES = {
    "grey and alpha": (ALPHA.convert("LA"), "PNG", {}),
    "grey and alpha, TIFF": (ALPHA.convert("LA"), "TIFF", {}),
    "alpha, WebP": (ALPHA, "WEBP", {"lossless": True, "exact": True}),
    "alpha, JPEG 2000": (ALPHA, "JPEG2000", {"irreversible": False}),
    "alpha, TIFF": (ALPHA, "TIFF", {}),
    "transparent GIF": (ALPHA.quantize(64), "GIF", {}),
    "animated WebP": (ALPHA, "WEBP", {"lossless": True, "exact": True, "save_all": True, "append_images": TWO}),
    "two pages": (ALPHA, "TIFF", {"save_all": True, "append_images": [ALPHA.rotate(180)]}),
    "CMYK, TIFF": (RGB.convert("CMYK"), "TIFF", {}),
    "16 bits, JPEG 2000": (PIL.Image.fromarray(GREY.astype(np.uint16) << 8), "JPEG2000", {}),
    "YCbCr": (RGB.convert("YCbCr"), "TIFF", {}),
}


@pytest.mark.parametrize("name", MODES)
def test_any_format_is_read_as_pillow_shows_it_over_white(name, tmp_path):
    image, kind, options = MODES[name]
    if kind == "JPEG2000" and not PIL.features.check("jpg_2000"):
        pytest.skip("Pillow was built without JPEG 2000")
    data = encoded(image, kind, **options)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        shown = opened.convert("L" if opened.mode.startswith("I") else "RGBA").convert("RGBA")
    expected = PIL.Image.alpha_composite(PIL.Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    if image.mode == "I;16":
        expected = RGB.convert("L").convert("RGB")
    (tmp_path / "a").write_bytes(data)
    np.testing.assert_array_equal(images.read(tmp_path / "a"), expected)
    np.testing.assert_array_equal(images.decode(data, "x"), expected)
    np.testing.assert_array_equal(decoded(images.plain(data)[0]), expected)


def test_cmyk_with_a_profile_of_another_kind_of_colours_is_read_without_it():
    data = encoded(RGB.convert("CMYK"), "JPEG", quality=100, subsampling=0, icc_profile=ADOBE)
    np.testing.assert_allclose(images.decode(data, "x").astype(int), PICTURE, atol=8)


def test_newer_formats_are_read(tmp_path):
    for kind, feature in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")):
        if PIL.features.check(feature):
            data, changes, _ = images.plain(encoded(RGB, kind))
            assert changes == kind and np.abs(decoded(data).astype(int) - PICTURE).mean() < 6


def test_masks_are_luminance_over_white(tmp_path):
    from rahf.diffusion import sample

    pixels = np.zeros((2, 4, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[0] = [(255, 0, 255, 255), (0, 255, 0, 255), (127, 127, 127, 255), (128, 128, 128, 255)]
    pixels[1, 0] = (0, 0, 0, 0)  # hidden black
    (tmp_path / "mask.png").write_bytes(encoded(PIL.Image.fromarray(pixels), "PNG"))
    expected = [[False, True, False, True], [True, False, False, False]]
    assert sample.read_mask(tmp_path / "mask.png").tolist() == expected


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png_bomb(100_000))
    message = r"a.png is missing or is not a readable image \(more than 100 megapixels\), expected a JPEG, PNG or WebP"
    with pytest.raises(ValueError, match=f"image: .*{message}"):
        images.read(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"images: .*a.png is not a readable image \(more than 100 megapixels\)"):
        images.size(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"row 3: image: does not decode \(more than 100 megapixels\)"):
        images.decode(png_bomb(100_000), "row 3")
    with pytest.raises(ValueError, match=r"image: .*none.png is missing or is not a readable image \(no such file\)"):
        images.read(tmp_path / "none.png")
    for side in ((2_000_000, 1), (1, 2_000_000)):
        with pytest.raises(ValueError, match=r"\(a side of more than 1,000,000 pixels\)"):
            images.decode(encoded(PIL.Image.new("1", side), "PNG"), "x")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2 << 30)  # a sparse file
    for read in (images.read, images.size, images.read_bytes):
        with pytest.raises(ValueError, match=r"huge.png .*\(more than a GiB\)"):
            read(tmp_path / "huge.png")


def special_files(folder):
    """Paths that are no files, with what they are."""
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    here = socket.socket(socket.AF_UNIX)
    with contextlib.chdir(folder), here:  # a socket's path must be short
        here.bind("socket.png")
    kinds = {"folder": "folder", "pipe": "named pipe", "link": "named pipe", "device": "device", "socket": "socket"}
    return {folder / f"{name}.png": f"a {kind}" for name, kind in kinds.items()}


def test_extensions_are_pillows(tmp_path):
    named = {name for name, kind in PIL.Image.registered_extensions().items() if kind in images._FORMATS}
    assert named <= set(images.EXTENSIONS)


@pytest.mark.parametrize("name", ["a\0b.png", "a" * 5000, "loop.png", "file/b.png"])
def test_paths_that_no_file_can_have_are_named(name, tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is missing or is not a readable image \((no such file|not readable \()"):
        images.read(tmp_path / name)


def test_what_is_no_file_is_not_opened(tmp_path):
    from rahf.reward.image_table import ImageTable

    for path, kind in special_files(tmp_path).items():
        for read in (images.read, images.size, images.read_bytes):
            with pytest.raises(ValueError, match=rf"{path.name} .*\({kind}\)"):
                read(path)
        (tmp_path / "list.jsonl").write_text(json.dumps({"image": path.name, "prompt": "a cat"}))
        with pytest.raises(ValueError, match=rf"row 1: image: .*{path.name} is {kind}"):
            ImageTable(tmp_path / "list.jsonl")
        with pytest.raises(ValueError, match=rf"annotations: .*{path.name} is {kind}; expected a JSONL file"):
            consolidate.read(str(path))
        if kind != "a folder":
            with pytest.raises(ValueError, match=rf"images: .*{path.name} is {kind}; expected a parquet file"):
                find(f"table:{path}", ["u0"])
    spec = write_folder(tmp_path / "images", "captions.csv")
    (tmp_path / "images" / "u0.jpg").unlink()
    os.mkfifo(tmp_path / "images" / "u0.jpg")
    with pytest.raises(ValueError, match=r"images: .*u0.jpg is a named pipe; expected an image"):
        find(spec, ["u0"])


NAMES = ["a::b", "run[1]", "c*", "d?", "e]", "f::[x]*?"]


@pytest.mark.parametrize("name", NAMES)
def test_paths_that_exist_are_taken_literally(name, tmp_path):
    spec = write_folder(tmp_path / name, "captions.csv")
    assert len(find(spec, ["u0", "u1"])) == 2
    for folder in (name, "run1", "cc", "dd"):  # what a pattern would match
        write_table(tmp_path / folder / f"{name}.parquet", ["u0"], {"uid": "uid", "prompt": "prompt", "image": "image"})
        write_parquet(tmp_path / folder / "pairs" / f"{name}.parquet", [("u0", "u1")])
    for pattern in (f"{name}/{name}.parquet", f"{name}/*.parquet"):
        for beginning in (tmp_path, f"file://{tmp_path}"):
            assert len(find(f"table:{beginning}/{pattern}", ["u0"])) == 1
    assert len(find(f"parquet:{tmp_path}/{name}/pairs/{name}.parquet", ["u0", "u1"])) == 2
    with pytest.raises(ValueError, match=r"images: no file matches") as error:
        find(f"table:{tmp_path}/{name}/none.parquet", ["u0"])
    assert "gcsfs" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_records_and_annotations_are_taken_literally(name, tmp_path):
    from richhf_data import builder, tables

    line = {"uid": "cat7", "annotator": "ada", "prompt": "a cat", "scores": {"overall": 3}}
    for folder in (name, "run1", "cc", "dd"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.tfrecord").write_bytes(b"")
        (tmp_path / folder / f"{name}.jsonl").write_text(json.dumps(line | {"annotator": folder}))
    for pattern in (f"{name}.jsonl", "*.jsonl"):
        assert list(consolidate.read(f"{tmp_path}/{name}/{pattern}")["cat7"].annotations) == [name]
    for pattern in ("", "/train.tfrecord", "/*.tfrecord"):
        found = builder.record_paths(f"{tmp_path}/{name}{pattern}")
        assert found == {"train": tmp_path / name / "train.tfrecord"}
    with contextlib.chdir(tmp_path):
        assert tables.find_format(name) is None


@pytest.mark.parametrize("name", NAMES)
def test_parts_lie_in_any_folder(name, tmp_path):
    write_table(tmp_path / "0.parquet", ["u0", "u1"], {"uid": "uid", "prompt": "prompt", "image": "image"})
    found, folder = scan.gather(f"table:{tmp_path}/0.parquet", ["u0", "u1"], tmp_path / name)
    assert sorted(uid for uid, _, _ in found.read(["u0", "u1"])) == ["u0", "u1"]
    scan.remove(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["0.parquet"]


def test_linked_shards_are_read(tmp_path):
    write_table(tmp_path / "blob", ["u0"], {"uid": "uid", "prompt": "prompt", "image": "image"})
    (tmp_path / "0.parquet").symlink_to(tmp_path / "blob")  # as in Hugging Face's cache
    assert len(find(f"table:{tmp_path}/*.parquet", ["u0"])) == 1


def test_scan_imports_no_tensorflow():
    code = "import sys; sys.modules['tensorflow'] = None; import richhf_data.build, richhf_data.scan"
    assert subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[1]).returncode == 0
