"""A run in a bucket, its continuation, evaluation and prediction: python tests/gcs_worker.py IMAGE; see test_gcs.py."""

import sys

from etils import epath

import rahf
from rahf import evaluate, experiments, predict, train
from richhf_data import images

WORKDIR = "gs://bucket/run"


def main(image):
    config = experiments.load("rahf_ci")
    config.data.source = "stream"
    train.train(config, WORKDIR)
    (epath.Path(WORKDIR) / "checkpoints/4/commit_success.txt").unlink()  # as if the last save had been cut short
    train.train(config, WORKDIR)
    evaluate.evaluate(WORKDIR, "test", 8)
    examples = [{"name": image, "image": images.read(image), "prompt": "a red cat"}]
    predict.predict(rahf.load(WORKDIR), examples, ["state"], f"{WORKDIR}/out")


if __name__ == "__main__":
    main(sys.argv[1])
