import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from data.test_files import no_links
from data.test_pipeline import CONFIG, Run, digest
from openo3_jax import cli, tasks
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, prepare, prompts, stats, store, synthetic, transforms, workers
from openo3_jax.errors import InputError

SMALL = VideoConfig(max_frames=8, min_pixels=3136, max_pixels=3136)


def run_prepare(root, out, **settings):
    settings = {"frames": "raw", "config": SMALL, "jobs": 2, "max_bad_fraction": 0.0} | settings
    return prepare.prepare_root(root, out, **settings)


@pytest.fixture(scope="module")
def raw(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    run_prepare(root, out, config=CONFIG.video)
    return out


def pictures_of(prepared):
    items = [item for message in prepared.messages for item in message["content"]]
    return [item["picture"].pixels for item in items if item["type"] == "picture"]


def texts_of(prepared):
    items = [item for message in prepared.messages for item in message["content"]]
    return [item["text"] for item in items if item["type"] == "text"]


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_raw_frames_come_back_as_they_were(stage, root, raw):
    wording = prompts.load_prompts()
    pairs = []
    for place in (root, raw):
        records = annotations.load_stage(place, stage)
        pairs.append(transforms.prepare_all(records, place, stage, config=CONFIG.video, wording=wording))
    for direct, stored in zip(*pairs, strict=True):
        assert texts_of(stored) == texts_of(direct)
        assert stored.reward_record == direct.reward_record and stored.duration_s == direct.duration_s
        for a, b in zip(pictures_of(stored), pictures_of(direct), strict=True):
            np.testing.assert_array_equal(a, b)


def test_batches_are_those_of_the_videos(root, raw, processor):
    with Run(root, processor) as direct, Run(raw, processor) as stored:
        for step in (0, 3, 6):
            assert digest(stored.batches(step)) == digest(direct.batches(step))
        assert stored.batches.state(6) == direct.batches.state(6)
        assert not any(decoder._process for decoder in stored.samples._decoders._all)  # no video is opened


def test_lengths_of_clips_are_those_of_the_videos(root, raw, tmp_path):
    records = {stage: annotations.load_stage(raw, stage) for stage in annotations.STAGE_FILES}
    direct, stored = (stats.clip_lengths(place, records, jobs=1) for place in (root, raw))
    assert stored == direct
    manifest = json.loads((raw / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"video": {"length": 3}}))
    with pytest.raises(InputError, match=r"manifest.json: video: unknown field length"):
        stats.clip_lengths(tmp_path, records, jobs=1)


def test_jpeg_frames_are_close_and_small(root, raw, tmp_path):
    run_prepare(root, tmp_path / "out", frames="jpeg", config=CONFIG.video)
    wording, config = prompts.load_prompts(), CONFIG.video
    records = annotations.load_stage(tmp_path / "out", "sft")
    exact = transforms.prepare_all(records, raw, "sft", config=config, wording=wording)
    close = transforms.prepare_all(records, tmp_path / "out", "sft", config=config, wording=wording)
    gaps = [
        np.abs(a.astype(float) - b).mean()
        for one, other in zip(exact, close, strict=True)
        for a, b in zip(pictures_of(one), pictures_of(other), strict=True)
    ]
    assert 0 < np.mean(gaps) < 4


def test_a_disk_without_hard_links_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    synthetic.write_dataset(tmp_path / "root", num_train=6, seed=4)
    run_prepare(tmp_path / "root", tmp_path / "out")
    assert store.verify(tmp_path / "out") == []
    record = annotations.load_stage(tmp_path / "out", "sft")[0]
    assert store.Stored(tmp_path / "out", "sft", SMALL).media(record).pictures


def test_the_manifest_tells_damage(raw, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(raw, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["stages"]["sft"]["records"] == 20 and manifest["stages"]["rl"]["left_out"] == 0
    assert store.verify(copy) == [] and cli.main(["data", "check", str(copy)]) == 0
    shard = next(copy.glob("stgr/cot/1.0.0/*array_record*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (copy / "sizes-rl.jsonl").unlink()
    assert cli.main(["data", "check", str(copy)]) == 2
    out = capsys.readouterr().out
    assert f"{shard}: is damaged" in out and "sizes-rl.jsonl: is missing" in out
    assert cli.main(["data", "check", str(copy), "--json", str(tmp_path / "found.jsonl")]) == 2
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(f["level"], f["stage"], f["path"]) for f in found] == [
        ("problem", "sft", str(shard)),
        ("problem", "rl", str(copy / "sizes-rl.jsonl")),
    ]
    capsys.readouterr()
    assert cli.main(["data", "check", str(copy), "--fix", str(tmp_path / "fixed")]) == 2
    assert f"{copy} is a prepared set; fix the root" in capsys.readouterr().err and not (tmp_path / "fixed").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"name": "app", "icons": []}', '{"frames": 3}'])
def test_a_manifest_of_something_else_makes_no_prepared_set(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    assert not store.is_prepared(tmp_path)


WHOLE = {"frames": "raw", "video": {}, "stages": {"sft": {"directory": "stgr", "files": [{"path": "a"}]}}}
DAMAGED = {
    "cut off": json.dumps(WHOLE)[:-5],
    "no text": "\x00",
    "frames": json.dumps(WHOLE | {"frames": ["raw"]}),
    "video": json.dumps(WHOLE | {"video": None}),
    "stages": json.dumps(WHOLE | {"stages": []}),
    "stage": json.dumps(WHOLE | {"stages": {"sft": None}}),
    "directory": json.dumps(WHOLE | {"stages": {"sft": {"files": [{"path": "a"}]}}}),
    "files": json.dumps(WHOLE | {"stages": {"sft": {"directory": "stgr"}}}),
    "files are a number": json.dumps(WHOLE | {"stages": {"sft": {"directory": "stgr", "files": 3}}}),
    "file": json.dumps(WHOLE | {"stages": {"sft": {"directory": "stgr", "files": ["a"]}}}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_manifest_is_told_in_one_line(name, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text(DAMAGED[name])
    assert cli.main(["data", "check", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/manifest.json: " in error and "prepare again" in error and error.count("\n") == 1


def test_an_interrupted_preparation_goes_on(root, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART_RECORDS", 7)
    decoded = []
    borrow = workers.Decoders.map

    def map_counted(self, function, items):
        decoded.extend(items)
        if len(decoded) > 16:
            raise KeyboardInterrupt
        return borrow(self, function, items)

    monkeypatch.setattr(workers.Decoders, "map", map_counted)
    with pytest.raises(KeyboardInterrupt):
        run_prepare(root, tmp_path / "out", config=CONFIG.video)
    assert not store.is_prepared(tmp_path / "out")
    with pytest.raises(InputError, match="begun with other settings"):
        run_prepare(root, tmp_path / "out", frames="jpeg", config=CONFIG.video)
    first = len(decoded)
    assert first == 20  # two parts whole, the third had begun
    monkeypatch.setattr(workers.Decoders, "map", lambda self, f, items: decoded.extend(items) or borrow(self, f, items))
    run_prepare(root, tmp_path / "out", config=CONFIG.video)
    assert len(decoded) - first == 40 - 14
    assert store.verify(tmp_path / "out") == [] and not (tmp_path / "out" / ".parts").exists()
    assert len(list((tmp_path / "out" / "stgr" / "cot" / "1.0.0").glob("*array_record*"))) == 3
    for stage in ("sft", "rl"):
        whole, again = (annotations.load_stage(place, stage) for place in (raw, tmp_path / "out"))
        assert whole == again


def test_a_record_with_null_key_items_is_prepared_and_read_back(tmp_path):
    synthetic.write_dataset(tmp_path / "root", num_train=6, seed=4)
    file = tmp_path / "root" / "json_data" / "STGR-RL.json"
    records = json.loads(file.read_text())
    next(record for record in records if record["task"] == tasks.TEMPORAL_SPATIAL)["key_items"] = None
    file.write_text(json.dumps(records))
    run_prepare(tmp_path / "root", tmp_path / "out")
    checked, prepared = (annotations.load_stage(tmp_path / place, "rl") for place in ("root", "out"))
    assert prepared == checked and len(checked) == 6
    stored = store.Stored(tmp_path / "out", "rl", SMALL)
    assert all(stored.media(record).pictures for record in prepared)


def test_bad_records_are_left_out_and_named(tmp_path):
    synthetic.write_dataset(tmp_path / "root", num_train=6, seed=4)
    broken = annotations.load_stage(tmp_path / "root", "sft")[2]
    for path in (tmp_path / "root").glob(f"videos/tvg_r1/{broken['video_path']}"):
        path.write_text("nothing")
    with pytest.raises(InputError, match=r"1 of 6 records .*max_bad_fraction=0"):
        run_prepare(tmp_path / "root", tmp_path / "strict")
    manifest = run_prepare(tmp_path / "root", tmp_path / "out", max_bad_fraction=0.4)
    assert [manifest["stages"][s]["records"] for s in ("sft", "rl")] == [5, 6]
    line = json.loads((tmp_path / "out" / "bad_samples.jsonl").read_text())
    assert (line["index"], line["id"]) == (2, broken["id"])
    assert broken["id"] not in [record["id"] for record in annotations.load_stage(tmp_path / "out", "sft")]


def test_a_share_of_bad_records_is_a_share(root, tmp_path):
    with pytest.raises(InputError, match=r"max_bad_fraction=2; expected a share in \[0, 1\)"):
        run_prepare(root, tmp_path / "out", max_bad_fraction=2.0)
    assert not (tmp_path / "out").exists()


def test_nothing_but_the_set_is_left(raw):
    names = {"json_data", "manifest.json", "sizes-sft.jsonl", "sizes-rl.jsonl", "stgr"}
    assert {path.name for path in raw.iterdir()} == names


def test_other_settings_and_records_are_refused(raw):
    own = CONFIG.video.max_frames
    config = dataclasses.replace(CONFIG.video, max_frames=own - 2)
    with pytest.raises(InputError, match=f"was prepared with max_frames={own}, not {own - 2}"):
        store.Stored(raw, "sft", config)
    stored = store.Stored(raw, "sft", dataclasses.replace(CONFIG.video, key_frames="none", deadline_s=1.0))
    record = annotations.load_stage(raw, "sft")[0] | {"question": "another?"}
    with pytest.raises(InputError, match=r"holds no such record .*another\?"):
        stored.media(record)


def test_tfds_reads_it_without_tensorflow(raw):
    code = (
        "import json, sys, tensorflow_datasets as tfds\n"
        f"source = tfds.builder_from_directory({str(raw)!r} + '/stgr/rl/1.0.0').as_data_source('train')\n"
        "record = json.loads(source[3]['record'])\n"
        "print(len(source), record['id'], len(source[3]['pictures']), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["20", "rl-3", str(CONFIG.video.max_frames), "False"]


def test_the_verb(root, tmp_path, capsys):
    small = ["--video.max-frames", "4", "--video.min-pixels", "3136", "--video.max-pixels", "3136"]
    assert cli.main(["data", "prepare", str(root), str(tmp_path / "out"), "--jobs", "2", *small]) == 0
    out = capsys.readouterr().out
    assert "sft: 20 records, 0 left out" in out and "Downloading" not in out
    assert cli.main(["data", "prepare", str(root), str(tmp_path / "out"), *small]) == 2
