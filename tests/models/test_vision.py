"""What the tower does to bytes before it embeds them."""

import dataclasses

import jax
import numpy as np
from flax import nnx

import small
from openo3_jax import types
from openo3_jax.models import vision

CONFIG = small.model_config()
normalise = jax.jit(vision.normalise, static_argnums=1)


def test_normalisation_by_hand():
    """R 255 is (1 - 0.5) / 0.5, G 51 is (0.2 - 0.1) / 0.2, B 0 is (0 - 0.25) / 0.5."""
    config = dataclasses.replace(CONFIG.vision, image_mean=(0.5, 0.1, 0.25), image_std=(0.5, 0.2, 0.5))
    patch = np.repeat(np.uint8([255, 51, 0]), 2 * 14 * 14)
    got = normalise(patch[None], config)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0], np.repeat(np.float32([1.0, 0.5, -0.5]), 392), rtol=0, atol=1e-6)


def test_every_byte():
    """Against float64, within three units in the last place of the largest value."""
    patches = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 1176, axis=1)
    mean, std = (np.repeat(of, 392) for of in (CONFIG.vision.image_mean, CONFIG.vision.image_std))
    np.testing.assert_allclose(normalise(patches, CONFIG.vision), (patches / 255 - mean) / std, rtol=0, atol=7e-7)


def test_bytes_of_padding_change_nothing(one_device):
    """Zero is a colour like any other once it is normalised: what pads a row must reach no visual token."""
    sample = small.sample(CONFIG, prompt=3, answer=2, pictures=[(4, 6), (2, 4)])
    batch = small.make_batch([[sample]], CONFIG).vision
    num = len(sample.patches)
    assert batch.patches.dtype == np.uint8 and batch.patches.shape[1] > num and not batch.patches[0, num:].any()
    other = batch.patches.copy()
    other[0, num:] = np.random.default_rng(0).integers(0, 256, other[0, num:].shape)
    graphdef, params = small.make_params(CONFIG, one_device)

    @jax.jit
    def tower(batch: types.VisionBatch):
        return nnx.merge(graphdef, params).visual(batch)[0, : num // 4]

    plain = np.asarray(tower(batch))
    np.testing.assert_array_equal(tower(dataclasses.replace(batch, patches=other)), plain)
    other[0, 0] ^= 255
    assert (np.asarray(tower(dataclasses.replace(batch, patches=other))) != plain).any()
