"""The default config of `python -m benchmarks.feedback`."""

import ml_collections

from benchmarks.alignment import config as alignment
from rahf import experiments


def get_config():
    """All options: --config.pictures.train=1000, --config.base.num_steps=100, ..."""
    of_alignment = alignment.get_config()
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pictures = dict(train=24_000, clean=2_000, artifact_rate=0.4, wrong_rate=0.15)
    config.judge = dict(train=30_000, held_out=2_000, steps=1_200)
    config.annotated = dict(train=12_000, dev=300, test=700, artifact_rate=0.5, wrong_rate=0.2)
    config.sampling = of_alignment.sampling
    config.base = of_alignment.base
    config.base.train.num_steps = 2_500

    critic = experiments.load("rahf_synth_tiny")
    critic.model.update(image_size=32)
    critic.model.vit.update(patch_size=4, stem_patch=2)
    critic.train.update(num_steps=2_500)
    critic.eval.update(every=1_250)
    config.critic = critic
    return config
