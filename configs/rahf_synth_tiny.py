"""A small RAHF on RichHF-Synth at 96 px, from scratch in minutes on two CPU cores: what the demo compares its critic with.

  command    make demo-from-scratch
  hardware   2 CPU cores
  result     mean PLCC .574 on test, of 12,000 pictures (2026-11-22; the demo draws 4,800 now); tables in docs/results.md
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_base")
    config.log_every = 20
    config.checkpoint_every = 200
    config.model.update(
        image_size=96,
        dtype="float32",
        vit=dict(patch_size=12, stem_patch=4, width=128, depth=4, num_heads=4, mlp_dim=256),
        t5=dict(
            vocab_size=512,
            emb_dim=128,
            num_heads=4,
            head_dim=32,
            num_encoder_layers=3,
            num_decoder_layers=1,
            mlp_dim=256,
            mlp_activations=("relu",),
            dropout=0.0,
        ),
        score_head=dict(filters=(64, 32), dense=(128,)),
        heatmap_head=dict(filters=(64,), deconv_filters=(32,), output_hidden=16, strips=1),
    )
    config.data.update(text_length=24, keyword_length=40, augment=False)
    config.optimizer.update(kind="muon", schedule="cosine", learning_rate=2e-3, warmup_steps=150, weight_decay=0.05)
    config.optimizer.update(b2=0.98, ema_decay=0.99)
    config.train.update(batch_size=32, num_steps=1650, loss_weights=dict(score=40.0, heatmap=40.0, keyword=2.0))
    config.eval.update(every=825, batch_size=100, num_examples=200)
    return config
