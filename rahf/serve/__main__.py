"""Serves a critic over HTTP: scores, heatmaps, misaligned words, and further rewards, for other people's trainers.

    python -m rahf.serve --workdir=DIR --port=8080
    python -m rahf.serve --workdir=DIR --reward=pick=pickscore:DIR --answer=plausibility=0.5,pick=2 --accept_pickle

docs/serving.md has the protocols, and a block to paste for each trainer that it knows. Needs no TensorFlow.
"""

import contextlib
import os
import signal
import sys

from absl import flags

from rahf import experiments, workdirs
from richhf_data import command, ranges
from richhf_data.errors import UserError

_MOST_SIZES = ranges.Each(ranges.Range(1, 4096, whole=True))


def main() -> None:
    """Loads and compiles the critic, then serves until it is stopped."""
    try:
        from rahf import predictor
        from rahf.serve import scoring, server
        from rahf.serve.decoding import Decoders
        from richhf_data import schema, web
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs the package {error.name}; pip install 'rahf[serve]' installs it") from error
    args = flags.FLAGS
    try:
        sizes = [int(size) for size in args.batch_sizes]
    except ValueError:
        sizes = []
    if sizes not in _MOST_SIZES:
        raise UserError(f"batch_sizes: got {','.join(args.batch_sizes)}, expected {_MOST_SIZES}")
    if args.max_waiting < args.max_pictures:
        raise UserError(
            f"max_waiting: got {args.max_waiting} with --max_pictures={args.max_pictures}, expected as many or more"
        )
    sys.setswitchinterval(0.0005)  # seconds: the thread of the batches waits less for the event loop
    with contextlib.closing(web.bind(args.host, args.port)) as bound:
        model = predictor.load(args.workdir, args.config)
        rewards = scoring.named_rewards(args.reward)
        scores = schema.SCORES if "scores" in model.model_config.parts else ()
        answer = scoring.answer_weights(args.answer, [*scores, *rewards])
        scorer = scoring.Scorer(model, rewards, sizes)
        scorer.compile()
        limits = server.Limits(args.max_pictures, args.max_waiting, args.max_mib, args.body_seconds, args.wait_ms / 1000)
        with contextlib.closing(Decoders(args.decoders, model.model_config.image_size)) as decoders:
            bound.listen(2048)  # who reads the address may connect
            print(f"{web.address(bound)} serves {args.workdir}. Ctrl+C stops it.", flush=True)
            application = server.app(scorer, decoders, answer, args.accept_pickle, limits)
            web.run(application, bound, grace=args.grace_seconds, limit_concurrency=4096, timeout_keep_alive=30)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C
    flags.DEFINE_string("workdir", None, "The folder of a training run, or one that rahf.convert wrote.")
    flags.DEFINE_multi_string("reward", [], "A further reward, SPEC or NAME=SPEC; python -m pydoc rahf.reward.specs.")
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; 0.0.0.0 for all of the machine's.")
    ranges.flag("port", 8080, "The port; 0 takes a free one.", ranges.Range(0, 65535, whole=True))
    flags.DEFINE_list("batch_sizes", ["1", "2", "4", "8", "16", "32"], "Compiled at the start.")
    ranges.flag("wait_ms", 5, "Milliseconds that a picture waits for others to fill its batch.", ranges.Range(0, 10_000))
    ranges.flag("decoders", min(8, os.cpu_count()), "Processes that decode pictures.", ranges.Range(1, 256, whole=True))
    flags.DEFINE_bool("accept_pickle", False, "Read requests of flow_grpo and verl-omni: pickles, of plain data alone.")
    flags.DEFINE_string("answer", "overall", "What a pickled request gets: names with weights, alignment=0.7,plausibility.")
    ranges.flag("max_pictures", 256, "Pictures of one request.", ranges.COUNT)
    ranges.flag("max_waiting", 2048, "Pictures of all requests at once; more get 429 and Retry-After.", ranges.COUNT)
    ranges.flag("max_mib", 64, "MiB of one request; all together may have four times as many.", ranges.POSITIVE)
    ranges.flag("body_seconds", 60, "Seconds in which a request must have come.", ranges.POSITIVE)
    ranges.flag(
        "grace_seconds", 30, "Seconds in which requests may finish after SIGTERM.", ranges.Range(0, 3600, whole=True)
    )
    flags.mark_flag_as_required("workdir")
    command.run(main, experiments.reader(of_workdir=workdirs.read_config))
