"""Compares our Stable Diffusion with diffusers at the size of SD 1.5: random weights, 512 px, float32.

    python benchmarks/parity_diffusion.py [--steps=3]     (needs torch and diffusers: pip install -e '.[parity]')

diffusers writes a temporary folder (4.3 GB), which we read; then both compute the same outputs. Takes 10 GB of memory.
"""

import functools
import gc
import json
import pathlib
import tempfile
import time

import diffusers
import jax
import numpy as np
import tabulate
import torch
import transformers
from absl import flags

from rahf.diffusion import folder, sample
from richhf_data import command, ranges

UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "timestep_spacing": "leading",  # DPMSolverMultistepScheduler's default is linspace
}
PROMPT = "a yellow cat"


def write_vocabulary(path: pathlib.Path) -> None:
    """Writes a vocabulary of CLIP's size whose pieces are single bytes; the other ids are unused."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pieces = chars + [char + "</w>" for char in chars] + [f"unused{i}" for i in range(49408 - 2 - 512)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def make_pipeline(path: pathlib.Path):
    """A pipeline of diffusers with random weights; writes it to `path`."""
    write_vocabulary(path.with_name("vocabulary"))
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(path.with_name("vocabulary"), model_max_length=77),
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)
    return pipeline


def nchw(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def nhwc(x) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


def timed(makers) -> dict:
    """name -> result as numpy; prints the seconds of each."""
    out = {}
    for name, make in makers.items():
        start = time.monotonic()
        out[name] = np.asarray(make())
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return out


def inputs() -> dict:
    rng, keys = np.random.default_rng(0), sample.image_keys(sample.seed_data(0), np.arange(1))
    return {
        "latents": rng.standard_normal((1, 64, 64, 4)).astype(np.float32),
        "context": rng.standard_normal((1, 77, 768)).astype(np.float32),
        "image": rng.uniform(-1, 1, (1, 512, 512, 3)).astype(np.float32),
        "timesteps": np.array([501], np.int32),
        "initial": np.asarray(sample.noise(keys, sample.INITIAL, (64, 64, 4))),
    }


def with_diffusers(path) -> dict:
    pipeline = make_pipeline(path)
    given = {name: nchw(x) if x.ndim == 4 else torch.from_numpy(x) for name, x in inputs().items()}
    ids = torch.tensor(pipeline.tokenizer([PROMPT], padding="max_length").input_ids)

    def generate(scheduler):
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        options = {"num_inference_steps": flags.FLAGS.steps, "latents": given["initial"], "output_type": "np"}
        return pipeline(PROMPT, **options).images * 2 - 1

    makers = {
        "CLIP text": lambda: pipeline.text_encoder(ids).last_hidden_state,
        "UNet": lambda: nhwc(pipeline.unet(given["latents"], given["timesteps"], given["context"]).sample),
        "VAE, encode": lambda: nhwc(pipeline.vae.encode(given["image"]).latent_dist.mean),
        "VAE, decode": lambda: nhwc(pipeline.vae.decode(given["latents"]).sample),
        "text to image, ddim": lambda: generate(diffusers.DDIMScheduler),
        "text to image, dpm++": lambda: generate(diffusers.DPMSolverMultistepScheduler),
    }
    with torch.no_grad():
        return timed(makers)


def with_ours(path) -> dict:
    model, given = folder.read(path), inputs()
    ids = model.text_ids([PROMPT])

    def part(name, *args, method="__call__"):
        module = model.config.modules[name]
        return jax.jit(functools.partial(module.apply, method=method))({"params": model.params[name]}, *args)

    generate = functools.partial(sample.generate, model, [PROMPT], steps=flags.FLAGS.steps)
    return timed(
        {
            "CLIP text": lambda: part("text_encoder", ids, method="text_tokens"),
            "UNet": lambda: part("unet", given["latents"], given["timesteps"], given["context"]),
            "VAE, encode": lambda: part("vae", given["image"], method="encode").mean,
            "VAE, decode": lambda: part("vae", given["latents"], method="decode"),
            "text to image, ddim": lambda: generate(sampler="ddim"),
            "text to image, dpm++": lambda: generate(sampler="dpm++"),
        }
    )


def main():
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        path = pathlib.Path(temporary) / "model"
        theirs = with_diffusers(path)
        gc.collect()
        ours = with_ours(path)
    for name, expected in theirs.items():
        difference, largest = np.abs(ours[name] - expected), np.abs(expected).max()
        values = difference.max(), difference.mean(), difference.max() / largest
        rows.append((name, *(f"{value:.1e}" for value in values), f"{largest:.2f}"))
    headers = ("SD 1.5, 512 px", "largest difference", "mean difference", "largest, relative", "largest value")
    print(tabulate.tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    ranges.flag("steps", 3, "Steps of the samplers.", ranges.COUNT)
    command.run(main)
