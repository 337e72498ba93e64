"""What a Qwen2.5-VL model is: the sizes of its towers, read from and written as a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from openo3_jax.errors import InputError

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"


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
