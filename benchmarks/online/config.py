"""The default config of `python -m benchmarks.online`."""

import ml_collections

from benchmarks.feedback import config as feedback
from rahf import experiments


def get_config():
    """All options: --config.pictures=1024, --config.seeds=1, --config.online.optimizer.learning_rate=1e-3, ..."""
    of_feedback = feedback.get_config()
    config = ml_collections.ConfigDict()
    config.seed = 0
    of_feedback.base.train.num_steps = 1_500  # of 2,500, to leave the time to the runs
    config.feedback = of_feedback  # base, critic and judges
    config.pictures = 2_560  # that each method draws
    config.evaluations = 5  # of a run, beside the one before its first step
    config.eval = dict(prompts=100, images=2)  # held-out pictures of each evaluation
    config.seeds = 3  # of these rows
    config.seeded = ("weighted", "refl", "dpo")

    held_out = of_feedback.critic.copy_and_resolve_references()  # the second critic, from another seed
    held_out.train.num_steps = 750
    held_out.eval.every = 375
    config.held_out = held_out

    online = experiments.load("sd_online")
    online.model.update(dtype="float32", remat=False)
    online.lora.rank = 0  # the whole UNet, as in reward-weighted fine-tuning
    online.rollout.update(steps=12, guidance_scale=2.0)
    online.sample = dict(of_feedback.sampling, seed=0)
    online.policy.update(pictures=64, steps=0.25)
    online.train.update(batch_size=32)
    online.optimizer.update(weight_decay=0.0)
    online.log_every, online.checkpoint_every = 4, 16
    config.online = online

    weighted = of_feedback.tuning  # reward-weighted fine-tuning, as `benchmarks.feedback` has it
    config.weighted = weighted
    return config
