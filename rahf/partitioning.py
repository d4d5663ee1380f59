"""The mesh, and the tables that say where each array lives.

A mesh of `data` x `model` devices: the batch is divided over `data`, tensor parallelism over `model`. Arrays that are
sharded beside that are divided over groups of neighbours of `data`, and each group holds one copy: the axis `data` of the
config is the two axes `replica` x `shard` here. The modules name what an axis of a parameter or an activation means
("embed", "mlp", ...); only this file says where it lives.
"""

import contextlib
import contextvars
import functools
import math

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from richhf_data.errors import UserError

DATA = ("replica", "shard")

# Logical axis -> mesh axes. An axis that is not listed is whole on every device.
RULES = (
    ("batch", DATA),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("vocab", "model"),
    ("conv_out", "model"),
    ("score_out", "model"),
)

# `mesh.rules` -> what is divided over `shard` too, and where gradients are summed up to be used.
RULE_SETS = {
    "data_parallel": (),  # every device holds the whole training state
    "optimizer_sharded": ("opt_state", "ema"),  # ZeRO 1: each updates its share, and gathers the parameters
    "fully_sharded": ("params", "opt_state", "ema"),  # ZeRO 3, FSDP: a layer is gathered when it computes, already cast
}


def make_mesh(data: int = -1, model: int = 1, shard_group: int = 32, devices=None) -> Mesh:
    """A mesh over all devices; `data` = -1 takes what `model` leaves, `shard_group` is the largest size of `shard`.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    if data == -1 and model > 0 and devices.size % model == 0:
        data = devices.size // model
    if data * model != devices.size:
        raise UserError(
            f"mesh: got data={data}, model={model} for {devices.size} devices; their product must be {devices.size} "
            "(--config.mesh.data=-1 takes what model leaves)"
        )
    if shard_group < 1:
        raise UserError(f"mesh.shard_group: got {shard_group}, expected 1 or more")
    shard = math.gcd(data, shard_group)
    return Mesh(devices.reshape(data // shard, shard, model), (*DATA, "model"))


def mesh_of(config, devices=None) -> Mesh:
    """The mesh of a config's `mesh` section. Raises UserError where the devices cannot be divided so."""
    return make_mesh(config.data, config.model, config.shard_group, devices)


def sizes(mesh: Mesh) -> dict[str, int]:
    """{"data", "model"}: over how many devices the batch is divided, and over how many a layer."""
    return {"data": mesh.shape["replica"] * mesh.shape["shard"], "model": mesh.shape["model"]}


_rules = contextvars.ContextVar("rules", default=None)


@contextlib.contextmanager
def activate(mesh: Mesh, rules: str = "data_parallel"):
    """What the modules' logical axes mean while a step is traced, and where its gradients live."""
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            yield
    finally:
        _rules.reset(token)


def compute_copy(param: jax.Array, axes: tuple[str | None, ...], dtype) -> jax.Array:
    """A parameter as a layer computes with it: cast, then gathered from where it is sharded; its gradient goes back alike.

    Cast first, half of the bytes travel. Without `activate` it is the cast alone.
    """
    rules = _rules.get()
    if rules is None:
        return param.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    whole = _to_mesh(axes)
    shared = _divided(mesh, param.shape, whole) if RULE_SETS[rules] else whole

    @jax.custom_vjp
    def copy(param):
        return jax.lax.with_sharding_constraint(param.astype(dtype), whole)

    def forward(param):
        return copy(param), None

    def backward(_, gradient):
        return (jax.lax.with_sharding_constraint(gradient, shared).astype(param.dtype),)

    copy.defvjp(forward, backward)
    return copy(param)


def product(x: jax.Array, kernel: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
    """dtype[B, I] x float32[I, O] -> dtype[B, O], where kernels may be much larger than the rows.

    Then the rows of a group of devices are gathered where the kernel is sharded, instead of the kernel (`compute_copy`):
    each device multiplies its part of their inputs, and the products are summed up to where the rows came from.
    """
    rules = _rules.get()
    if rules is None:
        return x @ kernel.astype(x.dtype)
    mesh, whole = jax.sharding.get_abstract_mesh(), _to_mesh(axes)
    shared = _divided(mesh, kernel.shape, whole)
    sent = x.shape[0] // mesh.shape["replica"] * sum(kernel.shape)
    if not RULE_SETS[rules] or shared[0] != "shard" or sent >= kernel.size:
        return x @ compute_copy(kernel, axes, x.dtype)
    constrain = jax.lax.with_sharding_constraint
    x = constrain(x, PartitionSpec("replica", "shard"))
    return constrain(x @ constrain(kernel.astype(x.dtype), shared), PartitionSpec(DATA, whole[1]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis of a batch's arrays over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, boxed_params, sharded: bool = False):
    """Where every parameter lives, from abstract parameters that still carry their logical axis names.

    Args:
      sharded: whether they are divided over `shard` beside what the logical axes say.

    Raises:
      UserError: a dimension does not divide by the mesh axis that the table gives it; names the parameter.
    """
    specs = nn.get_partition_spec(boxed_params)
    shapes = nn.meta.unbox(boxed_params)

    def place(path, logical, shape):
        spec = _to_mesh(logical)
        for size, axis, name in zip(shape.shape, spec, logical, strict=False):
            if axis and size % mesh.shape[axis]:
                raise UserError(
                    f"{jax.tree_util.keystr(path)}: axis {name!r} of size {size} does not divide by mesh axis {axis!r} "
                    f"of {mesh.shape[axis]} devices; choose another --config.mesh.{axis}"
                )
        return NamedSharding(mesh, _divided(mesh, shape.shape, spec) if sharded else spec)

    return jax.tree_util.tree_map_with_path(
        place, specs, shapes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def gathered(shardings):
    """The same shardings, not divided over `shard`."""

    def without(axes):
        kept = [axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis != "shard"]
        return kept[0] if kept else None

    def gather(sharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*map(without, sharding.spec)))

    return jax.tree.map(gather, shardings)


def optimizer_shardings(mesh: Mesh, abstract_opt_state, abstract_params, shardings):
    """Each leaf of the optimiser's state as its parameter, in `shardings`; what belongs to none is whole everywhere.

    It belongs to the parameter whose path its own path ends with.
    """
    by_path = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), (_, sharding) in zip(
            jax.tree_util.tree_leaves_with_path(abstract_params),
            jax.tree_util.tree_leaves_with_path(shardings),
            strict=True,
        )
    }

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_opt_state)


def largest_replicated(abstract, shardings, count: int = 5) -> list[tuple[str, int]]:
    """[(name, bytes)], largest first: the arrays that every device of the mesh holds whole, where there is more than one."""
    found = [
        ("/".join(_names(path)), math.prod(leaf.shape) * leaf.dtype.itemsize)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(shardings), strict=True
        )
        if sharding.is_fully_replicated and sharding.num_devices > 1
    ]
    return sorted(found, key=lambda entry: -entry[1])[:count]


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


@functools.cache
def _to_mesh(logical) -> PartitionSpec:
    return PartitionSpec(*[dict(RULES).get(name) for name in logical])


def _divided(mesh, shape, spec: PartitionSpec) -> PartitionSpec:
    """The spec, with the first dimension that divides given to `shard` beside what it has; vectors stay as they are.

    If it is the first of all, what is gathered lies in memory as it came, and no tile of the last two is left half empty.
    """
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    if len(shape) > 1 and mesh.shape["shard"] > 1:
        for index, (size, axis) in enumerate(zip(shape, axes, strict=True)):
            if size % (mesh.shape["shard"] * (mesh.shape[axis] if axis else 1)) == 0:
                axes[index] = (axis, "shard") if axis else "shard"
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
