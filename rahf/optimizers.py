"""Learning-rate schedules and the optimiser, from the config's `optimizer` section."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from richhf_data import ranges
from richhf_data.errors import UserError

LEARNING_RATE = ranges.Range(0, 1000, without=(0,))
# Of a config, for `experiments.check_ranges`.
RANGES = {
    "optimizer.learning_rate": LEARNING_RATE,
    "optimizer.final_learning_rate": ranges.Range(0, 1000),
    "optimizer.warmup_steps": ranges.NUMBER,
    "optimizer.weight_decay": ranges.WEIGHT,
    "optimizer.b1": ranges.RATE,
    "optimizer.b2": ranges.RATE,
    "optimizer.clip_norm": ranges.Range(0, 1e30, without=(0,)),
    "optimizer.ema_decay": ranges.RATE,
    "optimizer.learning_rate_multipliers.*": ranges.WEIGHT,
}


def make_schedule(config, num_steps: int) -> optax.Schedule:
    """Step -> learning rate.

    `rsqrt` is the paper's: linear warm-up, then lr * sqrt(warmup_steps / step). `cosine` is for fine-tuning and short
    runs: linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` at `num_steps`.

    Raises:
      UserError: an unknown schedule, a cosine whose warm-up takes all steps, or rsqrt without a warm-up.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "rsqrt":
        if warmup < 1:
            raise UserError(f"optimizer.warmup_steps: got {warmup}, expected 1 or more for optimizer.schedule='rsqrt'")

        def rsqrt(step):
            step = jnp.asarray(step, jnp.float32) + 1.0
            return peak * jnp.minimum(step / warmup, jnp.sqrt(warmup / step))

        return rsqrt
    if config.schedule == "cosine":
        if warmup >= num_steps:
            raise UserError(f"optimizer.warmup_steps: got {warmup}, expected fewer than train.num_steps={num_steps}")
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=num_steps,
            end_value=config.final_learning_rate,
        )
    raise UserError(f"optimizer.schedule: got {config.schedule!r}, expected 'rsqrt' or 'cosine'")


def make_optimizer(config, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping, then `adamw` or `muon`, with weight decay on kernels alone.

    `muon` orthogonalises the momentum of every kernel, as a matrix of its inputs by its outputs, and leaves biases,
    scales and embeddings to Adam with Nesterov momentum (kellerjordan.github.io/posts/muon). Its updates are scaled
    to the size of AdamW's (arXiv 2502.16982). From scratch on RichHF-Synth it needs a fraction of AdamW's examples.

    `learning_rate_multipliers` scales the updates of each part (`part_of`). Parameters under `freeze` do not change, have
    no moments, and are left out of the gradient's norm.

    `update` takes `norm`, the gradient's `global_norm`, where it is known; without it, it is computed.

    Raises:
      UserError: another `kind` or part, or a schedule that `make_schedule` refuses.
    """
    schedule = make_schedule(config, num_steps)
    if config.kind == "adamw":
        optimizer = optax.adamw(
            schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_by_path(_is_kernel)
        )
    elif config.kind == "muon":
        optimizer = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_by_path(_as_matrix),
            consistent_rms=0.2,
        )
    else:
        raise UserError(f"optimizer.kind: got {config.kind!r}, expected 'adamw' or 'muon'")
    steps = [_clipped(config.clip_norm), optimizer]
    multipliers = dict(config.get("learning_rate_multipliers", {}))  # critics alone have parts
    if unknown := set(multipliers) - set(PARTS):
        raise UserError(f"optimizer.learning_rate_multipliers: got {sorted(unknown)}, expected some of {', '.join(PARTS)}")
    if any(multiplier != 1.0 for multiplier in multipliers.values()):
        steps.append(_scaled_by_part(multipliers))
    optimizer = optax.chain(*steps)
    if config.freeze:
        optimizer = optax.multi_transform(
            {False: optimizer, True: _unchanged()}, _by_path(lambda path, param: is_frozen(path, config.freeze))
        )
    return optimizer


PARTS = ("vit", "t5", "resnet", "clip", "heads")


def part_of(path) -> str:
    """Which of `PARTS` a parameter belongs to: `heads` is all besides the encoders."""
    return path[0].key if path[0].key in PARTS else "heads"


def is_frozen(path, freeze: Sequence[str]) -> bool:
    """Whether a parameter lies under one of the names of `optimizer.freeze`, such as `vit` or `t5/encoder`."""
    name = "/".join(key.key for key in path) + "/"
    return any(name.startswith(prefix.rstrip("/") + "/") for prefix in freeze)


def stop_frozen(params, freeze: Sequence[str]):
    """The parameters, with no gradient through the frozen ones, so that what only they need is not computed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, param: jax.lax.stop_gradient(param) if is_frozen(path, freeze) else param, params
    )


def with_frozen(old, new, freeze: Sequence[str]):
    """New parameters, the frozen ones as they were."""
    return jax.tree_util.tree_map_with_path(lambda path, x, y: x if is_frozen(path, freeze) else y, old, new)


def check_parts(params, config) -> None:
    """Refuses `freeze` without a parameter under a name, `learning_rate_multipliers` of other parts: UserError."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for prefix in config.freeze:
        if not any(is_frozen(path, (prefix,)) for path in paths):
            raise UserError(f"optimizer.freeze: nothing lies under {prefix!r}, expected one of {sorted(params)} or deeper")
    multipliers, parts = sorted(config.get("learning_rate_multipliers", ())), sorted({part_of(path) for path in paths})
    if multipliers and multipliers != parts:
        raise UserError(f"optimizer.learning_rate_multipliers: got {multipliers}, expected the model's parts {parts}")


def global_norm(grads) -> jax.Array:
    """The norm that is clipped. Layers of deviations (heads.py) are left out: the others train as without them."""
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return optax.global_norm([leaf for path, leaf in leaves if all(getattr(key, "key", "") != "deviation" for key in path)])


def _clipped(limit: float) -> optax.GradientTransformationExtraArgs:
    """Clips by the global norm. A product, because XLA for CPUs keeps a second gradient for optax's quotient."""

    def update(grads, state, params=None, *, norm=None, **others):
        del params, others
        norm = global_norm(grads) if norm is None else norm
        scale = jnp.minimum(1.0, limit / norm)
        return jax.tree.map(lambda grad: grad * scale, grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _scaled_by_part(multipliers) -> optax.GradientTransformation:
    def scale(updates, params):
        return jax.tree_util.tree_map_with_path(lambda path, update: multipliers[part_of(path)] * update, updates)

    return optax.stateless(scale)


def _unchanged() -> optax.GradientTransformation:
    # Adding -0.0 changes no bit of any number, -0.0 and 0.0 included.
    return optax.stateless(lambda updates, params: jax.tree.map(lambda x: jnp.full_like(x, -0.0), updates))


def _by_path(function):
    return functools.partial(jax.tree_util.tree_map_with_path, function)


def _is_kernel(path, param) -> bool:
    return path[-1].key == "kernel"


def _as_matrix(path, param) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a kernel are its inputs and which its outputs; None for any other parameter."""
    if not _is_kernel(path, param):
        return None
    # Dense [in, out], convolution [h, w, in, out], and attention [embed, heads, kv] but for its output, which is
    # [heads, kv, embed].
    first_output = 1 if param.ndim == 3 and path[-2].key != "out" else param.ndim - 1
    axes = tuple(range(param.ndim))
    return optax.contrib.MuonDimensionNumbers(axes[:first_output], axes[first_output:])
