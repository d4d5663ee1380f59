"""Milliseconds, memory and rounding of each form of rahf/models/attention.py, at the sizes that the models have.

    python -m benchmarks.attention [--forms=plain,blockwise] [--only=unet_64] [--repeats=5]

In float32 on CPUs and in bfloat16 elsewhere. Where PyTorch is installed, its scaled_dot_product_attention runs beside them.
The gradient is that of query, key and value, its forward pass included; the temporaries are those that XLA states for it.
The differences of the output and of the gradients are from the plain form in float32, relative to its largest value.
"""

import functools
import importlib.util
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import tabulate
from absl import flags

from rahf.models import attention
from richhf_data import command, ranges
from richhf_data.errors import UserError

TITLE = "images, queries, keys, heads, width"
# As in the title, and whether there is a bias.
SIZES = {
    "unet_64": (2, 4096, 4096, 8, 40, False),
    "unet_32": (2, 1024, 1024, 8, 80, False),
    "unet_16": (2, 256, 256, 8, 160, False),
    "text_64": (2, 4096, 77, 8, 40, False),
    "vae": (1, 4096, 4096, 1, 512, False),
    "vit": (8, 197, 197, 12, 64, False),
    "t5": (8, 260, 260, 12, 64, True),
}


def forms(size: tuple) -> list[str]:
    """Those that this machine has for a size of `SIZES`."""
    kind = jax.devices()[0].device_kind
    *_, width, with_bias = size
    found = ["plain", "blockwise"]
    found += ["cudnn"] if kind.startswith("NVIDIA") and width <= 128 else []
    return found + (["pallas"] if kind.startswith("TPU") and not with_bias else [])


def inputs(size: tuple) -> tuple[list, jax.Array | None, jax.Array]:
    """float32 query, key and value; the bias; the gradient of the output."""
    batch, queries, keys, heads, width, with_bias = size
    rng = np.random.default_rng(0)
    lengths = (queries, keys, keys, queries)
    *arrays, cotangent = (rng.standard_normal((batch, n, heads, width), np.float32) for n in lengths)
    arrays[0] *= width**-0.5
    bias = jnp.asarray(rng.standard_normal((1, heads, queries, keys), np.float32)) if with_bias else None
    return [jnp.asarray(x) for x in arrays], bias, jnp.asarray(cotangent)


def timed(call, repeats: int) -> float:
    """The least milliseconds of a call after the first; of ten at a time where one is short."""
    call()
    start = time.perf_counter()
    call()
    times, least = (10 if time.perf_counter() - start < 0.01 else 1), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(times):
            call()
        least = min(least, (time.perf_counter() - start) / times)
    return 1e3 * least


def functions(form: str, bias):
    """(forward, gradient) of a form, compiled by `jax.jit`."""
    forward = functools.partial(attention.attention, bias=bias, implementation=form)

    def gradient(query, key, value, cotangent):
        return jax.vjp(forward, query, key, value)[1](cotangent)

    return jax.jit(forward), jax.jit(gradient)


def difference(found: list, expected: list) -> str:
    """The largest, relative to the largest value of the array."""
    pairs = zip(found, expected, strict=True)
    return f"{max(float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()) for a, b in pairs):.1e}"


def of_size(size: tuple, only: list[str] | None, repeats: int) -> list[dict]:
    """A row of the table for each form."""
    arrays, bias, cotangent = inputs(size)
    with jax.default_matmul_precision("highest"):
        forward, gradient = functions("plain", bias)
        expected, gradients = forward(*arrays), gradient(*arrays, cotangent)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    *arrays, cotangent = (x.astype(dtype) for x in (*arrays, cotangent))
    rows = []
    for form in [form for form in forms(size) if not only or form in only]:
        forward, gradient = functions(form, bias)
        compiled = gradient.lower(*arrays, cotangent).compile()
        rows.append(
            {
                "form": form,
                "forward ms": timed(lambda: jax.block_until_ready(forward(*arrays)), repeats),
                "gradient ms": timed(lambda: jax.block_until_ready(compiled(*arrays, cotangent)), repeats),
                "temporaries MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
                "output": difference([forward(*arrays)], [expected]),
                "gradients": difference(compiled(*arrays, cotangent), gradients),
            }
        )
    return rows + ([] if only or not importlib.util.find_spec("torch") else [_torch(arrays, bias, cotangent, repeats)])


def _torch(arrays, bias, cotangent, repeats: int) -> dict:
    """The row of PyTorch's function."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)

    def moved(x):
        return torch.from_numpy(np.array(x, np.float32)).to(device, dtype)

    query, key, value, cotangent = (moved(x).transpose(1, 2).contiguous() for x in (*arrays, cotangent))
    function = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, attn_mask=None if bias is None else moved(bias), scale=1.0
    )

    def done(found):
        if gpu:
            torch.cuda.synchronize()
        return found

    def gradient():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        return done(torch.autograd.grad(function(*leaves), leaves, cotangent))

    with torch.no_grad():
        forward = timed(lambda: done(function(query, key, value)), repeats)
    return {"form": "PyTorch", "forward ms": forward, "gradient ms": timed(gradient, repeats)}


def main():
    """The command."""
    args, rows = flags.FLAGS, []
    for flag, known in (("only", SIZES), ("forms", attention.IMPLEMENTATIONS)):
        if unknown := sorted(set(getattr(args, flag) or ()) - set(known)):
            raise UserError(f"{flag}: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    for name in args.only or SIZES:
        batch, queries, keys, heads, width, with_bias = SIZES[name]
        title = {TITLE: f"{name}: {batch}, {queries}, {keys}, {heads}, {width}{' and a bias' if with_bias else ''}"}
        rows += [title | row for row in of_size(SIZES[name], args.forms, args.repeats)]
    print(tabulate.tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    flags.DEFINE_list("only", None, f"Some of {', '.join(SIZES)}; all by default.")
    flags.DEFINE_list("forms", None, f"Some of {', '.join(attention.IMPLEMENTATIONS)}; those of this machine by default.")
    ranges.flag("repeats", 5, "Timed calls.", ranges.Range(1, 1000, whole=True))
    command.run(main)
