"""The processes of a run: how they find each other, wait for each other, and end together.

One machine needs no flags. On a TPU pod, and under Slurm or Open MPI, JAX finds the other processes by itself. Elsewhere,
give the same command on every machine, each with its own --process_id:

    python -m rahf.train ... --coordinator=HOST:PORT --num_processes=2 --process_id=0       HOST is process 0's machine
    python -m rahf.train ... --coordinator=HOST:PORT --num_processes=2 --process_id=1
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import traceback

import jax
from absl import flags
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from richhf_data import command, paths, ranges
from richhf_data.errors import UserError

JOIN_SECONDS = 300  # how far apart the processes may start
HEARTBEAT_SECONDS = 100  # a process that is silent for so long counts as dead
LOST = (
    "If the log of another process says why it ended, mend that. Then give the same command again on all machines: "
    "training resumes from its last checkpoint."
)


ENDED = (
    "this process was killed from outside, or ended for want of memory (ulimit -a and dmesg show it). What it has finished "
    "is kept: give the same command again."
)


class EndNow(UserError):
    """An error after which the process must end at once: threads of libraries would keep it alive."""


def define_flags() -> None:
    """Defines the flags that tell a command about its other processes."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX does not find it by itself.")
    ranges.flag("num_processes", None, "The number of processes, one a machine; 1 = no others.", ranges.COUNT)
    ranges.flag("process_id", None, "The number of this process, from 0 on.", ranges.NUMBER)


@contextlib.contextmanager
def joined(preemptible: bool = False):
    """Runs a command's work as one process of its run.

    On several hosts an error ends the process at once, with a message that names it: JAX's own shutdown would wait for the
    other processes, and they for this one.

    Args:
      preemptible: on several hosts SIGTERM is a notice that the work itself checks (loop.py); else it ends the process.
    """
    jax.config.update("jax_enable_preemption_service", preemptible)
    sys.unraisablehook = _unraisable
    args = flags.FLAGS
    try:
        several = _join(args.coordinator, args.num_processes, args.process_id)
    except UserError as error:
        _end(error, command.USER_ERROR)
    if not several:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's preemption service has taken it over
        try:
            with _last_words(f"error: {ENDED}"):
                yield
        except EndNow as error:
            _end(error, command.USER_ERROR)
        return
    who = f"process {jax.process_index()} of {jax.process_count()}"
    with _last_words(f"error: {who}: killed, or ended by JAX because another process died. {LOST}") as silent:
        try:
            yield
            jax.distributed.shutdown()  # waits for the others
        except SystemExit:
            raise
        except BaseException as error:
            text, lost = command.message(error), ""
            if isinstance(error, jax.errors.JaxRuntimeError):
                text, lost = str(error).strip().partition("\n")[0][:400], f"\n  {LOST}"
            elif text is None:
                traceback.print_exc()
            silent()
            code = command.USER_ERROR if text and not lost else 1
            _end(f"{who}: {text or str(error) or type(error).__name__}{lost}", code)


def _unraisable(unraisable) -> None:
    """Python's own report, but for the hundreds of TensorStore's about the loop of a save that has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def locked(folder, name: str = paths.LOCK):
    """`paths.locked` on process 0, which holds the folder for all."""
    return paths.locked(folder, name) if jax.process_index() == 0 else contextlib.nullcontext()


def _end(message, code: int) -> None:
    """Ends this process at once, without waiting for threads or for other processes."""
    sys.stdout.flush()
    print(f"error: {command.printable(str(message))}", file=sys.stderr, flush=True)
    os._exit(code)


@contextlib.contextmanager
def _last_words(message: str):
    """A child process prints `message` if this process dies inside: JAX's client may end it from C++, by SIGABRT.

    Yields a function that tells the child to stay silent.
    """
    child = subprocess.Popen(
        ["sh", "-c", 'read line || echo "$0" >&2', message], stdin=subprocess.PIPE, start_new_session=True
    )

    def silent():
        with contextlib.suppress(BrokenPipeError, ValueError):
            child.communicate(b"\n")

    try:
        yield silent
    finally:
        silent()


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Joins the run's other processes and waits for all of them; returns whether there are any. Call it before JAX has
    looked for devices.

    Raises:
      UserError: arguments that do not fit together; or the others do not answer.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if num_processes == 1 and not process_id:
        return False
    asked = {"initialization_timeout": JOIN_SECONDS, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    who = "the coordinator that JAX found (--num_processes=1 goes alone)"
    if any(value is not None for value in given.values()):
        if missing := [f"--{name}" for name, value in given.items() if value is None]:
            raise UserError(f"{', '.join(missing)}: got nothing, expected --coordinator, --num_processes and --process_id")
        if process_id >= num_processes:
            raise UserError(f"--process_id: got {process_id}, expected 0 to {num_processes - 1}, below --num_processes")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator: got {coordinator!r}, expected HOST:PORT of process 0, such as 10.0.0.1:8476")
        asked |= {"coordinator_address": coordinator, "cluster_detection_method": "deactivate"} | {
            name: given[name] for name in ("num_processes", "process_id")
        }
        who = f"--coordinator={coordinator}"
    problem = (
        f"{who}: not all processes came together in {JOIN_SECONDS} s; expected the same command on every machine, each with "
        "its own --process_id, and process 0's port open to the others"
    )
    with _last_words(f"error: {problem}"):
        try:
            jax.distributed.initialize(**asked)
        except Exception as error:  # XLA raises several kinds
            if "coordinator_address should be defined" in str(error):
                return False  # no cluster that JAX knows: one machine
            reason, *_ = str(error).partition("\n")
            raise UserError(f"{problem} ({reason[:200]})") from error
    return jax.process_count() > 1


def agreed(values):
    """What process 0 has, for all of them: a tree of arrays. Every process must call it."""
    return multihost_utils.broadcast_one_to_all(values) if jax.process_count() > 1 else values


def wait(what: str, seconds: int | None = None) -> None:
    """Waits until every process has come here. Each `what` can be waited for once in a run.

    Args:
      seconds: the longest wait for the last one; 5 minutes by default.
    """
    multihost.sync_global_processes(what, timeout=seconds, processes=set(range(jax.process_count())))
