"""rahf.score: every kind of input, the same bytes however a job was interrupted or divided, and what fails is listed."""

import functools
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time

import cv2
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import quick_xla
import tiny_model

import rahf
from rahf import experiments, hosts, predict
from rahf.score import beam, parts, workers
from rahf.score import job as jobs
from richhf_data import images as image_files
from richhf_data import picture_shards, schema
from richhf_data.errors import UserError

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = pathlib.Path(__file__).parent.parent
PROMPTS = ["a red cat", "two blue dogs, in the forest", "a house"]
BATCH = 8  # devices of the tests


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    return image_files.png(rng.integers(0, 256, (20 + number % 7, 24 + number % 5, 3), np.uint8))


def prompt(number: int) -> str:
    return f"{PROMPTS[number % 3]} {number}"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, standard_promotion):
    config = experiments.load("rahf_ci")
    config.data.source = "stream"
    return tiny_model.workdir(tmp_path_factory.mktemp("run"), config)


@pytest.fixture(scope="module")
def model(workdir):
    return rahf.load(workdir)


@pytest.fixture
def score(model):
    """Scores a SPEC into a folder, in this process: the job."""

    def run(spec, output, shard_rows=10, prompt=None, columns=None, rewards=(), num_workers=0, **options):
        found = picture_shards.shards(str(spec), shard_rows, prompt, columns)
        reward_specs = jobs.reward_specs(rewards)
        loaded = jobs.load_rewards(reward_specs)
        job = jobs.job_of(model, output, loaded, reward_specs, BATCH, **options)
        jobs.check_output(job, found)
        parts.begin(job, len(found))
        jobs.score(model, loaded, job, found, num_workers)
        jobs.finish(job, len(found))
        return job

    return run


def rows(output) -> list[dict]:
    tables = map(pyarrow.parquet.read_table, sorted(pathlib.Path(output).glob("part-*.parquet")))
    return [row for table in tables for row in table.to_pylist()]


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


def write_table(path, numbers, bad=(), group=5, **columns):
    images = [b"no picture" if number in bad else picture(number) for number in numbers]
    columns = columns or {"image": [{"bytes": data, "path": f"{i}.png"} for i, data in zip(numbers, images, strict=True)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": list(map(prompt, numbers))} | columns), path, row_group_size=group
    )


def write_tar(path, files: dict[str, bytes]):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_files(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:03d}.png").write_bytes(picture(number))
        (folder / f"{number:03d}.txt").write_text(prompt(number))


# -------------------------------------------------------------------------------------------------------------- Every input


def sources(folder) -> dict[str, str]:
    """kind -> a SPEC of the same twelve pictures and prompts."""
    numbers = range(12)
    write_files(folder / "files" / "a", numbers[:6])
    write_files(folder / "files" / "b", numbers[6:])
    lines = [{"image": f"files/{'ab'[i // 6]}/{i:03d}.png", "prompt": prompt(i)} for i in numbers]
    lines[5]["image"] = str(folder / lines[5]["image"])
    lines[6]["image"] = f"file://{folder / lines[6]['image']}"
    (folder / "list.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    write_table(folder / "structs" / "0.parquet", numbers[:7])
    write_table(folder / "structs" / "1.parquet", numbers[7:])
    write_table(folder / "bytes.parquet", numbers, picture=list(map(picture, numbers)), key=[f"k{i}" for i in numbers])
    tar = {f"d/{i}.{kind}": data for i in numbers for kind, data in _sample(i)}
    write_tar(folder / "0.tar", {"__meta__.txt": b"{}"} | tar)
    memory = fsspec.filesystem("memory")
    for name in ("structs/0.parquet", "structs/1.parquet"):
        memory.pipe(f"/{folder.name}/{name}", (folder / name).read_bytes())
    for i in numbers:
        memory.pipe(f"/{folder.name}/files/{i:03d}.png", picture(i))
        memory.pipe(f"/{folder.name}/files/{i:03d}.txt", prompt(i).encode())
    return {
        "folder": folder / "files",
        "pattern": folder / "files" / "*" / "*",
        "lines": folder / "list.jsonl",
        "structs": folder / "structs" / "*.parquet",
        "bytes": folder / "bytes.parquet",
        "tar": folder / "0.tar",
        "url of tables": f"memory://{folder.name}/structs/*.parquet",
        "url of a folder": f"memory://{folder.name}/files",
    }


def _sample(number: int) -> list[tuple[str, bytes]]:
    """The files of a tar's sample: its prompt as text, or as JSON."""
    as_json = json.dumps({"prompt": prompt(number), "width": 20}).encode()
    text = ("txt", f"{prompt(number)}\n".encode()) if number % 2 else ("json", as_json)
    return [("PNG", picture(number)), ("seg.png", b"a mask"), text, ("cls", b"3")]


def test_every_kind_of_input_gives_what_predict_gives(model, score, tmp_path):
    (tmp_path / "in").mkdir()
    pictures = [image_files.decode(picture(i), "") for i in range(12)]
    expected = model.predict(pictures, list(map(prompt, range(12))))
    for kind, spec in sources(tmp_path / "in").items():
        columns = {"image": "picture"} if kind == "bytes" else None
        score(spec, tmp_path / kind, columns=columns, heatmaps=kind == "tar")
        found = rows(tmp_path / kind)
        assert [row["prompt"] for row in found] == list(map(prompt, range(12))), kind
        assert all(row["error"] is None for row in found)
        for name in schema.SCORES:
            np.testing.assert_allclose([row[name] for row in found], expected.scores[name], atol=1e-5)
        assert [row["labelled_prompt"] for row in found] == expected.labelled_prompts
        assert [row["keywords"] for row in found] == expected.keywords
        if kind == "tar":
            maps = [cv2.imdecode(np.frombuffer(row["misalignment"], np.uint8), cv2.IMREAD_UNCHANGED) for row in found]
            np.testing.assert_allclose(np.stack(maps) / 255, expected.heatmaps["misalignment"], atol=0.5 / 255 + 1e-5)
    names = {kind: [row["image"] for row in rows(tmp_path / kind)][10] for kind in ("lines", "structs", "bytes", "tar")}
    assert names == {"lines": "files/b/010.png", "structs": "10.png", "bytes": "k10", "tar": "d/10"}


def test_values_are_those_of_the_command_predict(model, score, tmp_path):
    write_files(tmp_path / "in", range(12))
    score(tmp_path / "in", tmp_path / "out")
    inputs = predict.read_inputs(str(tmp_path / "in" / "*"), None)
    predict.predict(model, *predict.image_examples(inputs, tmp_path / "one"), tmp_path / "one", batch_size=BATCH)
    lines = [json.loads(line) for line in (tmp_path / "one" / "predictions.jsonl").read_text().splitlines()]
    for row, line in zip(rows(tmp_path / "out"), lines, strict=True):
        assert {name: row[name] for name in ("image", "prompt", "labelled_prompt", "keywords")} == {
            name: line[name] for name in ("image", "prompt", "labelled_prompt", "keywords")
        }
        np.testing.assert_allclose([row[name] for name in schema.SCORES], list(line["scores"].values()), atol=1e-5)


def test_shards_divide_between_row_groups_lines_and_files(tmp_path):
    write_table(tmp_path / "a.parquet", range(23), group=4)
    write_table(tmp_path / "b.parquet", range(30), group=30)
    found = picture_shards.shards(f"{tmp_path}/*.parquet", 10)
    assert [(shard.first, shard.last, shard.row, shard.count) for shard in found] == [
        (0, 2, 0, 8), (2, 4, 8, 8), (4, 6, 16, 7), (0, 1, 0, 30)
    ]
    assert [row[0] for shard in found[:3] for row in shard.read()] == [f"{i}.png" for i in range(23)]
    for end in ("", "\n", "\r\n\r\n"):
        lines = [json.dumps({"image": f"{i}.png", "prompt": prompt(i)}) for i in range(25)]
        (tmp_path / "list.jsonl").write_text("\ufeff" + "\n".join(lines) + end)
        found = picture_shards.shards(str(tmp_path / "list.jsonl"), 10)
        assert [row[1] for shard in found for row in shard.read()] == list(map(prompt, range(25)))
        assert [len(list(shard.read())) for shard in found] == [10, 10, 5] and found[2].line == 21
    write_files(tmp_path / "files", range(12))
    assert [len(shard.entries) for shard in picture_shards.shards(str(tmp_path / "files"), 5)] == [5, 5, 2]


# ---------------------------------------------------------------------------------------------------------------- What fails


def test_what_is_broken_is_listed_and_the_others_are_scored(score, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "ok.png").write_bytes(picture(1))
    (tmp_path / "cut.png").write_bytes(picture(1)[:200])
    images = ["ok.png", "cut.png", "none.png", "pipe.png", "foo://x.png", "ok.png"]
    lines = [json.dumps({"image": name, "prompt": PROMPTS[0]}) for name in images]
    lines[5:] = [json.dumps({"image": "ok.png", "prompt": "zebra " * 30}), '{"image": "ok.png"}', "no json", lines[0]]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    job = score(tmp_path / "list.jsonl", tmp_path / "out", shard_rows=4)
    found = rows(tmp_path / "out")
    wrong = [None, "truncated", "no such file", "a named pipe", "Protocol not known", "text_length=24", "no 'prompt'"]
    for row, reason in zip(found, [*wrong, "not JSON", None], strict=True):
        assert (row["error"] is None) if reason is None else re.search(reason, row["error"]), row
        assert (row["overall"] is None) == (row["keywords"] is None) == (reason is not None)
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in failed] == [row["error"] for row in found if row["error"]]
    assert failed[-1] | {"reason": ""} == {
        "part": "part-00001.parquet", "image": f"{tmp_path}/list.jsonl line 8", "prompt": None, "reason": ""
    }
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["rows"], index["failed"], index["model"]) == (9, 7, job.model)
    assert [(one["part"], one["rows"], one["failed"]) for one in index["shards"]] == [
        ("part-00000.parquet", 4, 3), ("part-00001.parquet", 4, 4), ("part-00002.parquet", 1, 0)
    ]
    assert "images: 2 scored" in (said := capsys.readouterr().out) and "images: 7 failed, see" in said


def test_samples_of_a_tar_that_are_not_whole_are_listed(score, tmp_path):
    files = {"a.png": picture(0), "a.txt": b"a cat", "b.png": picture(1), "c.txt": b"a dog"}
    files |= {"d.png": b"x", "d.txt": b"a dog", "e.png": picture(2), "e.jpg": picture(2), "e.txt": b"two"}
    files |= {"f.png": picture(3), "f.json": b"{"}
    write_tar(tmp_path / "0.tar", files)
    score(tmp_path / "0.tar", tmp_path / "out")
    wrong = {"b": "prompt: the sample has none", "c": "image: the sample has none", "d": "no known image format"}
    wrong |= {"e": "the sample has 2, expected one", "f": "not JSON"}
    for row in rows(tmp_path / "out"):
        assert (row["error"] is None) if row["image"] == "a" else wrong[row["image"]] in row["error"]
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[:900])
    with pytest.raises(UserError, match=r"0.tar is no whole tar file .*fetch it again"):
        score(tmp_path / "0.tar", tmp_path / "out")


def test_strict_ends_at_a_failure_and_goes_on_when_it_is_mended(score, tmp_path):
    write_files(tmp_path / "in", range(12))
    (tmp_path / "in" / "011.png").write_bytes(b"no picture")
    score(tmp_path / "in", tmp_path / "out", shard_rows=4)
    with pytest.raises(UserError, match=r"011.png: .*does not decode"):
        score(tmp_path / "in", tmp_path / "out", shard_rows=4, strict=True)
    (tmp_path / "in" / "011.png").write_bytes(picture(11))
    (tmp_path / "in" / "010.txt").write_text("zebra " * 30)
    with pytest.raises(UserError, match=r"010.png: prompt: .*text_length=24"):
        score(tmp_path / "in", tmp_path / "out", shard_rows=4, strict=True)
    (tmp_path / "in" / "010.txt").write_text(prompt(10))
    score(tmp_path / "in", tmp_path / "out", shard_rows=4, strict=True)
    assert not (tmp_path / "out" / "failed.jsonl").exists() and len(rows(tmp_path / "out")) == 12


def test_pictures_that_all_fail_are_an_error(score, tmp_path):
    write_files(tmp_path / "in", range(2))
    with pytest.raises(UserError, match=r"images: none of 2 was scored; the first: .*000.png: prompt: .*zebra"):
        score(tmp_path / "in", tmp_path / "out", prompt="zebra " * 30)


def test_long_prompts_are_cut_where_training_cut_them(model, score, tmp_path, monkeypatch):
    write_files(tmp_path / "in", range(2))
    monkeypatch.setattr(type(model), "truncates", True)
    score(tmp_path / "in", tmp_path / "out", prompt="zebra " * 30)
    assert all(row["error"] is None for row in rows(tmp_path / "out"))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("nothing*", {}, r"images: nothing matches .*nothing\*, expected picture files"),
        ("*.parquet", {"prompt": "a cat"}, r"prompt: got it with .*0.parquet, which has its own"),
        ("pictures", {"columns": {"image": "x"}}, r"columns: got them with .*000.png, expected them with \*.parquet"),
        ("*.parquet", {"columns": {"image": "x"}}, r"images: .*0.parquet: no column 'x'. Columns there: prompt"),
        ("*.parquet", {"columns": {"picture": "x"}}, r"columns: got picture, expected some of uid, prompt, image"),
        ("*.parquet", {"columns": {"uid": "x"}}, r"images: .*0.parquet: no column 'x'"),
        ("pictures", {"rewards": ["nothing:x"]}, r"reward: got 'nothing:x', expected"),
        ("pictures", {"rewards": ["a=clip:x", "a=clip:y"]}, r"reward: got 'a=clip:y' for the name 'a', which is taken"),
        ("pictures", {"rewards": ["error=clip:x"]}, r"reward: got .* for the name 'error', which is taken"),
        ("out/*.parquet", {}, r"images: .*part-00007.parquet is in .*out, where this command writes"),
        ("*.parquet", {}, r"output: .*out holds part-00007.parquet, which this command did not write; take another"),
        ("pipe.tar", {}, r"images: .*pipe.tar is a named pipe; expected picture files"),
        ("foo://bucket/*.tar", {}, r"images: cannot reach foo://bucket"),
    ],
)
def test_what_cannot_be_scored_is_refused(score, tmp_path, spec, options, message):
    write_table(tmp_path / "0.parquet", range(3))
    write_table(tmp_path / "out" / "part-00007.parquet", range(3))
    write_files(tmp_path / "pictures", range(1))
    os.mkfifo(tmp_path / "pipe.tar")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        score(spec if "://" in spec else tmp_path / spec, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before


# ---------------------------------------------------------------------------------------------------------------- Rewards


def brightness(images, prompts):
    """A reward that refuses a prompt with an odd number."""
    if any(int(prompt.split()[-1]) % 2 for prompt in prompts):
        raise ValueError("odd")
    return [image.mean() / 255 for image in images]


brightness.identity = "brightness"


def no_identity(images, prompts):
    return np.zeros(len(images))


no_identity.identity = None


def test_rewards_are_columns_and_what_they_refuse_is_listed(workdir, model, score, tmp_path):
    write_files(tmp_path / "in", range(10))
    (tmp_path / "in" / "008.png").write_bytes(b"no picture")  # of the last two, the other is odd
    (tmp_path / "in" / "004.png").write_bytes(b"no picture")
    given = [f"rahf:{workdir}:alignment=2", "light=python:test_score:brightness"]
    with pytest.warns(UserWarning, match="reward light refused all pictures of a batch"):
        job = score(tmp_path / "in", tmp_path / "out", rewards=given)
    found = rows(tmp_path / "out")
    for i, row in enumerate(found):
        if i % 2 or i in (4, 8):
            assert row["rahf"] is row["light"] is row["overall"] is None
            reason = "no known image" if i in (4, 8) else "reward light: reward: python:test_score:brightness: this code"
            assert reason in row["error"]
        else:
            image = image_files.decode(picture(i), "")
            assert row["light"] == pytest.approx(image.mean() / 255, abs=1e-6)  # of the picture at its own size
            assert row["rahf"] == pytest.approx(2 * row["alignment"], abs=1e-5)
    metadata = parts.read_metadata(str(tmp_path / "out" / "part-00000.parquet"))
    assert metadata["rewards"]["light"] == {"spec": "python:test_score:brightness", "identity": "brightness"}
    assert metadata["model"] == model.identity and (metadata["rows"], metadata["failed"]) == (10, 7)
    assert job.rewards[0][:2] == ("rahf", given[0])
    with pytest.raises(UserError, match=r"reward: python:test_score:no_identity has no identity"):
        score(tmp_path / "in", tmp_path / "out", rewards=["python:test_score:no_identity"])


# ---------------------------------------------------------------------------------------------------------------- Resuming


@pytest.fixture
def scored(monkeypatch):
    """The names of the pictures that are read in this process."""
    names, original = [], image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda data, name, *args: names.append(name) or original(data, name, *args))
    return names


def test_parts_that_are_done_stay_and_what_has_changed_is_scored_anew(score, tmp_path, scored, capsys):
    write_table(tmp_path / "in.parquet", range(20), bad=(3,))
    write_files(tmp_path / "in", range(6))
    run = functools.partial(score, tmp_path / "in.parquet", tmp_path / "out", shard_rows=5)
    run()
    whole = contents(tmp_path / "out")
    assert sorted(whole) == ["failed.jsonl", "index.json", *(f"part-{i:05d}.parquet" for i in range(4))]

    def scored_by(run) -> int:
        scored.clear()
        run()
        return len(scored)

    assert scored_by(run) == 0 and contents(tmp_path / "out") == whole
    assert "output: 4 of 4 shards were scored before" in capsys.readouterr().out
    (tmp_path / "out" / "part-00001.parquet").unlink()
    (tmp_path / "out" / "part-00002.parquet").write_bytes(whole["part-00002.parquet"][:-20])  # damaged
    (tmp_path / "out" / f"part-00003.parquet.{'a' * 16}.partial").write_bytes(b"left by a kill")
    assert scored_by(run) == 10 and contents(tmp_path / "out") == whole
    assert scored_by(functools.partial(run, heatmaps=True)) == 20
    assert scored_by(functools.partial(run, rewards=["light=python:test_score:no_identity"][:0])) == 20
    assert contents(tmp_path / "out") == whole
    write_table(tmp_path / "in.parquet", range(12))  # fewer rows, and none broken: no part and no list of before stays
    assert scored_by(run) == 12
    assert sorted(contents(tmp_path / "out")) == ["index.json", *(f"part-{i:05d}.parquet" for i in range(3))]
    files = functools.partial(score, tmp_path / "in", tmp_path / "files", shard_rows=2)
    assert scored_by(files) == 6 and scored_by(files) == 0
    (tmp_path / "in" / "000.png").write_bytes(picture(99))
    (tmp_path / "in" / "003.txt").write_text("another prompt")
    assert scored_by(files) == 4


def test_another_model_scores_anew(model, tmp_path):
    write_files(tmp_path / "in", range(2))
    [shard] = picture_shards.shards(str(tmp_path / "in"), 10)
    job = jobs.job_of(model, tmp_path, {}, {}, BATCH)
    heads = {parts.header(one, shard)["fingerprint"] for one in _changed(job)}
    assert len(heads) == 6


def _changed(job):
    import dataclasses

    yield job
    changes = {"model": "other", "batch_size": 16, "truncates": True, "rewards": (("a", "clip:x", "y"),), "heatmaps": True}
    for name, value in changes.items():
        yield dataclasses.replace(job, **{name: value})


def test_worker_processes_change_nothing(score, tmp_path):
    for i in range(3):
        write_table(tmp_path / "in" / f"{i}.parquet", range(20 * i, 20 * i + 20), bad=(4, 24))
    for num_workers in (0, 3):
        score(f"{tmp_path}/in/*.parquet", tmp_path / str(num_workers), num_workers=num_workers, heatmaps=True)
    assert contents(tmp_path / "0") == contents(tmp_path / "3") and len(rows(tmp_path / "3")) == 60


def test_a_worker_that_dies_is_an_error(model, tmp_path, monkeypatch):
    write_files(tmp_path / "in", range(4))
    found = picture_shards.shards(str(tmp_path / "in"), 2)
    job = jobs.job_of(model, tmp_path / "out", {}, {}, BATCH)
    parts.begin(job, len(found))
    original = workers.read

    def read(started, shards):
        for worker in started:
            worker.call("next", 9, found[0]).result()  # it lives
            [pid] = worker._pool._processes
            os.kill(pid, signal.SIGKILL)
        return original(started, shards)

    monkeypatch.setattr(workers, "read", read)
    with pytest.raises(UserError, match=r"images: a worker process died, .* fewer --workers \(now 1\), and it resumes"):
        jobs.score(model, {}, job, found, 1)


def test_a_shard_without_rows_is_a_part_without_rows(score, tmp_path):
    write_tar(tmp_path / "0.tar", {"notes.md": b""})
    write_tar(tmp_path / "1.tar", {"a.png": picture(0), "a.txt": b"a cat"})
    score(f"{tmp_path}/*.tar", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [one["rows"] for one in index["shards"]] == [0, 1] or index["failed"] == 1
    assert len(rows(tmp_path / "out")) == index["rows"]


def test_the_output_may_be_a_url(score, tmp_path):
    write_files(tmp_path / "in", range(3))
    (tmp_path / "in" / "001.png").write_bytes(b"no picture")
    memory, folder = fsspec.filesystem("memory"), f"/{tmp_path.name}/out"
    memory.pipe(f"{folder}/part-00007.parquet", b"damaged")
    memory.pipe(f"{folder}/index.json.{'a' * 16}.partial", b"left by a kill")
    for output in (tmp_path / "out", f"memory:/{folder}", f"memory:/{folder}"):
        score(tmp_path / "in", output)
    assert {path.rpartition("/")[2]: memory.cat_file(path) for path in memory.ls(folder, detail=False)} == contents(
        tmp_path / "out"
    )


# ------------------------------------------------------------------------------------------------------------ The command


def start(workdir, spec, output, *more) -> subprocess.Popen:
    """The command, with one device; a row of each file is broken."""
    flags = [f"--workdir={workdir}", f"--images={spec}", f"--output={output}", "--batch_size=8", "--shard_rows=5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": quick_xla.FLAGS}
    command = [sys.executable, "-m", "rahf.score", *flags, f"--reward=rahf:{workdir}:alignment=2", *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def by_two_hosts(workdir, tmp_path_factory):
    """A SPEC of 64 shards, and what two processes write of them: each its shards, on its own device."""
    folder = tmp_path_factory.mktemp("whole")
    for i in range(8):
        write_table(folder / "in" / f"{i:02d}.parquet", range(40 * i, 40 * i + 40), bad=(40 * i + 1,))
    with socket.socket() as one:
        one.bind(("localhost", 0))
        several = [f"--coordinator=localhost:{one.getsockname()[1]}", "--num_processes=2"]
    spec, output = f"{folder}/in/*.parquet", folder / "out"
    processes = [start(workdir, spec, output, "--workers=0", *several, f"--process_id={i}") for i in range(2)]
    for number, host in enumerate(processes):
        said, errors = host.communicate()
        assert host.returncode == predict.FAILED, errors
        assert re.search(rf"process {number}: .* images/s; the devices had a batch for", said)
        assert "32 of 32 shards" in errors and ("images: 312 scored" in said) == (number == 0)
    return spec, contents(output)


def test_a_killed_command_goes_on_to_the_same_bytes_and_two_do_not_share_a_folder(workdir, by_two_hosts, tmp_path):
    (spec, expected), output, deadline = by_two_hosts, tmp_path / "out", time.monotonic() + 100
    process = start(workdir, spec, output, "--workers=1")

    def wait_until(holds):
        while not holds():
            assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
            time.sleep(0.005)

    wait_until(lambda: (output / ".score.lock").exists() and (output / ".score.lock").read_bytes())
    held = pytest.raises(UserError, match=rf"out: process {process.pid} of .* writes there")
    with held, hosts.locked(output, ".score.lock"):  # as every command does, see test_command.py
        pass
    wait_until(lambda: len(list(output.glob("part-*.parquet"))) >= 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(list(output.glob("part-*.parquet")))
    assert 5 <= done < 64 and not (output / "index.json").exists()
    again = start(workdir, spec, output, "--workers=0")
    said, errors = again.communicate()
    assert again.returncode == predict.FAILED, errors
    assert f"output: {done} of 64 shards were scored before" in said
    assert contents(output) == expected


# ---------------------------------------------------------------------------------------------------------------- Beam


def test_beam_writes_the_same_parts(workdir, model, score, tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is in an environment of its own: make test-beam")
    write_table(tmp_path / "in.parquet", range(30), bad=(3, 17))
    reward = {"rahf": f"rahf:{workdir}"}
    job = score(tmp_path / "in.parquet", tmp_path / "here", rewards=list(reward.values()), heatmaps=True)
    found = picture_shards.shards(str(tmp_path / "in.parquet"), 10)
    for runner in ("--runner=DirectRunner", "--runner=PortableRunner --job_endpoint=embed --environment_type=LOOPBACK"):
        output = tmp_path / runner[9:15]
        one = jobs.job_of(model, output, jobs.load_rewards(reward), reward, BATCH, heatmaps=True)
        assert one.fingerprint() == job.fingerprint()
        parts.begin(one, len(found))
        beam.run(runner, one, found, workdir, model.config, reward)
        jobs.finish(one, len(found))
        assert contents(output) == contents(tmp_path / "here")


def test_beam_that_is_not_installed_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    job = jobs.job_of(model, tmp_path, {}, {}, BATCH)
    with pytest.raises(UserError, match=r"beam: Apache Beam is not installed; pip install 'rahf\[beam\]'"):
        beam.run("", job, [], tmp_path, model.config, {})
