"""Sampling from prompts with frames, prefill included, against `generate` of transformers; each in its own process.

    python benchmarks/generation.py [--quick] [--json FILE] [--prompts 8] [--rounds 1]

8 prompts of about 2,048 tokens (16 frames each) x 4 samples x 128 tokens, temperature 1, from a decoder of 1,024 x 8
layers and a tower of 512 x 4 layers, float32. transformers: sdpa, left padding, a cache, no gradient,
`num_return_sequences=4`. First greedy tokens of each prompt on both sides: equal, or the first difference is one of two
tokens whose logits are closer than rounding.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import random_model
import results
import sides

from openo3_jax.types import Sample

LEAST = 3.0  # of their tokens per second
GREEDY = 16  # tokens that are compared
CLOSE = 1e-3  # nats; of two such tokens either side may take one
FULL = random_model.FULL._replace(group=4, new_tokens=128)
QUICK = random_model.QUICK._replace(group=2, new_tokens=16)


def main() -> int:
    parser = results.make_parser(__doc__)
    sides.add_arguments(parser, ["ours", "theirs"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    number = min(2, args.prompts) if args.quick else args.prompts
    if args.side:
        prepare = {"ours": prepare_ours, "theirs": prepare_theirs}[args.side]
        return sides.serve(lambda: prepare(args.work, size, number))
    with tempfile.TemporaryDirectory() as directory:
        work = pathlib.Path(directory)
        seconds = measure(work, args)
        different = differences(work)
    best = {name: min(found, key=lambda one: one["all_s"]) for name, found in seconds.items()}
    tokens = number * size.group * size.new_tokens
    row = results.compare(
        f"generation, {number} x {size.group} samples of {size.new_tokens} after {size.prompt} tokens",
        "transformers generate",
        ours=tokens / best["ours"]["all_s"],
        theirs=tokens / best["theirs"]["all_s"],
        unit="tokens/s",
        least=LEAST,
        judged=not args.quick,
        compile_s=seconds["ours"][-1]["compile_s"],
        note="greedy tokens equal" if not different else f"greedy tokens of {different} prompts differ",
    )
    code = results.finish([row], args)
    for name, found in seconds.items():
        print(f"{name}: " + "; ".join(f"{one['all_s']:.1f} s" for one in found))
    return 3 if different else code


def measure(work: pathlib.Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """What each side measured; the greedy tokens are left in `work`."""
    flags = ["--prompts", str(args.prompts), *(["--quick"] if args.quick else [])]
    with sides.Side(__file__, "ours", work, flags) as ours, sides.Side(__file__, "theirs", work, flags) as theirs:
        return sides.in_turn({"ours": ours, "theirs": theirs}, args.rounds)


def differences(work: pathlib.Path) -> int:
    """Prompts whose greedy tokens differ first in a place where the logits do not excuse it."""
    with np.load(work / "ours.npz") as ours, np.load(work / "theirs.npz") as theirs:
        number = 0
        for mine, other, logits in zip(ours["tokens"], theirs["tokens"], theirs["logits"], strict=True):
            for at in np.flatnonzero(mine != other)[:1]:
                number += bool(logits[at, other[at]] - logits[at, mine[at]] > CLOSE)
        return number


def make_prompts(processor, size: random_model.Size, number: int) -> list[Sample]:
    """Of different lengths, so that both sides have padding to deal with."""
    return [random_model.make_prompt(processor, size._replace(prompt=size.prompt - 8 * i), i) for i in range(number)]


def prepare_ours(work: pathlib.Path, size: random_model.Size, number: int) -> tuple[dict, Callable]:
    import compiling

    from openo3_jax.config import SamplingConfig

    compiling.watch()
    policy = random_model.make_policy(work, size)
    policy.save_pretrained(work / "model")
    prompts, seeds = make_prompts(policy.processor, size, number), list(range(number))
    sampled = SamplingConfig(num_samples=size.group, max_new_tokens=size.new_tokens)
    greedy = SamplingConfig(max_new_tokens=GREEDY, temperature=0.0)
    out = policy.continue_samples(prompts, greedy, seeds, ban_special=False)
    np.savez(work / "ours.npz", tokens=np.array([group[0] for group in out.tokens]))

    def do_round() -> dict[str, float]:
        started_s = compiling.clock_s()
        out = policy.continue_samples(prompts, sampled, seeds, ban_special=False)
        assert all(len(tokens) == size.new_tokens for group in out.tokens for tokens in group)
        return {"all_s": compiling.clock_s() - started_s, "compile_s": compiling.seconds()}

    return {}, do_round


def prepare_theirs(work: pathlib.Path, size: random_model.Size, number: int) -> tuple[dict, Callable]:
    import hf_model
    import torch

    from openo3_jax.data import tokens

    torch.manual_seed(0)
    processor, model = tokens.load_processor(work / "model"), hf_model.load(work / "model")
    prompts = hf_model.inputs(make_prompts(processor, size, number), processor)
    first = prompts["input_ids"].shape[1]

    def generate(**asked):
        with torch.no_grad():
            return model.generate(**prompts, use_cache=True, **asked)

    asked = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = generate(max_new_tokens=GREEDY, **asked)
    logits = torch.stack(out.logits, dim=1).numpy()
    np.savez(work / "theirs.npz", tokens=out.sequences[:, first:].numpy(), logits=logits)

    def do_round() -> dict[str, float]:
        started_s = time.perf_counter()
        out = generate(max_new_tokens=size.new_tokens, do_sample=True, top_k=0, num_return_sequences=size.group)
        assert out.shape == (number * size.group, first + size.new_tokens)
        return {"all_s": time.perf_counter() - started_s}

    return {}, do_round


if __name__ == "__main__":
    sys.exit(main())
