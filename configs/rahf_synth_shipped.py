r"""The critic that comes with the package, `rahf.load("synth")`: `rahf_synth_small` with options that are not in the paper.

It draws no scene of the pictures that the demo and docs/results.md measure on. --config.seed=0 evaluates on those.

  command    python -m rahf.train --config=rahf_synth_shipped --workdir=DIR
             python -m rahf.evaluate --workdir=DIR --split=test --num_examples=1000 --config.seed=0
             python -m rahf.evaluate --workdir=DIR --split=test_novel --num_examples=1000 --config.seed=0
             python -m rahf.convert --source=workdir --input=DIR --output=rahf/critics/synth --dtype=bfloat16 \
                 --license=apache-2.0
  hardware   2 CPU cores, 99 minutes (2026-11-28)
  result     mean PLCC .758 on test, .768 on test_novel: 84 % of the ceiling; rahf/critics/synth/README.md
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_synth_small")
    config.seed = 22
    config.model.word_head = True
    config.model.vit.update(stem_width=32, stem_blocks=4, depth=3)
    config.model.score_head.update(filters=(), dense=(128, 64), pool="mean", reads_text=True, deviation=True)
    config.log_every = 100
    config.checkpoint_every = 1000
    config.optimizer.update(warmup_steps=1200, ema_decay=0.9995)
    config.train.update(batch_size=8, num_steps=26_000)
    config.train.update(heatmap_loss="cross_entropy", marked_weight=2.0, word_weight=10.0, loss_weights=dict(heatmap=20.0))
    config.data.decoding = "copy"
    config.eval.every = 6500
    config.data.left_out.update(train=12_000, dev=500, test=1000, test_novel=1000)  # of seed 0
    return config
