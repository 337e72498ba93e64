"""Frozen settings with units and validation: what the model is, how media become frames, how training runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from openo3_jax.errors import InputError

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"

# What the backward pass finds of a layer; the rest it computes again. "layers": the residual stream before the layer;
# "attention": that and attention's results, so that attention runs once; "dots": those and every product with a
# weight; "none": everything.
Remat = Literal["none", "layers", "attention", "dots"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower. Sizes in px are of the resized picture; field names follow the HF `vision_config`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int  # equals the text model's hidden_size
    fullatt_block_indexes: tuple[int, ...]  # these layers attend over a whole frame, the others within windows
    patch_size: int = 14  # px
    temporal_patch_size: int = 2  # frames
    spatial_merge_size: int = 2  # patches per side of a merged visual token
    window_size: int = 112  # px
    in_channels: int = 3
    tokens_per_second: int = 2  # time ids per second of native video
    # Of R, G, B / 255, as preprocessor_config.json has them (config.json does not): the tower normalises bytes itself.
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise InputError(
                f"vision_config: hidden_size={self.hidden_size} over num_heads={self.num_heads} must give a head "
                "size that is a multiple of 4 (2-D rotary positions split it in four)"
            )
        if self.window_size % self.merged_px:
            raise InputError(f"vision_config: window_size={self.window_size} is not a multiple of {self.merged_px} px")
        beyond = [i for i in self.fullatt_block_indexes if not 0 <= i < self.depth]
        if beyond:
            raise InputError(f"vision_config: fullatt_block_indexes {beyond} lie outside the {self.depth} layers")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: 3 channels x 2 frames x 14 x 14 = 1176."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2

    @property
    def merged_px(self) -> int:
        """Side of one visual token in px."""
        return self.patch_size * self.spatial_merge_size

    @property
    def window_patches(self) -> int:
        """Patches in a full attention window."""
        return (self.window_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder. Field names follow the HF text config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    mrope_section: tuple[int, int, int]  # rotary pairs that turn with time, row, column
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"config: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if sum(self.mrope_section) * 2 != self.head_dim:
            raise InputError(
                f"config: mrope_section={list(self.mrope_section)} must add up to half the head size, "
                f"{self.head_dim // 2}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Qwen2.5-VL model: both towers and the ids that stand for pictures in the token stream."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652

    def __post_init__(self):
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise InputError(
                f"config: vision_config.out_hidden_size={self.vision.out_hidden_size} differs from "
                f"hidden_size={self.text.hidden_size}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, where: str = "config.json") -> "ModelConfig":
        """Read a `config.json`, flat (transformers 4.x, the hub) or nested under `text_config` (5.x).

        Raises InputError for another architecture, a missing field or a variant that is not built here.
        """
        if config.get("model_type") != "qwen2_5_vl":
            raise InputError(f"{where}: model_type is {config.get('model_type')!r}; expected 'qwen2_5_vl' (Qwen2.5-VL)")
        text = {**_HF_TEXT_DEFAULTS, **config, **config.get("text_config", {})}
        text |= {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        vision = {**_HF_VISION_DEFAULTS, **config.get("vision_config", {})}
        for old, new in (("in_chans", "in_channels"), ("spatial_patch_size", "patch_size")):
            vision.setdefault(new, vision.get(old, VisionConfig.__dataclass_fields__[new].default))
        for field, expected in (("hidden_act", "silu"), ("use_sliding_window", False)):
            if text.get(field, expected) != expected:
                raise InputError(f"{where}: {field}={text[field]!r} is not supported; expected {expected!r}")
        if vision.get("hidden_act", "silu") != "silu":
            raise InputError(f"{where}: vision_config.hidden_act={vision['hidden_act']!r}; expected 'silu'")
        # The hub's flat files tie at the top level; 5.x writes the flag on both levels, the outer one wins there.
        text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        ids = {f: config[f] for f in ("image_token_id", "video_token_id", "vision_start_token_id") if f in config}
        return cls(
            text=_read_fields(TextConfig, text, where),
            vision=_read_fields(VisionConfig, vision, f"{where}: vision_config"),
            **ids,
        )

    def to_hf(self) -> dict[str, Any]:
        """The flat layout that the hub's Qwen2.5-VL directories have; every transformers release reads it."""
        text = dataclasses.asdict(self.text)
        section = list(text.pop("mrope_section"))
        vision = dataclasses.asdict(self.vision)
        vision["fullatt_block_indexes"] = list(vision["fullatt_block_indexes"])
        vision["in_chans"] = vision.pop("in_channels")
        del vision["image_mean"], vision["image_std"]  # preprocessor_config.json has them
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen2_5_vl",
            **text,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "max_position_embeddings": 128000,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "use_sliding_window": False,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_config": {"model_type": "qwen2_5_vl", "hidden_act": "silu", **vision},
        }


# What transformers assumes where a config.json is silent (configuration_qwen2_5_vl.py); sizes must be stated.
_HF_TEXT_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6}
_HF_VISION_DEFAULTS = {
    "depth": 32,
    "num_heads": 16,
    "intermediate_size": 3420,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 4,
}


def _read_fields(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build `cls` from the fields it knows; lists become tuples; a missing one is named."""
    fields = dataclasses.fields(cls)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")
    known = {f.name: values[f.name] for f in fields if f.name in values}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


def _published(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vision_ffn: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        text=TextConfig(
            vocab_size=151936 if tied else 152064,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
            mrope_section=(16, 24, 24),
        ),
        vision=VisionConfig(
            depth=32,
            hidden_size=1280,
            intermediate_size=vision_ffn,
            num_heads=16,
            out_hidden_size=hidden,
            fullatt_block_indexes=(7, 15, 23, 31),
        ),
    )


# The published sizes of Qwen2.5-VL (config.json of the hub's Instruct models).
QWEN2_5_VL: Mapping[str, ModelConfig] = {
    "3b": _published(2048, 11008, 36, 16, 2, 3420, tied=True),
    "7b": _published(3584, 18944, 28, 28, 4, 3420, tied=False),
    "32b": _published(5120, 27648, 64, 40, 8, 3456, tied=False),
    "72b": _published(8192, 29568, 80, 64, 8, 3456, tied=False),
}


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
    best: str | None = None  # metric that decides which checkpoint is the best, such as eval/accuracy
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
    rules: str = "paper"  # of the rewards: paper, released or hardened
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
        if self.workers < 0 or not 0 <= self.max_bad_fraction < 1:
            raise InputError(
                f"gspo: workers={self.workers} and max_bad_fraction={self.max_bad_fraction}; expected workers >= 0 and "
                "a share in [0, 1)"
            )

    @property
    def updates(self) -> int:
        """Of the weights, in the whole run."""
        return self.steps * self.minibatches
