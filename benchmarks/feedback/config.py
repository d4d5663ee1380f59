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
    config.clip_steps = 400
    config.sampling = of_alignment.sampling
    config.base = of_alignment.base
    config.base.train.num_steps = 2_500

    critic = experiments.load("rahf_synth_tiny")
    critic.model.update(image_size=32)
    critic.model.vit.update(patch_size=4, stem_patch=2)
    critic.train.update(num_steps=1_500)
    critic.eval.update(every=750)
    config.critic = critic

    config.samples = dict(prompts=500, images=8)  # of training prompts, by the base
    config.select = dict(threshold=0.8)  # paper A's plausibility
    tuning = of_alignment.tuning
    tuning.train.update(batch_size=32, num_steps=300, beta=0.0)
    tuning.reward.update(weighting="exponential", temperature=0.05)
    tuning.region.power = 2.0
    config.tuning = tuning
    config.seeds = 3  # of the fine-tunings on pictures that were selected, and on pictures that were not
    config.eval = dict(  # on held-out prompts
        prompts=200,
        images=2,  # per prompt
        margins=(0.1, 0.5),  # of the judge's probability that a picture has no artifact: slightly, significantly
    )
    config.guide = dict(scales=(1.0, 3.0, 10.0, 30.0, 100.0))
    config.repair = dict(threshold=0.3, dilation=0.08, candidates=4)
    return config
