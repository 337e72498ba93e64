"""Counted operations against the compiler's, where its count is whole: one layer, nothing in a loop."""

import dataclasses

import jax
import pytest
from flax import nnx

import small
from openo3_jax.config import QWEN2_5_VL
from openo3_jax.models import flops
from openo3_jax.types import VisionGrid


def compiled_flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_the_decoder_against_the_compiler(one_device):
    """One layer, 96 tokens, every pair of slots computed as the dense form does, logits everywhere."""
    config = small.model_config(num_hidden_layers=1, hidden_size=128, intermediate_size=320, mrope_section=(4, 6, 6))
    graphdef, params = small.make_params(config, one_device)
    batch = small.make_batch([[small.sample(config, prompt=100, answer=28)]], config)

    leaves, treedef = jax.tree.flatten(batch)

    def run(params, leaves):
        model = nnx.merge(graphdef, params)
        return model.logits(model.hidden(jax.tree.unflatten(treedef, leaves), backend="xla")[0])

    tokens = batch.tokens.shape[1]
    ours = flops.text_flops(config.text, tokens=tokens, pairs=tokens**2, targets=tokens)
    assert ours == pytest.approx(compiled_flops(run, params, leaves), rel=0.05)


def test_pairs_by_hand():
    """A prompt of 3: 1 + 2 + 3; completions of 2 and 1 add 2 * 3 + 3 and 1 * 3 + 1."""
    assert flops.causal_pairs(3) == 6
    assert flops.causal_pairs(3, [2, 1]) == 6 + 9 + 4


def test_the_tower_by_hand():
    """10 x 6 patches, windows of 8: windows of 8x6 and 2x6; weights of blocks, embedding and merger."""
    config = dataclasses.replace(small.model_config().vision, window_size=112)
    patches, dim, ffn = 60, 16, 24
    weights = 2 * (4 * dim * dim + 3 * dim * ffn) + 1176 * dim
    merger = 15 * (64 * 64 + 64 * 32)
    pairs = 60**2 + 48**2 + 12**2  # one full layer, one of windows
    assert flops.vision_flops(config, [VisionGrid(1, 10, 6)]) == 2 * patches * weights + 4 * pairs * dim + 2 * merger


def test_a_forward_of_the_7b_costs_two_operations_per_weight_and_token():
    """7.07e9 weights meet every token (embedding and tower aside); the head is a part of that."""
    config = QWEN2_5_VL["7b"].text
    weights = flops.text_flops(config, tokens=1, pairs=0, targets=1) / 2
    assert weights == pytest.approx(7.07e9, rel=0.01)


def test_what_is_computed_again_by_hand():
    """A prompt of 3, completions of 2 and 1, 19 pairs; two layers of width 32, a vocabulary of 96."""
    config, grids = small.model_config(), [VisionGrid(1, 4, 4)]
    of = {"prompt": 3, "completions": [2, 1], "targets": 3}
    forward, head = flops.forward_flops(config, grids, **of), 2 * 3 * 32 * 96
    text = 2 * 2 * 6 * (2 * 32 * 32 + 2 * 32 * 16)  # four projections of both layers, 6 tokens
    vision = 2 * (2 * 16 * 4 * 16 * 16 + 4 * 16**2 * 16)  # of both blocks four projections; 16 patches, one window
    expected = {"none": head, "dots": head + text + vision, "layers": forward, "attention": forward - 2 * 4 * 19 * 32}
    assert {remat: flops.again_flops(config, grids, **of, remat=remat) for remat in expected} == expected
