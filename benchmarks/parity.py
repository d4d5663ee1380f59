"""Compares our ViT, T5 and CLIP with transformers at full size with random weights, and RAHF in bfloat16 with float32.

    python benchmarks/parity.py [--workdir=RUN]         (needs torch: pip install -e '.[parity]'; some minutes and 10 GB)
"""

import dataclasses
import gc
import json
import tempfile

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import tabulate
import torch
import transformers
from absl import flags

from rahf import predictor, readers, sources, weights
from rahf.models import clip, t5
from rahf.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rahf.models.rahf import RAHF, RAHFConfig, dummy_inputs
from rahf.models.vit import ViT, ViTConfig
from richhf_data import command
from richhf_data.synthetic import stream

T5_BASE = {"d_model": 768, "num_heads": 12, "d_kv": 64, "num_layers": 12, "vocab_size": 32128}
V1_0 = T5_BASE | {"d_ff": 3072}
V1_1 = T5_BASE | {"d_ff": 2048, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CLIP_L14 = {
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "projection_dim": 768,
}


def converted(model, reader):
    """(configuration, parameters) that `reader` reads from a folder written by transformers."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = reader(folder)
        config = json.loads(json.dumps(found.config))
        return config, flax.traverse_util.unflatten_dict(dict(weights.read_all(found.tensors)), sep="/")


def row(name, output, ours, theirs):
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
    difference, largest = np.abs(ours - theirs), np.abs(theirs).max()
    return name, output, f"{difference.max():.1e}", f"{difference.mean():.1e}", f"{largest:.2f}"


def vit_rows():
    theirs = transformers.ViTModel(transformers.ViTConfig()).eval()
    config, params = converted(theirs, readers.vit_hugging_face)
    image = np.random.default_rng(0).uniform(-1, 1, (1, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    yield row("ViT-B/16", "tokens", ViT(ViTConfig(**config["vit"])).apply({"params": params}, image), expected)


def t5_rows(name, options):
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(dropout_rate=0.0, **options)).eval()
    config, params = converted(theirs, readers.t5_hugging_face)
    config["t5"]["mlp_activations"] = tuple(config["t5"]["mlp_activations"])
    module, rng = t5.T5(t5.T5Config(**config["t5"])), np.random.default_rng(0)
    ids, targets = rng.integers(2, 32000, (2, 20)).astype(np.int32), rng.integers(2, 32000, (2, 12)).astype(np.int32)
    inputs = np.array(t5.shift_right(targets))
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids).long(), decoder_input_ids=torch.from_numpy(inputs).long())

    def forward(module, ids, inputs):
        encoded = module.encode(module.embed(ids), ids != 0)
        return encoded, module.decode(encoded, ids != 0, inputs)

    apply = jax.jit(lambda params, *args: module.apply({"params": params}, *args, method=forward))
    encoded, logits = apply(params, ids, inputs)
    yield row(name, "encoder", encoded, expected.encoder_last_hidden_state.numpy())
    yield row(name, "logits", logits, expected.logits.numpy())


def clip_rows():
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**CLIP_L14)).eval()
    config, params = converted(theirs, readers.clip_hugging_face)
    sizes = config["clip"] | {"vision": CLIPVisionConfig(**config["clip"]["vision"])}
    module = CLIP(CLIPConfig(**sizes | {"text": CLIPTextConfig(**config["clip"]["text"])}))
    image = np.random.default_rng(0).uniform(-1, 1, (1, 224, 224, 3)).astype(np.float32)
    ids = np.array([[49406, 320, 2368, 49407]], np.int32)
    pixels = (((image + 1) / 2 - clip.MEAN) / clip.STD).transpose(0, 3, 1, 2).copy()
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids).long(), pixel_values=torch.from_numpy(pixels))
    ours = module.apply({"params": params}, image, ids)
    yield row("CLIP L/14", "logits", ours, expected.logits_per_image.numpy())


def bfloat16_rows(workdir):
    """Differences of the base config with random parameters, and of a trained run on RichHF-Synth."""
    config = RAHFConfig()
    inputs = dummy_inputs(config, 64)
    params = nn.unbox(jax.jit(RAHF(config).init)(jax.random.key(0), *inputs)["params"])
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, inputs[0].shape).astype(np.uint8)
    text, keywords = (rng.integers(2, 32000, x.shape).astype(np.int32) for x in inputs[1:])
    yield from difference_rows("base, random, bfloat16", config, params, image, text, keywords)
    if workdir:
        model = predictor.load(workdir)
        arguments = sources.image_arguments(model.config) | sources.text_arguments(model.config)
        batch = next(stream.batches(64, seed=1, vocabulary=model.vocabulary, start=0, workers=1, **arguments))
        inputs = (batch[name] for name in ("image", "text_ids", "keyword_ids"))
        yield from difference_rows("trained, bfloat16", model.model_config, model.params, *inputs)


def difference_rows(name, config, params, *inputs):
    exact, rounded = (
        jax.jit(RAHF(dataclasses.replace(config, dtype=dtype)).apply)({"params": params}, *inputs)
        for dtype in ("float32", "bfloat16")
    )
    for output, *values in zip(exact._fields, rounded, exact, strict=True):
        yield row(name, output, *values)


def main():
    torch.manual_seed(0)
    rows, workdir = [], flags.FLAGS.workdir
    for part in (
        vit_rows(),
        t5_rows("T5 v1.0 base", V1_0),
        t5_rows("T5 v1.1 base", V1_1),
        clip_rows(),
        bfloat16_rows(workdir),
    ):
        rows += part
        gc.collect()
    headers = ("model", "output", "largest difference", "mean difference", "largest value")
    print(tabulate.tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A trained run, to compare its bfloat16 with its float32 as well.")
    command.run(main)
