"""Online alignment of Stable Diffusion 1.5 at 512 px: a reward raises itself in pictures that the model draws meanwhile.

docs/online.md says which method when, and what each costs.

  command    python -m rahf.diffusion.online --config=sd_online --config.method=draft --workdir=DIR \\
                 --config.model.folder=SD15 --config.data.prompts=prompts.txt --config.reward.source=rahf:DIR:plausibility
  hardware   8 TPU v3 cores or one GPU of 80 GB
  result     not yet measured; docs/results.md has the methods at small scale
"""

from rahf import experiments


def get_config():
    config = experiments.load("sd_reward")
    config.kind = "online"
    config.checkpoint_every = 100
    config.method = "draft"  # ddpo, grpo: policy gradients; refl, draft: the reward's gradient; dpo: preferences
    config.data = dict(
        prompts="",  # one a line, or .jsonl: {"prompt": text}; of every method but dpo
        held_out="",  # likewise, prompts that are only evaluated; without a file, `eval.prompts` of the prompts are held out
        pairs="",  # dpo: preferences, docs/online.md has their formats
        sets=(),  # dpo: NAME=FOLDER of both sets of pictures, for the responses of rahf's annotation server
        images="",  # dpo: the model's own pictures, of which `reward.source` prefers the best over the worst of a prompt
        pretraining="",  # refl, draft: pictures and captions for the pre-training term
        resize=False,
        truncate_long_prompts=False,
    )
    config.reward = dict(
        source="",  # any reward: rahf:DIR:alignment=0.7,aesthetics=0.3, "ensemble:1.0:rahf:A:overall|rahf:B:overall"
        margin=0.0,  # dpo: the least difference of a pair's rewards
    )
    config.beta = 0.0  # of the distance to the model at the start: KL (ddpo, grpo), of the predictions (refl, draft)
    config.rollout = dict(  # what a step of training looks back on
        steps=50,  # from noise to picture; for dpo, nothing is drawn
        guidance_scale=5.0,
        sampler="ddim",  # refl, draft; ddpo and grpo sample by DDIM with eta = 1
    )
    config.policy = dict(  # ddpo, grpo
        pictures=64,  # a round, drawn before its updates; a multiple of train.batch_size
        group=0,  # pictures of one prompt in a round; 0: 1 for ddpo, 8 for grpo
        epochs=1,  # times that a round's pictures are used
        steps=1.0,  # the share of the sampler's steps that are trained, chosen at random for each picture
        clip=1e-4,  # of the ratio of new to old probability
        max_advantage=5.0,
        history=32,  # ddpo: a prompt's newest rewards, whose mean and deviation normalise the next ones
    )
    config.gradient = dict(  # refl, draft
        last=1,  # draft: steps that the gradient passes through
        noisings=1,  # draft: noisings of the picture in its last step, averaged over; above 1: DRaFT-LV, for last=1
        start=0.75,  # refl: the picture is predicted at a random step from this share of the steps on
        ceiling=1e9,  # a reward above it counts no more (ReFL's margin)
    )
    config.preference = dict(beta=2500.0)  # dpo: T beta of arXiv 2311.12908; its code names it beta_dpo=5000, and halves it
    config.dense = dict(
        source="",  # rahf:DIR, a critic whose heatmaps and words say where the reward comes from
        heatmaps=("implausibility",),
        weight=0.0,  # ddpo, grpo: how much a region counts beside its picture; draft: 0 to 1, how much only flaws learn
        words=0.0,  # ddpo, grpo, dpo: 0 to 1, how much a misaligned word takes more of the blame and less of the praise
    )
    config.eval = dict(
        every=100,  # steps
        prompts=32,
        images=2,  # of each
        reward="",  # a second reward that is never trained on: where it falls while the other one rises, the run cheats
        features="",  # clip:DIR, for diversity and FID
        reference="",  # real pictures, for FID
        patience=0,  # evaluations without a better held-out reward, after which the run ends; 0: it never does
    )
    config.lora = dict(rank=4, alpha=4.0)
    config.optimizer.update(learning_rate=3e-4, final_learning_rate=3e-4, warmup_steps=0, weight_decay=1e-4, ema_decay=0.0)
    config.train.update(batch_size=32, num_steps=1_000, beta=1.0)
    config.train.text_dropout = 0.0  # dpo: the share of pairs with an empty prompt
    del config.region, config.train.pretraining_share, config.sample.every, config.sample.prompts
    return config
