import json
import os
import pathlib
import shutil

import pytest

from openo3_jax import cli
from openo3_jax.data import annotations, check, record_checks, synthetic
from openo3_jax.data.record_checks import Facts
from openo3_jax.errors import InputError

STR, VISUAL, MCQ = "temporal-spatial free-form QA", "visual QA", "General video QA MCQ"
TEMPORAL, TEMPORAL_MCQ = "temporal QA", "temporal QA (MCQ)"


def clip_record(task, answer, **fields):
    record = {"task": task, "source": "x", "video_path": "a.mp4", "question": "?", "answer": answer}
    return record | {"reasoning_process": "So."} | fields


NOTHING_READ = Facts()


def flaws_of(record, stage, facts=NOTHING_READ):
    checked = annotations.check_record(record, stage, where="a")
    return record_checks.find_flaws(record, checked, stage, facts)


KEYS = [{"idx": 0, "time": 2.0, "path": "k0"}, {"idx": 1, "time": 5.0, "path": "k1"}]
ITEMS = {"0": {"cat": [[0.1, 0.2, 0.5, 1.0]]}, "1": {"dog": [[0, 0, 1, 1]]}}
SPATIAL = clip_record(STR, "Yes", key_frames=KEYS, key_items=ITEMS)
PICTURE = {"task": VISUAL, "source": "gqa", "image_path": "a.png", "image_size": [60, 30], "question": "?"}
PICTURE |= {"answer": "<obj>cat</obj><box>[0,0,60,30]</box>", "reasoning_process": "So."}

GOOD = {  # name: (record, stage, what its media are)
    "span": (clip_record(TEMPORAL, "[1.0, 2.5]"), "rl", Facts(duration_s=2.5)),
    "span in words": (clip_record(TEMPORAL, "From <t>1.0</t>s to <t>2.5</t>s."), "sft", Facts(duration_s=2.45)),
    "letter and span": (clip_record(TEMPORAL_MCQ, "B\n[0, 2]"), "rl", Facts(duration_s=9.0)),
    "letter": (clip_record(MCQ, "C"), "rl", Facts(duration_s=9.0)),
    "key frame at the end": (SPATIAL, "rl", Facts(duration_s=4.95)),
    "picture": (PICTURE, "rl", Facts(size_wh=(60, 30))),
    "fractions in a text": (SPATIAL | {"reasoning_process": "<box>[0,0.5,1,1]</box>"}, "sft", Facts()),
    "px in an RL text": (SPATIAL | {"question": "<box>[0,0,99,99]</box>?"}, "rl", Facts()),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_records_have_no_flaw(name):
    assert flaws_of(*GOOD[name]) == []


BAD = {  # name: (record, stage, media, field, what is said)
    "late span": (clip_record(TEMPORAL, "[1.0, 2.7]"), "rl", Facts(duration_s=2.5), "answer", "ends at 2.7 s, after"),
    "reversed": (clip_record(TEMPORAL, "[3, 2]"), "rl", Facts(), "answer", "span [3, 2] is empty or reversed"),
    "negative": (clip_record(TEMPORAL, "[-1, 2]"), "rl", Facts(), "answer", "span [-1, 2]"),
    "no span": (clip_record(TEMPORAL, "soon"), "rl", Facts(), "answer", "'soon' holds no span; expected [1.0, 2.5]"),
    "RL span in SFT": (clip_record(TEMPORAL, "[1, 2]"), "sft", Facts(), "answer", "expected From <t>1.0</t>s to"),
    "three numbers": (clip_record(TEMPORAL, "[1, 2, 3]"), "rl", Facts(), "answer", "holds no span"),
    "a word for a letter": (clip_record(MCQ, "Blue"), "rl", Facts(), "answer", "'Blue' is no option letter"),
    "no letter": (clip_record(TEMPORAL_MCQ, "left\n[1, 2]"), "rl", Facts(), "answer", "no option letter"),
    "late key frame": (SPATIAL, "rl", Facts(duration_s=4.5), "key_frames", "time 5 s is after the end"),
    "order": (SPATIAL | {"key_frames": KEYS[::-1]}, "rl", Facts(), "key_frames", "not in the order"),
    "box outside": (
        SPATIAL | {"key_items": {"0": {"cat": [[0.1, 0.2, 1.1, 1]]}, "1": {}}}, "rl", Facts(), "key_items",
        "0: cat: box [0.1, 0.2, 1.1, 1] leaves the frame of 1 x 1",
    ),
    "box reversed": (
        SPATIAL | {"key_items": {"0": {"cat": [[0.5, 0.2, 0.1, 1]]}, "1": {}}}, "rl", Facts(), "key_items", "reversed",
    ),
    "other size": (PICTURE, "rl", Facts(size_wh=(30, 60)), "image_size", "[60, 30], but the picture has [30, 60] px"),
    "px in an SFT text": (
        SPATIAL | {"reasoning_process": "<box>[0,0,20,20]</box>"}, "sft", Facts(), "reasoning_process", "leaves",
    ),
    "three numbers in a box": (
        SPATIAL | {"answer": "<box>[0,0,1]</box>"}, "sft", Facts(), "answer", "does not hold four numbers",
    ),
    "no box": (PICTURE | {"answer": "left"}, "rl", Facts(), "answer", "'left' holds no <box>"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_flaws_are_found_and_named(name):
    record, stage, facts, field, says = BAD[name]
    flaws = [flaw for flaw in flaws_of(record, stage, facts) if flaw.field == field]
    assert len(flaws) == 1 and says in flaws[0].what and not flaws[0].is_note


ODD = {
    "released spelling": (clip_record(MCQ, "C", source="videor1_free_from"), "source"),
    "null key items": (SPATIAL | {"key_items": None}, "key_items"),
    "empty key items": (SPATIAL | {"key_items": {}}, "key_items"),
    "null entries": (SPATIAL | {"key_items": {**ITEMS, "7": None}}, "key_items"),
}


@pytest.mark.parametrize("name", ODD)
def test_released_oddities_pass_with_a_note(name):
    record, field = ODD[name]
    assert [(flaw.field, flaw.is_note) for flaw in flaws_of(record, "rl")] == [(field, True)]


def test_mending():
    record = SPATIAL | {
        "key_items": {"0": {"cat": [[-0.2, 0, 0.5, 1], [1.2, 0, 1.4, 1]]}, "1": {"dog": [[0, 0, 1, 1]]}}
    }
    mended, changes = record_checks.mend(record, Facts(duration_s=3.0), unreadable=[])
    assert mended["key_frames"] == KEYS[:1]  # 5 s is after the end
    assert mended["key_items"] == {"0": {"cat": [[0, 0, 0.5, 1]]}}  # the second box lay outside altogether
    assert changes == ["key_frames: idx 1 removed", "key_items: boxes cut off at the edge of the frame"]
    assert record_checks.mend(SPATIAL, Facts(duration_s=9.0), ["k0"])[0]["key_frames"] == KEYS[1:]
    assert record_checks.mend(PICTURE, Facts(size_wh=(30, 60)), [])[0]["image_size"] == [30, 60]
    assert record_checks.mend(PICTURE, Facts(size_wh=(60, 30)), []) == (PICTURE, [])


# ---- a whole root ----


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    synthetic.write_dataset(root, num_train=6, seed=3)
    return root


@pytest.fixture
def root(pristine, tmp_path):
    """A copy of the set whose files may be damaged: none is shared with the original."""
    return shutil.copytree(pristine, tmp_path / "root")


def edit(root, stage, change):
    records = annotations.load_list(annotations.stage_file(root, stage))
    change(records)
    pathlib.Path(annotations.stage_file(root, stage)).write_text(json.dumps(records))


def test_a_clean_set_has_no_findings(pristine, tmp_path, capsys):
    counted = []
    report = check.check_root(pristine, jobs=2, advance=lambda done, total: counted.append((done, total)))
    assert report.findings == [] and sum(report.totals.values()) == 12
    assert counted == [(i + 1, report.num_files) for i in range(report.num_files)]
    assert cli.main(["data", "check", str(pristine), "--jobs", "2"]) == 0
    assert f"12 records, {report.num_files} media files, 0 records with problems" in capsys.readouterr().out


def test_every_kind_of_trouble_is_found_and_mended(root, tmp_path, capsys):
    def damage(records):
        by_task = {record["task"]: record for record in records}
        by_task[STR]["key_frames"].reverse()
        by_task[TEMPORAL]["answer"] = "[0, 99]"
        by_task[MCQ]["video_path"] = "../../secret.mp4"
        by_task["General video QA Free-form"]["question"] = 3
        by_task[VISUAL]["image_size"] = [1, 1]

    edit(root, "rl", damage)
    records = annotations.load_list(annotations.stage_file(root, "rl"))
    clip = next(r for r in records if r["task"] == TEMPORAL_MCQ)
    (root / "videos" / "tvg_r1" / clip["video_path"]).write_text("no clip")
    lines = tmp_path / "found.jsonl"
    fixed = tmp_path / "fixed"
    assert cli.main(["data", "check", str(root), "--jobs", "2", "--json", str(lines), "--fix", str(fixed)]) == 2
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {(f["task"], f["field"]) for f in found if f["stage"] == "rl" and f["level"] == "problem"} == {
        (STR, "key_frames"),
        (TEMPORAL, "answer"),
        (MCQ, "video_path"),
        ("General video QA Free-form", "question"),
        (VISUAL, "image_size"),
        (TEMPORAL_MCQ, "video_path"),
    }
    assert not [f for f in found if f["stage"] == "sft"]
    assert "STGR-RL.json:" in capsys.readouterr().out

    changes = [json.loads(line) for line in (fixed / "changes.jsonl").read_text().splitlines()]
    done = {records[change["index"]]["task"]: change["done"] for change in changes}
    assert done == {
        STR: "changed",
        VISUAL: "changed",
        TEMPORAL: "left out",
        MCQ: "left out",
        "General video QA Free-form": "left out",
        TEMPORAL_MCQ: "left out",
    }
    report = check.check_root(fixed, jobs=2)
    assert report.problems == [] and sum(report.totals.values()) == 6 + 2
    with pytest.raises(InputError, match=r"fixed: exists and is not an empty directory"):
        check.check_root(root, jobs=1, fix=fixed)


def test_a_record_with_null_key_items_stays_in_the_mended_copy(root, tmp_path):
    def change(records):
        next(r for r in records if r["task"] == STR)["key_items"] = None

    edit(root, "rl", change)
    report = check.check_root(root, jobs=1, fix=tmp_path / "fixed")
    assert report.problems == [] and [f.field for f in report.findings] == ["key_items"]
    assert (tmp_path / "fixed" / "changes.jsonl").read_text() == ""
    released, fixed = (annotations.load_stage(at, "rl") for at in (root, tmp_path / "fixed"))
    assert fixed == released


@pytest.mark.parametrize("name", ["absent/found.jsonl", "."])
def test_findings_that_could_not_be_written_are_not_looked_for(name, root, tmp_path, capsys):
    assert cli.main(["data", "check", str(root), "--json", str(tmp_path / name), "--fix", str(tmp_path / "f")]) == 2
    assert "cannot be written" in capsys.readouterr().err and not (tmp_path / "f").exists()


def test_a_mended_copy_is_whole_or_not_there(root, tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(check, "_place", fail)
    with pytest.raises(OSError, match="No space left"):
        check.check_root(root, jobs=1, fix=tmp_path / "fixed")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_an_espresso_clip_in_its_second_place_is_a_note(root):
    def change(records):
        record = next(r for r in records if r["task"] == STR)
        record["source"] = "videoespresso_train_video"
        os.rename(root / "videos/stgr/temporal_grounding/videos" / record["video_path"], root / "videos/e.mp4")
        record["video_path"] = "e.mp4"
        for frame in record["key_frames"]:
            os.rename(root / "videos/stgr/temporal_grounding/kfs" / frame["path"], root / "videos" / frame["path"])

    (root / "json_data/STGR-SFT.json").unlink()
    edit(root, "rl", change)
    report = check.check_root(root, jobs=1)
    assert report.problems == []
    assert [(f.level, f.field, "second directory" in f.what) for f in report.findings] == [("note", "video_path", True)]


def test_a_link_out_of_the_root_is_a_problem(root, tmp_path):
    record = annotations.load_list(annotations.stage_file(root, "rl"))[0]
    path = root / "videos/stgr/temporal_grounding/videos" / record["video_path"]
    path.rename(tmp_path / "outside.mp4")
    path.symlink_to(tmp_path / "outside.mp4")
    (root / "json_data/STGR-SFT.json").unlink()
    problems = check.check_root(root, jobs=1).problems
    assert [(p.index, p.field) for p in problems] == [(0, "video_path")] and "outside the data root" in problems[0].what


def test_no_annotations(tmp_path):
    with pytest.raises(InputError, match=r"no json_data/STGR-SFT.json or STGR-RL.json"):
        check.check_root(tmp_path, jobs=1)
