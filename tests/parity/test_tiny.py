"""A tiny directory made offline: transformers reads it, training teaches it, the export answers there too."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from openo3_jax import policy, recipes, tiny
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, prompts, synthetic, transforms, world
from openo3_jax.experiments import overfit
from openo3_jax.train import run, sft
from parity import hf


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "model"
    tiny.init_tiny(out, seed=3)
    return out


def load_theirs(directory):
    """As a user would load it: by the Auto classes, no code of ours."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), hf.load_processor(directory)


def test_transformers_loads_it(directory, one_device):
    model, processor = load_theirs(directory)
    assert isinstance(model, transformers.Qwen2_5_VLForConditionalGeneration)
    conversation = hf.make_conversation("five images")
    with torch.no_grad():
        theirs = model(**hf.encode(processor, [conversation])).logits[0].numpy()
    ours = policy.load_pretrained(directory, mesh=one_device).logits([conversation])[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, np.abs(theirs).max()))


def test_same_seed_same_bytes(directory, tmp_path):
    tiny.init_tiny(tmp_path / "again", seed=3)
    tiny.init_tiny(tmp_path / "other", seed=4)
    weights = [(d / "model.safetensors").read_bytes() for d in (directory, tmp_path / "again", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]


@pytest.fixture(scope="module")
def learned(directory, tmp_path_factory, one_device):
    """Five rendered records, one of each SFT task, learned by heart from random weights."""
    root = tmp_path_factory.mktemp("learned")
    synthetic.write_dataset(root / "data", num_train=5, seed=11, config=world.WorldConfig(num_frames=20))
    recipe = recipes.sft_tiny()
    config = dataclasses.replace(
        recipe,
        steps=160,
        batch_size=5,
        max_row_tokens=512,
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=6e-3),
        video=VideoConfig(max_frames=4, min_pixels=6 * 28 * 28, max_pixels=6 * 28 * 28),
    )
    with jax.default_matmul_precision("highest"):
        trained = sft.run_sft(
            model=directory,
            data=root / "data",
            out=root / "run",
            config=config,
            mesh=one_device,
            stop=lambda _, values: values["sft/loss"] < overfit.STOP_LOSS,
        )
    trained.save_pretrained(root / "export")
    return root, config, trained


def test_learns_records_by_heart(learned):
    root, config, trained = learned
    losses = [json.loads(line)["sft/loss"] for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 4.0 and losses[-1] < overfit.OVERFIT_LOSS
    records = annotations.load_stage(root / "data", "sft")
    for target, said in overfit.answers(trained, records, root / "data", config):
        assert said == target


def test_the_run_can_be_exported_again(learned, tmp_path, one_device):
    root, _, trained = learned
    run.load(root / "run", mesh=one_device).save_pretrained(tmp_path / "export")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "export" / name).read_bytes() == (root / "export" / name).read_bytes()
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (root / "export" / file).read_bytes() == (trained.directory / file).read_bytes()


def test_the_export_answers_in_transformers(learned):
    """Greedy, with transformers' own template, tokenizer and image processor on the same frames."""
    root, config, _ = learned
    model, processor = load_theirs(root / "export")
    records = annotations.load_stage(root / "data", "sft")
    prepared = transforms.prepare_all(
        records, root / "data", "sft", config=config.video, wording=prompts.load_prompts()
    )
    for one in prepared:
        assert hf.answer(model, processor, one.messages[:-1]) == one.messages[-1]["content"][0]["text"]
