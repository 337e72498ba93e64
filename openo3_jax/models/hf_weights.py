"""Safetensors -> sharded weights, and back. Streams tensor by tensor: the host never holds the model."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import ModelConfig
from openo3_jax.errors import InputError
from openo3_jax.models import hf_mapping, qwen2_5_vl

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 2 * 1024**3
MAX_NAMED = 20  # problems listed in one message

# safetensors' names of the dtypes a checkpoint may hold
DTYPES: Mapping[str, jnp.dtype] = {
    "F32": jnp.dtype(jnp.float32),
    "F16": jnp.dtype(jnp.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
}


class Stored(NamedTuple):
    """One tensor of a directory; `key` is in the hub's spelling, `file_key` as it stands in the file."""

    key: str
    file_key: str
    file: Path
    dtype: jnp.dtype
    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]  # a slice of the tensor; nothing else is read


def read_index(directory: Path) -> list[Stored]:
    """Every tensor of the directory's safetensors files, from their headers alone.

    Raises InputError where there are no weights or a file is missing, cut off or of another dtype.
    """
    return [tensor for file in _weight_files(directory) for tensor in _read_header(file)]


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise InputError(f"{index}: not a safetensors index ({error!r})") from error
        files = [directory / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise InputError(f"{directory}: {INDEX} names {', '.join(missing)}, which is not there; download it again")
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    raise InputError(f"{directory}: no weights; expected {SINGLE} or {INDEX}")


def _read_header(file: Path) -> Iterator[Stored]:
    try:
        stream = safetensors.safe_open(file, framework="np")
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: not a safetensors file, or cut off ({error}); copy or download it again") from error
    for key in stream.keys():  # noqa: SIM118 (not a mapping)
        tensor = stream.get_slice(key)
        if tensor.get_dtype() not in DTYPES:
            raise InputError(f"{file}: {key} has dtype {tensor.get_dtype()}; expected one of {', '.join(DTYPES)}")
        dtype, shape = DTYPES[tensor.get_dtype()], tuple(tensor.get_shape())
        yield Stored(hf_mapping.hub_key(key), key, file, dtype, shape, tensor.__getitem__)


def check(stored: list[Stored], config: ModelConfig, abstract: nnx.State, where: Path) -> dict[str, Stored]:
    """Hold the directory against the table. Raises one InputError that lists every problem."""
    expected = {
        key: hf_mapping.hf_shape(entry, _layer_shape(entry, abstract), config)
        for entry in hf_mapping.table(config)
        for key in hf_mapping.keys(entry, config)
    }
    found: dict[str, Stored] = {}
    problems = []
    for tensor in stored:
        if tensor.key in found:
            problems.append(f"doubled {tensor.file_key} ({found[tensor.key].file.name}, {tensor.file.name})")
            continue
        found[tensor.key] = tensor
        want = expected.get(tensor.key)
        if want is None and tensor.key == hf_mapping.HEAD_KEY:  # some files repeat the tied head
            want = expected[hf_mapping.EMBEDDING_KEY]
        if want is None:
            problems.append(f"unknown {tensor.file_key} {list(tensor.shape)}")
        elif want != tensor.shape:
            problems.append(f"misshapen {tensor.file_key} {list(tensor.shape)}, expected {list(want)}")
    problems += [f"missing {key} {list(shape)}" for key, shape in expected.items() if key not in found]
    if problems:
        listed = "; ".join(problems[:MAX_NAMED]) + ("; ..." if len(problems) > MAX_NAMED else "")
        raise InputError(
            f"{where}: weights do not fit config.json, {len(problems)} problem(s): {listed}; use the directory's own "
            "config.json and complete files"
        )
    return found


def _variable(params: nnx.State, path: tuple[str, ...]) -> nnx.Variable:
    for name in path:
        params = params[name]
    return params


def _layer_shape(entry: hf_mapping.Entry, params: nnx.State) -> tuple[int, ...]:
    shape = _variable(params, entry.path).get_raw_value().shape
    return shape[1:] if entry.is_stacked else shape


def load(
    directory: Path, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype
) -> tuple[nnx.GraphDef, nnx.State, dict[str, jnp.dtype]]:
    """Weights of an HF directory, cast to `dtype` and placed on the mesh; also the stored dtype of every key.

    Each device receives its own slice of each tensor; a stacked weight is filled layer by layer in place, so beyond
    the arrays themselves the host holds a tensor or two.
    """
    graphdef, abstract = qwen2_5_vl.abstract_params(config, mesh)
    found = check(read_index(directory), config, abstract, directory)
    shardings = mesh_lib.state_shardings(abstract, mesh)
    _check_tied_head(found, config)
    params = abstract
    for entry in hf_mapping.table(config):
        place = _variable(shardings, entry.path).get_raw_value()
        variable = _variable(params, entry.path)
        tensors = [found[key] for key in hf_mapping.keys(entry, config)]
        _set(params, entry.path, variable.replace(_load_entry(entry, tensors, variable, place, dtype)))
    return graphdef, params, {key: tensor.dtype for key, tensor in found.items()}


def _set(params: nnx.State, path: tuple[str, ...], variable: nnx.Variable) -> None:
    for name in path[:-1]:
        params = params[name]
    params[path[-1]] = variable


def _check_tied_head(found: Mapping[str, Stored], config: ModelConfig) -> None:
    head = found.get(hf_mapping.HEAD_KEY)
    if head is None or not config.text.tie_word_embeddings:
        return
    if not np.array_equal(head.read((slice(None),)), found[hf_mapping.EMBEDDING_KEY].read((slice(None),))):
        raise InputError(
            f"{head.file}: {head.file_key} differs from the embedding although config.json ties them; "
            'set "tie_word_embeddings": false or drop the tensor'
        )


def _load_entry(
    entry: hf_mapping.Entry, tensors: Sequence[Stored], variable: nnx.Variable, place: NamedSharding, dtype: jnp.dtype
) -> jax.Array:
    """The tensors of one row of the table, converted and put where `place` wants them."""
    logical = tuple(name for name in variable.get_metadata()["out_sharding"] if name != "layers")
    hf_place = mesh_lib.sharding(place.mesh, *hf_mapping.hf_axes(entry, logical))

    def read(tensor: Stored) -> jax.Array:
        return jax.make_array_from_callback(tensor.shape, hf_place, tensor.read)

    def convert(x: jax.Array) -> jax.Array:
        return hf_mapping.from_hf(entry, x).astype(dtype)

    if not entry.is_stacked:
        return jax.jit(convert, out_shardings=place)(read(tensors[0]))
    put = jax.jit(lambda stacked, x, i: stacked.at[i].set(convert(x)), out_shardings=place, donate_argnums=0)
    stacked = jax.jit(partial(jnp.zeros, variable.get_raw_value().shape, dtype), out_shardings=place)()
    for i, tensor in enumerate(tensors):
        stacked = jax.block_until_ready(put(stacked, read(tensor), i))  # one layer in flight, not all of them
    return stacked


def save(
    params: nnx.State,
    config: ModelConfig,
    dtypes: Mapping[str, jnp.dtype],
    out: Path,
    *,
    max_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the weights in the hub's spelling, in files of at most `max_bytes`, each tensor in `dtypes[key]`."""
    sources = {
        key: (entry, i) for entry in hf_mapping.table(config) for i, key in enumerate(hf_mapping.keys(entry, config))
    }
    if hf_mapping.HEAD_KEY in dtypes and config.text.tie_word_embeddings:
        sources[hf_mapping.HEAD_KEY] = sources[hf_mapping.EMBEDDING_KEY]

    @partial(jax.jit, static_argnums=(1, 3))
    def fetch(weight, entry, i, dtype):
        layer = weight[i] if entry.is_stacked else weight
        return hf_mapping.to_hf(entry, layer, config).astype(dtype)

    shapes = {
        key: hf_mapping.hf_shape(entry, _layer_shape(entry, params), config) for key, (entry, _) in sources.items()
    }
    shards = _split(sorted(sources), shapes, dtypes, max_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, keys in zip(names, shards, strict=True):
        tensors = {}
        for key in keys:
            entry, i = sources[key]
            weight = _variable(params, entry.path).get_raw_value()
            tensors[key] = np.asarray(fetch(weight, entry, i, dtypes[key]))
        safetensors.numpy.save_file(tensors, out / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(_num_bytes(shapes[key], dtypes[key]) for key in sources)
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _num_bytes(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def _split(keys, shapes, dtypes, max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_bytes
    for key in keys:
        size = _num_bytes(shapes[key], dtypes[key])
        if shards[-1] and size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(key)
        room -= size
    return shards
