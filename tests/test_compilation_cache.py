"""The command line keeps compiled programs in the user's cache folder, and does without it where it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from openo3_jax import cli
cli.main(["no-such-verb"])  # prepares the libraries as every verb does
import jax, jax.numpy as jnp
from jax import monitoring
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # it is quick to compile
found = []
monitoring.register_event_listener(lambda event, **_: found.append(event.rpartition("/")[2]))
print(int(jax.jit(lambda x: (x @ x).sum())(jnp.full((3, 3), 2))), "cache_hits" in found, "cache_misses" in found)
"""


def compile_one(cache: Path, **environment: str) -> str:
    """What a fresh interpreter says: the program's result, whether a program was found, whether one was missing."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    given |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache), **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=given, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_second_start_finds_what_the_first_one_compiled_and_a_broken_entry_is_compiled_again(tmp_path):
    assert compile_one(tmp_path) == "108 False True"
    assert compile_one(tmp_path) == "108 True False"
    for entry in (tmp_path / "openo3_jax" / "compiled").iterdir():
        entry.write_bytes(entry.read_bytes()[:20])
    assert compile_one(tmp_path).startswith("108 False")


@pytest.mark.parametrize("environment", [{"JAX_ENABLE_COMPILATION_CACHE": "false"}, {"JAX_COMPILATION_CACHE_DIR": ""}])
def test_it_can_be_turned_off(tmp_path, environment):
    assert compile_one(tmp_path, **environment) == "108 False False"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_nothing_but_time(tmp_path):
    (tmp_path / "file").write_text("not a folder")  # a read-only home, for a root user too
    assert compile_one(tmp_path / "file").startswith("108 False")
