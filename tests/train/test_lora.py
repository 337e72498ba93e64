"""Adapters: what they start as, what is trained, what is frozen, kept, resumed and exported."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from flax import nnx

import small
from openo3_jax import cli, config_json
from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax.config import GSPOConfig, LoRAConfig, OptimizerConfig, SFTConfig
from openo3_jax.data import groups
from openo3_jax.errors import InputError
from openo3_jax.models import lora
from openo3_jax.rewards.own import make_reward
from openo3_jax.train import gspo, replay, run, sft, steps
from openo3_jax.train import state as state_lib
from openo3_jax.types import Rollouts

EVERYWHERE = LoRAConfig(rank=4, alpha=6.0, vision=("qkv", "proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"))
CONFIG = small.model_config()
SETTINGS = SFTConfig(steps=5, compute_dtype="float32", remat="none", lora=EVERYWHERE)


def make_batch(num_rows=4):
    rows = [
        [small.sample(CONFIG, prompt=5, answer=7, pictures=[(4, 6), (6, 4)])],
        [small.sample(CONFIG, prompt=3, answer=4), small.sample(CONFIG, prompt=6, answer=2, pictures=[(6, 4)])],
    ]
    return small.make_batch(rows, CONFIG, num_rows=num_rows)


@pytest.fixture(scope="module")
def policy(tmp_path_factory, one_device):
    return small.make_policy(tmp_path_factory.mktemp("model"), one_device)


def attached(mesh, config=EVERYWHERE, seed=0):
    """Definition, frozen weights and adapters of the small model."""
    graphdef, params = small.make_params(CONFIG, mesh)
    return *lora.attach(graphdef, params, config, seed), params


def drift(adapters, size=0.1):
    """Adapters that add something, the same on every mesh."""
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + size * draw.normal(size=x.shape).astype(np.float32), adapters)


# ---- the model ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_changes_no_bit(dtype, one_device):
    graphdef, params = small.make_params(CONFIG, one_device)
    whole, adapters = lora.attach(graphdef, params, EVERYWHERE, 0)
    batch = make_batch()

    @jax.jit
    def logits(params, batch):
        definition = whole if lora.is_attached(params) else graphdef
        model = nnx.merge(definition, jax.tree.map(lambda x: x.astype(dtype), params))
        return model.logits(model.hidden(batch)[0])

    plain, fresh, moved = (
        np.asarray(logits(p, batch)) for p in (params, lora.join(params, adapters), lora.join(params, drift(adapters)))
    )
    np.testing.assert_array_equal(plain, fresh)
    assert np.abs(plain - moved).max() > 1e-2


def test_only_the_named_layers_have_adapters(one_device):
    _, adapters, _ = attached(one_device, LoRAConfig(rank=2, text=("q_proj",), vision=("fc2",)))
    shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(adapters)}
    assert shapes == {
        "text/layers/self_attn/q_proj/lora_a": (2, 32, 2),
        "text/layers/self_attn/q_proj/lora_b": (2, 2, 32),
        "visual/merger/fc2/lora_a": (64, 2),
        "visual/merger/fc2/lora_b": (2, 32),
    }


def test_merged_and_detached(one_device):
    """y = x (W + s A B) + b, by hand for one matrix, and the logits of the whole."""
    whole, adapters, params = attached(one_device)
    both = lora.join(params, drift(adapters))
    merged_def, merged = jax.jit(lambda p: lora.merge(whole, p))(both)
    layer = both["text"]["layers"]["mlp"]["up_proj"]
    expected = layer["kernel"][...] + 6.0 / 4 * np.einsum("lir,lro->lio", layer["lora_a"][...], layer["lora_b"][...])
    np.testing.assert_allclose(merged["text"]["layers"]["mlp"]["up_proj"]["kernel"][...], expected, atol=1e-6)
    batch = make_batch()
    applied, folded = (nnx.merge(d, p).hidden(batch)[0] for d, p in ((whole, both), (merged_def, merged)))
    np.testing.assert_allclose(applied, folded, atol=2e-5)
    plain_def, plain = lora.detach(whole, both)
    jax.tree.map(np.testing.assert_array_equal, plain, params)
    assert plain_def == merged_def == small.make_params(CONFIG, one_device)[0]


@pytest.mark.parametrize(
    "axes", [{"fsdp": 2, "tensor": 2}, pytest.param({"tensor": 2, "context": 2}, marks=pytest.mark.soak)]
)
def test_losses_and_gradients_do_not_depend_on_the_mesh(axes, one_device):
    def run_on(mesh):
        whole, adapters, params = attached(mesh)
        adapters = jax.device_put(drift(adapters), mesh_lib.state_shardings(adapters, mesh))
        value = jax.value_and_grad(lambda a, b: steps.sft_loss(whole, lora.join(params, a), b, SETTINGS))
        return jax.jit(value)(adapters, mesh_lib.shard_rows(make_batch(), mesh))

    loss, grads = run_on(mesh_lib.make_mesh(axes, devices=jax.devices()[:4]))
    expected_loss, expected = run_on(one_device)
    np.testing.assert_allclose(loss, expected_loss, atol=1e-5)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        scale = np.linalg.norm(other)
        assert np.linalg.norm(np.asarray(one) - np.asarray(other)) <= 2e-5 * scale + 1e-7, jax.tree_util.keystr(path)


# ---- the state ----


def test_the_state_holds_the_weights_once(policy):
    """Adapters and their moments in float32; the rest in the dtype of computation, without moments or a reference."""
    config = GSPOConfig(steps=2, lora=EVERYWHERE)
    made = state_lib.make_state(policy, config)
    number = sum(x.size for x in jax.tree.leaves(policy.params))
    trained = sum(x.size for x in jax.tree.leaves(made.params))
    assert made.reference is None and trained < number
    assert {x.dtype for x in jax.tree.leaves(made.params)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(made.frozen)} == {jnp.dtype("bfloat16")}
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(made))
    assert num_bytes <= 2 * number + 12 * trained + 64
    assert sum(
        x.nbytes for x in jax.tree.leaves(state_lib.make_state(policy, dataclasses.replace(config, lora=None)))
    ) > (14 * number)


def make_rollouts(policy, config):
    """Of a few prompts with random completions."""
    draw = np.random.default_rng(0)
    sample = small.sample(policy.config, prompt=6, answer=1)
    tokens = [[draw.integers(1, 90, 5).astype(np.int32) for _ in range(2)] for _ in range(2)]
    bucket = groups.group_bucket([sample] * 2, tokens, policy.config.vision, num_rows=2)
    batch, completion = groups.make_group_batch([sample] * 2, tokens, bucket, policy.config, pad_id=0)
    logp = np.where(completion >= 0, -1.5, 0).astype(np.float32)
    advantage = np.array([[1, -1], [0.5, -0.5]], np.float32)
    return Rollouts(batch, completion, logp, logp, advantage, np.ones((2, 2), bool))


def test_the_reference_is_the_model_without_its_adapters(policy):
    """The divergence is zero at first, and later that from the base, as with a second copy of the weights."""
    config = GSPOConfig(
        steps=3, compute_dtype="float32", remat="none", lora=EVERYWHERE, optimizer=OptimizerConfig(learning_rate=1e-2)
    )
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, num_samples=2))
    rollouts = make_rollouts(policy, config)
    step = steps.make_gspo_step(config)
    own = state_lib.make_state(policy, config)
    copied = state_lib.make_state(policy, config, reference=policy)
    assert copied.reference is not None
    for number in range(3):
        own, measured = step(own, rollouts)
        copied, expected = step(copied, rollouts)
        assert float(measured["kl"]) == pytest.approx(float(expected["kl"]), rel=1e-5, abs=1e-7)
        assert float(measured["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-5)
        assert (abs(float(measured["kl"])) < 1e-7) == (number == 0)
    for one, other in zip(jax.tree.leaves(own.params), jax.tree.leaves(copied.params), strict=True):
        # A thousandth of a step: AdamW makes rounding of small gradients large. Without the divergence it is 1.7 steps.
        np.testing.assert_allclose(one, other, atol=1e-3 * config.optimizer.learning_rate)


def test_a_step_changes_the_adapters_and_nothing_else(policy):
    made = state_lib.make_state(policy, SETTINGS)
    before = jax.tree.map(np.asarray, (made.params, made.frozen))
    config = policy.config
    batch = small.make_batch([[small.sample(config, prompt=5, answer=7)]], config)
    step = steps.make_sft_step(SETTINGS)
    for _ in range(2):  # A has no gradient while B is zero
        made, measured = step(made, batch)
    assert float(measured["grad_norm"]) > 0
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, made.frozen), before[1])
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), made.params, before[0])
    text = [path for path, is_moved in jax.tree_util.tree_leaves_with_path(moved) if is_moved]
    assert len(text) == 14, "A and B of the decoder's seven layers; no picture, so nothing of the tower"


def test_adapters_of_a_policy_are_merged_into_a_new_start(policy):
    made = state_lib.make_state(policy, SETTINGS)
    moved = dataclasses.replace(made, params=drift(made.params))
    again = state_lib.make_state(state_lib.trained_policy(policy, moved), SETTINGS)
    for path, leaf in nnx.to_flat_state(again.frozen):
        plain = dict(nnx.to_flat_state(moved.frozen))[path]
        assert (np.abs(np.asarray(leaf[...] - plain[...])).max() > 1e-3) == (
            path[-1] == "kernel" and "patch_embed" not in path
        )


# ---- runs ----


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.prepare(tmp_path_factory.mktemp("lora"))


SMALL = LoRAConfig(rank=4, alpha=8.0, text=("q_proj", "v_proj", "down_proj"), vision=("qkv", "fc1"))


def run_sft(root, out, mesh, *, resume=False, stop=None, learning_rate=1e-2):
    adamw = OptimizerConfig(learning_rate=learning_rate)
    config = dataclasses.replace(tiny_runs.SFT, steps=3, lora=SMALL, optimizer=adamw)
    places = {"model": root / "model", "data": root / "data", "out": out}
    return sft.run_sft(**places, config=config, mesh=mesh, resume=resume, stop=stop)


@pytest.fixture(scope="module")
def finished(root, one_device):
    """A run of three steps, and its policy."""
    return root / "run", run_sft(root, root / "run", one_device)


def bits(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_checkpoints_hold_adapters_only_and_resume_exactly(root, finished, one_device, tmp_path):
    out, policy = finished
    run_sft(root, tmp_path / "run", one_device, stop=lambda done, _: done == 2)
    again = run_sft(root, tmp_path / "run", one_device, resume=True)
    for one, other in zip(bits(policy.params), bits(again.params), strict=True):
        np.testing.assert_array_equal(one, other)
    size = sum(file.stat().st_size for file in (out / "checkpoints" / "3").rglob("*") if file.is_file())
    assert size < sum(x.nbytes for x in bits(policy.params)) / 4
    loaded = run.load(out, mesh=one_device)
    for one, other in zip(bits(policy.params), bits(loaded.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_export_merged_and_as_an_adapter(finished, one_device, tmp_path, monkeypatch):
    """The merged directory, and the adapter's as MODEL, give the logits of the policy that was trained."""
    out, policy = finished
    monkeypatch.setattr(mesh_lib, "make_mesh", lambda *_: one_device)
    assert cli.main(["export", str(out), str(tmp_path / "merged")]) == 0
    assert cli.main(["export", str(out), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    said = [[{"role": "user", "content": "Where does the circle go?"}]]
    expected = policy.logits(said)[0]
    base = policy_lib.load_pretrained(policy.directory, mesh=one_device).logits(said)[0]
    assert np.abs(base - expected).max() > 1e-2
    for name in ("merged", "adapter"):
        read = policy_lib.load_pretrained(tmp_path / name, mesh=one_device)
        np.testing.assert_allclose(read.logits(said)[0], expected, atol=2e-5)


def test_stage_two_goes_on_from_an_adapter_and_its_sampler_is_its_trainer(root, finished, one_device, tmp_path):
    out, _ = finished
    run.save_adapter(out, tmp_path / "adapter")
    config = dataclasses.replace(tiny_runs.GSPO, steps=2, lora=SMALL)
    places = {"model": tmp_path / "adapter", "data": root / "data", "out": tmp_path / "run"}
    policy = gspo.run_gspo(**places, config=config, mesh=one_device, reward=make_reward(tiny_runs.reward))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and max(line["gspo/logp_gap_max"] for line in lines) < 1e-4
    loaded = run.load(tmp_path / "run", mesh=one_device)
    for one, other in zip(bits(policy.params), bits(loaded.params), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(InputError, match="an adapter itself, and peft adds one to a whole model"):
        run.save_adapter(tmp_path / "run", tmp_path / "second")


@pytest.mark.parametrize("adapters", [None, SMALL], ids=["all weights", "adapters"])
def test_an_evaluator_gets_weights_in_the_dtype_of_computation(adapters, root, one_device, tmp_path):
    """In bfloat16; what is returned has what was trained in float32. Both can be asked."""
    said = [[{"role": "user", "content": "Where does the circle go?"}]]

    def dtypes_of(policy) -> set[str]:
        assert np.isfinite(policy.logits(said)[0]).all()
        assert policy.generate(said, max_new_tokens=2).tokens[0][0].size
        return {str(leaf.dtype) for leaf in jax.tree.leaves(policy.params)}

    seen = []
    config = dataclasses.replace(tiny_runs.SFT, steps=1, compute_dtype="bfloat16", lora=adapters)
    policy = sft.run_sft(
        model=root / "model",
        data=root / "data",
        out=tmp_path / "run",
        config=config,
        mesh=one_device,
        evaluate=lambda policy, done: seen.append(dtypes_of(policy)) or {},
    )
    assert seen == [{"bfloat16"}]
    assert dtypes_of(policy) == ({"float32"} if adapters is None else {"float32", "bfloat16"})


def test_another_base_is_noticed(root, finished, one_device, tmp_path):
    out, _ = finished
    shutil.copytree(out, tmp_path / "run")
    settings = json.loads((out / "config.json").read_text())
    shutil.copytree(root / "model", tmp_path / "model")
    weights = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings | {"model": str(tmp_path / "model")}))
    with pytest.raises(InputError, match="has other weights than when"):
        run.load(tmp_path / "run", mesh=one_device)
    (tmp_path / "data").symlink_to(root / "data")
    with pytest.raises(InputError, match=r"frozen is \d+ in the checkpoint and \d+ now"):
        run_sft(tmp_path, tmp_path / "run", one_device, resume=True)


@pytest.mark.filterwarnings("error:A large amount of constants")
def test_a_dump_holds_the_adapters_and_runs_again(root, one_device, tmp_path, small_constants):
    """What is frozen is an argument of the program that runs it again."""
    with pytest.raises(InputError, match="step-2-0 runs it again"):
        run_sft(root, tmp_path / "run", one_device, learning_rate=1e37)
    report = replay.replay(tmp_path / "run" / replay.DUMPS / "step-2-0", mesh=one_device)
    assert report.startswith("sft, step 2") and "gradients: not finite in" in report and "of 10 arrays" in report


# ---- mistakes ----


def read(value):
    return config_json.from_json(SFTConfig, {"steps": 1, "lora": value}, "run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAConfig(rank=0), "rank=0"),
        (lambda: LoRAConfig(alpha=0.0), "alpha=0.0"),
        (lambda: LoRAConfig(text=("qkv",)), "text names qkv; expected some of q_proj"),
        (lambda: LoRAConfig(vision=("q_proj",)), "vision names q_proj; expected some of qkv"),
        (lambda: LoRAConfig(text=()), "nothing would be trained"),
        (
            lambda: config_json.from_json(SFTConfig, {"steps": 1, "lora": {"rnk": 1}}, "run"),
            "run: lora: unknown field rnk",
        ),
        (
            lambda: config_json.from_json(SFTConfig, {"steps": 1, "lora": 4}, "run"),
            "run: lora is 4; expected an object",
        ),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)


def test_there_may_be_no_adapter(policy, tmp_path):
    with pytest.raises(InputError, match="all weights were trained; export them whole"):
        policy.save_adapter(tmp_path / "out")
