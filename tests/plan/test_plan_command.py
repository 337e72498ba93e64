"""Plans on the devices of this machine: what programs must not hold, what fits, what is searched, what is refused."""

import collections
import dataclasses
import json
import math
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from openo3_jax import cli, recipes
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import QWEN2_5_VL, GSPOConfig, LoRAConfig, SamplingConfig, SFTConfig
from openo3_jax.data import sampling
from openo3_jax.errors import InputError
from openo3_jax.models import generate
from openo3_jax.plan import command, compiler, devices, programs, search, workload
from openo3_jax.plan.config import Rates, Sizes
from openo3_jax.train import losses

MODEL = small.model_config(vocab_size=2048)
SIZES = Sizes(frames=2, text_tokens=40, answer_tokens=64)
VIDEO = dataclasses.replace(recipes.sft_tiny().video, min_pixels=8 * 28 * 28, max_pixels=8 * 28 * 28)
SFT = SFTConfig(steps=1, batch_size=8, max_row_tokens=256, compute_dtype="float32", video=VIDEO)
GSPO = GSPOConfig(
    steps=1,
    batch_size=8,
    sampling=SamplingConfig(num_samples=2, max_new_tokens=64),
    compute_dtype="float32",
    video=VIDEO,
)
EIGHT = devices.Devices("h100", "8")


def request(config, axes=None, model=MODEL):
    return compiler.Request(config, model, EIGHT, axes, SIZES)


@pytest.fixture(scope="module")
def answers():
    """Of both stages, compiled for eight devices of this machine; the real compilers are benchmarks/plan.py's."""
    quick = {"xla_backend_optimization_level": 0}
    configs = {"sft": SFT, "gspo": dataclasses.replace(GSPO, remat="none")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_LOGITS", 16 * MODEL.text.vocab_size)
        patch.setattr(losses, "MIN_CHUNK_TARGETS", 16)
        return {name: compiler.answer(request(one, {"fsdp": 8}), jax.devices(), quick) for name, one in configs.items()}


def test_described_hosts_of_gpus_are_told_apart():
    """All of them are described as one slice; tensor stays within a host all the same."""
    gpu = {"slice_index": 0, "platform": "gpu", "device_kind": "fake"}
    described = [types.SimpleNamespace(id=i, process_index=i // 8, **gpu) for i in range(16)]
    with pytest.raises(InputError, match="over 2 hosts: only data and fsdp may cross hosts"):
        compiler.answer(request(SFT, {"tensor": 16}), described)


# ---- what must not be in a program ----


@pytest.mark.parametrize("stage", ["sft", "gspo"])
def test_train_steps_hold_no_logits_of_a_row_and_no_whole_model(stage, answers):
    answer = answers[stage]
    update = answer.programs[-1]
    assert update.name == "update"
    assert update.most_logits == 16, "a chunk of targets"
    sizes = {True: 0, False: 0}  # bytes of the weights in stacked layers, and of all others
    for path, leaf in jax.tree_util.tree_leaves_with_path(programs.make_abstract(SFT, MODEL, one()).state.params):
        name = jax.tree_util.keystr(path)
        sizes["layers" in name or "blocks" in name] += programs.num_bytes(leaf)
    copies = 2 if stage == "gspo" else 1  # the reference's
    assert 0 < update.gathered_outside_loops <= copies * (sizes[False] + 0.3 * sizes[True])


def one():
    return mesh_lib.make_mesh({}, devices=jax.devices()[:1])


def test_a_decode_step_makes_no_cache(one_device):
    """Of all it makes only the written suffix has a cache's shape. What compilers add: benchmarks/plan.py."""
    graphdef, params = small.make_params(MODEL, one_device)
    load = workload.make_load(GSPO, MODEL, SIZES, 1)
    batch = programs.abstract_batch(load.prompt, 2, MODEL, one_device)
    slots = jax.ShapeDtypeStruct((2, load.prompt.seq), jnp.int32)
    prompts = jax.eval_shape(partial(generate.prefill, graphdef), params, batch, slots)
    layout = jax.eval_shape(partial(generate.sampling_layout, graphdef), params)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (2, 3)))
    is_in = jax.ShapeDtypeStruct((MODEL.text.vocab_size,), jnp.bool_)
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    decode = partial(generate.decode, config=SamplingConfig(num_samples=3, max_new_tokens=72))
    program = jax.make_jaxpr(decode)(layout, prompts, keys, is_in, is_in, limit)
    loop = next(equation for equation in program.eqns if equation.primitive.name == "while")
    made = dict(makers(loop.params["body_jaxpr"].jaxpr))
    heads, size = MODEL.text.num_key_value_heads, MODEL.text.head_dim
    suffix, prefix = 2 * 3 * heads * 72 * size, 2 * heads * load.prompt.seq * size
    assert made[suffix] == ["dynamic_update_slice"] * 2 * MODEL.text.num_hidden_layers
    assert prefix not in made


def makers(jaxpr):
    """Numbers of elements, each with the primitives that make arrays of so many."""
    found = collections.defaultdict(list)
    for equation in jaxpr.eqns:
        inner = [value for value in jax.tree.leaves(equation.params, is_leaf=small.is_jaxpr) if small.is_jaxpr(value)]
        if inner:
            for one in inner:
                for size, names in makers(getattr(one, "jaxpr", one)):
                    found[size] += names
            continue
        for variable in equation.outvars:
            found[math.prod(getattr(variable.aval, "shape", ()))].append(equation.primitive.name)
    return found.items()


def test_programs_of_stage_two_are_those_of_a_step(answers):
    assert [one.name for one in answers["gspo"].programs] == ["prefill", "layout", "decode", "update"]
    answer = answers["gspo"]
    state = sum(getattr(answer, name) for name in compiler.Answer._fields if name.endswith("_bytes"))
    batch = programs.abstract_batch(answer.load.row, 8, MODEL, mesh_lib.make_mesh({"fsdp": 8}))
    assert answer.programs[-1].arguments == pytest.approx(state + programs.num_bytes(batch), rel=0.02)


def test_what_a_program_does_not_read_takes_memory_too(answers):
    """The tower's weights while the decoder's are laid out, and the state beside all of the sampler's programs."""
    answer = answers["gspo"]
    weights = programs.num_bytes(programs.make_abstract(GSPO, MODEL, mesh_lib.make_mesh({"fsdp": 8})).weights)
    state = sum(getattr(answer, name) for name in compiler.Answer._fields if name.endswith("_bytes"))
    prefill, layout, decode = answer.programs[:3]
    for one, before in ((prefill, 0), (layout, prefill.outputs), (decode, prefill.outputs + layout.outputs)):
        assert one.arguments + one.resident > 0.99 * (state + weights + before), (
            one.name
        )  # outputs count some bytes of their own


# ---- nothing is allocated, everything is counted ----


@pytest.mark.parametrize(
    ("change", "bytes_per_weight"),
    [({}, 4 + 8 + 2), ({"kl_coef": 0.0}, 4 + 8), ({"lora": LoRAConfig(rank=1, text=("k_proj",))}, 2)],
)
def test_a_7b_state_by_hand(change, bytes_per_weight):
    """float32 weights and two moments, a bfloat16 reference; with adapters the bfloat16 weights alone."""
    config = dataclasses.replace(recipes.gspo_7b(), **change)
    mesh = mesh_lib.make_mesh({"fsdp": 8})
    state = programs.make_abstract(config, QWEN2_5_VL["7b"], mesh).state
    number = 8_292_166_656
    assert programs.num_bytes(state) * 8 / number == pytest.approx(bytes_per_weight, rel=2e-3)


def test_sizes_of_a_load():
    """16 frames of 128 visual tokens with 16 of text each, and 256: 2,560. Rows of stage two hold 4 x 768 more."""
    load = workload.make_load(recipes.gspo_7b(), QWEN2_5_VL["7b"], Sizes(), 8)
    assert (load.prompt_tokens, load.rows, load.prompts) == (2560, 8, 8)
    assert (load.row.seq, load.row.patches, load.row.targets) == (5632, 8192, 3072)
    assert load.prompt.seq == 2560 and load.padding == 1
    load = workload.make_load(recipes.sft_7b(), QWEN2_5_VL["7b"], Sizes(), 64)
    assert (load.rows, load.row.seq, load.padding) == (64, 4096, 8)


FRAMES = {  # settings of the video -> visual tokens of a frame of 16:9
    (): 8 * 16,  # the floor of 128 tokens lifts the cap to 134
    (("min_pixels", 100 * 784),): 8 * 16,  # 128 are the cap
    (("min_pixels", 96 * 784), ("max_pixels", 96 * 784)): 7 * 14,  # the cap is int(1.05 * 96) = 100
    (("max_frames", 64), ("max_pixels", 4096 * 784)): 45 * 80,  # 128,000 * 0.9 / 64 * 2 = 3,600 tokens: their share
}


@pytest.mark.parametrize("changes", FRAMES)
def test_frames_are_as_large_as_the_data_makes_them(changes):
    config = recipes.gspo_7b()
    config = dataclasses.replace(config, video=dataclasses.replace(config.video, **dict(changes)))
    load = workload.make_load(config, QWEN2_5_VL["7b"], Sizes(), 8)
    assert len(load.grids) == config.video.max_frames
    grid = load.grids[0]
    assert grid.height * grid.width // 4 == FRAMES[changes]
    area = FRAMES[changes] * 28 * 28
    height, width = sampling.frame_size(2160, 3840, len(load.grids), config.video)
    assert 0.85 * area < height * width <= area * 134 / 128


def test_no_frames_are_planned_where_none_are_asked_for():
    load = workload.make_load(recipes.gspo_7b(), QWEN2_5_VL["7b"], Sizes(frames=0), 8)
    assert (load.grids, load.prompt_tokens) == ((), 256)


def test_floors_and_cost_by_hand(answers):
    """One H100-second of arithmetic takes 2.5 at 40 %; 1,000 steps on 8 devices at 2 an hour."""
    config = dataclasses.replace(SFT, steps=1000)
    wish = request(config)
    estimate = command.estimate_of(wish, answers["sft"], Rates(compute_efficiency=0.5, price=2.0))
    work = workload.work(config, MODEL, SIZES, answers["sft"].load)
    update = answers["sft"].programs[0]
    floor = estimate.floors[0]
    rows = answers["sft"].load
    assert floor.flops == pytest.approx(work.update * rows.padding)
    assert floor.compute_s == pytest.approx(floor.flops / (8 * 989e12))
    assert floor.memory_s == pytest.approx((update.arguments + update.outputs) / 3.35e12)
    assert floor.links_s == pytest.approx(sum(one.sent_bytes for one in update.collectives) / 450e9)
    expected = max(floor.compute_s / 0.5, floor.memory_s / 0.6, floor.links_s / 0.6)
    assert estimate.expected_s == pytest.approx(expected)
    assert estimate.run_cost == pytest.approx(1000 * expected / 3600 * 8 * 2.0)
    assert estimate.fits and estimate.available_bytes == 84_942_979_072 - 8 * 2**30
    assert work.update == pytest.approx(work.model * 4 / 3), "every forward is made twice"


def test_decoding_processes_are_those_of_the_recipe(answers):
    """Half a GiB each: 32 of them where the host decides, 2 in this one."""
    few = request(dataclasses.replace(SFT, workers=2))
    most, least = (command.estimate_of(one, answers["sft"], Rates()).host_bytes for one in (request(SFT), few))
    assert most - least == (32 - 2) * 2**29


def test_updates_of_a_step_are_all_counted(answers):
    """Two minibatches: the update runs twice, what comes before it once."""
    wish = request(dataclasses.replace(GSPO, minibatches=2))
    once, twice = (command.estimate_of(one, answers["gspo"], Rates()) for one in (request(GSPO), wish))
    assert [one.runs for one in twice.floors] == [1, 1, 1, 2]
    assert twice.floors[3].links_s == pytest.approx(2 * once.floors[3].links_s)
    assert twice.floors[2].links_s == once.floors[2].links_s


def test_what_does_not_fit(answers):
    full = answers["sft"].programs[0]._replace(temporary=80 * 2**30)
    refused = full._replace(refused="RESOURCE_EXHAUSTED: too much")
    for program in (full, refused):
        assert not command.estimate_of(request(SFT), answers["sft"]._replace(programs=[program]), Rates()).fits


# ---- search ----


LARGEST = [(8, 8, 8), (8, 15, 8), (16, 100, 96), (8, 2048, 2048), (9, 17, 17), (9, 40, 33), (0, 5, 0), (0, 20, 16)]
ROOMS = {  # of a number up to a limit: in proportion, in stairs, as its square, and a compiler that only says no
    "line": lambda number, limit: 1000 * (limit - number),
    "stairs": lambda number, limit: 1000 * (limit // 8 - (number + 7) // 8) if number != limit else 0,
    "square": lambda number, limit: limit**2 - number**2,
    "none": lambda number, limit: 1 if number <= limit else None,
}


@pytest.mark.parametrize(("known", "limit", "expected"), LARGEST)
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
def test_the_largest_that_fits(room, known, limit, expected):
    """To 8, counted from what is known to fit: from 9 these are 17, 25, 33, 41."""
    asked = []

    def ask(number):
        asked.append(number)
        return room(number, limit)

    if room(known, limit) is not None and room(known, limit) >= 0:
        assert search.largest(ask, known, room(known, limit), 8) == expected
        assert len(set(asked)) == len(asked) <= 20 and known not in asked


def test_a_line_needs_three_questions():
    asked = []
    assert search.largest(lambda number: asked.append(number) or 100 - number, 16, 84, 8) == 96
    assert asked == [32, 96, 104]


def test_search_ranks_what_fits(answers):
    """Larger batches are faster here until they are too large; one mesh does not divide."""
    answer = answers["sft"]

    def judge(wish):
        if wish.axes["tensor"] == 2:
            raise InputError("mesh: does not divide")
        scale = wish.config.batch_size / 8
        program = answer.programs[0]._replace(temporary=int(20 * 2**30 * scale))
        made = answer._replace(axes=wish.axes, programs=[program])
        estimate = command.estimate_of(wish, made, Rates())
        return made, estimate._replace(expected_s=scale**0.5 * (2 if wish.config.remat == "layers" else 1))

    said = []
    tried = search.search(request(SFT), judge, said.append)
    assert len(said) == len(tried)
    best = tried[0].request
    assert (best.config.batch_size, best.axes) == (16, {"data": 1, "fsdp": 8, "tensor": 1})
    assert best.config.remat != "layers"
    assert [one.estimate.fits for one in tried] == sorted((one.estimate.fits for one in tried), reverse=True)
    assert tried[-1].request.config.batch_size == 32 and not tried[-1].estimate.fits


def test_a_search_that_finds_nothing_says_why():
    def judge(wish):
        raise InputError("--devices v5p:3x5x7: no such slice")

    with pytest.raises(InputError, match=r"no mesh of h100:8 can be compiled; .* v5p:3x5x7: no such slice"):
        search.search(request(SFT), judge, print)


@pytest.mark.parametrize("config", [SFT, GSPO])
@pytest.mark.parametrize(("frames", "most_frames"), [(2, 34), (None, 40)])
def test_limits_are_sought_each_alone(frames, most_frames, config, answers):
    """Up to 40 frames, 3,200 tokens of text and groups of 9 fit, from 2 (the recipe's 16), 40 and 2, by 8, 1,024, 2."""

    def judge(wish):
        group = wish.config.sampling.num_samples if isinstance(wish.config, GSPOConfig) else 0
        shares = wish.sizes.num_frames(wish.config.video) / 40, wish.sizes.text_tokens / 3200, group / 9
        answer = answers["sft"]
        estimate = command.estimate_of(request(SFT), answer, Rates())
        return answer, estimate._replace(peak_bytes=int(2**30 * max(shares)), available_bytes=2**30)

    most = {"frames": most_frames, "tokens of text": 3112}
    if config is GSPO:
        most["samples of a prompt"] = 8
    wish = request(config)._replace(sizes=dataclasses.replace(SIZES, frames=frames))
    best = search.Tried("", wish, *judge(wish))
    assert search.limits(best, judge, lambda said: None) == most


def test_meshes():
    assert list(search.meshes(1, MODEL)) == [{"data": 1, "fsdp": 1, "tensor": 1}]
    found = list(search.meshes(256, QWEN2_5_VL["7b"]))
    assert {"data": 4, "fsdp": 64, "tensor": 1} in found and all(np.prod([*one.values()]) == 256 for one in found)


# ---- mistakes: one line each ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "b200:8"], "'b200' is no kind of device; expected one of h100, h200"),
        (["--devices", "h100"], "expected h100:SHAPE, such as h100:16"),
        (["--devices", "v5p:4x4"], "expected v5p:SHAPE, such as v5p:8x8x8"),
        (["--devices", "h100:12"], "beyond 8 GPUs a multiple of 8"),
        (["--devices", "h100:8", "--model", "8b"], "--model 8b: expected 3b, 7b, 32b, 72b, or a directory"),
        (["--devices", "h100:8", "--frames", "-1"], "frames=-1"),
        (["--devices", "h100:8", "--compute-efficiency", "0"], "expected shares in (0, 1]"),
    ],
)
def test_mistakes(words, message, capsys):
    assert cli.main(["plan", "sft_7b", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


DAMAGED = {  # what config.json holds: what is said
    "{": "config.json: not readable as JSON",
    "[1]": "config.json: holds a list; expected a JSON object",
    '{"model_type": "qwen2_5_vl", "vision_config": null}': "config.json: vision_config is None; expected an object",
    '{"model_type": "qwen2_5_vl", "text_config": []}': "config.json: text_config is []; expected an object",
    json.dumps(MODEL.to_hf() | {"num_attention_heads": 0}): "config.json: a value cannot be used (",
    json.dumps(MODEL.to_hf() | {"rope_scaling": 3}): "config.json: a value cannot be used (",
}


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_config_of_a_model(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert cli.main(["plan", "sft_7b", "--devices", "h100:8", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert DAMAGED[content] in error and error.count("\n") == 1


@pytest.mark.parametrize(("text", "extra"), [("h100:8", "plan-gpu"), ("v5p:2x2x2", "plan-tpu")])
def test_a_compiler_that_is_not_installed(text, extra, monkeypatch, capsys):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "gspo_7b", "--devices", text]) == 2
    assert f'pip install -e ".[{extra}]"' in capsys.readouterr().err


def test_a_mesh_that_does_not_divide():
    with pytest.raises(InputError, match="make 6 places for 8 devices"):
        compiler.answer(request(SFT, {"fsdp": 6}), jax.devices())
    with pytest.raises(InputError, match="do not divide"):
        compiler.answer(request(SFT, {"tensor": 8}), jax.devices())


# ---- the process that compiles ----


def test_requests_survive_their_json():
    for config in (SFT, dataclasses.replace(GSPO, lora=LoRAConfig(rank=2))):
        wish = request(config, {"fsdp": 8}, QWEN2_5_VL["7b"])
        assert compiler._load(compiler._dump(wish)) == wish


def test_the_process_that_compiles_runs_on_the_cpu(monkeypatch):
    """Whatever the user's environment says; one that ends at once is told with what it said."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(devices, "check_extra", lambda devices: None)
    child = "import os, sys; sys.exit(os.environ['JAX_PLATFORMS'])"
    popen = compiler.subprocess.Popen
    monkeypatch.setattr(compiler.subprocess, "Popen", lambda _, **how: popen([sys.executable, "-c", child], **how))
    with (
        compiler.Compiler(EIGHT) as compile_for,
        pytest.raises(RuntimeError, match=r"^the compiler ended with 1: cpu$"),
    ):
        compile_for(request(SFT))


def test_a_compiler_that_ended_before_it_was_asked(monkeypatch):
    """What was written and not read is nothing that leaving the block may fail of."""
    monkeypatch.setattr(devices, "check_extra", lambda devices: None)
    pipe = compiler.subprocess.PIPE
    with compiler.Compiler(EIGHT) as compile_for, pytest.raises(RuntimeError, match=r"^the compiler ended with 3: "):
        command_line = [sys.executable, "-c", "raise SystemExit(3)"]
        compile_for._process = compiler.subprocess.Popen(command_line, stdin=pipe, stdout=pipe, text=True)
        compile_for._process.wait()
        compile_for(request(SFT))


def test_a_plan_from_the_command_line(monkeypatch, tmp_path, capsys, answers):
    """The child's part is played by this process: what is printed, what is written, and the exit code."""
    monkeypatch.setattr(compiler.Compiler, "__call__", lambda self, wish: answers["sft"])
    monkeypatch.setattr(devices, "check_extra", lambda devices: None)
    (tmp_path / "config.json").write_text(json.dumps(MODEL.to_hf()))
    words = ["plan", "sft_7b", "--devices", "h100:8", "--model", str(tmp_path), "--price", "2"]
    assert cli.main([*words, "--json", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    assert "fits: peak" in text and "at 2 for a device and hour" in text and "all-gather" in text
    assert "of the rows hold samples" not in text
    assert "if 40% of the arithmetic and 60% of the bandwidths are reached" in text and "optimizer" in text
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["programs"][0]["collectives"][0]["sent_bytes"] > 0
    assert found["rates"] == {"compute_efficiency": 0.4, "bandwidth_efficiency": 0.6, "price": 2.0}
    kinds = found["bytes_by_kind"]
    assert kinds["optimizer"] == pytest.approx(2 * kinds["trained weights"], rel=1e-3)
    assert kinds["activations, gradients, gathered weights"] == found["programs"][0]["temporary"] > 0
    assert found["model_flops"] > 0
    empty = answers["sft"]._replace(load=answers["sft"].load._replace(padding=4.0))
    monkeypatch.setattr(compiler.Compiler, "__call__", lambda self, wish: empty)
    assert cli.main(words) == 0
    assert "25% of the rows hold samples" in capsys.readouterr().out
    huge = answers["sft"]._replace(programs=[answers["sft"].programs[0]._replace(temporary=2**40)])
    monkeypatch.setattr(compiler.Compiler, "__call__", lambda self, wish: huge)
    assert cli.main(words) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out
