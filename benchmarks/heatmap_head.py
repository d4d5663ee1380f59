"""The TPU compiler's figures of one heatmap head of the paper's size: forward and backward pass, alone on one core.

    python -m benchmarks.heatmap_head [--topology=v3:2x2] [--images=2] [--strips=4]

Prints FLOPs, bytes, the compiler's and the scheduler's estimates, and the time at the chip's peak. Needs libtpu, no TPU.
"""

import jax
import jax.numpy as jnp
import tabulate
from absl import flags
from flax import linen as nn

from rahf import compile as compiling
from rahf.models.heads import HeatmapHead, HeatmapHeadConfig
from richhf_data import command, ranges

CLOCK = 940e6  # Hz, of a TPU v3


def main():
    args = flags.FLAGS
    device = compiling.devices_of(args.topology)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    head = HeatmapHead(HeatmapHeadConfig(strips=args.strips), jnp.bfloat16)

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    features, target = abstract((args.images, 14, 14, 768), jnp.bfloat16), abstract((args.images, 224, 224), jnp.float32)
    params = nn.unbox(jax.eval_shape(head.init, jax.random.key(0), features))
    params = jax.tree.map(lambda x: abstract(x.shape, x.dtype), params)

    def loss(params, features, target):
        return jnp.sum((head.apply(params, features) - target) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, features, target).compile()
    cost, cycles = compiled.cost_analysis(), compiling.scheduler_cycles(compiled.as_text())
    row = {
        "images": args.images,
        "strips": args.strips,
        "TFLOP": f"{cost['flops'] / 1e12:.3f}",
        "GB": f"{cost['bytes accessed'] / 1e9:.1f}",
        "estimated ms": f"{cost['optimal_seconds'] * 1e3:.1f}",
        "scheduler's ms (v3)": f"{cycles / CLOCK * 1e3:.1f}",
        "at peak ms": f"{cost['flops'] / compiling.CHIPS[device.device_kind].tflops / 1e9:.1f}",
        "temporaries MiB": f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f}",
    }
    print(tabulate.tabulate([row], headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    flags.DEFINE_string("topology", "v3:2x2", "Topology of the TPU.")
    ranges.flag("images", 2, "Images on one core.", ranges.ROWS)
    ranges.flag("strips", 4, "`model.heatmap_head.strips`.", ranges.ROWS)
    command.run(main)
