import os

import pytest

from openo3_jax.data import media
from openo3_jax.errors import InputError

STR, VISUAL, TEMPORAL = "temporal-spatial free-form QA", "visual QA", "temporal QA"
GENERAL = "General video QA MCQ"

PLACES = {  # (stage, task, source): directories that are tried, under videos/
    ("sft", VISUAL, "TreeVGR"): ["treevgr", "treevgr/images"],
    ("sft", STR, "STR_plm_rdcap"): ["stgr/plm/videos"],
    ("sft", STR, "STR_plm_other"): ["stgr/temporal_grounding/videos"],
    ("sft", STR, "STR_coin"): ["stgr/temporal_grounding/videos"],
    ("sft", TEMPORAL, "TVG_tacos"): ["tvg_r1"],
    ("sft", GENERAL, "videor1_mcq"): ["videor1"],
    ("rl", VISUAL, "gqa"): ["gqa"],
    ("rl", STR, "STR_plm_rdcap"): ["stgr/plm/videos"],
    ("rl", STR, "STR_plm_other"): ["stgr/plm/videos"],
    ("rl", STR, "STR_coin"): ["stgr/temporal_grounding/videos"],
    ("rl", STR, "videoespresso_train_video"): ["videoespresso/videos", "."],
    ("rl", TEMPORAL, "timerft"): ["timerft"],
    ("rl", "temporal QA (MCQ)", "TVG_qvhighlight"): ["tvg_r1"],
    ("rl", GENERAL, "videor1_mcq"): ["videor1"],
}


def make_record(task, source, path="deep/a.bin"):
    return {"task": task, "source": source, "image_path" if task == VISUAL else "video_path": path}


@pytest.mark.parametrize("case", PLACES, ids=str)
def test_every_source_has_its_place(case, tmp_path):
    stage, task, source = case
    for directory in reversed(PLACES[case]):  # the first that is tried wins
        path = tmp_path / "videos" / directory / "deep" / "a.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        found = media.find_media(tmp_path, make_record(task, source), stage)
        assert os.path.samefile(found, path)
    with pytest.raises(InputError) as caught:
        media.find_media(tmp_path, make_record(task, source, "b.bin"), stage)
    assert str(caught.value).count("b.bin") == len(PLACES[case]) + 1


KEY_FRAMES = {
    ("sft", "STR_plm_rdcap"): "stgr/plm/kfs",
    ("sft", "STR_coin"): "stgr/temporal_grounding/kfs",
    ("rl", "STR_plm_other"): "stgr/plm/kfs",
    ("rl", "videoespresso_train_video"): "videoespresso/kfs",
}


@pytest.mark.parametrize("case", KEY_FRAMES, ids=str)
def test_key_frames_lie_beside_their_videos(case, tmp_path):
    stage, source = case
    path = tmp_path / "videos" / KEY_FRAMES[case] / "k.jpg"
    path.parent.mkdir(parents=True)
    path.touch()
    frame = {"idx": 0, "time": 1.0, "path": "k.jpg"}
    assert os.path.samefile(media.find_key_frame(tmp_path, make_record(STR, source), frame, stage), path)


def test_unknown_sources_list_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"source='mine'.*videoespresso_train_video, timerft, gqa"):
        media.find_media(tmp_path, make_record(STR, "mine"), "rl")
    with pytest.raises(InputError, match=r"source='timerft': no directory of key frames"):
        frame = {"idx": 0, "time": 1.0, "path": "k.jpg"}
        media.find_key_frame(tmp_path, make_record(STR, "timerft"), frame, "rl")


@pytest.mark.parametrize("name", ["../a.bin", "x/../../a.bin", "/etc/passwd", "", "a\0b", "..\\a.bin", "C:/a.bin"])
def test_paths_stay_inside_the_root(name, tmp_path):
    (tmp_path / "videos" / "timerft" / "x").mkdir(parents=True)
    (tmp_path / "videos" / "a.bin").touch()
    (tmp_path / "videos" / "timerft" / "a.bin").touch()
    with pytest.raises(InputError, match="expected a path relative to the data root"):
        media.find_media(tmp_path, make_record(TEMPORAL, "timerft", name), "rl")


def test_links_stay_inside_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    folder = root / "videos" / "timerft"
    folder.mkdir(parents=True)
    outside.mkdir()
    (outside / "a.bin").touch()
    (root / "b.bin").touch()
    (folder / "out.bin").symlink_to(outside / "a.bin")
    (folder / "out").symlink_to(outside)
    (folder / "in.bin").symlink_to(root / "b.bin")
    (folder / "loop.bin").symlink_to(folder / "loop.bin")
    (tmp_path / "link").symlink_to(root)
    for name in ("out.bin", "out/a.bin"):
        with pytest.raises(InputError, match="outside the data root"):
            media.find_media(root, make_record(TEMPORAL, "timerft", name), "rl")
    with pytest.raises(InputError, match="no such file"):
        media.find_media(root, make_record(TEMPORAL, "timerft", "loop.bin"), "rl")
    for base in (root, tmp_path / "link"):  # the root itself may be a link
        assert media.find_media(base, make_record(TEMPORAL, "timerft", "in.bin"), "rl").exists()
