"""The serious run on RichHF-Synth, augmented prompt: one head of each kind, the task named in the text.

  command    python -m rahf.train --config=configs/rahf_synth_small_augmented.py --workdir=DIR
  hardware   2 CPU cores, two hours by the step's speed in benchmarks/README.md
  result     not yet measured to its end
"""

from configs import rahf_synth_small


def get_config():
    config = rahf_synth_small.get_config()
    config.model.variant = "augmented_prompt"
    config.train.num_steps = 5400  # an image costs seven passes of the encoder here
    return config
