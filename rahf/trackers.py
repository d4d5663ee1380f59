"""Where a run's numbers and pictures go: TensorBoard's files, always, and a tracker that `config.tracker` names.

    --config.tracker=wandb:PROJECT      Weights & Biases
    --config.tracker=trackio:PROJECT    trackio

Process 0 writes. All starts of a run have one name there, which workdir/tracker.json keeps. After a kill, the steps since
the last checkpoint are logged again, with the same values. What fails at a tracker is printed, and never ends a run.
"""

import contextlib
import dataclasses
import importlib
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated

import jax
import numpy as np
import tensorboardX
from etils import epath

from rahf import event_files
from richhf_data import json_files, paths
from richhf_data.errors import UserError
from richhf_data.ranges import Range

TENSORBOARD, WANDB, TRACKIO = "tensorboard", "wandb", "trackio"
UPLOAD_SECONDS = 30  # that the end of a run waits for wandb; trackio waits as long


class Writer:
    """Writes to TensorBoard, and to the tracker if there is one."""

    def __init__(self, tensorboard: tensorboardX.SummaryWriter, tracker: "Tracker | None"):
        self._tensorboard, self._tracker = tensorboard, tracker

    def scalars(self, section: str, values: Mapping[str, float], step: int) -> None:
        """Writes numbers as SECTION/NAME."""
        values = {f"{section}/{name}": float(value) for name, value in values.items()}
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._tracker and values:
            self._tracker.log(values, step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Writes a picture, uint8[H, W, 3]."""
        self._tensorboard.add_image(name, image, step, dataformats="HWC")
        if self._tracker:
            self._tracker.log({name: image}, step)


@contextlib.contextmanager
def opened(workdir: epath.Path, config, step: int = 0) -> Iterator[Writer]:
    """The writer of a run that begins or goes on at a step; in processes other than 0, it writes nothing.

    Raises:
      UserError: as `check`; Weights & Biases without an API key.
    """
    writes, tracker = jax.process_index() == 0, None
    check(config)
    with contextlib.ExitStack() as stack:
        if writes and _of(config) != TENSORBOARD:
            tracker = stack.enter_context(Tracker(workdir, config))
        end = f".{secrets.token_hex(8)}"  # of the file's name, so that no link can lie in wait for it
        with paths.naming("/dev/shm"):  # its queue has semaphores
            summaries = tensorboardX.SummaryWriter(
                event_files.address(workdir / "tensorboard"),
                purge_step=step or None,
                write_to_disk=writes,
                filename_suffix=end,
            )
        yield Writer(stack.enter_context(summaries), tracker)


def check(config) -> None:
    """Refuses a tracker that is unknown or whose package is not installed: UserError. No key means TensorBoard alone."""
    tracker = _of(config)
    if not re.fullmatch(rf"{TENSORBOARD}|({WANDB}|{TRACKIO}):[\w.-]{{1,100}}", tracker):
        raise UserError(
            f"tracker: got {tracker!r}, expected {TENSORBOARD}, {WANDB}:PROJECT or {TRACKIO}:PROJECT; PROJECT has up to 100 "
            "letters, digits, dots, _ and -"
        )
    if tracker != TENSORBOARD:
        _module(tracker.partition(":")[0])


def _of(config) -> str:
    return str(config.get("tracker", TENSORBOARD))


def _module(name: str):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name
    else:
        missing = None if hasattr(module, "init") else name  # a folder of the name `wandb` imports as an empty package
    if missing:
        raise UserError(
            f"tracker: {name} needs the package {missing}, which is not installed; pip install 'rahf[trackers]' installs "
            f"it, or log to TensorBoard alone: --config.tracker={TENSORBOARD}"
        )
    return module


@dataclasses.dataclass(frozen=True)
class Identity:
    """tracker.json: what all starts of a run are called at a tracker."""

    run: Annotated[str, Range(1, 64)]


def name_of(workdir: epath.Path) -> str:
    """The name of a workdir's run: the folder's and four random bytes, drawn at its first start."""
    file = workdir / "tracker.json"
    if not file.exists():
        folder = re.sub(r"[^\w.-]", "-", workdir.name)[:50]
        json_files.write(file, {"run": f"{folder}-{secrets.token_hex(4)}"})
    return json_files.read_as(Identity, file).run


class Tracker:
    """A run at Weights & Biases or trackio. What fails there is printed once, and ends nothing."""

    def __init__(self, workdir: epath.Path, config):
        self._name, _, project = _of(config).partition(":")
        self._module, self._run, self._told = _module(self._name), None, False
        values = config.copy_and_resolve_references().to_dict()
        start = self._start_wandb if self._name == WANDB else self._start_trackio
        with self._telling():
            self._run = start(project, name_of(workdir), values, workdir)

    def _start_trackio(self, project: str, name: str, values: dict, workdir):
        return self._module.init(project=project, name=name, config=values, resume="allow", embed=False)

    def _start_wandb(self, project: str, name: str, values: dict, workdir):
        wandb = self._module
        options = {"project": project, "id": name, "name": name, "config": values}
        options |= {"resume": "allow", "allow_val_change": True}
        options["settings"] = {"reinit": "create_new", "finish_timeout": UPLOAD_SECONDS}
        if "://" not in str(workdir) and "WANDB_DIR" not in os.environ:
            options["dir"] = str(workdir)
        try:
            run = wandb.init(**options)
        except wandb.errors.UsageError as error:
            hint = f"wandb login, WANDB_MODE=offline, or --config.tracker={TENSORBOARD}"
            raise UserError(f"tracker: Weights & Biases got wrong settings: {error}; {hint}") from error
        except Exception as error:
            wandb.teardown()  # it still has a run of this name
            run = wandb.init(**options, mode="offline")
            self._tell(f"not reached; the run goes into {os.path.dirname(run.dir)}, which `wandb sync` sends", error)
        # wandb's own steps only rise, and a resumed run goes back: "step" is the axis of all charts.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def log(self, values: Mapping[str, float | np.ndarray], step: int) -> None:
        """Logs numbers and pictures, uint8[H, W, 3], of a step."""
        if self._run is None:
            return
        with self._telling():
            values = {key: self._module.Image(x) if isinstance(x, np.ndarray) else x for key, x in values.items()}
            if self._name == WANDB:
                self._run.log(values | {"step": step})
            else:
                self._run.log(values, step=step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._run is None:
            return
        with self._telling():
            if self._name == WANDB:
                self._run.finish(exit_code=int(kind is not None))
            else:
                self._run.finish()

    @contextlib.contextmanager
    def _telling(self):
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of a network, a server, a disk: each library has its own
            self._tell("not everything is logged there; TensorBoard has it", error)

    def _tell(self, text: str, error: Exception) -> None:
        if not self._told:
            reason = str(error).partition("\n")[0]
            print(f"WARNING: {self._name}: {text}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        self._told = True
