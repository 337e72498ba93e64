"""Shapes that follow what a run needs: growth at once, shrinking after a while, few programs, the same once resumed."""

import dataclasses
import json

import numpy as np

from openo3_jax.data import fitting_bucket, packing

BASE = packing.Bucket(rows=4, seq=256, patches=64, windows=8, frames={48: 2}, targets=64)


def need(seq, targets=64):
    return dataclasses.replace(BASE, seq=seq, targets=targets)


def given(bucket, *sizes):
    return [bucket(need(seq)).seq for seq in sizes]


def test_it_grows_at_once_and_shrinks_when_eight_in_a_row_needed_less():
    bucket = fitting_bucket.FittingBucket()
    assert given(bucket, 512, 1024) == [512, 1024]
    assert given(bucket, *[512] * 7) == [1024] * 7
    assert given(bucket, 512) == [512]  # the eighth
    assert given(bucket, 640) == [1024]  # known, so nothing is compiled for it


def test_a_little_less_is_no_reason_to_compile():
    bucket = fitting_bucket.FittingBucket()
    assert given(bucket, 1024, *[896] * 20) == [1024] * 21
    assert given(bucket, *[768] * 8) == [1024] * 7 + [768]  # three quarters


def test_one_large_need_keeps_the_large_bucket():
    bucket = fitting_bucket.FittingBucket()
    assert set(given(bucket, *([1024] + [256] * 6) * 4)) == {1024}


def test_what_is_given_always_holds_what_was_asked_and_programs_are_few():
    """2,000 asks of a run whose completions become shorter and then longer again."""
    draw, bucket, shapes = np.random.default_rng(0), fitting_bucket.FittingBucket(), set()
    for step in range(2000):
        scale = 0.4 + abs(step - 1000) / 1600
        asked = need(packing.round_up(int(1400 * scale * draw.uniform(0.7, 1.0)), 128), 32 * int(draw.integers(1, 9)))
        found = bucket(asked)
        assert packing.holds(found, asked)
        shapes.add(json.dumps(dataclasses.asdict(found)))
    assert len(shapes) <= 12


def test_it_goes_on_after_a_resume():
    draw = np.random.default_rng(1)
    sizes = [256 * int(draw.integers(1, 3 if 20 < i < 40 else 6)) for i in range(60)]
    whole = fitting_bucket.FittingBucket()
    expected = given(whole, *sizes)
    assert len(set(expected)) > 2
    bucket = fitting_bucket.FittingBucket()
    for size, seq in zip(sizes, expected, strict=True):
        bucket = fitting_bucket.FittingBucket.from_json(json.loads(json.dumps(bucket.to_json())))
        assert given(bucket, size) == [seq]
