"""A ResNet on RichHF-Synth at 96 px, from scratch, at the training compute of `rahf_synth_tiny`.

  command    python -m rahf.train --config=baseline_synth_resnet --workdir=DIR
  hardware   2 CPU cores, 25 CPU minutes
  result     mean PLCC .613 on test; tables in docs/results.md
"""

from rahf import experiments


def get_config():
    base, config = experiments.load("baseline_resnet50"), experiments.load("rahf_synth_tiny")
    del config.model, config.init, config.optimizer.learning_rate_multipliers
    config.model, config.init = base.model, base.init
    config.optimizer.learning_rate_multipliers = base.optimizer.learning_rate_multipliers
    config.model.update(
        image_size=96,
        dtype="float32",
        resnet=dict(depths=(2, 2, 2), width=40),
        dense=(128,),
        heatmap_head=dict(deconv_filters=(32, 16), output_hidden=16),
    )
    config.data.source = "stream"
    config.train.num_steps = 1510  # 52 TFLOP, as rahf_synth_tiny
    return config
