"""What guidance costs: a guided step of sampling beside a plain one, seconds and memory.

    python -m benchmarks.guide [--size=512 --steps=2]

Stable Diffusion 1.5's sizes and a RAHF of `rahf_base`, random weights, float32, one picture with classifier-free guidance.
Each row runs in a process of its own. Seconds are those of the second call, divided by its steps; memory is the largest of
the process, weights and compiler included. Prints a table.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import resource
import time

import jax
import tabulate
from absl import flags
from flax import linen as nn

from rahf import compile as compiling
from rahf import experiments
from rahf.diffusion import folder, sample
from rahf.diffusion.guide import Guidance
from rahf.models import critics
from rahf.models.rahf import RAHF, RAHFConfig
from richhf_data import command, ranges

ROWS = {  # name -> options of `Guidance`
    "plain": None,
    "guided, forward": {"scale": 1.0},
    "guided, backward": {"scale": 0.0, "backward_steps": 1},
    "guided in half of the steps": {"scale": 1.0, "end": 0.5},
}


class Random(folder.StableDiffusion):
    """Random weights, and ids in place of a tokeniser."""

    def text_ids(self, texts, truncate=False):
        """int32[B, L]: as of empty texts."""
        tower = self.config.text.text
        ids = jax.numpy.full((len(texts), tower.length), tower.eos_id, jax.numpy.int32)
        return jax.device_get(ids.at[:, 0].set(tower.eos_id - 1))


def measure(options: dict | None, size: int, steps: int) -> tuple[float, float]:
    """Seconds of a step, and GiB."""
    sizes = folder.Config()
    unet = dataclasses.replace(sizes.unet, sample_size=size // sizes.vae.factor)
    config = dataclasses.replace(sizes, unet=unet)
    params = nn.unbox(jax.jit(functools.partial(folder.init, config))(jax.random.key(0)))
    guide = None
    if options:
        of_config = experiments.load("rahf_base")
        model_config = RAHFConfig.from_dict(of_config.model.to_dict())
        module, inputs = RAHF(model_config), critics.dummy_inputs(model_config, of_config.data.text_length)
        critic = nn.unbox(jax.jit(module.init)(jax.random.key(1), *inputs))["params"]
        shapes = compiling.aesthetics_of(of_config)
        guide = Guidance(dataclasses.replace(shapes, params=critic), **options)
    draw = functools.partial(sample.generate, Random(config, params, None), [""], steps=steps, guide=guide)
    draw()
    start = time.perf_counter()
    draw()
    return (time.perf_counter() - start) / steps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    """The command."""
    lines, context = [], multiprocessing.get_context("spawn")
    for name, options in ROWS.items():
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            seconds, memory = pool.submit(measure, options, flags.FLAGS.size, flags.FLAGS.steps).result()
        first = lines[0] if lines else {"s a step": seconds, "GiB": memory}
        ratios = {"times plain": seconds / first["s a step"], "memory, times plain": memory / first["GiB"]}
        lines.append({"": name, "s a step": seconds, "GiB": memory} | ratios)
        print(f"{name}: {seconds:.2f} s a step, {memory:.2f} GiB", flush=True)
    print(tabulate.tabulate(lines, headers="keys", tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    ranges.flag("size", 512, "Pixels, both sides.", ranges.PIXELS)
    ranges.flag("steps", 2, "Steps of DDIM.", ranges.COUNT)
    command.run(main)
