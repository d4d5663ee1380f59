"""Scores pictures by the million: parquet, JSONL, folders or tars in, parquet out; resumes, and needs no TensorFlow.

    python -m rahf.score --workdir=DIR --images='photos/*.parquet' --output=DIR

--images is a path, a pattern or a URL (gs://, s3://, hf://); richhf_data/picture_shards.py lists what it may name. A part
part-NNNNN.parquet of the output has a row for each picture of a shard of the input:

    image, prompt                                    the picture's name, and its prompt
    plausibility, alignment, aesthetics, overall     float32 in [0, 1], higher is better
    NAME                                             float32, for each --reward=NAME=SPEC (or SPEC, whose kind is the name)
    keywords, labelled_prompt                        the words that the picture contradicts; what the decoder wrote
    implausibility, misalignment                     PNG, with --heatmaps
    error                                            why there is no prediction, and null if there is one

Pictures that cannot be scored are listed in failed.jsonl too, and make the exit code 3; with --strict the first one ends the
command. index.json lists the parts; it is written last. Give the same command again to continue a killed run: a part that is
there stays, if its input, the model, the rewards and the options are the same. The result is the same, byte for byte.
"""

import os

import jax
import numpy as np
from absl import flags

from rahf import evaluate, experiments, hosts, predict, predictor, workdirs
from rahf.score import beam, parts
from rahf.score import job as jobs
from richhf_data import command, parquet, picture_shards, ranges
from richhf_data.errors import UserError


def main():
    """The command."""
    args = flags.FLAGS
    with hosts.joined(), hosts.locked(args.output, ".score.lock"):
        reward_specs = jobs.reward_specs(args.reward)
        if args.beam is not None and jax.process_count() > 1:
            raise UserError("beam: got it on several hosts, expected one process, whose pipeline has workers; leave it out")
        workdirs.check_config(args.workdir, args.config, evaluate.EVALUATE_MAY_DIFFER)
        shards = picture_shards.shards(args.images, args.shard_rows, args.prompt, parquet.columns_of(args.columns))
        model = jobs.on_own_devices(predictor.load(args.workdir, args.config))
        rewards = jobs.load_rewards(reward_specs)
        jobs.rewards_on_own_devices(rewards)
        options = {"heatmaps": args.heatmaps, "strict": args.strict}
        job = jobs.job_of(model, args.output, rewards, reward_specs, args.batch_size, **options)
        jobs.check_output(job, shards)
        if jax.process_index() == 0:
            parts.begin(job, len(shards))
        hosts.wait("score begins", jobs.WEEK)
        if args.beam is None:
            jobs.score(model, rewards, job, shards, args.workers)
        else:
            beam.run(args.beam, job, shards, args.workdir, args.config, reward_specs)
        hosts.wait("score ends", jobs.WEEK)
        failed = jobs.finish(job, len(shards)) if jax.process_index() == 0 else 0
        failed = int(hosts.agreed(np.int32(failed)))
    if failed:
        raise SystemExit(predict.FAILED)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The folder of a training run, or one that rahf.convert wrote.")
    flags.DEFINE_string("images", None, "A folder, pictures, .jsonl, .parquet or .tar: a path, a pattern or a URL.")
    flags.DEFINE_string("prompt", None, "The prompt of all picture files; else each one's own NAME.txt.")
    flags.DEFINE_list("columns", [], "image=NAME,prompt=NAME,uid=NAME: columns of a table, in place of a guess.")
    flags.DEFINE_string("output", None, "The folder to write to; a path or a URL.")
    flags.DEFINE_multi_string("reward", [], "SPEC or NAME=SPEC: a reward to compute too, see rahf.reward.specs.")
    flags.DEFINE_bool("heatmaps", False, "Write the heatmaps too, as PNG.")
    flags.DEFINE_bool("strict", False, "End at the first picture that fails.")
    ranges.flag("shard_rows", 4096, "The most rows of a part, but for those of one row group or one tar.", ranges.ROWS)
    ranges.flag("batch_size", 32, "Pictures at a time.", ranges.ROWS)
    ranges.flag("workers", os.cpu_count(), "Processes that read and decode; 0 = this process.", ranges.NUMBER_OF_PROCESSES)
    flags.DEFINE_string("beam", None, "Score in an Apache Beam pipeline of these options (--runner=...).")
    hosts.define_flags()
    flags.mark_flags_as_required(["workdir", "images", "output"])
    command.run(main, experiments.reader(of_workdir=workdirs.read_config))
