"""A CLIP that predicts scores on RichHF-Synth at 96 px, from scratch, at the training compute of `rahf_synth_tiny`.

  command    python -m rahf.train --config=baseline_synth_clip --workdir=DIR
  hardware   2 CPU cores, 20 CPU minutes
  result     mean PLCC .577 on test; tables in docs/results.md
"""

from rahf import experiments


def get_config():
    base, config = experiments.load("baseline_clip"), experiments.load("rahf_synth_tiny")
    del config.model, config.init, config.optimizer.learning_rate_multipliers
    config.model, config.init = base.model, base.init
    config.optimizer.learning_rate_multipliers = dict(clip=1.0, heads=1.0)
    config.model.update(
        dtype="float32",
        clip=dict(
            vision=dict(image_size=96, patch_size=12, width=160, depth=7, num_heads=4, mlp_dim=320),
            text=dict(vocab_size=512, width=160, depth=3, num_heads=4, mlp_dim=320, length=24, eos_id=1),
            projection_dim=128,
        ),
        dense=(128,),
    )
    config.data.source = "stream"
    config.train.num_steps = 1554  # 52 TFLOP, as rahf_synth_tiny
    return config
