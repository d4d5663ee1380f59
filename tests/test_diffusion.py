"""Stable Diffusion: parity with diffusers (golden outputs, and live where it is installed), folders, samplers, errors."""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import tiny_diffusion
from tiny_diffusion import GOLDEN, GUIDANCE, MODELS, NEGATIVE, OUTPUTS, PROMPTS, SAMPLERS, SEED, STEPS, STRENGTH

from rahf import predict
from rahf.diffusion import folder, sample
from rahf.diffusion.schedule import Schedule, plan
from rahf.diffusion.unet import DownBlock, UNet, UNetConfig
from rahf.diffusion.vae import VAE, VAEConfig
from rahf.models.clip import CLIP, VIT_L14
from richhf_data import images as image_files

ROOT = pathlib.Path(__file__).parent.parent
TOLERANCE = 1e-5  # of the output's scale


def jitted(module, params, *args, method="__call__"):
    return jax.jit(functools.partial(module.apply, method=method))({"params": params}, *args)


def outputs(model, names):
    """The outputs of `names`, as `tiny_diffusion.diffusers_outputs` gives them, from our code."""
    config, modules, params = model.config, model.config.modules, model.params
    inputs = tiny_diffusion.parts_inputs(dataclasses.asdict(config.unet))
    pixels = config.unet.sample_size * config.vae.factor
    image, mask = tiny_diffusion.picture(pixels), tiny_diffusion.region(pixels)

    def part(name, *arguments, method="__call__"):
        return jitted(modules[name], params[name], *(inputs[argument] for argument in arguments), method=method)

    generate = functools.partial(
        sample.generate, model, PROMPTS, seed=SEED, negative_prompt=NEGATIVE, steps=STEPS, guidance_scale=GUIDANCE
    )
    masked = functools.partial(generate, image=image, mask=mask)
    partly = functools.partial(masked, strength=STRENGTH, sampler="dpm++")
    posterior = functools.cache(lambda: part("vae", "image", method="encode"))
    makers = {
        "unet": lambda: part("unet", "latents", "timesteps", "context"),
        "mean": lambda: posterior().mean,
        "logvar": lambda: posterior().logvar,
        "decoded": lambda: part("vae", "decoded", method="decode"),
        "text": lambda: part("text_encoder", "ids", method="text_tokens"),
        "inpainted": masked,
        "inpainted_partly": partly,
        "blended": masked,
        "blended_partly": partly,
    }
    for sampler in SAMPLERS:
        makers[f"image_{sampler}"] = functools.partial(generate, sampler=sampler)
        makers[f"trajectory_{sampler}"] = functools.partial(trajectory, model, sampler)
        makers[f"from_image_{sampler}"] = functools.partial(generate, image=image, strength=STRENGTH, sampler=sampler)
    return {name: makers[name]() for name in names}


def trajectory(model, sampler):
    """float32[STEPS, B, h, w, Z]: the latents after each step of text to image."""
    return trajectory_of(model.config)(
        model.params, model.text_ids(PROMPTS), model.text_ids([NEGATIVE]), plan(model.config.schedule, sampler, STEPS)
    )


@functools.cache
def trajectory_of(config):
    size = config.unet.sample_size

    @jax.jit
    def run(params, ids, negative_ids, steps):
        keys = sample.image_keys(sample.seed_data(SEED), np.arange(2))
        initial = sample.noise(keys, sample.INITIAL, (size, size, 4))
        predict_noise = sample.guided(config, params, ids, negative_ids, np.float32(GUIDANCE))
        return sample.denoise(predict_noise, config.schedule, steps, initial, keys, keep=True)[0]

    return run


def check(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape and ours[name].dtype == np.float32, name
        difference = np.abs(np.asarray(ours[name]) - expected).max() / max(1, np.abs(expected).max())
        assert difference <= TOLERANCE, (name, difference)


@pytest.fixture(scope="module")
def tiny(unpacked):
    """name of `tiny_diffusion.MODELS` -> folder with weights."""
    return functools.cache(lambda name: tiny_diffusion.write_weights(unpacked("diffusion_tiny") / name))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_the_golden_ones(tiny, name):
    golden = np.load(tiny(name) / "golden.npz")
    check(tiny_diffusion.thinned(outputs(folder.read(tiny(name)), GOLDEN[name])), dict(golden))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_those_of_the_installed_diffusers(tmp_path, name, standard_promotion):
    pytest.importorskip("diffusers")
    made = tiny_diffusion.make_folder(tmp_path / name, name)
    check(outputs(folder.read(made), OUTPUTS[name]), tiny_diffusion.diffusers_outputs(made, OUTPUTS[name]))


def test_a_written_folder_gives_the_same_images_in_diffusers(tiny, tmp_path, standard_promotion):
    pytest.importorskip("diffusers")
    for name in ("first", "inpainting"):
        folder.write(folder.read(tiny(name)), tmp_path / name)
        golden, names = np.load(tiny(name) / "golden.npz"), ["image_ddim" if name == "first" else "inpainted"]
        check(tiny_diffusion.diffusers_outputs(tmp_path / name, names), {name: golden[name] for name in names})


# ---- Networks -------------------------------------------------------------------------------------------------------
def count(module, *args, method="__call__"):
    made = jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), *args)
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(made)))


def test_stable_diffusion_has_the_published_sizes():
    latents, context = np.zeros((2, 64, 64, 4), np.float32), np.zeros((2, 77, 768), np.float32)
    assert count(UNet(UNetConfig()), latents, np.int32(1), context) == 859_520_964
    latents = np.zeros((2, 64, 64, 9), np.float32)
    assert count(UNet(UNetConfig(in_channels=9)), latents, np.int32(1), context) == 859_535_364
    assert count(VAE(VAEConfig()), np.zeros((2, 512, 512, 3), np.float32)) == 83_653_863
    text = CLIP(VIT_L14, text_only=True)
    assert count(text, np.zeros((1, 77), np.int32), method="text_tokens") == 123_060_480


def test_every_parameter_names_its_axes():
    boxed = jax.eval_shape(functools.partial(folder.init, folder.Config()), jax.random.key(0))
    known = {"conv_height", "conv_width", "conv_in", "conv_out", "embed", "joined_kv", "mlp", "vocab", "position", None}
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        assert isinstance(leaf, nn.Partitioned) and len(leaf.names) == leaf.value.ndim, path
        assert set(leaf.names) <= known and (any(leaf.names) or leaf.value.size <= 8), (path, leaf.names)


def test_a_new_unet_predicts_zero_and_all_of_it_learns():
    """Its last convolution starts at zero, and so does the last one of every part: what lies before them learns later."""
    config = UNetConfig(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=(2, 2),
        cross_attention_dim=12,
        norm_num_groups=4,
        remat=True,
    )
    inputs = tiny_diffusion.parts_inputs({"sample_size": 8, "cross_attention_dim": 12})
    arguments, module = [inputs[name] for name in ("latents", "timesteps", "context")], UNet(config)

    @jax.jit
    def step(params):
        def loss(params):
            prediction = module.apply({"params": params}, *arguments)
            return ((prediction - inputs["latents"]) ** 2).mean(), prediction

        (_, prediction), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - g, params, gradient), prediction

    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), *arguments)["params"])
    params, prediction = step(params)
    np.testing.assert_array_equal(prediction, np.zeros_like(prediction))
    for _ in range(3):
        previous, (params, prediction) = params, step(params)
    assert np.abs(prediction).max() > 0.1
    for path, changed in jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: (a != b).any(), params, previous)):
        assert changed, path


def test_remat_changes_no_gradient_and_is_in_every_part(tiny):
    model = folder.read(tiny("first"))
    rng = np.random.default_rng(0)
    x, time, context = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 4, 8), (2, 32), (2, 5, 12)))

    def gradient(remat):
        block = DownBlock(dataclasses.replace(model.config.unet, remat=remat), 0)
        loss = jax.jit(jax.grad(lambda params: (block.apply({"params": params}, x, time, context)[0] ** 2).mean()))
        params = model.params["unet"]["down_blocks_0"]
        return loss(params), loss.lower(params).as_text().count("stablehlo.convolution")

    def check_close(a, b):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-4)

    (recomputed, convolutions), (kept, once) = gradient(True), gradient(False)
    jax.tree.map(check_close, recomputed, kept)
    assert convolutions == once  # their outputs are kept
    inputs = tiny_diffusion.parts_inputs(dataclasses.asdict(model.config.unet))
    for name, arguments, resnets, transformers in (
        ("unet", ("latents", "timesteps", "context"), 8, 4),
        ("vae", ("image",), 10, 0),
    ):
        module = model.config.modules[name]
        module = type(module)(dataclasses.replace(module.config, remat=True))
        jaxpr = jax.make_jaxpr(module.apply)({"params": model.params[name]}, *(inputs[argument] for argument in arguments))
        assert str(jaxpr).count("remat2[") + str(jaxpr).count("checkpoint[") == resnets + transformers


def test_bfloat16_stays_close_to_float32(tiny):
    model = folder.read(tiny("first"))
    inputs = tiny_diffusion.parts_inputs(dataclasses.asdict(model.config.unet))
    golden = np.load(tiny("first") / "golden.npz")
    for name, arguments, method, output in (
        ("unet", ("latents", "timesteps", "context"), "__call__", "unet"),
        ("vae", ("decoded",), "decode", "decoded"),
    ):
        module = model.config.modules[name]
        module = type(module)(dataclasses.replace(module.config, dtype="bfloat16"))
        rounded = jitted(module, model.params[name], *(inputs[argument] for argument in arguments), method=method)
        assert rounded.dtype == np.float32
        assert 0 < np.abs(rounded - golden[output]).max() < 0.05 * np.abs(golden[output]).max()


def test_networks_name_a_wrong_input(tiny):
    config = folder.read_config(tiny("first"))
    latents, context = np.zeros((2, 8, 8, 4), np.float32), np.zeros((2, 5, 12), np.float32)
    for arguments, message in (
        ((latents[..., :3], 1, context), r"latents: got shape \(2, 8, 8, 3\), expected \[B, h, w, 4\]"),
        ((latents, 1, context[:1]), r"context: got shape \(1, 5, 12\), expected \[2, L, 12\]"),
        ((latents, 1, context[..., :7]), r"context: got shape \(2, 5, 7\), expected \[2, L, 12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            UNet(config.unet).init(jax.random.key(0), *arguments)
    with pytest.raises(ValueError, match=r"image: got 15 by 16 pixels .* multiples of 2, .* resize it, to 16 by 16"):
        VAE(config.vae).init(jax.random.key(0), np.zeros((1, 15, 16, 3), np.float32))
    with pytest.raises(ValueError, match=r"image: got shape \(1, 16, 16, 4\), expected \[B, H, W, 3\]"):
        VAE(config.vae).init(jax.random.key(0), np.zeros((1, 16, 16, 4), np.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNetConfig(norm_num_groups=48), r"unet.block_out_channels: got \(320, .* of norm_num_groups = 48"),
        (lambda: UNetConfig(down_block_types=("DownBlock2D",)), r"unet.down_block_types: got .*, expected one for each"),
        (lambda: UNetConfig(up_block_types=("AttnUpBlock2D",) * 4), r"up_block_types\[0\]: got .* 'CrossAttnUpBlock2D'"),
        (lambda: UNetConfig(attention_head_dim=(7,) * 4), r"unet.attention_head_dim: got \(7, .* divide block_out_channels"),
        (lambda: VAEConfig(dtype="int8"), r"vae.dtype: got 'int8', expected one of"),
        (lambda: Schedule(prediction_type="sample"), r"schedule.prediction_type: got 'sample', expected one of \('epsilon'"),
        (lambda: folder.Config(UNetConfig(in_channels=5)), r"unet: got in_channels = 5 .* expected 4 of both, or 9 in"),
        (lambda: folder.Config(UNetConfig(cross_attention_dim=1024)), r"got 1024, expected the text encoder's width, 768"),
    ],
)
def test_configs_name_a_wrong_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- Schedule -------------------------------------------------------------------------------------------------------
def test_alphas_are_stable_diffusions():
    alphas = Schedule().alphas_cumprod
    # The published noise levels of the first and last of SD's 1000 timesteps: sigma 0.0292 and 14.6146 (k-diffusion).
    np.testing.assert_allclose(np.sqrt(1 / alphas[[0, -1]] - 1), [0.02917, 14.6146], rtol=2e-4)
    assert (np.diff(alphas) < 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_leads_back_to_the_image(prediction):
    schedule, rng = Schedule(prediction_type=prediction), np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 2, 2, 4)).astype(np.float32)
    timesteps = np.array([0, 400, 999], np.int32)
    x, target = schedule.add_noise(x0, noise, timesteps), schedule.target(x0, noise, timesteps)
    alphas = schedule.alphas_cumprod[timesteps].astype(np.float32)
    np.testing.assert_allclose(x[1], np.sqrt(alphas[1]) * x0[1] + np.sqrt(1 - alphas[1]) * noise[1], atol=1e-5)
    for i in range(3):
        np.testing.assert_allclose(schedule.x0(x[i], target[i], alphas[i]), x0[i], atol=2e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_samplers_end_at_the_image_that_is_always_predicted(sampler, strength):
    """With a perfect prediction any sampler goes from any noise level to the image itself."""
    schedule, rng = Schedule(set_alpha_to_one=True), np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 2, 3, 3, 4)).astype(np.float32)
    steps = plan(schedule, sampler, 10, strength)
    assert len(steps.timesteps) == 10 * strength

    def perfect(x, timestep):
        alpha = jax.numpy.asarray(schedule.alphas_cumprod, np.float32)[timestep]
        return (x - jax.numpy.sqrt(alpha) * x0) / jax.numpy.sqrt(1 - alpha)

    start = schedule.add_noise(x0, noise, steps.timesteps[:1])
    image, _ = sample.denoise(perfect, schedule, steps, start, sample.image_keys(sample.seed_data(0), np.arange(2)))
    np.testing.assert_allclose(image, x0, atol=2e-4)


def test_plan_names_wrong_steps():
    for arguments, message in (
        (("euler", 10), r"sampler: got 'euler', expected one of \('ddim', 'ddpm', 'dpm\+\+'\)"),
        (("ddim", 0), r"steps: got 0 for ddim, expected at least 1 and fewer than schedule.num_train_timesteps = 1000"),
        (("ddim", 1000), r"steps: got 1000 for ddim, .* fewer than"),
        (("dpm++", 1001), r"steps: got 1001 for dpm\+\+"),
        (("ddim", 10, 0.05), r"strength: got 0.05 for 10 steps, .* raise it to 0.1 or take more steps"),
        (("ddim", 10, 1.5), r"strength: got 1.5 for 10 steps, expected above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(Schedule(), *arguments)


# ---- Sampling -------------------------------------------------------------------------------------------------------
def test_an_image_does_not_depend_on_its_batch(tiny):
    model = folder.read(tiny("first"))
    both = np.load(tiny("first") / "golden.npz")["image_ddpm"]
    alone = sample.generate(
        model,
        PROMPTS[1:],
        seed=SEED,
        first=1,
        negative_prompt=NEGATIVE,
        steps=STEPS,
        sampler="ddpm",
        guidance_scale=GUIDANCE,
    )
    np.testing.assert_allclose(alone, both[1:], atol=TOLERANCE)
    assert np.abs(both[0] - both[1]).max() > 0.1


def primitives(jaxpr):
    """All equations of a jaxpr, those of its inner ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from primitives(inner)


def test_texts_in_succession_give_what_repeated_latents_give(micro):
    inputs = tiny_diffusion.parts_inputs(dataclasses.asdict(micro.config.unet))
    latents, context = inputs["latents"], np.concatenate([inputs["context"], 2 * inputs["context"]])
    unet = micro.config.modules["unet"].apply

    @jax.jit
    def both(variables, timesteps):
        text = unet(variables, context, method="keys_values")
        expected = unet(variables, np.repeat(latents, 2, axis=0), jnp.repeat(timesteps, 2), context)
        return expected, unet(variables, latents, timesteps, text)

    expected, found = both({"params": micro.params["unet"]}, inputs["timesteps"])
    assert expected.shape == (4, *latents.shape[1:])
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_tiles_give_the_same_picture(tiny):
    model, rng = folder.read(tiny("first")), np.random.default_rng(0)
    variables, vae = {"params": model.params["vae"]}, model.config.modules["vae"]
    for method, shape, layers in (("decode", (2, 9, 5, 4), 10), ("encode", (2, 18, 10, 3), 4)):
        given = rng.standard_normal(shape).astype(np.float32)
        whole, tiled = (jax.jit(functools.partial(vae.apply, method=method, tile=tile)) for tile in (None, 8))
        loops = [e for e in primitives(tiled.trace(variables, given).jaxpr.jaxpr) if e.primitive.name in ("scan", "while")]
        assert len(loops) == layers  # 18 rows of pixels, 9 of latents: the last strip overlaps the one before
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6), tiled(variables, given), whole(variables, given)
        )


def test_a_step_computes_nothing_twice(tiny):
    """No key or value of the text; what lies before the first text in one row for both halves of guidance."""
    model = folder.read(tiny("first"))

    def run(params, ids, negative_ids, latents):
        predict_noise = sample.guided(model.config, params, ids, negative_ids, np.float32(GUIDANCE))
        keys, steps = sample.image_keys(sample.seed_data(SEED), np.arange(2)), plan(model.config.schedule, "ddim", 2)
        return sample.denoise(predict_noise, model.config.schedule, steps, latents, keys)[0]

    ids, latents = model.text_ids([*PROMPTS, NEGATIVE]), np.zeros((2, 8, 8, 4), np.float32)
    jaxpr = jax.make_jaxpr(run)(model.params, ids[:2], ids[2:], latents).jaxpr
    (loop,) = (equation for equation in primitives(jaxpr) if equation.primitive.name == "scan")
    step = list(primitives(loop.params["jaxpr"].jaxpr))
    products = [equation.outvars[0].aval.shape for equation in step if equation.primitive.name == "dot_general"]
    convolutions = [equation.outvars[0].aval.shape for equation in step if equation.primitive.name == "conv_general_dilated"]
    assert not [shape for shape in products if shape[1:-1] == (77,)]
    assert convolutions[:3] == [(2, 8, 8, 8)] * 3 and {shape[0] for shape in convolutions[3:]} == {4}
    assert [shape for shape in products if len(shape) == 2] == [(1, shape[1]) for shape in products if len(shape) == 2]


def test_generate_names_wrong_inputs(tiny):
    model, image = folder.read(tiny("first")), tiny_diffusion.picture(16)
    inpainting = dataclasses.replace(model, config=folder.read_config(tiny("inpainting")))
    long = "cat " * 80
    for prompts, options, message in (
        ([], {}, r"prompts: got none"),
        (["cat", long], {}, r"prompt: 'cat cat .* takes 82 ids with its start and end, the text encoder reads 77"),
        (["cat"], {"negative_prompt": long}, r"takes 82 ids"),
        (["cat"], {"height": 15}, r"image: got 15 by 16 pixels"),
        (["cat"], {"height": 10**6, "width": 10**6}, r"image: got 1000000 by 1000000 pixels .*, expected at most 20,000"),
        (["cat"], {"guidance_scale": 1e38}, r"guidance_scale: got 1e\+38, expected a number from 0 to 1,000"),
        (["cat"], {"guidance_scale": np.nan}, r"guidance_scale: got nan"),
        (["cat"], {"guidance_scale": -1.0}, r"guidance_scale: got -1.0"),
        (["cat"], {"seed": 2**32}, r"seed: got 4294967296, expected a whole number from 0"),
        (["cat"], {"seed": -1}, r"seed: got -1"),
        (["cat"], {"vae_tile": 0}, r"vae_tile: got 0, expected a whole number from 1 to 16,384"),
        (["cat"], {"image": image[:15]}, r"image: got 15 by 16 pixels"),
        (["cat"], {"image": image, "width": 8}, r"image: got \(16, 16\) pixels for height None and width 8"),
        (["cat"], {"image": image[..., 0]}, r"image: got shape \(16, 16\), expected \[H, W, 3\], or 1 of them"),
        (["cat"], {"image": np.stack([image] * 3)}, r"image: got shape \(3, 16, 16, 3\), expected .* or 1 of them"),
        (["cat"], {"image": image.astype(int)}, r"image: got int(32|64), expected uint8 in \[0, 255\] or a float type"),
        (["cat"], {"mask": image[..., 0] > 0}, r"mask: got one without an image"),
        (["cat"], {"strength": 0.5}, r"strength: got one without an image"),
        (["cat"], {"image": image, "mask": image[..., 0]}, r"mask: got uint8\[16, 16\], expected bool\[16, 16\]"),
        (["cat"], {"image": image, "mask": image[:8, :, 0] > 0}, r"mask: got bool\[8, 16\], expected bool\[16, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.generate(model, prompts, **options)
    with pytest.raises(ValueError, match=r"mask: got none for an inpainting model"):
        sample.generate(inpainting, ["cat"], image=image)
    assert model.text_ids([long], truncate=True).shape == (1, 77)


def test_an_image_that_is_not_finite_is_named_by_prompt_and_seed(tiny):
    model = folder.read(tiny("first"))
    options = {"negative_prompt": NEGATIVE, "steps": STEPS, "sampler": "ddpm", "guidance_scale": GUIDANCE}  # compiled above
    bias = np.asarray(model.params["vae"]["decoder"]["conv_out"]["bias"])
    for value in (np.nan, np.inf):
        params = jax.tree.map(lambda leaf: leaf, model.params)
        params["vae"]["decoder"]["conv_out"]["bias"] = np.full_like(bias, value)
        with pytest.raises(ValueError, match=r"sample: image 7 of seed 5, of the prompt 'a cat .*', is not finite; lower"):
            sample.generate(dataclasses.replace(model, params=params), PROMPTS[1:], seed=5, first=7, **options)


def command(tmp_path, *arguments):
    """(exit status, stdout, stderr) of `python -m rahf.diffusion.sample`."""
    done = subprocess.run(
        [sys.executable, "-m", "rahf.diffusion.sample", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_writes_pictures_that_predict_reads(micro_folder, micro, tmp_path):
    image, output = tmp_path / "image.png", tmp_path / "out"
    PIL.Image.fromarray(tiny_diffusion.picture(4)).save(image)
    arguments = [f"--model={micro_folder}", f"--output={output}", "--sampler=dpm++", "--steps=5", f"--image={image}"]
    status, out, err = command(tmp_path, *arguments, *(f"--prompt={p}" for p in PROMPTS), "--num_images=2", "--batch_size=3")
    assert status == 0, err
    assert "4 images" in out and "8/8" in err  # two batches of 4 steps
    prompts, picture = np.repeat(PROMPTS, 2).tolist(), tiny_diffusion.picture(4)
    expected = sample.generate(micro, prompts, steps=5, sampler="dpm++", image=picture)
    inputs = predict.read_inputs(str(output / "images.jsonl"), None)
    assert [prompt for _, prompt in inputs] == prompts
    for (path, _), pixels in zip(inputs, sample.to_uint8(expected), strict=True):
        assert np.abs(image_files.read(path).astype(int) - pixels).max() <= 1
    status, _, err = command(tmp_path, *arguments, "--prompt=cat")
    assert status == 2 and err.splitlines()[-1].startswith("error: output: ") and "Traceback" not in err


def test_a_killed_run_goes_on_and_draws_nothing_twice(micro_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("cat\n\n  a red cat \nred\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red cat"}\n{"prompt": "red", "kind": 1}\n')
    options = {name: None for name in ("prompt", "image", "mask", "height", "width", "strength", "dtype", "vae_tile")}
    options |= {"num_images": 2, "batch_size": 3, "steps": 2, "sampler": "ddim", "guidance_scale": 3.0, "attention": "auto"}
    options |= {"seed": 1, "negative_prompt": "", "truncate": False, "model": micro_folder, "guide": None}
    options |= {f"guide_{name}": None for name in sample.GUIDE}

    def run(output, **changes):
        sample.run(argparse.Namespace(**options | {"output": tmp_path / output} | changes))
        return {file.name: file.read_bytes() for file in (tmp_path / output).iterdir()}

    expected = run("whole", prompt=["cat"], prompts=tmp_path / "prompts.jsonl")
    assert sorted(expected) == [*(f"0000{i}.png" for i in range(6)), "images.jsonl", "settings.json"]
    calls, real = [], sample.generate

    def killed(*args, **kwargs):
        calls.append(kwargs["first"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        run("out", prompts=tmp_path / "prompts.txt")
    assert not (tmp_path / "out" / "images.jsonl").exists()
    with pytest.raises(ValueError, match=r"output: .*out holds images of another seed and guidance_scale; choose"):
        run("out", prompts=tmp_path / "prompts.txt", seed=2, guidance_scale=1.0)
    assert run("out", prompts=tmp_path / "prompts.txt") == expected
    assert calls == [0, 3, 3]
    rows = [json.loads(line) for line in expected["images.jsonl"].decode().splitlines()]
    assert [row["prompt"] for row in rows] == ["cat"] * 2 + ["a red cat"] * 2 + ["red"] * 2
    assert rows[5] == {"image": "00005.png", "prompt": "red", "seed": 1, "number": 5}

    for name, text, message in (
        ("none.txt", None, r"prompts: no file .*none.txt"),
        ("empty.txt", "\n", r"prompts: .*empty.txt has none, expected one per line"),
        ("a.jsonl", '{"prompt": "cat"}\n{"text": "cat"}\n', r'a.jsonl line 2: got .*, expected {"prompt": text}'),
        ("long.txt", "cat\n" + "1 2 " * 40, "takes 82 ids"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            run("new", prompts=tmp_path / name)
    PIL.Image.new("RGB", (16, 16), "magenta").save(tmp_path / "mask.png")  # a luminance below half
    with pytest.raises(ValueError, match=r"mask: .*mask.png marks no pixel, expected white where to inpaint"):
        run("new", prompts=tmp_path / "prompts.txt", image=tmp_path / "mask.png", mask=tmp_path / "mask.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("image", "mask"):
        with pytest.raises(ValueError, match=r"image: .*pipe.png is missing or is not a readable image \(a named pipe\)"):
            run("new", **{"prompts": tmp_path / "prompts.txt", name: tmp_path / "pipe.png"})
    with pytest.raises(ValueError, match="prompt: got none, expected --prompt=TEXT or --prompts=FILE"):
        run("new", prompts=None)
    assert not (tmp_path / "new").exists() and len(calls) == 3


# ---- Folders --------------------------------------------------------------------------------------------------------
def damaged(tiny, tmp_path, change=lambda part, tensors: tensors, **configs):
    """A copy of the first folder with other tensors, or other values in its JSON files ("__" = "/")."""
    copy = tmp_path / "model"
    shutil.copytree(tiny("first"), copy, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    for name, values in configs.items():
        file = copy / f"{name.replace('__', '/')}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return tiny_diffusion.write_weights(copy, change)


def test_a_written_folder_reads_as_the_model_that_was_written(tiny, tmp_path):
    for name in ("first", "second"):
        model = folder.read(tiny(name))
        folder.write(model, tmp_path / name)
        again = folder.read(tmp_path / name)
        assert again.config == model.config
        jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
        np.testing.assert_array_equal(again.text_ids(PROMPTS), model.text_ids(PROMPTS))
        for part, file in tiny_diffusion.FILES.items():  # in diffusers' own names and layouts
            ours, theirs = (
                safetensors.numpy.load_file(root / part / f"{file}.safetensors") for root in (tmp_path / name, tiny(name))
            )
            prefix = "text_model." if part == "text_encoder" else ""
            assert ours.keys() == {prefix + key.removeprefix(prefix) for key in theirs}
            for key, tensor in theirs.items():
                np.testing.assert_array_equal(ours[prefix + key.removeprefix(prefix)], tensor)
    with pytest.raises(ValueError, match=r"output: .* holds a pipeline already"):
        folder.write(model, tmp_path / "second")


def test_old_files_read_as_new_ones(tiny, tmp_path):
    """The VAE's attention in SD 1.4's and 1.5's words, position ids, half-precision weights, an offset that is left out."""

    def old(part, tensors):
        if part == "vae":
            for theirs, now in folder.OLD_ATTENTION.items():
                tensors = {name.replace(f".{now}.", f".{theirs}."): tensor for name, tensor in tensors.items()}
            assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
            tensors = {name: t[..., None, None] if ".query.weight" in name else t for name, t in tensors.items()}
        if part == "text_encoder":
            tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
        return {name: np.ascontiguousarray(t.astype(np.float16)) for name, t in tensors.items()}

    model = folder.read(damaged(tiny, tmp_path, old, scheduler__scheduler_config={"steps_offset": 0}))
    expected = folder.read(tiny("first"))
    assert model.config == expected.config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16)), model.params, expected.params)
    assert jax.tree.leaves(model.params)[0].dtype == np.float32


def test_half_precision_files_and_files_in_parts_are_read(tiny, tmp_path):
    made = damaged(tiny, tmp_path)
    file = made / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, parts = safetensors.numpy.load_file(file), {}
    for part in range(2):
        name = f"diffusion_pytorch_model.fp16-0000{part + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({key: tensors[key] for key in sorted(tensors)[part::2]}, file.with_name(name))
        parts |= dict.fromkeys(sorted(tensors)[part::2], name)
    file.unlink()
    file.with_name(f"{file.name}.index.fp16.json").write_text(json.dumps({"weight_map": parts}))
    file = made / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, folder.read(made).params, folder.read(tiny("first")).params)
    assert {"diffusion_pytorch_model.fp16.bin", "pytorch_model.bin.index.json"} < set(folder.WEIGHTS)


def without(part_name, tensor, replacement=None):
    def change(part, tensors):
        if part == part_name:
            tensors = {name: value for name, value in tensors.items() if name != tensor}
            tensors |= replacement or {}
        return tensors

    return change


CONV = "down_blocks.0.resnets.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "configs", "message"),
    [
        (without("unet", CONV), {}, rf"resnets_0/conv1/kernel \(3, 3, 8, 8\): missing, expected the tensor {CONV}"),
        (without("unet", "", {"lora": np.zeros(3)}), {}, r"unet of .*\n  lora \(3,\): no parameter of ours takes it"),
        (without("unet", CONV, {CONV: np.zeros((8, 8, 1, 1))}), {}, rf"the tensor {CONV} has shape \(8, 8, 1, 1\)"),
        (without("vae", "quant_conv.bias"), {}, r"vae of .*\n  quant_conv/bias \(8,\): missing"),
        (None, {"model_index": {"_class_name": "StableDiffusionXLPipeline"}}, r"is SDXL, which is not supported; expected"),
        (None, {"model_index": {"text_encoder_2": ["transformers", "x"]}}, r"is SDXL, which is not supported"),
        (None, {"model_index": {"_class_name": "FluxPipeline"}}, r"is a FluxPipeline; expected Stable Diffusion 1.x"),
        (None, {"unet__config": {"addition_embed_type": "text_time"}}, r"got addition_embed_type = 'text_time', only None"),
        (None, {"unet__config": {"layers_per_block": [1, 2]}}, r"layers_per_block: got \[1, 2\], expected an integer"),
        (None, {"vae__config": {"norm_num_groups": 3}}, r"vae/config.json: vae.block_out_channels: got \(4, 8\)"),
        (None, {"scheduler__scheduler_config": {"rescale_betas_zero_snr": True}}, r"zero_snr = True, only False"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tiny, tmp_path, change, configs, message):
    made = damaged(tiny, tmp_path, *([change] if change else []), **configs)
    with pytest.raises(ValueError, match=message):
        folder.read(made)


def test_folders_that_lack_a_file_are_refused(tiny, tmp_path):
    made = damaged(tiny, tmp_path)
    (made / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights: .*vae has the files \[\], expected diffusion_pytorch_model.safetensors"):
        folder.read(made)
    (made / "vae" / "diffusion_pytorch_model.non_ema.safetensors").touch()
    with pytest.raises(ValueError, match=r"vae has the files \['diffusion_pytorch_model.non_ema.safetensors'\], .* no o"):
        folder.read(made)
    (made / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model: no .*unet/config.json, expected a diffusers folder"):
        folder.read(made)
