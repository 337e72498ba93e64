import jax
import pytest
import tiny_runs


@pytest.fixture(scope="module")
def server():
    server = tiny_runs.Server()
    yield server
    server.close()


@pytest.fixture
def small_constants():
    """A program may close over 64 KiB, less than a tiny model's weights; of more jax warns."""
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 2**16)
    yield
    jax.config.update("jax_captured_constants_warn_bytes", before)
