"""OpenCLIP's weights: every form of their files, the published sizes, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
import tiny_preference

from rahf import convert, readers, weights
from rahf.models.clip import CLIP, VIT_L14, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rahf.models.parameters import param_shapes
from rahf.weights import Tensor
from richhf_data import checked
from richhf_data.errors import UserError

B16 = CLIPConfig(CLIPVisionConfig(patch_size=16))
L14_336 = dataclasses.replace(VIT_L14, vision=dataclasses.replace(VIT_L14.vision, image_size=336))
H14 = CLIPConfig(
    CLIPVisionConfig(patch_size=14, width=1280, depth=32, num_heads=16, mlp_dim=5120),
    CLIPTextConfig(width=1024, depth=24, num_heads=16, mlp_dim=4096),
    projection_dim=1024,
    activation="gelu",
)
BIGG14 = CLIPConfig(
    CLIPVisionConfig(patch_size=14, width=1664, depth=48, num_heads=16, mlp_dim=8192),
    CLIPTextConfig(width=1280, depth=32, num_heads=20, mlp_dim=5120),
    projection_dim=1280,
    activation="gelu",
)
NAMED = {  # OpenCLIP's name -> (configuration, parameters)
    "ViT-B-32": (CLIPConfig(), 151_277_313),
    "ViT-B-16": (B16, 149_620_737),
    "ViT-L-14": (VIT_L14, 427_616_513),
    "ViT-L-14-336": (L14_336, 427_944_193),
    "ViT-H-14": (H14, 986_109_441),
    "ViT-bigG-14": (BIGG14, 2_539_567_105),
}


@pytest.fixture(scope="module")
def source(unpacked):
    """The tiny OpenCLIP as a folder of the hub."""
    return tiny_preference.write(unpacked("preference_tiny"), "open_clip")


def tensors_of(source):
    return safetensors.numpy.load_file(source / "open_clip.safetensors")


def shaped(shapes) -> weights.Tensors:
    return {name: Tensor(tuple(shape), lambda: None) for name, shape in shapes.items()}


# ---- Sizes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMED)
def test_the_published_sizes_have_their_parameters(name):
    """By the sum over one block of each tower, times its depth, and the rest."""
    config, count = NAMED[name]
    one = [dataclasses.replace(tower, depth=1) for tower in (config.vision, config.text)]
    size, length = config.vision.image_size, config.text.length
    inputs = np.zeros((1, size, size, 3), np.float32), np.zeros((1, length), np.int32)
    shapes = param_shapes(CLIP(dataclasses.replace(config, vision=one[0], text=one[1])).init, *inputs)
    depths = {"vision/block_0/": config.vision.depth, "text/block_0/": config.text.depth}
    times = {name: next((depth for start, depth in depths.items() if name.startswith(start)), 1) for name in shapes}
    assert sum(int(np.prod(leaf.shape)) * times[name] for name, leaf in shapes.items()) == count


@pytest.mark.parametrize("name", NAMED)
def test_the_published_sizes_are_read_from_their_names_and_shapes(name, torch):
    """Of OpenCLIP's models and of transformers', on the meta device."""
    open_clip, transformers = pytest.importorskip("open_clip"), pytest.importorskip("transformers")
    from test_clip import huggingface_options

    config, count = NAMED[name]
    settings = open_clip.get_model_config(name)
    quick = {"quick_gelu": True} if config.activation == "quick_gelu" else {}
    with torch.device("meta"):
        theirs = open_clip.CLIP(**settings).state_dict()
        text, vision = huggingface_options(config)
        options = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.projection_dim)
        of_transformers = transformers.CLIPModel(options).state_dict()
    shapes = shaped({key: value.shape for key, value in theirs.items()})
    found = readers.clip.clip_from_open_clip(shapes, {"model_cfg": settings | quick}, name)
    assert checked.conform(CLIPConfig, json.loads(json.dumps(found.config["clip"]))) == config
    assert sum(int(np.prod(tensor.shape)) for tensor in found.tensors.values()) == count
    table, ours = readers.names.clip_from_hugging_face(config), readers.clip._clip_shapes(config)
    shapes = shaped({key: value.shape for key, value in of_transformers.items()})
    assert set(readers.matched(shapes, table, ours, r".*\.position_ids", name)) == set(found.tensors)


def test_sizes_that_no_tensor_tells_follow_the_width():
    """Without a configuration: 80 wide heads at width 1280, the exact GELU."""
    theirs = {"visual.conv1.weight": (1280, 3, 14, 14), "visual.positional_embedding": (257, 1280)}
    theirs |= {"visual.proj": (1280, 1024), "visual.transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280)}
    theirs |= {"token_embedding.weight": (49408, 1024), "positional_embedding": (77, 1024)}
    theirs |= {"transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024)}
    found = readers.clip._open_clip_config(shaped(theirs), readers.clip.OpenCLIPFile(), "CLIP")
    vision, text = (dataclasses.replace(tower, depth=1) for tower in (H14.vision, H14.text))
    assert found == dataclasses.replace(H14, vision=vision, text=text)


# ---- Forms of files -------------------------------------------------------------------------------------------------
def same(one, other):
    assert one.config == other.config
    for name, tensor in other.tensors.items():
        np.testing.assert_array_equal(one.tensors[name].read(), tensor.read())


def test_checkpoints_of_trainings_and_custom_text_towers_are_read(source, tmp_path):
    tensors, config = tensors_of(source), json.loads((source / readers.clip.OPEN_CLIP_CONFIG).read_text())
    plain = readers.clip.clip_open_clip(source)
    for prefix in ("module.", ""):
        texts = {f"text.{name}" if not name.startswith(("visual.", "logit")) else name: x for name, x in tensors.items()}
        for one in (tensors, texts):
            safetensors.numpy.save_file({prefix + name: x for name, x in one.items()}, tmp_path / "a.safetensors")
            theirs = weights.open_safetensors(tmp_path / "a.safetensors")
            same(readers.clip.clip_from_open_clip(theirs, config, "CLIP"), plain)


def test_torch_files_and_folders_of_the_hub_are_read(source, torch, tmp_path):
    state = {f"module.{name}": torch.from_numpy(x) for name, x in tensors_of(source).items()}
    config = (source / readers.clip.OPEN_CLIP_CONFIG).read_bytes()
    (tmp_path / readers.clip.OPEN_CLIP_CONFIG).write_bytes(config)
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    same(readers.clip.clip_open_clip(tmp_path / "epoch_3.pt"), readers.clip.clip_open_clip(source))
    torch.save(dict(state), tmp_path / "open_clip_pytorch_model.bin")
    safetensors.numpy.save_file({"of": np.ones(1, np.float32)}, tmp_path / "model.safetensors")  # transformers' beside it
    same(readers.clip.clip_open_clip(tmp_path), readers.clip.clip_open_clip(source))


def test_the_command_says_what_it_found(source, tmp_path):
    converted = convert.convert("open-clip", source, tmp_path / "out")
    assert converted.found == ("image tower of 2 layers, 2 heads, 24 px; text tower of 1 layers, 3 heads; activation gelu")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "SHA256SUMS", "config.json", "merges.txt", "vocab.json", "weights.safetensors"
    ]  # fmt: skip


# ---- Refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("visual.layer1.0.conv1.weight", "holds a ResNet "),
        ("visual.trunk.blocks.0.norm1.weight", "holds an image tower of timm"),
        ("text_decoder.ln_final.weight", "holds a CoCa"),
        ("logit_bias", "holds a SigLIP"),
        ("text.transformer.encoder.layer.0.attention.self.query.weight", "holds a text tower of Hugging Face"),
        ("visual.transformer.resblocks.0.ls_1.gamma", r"ls_1.gamma \(1,\): no parameter of ours takes it"),
    ],
)
def test_what_is_no_plain_clip_is_refused_by_name(name, message, source):
    theirs = weights.open_safetensors(source / "open_clip.safetensors") | shaped({name: (1,)})
    settings = json.loads((source / readers.clip.OPEN_CLIP_CONFIG).read_text())
    with pytest.raises(UserError, match=message):
        readers.clip.clip_from_open_clip(theirs, settings, "CLIP")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"layers": 3}}, r"vision_cfg.layers: got 3, expected 2, as the tensors say"),
        ({"vision_cfg": {"image_size": 32}}, r"vision_cfg.image_size: got 32, expected 24"),
        ({"vision_cfg": {"pool_type": "avg"}}, r"model_cfg.vision_cfg.pool_type: got 'avg', expected 'tok'"),
        ({"text_cfg": {"no_causal_mask": True}}, r"model_cfg.text_cfg.no_causal_mask: got True, expected False"),
        ({"text_cfg": {"act_kwargs": {"approximate": "tanh"}}}, r"text_cfg.act_kwargs: got .*, expected null"),
        ({"vision_cfg": {"head_width": 5}}, r"clip.vision.width: got 16, expected a multiple of num_heads = 3"),
        ({"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}, r"preprocess_cfg.mean: got \(0.5, 0.5, 0.5\), expected OpenAI's"),
        ({"preprocess_cfg": {"resize_mode": "squash"}}, r"preprocess_cfg.resize_mode: got 'squash', expected 'shortest'"),
        (None, r"embeds 517 ids, expected the 49408 of CLIP's tokenizer; put its open_clip_config.json beside"),
    ],
)
def test_a_configuration_that_computes_something_else_is_refused(change, message, source):
    settings = json.loads((source / readers.clip.OPEN_CLIP_CONFIG).read_text())
    for part, values in (change or {}).items():
        place = settings if part == "preprocess_cfg" else settings["model_cfg"]
        place[part] = place.get(part, {}) | values
    with pytest.raises(UserError, match=message):
        theirs = weights.open_safetensors(source / "open_clip.safetensors")
        readers.clip.clip_from_open_clip(theirs, settings if change else None, "CLIP")


def test_a_file_of_another_format_is_refused(source, tmp_path):
    safetensors.numpy.save_file({"a": np.ones(1, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"CLIP .*a.safetensors: lacks \['visual.conv1.weight', .*is it another format"):
        readers.clip.clip_open_clip(tmp_path / "a.safetensors")
