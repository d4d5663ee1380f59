"""Launches rahf.train, or a sweep of it, through XManager: on this machine or on Vertex AI.

    xmanager launch launch/xm_launch.py -- --config=configs/rahf_synth_tiny.py --workdir=run --executor=local \\
        --python=.venv/bin/python --config.data.source=stream --sweep=optimizer.learning_rate=1e-3,3e-4

XManager needs protobuf below 7, which contradicts constraints.txt: install it in an environment of its own (`pip install
'xmanager>=0.5' ml_collections flax`). Local jobs run with --python, Vertex AI's in an image of the checked-out commit, by
the Dockerfile. Vertex AI has only slices of 8 cores of TPU v2 and v3: for pods, use launch/tpu_vm.py.

Each combination of the sweeps' values is one run, in a folder of --workdir that is named after the values. Local runs
follow one another. The config and its overrides are checked before anything is packaged.
"""

import asyncio
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # `xmanager launch` removes the first entry

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402
from xmanager import xm, xm_local  # noqa: E402

from launch import tpu_vm  # noqa: E402
from rahf import experiments  # noqa: E402
from richhf_data import command  # noqa: E402
from richhf_data.errors import UserError  # noqa: E402

config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/. --config.KEY=VALUE overrides a value.")
flags.DEFINE_string("workdir", None, "As rahf.train takes it; gs://BUCKET/FOLDER on Vertex AI.")
flags.DEFINE_enum("executor", None, ["local", "vertex"], "Where the runs are executed.")
flags.DEFINE_multi_string("sweep", [], "KEY=VALUE,VALUE of the config; with several, every combination is run.")
flags.DEFINE_string("python", None, "local: a Python that has RAHF.")
flags.DEFINE_list("requirements", [], "vertex: such as cpu=96,ram=300,tpu_v3=8 or a100=1; ram in GiB.")
flags.DEFINE_string("project", None, "vertex: Google Cloud project.")
flags.DEFINE_string("location", None, "vertex: region, such as europe-west4.")
flags.DEFINE_string("bucket", None, "vertex: bucket for staging, without gs://.")
flags.DEFINE_string("image", None, "vertex: where to push the image, REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG.")
flags.mark_flags_as_required(["config", "workdir", "executor"])
FLAGS = flags.FLAGS
TRAINING = """HEALTHCHECK NONE
RUN python -m pip install --no-cache-dir -c constraints.txt '.[{extras}]'
ENTRYPOINT ["python", "-m", "rahf.train"]
CMD []
"""


def trials(sweeps: list[str], config) -> list[dict[str, str]]:
    """Every combination of the values: ["a.b=1,2"] -> [{"a.b": "1"}, {"a.b": "2"}]; [{}] without sweeps.

    Raises:
      UserError: not KEY=VALUE,...; a key that the config does not have, or twice; a value twice.
    """
    choices = {}
    for sweep in sweeps:
        key, _, text = sweep.partition("=")
        values = re.split(r",(?![^(\[]*[)\]])", text)  # commas inside tuples do not separate
        if not key or "" in values or len(set(values)) < len(values) or key in choices:
            raise UserError(f"--sweep: got {sweep}, expected KEY=VALUE,VALUE with distinct values, each key once")
        experiments.check_key(config, key)
        choices[key] = values
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def job_args(trial: dict[str, str]) -> dict[str, str]:
    """Flag -> value of rahf.train, for one run."""
    overrides = config_flags.get_override_values(FLAGS["config"])
    if both := sorted(set(overrides) & set(trial)):
        raise UserError(f"--sweep: got {', '.join(both)} in --config.{both[0]} as well, expected it in one of them")
    path = pathlib.Path(config_flags.get_config_filename(FLAGS["config"])).resolve()
    if FLAGS.executor == "vertex":
        if not path.is_relative_to(ROOT):
            raise UserError(f"--config: got {path}, expected a file in {ROOT}, as its commit becomes the image")
        path = path.relative_to(ROOT)
    name = ",".join(f"{key.split('.')[-1]}={value}" for key, value in trial.items())
    folder = re.sub(r"[^\w.,=+-]", "_", name)
    values = {f"config.{key}": str(value) for key, value in (overrides | trial).items()}
    return {"config": str(path), "workdir": f"{FLAGS.workdir}/{folder}" if folder else FLAGS.workdir, **values}


def requirements(texts: list[str]) -> xm.JobRequirements:
    """["cpu=8", "ram=64", "tpu_v3=8"] -> a job's requirements.

    Raises:
      UserError: an unknown resource, or TPUs that Vertex AI does not have.
    """
    amounts = {}
    for text in texts:
        name, _, amount = text.partition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", amount):
            raise UserError(f"--requirements: got {text}, expected NAME=NUMBER")
        amounts[name.lower()] = float(amount) * xm.GiB if name.lower() == "ram" else int(float(amount))
    for name, amount in amounts.items():
        if name.startswith("tpu") and (name not in ("tpu_v2", "tpu_v3") or amount != 8):
            raise UserError(
                f"--requirements: got {name}={amount}, Vertex AI takes tpu_v2=8 or tpu_v3=8; others: launch/tpu_vm.py"
            )
    try:
        return xm.JobRequirements(**amounts)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--requirements: got {','.join(texts)}, expected XManager's resources: {error}") from error


def local_packageable() -> xm.Packageable:
    """rahf.train of this checkout, run by --python."""
    spec = xm.Binary(path=os.path.abspath(FLAGS.python))
    args = xm.SequentialArgs.from_collection(["-m", "rahf.train"])
    return xm.Packageable(spec, xm_local.Local.Spec(), args=args, env_vars={"PYTHONPATH": str(ROOT)})


def vertex_packageable(folder: pathlib.Path, needs: xm.JobRequirements) -> xm.Packageable:
    """An image with rahf.train of the checked-out commit, which is unpacked into `folder`: the Dockerfile's first stage, and
    the extras that training needs."""
    archive = folder / "rahf.tar.gz"
    subprocess.run(tpu_vm.archive_command(tpu_vm.commit(), archive), check=True)
    (folder / "rahf").mkdir()
    subprocess.run(["tar", "-xzf", archive, "-C", folder / "rahf"], check=True)
    extras = "data" if needs.accelerator is None else "data,tpu" if needs.accelerator in xm.TpuType else "data,cuda"
    file = folder / "rahf" / "Dockerfile"
    base, _, _ = file.read_text(encoding="utf-8").partition("\nFROM base AS ")
    file.write_text(f"{base}\n{TRAINING.format(extras=extras)}", encoding="utf-8")
    return xm.Packageable(xm.Dockerfile(path=str(file.parent)), xm_local.Vertex.Spec(push_image_tag=FLAGS.image))


async def launch(runs: list[dict[str, str]], needs: xm.JobRequirements, folder: pathlib.Path) -> None:
    """Packages once, then adds one work unit per run."""
    local = FLAGS.executor == "local"
    async with xm_local.create_experiment(experiment_title="rahf") as experiment:
        [executable] = experiment.package([local_packageable() if local else vertex_packageable(folder, needs)])
        executor = xm_local.Local() if local else xm_local.Vertex(requirements=needs)
        for args in runs:
            unit = await experiment.add(xm.Job(executable, executor), args={"args": args})
            if local:
                await unit.wait_until_complete()


def main(argv):
    """The command."""
    logging.set_verbosity(logging.WARNING)  # XManager's database logs every step
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        needed = {"local": ["python"], "vertex": ["project", "location", "bucket", "image", "requirements"]}
        for executor, names in needed.items():
            for name in names:
                if bool(FLAGS[name].value) != (executor == FLAGS.executor):
                    which = "expected it" if executor == FLAGS.executor else f"it is for --executor={executor}"
                    raise UserError(f"--{name}: got {FLAGS[name].value or 'none'}, {which}")
        if FLAGS.executor == "vertex" and not FLAGS.workdir.startswith("gs://"):
            raise UserError(f"--workdir: got {FLAGS.workdir}, expected gs://BUCKET/FOLDER: Vertex AI deletes its disks")
        needs = requirements(FLAGS.requirements)
        runs = [job_args(trial) for trial in trials(FLAGS.sweep, FLAGS.config)]
        if len(folders := {args["workdir"] for args in runs}) < len(runs):
            raise UserError(f"--sweep: got {len(runs)} runs for {len(folders)} folders, expected other values")
        if FLAGS.executor == "vertex":
            os.environ |= {"GOOGLE_CLOUD_PROJECT": FLAGS.project, "GOOGLE_CLOUD_BUCKET_NAME": FLAGS.bucket}
            from xmanager.cloud import vertex

            vertex.set_default_client(vertex.Client(FLAGS.project, FLAGS.location))
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(launch(runs, needs, pathlib.Path(folder)))
    except (UserError, xm.ExperimentUnitError) as error:
        command.fail(str(error))


if __name__ == "__main__":
    app.run(main)
