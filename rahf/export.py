"""A RAHF's prediction as StableHLO, which runs without this code."""

import pathlib

import flax.traverse_util
import jax

from rahf.models import critics
from rahf.models.parameters import param_shapes
from rahf.pretrained import Pretrained
from richhf_data import paths


def export_stablehlo(converted: Pretrained, path: pathlib.Path) -> None:
    """Writes the predict function of a RAHF as StableHLO for CPU, GPU and TPU and any batch size, without its weights.

    `jax.export.deserialize(bytes).call(weights, image, text_ids)` returns scores, heatmaps and keyword_ids, None for what
    the model does not predict. `weights` is the dictionary that safetensors reads, image uint8[B, H, W, 3], text_ids
    int32[B, R, L] with R = 1, or 7 in the augmented-prompt variants.
    """
    model_config = critics.config_of(converted.config["model"])
    module, lengths = critics.module_of(model_config), converted.config["data"]
    inputs = critics.dummy_inputs(model_config, lengths["text_length"])

    def predict_function(params, image, text_ids):
        params = flax.traverse_util.unflatten_dict(params, sep="/")
        return module.apply({"params": params}, image, text_ids, lengths["keyword_length"], method=module.predict)

    (batch,) = jax.export.symbolic_shape("B")
    arguments = (
        param_shapes(module.init, *inputs),
        *(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in inputs[:2]),
    )
    exported = jax.export.export(jax.jit(predict_function), platforms=("cpu", "cuda", "tpu"))(*arguments)
    paths.replace(path, exported.serialize())
