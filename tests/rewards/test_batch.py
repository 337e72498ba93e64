"""A batch is its rows: any size, order, mix, padding, transformation and device layout give the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_cases as cases
from jax.sharding import NamedSharding, PartitionSpec

from openo3_jax import mesh
from openo3_jax.config import AdvantageConfig
from openo3_jax.rewards import arrays, parse, rubric, score
from openo3_jax.rewards.rules import PAPER, RELEASED, TERMS

ROWS = cases.read_golden()[:160]
NUMBERS = RELEASED.numbers()


def score_golden(rows: list[dict], rules=RELEASED) -> np.ndarray:
    progress = [row["step_percent"] for row in rows]
    rewards = score.score(rows, [row["completion"] for row in rows], progress=progress, rules=rules)
    return np.stack([*(rewards.terms[term] for term in TERMS), rewards.total], 1)


@pytest.mark.parametrize("rules", [PAPER, RELEASED], ids=["paper", "released"])
def test_order_and_batch_size_change_nothing(rules):
    whole = score_golden(ROWS, rules)
    assert {row["task"] for row in ROWS} == {row["task"] for row in cases.read_golden()}
    order = np.random.default_rng(0).permutation(len(ROWS))
    np.testing.assert_allclose(score_golden([ROWS[i] for i in order], rules), whole[order], atol=1e-6)
    alone = np.concatenate([score_golden([row], rules) for row in ROWS])
    np.testing.assert_allclose(alone, whole, atol=1e-6)


def test_padding_changes_nothing(monkeypatch):
    """The same rows in arrays four times as wide."""
    whole = score_golden(ROWS)
    for name in ("PREDICTION_SIZES", "TRUTH_SIZES"):
        monkeypatch.setattr(arrays, name, {size: 4 * width for size, width in getattr(arrays, name).items()})
    np.testing.assert_allclose(score_golden(ROWS), whole, atol=1e-6)


def test_a_long_answer_gets_a_bucket_of_its_own():
    short = [row for row in ROWS if row["task"] == "temporal QA"][:20]
    rows = [*short, short[0] | {"completion": "<think>" + "<t>1.5</t>s " * 16_000 + "</think>"}]
    parsed = parse.parse(rows, [row["completion"] for row in rows])
    widths = [bucket.rows.prediction.times_s.shape for bucket in parsed.buckets()]
    assert widths == [(32, 16), (8, 16 * 4**5)]
    places = np.concatenate([bucket.places for bucket in parsed.buckets()])
    assert sorted(places) == list(range(21))


def test_many_wide_rows_are_scored_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(arrays, "_MOST_CELLS", 64)
    whole = score_golden(ROWS[:40])
    wide = ROWS[0] | {"task": "temporal QA", "answer": "[0, 3]", "completion": "<think>" + "<t>1.5</t>s " * 100}
    wide["completion"] += "</think>"
    rows = [*ROWS[:20], *[wide] * 20, *ROWS[20:40]]
    parsed = parse.parse(rows, [row["completion"] for row in rows])
    wide_buckets = [bucket for bucket in parsed.buckets() if bucket.rows.prediction.times_s.shape[1] > 64]
    assert [len(bucket.places) for bucket in wide_buckets] == [8, 8, 4]
    scores = score_golden(rows)
    np.testing.assert_allclose(np.concatenate([scores[:20], scores[40:]]), whole, atol=1e-6)
    assert (scores[20:40, TERMS.index("thk_temporal_segment")] == 1).all()


def test_batches_of_different_content_share_one_program():
    def buckets(rows):
        return parse.parse(rows, [row["completion"] for row in rows]).buckets()

    temporal = [row for row in ROWS if row["task"].startswith("temporal QA")][:20]
    visual = [row for row in ROWS if row["task"] == "visual QA"][:20]
    with score.double_precision():
        for bucket in buckets(temporal):
            rubric.score_rows(bucket.rows, NUMBERS)
        compiled = rubric.score_rows._cache_size()
        for bucket in buckets(visual):
            rubric.score_rows(bucket.rows, NUMBERS)
    assert rubric.score_rows._cache_size() == compiled


def test_jit_of_one_and_vmap_agree_with_the_batch():
    (bucket, *_) = parse.parse(ROWS[:16], [row["completion"] for row in ROWS[:16]]).buckets()
    one = jax.jit(lambda row: rubric.score_row(row, NUMBERS))
    with score.double_precision():
        rows = jax.tree.map(jnp.asarray, bucket.rows)
        batch = rubric.score_rows(rows, NUMBERS)
        mapped = jax.vmap(one)(rows)
        for i in range(8):
            alone = one(jax.tree.map(lambda array, i=i: array[i], rows))
            np.testing.assert_allclose(alone.terms, batch.terms[i], atol=1e-6)
    np.testing.assert_allclose(mapped.terms, batch.terms, atol=1e-6)
    np.testing.assert_allclose(mapped.total, batch.total, atol=1e-6)


def test_sharded_over_eight_devices():
    eight = mesh.make_mesh({"data": 8})
    (bucket, *_) = parse.parse(ROWS, [row["completion"] for row in ROWS]).buckets()
    with score.double_precision():
        whole = rubric.score_rows(bucket.rows, NUMBERS)
        sharded = jax.device_put(bucket.rows, NamedSharding(eight, PartitionSpec("data")))
        scores = rubric.score_rows(sharded, NUMBERS)
    assert len(scores.terms.sharding.device_set) == 8
    for found, expected in zip(scores, whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_empty_batch():
    rewards = score.score([], [])
    assert rewards.total.shape == (0,) and rewards.terms["format"].shape == (0,)


def test_scores_are_float32_and_leave_the_precision_as_it_was():
    rewards = score.score([cases.mcq_record()], [cases.completion("", "B")])
    assert {array.dtype for array in (*rewards.terms.values(), rewards.total)} == {np.dtype(np.float32)}
    assert {array.dtype for array in rewards.applies.values()} == {np.dtype(bool)}
    assert not jax.config.jax_enable_x64


GROUPS = np.float32([[1, 2, 3, 4], [2, 2, 2, 2]])  # means 2.5 and 2, unbiased std sqrt(5/3)


def test_advantages_by_hand():
    found = rubric.advantages(GROUPS, AdvantageConfig())
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / (np.sqrt(5 / 3) + 1e-4)
    np.testing.assert_allclose(found.advantage, [expected, [0] * 4], rtol=1e-5)
    np.testing.assert_allclose(found.std, [np.sqrt(5 / 3), 0], rtol=1e-6)
    assert found.keep.all()


def test_advantage_options():
    config = AdvantageConfig(scale="none", drop_equal=True)
    found = rubric.advantages(GROUPS, config)
    np.testing.assert_allclose(found.advantage[0], [-1.5, -0.5, 0.5, 1.5], rtol=1e-6)
    assert found.keep.tolist() == [[True] * 4, [False] * 4]
    biased = rubric.advantages(GROUPS, dataclasses.replace(config, scale="group", std_floor=0.0, unbiased=False))
    np.testing.assert_allclose(biased.std[0], np.sqrt(5 / 4), rtol=1e-6)
    single = rubric.advantages(GROUPS[:, :1], AdvantageConfig())
    assert single.advantage.tolist() == [[0.0], [0.0]]
    # All eight: mean 2.25, squares 2 * 0.0625 + ... = 5.5, std sqrt(5.5 / 7)
    batch = rubric.advantages(GROUPS, AdvantageConfig(scale="batch", std_floor=0.0))
    np.testing.assert_allclose(batch.advantage[0], np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(5.5 / 7), rtol=1e-6)


def test_what_is_not_valid_counts_nowhere():
    """Of 1 2 3 4 the 4 is left out: mean 2, unbiased std 1; of a group without any valid reward nothing is kept."""
    valid = np.array([[True, True, True, False], [False] * 4])
    found = rubric.advantages(GROUPS, AdvantageConfig(std_floor=0.0), valid)
    assert found.advantage.tolist() == [[-1, 0, 1, 0], [0] * 4]
    assert found.keep.tolist() == valid.tolist()
    assert found.mean.tolist() == [2, 0] and found.std.tolist() == [1, 0]
