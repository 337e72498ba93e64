"""A rendered data root and a model directory without weights, for the tests of what reads them."""

import json

import pytest

from openo3_jax import tiny
from openo3_jax.data import synthetic, tiny_tokenizer, tokens

NUM = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    synthetic.write_dataset(root, num_train=NUM, seed=1)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with all that a processor needs, without weights."""
    directory = tmp_path_factory.mktemp("model")
    ids = tiny_tokenizer.write_tokenizer(directory)
    config = tiny.tiny_config(ids, hidden_size=64, layers=2)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    return directory


@pytest.fixture(scope="module")
def processor(model):
    return tokens.load_processor(model)
