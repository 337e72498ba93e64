"""What a run compiles: named in its log, and nothing new for other numbers of samples, frames or tokens in a bucket."""

import dataclasses

import jax
import numpy as np
import pytest

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import GSPOConfig, SamplingConfig, SFTConfig
from openo3_jax.data import groups, packing, rl_prompts
from openo3_jax.rewards.score import Rewards
from openo3_jax.train import machine, rollout, state, steps

SFT = SFTConfig(steps=9, compute_dtype="float32", remat="none")
GSPO = GSPOConfig(
    steps=9,
    batch_size=4,
    compute_dtype="float32",
    remat="none",
    sampling=SamplingConfig(num_samples=2, max_new_tokens=8),
)
FRAME = np.zeros((56, 56, 3), np.uint8)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    mesh = mesh_lib.make_mesh({"fsdp": 2}, devices=jax.devices()[:2])
    return small.make_policy(tmp_path_factory.mktemp("model"), mesh)


def sample(policy, frames, words, answer=None):
    """A conversation with so many frames and words."""
    pictures = [{"type": "image", "image": FRAME}] * frames
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": "see " * words}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": "at " * answer})
    return policy.encode([messages])[0]


class Programs:
    """Names of the programs that are compiled while the `with` block runs."""

    def __enter__(self):
        self.names = []
        self._listen = lambda event, _, fun_name="", **__: self.names.append(fun_name) if "backend_" in event else None
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)


def test_the_sft_step_compiles_once_for_a_bucket(policy):
    bucket = packing.Bucket(rows=4, seq=768, patches=256, windows=32, frames={16: 16}, targets=64)
    step, training = steps.make_sft_step(SFT), state.make_state(policy, SFT)
    batches = {  # (frames, words, answer) of each sample, row by row
        "full": [[(4, 20, 5)], [(2, 9, 9), (1, 5, 3)], [(4, 30, 2)], [(1, 3, 20)]],
        "fewer samples": [[(4, 20, 5)]],
        "other frames": [[(1, 20, 5)], [(6, 9, 9)]],
        "longer prompts": [[(2, 90, 5)], [(2, 60, 30)], [(0, 70, 3)]],
    }
    made = [[[sample(policy, *one) for one in row] for row in rows] for rows in batches.values()]
    counts = []
    for rows in made:
        batch = packing.make_batch(rows, bucket, policy.config, pad_id=policy.processor.pad_id)
        with Programs() as compiled:
            training, measured = step(training, mesh_lib.shard_rows(batch, policy.mesh))
            assert np.isfinite(float(measured["loss"]))
        counts.append([name for name in compiled.names if "sft_step" in name])
        assert counts[0] or not compiled.names, compiled.names
    assert [len(names) for names in counts] == [1, 0, 0, 0]


def test_rollout_and_update_compile_once_for_a_bucket(policy):
    """From the second step on nothing is compiled: other numbers of prompts, frames, tokens, and other lengths."""
    steps_ = [  # (frames, words) of each prompt; None: a prompt that could not be used
        [(4, 60), (2, 30), (1, 10), (4, 20)],
        [(2, 50), (1, 5)],
        [(1, 60), None, (3, 3), (4, 33)],
    ]
    jax.clear_caches()  # of other tests of this process
    step, training = steps.make_gspo_step(GSPO), state.make_state(policy, GSPO)
    prompt_bucket, group_bucket = rollout.GrowingBucket(), rollout.GrowingBucket()
    names = []
    for number, wanted in enumerate(steps_):
        samples = [None if one is None else sample(policy, *one) for one in wanted]
        prompts = [None if s is None else rl_prompts.Prompt(i, {"task": "t"}, s) for i, s in enumerate(samples)]
        bucket = prompt_bucket(dataclasses.replace(policy.bucket([s for s in samples if s]), rows=4))
        # The longest group that there can be, as after some steps of a run.
        room = [packing.Size(len(s.tokens), 0, s.grids) for s in samples if s]
        longest = [[np.zeros(8, np.int32)] * 2] * len(room)
        group_bucket(groups.group_bucket(room, longest, policy.config.vision, num_rows=4))
        with Programs() as compiled:
            out = policy.continue_samples(
                samples, GSPO.sampling, [number + i for i in range(len(samples))], bucket=bucket
            )
            sampled = rollout.Groups(prompts, out, *rollout.judge(prompts, out, GSPO, reward, 1.0))
            rollouts = rollout.make_rollouts(policy, sampled, slice(0, 4), GSPO, group_bucket)
            training, measured = step(training, rollouts)
            assert np.isfinite(float(measured["loss"]))
        names.append(compiled.names)
    large = ("decode", "prefill", "gspo_step")
    assert [sum(part in name for name in names[0]) for part in large] == [1, 1, 1], names[0]
    assert [[name for name in some if any(part in name for part in large)] for some in names[1:]] == [[], []]


def reward(records, texts, progress) -> Rewards:
    return Rewards({}, {}, np.float32([len(set(text)) for text in texts]))


def test_a_run_names_what_it_compiles():
    """The long programs when they are there, all of them when it ends."""
    lines = []
    with machine.Machine(lines.append) as computer:
        machine_before = computer.values()
        assert machine_before["time/programs"] == 0
        jax.monitoring.record_event_duration_secs(machine._COMPILED, 12.34, fun_name="jit(sft_step)")
        jax.monitoring.record_event_duration_secs(machine._COMPILED, 0.01, fun_name="jit(add)")
        jax.monitoring.record_event_duration_secs(machine._COMPILED, 3.0, fun_name="jit(sft_step)")
        assert computer.values()["time/programs"] == 3
    assert lines == [
        "compiled jit(sft_step) in 12.3 s, program 1 of this run",
        "compiled jit(sft_step) in 3.0 s, program 3 of this run",
        "compiled 3 programs in 15.3 s: jit(sft_step) 2 x, 15.3 s; jit(add) 1 x, 0.0 s",
    ]
    jax.monitoring.record_event_duration_secs(machine._COMPILED, 9.0, fun_name="jit(other)")
    assert len(lines) == 3
