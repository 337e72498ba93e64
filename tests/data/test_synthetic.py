import json
import pathlib

import av
import numpy as np
import pytest
from PIL import Image

from openo3_jax import tags, tasks
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, media, prompts, synthetic, transforms, world
from openo3_jax.errors import InputError

STAGES = ("sft", "rl")


def decode(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [frame.time for frame in frames]


@pytest.mark.parametrize("seed", range(6))
def test_the_track_tells_what_the_clip_shows(seed, tmp_path):
    path = tmp_path / "a.mp4"
    track = synthetic.render_clip(path, seed=seed)
    frames, times_s = decode(path)
    assert frames.shape == (40, 112, 140, 3)
    np.testing.assert_allclose(times_s, track.times_s, atol=1e-9)
    color = np.array(world.COLORS[track.color], np.float64)
    # Codec noise stays well below the distance between any two of the colors.
    is_shape = np.abs(frames - color).max(-1) < 60
    start_s, end_s = track.visible_s
    for i, box in enumerate(track.boxes_frac):
        visible = start_s <= track.times_s[i] < end_s
        assert visible == (not np.isnan(box).any())
        if visible:
            rows, columns = np.flatnonzero(is_shape[i].any(1)), np.flatnonzero(is_shape[i].any(0))
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(box * [140, 112, 140, 112], found, atol=2)
        else:
            assert is_shape[i].sum() == 0
    xs = track.boxes_frac[~np.isnan(track.boxes_frac[:, 0]), 0]
    if track.direction == "nowhere":
        assert abs(xs[-1] - xs[0]) < 0.3
    else:
        assert (xs[-1] > xs[0]) == (track.direction == "right")


def test_equal_seeds_give_equal_files(tmp_path):
    for name in ("a", "b"):
        synthetic.write_dataset(tmp_path / name, num_train=6, seed=3)
    synthetic.write_dataset(tmp_path / "c", num_train=6, seed=4)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    # 2 JSON files, 5 clips and a picture for each stage, 2 key frames for each of 3 STR clips
    assert len(files) == 2 + 10 + 2 + 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a/json_data/STGR-RL.json").read_text() != (tmp_path / "c/json_data/STGR-RL.json").read_text()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    synthetic.write_dataset(root, num_train=12, seed=0)
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_records_pass_the_checks_and_become_messages(stage, root):
    records = annotations.load_stage(root, stage)
    assert len(records) == 12
    assert {record["task"] for record in records} == set(tasks.STAGE_TASKS[stage])
    assert len({record["id"] for record in records}) == 12
    config = VideoConfig(min_pixels=3136, max_pixels=3136)
    prepared = transforms.prepare_all(records, root, stage, config=config, wording=prompts.load_prompts())
    assert [len(p.messages) for p in prepared] == [3 if stage == "sft" else 2] * 12
    for p in prepared:
        assert p.duration_s == (None if p.record["task"] == tasks.VISUAL else pytest.approx(4.0))


def test_reasoning_cites_the_ground_truth(root):
    sft = annotations.load_stage(root, "sft")
    spatial = [i for i, r in enumerate(sft) if r["task"] == tasks.TEMPORAL_SPATIAL]
    for record in (sft[i] for i in spatial):
        claims = tags.parse_claims(record["reasoning_process"])
        assert [claim.time_s for claim in claims] == [frame["time"] for frame in record["key_frames"]]
        for claim, frame in zip(claims, record["key_frames"], strict=True):
            (boxes,) = record["key_items"][str(frame["idx"])].values()
            np.testing.assert_allclose(claim.boxes, boxes, atol=6e-4)
    temporal = [r for r in sft if r["task"] == tasks.TEMPORAL]
    for record in temporal:
        span = tags.parse_span(record["answer"])
        assert list(span) == tags.parse_times(record["reasoning_process"])


def test_spans_are_when_the_object_is_seen(root):
    temporal = [r for r in annotations.load_stage(root, "rl") if r["task"] == tasks.TEMPORAL]
    assert temporal
    for record in temporal:
        frames, times_s = decode(media.find_media(root, record, "rl"))
        color = np.array(world.COLORS[record["question"].split()[3]], float)
        seen = (np.abs(frames - color).max(-1) < 60).sum((1, 2)) > 20
        start_s, end_s = json.loads(record["answer"])
        assert seen.tolist() == [start_s <= time_s < end_s for time_s in times_s]


def test_each_stage_has_clips_of_its_own(root, tmp_path):
    clips = {stage: {media.find_media(root, r, stage) for r in annotations.load_stage(root, stage)} for stage in STAGES}
    assert all(len(paths) == 12 for paths in clips.values())
    assert len({pathlib.Path(path).read_bytes() for paths in clips.values() for path in paths}) == 24
    synthetic.write_dataset(tmp_path, num_train=12, seed=0, stages=["rl"])
    assert annotations.load_stage(tmp_path, "rl") == annotations.load_stage(root, "rl")
    assert [file.name for file in (tmp_path / "json_data").iterdir()] == ["STGR-RL.json"]


@pytest.mark.parametrize("stage", STAGES)
def test_options_and_boxes_name_what_is_seen(stage, root):
    for record in annotations.load_stage(root, stage):
        if record["task"] in (tasks.GENERAL_MCQ, tasks.TEMPORAL_MCQ):
            options = dict(line.split(". ") for line in record["question"].split("\n")[1:])
            assert list(options) == ["A", "B", "C", "D"] and len(set(options.values())) == 4
            frames, _ = decode(media.find_media(root, record, stage))
            seen = np.abs(frames - np.array(world.COLORS[options[record["answer"][0]]], float)).max(-1) < 60
            assert seen.sum((1, 2)).max() > 100
        if record["task"] == tasks.VISUAL:
            x1, y1, x2, y2 = map(int, tags.parse_first_box(record["answer"]))
            pixels = np.asarray(Image.open(media.find_media(root, record, stage))).astype(float)
            assert record["image_size"] == [140, 112]
            color = record["question"].split()[3]
            inside = np.abs(pixels[(y1 + y2) // 2, (x1 + x2) // 2] - world.COLORS[color])
            assert inside.max() < 60


BAD = {"height": 111, "width": 30, "num_frames": 7, "fps": 0}


@pytest.mark.parametrize("field", BAD)
def test_impossible_clips_are_refused(field, tmp_path):
    with pytest.raises(InputError, match=f"{field}={BAD[field]}"):
        synthetic.render_clip(tmp_path / "a.mp4", seed=0, **{field: BAD[field]})


def test_no_records_and_no_encoder(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="num_train=0"):
        synthetic.write_dataset(tmp_path, num_train=0, seed=0)
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(InputError, match="no libx264"):
        synthetic.render_clip(tmp_path / "a.mp4", seed=0)


# ---- the world ----


def test_scenes_of_several_objects_name_each_apart():
    config = world.WorldConfig(objects=(2, 3))
    numbers = set()
    for seed in range(12):
        scene = world.make_scene(seed, config)
        numbers.add(len(scene.tracks))
        assert (
            len({track.shape for track in scene.tracks})
            == len({track.color for track in scene.tracks})
            == len(scene.tracks)
        )
        assert all(track.ground != track.color for track in scene.tracks)
    assert numbers == {2, 3}


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_motions(motion):
    """What each one does to the centre of an object that is wholly inside, in fractions of the frame."""
    for seed in range(6):
        (track,) = world.make_scene(seed, world.WorldConfig(motions=(motion,))).tracks
        boxes = track.boxes_frac[~np.isnan(track.boxes_frac[:, 0])]
        if motion == "still":
            assert np.ptp(boxes, axis=0).max() == 0 and track.direction == "nowhere"
        if motion == "turn":
            np.testing.assert_allclose(boxes[0], boxes[-1], atol=1e-9)
        if motion == "stop":
            half = boxes[len(boxes) // 2 + 1 :]
            assert np.ptp(half, axis=0).max() == 0
        if motion == "enter":
            assert boxes[0, 0] == 0 or boxes[0, 2] == 1
            assert boxes[-1, 2] - boxes[-1, 0] > boxes[0, 2] - boxes[0, 0]
        if motion == "cross":
            assert track.direction in ("left", "right", "nowhere")


def test_knobs():
    still = world.make_scene(0, world.WorldConfig(reach=0.0, texture=0.0, motions=("cross",))).tracks[0]
    assert np.nanmax(np.ptp(still.boxes_frac[~np.isnan(still.boxes_frac[:, 0])], axis=0)) == 0
    plain, rough = (world.make_scene(0, world.WorldConfig(texture=texture)).frames[0] for texture in (0.0, 0.4))
    assert len(np.unique(plain.reshape(-1, 3), axis=0)) < 10 < len(np.unique(rough.reshape(-1, 3), axis=0))


def test_a_still_shows_what_it_lists():
    pixels, objects, ground = world.make_still(5, world.WorldConfig(objects=(3, 3)))
    assert objects and ground not in {name.split()[0] for name, _ in objects}
    for name, box in objects:
        assert pixels.shape == (112, 140, 3) and (box[2:] > box[:2]).all()
        color = world.COLORS[name.split()[0]]
        near = np.abs(pixels.astype(int) - color).max(-1) < 5
        x1, y1, x2, y2 = np.rint(box * [140, 112, 140, 112]).astype(int)
        assert near[y1:y2, x1:x2].mean() > 0.3


def test_beats_and_stays_bound_when_an_object_is_there():
    config = world.WorldConfig(objects=(3, 3), num_frames=30, fps=5, beat_s=1.0, stays=(1, 4))
    spans_s = np.array([track.visible_s for seed in range(40) for track in world.make_scene(seed, config).tracks])
    assert (spans_s == np.rint(spans_s)).all()
    assert set(np.diff(spans_s)[:, 0]) == {1.0, 2.0, 3.0, 4.0} and spans_s.max() == 6.0 and spans_s.min() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": (0, 1)}, r"objects=\(0, 1\)"),
        ({"objects": (2, 4)}, "1 to 3"),
        ({"motions": ("fly",)}, "expected some of cross"),
        ({"texture": 0.9}, "texture=0.9"),
        ({"stays": (3, 2)}, r"stays=\(3, 2\)"),
        ({"beat_s": 0.0}, "more than 0 s"),
    ],
)
def test_worlds_that_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        world.WorldConfig(**change)


def test_an_interruption_leaves_the_other_clips_unwritten(tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.write_dataset(tmp_path, num_train=200, seed=0, stages=["sft"], advance=stop)
    assert len([file for file in tmp_path.rglob("*") if file.suffix in (".mp4", ".jpg")]) < 100
    assert not (tmp_path / "json_data").exists()
