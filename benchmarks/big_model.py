"""The 7B model without an accelerator: a random directory is made, loaded, asked about a clip, exported and compared.

    python benchmarks/big_model.py [--size 7b] [--work DIR] [--limit-gib 24]

Prints the seconds and the largest anonymous memory (RssAnon) of each part. Needs 34 GB of disk for 7b, and memory for
the weights in bfloat16 (16.6 GB). Exits with 3 where more than `--limit-gib` was used, or an exported byte differs.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax import tiny
from openo3_jax.config import QWEN2_5_VL, ModelConfig, VideoConfig
from openo3_jax.data import synthetic, tiny_tokenizer
from openo3_jax.models import hf_mapping, hf_weights, qwen2_5_vl

GIB = 2**30
SHARD_BYTES = 2 * GIB
DRAWN = 2**24  # random values; a tensor repeats them from a place of its own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["tiny", *QWEN2_5_VL], default="7b")
    parser.add_argument("--work", type=Path, help="where the directories are made; a temporary one without it")
    parser.add_argument("--limit-gib", type=float, default=24.0)
    parser.add_argument("--new-tokens", type=int, default=4)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        return run(args.size, work, args.limit_gib, args.new_tokens)


def run(size: str, work: Path, limit_gib: float, new_tokens: int) -> int:
    source, out = work / "model", work / "export"
    for directory in (source, out):
        shutil.rmtree(directory, ignore_errors=True)
    synthetic.write_dataset(work / "data", num_train=1, seed=0)
    clip = next((work / "data").rglob("*.mp4"))
    peaks = []
    with measured("random directory", peaks):
        write_directory(size, source)
    frames = VideoConfig(min_frames=4, max_frames=4, min_pixels=16 * 28 * 28, max_pixels=16 * 28 * 28)
    one = mesh_lib.make_mesh({}, devices=jax.devices()[:1])
    with measured("load", peaks):
        policy = policy_lib.load_pretrained(source, dtype="bfloat16", mesh=one, video=frames)
    said = [{"type": "video", "video": clip}, {"type": "text", "text": "What moves, where, and when?"}]
    with measured(f"answer of {new_tokens} tokens", peaks):
        answer = policy.generate([[{"role": "user", "content": said}]], max_new_tokens=new_tokens, temperature=0.0)
    with measured("export", peaks):
        policy.save_pretrained(out)
    number, differing = compare(source, out)
    print(f"{len(answer.tokens[0][0])} tokens answered; {number} tensors exported, {len(differing)} differ")
    holds = not differing and max(peaks) <= limit_gib * GIB
    print(f"{'holds' if holds else 'DOES NOT HOLD'}: equal bytes, at most {limit_gib} GiB of anonymous memory")
    return 0 if holds else 3


def write_directory(size: str, out: Path) -> None:
    """A random bfloat16 model of a published size with a small tokenizer, file by file."""
    out.mkdir()
    ids = tiny_tokenizer.write_tokenizer(out)
    config = tiny.tiny_config(ids) if size == "tiny" else QWEN2_5_VL[size]
    named = {name: getattr(ids, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    config = ModelConfig(text=config.text, vision=config.vision, **named)
    stops = {"bos_token_id": None, "eos_token_id": ids.eos_token_id, "pad_token_id": ids.pad_token_id}
    (out / "config.json").write_text(json.dumps(config.to_hf() | stops | {"torch_dtype": "bfloat16"}))
    one = mesh_lib.make_mesh({}, devices=jax.devices()[:1])
    _, abstract = qwen2_5_vl.abstract_params(config, one)
    drawn = np.random.default_rng(0).normal(size=DRAWN).astype(np.float32)
    shard, room, weight_map, total = {}, SHARD_BYTES, {}, 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        safetensors.numpy.save_file(shard, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, shape in shapes(config, abstract):
        values = make_tensor(key, shape, drawn)
        if shard and values.nbytes > room:
            flush()
            room = SHARD_BYTES
        shard[key] = values
        room -= values.nbytes
        total += values.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / hf_weights.INDEX).write_text(json.dumps(index))


def shapes(config: ModelConfig, abstract) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the directory, in the hub's spelling."""
    for entry in hf_mapping.table(config):
        leaf = abstract
        for name in entry.path:
            leaf = leaf[name]
        shape = leaf.shape[1:] if entry.is_stacked else leaf.shape
        for key in hf_mapping.keys(entry, config):
            yield key, hf_mapping.hf_shape(entry, shape, config)


def make_tensor(key: str, shape: tuple[int, ...], drawn: np.ndarray) -> np.ndarray:
    size = int(np.prod(shape))
    if len(shape) == 1:
        return np.full(shape, "norm" in key or "ln_q" in key, jnp.bfloat16)
    scale = (size // shape[0]) ** -0.5
    start = hash_of(key) % (DRAWN // 2)
    block = (drawn[start : start + size] * np.float32(scale)).astype(jnp.bfloat16)
    return np.resize(block, shape)


def hash_of(key: str) -> int:
    return int.from_bytes(key.encode(), "little") % (2**61 - 1)


def compare(one: Path, other: Path) -> tuple[int, list[str]]:
    """Number of tensors, and those whose bytes, dtype or shape differ."""
    stored = [{tensor.key: tensor for tensor in hf_weights.read_index(directory)} for directory in (one, other)]
    keys = set(stored[0]) | set(stored[1])
    return len(keys), [key for key in sorted(keys) if not all(key in s for s in stored) or not equal(key, stored)]


def equal(key: str, stored: list[dict[str, hf_weights.Stored]]) -> bool:
    a, b = (side[key].read((slice(None),)) for side in stored)
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(np.uint8), b.view(np.uint8))


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """RssAnon in bytes, looked at twenty times a second until the end of the block."""
    done = threading.Event()
    found = [rss_anon()]

    def watch() -> None:
        while not done.wait(0.05):
            found.append(rss_anon())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.append(rss_anon())
        done.set()
        thread.join()


@contextlib.contextmanager
def measured(name: str, peaks: list[int]) -> Iterator[None]:
    """Print seconds and the largest RssAnon of a part, and keep the latter."""
    started_s = time.monotonic()
    with watched() as found:
        yield
    peaks.append(max(found))
    print(f"{name:24}{time.monotonic() - started_s:8.0f} s{max(found) / GIB:8.2f} GiB", flush=True)


def rss_anon() -> int:
    """Bytes of this process that no file backs."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    sys.exit(main())
