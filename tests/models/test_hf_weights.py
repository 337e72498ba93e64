"""Safetensors in and out: bytes survive, every problem is named at once, the host never holds the model."""

import collections
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.errors import InputError
from openo3_jax.models import hf_mapping, hf_weights, qwen2_5_vl

UNTIED, TIED = small.model_config(), small.model_config(tied=True)
AWKWARD = [-0.0, np.inf, -np.inf, 1e-45, 2.0**-133, 3.3895314e38]  # signs, infinities, subnormals, the largest bf16


def hf_tensors(config, dtype, *, seed=0):
    """Random tensors under the hub's keys, awkward values in each."""
    draw = np.random.default_rng(seed)
    _, abstract = qwen2_5_vl.abstract_params(config, mesh_lib.make_mesh({}, devices=jax.devices()[:1]))
    tensors = {}
    for entry in hf_mapping.table(config):
        leaf = abstract
        for name in entry.path:
            leaf = leaf[name]
        shape = leaf.get_raw_value().shape[1:] if entry.is_stacked else leaf.get_raw_value().shape
        for key in hf_mapping.keys(entry, config):
            values = draw.normal(size=hf_mapping.hf_shape(entry, shape, config)).astype(np.float32)
            values.flat[: len(AWKWARD)] = AWKWARD
            tensors[key] = values.astype(dtype)
    return tensors


def in_memory_spelling(key):
    """The key as transformers 5 has it in memory."""
    if key.startswith("visual."):
        return f"model.{key}"
    return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key


def write(directory, tensors, *, files=1):
    """Spread the tensors over `files` files, in no particular order, with an index if there are several."""
    if files == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return
    names = [f"part-{i}.safetensors" for i in range(files)]
    for i, name in enumerate(names):
        safetensors.numpy.save_file(dict(list(tensors.items())[i::files]), directory / name)
    weight_map = {key: names[i % files] for i, key in enumerate(tensors)}
    (directory / hf_weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_file(file):
    with safetensors.safe_open(file, framework="np") as stream:
        return {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (not a mapping)


def read(directory):
    tensors = {}
    for file in directory.glob("*.safetensors"):
        assert not tensors.keys() & read_file(file).keys()
        tensors |= read_file(file)
    return tensors


def assert_same_bytes(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for key, expected in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (expected.dtype, expected.shape), key
        assert ours[key].tobytes() == expected.tobytes(), key


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("config", "stored", "loaded", "files", "spelling", "mesh"),
    [
        (UNTIED, jnp.bfloat16, jnp.float32, 1, str, {}),
        (TIED, jnp.bfloat16, jnp.bfloat16, 3, in_memory_spelling, {}),
        (UNTIED, np.float32, jnp.float32, 4, in_memory_spelling, {"fsdp": 4, "tensor": 2}),
    ],
)
def test_a_round_trip_keeps_every_bit(source, tmp_path, config, stored, loaded, files, spelling, mesh):
    """What comes out has the hub's keys and the stored dtype, whatever spelling, files and mesh it came through.

    A tied head that is stored although it need not be is written again.
    """
    tensors = hf_tensors(config, stored)
    if config.text.tie_word_embeddings and files > 1:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write(source, {spelling(key): value for key, value in tensors.items()}, files=files)
    devices = mesh_lib.make_mesh(mesh, devices=jax.devices()[: int(np.prod([*mesh.values(), 1]))])
    _, params, dtypes = hf_weights.load(source, config, devices, jnp.dtype(loaded))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(loaded)}
    hf_weights.save(params, config, dtypes, tmp_path, max_bytes=9_000)
    for file in tmp_path.glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in read_file(file).values()]
        assert sum(sizes) <= 9_000 or len(sizes) == 1
    assert_same_bytes(read(tmp_path), tensors)
    index = json.loads((tmp_path / hf_weights.INDEX).read_text())
    assert sorted(index["weight_map"]) == sorted(tensors)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())


def test_a_tied_head_that_differs_is_refused(source, one_device):
    tensors = hf_tensors(TIED, np.float32)
    write(source, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + np.float32(1)})
    with pytest.raises(InputError, match=r"lm_head\.weight differs from the embedding although config\.json ties"):
        hf_weights.load(source, TIED, one_device, jnp.dtype(jnp.float32))


# ---- what does not fit ----


def load_f32(source, mesh):
    return hf_weights.load(source, UNTIED, mesh, jnp.dtype(jnp.float32))


def test_one_error_lists_every_problem(source, one_device):
    tensors = hf_tensors(UNTIED, np.float32)
    del tensors["model.norm.weight"], tensors["visual.blocks.1.attn.qkv.bias"]
    tensors["visual.extra.weight"] = np.zeros((2, 3), np.float32)
    tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((40, 31), np.float32)
    write(source, tensors, files=2)
    doubled = {"model.language_model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}
    safetensors.numpy.save_file(doubled, source / "twice.safetensors")
    index = json.loads((source / hf_weights.INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(doubled, "twice.safetensors")
    (source / hf_weights.INDEX).write_text(json.dumps(index))

    with pytest.raises(InputError) as caught:
        load_f32(source, one_device)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        f"{source}: weights do not fit config.json, 5 problem(s)",
        "missing model.norm.weight [32]",
        "missing visual.blocks.1.attn.qkv.bias [48]",
        "unknown visual.extra.weight [2, 3]",
        "misshapen model.layers.0.mlp.gate_proj.weight [40, 31], expected [40, 32]",
        "doubled model.language_model.embed_tokens.weight",
        "twice.safetensors",
    ):
        assert part in message, part


def test_a_long_list_of_problems_is_cut(source, one_device):
    write(source, {f"junk.{i}": np.zeros(1, np.float32) for i in range(30)})
    with pytest.raises(InputError, match=r"problem\(s\): .*; \.\.\.; use the directory's own"):
        load_f32(source, one_device)


def cut_in_half(source):
    write(source, hf_tensors(UNTIED, np.float32))
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_safetensors(source):
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")


def file_missing(source):
    write(source, hf_tensors(UNTIED, np.float32), files=3)
    (source / "part-1.safetensors").unlink()


def broken_index(source):
    (source / hf_weights.INDEX).write_text('{"weight_map": ')


def index_without_map(source):
    (source / hf_weights.INDEX).write_text("[]")


def whole_numbers(source):
    write(source, hf_tensors(UNTIED, np.float32) | {"model.norm.weight": np.zeros(32, np.int64)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda source: None, "no weights; expected model.safetensors or model.safetensors.index.json"),
        (cut_in_half, "model.safetensors: not a safetensors file, or cut off"),
        (no_safetensors, "model.safetensors: not a safetensors file, or cut off"),
        (file_missing, "names part-1.safetensors, which is not there"),
        (broken_index, "not a safetensors index"),
        (index_without_map, "not a safetensors index"),
        (whole_numbers, "model.norm.weight has dtype I64; expected one of F32, F16, BF16"),
    ],
)
def test_unusable_files_are_named(source, one_device, spoil, message):
    spoil(source)
    with pytest.raises(InputError) as caught:
        load_f32(source, one_device)
    assert message in str(caught.value) and str(source) in str(caught.value) and "\n" not in str(caught.value)


# ---- the table ----


@pytest.mark.parametrize("config", [UNTIED, TIED])
def test_every_weight_has_one_row(config, one_device):
    _, abstract = qwen2_5_vl.abstract_params(config, one_device)
    paths = ["/".join(map(str, path)) for path in nnx.to_flat_state(abstract).paths]
    assert sorted("/".join(entry.path) for entry in hf_mapping.table(config)) == sorted(paths)
    keys = collections.Counter(key for entry in hf_mapping.table(config) for key in hf_mapping.keys(entry, config))
    assert set(keys.values()) == {1}
    assert ("lm_head.weight" in keys) is (not config.text.tie_word_embeddings)


# ---- memory ----

MEASURE = """
import json, sys, threading
from pathlib import Path
import jax, jax.numpy as jnp
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import ModelConfig
from openo3_jax.models import hf_weights

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def load(directory):
    config = ModelConfig.from_hf(json.loads(Path(directory, "config.json").read_text()))
    return hf_weights.load(Path(directory), config, mesh, jnp.dtype(dtype))[1]

_, dtype, small_directory, large_directory = sys.argv
mesh = mesh_lib.make_mesh()
load(small_directory)  # code, compiler and thread pools are not the model's
seen, done = [anonymous_bytes()], threading.Event()

def watch():
    while not done.wait(0.002):
        seen.append(anonymous_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
params = load(large_directory)
jax.block_until_ready(params)
done.set()
watcher.join()
loaded = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"beyond": max(seen) - seen[0] - loaded, "loaded": loaded, "samples": len(seen)}))
"""


def write_model(directory, config, dtype, max_bytes, mesh):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    _, params = small.make_params(config, mesh)
    keys = [key for entry in hf_mapping.table(config) for key in hf_mapping.keys(entry, config)]
    hf_weights.save(params, config, dict.fromkeys(keys, jnp.dtype(dtype)), directory, max_bytes=max_bytes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_less_than_a_shard_beyond_the_arrays(tmp_path, one_device, dtype):
    """A model of about 200 MB in at least four files, read in a process of its own."""
    wide = small.model_config(
        hidden_size=512, intermediate_size=4096, num_hidden_layers=7, num_attention_heads=8, mrope_section=(16, 8, 8)
    )
    write_model(tmp_path / "small", UNTIED, dtype, 10**9, one_device)
    write_model(tmp_path / "wide", wide, dtype, 48 * 2**20 // (1 if dtype == "float32" else 2), one_device)
    shards = [file.stat().st_size for file in (tmp_path / "wide").glob("*.safetensors")]
    assert len(shards) >= 4
    command = [sys.executable, "-c", MEASURE, dtype, str(tmp_path / "small"), str(tmp_path / "wide")]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    measured = json.loads(done.stdout)
    assert measured["samples"] > 20
    assert measured["beyond"] < 1.2 * max(shards), measured
