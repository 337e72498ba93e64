import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from data import hostile
from data.test_hostile import children
from openo3_jax import recipes
from openo3_jax.data import annotations, loader, packing, pipeline, plan, prompts
from openo3_jax.errors import InputError
from openo3_jax.types import RowShare

NUM = 20  # records of each stage in `root`
CONFIG = dataclasses.replace(recipes.demo(), steps=12, batch_size=4, max_row_tokens=1024, weights=(), seed=5, workers=2)


class Run:
    """Batches of stage one over `root`; a context manager."""

    def __init__(self, root, processor, config=CONFIG, *, bad_file=None, **settings):
        records = annotations.load_stage(root, "sft")
        wording = prompts.load_prompts()
        self.samples = pipeline.Samples(records, root, "sft", processor, config, wording, bad_file=bad_file)
        self.batches = pipeline.SFTBatches(self.samples, processor, config, **{"rows_multiple": 2} | settings)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.samples.__exit__(*error)


def digest(batch):
    leaves = jax.tree.leaves(batch)
    return hashlib.sha256(b"".join(repr(leaf.shape).encode() + leaf.tobytes() for leaf in leaves)).hexdigest()


def equal(a, b):
    return digest(a) == digest(b)


# ---- the same batches ----


def test_the_step_decides_on_the_batch_whatever_came_before(root, processor):
    with Run(root, processor) as one, Run(root, processor) as other:
        forward = [one.batches(step) for step in range(CONFIG.steps)]
        for step in (7, 3, 4, 4, 11, 0):
            assert equal(other.batches(step), forward[step]), step
        assert len({digest(batch) for batch in forward}) == CONFIG.steps
    with Run(root, processor, dataclasses.replace(CONFIG, seed=6)) as reseeded:
        assert not equal(reseeded.batches(0), forward[0])


RESUME = """
import dataclasses, json, sys
from data.test_pipeline import CONFIG, Run, digest
from openo3_jax.data import loader, tokens
root, model, state, workers = sys.argv[1:]
config = dataclasses.replace(CONFIG, workers=int(workers))
with Run(root, tokens.load_processor(model), config) as run:
    step = run.batches.step_of(loader.IteratorState(*json.loads(state)))
    print(step, digest(run.batches(step)))
"""


def test_a_saved_state_gives_the_next_batch_in_a_new_process_with_other_workers(root, model, processor):
    with Run(root, processor) as run:
        for step in range(7):
            run.batches(step)
        state = json.dumps(run.batches.state(7))
        following = digest(run.batches(7))
    assert json.loads(state)[:3] == [5, 1, 2]  # 5 batches an epoch: step 7 is the third of the second
    tests = str(pathlib.Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", RESUME, str(root), str(model), state, "1"],
        capture_output=True, text=True, check=True, cwd=tests,
    )  # fmt: skip
    assert done.stdout.split() == ["7", following]


def test_a_state_of_other_data_is_refused(root, processor, tmp_path):
    with Run(root, processor) as run:
        state = run.batches.state(3)
        for changed in (state._replace(data="0"), state._replace(seed=9)):
            with pytest.raises(InputError, match="resume with the same records"):
                run.batches.step_of(changed)
        assert run.batches.step_of(state) == 3
    for change in ({"weights": (("visual QA", 2.0),)}, {"batch_size": 5}, {"loss_on": "released"}):
        with Run(root, processor, dataclasses.replace(CONFIG, **change)) as other:
            assert other.batches.state(0).data != state.data
    bounded = dataclasses.replace(CONFIG.video, deadline_s=5.0, max_side_px=1000)
    for change in ({"workers": 1}, {"max_bad_fraction": 0.5}, {"video": bounded}):
        with Run(root, processor, dataclasses.replace(CONFIG, **change)) as same:
            assert same.batches.state(3) == state


def test_an_epoch_shows_every_record_but_the_remainder_once(root, processor):
    config = dataclasses.replace(CONFIG, batch_size=6, steps=6)
    with Run(root, processor, config) as run:
        assert run.batches.epochs.num_batches == 3 and run.batches.epochs.num_left_out == 2
        for epoch in range(2):
            plans = [run.batches._plans.batch(3 * epoch + i) for i in range(3)]
            seen = [index for batch in plans for row in batch.rows for index in row]
            assert len(seen) == len(set(seen)) == 18


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_a_batch_in_equal_parts(count, root, processor):
    with Run(root, processor, rows_multiple=4) as whole:
        expected = [whole.batches(step) for step in range(3)]
    parts = []
    for index in range(count):
        with Run(root, processor, rows_multiple=4, share=RowShare(count, (index,), (index,))) as run:
            parts.append([run.batches(step) for step in range(3)])
            read = set(run.samples._kept)
            assert len(read) < NUM  # the others' records are not read
    for step in range(3):
        mine = [part[step] for part in parts]
        assert len({batch.tokens.shape for batch in mine}) == 1
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *mine)
        assert equal(joined, expected[step])


def test_samples_are_those_of_transforms(root, processor):
    """A row is what `prepare` and `encode` give for its records, one after the other."""
    from openo3_jax.data import transforms

    records = annotations.load_stage(root, "sft")
    with Run(root, processor) as run:
        batch, rows = run.batches(2), run.batches._plans.batch(2).rows
    wording = prompts.load_prompts()
    for number, row in enumerate(rows):
        prepared = transforms.prepare_all([records[i] for i in row], root, "sft", config=CONFIG.video, wording=wording)
        encoded = [processor.encode(one.messages) for one in prepared]
        expected = np.concatenate([sample.tokens for sample in encoded])
        np.testing.assert_array_equal(batch.tokens[number, : len(expected)], expected)
        patches = np.concatenate([sample.patches for sample in encoded])
        np.testing.assert_array_equal(batch.vision.patches[number, : len(patches)], patches)
        assert (batch.segments[number] > 0).sum() == len(expected)


def test_few_shapes_and_their_padding(root, processor):
    with Run(root, processor) as run:
        shapes = {run.batches(step).tokens.shape for step in range(CONFIG.steps)}
        assert shapes == {(shape.rows, shape.seq) for shape in run.batches.shapes}
        batch, measured = run.batches(1), run.batches.measures(1)
        assert (measured["rows"], measured["row_tokens"]) == batch.tokens.shape
        assert measured["row_patches"] == batch.vision.patches.shape[1]
        assert measured["token_waste"] == pytest.approx((batch.segments == 0).mean())
        assert measured["patch_waste"] == pytest.approx((batch.vision.frame_slots < 0).mean())
        assert measured["empty_places"] == 0


# ---- records that cannot be used ----


@pytest.fixture
def broken_root(root, tmp_path):
    """A copy of the set, for tests that damage it."""
    return pathlib.Path(shutil.copytree(root, tmp_path / "root"))


TOLERANT = dataclasses.replace(CONFIG, max_bad_fraction=0.5)


def test_a_clip_that_breaks_leaves_its_place_empty_and_moves_nothing(broken_root, processor, tmp_path):
    with Run(broken_root, processor, TOLERANT) as run:
        clean = run.batches(0)
        rows = run.batches._plans.batch(0).rows
    records = annotations.load_stage(broken_root, "sft")
    row, place, bad = next(
        (r, p, index) for r, row in enumerate(rows) for p, index in enumerate(row) if "video_path" in records[index]
    )
    bad_file = tmp_path / "bad_samples.jsonl"
    with Run(broken_root, processor, TOLERANT, bad_file=bad_file) as run:
        run.samples.sizes(range(NUM))  # planned while the file was whole
        for path in broken_root.glob(f"videos/**/{records[bad]['video_path']}"):
            path.write_bytes(path.read_bytes()[:300])
        holed = run.batches(0)
        assert run.batches._plans.batch(0).rows == rows
        assert run.batches.measures(0)["empty_places"] == 1
    lost = clean.segments[row] == place + 1
    assert lost.any() and (holed.segments[row][lost] == 0).all()
    others = np.ones(clean.segments.shape, bool)
    others[row] = ~lost
    for name in ("segments", "tokens", "visual_tokens"):
        np.testing.assert_array_equal(getattr(holed, name)[others], getattr(clean, name)[others])
    kept = ~np.isin(clean.target_slots[row], np.flatnonzero(lost))
    targets = {(s, t) for s, t in zip(clean.target_slots[row][kept], clean.targets[row][kept], strict=True) if s >= 0}
    left = {(s, t) for s, t in zip(holed.target_slots[row], holed.targets[row], strict=True) if s >= 0}
    assert left == targets
    shown = clean.visual_slots[row]
    of_others = np.repeat((shown >= 0) & ~np.isin(shown, np.flatnonzero(lost)), packing.MERGE_UNIT)
    np.testing.assert_array_equal(holed.vision.patches[row][of_others], clean.vision.patches[row][of_others])
    assert not holed.vision.patches[row][~of_others].any()
    line = json.loads(bad_file.read_text())
    assert (line["index"], line["task"], line["path"]) == (bad, records[bad]["task"], records[bad]["video_path"])
    assert "cannot be decoded" in line["reason"]


def test_too_many_bad_records_end_the_run_with_the_list(broken_root, processor, tmp_path):
    for path in broken_root.glob("videos/**/*.mp4"):
        path.write_text("nothing")
    bad_file = tmp_path / "bad.jsonl"
    config = dataclasses.replace(CONFIG, max_bad_fraction=0.1)
    says = r"\d+ of 20 records .* max_bad_fraction=0.1: record \d+: .*mp4.*bad.jsonl"
    with Run(broken_root, processor, config, bad_file=bad_file) as run, pytest.raises(InputError, match=says):
        run.batches(0)
    assert len(bad_file.read_text().splitlines()) >= 3


def test_one_bad_record_ends_the_run_by_default_in_a_small_set(broken_root, processor):
    (broken_root / "videos" / "treevgr" / "sft-1.jpg").write_text("no picture")
    with Run(broken_root, processor) as run, pytest.raises(InputError, match=r"1 of 20 records.*sft-1.jpg"):
        run.batches(0)


def test_hostile_media_are_counted_and_leave_nothing_behind(broken_root, processor, tmp_path):
    before, whole = children(), {}
    (tmp_path / "hostile").mkdir()
    clips = sorted(broken_root.glob("videos/**/*.mp4"))
    for number, path in enumerate(clips):
        bad = hostile.make_file(tmp_path / "hostile", number, whole)
        path.unlink()
        if bad.is_file():  # a pipe stays away: nothing is there then
            bad.rename(path)
    config = dataclasses.replace(CONFIG, max_bad_fraction=0.95)
    with Run(broken_root, processor, config) as run:
        digests = [digest(run.batches(step)) for step in range(8)]
        reasons = run.samples.bad.reasons
    assert 3 <= len(reasons) < NUM and all("\n" not in reason for reason in reasons.values())
    with Run(broken_root, processor, config) as again:
        assert [digest(again.batches(step)) for step in range(8)] == digests
    assert children() == before


# ---- reading ahead ----


def test_batches_are_made_while_the_step_runs(root, processor):
    with Run(root, processor) as run:
        run.batches(0)
        patience = time.monotonic() + 30
        while len(run.samples._kept) < 2 * CONFIG.batch_size and time.monotonic() < patience:
            time.sleep(0.02)  # a step; nothing asks for the next batch
        assert len(run.samples._kept) >= 2 * CONFIG.batch_size
        ahead = run.batches._load._iterator
        run.batches(1)
        assert run.batches._load._iterator is ahead  # what was read ahead was used


def test_an_error_in_a_step_ends_the_process_at_once(root, model):
    code = (
        "import sys\nfrom data.test_pipeline import Run\nfrom openo3_jax.data import tokens\n"
        "with Run(sys.argv[1], tokens.load_processor(sys.argv[2])) as run:\n run.batches(0)\n raise SystemExit(7)"
    )
    tests = str(pathlib.Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code, str(root), str(model)], cwd=tests, timeout=60)
    assert done.returncode == 7


def test_many_threads_may_read(root, processor):
    with Run(root, processor) as run:
        first = {i: run.samples.read(i).sample for i in range(NUM)}
    with Run(root, processor) as run:
        found: dict[int, object] = {}
        threads = [
            threading.Thread(target=lambda k=k: found.update({i: run.samples.read(i).sample for i in range(k, NUM, 4)}))
            for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(NUM):
        np.testing.assert_array_equal(found[i].patches, first[i].patches)


def test_weights_change_what_is_seen(root, processor):
    config = dataclasses.replace(CONFIG, weights=(("visual QA", 0.0), ("temporal QA", 2.0)))
    records = annotations.load_stage(root, "sft")
    with Run(root, processor, config) as run:
        assert run.batches.epochs == plan.Epochs(num_draws=20, batch_size=4)
        seen = [index for step in range(5) for row in run.batches._plans.batch(step).rows for index in row]
    counts = {
        task: [seen.count(i) for i, r in enumerate(records) if r["task"] == task]
        for task in ("visual QA", "temporal QA")
    }
    assert counts == {"visual QA": [0] * 4, "temporal QA": [2] * 4}


def test_a_state_survives_json():
    state = loader.IteratorState(1, 2, 3, "ab")
    assert loader.IteratorState(*json.loads(json.dumps(state))) == state
