"""The parts of gpu.py by this package, which starts it: rates of the device, SFT, decoding, GSPO.

A part is a function that gives runs by name; a run takes a directory, a model and its tokenizer's ids, and returns the
seconds it took and what to hold them against.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import compiling
import gspo
import jax
import jax.numpy as jnp
import numpy as np
import random_model
import sides

from openo3_jax import mesh as mesh_lib
from openo3_jax import tiny
from openo3_jax.config import QWEN2_5_VL, ModelConfig, SamplingConfig, SFTConfig
from openo3_jax.data import tiny_tokenizer
from openo3_jax.models import generate, kv_cache, qwen2_5_vl, text
from openo3_jax.train import profiling, steps
from openo3_jax.train import state as state_lib

GIB = 2**30
SPARE_BYTES = 8 * GIB  # for activations and what else runs
# Bytes for each weight at the fullest moment of a part: state, gradients, copies in the dtype of computation.
PARTS: Mapping[str, int] = {"sft": 18, "decode": 6, "gspo": 22}
SHARED = 4  # samples of a prompt while decoding


class Load(NamedTuple):
    """Sizes of the parts."""

    matrix: int  # side
    copied: int  # bytes
    frames: int
    frame_hw: tuple[int, int]
    row: int  # tokens of a row of SFT
    rows: int
    prefix: int  # of decoding
    batches: tuple[int, ...]
    steps: int  # of decoding
    prompt: int  # tokens, of GSPO
    prompts: int
    group: int
    new_tokens: int


FULL = Load(8192, GIB, 16, (224, 420), 4096, 2, 4096, (4, 32, 128), 64, 2048, 4, 8, 256)
TINY = Load(128, 2**20, 2, (56, 84), 128, 1, 64, (4,), 8, 64, 1, 4, 8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    sides.add_arguments(parser, ["all"])
    parser.add_argument("--model")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    return sides.serve(lambda: (measure(args), dict))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every part after the other; one that fails for want of memory says so and the next goes on."""
    compiling.watch()
    load, device = (TINY if args.tiny else FULL), jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    found: dict[str, Any] = {"device": device.device_kind, "platform": device.platform, "parts": {}, "layers": {}}
    found |= {"flops_per_s": product_rate(load.matrix), "bytes_per_s": copy_rate(load.copied)}
    with tempfile.TemporaryDirectory() as directory:
        for part, weight_bytes in PARTS.items():
            place = pathlib.Path(directory) / part
            place.mkdir()
            model, ids = cut_model("tiny" if args.tiny else args.model, place, weight_bytes, limit)
            found["layers"][part] = model.text.num_hidden_layers
            for key, run in WORK[part](load).items():
                before_s = compiling.seconds()
                try:
                    found["parts"][key] = run(place, model, ids) | {"compile_s": compiling.seconds() - before_s}
                except jax.errors.JaxRuntimeError as error:
                    found["parts"][key] = {"error": str(error).partition("\n")[0]}
                print(key, found["parts"][key], flush=True)
    return found


def cut_model(
    name: str, directory: pathlib.Path, weight_bytes: int, limit: int | None
) -> tuple[ModelConfig, tiny_tokenizer.TokenIds]:
    """A published model with the small tokenizer's ids, and as many decoder layers as the device has room for."""
    ids = tiny_tokenizer.write_tokenizer(directory)
    model = tiny.tiny_config(ids, hidden_size=64, layers=2) if name == "tiny" else QWEN2_5_VL[name]
    special = {key: getattr(ids, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id")}
    model = dataclasses.replace(model, **special)
    one = mesh_lib.make_mesh({}, devices=jax.devices()[:1])
    sizes = qwen2_5_vl.abstract_params(model, one)[1]
    layers = sizes["text"]["layers"]
    each = sum(x.size for x in jax.tree.leaves(layers)) // model.text.num_hidden_layers
    rest = sum(x.size for x in jax.tree.leaves(sizes)) - each * model.text.num_hidden_layers
    if limit is not None:
        fitting = (limit - SPARE_BYTES) // weight_bytes - rest
        depth = max(1, min(model.text.num_hidden_layers, fitting // each))
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_hidden_layers=depth))
    return model, ids


def fastest(call: Callable[[], Any], rounds: int = 3) -> float:
    """Seconds of the fastest of several calls; one before them compiles."""
    found = []
    for _ in range(1 + rounds):
        started_s = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - started_s)
    return min(found[1:])


def product_rate(side: int, times: int = 16) -> float:
    """Operations per second of bfloat16 matrix products, one after the other."""
    x = jnp.full((side, side), 1 / side, jnp.bfloat16)
    run = jax.jit(lambda x, w: jax.lax.fori_loop(0, times, lambda _, y: y @ w, x))
    return times * 2 * side**3 / fastest(lambda: run(x, x))


def copy_rate(size: int, times: int = 16) -> float:
    """Bytes per second, read and written, of an array that is copied with 1 added."""
    x = jnp.zeros(size // 2, jnp.bfloat16)
    run = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: y + jnp.bfloat16(1), x))
    return times * 2 * size / fastest(lambda: run(x))


def sft_work(load: Load) -> dict[str, Callable]:
    def run(place: pathlib.Path, model: ModelConfig, ids: tiny_tokenizer.TokenIds) -> dict[str, float]:

        policy = random_model.policy_of(place, model, ids)
        config = SFTConfig(steps=8, batch_size=load.rows)
        kept = {"state": state_lib.make_state(policy, config)}
        policy = policy.without_weights()
        size = random_model.QUICK._replace(frames=load.frames, frame_hw=load.frame_hw, prompt=load.row)
        samples = [random_model.make_prompt(policy.processor, size, row, "because " * 64) for row in range(load.rows)]
        batch = policy.batch(samples)
        step = steps.make_sft_step(config)

        def call() -> Any:
            kept["state"], measured = step(kept["state"], batch)
            return measured

        took_s = fastest(call)
        sizes = [(len(one.tokens), int(one.loss_mask.sum()), one.grids) for one in samples]
        return {"all_s": took_s, "flops": profiling.sft_flops(model, sizes)}

    return {"sft step": run}


def decode_work(load: Load) -> dict[str, Callable]:
    def run(place: pathlib.Path, model: ModelConfig, ids: tiny_tokenizer.TokenIds, batch: int) -> dict[str, float]:

        config, prompts = model.text, batch // SHARED
        mesh = mesh_lib.make_mesh({}, devices=jax.devices()[:1])
        graphdef, params = qwen2_5_vl.init_params(model, mesh, 0)
        cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree), donate_argnums=0)
        layout = jax.jit(generate.sampling_layout, static_argnums=0)(graphdef, cast(params))
        del params
        shape = (config.num_hidden_layers, prompts, load.prefix, config.num_key_value_heads, config.head_dim)

        @jax.jit
        def make() -> generate.Prompts:
            cache = jnp.full(shape, 0.01, jnp.bfloat16)
            return generate.Prompts(
                jnp.zeros((prompts, config.vocab_size), jnp.float32),
                kv_cache.split_layers(text.KeyValue(cache, cache), lambda x: x),
                jnp.ones((prompts, load.prefix), jnp.int32),
                jnp.ones((prompts, load.prefix), bool),
                jnp.full(prompts, load.prefix, jnp.int32),
            )

        made = make()
        asked = SamplingConfig(num_samples=SHARED, max_new_tokens=load.steps)
        keys = jax.random.split(jax.random.key(0), (prompts, SHARED))
        none = jnp.zeros(config.vocab_size, bool)
        decode = jax.jit(generate.decode, static_argnames="config")

        def call(steps: int) -> Any:
            return decode(layout, made, keys, none, none, np.int32(steps), config=asked)

        took_s = (fastest(lambda: call(load.steps)) - fastest(lambda: call(1))) / (load.steps - 1)
        suffixes = 2 * config.num_hidden_layers * batch * load.steps * config.num_key_value_heads * config.head_dim * 2
        read = sum(x.nbytes for x in jax.tree.leaves((layout.layers, layout.rest, made.prefix))) + suffixes
        if not config.tie_word_embeddings:
            read -= layout.rest["embed_tokens"]["weight"][...].nbytes  # of which a step reads a row a sample
        return {"all_s": took_s, "bytes": read, "tokens": batch}

    def of(batch: int) -> Callable:
        return lambda *args: run(*args, batch)

    return {f"decode step, {batch} behind {load.prefix}": of(batch) for batch in load.batches}


def gspo_work(load: Load) -> dict[str, Callable]:
    def run(place: pathlib.Path, model: ModelConfig, ids: tiny_tokenizer.TokenIds) -> dict[str, Any]:

        size = random_model.QUICK._replace(
            frames=load.frames,
            frame_hw=load.frame_hw,
            prompt=load.prompt,
            group=load.group,
            new_tokens=load.new_tokens,
        )
        policy = random_model.policy_of(place, model, ids)
        config = dataclasses.replace(gspo.make_config(size), batch_size=load.prompts, compute_dtype="bfloat16")
        state = state_lib.make_state(policy, config)
        policy = policy.without_weights()
        samples = [random_model.make_prompt(policy.processor, size, seed) for seed in range(load.prompts)]
        batch, slots = policy.prompt_batch(samples)
        keys = jax.random.split(jax.random.key(0), (load.prompts, load.group))
        none = np.zeros(model.text.vocab_size, bool)
        cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(config.compute_dtype), tree))
        prefill = jax.jit(generate.prefill, static_argnums=0)
        lay_out = jax.jit(generate.sampling_layout, static_argnums=0)
        decode = jax.jit(generate.decode, static_argnames="config")
        score, step = steps.make_score_step(config), steps.make_gspo_step(config)
        phases: dict[str, float] = {}

        def timed(phase: str, call: Callable[..., Any], *given: Any, **named: Any) -> Any:
            started_s = time.perf_counter()
            made = jax.block_until_ready(call(*given, **named))
            phases[phase] = time.perf_counter() - started_s
            return made

        for _ in range(3):  # the first compiles, the last counts
            weights = timed("cast", cast, state.params)
            prompts = timed("prefill", prefill, policy.graphdef, weights, batch, slots)
            layout = timed("layout", lay_out, policy.graphdef, weights)
            del weights
            limit = np.int32(load.new_tokens)
            out = timed("decode", decode, layout, prompts, keys, none, none, limit, config=config.sampling)
            del layout, prompts
            side = gspo.Side(samples, load.group)
            new, logp = np.asarray(out.tokens), np.asarray(out.logp)
            rollouts = gspo.make_rollouts(policy, side, new, logp, load.prompts * load.group)
            timed("old log-probabilities", score, state, rollouts.batch)
            state, _ = timed("update", step, state, rollouts)
        return {"all_s": sum(phases.values()), "phases": phases}

    return {"gspo iteration": run}


WORK = {"sft": sft_work, "decode": decode_work, "gspo": gspo_work}

if __name__ == "__main__":
    sys.exit(main())
