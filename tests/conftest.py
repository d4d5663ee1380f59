"""Eight virtual CPU devices, strict promotion, no accelerator, no network."""

import atexit
import os
import shutil
import tempfile

import quick_xla

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", quick_xla.FLAGS]
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["HF_HUB_OFFLINE"] = "1"

# Tests, their workers and the processes that they start compile the same program once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rahf_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import functools
import gc
import pathlib
import zipfile

import jax
import pytest

gc.set_threshold(100_000, 50, 100)  # tracing makes many objects that stay

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


LONG = ("test_hosts.py", "test_train.py", "test_diffusion_train.py", "test_gcs.py", "test_builder.py")


def pytest_collection_modifyitems(items):
    """The longest files come first, so that the workers end together."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of committed test data."""
    return pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def unpacked(data_dir, tmp_path_factory):
    """name -> folder with the unpacked files of data/<name>.zip."""

    @functools.cache
    def unpack(name) -> pathlib.Path:
        folder = tmp_path_factory.mktemp(name)
        with zipfile.ZipFile(data_dir / f"{name}.zip") as archive:
            archive.extractall(folder)
        return folder

    return unpack


@pytest.fixture(scope="session")
def micro_folder(unpacked, tmp_path_factory) -> pathlib.Path:
    """The folder of the smallest diffusion model, `tiny_diffusion.write_micro`."""
    import tiny_diffusion

    return tiny_diffusion.write_micro(tmp_path_factory.mktemp("micro") / "model", unpacked("diffusion_tiny") / "first")


@pytest.fixture(scope="session")
def micro(micro_folder):
    """That model."""
    from rahf.diffusion import folder

    return folder.read(micro_folder)


@pytest.fixture(scope="module")
def standard_promotion():
    """For tests that also run code of other libraries, such as optax, which promotes types and ranks."""
    jax.config.update("jax_numpy_rank_promotion", "allow")
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def torch():
    """PyTorch, seeded; the test is skipped where it is not installed (extra `parity`)."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch
