"""The launchers, against a stand-in gcloud that keeps the cloud in files and runs what ssh is given, worker by worker."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launch import tpu_vm
from rahf import loop

ROOT = pathlib.Path(__file__).parent.parent

# gcloud's flags as Cloud SDK 528.0.0 defines them; the cloud is a folder: state.json, workers/N (home folders), bucket.
GCLOUD = """#!PYTHON -S
import argparse, json, os, pathlib, shutil, subprocess, sys, threading

cloud = pathlib.Path("CLOUD")
with open(cloud / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
assert sys.argv[1:3] == ["compute", "tpus"], sys.argv
group, verb = sys.argv[3:5]
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--zone", required=True)
parser.add_argument("--project", required=True)
for name in {
    ("queued-resources", "create"): ["node-id", "accelerator-type", "runtime-version"],
    ("queued-resources", "describe"): ["format"],
    ("queued-resources", "delete"): [],
    ("tpu-vm", "describe"): ["format"],
    ("tpu-vm", "ssh"): ["worker", "command"],
    ("tpu-vm", "scp"): ["worker"],
}[group, verb]:
    parser.add_argument("--" + name, required=True)
for name in ["network", "subnetwork", "service-account"] if verb == "create" else []:
    parser.add_argument("--" + name)
ssh = ["internal-ip"]
for name in {"create": ["spot", "internal-ips"], "delete": ["force", "quiet"], "ssh": ssh, "scp": ssh}.get(verb, []):
    parser.add_argument("--" + name, action="store_true")
parser.add_argument("names", nargs=2 if verb == "scp" else 1)
args = parser.parse_args(sys.argv[5:])
scenario = json.loads((cloud / "scenario.json").read_text())
file = cloud / "state.json"
state = json.loads(file.read_text()) if file.exists() else {"generation": -1, "states": [], "exists": False}


def fail(message):
    print(f"ERROR: (gcloud.compute.tpus.{group}.{verb}) {message}", file=sys.stderr)
    sys.exit(1)


def machines_go():
    for home in sorted(cloud.glob("workers/*")):
        for pid in home.glob("rahf-job/pid"):
            subprocess.run(["kill", "-KILL", "--", "-" + pid.read_text().strip()], stderr=subprocess.DEVNULL)
        shutil.rmtree(home)


path = f"projects/{args.project}/locations/{args.zone}/queuedResources/{args.names[0]}"
if verb in scenario.get("errors", {}):
    fail(scenario["errors"][verb])
if verb == "create":
    if state["exists"]:
        fail(f"ALREADY_EXISTS: Resource '{path}' already exists")
    generation = state["generation"] + 1
    states = scenario.get("states", [["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    kind = args.accelerator_type
    state = {"generation": generation, "states": states[min(generation, len(states) - 1)], "exists": True, "kind": kind}
    for worker in range(2):
        (cloud / "workers" / str(worker)).mkdir(parents=True)
elif not state["exists"]:
    fail(f"NOT_FOUND: Resource '{path}' was not found")
elif (group, verb) == ("queued-resources", "describe"):
    if (cloud / "preempt").exists():
        (cloud / "preempt").unlink()
        machines_go()
        state["states"] = ["SUSPENDING", "SUSPENDED"]
    now = state["states"][0]
    state["states"] = state["states"][1:] or [now]
    details = {"state": now, "stateInitiator": scenario.get("initiator", "SERVICE")}
    if now == "FAILED":
        details["failedData"] = {"error": {"code": 8, "message": scenario["failure"]}}
    node = {"parent": "p", "nodeId": args.names[0], "node": {"acceleratorType": state["kind"]}}
    print(json.dumps({"name": path, "state": details, "tpu": {"nodeSpec": [node]}}, indent=2))
elif verb == "describe":
    gone = (cloud / "node_gone").exists()
    print(json.dumps({"name": args.names[0], "state": "PREEMPTED" if gone else "READY"}))
elif verb == "delete":
    assert args.force and args.quiet
    (cloud / "node_gone").unlink(missing_ok=True)
    machines_go()
    state["exists"] = False
else:
    workers = range(2) if args.worker == "all" else [int(args.worker)]
    codes = []
    for worker in workers:
        print(f"SSH: Attempting to connect to worker {worker}...", file=sys.stderr)
        home = cloud / "workers" / str(worker)
        if not home.exists() or (cloud / "node_gone").exists():
            codes.append(255)
        elif verb == "scp":
            shutil.copy(args.names[0], home)
        else:
            env = {"HOME": str(home), "WORKER": str(worker), "PATH": f"{cloud}/worker_bin:/usr/bin:/bin"}
            command = ["bash", "-c", args.command]
            session = subprocess.Popen(command, cwd=home, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
            codes.append(session.wait())
            subprocess.run(["kill", "-KILL", "--", f"-{session.pid}"], stderr=subprocess.DEVNULL)  # the ssh drops
    file.write_text(json.dumps(state))
    sys.exit(next((code for code in codes if code), 0))
file.write_text(json.dumps(state))
"""

# What a worker's image has: python3, whose pip installs uv, which makes a .venv whose python is the trainer below.
PYTHON3 = """#!/bin/sh
[ "$*" = "-m pip install --quiet --user uv" ] && mkdir -p ~/.local/bin && cp CLOUD/worker_bin/uv ~/.local/bin/uv
"""
UV = """#!/bin/sh
[ ! -e CLOUD/broken_pip ] || { echo "No solution found when resolving dependencies" >&2; exit 1; }
case "$1" in
  venv) mkdir -p .venv/bin ;;
  pip) grep -q numpy constraints.txt && [ -f setup.py ] && cp CLOUD/worker_bin/trainer .venv/bin/python ;;
esac
"""
# Plays rahf.train: counts steps to 10 in the bucket from where the last one got; `trainer` of the scenario says how each
# machine's start ends: [last step, exit code or what happens].
TRAINER = """#!PYTHON -S
import json, os, pathlib, sys, time

cloud, worker = pathlib.Path("CLOUD"), os.environ["WORKER"]
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[3:] if "=" in flag)
assert sys.argv[1:3] == ["-m", "rahf.train"] and flags["workdir"].startswith("gs://"), sys.argv
run = cloud / "bucket" / flags["workdir"].removeprefix("gs://")
run.mkdir(parents=True, exist_ok=True)
starts = run / f"starts{worker}"
number = len(starts.read_text().splitlines()) if starts.exists() else 0
ends = json.loads((cloud / "scenario.json").read_text()).get("trainer", [[10, 0]])
last, end = ends[min(number, len(ends) - 1)]
step = run / f"step{worker}"
first = int(step.read_text()) if step.exists() else 0
with open(starts, "a") as file:
    file.write(json.dumps([first, sys.argv[1:]]) + "\\n")
print(f"resumed from step {first}", flush=True)
step.write_text(str(last))
if isinstance(end, list):  # one a worker
    end = end[int(worker)]
while not all((run / f"step{other}").exists() and (run / f"step{other}").read_text() == str(last) for other in range(2)):
    time.sleep(0.01)
if end in ("preempt", "notice", "node_gone"):
    (cloud / end.replace("notice", "preempt")).touch()
    time.sleep(0 if end == "notice" else 60)
    end = 75
if end == "hang":
    time.sleep(60)
if end == "killed":
    os.killpg(0, 9)
if end not in (0, 75):
    print(f"error: worker {worker} cannot read the data")
sys.exit(end)
"""
FLAGS = ["--name=rahf", "--project=my-project", "--zone=europe-west4-a"]
TYPE = ["--type=v3-16", "--version=tpu-ubuntu2204-base"]
TRAIN = ["train", *FLAGS, *TYPE, "--spot", "--workdir=gs://bucket/run", "--poll=0.02", "--", "--config=configs/rahf_ci.py"]


def executable(path, text, cloud):
    path.write_text(text.replace("PYTHON", sys.executable, 1).replace("CLOUD", str(cloud)))
    path.chmod(0o755)


class Cloud:
    """The stand-in, and a checkout with the launcher."""

    def __init__(self, folder):
        self.folder, self.checkout = folder / "cloud", folder / "checkout"
        for name in ("bin", "worker_bin", "bucket"):
            (self.folder / name).mkdir(parents=True)
        executable(self.folder / "bin" / "gcloud", GCLOUD, self.folder)
        executable(self.folder / "bin" / "python", '#!/bin/sh\nexec PYTHON "$@"\n', self.folder)
        executable(self.folder / "worker_bin" / "hostname", "#!/bin/sh\necho t1v-n-0a1b-w-$WORKER\n", self.folder)
        executable(self.folder / "worker_bin" / "python3", PYTHON3, self.folder)
        executable(self.folder / "worker_bin" / "uv", UV, self.folder)
        executable(self.folder / "worker_bin" / "trainer", TRAINER, self.folder)
        self.environment = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        self.scenario()
        (self.checkout / "launch").mkdir(parents=True)
        for name in ("launch/__init__.py", "launch/tpu_vm.py", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, self.checkout / name)
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "all")

    def git(self, *arguments):
        subprocess.run(["git", *arguments], cwd=self.checkout, check=True)

    def scenario(self, **scenario):
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    def launch(self, *arguments):
        command = [sys.executable, "-m", "launch.tpu_vm", *arguments]
        return subprocess.run(command, cwd=self.checkout, env=self.environment, capture_output=True, text=True, timeout=60)

    def calls(self, verb=None):
        file = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if verb in (None, call[3])]

    def starts(self, worker=0):
        """[the step that it went on from, its arguments] of each start of the trainer."""
        file = self.folder / "bucket" / "bucket" / "run" / f"starts{worker}"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def exists(self):
        file = self.folder / "state.json"
        return file.exists() and json.loads(file.read_text())["exists"]


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for pid in cloud.folder.glob("workers/*/rahf-job/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def test_training_that_saved_on_sigterm_is_what_the_launcher_starts_again():
    assert loop.EXIT_CODES[signal.SIGTERM] == tpu_vm.PREEMPTED


def test_train_creates_sets_up_runs_and_deletes(cloud):
    done = cloud.launch(*TRAIN, "--config.note=two words; $HOME 'quoted'")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "training finished; 0 preemptions" in done.stdout and "rahf: deleted; the run is in gs://bucket/run" in done.stdout
    )
    for worker in range(2):
        [[first, arguments]] = cloud.starts(worker)
        assert first == 0
        assert arguments == [
            "-m",
            "rahf.train",
            "--workdir=gs://bucket/run",
            "--config=configs/rahf_ci.py",
            "--config.note=two words; $HOME 'quoted'",
        ]
    [create] = cloud.calls("create")
    where = ["--zone=europe-west4-a", "--project=my-project"]
    kind = ["--node-id=rahf", "--accelerator-type=v3-16", "--runtime-version=tpu-ubuntu2204-base", "--spot"]
    assert create == ["compute", "tpus", "queued-resources", "create", "rahf", *kind, *where]
    assert not cloud.exists()


@pytest.mark.parametrize("end", ["preempt", "notice", "node_gone"])
def test_train_creates_again_and_resumes_after_a_preemption(cloud, end):
    cloud.scenario(trainer=[[4, end], [10, 0]])
    done = cloud.launch(*TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preempted (number 1)" in done.stdout and "finished; 1 preemptions" in done.stdout
    assert len(cloud.calls("create")) == 2 and cloud.calls("create")[0] == cloud.calls("create")[1]
    assert len(cloud.calls("scp")) == 2
    for worker in range(2):
        starts = cloud.starts(worker)
        assert [first for first, _ in starts] == [0, 4]
        assert starts[0][1] == starts[1][1]
    assert len(cloud.calls("delete")) == 2 and not cloud.exists()


@pytest.mark.parametrize("end", [75, "killed", ["killed", "hang"]])
def test_train_starts_again_on_machines_that_stay(cloud, end):
    cloud.scenario(trainer=[[4, end], [10, 0]])
    done = cloud.launch(*TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [first for first, _ in cloud.starts()] == [0, 4] and len(cloud.calls("create")) == 1


def test_train_does_not_start_again_for_ever(cloud):
    cloud.scenario(trainer=[[4, 75]])
    done = cloud.launch(*TRAIN)
    assert done.returncode == 1 and len(cloud.starts()) == 4
    assert "ended 4 times on one machine" in done.stderr and "rahf exists (ACTIVE)" in done.stderr


def test_train_shows_the_log_of_a_failure_and_does_not_retry(cloud):
    cloud.scenario(trainer=[[4, [1, 0]], [10, 0]])
    done = cloud.launch(*TRAIN)
    assert done.returncode == 1 and len(cloud.starts()) == 1
    assert "t1v-n-0a1b-w-0: error: worker 0 cannot read the data" in done.stdout
    assert "the training failed: exit 1" in done.stderr
    assert "rahf exists (ACTIVE)" in done.stderr and "queued-resources delete rahf --force" in done.stderr
    again = cloud.launch(*TRAIN)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [first for first, _ in cloud.starts()] == [0, 4] and len(cloud.calls("create")) == 1


def test_train_ends_workers_that_outlive_a_failed_one(cloud):
    cloud.scenario(trainer=[[4, ["hang", 3]]])
    done = cloud.launch(*TRAIN)
    assert done.returncode == 1 and "the training failed: exit 3" in done.stderr
    state = cloud.launch("status", *FLAGS)
    assert "w-0: died" in state.stdout and "w-1: exit 3: error: worker 1 cannot read the data" in state.stdout


def test_train_attaches_to_what_an_earlier_launcher_started(cloud):
    cloud.scenario(trainer=[[10, "hang"]])
    command = [sys.executable, "-m", "launch.tpu_vm", *TRAIN]
    first = subprocess.Popen(command, cwd=cloud.checkout, env=cloud.environment, stdout=subprocess.PIPE, text=True)
    for line in first.stdout:
        if "running" in line:
            break
    first.kill()
    first.wait()
    second = subprocess.Popen(command, cwd=cloud.checkout, env=cloud.environment, stdout=subprocess.PIPE, text=True)
    assert "running" in second.stdout.readline()
    second.kill()
    second.wait()
    assert len(cloud.starts()) == 1 and len(cloud.calls("scp")) == 1


NO_ACCOUNT = "You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login"
ZONE = (
    "INVALID_ARGUMENT: Cloud TPU received a bad request. The requested accelerator configuration for accelerator type, "
    '"v3-16", could not be found in the zonal accelerator configurations for "europe-west4-a".'
)
NO_ZONE = "PERMISSION_DENIED: Permission denied on 'locations/europe-west4-a' (or it may not exist)."
QUOTA = "RESOURCE_EXHAUSTED: Quota limit 'TPUV3sPreemptiblePodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0."


@pytest.mark.parametrize(
    "verb, message, advice",
    [
        ("train", ZONE, "accelerator-types list --zone=europe-west4-a --project=my-project"),
        ("create", NO_ZONE, "gcloud compute tpus locations list --project=my-project"),
        ("train", QUOTA, "ask for quota for v3-16 in europe-west4-a"),
        ("create", "PERMISSION_DENIED: The caller does not have permission", "roles/tpu.admin"),
        (
            "train",
            "PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled.",
            "gcloud services enable tpu.googleapis.com --project=my-project",
        ),
    ],
)
def test_refusal_of_create_shows_the_message_and_what_to_do(cloud, verb, message, advice):
    cloud.scenario(errors={"create": message})
    done = cloud.launch(*(TRAIN if verb == "train" else ["create", *FLAGS, *TYPE]))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr and advice in done.stderr
    assert "Nothing named rahf is left in europe-west4-a." in done.stderr
    assert len(cloud.calls("create")) == 1


def test_missing_credentials_say_that_the_resource_may_exist(cloud):
    cloud.scenario(errors={verb: NO_ACCOUNT for verb in ("create", "describe", "ssh", "delete")})
    for arguments in (TRAIN, ["create", *FLAGS, *TYPE], ["status", *FLAGS], ["delete", *FLAGS]):
        done = cloud.launch(*arguments)
        assert done.returncode == 1 and "active account" in done.stderr
        assert "what to do: log in: gcloud auth login" in done.stderr
        assert "rahf may exist" in done.stderr and "queued-resources delete rahf --force" in done.stderr


def test_name_in_use_is_told_and_left_alone(cloud):
    assert cloud.launch("create", *FLAGS, "--type=v2-8", "--version=v", "--poll=0.02").returncode == 0
    done = cloud.launch("create", *FLAGS, *TYPE)
    assert done.returncode == 1 and "ALREADY_EXISTS" in done.stderr and "choose another --name" in done.stderr
    assert "rahf exists (ACTIVE)" in done.stderr
    done = cloud.launch(*TRAIN)
    assert done.returncode == 1 and "the name is in use by v2-8, expected v3-16" in done.stderr
    assert cloud.exists() and not cloud.calls("delete") and not cloud.calls("scp")


@pytest.mark.parametrize("verb", ["create", "train"])
def test_failed_request_is_told_with_the_command_that_deletes_it(cloud, verb):
    message = "Quota 'TPUV3sPreemptiblePodPerProjectPerZoneForTPUAPI' exhausted. Limit 0 in zone europe-west4-a"
    cloud.scenario(states=[["WAITING_FOR_RESOURCES", "FAILED"]], failure=message)
    done = cloud.launch(*(TRAIN if verb == "train" else ["create", *FLAGS, *TYPE, "--poll=0.02"]))
    assert done.returncode == 1 and message in done.stderr and "ask for quota" in done.stderr
    assert "rahf exists (FAILED)" in done.stderr
    assert "gcloud compute tpus queued-resources delete rahf --force --quiet --zone=europe-west4-a" in done.stderr


def test_resource_suspended_by_a_person_is_not_created_again(cloud):
    cloud.scenario(states=[["ACTIVE", "SUSPENDED"]], trainer=[[4, "hang"]], initiator="USER")
    done = cloud.launch(*TRAIN)
    assert done.returncode == 1 and "SUSPENDED by a person" in done.stderr and len(cloud.calls("create")) == 1


def test_broken_installation_is_shown_after_three_attempts(cloud):
    (cloud.folder / "broken_pip").touch()
    done = cloud.launch(*TRAIN)
    assert done.returncode == 1 and "No solution found when resolving" in done.stderr and len(cloud.calls("scp")) == 3
    assert "rahf exists (ACTIVE)" in done.stderr and not cloud.starts()


def test_dry_run_prints_the_commands_that_train_runs(cloud):
    printed = cloud.launch(*TRAIN[: TRAIN.index("--")], "--dry_run", *TRAIN[TRAIN.index("--") :])
    assert printed.returncode == 0 and not cloud.calls()
    planned = shlex.split(printed.stdout.replace("\ngcloud ", "\n; gcloud ").replace("\ngit ", "\n; git "))
    commands = [list(group.split("\0")) for group in "\0".join(planned).split("\0;\0")]
    expected = [command[1:] for command in commands if command[0] == "gcloud"]
    assert cloud.launch(*TRAIN).returncode == 0
    done = [["rahf.tar.gz" if part.endswith("/rahf.tar.gz") else part for part in call] for call in cloud.calls()]
    assert [call for index, call in enumerate(done) if call not in done[:index]] == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["create", *TYPE], ["queued-resources create", "queued-resources describe"]),
        (["setup"], ["archive", "tpu-vm scp", "tpu-vm ssh"]),
        (["run", "--", "python", "-m", "rahf.train"], ["tpu-vm ssh", "tpu-vm ssh"]),
        (["logs"], ["tpu-vm ssh"]),
        (["logs", "--worker=3", "--nofollow", "--lines=5"], ["tpu-vm ssh"]),
        (["status"], ["queued-resources describe", "tpu-vm describe", "tpu-vm ssh"]),
        (["delete"], ["queued-resources delete"]),
    ],
)
def test_dry_run_prints_the_commands_of_every_step(arguments, expected, capsys, monkeypatch):
    """That they are those that run is tested for `train`, which has all of them."""
    monkeypatch.setattr(tpu_vm.Pod, "call", None)
    verb, *rest = arguments
    assert tpu_vm.main([verb, *FLAGS, "--dry_run", *rest]) == 0
    lines = re.findall(r"^(?:gcloud compute tpus (\S+ \S+)|git .* (archive)) ", capsys.readouterr().out, re.MULTILINE)
    assert ["".join(line) for line in lines] == expected


def test_t5x_is_installed_and_started_where_the_flag_says_so(capsys):
    arguments = [*TRAIN[: TRAIN.index("--")], "--dry_run", "--t5x", "--", "--gin_file=configs/t5x/finetune.gin"]
    assert tpu_vm.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "-m t5x.train --multiprocess_gpu" in printed and "gs://bucket/run" in printed and "rahf.train" not in printed
    (file,) = re.findall(r"--no-deps .* -r (\S+)", printed)
    assert (ROOT / file.rstrip("'")).is_file()
    assert tpu_vm.main([*TRAIN[: TRAIN.index("--")], "--dry_run", "--", "--config=rahf_ci"]) == 0
    printed = capsys.readouterr().out
    assert "rahf.train" in printed and "t5x.train" not in printed and "requirements.txt" not in printed


@pytest.mark.parametrize("flag", ["--name", "--project", "--zone", "--type", "--version", "--workdir"])
def test_missing_flag_is_named(cloud, flag):
    done = cloud.launch(*[argument for argument in TRAIN if not argument.startswith(f"{flag}=")])
    assert done.returncode == 2 and re.search(f"required: {flag};", done.stderr.strip()) and not cloud.calls()


def test_train_refuses_a_local_workdir_and_uncommitted_changes(cloud):
    done = cloud.launch(*[argument.replace("gs://bucket/run", "/tmp/run") for argument in TRAIN])
    assert done.returncode == 2 and "--workdir: got /tmp/run, expected gs://" in done.stderr
    (cloud.checkout / "setup.py").write_text("changed")
    done = cloud.launch(*TRAIN)
    assert done.returncode == 2 and "uncommitted changes: got setup.py" in done.stderr and not cloud.calls()


def test_missing_gcloud_is_told(cloud, tmp_path):
    cloud.environment["PATH"] = str(tmp_path)
    done = cloud.launch("status", *FLAGS)
    assert done.returncode == 1 and "gcloud: not installed" in done.stderr and "cloud.google.com/sdk" in done.stderr


def test_run_refuses_a_second_job(cloud):
    cloud.scenario(trainer=[[4, "hang"]])
    job = ["--", "python", "-m", "rahf.train", "--workdir=gs://bucket/run"]
    assert cloud.launch("create", *FLAGS, *TYPE, "--poll=0.02").returncode == 0
    assert cloud.launch("setup", *FLAGS).returncode == 0
    assert cloud.launch("run", *FLAGS, *job).returncode == 0
    done = cloud.launch("run", *FLAGS, *job)
    assert done.returncode == 2 and "a job runs already" in done.stderr
    done = cloud.launch("setup", *FLAGS)
    assert done.returncode == 1 and "a job runs here" in done.stderr
    time.sleep(0.1)
    assert len(cloud.starts()) == 1


def test_documented_commands_run(cloud):
    section = (ROOT / "docs" / "pods.md").read_text().partition("## On a TPU pod")[2].partition("\n## ")[0]
    script = "set -ex\n" + "\n".join(re.findall(r"```\n(.*?)```", section, re.DOTALL)[:1])
    verbs = re.findall(r"launch\.tpu_vm (\w+)", script)
    assert set(verbs) == {"create", "setup", "run", "status", "logs", "delete", "train"}
    for verb in ("create", "train"):
        script = script.replace(f"{verb} $POD", f"{verb} --poll=0.02 $POD")
    script = re.sub(r"logs( +)\$POD", "logs --nofollow $POD", script)
    done = subprocess.run(
        ["bash", "-c", script], cwd=cloud.checkout, env=cloud.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from step 0" in done.stdout and "deleted; the run is in gs://BUCKET/run" in done.stdout
    assert any("tail -n 100 rahf-job/log" in call[-3] for call in cloud.calls("ssh"))
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 2 and not cloud.exists()


# ----------------------------------------------------------------------------------------------------------- XManager

# XManager's own mock in the place of Vertex AI; what it is given is printed.
MOCK = """
import json, os, pathlib, sys
sys.path.insert(0, "launch")
import xm_launch
from absl import app
from xmanager import xm_local, xm_mock
from xmanager.cloud import vertex

experiment = xm_mock.MockExperiment()
package = experiment.package

def record(packageables):
    [packageable] = packageables
    spec = packageable.executable_spec
    files = sorted(path.name for path in pathlib.Path(spec.path).iterdir())
    print(json.dumps({"tag": packageable.executor_spec.push_image_tag, "files": files}))
    print(json.dumps(pathlib.Path(spec.dockerfile).read_text().splitlines()))
    return package(packageables)

experiment.package = record
xm_local.create_experiment = lambda experiment_title: experiment
vertex.Client = lambda project, location: print(json.dumps([project, location, os.environ["GOOGLE_CLOUD_BUCKET_NAME"]]))

try:
    app.run(xm_launch.main, argv=["xm_launch", *sys.argv[1:]])
except SystemExit as error:
    if error.code:
        raise
for job, args in zip(experiment.launched_jobs, experiment.launched_jobs_args, strict=True):
    needs = {str(kind): amount for kind, amount in job.executor.requirements.task_requirements.items()}
    print(json.dumps({"job": job.args.to_list(str), "needs": needs}))
"""
VERTEX = ["--executor=vertex", "--workdir=gs://b/run", "--project=p", "--location=europe-west4", "--bucket=b", "--image=i:1"]


@pytest.fixture
def xmanager(cloud):
    """Its command, where it is on PATH: its protobuf bound keeps it out of an environment with constraints.txt."""
    found = shutil.which("xmanager")
    if not found:
        pytest.skip("xmanager is not on PATH")
    shutil.copy(ROOT / "launch" / "xm_launch.py", cloud.checkout / "launch")
    shutil.copy(ROOT / "Dockerfile", cloud.checkout)
    for name in ("configs", "rahf", "richhf_data"):
        shutil.copytree(ROOT / name, cloud.checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    cloud.git("add", ".")
    cloud.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "configs")
    cloud.environment |= {"HOME": str(cloud.folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def launch(*arguments, mock=False):
        python = pathlib.Path(found).resolve().parent / "python"
        command = [python, "-c", MOCK] if mock else [found, "launch", "launch/xm_launch.py", "--"]
        command += ["--config=configs/rahf_ci.py", *arguments]
        return subprocess.run(
            command, cwd=cloud.checkout, env=cloud.environment, capture_output=True, text=True, timeout=120
        )

    return launch


def test_xmanager_local_executor_runs_every_combination_of_a_sweep(cloud, xmanager):
    executable(cloud.folder / "bin" / "job", '#!/bin/sh\necho "ran $*"\n', cloud.folder)
    sweeps = ["--sweep=optimizer.learning_rate=1e-3,3e-4", "--sweep=optimizer.freeze=(),('vit',)"]
    python = f"--python={cloud.folder / 'bin' / 'job'}"
    done = xmanager("--executor=local", "--workdir=run", python, "--config.data.source=stream", *sweeps)
    assert done.returncode == 0, done.stdout + done.stderr
    config = f"--config={cloud.checkout / 'configs' / 'rahf_ci.py'}"
    expected = [
        f"ran -m rahf.train {config} --workdir=run/learning_rate={rate},freeze={name} --config.data.source=stream "
        f"--config.optimizer.learning_rate={rate} --config.optimizer.freeze={freeze}"
        for rate in ("1e-3", "3e-4")
        for freeze, name in (("()", "__"), ("('vit',)", "__vit_,_"))
    ]
    assert re.findall(r"ran .*", done.stdout) == expected


def test_xmanager_reports_a_local_job_that_failed(xmanager):
    done = xmanager("--executor=local", "--workdir=run", "--python=/bin/false")
    assert done.returncode == 1 and "error: " in done.stderr and "non-zero code: 1" in done.stderr


def test_xmanager_vertex_packages_the_commit_and_asks_for_resources(cloud, xmanager):
    (cloud.checkout / "untracked").touch()
    done = xmanager(*VERTEX, "--requirements=cpu=96,ram=300,tpu_v3=8", "--sweep=seed=0,1", mock=True)
    assert done.returncode == 0, done.stdout + done.stderr
    client, image, instructions, first, second = [json.loads(line) for line in done.stdout.splitlines() if line[0] in "[{"]
    assert client == ["p", "europe-west4", "b"]
    files = ["Dockerfile", "configs", "constraints.txt", "launch", "rahf", "richhf_data", "setup.py"]
    assert image == {"tag": "i:1", "files": files}
    assert [line for line in instructions if line.startswith("FROM")] == ["FROM python:3.11-slim AS base"]
    assert instructions[-3].endswith("-c constraints.txt '.[data,tpu]'")
    assert instructions[-2:] == ['ENTRYPOINT ["python", "-m", "rahf.train"]', "CMD []"]
    for seed, job in enumerate((first, second)):
        flags = ["--config=configs/rahf_ci.py", f"--workdir=gs://b/run/seed={seed}", f"--config.seed={seed}"]
        assert job["job"] == flags
        amounts = sorted(job["needs"].values())
        assert amounts == [8, 96, 300 * 2**30]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--executor=local", "--workdir=r"], "--python: got none, expected it"),
        ([*VERTEX[:-1], "--requirements=a100=1"], "--image: got none, expected it"),
        ([*VERTEX, "--requirements=tpu_v3=128"], "launch/tpu_vm.py"),
        ([*VERTEX, "--requirements=a100"], "expected NAME=NUMBER"),
        ([*VERTEX, "--requirements=a100=1", "--workdir=r"], "expected gs://BUCKET/FOLDER"),
        (
            [*VERTEX, "--requirements=a100=1", "--sweep=optimizer.rate=1"],
            "--config.optimizer.rate: the config has no such key",
        ),
        ([*VERTEX, "--requirements=a100=1", "--sweep=seed=1,1"], "with distinct values"),
        ([*VERTEX, "--requirements=a100=1", "--sweep=seed=1", "--config.seed=2"], "got seed in --config.seed as well"),
        ([*VERTEX, "--requirements=a100=1", "--sweep=optimizer.freeze=('t5',),['t5',]"], "got 2 runs for 1 folders"),
    ],
)
def test_xmanager_refuses(xmanager, arguments, message):
    done = xmanager(*arguments, mock=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert '"tag"' not in done.stdout
