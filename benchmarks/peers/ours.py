"""Our side of each row: `ROWS` has its name -> a function that loads what it needs and returns what is timed."""

import dataclasses
import functools
import types

import flax.traverse_util
import jax
import numpy as np

from benchmarks.peers import inputs
from rahf import partitioning, predictor, train, weights
from rahf import program as programs
from rahf.diffusion import finetuning, folder, sample


def dtype() -> str:
    """Of the computation."""
    return "bfloat16" if jax.default_backend() == "gpu" else "float32"


def _mesh():
    return partitioning.make_mesh(devices=jax.devices()[:1])


# ---- RAHF -----------------------------------------------------------------------------------------------------------
def _read(tensors, like):
    """Parameters in the places of `like`, one tensor at a time."""
    like = flax.traverse_util.flatten_dict(like, sep="/")
    placed = {name: partitioning.place(array, like[name].sharding) for name, array in weights.read_all(tensors)}
    return flax.traverse_util.unflatten_dict(placed, sep="/")


def rahf_predict(place):
    config, tensors = inputs.rahf_config(place, dtype())
    model = predictor.Predictor(config, types.SimpleNamespace(decode=lambda ids: ""), _mesh())
    params, given = _read(tensors, model.params), inputs.read(place, "rahf")
    rows = [{"image": image, "text_ids": ids} for image, ids in zip(given["image"], given["text_ids"], strict=True)]

    def call():
        found = list(model.predict_rows(params, rows, len(rows)))
        return {name: np.stack([row[name] for row in found]) for name in ("scores", "heatmaps", "keyword_ids")}

    return call


def rahf_step(place):
    (config, tensors), rows = inputs.rahf_config(place, dtype()), inputs.read(place, "rahf")
    config.train.batch_size = len(rows["image"])
    training = programs.assemble(train.program(config), config, _mesh())
    return _step(training, _read(tensors, training.params), rows)


def _step(training, params, rows):
    """Repeated steps on one batch. The parameters must not be used elsewhere."""
    state = training.init_state(params)
    del params

    def call():
        nonlocal state
        state, found = training.step(state, rows)
        return {name: np.asarray(found[name]) for name in ("loss", "gradient_norm")}

    return call


# ---- Stable Diffusion -----------------------------------------------------------------------------------------------
def _diffusion(place) -> folder.StableDiffusion:
    model = folder.read(place / "sd")
    parts = {part: dataclasses.replace(getattr(model.config, part), dtype=dtype()) for part in ("unet", "vae")}
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **parts))


def _part(place, name, names, method="__call__"):
    """A network of the folder on some of the inputs."""
    model, given = _diffusion(place), inputs.read(place, "sd")
    apply = partitioning.MeshFunction(functools.partial(model.config.modules[name].apply, method=method), _mesh())
    params, args = {"params": model.params[name]}, [jax.device_put(given[key]) for key in names]
    return lambda: {"output": np.asarray(apply(params, *args), np.float32)}


def text_to_image(place):
    model = _diffusion(place)
    return lambda: {"output": sample.generate(model, [inputs.PROMPT], steps=inputs.STEPS)}


def sd_step(place, remat=False):
    config, model, given = inputs.diffusion_config(dtype(), remat), folder.read(place / "sd"), inputs.read(place, "sd")
    program = finetuning.program(finetuning.model_config(config, model.config), config)
    rows = {"moments": given["moments"], "context": given["context"][:1]}
    rows |= {"weight": np.zeros(1, np.float32), "pretraining": np.ones(1, np.float32)}
    training = programs.assemble(program, config, _mesh())
    places = jax.tree.map(lambda leaf: leaf.sharding, training.params)
    return _step(training, jax.device_put({"unet": model.params["unet"]}, places), rows)


ROWS = {
    "rahf_predict": rahf_predict,
    "rahf_step": rahf_step,
    "unet": functools.partial(_part, name="unet", names=("latents", "timesteps", "context")),
    "vae_decode": functools.partial(_part, name="vae", names=("initial",), method="decode"),
    "text_to_image": text_to_image,
    "sd_step": sd_step,
    "sd_step_remat": functools.partial(sd_step, remat=True),
}
