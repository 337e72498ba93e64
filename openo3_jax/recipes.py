"""The paper's settings, and small ones that were run: each with command and hardware, those that ran with result."""

import dataclasses
from collections.abc import Mapping

from openo3_jax import tasks
from openo3_jax.config import (
    GSPOConfig,
    LoRAConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
    VideoConfig,
)

LORA_7B = LoRAConfig(rank=64, alpha=64.0)


def sft_7b() -> SFTConfig:
    """The paper's first stage: Qwen2.5-VL-7B, all weights, one epoch of STGR-CoT-30k (31,166 records) in batches of 8.

    openo3 sft sft_7b --model Qwen2.5-VL-7B-Instruct --data DATA_ROOT --out RUN
    Hardware: 8 x H100 80 GB. Not run by us: no weights, data or accelerators were at hand.
    Source: Open-o3-Video src/scripts/run_sft_video.sh.
    """
    return SFTConfig(steps=3896)


def sft_7b_lora() -> SFTConfig:
    """`sft_7b` with adapters of rank 64 on the decoder's linear layers: one 80 GB GPU holds it.

    openo3 sft sft_7b_lora --model Qwen2.5-VL-7B-Instruct --data DATA_ROOT --out RUN
    Not run by us. Ten times the learning rate of all weights, or more, is usual for adapters (Thinking Machines, LoRA
    Without Regret, 2025); 1e-6 x 100 is where to start a search.
    """
    return dataclasses.replace(sft_7b(), lora=LORA_7B, optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100))


def sft_tiny() -> SFTConfig:
    """A tiny model (`openo3 init-tiny`) on a handful of clips, small frames, on a CPU.

    openo3 experiment overfit --out OUT
    Hardware: 2 CPU cores. Result: docs/log.md, 29 Nov 2026.
    """
    return SFTConfig(
        steps=300,
        max_row_tokens=1024,
        compute_dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(name="muon", learning_rate=4e-3, schedule="cosine", warmup_steps=10, clip_norm=1.0),
        video=VideoConfig(min_pixels=16 * 28 * 28, max_pixels=16 * 28 * 28),
    )


_DEMO_RUN = RunConfig(save_every=25)
_DEMO_VIDEO = VideoConfig(max_frames=6, min_pixels=12 * 28 * 28, max_pixels=12 * 28 * 28)


def demo(*, steps: int = 300) -> SFTConfig:
    """First stage of `openo3 demo`: rendered clips, six frames of 84 x 112 px each, the tiny base that sees.

    openo3 demo --out OUT
    Hardware: 2 CPU cores, 3 to 7 minutes. Result: docs/demo.md.
    """
    return SFTConfig(
        steps=steps,
        batch_size=16,
        max_row_tokens=256,
        weights=((tasks.TEMPORAL, 2.0),),
        compute_dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=2e-3,
            adam_learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=10,
            clip_norm=1.0,
        ),
        run=_DEMO_RUN,
        video=_DEMO_VIDEO,
    )


def demo_gspo(*, steps: int = 72) -> GSPOConfig:
    """Second stage of `openo3 demo`: all six tasks about clips of the first, groups of eight answers.

    Part of `openo3 demo`. Hardware: 2 CPU cores, 3 to 7 minutes. Result: docs/demo.md.
    """
    return GSPOConfig(
        steps=steps,
        batch_size=12,
        sampling=SamplingConfig(num_samples=8, max_new_tokens=128, top_p=0.95),
        rules="hardened",  # without the names of objects in the reward, names are what is given up first
        compute_dtype="float32",
        remat="none",
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_steps=4, clip_norm=1.0),
        run=_DEMO_RUN,
        video=_DEMO_VIDEO,
    )


def gspo_7b() -> GSPOConfig:
    """The paper's second stage: one epoch of STGR-RL-36k (37,228 records) after `sft_7b`, groups of 4.

    openo3 gspo gspo_7b --model EXPORTED_SFT --data DATA_ROOT --out RUN
    Hardware: 8 x H100 80 GB. Not run by us: no weights, data or accelerators were at hand.
    Source: Open-o3-Video src/scripts/run_grpo_video.sh, grpo_trainer.py:306-319.
    """
    return GSPOConfig(steps=4654)


def gspo_7b_lora() -> GSPOConfig:
    """`gspo_7b` with adapters of rank 64; the model without them is the reference, so its weights exist once.

    openo3 gspo gspo_7b_lora --model EXPORTED_SFT --data DATA_ROOT --out RUN
    Hardware: one 80 GB GPU by `openo3 plan`. Not run by us.
    """
    base = gspo_7b()
    return dataclasses.replace(base, lora=LORA_7B, optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-5))


def gspo_7b_offpolicy() -> GSPOConfig:
    """`gspo_7b` with groups of 8 and four updates per rollout, clipped as in the GSPO paper (arXiv:2507.18071, 5.1).

    openo3 gspo gspo_7b_offpolicy --model EXPORTED_SFT --data DATA_ROOT --out RUN
    Hardware: 8 x H100 80 GB, not checked by `openo3 plan`. Not run by us.
    32 prompts a step: each of the four updates has one for each of 8 devices. Old log-probabilities are computed anew,
    for in bfloat16 the sampler may differ from the trainer by more than this clip is wide.
    """
    base = gspo_7b()
    return dataclasses.replace(
        base,
        steps=1164,
        batch_size=32,
        minibatches=4,
        sampling=dataclasses.replace(base.sampling, num_samples=8),
        old_logp="recompute",
        clip_low=3e-4,
        clip_high=4e-4,
    )


def grpo_7b() -> GSPOConfig:
    """`gspo_7b` with the ratio of each token (GRPO, arXiv:2402.03300).

    openo3 gspo grpo_7b --model EXPORTED_SFT --data DATA_ROOT --out RUN
    Hardware: 8 x H100 80 GB, as `gspo_7b`. Not run by us.
    """
    return dataclasses.replace(gspo_7b(), ratio="token")


def gspo_tiny() -> GSPOConfig:
    """A tiny model after `sft_tiny` on a handful of clips, small frames, on a CPU.

    openo3 experiment sharpen --data ROOT --out OUT
    Hardware: 2 CPU cores. Result: docs/log.md, 22 Nov 2026.
    """
    return GSPOConfig(
        steps=50,
        batch_size=8,
        sampling=SamplingConfig(num_samples=16, max_new_tokens=192, top_p=0.95),
        compute_dtype="float32",
        remat="none",
        max_bad_fraction=0.0,
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=4, clip_norm=1.0),
        video=VideoConfig(min_pixels=16 * 28 * 28, max_pixels=16 * 28 * 28),
    )


SFT: Mapping[str, SFTConfig] = {
    "sft_tiny": sft_tiny(),
    "sft_7b": sft_7b(),
    "sft_7b_lora": sft_7b_lora(),
    "demo": demo(),
}
GSPO: Mapping[str, GSPOConfig] = {
    "gspo_tiny": gspo_tiny(),
    "gspo_7b": gspo_7b(),
    "gspo_7b_lora": gspo_7b_lora(),
    "gspo_7b_offpolicy": gspo_7b_offpolicy(),
    "grpo_7b": grpo_7b(),
    "demo_gspo": demo_gspo(),
}
