"""Times the gradient of a convolution's kernel alone and in a loop, by XLA and as a product (`cpu.kernel_gradient`).

    python -m benchmarks.loop_gradient
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import tabulate

from rahf import partitioning
from rahf.models import cpu, layers

SIZES = ((32, 8, 128), (32, 16, 64), (8, 32, 64))  # pictures, pixels of a side, channels
PADDING = ((1, 1), (1, 1))
TIMES = 3


def milliseconds(function, *inputs) -> float:
    """Of a call, the best of several."""
    options = partitioning.compiler_options(jax.devices()[0].device_kind)
    compiled = jax.jit(function, compiler_options=options).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))
    found = []
    for _ in range(TIMES):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        found.append(time.perf_counter() - start)
    return 1000 * min(found)


def in_loop(gradient):
    """The sum of a gradient over two batches, in a `jax.lax.scan`."""

    def total(kernel, x):
        add = lambda total, x: (total + gradient(kernel, x), None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros_like(kernel), jnp.stack([x, x]))[0]

    return total


def main():
    """The command."""
    rows = []
    for count, side, channels in SIZES:
        x, kernel = (np.random.default_rng(0).standard_normal(shape).astype(np.float32)
                     for shape in ((count, side, side, channels), (3, 3, channels, channels)))  # fmt: skip

        def loss(kernel, x):
            return jnp.sin(layers.convolution(x, kernel, 1, PADDING)).sum()

        def products(kernel, x):
            with cpu.in_loop():
                return jax.grad(loss)(kernel, x)

        plain = jax.grad(loss)
        forms = {"XLA's": plain, "XLA's, in a loop": in_loop(plain)}
        forms |= {"product": products, "product, in a loop": in_loop(products)}
        times = {name: milliseconds(form, kernel, x) / (2 if "loop" in name else 1) for name, form in forms.items()}
        label = {"pictures, pixels, channels": f"{count}, {side} px, {channels}"}
        rows.append(label | {name: f"{value:.1f}" for name, value in times.items()})
    print("Milliseconds for a batch, forward and kernel's gradient:\n")
    print(tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
