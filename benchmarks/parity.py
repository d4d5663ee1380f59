"""Compares our networks with the originals at full size with random weights, and RAHF in bfloat16 with float32.

python benchmarks/parity.py [--workdir=RUN] [--only=NAME]     (needs torch: pip install -e '.[parity]' open_clip_torch;
                                                               some minutes and 12 GB)
"""

import dataclasses
import functools
import gc
import json
import pathlib
import sys
import tempfile

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import open_clip
import tabulate
import torch
import transformers
from absl import flags

from rahf import predictor, readers, sources, weights
from rahf.models import clip, critics, t5
from rahf.models.blip import ImageReward, ImageRewardConfig
from rahf.models.clip import CLIP, CLIPConfig
from rahf.models.rahf import RAHF, RAHFConfig
from rahf.models.vit import ViT, ViTConfig
from rahf.reward import gradient_map
from richhf_data import checked, command
from richhf_data.synthetic import stream

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import tiny_preference

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
    config, params = converted(theirs, readers.encoders.vit_hugging_face)
    image = np.random.default_rng(0).uniform(-1, 1, (1, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    yield row("ViT-B/16", "tokens", ViT(ViTConfig(**config["vit"])).apply({"params": params}, image), expected)


def t5_rows(name, options):
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(dropout_rate=0.0, **options)).eval()
    config, params = converted(theirs, readers.encoders.t5_hugging_face)
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


def held(state, reader, kind):
    """(configuration, parameters) that `reader` reads from the tensors of a torch model, whose memory they share."""
    found = reader({name: weights.Tensor(tuple(x.shape), x.numpy) for name, x in state.items()})
    params = flax.traverse_util.unflatten_dict({name: x.read() for name, x in found.tensors.items()}, sep="/")
    return found.config[kind], params


def picture():
    """float32[1, 224, 224, 3] in [-1, 1], and the same as CLIP's torch models read it."""
    image = np.random.default_rng(0).uniform(-1, 1, (1, 224, 224, 3)).astype(np.float32)
    return image, torch.from_numpy((((image + 1) / 2 - clip.MEAN) / clip.STD).transpose(0, 3, 1, 2).copy())


def clip_rows():
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**CLIP_L14)).eval()
    config, params = converted(theirs, readers.clip.clip_hugging_face)
    config = checked.conform(CLIPConfig, config["clip"])
    module, ids, (image, pixels) = CLIP(config), np.array([[49406, 320, 2368, 49407]], np.int32), picture()
    pixels.requires_grad_()
    expected = theirs(input_ids=torch.from_numpy(ids).long(), pixel_values=pixels)
    yield row(
        "CLIP L/14", "logits", module.apply({"params": params}, image, ids), expected.logits_per_image.detach().numpy()
    )

    texts = clip.unit(module.apply({"params": params}, ids, method="encode_text"))
    ours = jax.jit(functools.partial(gradient_map.pixel_gradient, config, sigma=0))(params, image, texts)
    (gradient,) = torch.autograd.grad(expected.logits_per_image.sum(), pixels)
    of_pixels = np.abs(gradient[0].numpy() / clip.STD.reshape(3, 1, 1)).max(0)
    yield row("CLIP L/14", "gradient map", ours[0], of_pixels / of_pixels.max())


def open_clip_rows():
    """The model of PickScore and of HPSv2."""
    settings = open_clip.get_model_config("ViT-H-14")
    theirs, (image, pixels) = open_clip.CLIP(**settings).eval(), picture()
    ids = np.array([[49406, 320, 2368, 49407]], np.int32)
    padded = torch.from_numpy(np.pad(ids, ((0, 0), (0, 73)))).long()
    with torch.no_grad():
        expected = theirs.get_logits(pixels, padded)[0].numpy()
    read = functools.partial(readers.clip.clip_from_open_clip, settings={"model_cfg": settings}, what="CLIP")
    config, params = held(theirs.state_dict(), read, "clip")
    module = CLIP(checked.conform(CLIPConfig, config))
    yield row("CLIP H/14", "logits", jax.jit(module.apply)({"params": params}, image, ids), expected)


def image_reward_rows():
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    vision |= {"image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
    text = {"vocab_size": 30524, "encoder_hidden_size": 1024, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    text |= {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    theirs = tiny_preference.image_reward_model(vision, text, (1024, 128, 64, 16)).eval()
    ids, (image, pixels) = np.random.default_rng(0).integers(1000, 30000, (1, 35)).astype(np.int32), picture()
    mask = np.arange(35)[None] < 20
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        masked = torch.from_numpy(mask).long()
        expected = tiny_preference.image_reward_score(theirs, pixels, torch.from_numpy(ids).long(), masked).numpy()
    state = {tiny_preference.blip_name(name): parameter.detach() for name, parameter in theirs.named_parameters()}
    config, params = held(state, functools.partial(readers.clip.image_reward_from, what="ImageReward"), "image_reward")
    module = ImageReward(checked.conform(ImageRewardConfig, config))
    yield row("ImageReward", "score", jax.jit(module.apply)({"params": params}, image, ids, mask), expected)


def bfloat16_rows(workdir):
    """Differences of the base config with random parameters, and of a trained run on RichHF-Synth."""
    config = RAHFConfig()
    inputs = critics.dummy_inputs(config, 64)
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
    parts = {
        "vit": vit_rows,
        "t5_v1_0": functools.partial(t5_rows, "T5 v1.0 base", V1_0),
        "t5_v1_1": functools.partial(t5_rows, "T5 v1.1 base", V1_1),
        "clip": clip_rows,
        "open_clip": open_clip_rows,
        "image_reward": image_reward_rows,
        "bfloat16": functools.partial(bfloat16_rows, flags.FLAGS.workdir),
    }
    rows, only = [], flags.FLAGS.only
    for name, part in parts.items():
        rows += part() if only in (None, name) else []
        gc.collect()
    headers = ("model", "output", "largest difference", "mean difference", "largest value")
    print(tabulate.tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A trained run, to compare its bfloat16 with its float32 as well.")
    flags.DEFINE_string("only", None, "One of vit, t5_v1_0, t5_v1_1, clip, open_clip, image_reward, bfloat16.")
    command.run(main)
