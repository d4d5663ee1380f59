"""The longer run on RichHF-Synth, augmented prompt: one head of each kind, the task named in the text.

  command    python -m rahf.train --config=rahf_synth_small_augmented --workdir=DIR
  hardware   2 CPU cores, 75 minutes (2026-11-22, estimated from the 33 minutes of its last 2,400 steps)
  result     mean PLCC .700 on test, .723 on test_novel: 77 % and 79 % of the ceiling; tables in docs/results.md
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_synth_small")
    config.model.variant = "augmented_prompt"
    config.train.num_steps = 5400  # an image costs seven passes of the encoder here
    return config
