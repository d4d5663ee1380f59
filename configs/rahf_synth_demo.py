"""The demo: the critic that comes with the package, fine-tuned on 4,800 pictures that are read from records.

  command    make demo
  hardware   2 CPU cores
  result     mean PLCC .758 on the demo's test; tables in docs/results.md
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_synth_shipped")
    config.seed = 0
    config.init.rahf = "synth"
    config.log_every = 20
    config.checkpoint_every = 75
    config.data.update(source="seqio", left_out=dict(train=0, dev=0, test=0, test_novel=0))
    config.optimizer.update(learning_rate=1e-4, warmup_steps=15, ema_decay=0.98)
    config.train.update(batch_size=32, num_steps=150)
    config.eval.update(every=150, num_examples=200)
    return config
