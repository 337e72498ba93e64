"""The vision tower, and the prefill of mixed conversations, against transformers and torch; each in its own process.

    python benchmarks/forward.py [--quick] [--json FILE] [--rounds 5]

The widths of Qwen2.5-VL-3B, four layers of each tower (one over whole frames), a vocabulary of 16,384, float32. The
tower sees 16 frames of 280 x 364 px. The prefill is that of four conversations: text alone, one picture of 448 x 672
px, 8 frames and 16 frames of 224 x 420 px; it gives the logits after the last token and a cache, on both sides. torch:
sdpa, no gradient, padding on the left, `logits_to_keep=1`, as its `generate` calls the model. Both processes live
throughout and are measured in turn; the fastest round counts. First the outputs must agree.
"""

import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import cut_3b
import numpy as np
import results
import sides

from openo3_jax.types import Sample

TOWER_FRAMES, TOWER_HW = 16, (280, 364)
FRAME_HW = (224, 420)
CONVERSATIONS = ([], [(448, 672)], [FRAME_HW] * 8, [FRAME_HW] * 16)
TEXT_ALONE = 512  # slots
MOST_TOWER, MOST_PREFILL = 0.7, 0.8
TOLERANCE = 1e-3  # of the largest value
NAMES = ("tower", "prefill")


def main() -> int:
    parser = results.make_parser(__doc__)
    sides.add_arguments(parser, ["ours", "theirs"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.side:
        prepare = {"ours": prepare_ours, "theirs": prepare_theirs}[args.side]
        return sides.serve(lambda: prepare(args.work, quick=args.quick))
    flags = ["--quick"] if args.quick else []
    with tempfile.TemporaryDirectory() as directory:
        work = pathlib.Path(directory)
        cut_3b.write(work / "model", cut_3b.QUICK if args.quick else cut_3b.Cut())
        ours = sides.Side(__file__, "ours", work, flags, XLA_FLAGS=cut_3b.XLA_FLAGS)
        with ours, sides.Side(__file__, "theirs", work, flags) as theirs:
            gap = sides.largest_gap(work, "ours", "theirs")
            found = sides.in_turn({"ours": ours, "theirs": theirs}, 1 if args.quick else args.rounds)
            compile_s = ours.ready["compile_s"]
    rows = []
    height, width = TOWER_HW
    works = {
        "tower": (f"vision tower of 4 layers, {TOWER_FRAMES} frames of {height} x {width} px", MOST_TOWER),
        "prefill": (f"prefill of {len(CONVERSATIONS)} mixed conversations, 4 + 4 layers", MOST_PREFILL),
    }
    for name, (work, most) in works.items():
        best = {side: min(one[name] for one in rounds) for side, rounds in found.items()}
        middle = {side: float(np.median([one[name] for one in rounds])) for side, rounds in found.items()}
        core = {side: min(one[f"{name}, core"] for one in rounds) for side, rounds in found.items()}
        note = f"outputs within {gap:.0e}; medians {middle['ours']:.3g} and {middle['theirs']:.3g} s"
        note += f"; seconds of a core {core['ours']:.3g} and {core['theirs']:.3g}; XLA_FLAGS={cut_3b.XLA_FLAGS}"
        row = results.compare(
            work,
            "transformers + torch",
            **best,
            unit="s",
            most=most,
            judged=not args.quick,
            compile_s=compile_s,
            note=note,
        )
        rows.append(row)
    return results.finish(rows, args) or (0 if gap < TOLERANCE else 3)


def make_samples(directory: pathlib.Path, *, quick: bool) -> tuple[Sample, list[Sample]]:
    """For the tower, and the conversations."""
    from openo3_jax.data import tokens

    processor = tokens.load_processor(directory)
    small = (56, 84)
    shown = [[small] * min(3, len(pictures)) for pictures in CONVERSATIONS] if quick else CONVERSATIONS
    tower = [small] * 3 if quick else [TOWER_HW] * TOWER_FRAMES
    slots = [64 if quick else TEXT_ALONE, *[None] * (len(shown) - 1)]
    conversations = [
        cut_3b.make_sample(processor, pictures, slots=number, seed=i)
        for i, (pictures, number) in enumerate(zip(shown, slots, strict=True))
    ]
    return cut_3b.make_sample(processor, tower), conversations


def measured(work: dict[str, Callable[[], None]]) -> Callable[[], dict[str, float]]:
    """A round: seconds of the wall, and of all cores, of each."""

    def do_round() -> dict[str, float]:
        seconds = {}
        for name, do in work.items():
            started_s, started_core_s = time.perf_counter(), time.process_time()
            do()
            seconds[name], seconds[f"{name}, core"] = (
                time.perf_counter() - started_s,
                time.process_time() - started_core_s,
            )
        return seconds

    return do_round


def prepare_ours(work: pathlib.Path, *, quick: bool) -> tuple[dict, Callable]:
    import compiling
    import jax
    from flax import nnx

    from openo3_jax import policy as policy_lib
    from openo3_jax.models import generate

    compiling.watch()
    policy = policy_lib.load_pretrained(work / "model", mesh={"fsdp": 1})
    alone, conversations = make_samples(work / "model", quick=quick)
    tower_batch, batch = cut_3b.make_batch(policy, [alone]), policy.prompt_batch(conversations)
    visual = jax.jit(lambda params, batch: nnx.merge(policy.graphdef, params).visual(batch.vision))
    prefill = jax.jit(generate.prefill, static_argnums=0)

    def tower():
        return jax.block_until_ready(visual(policy.params, tower_batch))

    def first_logits():
        return jax.block_until_ready(prefill(policy.graphdef, policy.params, *batch)).logits

    tokens = alone.is_visual.sum()
    np.savez(work / "ours.npz", tower=np.asarray(tower())[0, :tokens], prefill=np.asarray(first_logits()))
    return {"compile_s": compiling.seconds()}, measured({"tower": tower, "prefill": first_logits})


def prepare_theirs(work: pathlib.Path, *, quick: bool) -> tuple[dict, Callable]:
    import hf_model
    import torch

    from openo3_jax.data import tokens

    processor, model = tokens.load_processor(work / "model"), hf_model.load(work / "model")
    alone, conversations = make_samples(work / "model", quick=quick)
    tower_inputs, inputs = (hf_model.inputs(samples, processor) for samples in ([alone], conversations))

    def tower():
        with torch.no_grad():
            return model.model.visual(
                tower_inputs["pixel_values"], grid_thw=tower_inputs["image_grid_thw"]
            ).pooler_output

    def first_logits():
        with torch.no_grad():
            return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]

    np.savez(work / "theirs.npz", tower=tower().numpy(), prefill=first_logits().numpy())
    return {}, measured({"tower": tower, "prefill": first_logits})


if __name__ == "__main__":
    sys.exit(main())
