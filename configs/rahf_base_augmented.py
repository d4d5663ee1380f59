"""The paper's RAHF, augmented prompt: one head of each kind, the task named in the text.

  command    python -m rahf.train --config=rahf_base_augmented --workdir=DIR --config.data.data_dir=DIR
  hardware   the paper: 64 TPU v3 chips, batch 256, 20,000 steps
  result     not yet measured
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_base")
    config.model.variant = "augmented_prompt"
    return config
