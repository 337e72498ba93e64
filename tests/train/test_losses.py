"""Cross-entropy in chunks against the dense formula; packed rows against separate ones; what the step never holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import SFTConfig
from openo3_jax.data import packing
from openo3_jax.train import losses, optimizer, state, steps


def test_cross_entropy_by_hand():
    """Two targets of four slots, with log-probabilities -1 and -2: 1.5 nats per token."""
    logp = jnp.float32([[-1.0, -9.0], [-2.0, -9.0]])
    is_target = jnp.array([[True, False], [True, False]])
    assert losses.cross_entropy(logp, is_target) == 1.5
    assert losses.cross_entropy(logp, jnp.zeros((2, 2), bool)) == 0.0


def test_target_scores_by_hand(one_device):
    """Hidden 1 against a head of ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8."""
    head = np.log(np.float32([[1.0], [2.0], [5.0]]))
    hidden = np.float32([[[1.0], [0.0]]])
    slots, targets = np.int32([[0, 0, 1, -1]]), np.int32([[1, 2, 2, -1]])
    logp, entropy = losses.target_scores(hidden, head, slots, targets, mesh=one_device)
    np.testing.assert_allclose(logp[0], np.log([2 / 8, 5 / 8, 1 / 3, 1.0]), atol=1e-6)
    eighths = -sum(p * np.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    np.testing.assert_allclose(entropy[0], [eighths, eighths, np.log(3), 0.0], atol=1e-6)


def dense_logp(hidden, head, slots, targets):
    picked = jnp.take_along_axis(hidden, jnp.maximum(slots, 0)[..., None], axis=1)
    logp = jax.nn.log_softmax(jnp.einsum("rnd,vd->rnv", picked, head), axis=-1)
    logp = jnp.take_along_axis(logp, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(slots >= 0, logp, 0.0)


@pytest.mark.parametrize(
    ("axes", "chunk_targets"),
    [({}, 1), ({}, 7), ({}, 1000), ({"fsdp": 2, "tensor": 4}, 3), ({"data": 2, "fsdp": 2, "tensor": 2}, 1000)],
)
def test_chunks_and_meshes_agree_with_the_dense_formula(monkeypatch, axes, chunk_targets):
    """Value and gradients of 4 rows of 13 targets (some padding, some slots twice) over 24 tokens."""
    rows, seq, dim, vocab, num_targets = 4, 11, 8, 24, 13
    mesh = mesh_lib.make_mesh(axes, devices=jax.devices()[: int(np.prod([*axes.values(), 1]))])
    monkeypatch.setattr(losses, "MIN_CHUNK_TARGETS", 1)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk_targets * vocab // axes.get("tensor", 1))
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(rows, seq, dim)).astype(np.float32)
    head = draw.normal(size=(vocab, dim)).astype(np.float32)
    slots = draw.integers(-1, seq, (rows, num_targets)).astype(np.int32)
    targets = np.where(slots < 0, -1, draw.integers(0, vocab, (rows, num_targets))).astype(np.int32)
    pull = draw.normal(size=(rows, num_targets)).astype(np.float32)

    @jax.jit
    def run(hidden, head, slots, targets, pull):
        def chunked(hidden, head):
            return losses.target_scores(hidden, head, slots, targets, mesh=mesh).logp

        def dense(hidden, head):
            return dense_logp(hidden, head, slots, targets)

        (ours, ours_back), (theirs, theirs_back) = (jax.vjp(f, hidden, head) for f in (chunked, dense))
        return (ours, *ours_back(pull)), (theirs, *theirs_back(pull))

    sharded = mesh_lib.shard_rows((hidden, slots, targets, pull), mesh)
    table = jax.device_put(head, mesh_lib.sharding(mesh, "vocab", "embed"))
    ours, theirs = run(sharded[0], table, *sharded[1:])
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference, atol=2e-6 * max(1.0, float(np.abs(reference).max())))


# ---- packed rows ----

CONFIG = small.model_config()
SFT = SFTConfig(steps=1, compute_dtype="float32", remat="none")
SAMPLES = [
    small.sample(CONFIG, prompt=5, answer=7, pictures=[(4, 6), (10, 4)]),
    small.sample(CONFIG, prompt=3, answer=4),
    small.sample(CONFIG, prompt=6, answer=2, pictures=[(4, 4)]),
]
ROWS = [SAMPLES], [[sample] for sample in SAMPLES]


@pytest.fixture(scope="module")
def loss_and_gradients(one_device):
    graphdef, params = small.make_params(CONFIG, one_device)

    @jax.jit
    def run(params, batch):
        def loss(params):
            return steps.sft_loss(graphdef, params, batch, SFT)

        return jax.value_and_grad(loss)(params)

    # One static shape for every way of laying out the samples: one program is compiled.
    together, apart = (packing.bucket_for(rows, CONFIG.vision, num_rows=3, image_token_id=small.IMAGE) for rows in ROWS)
    bucket = packing.union(together, apart)
    return lambda rows: run(params, packing.make_batch(rows, bucket, CONFIG))


def test_packed_rows_equal_separate_rows(loss_and_gradients):
    """Three samples, two with pictures: one row, or one row each."""
    (loss, grads), (expected_loss, expected) = map(loss_and_gradients, ROWS)
    assert abs(float(loss) - float(expected_loss)) < 1e-5
    for (path, mine), reference in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        floor = 1e-7 if "k_proj" in name and "bias" in name else 0.0  # the exact gradient is 0
        norm = np.linalg.norm(reference)
        assert np.linalg.norm(mine - reference) <= 1e-5 * norm + floor, name


def test_the_loss_is_the_mean_over_all_targets(loss_and_gradients):
    """13 answer tokens: 7, 4 and 2. The batch weighs each token alike, not each row."""
    means = [float(loss_and_gradients([[sample]])[0]) for sample in SAMPLES]
    together = float(loss_and_gradients(ROWS[1])[0])
    assert together == pytest.approx((7 * means[0] + 4 * means[1] + 2 * means[2]) / 13, abs=1e-5)
    assert abs(together - np.mean(means)) > 1e-3, "these samples cannot tell the two means apart"


# ---- what the step never holds ----


def test_the_step_holds_no_logits_of_a_row_and_no_pairs_of_patches(one_device, monkeypatch):
    """384 slots, 1,408 tokens of vocabulary, 448 patches of 64 to 128 per frame: sizes that nothing else has."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 64 * 1408)
    config = small.model_config(vocab_size=1408)
    graphdef, params = small.make_params(config, one_device)
    # 14 words and 4 pictures of 8x14 patches: 28 visual tokens each.
    sample = small.sample(config, prompt=150, answer=80, pictures=[(8, 14)] * 4)
    batch = small.make_batch([[sample]], config)
    seq, patches, vocab = batch.tokens.shape[1], batch.vision.patches.shape[1], 1408
    assert (seq, patches) == (384, 448)

    training = SFTConfig(steps=1, compute_dtype="float32")
    opt_state = optimizer.make_optimizer(training.optimizer, 1).init(params)
    before = state.TrainState(step=jnp.int32(0), params=params, opt_state=opt_state, reference=None, graphdef=graphdef)
    program = jax.make_jaxpr(lambda *args: steps.make_sft_step(training)(*args))(before, batch)
    shapes = set(small.shapes_in(program))
    assert any(seq in shape for shape in shapes) and any(patches in shape for shape in shapes)
    assert any(shape[-2:] == (64, vocab) for shape in shapes), "the chunks of logits are not where they are looked for"
    assert not [shape for shape in shapes if vocab in shape and seq in shape]
    assert not [shape for shape in shapes if vocab in shape and batch.targets.shape[1] in shape]
    assert not [shape for shape in shapes if shape.count(patches) > 1]


def test_the_search_finds_logits_of_a_row():
    program = jax.make_jaxpr(jax.jit(lambda x, w: jax.lax.map(lambda row: row @ w, x).sum()))(
        jnp.ones((2, 5, 3)), jnp.ones((3, 7))
    )
    assert (2, 5, 7) in set(small.shapes_in(program))
