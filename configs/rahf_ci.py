"""The smallest RAHF that runs every line of code, for tests: a few seconds on one core.

  command    python -m rahf.train --config=rahf_ci --workdir=DIR --config.data.source=stream
  hardware   1 CPU core
  result     none: it learns nothing useful
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_synth_tiny")
    config.log_every = 1
    config.checkpoint_every = 2
    config.model.update(
        image_size=32,
        vit=dict(patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32),
        t5=dict(emb_dim=32, num_heads=2, head_dim=8, num_encoder_layers=1, num_decoder_layers=1, mlp_dim=32),
        score_head=dict(filters=(8,), dense=(16,)),
        heatmap_head=dict(filters=(8,), deconv_filters=(8, 4), output_hidden=4, strips=2),
    )
    config.data.num_workers = 0
    # Quicker to compile than muon; and every `train.num_steps` has the same program, so that it is compiled once.
    config.optimizer.update(kind="adamw", schedule="rsqrt", warmup_steps=2)
    config.train.update(batch_size=8, num_steps=4)
    config.eval.update(every=2, batch_size=8, num_examples=8)
    return config
