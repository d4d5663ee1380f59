"""Tiny baselines: their configs, with the training settings of rahf_ci."""

from rahf import experiments

MODELS = {
    "resnet": dict(
        image_size=32,
        dtype="float32",
        resnet=dict(depths=(1, 1), width=4, stem="small"),
        dense=(8,),
        heatmap_head=dict(deconv_filters=(4, 4), output_hidden=4),
    ),
    "clip": dict(
        dtype="float32",
        clip=dict(
            vision=dict(image_size=32, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=16),
            text=dict(vocab_size=512, width=16, depth=1, num_heads=2, mlp_dim=16, length=24, eos_id=1),
            projection_dim=12,
        ),
        dense=(8,),
    ),
}


def config(architecture: str):
    """A run of 4 steps on RichHF-Synth as it is drawn, at 32 pixels."""
    base = experiments.load({"resnet": "baseline_resnet50", "clip": "baseline_clip"}[architecture])
    config = experiments.load("rahf_ci")
    del config.model, config.init, config.optimizer.learning_rate_multipliers
    config.model, config.init = base.model, base.init
    config.model.update(MODELS[architecture])
    config.optimizer.learning_rate_multipliers = dict.fromkeys(base.optimizer.learning_rate_multipliers, 1.0)
    config.data.source = "stream"
    return config
