import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rahf import partitioning
from rahf.models import cpu, layers


def convolution(x, kernel):
    return layers.convolution(x, kernel, 1, ((1, 1), (1, 1)))


def doubled(x, kernel):
    return convolution(layers.upsample(x), kernel)


@pytest.mark.parametrize(
    "ours, plain",
    [(cpu.patches, convolution), (cpu.winograd, convolution), (layers.upsampled_convolution, doubled)],
    ids=["patches", "winograd", "upsampled"],
)
def test_outputs_and_gradients_are_those_of_the_convolution(ours, plain):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 4, 32)).astype(np.float32)
    kernel = (rng.standard_normal((3, 3, 32, 16)) / np.sqrt(9 * 32)).astype(np.float32)
    cotangent = rng.standard_normal(plain(x, kernel).shape).astype(np.float32)
    outputs = []
    for function in (ours, plain):
        out, pull_back = jax.vjp(function, x, kernel)
        outputs.append((out, *pull_back(cotangent)))
    for found, wanted in zip(*outputs, strict=True):
        assert np.abs(found - wanted).max() < 2e-6 * np.abs(wanted).max()


def test_the_choice_follows_device_size_and_precision(monkeypatch):
    def choice(side, channels, dtype=jnp.float32):
        shapes = (2, side, side, channels), (3, 3, channels, channels)
        return cpu.convolution_of(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))

    assert choice(8, 1280) is cpu.patches
    assert choice(64, 320) is cpu.winograd
    assert choice(33, 320) is None  # an odd number of pixels
    assert choice(512, 320) is None  # tiles that take too much memory
    assert choice(8, 64) is None
    assert choice(64, 320, jnp.bfloat16) is None
    monkeypatch.setattr(partitioning, "device_kind", lambda: "TPU v3")
    assert choice(8, 1280) is None


@pytest.mark.parametrize("many", [1, 10**6])
def test_a_kernels_gradient_is_that_of_the_convolution(monkeypatch, many):
    monkeypatch.setattr(cpu, "MANY_PIXELS", many)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 12, 10, 8)).astype(np.float32)
    cases = (3, ((1, 1), (1, 1)), 1), (3, ((0, 0), (0, 0)), 1), (2, ((1, 0), (0, 1)), 1), (3, ((1, 1), (0, 1)), 2)
    for size, padding, stride in cases:
        kernel = jnp.zeros((size, size, 8, 4))
        plain, pull_back = jax.vjp(lambda kernel: layers._convolve.fun(x, kernel, stride, padding), kernel)
        cotangent = rng.standard_normal(plain.shape).astype(np.float32)
        (wanted,) = pull_back(cotangent)
        found = cpu.kernel_gradient(jnp.asarray(x), cotangent, (size, size), padding, stride)
        assert np.abs(found - wanted).max() < 2e-6 * np.abs(wanted).max()
        with cpu.in_loop():
            _, pull_back = jax.vjp(lambda kernel: layers.convolution(jnp.asarray(x), kernel, stride, padding), kernel)
        assert np.abs(pull_back(cotangent)[0] - wanted).max() < 2e-6 * np.abs(wanted).max()
    monkeypatch.setattr(partitioning, "device_kind", lambda: "TPU v3")
    assert cpu.kernel_gradient(jnp.asarray(x), cotangent, (size, size), padding) is None
