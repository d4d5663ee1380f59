"""What is trained (`Program`), and the compiled training step that is made from it (`Training`).

A `Program` is the part that differs between models: fresh parameters, the loss, the shapes of a batch. `assemble` makes a
`Training` from it and a config: the mesh, the training state as shapes with shardings, and a step that brings its own
mesh and sharding. `rahf.train`, `rahf.diffusion.train`, `rahf.compile`, the benchmarks and the tests all use that one step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from rahf import experiments, optimizers, partitioning
from rahf.models import cpu
from rahf.models.attention import IMPLEMENTATIONS
from rahf.models.resnet import STATISTICS, with_statistics
from richhf_data import ranges
from richhf_data.errors import UserError

# Of every config that is trained; for `experiments.check_ranges`.
RANGES = optimizers.RANGES | {
    "seed": ranges.SEED,
    "log_every": ranges.COUNT,
    "checkpoint_every": ranges.COUNT,
    "train.batch_size": ranges.ROWS,
    "train.num_steps": ranges.COUNT,
    "train.accumulation_steps": ranges.ROWS,
    "train.max_bad_steps": ranges.COUNT,
    "mesh.data": ranges.Range(1, 2**20, whole=True, also=-1),
    "mesh.model": ranges.Range(1, 2**20, whole=True),
    "mesh.shard_group": ranges.COUNT,
    "mesh.attention": ranges.OneOf(("auto", *IMPLEMENTATIONS)),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """What is trained.

    Attributes:
      init: key -> fresh parameters, boxed with their logical axis names (`flax.linen.with_logical_partitioning`).
      loss: (params, rows, normalisers, key) -> (loss, metrics with "loss"). Those of the parts of a batch add up to those of
        the whole. Where the metrics hold `STATISTICS`, a tree of running statistics, their mean over the parts takes the
        place of the parameters of these names. `params` has the entries of `constants` too.
      normalisers: batch -> what the losses of its parts are divided by.
      batch_shapes: rows of the global batch -> {name: (shape, dtype)} of the batch.
      remat: the config keys that say whether a part is recomputed in the backward pass.
      frozen: parameters that are never trained, as in `optimizer.freeze`.
      constants: name -> a tree of shapes, boxed as `init`'s or plain: what the loss reads and nothing changes. They are in
        no checkpoint; `Training.given` gives them.
      turns: how often the loss is called for each part of a batch, with the number of the turn as `rows["turn"]`, int32[],
        where there are several. Gradients and metrics add up.
    """

    init: Callable[[jax.Array], dict]
    loss: Callable
    normalisers: Callable[[Mapping], dict[str, jax.Array]]
    batch_shapes: Callable[[int], dict[str, tuple[tuple[int, ...], str]]]
    remat: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    turns: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """A program assembled for one config and one mesh.

    Attributes:
      config: with the program's frozen parameters in `optimizer.freeze`. program, mesh: what it was made of.
      state: the training state as `jax.ShapeDtypeStruct`s with shardings: `step`, `params`, `opt_state`, and `ema` where
        `optimizer.ema_decay` is above 0.
      batch: {name: `jax.ShapeDtypeStruct`} of the global batch.
      constants: the program's, as shapes with shardings; arrays once they were `given`.
      init_key, step_key: of the config's seed.
    """

    config: object
    program: Program
    mesh: Mesh
    state: dict
    batch: dict[str, jax.ShapeDtypeStruct]
    constants: dict
    init_key: jax.Array
    step_key: jax.Array
    _optimizer: optax.GradientTransformation
    _update: partitioning.MeshFunction

    @property
    def params(self):
        """The parameters as shapes with shardings."""
        return self.state["params"]

    @property
    def own_rows(self) -> np.ndarray:
        """int64[b]: which rows of each global batch this process reads."""
        return partitioning.local_rows(partitioning.batch_sharding(self.mesh), self.config.train.batch_size)

    def init_params(self) -> dict:
        """Fresh parameters, in their places; the config's seed decides them."""
        init = jax.jit(lambda key: nn.unbox(self.program.init(key)), out_shardings=_shardings(self.params))
        return init(self.init_key)

    def init_state(self, params) -> dict:
        """The state of step 0 with these parameters. Do not use them afterwards: the first step donates their memory."""

        def state_of(params):
            return _state_of(params, self._optimizer, ema="ema" in self.state)

        return jax.jit(state_of, out_shardings=_shardings(self.state))(params)

    def given(self, constants: Mapping[str, Any]) -> "Training":
        """The same, with the program's constants: trees of arrays, which are put in their places."""
        placed = jax.tree.map(lambda x, to: partitioning.place(np.asarray(x), to.sharding), dict(constants), self.constants)
        return dataclasses.replace(self, constants=placed)

    def place(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on the devices, from this process's rows of it."""
        return partitioning.shard_batch(rows, partitioning.batch_sharding(self.mesh))

    def step(self, state, batch: Mapping[str, jax.Array]):
        """One update: (state, a batch that was placed) -> (new state, metrics). The old state's memory is donated.

        The losses are normalised over the global batch, so neither the number of devices nor `train.accumulation_steps`
        changes the mathematics. Where the loss or the gradient is not finite, the metric `skipped` is 1 and only the step
        number changes.
        """
        return self._update(state, batch, self.step_key, self.constants)

    def lower(self) -> jax.stages.Lowered:
        """The update, lowered from shapes alone: no device computes."""
        return self._update.lower(self.state, self.batch, jax.eval_shape(lambda: self.step_key), self.constants)


def assemble(
    program: Program,
    config,
    mesh: Mesh | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Training:
    """A program, ready to train as a config says.

    Args:
      config: with `seed`, and the sections `mesh`, `optimizer` and `train`.
      mesh: by default that of `config.mesh` on all devices. An abstract one is enough to see where the state lives.
      optimizer: by default that of `config.optimizer`.

    Raises:
      UserError: a number out of its range; a mesh, batch size, optimiser or frozen part that cannot be.
    """
    config = config.copy_and_resolve_references()
    config.optimizer.freeze = tuple(dict.fromkeys((*program.frozen, *config.optimizer.freeze)))
    experiments.check_ranges(config, RANGES)
    mesh = partitioning.mesh_of(config.mesh) if mesh is None else mesh
    _check_batch_size(config, mesh)
    schedule = optimizers.make_schedule(config.optimizer, config.train.num_steps)
    optimizer = optimizer or optimizers.make_optimizer(config.optimizer, config.train.num_steps)
    optimizer = optax.with_extra_args_support(optimizer)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))

    boxed = jax.eval_shape(program.init, init_key)
    optimizers.check_parts(nn.unbox(boxed), config.optimizer)
    state = _abstract_state(boxed, optimizer, config, mesh)
    rows = partitioning.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, (shape, dtype) in program.batch_shapes(config.train.batch_size).items()
    }
    boxed = dict(program.constants)
    sharded = "params" in partitioning.SHARDED_PARTS[config.mesh.sharding]
    constants = partitioning.placed_shapes(nn.unbox(boxed), partitioning.param_shardings(mesh, boxed, sharded))
    update = partitioning.MeshFunction(
        _make_update(program, optimizer, schedule, config, mesh),
        mesh,
        config.mesh.sharding,
        config.mesh.attention,
        in_shardings=(_shardings(state), rows, None, _shardings(constants)),
        out_shardings=(_shardings(state), None),
        donate_argnums=0,
    )
    return Training(config, program, mesh, state, batch, constants, init_key, step_key, optimizer, update)


def _state_of(params, optimizer, ema: bool) -> dict:
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(params)}
    return state | ({"ema": jax.tree.map(jnp.copy, params)} if ema else {})


def _abstract_state(boxed_params, optimizer, config, mesh) -> dict:
    """`Training.state`, from abstract parameters that carry their logical axis names."""
    if config.mesh.sharding not in partitioning.SHARDED_PARTS:
        known = sorted(partitioning.SHARDED_PARTS)
        raise UserError(f"mesh.sharding: got {config.mesh.sharding!r}, expected one of {known}")
    sharded = partitioning.SHARDED_PARTS[config.mesh.sharding]
    ema = config.optimizer.ema_decay > 0
    state = jax.eval_shape(lambda params: _state_of(params, optimizer, ema), nn.unbox(boxed_params))
    like_params = {
        part: partitioning.param_shardings(mesh, boxed_params, part in sharded) for part in ("params", "opt_state", "ema")
    }
    moments = partitioning.optimizer_shardings(mesh, state["opt_state"], state["params"], like_params["opt_state"])
    places = like_params | {"step": partitioning.replicated(mesh), "opt_state": moments}
    places = {name: places[name] for name in state}
    return partitioning.placed_shapes(state, places)


def _shardings(abstract):
    return jax.tree.map(lambda x: x.sharding, abstract)


def _check_batch_size(config, mesh) -> None:
    data = partitioning.sizes(mesh)["data"]
    unit = data * config.train.accumulation_steps
    if config.train.batch_size % unit:
        raise UserError(
            f"train.batch_size: got {config.train.batch_size}, expected a multiple of {unit} = "
            f"{data} (mesh.data) x {config.train.accumulation_steps} (train.accumulation_steps)"
        )


def _make_update(program: Program, optimizer, schedule, config, mesh) -> Callable:
    """The pure update `(state, batch, key, constants) -> (state, metrics)`; see `Training.step`."""
    microbatches = config.train.accumulation_steps
    parts = microbatches * program.turns

    def update(state, batch, key, constants):
        key = jax.random.fold_in(key, state["step"])
        normalisers = program.normalisers(batch)

        def loss_of_part(params, rows, index):
            params = optimizers.stop_frozen(params, config.optimizer.freeze)
            rows = rows if program.turns == 1 else rows | {"turn": index % program.turns}
            return program.loss(params | constants, rows, normalisers, jax.random.fold_in(key, index))

        gradient = jax.value_and_grad(loss_of_part, has_aux=True)
        if parts == 1:
            (_, metrics), grads = gradient(state["params"], batch, 0)
        else:
            rows = batch
            if microbatches > 1:
                rows = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
                spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, partitioning.DATA))
                rows = jax.lax.with_sharding_constraint(rows, spread)

            def part(index):
                if microbatches == 1:
                    return rows, index
                place = index // program.turns
                return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), rows), index

            def accumulate(total, index):
                with cpu.in_loop():
                    (_, metrics), grads = gradient(state["params"], *part(index))
                return jax.tree.map(jnp.add, total, (grads, metrics)), None

            (_, metrics), grads = jax.eval_shape(lambda: gradient(state["params"], *part(jnp.int32(0))))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
            (grads, metrics), _ = jax.lax.scan(accumulate, zeros, jnp.arange(parts))

        statistics = jax.tree.map(lambda x: x / parts, metrics.pop(STATISTICS, {}))
        norm = optimizers.global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

        def updated(old, grads):
            updates, opt_state = optimizer.update(grads, old["opt_state"], old["params"], norm=norm)
            params = optax.apply_updates(old["params"], updates)
            if statistics:
                params = optimizers.with_frozen(old["params"], with_statistics(params, statistics), config.optimizer.freeze)
            new = {"params": params, "opt_state": opt_state}
            if "ema" in old:
                decay = config.optimizer.ema_decay
                new["ema"] = jax.tree.map(lambda old, now: old - (1 - decay) * (old - now), old["ema"], params)
            return new

        old = {name: state[name] for name in state if name != "step"}
        if partitioning.device_kind() == "cpu":  # with a `where` for each array, XLA copies both moments there
            new = jax.lax.cond(finite, updated, lambda old, grads: old, old, grads)
        else:  # a branch holds all gradients at once
            new = jax.tree.map(lambda now, old: jnp.where(finite, now, old), updated(old, grads), old)
        metrics |= {"gradient_norm": norm, "learning_rate": schedule(state["step"])}
        return {"step": state["step"] + 1} | new, metrics | {"skipped": 1 - finite.astype(jnp.int32)}

    return update
