"""The training loop of the judge, the CLIP and the VAE."""

from collections.abc import Callable, Mapping

import jax
import ml_collections
import numpy as np
from tqdm.auto import tqdm

from rahf import optimizers
from richhf_data.errors import UserError


def optimise(
    loss: Callable,
    params,
    arrays: Mapping[str, np.ndarray],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    name: str,
):
    """Trains by Muon with a warm-up and a cosine to 0, over shuffled rows. Deterministic.

    Args:
      loss: `(params, {name: rows of its array}, key) -> (float32[], {name: float32[]})`; the progress bar shows the second.
      params: unboxed arrays. arrays: all with the same number of rows.
      name: of the progress bar.

    Returns:
      The trained parameters.

    Raises:
      UserError: fewer rows than a batch, or a loss that is not finite.
    """
    (rows,) = {len(array) for array in arrays.values()}
    if rows < batch_size:
        raise UserError(f"{name}: got {rows} rows, expected at least a batch of {batch_size}")
    settings = ml_collections.ConfigDict(
        dict(kind="muon", learning_rate=learning_rate, schedule="cosine", warmup_steps=max(1, min(100, steps // 10)))
        | dict(final_learning_rate=0.0, b1=0.9, b2=0.98, weight_decay=0.01, clip_norm=1.0, freeze=())
        | dict(learning_rate_multipliers=dict.fromkeys(optimizers.PARTS, 1.0))
    )
    optimizer = optimizers.make_optimizer(settings, steps)

    def step(state, batch, key):
        params, opt_state = state
        (_, shown), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (jax.tree.map(jax.numpy.add, params, updates), opt_state), shown

    step, key = jax.jit(step, donate_argnums=0), jax.random.key(seed)
    state = jax.tree.map(jax.numpy.array, (params, optimizer.init(params)))  # copies: they are donated
    per_epoch = rows // batch_size
    with tqdm(range(steps), desc=name, unit="step", dynamic_ncols=True) as bar:
        for i in bar:
            if i % per_epoch == 0:
                order = np.random.default_rng((seed, i // per_epoch)).permutation(rows)
            part = order[i % per_epoch * batch_size :][:batch_size]
            batch = {name: array[part] for name, array in arrays.items()}
            state, shown = step(state, batch, jax.random.fold_in(key, i))
            if i % 20 == 0 or i == steps - 1:
                shown = {label: float(value) for label, value in shown.items()}
                bar.set_postfix({label: f"{value:.3g}" for label, value in shown.items()})
                if not np.isfinite(list(shown.values())).all():
                    raise UserError(f"{name}: the loss is not finite at step {i}: {shown}; lower the learning rate")
    return state[0]
