"""T5X's own trainer, evaluator and inference on RAHF, where T5X is at hand; without it, what can be checked of rahf/t5x.py.

RAHF_T5X names the folder that docs/t5x.md makes: t5x, airio, jestimator and site.
"""

import ast
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_data
import tiny_model
from tiny_model import write_t5x

from rahf import convert, evaluate, experiments, features, predictor, readers, sources, train, weights, workdirs
from rahf.losses import keyword_loss_sum
from rahf.models import critics
from rahf.readers import encoders
from richhf_data.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
GIN = ROOT / "configs" / "t5x"
PLACE = os.environ.get("RAHF_T5X", "")
FOLDERS = [f"{PLACE}/{name}" for name in ("t5x", "airio", "jestimator", "site")] if PLACE else []
needs_t5x = pytest.mark.skipif(
    not (PLACE or importlib.util.find_spec("t5x")), reason="T5X is not importable: RAHF_T5X names no folder of docs/t5x.md"
)
RECORDED = json.loads((pathlib.Path(__file__).parent / "data" / "t5x_signatures.json").read_text(encoding="utf-8"))
pytestmark = pytest.mark.usefixtures("standard_promotion")
# With this learning rate, AdamW's updates of gradients near 0 differ by little where rounding does.
VALUES = {"optimizer.learning_rate": 1e-4, "model.t5.dropout": 0.1}
# Softmax does not depend on a key's bias: its gradient is rounding alone, of which AdamW makes whole updates.
NO_GRADIENT = r"vit/.*/key/bias"


# ---- T5X's own commands ---------------------------------------------------------------------------------------------


def start(log, program: str, *files: str, **bindings) -> subprocess.Popen:
    """`python -m PROGRAM` of T5X with our gin files, on eight virtual devices; it writes into the file `log`."""
    flags = [f"--gin_file=configs/t5x/{name}.gin" for name in files]
    flags += [f"--gin.{name}={value!r}" for name, value in bindings.items()]
    paths = os.pathsep.join([str(ROOT), *FOLDERS])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, "-m", program, *flags], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log
    )


def run(program: str, *files: str, **bindings) -> str:
    """Runs it to its end; returns its log."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        code = start(log, program, *files, **bindings).wait(timeout=600)
        log.seek(0)
        text = log.read()
    assert code == 0, text[-3000:]
    return text


def bindings_of(folder) -> dict:
    """Of every training."""
    return {"MODEL_DIR": str(folder), "DATA_DIR": tiny_data.built()}


def run_until(step: int, folder: pathlib.Path, name: str = "finetune", **bindings) -> str:
    """Trains, and kills the process when the checkpoint of a step is complete; returns its log."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = start(log, "t5x.train", name, "tiny", **bindings_of(folder), **bindings)
        while not (folder / f"checkpoint_{step}" / "commit_success.txt").exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        log.seek(0)
        text = log.read()
    assert code == -signal.SIGKILL, text[-3000:]
    return text


def losses(log: str) -> list[float]:
    """Of the training, each a mean over the steps since the one before."""
    return [float(loss) for loss in re.findall(r"\] collection=train .*?[ ,]loss=([\d.]+)", log)]


def params(checkpoint) -> dict[str, np.ndarray]:
    return dict(weights.read_all(readers.rahf_t5x(checkpoint).tensors))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        if not re.fullmatch(NO_GRADIENT, name):
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerance, err_msg=name)


def train_ours(workdir, values) -> pathlib.Path:
    """Ten steps of `rahf.train` with `tiny.gin`'s values and these, and checkpoints of five and ten steps."""
    config = experiments.load("rahf_ci")
    common = {"data.data_dir": tiny_data.built(), "train.num_steps": 10, "checkpoint_every": 5, "eval.every": 10}
    config.update_from_flattened_dict(common | {"optimizer.ema_decay": 0.0} | values)
    train.train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def ours(tmp_path_factory, standard_promotion):
    """The workdir of `rahf.train`."""
    return train_ours(tmp_path_factory.mktemp("ours"), VALUES)


def params_of_ours(workdir, step) -> dict[str, np.ndarray]:
    state = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    return flax.traverse_util.flatten_dict(jax.device_get(state["params"]), sep="/")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model directory of T5X's trainer after the same ten steps, and the log."""
    folder = tmp_path_factory.mktemp("theirs")
    return folder, run("t5x.train", "finetune", "tiny", **bindings_of(folder), OVERRIDES=VALUES)


@needs_t5x
def test_t5x_trains_the_parameters_of_rahf_train(trained, ours):
    folder, log = trained
    first, second = losses(log)
    assert second < first
    begin, five = params(folder / "checkpoint_0"), params(folder / "checkpoint_5")
    assert max(np.abs(five[name] - begin[name]).max() for name in five) > 1e-4
    assert_close(five, params_of_ours(ours, 5), 1e-5)
    assert_close(params(folder / "checkpoint_10"), params_of_ours(ours, 10), 3e-5)


@needs_t5x
def test_t5x_divides_the_other_variant_and_resumes_a_run_that_was_killed(tmp_path):
    values = VALUES | {"model.variant": "augmented_prompt", "data.truncate_long_prompts": True}
    theirs, bindings = tmp_path / "theirs", {"OVERRIDES": values, "MODEL_PARALLEL": 2}
    first = losses(run_until(5, theirs, **bindings))
    assert not (theirs / "checkpoint_10").exists()
    (second,) = losses(run("t5x.train", "finetune", "tiny", **bindings_of(theirs), **bindings))
    assert second < first[0]
    ours = train_ours(tmp_path / "ours", values)
    assert_close(params(theirs / "checkpoint_5"), params_of_ours(ours, 5), 1e-5)
    assert_close(params(theirs / "checkpoint_10"), params_of_ours(ours, 10), 3e-5)
    assert re.search(r"mlp.*partition spec \(None, 'model'\)", (theirs / "model-info.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory):
    """The folder of the converted checkpoint, and its model with the run's config."""
    folder = tmp_path_factory.mktemp("converted")
    convert.convert("t5x-rahf", trained[0] / "checkpoint_10", folder)
    return predictor.load(folder, workdirs.read_config(trained[0]))


@needs_t5x
def test_t5x_evaluates_as_rahf_does(trained, converted, tmp_path):
    bindings = {"CHECKPOINT_PATH": str(trained[0] / "checkpoint_10"), "EVAL_OUTPUT_DIR": str(tmp_path)}
    run("t5x.eval", "eval", "cpu", **bindings, BATCH_SIZE=8, SPLIT="dev")
    (file,) = (tmp_path / "inference_eval").glob("*-metrics.jsonl")
    theirs = json.loads(file.read_text(encoding="utf-8"))
    assert theirs.pop("step") == 10
    found = evaluate.Evaluation(converted.predictor, "dev").run(converted.params)
    assert found.keys() == theirs.keys()
    np.testing.assert_allclose(list(theirs.values()), [found[name] for name in theirs], atol=1e-6)


def inferred(checkpoint, folder, mode) -> dict[str, dict]:
    """uid -> the line that T5X's inference writes of it."""
    bindings = {"CHECKPOINT_PATH": str(checkpoint), "INFER_OUTPUT_DIR": str(folder), "MODE": mode}
    run("t5x.infer", "infer", "cpu", **bindings, BATCH_SIZE=8, SPLIT="dev")
    (file,) = (path for path in folder.glob(f"*-{mode}.jsonl-*") if path.suffix != ".COMPLETED")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {line["inputs"]["uid"]: line for line in lines}


@needs_t5x
def test_t5x_writes_predictions(trained, converted, tmp_path):
    predicted, scored = (
        inferred(trained[0] / "checkpoint_10", tmp_path / mode, mode) for mode in ("predict_with_aux", "score")
    )
    task = sources.register_task(converted.config, converted.vocabulary, augment=False)
    evaluator = features.evaluator(task, "dev")
    rows = [row for _, row in evaluator.cached_model_datasets[task.name].as_numpy_iterator()]
    uids = [target["uid"] for target in features.targets(evaluator, task)]
    assert predicted.keys() == scored.keys() == set(uids) and len(uids) == 9
    model, weights_of_ours = critics.module_of(converted.model_config), {"params": jax.device_get(converted.params)}
    for uid, row, expected in zip(uids, rows, converted.predict_rows(rows, 8), strict=True):
        assert isinstance(predicted[uid]["prediction"], str)
        for name in ("scores", "heatmaps"):
            np.testing.assert_allclose(predicted[uid]["aux"][name], expected[name], atol=1e-5)
        inputs = [row[name][None] for name in tiny_model.INPUTS]
        logits = tiny_model.apply(model, weights_of_ours, *inputs).keyword_logits
        loss, _ = keyword_loss_sum(logits, row["keyword_ids"][None])
        np.testing.assert_allclose(scored[uid]["score"], -loss, rtol=1e-5)


@needs_t5x
def test_a_workdir_starts_a_run_of_t5x(ours, tmp_path):
    converted = convert.convert("workdir", ours, tmp_path / "critic")
    run_until(0, tmp_path / "run", OVERRIDES=VALUES | {"init.rahf": str(tmp_path / "critic")})
    assert_equal(params(tmp_path / "run" / "checkpoint_0"), dict(weights.read_all(converted.tensors)))


@needs_t5x
def test_t5x_restores_a_t5_into_rahf_by_its_assignment_map(unpacked, tmp_path):
    t5 = encoders.t5_t5x(checkpoint := unpacked("t5x_v1_1_tiny") / "checkpoint_0")
    model = {f"model.t5.{name}": value for name, value in t5.config["t5"].items()}
    run_until(0, tmp_path, "pretrain", OVERRIDES=model, T5_CHECKPOINT_PATH=str(checkpoint))
    found = params(tmp_path / "checkpoint_0")
    assert found["vit/embedding/kernel"].std() > 0
    assert_equal({name: found[f"t5/{name}"] for name in t5.tensors}, dict(weights.read_all(t5.tensors)))


@needs_t5x
def test_t5x_starts_from_the_parameters_of_its_own_checkpoint_and_from_the_first_batch(trained, tmp_path):
    before = trained[0] / "checkpoint_10"
    run_until(5, tmp_path / "theirs", OVERRIDES=VALUES, INITIAL_CHECKPOINT_PATH=str(before))
    assert_equal(params(tmp_path / "theirs" / "checkpoint_0"), params(before))
    convert.convert("t5x-rahf", before, tmp_path / "critic")
    ours = train_ours(tmp_path / "ours", VALUES | {"init.rahf": str(tmp_path / "critic")})
    assert_close(params(tmp_path / "theirs" / "checkpoint_5"), params_of_ours(ours, 5), 1e-5)


# ---- Without T5X ----------------------------------------------------------------------------------------------------
RECORD = """
import importlib, inspect, json, pathlib, sys
import t5x.eval, t5x.infer, t5x.train

def signature(name):
    for count in range(name.count(".") + 1, 0, -1):
        try:
            found = importlib.import_module(".".join(name.split(".")[:count]))
        except ImportError:
            continue
        for part in name.split(".")[count:]:
            found = getattr(found, part)
        return list(inspect.signature(found).parameters)

runs = pathlib.Path(t5x.train.__file__).parent / "configs" / "runs"
macros = {path.stem: [line.split(" = ")[0] for line in path.read_text().splitlines() if " = " in line and line[0].isupper()]
          for path in runs.glob("*.gin")}
print(json.dumps({"signatures": {name: signature(name) for name in sys.argv[1:]}, "macros": macros}))
"""


@needs_t5x
def test_recorded_signatures_are_those_of_t5x():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS)}
    command = [sys.executable, "-c", RECORD, *RECORDED["signatures"]]
    found = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    assert found["signatures"] == RECORDED["signatures"]
    assert RECORDED["macros"].items() <= found["macros"].items()


def definitions(tree) -> dict[str, list[str]]:
    """Of the module's functions, and of its classes' methods and constructors: the names of their parameters."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = parameters(node)
        elif isinstance(node, ast.ClassDef):
            methods = {part.name: parameters(part) for part in node.body if isinstance(part, ast.FunctionDef)}
            found[node.name] = methods.get("__init__", ["self"])[1:]
            found |= {f"{node.name}.{name}": names for name, names in methods.items()}
    return found


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    return [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)]


OURS = definitions(ast.parse((ROOT / "rahf" / "t5x.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "method", ["loss_fn", "predict_batch_with_aux", "score_batch", "get_initial_variables", "_compute_logits"]
)
def test_the_model_has_the_methods_that_t5x_calls(method):
    assert OURS[f"RAHFModel.{method}"] == RECORDED["signatures"][f"t5x.models.BaseTransformerModel.{method}"]


def statements(file: pathlib.Path) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """({alias: module} of a gin file's imports, the files that it includes, {what is bound: value})."""
    text = re.sub(r"\s*#.*", "", file.read_text(encoding="utf-8"))
    text = re.sub(
        r"^(\S+):\n((?:  .*\n?)+)", lambda match: re.sub(r"^  ", f"{match[1]}.", match[2], flags=re.M), text, flags=re.M
    )
    imports = {}
    for line in re.findall(r"^(?:from|import) .*", text, re.MULTILINE):
        package, module, alias = re.fullmatch(r"(?:from (\S+) )?import (\S+)(?: as (\S+))?", line).groups()
        imports[alias or module] = f"{package}.{module}" if package else module
    bound = dict(re.findall(r"^(?!from |import |include )(\S+) = (.*)", text, re.MULTILINE))
    return imports, re.findall(r"^include '(.*)'", text, re.MULTILINE), bound


def reachable(file: str) -> set[str]:
    """The gin files that one includes, and itself; T5X's too."""
    if file.startswith("t5x/"):
        return {file}
    return {file}.union(*map(reachable, statements(ROOT / file)[1]))


PROGRAMS = {"train_script": "t5x.train", "eval_script": "t5x.eval", "infer_script": "t5x.infer"}


@pytest.mark.parametrize("name", ["pretrain", "finetune", "eval", "infer"])
def test_gin_files_name_what_is_there(name):
    included = set().union(*(reachable(f"configs/t5x/{file}.gin") for file in (name, "base", "tiny", "cpu")))
    theirs = {path for path in included if path.startswith("t5x/")}
    macros = {macro for path in theirs for macro in RECORDED["macros"][pathlib.Path(path).stem]}
    macros |= {key for path in included - theirs for key in statements(ROOT / path)[2] if "." not in key}
    count = 0
    for path in included - theirs:
        imports, _, bound = statements(ROOT / path)
        imports |= {alias: module for alias, module in PROGRAMS.items() if alias in imports}

        def known(reference, imports=imports):
            module, _, name = reference.rpartition("/")[2].partition(".")
            where = imports[module]
            return OURS[name] if where == "rahf.t5x" else RECORDED["signatures"][f"{where}.{name}"]

        for key, value in bound.items():
            if "." in key:
                target, _, parameter = key.rpartition(".")
                assert parameter in known(target), f"{path}: {key}"
                count += 1
            for reference in re.findall(r"@([\w./]+)", value):
                known(reference)
            assert set(re.findall(r"%([A-Z0-9_]+)", value)) <= macros, f"{path}: {key} = {value}"
    assert count > 10


def test_documented_commands_name_gin_files_and_macros_that_are_there():
    text = (ROOT / "docs" / "t5x.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"(?:-m t5x\.\w+|--t5x) .*", text)
    assert len(found) >= 4
    for command in found:
        files = re.findall(r"--gin_file=(\S+)", command)
        included = set().union(*map(reachable, files))
        macros = {key for path in included if not path.startswith("t5x/") for key in statements(ROOT / path)[2]}
        macros |= {
            macro for path in included if path.startswith("t5x/") for macro in RECORDED["macros"][pathlib.Path(path).stem]
        }
        assert files and set(re.findall(r"--gin\.(\w+)=", command)) <= macros, command


@pytest.fixture
def theirs(tmp_path):
    """A model directory as T5X leaves it, and the tiny model's parameters in it."""
    config = experiments.load("rahf_ci")
    config.model = tiny_model.dividing()
    config.data.data_dir = tiny_data.built()
    config.model.t5.vocab_size = 80
    workdirs.open_workdir(tmp_path / "run", config)
    sources.install_vocabulary(config, tmp_path / "run")
    params = tiny_model.model_and_params(critics.config_of(config.model.to_dict()))[1]["params"]
    return tmp_path / "run", params


@pytest.mark.parametrize("form", ["orbax", "t5x"])
def test_a_checkpoint_of_t5x_becomes_a_critic(form, theirs, tmp_path):
    folder, params = theirs
    checkpoint = folder / "checkpoint_3"
    if form == "orbax":
        state = {"step": np.int32(3), "param_states": {"0": {"mu": params}}}
        ocp.PyTreeCheckpointer().save(checkpoint / "state", {"target": params, "state": state})
    else:
        write_t5x(checkpoint, flax.traverse_util.flatten_dict(params, sep="/"))
    converted = convert.convert("t5x-rahf", checkpoint, tmp_path / "critic")
    expected = flax.traverse_util.flatten_dict(params, sep="/")
    assert_equal(dict(weights.read_all(converted.tensors)), expected)
    model = predictor.load(tmp_path / "critic")
    assert_equal(flax.traverse_util.flatten_dict(jax.device_get(model.params), sep="/"), expected)


def test_a_folder_that_is_no_checkpoint_of_t5x_is_refused(theirs, tmp_path):
    folder, _ = theirs
    with pytest.raises(UserError, match=r"holds neither state/ nor a file `checkpoint`, expected MODEL_DIR/checkpoint_N"):
        convert.convert("t5x-rahf", folder / "checkpoint_4", tmp_path / "critic")
    with pytest.raises(UserError, match=r"has no config\.json"):
        convert.convert("t5x-rahf", tmp_path / "other" / "checkpoint_4", tmp_path / "critic")
