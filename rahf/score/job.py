"""The loop over the pictures of a scoring job, and the summary at its end."""

import contextlib
import dataclasses
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from tqdm.auto import tqdm

from rahf import partitioning, predictor
from rahf.reward import specs
from rahf.score import parts, workers
from richhf_data import input_files, parquet, paths
from richhf_data.errors import UserError

WEEK = 7 * 24 * 3600  # the longest that a host waits for the others


def reward_specs(given: Sequence[str]) -> dict[str, str]:
    """name of a column -> spec, see `specs.named`. Raises UserError for two of one name, or one of another column."""
    taken = parts.Job("", "", "", 1, 1, False, heatmaps=True, deviations=True).schema().names
    return specs.named(given, taken)


def load_rewards(of: Mapping[str, str]) -> dict[str, Callable]:
    """name -> reward, of name -> spec. Raises UserError as `specs.reward_of`."""
    return {name: specs.reward_of(spec) for name, spec in of.items()}


def job_of(
    model: predictor.Model,
    output,
    rewards: Mapping[str, Callable],
    reward_specs: Mapping[str, str],
    batch_size: int,
    heatmaps: bool = False,
    strict: bool = False,
) -> parts.Job:
    """The job of a model and rewards.

    Raises:
      UserError: a reward without an identity, whose parts could not be told from another's; heatmaps of a model without.
    """
    identities = {name: specs.identity_of(reward, f"reward {name}") for name, reward in rewards.items()}
    for name, identity in identities.items():
        if identity is None:
            raise UserError(
                f"reward: {reward_specs[name]} has no identity, by which a part is known to be of this reward; give it the "
                "attribute identity, a text that changes with the reward"
            )
    if heatmaps:
        model.require("heatmaps", "heatmaps")
    return parts.Job(
        output=str(output) if "://" in str(output) else os.path.abspath(output),
        model=model.identity,
        vocabulary=model.vocabulary.path,
        image_size=model.model_config.image_size,
        batch_size=batch_size,
        truncates=model.truncates,
        rewards=tuple((name, reward_specs[name], identities[name]) for name in rewards),
        heatmaps=heatmaps,
        strict=strict,
        deviations=model.model_config.deviations,
    )


def on_own_devices(model: predictor.Model) -> predictor.Model:
    """A model that predicts on this process's devices alone; without other processes, the same."""
    if jax.process_count() == 1:
        return model
    own = predictor.Predictor(model.config, model.vocabulary, partitioning.make_mesh(devices=jax.local_devices()))
    held = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), model.params)  # every device holds all
    return predictor.Model(own, jax.device_put(held, jax.tree.map(lambda leaf: leaf.sharding, own.params)))


def rewards_on_own_devices(rewards: Mapping[str, Callable]) -> None:
    """Lets rewards compute on this process's devices alone."""
    if jax.process_count() > 1:
        jax.config.update("jax_default_device", jax.local_devices()[0])
        for reward in rewards.values():
            for _, member in getattr(reward, "members", [("", reward)]):
                if isinstance(member, specs.ScoreReward):
                    member.model = on_own_devices(member.model)


def predict(
    model: predictor.Model, rewards: Mapping[str, Callable], job: parts.Job, batches: Iterable[tuple]
) -> Iterator[tuple]:
    """Yields (key, time, predictions) of each (key, batch). A batch None has the predictions None.

    The time, of `time.perf_counter`, is when the batch was handed to the devices. Every batch is filled up to
    `job.batch_size` rows: one program computes all, so that a row's last bit depends on nothing but its batch. Batches are
    read and handed to the devices ahead of the results.
    """

    def prepared():
        for key, batch in batches:
            if batch is None:
                yield (key, time.perf_counter(), None, None), []
                continue
            faults, rows = dict(batch.faults), {}
            for row, picture in batch.pictures.items():
                try:
                    rows[row] = {"image": picture, **model.text(batch.prompts[row]), "name": batch.names[row]}
                except UserError as error:
                    faults[row] = str(error)
            values = _rewarded(rewards, job.batch_size, batch, rows, faults)
            if job.strict and faults:
                row = min(faults)
                raise UserError(f"{batch.names[row]}: {faults[row]}")
            good = list(rows.values())
            yield (key, time.perf_counter(), faults, values), good + good[-1:] * (job.batch_size - len(good))

    with contextlib.closing(model.predict_batches(prepared(), job.batch_size)) as results:
        for (key, handed, faults, values), rows in results:
            yield key, handed, None if faults is None else _predictions(job, faults, values, rows)


def _rewarded(rewards: Mapping[str, Callable], size: int, batch: parts.Batch, rows: dict, faults: dict) -> np.ndarray:
    """float32[n, rewards] of the rows, in batches of `size`. One that a reward refuses goes from `rows` to `faults`."""
    values = {row: [] for row in rows}
    for name, reward in rewards.items():

        def rewarded(places, count, reward=reward):
            """float32[n]; computed as a batch of `count`, so that a reward compiles one program."""
            filled = [*places, *places[-1:] * (count - len(places))]
            images, prompts = [batch.originals[row] for row in filled], [batch.prompts[row] for row in filled]
            return specs.checked(reward, images, prompts)[: len(places)] if places else ()

        try:
            found = rewarded(list(rows), size)
        except UserError:
            found = []
            for row in list(rows):
                try:
                    found += rewarded([row], 1).tolist()
                except UserError as error:
                    faults[row] = f"reward {name}: {error}"
                    del rows[row], values[row]
            if not rows:
                warnings.warn(f"reward {name} refused all pictures of a batch; see the column error", stacklevel=1)
        for row, value in zip(rows, found, strict=True):
            values[row].append(value)
    return np.array(list(values.values()), np.float32).reshape(len(rows), len(rewards))


def _predictions(job: parts.Job, faults: dict[int, str], rewards: np.ndarray, rows: Sequence[dict]) -> parts.Predictions:
    rows = rows[: len(rewards)]  # the others filled up the batch

    def column(name):
        return None if not rows or rows[0][name] is None else [row[name] for row in rows]

    scores, heatmaps = column("scores"), column("heatmaps") if job.heatmaps else None
    deviations = column("deviations") if job.deviations else None
    return parts.Predictions(
        faults=faults,
        scores=None if scores is None else np.stack(scores),
        labelled=column("labelled_prompt"),
        heatmaps=None if heatmaps is None else np.round(np.stack(heatmaps) * 255).astype(np.uint8),
        rewards=rewards,
        deviations=None if deviations is None else np.stack(deviations),
    )


@dataclasses.dataclass
class _Clock:
    """When batches are handed to the devices and come back. Starts with the first result: the program is compiled then.

    Attributes:
      images: that came back. busy: seconds with a batch of the critic at the devices.
    """

    images: int = 0
    busy: float = 0.0
    first: float | None = None
    last: float = 0.0

    def back(self, handed: float, images: int) -> None:
        now = time.perf_counter()
        if self.first is None:
            self.first = now
        else:
            self.images += images
            self.busy += now - max(handed, self.last)
        self.last = now

    def __str__(self):
        seconds = self.last - (self.first or 0.0)
        if not self.images:
            return ""
        return f"{self.images / seconds:,.1f} images/s; the devices had a batch for {self.busy / seconds:.1%} of the time"


def score(
    model: predictor.Model, rewards: Mapping[str, Callable], job: parts.Job, shards: Sequence, num_workers: int
) -> None:
    """Writes the parts of the shards that are this process's, unless they are done.

    Args:
      model, rewards: that compute on this process's devices. num_workers: processes that read and write; 0 = this one.

    Raises:
      UserError: a shard cannot be read; or, if `job.strict`, a picture.
    """
    own = itertools.islice(enumerate(shards), jax.process_index(), None, jax.process_count())
    num_own = len(range(jax.process_index(), len(shards), jax.process_count()))
    clock, calls, skipped = _Clock(), [], 0
    begun = set()  # shards of which a batch was read

    with (
        workers.started(job, min(num_workers, num_own)) as started,
        tqdm(desc="score", unit="image", dynamic_ncols=True, postfix=f"0 of {num_own} shards") as bar,
    ):

        def batches():
            for worker, index, batch in workers.read(started, own):
                if batch is not None:
                    begun.add(index)
                yield (worker, index, len(batch.names) if batch else 0), batch

        num_done = 0
        with contextlib.closing(predict(model, rewards, job, batches())) as results:
            for (worker, index, count), handed, predictions in results:
                if predictions is not None:
                    clock.back(handed, count)
                    calls.append(worker.call("predicted", index, predictions))
                    bar.update(count)
                    continue
                if index in begun:
                    begun.remove(index)
                    calls.append(worker.call("write", index))
                else:
                    skipped += 1
                num_done += 1
                bar.set_postfix_str(f"{num_done} of {num_own} shards")
                calls = _not_done(calls)
        for call in calls:
            call.result()
    if skipped:
        print(f"output: {skipped} of {num_own} shards were scored before")
    if text := str(clock):
        print(f"process {jax.process_index()}: {text}" if jax.process_count() > 1 else f"speed: {text}")


def _not_done(calls: list) -> list:
    """The calls that are not done. Raises the error of one that has failed."""
    for call in (done := [call for call in calls if call.done()]):
        call.result()
    return [call for call in calls if call not in done]


def check_output(job: parts.Job, shards: Sequence) -> None:
    """Refuses pictures that lie in the output: UserError."""
    for url in dict.fromkeys(shard.url for shard in shards):
        if input_files.is_local(url) and "://" not in job.output and paths.contains(job.output, parquet.local(url)):
            raise UserError(f"images: {url} is in {job.output}, where this command writes; choose another --output")


def finish(job: parts.Job, count: int) -> int:
    """Writes failed.jsonl and, last, index.json, from the parts; prints what is there; returns how many pictures failed.

    Raises:
      UserError: a part is missing; no picture was scored.
    """
    output, found = job.output.rstrip("/"), parts.read_all_metadata(job, count)
    rows, failed = (sum(metadata[name] for metadata in found) for name in ("rows", "failed"))
    first = None
    if failed:
        with paths.writing_url(f"{output}/failed.jsonl") as file:
            for index, metadata in enumerate(found):
                for row in parts.failures(job, index) if metadata["failed"] else ():
                    first = first or row
                    file.write(f"{json.dumps(row)}\n".encode())
    columns = [field.name for field in job.schema()]
    listed = [
        {"part": job.path(index).rpartition("/")[2]} | {name: metadata[name] for name in ("input", "rows", "failed")}
        for index, metadata in enumerate(found)
    ]
    rewards = {name: {"spec": spec, "identity": identity} for name, spec, identity in job.rewards}
    index = {"model": job.model, "rewards": rewards, "columns": columns, "rows": rows, "failed": failed, "shards": listed}
    with paths.writing_url(f"{output}/index.json") as file:
        file.write(f"{json.dumps(index, indent=1, sort_keys=True)}\n".encode())
    if failed == rows:
        reason = f"; the first: {first['image']}: {first['reason']}" if first else ""
        raise UserError(f"images: none of {rows} was scored{reason}")
    print(f"images: {rows - failed:,} scored: {job.path(0)} to {job.path(count - 1).rpartition('/')[2]}, index.json")
    if failed:
        print(f"images: {failed:,} failed, see {output}/failed.jsonl")
    return failed
