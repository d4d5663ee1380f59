"""Tiny Stable Diffusions as diffusers' folders, and what diffusers computes with them.

    python tests/tiny_diffusion.py        writes tests/data/diffusion_tiny.zip; needs diffusers and torch (extra `parity`)

The zip has, for each of `MODELS`, the folder as diffusers writes it (configurations, tokeniser), the names and shapes of its
tensors, and golden.npz with diffusers' outputs. The weights are not in it: `weight` makes them from their names.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import zipfile
import zlib
from unittest import mock

import numpy as np
import safetensors.numpy

DATA = pathlib.Path(__file__).parent / "data" / "diffusion_tiny.zip"
SEED = 3
STEPS = 20
PROMPTS = ["red cat", "a cat on a red cat"]
NEGATIVE = "cat"
GUIDANCE = 3.0
STRENGTH = 0.6
SAMPLERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "dpm++": "DPMSolverMultistepScheduler"}
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 12),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
VAE = {
    "sample_size": 16,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
TEXT = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "projection_dim": 12}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
SECOND = {"block_out_channels": (8, 12, 16), "attention_head_dim": (2, 3, 4), "use_linear_projection": True}
SECOND |= {"down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",), "layers_per_block": 2}
SECOND |= {"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2}
MODELS = {  # name -> options of UNet, VAE, text encoder, schedule
    "first": (UNET, VAE, TEXT, SCHEDULE),  # as SD 1.x
    "second": (  # as SD 2.x, which predicts the velocity
        UNET | SECOND,
        VAE | {"scaling_factor": 0.5, "layers_per_block": 2},
        TEXT | {"hidden_act": "gelu"},
        SCHEDULE | {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "set_alpha_to_one": True},
    ),
    "inpainting": (UNET | {"in_channels": 9}, VAE, TEXT, SCHEDULE),
}
PARTS = ("unet", "mean", "logvar", "decoded", "text")
OUTPUTS = {  # name -> what is compared
    "first": (
        *PARTS,
        *(f"{kind}_{sampler}" for kind in ("image", "trajectory") for sampler in SAMPLERS),
        *("from_image_ddim", "from_image_dpm++", "blended", "blended_partly"),
    ),
    "second": (*PARTS, *(f"trajectory_{sampler}" for sampler in SAMPLERS)),
    "inpainting": ("unet", "inpainted", "inpainted_partly"),
}
GOLDEN = {  # name -> what of it golden.npz has, so that the zip stays small and the test short
    "first": [name for name in OUTPUTS["first"] if not name.startswith("trajectory") and name != "blended_partly"],
    "second": OUTPUTS["second"],
    "inpainting": ("inpainted",),
}


def weight(name: str, shape) -> np.ndarray:
    """The tensor of that name: random, of a size that keeps activations near 1; none at a usual initial value."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return draw * np.float32(0.7 / np.sqrt(np.prod(shape[1:])))
    return draw * np.float32(0.1) + np.float32(name.endswith("weight"))


def write_tokenizer(folder) -> dict[str, int]:
    """vocab.json and merges.txt as OpenAI's: the bytes, the bytes that end a word, three merges, the two special ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["c a", "ca t</w>", "r e"]
    pieces = chars + [char + "</w>" for char in chars] + [merge.replace(" ", "") for merge in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return {piece: i for i, piece in enumerate(pieces)}


def write_published_tokenizer(folder, theirs) -> None:
    """vocab.json and merges.txt of the published models, from open_clip's SimpleTokenizer."""
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # as OpenAI's files have them
    (folder / "vocab.json").write_text(json.dumps({renamed.get(k, k): v for k, v in theirs.encoder.items()}))
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.get)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")


def write_weights(folder, change=lambda part, tensors: tensors) -> pathlib.Path:
    """Adds the weights to a folder with `tensors.json`; `change` may alter a part's."""
    for part, shapes in json.loads((folder / "tensors.json").read_text()).items():
        tensors = change(part, {name: weight(f"{part}.{name}", shape) for name, shape in shapes.items()})
        safetensors.numpy.save_file(tensors, folder / part / f"{FILES[part]}.safetensors")
    return folder


def write_micro(folder, first) -> pathlib.Path:
    """As the model "first", with one level in UNet and VAE, 4 x 4 latents and pixels, 16 tokens: it compiles sooner."""
    import flax.traverse_util

    from rahf.diffusion import folder as diffusers_folder

    config, params = diffusers_folder.read_config(first), {}
    one = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "attention_head_dim": (2,)}
    unet = dataclasses.replace(config.unet, sample_size=4, block_out_channels=(8,), **one)
    text = dataclasses.replace(config.text, text=dataclasses.replace(config.text.text, length=16, depth=1))
    config = dataclasses.replace(config, unet=unet, vae=dataclasses.replace(config.vae, block_out_channels=(4,)), text=text)
    for part, shapes in diffusers_folder._shapes(config).items():
        for name, (theirs, layout) in diffusers_folder.tensor_map(part, config, shapes).items():
            shape = diffusers_folder.BACK[layout](np.zeros(shapes[name].shape)).shape
            params[f"{part}/{name}"] = layout(weight(f"{part}.{theirs}", shape))
    params = flax.traverse_util.unflatten_dict(params, sep="/")
    diffusers_folder.write(diffusers_folder.StableDiffusion(config, params, first / "tokenizer"), folder)
    return folder


def picture(size: int) -> np.ndarray:
    """uint8[size, size, 3]: a disc on a gradient, in [0, 255]."""
    y, x = np.mgrid[:size, :size] / size
    disc = (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1
    return np.round(255 * np.stack([x, y, disc], axis=-1)).astype(np.uint8)


def region(size: int) -> np.ndarray:
    """bool[size, size]: a rectangle that no multiple of 2 aligns with."""
    mask = np.zeros((size, size), bool)
    mask[1 : size // 2, 3 : size - 2] = True
    return mask


def thinned(outputs: dict) -> dict:
    """Every fourth step of the trajectories, to keep the zip small; the rest as it is."""
    return {name: x[3::4] if name.startswith("trajectory") else x for name, x in outputs.items()}


def parts_inputs(unet: dict) -> dict[str, np.ndarray]:
    """Inputs of the three networks, NHWC."""
    rng, size, options = np.random.RandomState(7), unet["sample_size"], UNET | unet
    return {
        # Sizes that do not halve evenly: 7 x 6, 4 x 3, 2 x 2.
        "latents": rng.standard_normal((2, size - 1, size - 2, options.get("in_channels", 4))).astype(np.float32),
        "timesteps": np.array([981, 7], np.int32),
        "context": rng.standard_normal((2, 5, options["cross_attention_dim"])).astype(np.float32),
        "image": rng.uniform(-1, 1, (2, 12, 20, 3)).astype(np.float32),
        "decoded": rng.standard_normal((2, 5, 3, 4)).astype(np.float32),
        "ids": rng.randint(0, 510, (2, 77)).astype(np.int32),
    }


# ---- With diffusers -------------------------------------------------------------------------------------------------
def make_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A folder that diffusers writes, with `tensors.json` beside its parts and the weights of `weight`."""
    import diffusers
    import transformers

    unet, vae, text, schedule = MODELS[name]
    ids = write_tokenizer(folder.parent / f"{folder.name}_tokenizer")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder.parent / f"{folder.name}_tokenizer", model_max_length=77)
    config = transformers.CLIPTextConfig(
        vocab_size=len(ids), bos_token_id=len(ids) - 2, eos_token_id=len(ids) - 1, pad_token_id=len(ids) - 1, **text
    )
    kind = diffusers.StableDiffusionInpaintPipeline if "in_channels" in unet else diffusers.StableDiffusionPipeline
    kind(
        vae=diffusers.AutoencoderKL(**vae),
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**unet),
        scheduler=diffusers.DDIMScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    shapes = {}
    for part, file in FILES.items():
        tensors = safetensors.numpy.load_file(folder / part / f"{file}.safetensors")
        shapes[part] = {name: tensor.shape for name, tensor in tensors.items()}
    (folder / "tensors.json").write_text(json.dumps(shapes))
    return write_weights(folder)


def nchw(x):
    import torch

    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def nhwc(x) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def check_gradients(model, gradients, unet, tolerance=2e-4):
    """Our gradients of a UNet's parameters are those that torch left in diffusers' UNet.

    Args:
      model: folder.Config. tolerance: of the largest number of a tensor.
    """
    import flax.traverse_util

    from rahf.diffusion import folder

    theirs = {name: tensor.grad.numpy() for name, tensor in unet.named_parameters()}
    ours = flax.traverse_util.flatten_dict(gradients, sep="/")
    mapped = folder.tensor_map("unet", model, ours)
    assert len(mapped) == len(ours) == len(theirs)
    for name, (their_name, layout) in mapped.items():
        expected = layout(theirs[their_name])
        np.testing.assert_allclose(ours[name], expected, atol=tolerance * np.abs(expected).max() + 1e-7, err_msg=name)


@contextlib.contextmanager
def drawn(queue):
    """diffusers' noise comes from here, one entry [B, h, w, Z] after the other."""
    queue = list(queue)

    def take(shape, *args, **kwargs):
        noise = nchw(queue.pop(0))
        assert tuple(noise.shape) == tuple(shape), (noise.shape, shape)
        return noise

    modules = ["schedulers.scheduling_ddim", "schedulers.scheduling_ddpm", "models.autoencoders.vae"]
    modules += [f"pipelines.stable_diffusion.pipeline_stable_diffusion{kind}" for kind in ("", "_img2img", "_inpaint")]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch(f"diffusers.{module}.randn_tensor", take))
        yield
    assert not queue, f"{len(queue)} entries were not drawn"


def diffusers_outputs(folder: pathlib.Path, names) -> dict[str, np.ndarray]:
    """The outputs of `names` that diffusers gives, as float32 in our layouts."""
    import diffusers
    import torch

    from rahf.diffusion import sample

    index = json.loads((folder / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    inputs = parts_inputs(dict(pipeline.unet.config))
    size = pipeline.unet.config.sample_size
    keys, shape = sample.image_keys(sample.seed_data(SEED), np.arange(len(PROMPTS))), (size, size, 4)
    initial, of_image, of_masked = (np.asarray(sample.noise(keys, i, shape)) for i in range(3))
    pixels = size * 2
    image, mask = picture(pixels).astype(np.float32) / 255, region(pixels).astype(np.float32)

    def unet():
        arguments = nchw(inputs["latents"]), torch.from_numpy(inputs["timesteps"]), torch.from_numpy(inputs["context"])
        return nhwc(pipeline.unet(*arguments).sample)

    def posterior():
        return pipeline.vae.encode(nchw(inputs["image"])).latent_dist

    def text():
        return pipeline.text_encoder(torch.from_numpy(inputs["ids"]).long()).last_hidden_state.numpy()

    def generate(kind, sampler, queue, **options):
        scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(pipeline.scheduler.config)
        components = pipeline.components | {"scheduler": scheduler}
        with drawn(queue):
            made = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**components, requires_safety_checker=False)
            made.set_progress_bar_config(disable=True)
            options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE} | options
            images = made(PROMPTS, negative_prompt=[NEGATIVE] * len(PROMPTS), output_type="np", **options).images
        return images * 2 - 1

    def from_text(sampler, trajectory=None):
        def record(pipe, i, t, values):
            trajectory.append(nhwc(values["latents"]))
            return {}

        queue = [np.asarray(sample.step_noise(keys, i, shape)) for i in range(STEPS)] if sampler == "ddpm" else []
        record = record if trajectory is not None else None
        images = generate("", sampler, queue, latents=nchw(initial), callback_on_step_end=record)
        return images if trajectory is None else np.stack(trajectory)

    def from_image(sampler):
        return generate("Img2Img", sampler, [of_image, initial], image=[image] * 2, strength=STRENGTH)

    def inpainted(sampler, queue, strength):
        options = {"image": [image] * 2, "mask_image": np.stack([mask] * 2), "height": pixels, "width": pixels}
        return generate("Inpaint", sampler, queue, **options, strength=strength)

    makers = {
        "unet": unet,
        "mean": lambda: nhwc(posterior().mean),
        "logvar": lambda: nhwc(posterior().logvar),
        "decoded": lambda: nhwc(pipeline.vae.decode(nchw(inputs["decoded"])).sample),
        "text": text,
        "inpainted": lambda: inpainted("ddim", [initial, of_masked], 1.0),
        "inpainted_partly": lambda: inpainted("dpm++", [of_image, initial, of_masked], STRENGTH),
        "blended": lambda: inpainted("ddim", [of_image, initial, of_masked], 1.0),
        "blended_partly": lambda: inpainted("dpm++", [of_image, initial, of_masked], STRENGTH),
    }
    for sampler in SAMPLERS:
        makers[f"image_{sampler}"] = functools.partial(from_text, sampler)
        makers[f"trajectory_{sampler}"] = functools.partial(from_text, sampler, [])
        makers[f"from_image_{sampler}"] = functools.partial(from_image, sampler)
    with torch.no_grad():
        return {name: makers[name]() for name in names}


def main():
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(DATA, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in MODELS:
            folder = make_folder(pathlib.Path(temporary) / name, name)
            np.savez_compressed(folder / "golden.npz", **thinned(diffusers_outputs(folder, GOLDEN[name])))
            for file in sorted(folder.rglob("*")):
                if file.is_file() and file.suffix != ".safetensors":
                    archive.write(file, f"{name}/{file.relative_to(folder)}")
    print(f"{DATA}: {DATA.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
