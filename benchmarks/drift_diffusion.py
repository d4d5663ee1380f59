"""How far sampling in bfloat16 drifts from float32: the latents after each step of every sampler, and the pictures.

    python benchmarks/drift_diffusion.py [--model=DIR] [--steps=20] [--size=256]

--model is a diffusers folder of Stable Diffusion; without one, the parts of SD 1.5 at a quarter of their widths have random
weights. UNet and VAE compute in bfloat16, as with `rahf.diffusion.sample --dtype=bfloat16`; the text encoder and the
sampler's arithmetic are float32 in both.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
from absl import flags
from flax import linen as nn

from rahf.diffusion import folder, sample
from rahf.diffusion.schedule import SAMPLERS, plan
from richhf_data import command, ranges

GUIDANCE = 7.5
PROMPTS = 2


def quarter() -> folder.StableDiffusion:
    """SD 1.5 at a quarter of its widths. Every layer's random weights keep the size of what it reads."""
    whole = folder.Config()
    text = dataclasses.replace(whole.text.text, width=192, mlp_dim=768, num_heads=3)
    config = dataclasses.replace(
        whole,
        unet=dataclasses.replace(whole.unet, block_out_channels=(96, 160, 320, 320), cross_attention_dim=192),
        vae=dataclasses.replace(whole.vae, block_out_channels=(32, 64, 128, 128)),
        text=dataclasses.replace(whole.text, text=text),
    )
    shapes = nn.unbox(jax.eval_shape(functools.partial(folder.init, config), jax.random.key(0)))
    rng = np.random.default_rng(0)

    def weights(path, leaf):
        draw = rng.standard_normal(leaf.shape, np.float32)
        if leaf.ndim == 1:
            return 0.1 * draw + np.float32(path[-1].key == "scale")
        return draw * np.float32(0.7 / np.sqrt(np.prod(leaf.shape[:-1])))

    return folder.StableDiffusion(config, jax.tree_util.tree_map_with_path(weights, shapes), None)


@functools.partial(jax.jit, static_argnames=("config", "grid"))
def sampled(config, grid, params, ids, negative_ids, steps):
    """The latents after each step, float32[n, B, h, w, Z], and the pictures, float32[B, H, W, 3] in [0, 255]."""
    keys = sample.image_keys(sample.seed_data(0), np.arange(len(ids)))
    initial = sample.noise(keys, sample.INITIAL, (*grid, config.vae.latent_channels))
    predict_noise = sample.guided(config, params, ids, negative_ids, np.float32(GUIDANCE))
    latents, _ = sample.denoise(predict_noise, config.schedule, steps, initial, keys, keep=True)
    images = config.modules["vae"].apply({"params": params["vae"]}, latents[-1], method="decode_latents")
    return latents, (jnp.clip(images, -1, 1) + 1) * 127.5


def main():
    args = flags.FLAGS
    jax.config.update("jax_default_matmul_precision", "highest")  # of float32, on devices that round its products
    model = folder.read(args.model) if args.model else quarter()
    text, grid = model.config.text.text, model.config.vae.grid(args.size, args.size)
    ids = np.random.default_rng(0).integers(0, text.vocab_size, (PROMPTS + 1, text.length), np.int32)
    rounded = {name: dataclasses.replace(getattr(model.config, name), dtype="bfloat16") for name in ("unet", "vae")}
    configs = model.config, dataclasses.replace(model.config, **rounded)
    shown = sorted({1, *(max(1, round(args.steps * share)) for share in (0.25, 0.5, 0.75, 1))})
    rows = []
    for sampler in SAMPLERS:
        steps = plan(model.config.schedule, sampler, args.steps)
        exact, found = (jax.device_get(sampled(of, grid, model.params, ids[1:], ids[:1], steps)) for of in configs)
        latents, pixels = (np.abs(ours - theirs) for ours, theirs in zip(found, exact, strict=True))
        row = {"sampler": sampler}
        for step in shown:
            difference = latents[step - 1] / exact[0][step - 1].std()
            row[f"step {step}"] = f"{difference.mean():.2%} / {difference.max():.1%}"
        rows.append(row | {"pixels, of 255": f"{pixels.mean():.2f} / {pixels.max():.0f}"})
    print(f"bfloat16 beside float32, {args.size} px, {args.steps} steps: mean / largest difference")
    print("of latents, as a share of their standard deviation after that step, and of pixels")
    print(tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A diffusers folder of Stable Diffusion.")
    ranges.flag("steps", 20, "Steps of the samplers.", ranges.COUNT)
    ranges.flag("size", 256, "Of the pictures, in pixels.", ranges.PIXELS)
    command.run(main)
