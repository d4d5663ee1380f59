"""The side of PyTorch, diffusers and transformers: `ROWS` as in ours.py, and the models that both sides read.

On a GPU: bfloat16 and torch.compile; the decoder of a RAHF's prediction runs as transformers' `generate` does by default.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable

import diffusers
import numpy as np
import safetensors.torch
import torch
import transformers
from torch.utils import flop_counter

from benchmarks import parity_diffusion
from benchmarks.peers import inputs
from tests import release_torch, tiny_diffusion

torch.set_num_threads(len(os.sched_getaffinity(0)))
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
# A RAHF of ViT-B/16 and T5 v1.1 base, as configs/rahf_base.py, with the heads of the release.
FULL = {
    "vit": {},
    "t5": {"d_model": 768, "num_heads": 12, "d_kv": 64, "num_layers": 12, "d_ff": 2048, "vocab_size": 32128}
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "multi_heads": True,
    "score": {"filters": (768, 384, 192, 96, 48, 12), "dense": (512, 128)},
    "heatmap": {"filters": (768, 384), "ups": (768, 384, 384, 192), "hidden": 192},
}
SMALL = release_torch.CASES["flan_t5_with_equal_widths"]
SMALL = SMALL | {"t5": SMALL["t5"] | {"num_decoder_layers": SMALL["t5"]["num_layers"]}}


def write_rahf(place: pathlib.Path, small: bool) -> None:
    """The folder `rahf`."""
    case = SMALL if small else FULL
    (place / "rahf").mkdir()
    (place / "rahf" / "config.json").write_text(json.dumps(case), encoding="utf-8")
    state = {name: array.clone() for name, array in release_torch.build(case).state_dict().items()}
    safetensors.torch.save_file(state, place / "rahf" / "model.safetensors")


def write_diffusion(place: pathlib.Path, small: bool) -> None:
    """The folder `sd`."""
    torch.manual_seed(0)
    if small:
        tiny_diffusion.make_folder(place / "sd", "first")
    else:
        parity_diffusion.make_pipeline(place / "sd")


# ---- What is timed --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Work:
    """`call` is timed. `counted` has the FLOPs of its forward pass, of which it takes `times`; by default itself."""

    call: Callable[[], dict[str, np.ndarray]]
    counted: Callable[[], object] | None = None
    times: int = 1

    def __call__(self):
        return self.call()

    def flops(self) -> int:
        """Of a call, without what a backward pass computes again."""
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        formulas = {attention: lambda query, key, value, *args, **kwargs: flop_counter.sdpa_flop_count(query, key, value)}
        counter = flop_counter.FlopCounterMode(display=False, custom_mapping=formulas)
        with torch.compiler.set_stance("force_eager"), counter:
            (self.counted or self.call)()
        return self.times * counter.get_total_flops()


def _compiled(function):
    return torch.compile(function) if GPU else function


def _tensors(place, kind, *names) -> list[torch.Tensor]:
    given = inputs.read(place, kind)
    return [torch.from_numpy(given[name]).to(DEVICE) for name in names]


def _array(tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _steps(model, loss) -> Work:
    """Repeated training steps: AdamW, the gradient's norm clipped. loss: step -> the loss."""
    options = {"lr": inputs.LEARNING_RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    optimizer, done = torch.optim.AdamW(model.parameters(), **options), 0

    def forward(step=0):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
            return loss(step)

    def call():
        nonlocal done
        found = forward(done)
        found.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), inputs.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        return {"loss": _array(found), "gradient_norm": _array(norm)}

    return Work(call, forward, 3)


# ---- RAHF -----------------------------------------------------------------------------------------------------------
def _rahf(place):
    case = inputs.case(place)
    model = release_torch.build(case, state=safetensors.torch.load_file(place / "rahf" / "model.safetensors")).to(DEVICE)
    image, ids = inputs.read(place, "rahf")["image"], _tensors(place, "rahf", "text_ids")[0].long()
    pixels = np.stack([release_torch.pixels_of(case, row) for row in image])
    return model, torch.from_numpy(pixels).to(DEVICE), list(ids.unbind(1))


def rahf_predict(place):
    model, pixels, texts = _rahf(place)
    model, pixels = model.to(DTYPE), pixels.to(DTYPE)
    perceive = _compiled(model.perceive)

    @torch.no_grad()
    def call():
        scores, heatmaps, encoded = perceive(pixels, texts)
        written = model.write(encoded, inputs.LENGTH, use_cache=True)
        return {"scores": _array(scores), "heatmaps": _array(heatmaps), "keyword_ids": written.cpu().numpy()}

    return Work(call)


def rahf_step(place):
    model, pixels, texts = _rahf(place)
    scores, heatmaps, ids = _tensors(place, "rahf", "scores", "heatmaps", "keyword_ids")
    heatmaps, ids = heatmaps / 255, ids.long()

    @_compiled
    def loss_of(pixels, texts):
        found_scores, found_maps, encoded = model.perceive(pixels, texts)
        encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=encoded)
        keyword = model.t5(encoder_outputs=encoded, labels=ids).loss
        squared = torch.nn.functional.mse_loss
        return squared(found_scores.float(), scores) + squared(found_maps.float(), heatmaps) + keyword

    return _steps(model, lambda step: loss_of(pixels, texts))


# ---- Stable Diffusion -----------------------------------------------------------------------------------------------
def _part(place, kind, name, dtype=DTYPE):
    return kind.from_pretrained(place / "sd", subfolder=name, torch_dtype=dtype).to(DEVICE)


def _output(tensor) -> dict[str, np.ndarray]:
    return {"output": np.moveaxis(_array(tensor), 1, -1)}


def unet(place):
    model = _compiled(_part(place, diffusers.UNet2DConditionModel, "unet"))
    latents, timesteps, context = _tensors(place, "sd", "latents", "timesteps", "context")
    latents, context = latents.movedim(-1, 1).contiguous().to(DTYPE), context.to(DTYPE)
    return Work(torch.no_grad()(lambda: _output(model(latents, timesteps, context).sample)))


def vae_decode(place):
    model = _part(place, diffusers.AutoencoderKL, "vae")
    decode, (latents,) = _compiled(model.decode), _tensors(place, "sd", "initial")
    latents = latents.movedim(-1, 1).contiguous().to(DTYPE)
    return Work(torch.no_grad()(lambda: _output(decode(latents).sample)))


def text_to_image(place):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(place / "sd", torch_dtype=DTYPE).to(DEVICE)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet, pipeline.vae.decode = _compiled(pipeline.unet), _compiled(pipeline.vae.decode)
    (initial,) = _tensors(place, "sd", "initial")
    initial = initial.movedim(-1, 1).contiguous().to(DTYPE)
    options = {"num_inference_steps": inputs.STEPS, "latents": initial, "output_type": "np"}
    return Work(lambda: {"output": pipeline(inputs.PROMPT, **options).images * 2 - 1})


def sd_step(place, checkpointing=False):
    model = _part(place, diffusers.UNet2DConditionModel, "unet", torch.float32).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    network = _compiled(model)
    scheduler = diffusers.DDIMScheduler.from_pretrained(place / "sd", subfolder="scheduler")
    factor = diffusers.AutoencoderKL.load_config(place / "sd", subfolder="vae").get("scaling_factor", 0.18215)
    moments, context, latent_noise, times, noise = _tensors(
        place, "sd", "moments", "context", "latent_noise", "times", "noise"
    )
    (mean, logvar), context = moments.movedim(-1, 1).chunk(2, dim=1), context[:1]

    def loss(step):
        step = min(step, len(times) - 1)
        of_latents, of_step = latent_noise[step].movedim(-1, 1), noise[step].movedim(-1, 1).contiguous()
        latents = factor * (mean + torch.exp(0.5 * logvar) * of_latents)
        noised = scheduler.add_noise(latents, of_step, times[step])
        return torch.nn.functional.mse_loss(network(noised, times[step], context).sample.float(), of_step)

    return _steps(model, loss)


ROWS = {
    "rahf_predict": rahf_predict,
    "rahf_step": rahf_step,
    "unet": unet,
    "vae_decode": vae_decode,
    "text_to_image": text_to_image,
    "sd_step": sd_step,
    "sd_step_remat": functools.partial(sd_step, checkpointing=True),
}
