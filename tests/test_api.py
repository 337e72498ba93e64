"""The facade: sizes that rewards need, found where records lack them."""

import pytest

from openo3_jax import api
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, prompts, synthetic, transforms, video


def test_sizes_of_media_are_those_of_training_and_no_clip_is_decoded(tmp_path, monkeypatch):
    synthetic.write_dataset(tmp_path, num_train=6, seed=0)
    records = annotations.load_stage(tmp_path, "rl")
    settings = {"config": VideoConfig(), "wording": prompts.load_prompts()}
    prepared = transforms.prepare_all(records, tmp_path, "rl", **settings)
    monkeypatch.setattr(video.Decoder, "read", lambda *_: pytest.fail("a clip has been decoded"))
    with api.MediaSizes(tmp_path) as sizes:
        for record, one in zip(records, prepared, strict=True):
            bare = {name: value for name, value in record.items() if name != "image_size"}
            assert sizes(bare) == {"image_size": one.image_size, "image_size_refine": one.image_size_refine}
