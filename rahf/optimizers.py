"""Learning-rate schedules and the optimiser, from the config's `optimizer` section."""

import jax
import jax.numpy as jnp
import optax


def make_schedule(config, num_steps: int) -> optax.Schedule:
    """Step -> learning rate.

    `rsqrt` is the paper's: linear warm-up, then lr * sqrt(warmup_steps / step). `cosine` is for fine-tuning and short
    runs: linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` at `num_steps`.

    Raises:
      ValueError: an unknown schedule, or a cosine whose warm-up takes all steps.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "rsqrt":

        def rsqrt(step):
            step = jnp.asarray(step, jnp.float32) + 1.0
            return peak * jnp.minimum(step / warmup, jnp.sqrt(warmup / step))

        return rsqrt
    if config.schedule == "cosine":
        if warmup >= num_steps:
            raise ValueError(f"optimizer.warmup_steps: got {warmup}, expected fewer than train.num_steps={num_steps}")
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=num_steps,
            end_value=config.final_learning_rate,
        )
    raise ValueError(f"optimizer.schedule: got {config.schedule!r}, expected 'rsqrt' or 'cosine'")


def make_optimizer(config, num_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW; weight decay on matrices and kernels alone (not on biases, scales, embeddings)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
