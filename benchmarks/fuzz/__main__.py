"""Broken, hostile and unusual inputs at every door: is each refused with a reason, or read as it should be?

    python -m benchmarks.fuzz --minutes=10 --seed=0 --output=DIR
    python -m benchmarks.fuzz --case=ID --seed=0 --output=DIR       one case again, with all that it prints

A case is a door (doors.py) with one thing changed (mutators.py): a file, the name of its folder, or a flag. Seed, door and
number decide it. It runs in a process of its own, forked from one that has imported everything and touched no device, with
a limit of time and of memory. The verdicts:

    ok        exit code 0, and the output is whole and valid; equal to the good input's where the change means nothing
    refused   exit code 2 and one line `error: ...`; or the exit code for an input of which a part was left out
    FAULT     a traceback, a hang, a signal, too much memory, another exit code, code of the input was run, or exit code 0
              with an output that is missing or wrong

Prints a table of the kinds of changes and the doors, and the faults. DIR/results.jsonl has every case, DIR/faults/ID the
inputs and outputs of those that fell short. The exit code is 1 where there are some.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

import jax
import psutil
import tabulate
from absl import flags

from benchmarks.fuzz import doors, mutators
from richhf_data import command, ranges
from richhf_data.errors import UserError

SECONDS, GIB = 60, 4  # the limits of a case
ERROR = re.compile(r"^error: .{8,}", re.MULTILINE)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
THEIRS = frozenset(flags.FLAGS)  # flags of libraries
EVIL = f"open({mutators.MARKER!r}, 'w')\n\n\nclass Evil:\n    pass\n"


@dataclasses.dataclass(frozen=True)
class Case:
    """A door with one thing changed.

    Attributes:
      name: the door's and a number; with the seed, it decides everything. door: of `DOORS`.
      kind: the row of the table. what: what was done. folder: where it runs.
      arguments: of a command. same: whether the result must equal the good input's.
    """

    name: str
    door: doors.Door
    kind: str
    what: str
    folder: pathlib.Path
    input: str
    output: str
    arguments: tuple[str, ...] = ()
    same: bool = False


# ---- Cases ----------------------------------------------------------------------------------------------------------
def slug(door: doors.Door) -> str:
    """The door's name in a case's name."""
    return re.sub(r"\W+", "_", door.name)


@functools.cache
def changes(door: doors.Door, good: pathlib.Path, seed: int) -> list[tuple]:
    """Everything that can be changed of a door's input, in an order in which the kinds take turns.

    Each is a mutator and a file, ("path",), or ("flag", name, text).
    """
    rng = random.Random(f"{seed} {door.name}")
    files = sorted(path.relative_to(good) for path in good.glob(door.files) if path.is_file()) if door.files else []
    groups = collections.defaultdict(list)
    for file in files:
        for place, mutator in enumerate(mutators.ALL):
            if mutator.suffixes is None or mutator.suffixes & {file.suffix, file.name}:
                groups[place].append((mutator, file))
    if door.files:
        groups["path"] = [("path",)] * 4
    for name in door.flags:
        groups[f"flag {name}"] = [("flag", name, text) for text in mutators.FLAGS]
    for group in groups.values():
        rng.shuffle(group)
    order = list(groups.values())
    rng.shuffle(order)
    return [group[i] for i in range(max(map(len, order))) for group in order if i < len(group)]


def case_of(door: doors.Door, good: pathlib.Path, number: int | None, seed: int, cases: pathlib.Path) -> Case:
    """Makes case number `number` of a door in a folder of its own; without a number, the good input."""
    name = f"{slug(door)}-{'good' if number is None else number}"
    folder = cases / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder / "input")
    (folder / "evil.py").write_text(EVIL, encoding="utf-8")
    made = Case(name, door, "good", "nothing", folder, "input", "output", same=True)
    if number is None:
        return made
    rng, options = random.Random(f"{seed} {name}"), changes(door, good, seed)
    option = options[number % len(options)]
    if option[0] == "path":
        renamed, output = mutators.rename(rng, folder / "input").name, rng.choice(mutators.PATHS) + ".out"
        what = f"input {renamed!r}, output {output!r}"
        return dataclasses.replace(made, kind="names of folders", what=what, input=renamed, output=output)
    if option[0] == "flag":
        argument = f"--{option[1]}={option[2]}"
        return dataclasses.replace(made, kind="flags", what=argument, arguments=(argument,), same=False)
    mutator, file = option
    done = mutator.change(rng, folder / "input" / file)
    return dataclasses.replace(made, kind=mutator.kind, what=f"{file}: {done}", same=mutator.same)


# ---- Processes ------------------------------------------------------------------------------------------------------
def forked(work: Callable[[], object], folder: pathlib.Path) -> int:
    """Starts `work` in a child whose output goes to files of `folder`; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX has threads, but none that a child needs
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
            os.dup2(os.open(folder / name, mode | os.O_CREAT, 0o644), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        warnings.simplefilter("ignore")
        code = _code_of(work)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _code_of(work) -> int:
    """Runs `work` as command.py runs a command: 0, 2 and an `error:` line for what the user can mend, else 1."""
    try:
        work()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except (UserError, OSError) as error:
        if (text := command.message(error)) is not None:
            print(f"error: {text}", file=sys.stderr)
            return command.USER_ERROR
        traceback.print_exc()
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(case: Case) -> None:
    """In the child: passes the door, then writes the checked result into result.json."""
    if callable(case.door.call):
        result = case.door.call(pathlib.Path(case.input))
    else:
        module, *arguments = (text.format(input=case.input, output=case.output) for text in case.door.call)
        for name in list(flags.FLAGS):
            if name not in THEIRS:
                delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        sys.argv = [module, *arguments, *case.arguments]
        sys.path.insert(0, "")  # as `python -m` has it
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            if error.code:
                raise
        result = case.door.result(pathlib.Path(case.output))
    pathlib.Path("result.json").write_text(json.dumps(result), encoding="utf-8")


def verdict(case: Case, status: int, ended: str | None, good) -> tuple[str, str]:
    """("ok", "refused" or "FAULT", why), of a child's exit status.

    Args:
      ended: why it was killed, if it was. good: the result of the good input.
    """
    errors = (case.folder / "stderr").read_text(encoding="utf-8", errors="replace")
    if (case.folder / mutators.MARKER).exists():
        return "FAULT", "code of the input was run"
    if ended:
        return "FAULT", ended
    if os.WIFSIGNALED(status):
        return "FAULT", f"signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    if "Traceback (most recent call last)" in errors:
        return "FAULT", f"traceback: {errors.strip().splitlines()[-1][:160]}"
    if code == command.USER_ERROR:
        lines = ERROR.findall(errors)
        if len(lines) != 1:
            return "FAULT", f"exit code 2 with {len(lines)} lines `error: ...`"
        return ("FAULT", "control characters in the error") if CONTROL.search(lines[0]) else ("refused", lines[0][:300])
    if code and code == case.door.left_out:
        return "refused", f"in part: exit code {code}"
    if code:
        return "FAULT", f"exit code {code}"
    result = json.loads((case.folder / "result.json").read_bytes())
    if case.same and good is not None and result != good:
        return "FAULT", "exit code 0, and another result than the good input's"
    return "ok", ""


@dataclasses.dataclass
class Running:
    """A case in its process."""

    case: Case
    pid: int
    began: float
    limit: float  # seconds

    def ended(self) -> tuple[int, str | None] | None:
        """(exit status, why it was killed), or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self._kill()  # what it left behind
            return status, None
        why = f"no end within {self.limit} s" if time.monotonic() - self.began > self.limit else None
        with contextlib.suppress(psutil.Error):
            child = psutil.Process(self.pid)
            used = sum(process.memory_info().rss for process in (child, *child.children(recursive=True)))
            why = f"more than {GIB} GiB of memory" if used > GIB << 30 else why
        if why is None:
            return None
        self._kill()
        return os.waitpid(self.pid, 0)[1], why

    def _kill(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


# ---- The command ----------------------------------------------------------------------------------------------------
def good_inputs(chosen: list[doors.Door], folder: pathlib.Path) -> None:
    """Makes the doors' good inputs, each in a child, since they need devices."""
    for door in chosen:
        place = folder / slug(door)
        if place.exists():
            continue
        logs = folder / f"{slug(door)}.logs"
        logs.mkdir(parents=True, exist_ok=True)
        place.mkdir()
        if os.waitpid(forked(lambda door=door, place=place: door.make(place), logs), 0)[1]:
            shutil.rmtree(place)
            said = (logs / "stderr").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the good input of {door.name} was not made:\n{said}")


def run_all(cases: Iterator[Case], limit: float) -> Iterator[tuple[Case, int, str | None, float]]:
    """Runs cases, as many at once as there are cores; yields each with its exit status, why it was killed, its seconds."""
    running = []
    while True:
        while len(running) < os.cpu_count() and (case := next(cases, None)) is not None:
            running.append(Running(case, forked(lambda case=case: run(case), case.folder), time.monotonic(), limit))
        if not running:
            return
        time.sleep(0.02)
        for one in list(running):
            if (ended := one.ended()) is not None:
                running.remove(one)
                yield one.case, *ended, time.monotonic() - one.began


def fuzz(chosen: list[doors.Door], output: pathlib.Path, seed: int, seconds: float, only: int | None = None) -> list[dict]:
    """Runs the good inputs, then cases until `seconds` have passed; returns a row of results.jsonl for each.

    The good inputs compile what the others need. Of the doors, the one that had the least time for its share is next.

    Args:
      only: the number of the one case to run.
    """
    good_inputs(chosen, output / "good")
    spent, results, rows = dict.fromkeys((door.name for door in chosen), 0.0), {}, []

    def case(door, number):
        return case_of(door, output / "good" / slug(door), number, seed, output / "cases")

    def cases():
        if only is not None:
            yield case(chosen[0], only)
            return
        counts, end = collections.Counter(), time.monotonic() + seconds
        while time.monotonic() < end:
            door = min(chosen, key=lambda door: spent[door.name] / door.share)
            spent[door.name] += 0.05  # while it runs
            counts[door.name] += 1
            yield case(door, counts[door.name] - 1)

    def record(case, status, ended, took):
        found, why = verdict(case, status, ended, results.get(case.door.name))
        if case.kind == "good" and found == "ok":
            results[case.door.name] = json.loads((case.folder / "result.json").read_bytes())
        elif case.kind == "good":
            found, why = "FAULT", f"the good input: {found}: {why}"
        else:
            spent[case.door.name] += took
        row = {"case": case.name, "door": case.door.name, "group": case.door.group, "kind": case.kind}
        rows.append(row | {"what": case.what, "verdict": found, "why": why, "seconds": round(took, 2)})
        with (output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        if found == "FAULT":
            print(f"FAULT {case.name}: {case.what}: {why}", flush=True)
            shutil.rmtree(output / "faults" / case.name, ignore_errors=True)
            shutil.copytree(case.folder, output / "faults" / case.name, symlinks=True, ignore=_special)
        if only is None:
            shutil.rmtree(case.folder, ignore_errors=True)

    for done in run_all((case(door, None) for door in chosen), 5 * SECONDS):
        record(*done)
    for done in run_all(cases(), SECONDS):
        record(*done)
    return rows


def _special(folder, names):
    places = {name: pathlib.Path(folder, name) for name in names}
    return [name for name, path in places.items() if not (path.is_symlink() or path.is_file() or path.is_dir())]


def table(rows: list[dict]) -> str:
    """Counts of inputs, by the kind of change and the doors' group; faults in brackets."""
    groups = list(dict.fromkeys(door.group for door in doors.DOORS))
    counts = collections.Counter((row["kind"], row["group"]) for row in rows)
    faults = collections.Counter((row["kind"], row["group"]) for row in rows if row["verdict"] == "FAULT")
    lines = []
    for kind in dict.fromkeys(["good", *sorted({row["kind"] for row in rows})]):
        cells = {group: f"{counts[kind, group] or ''}{f' ({n})' if (n := faults[kind, group]) else ''}" for group in groups}
        of_kind = collections.Counter(row["verdict"] for row in rows if row["kind"] == kind)
        lines.append({"input": kind} | cells | {name: of_kind[name] for name in ("ok", "refused", "FAULT")})
    of_all = collections.Counter(row["verdict"] for row in rows)
    sums = {group: sum(row["group"] == group for row in rows) for group in groups}
    lines.append({"input": f"all {len(rows)}"} | sums | {name: of_all[name] for name in ("ok", "refused", "FAULT")})
    return tabulate.tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def main():
    """The command."""
    args = flags.FLAGS
    output = pathlib.Path(args.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "XLA_FLAGS": doors.quick_xla.FLAGS}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(output / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    chosen, only = doors.DOORS, None
    if args.case:
        name, _, number = args.case.rpartition("-")
        chosen, only = [door for door in doors.DOORS if slug(door) == name], number.isdecimal() and int(number)
        if not chosen or only is False:
            known = ", ".join(map(slug, doors.DOORS))
            raise UserError(f"--case: got {args.case}, expected DOOR-NUMBER with a door of {known}")
    for module in ("richhf_data.tasks", "rahf.features", *(door.call[0] for door in chosen if not callable(door.call))):
        importlib.import_module(module)  # once for all cases
    rows = fuzz(chosen, output, args.seed, 60 * args.minutes, only)
    if args.case:
        print((output / "cases" / args.case / "stdout").read_text(encoding="utf-8", errors="replace"))
        print((output / "cases" / args.case / "stderr").read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
        print(json.dumps(rows[-1], indent=2))
    else:
        print(table(rows))
    raise SystemExit(any(row["verdict"] == "FAULT" for row in rows))


if __name__ == "__main__":
    ranges.flag("minutes", 10.0, "How long to go on.", ranges.Range(0, 10_000, without=(0,)))
    ranges.flag("seed", 0, "Decides what is changed, and how.", ranges.SEED)
    flags.DEFINE_string("output", None, "The folder for the results and the faults.")
    flags.DEFINE_string("case", None, "Run one case alone and print what it prints.")
    flags.mark_flag_as_required("output")
    command.run(main)
