"""Samples images from a Stable Diffusion: text to image, image to image, inpainting.

    python -m rahf.diffusion.sample --model=DIR --prompt='a yellow cat' --output=DIR [--num_images=4 --sampler=dpm++]
    python -m rahf.diffusion.sample --model=DIR --prompt='a yellow cat' --output=DIR --image=photo.png [--mask=mask.png]
    python -m rahf.diffusion.sample --model=DIR --prompt='a cat' --output=DIR --guide=rahf:DIR:aesthetics --guide_scale=50
    python -m rahf.diffusion.sample --model=DIR --prompts=FILE --output=DIR   one prompt per line; .jsonl: {"prompt": text}

writes 00000.png, ..., then images.jsonl, which `rahf.predict` and `rahf.diffusion.evaluate` read as --images. Give the same
command again to continue a killed run. In Python:

    model = folder.read(DIR)
    images = generate(model, ["a yellow cat"], seed=0)

A call runs one compiled program: text encoder, denoising loop, decoder. An image's noise depends only on the seed and on the
image's number, not on its batch.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from absl import flags
from flax import linen as nn
from tqdm.auto import tqdm

from rahf import partitioning
from rahf.diffusion import folder
from rahf.diffusion import guide as guides
from rahf.diffusion.blocks import repeated
from rahf.diffusion.schedule import SAMPLERS, Plan, Schedule, plan
from rahf.models.attention import IMPLEMENTATIONS
from rahf.models.layers import normalize_image
from rahf.reward import specs
from rahf.reward.differentiable import checked_score
from richhf_data import command, images, json_files, jsonl, paths, ranges, schema
from richhf_data.errors import UserError

Array = jax.Array
INITIAL, IMAGE, MASKED, STEPS, AGAIN = range(5)  # uses of noise
GUIDE = ("scale", "backward_steps", "backward_rate", "recurrence", "start", "end")  # flags --guide_*


def noise(keys: Array, purpose: int, shape: tuple[int, ...]) -> Array:
    """Standard normal float32[B, *shape]. Row b depends on keys[b] only."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, purpose), shape))(keys)


def step_noise(
    keys: Array, step: int | Array, shape: tuple[int, ...], again: int | Array | None = None, purpose: int = STEPS
) -> Array:
    """The noise of a sampler's step number `step`, float32[B, *shape]; the first step taken has number 0.

    again: the number of a try of a guided step that is taken again; None for the last one and for every other step.
    purpose: STEPS, or AGAIN: for the noise after such a try.
    """

    def draw(key):
        key = jax.random.fold_in(jax.random.fold_in(key, purpose), step)
        return jax.random.normal(key if again is None else jax.random.fold_in(key, again), shape)

    return jax.vmap(draw)(keys)


def seed_data(seed: int) -> np.ndarray:
    """A seed as an input of compiled programs, uint32[2]."""
    with jax.ensure_compile_time_eval():
        return np.asarray(jax.random.key_data(jax.random.key(seed)))


def image_keys(seed: np.ndarray, numbers: Array) -> Array:
    """The keys of images, B of them, by their numbers, int32[B]. seed: from `seed_data`."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.wrap_key_data(seed)))(numbers)


def denoise(
    predict_noise: Callable[[Array, Array], Array],
    schedule: Schedule,
    steps: Plan,
    latents: Array,
    keys: Array,
    blend: Callable[[Array, Array], Array] | None = None,
    on_step: Callable[[], None] | None = None,
    keep: bool = False,
    guide: guides.Guide | None = None,
) -> tuple[Array, Array]:
    """Runs a sampler's steps as one loop.

    Args:
      predict_noise: (latents float32[B, h, w, Z], timestep int32[]) -> the network's prediction of the same shape.
      latents: at the noise level of the first step. keys: B keys, for samplers that add noise.
      blend: (latents, alpha float32[]) -> latents, applied after each step; alpha is the latents' noise level.
      on_step: called on the host after each step.
      keep: return the latents after every step.
      guide: raises a score (guide.py).

    Returns:
      float32[B, h, w, Z], or float32[n, B, h, w, Z]; and the largest gradient of each step, float32[n], 0 without a guide.
    """

    def taken(x, before, i, now, guided, again=None):
        """One step from x: the next x, x_0 and the largest gradient. again: as of `step_noise`."""

        def clean(x):
            return schedule.x0(x, predict_noise(x, now.timesteps), now.alpha)

        x0, largest = guide.clean(clean, x, now.alpha) if guided else (clean(x), jnp.zeros(()))
        added = step_noise(keys, i, x.shape[1:], again)
        x = now.x * x + now.x0 * x0 + now.x0_before * before + now.noise * added
        return blend(x, now.alpha_next) if blend is not None else x, x0, largest

    def guided_step(x, before, i, now):
        def repeat(x, again):
            after, _, _ = taken(x, before, i, now, True, again)
            return guides.noised_again(after, now, step_noise(keys, i, x.shape[1:], again, AGAIN)), None

        if guide.form.recurrence > 1:
            x, _ = jax.lax.scan(repeat, x, jnp.arange(guide.form.recurrence - 1))
        return taken(x, before, i, now, True)

    def step(carry, now):
        x, before = carry
        i, now = now
        if guide is None:
            x, x0, largest = taken(x, before, i, now, False)
        elif guide.form.always:
            x, x0, largest = guided_step(x, before, i, now)
        else:
            plain = functools.partial(taken, guided=False)
            x, x0, largest = jax.lax.cond(guide.active[i], guided_step, plain, x, before, i, now)
        if on_step is not None:
            jax.debug.callback(on_step)
        return (x, x0), (x if keep else None, largest)

    numbers = jnp.arange(len(steps.timesteps))
    steps = numbers, jax.tree.map(jnp.asarray, steps)
    (latents, _), (kept, largest) = jax.lax.scan(step, (latents, jnp.zeros_like(latents)), steps)
    return kept if keep else latents, largest


def guided(config, params, ids: Array, negative_ids: Array | None, scale: Array, read: Sequence[Array] = ()) -> Callable:
    """`predict_noise` of `denoise` for B prompts, with classifier-free guidance (arXiv 2207.12598).

    The texts are encoded here, and their keys and values computed, so that a step computes nothing of them.

    Args:
      config: a `folder.Config`. params: {"unet", "text_encoder"}.
      ids: int32[B, L]. negative_ids: int32[N, L], B a multiple of N; None = no guidance. scale: float32[].
      read: what the UNet reads beside the latents, each float[B, h, w, C].
    """

    def encode(ids):
        return config.modules["text_encoder"].apply({"params": params["text_encoder"]}, ids, method="text_tokens")

    negative = None if negative_ids is None else encode(negative_ids)
    return of_contexts(config, params["unet"], encode(ids), negative, scale, read)


def of_contexts(
    config, unet, context: Array, negative: Array | None, scale: Array, read: Sequence[Array] = (), through=None
) -> Callable:
    """As `guided`, for texts that were encoded before.

    Args:
      unet: parameters. context: float[B, L, D]. negative: float[N, L, D], B a multiple of N; None = no guidance.
      through: a function that the texts' keys and values pass, `UNet.keys_values` -> the same; of [2B, L, D] with guidance,
        the negative one before each text.
    """

    def apply(*args, **kwargs):
        return config.modules["unet"].apply({"params": unet}, *args, **kwargs)

    if negative is not None:
        negative = repeated(negative, len(context))
        context = jnp.stack([negative, context], axis=1)  # [B, 2, L, D]
        context = context.reshape(-1, *context.shape[2:])
    text = apply(context, method="keys_values")
    if through is not None:
        text = through(text)

    def predict_noise(x, timestep):
        found = apply(jnp.concatenate([x, *read], axis=-1), timestep, text)
        if negative is None:
            return found
        both = found.reshape(len(x), 2, *x.shape[1:])
        return both[:, 0] + scale * (both[:, 1] - both[:, 0])

    return predict_noise


def _sampled(config, params, rows, negative_ids, seed, steps, scale, guide, *, grid, vae_tile, partial, on_step, form):
    """The compiled program of `generate`. Absent rows are None. partial: start from the noised image.

    guide: None, or (parameters of the score, its scale, the backward rate, bool[steps]). form: of `Guidance`, or None.
    """
    if form is not None:  # bounds the memory of the gradients
        parts = {name: dataclasses.replace(getattr(config, name), remat=True) for name in ("unet", "vae")}
        config = dataclasses.replace(config, **parts)
    image, mask, keys = rows["image"], rows["mask"], image_keys(seed, rows["number"])
    vae = functools.partial(config.modules["vae"].apply, {"params": params["vae"]}, tile=vae_tile)
    shape = *grid, config.vae.latent_channels
    initial, schedule = noise(keys, INITIAL, shape), config.schedule
    latents, blend, read = initial, None, []
    if image is not None:
        image = normalize_image(image).astype(jnp.float32)
        known = vae(image, noise(keys, IMAGE, shape), method="encode_latents")

        def noised(alpha):
            return jnp.sqrt(alpha) * known + jnp.sqrt(1 - alpha) * initial

        if partial:
            latents = noised(steps.alpha[0])
    if mask is not None:
        pixels = mask[..., None]  # [B, H, W, 1]
        factor = config.vae.factor
        coarse = pixels[:, ::factor, ::factor]  # [B, h, w, 1]
        if config.inpaints:
            masked = vae(image * (1 - pixels), noise(keys, MASKED, shape), method="encode_latents")
            read = [coarse, masked]
        else:

            def blend(x, alpha):
                return coarse * x + (1 - coarse) * noised(alpha)

    predict_noise = guided(config, params, rows["ids"], negative_ids, scale, read)
    if form is not None:
        params_of_score, guide_scale, rate, active = guide

        def score(latents):
            found = form.score(params_of_score, vae(latents, method="decode_latents"), rows["scored"])
            return checked_score(found, len(latents))

        guide = guides.Guide(form, score, guide_scale, rate, active)
    latents, largest = denoise(predict_noise, schedule, steps, latents, keys, blend, on_step, guide=guide)
    images = vae(latents, method="decode_latents")
    images = jnp.where(jnp.isfinite(images), jnp.clip(images, -1, 1), jnp.nan)
    return nn.with_logical_constraint(images, (None,) * 4), nn.with_logical_constraint(largest, (None,))  # on all devices


def _generate(*inputs, attention, **options):
    with partitioning.forcing_attention(attention):
        return _sampled(*inputs, **options)


@functools.cache
def _compiled(mesh: jax.sharding.Mesh | None) -> Callable:
    """`_generate`, compiled for a mesh or for one device."""
    static = {"static_argnums": 0, "static_argnames": ("grid", "vae_tile", "partial", "on_step", "attention", "form")}
    if mesh is not None:
        return partitioning.MeshFunction(_generate, mesh, **static)
    options = partitioning.compiler_options(jax.devices()[0].device_kind)
    return jax.jit(_generate, compiler_options=options, **static)


def generate(
    model: folder.StableDiffusion,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    first: int = 0,
    negative_prompt: str = "",
    steps: int = 50,
    sampler: str = "ddim",
    guidance_scale: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    strength: float | None = None,
    truncate: bool = False,
    vae_tile: int | None = None,
    attention: str = "auto",
    on_step: Callable[[], None] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    guide: guides.Guidance | None = None,
) -> np.ndarray:
    """Generates one image for each of B prompts.

    Args:
      seed, first: row b is image number `first` + b of the seed.
      steps: the number of steps from pure noise to an image. sampler: one of `schedule.SAMPLERS`.
      guidance_scale: in `ranges.GUIDANCE`; 1 or less = no guidance, and the negative prompt is ignored.
      height, width: in pixels, if there is no image; by default the size of the UNet's training images.
      image: uint8[H, W, 3], or float in [-1, 1], or B of them: the image to start from or to inpaint.
      mask: bool[H, W], or B of them: True = inpaint here. An inpainting model reads the image outside of the mask; for any
        other model, the image outside is restored after each step.
      strength: share of the steps to take, and of the noise to add to the image; by default 0.8, or 1 with a mask. 1 with a
        mask starts from pure noise.
      truncate: drop the end of prompts that are too long.
      vae_tile: rows of pixels that a layer of the VAE computes at a time (`VAE.decode`); None = all.
      attention: its form, one of `rahf.models.attention.IMPLEMENTATIONS`; "auto": by device and size.
      on_step: called after each step.
      mesh: of `rahf.partitioning`; the images are sharded over it, and the parameters must be on it. On several hosts, each
        passes the same arguments and gets all images.
      guide: a score that the images shall raise (guide.py). With a scale of 0, no backward steps and no recurrence, the
        program is that without a guide.

    Returns:
      float32[B, H, W, 3] in [-1, 1].

    Raises:
      UserError: a size that the VAE's factor does not divide, a prompt that is too long, inputs that contradict each other,
        an image that is not finite, a guide without a gradient or without a step.
    """
    for name, value, allowed in (
        ("seed", seed, ranges.SEED),
        ("guidance_scale", guidance_scale, ranges.GUIDANCE),
        ("vae_tile", 1 if vae_tile is None else vae_tile, ranges.PIXELS),
    ):
        if value not in allowed:
            raise UserError(f"{name}: got {value!r}, expected {allowed}")
    config, count = model.config, len(prompts)
    if not count:
        raise UserError("prompts: got none, expected one or more")
    if image is None and (mask is not None or strength is not None):
        raise UserError(f"{'strength' if mask is None else 'mask'}: got one without an image; pass an image as well")
    if config.inpaints and mask is None:
        raise UserError("mask: got none for an inpainting model; pass an image and a mask, or take another model")
    if image is None:
        size = config.unet.sample_size * config.vae.factor
        height, width = height or size, width or size
    else:
        image = np.asarray(image)
        if image.shape[-1:] != (3,) or image.shape[:-3] not in ((), (1,), (count,)) or image.ndim < 3:
            raise UserError(f"image: got shape {image.shape}, expected [H, W, 3], or {count} of them")
        image = np.broadcast_to(image, (count, *image.shape[-3:]))
        if (height or image.shape[1], width or image.shape[2]) != image.shape[1:3]:
            raise UserError(f"image: got {image.shape[1:3]} pixels for height {height} and width {width}; leave these out")
        height, width = image.shape[1:3]
    grid = config.vae.grid(height, width)
    if height * width > (most := images.MAX_PIXELS):
        raise UserError(f"image: got {height} by {width} pixels (height by width), expected at most {most:,} in all")
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape[-2:] != (height, width) or mask.shape[:-2] not in ((), (1,), (count,)):
            got, expected = f"{mask.dtype}{list(mask.shape)}", f"bool[{height}, {width}]"
            raise UserError(f"mask: got {got}, expected {expected}, the image's size, or {count} of them")
        mask = np.broadcast_to(mask, (count, height, width)).astype(np.float32)
    strength = usual_strength(image, mask) if strength is None else strength
    steps = plan(config.schedule, sampler, steps, strength)
    negative_ids = model.text_ids([negative_prompt], truncate) if guidance_scale > 1 else None
    guide = guide if guide is not None and guide.acts else None
    active = guide.active(len(steps.timesteps)) if guide else None
    rows = {
        "ids": model.text_ids(prompts, truncate),
        "image": image,
        "mask": mask,
        "number": np.arange(first, first + count, dtype=np.int32),
        "scored": guide.score.rows(prompts) if guide else None,
    }
    partial = image is not None and (mask is None or strength < 1)
    options = {"grid": grid, "vae_tile": vae_tile, "partial": partial, "on_step": on_step, "attention": attention}
    options["form"] = None
    if mesh is not None:
        devices = partitioning.sizes(mesh)["data"]

        def place(array, size):
            return partitioning.place(schema.pad_rows(array, size), partitioning.batch_sharding(mesh))

        rows = jax.tree.map(lambda array: place(array, count + -count % devices), rows)
        negative_ids = None if negative_ids is None else place(negative_ids, devices)
    of_guide = None
    if guide:
        options["form"] = guide.form
        of_guide = guide.score.placed(mesh), np.float32(guide.scale), np.float32(guide.backward_rate), active
    inputs = rows, negative_ids, seed_data(seed), steps, np.float32(guidance_scale), of_guide
    drawn, largest = jax.device_get(_compiled(mesh)(config, model.params, *inputs, **options))
    drawn = drawn[:count]
    if guide and (guide.form.forward or guide.backward_steps):
        guides.check_gradient(largest, active, guide.scale)
    for number, (prompt, pixels) in enumerate(zip(prompts, drawn, strict=True), first):
        if not np.isfinite(pixels).all():
            raise UserError(
                f"sample: image {number} of seed {seed}, of the prompt {prompt[:80]!r}, is not finite; lower the guidance "
                f"scale ({guidance_scale}{f'; of the guide {guide.scale:g}' if guide else ''}), compute in float32, or "
                "take another model"
            )
    return drawn


def lower(
    config: folder.Config, mesh, count: int, steps: Plan, guidance: bool, height, width, vae_tile=None, attention="auto",
    guide: guides.Guidance | None = None,
):  # fmt: skip
    """The program of `generate` for text to image, lowered from shapes alone, and its parameters as shapes.

    Args:
      count: images, a multiple of the devices that share a batch. guidance: with classifier-free guidance, or without.
      guide: with shapes as its parameters and as the rows of `count` prompts. The rest: of `generate`.

    Returns:
      jax.stages.Lowered, and {"unet", "vae", "text_encoder"}, whole on every device of the mesh.
    """
    whole, length = partitioning.replicated(mesh), config.text.text.length
    shapes = nn.unbox(jax.eval_shape(functools.partial(folder.init, config), jax.random.key(0)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=partitioning.batch_sharding(mesh))

    rows = {"ids": integers(count, length), "number": integers(count), "image": None, "mask": None}
    negative_ids = integers(partitioning.sizes(mesh)["data"], length) if guidance else None
    of_guide, rows["scored"] = None, None
    if guide:
        of_score = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), guide.score.params)
        of_guide = of_score, np.float32(1), np.float32(1), guide.active(len(steps.timesteps))
        rows["scored"] = jax.tree.map(lambda x: integers(*x.shape), guide.score.rows([""] * count))
    inputs = rows, negative_ids, seed_data(0), steps, np.float32(1), of_guide
    options = {"grid": config.vae.grid(height, width), "vae_tile": vae_tile, "partial": False, "on_step": None}
    options |= {"attention": attention, "form": guide and guide.form}
    return _compiled(mesh).lower(config, params, *inputs, **options), params


def usual_strength(image, mask) -> float:
    """The default strength of `generate`."""
    return 0.8 if image is not None and mask is None else 1.0


def to_uint8(images: np.ndarray) -> np.ndarray:
    """float[..., 3] in [-1, 1] -> uint8."""
    return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


# ---- The command ----------------------------------------------------------------------------------------------------
def read_mask(path) -> np.ndarray:
    """The mask in an image file, bool[H, W]: True where the luminance (ITU-R 601) is half or more, as in diffusers.

    Transparent pixels count as white, so they are True.
    """
    return np.asarray(PIL.Image.fromarray(images.read(path)).convert("L")) >= 128


def read_prompts(path) -> list[str]:
    """The prompts of a text file, one per line, or of a .jsonl file with lines {"prompt": text}. Skips empty lines.

    Raises:
      UserError: no such file, a line of another form, no prompts.
    """
    if pathlib.Path(path).suffix == ".jsonl":
        rows = jsonl.read(path, "prompts", '{"prompt": text}', texts=("prompt",), blank=False)
        prompts = [row["prompt"].strip() for row in rows]
    else:
        prompts = list(jsonl.read_texts(path, "prompts"))
    if not prompts:
        raise UserError(f"prompts: {path} has none, expected one per line")
    return prompts


def guidance_of(args) -> guides.Guidance | None:
    """What the flags --guide* say. Raises UserError: a scale and such without a guide, or a guide without a strength."""
    given = {name: getattr(args, f"guide_{name}") for name in GUIDE}
    given = {name: value for name, value in given.items() if value is not None}
    if not args.guide:
        if given:
            raise UserError(f"guide: got --guide_{next(iter(given))} without --guide; add --guide=rahf:DIR:aesthetics")
        return None
    if not {"scale", "backward_steps"} & given.keys():
        raise UserError("guide: got no --guide_scale, expected one: try powers of ten, and look at the pictures")
    return guides.Guidance(specs.differentiable_of(args.guide), **{"scale": 0.0} | given)


def _settings(args, prompts: Sequence[str], guide: guides.Guidance | None) -> dict:
    """All that the images depend on: input files by content, the model's files by size and modification time."""
    names = ("seed", "num_images", "sampler", "steps", "guidance_scale", "negative_prompt", "height", "width", "strength")
    settings = {name: getattr(args, name) for name in (*names, "truncate", "dtype")} | {"prompts": list(prompts)}
    for name in ("image", "mask"):
        file = getattr(args, name)
        settings[name] = hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() if file else None
    if guide:
        of_guide = {field.name: getattr(guide, field.name) for field in dataclasses.fields(guide)}
        settings["guide"] = of_guide | {"score": guide.score.identity or args.guide}
    else:
        settings["guide"] = None
    return settings | {"model": files_of(args.model)}


def files_of(root) -> list[list]:
    """The state of a folder: name, size and modification time of each file."""
    root = pathlib.Path(root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [[str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def open_output(output: pathlib.Path, settings: dict, files: str = "*.png") -> None:
    """Notes the settings in a folder. Raises UserError if it holds such files of other settings."""
    file = output / "settings.json"
    if any(output.glob(files)):
        old = json_files.read(file) if file.is_file() else None
        different = [name for name in settings if settings[name] != old.get(name)] if old else ["origin"]
        if different:
            raise UserError(f"output: {output} holds images of another {' and '.join(different)}; choose another folder")
    json_files.write(file, settings)


def run(args) -> None:
    """Writes `args.num_images` images for each prompt. Skips batches whose files exist.

    Raises:
      UserError: as `generate`; no prompt; an output folder with images of other settings.
    """
    output = pathlib.Path(args.output)
    prompts = [*(args.prompt or []), *(read_prompts(args.prompts) if args.prompts else [])]
    if not prompts:
        raise UserError("prompt: got none, expected --prompt=TEXT or --prompts=FILE")
    image = images.read(args.image) if args.image else None
    mask = read_mask(args.mask) if args.mask else None
    if mask is not None and not mask.any():
        raise UserError(f"mask: {args.mask} marks no pixel, expected white where to inpaint (a luminance of half or more)")
    model = folder.read(args.model)
    model.text_ids(prompts, args.truncate)  # raises for a prompt that is too long
    if args.dtype:
        parts = {part: dataclasses.replace(getattr(model.config, part), dtype=args.dtype) for part in ("unet", "vae")}
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, **parts))
    if guide := guidance_of(args):
        guide.score.rows(list(dict.fromkeys(prompts)))  # raises for a prompt that it cannot read
    open_output(output, _settings(args, prompts, guide))
    jobs = [prompt for prompt in prompts for _ in range(args.num_images)]
    files = [f"{number:05d}.png" for number in range(len(jobs))]
    batch = -(-len(jobs) // -(-len(jobs) // args.batch_size))  # the smallest that gives as few batches
    batches = [range(first, min(first + batch, len(jobs))) for first in range(0, len(jobs), batch)]
    waiting = [numbers for numbers in batches if not all((output / files[number]).is_file() for number in numbers)]
    strength = usual_strength(image, mask) if args.strength is None else args.strength
    steps = len(plan(model.config.schedule, args.sampler, args.steps, strength).timesteps)
    done = (len(batches) - len(waiting)) * steps
    with tqdm(desc="sample", unit="step", total=len(batches) * steps, initial=done, dynamic_ncols=True) as bar:
        for numbers in waiting:
            part = [jobs[number] for number in numbers]
            drawn = generate(
                model,
                part + [part[-1]] * (batch - len(part)),  # one compiled shape
                seed=args.seed,
                first=numbers[0],
                negative_prompt=args.negative_prompt,
                steps=args.steps,
                sampler=args.sampler,
                guidance_scale=args.guidance_scale,
                height=args.height,
                width=args.width,
                image=image,
                mask=mask,
                strength=args.strength,
                truncate=args.truncate,
                vae_tile=args.vae_tile,
                attention=args.attention,
                on_step=bar.update,
                guide=guide,
            )
            for number, pixels in zip(numbers, to_uint8(drawn), strict=False):
                paths.replace(output / files[number], images.png(pixels))
            jax.effects_barrier()  # waits for the last updates of the bar
            bar.set_postfix(images=f"{numbers[-1] + 1}/{len(jobs)}")
    rows = [
        {"image": file, "prompt": prompt, "seed": args.seed, "number": number}
        for number, (file, prompt) in enumerate(zip(files, jobs, strict=True))
    ]
    jsonl.write(output / "images.jsonl", rows)
    print(f"{len(rows)} images: {output}/*.png, images.jsonl")


def main():
    """The command."""
    with paths.locked(flags.FLAGS.output):
        run(flags.FLAGS)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A diffusers folder of Stable Diffusion.")
    flags.DEFINE_multi_string("prompt", None, "A prompt; may be given several times.")
    flags.DEFINE_string("prompts", None, 'A file of prompts, one per line, or a .jsonl with lines {"prompt": text}.')
    flags.DEFINE_string("output", None, "The folder to write to.")
    ranges.flag("num_images", 1, "Images of each prompt.", ranges.COUNT)
    ranges.flag("batch_size", 4, "Images at a time.", ranges.ROWS)
    ranges.flag("steps", 50, "The number of steps from pure noise to an image.", ranges.COUNT)
    flags.DEFINE_enum("sampler", "ddim", SAMPLERS, "The sampler; dpm++ needs about half the steps.")
    ranges.flag("guidance_scale", 7.5, "Weight of classifier-free guidance; 1 = no guidance.", ranges.GUIDANCE)
    flags.DEFINE_string("negative_prompt", "", "A prompt that guidance leads away from.")
    ranges.flag("seed", 0, "The seed of the noise.", ranges.SEED)
    ranges.flag("height", None, "In pixels; by default that of the model's training images, or of --image.", ranges.PIXELS)
    ranges.flag("width", None, "In pixels; default as for --height.", ranges.PIXELS)
    flags.DEFINE_string("image", None, "An image to start from, or to inpaint.")
    flags.DEFINE_string("mask", None, "An image of the size of --image, white where to inpaint.")
    ranges.flag("strength", None, "Change of the image; by default 0.8, or 1 with a mask.", ranges.SOME_SHARE)
    flags.DEFINE_string("guide", None, "A reward that the pictures shall raise (rahf.reward.specs): rahf:DIR:aesthetics.")
    ranges.flag("guide_scale", None, "Weight of its gradient, which passes through the UNet.", guides.SCALE)
    ranges.flag("guide_backward_steps", None, "Steps uphill from each predicted clean picture; default 0.", ranges.NUMBER)
    ranges.flag("guide_backward_rate", None, "Length of such a step, times the gradient; default 1.", ranges.POSITIVE)
    ranges.flag("guide_recurrence", None, "Times that a guided step is taken; default 1.", guides.TIMES)
    ranges.flag("guide_start", None, "The share of the taken steps before the first guided one; default 0.", ranges.SHARE)
    ranges.flag("guide_end", None, "The share of the taken steps after which none is guided; default 1.", ranges.SHARE)
    flags.DEFINE_bool("truncate", False, "Drop the end of prompts that are too long.")
    ranges.flag("vae_tile", None, "Rows of pixels that a layer of the VAE computes at a time: less memory.", ranges.PIXELS)
    flags.DEFINE_enum("attention", "auto", ("auto", *IMPLEMENTATIONS), "The form of attention; by device and size if auto.")
    flags.DEFINE_enum("dtype", None, ("float32", "bfloat16"), "The dtype of the computation; float32 by default.")
    flags.mark_flags_as_required(["model", "output"])
    command.run(main)
