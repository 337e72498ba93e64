"""Safetensors -> sharded weights, and back. Streams tensor by tensor: the host never holds the model.

Files are mapped into memory, so that a matrix is transposed on its way from the page cache into its device's buffer.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
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

from openo3_jax import hosts
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import ModelConfig
from openo3_jax.errors import InputError
from openo3_jax.models import hf_mapping, lora, qwen2_5_vl

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 2 * 1024**3
MAX_NAMED = 20  # problems listed in one message
ALIGNMENT = 64  # bytes, of a buffer that a CPU device takes over
STRIP = 128  # rows of a matrix that are transposed at a time
MAX_THREADS = 8  # that copy the layers of a stacked weight side by side

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
    read: Callable[[tuple[slice, ...]], np.ndarray]  # a slice, in the memory of the file: nothing is copied


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
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
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
        safetensors.safe_open(file, framework="np")  # checks the header against the file
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: not a safetensors file, or cut off ({error}); copy or download it again") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(file, np.uint8, "r")[8 + length :]
    for key, about in header.items():
        if about["dtype"] not in DTYPES:
            raise InputError(f"{file}: {key} has dtype {about['dtype']}; expected one of {', '.join(DTYPES)}")
        dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
        values = np.asarray(data[slice(*about["data_offsets"])]).view(dtype).reshape(shape)
        yield Stored(hf_mapping.hub_key(key), key, file, dtype, shape, values.__getitem__)


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

    Each device receives its own slice of each tensor, the layers of a stacked weight side by side. On a CPU device the
    buffer that is filled is the array itself, so beyond the arrays the host holds strips; elsewhere one weight's parts.
    """
    graphdef, abstract = qwen2_5_vl.abstract_params(config, mesh)
    found = check(read_index(directory), config, abstract, directory)
    shardings = mesh_lib.state_shardings(abstract, mesh)
    _check_tied_head(found, config)
    params = abstract
    with futures.ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        for entry in hf_mapping.table(config):
            place = _variable(shardings, entry.path).get_raw_value()
            variable = _variable(params, entry.path)
            tensors = [found[key] for key in hf_mapping.keys(entry, config)]
            value = _load_entry(entry, tensors, variable.get_raw_value().shape, place, dtype, threads)
            _set(params, entry.path, variable.replace(value))
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
    entry: hf_mapping.Entry,
    tensors: Sequence[Stored],
    shape: tuple[int, ...],
    place: NamedSharding,
    dtype: jnp.dtype,
    threads: futures.Executor,
) -> jax.Array:
    """The tensors of one row of the table, converted, each device's part written straight into its buffer."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        part = _aligned_empty(
            tuple(len(range(*at.indices(size))) for at, size in zip(index, shape, strict=True)), dtype
        )
        wanted, layers, inner = (tensors[index[0]], part, index[1:]) if entry.is_stacked else (tensors, [part], index)
        at = hf_mapping.hf_index(entry, inner)

        def copy(tensor: Stored, layer: np.ndarray) -> None:
            _copy(hf_mapping.from_hf(entry, tensor.read(at)), layer)

        for _ in threads.map(copy, wanted, layers):  # raises what a thread raised
            pass
        return part

    return jax.make_array_from_callback(shape, place, read)


def _aligned_empty(shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray:
    """Memory that a CPU device takes over without a copy: it asks for 64 bytes, numpy gives 16."""
    size = _num_bytes(shape, dtype)
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source`, in strips that keep both sides of a transposed matrix in the cache."""
    if source.ndim < 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[1], STRIP):
        strip = slice(start, start + STRIP)
        target[:, strip] = source[:, strip].astype(target.dtype)


def save(
    params: nnx.State,
    config: ModelConfig,
    dtypes: Mapping[str, jnp.dtype],
    out: Path | None,
    *,
    max_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the weights in the hub's spelling, in files of at most `max_bytes`, each tensor in `dtypes[key]`.

    Adapters are added to their weights, one layer at a time. `out` None: lend this process's part of the weights to the
    one that writes. Raises: InputError, in every process, for a file that cannot be written.
    """
    sources = {
        key: (entry, i) for entry in hf_mapping.table(config) for i, key in enumerate(hf_mapping.keys(entry, config))
    }
    if hf_mapping.HEAD_KEY in dtypes and config.text.tie_word_embeddings:
        sources[hf_mapping.HEAD_KEY] = sources[hf_mapping.EMBEDDING_KEY]

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
            layer = _with_adapter(hosts.whole(weight[i] if entry.is_stacked else weight), entry, params, i)
            if out is None:
                continue
            tensors[key] = np.empty(shapes[key], dtypes[key])
            flat = tensors[key].reshape(len(tensors[key]), -1) if layer.ndim > 1 else tensors[key]
            _copy(hf_mapping.to_hf(entry, layer), flat)
        hosts.together(partial(_write, tensors, out, name))
    if len(shards) > 1:
        total = sum(_num_bytes(shapes[key], dtypes[key]) for key in sources)
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        hosts.together(lambda: None if out is None else (out / INDEX).write_text(index))


def _write(tensors: Mapping[str, np.ndarray], out: Path | None, name: str) -> None:
    if out is None:
        return
    try:
        safetensors.numpy.save_file(tensors, out / name, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # which a full disk is to this library
        raise InputError(f"{out / name}: cannot be written: {error}; make room, or choose another place") from None


def _with_adapter(weight: np.ndarray, entry: hf_mapping.Entry, params: nnx.State, i: int) -> np.ndarray:
    """One layer's weight, with its adapter added in float32 where it has one."""
    halves = lora.halves(params, entry.path)
    if halves is None:
        return weight
    parts = (hosts.whole(half[...][i] if entry.is_stacked else half[...]) for half in halves)
    a, b = (np.asarray(part, np.float32) for part in parts)
    return weight.astype(np.float32) + np.float32(halves[1].scale) * (a @ b)


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
