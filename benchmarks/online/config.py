"""The default config of `python -m benchmarks.online`."""

import ml_collections

from benchmarks.feedback import config as feedback
from rahf import experiments


def get_config():
    """All options: --config.pictures=1024, --config.seeds=1, --config.online.optimizer.learning_rate=1e-3, ..."""
    of_feedback = feedback.get_config()
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.feedback = of_feedback  # base, critic and judges
    config.pictures = 2_048  # that each method draws
    config.evaluations = 4  # of a run, beside the one before its first step
    config.eval = dict(prompts=100, images=2)  # held-out pictures of each evaluation
    config.seeds = 3  # of the methods that `SEEDED` names

    held_out = experiments.load("baseline_synth_resnet")  # the second critic, of another architecture
    held_out.model.image_size = 32
    held_out.model.resnet.stem = "small"
    held_out.train.num_steps = 500
    held_out.eval.every = 250
    config.held_out = held_out

    online = experiments.load("sd_online")
    online.model.update(dtype="float32", remat=False)
    online.lora.rank = 0  # the whole UNet, as in reward-weighted fine-tuning
    online.rollout.update(steps=12, guidance_scale=2.0)
    online.sample = dict(of_feedback.sampling, seed=0)
    online.policy.update(pictures=64, steps=0.5)
    online.train.update(batch_size=32)
    online.optimizer.update(learning_rate=3e-4, final_learning_rate=3e-4, weight_decay=0.0)
    online.log_every, online.checkpoint_every = 4, 16
    config.online = online

    weighted = of_feedback.tuning  # reward-weighted fine-tuning, as `benchmarks.feedback` has it
    config.weighted = weighted
    return config
