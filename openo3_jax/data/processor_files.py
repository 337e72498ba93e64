"""The files beside the weights of a model directory -> tokenizer, chat template, image settings, stop ids."""

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

from openo3_jax import config as config_lib
from openo3_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ImageSizing(NamedTuple):
    """The range of height * width in px that stills are resized into; `smart_resize(h, w, **sizing._asdict())`."""

    min_pixels: int
    max_pixels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What preprocessor_config.json says; the sizes in px and patches equal those of the vision config."""

    sizing: ImageSizing
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_size: int
    temporal_patch_size: int
    merge_size: int


def load_model_config(directory: pathlib.Path) -> config_lib.ModelConfig:
    """config.json. Raises: InputError if it is missing, damaged, or that of a model which is not built here."""
    path = directory / "config.json"
    values = read_json(path)
    for part in ("text_config", "vision_config"):
        if not isinstance(values.get(part, {}), dict):
            raise InputError(f"{path}: {part} is {values[part]!r}; expected an object, as in the original model's")
    try:
        return config_lib.ModelConfig.from_hf(values, where=str(path))
    except (TypeError, ZeroDivisionError) as error:  # of the arithmetic that sizes must stand
        raise InputError(f"{path}: a value cannot be used ({error}); copy it from the original model") from None


def load_tokenizer(directory: pathlib.Path) -> "PreTrainedTokenizerBase":
    """The directory's own tokenizer, which must be able to say where its tokens stand in the text."""
    if not (directory / "tokenizer.json").exists() and not (directory / "vocab.json").exists():
        raise InputError(f"{directory}: has no tokenizer.json; copy the tokenizer files of the original model here")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        read_json(directory / name, default={})  # a damaged file is named here; transformers would not
    from transformers import AutoTokenizer  # here: it takes seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{directory}: transformers cannot load the tokenizer ({reason}); copy the files of the original model"
        ) from None
    if not tokenizer.is_fast:
        raise InputError(f"{directory}: the tokenizer gives no offsets; expected a Qwen2Tokenizer (tokenizer.json)")
    return tokenizer


def load_chat_template(directory: pathlib.Path, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The template of chat_template.json, the older file, which wins; None where the tokenizer has its own."""
    template = read_json(directory / "chat_template.json", default={}).get("chat_template")
    if template is None and tokenizer.chat_template is None:
        raise InputError(
            f"{directory}: has no chat template; expected chat_template.jinja, chat_template.json or an entry in "
            "tokenizer_config.json; copy it from the original model"
        )
    return template


def load_stop_ids(directory: pathlib.Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The eos ids of generation_config.json, else those of `<|im_end|>` and `<|endoftext|>`."""
    path = directory / "generation_config.json"
    stops = read_json(path, default={}).get("eos_token_id")
    if stops is None:
        stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    stops = stops if isinstance(stops, list) else [stops]
    if not stops or not all(isinstance(stop, int) for stop in stops):
        raise InputError(f"{path}: eos_token_id={stops!r}; expected a token id or a list of them")
    return tuple(stops)


def load_image_settings(directory: pathlib.Path, vision: config_lib.VisionConfig) -> ImageSettings:
    """preprocessor_config.json; `min_pixels` and `max_pixels` win over `size`, whose edges are areas in px too.

    Source: transformers 5.23 models/qwen2_vl/image_processing_pil_qwen2_vl.py (`__init__`).
    """
    path = directory / "processor_config.json"
    values = read_json(path, default={}).get("image_processor")
    if values is None:
        path = directory / "preprocessor_config.json"
        values = read_json(path)
    expected = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
    }
    for field, value in expected.items():
        if values.get(field, value) != value:
            raise InputError(f"{path}: {field}={values[field]!r}; expected {value!r}, as in config.json")
    size = values.get("size") or {}
    lowest, highest = values.get("min_pixels"), values.get("max_pixels")
    sizing = ImageSizing(
        min_pixels=size.get("shortest_edge", 56 * 56) if lowest is None else lowest,
        max_pixels=size.get("longest_edge", 1280 * 28 * 28) if highest is None else highest,
    )
    missing = [field for field in ("image_mean", "image_std") if len(values.get(field) or ()) != 3]
    if missing:
        raise InputError(f"{path}: {missing[0]} is {values.get(missing[0])!r}; expected 3 numbers, one per channel")
    return ImageSettings(
        sizing=sizing,
        mean=tuple(float(value) for value in values["image_mean"]),
        std=tuple(float(value) for value in values["image_std"]),
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )


def read_json(path: pathlib.Path, *, default: dict | None = None) -> dict[str, Any]:
    """The object in a JSON file, or `default`, if given, where there is no file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise InputError(f"{path}: no such file; copy it from the original model") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}; expected a JSON object")
    return values
