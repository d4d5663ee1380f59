"""A scoring job as an Apache Beam pipeline, which writes the same parts. The extra `beam` installs it."""

import functools
import json
import shlex
from collections.abc import Mapping, Sequence

import pyarrow

from rahf import predictor
from rahf.score import job as jobs
from rahf.score import parts
from richhf_data.errors import UserError


def run(options: str, job: parts.Job, shards: Sequence, workdir: str, config, rewards: Mapping[str, str]) -> None:
    """Writes the parts of the shards that are not done.

    Args:
      options: of the pipeline ("--runner=..."). Its workers must see the workdir, the pictures and the output.
      workdir, config: as in `predictor.load`. rewards: name -> spec. Each worker process loads them once.

    Raises:
      UserError: Beam is not installed.
    """
    try:
        import apache_beam
        from apache_beam.ml.inference.base import ModelHandler, RunInference
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("beam: Apache Beam is not installed; pip install 'rahf[beam]'") from error

    class Critic(ModelHandler):
        """(header, number, batch) of a shard -> (header, (number, its rows as an Arrow stream))."""

        def load_model(self):
            return functools.partial(jobs.predict, predictor.load(workdir, config), jobs.load_rewards(rewards), job)

        def batch_elements_kwargs(self):
            return {"min_batch_size": 1, "max_batch_size": 1}  # an element is a batch, formed within its shard

        def run_inference(self, batch, model, inference_args=None):
            written = model.args[0].vocabulary.written
            for (head, number, of), _, predictions in model((element, element[2]) for element in batch):
                yield head, (number, _to_bytes(parts.rows(job, of, predictions, written)))

    def read(numbered):
        index, shard = numbered
        head = parts.header(job, shard)
        if not parts.is_done(job, index, head):
            for number, batch in enumerate(parts.batches(job, shard)):
                yield json.dumps([index, head]), number, batch

    def write(group):
        (index, head), found = json.loads(group[0]), sorted(group[1])
        parts.write(job, index, head, [_from_bytes(data) for _, data in found])

    with apache_beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        _ = (
            pipeline
            | apache_beam.Create(list(enumerate(shards)))
            | apache_beam.Reshuffle()
            | apache_beam.FlatMap(read)
            | RunInference(Critic())
            | apache_beam.GroupByKey()
            | apache_beam.Map(write)
        )


def _to_bytes(rows: pyarrow.RecordBatch) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(stream, rows.schema) as writer:
        writer.write_batch(rows)
    return stream.getvalue().to_pybytes()


def _from_bytes(data: bytes) -> pyarrow.RecordBatch:
    with pyarrow.ipc.open_stream(data) as reader:
        return reader.read_next_batch()
