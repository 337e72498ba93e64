import pytest
import tiny_runs


@pytest.fixture(scope="module")
def server():
    server = tiny_runs.Server()
    yield server
    server.close()
