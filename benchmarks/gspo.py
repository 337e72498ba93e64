"""One iteration of GSPO, the prompt shared by its group, against the prompt repeated for every sample.

    python benchmarks/gspo.py [--quick]

Both sides are this package: the same functions, given one row for a group or a row for each sample. A prompt of 2,048
visual and text tokens (16 frames), groups of 8, 256 new tokens; a decoder of 1,024 x 4 layers, a tower of 512 x 4
layers. `--quick` is a small one that keeps the benchmark alive. Exits with 3 where the shared form needs more than 0.35
of the operations or of the time, or where the two disagree.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import GSPOConfig, ModelConfig, SamplingConfig
from openo3_jax.data import groups, tiny_tokenizer, tokens
from openo3_jax.models import flops, qwen2_5_vl
from openo3_jax.policy import Policy
from openo3_jax.train import state as state_lib
from openo3_jax.train import steps
from openo3_jax.types import Picture, Rollouts, Sample

ROUNDS = 2
MOST = 0.35  # of the repeated form's operations and time


class Size(NamedTuple):
    hidden: int
    layers: int
    vision_hidden: int
    vision_layers: int
    frames: int
    frame_hw: tuple[int, int]  # px
    prompt: int  # tokens
    group: int
    new_tokens: int


FULL = Size(1024, 4, 512, 4, 16, (224, 420), 2048, 8, 256)
QUICK = Size(128, 2, 64, 2, 4, (56, 84), 128, 4, 32)


def make_policy(directory: pathlib.Path, size: Size) -> Policy:
    """Random weights; no token ends an answer, so that both sides write the same number of them."""
    ids = tiny_tokenizer.write_tokenizer(directory)
    heads = max(4, size.hidden // 128)
    half = size.hidden // heads // 2
    third = half * 3 // 8
    config = ModelConfig.from_hf(
        {
            "model_type": "qwen2_5_vl",
            "vocab_size": 16384 if size is FULL else ids.vocab_size,
            "hidden_size": size.hidden,
            "intermediate_size": 11 * size.hidden // 4,
            "num_hidden_layers": size.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(2, heads // 4),
            "tie_word_embeddings": True,
            "rope_scaling": {"mrope_section": [half - 2 * third, third, third]},
            "vision_config": {
                "depth": size.vision_layers,
                "hidden_size": size.vision_hidden,
                "intermediate_size": 11 * size.vision_hidden // 4,
                "num_heads": max(2, size.vision_hidden // 64),
                "out_hidden_size": size.hidden,
                "fullatt_block_indexes": [size.vision_layers - 1],
            },
            "image_token_id": ids.image_token_id,
            "video_token_id": ids.video_token_id,
            "vision_start_token_id": ids.vision_start_token_id,
        }
    )
    ends = {"eos_token_id": ids.eos_token_id, "bos_token_id": None}
    (directory / "config.json").write_text(json.dumps(config.to_hf() | ends))
    mesh = mesh_lib.make_mesh({}, devices=jax.devices()[:1])
    graphdef, params = qwen2_5_vl.init_params(config, mesh, 0)
    processor = dataclasses.replace(tokens.load_processor(directory), stop_ids=())
    return Policy(graphdef, params, mesh, processor, directory, {}, video=None, video_mode="frames")


def make_prompt(policy: Policy, size: Size) -> Sample:
    """Frames, then text up to the wanted number of tokens."""
    draw = np.random.default_rng(0)
    pictures = [Picture(draw.integers(0, 256, (1, *size.frame_hw, 3), dtype=np.uint8)) for _ in range(size.frames)]
    items: list[dict[str, Any]] = [{"type": "picture", "picture": picture} for picture in pictures]
    words = ""
    while True:
        sample = policy.processor.encode([{"role": "user", "content": [*items, {"type": "text", "text": words + "?"}]}])
        if len(sample.tokens) >= size.prompt:
            return sample
        words += "why " * max(1, (size.prompt - len(sample.tokens)) // 8)


class Side(NamedTuple):
    """Rows of prompts, and how many samples each of them has."""

    prompts: list[Sample]
    group: int


def iteration(policy: Policy, state: Any, step: Any, side: Side, config: GSPOConfig) -> tuple[Any, dict[str, float]]:
    """Rollout, then one update with a reference; seconds of each and the loss."""
    started = time.perf_counter()
    sampling = dataclasses.replace(config.sampling, num_samples=side.group)
    now = dataclasses.replace(policy, params=state.params)
    out = now.continue_samples(side.prompts, sampling, list(range(len(side.prompts))))
    sampled = time.perf_counter()
    rollouts = make_rollouts(policy, side, out.tokens, out.logp, config.sampling.num_samples)
    state, measured = step(state, rollouts)
    loss = float(measured["loss"])
    done = time.perf_counter()
    return state, {"rollout": sampled - started, "update": done - sampled, "all": done - started, "loss": loss}


def make_rollouts(policy: Policy, side: Side, new: Any, logp: Any, total: int) -> Rollouts:
    """Advantages from -1 to 1 over the whole group, whichever rows it stands in."""
    rows = len(side.prompts)
    bucket = groups.group_bucket(side.prompts, new, policy.config.vision, num_rows=rows)
    batch, completion = groups.make_group_batch(side.prompts, new, bucket, policy.config, pad_id=0)
    values = groups.spread(logp, completion.shape)
    advantage = np.linspace(-1, 1, total, dtype=np.float32).reshape(rows, side.group)
    return Rollouts(batch, completion, values, values, advantage, np.ones_like(advantage, bool))


def operations(config: ModelConfig, prompt: Sample, side: Side, new_tokens: int) -> float:
    """Prefill, decoding, and in the update the policy's forward and backward and the reference's forward."""
    rows, group = len(side.prompts), side.group
    length, targets = len(prompt.tokens), group * new_tokens
    prefill = flops.forward_flops(config, prompt.grids, prompt=length, targets=1)
    pairs = flops.causal_pairs(length, [new_tokens] * group) - flops.causal_pairs(length)
    decode = flops.text_flops(config.text, tokens=targets, pairs=pairs, targets=targets)
    update = flops.forward_flops(config, prompt.grids, prompt=length, completions=[new_tokens] * group, targets=targets)
    return float(rows * (prefill + decode + 4 * update))  # forward, twice that backward, and the reference's forward


def temporary_bytes(step: Any, state: Any, rollouts: Rollouts) -> int:
    """What the compiled update holds beyond its arguments."""
    return step.lower(state, rollouts).compile().memory_analysis().temp_size_in_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    size = QUICK if parser.parse_args().quick else FULL
    config = GSPOConfig(
        steps=4,
        batch_size=1,
        sampling=SamplingConfig(num_samples=size.group, max_new_tokens=size.new_tokens),
        compute_dtype="float32",
    )
    step = steps.make_gspo_step(config)
    with tempfile.TemporaryDirectory() as directory:
        policy = make_policy(pathlib.Path(directory), size)
        prompt = make_prompt(policy, size)
        sides = {"shared": Side([prompt], size.group), "repeated": Side([prompt] * size.group, 1)}
        print(f"prompt {len(prompt.tokens)} tokens, group {size.group}, {size.new_tokens} new")

        # The same completions through both forms first: the same gradient.
        out = policy.continue_samples([prompt], config.sampling, [0])
        repeated = [[tokens] for tokens in out.tokens[0]], [[logp] for logp in out.logp[0]]
        same = {
            "shared": make_rollouts(policy, sides["shared"], out.tokens, out.logp, size.group),
            "repeated": make_rollouts(policy, sides["repeated"], *repeated, size.group),
        }
        norm, memory, states = {}, {}, {}
        for name in sides:
            state = state_lib.make_state(policy, config)
            memory[name] = temporary_bytes(step, state, same[name])
            states[name], measured = step(state, same[name])
            norm[name] = float(measured["grad_norm"])
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(1 + ROUNDS):  # in turn, so that a busy moment of the machine meets both
            for name, side in sides.items():
                states[name], seconds = iteration(policy, states[name], step, side, config)
                runs[name].append(seconds)
        # the first round compiles
        fastest = {name: min(found[1:], key=lambda run: run["all"]) for name, found in runs.items()}
        gap = abs(norm["shared"] - norm["repeated"]) / norm["repeated"]
        count = {name: operations(policy.config, prompt, side, size.new_tokens) for name, side in sides.items()}
    print(f"{'':10s} {'TFLOP':>8s} {'rollout s':>10s} {'update s':>10s} {'all s':>8s} {'temporaries GiB':>16s}")
    for name, run in fastest.items():
        print(
            f"{name:10s} {count[name] / 1e12:8.2f} {run['rollout']:10.2f} {run['update']:10.2f} {run['all']:8.2f} "
            f"{memory[name] / 2**30:16.2f}"
        )
    ratios = count["shared"] / count["repeated"], fastest["shared"]["all"] / fastest["repeated"]["all"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"shared / repeated: operations {ratios[0]:.3f}, time {ratios[1]:.3f} (at most {MOST})")
    print(f"gradient norm {norm['shared']:.6f}, repeated {norm['repeated']:.6f}; peak of the process {peak:.1f} GiB")
    return 0 if (max(ratios) <= MOST or size is QUICK) and gap < 1e-3 else 3


if __name__ == "__main__":
    sys.exit(main())
