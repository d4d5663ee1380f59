"""images.py: each wanted uid once, nothing else, and faults of a source are named."""

import csv
import json
import pathlib
import sys

import cv2
import pytest
from tiny_data import image_of, jpg, prompt_of, write_parquet

from richhf_data import images


def test_parquet_yields_the_wanted_uids_once(tmp_path):
    write_parquet(tmp_path / "a" / "0.parquet", [(f"a{i}", f"b{i}") for i in range(10)])
    write_parquet(tmp_path / "a" / "1.parquet", [("a3", "c0"), ("c1", "b4"), ("c1", "c2")])
    spec = f"parquet:{tmp_path}/a/*.parquet"
    found = {uid: (caption, image) for uid, caption, image in images.find(spec, ["a3", "b7", "c1", "absent"])}
    assert sorted(found) == ["a3", "b7", "c1"]
    assert len(list(images.find(spec, ["a3", "c1"]))) == 2
    assert found["b7"] == (prompt_of("a7"), jpg(image_of("b7")))  # a pair has one caption, its first uid's here


def test_parquet_reads_no_further_than_needed(tmp_path):
    write_parquet(tmp_path / "0.parquet", [("a", "b")])
    (tmp_path / "1.parquet").write_bytes(b"not parquet")
    assert [uid for uid, _, _ in images.find(f"parquet:{tmp_path}/*.parquet", ["b", "a"])] == ["a", "b"]
    with pytest.raises(ValueError, match=r"1.parquet is not a readable parquet file .*download it again"):
        list(images.find(f"parquet:{tmp_path}/*.parquet", ["b", "z"]))


def test_parquet_reads_images_only_where_a_uid_is(tmp_path, monkeypatch):
    write_parquet(tmp_path / "0.parquet", [(f"a{i}", f"b{i}") for i in range(12)], row_group_size=3)
    groups = []
    original = images._find_in_row_group
    monkeypatch.setattr(images, "_find_in_row_group", lambda f, g, w: groups.append(g) or original(f, g, w))
    assert len(list(images.find(f"parquet:{tmp_path}/0.parquet", ["b4", "a11"]))) == 2
    assert groups == [1, 3]


def _folder(path: pathlib.Path, table: str) -> str:
    path.mkdir()
    for uid, suffix in (("u0", ".jpg"), ("u1", ".PNG"), ("u2", ".webp"), ("u3", ".jpeg"), ("other", ".png")):
        encoded = cv2.imencode(suffix.lower(), image_of(uid))[1].tobytes()
        (path / f"{uid}{suffix}").write_bytes(encoded)
    captions = {uid: f'{uid}, "quoted"' for uid in ("u0", "u1", "u2", "u3", "no-image")}
    with open(path / table, "w", newline="") as file:
        if table.endswith("csv"):
            csv.writer(file).writerows([("extra", "uid", "caption"), *(("x", *item) for item in captions.items())])
        else:
            file.writelines(json.dumps({"uid": u, "caption": c}) + "\n\n" for u, c in captions.items())
    return f"folder:{path}"


@pytest.mark.parametrize("table", ["captions.csv", "captions.jsonl"])
def test_folder_yields_the_wanted_uids(tmp_path, table):
    spec = _folder(tmp_path / "images", table)
    found = {u: (c, i) for u, c, i in images.find(spec, ["u0", "u1", "u2", "u3", "no-image", "other", "absent"])}
    assert sorted(found) == ["u0", "u1", "u2", "u3"]  # `other` has no caption
    assert found["u1"][0] == 'u1, "quoted"'
    assert (cv2.imdecode(_bytes(found["u1"][1]), cv2.IMREAD_COLOR) == image_of("u1")).all()


def _bytes(encoded):
    import numpy as np

    return np.frombuffer(encoded, np.uint8)


@pytest.mark.parametrize("spec", ["", "parquet", "parquet:", "zip:x", "/data/*.parquet"])
def test_unknown_spec_is_named(spec):
    with pytest.raises(ValueError, match=r"images: got .*expected parquet:GLOB or folder:DIR"):
        list(images.find(spec, ["u0"]))


def test_no_matching_shard_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file matches '.*nothing-\*.parquet'.*quote the pattern"):
        list(images.find(f"parquet:{tmp_path}/nothing-*.parquet", ["u0"]))


def test_missing_columns_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a"], "image": [b""]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"0.parquet: got columns caption, image, expected .*image_0_uid, .* missing"):
        list(images.find(f"parquet:{tmp_path}/0.parquet", ["u0"]))


def test_folder_faults_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*absent, expected images named by uid"):
        list(images.find(f"folder:{tmp_path}/absent", ["u0"]))
    with pytest.raises(ValueError, match=r"neither captions.jsonl nor captions.csv"):
        list(images.find(f"folder:{tmp_path}", ["u0"]))
    (tmp_path / "captions.csv").write_text("id,text\nu0,a\n")
    with pytest.raises(ValueError, match=r"captions.csv: got columns \['id', 'text'\], expected a header uid,caption"):
        list(images.find(f"folder:{tmp_path}", ["u0"]))
    (tmp_path / "captions.jsonl").write_text('{"uid": "u0", "caption": "a"}\n{"uid": "u1"}\n')
    with pytest.raises(ValueError, match=r'captions.jsonl line 2: got .*expected \{"uid"'):
        list(images.find(f"folder:{tmp_path}", ["u0"]))


def test_images_imports_no_tensorflow():
    import subprocess

    code = "import sys; sys.modules['tensorflow'] = None; import richhf_data.images"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[1])
