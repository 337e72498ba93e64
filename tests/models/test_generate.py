"""Generation against the model without a cache, and what a sample may depend on."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax.config import SamplingConfig
from openo3_jax.models import generate, qwen2_5_vl
from openo3_jax.types import Sample

LIMIT = 70  # not a multiple of the 64 tokens for which the loop is compiled


@pytest.fixture(scope="module")
def policy(tmp_path_factory, one_device):
    return small.make_policy(tmp_path_factory.mktemp("policy"), one_device)


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    items = [{"type": "image", "image": pixels}, {"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": items}]


TEXT = [{"role": "user", "content": "When does the red circle appear, and where is it then?"}]
SHORT = [{"role": "user", "content": "Why?"}]
CONVERSATIONS = [TEXT, picture(0), SHORT]


@pytest.fixture(scope="module")
def greedy(policy):
    return policy.generate(CONVERSATIONS, temperature=0.0, max_new_tokens=LIMIT)


@pytest.fixture(scope="module")
def sampled(policy):
    return policy.generate(CONVERSATIONS, num_samples=3, max_new_tokens=64, seed=[5, 6, 7])


def extend(sample: Sample, new: np.ndarray) -> Sample:
    """The sample with `new` text tokens behind it, all three position axes counting on from the largest."""
    num = len(new)
    following = np.broadcast_to(sample.positions.max() + 1 + np.arange(num), (3, num))
    return dataclasses.replace(
        sample,
        tokens=np.concatenate([sample.tokens, new.astype(np.int32)]),
        positions=np.concatenate([sample.positions, following], axis=1).astype(sample.positions.dtype),
        loss_mask=np.concatenate([sample.loss_mask, np.ones(num, bool)]),
        is_visual=np.concatenate([sample.is_visual, np.zeros(num, bool)]),
    )


def logits_after(policy, samples, generated):
    """For each sample the logits from which each of its generated tokens was drawn, by one pass without a cache."""
    model = nnx.merge(policy.graphdef, policy.params)
    batch = policy.batch([extend(s, new) for s, new in zip(samples, generated, strict=True)])
    logits = np.asarray(jax.jit(lambda batch: model.logits(model.hidden(batch)[0]))(batch))
    return [
        row[len(s.tokens) - 1 : len(s.tokens) - 1 + len(new)].copy()
        for row, s, new in zip(logits, samples, generated, strict=True)
    ]


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def test_greedy_tokens_are_the_largest_logits_of_the_model_without_a_cache(policy, greedy):
    generated = [group[0] for group in greedy.tokens]
    banned = policy.processor.banned_ids(policy.config.text.vocab_size)
    for logits, tokens in zip(logits_after(policy, policy.encode(CONVERSATIONS), generated), generated, strict=True):
        logits[:, banned] = -np.inf
        # Where two logits are closer than rounding either may win; nearly nowhere are they.
        assert (np.take_along_axis(logits, tokens[:, None], 1)[:, 0] >= logits.max(-1) - 1e-4).all()
        assert (logits.argmax(-1) == tokens).mean() > 0.95


def test_log_probabilities_are_those_of_the_model_without_a_cache(policy, sampled):
    """Within 1e-4 nats, over the whole vocabulary, for the first and the last sample of each group."""
    for g in (0, 2):
        generated = [group[g] for group in sampled.tokens]
        for i, logits in enumerate(logits_after(policy, policy.encode(CONVERSATIONS), generated)):
            expected = np.take_along_axis(log_softmax(logits), generated[i][:, None], axis=1)[:, 0]
            np.testing.assert_allclose(sampled.logp[i][g], expected, atol=1e-4)


def test_the_limit_cuts_where_it_was_asked_to(policy, greedy):
    for tokens, logp, finished in zip(greedy.tokens, greedy.logp, greedy.finished, strict=True):
        assert len(tokens[0]) == len(logp[0])
        assert len(tokens[0]) == LIMIT or finished[0]
        assert finished[0] == (tokens[0][-1] in policy.processor.stop_ids)
    assert not all(finished[0] for finished in greedy.finished), "these prompts cannot tell the limit"


def test_a_sample_ends_with_its_first_stop_token(policy, greedy):
    """The token that greedy decoding gives last becomes a stop: everything after its first place is gone."""
    for i, group in enumerate(greedy.tokens):
        stop = int(group[0][-1])
        stopping = dataclasses.replace(
            policy, processor=dataclasses.replace(policy.processor, stop_ids=(stop, policy.processor.pad_id))
        )
        again = stopping.generate(CONVERSATIONS, temperature=0.0, max_new_tokens=LIMIT)
        first = group[0].tolist().index(stop)
        assert again.tokens[i][0].tolist() == group[0][: first + 1].tolist()
        assert again.finished[i][0] is True


def test_texts_are_the_tokens_without_special_ones(policy, sampled):
    for texts, tokens in zip(sampled.texts, sampled.tokens, strict=True):
        assert texts == [policy.processor.decode(one) for one in tokens]
        assert not any("<|" in text for text in texts)


def test_a_sample_depends_on_its_seed_and_number_alone(policy, sampled):
    """Other places in the batch, another picture beside it: bit-equal tokens and log-probabilities."""
    moved = policy.generate([SHORT, TEXT, picture(1)], num_samples=3, max_new_tokens=64, seed=[7, 5, 99])
    for here, there in ((0, 1), (2, 0)):
        for g in range(3):
            np.testing.assert_array_equal(sampled.tokens[here][g], moved.tokens[there][g])
            np.testing.assert_array_equal(sampled.logp[here][g], moved.logp[there][g])


def test_seeds_and_samples_differ(policy, sampled):
    other = policy.generate(CONVERSATIONS, num_samples=3, max_new_tokens=64, seed=11)
    drawn = [tuple(tokens) for group in (*sampled.tokens, *other.tokens) for tokens in group]
    assert len(set(drawn)) == len(drawn) == 18
    repeated = policy.generate(CONVERSATIONS, num_samples=3, max_new_tokens=64, seed=[5, 6, 7])
    assert [t.tolist() for g in repeated.tokens for t in g] == [t.tolist() for g in sampled.tokens for t in g]


def test_top_k_of_one_is_greedy(policy, greedy):
    out = policy.generate(CONVERSATIONS, top_k=1, max_new_tokens=64, seed=3)
    for tokens, expected in zip(out.tokens, greedy.tokens, strict=True):
        assert tokens[0].tolist() == expected[0][:64].tolist()


def test_special_tokens_come_only_unbanned(policy, sampled):
    """The random model likes special tokens as much as others: unbanned, some of 9 x 64 tokens are special."""
    banned = set(policy.processor.banned_ids(policy.config.text.vocab_size).tolist())
    assert not banned & {int(token) for group in sampled.tokens for tokens in group for token in tokens}
    free = policy.generate(CONVERSATIONS, num_samples=3, max_new_tokens=64, seed=[5, 6, 7], ban_special=False)
    assert banned & {int(token) for group in free.tokens for tokens in group for token in tokens}


def test_one_program_serves_every_limit_seed_and_ban(policy, sampled):
    """Only the static shape and the knobs compile: another limit below 64, other seeds and bans do not."""
    before = policy_lib._programs(False).decode._cache_size()
    out = policy.generate(CONVERSATIONS, num_samples=3, max_new_tokens=9, seed=1, ban_special=False)
    assert policy_lib._programs(False).decode._cache_size() == before
    assert all(len(tokens) <= 9 for group in out.tokens for tokens in group)


@pytest.mark.parametrize("seed", [[1, 2], [1, 2, 3, 4]])
def test_one_seed_for_each_conversation(policy, seed):
    with pytest.raises(ValueError, match=f"{len(seed)} seeds for 3 conversations"):
        policy.generate(CONVERSATIONS, seed=seed)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2}, {"fsdp": 2, "tensor": 2}, {"context": 2}])
def test_prompts_that_share_a_row_are_prefilled_as_alone(axes, tmp_path):
    policy = small.make_policy(tmp_path, mesh_lib.make_mesh(axes, devices=jax.devices()[: math.prod(axes.values())]))
    prefill = jax.jit(generate.prefill, static_argnums=0)
    samples = policy.encode([TEXT, picture(0), SHORT, picture(1)])
    ways = axes.get("fsdp", 1)
    batch, slots = policy.prompt_batch(samples)
    assert (len(batch.tokens), len(slots)) == (ways, 4), "all prompts of a device in one row"
    shared = prefill(policy.graphdef, policy.params, batch, slots)
    alone = prefill(policy.graphdef, policy.params, *policy.prompt_batch(samples, policy.bucket(samples)))
    assert [len(sample.tokens) for sample in samples] == alone.in_prefix.sum(1).tolist()
    np.testing.assert_array_equal(shared.in_prefix, alone.in_prefix)
    np.testing.assert_array_equal(np.where(shared.in_prefix, shared.tokens, 0), alone.tokens)
    np.testing.assert_array_equal(shared.next_position, alone.next_position)
    close = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    close(shared.logits, alone.logits)
    jax.tree.map(close, shared.prefix, alone.prefix)


def test_weights_are_gathered_layer_by_layer_for_sampling(policy):
    """The sampling layout holds one tree per layer, each equal to its slice of the stacked weights."""
    from openo3_jax.models import generate

    layout = generate.sampling_layout(policy.graphdef, policy.params)
    stacked = policy.params["text"]["layers"]
    assert len(layout.layers) == policy.config.text.num_hidden_layers == 2
    for i, layer in enumerate(layout.layers):
        for mine, whole in zip(jax.tree.leaves(layer), jax.tree.leaves(stacked), strict=True):
            np.testing.assert_array_equal(mine, whole[i])


def test_bfloat16_weights_on_a_cpu_are_converted_one_layer_at_a_time(one_device):
    """Temporaries are below half of a float32 copy of four layers' weights; without the options they are above it."""
    config = small.model_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, mrope_section=(16, 8, 8))
    graphdef, params = qwen2_5_vl.abstract_params(config, one_device)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), params)
    copies = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(params["text"]["layers"]))
    batch = small.make_batch([[small.sample(config, prompt=6, answer=1)]], config)
    slots = np.zeros((1, batch.tokens.shape[1]), np.int32)
    prompts = jax.eval_shape(partial(generate.prefill, graphdef), params, batch, slots)
    layout = jax.eval_shape(partial(generate.sampling_layout, graphdef), params)
    mask, keys = np.zeros(config.text.vocab_size, bool), np.zeros((1, 1, 2), np.uint32)
    programs = policy_lib._programs(True)
    prefill = programs.prefill.lower(graphdef, params, batch, slots)
    sampling = SamplingConfig(max_new_tokens=8)
    decode = programs.decode.lower(layout, prompts, keys, mask, mask, np.int32(8), config=sampling)
    for lowered in (prefill, decode):
        assert lowered.compile().memory_analysis().temp_size_in_bytes < copies / 2


@pytest.mark.parametrize(("dtype", "expected"), [("float32", False), ("bfloat16", True)])
def test_which_weights_are_converted(policy, dtype, expected):
    cast = jax.tree.map(lambda x: x.astype(dtype), policy.params)
    assert dataclasses.replace(policy, params=cast)._is_converted == expected
