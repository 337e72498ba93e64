"""What one process cannot do ends all of them, with its words; told here by a second one that is made up."""

import pytest

from openo3_jax import hosts, tiny
from openo3_jax.errors import InputError
from openo3_jax.models import hf_weights
from openo3_jax.policy import load_pretrained


@pytest.fixture(scope="module")
def policy(tmp_path_factory, one_device):
    directory = tmp_path_factory.mktemp("together") / "model"
    tiny.init_tiny(directory, hidden_size=64, layers=1)
    return load_pretrained(directory, mesh=one_device)


@pytest.fixture
def said(monkeypatch):
    """What this process, the first one, tells the others."""
    said = []
    monkeypatch.setattr(hosts, "gather", lambda value: said.append(value) or [value, {"told": None}])
    return said


@pytest.fixture
def as_second(monkeypatch):
    """The first process fails wherever they tell each other something."""
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(hosts, "gather", lambda value: [{"error": "no room"}, value])


def test_a_file_that_cannot_be_read_is_told(said, tmp_path):
    with pytest.raises(FileNotFoundError):
        hosts.together(lambda: (tmp_path / "none").read_text())
    assert said == [{"error": f"[Errno 2] No such file or directory: '{tmp_path / 'none'}'"}]


def test_words_of_another_process(as_second):
    with pytest.raises(InputError, match="process 0: no room"):
        hosts.together(lambda: 1)


def test_who_disagrees_with_the_first_is_named():
    hosts.agree(["a", "a"], "plan", "look")
    with pytest.raises(InputError, match="plan: b in process 2, a in process 0; look"):
        hosts.agree(["a", "a", "b"], "plan", "look")


def test_a_place_that_is_taken_is_told(policy, said, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists and is not an empty directory"):
        policy.save_pretrained(tmp_path)
    assert [list(value) for value in said] == [["error"]]


def test_who_lends_weights_does_not_wait_for_the_one_that_writes(policy, as_second, tmp_path):
    with pytest.raises(InputError, match="process 0: no room"):
        policy.save_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match="process 0: no room"):
        hf_weights.save(policy.params, policy.config, policy.dtypes, None)


def test_a_directory_has_its_name_when_it_is_told(policy, said, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(hosts, "gather", lambda value: seen.append((tmp_path / "out").exists()) or [value])
    policy.save_pretrained(tmp_path / "out")
    assert seen == [False, False, True]


def test_weights_that_cannot_be_written(policy, said, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise hf_weights.safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hf_weights.safetensors.numpy, "save_file", refuse)
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be written: .*No space left.*; make room"):
        policy.save_pretrained(tmp_path / "out")
    assert "cannot be written" in said[-1]["error"] and not list(tmp_path.iterdir())
