"""The serious run on RichHF-Synth, augmented prompt: one head of each kind, the task named in the text.

  command    python -m rahf.train --config=configs/rahf_synth_small_augmented.py --workdir=DIR
  hardware   2 CPU cores, about an hour
  result     in README.md
"""

from configs import rahf_synth_small


def get_config():
    config = rahf_synth_small.get_config()
    config.model.variant = "augmented_prompt"
    config.train.num_steps = 9000  # a row teaches one task here, and costs less
    return config
