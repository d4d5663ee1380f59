r"""The critic that comes with the package, `rahf.load("synth")`: `rahf_synth_small` on other pictures and other prompts.

It draws no scene of the pictures that the demo and docs/results.md measure on. --config.seed=0 evaluates on those.

  command    python -m rahf.train --config=rahf_synth_shipped --workdir=DIR
             python -m rahf.evaluate --workdir=DIR --split=test --num_examples=1000 --config.seed=0
             python -m rahf.evaluate --workdir=DIR --split=test_novel --num_examples=1000 --config.seed=0
             python -m rahf.convert --source=workdir --input=DIR --output=rahf/critics/synth --dtype=bfloat16 \
                 --license=apache-2.0
  hardware   2 CPU cores
  result     rahf/critics/synth/README.md
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_synth_small")
    config.seed = 22
    config.data.left_out.update(train=12_000, dev=500, test=1000, test_novel=1000)  # of seed 0
    return config
