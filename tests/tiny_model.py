"""A tiny RAHF, its parameters and its batches, for tests."""

import dataclasses
import functools

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy
import tensorstore

from rahf import checkpoints, sources, workdirs
from rahf.models import critics, rahf
from rahf.predictor import load
from richhf_data import schema

VOCAB = 40
VARIANTS = schema.VARIANTS[:2]  # the third differs from the second in its texts alone
INPUTS = ("image", "text_ids", "keyword_ids")


def config(variant="multi_head", **options) -> rahf.RAHFConfig:
    """16 pixels, a 4x4 grid, 8x8 heatmaps, one layer of each stack."""
    return rahf.RAHFConfig.from_dict(
        {
            "variant": variant,
            "image_size": 16,
            "vit": {"patch_size": 4, "width": 12, "depth": 1, "num_heads": 2, "mlp_dim": 16},
            "t5": {
                "vocab_size": VOCAB,
                "emb_dim": 16,
                "num_heads": 2,
                "head_dim": 8,
                "num_encoder_layers": 1,
                "num_decoder_layers": 1,
                "mlp_dim": 16,
            },
            "score_head": {"filters": (8, 4), "dense": (8,)},
            "heatmap_head": {"filters": (8,), "deconv_filters": (4,), "output_hidden": 4},
        }
        | options
    )


def dividing(variant="multi_head") -> dict:
    """The tiny model as a config's section, of sizes that 8 devices divide; in float32 with dropout."""
    values = dataclasses.asdict(config(variant))
    values["vit"] |= {"width": 16, "num_heads": 8, "mlp_dim": 16, "dropout": 0.1}
    values["t5"] |= {"num_heads": 8, "head_dim": 2}
    values["score_head"] |= {"filters": (8, 8)}
    values["heatmap_head"] |= {"deconv_filters": (8,), "output_hidden": 8}
    return values


def random_params(module: nn.Module, *inputs, seed: int = 0) -> dict:
    """Parameters of the shapes that `module` makes, drawn by numpy: nothing to compile. Scales are near 1."""
    made = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 4
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, made)


def model_and_params(model_config: rahf.RAHFConfig) -> tuple[rahf.RAHF, dict]:
    model = rahf.RAHF(model_config)
    return model, {"params": random_params(model, *critics.dummy_inputs(model_config), seed=4)}  # writes varied keywords


def workdir(folder, run_config):
    """The folder, as if the run of a RAHF's config had trained in it."""
    workdirs.open_workdir(folder, run_config, ())
    sources.install_vocabulary(run_config, folder)
    _, params = model_and_params(rahf.RAHFConfig.from_dict(run_config.model.to_dict()))
    with checkpoints.manager(folder, "best") as best:
        checkpoints.save(best, 1, jax.device_put(params["params"]), {"value": 0.5, "processor_seconds": 5400.0})
    return folder


def batch(model_config: rahf.RAHFConfig, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as richhf_data/schema.py says it; prompts and keywords of several lengths, some targets absent."""
    rng = np.random.default_rng(seed)
    size, maps = model_config.image_size, model_config.heatmap_size

    def ids(*shape):
        out = rng.integers(2, VOCAB, shape).astype(np.int32)
        lengths = rng.integers(2, shape[-1], shape[:-1])[..., None]
        positions = np.arange(shape[-1])
        return np.where(positions < lengths, out, np.where(positions == lengths, 1, 0)).astype(np.int32)

    return {
        "image": rng.integers(0, 256, (rows, size, size, 3)).astype(np.uint8),
        "text_ids": ids(rows, model_config.num_texts, 6),
        "keyword_ids": ids(rows, 5),
        "scores": rng.random((rows, 4)).astype(np.float32),
        "score_mask": rng.random((rows, 4)) < 0.8,
        "heatmaps": rng.integers(0, 256, (rows, maps, maps, 2)).astype(np.uint8),
        "heatmap_mask": rng.random((rows, 2)) < 0.8,
    }


def write_t5x(folder, arrays):
    """A checkpoint in T5X's own format: a msgpack index, one zarr array a parameter, small ones in the index."""
    folder.mkdir(exist_ok=True)
    target = {}
    for name, array in arrays.items():
        if array.size < 40:
            target[name] = array
            continue
        path = folder / f"target.{name.replace('/', '.')}"
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}
        target[name] = spec
        tensorstore.open(spec, create=True, dtype=array.dtype, shape=array.shape).result().write(array).result()
    index = {"version": 3, "optimizer": {"target": flax.traverse_util.unflatten_dict(target, sep="/"), "state": {}}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(index))


# The model is a static argument: tests that use the same one on batches of the same size share a compilation.
@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, image, text_ids, keyword_ids) -> rahf.Outputs:
    return model.apply(params, image, text_ids, keyword_ids)


def forward(model, params, rows) -> rahf.Outputs:
    return apply(model, params, *(rows[name] for name in INPUTS))


@functools.partial(jax.jit, static_argnums=0)
def predict(model, params, image, text_ids):
    """(scores, heatmaps, keyword ids) with at most 5 ids."""
    return model.apply(params, image, text_ids, 5, method="predict")


def check_stablehlo(folder):
    """A converted folder predicts, and its exported function gives the same without our code, for any batch."""
    model = load(folder)
    size = model.model_config.image_size
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    rows = [model.prepare(image, "a red cat") for image in images]
    exported = jax.export.deserialize((folder / "predict.stablehlo").read_bytes())
    held = safetensors.numpy.load_file(folder / "weights.safetensors")
    scores, heatmaps, ids = exported.call(held, images, np.stack([row["text_ids"] for row in rows]))
    for i, expected in enumerate(model.predict_rows(rows, 3)):
        np.testing.assert_allclose(scores[i], expected["scores"], atol=1e-5)
        np.testing.assert_allclose(heatmaps[i], expected["heatmaps"], atol=1e-5)
        np.testing.assert_array_equal(ids[i], expected["keyword_ids"])
