"""Paper A's baseline: a ResNet-50 with dense layers for the scores and deconvolutions for the heatmaps, on RichHF-18K.

  command    python -m rahf.train --config=baseline_resnet50 --workdir=DIR --config.data.data_dir=DIR
  hardware   one GPU
  result     not yet measured; the paper's: PLCC .495 / .108 / .370 / .337 (plausibility, alignment, aesthetics, overall)

It starts from `--config.init.resnet=DIR`, a folder of `rahf.convert --source=resnet`. The paper trains one model for
the scores and one for the heatmaps: `--config.model.predicts=scores` and `=heatmaps`.
"""

from rahf import experiments


def get_config():
    config = experiments.load("rahf_base")
    del config.model, config.init, config.optimizer.learning_rate_multipliers
    config.model = dict(
        architecture="resnet",
        image_size=224,  # pixels
        predicts="both",  # or "scores", "heatmaps"
        dtype="bfloat16",  # of the computation; parameters, losses and batch statistics are float32
        resnet=dict(
            depths=(3, 4, 6, 3),
            width=64,
            stem="imagenet",  # "small": for small images
            epsilon=1e-5,
            frozen_norm=False,  # True: the running statistics stay those of ImageNet
        ),
        dense=(2048, 1024),  # the heads' sizes are not in the paper
        heatmap_head=dict(
            filters=(),
            deconv_filters=(256, 256, 256, 128, 64),
            output_hidden=64,
            style="paper",
            remat=False,
            strips=1,
        ),
    )
    config.init = dict(resnet="", rahf="")  # folders that rahf.convert wrote; `rahf`: a whole baseline
    config.optimizer.learning_rate_multipliers = dict(resnet=1.0, heads=1.0)
    config.optimizer.update(schedule="cosine", learning_rate=3e-4, warmup_steps=500, weight_decay=0.05)
    config.train.update(batch_size=64, num_steps=8000)
    config.train.loss_weights.heatmap = 10.0  # its error is a tenth of the scores'
    config.eval.every = 500
    return config
