"""The first author's PyTorch release, rebuilt from its description with every size free, and what it computes in float64.

    python tests/release_torch.py        writes data/release_variants.npz; needs torch and transformers (extra `parity`)

`weights` draws a model's parameters from their names and shapes, which the file holds, so that its tests need no torch.
"""

import functools
import itertools
import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent / "data" / "release_variants.npz"
SCORES = ("plausibility", "alignment", "aesthetics", "overall")
HEATMAPS = ("implausibility", "misalignment")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
VOCAB, TARGETS = 48, 6  # ids of the vocabulary, and of a target
V1_0 = {"d_model": 16, "num_heads": 2, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 1}
V1_1 = {"d_model": 24, "num_heads": 3, "d_kv": 8, "d_ff": 28, "num_layers": 1, "num_decoder_layers": 2}
V1_1 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
DEEP = {"hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 36, "patch_size": 8}
# Each: Hugging Face's settings of ViT and T5, what is beside the file, and whether there is a head for each task. Sizes of
# the heads may follow, as `score` and `heatmap`.
CASES = {
    "flan_t5_with_equal_widths": dict(vit=SMALL | {"patch_size": 4, "image_size": 16}, t5=V1_1, multi_heads=True),
    "single_heads_with_dino_pixels": dict(vit=DEEP | {"image_size": 24}, t5=V1_0, multi_heads=False, pixels=IMAGENET),
    "single_heads_with_flan_t5": dict(
        vit=DEEP | {"image_size": 16, "qkv_bias": False, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
        t5=V1_1,
        multi_heads=False,
    ),
}


def notes(case) -> dict:
    """The model's config.json beside its weights."""
    return {"vit": case["vit"], "t5": case["t5"], "multi_heads": case["multi_heads"]}


def weights(shapes, tied: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 parameters by name. With `tied`, T5's logits are computed from its embedding."""
    random, out = np.random.RandomState(seed), {}
    for name, shape in sorted(shapes.items()):
        fan_in = np.prod(shape[1:]) if len(shape) > 1 and shape[-1] > 1 else 16
        mean = ("norm" in name and name.endswith("weight")) or name.endswith("scale")
        out[name] = (mean + random.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
    for name in ("t5.encoder.embed_tokens", "t5.decoder.embed_tokens", *(["t5.lm_head"] if tied else [])):
        out[f"{name}.weight"] = out["t5.shared.weight"]
    return out


def inputs(case, seed: int = 1) -> dict[str, np.ndarray]:
    """Two images uint8[2, H, W, 3] with text_ids int32[2, R, L], of many lengths, and targets int32[2, T]."""
    random, size = np.random.RandomState(seed), case["vit"]["image_size"]
    ids = random.randint(2, VOCAB, (2, 1 if case["multi_heads"] else 7, 12))
    lengths = random.randint(4, 12, ids.shape[:2])[..., None]
    places = np.arange(12)
    ids = np.where(places < lengths, ids, np.where(places == lengths, 1, 0))
    image = random.randint(0, 256, (2, size, size, 3))
    targets = random.randint(2, VOCAB, (2, TARGETS))
    return {"image": image.astype(np.uint8), "text_ids": ids.astype(np.int32), "targets": targets.astype(np.int32)}


def build(case, tied: bool | None = None, state=None):
    """The model in PyTorch, with parameters of `weights`, or of a `state`. `tied` is by default what T5's settings say."""
    import torch
    import transformers
    from torch import nn

    class Norm(nn.Module):
        """x / root mean square over channels * scale."""

        def __init__(self, channels):
            super().__init__()
            self.scale = nn.Parameter(torch.empty(channels, 1, 1))

        def forward(self, x):
            return self.scale * x / torch.sqrt((x * x).mean(1, keepdim=True) + 1e-8)

    def conv(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    class Score(nn.Module):
        def __init__(self, width, cells, filters=(8, 6, 4), dense=(10, 5)):
            super().__init__()
            layers = [(conv(a, b), Norm(b), nn.ReLU()) for a, b in zip((width, *filters), filters, strict=False)]
            self.conv_layers = nn.Sequential(*sum(layers, ()))
            sizes = (filters[-1] * cells, *dense, 1)
            layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
            self.linear_layers = nn.Sequential(*sum(layers, ())[:-1], nn.Sigmoid())

        def forward(self, x):
            return self.linear_layers(self.conv_layers(x).flatten(1))[:, 0]

    class Heatmap(nn.Module):
        def __init__(self, width, filters=(8, 6), ups=(6, 4), hidden=5):
            super().__init__()
            layers = [(conv(a, b), nn.ReLU(), Norm(b)) for a, b in zip((width, *filters), filters, strict=False)]
            self.conv_layers = nn.Sequential(*sum(layers, ()))
            self.deconv_layers, self.conv_layers2 = nn.ModuleList(), nn.ModuleList()
            for a, b in zip((filters[-1], *ups), ups, strict=False):
                up = nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1)
                self.deconv_layers.append(nn.Sequential(up, Norm(b), nn.ReLU()))
                self.conv_layers2.append(nn.Sequential(conv(b, b), Norm(b), nn.ReLU(), conv(b, b), Norm(b)))
            self.last_conv1, self.last_conv2 = conv(ups[-1], hidden), conv(hidden, 1)

        def forward(self, x):
            x = self.conv_layers(x)
            for up, readouts in zip(self.deconv_layers, self.conv_layers2, strict=True):
                x = up(x)
                x = torch.relu(x + readouts(x))
            return torch.sigmoid(self.last_conv2(torch.relu(self.last_conv1(x))))[:, 0]

    class Release(nn.Module):
        def __init__(self):
            super().__init__()
            vit = transformers.ViTConfig(**case["vit"])
            t5 = {"vocab_size": VOCAB, "decoder_start_token_id": 0, "dropout_rate": 0.0} | case["t5"]
            t5 = transformers.T5Config(**t5)
            self.vit, self.t5 = transformers.ViTModel(vit), transformers.T5ForConditionalGeneration(t5)
            # transformers 5 always ties them.
            self.t5.lm_head.weight = nn.Parameter(torch.empty(t5.vocab_size, t5.d_model))
            self.visual_token_projection = nn.Linear(vit.hidden_size, t5.d_model)
            self.side = vit.image_size // vit.patch_size
            score = functools.partial(Score, t5.d_model, self.side**2, **case.get("score", {}))
            heatmap = functools.partial(Heatmap, t5.d_model, **case.get("heatmap", {}))
            if case["multi_heads"]:
                self.score_predictor = nn.ModuleDict({name: score() for name in SCORES})
                self.heatmap_predictor = nn.ModuleDict({name: heatmap() for name in HEATMAPS})
            else:
                self.score_predictor, self.heatmap_predictor = score(), heatmap()

        def fuse(self, tokens, ids):
            """The encoded image as a map [B, D, h, w], and the encoded text [B, L, D]; `ids` have no padding."""
            x = torch.cat([tokens, self.t5.get_input_embeddings()(ids)], dim=1)
            x = self.t5.encoder(inputs_embeds=x).last_hidden_state
            image, text = x[:, 1 : tokens.shape[1]], x[:, tokens.shape[1] :]
            return image.transpose(1, 2).reshape(len(x), -1, self.side, self.side), text

        def perceive(self, pixels, texts):
            """pixels [B, 3, H, W], texts: R of [B, L] -> scores [B, 4], heatmaps [B, h, w, 2], for the decoder [B, L, D]."""
            tokens = self.visual_token_projection(self.vit(pixel_values=pixels).last_hidden_state)
            maps, encoded = zip(*(self.fuse(tokens, ids) for ids in texts), strict=True)
            if case["multi_heads"]:
                scores = [self.score_predictor[name](maps[0]) for name in SCORES]
                heatmaps = [self.heatmap_predictor[name](maps[0]) for name in HEATMAPS]
            else:
                scores = [self.score_predictor(x) for x in maps[:4]]
                heatmaps = [self.heatmap_predictor(x) for x in maps[4:6]]
            return torch.stack(scores, -1), torch.stack(heatmaps, -1), encoded[-1]

        def logits(self, encoded, targets):
            """encoded [B, L, D], targets [B, T] -> [B, T, V]."""
            encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=encoded)
            return self.t5(encoder_outputs=encoded, labels=targets).logits

        def write(self, encoded, length, use_cache=False):
            """encoded [B, L, D] -> ids [B, length], decoded greedily. The cache wants as many layers in both stacks."""
            encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=encoded)
            greedy = {"max_new_tokens": length, "do_sample": False, "use_cache": use_cache}
            written = self.t5.generate(encoder_outputs=encoded, **greedy)[:, 1:]
            return nn.functional.pad(written, (0, length - written.shape[1]))

    model = Release().eval()
    tied = case["t5"].get("tie_word_embeddings", True) if tied is None else tied
    if state is None:
        drawn = weights({name: tuple(x.shape) for name, x in model.state_dict().items()}, tied)
        state = {name: torch.from_numpy(x) for name, x in drawn.items()}
    model.load_state_dict(state)
    return model


def pixels_of(case, image: np.ndarray) -> np.ndarray:
    """uint8[H, W, 3] -> float32[3, H, W] as the ViT's image processor makes it."""
    half = [0.5] * 3
    mean, std = (case.get("pixels", {}).get(name, half) for name in ("image_mean", "image_std"))
    return ((image / 255 - np.asarray(mean)) / np.asarray(std)).astype(np.float32).transpose(2, 0, 1)


def run(model, case, image, texts, targets, length: int = 8) -> dict[str, np.ndarray]:
    """The model's outputs for one image uint8[H, W, 3], its R lists of ids, and a target."""
    import torch

    with torch.no_grad():
        pixels = torch.from_numpy(pixels_of(case, image)[None]).to(next(model.parameters()).dtype)
        scores, heatmaps, encoded = model.perceive(pixels, [torch.tensor(ids)[None] for ids in texts])
        logits, written = model.logits(encoded, torch.tensor(targets)[None]), model.write(encoded, length)
    found = {"scores": scores, "heatmaps": heatmaps, "logits": logits, "written": written}
    return {name: x[0].numpy() for name, x in found.items()}


def main():
    held = {}
    for name, case in CASES.items():
        model, rows = build(case).double(), inputs(case)  # so that the outputs have no rounding errors of their own
        held[f"{name}/shapes"] = json.dumps({name: tuple(x.shape) for name, x in model.state_dict().items()})
        texts = [[ids[ids != 0].tolist() for ids in row] for row in rows["text_ids"]]
        found = [
            run(model, case, image, ids, targets.tolist())
            for image, ids, targets in zip(rows["image"], texts, rows["targets"], strict=True)
        ]
        for output in found[0]:
            array = np.stack([row[output] for row in found])
            held[f"{name}/{output}"] = array.astype(np.float32) if array.dtype == np.float64 else array
    np.savez_compressed(FILE, **held)


if __name__ == "__main__":
    main()
