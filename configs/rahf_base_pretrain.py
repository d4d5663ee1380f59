"""Pre-training before `rahf_base`: image captions mixed with RichHF-18K, so that the decoder learns to name what it sees.

  command    python -m richhf_data.build --records=captions:'captions/*.parquet' --data_dir=data/captions \\
                 --vocabulary=t5.model
             python -m rahf.train --config=rahf_base_pretrain --workdir=pretrain \\
                 --config.init.vit=vit --config.init.t5=t5
             python -m rahf.convert --source=workdir --input=pretrain --output=pretrained
             python -m rahf.train --config=rahf_base --workdir=run --config.data.data_dir=data/richhf \\
                 --config.init.rahf=pretrained --config.data.vocabulary=pretrained/vocabulary.model
  hardware   pod
  result     not yet measured

The paper adds natural image captions (WebLI) to its pre-training mixture and gives neither rates nor steps. Those here are
our own. For captions alone: --config.data.mixture="()" --config.data.data_dir=data/captions.
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_base")
    config.data.update(mixture=(("data/richhf", 0.2), ("data/captions", 0.8)), truncate_long_prompts=True)
    config.train.num_steps = 50_000
    return config
