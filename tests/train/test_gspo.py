"""The step of stage two: shared prompts, the sampler against the trainer, learning, and what must be refused."""

import dataclasses

import jax
import numpy as np
import pytest

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import AdvantageConfig, GSPOConfig, OptimizerConfig, SamplingConfig
from openo3_jax.data import groups, packing, rl_prompts
from openo3_jax.errors import InputError
from openo3_jax.models import qwen2_5_vl
from openo3_jax.policy import Generations
from openo3_jax.rewards.own import make_reward
from openo3_jax.rewards.score import Rewards
from openo3_jax.train import gspo, rollout, state, steps
from openo3_jax.types import Rollouts

# ---- one row for a group, or a row each ----

MODEL = small.model_config()
STEP = GSPOConfig(
    steps=1,
    sampling=SamplingConfig(num_samples=3),
    compute_dtype="float32",
    remat="none",
    clip_low=0.01,  # so that some of the ratios below are clipped
    clip_high=0.02,
)
PROMPTS = [
    small.sample(MODEL, prompt=6, answer=3, pictures=[(4, 6), (10, 4)]),
    small.sample(MODEL, prompt=140, answer=2),  # over a block of attention
    small.sample(MODEL, prompt=2, answer=1, pictures=[(4, 4)]),
]


def make_group(seed, lengths):
    draw = np.random.default_rng(seed)
    return [draw.integers(1, small.TEXT_IDS, n).astype(np.int32) for n in lengths]


def make_rollouts(prompts, completions, values, bucket, num_rows) -> Rollouts:
    batch, completion = groups.make_group_batch(prompts, completions, bucket, MODEL, pad_id=0)
    sampled, advantage = values
    logp = groups.spread(sampled, completion.shape)
    padding = ((0, num_rows - len(advantage)), (0, 0))
    return Rollouts(
        batch=batch,
        completion=completion,
        sampled_logp=logp,
        old_logp=logp,
        advantage=np.pad(np.float32(advantage), padding),
        keep=np.pad(np.ones_like(advantage, bool), padding),
    )


@pytest.fixture(scope="module")
def models(one_device):
    graphdef, params = small.make_params(MODEL, one_device)
    return graphdef, params, small.make_params(MODEL, one_device, seed=1)[1]


@pytest.mark.parametrize("lengths", [(1, 5, 130), (2, 9, 3, 1, 6)])
def test_a_shared_prompt_gives_loss_and_gradients_of_separate_rows(models, lengths):
    """Three prompts, two with pictures, one longer than a block; groups of two to five, up to 130 tokens."""
    graphdef, params, reference = models
    size = len(lengths)
    completions = [make_group(number, np.roll(lengths, number)) for number in range(len(PROMPTS))]
    draw = np.random.default_rng(0)
    sampled = [[-4 - 0.02 * draw.normal(size=len(c)).astype(np.float32) for c in group] for group in completions]
    advantage = draw.normal(size=(len(PROMPTS), size))
    alone = [prompt for prompt in PROMPTS for _ in range(size)]
    split = [[c] for group in completions for c in group]

    @jax.jit
    def run(rollouts):
        def loss(params):
            return steps.gspo_loss(graphdef, params, reference, rollouts, STEP)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def score(prompts, completions, values):
        bucket = groups.group_bucket(prompts, completions, MODEL.vision, num_rows=len(prompts))
        return run(make_rollouts(prompts, completions, values, bucket, len(prompts)))

    (loss, parts), grads = score(PROMPTS, completions, (sampled, advantage))
    values = [[s] for group in sampled for s in group], advantage.reshape(-1, 1)
    (expected_loss, expected_parts), expected = score(alone, split, values)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for name in ("kl", "clip_fraction", "entropy", "ratio"):
        np.testing.assert_allclose(parts[name], expected_parts[name], rtol=1e-4, err_msg=name)
    for (path, mine), theirs in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        floor = 1e-7 if "k_proj" in name and "bias" in name else 0.0  # moves no softmax: rounding on both sides
        assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs) + floor, name


def test_the_step_updates_the_policy_and_not_the_reference(tmp_path):
    """Two updates on 2 x 2 x 2 devices: one program, everything where it was, the reference untouched."""
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    policy = small.make_policy(tmp_path, mesh)
    config = dataclasses.replace(STEP, steps=2, optimizer=OptimizerConfig(learning_rate=1e-3))
    prompt = policy.processor.encode([{"role": "user", "content": "Where?"}])
    completions = [[np.int32([40, 41, 42]), np.int32([43])]] * 4
    bucket = groups.group_bucket([prompt] * 4, completions, policy.config.vision, num_rows=4)
    batch, completion = groups.make_group_batch([prompt] * 4, completions, bucket, policy.config, pad_id=0)
    zeros = np.zeros(completion.shape, np.float32)
    rollouts = Rollouts(batch, completion, zeros, zeros, np.float32([[1, -1]] * 4), np.ones((4, 2), bool))
    training, step = state.make_state(policy, config), steps.make_gspo_step(config)
    places = jax.tree.map(lambda leaf: leaf.sharding, training)
    reference = jax.tree.map(np.asarray, training.reference)
    before = jax.tree.map(np.asarray, training.params)
    for _ in range(2):
        training, metrics = step(training, mesh_lib.shard_rows(rollouts, mesh))
    assert step._cache_size() == 1 and int(training.step) == 2
    assert jax.tree.map(lambda leaf: leaf.sharding, training) == places
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, training.reference), reference)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), before, training.params)
    assert min(jax.tree.leaves(moved["text"])) > 0
    assert all(np.isfinite(float(value)) for value in metrics.values())


# ---- sampler and trainer ----


@pytest.fixture(scope="module")
def policy(tmp_path_factory, one_device):
    return small.make_policy(tmp_path_factory.mktemp("policy"), one_device)


def ask(policy, *contents):
    conversations = [[{"role": "user", "content": content}] for content in contents]
    samples = policy.encode(conversations)
    return [rl_prompts.Prompt(i, {"task": "General video QA MCQ"}, sample) for i, sample in enumerate(samples)]


PICTURE = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
QUESTIONS = (
    "When does the red circle appear?",
    [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is this?"}],
    "Why?",
)
SAMPLING = SamplingConfig(num_samples=4, max_new_tokens=64)


def give_nothing(records, completions, progress):
    return Rewards({}, {}, np.zeros(len(records), np.float32))


def test_the_ratio_of_the_first_update_is_one(policy):
    """Log-probabilities of the sampler and of the training forward on rows of prompt + 4 completions."""
    config = dataclasses.replace(STEP, batch_size=3, sampling=SAMPLING)
    prompts = ask(policy, *QUESTIONS)
    out = policy.continue_samples([prompt.sample for prompt in prompts], SAMPLING, [5, 6, 7])
    sampled = rollout.Groups(prompts, out, *rollout.judge(prompts, out, config, give_nothing, 1.0))
    rollouts = rollout.make_rollouts(policy, sampled, slice(0, 3), config, rollout.GrowingBucket())
    _, parts = jax.jit(lambda params, r: steps.gspo_loss(policy.graphdef, params, None, r, config))(
        policy.params, rollouts
    )
    assert 0 < parts["logp_gap_max"] < 1e-4
    assert abs(parts["ratio"] - 1) < 1e-4
    logp = np.asarray(steps.make_score_step(config)(state.make_state(policy, config), rollouts.batch))
    np.testing.assert_allclose(logp, rollouts.sampled_logp, atol=1e-4)


def test_padding_is_what_the_rows_leave_empty(policy):
    config = dataclasses.replace(STEP, batch_size=3, minibatches=3, sampling=SAMPLING)
    prompts = [
        prompt._replace(size=packing.size_of(prompt.sample, "assistant", -1)) for prompt in ask(policy, *QUESTIONS)
    ]
    out = policy.continue_samples([prompt.sample for prompt in prompts], SAMPLING, [5, 6, 7])
    sampled = rollout.Groups(prompts, out, *rollout.judge(prompts, out, config, give_nothing, 1.0))
    kept, bucket = [slice(0, 1), slice(1, 2)], rollout.GrowingBucket()  # of the third nothing is kept
    batches = [rollout.make_rollouts(policy, sampled, rows, config, bucket) for rows in kept]
    found = gspo._padding(sampled, kept, batches)
    empty = np.concatenate([np.asarray(one.batch.segments == 0).ravel() for one in batches])
    hollow = np.concatenate([np.asarray(one.batch.vision.frame_slots < 0).ravel() for one in batches])
    assert found == pytest.approx({"data/token_waste": empty.mean(), "data/patch_waste": hollow.mean()})
    assert gspo._padding(sampled, [], []) == {}


def test_sampled_tokens_follow_the_models_distribution(policy):
    """Of 4,096 first tokens, each allowed token's share is within 5 standard errors of its softmax over the allowed."""
    num = 4096
    prompts = ask(policy, "Why?")
    sampling = SamplingConfig(num_samples=num, max_new_tokens=1)
    out = policy.continue_samples([prompts[0].sample], sampling, [3])
    first = np.array([tokens[0] for tokens in out.tokens[0]])
    logits = policy.logits([[{"role": "user", "content": "Why?"}]])[0][-1].astype(np.float64)
    logits[policy.processor.banned_ids(policy.config.text.vocab_size)] = -np.inf
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    share = np.bincount(first, minlength=len(logits)) / num
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / num) + 1 / num).all()
    assert share[expected > 0.05].size > 0  # the test can see a wrong temperature


# ---- learning ----

TOY = GSPOConfig(
    steps=40,
    batch_size=4,
    sampling=SamplingConfig(num_samples=8, max_new_tokens=8),
    kl_coef=0.0,
    compute_dtype="float32",
    remat="none",
    optimizer=OptimizerConfig(learning_rate=5e-3, schedule="constant", clip_norm=1.0),
)


def share_of_sevens(records, completions):
    return [text.count("7") / TOY.sampling.max_new_tokens for text in completions]


def climb(policy, *, shuffle: bool) -> list[float]:
    """Mean reward of every step of the toy task: to write sevens."""
    prompts = ask(policy, "Why?", "Where is it?", "What do you see?", "When?")
    training, step = state.make_state(policy, TOY), steps.make_gspo_step(TOY)
    reward, bucket = make_reward(share_of_sevens), rollout.GrowingBucket()
    draw = np.random.default_rng(0)
    history: list[float] = []
    for number in range(TOY.steps):
        now = dataclasses.replace(policy, params=training.params)
        seeds = rollout.prompt_seeds(0, number, len(prompts))
        out = now.continue_samples([prompt.sample for prompt in prompts], TOY.sampling, seeds)
        rewards, advantages = rollout.judge(prompts, out, TOY, reward, 1.0)
        if shuffle:
            advantages = advantages._replace(advantage=draw.permuted(advantages.advantage, axis=1))
        sampled = rollout.Groups(prompts, out, rewards, advantages)
        history.append(float(rewards.total.mean()))
        training, _ = step(training, rollout.make_rollouts(policy, sampled, slice(0, 4), TOY, bucket))
        if history[-1] > 0.97:
            break
    return history


def test_a_toy_task_is_learned(policy):
    history = climb(policy, shuffle=False)
    assert history[0] < 0.2 and history[-1] > 0.95, history


def test_shuffled_advantages_teach_nothing(policy):
    assert max(climb(policy, shuffle=True)) < 0.5


# ---- judging ----


def generations(texts, finished):
    tokens = [[np.int32([1, 2])] * len(row) for row in texts]
    logp = [[np.float32([-1, -1])] * len(row) for row in texts]
    return Generations(texts, tokens, logp, finished)


def length_reward(records, completions):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("score", [[-1, 0, 1], [0, 0, 0]]),  # lengths 1 2 3: std 1
        ("zero", [[0, 1, -1], [0, 0, 0]]),  # the third counts 0: mean 1, std 1
        ("drop", [[-(0.5**0.5), 0.5**0.5, 0], [0, 0, 0]]),  # 1 2: std sqrt(1 / 2)
    ],
)
def test_completions_that_the_limit_cut(policy, cut, expected):
    """The third of the first group and all of the second are cut: nothing of them is kept when they are dropped."""
    config = dataclasses.replace(TOY, cut=cut, advantages=AdvantageConfig(std_floor=0.0))
    prompts = ask(policy, "a", "b")
    out = generations([["a", "aa", "aaa"], ["a", "aa", "aaa"]], [[True, True, False], [False] * 3])
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, num_samples=3))
    _, advantages = rollout.judge(prompts, out, config, make_reward(length_reward), 1.0)
    np.testing.assert_allclose(advantages.advantage[0], expected[0], rtol=1e-5)
    if cut == "drop":
        assert advantages.keep.tolist() == [[True, True, False], [False] * 3]
    else:
        assert advantages.keep.all()


def test_a_reward_that_is_no_number_is_named(policy):
    prompts = ask(policy, "a")
    out = generations([["x", "y"]], [[True, True]])
    config = dataclasses.replace(TOY, sampling=dataclasses.replace(TOY.sampling, num_samples=2))
    broken = make_reward(lambda records, completions: [0.0, float("nan")])
    with pytest.raises(InputError, match="reward: nan for record 0, completion 'y'"):
        rollout.judge(prompts, out, config, broken, 1.0)
    with pytest.raises(InputError, match=r"gave shape \(1,\) for 2 completions"):
        rollout.judge(prompts, out, config, make_reward(lambda records, completions: [0.0]), 1.0)


def test_seeds_are_a_function_of_step_and_place():
    assert rollout.prompt_seeds(0, 3, 4)[:2] == rollout.prompt_seeds(0, 3, 2)
    assert len({*rollout.prompt_seeds(0, 3, 4), *rollout.prompt_seeds(0, 4, 4), *rollout.prompt_seeds(1, 3, 4)}) == 12


def test_a_reference_of_another_shape_is_refused(policy, tmp_path, one_device):
    other = dataclasses.replace(policy.config, text=dataclasses.replace(policy.config.text, num_hidden_layers=3))
    graphdef, params = qwen2_5_vl.abstract_params(other, one_device)
    processor = dataclasses.replace(policy.processor, config=other)
    stranger = dataclasses.replace(policy, graphdef=graphdef, params=params, processor=processor)
    with pytest.raises(InputError, match=r"another model .*num_hidden_layers.*=3 and .*=2"):
        state.make_state(policy, STEP, reference=stranger)
