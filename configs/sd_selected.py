"""Paper A's fine-tuning of a generator on its own pictures that RAHF selected, for Stable Diffusion 1.5 at 512 px.

`selected` is written by rahf.diffusion.select; docs/feedback.md has all commands from prompts to the comparison.

  command    python -m rahf.diffusion.train --config=sd_selected --workdir=DIR --config.model.folder=SD15 \\
                 --config.data.pretraining=selected
  hardware   8 TPU v3 cores or one GPU of 80 GB
  result     not yet measured at this size; docs/results.md has it at small scale
"""

from rahf import experiments


def get_config():
    config = experiments.load("sd_reward")
    config.checkpoint_every = 250
    config.train.update(num_steps=2_000, beta=0.0)  # a selection is small; the paper gives no steps
    config.optimizer.update(learning_rate=5e-6, final_learning_rate=5e-6)
    config.sample.every = 500
    return config
