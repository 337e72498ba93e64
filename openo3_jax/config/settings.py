"""Frozen settings with units and validation: how media become frames, how tokens are drawn, how training runs."""

import dataclasses
from typing import Literal

from openo3_jax.errors import InputError

# What the backward pass finds of a layer; the rest it computes again. "layers": the residual stream before the layer;
# "attention": that and the results of the decoder's attention, which then runs once; "dots": those and the two wide
# products of every MLP, which are most of a layer's arithmetic; "none": everything.
Remat = Literal["none", "layers", "attention", "dots"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How a clip becomes frames. Defaults are the reference's (vision_process.py:25-42)."""

    fps: float = 2.0  # frames taken per second of video
    min_frames: int = 4
    max_frames: int = 16
    min_pixels: int = 128 * 28 * 28  # per frame, after the resize
    max_pixels: int = 128 * 28 * 28  # per frame; the effective cap is at least 1.05 times min_pixels
    total_pixels: int = int(128_000 * 28 * 28 * 0.9)  # over all frames of a clip
    frame_times: Literal["true", "released"] = "true"  # true presentation time, or the reference's i / sample_fps
    key_frames: Literal["merge", "released", "none"] = "merge"  # annotated frames among the uniform ones (training)
    decoder: Literal["pyav", "decord"] = "pyav"
    deadline_s: float = 60.0  # a decode that takes longer is killed
    max_side_px: int = 16_384  # of the source picture; larger is refused before decoding

    def __post_init__(self):
        if self.min_frames < 2 or self.max_frames < self.min_frames:
            raise InputError(f"frames: need 2 <= min_frames <= max_frames, got {self.min_frames}, {self.max_frames}")
        if self.max_pixels < 28 * 28:
            raise InputError(f"max_pixels={self.max_pixels} holds no 28x28 visual token; use at least 784")
        if self.min_pixels > self.max_pixels:
            raise InputError(
                f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}; expected at most that: give both "
                "--video.min-pixels and --video.max-pixels (of eval: --min-pixels and --max-pixels)"
            )
        if self.fps <= 0 or self.deadline_s <= 0:
            raise InputError(f"fps={self.fps} and deadline_s={self.deadline_s} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn. Log-probabilities are always those of the raw logits."""

    num_samples: int = 1  # per conversation; they share its prefix
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    repetition_penalty: float = 1.0  # of tokens that the prompt or the answer has already; 1 is off, above discourages

    def __post_init__(self):
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise InputError(
                f"sampling: num_samples={self.num_samples} and max_new_tokens={self.max_new_tokens} must be at least 1"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise InputError(
                f"sampling: need temperature >= 0, 0 < top_p <= 1, top_k >= 0; got {self.temperature}, {self.top_p}, "
                f"{self.top_k}"
            )
        if self.repetition_penalty <= 0:
            raise InputError(f"sampling: need repetition_penalty > 0; got {self.repetition_penalty}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as the reference's, or Muon for matrices with AdamW for the rest; gradients clipped by global norm."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-6  # at its peak
    adam_learning_rate: float | None = None  # with muon, of what AdamW updates; None: learning_rate
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # from the peak to 0 over the run
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 5.0  # of the whole gradient

    def __post_init__(self):
        if self.learning_rate <= 0 or self.clip_norm <= 0 or self.warmup_steps < 0:
            raise InputError(
                f"optimizer: need learning_rate > 0, clip_norm > 0, warmup_steps >= 0; got {self.learning_rate}, "
                f"{self.clip_norm}, {self.warmup_steps}"
            )
        if self.adam_learning_rate is not None and (self.name != "muon" or self.adam_learning_rate <= 0):
            raise InputError(
                f"optimizer: adam_learning_rate={self.adam_learning_rate} with {self.name}; expected a positive number "
                'with name="muon" (AdamW has learning_rate alone)'
            )


# Linear layers that may have an adapter, by their names in the model (`hf_mapping.py`).
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION_TARGETS = ("qkv", "proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")  # fc1, fc2: the merger's


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Adapters (arXiv:2106.09685) instead of the weights: `y = x W + b + (alpha / rank) (x A) B`, W and b frozen.

    The frozen weights are held in the dtype of computation, without moments and without a float32 copy.
    """

    rank: int = 16
    alpha: float = 32.0
    text: tuple[str, ...] = TEXT_TARGETS  # layers of the decoder
    vision: tuple[str, ...] = ()  # layers of the vision tower, some of VISION_TARGETS

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise InputError(f"lora: rank={self.rank} and alpha={self.alpha}; expected rank >= 1 and alpha > 0")
        for field, names, known in (("text", self.text, TEXT_TARGETS), ("vision", self.vision, VISION_TARGETS)):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise InputError(f"lora: {field} names {', '.join(unknown)}; expected some of {', '.join(known)}")
        if not self.text and not self.vision:
            raise InputError("lora: text and vision name no layer, so nothing would be trained; name at least one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run keeps and watches. A run may be resumed with other values."""

    save_every: int = 200  # steps between checkpoints; the last step is always saved
    keep_last: int = 2  # checkpoints; the best one stays as well
    best: str | None = None  # metric that decides which checkpoint is the best, such as reward/total
    best_is: Literal["highest", "lowest"] = "highest"
    patience: int = 0  # values of `best` in a row without improvement that end the run; 0: never
    nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does; never an update
    stuck_after_s: float = 900.0  # without progress, until it is said where each thread is; 0: never
    tensorboard: bool = True  # event files beside metrics.jsonl
    wandb: str | None = None  # project of Weights & Biases to log to; needs the package wandb
    heartbeat_timeout_seconds: int = 20  # of silence, until a process of a run over several counts as gone

    def __post_init__(self):
        if self.heartbeat_timeout_seconds < 2:
            raise InputError(f"run: heartbeat_timeout_seconds={self.heartbeat_timeout_seconds}; expected at least 2")
        if self.save_every < 1 or self.keep_last < 1 or self.patience < 0 or self.stuck_after_s < 0:
            raise InputError(
                f"run: need save_every >= 1, keep_last >= 1, patience >= 0, stuck_after_s >= 0; got {self.save_every}, "
                f"{self.keep_last}, {self.patience}, {self.stuck_after_s}"
            )
        if self.patience and self.best is None:
            raise InputError(f"run: patience={self.patience} counts values of a metric; name it by run.best")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """How the processes of a run over several hosts find each other. No setting of the run: nothing of it is saved."""

    distributed: bool = False  # find the others as the cluster says: Slurm, GKE, Cloud TPU, Open MPI
    coordinator: str | None = None  # HOST:PORT of the first process, where no cluster says
    num_processes: int | None = None
    process_id: int | None = None  # of this one, from 0

    def __post_init__(self):
        given = (self.coordinator, self.num_processes, self.process_id)
        if given == (None, None, None):
            return
        if None in given or self.distributed:
            raise InputError(
                f"hosts: coordinator={self.coordinator}, num_processes={self.num_processes}, process_id="
                f"{self.process_id}, distributed={self.distributed}; expected all of the three, or distributed alone"
            )
        if not self.coordinator.rpartition(":")[2].isdecimal() or not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"hosts: coordinator={self.coordinator}, process_id={self.process_id} of num_processes="
                f"{self.num_processes}; expected HOST:PORT and 0 <= process_id < num_processes"
            )

    @property
    def is_distributed(self) -> bool:
        return self.distributed or self.coordinator is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Stage one. Defaults are the reference's (run_sft_video.sh); its loss was on all text, ours on the answers."""

    steps: int  # optimizer updates
    batch_size: int = 8  # samples per update, over all devices
    max_row_tokens: int = 4096  # samples are packed into rows up to this; a longer sample has a row of its own
    seed: int = 0  # order of the records
    weights: tuple[tuple[str, float], ...] = ()  # (task or source, how often its records are seen in an epoch)
    workers: int = 0  # decoding processes on each host; 0: one per core, at most 32
    max_bad_fraction: float = 0.01  # share of the records that may be unreadable before the run stops
    loss_on: Literal["assistant", "released"] = "assistant"  # "released": all text, as the reference's code does
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # weights stay float32 in the state
    remat: Remat = "layers"  # what the forward pass keeps for the backward pass; the rest is computed again
    lora: LoRAConfig | None = None  # what is trained in the place of the weights; None: all weights are
    optimizer: OptimizerConfig = OptimizerConfig()
    video: VideoConfig = VideoConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or self.max_row_tokens < 1:
            raise InputError(
                f"sft: steps={self.steps}, batch_size={self.batch_size} and max_row_tokens={self.max_row_tokens} "
                "must be at least 1"
            )
        if self.seed < 0:
            raise InputError(f"sft: seed={self.seed}; expected 0 or more")
        if self.workers < 0 or not 0 <= self.max_bad_fraction < 1:
            raise InputError(
                f"sft: workers={self.workers} and max_bad_fraction={self.max_bad_fraction}; expected workers >= 0 and "
                "a share in [0, 1)"
            )

    @property
    def updates(self) -> int:
        """Of the weights, in the whole run."""
        return self.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How rewards of a group become advantages. Defaults are the released trainer's (grpo_trainer.py:675-681)."""

    scale: Literal["group", "batch", "none"] = "group"  # deviation to divide by; none: Dr.GRPO (arXiv:2503.20783)
    std_floor: float = 1e-4  # added to the standard deviation
    unbiased: bool = True  # divide the sum of squares by one less than the number
    drop_equal: bool = False  # a group of equal rewards teaches nothing: leave it out of the loss

    def __post_init__(self):
        if self.std_floor < 0:
            raise InputError(f"advantages: std_floor={self.std_floor}; expected >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSPOConfig:
    """Stage two. Defaults are the reference's (run_grpo_video.sh, grpo_trainer.py:306-319).

    A step samples a group for each of `batch_size` prompts, scores it, and makes `minibatches` updates from it.
    """

    steps: int  # rollouts
    batch_size: int = 8  # prompts per step, over all devices
    minibatches: int = 1  # updates per step; each has an equal share of the prompts
    seed: int = 0  # order of the records, and sampling
    weights: tuple[tuple[str, float], ...] = ()  # (task or source, how often its records are seen in an epoch)
    workers: int = 0  # decoding processes on each host; 0: one per core, at most 32
    sampling: SamplingConfig = SamplingConfig(num_samples=4, max_new_tokens=768, top_p=0.95, top_k=50)
    rules: str = "paper"  # of the rewards: paper, released or hardened, with changes if any: "paper,gate_s=1"
    cut: Literal["score", "zero", "drop"] = "score"  # completions that reach max_new_tokens: what becomes of them
    advantages: AdvantageConfig = AdvantageConfig()
    ratio: Literal["sequence", "token"] = "sequence"  # GSPO (arXiv:2507.18071), or GRPO (arXiv:2402.03300)
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    kl_coef: float = 0.04  # of the divergence from the frozen first policy; 0: no such policy is kept
    reduction: Literal["sequence_mean", "token_mean"] = "sequence_mean"  # of the loss, over the batch
    old_logp: Literal["rollout", "recompute"] = "rollout"  # by the sampler, or by the training forward
    importance_cap: float | None = None  # weigh by min(p_old / p_sampler, cap); needs old_logp="recompute"
    max_bad_fraction: float = 0.01  # share of prompts whose media may be unreadable before the run stops
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # weights stay float32 in the state
    remat: Remat = "layers"  # what the forward pass keeps for the backward pass; the rest is computed again
    lora: LoRAConfig | None = None  # what is trained in the place of the weights; None: all weights are
    optimizer: OptimizerConfig = OptimizerConfig(schedule="cosine", weight_decay=0.01)
    video: VideoConfig = VideoConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or self.minibatches < 1:
            raise InputError(
                f"gspo: steps={self.steps}, batch_size={self.batch_size} and minibatches={self.minibatches} must be "
                "at least 1"
            )
        if self.batch_size % self.minibatches:
            raise InputError(f"gspo: minibatches={self.minibatches} do not divide batch_size={self.batch_size} prompts")
        if self.sampling.num_samples < 2:
            raise InputError(
                "gspo: sampling.num_samples=1; a reward is compared with the others of its group, so use at least 2"
            )
        if self.sampling.temperature == 0:
            raise InputError("gspo: sampling.temperature=0 draws the same completion again and again; use 1")
        if self.clip_low < 0 or self.clip_high < 0 or self.clip_low >= 1 or self.kl_coef < 0:
            raise InputError(
                f"gspo: need 0 <= clip_low < 1, clip_high >= 0, kl_coef >= 0; got {self.clip_low}, {self.clip_high}, "
                f"{self.kl_coef}"
            )
        if self.importance_cap is not None and (self.old_logp != "recompute" or self.importance_cap <= 0):
            raise InputError(
                f"gspo: importance_cap={self.importance_cap} with old_logp={self.old_logp!r}; expected a positive cap "
                'and old_logp="recompute": the weights compare the sampler with the training forward'
            )
        if self.seed < 0:
            raise InputError(f"gspo: seed={self.seed}; expected 0 or more")
        if self.workers < 0 or not 0 <= self.max_bad_fraction < 1:
            raise InputError(
                f"gspo: workers={self.workers} and max_bad_fraction={self.max_bad_fraction}; expected workers >= 0 and "
                "a share in [0, 1)"
            )

    @property
    def updates(self) -> int:
        """Of the weights, in the whole run."""
        return self.steps * self.minibatches
