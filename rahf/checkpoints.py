"""Orbax checkpoints, from which a killed run resumes exactly. Damaged ones are detected.

    workdir/checkpoints/<step>/  the two latest training states (parameters, optimiser, EMA)
    workdir/best/<step>/         the parameters of the best periodic evaluation

Orbax commits a checkpoint whole or not at all, but TensorStore keeps no checksum of an array's bytes: a flipped byte is read
as another number. So each checkpoint's metadata has a digest of every array's values, and one of itself. Orbax also commits
what it could not merge, so a save counts when its metadata were read back.
"""

import contextlib
import functools
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from rahf import hosts
from richhf_data import paths
from richhf_data.errors import UserError

keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


class SaveError(hosts.EndNow):
    """A checkpoint did not reach the disk. The process must end at once: Orbax's threads would wait ten minutes."""


class Manager(ocp.CheckpointManager):
    """Orbax's manager, with what `save` has to check.

    Attributes:
      unread: the step that was saved and not read back yet.
      config: the content of the workdir's config.json when this was opened; None where there was none.
    """

    unread: int | None = None
    config: bytes | None = None


def check_path(workdir) -> None:
    """Refuses a workdir whose path Orbax would take for a pattern when it merges: it would find nothing, or another run."""
    if found := re.search(r"[*?[]", str(paths.absolute(workdir))):
        raise UserError(
            f"workdir: {paths.absolute(workdir)} has a {found[0]} in its path, expected none of * ? [ (Orbax takes a "
            "checkpoint's path for a pattern); take another --workdir, or a link to it"
        )


@contextlib.contextmanager
def manager(workdir, kind: str) -> Iterator[Manager]:
    """The Orbax manager of `checkpoints` (the two latest training states) or `best` (one set of parameters).

    Raises:
      SaveError: when it is left, a save that did not reach the disk.
    """
    keep = {"checkpoints": 2, "best": 1}[kind]
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    handlers = {"state": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
    folder = paths.absolute(workdir) / kind
    checkpoints = Manager(folder, options=options, item_handlers=handlers)
    checkpoints.config = _config(checkpoints)
    try:
        try:
            yield checkpoints
        except SystemExit:  # a signal: what was begun is still saved
            finish(checkpoints)
            raise
        finish(checkpoints)
    finally:
        with contextlib.suppress(Exception):  # it raises again what was raised above
            checkpoints.close()


def save(checkpoints: Manager, step: int, state, metadata: Mapping) -> None:
    """Starts writing `state` (a tree of arrays) and `metadata` (JSON) as `step`; returns before it is on disk, but on a CPU.

    Raises:
      SaveError: this save cannot begin, or the one before did not reach the disk; names the folder and the last good step.
        Or the workdir was removed, or holds another run.
    """
    metadata = {**metadata, "step": step, "digests": digests(state)}
    metadata["seal"] = _seal(metadata)
    if checkpoints.config is not None and _config(checkpoints) != checkpoints.config:
        raise SaveError(
            f"workdir: {checkpoints.directory.parent} was removed, or another run began there: its config.json is not this "
            f"run's. Step {step} is not saved. Put the folder back and give the same command again."
        )
    finish(checkpoints)
    checkpoints.unread = step
    with _clear_save_errors(checkpoints):
        checkpoints.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata))
        )
        if jax.default_backend() == "cpu":  # Orbax holds the state itself: the next step would need another one's memory
            checkpoints.wait_until_finished()


def _config(checkpoints: Manager) -> bytes | None:
    file = checkpoints.directory.parent / "config.json"
    return file.read_bytes() if file.exists() else None


def finish(checkpoints: Manager) -> None:
    """Waits for the last save and reads its metadata and its arrays' back."""
    with _clear_save_errors(checkpoints):
        checkpoints.wait_until_finished()
        step = checkpoints.unread
        if step is not None and read_metadata(checkpoints, step)["digests"].keys() != _shapes(checkpoints, step).keys():
            raise UserError(f"step {step} does not hold the arrays that were saved")
        checkpoints.unread = None


@contextlib.contextmanager
def _clear_save_errors(checkpoints: Manager):
    try:
        yield
    except Exception as error:
        checkpoints.reload()
        good = max((step for step in checkpoints.all_steps() if step != checkpoints.unread), default=None)
        kept = "No checkpoint is there yet" if good is None else f"The last good one is of step {good}, intact"
        raise SaveError(
            f"checkpoint: could not write to {checkpoints.directory}: {_reason(error)}\n"
            f"  {kept}. Make room, restore the right to write there, or raise the limit (ulimit -a), then give the same "
            "command again."
        ) from error


def _reason(error) -> str:
    """The first line of Orbax's and TensorStore's long errors, or of what they were raised from; its middle left out."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 400 else f"{line[:200]} ... {line[-200:]}"


def digests(tree) -> dict[str, int]:
    """A 32-bit digest of the bits of each array by name, the same on every mesh; it changes if any number changes."""
    # One at a time: on a CPU of many virtual devices, hundreds of collectives in flight can deadlock.
    return {keystr(path): int(_digest(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.jit  # one small program for each shape compiles much faster than one for the whole tree
def _digest(array):
    """The sum of a hash (MurmurHash3's finaliser) of each number's bits and position, whatever the order of summing."""
    array = jnp.asarray(array)
    width = array.dtype.itemsize
    if array.dtype == jnp.bool_:
        array, width = array.astype(jnp.uint8), 1
    bits = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width])
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    mixed = bits.astype(jnp.uint32) ^ (position * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> jnp.uint32(16)), dtype=jnp.uint32)


def _seal(metadata) -> int:
    content = {key: value for key, value in metadata.items() if key != "seal"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_metadata(checkpoints: ocp.CheckpointManager, step: int) -> dict:
    """The metadata that `save` stored with the state, with `step` and `digests`.

    Raises:
      UserError: it is not what was saved.
    """
    where = checkpoints.directory / str(step)
    try:
        metadata = checkpoints.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
    except Exception as error:
        raise UserError(f"checkpoint: {where} is damaged, its metadata cannot be read: {_reason(error)}") from error
    if not isinstance(metadata, dict) or metadata.get("seal") != _seal(metadata) or metadata["step"] != step:
        raise UserError(
            f"checkpoint: {where} is damaged: its metadata is not what was saved (or is that of a version of this code that "
            "kept no digests)"
        )
    return metadata


def restore(checkpoints: ocp.CheckpointManager, step: int, abstract_state):
    """The state saved as `step`, placed as `abstract_state` (ShapeDtypeStructs with shardings) says.

    Raises:
      UserError: the checkpoint does not read as it was saved; or it holds another architecture: names the first
        parameters that do not match.
    """
    where = checkpoints.directory / str(step)
    saved_digests = read_metadata(checkpoints, step)["digests"]
    wanted = {keystr(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state)}
    try:
        found = _shapes(checkpoints, step)
        if found == wanted:
            state = checkpoints.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            )["state"]
    except Exception as error:
        message = f"checkpoint: {where} is damaged, it cannot be read: {_reason(error)}"
        if jax.process_count() > 1:  # the others may have read their parts of it, and would wait for this process
            raise hosts.EndNow(
                f"{message}\n  Move that folder away, or give the command once on one host: it resumes from the one before."
            ) from error
        raise UserError(message) from error
    check_shapes(found, wanted, where)
    if wrong := [name for name, digest in digests(state).items() if digest != saved_digests.get(name)]:
        raise UserError(
            f"checkpoint: {where} is damaged: {len(wrong)} of {len(wanted)} arrays do not read as they were saved, the "
            f"first is {wrong[0]}"
        )
    return state


def _shapes(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, tuple[int, ...]]:
    """The arrays' shapes in a checkpoint, by name, as it says itself."""
    saved = checkpoints.item_metadata(step)["state"].tree
    return {keystr(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}


def restore_latest(checkpoints: ocp.CheckpointManager, abstract_state):
    """(state, metadata) of the newest training state that reads as it was saved; (None, None) where none was saved.

    A newer one that does not is set aside, with a warning. For the run that writes here: removes what it left half-written.

    Raises:
      UserError: none of those that were saved can be read.
    """
    _remove_half_written(checkpoints)
    failures = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            state = restore(checkpoints, step, abstract_state)
        except hosts.EndNow:
            raise
        except UserError as error:
            failures[step] = error
            continue
        for bad, error in failures.items():
            place, used = _set_aside(checkpoints, bad), checkpoints.directory / str(step)
            _warn(f"{error}\nGoing on from the one before, {used}. The damaged one is now {place}")
        return state, read_metadata(checkpoints, step)
    if failures:
        raise UserError(
            "\n  ".join(str(error) for error in failures.values())
            + f"\n  No training state is left in {checkpoints.directory}. Put a copy back, or train anew in another "
            "--workdir (what was evaluated as best may still be there to predict with)."
        )
    return None, None


def _remove_half_written(checkpoints) -> None:
    if jax.process_index() == 0 and checkpoints.directory.exists():  # in a bucket a folder without files is none
        for path in checkpoints.directory.iterdir():  # not `glob`, which takes the folder for a pattern too
            if path.name.endswith(".orbax-checkpoint-tmp"):
                path.rmtree()


def _set_aside(checkpoints, step) -> epath.Path:
    """Moves a step out of Orbax's sight, so that it can be saved again."""
    source, folder = checkpoints.directory / str(step), checkpoints.directory.parent / "damaged"
    place = folder / f"{checkpoints.directory.name}-{step}"
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        if place.exists():
            place.rmtree()
        source.rename(place)
    hosts.wait(f"set aside {place}")
    checkpoints.reload()
    return place


def _warn(message) -> None:
    if jax.process_index() == 0:
        print(f"\nWARNING: {message}\n", file=sys.stderr, flush=True)


def check_shapes(found: Mapping[str, tuple], wanted: Mapping[str, tuple], where) -> None:
    """Refuses parameters that are not the config's model's: UserError with the first names and both sides' shapes."""
    mismatches = [
        f"  {key}: the checkpoint has {found.get(key, 'nothing')}, the config's model {wanted.get(key, 'nothing')}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if mismatches:
        more = f"\n  and {len(mismatches) - 5} more" if len(mismatches) > 5 else ""
        raise UserError(
            f"checkpoint: {where} is of another architecture than the config:\n" + "\n".join(mismatches[:5]) + more
        )


def restore_params(workdir, abstract_params):
    """The parameters to predict with: those of the best evaluation so far.

    Raises:
      UserError: the workdir has no checkpoint, or one of another architecture.
    """
    with manager(workdir, "best") as best:
        return restore(best, best_step(best), abstract_params)


def best_step(best: ocp.CheckpointManager) -> int:
    """The step of the best evaluation so far. Raises UserError where there is none."""
    if (step := best.latest_step()) is None:
        raise UserError(
            f"workdir: {best.directory.parent} has no finished evaluation yet, expected a checkpoint in {best.directory}; "
            "go on training until step eval.every"
        )
    return step


def best_value(best: ocp.CheckpointManager, abstract_params) -> float | None:
    """The selection value that the kept best checkpoint was saved with; None when there is none to be read.

    For the run that writes here: sets aside a damaged one, removes what was left half-written.
    """
    _remove_half_written(best)
    step = best.latest_step()
    if step is None:
        return None
    try:
        restore(best, step, abstract_params)
        return read_metadata(best, step)["value"]
    except hosts.EndNow:
        raise
    except UserError as error:
        _warn(f"{error}\nThe next evaluation takes its place. The damaged one is now {_set_aside(best, step)}")
        return None
