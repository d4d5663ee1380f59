"""The RAHF that the paper's first author released in PyTorch: ViT-L/16-384 + T5 base (v1.0), multi-head.

  command    python -m rahf.convert --source=rahf-pytorch --input=rahf_model.pt --vocabulary=t5-base --output=release
             python -m rahf.train --config=rahf_pytorch --workdir=DIR --config.init.rahf=release \\
                 --config.data.data_dir=DIR --config.data.vocabulary=release/vocabulary.model
  hardware   the release's: batch 8, 30 epochs of RichHF-18K
  result     the release reports PLCC .739 / .565 / .629 / .642; not measured here

The architecture, learning rates, weight decay and batch are the release's (github.com/youweiliang/RichHF), whose weights
are for non-commercial use; warm-up, clipping and augmentation are those of `rahf_base`. The release attends to the prompt's
padding and counts it in the loss. This config does not; `model.mask_padding=False` and `train.count_padding=True` would.
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_base")
    config.model.update(
        image_size=384,
        decoder_attends="text",
        vit=dict(width=1024, depth=24, num_heads=16, mlp_dim=4096, class_token=True, gelu="erf", epsilon=1e-12),
        t5=dict(mlp_dim=3072, mlp_activations=("relu",), logits_via_embedding=True),
        score_head=dict(
            filters=(768, 384, 192, 96, 48, 12), kernel_size=3, padding="SAME", dense=(512, 128), style="pytorch"
        ),
        heatmap_head=dict(style="pytorch", strips=1),
    )
    config.data.update(text_length=128, keyword_length=128)
    config.optimizer.update(schedule="cosine", learning_rate=2e-5, final_learning_rate=1e-5, weight_decay=2e-3)
    config.train.update(batch_size=8, num_steps=59_000)
    return config
