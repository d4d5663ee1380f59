"""Paper A's baseline: a fine-tuned CLIP that predicts the four scores, on RichHF-18K.

  command    python -m rahf.train --config=baseline_clip --workdir=DIR --config.data.data_dir=DIR
  hardware   one GPU
  result     not yet measured; the paper's: PLCC .390 / .398 / .357 / .353 (plausibility, alignment, aesthetics, overall)

It starts from `--config.init.clip=DIR`, a folder of `rahf.convert --source=clip-hf`, and takes its tokenizer.
`--config.optimizer.freeze="('clip',)"` trains the dense layers alone. Sizes for ViT-L/14:
--config.model.clip.vision.patch_size=14 and so on; `rahf.convert` prints them.
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_base")
    del config.model, config.init, config.optimizer.learning_rate_multipliers
    config.model = dict(
        architecture="clip",
        dtype="bfloat16",  # of the computation; parameters and losses are float32
        clip=dict(
            vision=dict(image_size=224, patch_size=32, width=768, depth=12, num_heads=12, mlp_dim=3072),
            text=dict(vocab_size=49408, width=512, depth=12, num_heads=8, mlp_dim=2048, length=77, eos_id=49407),
            projection_dim=512,
            activation="quick_gelu",
            epsilon=1e-5,
        ),
        dense=(1024, 512),  # not in the paper
    )
    config.data.update(text_length=78, keyword_length=78)  # CLIP's 77 ids and the 1 of `CLIPVocabulary`
    config.init = dict(clip="", rahf="")  # folders that rahf.convert wrote; `rahf`: a whole baseline
    config.optimizer.learning_rate_multipliers = dict(clip=1.0, heads=10.0)
    config.optimizer.update(schedule="cosine", learning_rate=1e-5, warmup_steps=500, weight_decay=0.05)
    config.train.update(batch_size=64, num_steps=4000)
    config.eval.every = 500
    return config
