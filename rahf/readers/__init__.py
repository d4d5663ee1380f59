"""Readers of weights in the formats of other projects: each returns a `Pretrained` with our names, shapes and configuration.

A reader takes the configuration from the files, then maps each of our parameters to one of their tensors with a table of
names.py. Names and shapes are checked; values are read later, one tensor at a time.
"""

import dataclasses
import functools
import pathlib

from etils import epath

from rahf import checkpoints, names, weights, workdirs
from rahf.models import critics
from rahf.models.parameters import param_shapes
from rahf.pretrained import Pretrained, matched
from rahf.readers import clip, encoders, release
from rahf.weights import Tensor
from richhf_data.errors import UserError


def rahf_workdir(path) -> Pretrained:
    """The best checkpoint of a training run's workdir. An array that does not read as it was saved is refused when read."""
    path = pathlib.Path(path)
    config = workdirs.read_config(path)
    with checkpoints.manager(path, "best") as best:
        step = checkpoints.best_step(best)
        where, saved_digests = best.directory / str(step), checkpoints.read_metadata(best, step)["digests"]
    theirs = weights.open_orbax(where / "state")

    def read(name):
        array = theirs[name].read()
        if checkpoints.digests({name: array}) != {name: saved_digests.get(name)}:
            raise UserError(f"checkpoint: {where} is damaged: {name} does not read as it was saved")
        return array

    checked = {name: Tensor(tensor.shape, functools.partial(read, name)) for name, tensor in theirs.items()}
    return _rahf(config, checked, f"workdir {path}")


def rahf_t5x(path) -> Pretrained:
    """A checkpoint of RAHF that T5X wrote, MODEL_DIR/checkpoint_N, beside the config.json of `rahf.t5x.summarize_config`."""
    path = epath.Path(path)
    config = workdirs.read_config(path.parent)
    if (path / "checkpoint").exists():  # T5X's format from before Orbax
        theirs = weights.open_t5x(path)
    elif (path / "state").exists():
        theirs = weights.open_orbax(path / "state")
        theirs = {name.removeprefix("target/"): theirs[name] for name in theirs if name.startswith("target/")}
    else:
        raise UserError(
            f"weights: {path} holds neither state/ nor a file `checkpoint`, expected MODEL_DIR/checkpoint_N of T5X"
        )
    return _rahf(config, theirs, f"T5X checkpoint {path}")


def _rahf(config, theirs, source: str) -> Pretrained:
    """The whole RAHF of a run's config, of the tensors of its checkpoint, which errors call `source`."""
    model_config = critics.config_of(config.model.to_dict())
    ours = param_shapes(critics.module_of(model_config).init, *critics.dummy_inputs(model_config))
    tensors = matched(theirs, names.same_names(ours), ours, "", source)
    kept = (*release.LENGTHS, "truncate_long_prompts", "decoding")
    data = {name: config.data[name] for name in kept if name in config.data}
    return Pretrained("rahf", {"model": dataclasses.asdict(model_config), "data": data}, tensors)


READERS = {
    "vit-npz": encoders.vit_npz,
    "vit-hf": encoders.vit_hugging_face,
    "resnet": encoders.resnet,
    "t5x": encoders.t5_t5x,
    "t5-hf": encoders.t5_hugging_face,
    "clip-hf": clip.clip_hugging_face,
    "open-clip": clip.clip_open_clip,
    "aesthetic": clip.aesthetic,
    "image-reward": clip.image_reward,
    "rahf-pytorch": release.rahf_pytorch,
    "t5x-rahf": rahf_t5x,
    "workdir": rahf_workdir,
}
