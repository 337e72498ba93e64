"""The parity ladder against `transformers`, float32, highest precision: layer, tower, logits, gradients, tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from openo3_jax import types
from openo3_jax.config import SFTConfig
from openo3_jax.data import packing
from openo3_jax.models import attention, hf_mapping, rope, text
from openo3_jax.train import steps
from parity import hf

SFT = SFTConfig(steps=1, compute_dtype="float32")

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def assert_close(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    np.testing.assert_array_less(np.abs(ours - theirs), 1e-4 * max(1.0, np.abs(theirs).max()))


@pytest.fixture(scope="module")
def conversations():
    return [hf.make_conversation(case) for case in hf.CASES]


@pytest.fixture(scope="module")
def samples(pair, conversations):
    return pair.ours.encode(conversations)


def unstack(stacked: nnx.Module, index: int) -> nnx.Module:
    graphdef, params = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[index], params))


def test_decoder_layer(pair):
    """Layer 0 alone, on random hidden states with three different position axes."""
    config = pair.ours.config.text
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 11, config.hidden_size)).astype(np.float32)
    positions = np.sort(draw.integers(0, 40, (2, 3, 11)), axis=-1)
    layer = unstack(nnx.merge(pair.ours.graphdef, pair.ours.params).text.layers, 0)
    q, kv = layer.project(x, text.angles(config, jnp.asarray(positions)))
    slots = attention.Slots(jnp.ones((2, 11), jnp.int32))
    ours = layer.finish(jnp.asarray(x), attention.attention(q, kv.k, kv.v, slots, causal=True))

    decoder = pair.theirs.model.language_model
    angles = decoder.rotary_emb(torch.tensor(x), torch.tensor(positions).permute(1, 0, 2))
    mask = torch.full((11, 11), -1e30).triu(1)[None, None]
    with torch.no_grad():
        theirs = decoder.layers[0](torch.tensor(x), attention_mask=mask, position_embeddings=angles)
    assert_close(ours, theirs[0] if isinstance(theirs, tuple) else theirs)


@pytest.mark.parametrize("index", [0, 1])
def test_vision_block(pair, samples, index):
    """One block (windowed or full) on random hidden states of five pictures of different sizes."""
    config = pair.ours.config.vision
    batch = pair.ours.batch([samples[2]])
    num = len(samples[2].patches)
    x = np.random.default_rng(1).normal(size=(num, config.hidden_size)).astype(np.float32)
    padded = jnp.zeros((1, batch.vision.patches.shape[1], config.hidden_size)).at[0, :num].set(x)
    block = unstack(nnx.merge(pair.ours.graphdef, pair.ours.params).visual.blocks, index)
    is_full = jnp.asarray(index in config.fullatt_block_indexes)
    angles = rope.vision_angles(batch.vision.patch_hw, config.head_dim)
    ours = block(padded, angles, batch.vision, is_full)[0, :num]

    tower = pair.theirs.model.visual
    grids = torch.tensor([list(grid) for grid in samples[2].grids])
    order, window_ends = tower_windows(tower, grids)
    frame_ends = torch.cumsum(grids.prod(1), 0)
    ends = torch.tensor([0, *(frame_ends if index in config.fullatt_block_indexes else window_ends)], dtype=torch.int32)
    theirs_angles = torch.tensor(np.asarray(angles[0, :num]))[order]
    cos_sin = torch.cat([theirs_angles, theirs_angles], -1)
    with torch.no_grad():
        theirs = tower.blocks[index](
            torch.tensor(x)[order], cu_seqlens=ends, position_embeddings=(cos_sin.cos(), cos_sin.sin())
        )
    assert_close(np.asarray(ours)[order], theirs)


def tower_windows(tower, grids):
    """Patch order and window ends as the reference has them."""
    from transformers import vision_utils

    order, ends = vision_utils.get_vision_window_index(
        grids, spatial_merge_size=2, window_size=tower.config.window_size, patch_size=14
    )
    order = (order[:, None] * 4 + torch.arange(4)).flatten()
    return order, sorted(set(ends.tolist()) - {0})


@pytest.mark.parametrize("case", ["one image", "five images", "sixteen frames"])
def test_vision_tower(pair, samples, case):
    """From bytes on our side, from the pixels of transformers' processor on theirs."""
    sample = samples[list(hf.CASES).index(case)]
    model = nnx.merge(pair.ours.graphdef, pair.ours.params)
    ours = jax.jit(model.visual)(pair.ours.batch([sample]).vision)[0, : int(sample.is_visual.sum())]
    with torch.no_grad():
        grids = torch.tensor([list(grid) for grid in sample.grids])
        pixels = hf.encode(pair.processor, [hf.make_conversation(case)])["pixel_values"]
        theirs = pair.theirs.model.visual(pixels, grid_thw=grids).pooler_output
    assert_close(ours, theirs)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_logits_of_a_padded_batch(pair, conversations, padding_side):
    """Text only, one image, five images and sixteen frames in one batch."""
    inputs = hf.encode(pair.processor, conversations, padding_side=padding_side)
    with torch.no_grad():
        theirs = pair.theirs(**inputs).logits.numpy()
    ours = pair.ours.logits(conversations)
    for row, (mine, mask) in enumerate(zip(ours, inputs["attention_mask"].bool().numpy(), strict=True)):
        assert_close(mine, theirs[row][mask])


@pytest.mark.parametrize("case", ["text only", "five images"])
def test_logits_alone(pair, case):
    conversation = hf.make_conversation(case, seed=7)
    inputs = hf.encode(pair.processor, [conversation])
    with torch.no_grad():
        theirs = pair.theirs(**inputs).logits.numpy()
    assert_close(pair.ours.logits([conversation])[0], theirs[0])


def test_logits_of_native_video(pair):
    """Six frames, three temporal patches of 0.5 s; transformers gets our positions, its own differ (docs/parity.md)."""
    pixels = np.random.default_rng(5).integers(0, 256, (6, 84, 140, 3), dtype=np.uint8)
    clip = types.Picture(pixels, seconds_per_grid=0.5)
    content = [{"type": "picture", "picture": clip}, {"type": "text", "text": "What moves?"}]
    sample = pair.ours.processor.encode([{"role": "user", "content": content}])
    assert [tuple(grid) for grid in sample.grids] == [(3, 6, 10)]
    model = nnx.merge(pair.ours.graphdef, pair.ours.params)
    ours = model.logits(jax.jit(lambda batch: model.hidden(batch)[0])(pair.ours.batch([sample])))
    settings = pair.processor.image_processor
    mean, std = (torch.tensor(of).repeat_interleave(2 * 14 * 14) for of in (settings.image_mean, settings.image_std))
    with torch.no_grad():
        theirs = pair.theirs(
            input_ids=torch.tensor(sample.tokens)[None].long(),
            position_ids=torch.tensor(sample.positions)[:, None].long(),
            pixel_values_videos=(torch.tensor(sample.patches) / 255 - mean) / std,
            video_grid_thw=torch.tensor([[3, 6, 10]]),
        ).logits
    assert_close(ours[0, : len(sample.tokens)], theirs[0])


def test_gradients_of_every_leaf(pair, conversations, samples):
    """Mean cross-entropy over all text of the padded batch, three rows with pictures, one without; with remat."""
    bucket = packing.bucket_for([[s] for s in samples], pair.ours.config.vision, loss_on="released")
    batch = packing.make_batch([[s] for s in samples], bucket, pair.ours.config, loss_on="released")
    loss, grads = jax.jit(jax.value_and_grad(lambda params: steps.sft_loss(pair.ours.graphdef, params, batch, SFT)))(
        pair.ours.params
    )

    pair.theirs.zero_grad()
    inputs = hf.encode(pair.processor, conversations)
    logp = torch.log_softmax(pair.theirs(**inputs).logits, -1)
    rows, columns = np.nonzero(batch.target_slots >= 0)
    picked = logp[rows, batch.target_slots[rows, columns], batch.targets[rows, columns]]
    theirs = -picked.mean()
    theirs.backward()
    assert_close(loss, theirs.detach().numpy())

    expected = {hf_mapping.hub_key(name): weight.grad.numpy() for name, weight in pair.theirs.named_parameters()}
    for entry in hf_mapping.table(pair.ours.config):
        leaf = grads
        for name in entry.path:
            leaf = leaf[name]
        for i, key in enumerate(hf_mapping.keys(entry, pair.ours.config)):
            mine = leaf.get_raw_value()[i] if entry.is_stacked else leaf.get_raw_value()
            mine = hf_mapping.to_hf(entry, np.asarray(mine))
            reference = expected.pop(key).reshape(mine.shape)
            norm = np.linalg.norm(reference)
            # Adding a constant to every key moves no softmax: that gradient is rounding noise on both sides.
            floor = 1e-6 if key.endswith("k_proj.bias") else 0.0
            assert np.linalg.norm(mine - reference) <= 1e-4 * norm + floor, key
    assert set(expected) <= {hf_mapping.HEAD_KEY}, "leaves without a counterpart"


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens(penalty, pair, conversations):
    """64 tokens after each prompt of the mixed batch, the same ids banned on both sides."""
    banned = pair.ours.processor.banned_ids(pair.ours.config.text.vocab_size).tolist()
    inputs = hf.encode(pair.processor, conversations, padding_side="left")
    asked = {"do_sample": False, "max_new_tokens": 64, "suppress_tokens": banned, "repetition_penalty": penalty}
    theirs = pair.theirs.generate(**inputs, **asked).numpy()
    theirs = theirs[:, inputs["input_ids"].shape[1] :]
    ours = pair.ours.generate(conversations, temperature=0.0, max_new_tokens=64, repetition_penalty=penalty)
    for row, tokens in enumerate(ours.tokens):
        assert ours.finished[row][0] == (tokens[0][-1] in pair.ours.processor.stop_ids)
        assert len(tokens[0]) == 64 or ours.finished[row][0]
        np.testing.assert_array_equal(tokens[0], theirs[row, : len(tokens[0])])


def test_parity_can_fail(pair, conversations):
    """The ladder notices a rotation by the wrong axis: time and row swapped in the positions."""
    samples = pair.ours.encode(conversations[1:2])
    batch = pair.ours.batch(samples)

    swapped = dataclasses.replace(batch, positions=batch.positions[:, jnp.array([1, 0, 2])])
    model = nnx.merge(pair.ours.graphdef, pair.ours.params)
    right, wrong = (model.logits(model.hidden(b)[0])[0, : len(samples[0].tokens)] for b in (batch, swapped))
    with pytest.raises(AssertionError):
        assert_close(wrong, right)
