"""The longer run on RichHF-Synth, multi-head, 96 px: pictures are drawn during training, and none is seen twice.

  command    python -m rahf.train --config=rahf_synth_small --workdir=DIR
             python -m rahf.evaluate --workdir=DIR --split=test        # and --split=test_novel
  hardware   1 CPU core, 73 minutes (2026-11-22); about half of that on 2
  result     mean PLCC .718 on test, .735 on test_novel: 79 % and 80 % of the ceiling; tables in docs/results.md
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_synth_tiny")
    config.checkpoint_every = 250
    config.data.update(source="stream", num_workers=1)
    config.optimizer.update(warmup_steps=300, ema_decay=0.998)
    config.train.update(batch_size=32, num_steps=6500)
    config.eval.update(every=500, batch_size=100, num_examples=500)
    return config
