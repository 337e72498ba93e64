"""Tests are stricter than production: eight CPU devices, highest matmul precision, shapes checked at run time."""

import os

import compile_flags

os.environ.update(compile_flags.settings(devices=8) | dict(os.environ))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
# The same program is compiled once, however many tests and runs of the suite ask for it.
jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.dirname(__file__), "..", ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


TRAINS = ("test_tiny.py", "test_base.py")  # for so many steps that optimizing pays
LONG = ("test_hosts.py", "test_kill.py", "test_lora.py", "test_meshes.py", "test_gspo_run.py", "test_tiny.py")


def pytest_collection_modifyitems(items):
    """Files that take minutes first, so that processes side by side end at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def one_device():
    from openo3_jax import mesh

    return mesh.make_mesh({}, devices=jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def optimized(request):
    """Files that train compile as users do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before and request.path.name not in TRAINS)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def strict_dtypes():
    """Implicit dtype promotion is an error (in our code; optax's own arithmetic promotes)."""
    with jax.numpy_dtype_promotion("strict"):
        yield
