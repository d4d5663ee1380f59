import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import attention as benchmark
from rahf import partitioning
from rahf.models import attention
from rahf.models.attention import attention as attend
from richhf_data.errors import UserError

pytestmark = pytest.mark.usefixtures("small_blocks")
SHAPES = {  # queries, keys: one block, several, and padded ones
    "one block": (4, 6),
    "several": (12, 18),
    "padded": (9, 13),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 4)
    monkeypatch.setattr(attention, "KEYS", 6)


def inputs(queries, keys, dtype=jnp.float32, images=2, heads=4):
    """query, key, value, bias, mask and a cotangent. The first image has no key at all."""
    rng = np.random.default_rng(0)
    shapes = [(images, n, heads, 8) for n in (queries, keys, keys)]
    query, key, value = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    bias = rng.standard_normal((1, heads, queries, keys)).astype(np.float32)
    mask = rng.random((images, keys)) < 0.7
    mask[0] = False
    cotangent = rng.standard_normal(query.shape).astype(np.float32)
    return *(jnp.asarray(x, dtype) for x in (query, key, value)), bias, mask, jnp.asarray(cotangent, dtype)


def outputs(implementation, query, key, value, bias, mask, cotangent, causal=False):
    """The output and the gradients of all float inputs."""

    def call(*arrays):
        return attend(*arrays[:3], bias=arrays[3], mask=mask, causal=causal, implementation=implementation)

    out, pull_back = jax.vjp(call, query, key, value, bias)
    return [np.asarray(x, np.float32) for x in (out, *pull_back(cotangent)) if x is not None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_blocks_equal_the_whole_matrix(shape, with_bias, with_mask, causal):
    query, key, value, bias, mask, cotangent = inputs(*SHAPES[shape])
    arguments = query, key, value, bias if with_bias else None, mask if with_mask else None, cotangent, causal
    for ours, plain in zip(outputs("blockwise", *arguments), outputs("plain", *arguments), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_blocks_in_bfloat16_are_within_its_rounding():
    arguments = inputs(12, 18, jnp.bfloat16)
    exact = inputs(12, 18)
    exact = [x.astype(jnp.float32) for x in arguments[:3]] + [*exact[3:5], arguments[5].astype(jnp.float32)]
    reference = outputs("plain", *exact)
    for blocks, plain, wanted in zip(outputs("blockwise", *arguments), outputs("plain", *arguments), reference, strict=True):
        rounding = 2**-8 * np.abs(wanted).max()
        assert np.abs(blocks - wanted).max() < max(2 * np.abs(plain - wanted).max(), rounding)


@pytest.mark.parametrize("everything", [False, True], ids=["", "bias, mask, causal, padding"])
def test_the_kernel_for_tpus_equals_the_whole_matrix(everything):
    query, key, value, bias, mask, cotangent = inputs(*((140, 150) if everything else (128, 256)), images=1, heads=1)
    mask[0, :140] = np.arange(140) % 3 < 2
    arguments = query, key, value, bias if everything else None, mask if everything else None, cotangent, everything
    with pltpu.force_tpu_interpret_mode():
        found = outputs("pallas", *arguments)
    for ours, plain in zip(found, outputs("plain", *arguments), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("everything", [False, True], ids=["", "bias, mask, causal"])
def test_the_form_for_gpus_equals_the_whole_matrix(monkeypatch, shape, everything):
    dtype, own = jnp.bfloat16, jax.nn.dot_product_attention
    if jax.default_backend() != "gpu":  # JAX's other form takes the same arguments
        dtype = jnp.float32
        monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, implementation, **options: own(*args, **options))
    query, key, value, bias, mask, cotangent = inputs(*SHAPES[shape], dtype)
    mask[:, 0] = True
    arguments = query, key, value, bias if everything else None, mask if everything else None, cotangent, everything
    limit = 1e-5 if dtype == jnp.float32 else 2**-6
    for ours, plain in zip(outputs("cudnn", *arguments), outputs("plain", *arguments), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=limit, atol=limit * np.abs(plain).max())


def test_the_plain_form_is_jax_own_attention():
    query, key, value, bias, _, _ = inputs(9, 13)
    mask = jnp.array([[True] * 13, [True] * 5 + [False] * 8])
    ours = attend(query, key, value, bias=bias, mask=mask, implementation="plain")
    wanted = jax.nn.dot_product_attention(query, key, value, bias, mask[:, None, None], scale=1.0)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_no_block_holds_the_matrix():
    query = jnp.zeros((1, 48, 1, 8))
    text = jax.jit(functools.partial(attend, implementation="blockwise")).lower(query, query, query).as_text()
    assert "48x48" not in text and "4x6" in text
    gradient = jax.grad(lambda q: attend(q, q, q, implementation="blockwise").sum())
    assert "48x48" not in jax.jit(gradient).lower(query).as_text()


@pytest.mark.parametrize("model", [1, 2])
def test_devices_compute_their_own_rows_and_heads(model):
    mesh = partitioning.make_mesh(model=model, shard_group=2)
    arguments = inputs(9, 13, images=8)
    mask = arguments[4]
    rows = partitioning.batch_sharding(mesh)
    query, key, value, cotangent = (jax.device_put(arguments[i], rows) for i in (0, 1, 2, 5))

    def call(query, key, value, bias, cotangent):
        how = {"mask": mask, "implementation": "blockwise"}
        out, pull_back = jax.vjp(lambda q, k, v, b: attend(q, k, v, bias=b, **how), query, key, value, bias)
        return out, *pull_back(cotangent)

    function = partitioning.MeshFunction(call, mesh)
    found = function(query, key, value, arguments[3], cotangent)
    compiled = function.lower(query, key, value, arguments[3], cotangent).compile().as_text()
    assert "all-gather" not in compiled
    for ours, wanted in zip(found, outputs("plain", *arguments), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_the_choice_follows_device_and_size(monkeypatch):
    def choice(kind, length, dtype, width=64, keys=None, capability=9.0, **options):
        monkeypatch.setattr(partitioning, "device_kind", lambda: kind)
        monkeypatch.setattr(attention, "_capability", lambda: capability)
        shapes = [(2, n, 8, width) for n in (length, keys or length)]
        return attention.choose(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), **options)

    assert choice("cpu", 260, jnp.float32) == "plain"
    assert choice("cpu", 4096, jnp.float32) == "blockwise"
    assert choice("cpu", 4096, jnp.float32, keys=77) == "plain"
    assert choice("NVIDIA H100 80GB HBM3", 260, jnp.bfloat16) == "cudnn"
    assert choice("NVIDIA H100 80GB HBM3", 260, jnp.float32) == "plain"
    assert choice("NVIDIA H100 80GB HBM3", 260, jnp.bfloat16, with_bias=True) == "plain"
    assert choice("NVIDIA GeForce RTX 2080 Ti", 4096, jnp.bfloat16, capability=7.5) == "blockwise"
    assert choice("NVIDIA H100 80GB HBM3", 4096, jnp.bfloat16, width=512) == "blockwise"
    assert choice("TPU v3", 260, jnp.bfloat16) == "plain"
    assert choice("TPU v3", 4096, jnp.bfloat16) == "pallas"
    assert choice("TPU v2", 4096, jnp.bfloat16) == "blockwise"
    assert choice("TPU v5 lite", 4096, jnp.bfloat16, with_bias=True) == "blockwise"
    assert choice("TPU v5 lite", 260, jnp.bfloat16, forced="pallas") == "pallas"
    assert choice("NVIDIA H100 80GB HBM3", 4096, jnp.bfloat16, width=512, forced="cudnn") == "blockwise"
    assert choice("cpu", 4096, jnp.float32, forced="plain") == "plain"
    with pytest.raises(UserError, match="attention: got 'cudnn' on cpu"):
        choice("cpu", 4096, jnp.float32, forced="cudnn")


def test_a_config_forces_a_form():
    mesh, x = partitioning.make_mesh(), jnp.zeros((8, 48, 2, 8))

    def text(attention):
        return partitioning.MeshFunction(lambda x: attend(x, x, x), mesh, attention=attention).lower(x).as_text()

    assert "while" in text("blockwise")
    assert "while" not in text("plain") and text("plain") == text("auto")


def test_the_benchmark_compares_each_form():
    rows = benchmark.of_size((1, 9, 13, 2, 8, True), None, 1)
    assert [row["form"] for row in rows][:2] == ["plain", "blockwise"]
    assert float(rows[1]["output"]) < 1e-5 and float(rows[1]["gradients"]) < 1e-5
