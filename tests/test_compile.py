"""Ahead-of-time compilation: what it reports, and what it refuses."""

import json
import subprocess
import sys

import jax
import pytest

from rahf import compile as compiling
from rahf import experiments, partitioning, sources
from rahf import program as programs
from richhf_data.synthetic import stream

PROMISED = [
    "topology",
    "num_devices",
    "mesh",
    "num_params",
    "hbm_gib_per_core",
    "hbm_capacity_gib",
    "fits",
    "flops_per_core",
    "estimated_step_s",
    "peak_step_s",
    "collectives",
    "compile_s",
]


def ci_config():
    config = experiments.load("rahf_ci")
    config.data.source = "stream"
    return config


def test_the_command_prints_the_promised_object_last():
    command = [sys.executable, "-m", "rahf.compile", "--config=configs/rahf_ci.py", "--topology=cpu", "--step=predict"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(PROMISED) <= set(result)
    assert result["fits"] and result["flops_per_core"] > 0


@pytest.mark.usefixtures("standard_promotion")  # optax promotes freely
def test_a_train_step_over_8_devices_adds_its_gradients_up():
    config = ci_config()
    config.model.variant = "augmented_prompt"  # has fewer parameters, and compiles sooner
    result = compiling.measure(config, "cpu", "train", jax.devices(), config.train.batch_size)
    assert result["mesh"] == {"data": 8, "model": 1}
    gradients = 4 * result["num_params"]
    assert sum(entry["bytes"] for entry in result["collectives"].values()) >= gradients
    arguments = result["hbm_gib_by_kind"]["arguments"] * compiling.GIB
    assert gradients / 8 < arguments < gradients  # parameters and moments, sharded
    config.mesh.sharding = "data_parallel"
    whole = compiling.measure(config, "cpu", "train", jax.devices(), config.train.batch_size)
    assert whole["hbm_gib_by_kind"]["arguments"] * compiling.GIB > 3 * gradients


def test_the_step_of_lora_has_moments_of_its_adapters_alone():
    config = experiments.load("sd_reward")
    config.lora.rank = 4
    training = programs.assemble(compiling.program_of(config), config)
    moments = sum(leaf.size for leaf in jax.tree.leaves(training.state["opt_state"]))
    adapters = sum(leaf.size for leaf in jax.tree.leaves(training.params["lora"]))
    assert training.config.optimizer.freeze == ("unet",)
    assert moments < 2 * adapters + 10


def test_sampling_over_8_devices_sends_nothing_but_the_pictures(unpacked):
    config = experiments.load("sd_reward")
    config.model.folder = str(unpacked("diffusion_tiny") / "first")
    picture = {"height": 32, "width": 16, "vae_tile": 8}
    result = compiling.measure(config, "cpu", "sample", jax.devices(), 7, picture)
    assert result["batch_size"] == 8 and result["fits"]
    assert result["collectives"] == {"all-gather": {"count": 2, "bytes": 8 * 32 * 16 * 3 * (4 + 1)}}  # the second: finite?


def test_a_guided_sampling_reads_the_critic_too(micro_folder):
    config = experiments.load("sd_reward")
    config.model.folder = str(micro_folder)
    mesh, counts = partitioning.make_mesh(), []
    for picture in ({}, {"guide": "rahf_ci"}):
        low, _ = compiling.lowered(config, "sample", mesh, 8, picture)
        counts.append(len(jax.tree.leaves(low.args_info)))
    critic = jax.tree.leaves(compiling.aesthetics_of(experiments.load("rahf_ci")).params)
    assert counts[1] - counts[0] == len(critic) + 4  # scale, rate, the guided steps, the prompts' ids


@pytest.fixture
def online_config(micro_folder):
    """(method, {key: value}) -> a config of tiny parts."""

    def make(method, overrides):
        config = experiments.load("sd_online")
        config.update_from_flattened_dict(
            {"method": method, "model.folder": str(micro_folder), "model.remat": False}
            | {"model.dtype": "float32", "rollout.steps": 3, "train.batch_size": 8, "mesh.sharding": "data_parallel"}
            | overrides
        )
        compiling.CHECKS["online"](config)
        return config

    return make


def test_a_rollout_over_8_devices_sends_nothing_but_the_pictures(online_config):
    result = compiling.measure(online_config("ddpo", {}), "cpu", "rollout", jax.devices(), 8)
    assert result["batch_size"] == 8 and result["fits"] and len(result["loops"]) >= 1
    assert result["collectives"] == {"all-gather": {"count": 2, "bytes": 8 * 4 * 4 * 3 + 8}}  # uint8, and finite?


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("method", "overrides", "constants"),
    [
        ("grpo", {"lora.rank": 0, "beta": 0.1}, {"empty", "reference"}),
        ("refl", {}, {"empty", "vae", "reward"}),
        ("draft", {"dense.weight": 0.5}, {"empty", "vae", "reward", "critic"}),
        ("dpo", {"lora.rank": 0}, {"reference"}),
    ],
)
def test_an_online_update_reads_what_its_method_needs(online_config, method, overrides, constants):
    picture = {"guide": "rahf_ci"} if method in ("refl", "draft") else {}
    low, params = compiling.lowered(online_config(method, overrides), "train", partitioning.make_mesh(), 8, picture)
    (state, batch, _, read), _ = low.args_info
    assert set(read) == constants
    assert set(params) == ({"unet"} if overrides.get("lora.rank") == 0 else {"unet", "lora"})
    assert jax.tree.structure(state["params"]) == jax.tree.structure(params)
    critic = jax.tree.leaves(compiling.aesthetics_of(experiments.load("rahf_ci")).params)
    for name in constants & {"reward", "critic"}:
        assert len(jax.tree.leaves(read[name])) == len(critic)
    assert ("region_0" in batch) == ("critic" in constants)


@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [
        ("rahf_ci", None, ("train", "predict", "evaluate")),
        ("sd_reward", None, ("train", "sample")),
        ("sd_online", "draft", ("train", "sample")),
        ("sd_online", "grpo", ("train", "sample", "rollout")),
    ],
)
def test_a_config_has_steps_of_its_kind(name, method, steps):
    config = experiments.load(name)
    if method:
        config.method = method
    assert compiling.steps_of(config) == steps
    assert set(steps) <= set(compiling.STEPS)


def test_collectives_are_counted_with_the_bytes_of_their_results():
    hlo = """
  %all-reduce.1 = (f32[768]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=1
  %all-gather-start = (f32[4,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%c), dimensions={0}
  %all-gather-done = f32[32,8]{1,0} all-gather-done(%all-gather-start)
  %fusion = f32[9]{0} fusion(%all-reduce.1), calls=%f
  %all-gather.2 = pred[5]{0} all-gather(%d)
"""
    expected = {"all-reduce": {"count": 1, "bytes": 4 * 768 + 2 * 6}, "all-gather": {"count": 2, "bytes": 4 * 256 + 5}}
    assert compiling.collectives(hlo) == expected


def test_scheduler_cycles_are_those_of_the_entry_computation_and_of_a_turn_of_each_loop():
    hlo = """
%body (p: f32[]) -> f32[] {
  ROOT %a = f32[] add(%p, %p), backend_config={"estimated_cycles":"100"}
}

ENTRY %main (p: f32[]) -> f32[] {
  %b = f32[] add(%p, %p), backend_config={"estimated_cycles":"7"}
  %while.1 = (f32[], /*index=1*/f32[]{:T(256)}) while(%b), condition=%condition, body=%body, metadata={op_name="while"}
  ROOT %c = f32[] add(%b, %p), backend_config={"estimated_cycles":"5"}
}
"""
    other = hlo.replace("estimated_cycles", "other")
    assert (compiling.scheduler_cycles(hlo), compiling.loops(hlo)) == (12, [100])
    assert (compiling.scheduler_cycles(other), compiling.loops(other)) == (None, [None])


def test_kernels_without_costs_are_named_and_their_time_is_estimated():
    operands = "f32[2,8,4096,40]{3,2,1,0}, f32[2,8,1024,40]{3,2,1,0}, f32[2,8,1024,40]{3,2,1,0}"
    call = f'custom_call_target="tpu_custom_call", operand_layout_constraints={{{operands}}}, frontend_attributes={{}}'
    hlo = f"""
  %a = f32[2,8,4096,40]{{3,2,1,0:T(8,128)}} custom-call(%q, %k, %v), {call}, \
metadata={{op_name="jit(f)/flash_mha_bwd_dq_block_q_major=512/pallas_call"}}, backend_config={{}}
  %b = f32[9]{{0}} custom-call(%q, %k, %v), {call}, metadata={{op_name="jit(f)/flash_attention/pallas_call"}}, \
backend_config={{"cost_estimate":{{"flops":"7"}}}}
  %c = f32[9]{{0}} custom-call(%q, %k, %v), {call}, metadata={{op_name="jit(f)/other/pallas_call"}}, backend_config={{}}
  %d = bf16[9]{{0}} custom-call(%q), custom_call_target="ConcatBitcast"
  %e = pred[9]{{0}} custom-call(%q), custom_call_target="ZeroCrop"
""".replace("\\\n", "")
    query, key = 2 * 8 * 4096 * 40, 2 * 8 * 1024 * 40
    flops = 3 * 2 * query * 1024
    found = compiling.kernels(hlo)
    assert found == {
        "flash_mha_bwd_dq": {"count": 1, "flops": flops, "bytes": 4 * (2 * query + 2 * key)},
        "other": {"count": 1, "flops": None, "bytes": 4 * (query + 2 * key + 9)},
    }
    chip = compiling.Chip(16, 1e-3, 1e9)  # slow at FLOPs, quick at bytes
    for optimal in (2.5 - 2, 2.5):
        cost = {"optimal_seconds": optimal, "flops": 1e9}
        assert compiling._seconds(cost, hlo, found, chip) == pytest.approx(2.5 + flops / 1e9, rel=1e-6)


def test_batch_shapes_are_those_of_a_batch(tmp_path):
    config = ci_config()
    arguments = sources.image_arguments(config) | sources.text_arguments(config)
    vocabulary = sources.install_vocabulary(config, tmp_path)
    batch = next(stream.batches(4, seed=0, vocabulary=vocabulary, workers=0, **arguments))
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == sources.batch_shapes(config, 4)


@pytest.mark.parametrize("topology", ["v99:8x8", "gpu"])
def test_an_unknown_topology_is_refused(topology):
    with pytest.raises(ValueError, match=f"topology: got '{topology}'"):
        compiling.devices_of(topology)


def test_the_quickest_that_fits_is_recommended():
    def result(seconds, gib, fits):
        return {"estimated_step_s": seconds, "hbm_gib_per_core": gib, "fits": fits}

    slow, quick, too_big = result(0.2, 3, True), result(0.1, 9, True), result(0.05, 20, False)
    assert compiling.recommended([slow, quick, too_big]) is quick
    assert compiling.recommended([too_big]) is None
