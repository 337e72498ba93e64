"""Published sizes, both layouts of config.json, and what is refused."""

import dataclasses
import json
import math

import jax
import pytest
import transformers

import small
from openo3_jax import config_json, recipes
from openo3_jax.config import (
    QWEN2_5_VL,
    GSPOConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    SFTConfig,
    VideoConfig,
)
from openo3_jax.errors import InputError
from openo3_jax.models import qwen2_5_vl


@pytest.mark.parametrize("size", QWEN2_5_VL)
def test_published_sizes_survive_their_json(size):
    config = QWEN2_5_VL[size]
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("size", QWEN2_5_VL)
def test_nested_layout_reads_the_same(size):
    """transformers 5: the decoder under `text_config`, theta and sections in `rope_parameters`."""
    flat = QWEN2_5_VL[size].to_hf()
    outer = {"architectures", "model_type", "vision_config", "tie_word_embeddings"} | {
        key for key in flat if key.endswith("_token_id")
    }
    text = {key: value for key, value in flat.items() if key not in outer}
    theta, scaling = text.pop("rope_theta"), text.pop("rope_scaling")
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "mrope_section": scaling["mrope_section"]}
    nested = {key: flat[key] for key in outer} | {"text_config": {"model_type": "qwen2_5_vl_text", **text}}
    nested["vision_config"] = {**flat["vision_config"], "in_channels": flat["vision_config"]["in_chans"]}
    del nested["vision_config"]["in_chans"]
    assert ModelConfig.from_hf(nested) == QWEN2_5_VL[size]
    assert ModelConfig.from_hf(nested | {"hidden_size": 1, "vocab_size": 1}) == QWEN2_5_VL[size], "the inner level wins"


def test_outer_tie_flag_wins():
    config = small.model_config(tied=True).to_hf()
    assert ModelConfig.from_hf(config | {"text_config": {"tie_word_embeddings": False}}).text.tie_word_embeddings


# As the hub counts the published models.
@pytest.mark.parametrize(("size", "expected"), [("7b", 8_292_166_656), ("3b", 3_754_622_976)])
def test_number_of_parameters(size, expected, one_device):
    """Built under `eval_shape`: shapes without memory."""
    _, abstract = qwen2_5_vl.abstract_params(QWEN2_5_VL[size], one_device)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; expected 'qwen2_5_vl'"),
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; expected 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"num_attention_heads": 3}, "hidden_size=32 is not a multiple of"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of"),
        (
            {"rope_scaling": {"mrope_section": [1, 1, 1]}},
            "[1, 1, 1] must add up to half the head size, 4",
        ),
        ({"hidden_size": 64, "rope_scaling": {"mrope_section": [4, 2, 2]}}, "out_hidden_size=32 differs from"),
    ],
)
def test_other_models_are_refused(change, message):
    with pytest.raises(InputError) as caught:
        ModelConfig.from_hf(small.model_config().to_hf() | change)
    assert message in str(caught.value)


def test_missing_fields_are_named():
    config = small.model_config().to_hf()
    del config["hidden_size"], config["num_hidden_layers"]
    with pytest.raises(InputError, match=r"config\.json: missing hidden_size, num_hidden_layers"):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VideoConfig(min_frames=1), "need 2 <= min_frames <= max_frames, got 1, 16"),
        (lambda: VideoConfig(max_pixels=783), "max_pixels=783 holds no 28x28 visual token"),
        (
            lambda: VideoConfig(max_pixels=50_176),
            "min_pixels=100352 is above max_pixels=50176; expected at most that: give both --video.min-pixels and "
            "--video.max-pixels",
        ),
        (lambda: VideoConfig(fps=0.0), "must be positive"),
        (lambda: SamplingConfig(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (lambda: SamplingConfig(temperature=-0.1), "need temperature >= 0"),
        (lambda: SamplingConfig(top_p=0.0), "0 < top_p <= 1"),
        (lambda: SamplingConfig(top_k=-1), "top_k >= 0"),
        (lambda: OptimizerConfig(learning_rate=0.0), "need learning_rate > 0"),
        (lambda: OptimizerConfig(adam_learning_rate=1e-3), 'with adamw; expected a positive number with name="muon"'),
        (lambda: SFTConfig(steps=0), "steps=0"),
        (lambda: SFTConfig(steps=1, seed=-1), "sft: seed=-1; expected 0 or more"),
        (lambda: GSPOConfig(steps=1, seed=-1), "gspo: seed=-1; expected 0 or more"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)


# ---- settings of a run <-> JSON ----


def test_settings_survive_their_json():
    for recipe in (*recipes.SFT.values(), *recipes.GSPO.values()):
        changed = dataclasses.replace(recipe, weights=(("visual QA", 2.0), ("GQA", 0.5)), steps=7)
        text = json.dumps(config_json.to_json(changed))
        assert config_json.from_json(type(recipe), json.loads(text), "config.json") == changed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 3, "setps": 4}, "run: unknown field setps; expected some of steps, batch_size"),
        ({}, "run: missing steps"),
        ({"steps": "3"}, "run: steps is '3'; expected int"),
        ({"steps": 3.5}, "run: steps is 3.5; expected int"),
        ({"steps": True}, "run: steps is True; expected int"),
        ({"steps": 3, "remat": "yes"}, "run: remat is 'yes'"),
        ({"steps": 3, "loss_on": "all"}, "run: loss_on is 'all'; expected assistant | released"),
        ({"steps": 3, "optimizer": 1}, "run: optimizer is 1; expected an object"),
        ({"steps": 3, "optimizer": {"lr": 1}}, "run: optimizer: unknown field lr"),
        ({"steps": 3, "weights": [["a", "b"]]}, "run: weights is 'b'; expected float"),
        ({"steps": 3, "run": {"best": 3}}, "run: run: best is 3"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_settings_that_are_not_understood(values, message):
    with pytest.raises(InputError) as caught:
        config_json.from_json(SFTConfig, values, "run")
    assert message in str(caught.value)


def test_silence_means_what_transformers_assumes():
    """A config.json may leave out what equals the defaults of its reader."""
    settings = QWEN2_5_VL["32b"].to_hf()
    del settings["rms_norm_eps"], settings["rope_theta"]
    for field in ("depth", "num_heads", "fullatt_block_indexes", "tokens_per_second", "patch_size"):
        del settings["vision_config"][field]
    read = ModelConfig.from_hf(settings)
    assert (read.text.rms_norm_eps, read.text.rope_theta, read.vision.tokens_per_second) == (1e-5, 1e6, 4)
    assert (read.vision.depth, read.vision.num_heads, read.vision.patch_size) == (32, 16, 14)
    assert read.vision.fullatt_block_indexes == (7, 15, 23, 31)
    theirs = transformers.Qwen2_5_VLConfig(**settings)
    assert theirs.text_config.rms_norm_eps == 1e-5 and theirs.vision_config.tokens_per_second == 4
