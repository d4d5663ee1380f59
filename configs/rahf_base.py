"""The paper's RAHF, multi-head: ViT-B/16 + T5 v1.1 base at 224 px, on RichHF-18K.

  command    python -m rahf.train --config=rahf_base --workdir=DIR --config.data.data_dir=DIR
  hardware   the paper: 64 TPU v3 chips, batch 256, 20,000 steps
  result     not yet measured
"""

import ml_collections


def get_config():
    """Every value of a run and its default; the other `rahf_*` configs change some of them."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.log_every = 50  # steps
    config.checkpoint_every = 1000
    config.tracker = "tensorboard"  # or "wandb:PROJECT", "trackio:PROJECT", beside it

    config.model = dict(
        architecture="rahf",  # the baselines: configs/baseline_resnet50.py, configs/baseline_clip.py
        variant="multi_head",
        image_size=224,  # pixels; not in the paper
        dtype="bfloat16",  # of the computation; parameters, losses and softmax are float32
        decoder_attends="fused",  # "text": the prompt alone, as in the first author's PyTorch release
        mask_padding=True,  # False in that release
        image_projection=False,  # True: also between equal widths of ViT and T5, as in that release
        word_head=False,  # True: a head for training alone says of each word whether it is misaligned; not in the paper
        vit=dict(
            patch_size=16,
            width=768,
            depth=12,
            num_heads=12,
            mlp_dim=3072,
            dropout=0.0,
            remat=False,
            scan=False,  # loop over the layers: quicker to compile
            class_token=False,
            gelu="tanh",  # "erf" in Hugging Face's
            epsilon=1e-6,  # 1e-12 in Hugging Face's
            stem_patch=0,  # pixels of the smaller patches that are embedded first; 0: none
            stem_width=64,
            stem_blocks=0,  # 3x3 convolutions over the stem's patches
        ),
        t5=dict(
            vocab_size=32128,
            emb_dim=768,
            num_heads=12,
            head_dim=64,
            num_encoder_layers=12,
            num_decoder_layers=12,
            mlp_dim=2048,
            mlp_activations=("gelu", "linear"),  # T5 v1.1; ("relu",) is v1.0
            logits_via_embedding=False,  # True in v1.0
            num_buckets=32,  # of the relative positions
            max_distance=128,  # tokens; larger distances share the last bucket
            relpos_bias_per_layer=False,  # True in UMT5
            dropout=0.1,
            remat=False,
            scan=False,
        ),
        score_head=dict(
            filters=(768, 384, 128, 64),
            kernel_size=2,
            padding="VALID",
            dense=(2048, 1024),
            style="paper",  # "pytorch": the first author's release
            pool="flatten",  # "mean": over positions; not in the paper
            reads_text=False,  # with "mean": the prompt's positions too
            deviation=False,  # True: how far a label may be from the score (Nix & Weigend 1994, arXiv 1703.04977)
        ),
        heatmap_head=dict(
            filters=(768, 384),
            deconv_filters=(768, 384, 384, 192),
            output_hidden=192,  # not in the paper
            style="paper",  # "pytorch": the first author's release
            remat=False,
            strips=4,  # pieces that an image is cut into: faster on TPUs with few images; use 1 elsewhere
        ),
    )
    config.data = dict(
        source="seqio",  # or "stream": RichHF-Synth drawn endlessly, no files, no TensorFlow
        data_dir="",  # what richhf_data.build wrote
        mixture=(),  # (("data/a", 0.8), ("data/b", 0.2)): several to train on, by rate; data_dir, or the first, to evaluate
        vocabulary="",  # a SentencePiece model; data_dir/vocabulary.model when empty
        text_length=64,  # ids, the end included
        keyword_length=64,  # the paper's decoder length
        decoding="free",  # the paper's; "copy": the decoder may only write the prompt's words, with or without the suffix
        truncate_long_prompts=False,
        augment=True,  # the paper's crops and colours
        num_workers=2,  # processes that draw for "stream"
        left_out=dict(seed=0, train=0, dev=0, test=0, test_novel=0),  # "stream" draws no scene of these first examples
        captions=0.0,  # share of the rows of "stream" that are captions, which the decoder learns to write
    )
    config.optimizer = dict(
        kind="adamw",  # or "muon", for training from scratch
        schedule="rsqrt",  # the paper's; "cosine" for fine-tuning and short runs
        learning_rate=0.015,
        final_learning_rate=0.0,  # of the cosine
        warmup_steps=2000,
        weight_decay=0.0,  # not in the paper
        b1=0.9,
        b2=0.999,
        clip_norm=1.0,  # not in the paper
        ema_decay=0.0,  # 0 = no moving average
        freeze=(),  # ("vit",) or ("t5/encoder", "t5/token_embedder"): parameters that stay as they are
        learning_rate_multipliers=dict(vit=1.0, t5=1.0, heads=1.0),
    )
    config.init = dict(vit="", t5="", rahf="")  # folders that rahf.convert wrote, to start from
    config.train = dict(
        batch_size=256,
        num_steps=20_000,
        accumulation_steps=1,  # microbatches that one step adds up
        max_bad_steps=10,  # in a row whose loss or gradient is not finite: they are skipped, then the run ends
        loss_weights=dict(score=1.0, heatmap=1.0, keyword=1.0),  # not in the paper
        heatmap_loss="mse",  # the paper's; "cross_entropy": rahf/losses.py
        marked_weight=1.0,  # of a misaligned word's suffix in the keywords' loss; not in the paper: more finds more words
        word_weight=1.0,  # of the loss of model.word_head, in which a misaligned word has marked_weight too
        count_padding=False,  # True: the keywords' padding is a target too, as in the first author's PyTorch release
    )
    config.eval = dict(every=1000, batch_size=64, num_examples=995)
    config.mesh = dict(
        data=-1,  # devices that the batch is divided over; -1: all that model leaves
        model=1,  # devices that a layer is divided over
        sharding="fully_sharded",  # or "optimizer_sharded", "data_parallel": what of the training state is divided too
        shard_group=32,  # over how many devices of data at most; each group holds one copy
        attention="auto",  # by device and size; or "plain", "blockwise", "cudnn", "pallas": rahf/models/attention.py
    )
    return config
