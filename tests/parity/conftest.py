"""One random model directory per shape, shared by the whole ladder."""

import pytest
import transformers

from openo3_jax import policy as policy_lib
from parity import hf

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Pair:
    """The same directory read by both sides."""

    def __init__(self, shape: str, directory, mesh):
        self.shape = shape
        self.directory = directory
        self.theirs = hf.write_directory(shape, directory)
        self.processor = hf.load_processor(directory)
        self.ours = policy_lib.load_pretrained(directory, mesh=mesh)


@pytest.fixture(scope="session", params=list(hf.SHAPES))
def pair(request, tmp_path_factory, one_device):
    return Pair(request.param, tmp_path_factory.mktemp("pair"), one_device)
