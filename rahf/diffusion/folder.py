"""Reads and writes a Stable Diffusion as a folder of diffusers.

    model_index.json                                       the list of parts; written last
    unet/, vae/         config.json, diffusion_pytorch_model.safetensors
    text_encoder/       config.json, model.safetensors
    tokenizer/          CLIP's vocabulary
    scheduler/          scheduler_config.json

Supported are Stable Diffusion 1.x, its inpainting model, and models of the same parts in other sizes, such as 2.x.
safety_checker/ and feature_extractor/ are ignored and not written. Names and shapes of all tensors are checked before any is
read.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Literal

import flax.traverse_util
import jax
import numpy as np
from flax import linen as nn
from tqdm.auto import tqdm

from rahf import checkpoints, names, readers, weights
from rahf.diffusion.schedule import SPACINGS, Schedule
from rahf.diffusion.unet import UNet, UNetConfig
from rahf.diffusion.vae import VAE, VAEConfig
from rahf.models.clip import CLIP, VIT_L14, CLIPConfig
from rahf.models.parameters import param_shapes
from rahf.pretrained import matched
from rahf.weights import Tensor, Tensors
from richhf_data import checked, clip_tokenizer, json_files, paths
from richhf_data.errors import UserError

INDEX = "model_index.json"
FORMAT = "0.42.1"  # the version of diffusers whose format we write
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
SCHEDULERS = (  # whose models predict noise or velocity on the same noise schedule; any of our samplers can sample from them
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler"),
    *("DDIMParallelScheduler", "DDPMParallelScheduler"),
)
PARTS = {  # part -> its classes
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": SCHEDULERS,
}
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that change no image, or none of a prompt's
KINDS = [(name, "safetensors") for name in ("diffusion_pytorch_model", "model")]
KINDS += [(name, "bin") for name in ("diffusion_pytorch_model", "pytorch_model")]
WEIGHTS = [  # in order of preference
    file
    for name, ending in KINDS
    for variant in ("", ".fp16")
    for file in (f"{name}{variant}.{ending}", f"{name}.{ending}.index{variant}.json")
]
VOCABULARY = (*clip_tokenizer.FILES, *clip_tokenizer.OPTIONS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Configurations of the parts; the defaults are those of Stable Diffusion 1.4 and 1.5."""

    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    vae: VAEConfig = dataclasses.field(default_factory=VAEConfig)
    text: CLIPConfig = VIT_L14  # only the text tower is used
    schedule: Schedule = dataclasses.field(default_factory=Schedule)

    def __post_init__(self):
        unet, channels, width = self.unet, self.vae.latent_channels, self.text.text.width
        if unet.out_channels != channels or unet.in_channels not in (channels, 2 * channels + 1):
            raise UserError(
                f"unet: got in_channels = {unet.in_channels} and out_channels = {unet.out_channels} for "
                f"vae.latent_channels = {channels}, expected {channels} of both, or {2 * channels + 1} in for inpainting"
            )
        if unet.cross_attention_dim != width:
            raise UserError(
                f"unet.cross_attention_dim: got {unet.cross_attention_dim}, expected the text encoder's width, {width}"
            )

    @property
    def inpaints(self) -> bool:
        """Whether the UNet also reads a mask and the masked image."""
        return self.unet.in_channels != self.unet.out_channels

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks, by part. The text encoder's method is `text_tokens`."""
        return {"unet": UNet(self.unet), "vae": VAE(self.vae), "text_encoder": CLIP(self.text, text_only=True)}


def init(config: Config, key: jax.Array) -> dict:
    """New parameters of the three parts, boxed with their logical axes. Can be traced by JAX."""
    unet, vae, text = config.modules.values()
    keys, size = jax.random.split(key, 3), config.vae.factor
    latents = np.zeros((1, size, size, config.unet.in_channels), np.float32)  # the smallest size that every level can halve
    context = np.zeros((1, 1, config.unet.cross_attention_dim), np.float32)
    image = np.zeros((1, size, size, config.vae.in_channels), np.float32)
    return {
        "unet": unet.init(keys[0], latents, np.zeros((), np.int32), context)["params"],
        "vae": vae.init(keys[1], image)["params"],
        "text_encoder": text.init(keys[2], np.zeros((1, 1), np.int32), method="text_tokens")["params"],
    }


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
    """A Stable Diffusion in memory.

    Attributes:
      params: {"unet", "vae", "text_encoder"} -> nested dictionaries of float32 arrays, or of `Tensor`s (`opened`).
      vocabulary: the folder with the tokenizer's files.
    """

    config: Config
    params: dict
    vocabulary: pathlib.Path

    @functools.cached_property
    def tokenizer(self) -> clip_tokenizer.Tokenizer:
        return clip_tokenizer.Tokenizer(self.vocabulary)

    def text_ids(self, prompts, truncate: bool = False) -> np.ndarray:
        """Tokenizes prompts: int32[B, L], L = the text encoder's positions (77).

        Args:
          truncate: drop the end of a prompt that is too long.

        Raises:
          UserError: a prompt is too long, without `truncate`.
        """
        length = self.config.text.text.length
        for prompt in prompts:
            if not truncate and (count := self.tokenizer.num_ids(prompt)) > length:
                raise UserError(
                    f"prompt: {prompt[:80]!r} takes {count} ids with its start and end, the text encoder reads {length}; "
                    "shorten it, or let its end be dropped (truncate)"
                )
        return self.tokenizer(prompts, length)


# ---- Configurations -------------------------------------------------------------------------------------------------
# Options that our networks do not have, with the values that they implement. A file with other values is refused.
UNET_FIXED = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "cross_attention_norm": None,
}
VAE_FIXED = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
SCHEDULE_FIXED = {"thresholding": False, "rescale_betas_zero_snr": False}
# The same for one sampler: those options that diffusers' scheduler of it takes from the file, whatever the file's scheduler
# is, with the values that ours implements.
SAMPLER_FIXED = {
    "ddpm": {"variance_type": ("fixed_small", "fixed_small_log")},
    "dpm++": {
        "solver_order": (2,),
        "algorithm_type": ("dpmsolver++", "deis"),  # other solvers' names become its own
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
        "final_sigmas_type": ("zero",),
        "lambda_min_clipped": (-np.inf,),
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None),
        "use_dynamic_shifting": (False, None),
    },
}
# diffusers' values of options that a file lacks, where they are not Stable Diffusion's. Of the scheduler, those of
# DDIMScheduler, DDPMScheduler and DPMSolverMultistepScheduler.
UNET_ABSENT = {"cross_attention_dim": 1280, "attention_head_dim": 8}
VAE_ABSENT = {"block_out_channels": [64], "layers_per_block": 1}
SCHEDULE_ABSENT = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "set_alpha_to_one": True,
    "timestep_spacing": None,
}
OURS = {"dtype", "remat", "unsupported"}  # fields of our configurations that diffusers does not have


def _config(cls, file: pathlib.Path, values: Mapping, fixed: Mapping):
    """Values of a config file of diffusers as our `cls`."""
    for name, expected in fixed.items():
        if values.get(name, expected) != expected:
            raise UserError(f"{file}: got {name} = {checked.shown(values[name])}, only {expected!r} is supported")
    ours = {field.name for field in dataclasses.fields(cls)} - OURS
    return json_files.conform(cls, {name: value for name, value in values.items() if name in ours}, file)


def _unet_config(file: pathlib.Path) -> UNetConfig:
    values = UNET_ABSENT | _read_json(file)
    if values.get("sample_size") is None or _before_0_9(values.get("_diffusers_version"), values["sample_size"]):
        values["sample_size"] = 64
    if type(heads := values["attention_head_dim"]) is int:
        values["attention_head_dim"] = (heads,) * len(UNetConfig.block_out_channels)
        if isinstance(channels := values.get("block_out_channels"), list):
            values["attention_head_dim"] = (heads,) * len(channels)
    return _config(UNetConfig, file, values, UNET_FIXED)


def _before_0_9(version, sample_size) -> bool:
    """Whether diffusers' pipelines take a sample size of less than 64 for a mistake of an old version."""
    old = isinstance(version, str) and re.match(r"0\.[0-8](\D|$)", version)
    return bool(old) and type(sample_size) is int and 0 < sample_size < 64


def _vae_config(file: pathlib.Path) -> VAEConfig:
    values = VAE_ABSENT | _read_json(file)
    config = _config(VAEConfig, file, values, VAE_FIXED)
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        expected = [block] * len(config.block_out_channels)
        if (found := values.get(name, [block])) != expected:
            raise UserError(f"{file}: got {name} = {checked.shown(found)}, only {expected} is supported")
    return config


def _text_config(file: pathlib.Path) -> CLIPConfig:
    values = _read_json(file)
    if values.get("model_type") == "clip":  # of both towers
        values = values.get("text_config")
    text = json_files.conform(readers.clip.CLIPTextFile, values, file, extra=True)
    vision = readers.clip.CLIPVisionFile(hidden_act=text.hidden_act, layer_norm_eps=text.layer_norm_eps)  # not used
    return readers.clip.clip_config(text, vision, CLIPConfig.projection_dim, file)


@dataclasses.dataclass(frozen=True)
class SchedulerFile:
    """Options of a scheduler's config that `Schedule` lacks, or that have fewer values here than there."""

    clip_sample: bool | None = None
    timestep_spacing: Literal[SPACINGS] = SPACINGS[0]


def _schedule(file: pathlib.Path) -> Schedule:
    found = _read_json(file)
    values = SCHEDULE_ABSENT | found
    if (name := values.get("_class_name", SCHEDULERS[0])) not in SCHEDULERS:
        raise UserError(f"{file}: got _class_name = {checked.shown(name)}, expected one of {', '.join(SCHEDULERS)}")
    json_files.conform(SchedulerFile, found, file, extra=True)
    schedule = _config(Schedule, file, values, SCHEDULE_FIXED)
    unsupported = tuple(
        (sampler, f"{name} = {checked.shown(values[name])} ({file})")
        for sampler, options in SAMPLER_FIXED.items()
        for name, allowed in options.items()
        if name in values and values[name] not in allowed
    )
    # Some files have offset 0. diffusers' pipelines set it to 1, and `clip_sample` to False.
    return dataclasses.replace(schedule, steps_offset=1, unsupported=unsupported)


def _check_index(file: pathlib.Path) -> None:
    """Refuses another pipeline, and parts that are missing, unknown or of another class."""
    index = _read_json(file)
    if (found := index.get("_class_name")) not in PIPELINES or "text_encoder_2" in index:
        xl = "XL" in str(found) or "text_encoder_2" in index
        name = "SDXL, which is not supported" if xl else f"a {checked.plain(found)}"
        raise UserError(f"model: {file.parent} is {name}; expected Stable Diffusion 1.x or 2.x ({', '.join(PIPELINES)})")
    for part, classes in PARTS.items():
        entry = index.get(part)
        libraries = [["diffusers", name] for name in classes] + [["transformers", name] for name in classes]
        if entry not in libraries:
            raise UserError(f"{file}: got {part} = {checked.shown(entry)}, expected a class of {', '.join(classes)}")
    for part, entry in index.items():
        if isinstance(entry, list) and part not in (*PARTS, *IGNORED) and entry != [None, None]:
            raise UserError(f"{file}: has the part {part} = {checked.shown(entry)}, expected {', '.join(PARTS)} alone")


def _read_json(file: pathlib.Path) -> dict:
    if not file.is_file():
        raise UserError(f"model: no {file}, expected a diffusers folder of Stable Diffusion: {INDEX} and a folder a part")
    return json_files.read(file)


def read_config(folder) -> Config:
    """The configuration of a diffusers folder.

    Raises:
      UserError: no such folder, another pipeline (SDXL for instance), a part whose options are not supported.
    """
    folder = pathlib.Path(folder)
    _check_index(folder / INDEX)
    parts = (
        _unet_config(folder / "unet/config.json"),
        _vae_config(folder / "vae/config.json"),
        _text_config(folder / "text_encoder/config.json"),
        _schedule(folder / "scheduler/scheduler_config.json"),
    )
    with json_files.named(folder):
        return Config(*parts)


# ---- Tensors --------------------------------------------------------------------------------------------------------
def linear(x):
    """Layout of torch's `Linear`, or of a 1 x 1 `Conv2d`, which old VAE files have instead."""
    return x.reshape(x.shape[:2]).T


def gated(x):
    """Layout of the kernel of diffusers' `GEGLU`: theirs is [2 * out, in], ours [in, 2, out]."""
    return x.reshape(2, -1, x.shape[1]).transpose(2, 0, 1)


def gated_bias(x):
    """Layout of the bias of `GEGLU`: theirs is [2 * out], ours [2, out]."""
    return x.reshape(2, -1)


BACK = {  # layout -> its inverse
    names.same: names.same,
    names.transposed: np.transpose,
    names.leading: lambda x: x[0],
    names.convolution: lambda x: x.transpose(3, 2, 0, 1),
    linear: np.transpose,
    gated: lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    gated_bias: lambda x: x.reshape(-1),
}
THEIRS = (  # our names -> diffusers', as regular expressions to apply in order
    (r"(blocks|resnets|attentions)_(\d+)", r"\1.\2"),
    (r"(down|up)sampler/", r"\1samplers.0.conv/"),
    (r"to_out/", "to_out.0/"),
    (r"ff_in/", "ff.net.0.proj/"),
    (r"ff_out/", "ff.net.2/"),
    (r"(kernel|scale)$", "weight"),
    (r"/", "."),
)
# Names in the VAE files of SD 1.4 and 1.5 -> current ones.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def tensor_map(part: str, config: Config, ours: Mapping[str, jax.ShapeDtypeStruct]) -> names.TensorMap:
    """Our parameters of a part -> the tensors of diffusers (of transformers for the text encoder)."""
    if part == "text_encoder":
        return {name: entry for name, entry in names.clip_from_hugging_face(config.text).items() if name in ours}
    found = {}
    for name, leaf in ours.items():
        theirs = functools.reduce(lambda name, rule: re.sub(*rule, name), THEIRS, name)
        layouts = {"kernel": {2: linear, 3: gated, 4: names.convolution}, "bias": {2: gated_bias}}
        found[name] = (theirs, layouts.get(name.rpartition("/")[2], {}).get(len(leaf.shape), names.same))
    return found


@functools.lru_cache(maxsize=8)
def _shapes(config: Config) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Part -> its parameters by name."""
    shapes = {part: {} for part in config.modules}
    for path, leaf in param_shapes(lambda key: {"params": init(config, key)}).items():
        part, _, name = path.partition("/")
        shapes[part][name] = leaf
    return shapes


def _open_part(folder: pathlib.Path, part: str) -> Tensors:
    found = [folder / part / name for name in WEIGHTS if (folder / part / name).is_file()]
    if not found:
        expected = ", ".join(f"{name}.{ending}" for name, ending in KINDS)
        raise weights.no_weights(folder / part, f"{expected}, or one of these as *.fp16.* or as an index of its parts")

    def current(theirs):  # their name in current versions
        if part == "vae":
            return re.sub(r"(attentions\.\d+)\.(\w+)", lambda m: f"{m[1]}.{OLD_ATTENTION.get(m[2], m[2])}", theirs)
        return f"text_model.{theirs.removeprefix('text_model.')}" if part == "text_encoder" else theirs

    return {current(theirs): tensor for theirs, tensor in weights.open_hugging_face(found[0]).items()}


def opened(folder) -> StableDiffusion:
    """A diffusers folder whose `params` are `Tensor`s, which are not read yet.

    Raises:
      UserError: as `read_config`; missing, extra or wrongly shaped tensors, with the first of their names.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    tensors = {}
    for part, ours in _shapes(config).items():
        unused = r".*\.position_ids" if part == "text_encoder" else ""
        theirs = _open_part(folder, part)
        found = matched(theirs, tensor_map(part, config, ours), ours, unused, f"{part} of {folder}")
        tensors |= {f"{part}/{name}": tensor for name, tensor in found.items()}
    vocabulary = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    return StableDiffusion(config, flax.traverse_util.unflatten_dict(tensors, sep="/"), vocabulary)


def read(folder) -> StableDiffusion:
    """Reads a diffusers folder. Parameters are float32, on the default device.

    Raises:
      UserError: as `opened`; tensors that hold no finite numbers.
    """
    model, params = opened(folder), {}
    tensors = flax.traverse_util.flatten_dict(model.params)
    for path, array in tqdm(weights.read_all(tensors), desc="read", unit="tensor", total=len(tensors)):
        params[path] = jax.device_put(array)
    return dataclasses.replace(model, params=flax.traverse_util.unflatten_dict(params))


def write(model: StableDiffusion, folder) -> None:
    """Writes a folder for diffusers' `StableDiffusionPipeline.from_pretrained`, or for that of the inpainting pipeline.

    The weights are float32. There is no safety checker. model_index.json is written last: a folder without it is incomplete.

    Raises:
      UserError: the folder already holds a complete pipeline.
    """
    folder, config, shapes = pathlib.Path(folder), model.config, _shapes(model.config)
    if (folder / INDEX).exists():
        raise UserError(f"output: {folder} holds a pipeline already; choose another folder")
    for part, file in (("unet", WEIGHTS[0]), ("vae", WEIGHTS[0]), ("text_encoder", "model.safetensors")):
        params, tensors = flax.traverse_util.flatten_dict(model.params[part], sep="/"), {}
        found, wanted = ({name: leaf.shape for name, leaf in side.items()} for side in (params, shapes[part]))
        checkpoints.check_shapes(found, wanted, part)
        for name, (theirs, layout) in tensor_map(part, config, shapes[part]).items():
            back, leaf = BACK[layout], params[name]
            shape = back(np.broadcast_to(np.float32(0), leaf.shape)).shape
            tensors[theirs] = Tensor(shape, lambda back=back, leaf=leaf: back(np.asarray(leaf)))
        progress = functools.partial(tqdm, desc=f"write {part}", unit="tensor")
        weights.write_safetensors(folder / part / file, tensors, progress)
    for part, values in _their_configs(config).items():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        json_files.write(folder / part / name, values)
    for name in VOCABULARY:
        if (model.vocabulary / name).is_file():
            paths.replace(folder / "tokenizer" / name, (model.vocabulary / name).read_bytes())
    if not (folder / "tokenizer/tokenizer_config.json").is_file():
        tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.text.text.length}
        json_files.write(folder / "tokenizer/tokenizer_config.json", tokenizer)
    json_files.write(folder / INDEX, _index(config))


def _index(config: Config) -> dict:
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    absent = {name: [None, None] for name in IGNORED}
    pipeline = {"_class_name": PIPELINES[2 if config.inpaints else 0], "_diffusers_version": FORMAT}
    return pipeline | {"requires_safety_checker": False} | parts | absent


def _their_configs(config: Config) -> dict[str, dict]:
    def fields(part):
        return {name: value for name, value in dataclasses.asdict(part).items() if name not in OURS}

    tower, depth = config.text.text, len(config.vae.block_out_channels)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * depth, "up_block_types": ["UpDecoderBlock2D"] * depth}
    size = config.unet.sample_size * config.vae.factor
    text = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tower.vocab_size,
        "hidden_size": tower.width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.num_heads,
        "intermediate_size": tower.mlp_dim,
        "max_position_embeddings": tower.length,
        "projection_dim": config.text.projection_dim,
        "hidden_act": config.text.activation,
        "layer_norm_eps": config.text.epsilon,
        "bos_token_id": tower.eos_id - 1,
        "eos_token_id": tower.eos_id,
    }
    schedule = fields(config.schedule)
    if schedule["timestep_spacing"] is None:  # that of the scheduler that reads the file, if the file has none
        del schedule["timestep_spacing"]
    return {
        "unet": {"_class_name": "UNet2DConditionModel"} | UNET_FIXED | fields(config.unet),
        "vae": {"_class_name": "AutoencoderKL", "sample_size": size} | VAE_FIXED | blocks | fields(config.vae),
        "text_encoder": text,
        "scheduler": {"_class_name": "DDIMScheduler", "clip_sample": False} | SCHEDULE_FIXED | schedule,
    }
