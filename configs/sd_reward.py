"""Paper B's reward-weighted fine-tuning of Stable Diffusion 1.5 at 512 px.

  command    python -m rahf.diffusion.train --config=sd_reward --workdir=DIR --config.model.folder=SD15 \\
                 --config.data.images=samples --config.data.pretraining=pairs.parquet --config.reward.source=reward:DIR
  hardware   8 TPU v3 cores or one GPU of 80 GB
  result     not yet measured at this size; docs/results.md has the whole method at small scale
"""

import ml_collections


def get_config():
    """Every value of a run and its default."""
    config = ml_collections.ConfigDict()
    config.kind = "diffusion"
    config.seed = 0
    config.log_every = 20  # steps
    config.checkpoint_every = 500
    config.tracker = "tensorboard"  # or "wandb:PROJECT", "trackio:PROJECT", beside it

    config.model = dict(
        folder="",  # a diffusers folder, to start from
        dtype="bfloat16",  # of the computation; parameters and losses are float32
        remat=True,  # recompute each residual block and each transformer in the backward pass
    )
    config.data = dict(
        images="",  # .jsonl or .parquet of the model's own images and their prompts, which the reward weights
        pretraining="",  # likewise, pictures and captions for the pre-training term; alone, it trains a base model
        resize=False,  # images of another size: scaled to the model's, the middle kept
        truncate_long_prompts=False,
    )
    config.reward = dict(
        source="",  # reward:DIR, rahf:DIR:alignment=0.7,aesthetics=0.3, python:package.module:function
        weighting="raw",  # the paper's; or "exponential", "top", "threshold"
        temperature=0.1,  # of "exponential": weights exp(reward / temperature)
        fraction=0.5,  # of "top": the share of the images with the highest rewards, all of weight 1
        threshold=0.5,  # of "threshold": rewards from there on have weight 1
    )
    config.region = dict(
        source="",  # rahf:DIR, a critic whose heatmaps weight the error of each latent pixel, beside or without a reward
        heatmaps=("implausibility",),  # or "misalignment"; both are multiplied
        power=1.0,  # of (1 - heatmap), what a pixel weighs
    )
    config.lora = dict(rank=0, alpha=8.0)  # 0 = the whole UNet is trained; else adapters of its attention
    config.optimizer = dict(
        kind="adamw",
        schedule="cosine",
        learning_rate=1e-5,  # not in the paper, as all below
        final_learning_rate=1e-5,
        warmup_steps=100,
        weight_decay=0.01,
        b1=0.9,
        b2=0.999,
        clip_norm=1.0,
        ema_decay=0.999,
        freeze=(),
    )
    config.train = dict(
        batch_size=32,
        pretraining_share=0.5,  # of the batch's rows, where there are both kinds
        beta=1.0,  # of the pre-training term; 0 = without
        num_steps=10_000,
        text_dropout=0.1,  # the share of rows with an empty prompt, for classifier-free guidance
        accumulation_steps=1,
        max_bad_steps=10,
    )
    config.sample = dict(
        every=1000,  # steps, for the grids in TensorBoard
        prompts=(),  # the first eight different ones of the data when empty
        seed=0,
        steps=25,
        sampler="dpm++",
        guidance_scale=7.5,
    )
    config.mesh = dict(data=-1, model=1, sharding="fully_sharded", shard_group=16, attention="auto")
    return config
