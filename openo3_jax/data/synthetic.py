"""A seed -> clips of one coloured shape that appears, moves and vanishes, with exact times and boxes, as STGR data.

Videos are H.264 mp4, key frames and pictures JPEG, records and directories those of the released files.
"""

import dataclasses
import io
import json
import os
import pathlib
from typing import Any

import av
import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from openo3_jax import tags, tasks
from openo3_jax.data import annotations
from openo3_jax.errors import InputError

COLORS = {
    "red": (225, 30, 40),
    "green": (30, 170, 60),
    "blue": (40, 70, 230),
    "yellow": (245, 215, 40),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
SHAPES = ("square", "circle", "triangle")

# Stage and task -> source and directory under videos/, so that the paths are found as the released ones are.
_PLACES: dict[tuple[tasks.Stage, str], tuple[str, str]] = {
    ("sft", tasks.TEMPORAL_SPATIAL): ("STR_synthetic", "stgr/temporal_grounding/videos"),
    ("sft", tasks.VISUAL): ("TreeVGR_synthetic", "treevgr"),
    ("sft", tasks.TEMPORAL): ("TVG_synthetic", "tvg_r1"),
    ("sft", tasks.GENERAL_MCQ): ("videor1_synthetic", "videor1"),
    ("sft", tasks.GENERAL_FREE_FORM): ("videor1_synthetic", "videor1"),
    ("rl", tasks.TEMPORAL_SPATIAL): ("STR_synthetic", "stgr/temporal_grounding/videos"),
    ("rl", tasks.VISUAL): ("gqa_synthetic", "gqa"),
    ("rl", tasks.TEMPORAL): ("timerft_synthetic", "timerft"),
    ("rl", tasks.TEMPORAL_MCQ): ("TVG_synthetic", "tvg_r1"),
    ("rl", tasks.GENERAL_MCQ): ("videor1_synthetic", "videor1"),
    ("rl", tasks.GENERAL_FREE_FORM): ("videor1_synthetic", "videor1"),
}
_KEY_FRAMES = "stgr/temporal_grounding/kfs"


@dataclasses.dataclass(frozen=True)
class Track:
    """What a clip shows, exactly; frame i is presented at `times_s[i]`.

    `boxes_frac`: xyxy as fractions of the frame, tight around the shape; NaN while it is not there.
    `visible_s`: from when on it is there, and when it is gone, in seconds.
    """

    color: str
    shape: str
    ground: str  # color of the background
    direction: str  # "left" or "right"
    times_s: Float64[np.ndarray, " frames"]
    boxes_frac: Float64[np.ndarray, "frames 4"]
    visible_s: tuple[float, float]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


def render_clip(
    path: str | os.PathLike,
    *,
    seed: int,
    num_frames: int = 40,
    fps: int = 10,
    height: int = 112,
    width: int = 140,
) -> Track:
    """Write an mp4 of height x width px, `num_frames` frames at `fps` per second; equal arguments, equal pixels.

    The shape crosses the frame to the left or right and is there for at least half of the clip.

    Raises: InputError for odd sides or sides below 32 px, fewer than 8 frames, or an av without libx264.
    """
    track, frames = _draw(seed, num_frames, fps, height, width)
    pathlib.Path(path).write_bytes(_encode(frames, fps))
    return track


def _draw(
    seed: int, num_frames: int, fps: int, height: int, width: int
) -> tuple[Track, UInt8[np.ndarray, "frames height width 3"]]:
    if height % 2 or width % 2 or min(height, width) < 32 or num_frames < 8 or fps < 1:
        raise InputError(
            f"clip: num_frames={num_frames}, fps={fps}, height={height}, width={width}; expected at least "
            "8 frames, 1 fps and even sides of at least 32 px"
        )
    rng = np.random.default_rng(seed)
    color, ground = rng.choice(sorted(COLORS), 2, replace=False).tolist()
    shape, direction = str(rng.choice(SHAPES)), str(rng.choice(["left", "right"]))
    side_px = int(rng.integers(min(height, width) // 4, min(height, width) // 2))
    first = int(rng.integers(0, num_frames // 4 + 1))
    gone = int(rng.integers(num_frames * 3 // 4, num_frames + 1))
    room_x, room_y = width - side_px, height - side_px
    x = [rng.integers(0, room_x // 3 + 1), rng.integers(room_x * 2 // 3, room_x + 1)]
    y = rng.integers(0, room_y + 1, 2)
    along = np.linspace(0.0, 1.0, num_frames)
    path_x = np.interp(along, [0, 1], x if direction == "right" else x[::-1])
    corners_px = np.rint(np.stack([path_x, np.interp(along, [0, 1], y)], axis=1)).astype(int)

    background = np.full((height, width, 3), COLORS[ground], np.float64)
    if rng.random() < 0.5:
        background *= np.linspace(0.6, 1.0, width)[None, :, None]
    frames = np.repeat(background.astype(np.uint8)[None], num_frames, axis=0)
    mask = _shape_mask(shape, side_px)
    for i in range(first, gone):
        left, top = corners_px[i]
        frames[i, top : top + side_px, left : left + side_px][mask] = COLORS[color]

    boxes_frac = np.hstack([corners_px, corners_px + side_px]) / [width, height, width, height]
    boxes_frac[:first] = boxes_frac[gone:] = np.nan
    times_s = np.arange(num_frames) / fps
    return Track(color, shape, ground, direction, times_s, boxes_frac, (first / fps, gone / fps)), frames


def _shape_mask(shape: str, side_px: int) -> np.ndarray:
    """True inside the shape, which touches all four sides of its square box."""
    y, x = np.mgrid[:side_px, :side_px] + 0.5
    half = side_px / 2
    if shape == "circle":
        return (x - half) ** 2 + (y - half) ** 2 <= half**2
    if shape == "triangle":
        return np.abs(x - half) <= (y + 0.5) / 2
    return np.ones((side_px, side_px), bool)


def _encode(frames: UInt8[np.ndarray, "frames height width 3"], fps: int) -> bytes:
    """An mp4 file; one thread and a constant quantiser, without rate control, so that it is the same each time."""
    if "libx264" not in av.codecs_available:
        raise InputError("this build of av has no libx264 encoder; install the av wheel from PyPI")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"qp": "18", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


# ---- records ----


def write_dataset(
    root: str | os.PathLike,
    *,
    num_train: int,
    seed: int,
    num_frames: int = 40,
    fps: int = 10,
    height: int = 112,
    width: int = 140,
) -> None:
    """Write `num_train` records for each stage under `root` in the released layout, with their media.

    The tasks of a stage take turns; record i of both stages shows clip i. Times in the texts are exact where
    1 / fps is a multiple of 0.1 s. Equal arguments give equal records and pixels.

    Raises: InputError for `num_train` below 1, and as `render_clip` does.
    """
    if num_train < 1:
        raise InputError(f"num_train={num_train}; expected at least 1 record")
    videos = pathlib.Path(root, "videos")
    records: dict[tasks.Stage, list[dict[str, Any]]] = {"sft": [], "rl": []}
    for i in range(num_train):
        rng = np.random.default_rng([seed, i])
        track, frames = _draw(int(rng.integers(2**32)), num_frames, fps, height, width)
        clip, colors = _encode(frames, fps), rng.permutation(sorted(COLORS)).tolist()
        for stage, done in records.items():
            task = tasks.STAGE_TASKS[stage][i % len(tasks.STAGE_TASKS[stage])]
            source, directory = _PLACES[stage, task]
            record = {"id": f"{stage}-{i}", "task": task, "source": source}
            record |= _question(task, stage, track, colors, (width, height))
            if task == tasks.VISUAL:
                record |= {"image_path": f"{i}.jpg", "image_size": [width, height]}
                _save_picture(videos / directory / record["image_path"], frames[_visible(track)[0]])
            else:
                record["video_path"] = f"{i}.mp4"
                _save(videos / directory / record["video_path"], clip)
            if task == tasks.TEMPORAL_SPATIAL:
                record |= _key_frames(track, i)
                for key, number in zip(record["key_frames"], _visible(track), strict=True):
                    _save_picture(videos / _KEY_FRAMES / key["path"], frames[number])
            done.append(record)
    for stage, name in annotations.STAGE_FILES.items():
        text = json.dumps(records[stage], indent=1) + "\n"
        _save(pathlib.Path(root, "json_data", name), text.encode())


def _visible(track: Track) -> list[int]:
    """Two frames that show the shape: a quarter and three quarters into its presence."""
    there = np.flatnonzero(~np.isnan(track.boxes_frac[:, 0]))
    return [int(there[len(there) // 4]), int(there[len(there) * 3 // 4])]


def _key_frames(track: Track, clip_number: int) -> dict[str, Any]:
    key_frames, key_items = [], {}
    for idx, i in enumerate(_visible(track)):
        time_s = round(float(track.times_s[i]), 3)
        key_frames.append({"idx": idx, "time": time_s, "path": f"{clip_number}_{time_s}.jpg"})
        key_items[str(idx)] = {track.name: [track.boxes_frac[i].round(4).tolist()]}
    return {"key_frames": key_frames, "key_items": key_items}


def _question(
    task: str, stage: tasks.Stage, track: Track, colors: list[str], size_wh: tuple[int, int]
) -> dict[str, str]:
    """Question and answer in the form of the stage, and in SFT the reasoning with its evidence.

    Boxes are fractions for temporal-spatial QA and px for visual QA, as released; the general tasks cite times
    only, since nothing turns their boxes into px of the frames shown.
    """
    first, second = _visible(track)
    early, late = (
        tags.render_claim(track.name, track.boxes_frac[i].tolist(), track.times_s[i]) for i in (first, second)
    )
    early_s, late_s = (tags.render_time(track.times_s[i]) for i in (first, second))
    box_px = np.rint(track.boxes_frac[first] * [*size_wh, *size_wh])
    place = f"<obj>{track.name}</obj>{tags.render_box(box_px.tolist())}"
    start_s, end_s = track.visible_s
    seconds = str([start_s, end_s])
    presence = f"It appears at {tags.render_time(start_s)} and is gone at {tags.render_time(end_s)}."
    options = [color for color in colors if color != track.color][:3]
    options.insert(colors.index(track.color) % 4, track.color)
    letter = "ABCD"[options.index(track.color)]
    listed = "".join(f"\n{key}. {color}" for key, color in zip("ABCD", options, strict=True))
    what_color = f"What color is the {track.shape}?{listed}"
    question, answer, reasoning = {
        tasks.TEMPORAL_SPATIAL: (
            f"Which object moves over the {track.ground} background?",
            f"A {track.name}",
            f"I see {early}, later {late}, on a {track.ground} background.",
        ),
        tasks.VISUAL: (
            f"Where is the {track.name}?",
            place,
            f"On the {track.ground} background I see {place}.",
        ),
        tasks.TEMPORAL: (
            f"When is the {track.name} visible?",
            tags.render_span(start_s, end_s) if stage == "sft" else seconds,
            presence,
        ),
        tasks.TEMPORAL_MCQ: (what_color, f"{letter}\n{seconds}", presence),
        tasks.GENERAL_MCQ: (what_color, letter, f"At {early_s} I see a {track.name}: {letter}."),
        tasks.GENERAL_FREE_FORM: (
            f"Which way does the {track.shape} move?",
            f"To the {track.direction}",
            f"From {early_s} to {late_s} it moves to the {track.direction}.",
        ),
    }[task]
    return {"question": question, "answer": answer} | ({"reasoning_process": reasoning} if stage == "sft" else {})


def _save(path: pathlib.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _save_picture(path: pathlib.Path, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    _save(path, file.getvalue())
