"""The wheel, installed into a folder of its own and used from an empty folder, as in an environment without extra `data`."""

import ast
import email
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
import zipfile

import cv2
import numpy as np
import pytest
import quick_xla

ROOT = pathlib.Path(__file__).parent.parent
EXTRA = ("seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text")  # modules of extra `data`
# Python runs a module of this name at its start: the modules of the extra are nowhere to be found.
SITECUSTOMIZE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {EXTRA} else find(name, *rest)
"""
EVALUATE_AND_PREDICT = """
import pathlib, sys
import cv2
import rahf, richhf_data
from rahf import evaluate, predict

assert all(pathlib.Path(module.__file__).is_relative_to(sys.argv[1]) for module in (rahf, richhf_data)), rahf.__file__
assert evaluate.evaluate("run", "test", 8)["num_examples"] == 8

model = rahf.load("run")
image = cv2.imread("cat.png")[..., ::-1]
feedback = model.predict([image, image[:30]], ["a yellow cat", "two red cats"])
assert {name: scores.shape for name, scores in feedback.scores.items()} == dict.fromkeys(
    ("plausibility", "alignment", "aesthetics", "overall"), (2,)
)
assert feedback.heatmaps["implausibility"].shape == (2, 16, 16)
assert len(feedback.keywords) == len(feedback.labelled_prompts) == 2
example = {"name": "cat", "image": image, "prompt": "a yellow cat"}
predict.predict(model, [example], ["cat"], "report", tables=predict.evaluation_tables("run", "test"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """`file`, the wheel; `site`, where it is installed; `run(*arguments)`, Python from the empty folder `folder`."""
    base = tmp_path_factory.mktemp("wheel")
    source, site, blocked, folder = (base / name for name in ("source", "site", "blocked", "empty"))
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("rahf", "richhf_data", "launch", "configs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    options = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", f"--wheel-dir={base}", source], check=True)
    (file,) = base.glob("*.whl")
    subprocess.run([*pip, "install", *options, "--no-compile", f"--target={site}", file], check=True)
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(SITECUSTOMIZE)
    folder.mkdir()
    one_device = {"XLA_FLAGS": quick_xla.FLAGS}
    environment = os.environ | one_device | {"PYTHONPATH": f"{blocked}{os.pathsep}{site}"}

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return types.SimpleNamespace(file=file, site=site, folder=folder, run=run)


@pytest.fixture(scope="module")
def trained(wheel):
    """`wheel`, with a run and a picture in its folder."""
    command = ["-m", "rahf.train", "--config=rahf_ci", "--workdir=run", "--config.data.source=stream"]
    done = wheel.run(*command, "--config.eval.every=4")
    assert done.returncode == 0, done.stderr
    cv2.imwrite(str(wheel.folder / "cat.png"), np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    return wheel


def test_wheel_holds_three_packages_with_templates_and_configs(wheel):
    names = zipfile.ZipFile(wheel.file).namelist()
    assert {name.partition("/")[0] for name in names} == {"rahf", "richhf_data", "launch", "rahf-0.1.0.dist-info"}
    expected = {f"rahf/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    expected |= {f"rahf/configs/t5x/{path.name}" for path in (ROOT / "configs/t5x").iterdir()}
    for package in ("rahf", "richhf_data"):
        expected |= {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.jinja")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "richhf_data/annotate/static").iterdir()}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "rahf/critics/synth").iterdir()}
    assert expected <= set(names) and len(expected) > 10


def test_core_requires_what_it_imports_and_nothing_of_the_extra(wheel):
    archive = zipfile.ZipFile(wheel.file)
    metadata = email.message_from_bytes(archive.read("rahf-0.1.0.dist-info/METADATA"))
    required = {name: set() for name in ("core", "data", "annotate", "serve", "test", "beam")}
    for requirement in metadata.get_all("Requires-Dist"):
        extra = re.search(r"extra == ['\"](\w+)", requirement)
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        required.setdefault(extra[1] if extra else "core", set()).add(name)
    assert required["data"] == {"seqio", "tensorflow", "tensorflow-datasets"}
    assert required["annotate"] == {"starlette", "uvicorn"} <= required["test"]
    assert required["data"] <= required["test"] and required["data"] <= required["beam"]
    assert required["annotate"] <= required["serve"] <= required["test"]
    assert not (required["data"] | required["serve"]) & required["core"]

    imported = set()
    for name in archive.namelist():
        if name.endswith(".py") and not name.startswith("launch/"):
            for node in ast.walk(ast.parse(archive.read(name))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module.partition(".")[0])
    imported -= {"apache_beam", "clu", "jax2onnx", "onnx", "t5x", "torch"}
    imported -= {*sys.stdlib_module_names, *EXTRA, "rahf", "richhf_data"}
    imported -= {name.replace("-", "_") for name in required["serve"]}
    distributions = importlib.metadata.packages_distributions()
    for module in imported:
        names = {name.lower().replace("_", "-") for name in distributions[module]}
        assert names & required["core"], f"{module} of {names} is imported, not required"
    assert "jax" in imported


def test_a_trained_model_is_evaluated_and_predicts_in_python(trained):
    done = trained.run("-c", EVALUATE_AND_PREDICT, trained.site)
    assert done.returncode == 0, done.stderr
    page = (trained.folder / "report" / "report.html").read_text()
    assert all(row in page for row in ("this model", "constant predictor", "ceiling", "one annotator"))
    assert (trained.folder / "run" / "eval" / "test.json").is_file()


def test_a_trained_model_predicts_by_the_command(trained):
    done = trained.run("-m", "rahf.predict", "--workdir=run", "--images=*.png", "--prompt=a cat", "--output=out")
    assert done.returncode == 0, done.stderr
    assert "a cat" in (trained.folder / "out" / "predictions.jsonl").read_text()
    assert (trained.folder / "out" / "report.html").is_file()


def test_the_critic_in_the_wheel_reports_by_its_name(wheel):
    critic = wheel.site / "rahf/critics/synth"
    before = {path: path.stat().st_mtime_ns for path in [critic, *critic.iterdir()]}
    done = wheel.run("-m", "rahf.predict", "--workdir=synth", "--drawn=2", "--output=drawn")
    assert done.returncode == 0, done.stderr
    assert "annotators, peak" in (wheel.folder / "drawn" / "report.html").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in [critic, *critic.iterdir()]}


@pytest.mark.parametrize(
    "module, flags",
    [
        ("rahf.train", ["--config=rahf_ci", "--workdir=other", "--config.data.data_dir=data"]),
        ("richhf_data.synthetic", ["--output=records"]),
        ("richhf_data.build", ["--records=*.tfrecord", "--images=folder:.", "--data_dir=data"]),
    ],
)
def test_a_command_that_needs_the_extra_says_so_in_one_line(wheel, module, flags):
    done = wheel.run("-m", module, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {module} with these flags needs the package tensorflow, which is not installed")
    assert "pip install 'rahf[data]'" in done.stderr
    assert not [path for path in wheel.folder.iterdir() if path.name in ("other", "records", "data")]
