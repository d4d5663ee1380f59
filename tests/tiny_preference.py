"""Tiny models of the published preference scores, and what the originals compute with them.

    python tests/tiny_preference.py       writes tests/data/preference_tiny.zip; needs torch, torchvision, open_clip

The zip has, for each of `MODELS`, its configuration, the names and shapes of its tensors, and golden.npz with the originals'
outputs for `pictures` and `PROMPTS`. The weights are not in it: `tiny_diffusion.weight` makes them from their names.
"""

import io
import json
import pathlib
import sys
import tempfile
import zipfile

import numpy as np
import PIL.Image
import safetensors.numpy
from tiny_diffusion import weight, write_tokenizer

DATA = pathlib.Path(__file__).parent / "data" / "preference_tiny.zip"
PROMPTS = ["red cat", "a cat, on a red cat", "", "cat " * 60]  # the last one is cut by all of them
SIZE = 24  # pixels that each model reads
SIGMA, COPIES, NOISE, SEED = 1.5, 3, 0.2, 5  # of the gradient maps
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", ",", "on"]
OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "mlp_ratio": 1.5},
    "text_cfg": {"context_length": 40, "vocab_size": 517, "width": 24, "heads": 3, "layers": 1},
}
CLIP = {  # PickScore's format
    "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    | {"vocab_size": 517, "max_position_embeddings": 40, "eos_token_id": 516, "hidden_act": "gelu"},
    "vision_config": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 28}
    | {"image_size": SIZE, "patch_size": 6, "hidden_act": "gelu"},
    "projection_dim": 10,
}
BLIP_TEXT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BLIP_TEXT |= {"vocab_size": len(WORDS) + 2, "max_position_embeddings": 48, "encoder_hidden_size": 64}
BLIP_TEXT |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
BLIP_VISION = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 96}
BLIP_VISION |= {"image_size": SIZE, "patch_size": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
MODELS = ("open_clip", "clip", "mlp", "linear", "image_reward")


def pictures() -> list[np.ndarray]:
    """Noise over a gradient, with edges; sides that are odd, smaller and larger than `SIZE`, and equal to it."""
    out = []
    for number, (height, width) in enumerate([(31, 46), (67, 29), (24, 24), (13, 17)]):
        y, x = np.mgrid[:height, :width] / max(height, width)
        noise = np.random.default_rng(number).uniform(0, 0.4, (height, width, 3))
        picture = 0.6 * np.stack([x, y, (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1], axis=-1) + noise
        picture[: height // 3, : width // 4] = 1
        out.append(np.round(255 * picture.clip(0, 1)).astype(np.uint8))
    return out


def write_words(folder: pathlib.Path) -> None:
    """A vocabulary of BERT's kind."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")


def write(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Adds to a folder of the zip the weights and the tokenizer. Returns what to give to rahf.convert."""
    shapes = json.loads((folder / name / "tensors.json").read_text())
    tensors = {tensor: np.array(weight(f"{name}.{tensor}", shape)) for tensor, shape in shapes.items()}
    file = folder / name / ("model.safetensors" if name == "clip" else f"{name}.safetensors")
    safetensors.numpy.save_file(tensors, file)
    if name in ("open_clip", "clip"):
        write_tokenizer(folder / name)
    if name == "image_reward":
        write_words(folder / name)
    return folder / name if name in ("open_clip", "clip") else file


# ---- With the originals ---------------------------------------------------------------------------------------------
def named_weights(name: str, module, rename=lambda tensor: tensor):
    """Sets the parameters of a torch module to those of `write`. Returns their names and shapes."""
    import torch

    shapes = {}
    with torch.no_grad():
        for tensor, parameter in module.named_parameters():
            shapes[rename(tensor)] = list(parameter.shape)
            parameter.copy_(torch.from_numpy(np.array(weight(f"{name}.{rename(tensor)}", tuple(parameter.shape)))))
    module.eval()
    return shapes


def torchvision_pixels(resize: str):
    """What the originals make of `pictures`: float32[B, 3, SIZE, SIZE] less the mean and by the deviation."""
    import torch
    import torchvision.transforms as T
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import functional as F

    bicubic, normalize = T.InterpolationMode.BICUBIC, T.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    if resize == "crop":  # of OpenAI, OpenCLIP and ImageReward
        steps = T.Compose([T.Resize(SIZE, interpolation=bicubic), T.CenterCrop(SIZE), T.ToTensor(), normalize])
        return torch.stack([steps(PIL.Image.fromarray(picture)) for picture in pictures()])
    out = []  # hpsv2/src/open_clip/transform.py: ResizeMaxSize after ToTensor, then Normalize
    for picture in pictures():
        x = T.ToTensor()(PIL.Image.fromarray(picture))
        height, width = (round(side * (SIZE / max(x.shape[1:]))) for side in x.shape[1:])
        x = F.resize(x, [height, width], bicubic)
        rows, columns = SIZE - height, SIZE - width
        x = F.pad(x, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2], fill=0)
        out.append(normalize(x))
    return torch.stack(out)


def clip_processor(**options):
    """The processor that PickScore was trained with, on PIL. The one on torchvision's tensors differs by one level."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind(size={"shortest_edge": SIZE}, crop_size=SIZE, **options)


def clip_ids(folder: pathlib.Path):
    import torch

    from richhf_data import clip_tokenizer

    write_tokenizer(folder)
    return torch.from_numpy(clip_tokenizer.Tokenizer(folder)(PROMPTS, 40)).long()


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def open_clip_outputs(folder: pathlib.Path) -> tuple[dict, dict]:
    """(shapes, outputs) of an OpenCLIP: HPSv2's pixels and scores, gradient maps."""
    import jax
    import open_clip
    import scipy.ndimage
    import torch

    model = open_clip.CLIP(**OPEN_CLIP)
    shapes, ids = named_weights("open_clip", model), clip_ids(folder)
    pixels = torchvision_pixels("pad")
    image, text = unit(model.encode_image(pixels)), unit(model.encode_text(ids))
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    outputs = {"hpsv2": (image * text).sum(-1), "hpsv2_pixels": (pixels * std + mean).permute(0, 2, 3, 1)}

    # Gradient maps of CLIP's square, as the processor of transformers cuts it.
    processor = clip_processor(do_normalize=False, do_rescale=False)
    squares = [processor(picture, return_tensors="np")["pixel_values"][0] for picture in pictures()]
    squares = torch.from_numpy(np.stack(squares)).float() / 127.5 - 1

    def cosine(x):
        return (unit(model.encode_image((x / 2 + 0.5 - mean) / std)) * text.detach()).sum()

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(cosine(x), x)[0]

    def mapped(found):
        maps = found.abs().amax(1).numpy()
        maps = np.stack([scipy.ndimage.gaussian_filter(one, SIGMA) for one in maps])
        return maps / maps.max((1, 2), keepdims=True)

    keys = jax.random.split(jax.random.key(SEED), COPIES)
    noise = [np.array(jax.random.normal(key, (SIZE, SIZE, 3))).transpose(2, 0, 1) for key in keys]
    noisy = [gradient(squares + 2 * NOISE * torch.from_numpy(one)) for one in noise]
    outputs |= {"gradient": mapped(gradient(squares)), "smoothgrad": mapped(sum(noisy))}

    kept = []
    hook = model.visual.transformer.resblocks[-1].register_forward_pre_hook(lambda block, inputs: kept.append(inputs[0]))
    found = cosine(squares.clone().requires_grad_())
    (of_tokens,) = torch.autograd.grad(found, kept)
    hook.remove()
    weights = of_tokens[:, 1:].mean(1, keepdim=True)
    cam = torch.relu((weights * kept[0][:, 1:]).sum(-1)).reshape(-1, 1, SIZE // 8, SIZE // 8)
    cam = torch.nn.functional.interpolate(cam, SIZE, mode="bilinear", align_corners=False)[:, 0]
    return shapes, outputs | {"gradcam": cam / cam.amax((1, 2), keepdim=True)}


def clip_outputs(folder: pathlib.Path) -> tuple[dict, dict]:
    """A `CLIPModel` of transformers: PickScore as its README computes it; and the two aesthetic heads on it."""
    import torch
    import transformers

    model = transformers.CLIPModel(transformers.CLIPConfig(**CLIP))
    shapes, ids = named_weights("clip", model), clip_ids(folder)
    processor = clip_processor()
    pixels = torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures()])
    image = unit(model.visual_projection(model.vision_model(pixels).pooler_output))
    text = unit(model.text_projection(model.text_model(ids).pooler_output))
    embedded = unit(model.visual_projection(model.vision_model(torchvision_pixels("crop")).pooler_output))
    heads = {}
    for name, head in (("mlp", mlp(10, (16, 8, 6, 5))), ("linear", torch.nn.Linear(10, 1))):
        named = named_weights(name, head, lambda tensor, name=name: f"layers.{tensor}" if name == "mlp" else tensor)
        heads[name] = named, {"aesthetic": head(embedded)[:, 0]}
    return {"clip": (shapes, {"pickscore": model.logit_scale.exp() * (image * text).sum(-1)})} | heads


def mlp(width, hidden):
    """The five layers of LAION's predictor, and of ImageReward."""
    from torch import nn

    a, b, c, d = hidden
    return nn.Sequential(
        nn.Linear(width, a), nn.Dropout(), nn.Linear(a, b), nn.Dropout(), nn.Linear(b, c), nn.Dropout(),
        nn.Linear(c, d), nn.Linear(d, 1),
    )  # fmt: skip


def blip_name(name: str) -> str:
    """ImageReward's name of a parameter of transformers' BLIP."""
    for old, new in (
        ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
        ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
        ("vision.embeddings.patch_embedding", "blip.visual_encoder.patch_embed.proj"),
        ("vision.encoder.layers", "blip.visual_encoder.blocks"),
        ("vision.post_layernorm", "blip.visual_encoder.norm"),
        (".layer_norm", ".norm"),
        (".self_attn.qkv", ".attn.qkv"),
        (".self_attn.projection", ".attn.proj"),
        ("text.", "blip.text_encoder."),
        ("head.", "mlp.layers."),
    ):
        name = name.replace(old, new)
    return name


def image_reward_model(vision: dict, text: dict, hidden):
    """ImageReward of transformers' BLIP classes, with parameters vision, text, head."""
    import torch
    import transformers
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    model = torch.nn.Module()
    model.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision))
    model.text = BlipTextModel(transformers.BlipTextConfig(**text), add_pooling_layer=False)
    model.head = mlp(text["hidden_size"], hidden)
    return model


def image_reward_score(model, pixels, ids, mask):
    """As the package computes it."""
    tokens = model.vision(pixels).last_hidden_state
    out = model.text(ids, attention_mask=mask, encoder_hidden_states=tokens, is_decoder=False).last_hidden_state
    return (model.head(out[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


def image_reward_outputs(folder: pathlib.Path) -> tuple[dict, dict]:
    import transformers

    model = image_reward_model(BLIP_VISION, BLIP_TEXT, (20, 12, 8, 6))
    shapes = named_weights("image_reward", model, blip_name)
    write_words(folder)
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    encoded = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    score = image_reward_score(model, torchvision_pixels("crop"), encoded.input_ids, encoded.attention_mask)
    return shapes, {"imagereward": score, "ids": encoded.input_ids}


def originals(folder: pathlib.Path) -> dict[str, tuple[dict, dict]]:
    """name of `MODELS` -> (its tensors' shapes, outputs)."""
    made = {"open_clip": open_clip_outputs(folder), "image_reward": image_reward_outputs(folder)} | clip_outputs(folder)
    return {
        name: (shapes, {key: np.asarray(x.detach() if hasattr(x, "detach") else x) for key, x in outputs.items()})
        for name, (shapes, outputs) in made.items()
    }


def main():
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    configs = {
        "open_clip/open_clip_config.json": {"model_cfg": OPEN_CLIP},
        "clip/config.json": CLIP | {"model_type": "clip"},
    }
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(DATA, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in configs.items():
            archive.writestr(file, json.dumps(content))
        for name, (shapes, outputs) in originals(pathlib.Path(temporary)).items():
            archive.writestr(f"{name}/tensors.json", json.dumps(shapes))
            np.savez_compressed(golden := io.BytesIO(), **outputs)
            archive.writestr(f"{name}/golden.npz", golden.getvalue())
    print(f"{DATA}: {DATA.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
