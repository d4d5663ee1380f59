"""The default config of `python -m benchmarks.alignment`."""

import ml_collections

from benchmarks.alignment import drawings
from rahf import experiments


def get_config():
    """All options: --config.pictures.train=1000, --config.base.num_steps=100, ..."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pictures = dict(train=24_000, clean=2_000, wrong_rate=drawings.WRONG_RATE)
    config.sampling = dict(steps=12, sampler="dpm++", guidance_scale=2.0)
    config.samples = dict(  # pictures of training prompts, by the base
        labelled=4_000,  # by the judge
        unlabelled=4_000,
    )
    config.eval = dict(  # on held-out prompts
        prompts=400,
        images=2,  # per prompt
        candidates=4,  # per picture, in rejection sampling
        strong_guidance=4.0,  # a second scale, besides sampling.guidance_scale
    )

    reward = experiments.load("reward_clip")
    reward.model.hidden = (512, 512)
    reward.eval.data_sizes = (0.125, 0.25, 0.5, 1.0)
    config.reward = reward

    common = experiments.load("sd_reward")
    common.model.update(dtype="float32", remat=False)
    common.optimizer.update(kind="muon", weight_decay=0.01, b2=0.98, warmup_steps=50)
    common.sample.update(every=500, steps=12, guidance_scale=2.0)
    common.log_every, common.checkpoint_every = 20, 250

    base = common.copy_and_resolve_references()
    base.train.update(batch_size=64, num_steps=3_000)
    base.optimizer.update(learning_rate=2e-3, final_learning_rate=0.0, ema_decay=0.995)
    config.base = base

    tuning = common.copy_and_resolve_references()
    tuning.train.update(batch_size=64, num_steps=400)
    tuning.optimizer.update(learning_rate=5e-4, final_learning_rate=0.0, ema_decay=0.98)
    config.tuning = tuning
    return config
