"""The service, as its clients see it: a real process, driven as the documentation of each protocol says."""

import asyncio
import base64
import contextlib
import functools
import io
import os
import pathlib
import pickle
import pickletools
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zlib

import aiohttp
import numpy as np
import PIL.Image
import psutil
import pytest
import quick_xla
import requests
import tiny_model
import yaml

import rahf
from rahf import client, experiments
from rahf.serve import plain_pickle, scoring
from richhf_data import schema
from richhf_data.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
PROMPTS = ["a red cat", "two blue dogs in the forest", "a house"]
OWN = """
import time
import numpy as np

def brightness(images, prompts):
    if any("refuse" in prompt for prompt in prompts):
        raise ValueError("this prompt is refused")
    if prompts[0].startswith("slow"):
        time.sleep(0.1 * len(prompts))
    return [float(np.mean(image)) for image in images]
"""


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@contextlib.contextmanager
def serving(workdir, *arguments, folder):
    """A process that serves; yields it with its address."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "XLA_FLAGS": quick_xla.FLAGS}
    command = [sys.executable, "-m", "rahf.serve", f"--workdir={workdir}", "--port=0", "--decoders=1", *arguments]
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            line = process.stdout.readline()
            assert line.startswith("http://127.0.0.1:"), (folder / "log").read_text()
            yield types.SimpleNamespace(process=process, url=line.split()[0])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = experiments.load("rahf_ci")
    config.data.update(source="stream", truncate_long_prompts=True)
    return tiny_model.workdir(tmp_path_factory.mktemp("critic"), config)


@pytest.fixture(scope="module")
def service(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    (folder / "own_reward.py").write_text(OWN)
    rewards = [f"--reward=smooth=rahf:{workdir}:plausibility", "--reward=bright=python:own_reward:brightness"]
    limits = ["--max_pictures=32", "--max_waiting=64", "--max_mib=1", "--body_seconds=2", "--batch_sizes=4,16"]
    with serving(workdir, *rewards, *limits, "--accept_pickle", folder=folder) as found:
        yield found


@pytest.fixture(scope="module")
def pictures():
    """40 pictures of several sizes, encoded, with their prompts."""
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (50, 40), (20, 90), (16, 16)]
    images = [rng.integers(0, 256, (*sizes[i % 4], 3), np.uint8) for i in range(40)]
    return [encoded(image) for image in images], [PROMPTS[i % 3] for i in range(40)], images


@pytest.fixture(scope="module")
def expected(workdir, pictures):
    _, prompts, images = pictures
    return rahf.load(workdir).predict(images, prompts)


def scores_of(expected, i) -> dict[str, float]:
    return {name: values[i] for name, values in expected.scores.items()}


# ---- Protocols ------------------------------------------------------------------------------------------------------
def test_feedback_equals_predict_whatever_the_batch(service, pictures, expected):
    data, prompts, images = pictures
    results = {}

    async def ask(session, places):
        body = {"images": [text(data[i]) for i in places], "prompts": [prompts[i] for i in places], "heatmaps": "float16"}
        async with session.post(f"{service.url}/v1/feedback", json=body) as response:
            assert response.status == 200
            results.update(zip(places, (await response.json())["results"], strict=True))

    async def all_at_once():
        places = iter(np.random.default_rng(1).permutation(40).tolist())
        parts = [[place for _, place in zip(range(size), places, strict=False)] for size in (1, 1, 2, 3, 5, 7, 9, 12)]
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(ask(session, part) for part in parts))

    asyncio.run(all_at_once())
    assert sorted(results) == list(range(40))
    for i, found in results.items():
        assert found["scores"] == pytest.approx(scores_of(expected, i), abs=1e-5)
        assert found["labelled_prompt"] == expected.labelled_prompts[i] and found["keywords"] == expected.keywords[i]
        assert found["rewards"]["smooth"] == found["scores"]["plausibility"]
        assert found["rewards"]["bright"] == pytest.approx(images[i].mean(), abs=1e-3)
        for name, maps in expected.heatmaps.items():
            heatmap = found["heatmaps"][name]
            values = np.frombuffer(base64.b64decode(heatmap["float16"]), "<f2").reshape(heatmap["shape"])
            np.testing.assert_allclose(values, maps[i], atol=1e-3)


def test_a_prompt_that_is_cut_is_said(service, pictures, workdir):
    data, prompts, images = pictures
    body = {"images": [text(data[0])] * 2, "prompts": ["red " * 100, prompts[0]]}
    long, short = requests.post(f"{service.url}/v1/feedback", json=body).json()["results"]
    assert long["prompt_cut"] is True and "prompt_cut" not in short
    with pytest.warns(UserWarning, match="lose their ends"):
        expected = rahf.load(workdir).predict(images[:1], body["prompts"][:1])
    assert long["scores"] == pytest.approx(scores_of(expected, 0), abs=1e-5)


def test_a_form_and_png_heatmaps(service, pictures, expected):
    data, prompts, _ = pictures
    form = {"prompts": prompts[:2], "heatmaps": "png", "rewards": "bright"}
    response = requests.post(f"{service.url}/v1/feedback", files=[("images", data[0]), ("images", data[1])], data=form)
    results = response.json()["results"]
    assert [found["scores"] for found in results] == [pytest.approx(scores_of(expected, i), abs=1e-5) for i in range(2)]
    assert [found["rewards"].keys() for found in results] == [{"bright"}] * 2
    heatmap = PIL.Image.open(io.BytesIO(base64.b64decode(results[1]["heatmaps"]["implausibility"]["png"])))
    np.testing.assert_allclose(np.asarray(heatmap) / 255, expected.heatmaps["implausibility"][1], atol=1 / 510 + 1e-5)


def test_unirl(service, pictures, expected):
    data, prompts, _ = pictures
    names = requests.get(f"{service.url}/rewards").json()["rewards"]
    assert names == ["rahf", *schema.SCORES, "smooth", "bright"]
    assert requests.get(f"{service.url}/health").json()["rewards"].keys() == set(names)
    asked = [(0, prompts[0], ["rahf", "bright"]), (1, prompts[1], ["overall"]), (2, "refuse", ["bright", "smooth"])]
    body = [
        {"history": [{"text": prompt, "image_b64": text(data[i])}], "required_rewards": wanted, "metadata": None}
        for i, prompt, wanted in asked
    ]
    body.append({"history": [{"text": "a", "image_b64": text(b"no picture")}], "required_rewards": ["overall"]})
    answer = requests.post(f"{service.url}/score", json={"requests": body}).json()
    first, second, third, fourth = answer["results"]
    assert first["rahf"] == pytest.approx(scores_of(expected, 0), abs=1e-5) and first.keys() == {"rahf", "bright"}
    assert next(iter(first["rahf"])) == "overall"
    assert second == {"overall": {"overall": pytest.approx(expected.scores["overall"][1], abs=1e-5)}}
    assert third.keys() == {"smooth"} and fourth == {}
    assert answer["errors"][:2] == [{}, {}] and "this prompt is refused" in answer["errors"][2]["bright"]
    assert "no known image format" in answer["errors"][3]["overall"]
    same = requests.post(f"{service.url}/score", json={"requests": [body[1] | {"request_id": "7", "other": 1}]}).json()
    assert same["identities"][0]["request_id"] == "7" and "other" not in same["identities"][0]
    body[0]["required_rewards"] = ["beauty"]
    refused = requests.post(f"{service.url}/score", json={"requests": body})
    assert refused.status_code == 422 and "'beauty', expected some of ['rahf', " in refused.json()["error"]


@pytest.mark.parametrize("path", ["", "/", "/pickle"])
def test_flow_grpo_and_verl_omni(service, pictures, expected, path):
    data, prompts, _ = pictures
    for given in (prompts[:5], np.array(prompts[:5]), list(np.array(prompts[:5])), tuple(prompts[:5])):
        body = {"images": data[:5], "prompts": given, "metadata": {"tags": [None, 1.5, True]}}
        response = requests.post(service.url + path, data=pickle.dumps(body), timeout=120)
        answer = pickle.loads(response.content)
        assert response.status_code == 200 and answer["scores"] == answer["outputs"]
        np.testing.assert_allclose(answer["scores"], expected.scores["overall"][:5], atol=1e-5)
    for body, reason in (
        ({"images": data[:1]}, "prompts: got none, and overall needs them"),
        ({"images": [b"x"], "prompts": ["a"]}, "images[0]: image: does not decode"),
        ({"images": data[:2], "prompts": ["a"]}, "prompts: expected one for each"),
        ({"images": "x"}, "images: got a str"),
        (os.system, "got posix.system, expected data alone"),
        ({"images": data[:1], "prompts": np.zeros((2, 0))}, "prompts: expected one for each"),
        ({"images": data[:1], "prompts": [functools.reduce(lambda t, _: (t, t), range(40), ())]}, "prompt: got a tuple"),
        ({"images": tuple(data[:1])}, "images: got a tuple"),
    ):
        response = requests.post(service.url + path, data=pickle.dumps(body))
        assert response.status_code == 400 and reason in pickle.loads(response.content)["error"]


def test_the_client(service, pictures, expected, tmp_path):
    data, prompts, images = pictures
    (tmp_path / "cat.png").write_bytes(data[0])
    several = [tmp_path / "cat.png", data[1], images[2], PIL.Image.fromarray(images[3])]
    reward = client.Client(service.url, {"alignment": 0.7, "bright": 2}, batch=3)
    values = [0.7 * expected.scores["alignment"][i] + 2 * images[i].mean() for i in range(4)]
    np.testing.assert_allclose(reward(several, prompts[:4]), values, rtol=1e-5)
    with pytest.raises(client.ServiceError, match=r"images\[0\]: image: does not decode"):
        reward([b"x"], ["a"])
    with pytest.raises(client.ServiceError, match=r"HTTP 422: .*rewards: got 'beauty'"):
        client.Client(service.url, "beauty")(data[:1], prompts[:1])
    with pytest.raises(client.ServiceError, match=r"HTTP 413: .*expected at most 32 a request"):
        reward_of_many = client.Client(service.url)
        reward_of_many(data[:33], prompts[:33])
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(client.ServiceError, match="no answer"):
            client.Client(f"http://127.0.0.1:{unused.getsockname()[1]}", tries=1)(data[:1], prompts[:1])


def snippets(title: str, language: str) -> str:
    page = (ROOT / "docs" / "serving.md").read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)[1]


def test_documented_blocks_work(service, pictures, expected, tmp_path, monkeypatch):
    data, prompts, images = pictures
    (tmp_path / "cat.png").write_bytes(data[0])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippets("From Python", "python").replace("http://127.0.0.1:8080", service.url), names)
    assert len(names["rewards"]) == 1 and names["found"]["heatmaps"].keys() == set(schema.HEATMAPS)

    exec(snippets("flow_grpo", "python").replace("http://127.0.0.1:8080", service.url), names)
    smooth = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 8, (3, 32, 32, 3))
    scores, _ = names["rahf_score"]("cpu")(smooth, prompts[:3], None)
    found = client.Client(service.url)([encoded(image, "JPEG", quality=95) for image in smooth], prompts[:3])
    np.testing.assert_allclose(scores, found, atol=1e-6)

    settings = yaml.safe_load(snippets("UniRL", "yaml"))["reward"]["backend"]["config"]
    assert set(settings["required_rewards"]) <= set(requests.get(f"{service.url}/rewards").json()["rewards"])
    assert settings["reward_weights"].keys() == set(settings["required_rewards"])

    torch = types.SimpleNamespace(tensor=lambda values, device: np.array(values))
    base = type("PointwiseRewardModel", (), {"__init__": lambda self, config, accelerator: setattr(self, "device", "cpu")})
    output = types.SimpleNamespace(PointwiseRewardModel=base, RewardModelOutput=lambda rewards: rewards)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "flow_factory", types.ModuleType("flow_factory"))
    monkeypatch.setitem(sys.modules, "flow_factory.rewards", output)
    exec(snippets("Flow-Factory", "python").replace("http://127.0.0.1:8080", service.url), names)
    rewards = names["RahfReward"](None, None)(prompt=prompts[:2], image=[PIL.Image.fromarray(one) for one in images[:2]])
    weighted = 0.7 * expected.scores["alignment"][:2] + 0.3 * expected.scores["plausibility"][:2]
    np.testing.assert_allclose(rewards, weighted, atol=1e-5)


def test_the_page(service, pictures):
    data, _, _ = pictures
    empty = requests.get(f"{service.url}/")
    assert empty.status_code == 200 and 'type="file"' in empty.text and "frame-ancestors 'none'" in str(empty.headers)
    shown = requests.post(f"{service.url}/", files={"picture": ("a.png", data[0])}, data={"prompt": "a <b>red</b> cat"})
    assert shown.status_code == 200 and shown.text.count("data:image/jpeg") == 3
    assert "&lt;b&gt;" in shown.text and "<b>red" not in shown.text and "bright" in shown.text
    for files, reason in (({"picture": ("a.png", b"x")}, "no known image format"), ({}, "not readable")):
        refused = requests.post(f"{service.url}/", files=files | {"other": b"x"}, data={"prompt": "<i>"})
        assert refused.status_code == 422 and "<i>" not in refused.text
        assert reason in refused.text or "Choose a picture" in refused.text


# ---- Malice and load ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "body, status, reason",
    [
        (b"{", 422, "not JSON"),
        (b"[1]", 422, "not an object"),
        (b'{"images": 3, "prompts": []}', 422, "images: got 3"),
        (b'{"images": [], "prompts": ["a"]}', 422, "prompts: got 1 for 0 images"),
        (b'{"images": [], "prompts": [], "heatmaps": "gif"}', 422, "heatmaps: got 'gif'"),
        (b'{"images": [], "prompts": [], "rewards": ["x"]}', 422, "rewards: got 'x'"),
        (b'{"images": ' + b"[" * 100_000, 422, "nested too deeply"),
        (b'{"images": [' + b"[]," * 100_000, 422, "more than 200,000 commas and brackets"),
        (b'{"images": [], "prompts": [], "rewards": [["x"]]}', 422, "rewards: got list, expected a list of names"),
        (b'{"images": ["' + b"A" * 2**21 + b'"], "prompts": ["a"]}', 413, "more than 1 MiB"),
        (
            b'{"images": [' + b'"",' * 9_999 + b'""], "prompts": [' + b'"",' * 9_999 + b'""]}',
            413,
            "got 10,000, expected at most",
        ),
    ],
)
def test_a_bad_request_is_refused(service, body, status, reason):
    response = requests.post(f"{service.url}/v1/feedback", data=body, headers={"content-type": "application/json"})
    assert response.status_code == status and reason in response.json()["error"]


def test_a_body_is_refused_before_it_is_read(service):
    def ask(*headers):
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = [
                "POST /v1/feedback HTTP/1.1",
                "host: x",
                "content-type: Application/JSON; charset=utf-8",
                *headers,
                "",
                "",
            ]
            connection.sendall("\r\n".join(head).encode())
            return connection.makefile("rb").read().decode()  # to its end: the service closes the connection

    assert "413 " in ask("content-length: 100000000000") and "415 " in ask("content-encoding: gzip", "content-length: 1")
    answer = requests.get(f"{service.url}/v1/feedback")
    assert answer.status_code == 405 and "error" in answer.json()


def test_a_client_that_leaves_takes_its_pictures_along(service, pictures):
    data, prompts, _ = pictures
    body = {"images": [text(data[0])] * 32, "prompts": ["slow " + prompts[0]] * 32}
    for _ in range(2):
        with pytest.raises(requests.Timeout):
            requests.post(f"{service.url}/v1/feedback", json=body, timeout=0.3)
    start = time.monotonic()
    while requests.get(f"{service.url}/health").json()["waiting"]:
        assert time.monotonic() - start < 4  # all 64 pictures would take more than 6
    assert len(client.Client(service.url, tries=1).feedback(data[:3], prompts[:3])) == 3
    assert 'status="499"' in requests.get(f"{service.url}/metrics").text


def test_a_bad_picture_or_prompt_is_an_error_of_its_own(service, pictures, expected):
    data, prompts, _ = pictures
    bomb = encoded(np.zeros((1, 1, 3), np.uint8))
    head = b"IHDR" + struct.pack(">II", 60_000, 60_000) + bomb[24:29]  # declares 3.6 gigapixels
    bomb = bomb[:12] + head + struct.pack(">I", zlib.crc32(head)) + bomb[33:]
    large = encoded(np.zeros((5000, 5000, 3), np.uint8))
    bad = [data[0][:100], b"", bomb, b"GIF89a", data[1], 7, large, data[1], data[1]]
    texts = ["a", "a", "a", "a", [[]], "a", "a", "a" * 20_001, "\ud800"]
    body = {"images": [text(one) if isinstance(one, bytes) else one for one in bad], "prompts": texts}
    body["images"].insert(3, text(data[2]))
    body["prompts"].insert(3, prompts[2])
    results = requests.post(f"{service.url}/v1/feedback", json=body).json()["results"]
    assert results.pop(3)["scores"] == pytest.approx(scores_of(expected, 2), abs=1e-5)
    reasons = [
        "truncated",
        "no bytes",
        "60000 x 60000 pixels",
        "",
        "prompt: got a list",
        "base64",
        "expected at most 20 million",
    ]
    for found, reason in zip(results, [*reasons, "prompt: got 20,001 characters", "prompt: got"], strict=True):
        assert found.keys() == {"error"} and re.search(reason, found["error"]), found


def test_a_flood_gets_429_and_the_client_comes_through(service, pictures):
    data, prompts, _ = pictures
    body = {"images": [text(data[0])] * 32, "prompts": prompts[:32]}
    seen = set()

    def flood():
        for _ in range(6):
            response = requests.post(f"{service.url}/v1/feedback", json=body)
            seen.add(response.status_code)
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1

    threads = [threading.Thread(target=flood) for _ in range(12)]
    for thread in threads:
        thread.start()
    assert len(client.Client(service.url, tries=20).feedback(data[:3], prompts[:3])) == 3
    for thread in threads:
        thread.join()
    assert seen == {200, 429}
    assert requests.get(f"{service.url}/health").json()["waiting"] == 0


def test_slow_clients_lose_their_place_and_no_other_waits(service, pictures):
    data, prompts, _ = pictures
    host, port = service.url.removeprefix("http://").split(":")
    slow = []
    for _ in range(50):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(
            b"POST /v1/feedback HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
        slow.append(connection)
    start = time.monotonic()
    assert len(client.Client(service.url, tries=1).feedback(data[:3], prompts[:3])) == 3
    assert time.monotonic() - start < 2  # their time is not over yet
    assert b" 408 " in slow[0].recv(4096)
    for connection in slow:
        connection.close()


def test_a_decoder_that_dies_is_replaced(service, pictures, expected):
    data, prompts, _ = pictures
    for decoder in psutil.Process(service.process.pid).children():
        if "spawn_main" in " ".join(decoder.cmdline()):
            decoder.kill()
    found = client.Client(service.url, tries=1).feedback(data[:9], prompts[:9])
    assert [one["scores"] for one in found] == [pytest.approx(scores_of(expected, i), abs=1e-5) for i in range(9)]


def test_health_and_metrics(service):
    health = requests.get(f"{service.url}/health")
    assert health.status_code == 200 and health.json()["status"] == "ok"
    metrics = requests.get(f"{service.url}/metrics").text
    counted = re.search(r'rahf_requests_total\{path="/v1/feedback",status="200"\} (\d+)', metrics)
    assert counted and int(counted[1]) > 0
    assert "rahf_batch_pictures_bucket" in metrics and 'rahf_pictures_total{outcome="failed"}' in metrics
    assert requests.get(f"{service.url}/nothing").status_code == 404


def test_sigterm_finishes_the_requests_that_are_here(workdir, pictures, tmp_path):
    data, prompts, _ = pictures
    (tmp_path / "slow_reward.py").write_text(
        "import time\ndef slow(images, prompts):\n    time.sleep(1)\n    return [1] * len(images)\n"
    )
    with serving(workdir, "--reward=python:slow_reward:slow", "--batch_sizes=4", folder=tmp_path) as one:
        answers = []
        body = {"images": [text(data[0])] * 4, "prompts": prompts[:4]}
        thread = threading.Thread(target=lambda: answers.append(requests.post(f"{one.url}/v1/feedback", json=body)))
        thread.start()
        while requests.get(f"{one.url}/health").json()["waiting"] < 4:
            time.sleep(0.02)
        pickled = requests.post(f"{one.url}/pickle", data=pickle.dumps({}))
        assert pickled.status_code == 403 and "--accept_pickle" in pickle.loads(pickled.content)["error"]
        one.process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0].status_code == 200 and len(answers[0].json()["results"]) == 4
        assert one.process.wait(30) == 0


# ---- Pickles --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_pickles_are_read(protocol):
    array = np.arange(6.0).reshape(2, 3)
    values = {
        "bytes": b"x" * 300, "text": "zwei ü", "list": [1, -5, 10**30, 1.5, None, True], "tuple": ((), (1,), (1, 2, 3, 4)),
        "nested": {1: {"a": []}}, "scalars": [np.float32(1.5).item(), "hey"],
    }  # fmt: skip
    arrays = [
        array,
        np.asfortranarray(array),
        np.array(["a cat", "ü"]),
        np.array([True]),
        np.array([b"ab"]),
        array.astype(">i2"),
    ]
    data = pickle.dumps({"values": values, "arrays": [*arrays, arrays[0]], "more": [np.str_("hey"), np.int64(3)]}, protocol)
    found = plain_pickle.loads(data)
    assert found["values"] == values and found["more"] == ["hey", 3]
    for one, expected_one in zip(found["arrays"], [*arrays, arrays[0]], strict=True):
        np.testing.assert_array_equal(one, expected_one)
        assert one.dtype == expected_one.dtype


class _Runs:
    def __reduce__(self):
        return os.system, ("touch /tmp/it_ran",)


def _deep(opcode: bytes, closing: bytes) -> bytes:
    return b"\x80\x04" + opcode * 50_000 + closing * 50_000 + b"."


def _scalars(count: int) -> bytes:
    """A pickle of so many scalars that share 400,000 bytes."""
    dtype = b"cnumpy\ndtype\n\x8c\x08<U100000\x85R(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shared = b"B" + struct.pack("<I", 400_000) + b"a\0\0\0" * 100_000
    names = b"cnumpy._core.multiarray\nscalar\nq\x02"
    return b"\x80\x04(" + dtype + b"q\x00" + shared + b"q\x01" + names + b"h\x02h\x00h\x01\x86R" * count + b"t."


@pytest.mark.parametrize(
    "data, reason",
    [
        (pickle.dumps(_Runs()), "got posix.system, expected data alone"),
        (pickle.dumps(print), "got builtins.print"),
        (pickle.dumps(np.array([{}])), "got an array of 'O8'"),
        (pickle.dumps(np.zeros(1, [("a", "f4")])), "got an array of 'V4'"),
        (pickle.dumps({1, 2}), "got the opcode EMPTY_SET"),
        (pickle.dumps([1], 2), "got protocol 2"),
        (b"", "does not decode"),
        (b"\x80\x04.", "does not decode"),
        (pickle.dumps([1, 2])[:-1], "does not decode"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 10 * 2**30) + b"x.", "does not decode"),  # declares 10 GiB of bytes
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.", "does not decode"),
        (b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b"j\x00\x00\x00\x00.", "does not decode"),  # a far place of the memo
        (b"\x80\x04" + b"]" * 300_000 + b".", "more than 200,000 opcodes"),
        (b"\x80\x04}" + _deep(b"(", b"t")[2:-1] + b"Ns.", "does not decode"),  # a key of 50,000 tuples in each other
        (b"\x80\x04K\x01)R.", "does not decode"),
        (pickle.dumps({2**64: 1}), "a long integer as a key"),
        (_scalars(1000), "the same bytes for too many values"),
        (pickle.dumps(np.array([1]))[:-1] + b"N\x85b.", "does not decode"),  # built twice
        (b"\x80\x04K\x01(\x85.", "does not decode"),  # a tuple from before its mark
        (b"\x80\x04cnumpy\nndarray\n(K\x01tR.", "does not decode"),
    ],
)
def test_other_pickles_are_refused(data, reason):
    with pytest.raises(UserError, match=r"^pickle: ") as error:
        plain_pickle.loads(data)
    assert reason in str(error.value)
    assert not pathlib.Path("/tmp/it_ran").exists()


def test_scalars_that_share_no_more_bytes_than_there_are_are_read():
    assert plain_pickle.loads(_scalars(1))[-1] == "a" * 100_000


def test_deep_data_does_no_harm():
    deep = plain_pickle.loads(_deep(b"(", b"t"))
    assert isinstance(deep, tuple)
    with pytest.raises(UserError):
        plain_pickle.loads(b"\x80\x04" + b"(" * 10 + b"\x93.")


def test_every_opcode_is_read_or_refused():
    rng = np.random.default_rng(0)
    good = pickle.dumps({"images": [b"abc"], "prompts": np.array(["a", "b"]), "metadata": {"x": (1, 2.5)}})
    plain = (dict, list, tuple, str, bytes, int, float, type(None), np.ndarray, np.dtype)
    for opcode in pickletools.opcodes:
        for tail in (b"", b"\x00" * 9 + b".", b"\xff" * 9 + b"\n."):
            with contextlib.suppress(UserError):
                assert isinstance(plain_pickle.loads(b"\x80\x04" + opcode.code.encode("latin-1") + tail), plain)
    for _ in range(3000):
        damaged = bytearray(good)
        for place in rng.integers(0, len(good), 3):
            damaged[place] = rng.integers(0, 256)
        with contextlib.suppress(UserError):
            assert isinstance(plain_pickle.loads(bytes(damaged)), plain)


# ---- Flags ----------------------------------------------------------------------------------------------------------
def test_names_of_rewards_and_the_answer(workdir):
    spec = f"rahf:{workdir}"
    assert list(scoring.named_rewards([f"a=sum:0.5*{spec}|{spec}:alignment=2", "python:math:fsum"])) == ["a", "python"]
    assert list(scoring.named_rewards([f"x={spec}:alignment=0.7,overall=2"])) == ["x"]
    for given, reason in (
        ([spec], "for the name 'rahf', which is taken"),
        ([f"overall={spec}"], "for the name 'overall', which is taken"),
        (["a=python:math:fsum"] * 2, "for the name 'a', which is taken"),
        (["a=beauty:x"], "got 'beauty:x', expected"),
    ):
        with pytest.raises(UserError, match=re.escape(reason)):
            scoring.named_rewards(given)
    names = [*schema.SCORES, "a"]
    assert scoring.answer_weights("overall", names) == {"overall": 1}
    assert scoring.answer_weights("alignment=0.7,a=-2", names) == {"alignment": 0.7, "a": -2}
    for given, reason in (("b", "got 'b' in 'b'"), ("a,a", "got 'a'"), ("a=x", "got 'x' times a"), ("a=inf", "got 'inf'")):
        with pytest.raises(UserError, match=re.escape(reason)):
            scoring.answer_weights(given, names)


def test_bad_batch_sizes_end_in_one_line(workdir):
    command = [sys.executable, "-m", "rahf.serve", f"--workdir={workdir}", "--batch_sizes=0,4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: batch_sizes: got 0,4, expected one or more, each a whole")
