"""Adapters that we write are loaded by `peft` onto transformers' model with equal logits, and the other way round."""

import dataclasses
import json

import jax
import numpy as np
import peft
import pytest
import torch

from openo3_jax import policy as policy_lib
from openo3_jax.config import LoRAConfig, SFTConfig
from openo3_jax.errors import InputError
from openo3_jax.train import state as state_lib
from parity import hf

SHAPE = "gqa 3:1, two full blocks, tied"
TARGETS = LoRAConfig(
    rank=4, alpha=6.0, text=("q_proj", "k_proj", "o_proj", "gate_proj"), vision=("qkv", "down_proj", "fc1", "fc2")
)
TOLERANCE = 2e-4  # of logits of size 10; parity of the base is 1e-4 of size 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory, transformers' processor, a conversation with pictures."""
    directory = tmp_path_factory.mktemp("base")
    hf.write_directory(SHAPE, directory)
    return directory, hf.load_processor(directory), hf.make_conversation("five images")


@pytest.fixture(scope="module")
def ours(base, one_device):
    """A policy with adapters that matter."""
    policy = policy_lib.load_pretrained(base[0], mesh=one_device)
    state = state_lib.make_state(policy, SFTConfig(steps=1, compute_dtype="float32", lora=TARGETS))
    draw = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + draw.normal(size=x.shape).astype(np.float32) * 0.1, state.params)
    return state_lib.trained_policy(policy, dataclasses.replace(state, params=moved))


def their_logits(model, base):
    inputs = hf.encode(base[1], [base[2]])
    with torch.no_grad():
        return model(**inputs).logits[0].numpy()


def load_theirs(base):
    return hf.Qwen2_5_VLForConditionalGeneration.from_pretrained(base[0], attn_implementation="eager").float().eval()


def test_peft_loads_our_adapter(base, ours, one_device, tmp_path):
    ours.save_adapter(tmp_path / "adapter")
    expected = ours.logits([base[2]])[0]
    plain = load_theirs(base)
    assert np.abs(their_logits(plain, base) - expected).max() > 0.1
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    np.testing.assert_allclose(their_logits(theirs.eval(), base), expected, atol=TOLERANCE)
    names = {name for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert len(names) == 2 * 4 + 4 * 2 + 2, "each named layer of both towers, and no other"
    again = policy_lib.load_pretrained(tmp_path / "adapter", mesh=one_device)
    np.testing.assert_allclose(again.logits([base[2]])[0], expected, atol=TOLERANCE)


def test_merged_export(base, ours, tmp_path):
    ours.save_pretrained(tmp_path / "merged")
    merged = load_theirs((tmp_path / "merged",))
    np.testing.assert_allclose(their_logits(merged, base), ours.logits([base[2]])[0], atol=TOLERANCE)


@pytest.fixture
def theirs(base, tmp_path):
    """An adapter made by peft, on some layers of the decoder; its logits."""
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj", "up_proj"], layers_to_transform=[1])
    torch.manual_seed(0)
    model = peft.get_peft_model(load_theirs(base), settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", their_logits(model, base)


def test_an_adapter_made_by_peft(base, theirs, one_device):
    """Only one of the layers has adapters; peft's file names the base."""
    policy = policy_lib.load_pretrained(theirs[0], mesh=one_device)
    np.testing.assert_allclose(policy.logits([base[2]])[0], theirs[1], atol=TOLERANCE)
    assert policy.directory == base[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}, "is 'Qwen/Qwen2.5-VL-7B-Instruct'; expected the"),
        ({"use_dora": True}, "use_dora is True; expected False: plain LoRA"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 0}, "r is 0; expected a positive number"),
        ({"r": 4}, "6 tensors do not fit: misshapen"),
    ],
)
def test_other_adapters_are_refused(theirs, change, message, one_device):
    file = theirs[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError) as caught:
        policy_lib.load_pretrained(theirs[0], mesh=one_device)
    assert message in str(caught.value)
