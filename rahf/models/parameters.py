"""The shapes of a module's parameters, without computing them."""

from collections.abc import Callable

import flax.linen as nn
import flax.traverse_util
import jax


def param_shapes(init: Callable, *inputs) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of the parameters that `init(key, *inputs)` makes, with names joined by "/".

    Args:
      init: a module's `init`, or a function of the key and the inputs that returns the same tree.
      inputs: arrays, or their `jax.ShapeDtypeStruct`.
    """
    made = nn.unbox(jax.eval_shape(init, jax.random.key(0), *inputs))["params"]
    return flax.traverse_util.flatten_dict(made, sep="/")
