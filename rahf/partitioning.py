"""The mesh, and the tables that say where each array lives.

The mesh has `data` x `model` devices: the batch is divided over `data`, and tensor parallelism divides layers over `model`.
Parameters and moments can be divided over groups of neighbours along `data`; each group then holds one copy. So the config's
axis `data` is two axes here, `replica` x `shard`. Modules name what each axis of a parameter or an activation means
("embed", "mlp", ...); only this file says where it lives.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable

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

# `mesh.sharding` -> the parts of the training state that are divided over `shard` too.
SHARDED_PARTS = {
    "data_parallel": (),  # every device holds the whole training state
    "optimizer_sharded": ("opt_state", "ema"),  # ZeRO 1: each device updates its share, then all-gathers the parameters
    "fully_sharded": ("params", "opt_state", "ema"),  # ZeRO 3, FSDP: a layer is cast, then all-gathered where it is used
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


_sharding = contextvars.ContextVar("sharding", default=None)
_attention = contextvars.ContextVar("attention", default=None)


@contextlib.contextmanager
def _activate(mesh: Mesh, sharding: str = "data_parallel"):
    """Gives the modules' logical axes their meaning while a function is traced. `MeshFunction` does it for its callers."""
    token = _sharding.set(sharding)
    try:
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            yield
    finally:
        _sharding.reset(token)


@contextlib.contextmanager
def forcing_attention(implementation: str):
    """Every attention that is traced takes this form, one of `rahf.models.attention.IMPLEMENTATIONS`; "auto" forces none."""
    token = _attention.set(None if implementation == "auto" else implementation)
    try:
        yield
    finally:
        _attention.reset(token)


def forced_attention() -> str | None:
    """What `forcing_attention` says."""
    return _attention.get()


@functools.cache
def compiler_options(kind: str) -> dict[str, str]:
    """Of `jax.jit`, for devices of a kind (`device_kind`).

    XLA's default order of operations on CPUs computes early whatever depends on parameters alone, and holds it. The other
    one halves the temporaries or better, and is quicker (benchmarks/README.md). {} where this jaxlib does not know it.
    """
    if kind != "cpu":
        return {}
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


class MeshFunction:
    """A jitted function that is always called, and lowered, under its own mesh and sharding.

    Args:
      sharding: of `SHARDED_PARTS`; how parameters and gradients are divided inside.
      attention: as for `forcing_attention`.
      options: of `jax.jit`.
    """

    def __init__(
        self, function: Callable, mesh: Mesh, sharding: str = "data_parallel", attention: str = "auto", **options
    ):
        device = mesh.abstract_mesh.abstract_device  # None of a mesh without devices
        options["compiler_options"] = compiler_options(device.device_kind) if device else None
        self._jitted = jax.jit(function, **options)
        self._mesh, self._sharding, self._attention = mesh, sharding, attention

    def __call__(self, *args, **kwargs):
        with _activate(self._mesh, self._sharding), forcing_attention(self._attention):
            return self._jitted(*args, **kwargs)

    def lower(self, *args, **kwargs) -> jax.stages.Lowered:
        with _activate(self._mesh, self._sharding), forcing_attention(self._attention):
            return self._jitted.lower(*args, **kwargs)


def _active() -> str | None:
    """The active sharding; None without a mesh of ours: on one device, or on T5X's mesh, over which XLA divides all."""
    sharding = _sharding.get()
    is_ours = "shard" in jax.sharding.get_abstract_mesh().axis_names
    assert sharding or not is_ours, "a mesh is set without its sharding: use MeshFunction"
    return sharding


def compute_copy(param: jax.Array, axes: tuple[str | None, ...], dtype) -> jax.Array:
    """The copy of a parameter that a layer computes with: cast to `dtype`, then all-gathered over `shard`.

    The cast comes first, so that half of the bytes travel. The gradient takes the same way back: it is reduce-scattered in
    `dtype`, then cast. Without a mesh this is the cast alone.
    """
    sharding = _active()
    if sharding is None:
        return param.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    whole = _to_mesh(axes)  # not divided over `shard`
    share = _divided(mesh, param.shape, whole) if SHARDED_PARTS[sharding] else whole  # of parameter and gradient

    @jax.custom_vjp
    def copy(param):
        return jax.lax.with_sharding_constraint(param.astype(dtype), whole)

    def forward(param):
        return copy(param), None

    def backward(_, gradient):
        return (jax.lax.with_sharding_constraint(gradient, share).astype(param.dtype),)

    copy.defvjp(forward, backward)
    return copy(param)


def product(x: jax.Array, kernel: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
    """dtype[B, I] x float32[I, O] -> dtype[B, O], for kernels that may be much larger than the rows.

    Where sending the rows is cheaper than all-gathering the kernel (`compute_copy`), the rows of a group of devices are
    gathered, each device multiplies the part of their inputs that its share of the kernel needs, and the products are
    reduce-scattered back to the devices that hold the rows.
    """
    sharding = _active()
    if sharding is None:
        return x @ kernel.astype(x.dtype)
    mesh, whole = jax.sharding.get_abstract_mesh(), _to_mesh(axes)
    share = _divided(mesh, kernel.shape, whole)
    sent = x.shape[0] // mesh.shape["replica"] * sum(kernel.shape)  # numbers, by way of the rows
    if not SHARDED_PARTS[sharding] or share[0] != "shard" or sent >= kernel.size:
        return x @ compute_copy(kernel, axes, x.dtype)
    constrain = jax.lax.with_sharding_constraint
    x = constrain(x, PartitionSpec("replica", "shard"))
    return constrain(x @ constrain(kernel.astype(x.dtype), share), PartitionSpec(DATA, whole[1]))


def device_kind() -> str:
    """What computes the function that is traced: "cpu", "NVIDIA H100 80GB HBM3", "TPU v3" and such."""
    device = jax.sharding.get_abstract_mesh().abstract_device if _active() else jax.devices()[0]
    return device.device_kind


def on_each_device(function: Callable, axes, result_axes) -> Callable:
    """A function of arrays of which every device computes its own part. XLA does not divide loops and custom calls itself.

    Args:
      axes: the logical axes of each array, None for an absent one. result_axes: of the result. An axis that does not divide
        by its mesh axes is whole on every device.
    """
    if _active() is None:
        return function
    mesh = jax.sharding.get_abstract_mesh()

    def spec(shape, logical):
        places = zip(shape, _to_mesh(logical), strict=True)
        return PartitionSpec(*(axis if axis and size % _size(mesh, axis) == 0 else None for size, axis in places))

    def call(*arrays):
        specs = tuple(None if x is None else spec(x.shape, names) for x, names in zip(arrays, axes, strict=True))
        out = spec(jax.eval_shape(function, *arrays).shape, result_axes)
        return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)(*arrays)

    return call


def _size(mesh, axis) -> int:
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis of a batch's arrays over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, boxed_params, sharded: bool = False):
    """Where every parameter lives, from abstract parameters that still carry their logical axis names.

    Args:
      sharded: whether they are divided over `shard` too, besides what the logical axes say.

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


def placed_shapes(shapes, shardings):
    """Shapes (`jax.ShapeDtypeStruct`s) with the place of each."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)


def optimizer_shardings(mesh: Mesh, abstract_opt_state, abstract_params, shardings):
    """Each leaf of the optimiser's state lives where its parameter does in `shardings`; any other is whole everywhere.

    A leaf belongs to the parameter whose path its own path ends with.
    """
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract_params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path, leaf):
        for start in range(len(path)):
            shape, sharding = by_path.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract_opt_state)


def largest_replicated(abstract, count: int = 5) -> list[tuple[str, int]]:
    """[(name, bytes)], largest first: the arrays that each of several devices holds whole; from shapes with shardings."""
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), math.prod(leaf.shape) * leaf.dtype.itemsize)
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
        if leaf.sharding.is_fully_replicated and leaf.sharding.num_devices > 1
    ]
    return sorted(found, key=lambda entry: -entry[1])[:count]


@functools.cache
def _to_mesh(logical) -> PartitionSpec:
    return PartitionSpec(*[dict(RULES).get(name) for name in logical])


def _divided(mesh, shape, spec: PartitionSpec) -> PartitionSpec:
    """The spec with `shard` added to the first dimension that divides by it; vectors stay as they are.

    Prefer the first dimension: shards gathered along it are contiguous in memory, in full tiles.
    """
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    if len(shape) > 1 and mesh.shape["shard"] > 1:
        for index, (size, axis) in enumerate(zip(shape, axes, strict=True)):
            if size % (mesh.shape["shard"] * (mesh.shape[axis] if axis else 1)) == 0:
                axes[index] = (axis, "shard") if axis else "shard"
                break
    return PartitionSpec(*axes)


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from one that every process has whole; nothing is sent between processes."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """int64[b], ascending: which rows of a global batch this process's devices hold; all of them in a run of one process.

    Processes that one `model` axis spans hold the same rows.
    """
    blocks = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[block] for block in blocks]))


def shard_batch(batch, sharding: NamedSharding):
    """Puts this process's rows of a batch (`local_rows`) on the devices as one global array."""
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
