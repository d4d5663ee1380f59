"""A simulated team annotates over HTTP, while the server is killed again and again: is every answer there, once?

    python -m benchmarks.annotate [--annotators=30 --items=600 --kills=20]

The items are RichHF-Synth pictures, the answers those of its simulated annotators. The team waits at random, gives items up,
and drops connections before the reply. The server is killed (SIGKILL) and started again. At the end each item has exactly
three answers, those that were confirmed, and the exported, consolidated records are those that RichHF-Synth writes itself.
Prints the response times and the size of the database.
"""

import contextlib
import dataclasses
import http.client
import json
import pathlib
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import cv2
import tabulate
from absl import flags

from richhf_data import command, consolidate, keywords, ranges, schema
from richhf_data.annotate import export, kinds, store
from richhf_data.annotate import server as server_pages
from richhf_data.synthetic import example

_JSON = {"accept": "application/json", "content-type": "application/json"}


@dataclasses.dataclass
class Team:
    """What the annotators share: the truth of each item, who gave which of its answers, and what was confirmed."""

    port: int
    drawn: dict[str, example.Example]  # by prompt and uid
    patience: float  # seconds, the longest wait before an answer
    lease: float  # seconds
    cookie: str
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    slots: dict[int, dict[str, int]] = dataclasses.field(default_factory=dict)
    confirmed: dict[tuple[str, int], dict] = dataclasses.field(default_factory=dict)
    late: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)


def answer_of(annotation: consolidate.Annotation) -> dict:
    """A simulated annotator's answer, as a browser sends it."""
    points = dict(zip(schema.HEATMAPS, ([list(point) for point in marks] for marks in annotation.points), strict=True))
    words = [place for place, label in enumerate(annotation.labels) if label == keywords.MISALIGNED]
    marked = {"implausibility": points["implausibility"], "misalignment": points["misalignment"] or words}
    scores = dict(zip(schema.SCORES, map(int, annotation.scores), strict=True))
    return {
        "points": points,
        kinds.WORDS: words,
        "nothing": [name for name, marks in marked.items() if not marks],
        "scores": scores,
    }


def _request(team: Team, method: str, path: str, headers: dict, body: dict | None = None, hang_up: bool = False):
    """(status, text) of a request, which is sent until the server answers. hang_up: once without reading the reply."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", team.port, timeout=20)
        try:
            start = time.perf_counter()
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            if hang_up:
                hang_up = False
                continue
            reply = connection.getresponse()
            text = reply.read().decode(errors="replace")
            if reply.status in (429, 503):
                time.sleep(0.2)
                continue
            with team.lock:
                team.seconds.append(time.perf_counter() - start)
            return reply.status, text
        except (OSError, http.client.HTTPException):  # the server was killed, or is not up yet
            time.sleep(0.1)
        finally:
            connection.close()


def annotate(team: Team, name: str, key: str, seed: int) -> None:
    """Works until nothing is left."""
    rng, cookie = random.Random(seed), {"cookie": f"{team.cookie}={key}"}
    _, page = _request(team, "GET", "/", cookie | {"accept": "text/html"})
    headers = _JSON | cookie | {"x-token": json.loads(re.search(r'id="setup">(.*?)</script>', page)[1])["token"]}
    idle = 0
    while idle < 3:
        status, text = _request(team, "GET", "/api/next", headers)
        item = json.loads(text)
        if status != 200 or item["item"] is None:
            idle += 1  # what others gave up comes back when their lease ends
            time.sleep(team.lease / 2)
            continue
        idle, number = 0, item["item"]
        time.sleep(rng.uniform(0, team.patience))
        if rng.random() < 0.05:  # gives it up: the lease ends while it sleeps
            time.sleep(team.lease + rng.uniform(0, 1))
            if rng.random() < 0.5:
                continue
        if rng.random() < 0.1:
            _request(team, "GET", item["pictures"][0], headers | {"accept": "image/*"})
        with team.lock:
            slots = team.slots.setdefault(number, {})
            free = [slot for slot in range(3) if slot not in slots.values()]
            if name not in slots and not free:
                continue  # of one who hesitates: the answer would be late
            slot = slots.setdefault(name, free[0] if free else 0)
        body = {
            "answer": answer_of(team.drawn[item["prompt"]].annotations[slot]),
            "revision": item["revision"],
            "seconds": 1.5,
        }
        status, text = _request(team, "POST", f"/api/item/{number}/answer", headers, body, hang_up=rng.random() < 0.1)
        reply = json.loads(text)
        with team.lock:
            if status == 200 and reply["state"] == "done":
                team.confirmed[name, number] = body["answer"]
            elif status == 200:
                team.late += 1
                del team.slots[number][name]
            else:
                team.errors.append(f"{status} {text[:200]}")


def run(
    folder: pathlib.Path, annotators: int, items: int, kills: int, patience: float = 0.3, lease: float = 3.0, size: int = 64
) -> dict[str, float]:
    """Simulates a team; raises AssertionError if an answer is lost, twice, or wrong. Returns what is printed."""
    drawn, lines = {}, []
    index = 0
    while len(drawn) < items:
        one = example.draw(0, index, "train", size, 32)
        index += 1
        if one.prompt not in drawn:
            drawn[one.prompt] = one
            cv2.imwrite(str(folder / f"{one.uid}.png"), one.image[..., ::-1])
            lines.append(json.dumps({"image": f"{one.uid}.png", "prompt": one.prompt}))
    (folder / "list.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = [f"annotator {number}" for number in range(annotators)]
    serve = [
        sys.executable, "-m", "richhf_data.annotate", "serve", f"--workdir={folder}/project", f"--port={port}",
        f"--images={folder}/list.jsonl", f"--lease_seconds={lease}", f"--annotators={','.join(names)}",
    ]  # fmt: skip

    def start() -> subprocess.Popen:
        return subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    server = start()
    try:
        deadline = time.monotonic() + 120
        while True:  # it listens when the project is made and its annotators are invited
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert time.monotonic() < deadline and server.poll() is None, "the server did not start"
            time.sleep(0.1)
        with contextlib.closing(store.Store(folder / "project")) as project:
            people = {row["name"]: row["id"] for row in project.annotators()}
            keys, cookie = {name: project.key(people[name]) for name in names}, server_pages.cookie_name(project)
        team = Team(port, drawn, patience, lease, cookie)
        threads = [threading.Thread(target=annotate, args=(team, name, keys[name], i)) for i, name in enumerate(names)]
        for thread in threads:
            thread.start()
        began, rng = time.monotonic(), random.Random(1)
        for kill in range(kills):
            while len(team.confirmed) < 3 * items * (kill + 1) / (kills + 1) and any(
                thread.is_alive() for thread in threads
            ):
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.05))
            server.kill()
            server.wait()
            server = start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
    finally:
        server.terminate()
        server.wait()
    assert not team.errors, team.errors[:3]
    with contextlib.closing(store.Store(folder / "project")) as project:
        rows = {row["id"]: row for row in project.items()}
        done = {(row["name"], row["item"]): json.loads(row["answer"]) for row in project.work() if row["state"] == "done"}
        assert len(rows) == items and all(row["finished"] == row["taken"] == 3 for row in rows.values())
        assert done.keys() == team.confirmed.keys() and len(done) == 3 * items
        for key, value in done.items():
            assert value == kinds.check("rich", kinds.QUESTIONS, rows[key[1]]["prompt"], team.confirmed[key])
        export.export(project, folder / "export")
    for uid, one in consolidate.read(str(folder / "export/annotations.jsonl")).items():
        truth = drawn[one.prompt]
        found, expected = (
            consolidate.raw_record(uid, consolidate.consolidate(list(given), one.prompt))
            for given in (one.annotations.values(), truth.annotations)
        )
        assert uid == truth.uid and found == expected, uid
    size = sum(path.stat().st_size for path in (folder / "project").glob(f"{store.FILE}*"))
    return {
        "answers": len(done),
        "late answers": team.late,
        "requests": len(team.seconds),
        "minutes": seconds / 60,
        "median ms": 1000 * statistics.median(team.seconds),
        "99 % below ms": 1000 * statistics.quantiles(team.seconds, n=100)[98],
        "KiB per 1,000 answers": size / 1024 / len(done) * 1000,
    }


def main() -> None:
    """The command."""
    args = flags.FLAGS
    with tempfile.TemporaryDirectory() if args.workdir is None else contextlib.nullcontext(args.workdir) as folder:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        found = run(pathlib.Path(folder), args.annotators, args.items, args.kills)
    print(tabulate.tabulate([found], headers="keys", tablefmt="github", floatfmt=".1f"))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A new folder to keep the pictures and the project in.")
    ranges.flag("annotators", 30, "People.", ranges.Range(3, 1000, whole=True))
    ranges.flag("items", 600, "Pictures.", ranges.COUNT)
    ranges.flag("kills", 20, "Of the server.", ranges.Range(0, 1000, whole=True))
    command.run(main)
