"""`import openo3_jax` and the command line's help must not wait for jax, transformers or a video decoder."""

import subprocess
import sys

import pytest

import openo3_jax

HEAVY = ("jax", "flax", "transformers", "decord", "av", "grain", "orbax", "matplotlib")
STATEMENTS = {
    "package": "import openo3_jax",
    "version": "import openo3_jax; assert openo3_jax.__version__",
    "names": "import openo3_jax; assert 'load_pretrained' in dir(openo3_jax)",
    "command line": "import openo3_jax.cli",
    "help": "import openo3_jax.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit as end: assert end.code == 0",
    "help of a verb": (
        "import openo3_jax.cli as cli\n"
        "try: cli.main(['sft', 'sft_7b', '--help'])\n"
        "except SystemExit as end: assert end.code == 0"
    ),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_nothing_heavy_is_imported(name):
    code = f"{STATEMENTS[name]}\nimport sys\nsys.stderr.write(','.join(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_decode_worker_does_not_import_jax():
    code = "import openo3_jax.data.decode_worker, sys\nprint([m for m in ('jax', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", openo3_jax.__all__)
def test_every_name_of_the_facade_exists(name):
    assert callable(getattr(openo3_jax, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_pretraind'"):
        openo3_jax.load_pretraind  # noqa: B018
