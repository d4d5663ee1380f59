"""A RAHF's prediction as StableHLO and as ONNX, which run without this code."""

import importlib
import json
import pathlib
from collections.abc import Callable, Mapping

import flax.traverse_util
import jax

from rahf.models import critics
from rahf.models.parameters import param_shapes
from rahf.pretrained import Pretrained
from richhf_data import paths
from richhf_data.errors import UserError

WEIGHTS = "weights.safetensors"


def export_stablehlo(converted: Pretrained, path: pathlib.Path) -> None:
    """Writes the predict function of a RAHF as StableHLO for CPU, GPU and TPU and any batch size, without its weights.

    `jax.export.deserialize(bytes).call(weights, image, text_ids)` returns scores, heatmaps and keyword_ids, None for what
    the model does not predict, and with score_head.deviation a fourth, deviations. `weights` is the dictionary that
    safetensors reads, image uint8[B, H, W, 3], text_ids int32[B, R, L] with R = 1, or 7 in the augmented-prompt variants. It
    decodes freely, whatever `data.decoding` is.
    """
    predict, params, inputs = _predict_function(converted.config)
    exported = jax.export.export(jax.jit(predict), platforms=("cpu", "cuda", "tpu"))(params, *inputs)
    paths.replace(path, exported.serialize())


def check_onnx() -> None:
    """Raises UserError if what `export_onnx` needs is not installed."""
    try:
        importlib.import_module("jax2onnx")
    except ImportError as error:
        raise UserError("onnx: needs the package jax2onnx; pip install 'rahf[onnx]' in an environment of its own") from error


def export_onnx(converted: Pretrained, folder: pathlib.Path) -> None:
    """Writes the same function as predict.onnx, whose weights are those of weights.safetensors in `folder`.

    Its inputs are `image` and `text_ids`, its outputs those of `scores`, `heatmaps`, `keyword_ids` and `deviations` that
    the model predicts. The batch size is free. It computes in float32, whatever the model's dtype.

    Raises:
      UserError: jax2onnx cannot translate this model.
    """
    import jax2onnx
    import onnx

    in_float32 = converted.config | {"model": converted.config["model"] | {"dtype": "float32"}}
    predict, params, inputs = _predict_function(in_float32)
    names = list(params)
    critic = critics.config_of(converted.config["model"])
    outputs = [{"keywords": "keyword_ids"}.get(part, part) for part in critic.parts]
    outputs += ["deviations"] if critic.deviations else []

    def flat(*args):
        results = predict(dict(zip(names, args[: len(names)], strict=True)), *args[len(names) :])
        return tuple(result for result in results if result is not None)

    try:
        model = jax2onnx.to_onnx(
            flat,
            [*(jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape in params.values()), *inputs],
            model_name="rahf",
            input_names=[*names, "image", "text_ids"],
            output_names=outputs,
        )
    except Exception as error:  # an operation that it does not know
        raise UserError(f"onnx: jax2onnx cannot translate this model ({error})") from error
    with (folder / WEIGHTS).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        held = json.loads(file.read(size))
    left = [value for value in model.graph.input if value.name not in params]
    for name, shape in params.items():
        first, end = held[name]["data_offsets"]
        tensor = model.graph.initializer.add(name=name, dims=shape.shape, data_type=onnx.TensorProto.FLOAT)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": WEIGHTS, "offset": 8 + size + first, "length": end - first}.items():
            tensor.external_data.add(key=key, value=str(value))
    del model.graph.input[:]
    model.graph.input.extend(left)
    paths.replace(folder / "predict.onnx", model.SerializeToString())


def _predict_function(config: Mapping) -> tuple[Callable, dict, list[jax.ShapeDtypeStruct]]:
    """The function of (params, image, text_ids), params by name, and the shapes of these; the batch size is a symbol.

    config: of a folder of kind "rahf".
    """
    model_config, lengths = critics.config_of(config["model"]), config["data"]
    module = critics.module_of(model_config)
    inputs = critics.dummy_inputs(model_config, lengths["text_length"])

    def predict(params, image, text_ids):
        params = flax.traverse_util.unflatten_dict(params, sep="/")
        return module.apply({"params": params}, image, text_ids, lengths["keyword_length"], method=module.predict)

    (batch,) = jax.export.symbolic_shape("B")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in inputs[:2]]
    return predict, param_shapes(module.init, *inputs), shapes
