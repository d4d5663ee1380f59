"""scan.py: the same images for any number of workers and interruptions, each shard read once, and what is ambiguous."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest
from tiny_data import flip, image_of, jpg, png, prompt_of, write_captions, write_parquet, write_table

from rahf.reward.image_table import ImageTable
from richhf_data import image_sources, images, scan, tables
from richhf_data.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def gathered(folder, spec, wanted, **arguments):
    found, parts = scan.gather(spec, wanted, f"{folder}/parts", **arguments)
    return found, sorted(found.read(wanted)), pathlib.Path(parts)


def write_shards(folder, count=6, rows=5) -> tuple[str, list[str]]:
    """Pick-a-Pic-like shards, and the uids that are wanted: one or two of each shard but the second, one that is absent."""
    for shard in range(count):
        write_parquet(folder / f"{shard:02d}.parquet", [(f"a{shard}-{i}", f"b{shard}-{i}") for i in range(rows)])
    wanted = [f"a{shard}-3" for shard in range(count) if shard != 1] + [f"b{shard}-0" for shard in range(0, count, 2)]
    return f"parquet:{folder}/*.parquet", [*wanted, "absent"]


@pytest.fixture
def scanned(monkeypatch):
    """The names of the shards that are scanned in this process."""
    names = []
    shard, original = image_sources.ParquetShard, image_sources.ParquetShard.read
    monkeypatch.setattr(shard, "read", lambda self, *args: names.append(self.name[:2]) or original(self, *args))
    return names


def test_found_images_equal_their_sources(tmp_path):
    spec, wanted = write_shards(tmp_path / "images")
    found, rows, _ = gathered(tmp_path, spec, wanted)
    assert [uid for uid, _, _ in rows] == sorted(set(wanted) - {"absent"})
    for uid, caption, image in rows:
        assert caption == prompt_of("a" + uid[1:]) and image == jpg(image_of(uid))
    assert len(found) == len(wanted) - 1
    assert [uid for uid, _, _ in found.read(["b0-0", "absent"])] == ["b0-0"]


def test_workers_change_nothing(tmp_path):
    spec, wanted = write_shards(tmp_path / "images")
    _, alone, folder = gathered(tmp_path / "0", spec, wanted)
    _, together, other = gathered(tmp_path / "2", spec, wanted, workers=2)
    assert alone == together
    parts = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in other.iterdir()} == parts
    assert len(parts) == 6


def test_shards_after_the_last_uid_are_not_read(tmp_path, scanned, capsys):
    spec, _ = write_shards(tmp_path / "images")
    gathered(tmp_path, spec, ["a0-3", "b2-0"])
    assert scanned == ["00", "01", "02"]
    assert "all found; 3 of 6 shards were not read" in capsys.readouterr().out
    gathered(tmp_path, spec, ["a0-3", "b5-0"])
    assert "were not read" not in capsys.readouterr().out


def test_finished_shards_are_not_read_again(tmp_path, scanned, capsys):
    spec, wanted = write_shards(tmp_path / "images")
    first = gathered(tmp_path, spec, wanted)
    assert scanned == [f"{i:02d}" for i in range(6)]
    for part in sorted(first[2].iterdir())[3:]:
        part.unlink()
    scanned.clear()
    assert gathered(tmp_path, spec, wanted)[1] == first[1]
    assert scanned == ["03", "04", "05"]
    assert "3 of 6 shards were read before" in capsys.readouterr().out
    scanned.clear()
    write_parquet(tmp_path / "images" / "01.parquet", [("a1-3", "absent")])  # it is another file now
    assert "absent" in [uid for uid, _, _ in gathered(tmp_path, spec, wanted)[1]]
    assert scanned == ["01"]
    scanned.clear()
    gathered(tmp_path, spec, wanted[:-2])  # others are wanted
    gathered(tmp_path, spec, wanted, max_pixels=100)
    assert len(scanned) == 6 + 6


CODE = """
import sys, time
from richhf_data import image_sources, images, scan
read = image_sources.ParquetShard.read
def slow(self, *args):
    for row in read(self, *args):
        time.sleep(0.02)
        yield row
image_sources.ParquetShard.read = slow
if __name__ == "__main__":
    scan.gather(sys.argv[1], sys.argv[4].split(","), sys.argv[2], workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_scan_goes_on_and_ends_the_same(tmp_path, workers, scanned):
    spec, _ = write_shards(tmp_path / "images", count=12, rows=20)
    wanted = [f"{side}{shard}-{i}" for shard in range(12) for i in range(20) for side in "ab"] + ["absent"]
    (tmp_path / "slow.py").write_text(CODE)
    command = [sys.executable, str(tmp_path / "slow.py"), spec, f"{tmp_path}/killed/parts", str(workers), ",".join(wanted)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(finished := list((tmp_path / "killed").glob("parts/*/*.parquet"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    children = [int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in children):  # the workers end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.05)
    finished = {path.name[:2] for path in (tmp_path / "killed").glob("parts/*/*.parquet")}
    assert 3 <= len(finished) < 12
    assert gathered(tmp_path / "killed", spec, wanted)[1] == gathered(tmp_path / "whole", spec, wanted)[1]
    assert set(scanned[: 12 - len(finished)]).isdisjoint(finished)
    assert len(scanned) == 12 - len(finished) + 12


def test_first_of_several_copies_counts(tmp_path):
    write_parquet(tmp_path / "0.parquet", [("x", "y"), ("x", "z")], {"y": b"broken"})
    write_parquet(tmp_path / "1.parquet", [("x", "w"), ("z", "y")], {"x": png(image_of("x")), "y": png(image_of("y"))})
    for row_group in (0, 1):
        path = tmp_path / f"{row_group}.parquet"
        table = pyarrow.parquet.read_table(path)
        captions = pyarrow.array(["one, caption", "one caption!"])  # the same words
        pyarrow.parquet.write_table(table.set_column(table.column_names.index("caption"), "caption", captions), path)
    found, rows, _ = gathered(tmp_path, f"parquet:{tmp_path}/*.parquet", ["x", "y", "z", "absent"])
    assert found.faults == {} and found.ambiguous == {}
    assert rows == [
        ("x", "one, caption", jpg(image_of("x"))),
        ("y", "one caption!", png(image_of("y"))),  # the copy that decodes
        ("z", "one caption!", jpg(image_of("z"))),
    ]


def test_two_pictures_or_captions_of_a_uid_are_ambiguous(tmp_path):
    columns = {"uid": "uid", "prompt": "prompt", "image": "image"}
    write_table(tmp_path / "0.parquet", ["u0", "u1", "u2"], columns)
    write_table(tmp_path / "1.parquet", ["u0", "u1"], columns, {"u0": jpg(image_of("other"))})
    path = tmp_path / "1.parquet"
    table = pyarrow.parquet.read_table(path)
    captions = pyarrow.array([prompt_of("u0"), "something else"])
    pyarrow.parquet.write_table(table.set_column(table.column_names.index("prompt"), "prompt", captions), path)
    found, rows, _ = gathered(tmp_path, f"table:{tmp_path}/*.parquet", ["u0", "u1", "u2", "absent"])
    assert found.ambiguous == {"u0": "two pictures", "u1": "two captions"}
    assert [uid for uid, _, _ in rows] == ["u2"]


def test_unusable_images_have_a_reason(tmp_path):
    columns = {"uid": "uid", "prompt": "prompt", "image": "image"}
    odd = {"u0": b"", "u1": b"text", "u2": jpg(image_of("u2"))[:200], "u4": None}
    write_table(tmp_path / "0.parquet", [f"u{i}" for i in range(5)], columns, odd)
    found, rows, _ = gathered(tmp_path, f"table:{tmp_path}/*.parquet", [f"u{i}" for i in range(5)])
    assert found.faults == {"u0": "no bytes", "u1": "no known image format", "u2": "truncated", "u4": "no bytes"}
    assert [uid for uid, _, _ in rows] == ["u3"]


def test_large_images_are_scaled_and_counted(tmp_path):
    columns = {"uid": "uid", "prompt": "prompt", "image": "image"}
    write_table(tmp_path / "0.parquet", ["u0"], columns)
    found, rows, _ = gathered(tmp_path, f"table:{tmp_path}/*.parquet", ["u0"], max_pixels=1000)
    assert found.changes == {"u0": "over 0.001 megapixels"}
    assert images.plain(rows[0][2], max_pixels=1000)[1] == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_every_faulty_shard_is_named_before_any_is_read(tmp_path, scanned, workers):
    spec, wanted = write_shards(tmp_path / "images")
    (tmp_path / "images" / "02.parquet").write_bytes(b"not parquet")
    (tmp_path / "images" / "05.parquet").write_bytes((tmp_path / "images" / "05.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"(?s)02.parquet is not a readable .*05.parquet is not a readable parquet file"):
        gathered(tmp_path, spec, wanted, workers=workers)
    assert not scanned


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_with_a_broken_page_is_named_and_the_others_are_kept(tmp_path, workers):
    spec, wanted = write_shards(tmp_path / "images")
    path = tmp_path / "images" / "03.parquet"
    data = path.read_bytes()
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(2).data_page_offset
    path.write_bytes(data[:start] + b"\xff" * 300 + data[start + 300 :])
    with pytest.raises(ValueError, match=r"images: .*03.parquet is not a readable parquet file .*download it again"):
        gathered(tmp_path, spec, wanted, workers=workers)
    parts = sorted(path.name for path in tmp_path.glob("parts/*/*"))
    assert [name[:2] for name in parts][:3] == ["00", "01", "02"]
    assert all(name.endswith(".parquet") for name in parts)


def test_a_flipped_bit_of_a_page_with_checksum_is_named(tmp_path):
    """In a text or an image, which decode as before: in shards, tables, captions, and in parts."""
    path = tmp_path / "0.parquet"
    damaged = r"0.parquet is not a readable parquet file .*CRC checksum verification failed"
    for column in ("caption", "jpg_0"):
        write_parquet(path, [("a0", "b0"), ("a1", "b1")])
        flip(path, column)
        with pytest.raises(UserError, match=damaged):
            gathered(tmp_path / column, f"parquet:{path}", ["a0", "a1"])
    write_captions(path, ["a cat", "a dog"], "prompt")
    flip(path, "prompt")
    for read in (
        lambda: list(tables.Captions(str(path), holdout=0.0).examples("train")),
        lambda: gathered(tmp_path / "table", f"table:{path}", ["x"], columns={"uid": "prompt"}),
        lambda: ImageTable(path),
    ):
        with pytest.raises(UserError, match=damaged):
            read()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "u0.png").write_bytes(png(image_of("u0")))
    table = pyarrow.table({"uid": ["u0"], "caption": ["a cat"]})
    pyarrow.parquet.write_table(table, tmp_path / "folder" / "captions.parquet")
    flip(tmp_path / "folder" / "captions.parquet", "caption")
    with pytest.raises(UserError, match=r"captions.parquet is not a readable parquet file .*CRC"):
        gathered(tmp_path / "parts", f"folder:{tmp_path}/folder", ["u0"])


@pytest.mark.parametrize("column", ["caption", "image"])
def test_a_flipped_bit_of_a_part_is_named(tmp_path, column):
    spec, wanted = write_shards(tmp_path / "images", count=1)
    _, _, folder = gathered(tmp_path, spec, wanted)
    (part,) = folder.iterdir()
    with pyarrow.parquet.ParquetFile(part) as file:
        chunk = file.metadata.row_group(0).column(file.schema_arrow.names.index(column))
    data = bytearray(part.read_bytes())
    data[(chunk.dictionary_page_offset or chunk.data_page_offset) + 60] ^= 4
    part.write_bytes(data)
    with pytest.raises(UserError, match=r"images: .*\.parquet is damaged \(.*CRC.*delete it and run the command again"):
        gathered(tmp_path, spec, wanted)


def test_no_wanted_uid_shows_those_there(tmp_path):
    spec, _ = write_shards(tmp_path / "images")
    with pytest.raises(ValueError, match=r"none of the 2 uids, expected such as x, y; got such as a0-0, a0-1.*--columns"):
        gathered(tmp_path, spec, ["x", "y"])


def test_damaged_part_is_named(tmp_path):
    spec, wanted = write_shards(tmp_path / "images")
    _, _, folder = gathered(tmp_path, spec, wanted)
    next(folder.iterdir()).write_bytes(b"")
    with pytest.raises(ValueError, match=r"images: .*\.parquet is damaged .*delete it and run the command again"):
        gathered(tmp_path, spec, wanted)


def test_remove_takes_the_parts_and_nothing_else(tmp_path):
    spec, wanted = write_shards(tmp_path / "images")
    _, _, folder = gathered(tmp_path, spec, wanted)
    _, _, other = gathered(tmp_path, spec, wanted[:2])
    scan.remove(str(folder))
    assert not folder.exists() and list(other.iterdir())
    scan.remove(str(other))
    assert not (tmp_path / "parts").exists() and (tmp_path / "images").exists()


def test_parts_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    spec, wanted = write_shards(tmp_path / "images", 1)
    with pytest.raises(ValueError, match=r"parts: cannot reach gs://bucket/parts/.* \(ImportError: Please install gcsfs"):
        scan.gather(spec, wanted, "gs://bucket/parts")


def test_parts_and_shards_may_be_urls(tmp_path):
    spec, wanted = write_shards(tmp_path / "images")
    found, parts = scan.gather(f"parquet:file://{tmp_path}/images/*.parquet", wanted, "memory://parts")
    assert parts.startswith("memory://parts/")
    assert sorted(found.read(wanted)) == gathered(tmp_path, spec, wanted)[1]
    scan.remove(parts)


def test_beam_writes_the_same_parts(tmp_path):
    pytest.importorskip("apache_beam")
    spec, wanted = write_shards(tmp_path / "images")
    _, rows, folder = gathered(tmp_path / "here", spec, wanted)
    options = "--runner=DirectRunner --direct_num_workers=2"
    _, beam_rows, beam_folder = gathered(tmp_path / "beam", spec, wanted, beam=options)
    assert beam_rows == rows
    parts = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in beam_folder.iterdir()} == parts


def test_beam_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    spec, wanted = write_shards(tmp_path / "images")
    with pytest.raises(ValueError, match=r"beam: Apache Beam is not installed; pip install 'rahf\[beam\]'"):
        gathered(tmp_path, spec, wanted, beam="")
