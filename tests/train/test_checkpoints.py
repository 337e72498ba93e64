"""What is on disk is whole, proven and kept by the policy, whatever happens to the disk; any mesh reads it."""

import dataclasses
import errno
import json
import os
import resource
import shutil

import jax
import numpy as np
import pytest

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import OptimizerConfig, SFTConfig, VideoConfig
from openo3_jax.errors import InputError
from openo3_jax.train import checkpoint, run
from openo3_jax.train import resume as resume_lib
from openo3_jax.train import state as state_lib
from openo3_jax.train.checkpoint import Checkpoints, Record

CONFIG = SFTConfig(steps=3, optimizer=OptimizerConfig(learning_rate=1e-3))


def devices(number: int):
    return mesh_lib.make_mesh({"fsdp": number}, devices=jax.devices()[:number])


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return small.make_policy(tmp_path_factory.mktemp("model"), devices(8))


@pytest.fixture(scope="module")
def state(policy):
    made = state_lib.make_state(policy, CONFIG)
    moments = jax.tree.map(lambda x: x + 0.25 if x.dtype == np.float32 else x, made.opt_state)
    return dataclasses.replace(made, step=made.step + 2, opt_state=moments)


def record(step, score=None, about=None):
    return Record(step, about or {}, {}, score)


@pytest.fixture
def two(tmp_path, state):
    """A directory with checkpoints 1 and 2; what was said."""
    said = []
    with Checkpoints(tmp_path / "checkpoints", keep_last=2, say=said.append) as checkpoints:
        checkpoints.save(state, record(1))
        checkpoints.save(state, record(2))
    assert not said
    return tmp_path / "checkpoints"


def assert_equal(one, other):
    """Weights, moments and step, bit for bit."""
    for name in ("params", "opt_state", "step"):
        for a, b in zip(*(jax.tree.leaves(getattr(x, name)) for x in (one, other)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# ---- whole ----


def test_each_file_cut_off_in_turn_is_named_and_the_checkpoint_before_is_used(two):
    names = sorted(path.relative_to(two / "2") for path in (two / "2").rglob("*") if path.is_file())
    assert len(names) > 10
    for name in names:
        file = two / "2" / name
        content = file.read_bytes()
        for cut in {0, len(content) // 2, len(content) - 1}:
            file.write_bytes(content[:cut])
            said = []
            assert checkpoint.newest_good(two, said.append) == 1, name
            assert len(said) == 1 and str(file) in said[0] and "\n" not in said[0], said
        file.write_bytes(content)
    assert checkpoint.newest_good(two, pytest.fail) == 2


def test_one_changed_byte_is_found(two):
    file = max((path for path in (two / "2").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = []
    assert checkpoint.newest_good(two, said.append) == 1
    assert f"{file} has other content" in said[0]


def test_a_missing_file_is_found(two):
    shutil.rmtree(two / "2" / "params" / "d")
    assert "is missing" in checkpoint.damage(two, 2)


def test_nothing_good_is_left(two, tmp_path):
    for step in (1, 2):
        (two / str(step) / checkpoint.RECORD).write_text("{")
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        resume_lib.find(tmp_path, {}, lambda line: None)


def test_export_refuses_a_damaged_checkpoint(two, policy):
    (two / "2" / "params" / "_METADATA").write_text("")
    with pytest.raises(InputError, match="_METADATA has 0 bytes where"):
        checkpoint.load_params(two, policy.params, policy.mesh)


def test_export_of_a_step(two, policy):
    (two / "2" / "params" / "_METADATA").write_text("")  # the newest cannot be read
    found = checkpoint.load_params(two, policy.params, policy.mesh, 1)
    jax.tree.map(np.testing.assert_array_equal, found, checkpoint.read_params(two / "1", policy.params, policy.mesh))
    with pytest.raises(InputError, match="no checkpoint of step 7; expected one of 1, 2"):
        checkpoint.load_params(two, policy.params, policy.mesh, 7)


# ---- kept by policy ----


def test_the_newest_and_the_best_stay(tmp_path, state):
    with Checkpoints(tmp_path, keep_last=2, say=pytest.fail) as checkpoints:
        for step, score in enumerate([0.2, 0.9, None, 0.4, 0.9, 0.1], start=1):
            checkpoints.save(state, record(step, score))
    assert checkpoint.finished(tmp_path) == [2, 5, 6], "of equal scores the first is the best"


def test_what_cannot_be_read_or_deleted_does_not_end_the_run(two, state, monkeypatch):
    """The new checkpoint is whole by then."""
    (two / "1" / checkpoint.RECORD).write_text("{")
    rmtree, said = shutil.rmtree, []

    def refuse(at, *more, **options):
        if at == two / "2":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(at))
        rmtree(at, *more, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with Checkpoints(two, keep_last=2, say=said.append) as checkpoints:
        for step in (3, 4):
            checkpoints.save(state, record(step))
            checkpoints.wait()
            assert checkpoints.failure is None
    assert checkpoint.finished(two) == [3, 4] and not (two / "1").exists()
    assert said == [f"{two}: checkpoint 2 is no longer needed and cannot be deleted: {os.strerror(errno.EBUSY)}"]


def test_what_is_not_finished_or_later_makes_room(two, tmp_path):
    shutil.copytree(two / "2", two / "3")
    (two / "3" / checkpoint.RECORD).unlink()  # killed before its end
    (two / "4.orbax-checkpoint-tmp").mkdir()
    (two / "5.orbax-checkpoint-tmp.json").write_text("{")  # a record that a kill cut off
    assert checkpoint.finished(two) == [1, 2]
    checkpoint.set_aside(two, 1, tmp_path / "aside")
    assert sorted(os.listdir(two)) == ["1"] and os.listdir(tmp_path / "aside") == ["2"]


# ---- bit for bit, on any mesh ----


def test_a_state_that_is_donated_while_it_is_written(tmp_path, policy, state):
    """The files hold the state as it was, not what the following steps made of it."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    running = jax.tree.map(lambda x: x + 0, state)
    with Checkpoints(tmp_path, keep_last=1, say=pytest.fail) as checkpoints:
        checkpoints.save(running, record(2))
        for _ in range(5):
            running = step(running)
    assert_equal(checkpoint.restore(tmp_path, 2, state_lib.resume_state(policy, CONFIG)), state)


@pytest.mark.parametrize("number", [8, 4, 1])
def test_restored_onto_another_mesh(number, two, state, tmp_path):
    other = small.make_policy(tmp_path / "model", devices(number))
    wanted = state_lib.resume_state(other, CONFIG)
    restored = checkpoint.restore(two, 2, wanted)
    assert_equal(restored, state)
    for leaf, place in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == place.sharding and len(leaf.sharding.device_set) == number


# ---- disks that fail ----


def test_a_full_disk_is_told_in_one_line_and_the_last_good_one_stays(two, state):
    """The kernel refuses to write beyond a size, as a full disk does; later there is room again."""
    said = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(two, keep_last=2, say=said.append) as checkpoints:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            checkpoints.save(state, record(3))
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(said) == 1 and "\n" not in said[0]
        assert "checkpoint 3 cannot be written" in said[0] and "the last good one is 2" in said[0]
        assert checkpoints.failure == said[0]
        checkpoints.save(state, record(4))
        checkpoints.wait()
        assert checkpoints.failure is None and len(said) == 1
    assert checkpoint.finished(two) == [2, 4]
    assert checkpoint.damage(two, 4) is None


def test_a_record_that_cannot_be_written_leaves_nothing_behind(two, state, monkeypatch):
    """Nor does one that a kill cut off, once the next checkpoint is written."""
    (two / "2.orbax-checkpoint-tmp.json").write_text("{")
    replace, said = os.replace, []

    def refuse(source, target):
        if str(target).endswith(checkpoint.RECORD):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with Checkpoints(two, keep_last=2, say=said.append) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            checkpoints.save(state, record(3))
            checkpoints.wait()
        assert len(said) == 1 and "checkpoint 3 cannot be written: No space left on device" in said[0]
        assert sorted(os.listdir(two)) == ["1", "2", "3"]
        checkpoints.save(state, record(4))
    assert checkpoint.finished(two) == [2, 4] and len(said) == 1


def test_a_directory_that_cannot_be_written(tmp_path, state):
    """/sys refuses new directories, even root's."""
    said = []
    with Checkpoints(tmp_path.joinpath("/sys/kernel/checkpoints"), keep_last=2, say=said.append) as checkpoints:
        checkpoints.save(state, record(1))
    assert len(said) == 1 and "cannot be written" in said[0] and "there is no earlier one" in said[0]


def test_checkpoints_deleted_while_the_run_goes_on(tmp_path, state):
    said = []
    with Checkpoints(tmp_path / "checkpoints", keep_last=2, say=said.append) as checkpoints:
        checkpoints.save(state, record(1))
        checkpoints.wait()
        shutil.rmtree(tmp_path / "checkpoints")
        checkpoints.save(state, record(2))
    assert len(said) == 1 and "checkpoint 1 has been deleted" in said[0]
    assert checkpoint.finished(tmp_path / "checkpoints") == [2]


# ---- going on with the same ----

ABOUT = {
    "stage": "sft",
    "records": "abc",
    "reference": None,
    "shapes": {"['w']": "float32[2,3]"},
    "config": {"seed": 1, "optimizer": {"learning_rate": 0.1}},
    "versions": {"jax": "1"},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "gspo"}, "stage is sft in the checkpoint and gspo now"),
        ({"records": "def"}, "records is abc in the checkpoint and def now"),
        ({"reference": 7}, "reference is None in the checkpoint and 7 now"),
        (
            {"shapes": {"['w']": "float32[2,4]"}},
            r"shapes\['w'\] is float32\[2,3\] in the checkpoint and float32\[2,4\]",
        ),
        ({"config": {"seed": 1, "optimizer": {"learning_rate": 0.2}}}, "config.optimizer.learning_rate is 0.1 in the"),
        ({"config": {"seed": 1}}, "config.optimizer is known to the checkpoint only"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, message, tmp_path, state):
    with Checkpoints(tmp_path / run.CHECKPOINTS, keep_last=1, say=pytest.fail) as checkpoints:
        checkpoints.save(state, record(1, about=ABOUT))
    assert resume_lib.find(tmp_path, ABOUT, pytest.fail).step == 1
    with pytest.raises(InputError, match=message):
        resume_lib.find(tmp_path, ABOUT | change, pytest.fail)


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(tmp_path, state):
    def about(rate: float | None) -> dict:
        config = SFTConfig(steps=3, optimizer=OptimizerConfig(name="muon", adam_learning_rate=rate))
        return ABOUT | {"config": resume_lib.describe("sft", config, "abc", {})["config"]}

    older = about(None)
    del older["config"]["optimizer"]["adam_learning_rate"]
    with Checkpoints(tmp_path / run.CHECKPOINTS, keep_last=1, say=pytest.fail) as checkpoints:
        checkpoints.save(state, record(1, about=older))
    assert resume_lib.find(tmp_path, about(None), pytest.fail).step == 1
    with pytest.raises(InputError, match=r"adam_learning_rate is None in the checkpoint and 0\.1 now"):
        resume_lib.find(tmp_path, about(0.1), pytest.fail)


def test_a_run_that_ended_for_its_media_goes_on_with_other_limits(tmp_path, state):
    def about(config: SFTConfig) -> dict:
        return ABOUT | {"config": resume_lib.describe("sft", config, "abc", {})["config"]}

    with Checkpoints(tmp_path / run.CHECKPOINTS, keep_last=1, say=pytest.fail) as checkpoints:
        checkpoints.save(state, record(1, about=about(SFTConfig(steps=3))))
    patient = SFTConfig(steps=3, max_bad_fraction=0.5, video=VideoConfig(deadline_s=300.0, max_side_px=32_000))
    assert resume_lib.find(tmp_path, about(patient), pytest.fail).step == 1
    with pytest.raises(InputError, match=r"config\.video\.fps is 2\.0 in the checkpoint and 1\.0 now"):
        resume_lib.find(tmp_path, about(SFTConfig(steps=3, video=VideoConfig(fps=1.0))), pytest.fail)


def test_another_version_is_told(tmp_path, state):
    with Checkpoints(tmp_path / run.CHECKPOINTS, keep_last=1, say=pytest.fail) as checkpoints:
        checkpoints.save(state, record(1, about=ABOUT))
    said = []
    assert resume_lib.find(tmp_path, ABOUT | {"versions": {"jax": "2"}}, said.append).step == 1
    assert "versions.jax is 1 in the checkpoint and 2 now" in said[0]


@pytest.mark.parametrize(
    ("tail", "kept"),
    [("", 4), ('{"step": 3, "x": ', 4), ('{"step": 3, "x": 1}\n', 4), ('{"step": 2}\n{"step": 3}\n{"step": 2}\n', 5)],
)
def test_lines_after_the_step_and_half_lines_go(tail, kept, tmp_path):
    file = tmp_path / "lines.jsonl"
    whole = "".join(json.dumps({"step": step}) + "\n" for step in (1, 1, 2, 2))
    file.write_text(whole + tail)
    resume_lib.cut_back(file, 2)
    assert file.read_text() == (whole + tail)[: kept * len('{"step": 1}\n')]


def test_equal_weights_have_equal_checksums(state, policy, tmp_path):
    other = small.make_policy(tmp_path, devices(4))
    assert state_lib.checksum(policy.params) == state_lib.checksum(other.params)
    changed = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-7), policy.params)
    assert state_lib.checksum(changed) != state_lib.checksum(policy.params)
