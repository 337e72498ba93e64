import dataclasses

import numpy as np

from openo3_jax.config import GSPOConfig
from openo3_jax.data import annotations, prompts, rl_prompts, synthetic, transforms

CONFIG = GSPOConfig(steps=6, batch_size=4, seed=2, workers=2)


def make(root, processor, config=CONFIG):
    records = annotations.load_stage(root, "rl")
    return rl_prompts.Prompts(records, root, processor, config, prompts.load_prompts())


def test_prompts_of_a_step_are_records_ready_for_model_and_rewards(root, processor):
    records = annotations.load_stage(root, "rl")
    with make(root, processor) as source:
        steps = [source(step) for step in range(5)]
        assert source(1).good[0].index == steps[1].good[0].index
    seen = [prompt.index for step in steps for prompt in step.good]
    assert sorted(seen) == list(range(20)) and not any(step.bad for step in steps)
    prompt = steps[0].good[2]
    wording = prompts.load_prompts()
    prepared = transforms.prepare_all([records[prompt.index]], root, "rl", config=CONFIG.video, wording=wording)[0]
    np.testing.assert_array_equal(prompt.sample.tokens, processor.encode(prepared.messages).tokens)
    np.testing.assert_array_equal(prompt.sample.patches, processor.encode(prepared.messages).patches)
    assert prompt.record == prepared.reward_record


def test_bad_records_are_left_out_and_told(root, processor, tmp_path):
    synthetic.write_dataset(tmp_path, num_train=8, seed=1)
    broken = annotations.load_stage(tmp_path, "rl")[2]
    for path in tmp_path.glob(f"videos/**/{broken['video_path']}"):
        path.write_text("nothing")
    with make(tmp_path, processor) as source:
        steps = [source(step) for step in range(2)]
    bad = [one for step in steps for one in step.bad]
    assert [one.index for one in bad] == [2] and "cannot be decoded" in bad[0].error
    assert sorted(prompt.index for step in steps for prompt in step.good) == [0, 1, 3, 4, 5, 6, 7]


def test_prompts_of_like_length_meet(root, processor):
    """With enough batches for several classes, lengths differ less within a step than among all records."""
    config = dataclasses.replace(CONFIG, weights=(("visual QA", 20.0),), steps=40)
    with make(root, processor, config) as source:
        assert len(source._plans.classes) > 1
        steps = [source(step) for step in range(source._plans.epochs.num_batches)]
    spreads = [np.ptp([len(prompt.sample.tokens) for prompt in step.good]) for step in steps]
    lengths = [len(prompt.sample.tokens) for step in steps for prompt in step.good]
    assert np.mean(spreads) < 0.5 * np.ptp(lengths)
