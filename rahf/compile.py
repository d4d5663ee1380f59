"""Compiles a config's steps for any topology, ahead of time and without a device: does it fit, how long will it take?

    python -m rahf.compile --config=rahf_base --topology=v3:8x8 [--step=train] [--config.key=value ...]
    python -m rahf.compile --config=rahf_base --topology=v3:8x8 --sweep
    python -m rahf.compile --config=sd_reward --topology=v3:2x2 --step=sample [--height=1024 --guide=rahf_base]
    python -m rahf.compile --config=sd_online --topology=v3:2x2 --config.method=ddpo [--step=rollout]

For a TPU the real compiler does it (`pip install -e '.[tpu]'`); nothing is allocated, shapes are all it needs. `cpu` and
`gpu` are the devices of this machine. Prints a table, and on the last line a JSON object; exits with 1 where a step does
not fit into the memory.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import sys
import time

import jax
import numpy as np
import tabulate
from absl import flags
from flax import linen as nn

from rahf import experiments, partitioning, train
from rahf import program as programs
from rahf.diffusion import finetuning, folder, sample
from rahf.diffusion.guide import Guidance
from rahf.diffusion.online import __main__ as online
from rahf.diffusion.online import backprop, policy
from rahf.diffusion.schedule import plan
from rahf.models import critics
from rahf.predictor import Predictor
from rahf.reward.differentiable import Differentiable, rahf_heatmaps, rahf_score
from richhf_data import command, ranges
from richhf_data.errors import UserError

GIB = 2**30
PICTURE = ("height", "width", "vae_tile", "guide")  # flags of the step "sample"
# predict and evaluate are one program, at 32 rows and at eval.batch_size. rollout draws train.batch_size pictures.
STEPS = ("train", "predict", "evaluate", "sample", "rollout")
# Pallas kernels that tell XLA no costs -> matrix products of the size of the logits in each.
UNSEEN_KERNELS = {"flash_mha_bwd_dkv": 4, "flash_mha_bwd_dq": 3}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one device as JAX counts them: memory in GiB, peak bfloat16 TFLOP/s, GB/s of the memory.

    Source: Cloud TPU's system architecture.
    """

    hbm: float
    tflops: float
    bandwidth: float


# By device kind. Up to v4 a device here is one of the two cores of a chip.
CHIPS = {
    "TPU v2": Chip(8, 22.5, 350),
    "TPU v3": Chip(16, 61.5, 450),
    "TPU v4": Chip(16, 137.5, 614),
    "TPU v5 lite": Chip(16, 197, 819),
    "TPU v5": Chip(95, 459, 2765),
    "TPU v6 lite": Chip(32, 918, 1640),
}


# By the kind of config.
CHECKS = {
    "rahf": train.check,
    "diffusion": finetuning.check,
    "online": lambda config: online.check(config, has_critic=config.dense.weight > 0 or config.dense.words > 0),
}


class DoesNotFit(UserError):
    """The compiler finds no room in the memory."""


def devices_of(topology: str) -> list:
    """The devices of a topology: `v3:8x8` (64 chips) to `v6e:2x2` of a TPU, or `cpu`, `gpu`: this machine's.

    Raises:
      UserError: an unknown topology, or no libtpu.
    """
    if topology in ("cpu", "gpu"):
        try:
            return jax.devices(topology)
        except RuntimeError as error:
            raise UserError(f"topology: got {topology!r}, but JAX finds no such device here ({error})") from error
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # nothing runs: leave any TPU of this machine unused
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.partition(":")[0] + "-8")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # XLA raises several kinds
        raise UserError(
            f"topology: got {topology!r} ({str(error).splitlines()[0]}), expected such as v2:2x2, v3:8x8, v4:2x2x1, "
            "v5e:4x4, v5p:2x2x1, v6e:2x2, cpu or gpu; a TPU needs libtpu: pip install -e '.[tpu]'"
        ) from error


def diffusion_of(config) -> folder.Config:
    """The Stable Diffusion of a config, of 1.5's sizes where it names no folder."""
    sizes = folder.read_config(config.model.folder) if config.model.folder else folder.Config()
    return finetuning.model_config(config, sizes)


def program_of(config, guide: str = "rahf_base") -> programs.Program:
    """What a config trains: RAHF, or Stable Diffusion.

    guide: the config of the RAHF whose aesthetics refl and draft raise, and whose heatmaps show them the regions.
    """
    kind = config.get("kind", "rahf")
    if kind == "rahf":
        return train.program(config)
    if kind == "diffusion":
        return finetuning.program(diffusion_of(config), config)
    reward, critic = None, None
    if config.method in ("refl", "draft"):
        rahf = experiments.load(guide)
        reward = aesthetics_of(rahf)
        if config.dense.weight > 0:
            heatmaps = rahf_heatmaps(critics.config_of(rahf.model.to_dict()), config.dense.heatmaps)
            critic = backprop.Critic(heatmaps, reward.params, reward.rows)
    return online.program(diffusion_of(config), config, reward, critic)


def steps_of(config) -> tuple[str, ...]:
    """Those of `STEPS` that a config has."""
    if config.get("kind", "rahf") == "rahf":
        return "train", "predict", "evaluate"
    return "train", "sample", *(("rollout",) if config.get("method") in ("ddpo", "grpo") else ())


def lowered(config, step: str, mesh, batch_size: int, picture: dict):
    """One of `STEPS` of a config, lowered from abstract shapes, and its parameters as shapes with shardings."""
    if step in ("train", "rollout"):
        training = programs.assemble(program_of(config, **picture), config, mesh)
        return training.lower() if step == "train" else rollout(config, training), training.params
    if step == "sample":
        model = diffusion_of(config)
        model = dataclasses.replace(model, vae=dataclasses.replace(model.vae, dtype=model.unet.dtype))
        size = model.unet.sample_size * model.vae.factor
        picture = {"height": size, "width": size, "attention": config.mesh.attention} | picture
        steps = plan(model.schedule, config.sample.sampler, config.sample.steps)
        if guide := picture.pop("guide", None):
            picture["guide"] = Guidance(aesthetics_of(experiments.load(guide)))
        return sample.lower(model, mesh, batch_size, steps=steps, guidance=config.sample.guidance_scale > 1, **picture)
    predictor = Predictor(config, None, mesh)
    return predictor.lower(batch_size), predictor.params


def rollout(config, training: programs.Training) -> jax.stages.Lowered:
    """The drawing of a batch of pictures by ddpo or grpo."""
    model, context = diffusion_of(config), training.batch["context"]
    draw = policy.draw(model, config, policy.steps_of(model.schedule, config.rollout.steps), training.mesh)
    whole = partitioning.replicated(training.mesh)
    shapes = nn.unbox(jax.eval_shape(lambda: folder.init(model, jax.random.key(0))["vae"]))
    vae = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    numbers = jax.ShapeDtypeStruct(context.shape[:1], np.int32, sharding=context.sharding)
    return draw.lower(training.params, vae, context, training.constants["empty"], numbers, sample.seed_data(0))


def aesthetics_of(config) -> Differentiable:
    """The aesthetics of a config's RAHF, from shapes alone."""
    model_config = critics.config_of(config.model.to_dict())
    inputs = critics.dummy_inputs(model_config, config.data.text_length)
    params = nn.unbox(jax.eval_shape(critics.module_of(model_config).init, jax.random.key(0), *inputs))["params"]

    def rows(prompts):
        return np.repeat(inputs[1], len(prompts), axis=0)

    return Differentiable(rahf_score(model_config, {"aesthetics": 1.0}), params, rows)


def measure(config, topology: str, step: str, devices, batch_size: int, picture: dict | None = None) -> dict:
    """Compiles a step, and what the compiler says of it: the JSON object of this command.

    picture: of the step "sample", `PICTURE`; height and width by default of the model's training images. guide: the name of
    a RAHF's config, which refl and draft take too.
    """
    mesh = partitioning.mesh_of(config.mesh, devices)
    if step not in ("train", "rollout"):  # predictions add rows up to a multiple of the devices
        batch_size += -batch_size % partitioning.sizes(mesh)["data"]
    start = time.monotonic()
    low, params = lowered(config, step, mesh, batch_size, picture or {})
    try:
        compiled = low.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(f"{topology}, {step} step: does not fit: {str(error).strip().splitlines()[0]}") from error
    seconds = time.monotonic() - start
    hlo = compiled.as_text()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    chip = CHIPS.get(devices[0].device_kind)
    kinds = {
        "arguments": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    hbm = sum(kinds.values()) / GIB
    unseen = kernels(hlo)
    flops = cost.get("flops") and cost["flops"] + sum(kernel["flops"] or 0 for kernel in unseen.values())
    return {
        "topology": topology,
        "step": step,
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "mesh": partitioning.sizes(mesh),
        "batch_size": batch_size,
        "rules": config.mesh.sharding,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "largest_replicated": dict(partitioning.largest_replicated(params)),  # bytes on every device
        "hbm_gib_per_core": hbm,
        "hbm_gib_by_kind": {name: size / GIB for name, size in kinds.items()},
        "hbm_capacity_gib": chip and chip.hbm,
        "fits": chip is None or hbm <= chip.hbm,
        "flops_per_core": flops,
        "bytes_per_core": cost.get("bytes accessed"),
        "estimated_step_s": _seconds(cost, hlo, unseen, chip) if chip else None,
        "kernels": unseen,
        "peak_step_s": flops / (chip.tflops * 1e12) if chip and flops else None,
        "scheduler_cycles": scheduler_cycles(hlo),
        "collectives": collectives(hlo),
        "loops": loops(hlo),  # their bodies count once, and not at all in scheduler_cycles
        "compile_s": seconds,
    }


_KERNEL = re.compile(r'custom_call_target="tpu_custom_call", operand_layout_constraints=\{(.*?)\}, frontend')


def kernels(hlo: str) -> dict[str, dict]:
    """{name: {"count", "flops", "bytes"}} of an optimised module's Pallas kernels whose costs XLA's figures lack.

    FLOPs are None for a kernel that `UNSEEN_KERNELS` does not name. XLA's bytes include those of its operands and results.
    """
    found = {}
    for line in hlo.splitlines():
        if not (match := _KERNEL.search(line)) or '"cost_estimate"' in line:
            continue
        path = re.search(r'op_name="([^"]*)/pallas_call"', line)
        name = re.split(r"_block_", path[1].rsplit("/", 1)[-1])[0] if path else "unnamed"
        inputs, results = _SHAPE.findall(match[1]), _SHAPE.findall(line.partition(" custom-call(")[0])
        entry = found.setdefault(name, {"count": 0, "flops": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += _size(inputs + results)
        if name in UNSEEN_KERNELS:  # query [B, A, N, K] and key [B, A, L, K] come first
            (_, query), (_, key), *_ = inputs
            entry["flops"] += 2 * UNSEEN_KERNELS[name] * _count(query) * int(key.split(",")[2])
        else:
            entry["flops"] = None
    return found


def _seconds(cost: dict, hlo: str, unseen: dict[str, dict], chip: Chip) -> float:
    """XLA's estimate, with the time of kernels it does not see: the longer of FLOPs at peak and bytes at full bandwidth."""
    seconds = cost["optimal_seconds"]
    if seconds < cost["flops"] / (chip.tflops * 1e12):
        # On some chips, XLA takes 1 s off for each of these, which move nothing. On others it does not.
        seconds += len(re.findall('custom_call_target="(ConcatBitcast|ZeroCrop)"', hlo))
    for kernel in unseen.values():
        seconds += max(0, (kernel["flops"] or 0) / (chip.tflops * 1e12) - kernel["bytes"] / (chip.bandwidth * 1e9))
    return seconds


def scheduler_cycles(hlo: str) -> int | None:
    """The TPU backend's own estimates of an optimised module's operations, added up; None on other platforms.

    They account for tiles and layouts, which `estimated_step_s` ignores. They count no communication.
    """
    return _cycles(hlo, "ENTRY ")


def loops(hlo: str) -> list[int | None]:
    """Of each loop of an optimised module, the cycles of one turn, as `scheduler_cycles`; without the loops in it."""
    return [_cycles(hlo, f"%{body} (") for body in re.findall(r" while\(.*\bbody=%([\w.-]+)", hlo)]


def _cycles(hlo: str, computation: str) -> int | None:
    lines = hlo.partition(f"\n{computation}")[2].partition("\n}")[0]
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', lines))) or None


_OP = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_SHAPE = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of an optimised HLO module's collectives; bytes of their results on one device."""
    found = {}
    for line in hlo.splitlines():
        if not (match := _OP.search(line)):
            continue
        shapes = _SHAPE.findall(match[1])
        if match[3]:  # an asynchronous one gives its operand beside its result
            shapes = shapes[len(shapes) // 2 :]
        entry = found.setdefault(match[2], {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += _size(shapes)
    return found


def _size(shapes: list[tuple[str, str]]) -> int:
    """Bytes of [(type, sizes)], as `_SHAPE` finds them."""
    return sum(_bytes(kind) * _count(sizes) for kind, sizes in shapes)


def _bytes(kind: str) -> int:
    return 1 if kind == "pred" else max(1, int(re.search(r"\d+", kind)[0]) // 8)


def _count(sizes: str) -> int:
    return math.prod(map(int, filter(None, sizes.split(","))))


def sweep(config, topology: str, step: str, devices, batch_size: int) -> list[dict]:
    """`measure` for each way to divide the devices over `data` and `model`, with and without remat."""
    results, seen = [], len(devices)
    for model_axis, remat in itertools.product([n for n in (1, 2, 4, 8) if seen % n == 0], (False, True)):
        changed = config.copy_and_resolve_references()
        changed.mesh.data, changed.mesh.model = -1, model_axis
        changed.update_from_flattened_dict(dict.fromkeys(program_of(config).remat, remat))
        try:
            result = measure(changed, topology, step, devices, batch_size)
        except UserError as error:
            print(f"model={model_axis}, remat={remat}: {error}", file=sys.stderr)
            continue
        results.append(result | {"remat": remat})
        print(_table([results[-1]]), flush=True)
    return results


def recommended(results: list[dict]) -> dict | None:
    """The quickest that fits; by the compiler's estimate, or by memory where it gives none."""
    fitting = [result for result in results if result["fits"]]
    return min(fitting, key=lambda result: (result["estimated_step_s"] or 0, result["hbm_gib_per_core"]), default=None)


def _table(results: list[dict]) -> str:
    def number(value, form=".2f"):
        return "-" if value is None else format(value, form)

    rows = []
    for result in results:
        kinds = result["hbm_gib_by_kind"]
        estimated, peak = result["estimated_step_s"], result["peak_step_s"]
        moved = sum(entry["bytes"] for entry in result["collectives"].values()) / GIB
        rows.append(
            {
                "topology": result["topology"],
                "mesh": " x ".join(str(size) for size in result["mesh"].values()),
                "remat": {None: "config", True: "yes", False: "no"}[result.get("remat")],
                "batch": result["batch_size"],
                "GiB/core": number(result["hbm_gib_per_core"]),
                "of": number(result["hbm_capacity_gib"], "g"),
                **{name: number(size) for name, size in kinds.items()},
                "TFLOP/core": number((result["flops_per_core"] or 0) / 1e12, ".3f"),
                "step s": number(estimated, ".4f"),
                "at peak s": number(peak, ".4f"),
                "Mcycles": number(result["scheduler_cycles"] and result["scheduler_cycles"] / 1e6, ".0f"),
                "of peak": number(peak and estimated and peak / estimated, ".0%"),
                "collectives GiB": number(moved),
                "fits": "yes" if result["fits"] else "NO",
                "compile s": number(result["compile_s"], ".0f"),
            }
        )
    return tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def main():
    """The command."""
    args = flags.FLAGS
    config = args.config
    possible = steps_of(config)
    if args.step not in possible:
        raise UserError(f"step: got {args.step!r}, expected {' or '.join(possible)}, the steps of this config")
    picture = {name: getattr(args, name) for name in PICTURE if getattr(args, name) is not None}
    guided = args.step == "train" and config.get("method") in ("refl", "draft")
    if args.step != "sample" and (wrong := [name for name in picture if name != "guide" or not guided]):
        raise UserError(f"{wrong[0]}: got one for --step={args.step}, expected --step=sample")
    if args.sweep and args.step == "sample":
        raise UserError("sweep: got it for --step=sample, expected another step; each device holds all parameters here")
    section = {"train": "train", "rollout": "train", "evaluate": "eval"}.get(args.step)
    batch_size = args.batch_size or (config[section].batch_size if section else 1 if args.step == "sample" else 32)
    if section == "train":
        config.train.batch_size = batch_size
    CHECKS[config.get("kind", "rahf")](config)
    devices = devices_of(args.topology)
    try:
        if args.sweep:
            results = sweep(config, args.topology, args.step, devices, batch_size)
        else:
            results = [measure(config, args.topology, args.step, devices, batch_size, picture)]
    except DoesNotFit as error:
        print(f"error: {error}", file=sys.stderr)
        results = []
    if not results:
        raise SystemExit(1)
    print(_table(results))
    for result in results[:1]:
        replicated = ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in result["largest_replicated"].items())
        print(f"largest parameters that every device holds whole: {replicated or 'none'}")
        for name, kernel in result["kernels"].items():
            flops = "unknown" if kernel["flops"] is None else f"{kernel['flops'] / 1e9:.1f} GFLOP"
            print(
                f"{kernel['count']} kernels {name}, which XLA's figures lack ({flops}, {kernel['bytes'] / 1e9:.2f} GB): "
                "their FLOPs and the time that follows are added here, not to Mcycles"
            )
        if result["loops"]:
            longest = max(cycles or 0 for cycles in result["loops"]) / 1e6
            print(
                f"{len(result['loops'])} loops: FLOPs, bytes and the estimate count the body of each once, Mcycles not at "
                f"all; a turn of the longest takes {longest:.1f}"
            )
    best = recommended(results)
    if args.sweep and best:
        remat = "".join(f" --config.{key}={best['remat']}" for key in program_of(config).remat)
        print(f"recommended: --config.mesh.model={best['mesh']['model']}{remat}")
    print(json.dumps(best or results[0]))
    if best is None:
        raise SystemExit(1)


if __name__ == "__main__":
    flags.DEFINE_string("topology", "cpu", "v3:8x8 and such, or cpu or gpu: this machine's devices.")
    flags.DEFINE_enum("step", "train", STEPS, "Which step to compile.")
    ranges.flag(
        "batch_size", None, "Rows of the global batch; by default the config's; one a device to sample.", ranges.ROWS
    )
    ranges.flag("height", None, "Of the pictures of --step=sample, in pixels; by default the model's.", ranges.PIXELS)
    ranges.flag("width", None, "In pixels; default as for --height.", ranges.PIXELS)
    ranges.flag("vae_tile", None, "As of rahf.diffusion.sample, for --step=sample.", ranges.PIXELS)
    flags.DEFINE_string(
        "guide", None, "A RAHF's config, whose aesthetics guide --step=sample, and train by refl and draft: rahf_base."
    )
    flags.DEFINE_bool("sweep", False, "Compare meshes and remat policies, and recommend one.")
    command.run(main, experiments.reader(kinds=tuple(CHECKS)))
