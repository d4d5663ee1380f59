"""The mesh, and the one table that maps the modules' logical axes to it.

Mesh axes: `data` (the batch, and the optimiser's state) and `model` (tensor parallel). The modules name what an axis of a
parameter or an activation means ("embed", "mlp", ...); only this file says where it lives.
"""

import contextlib

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis. An axis that is not listed, or maps to None, is replicated.
RULES = (
    ("batch", "data"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("vocab", "model"),
)


def make_mesh(data: int = -1, model: int = 1, devices=None) -> Mesh:
    """A (data, model) mesh over all devices; `data` = -1 takes what `model` leaves.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    if data == -1 and model > 0 and devices.size % model == 0:
        data = devices.size // model
    if data * model != devices.size:
        raise ValueError(
            f"mesh: got data={data}, model={model} for {devices.size} devices; their product must be {devices.size} "
            "(--config.mesh.data=-1 takes what model leaves)"
        )
    return Mesh(devices.reshape(data, model), ("data", "model"))


@contextlib.contextmanager
def activate(mesh: Mesh):
    """What the modules' logical axes mean while a step is traced."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis of a batch's arrays over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, boxed_params):
    """The sharding of every parameter, from abstract parameters that still carry their logical axis names.

    Raises:
      ValueError: a dimension does not divide by the mesh axis that the table gives it; names the parameter.
    """
    specs = nn.get_partition_spec(boxed_params)
    shapes = nn.meta.unbox(boxed_params)

    def place(path, logical, shape):
        axes = [dict(RULES).get(name) for name in logical]
        for size, axis, name in zip(shape.shape, axes, logical, strict=False):
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)}: axis {name!r} of size {size} does not divide by mesh axis {axis!r} "
                    f"of {mesh.shape[axis]} devices; choose another --config.mesh.{axis}"
                )
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(
        place, specs, shapes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def optimizer_shardings(mesh: Mesh, abstract_opt_state, abstract_params, shardings):
    """Shards each moment as its parameter, and over `data` as well on the first free dimension that divides.

    A leaf of the optimiser's state belongs to the parameter whose path its own path ends with.
    """
    by_path = {
        _names(path): (leaf.shape, sharding.spec)
        for (path, leaf), (_, sharding) in zip(
            jax.tree_util.tree_leaves_with_path(abstract_params),
            jax.tree_util.tree_leaves_with_path(shardings),
            strict=True,
        )
    }

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            shape, spec = by_path.get(names[start:], (None, None))
            if shape == leaf.shape:
                return NamedSharding(mesh, _over_data(mesh, shape, spec))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_opt_state)


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _over_data(mesh, shape, spec):
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    for index, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        if axis is None and size % mesh.shape["data"] == 0 and size >= mesh.shape["data"]:
            axes[index] = "data"
            break
    return PartitionSpec(*axes)


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from one that every process has whole; nothing is sent between them."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """int64[b], ascending: which rows of a global batch this process's devices hold. All of them where it is alone.

    Processes that one `model` axis spans hold the same rows.
    """
    blocks = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[block] for block in blocks]))


def shard_batch(batch, sharding: NamedSharding):
    """Puts this process's rows of a batch (`local_rows`) on the devices as one global array."""
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
