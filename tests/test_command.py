"""Every command: a user's error is one line and exit code 2, a fault of the code keeps its traceback."""

import ast
import contextlib
import errno
import importlib
import pathlib
import subprocess
import sys
import types

import pytest
from absl import flags

from rahf import experiments, hosts
from richhf_data import command, paths
from richhf_data.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
BUG = """
import runpy, sys
import jax.numpy as jnp
from rahf.models import heads
heads.nn.sigmoid = lambda x: jnp.zeros((2, 3)).reshape(4, 5)  # a bug in a layer
sys.argv[1:] = sys.argv[2:]
runpy.run_module("rahf.train", run_name="__main__")
"""


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_bug_in_a_layer_keeps_its_traceback(tmp_path):
    done = run("-c", BUG, "rahf.train", "--config=rahf_ci", "--config.data.source=stream", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr and "in __call__" in done.stderr  # of the layer
    assert "cannot reshape" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=rahf_ci", "--config.train.batch_size=many"], "--config.train.batch_size=many"),
        (["--config=rahf_ci", "--configg=1"], "Unknown command line flag 'configg'"),
        (["--config=rahf_ci", "workdir"], "unexpected arguments ['workdir']"),
        (["--config=rahf_ci", "--config.model.vit.num_heads=7"], "vit.width: got 16, expected a multiple of"),
    ],
)
def test_a_users_error_is_one_line(arguments, message, tmp_path):
    done = run("-m", "rahf.train", f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=rahf_ci", "--config.optimizer.learning_rat=1"], r"learning_rat: the config has no such key; did"),
        (["--config=rahf_ci", "--config.train.batch_size.x=1"], r"--config.train.batch_size.x: the config has no such key"),
        (["--config", "rahf_c"], r"no config 'rahf_c'; did you mean 'rahf_ci'\?"),
        (["--config=setup.py"], r"setup.py has no function get_config\(\)"),
        (["--config=sd_reward"], r"--config: sd_reward is of the kind 'diffusion', expected one of rahf"),
        ([], r"--config: got none, expected --config=NAME, one of .*rahf_base, "),
        (["--config.seed=1"], r"--config: got none, expected --config=NAME"),
    ],
)
def test_a_config_that_cannot_be_is_refused(arguments, message, monkeypatch, tmp_path):
    (tmp_path / "setup.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        experiments.reader(kinds=("rahf",))(["train", *arguments])


class ResourceExhaustedError(Exception):
    """As TensorFlow names it."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), "out/a: No space left on device"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "a: Too many open files; raise the limit, ulimit -a shows it"),
        (MemoryError("Unable to allocate 3 GiB"), "memory: ran out, Unable to allocate 3 GiB; free some, raise the limit"),
        (MemoryError(), "memory: ran out, an allocation failed; free some"),
        (RuntimeError("can't start new thread"), "memory: ran out, can't start new thread; free some"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating\n..."), "memory: ran out, RESOURCE_EXHAUSTED: Out of"),
        (ResourceExhaustedError("out/a.tfrecord; No space left on device"), "out/a.tfrecord; No space left on device"),
        (OSError(errno.ENOSPC, "No space left", command.__file__), f"{command.__file__}: No space left"),
        (RuntimeError("a fault"), None),
    ],
)
def test_what_the_machine_has_no_more_of_is_named(error, message):
    wrapped = RuntimeError("a library's own")
    wrapped.__cause__ = error if isinstance(error, ResourceExhaustedError) else None
    for one in (error, wrapped) if wrapped.__cause__ else (error,):
        text = command.message(one)
        assert text is None if message is None else text.startswith(message)


def test_help_lists_the_flags_of_other_modules_too():
    done = run("-m", "rahf.train", "--help")
    assert done.returncode == 0
    for name in ("--config", "--workdir", "--coordinator", "SIGTERM"):
        assert name in done.stdout


def test_errors_reach_the_terminal_without_control_characters(capsys):
    for text, shown in (
        ("uid \x1b[31m\x07\u202e\x9b2J\udcff: bad", r"error: uid \x1b[31m\x07\u202e\x9b2J\udcff: bad"),
        ("images: no file a\nerror: all is well\r", r"error: images: no file a\nerror: all is well\r"),
        ("annotations: bad lines:\n  line 1\n  line \n2", "error: annotations: bad lines:\n  line 1\n  line \\n2"),
        ("caf\u00e9 \U0001f600 'x' \\n", "error: caf\u00e9 \U0001f600 'x' \\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.fail(text)
        assert ended.value.code == 2 and capsys.readouterr().err == shown + "\n"
    assert command.message(UserError("a\x1b")) == command.message(OSError(2, "a\x1b", "b")).replace("b: ", "") == r"a\x1b"


def _opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file or a pipe as text, in the encoding of the locale. `epath` always takes UTF-8."""
    function, name = ast.unparse(call.func), getattr(call.func, "attr", "")
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    modes = [ast.unparse(one) for one in call.args[:2]] + [given.get("mode", "")]
    is_text = (
        name in ("read_text", "write_text")
        or (name in ("open", "fdopen") and any(mode in ("'r'", "'w'", "'a'", "'x'") for mode in modes))
        or (function == "open" and not any(mode in ("'rb'", "'wb'", "'ab'", "'r+b'") for mode in modes))
        or given.get("text") == "True"
    )
    return is_text and "encoding" not in given and "epath.Path(" not in function


def test_every_text_file_is_opened_with_its_encoding():
    files = [path for name in ("rahf", "richhf_data", "launch", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    calls = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)]
    assert [f"{file}:{node.lineno}: {ast.unparse(node)}" for file, node in calls if _opens_text(node)] == []
    for text in ("open(x)", "p.open('w')", "p.read_text()", "open(x, 'r')", "run(x, text=True)"):
        assert _opens_text(ast.parse(text).body[0].value)


HOLDERS = {
    "rahf.train": ".lock",
    "rahf.diffusion.train": ".lock",
    "rahf.reward.train": ".lock",
    "rahf.diffusion.sample": ".lock",
    "rahf.diffusion.evaluate": ".lock",
    "rahf.predict": ".predict.lock",
    "rahf.score.__main__": ".score.lock",
    "richhf_data.synthetic.__main__": ".lock",
    "richhf_data.build": ".lock",
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_folder_that_another_process_writes_is_refused(name, tmp_path, monkeypatch):
    module, place = importlib.import_module(name), str(tmp_path)
    given = types.SimpleNamespace(workdir=place, output=place, train=1, dev=0, test=0, test_novel=0)
    if name == "richhf_data.build":
        monkeypatch.setattr(module, "_refuse_unused", lambda records: None)
        monkeypatch.setattr(module, "_RECORDS", types.SimpleNamespace(value="records"))
        monkeypatch.setattr(module, "_DATA_DIR", types.SimpleNamespace(value=place))
    monkeypatch.setattr(flags, "FLAGS", given)
    monkeypatch.setattr(hosts, "joined", lambda **_: contextlib.nullcontext())
    message = rf"{tmp_path}: process \d+ of .* writes there"
    with paths.locked(tmp_path, HOLDERS[name]), pytest.raises(UserError, match=message):
        module.main()
