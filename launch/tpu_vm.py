"""Trains on a TPU pod of Google Cloud, through gcloud.

    python -m launch.tpu_vm train --name=NAME --project=PROJECT --zone=ZONE --type=v3-128 --version=tpu-ubuntu2204-base \\
        --spot --workdir=gs://BUCKET/run -- --config=rahf_base --config.data.data_dir=gs://BUCKET/data

creates the queued resource, waits for it, installs the checked-out commit on every worker, starts rahf.train there, watches
it, creates the resource again after a preemption, and deletes it at the end. The same command, given again, attaches to a
running job or resumes from the workdir's last checkpoint. `create`, `setup`, `run`, `logs`, `status` and `delete` do one
step each. `--dry_run` prints the commands and runs none.

A worker's job is a detached session, so a dropped ssh does not end it. Its log, exit code and lock are in ~/rahf-job. Exit
codes of rahf.train: 0 finished, 75 (EX_TEMPFAIL) preempted and saved, any other an error.

The commands, their flags and the states follow Cloud SDK 528.0.0 (`lib/surface/compute/tpus/{queued_resources,tpu_vm}` and
the TPU API v2 messages): `queued-resources create`, `describe` and
`delete --force`; `tpu-vm describe`, `ssh --worker=all --command` (its exit status is non-zero if any worker's is) and `scp`;
CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDING, SUSPENDED, FAILED and DELETING of a queued
resource, with `stateInitiator`; READY, PREEMPTED and TERMINATED of its node. `ssh --output-directory` is not used: that
version writes to a folder named None. Not yet run on a real pod.
"""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

from richhf_data import command, ranges
from richhf_data.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
PREEMPTED = 75  # os.EX_TEMPFAIL
RETRIES = 3  # failed gcloud calls in a row, or restarts on one machine, before an error
LINGER = 10  # polls to wait for the other workers after one has ended
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING", "DELETING")
GONE = ("PREEMPTED", "TERMINATED")  # states of a node that never comes back

# (pattern in gcloud's message, what to do about it); the first match counts.
ADVICE = [
    (
        r"active account|gcloud auth|reauthentication|refreshing auth tokens|UNAUTHENTICATED|invalid_grant",
        "log in: gcloud auth login; on a machine without a person: gcloud auth activate-service-account --key-file=FILE",
    ),
    (
        r"SERVICE_DISABLED|has not been used in project|it is disabled",
        "enable the API: gcloud services enable tpu.googleapis.com --project={project}",
    ),
    (
        r"[Qq]uota|RESOURCE_EXHAUSTED",
        "ask for quota for {type} in {zone}, or choose another --zone, --type or --spot: "
        "https://console.cloud.google.com/iam-admin/quotas?project={project}",
    ),
    (
        r"ALREADY_EXISTS|already exists",
        "choose another --name, or see which resource has it: {describe}",
    ),
    (
        r"accelerator|locations?/|[Zz]one|INVALID_ARGUMENT|runtime version",
        "check --zone, --type and --version: gcloud compute tpus locations list --project={project}; "
        "gcloud compute tpus accelerator-types list --zone={zone} --project={project}; "
        "gcloud compute tpus tpu-vm versions list --zone={zone} --project={project}",
    ),
    (
        r"PERMISSION_DENIED|[Pp]ermission",
        "check --project, and that your account has roles/tpu.admin and roles/iam.serviceAccountUser there",
    ),
    (r"ssh-add", "give gcloud's key to the agent: ssh-add ~/.ssh/google_compute_engine"),
]

# ------------------------------------------------------------------------------------------- what runs on each worker

# The images have Python 3.10 and RAHF needs 3.11, which uv installs.
SETUP = """set -e
mkdir -p rahf-job
flock -n rahf-job/lock true || { echo "a job runs here: setup would replace its code" >&2; exit 1; }
rm -rf rahf rahf-job/exit rahf-job/pid
mkdir rahf
tar -xzf rahf.tar.gz -C rahf
cd rahf
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --python=3.11 .venv
~/.local/bin/uv pip install --quiet --python=.venv/bin/python -c constraints.txt -e '.[tpu,data]'"""

SETUP_T5X = f"""{SETUP}
~/.local/bin/uv pip install --quiet --no-deps --python=.venv/bin/python -r configs/t5x/requirements.txt"""

# The job inherits the lock, so it is held until the last process of the job ends. The job writes its pid after it has left
# the ssh's session. START waits for the pid: from then on, the end of the ssh cannot end the job.
START = """set -e
cd rahf
exec 9>>../rahf-job/lock
flock -n 9 || {{ echo "already running"; exit 0; }}
rm -f ../rahf-job/exit ../rahf-job/pid
touch ../rahf-job/log
PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1 setsid nohup bash -c {job} </dev/null >/dev/null 2>&1 &
for attempt in $(seq 100); do [ -s ../rahf-job/pid ] && exit 0; sleep 0.1; done
echo "the job did not start" >&2
exit 1"""
JOB = """echo $$ > ../rahf-job/pid
{command} >> ../rahf-job/log 2>&1
echo $? > ../rahf-job/exit.new
mv ../rahf-job/exit.new ../rahf-job/exit"""

STATE = """mkdir -p rahf-job; cd rahf-job
flock -n lock true; held=$?
if [ -f exit ]; then state="exit $(cat exit)"
elif [ $held != 0 ]; then state=running
elif [ -f pid ]; then state=died
else state=absent; fi
echo "rahf-job: $(hostname): $state: $(tail -c 400 log 2>/dev/null | tr '\\r' '\\n' | tail -n 1)" """

KILL = "cd rahf-job && { flock -n lock true || kill -KILL -- -$(cat pid); }"
FAILURES = '[ "$(cat rahf-job/exit)" = 0 ] || tail -n 20 rahf-job/log | sed "s/^/$(hostname): /"'


# ------------------------------------------------------------------------------------------------------------- gcloud


class CloudError(Exception):
    """A command failed. The message ends with what to do, if that is known."""

    def __init__(self, message: str, advice: str = ""):
        super().__init__(message + (f"\n  what to do: {advice}" if advice else ""))
        self.advice = advice


class Failure(CloudError):
    """An error that another attempt does not solve."""


class Pod:
    """One queued resource with one node of the same name; the methods are gcloud's commands."""

    def __init__(self, args):
        self.args = args
        self.where = [f"--zone={args.zone}", f"--project={args.project}"]
        self.logged = ""

    def log(self, text: str) -> None:
        """Prints the text, unless it was the last one printed."""
        if text != self.logged:
            print(text, flush=True)
        self.logged = text

    def command(self, group: str, verb: str, *arguments: str) -> list[str]:
        return ["gcloud", "compute", "tpus", group, verb, *arguments, *self.where]

    def create_command(self) -> list[str]:
        args = self.args
        options = [f"--node-id={args.name}", f"--accelerator-type={args.type}", f"--runtime-version={args.version}"]
        options += ["--spot"] if args.spot else []
        options += ["--internal-ips"] if args.internal_ips else []
        for name in ("network", "subnetwork", "service_account"):
            if value := getattr(args, name):
                options.append(f"--{name.replace('_', '-')}={value}")
        return self.command("queued-resources", "create", args.name, *options)

    def describe_command(self) -> list[str]:
        return self.command("queued-resources", "describe", self.args.name, "--format=json")

    def delete_command(self) -> list[str]:
        return self.command("queued-resources", "delete", self.args.name, "--force", "--quiet")

    def node_command(self) -> list[str]:
        return self.command("tpu-vm", "describe", self.args.name, "--format=json")

    def ssh_command(self, script: str, worker: str = "all") -> list[str]:
        internal = ["--internal-ip"] if self.args.internal_ips else []
        return self.command("tpu-vm", "ssh", self.args.name, f"--worker={worker}", *internal, f"--command={script}")

    def scp_command(self, path) -> list[str]:
        internal = ["--internal-ip"] if self.args.internal_ips else []
        return self.command("tpu-vm", "scp", str(path), f"{self.args.name}:", "--worker=all", *internal)

    def call(self, command: list[str]) -> str:
        """Runs `command`; returns its standard output.

        Raises:
          CloudError: it failed, with what it wrote and what to do.
        """
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL)
        except FileNotFoundError as error:
            raise CloudError(f"{command[0]}: not installed", "https://cloud.google.com/sdk/docs/install") from error
        if done.returncode == 0:
            return done.stdout
        message = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}")[-4000:]
        values = {"type": "this type", **vars(self.args), "describe": shlex.join(self.describe_command())}
        advice = next((text.format(**values) for pattern, text in ADVICE if re.search(pattern, message)), "")
        if "Attempting to connect" in message:  # the message is the worker's, not the cloud's
            advice = ""
        raise CloudError(f"{shlex.join(command[:5])}: {message}", advice)

    def left(self) -> str:
        """States which resource exists, with the command that deletes it."""
        name, delete = self.args.name, shlex.join(self.delete_command())
        try:
            state, _ = self.state()
        except CloudError:
            return f"{name} may exist. Check: {shlex.join(self.describe_command())}\nDelete: {delete}"
        if state == "ABSENT":
            return f"Nothing named {name} is left in {self.args.zone}."
        return f"{name} exists ({state}) and is paid for until it is deleted: {delete}"

    def state(self) -> tuple[str, dict]:
        """The queued resource's state ("ABSENT" if there is none) and gcloud's description of it."""
        try:
            found = json.loads(self.call(self.describe_command()))
        except CloudError as error:
            if "NOT_FOUND" in str(error):
                return "ABSENT", {}
            raise
        return found["state"]["state"], found

    def jobs(self) -> dict[str, str]:
        """host -> state of its job: "absent", "running", "died" or "exit N"; prints them if they changed."""
        lines = [
            line.split(": ", 3) for line in self.call(self.ssh_command(STATE)).splitlines() if line.startswith("rahf-job: ")
        ]
        if not lines:
            raise CloudError("ssh: no worker answered")
        self.log("\n".join(f"{host}: {state}: {last}".rstrip(": ") for _, host, state, last in sorted(lines)))
        return {host: state for _, host, state, _ in lines}


# -------------------------------------------------------------------------------------------------------------- steps


def commit() -> str:
    """The commit that is checked out.

    Raises:
      UserError: no git checkout, or tracked files that differ from the commit.
    """
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8")
    if head.returncode:
        raise UserError(
            f"{ROOT}: got no git checkout, expected one: the workers install a commit; clone the repository: "
            f"{head.stderr.strip()}"
        )
    changed = subprocess.run(
        [*git, "diff", "--name-only", "HEAD"], capture_output=True, encoding="utf-8", check=True
    ).stdout.split()
    if changed:
        raise UserError(
            f"uncommitted changes: got {', '.join(changed)}, expected none: the workers install a commit; commit or stash "
            "them"
        )
    return head.stdout.strip()


def archive_command(revision: str, path) -> list[str]:
    """Packs the tracked files of a commit."""
    return ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={path}", revision]


def setup_script(pod: Pod) -> str:
    """The script that installs the unpacked commit on a worker, with T5X where --t5x says so."""
    return SETUP_T5X if pod.args.t5x else SETUP


def start_script(command: list[str]) -> str:
    """The script that starts a command on a worker, detached from the ssh."""
    return START.format(job=shlex.quote(JOB.format(command=shlex.join(command))))


def create(pod: Pod) -> None:
    """Requests the resource and waits until it is active."""
    pod.call(pod.create_command())
    while (state := check(pod, *pod.state())) != "ACTIVE":
        if state in ("ABSENT", "SUSPENDED"):
            raise Failure(f"{pod.args.name}: {state} before it was ACTIVE")
        pod.log(f"{pod.args.name}: {state}")
        time.sleep(pod.args.poll)
    pod.log(f"{pod.args.name}: ACTIVE")


def check(pod: Pod, state: str, found: dict) -> str:
    """Returns `state` if the launcher can continue from it.

    Raises:
      Failure: the state is FAILED, a person suspended the resource, or the name belongs to another accelerator type.
    """
    details, name = found.get("state", {}), pod.args.name
    nodes = found.get("tpu", {}).get("nodeSpec", [])
    kinds = {node["node"]["acceleratorType"].split("/")[-1] for node in nodes if "acceleratorType" in node.get("node", {})}
    if kinds - {pod.args.type}:
        raise Failure(f"{name}: the name is in use by {', '.join(kinds)}, expected {pod.args.type}", "choose another --name")
    if state == "FAILED":
        message = details.get("failedData", {}).get("error", {}).get("message", "no reason given")
        quota = "quota" in message.lower()
        raise Failure(f"{name}: FAILED: {message}", ADVICE[2][1].format(**vars(pod.args)) if quota else "")
    if state.startswith("SUSPEND") and details.get("stateInitiator") == "USER":
        raise Failure(f"{name}: {state} by a person, not preempted", "delete it, then give the command again")
    return state


def setup(pod: Pod, revision: str) -> None:
    """Installs the commit `revision` on all workers."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rahf.tar.gz"
        pod.call(archive_command(revision, path))
        pod.call(pod.scp_command(path))
    pod.call(pod.ssh_command(setup_script(pod)))
    pod.log(f"{pod.args.name}: commit {revision[:12]} installed on all workers")


def run(pod: Pod, command: list[str]) -> None:
    """Starts `command` on all workers.

    Raises:
      UserError: a job runs already.
    """
    if "running" in pod.jobs().values():
        raise UserError(f"{pod.args.name}: a job runs already; follow it with `logs`, or end it with `delete`")
    pod.call(pod.ssh_command(start_script(command)))


def train(pod: Pod, command: list[str]) -> None:
    """Runs the training to its end, through preemptions.

    Each round reads the state of the cloud and does one next step, so it can continue where an earlier launcher ended.

    Raises:
      CloudError: the training failed, the cloud refused a command, or nothing answers.
    """
    revision, name = commit(), pod.args.name
    failures = restarts = lingered = preemptions = 0
    first = True  # a job that ended before this launcher started is started again
    while True:
        try:
            state, found = pod.state()
            check(pod, state, found)
            if state == "ACTIVE" and json.loads(pod.call(pod.node_command()))["state"] in GONE:
                state = "SUSPENDED"
            if state == "ABSENT":
                pod.log(f"{name}: creating {pod.args.type} in {pod.args.zone}")
                pod.call(pod.create_command())
            elif state in WAITING:
                pod.log(f"{name}: {state}")
            elif state == "SUSPENDED":
                preemptions, restarts, lingered = preemptions + 1, 0, 0
                pod.log(f"{name}: preempted (number {preemptions}); deleting it to create it again")
                pod.call(pod.delete_command())
                failures = 0
                continue
            elif state == "ACTIVE":
                jobs = set(pod.jobs().values())
                failed = jobs - {"absent", "running", "died", "exit 0", f"exit {PREEMPTED}"}
                if jobs == {"absent"} or (first and "running" not in jobs):
                    setup(pod, revision)
                    pod.call(pod.ssh_command(start_script(command)))
                elif jobs == {"exit 0"}:
                    print(f"{name}: training finished; {preemptions} preemptions")
                    return
                elif "absent" in jobs:  # an earlier start reached only some workers
                    pod.call(pod.ssh_command(start_script(command)))
                elif "running" in jobs and (jobs <= {"running", "exit 0"} or lingered < LINGER):
                    lingered = 0 if jobs <= {"running", "exit 0"} else lingered + 1
                elif jobs & {"died", f"exit {PREEMPTED}"}:
                    if restarts == RETRIES:
                        raise Failure(
                            f"{name}: training ended {restarts + 1} times on one machine without an error of its own"
                        )
                    restarts, lingered = restarts + 1, 0
                    pod.log(f"{name}: starting the training again (number {restarts})")
                    pod.call(pod.ssh_command(KILL))
                    pod.call(pod.ssh_command(start_script(command)))
                else:
                    print(pod.call(pod.ssh_command(FAILURES)))
                    pod.call(pod.ssh_command(KILL))
                    raise Failure(f"{name}: the training failed: {', '.join(sorted(failed or jobs))}")
                first = False
            else:
                raise Failure(f"{name}: unknown state {state}")
            failures = 0
        except Failure:
            raise
        except CloudError as error:
            failures += 1
            if error.advice or failures == RETRIES:
                raise
            print(f"{error}\n{name}: trying again", flush=True)
        time.sleep(pod.args.poll)


# ------------------------------------------------------------------------------------------------------- the command


def status(pod: Pod) -> None:
    """Prints the states of the resource, its node and each worker's job, with the last line of the job's log."""
    state, _ = pod.state()
    print(f"{pod.args.name}: {state}")
    if state == "ACTIVE":
        print(f"{pod.args.name}: node {json.loads(pod.call(pod.node_command()))['state']}")
        pod.jobs()


def plan(pod: Pod, verb: str, job: list[str]) -> list[list[str]]:
    """The commands that `verb` runs, each once, in the order of their first use."""
    describe, jobs = pod.describe_command(), pod.ssh_command(STATE)
    install = [archive_command("HEAD", "rahf.tar.gz"), pod.scp_command("rahf.tar.gz"), pod.ssh_command(setup_script(pod))]
    if verb == "create":
        return [pod.create_command(), describe]
    if verb == "train":
        start = [*install, pod.ssh_command(start_script(job))]
        return [describe, pod.create_command(), pod.node_command(), jobs, *start, pod.delete_command()]
    return {
        "setup": install,
        "run": [jobs, pod.ssh_command(start_script(job))],
        "logs": [logs_command(pod)],
        "status": [describe, pod.node_command(), jobs],
        "delete": [pod.delete_command()],
    }[verb]


def logs_command(pod: Pod) -> list[str]:
    """The command that prints or follows the log of a worker's job."""
    args = pod.args
    follow = ["-F"] if getattr(args, "follow", True) else []
    script = shlex.join(["tail", "-n", str(getattr(args, "lines", 100)), *follow, "rahf-job/log"])
    return pod.ssh_command(script, worker=getattr(args, "worker", "0"))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        command.fail(f"{message}; --help lists the flags")


def parse(argv: list[str]):
    """(the flags before `--`, the arguments after it)."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = _Parser("python -m launch.tpu_vm", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.set_defaults(t5x=False)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def add(verb, text):
        flags = verbs.add_parser(verb, allow_abbrev=False, help=text, description=text)
        flags.add_argument("--name", required=True, help="Name of the queued resource and of its node.")
        flags.add_argument("--project", required=True, help="Google Cloud project.")
        flags.add_argument("--zone", required=True, help="Zone, such as europe-west4-a.")
        flags.add_argument("--internal_ips", action="store_true", help="No external addresses; launch inside the network.")
        flags.add_argument("--dry_run", action="store_true", help="Print the commands, run none.")
        return flags

    for verb, text in [
        ("create", "Request the queued resource and wait until it is active."),
        ("train", "Create, set up, start rahf.train with the flags after `--`, watch, create again, delete."),
    ]:
        flags = add(verb, text)
        flags.add_argument("--type", required=True, help="Accelerator type, such as v3-128.")
        flags.add_argument("--version", required=True, help="Runtime version, such as tpu-ubuntu2204-base.")
        flags.add_argument("--spot", action="store_true", help="Cheaper, and may be preempted.")
        flags.add_argument("--network", help="Network of the node; gcloud's default if absent.")
        flags.add_argument("--subnetwork", help="Subnetwork of the node.")
        flags.add_argument("--service_account", help="Account of the workers; it needs access to the bucket.")
        seconds = ranges.argument(ranges.Range(0, 3600, without=(0,)))
        flags.add_argument("--poll", type=seconds, default=30, help="Seconds between two polls.")
        if verb == "train":
            flags.add_argument(
                "--workdir", required=True, help="gs://BUCKET/FOLDER: checkpoints and logs outlive the machines."
            )
            flags.add_argument("--keep", action="store_true", help="Do not delete the resource when training has finished.")
            flags.add_argument(
                "--t5x", action="store_true", help="Start T5X's trainer in place of rahf.train (docs/t5x.md)."
            )
    flags = add("setup", "Install the checked-out commit on all workers.")
    flags.add_argument("--t5x", action="store_true", help="Install T5X too (docs/t5x.md).")
    add("run", "Start the command after `--` on all workers, detached, in the code's folder.")
    flags = add("logs", "Follow the log of a worker.")
    flags.add_argument("--worker", default="0", help="Index of the worker.")
    flags.add_argument("--lines", type=ranges.argument(ranges.COUNT), default=100, help="Number of last lines to print.")
    flags.add_argument("--nofollow", dest="follow", action="store_false", help="Do not wait for more lines.")
    add("status", "Print the state of the resource and of the job on each worker.")
    add("delete", "Delete the resource and its node.")
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    args, job = parse(argv)
    pod = Pod(args)
    try:
        if args.verb in ("train", "run") and not job:
            raise UserError(f"{args.verb}: got no arguments after `--`, expected the flags of rahf.train or a command")
        if args.verb not in ("train", "run") and job:
            raise UserError(f"{args.verb}: got {shlex.join(job)} after `--`, expected nothing")
        if args.verb == "train":
            if not args.workdir.startswith("gs://"):
                raise UserError(
                    f"--workdir: got {args.workdir}, expected gs://BUCKET/FOLDER: a preempted machine loses its disk"
                )
            # JAX finds the other workers; T5X's flag has the name of its first use
            theirs = ["t5x.train", "--multiprocess_gpu", f"--gin.MODEL_DIR='{args.workdir}'"]
            job = ["python", "-m", *(theirs if args.t5x else ["rahf.train", f"--workdir={args.workdir}"]), *job]
        if args.dry_run:
            print("\n".join(shlex.join(command) for command in plan(pod, args.verb, job)))
        elif args.verb == "create":
            create(pod)
        elif args.verb == "setup":
            setup(pod, commit())
        elif args.verb == "run":
            run(pod, job)
        elif args.verb == "logs":
            return subprocess.call(logs_command(pod))
        elif args.verb == "status":
            status(pod)
        elif args.verb == "delete":
            pod.call(pod.delete_command())
            print(f"{args.name}: deleted")
        elif args.verb == "train":
            train(pod, job)
            if args.keep:
                print(pod.left())
            else:
                pod.call(pod.delete_command())
                print(f"{args.name}: deleted; the run is in {args.workdir}")
    except UserError as error:
        print(f"error: {command.printable(str(error))}", file=sys.stderr)
        return 2
    except CloudError as error:
        print(f"error: {command.printable(str(error))}\n{pod.left()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nwatching has ended, the job has not. {pod.left()}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
