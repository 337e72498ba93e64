"""A seed -> clips of moving shapes (world.py) and questions about them with exact times and boxes, as STGR data.

Videos are H.264 mp4, key frames and pictures JPEG, records and directories those of the released files.
"""

import functools
import io
import json
import os
import pathlib
from collections.abc import Callable, Collection
from concurrent import futures
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from openo3_jax import tags, tasks
from openo3_jax.data import annotations, world
from openo3_jax.data.world import Scene, Track, WorldConfig
from openo3_jax.errors import InputError

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
_STAGES = tuple(tasks.STAGE_TASKS)


def render_clip(
    path: str | os.PathLike,
    *,
    seed: int,
    num_frames: int = 40,
    fps: int = 10,
    height: int = 112,
    width: int = 140,
) -> Track:
    """Write an mp4 of height x width px, `num_frames` at `fps` per second, of one object; equal arguments, equal files.

    Raises: InputError as `WorldConfig` does, and for an av without libx264.
    """
    scene = world.make_scene(seed, WorldConfig(num_frames=num_frames, fps=fps, height=height, width=width))
    pathlib.Path(path).write_bytes(_encode(scene.frames, fps))
    return scene.tracks[0]


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
    config: WorldConfig | None = None,
    stages: Collection[tasks.Stage] = _STAGES,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Write `num_train` records for each of `stages` under `root` in the released layout, with their media.

    The tasks of a stage take turns; each record has a clip of its own and asks about one of its objects. Times in the
    texts are exact where 1 / fps is a multiple of 0.1 s. Equal arguments give equal records and pixels, and those of a
    stage do not depend on what else is written. `advance` is told after each clip how many are done.

    Raises: InputError for `num_train` below 1, and as `render_clip` does.
    """
    if num_train < 1:
        raise InputError(f"num_train={num_train}; expected at least 1 record")
    config = config or WorldConfig()
    for before, stage in enumerate(stages):
        write = functools.partial(_write_record, pathlib.Path(root, "videos"), stage, seed, config)
        records = []
        with futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # an encoder does not hold the interpreter's lock
            for record in pool.map(write, range(num_train)):
                records.append(record)
                advance(before * num_train + len(records))
        text = json.dumps(records, indent=1) + "\n"
        _save(pathlib.Path(root, "json_data", annotations.STAGE_FILES[stage]), text.encode())


def _write_record(videos: pathlib.Path, stage: tasks.Stage, seed: int, config: WorldConfig, i: int) -> dict[str, Any]:
    """Record `i` of a stage, with its media written."""
    draw = np.random.default_rng([seed, i, _STAGES.index(stage)])
    scene = world.make_scene(int(draw.integers(2**32)), config)
    task = tasks.STAGE_TASKS[stage][i % len(tasks.STAGE_TASKS[stage])]
    source, directory = _PLACES[stage, task]
    asked = _Asked(scene, int(draw.integers(len(scene.tracks))), stage, draw, (config.width, config.height))
    name = f"{stage}-{i}"
    record = {"id": name, "task": task, "source": source, "num_objects": len(scene.tracks), **asked.record(task)}
    if task == tasks.VISUAL:
        record |= {"image_path": f"{name}.jpg", "image_size": [config.width, config.height]}
        _save_picture(videos / directory / record["image_path"], scene.frames[asked.shown[0]])
    else:
        record["video_path"] = f"{name}.mp4"
        _save(videos / directory / record["video_path"], _encode(scene.frames, config.fps))
    if task == tasks.TEMPORAL_SPATIAL:
        record |= asked.key_frames(name)
        for key, number in zip(record["key_frames"], asked.shown, strict=True):
            _save_picture(videos / _KEY_FRAMES / key["path"], scene.frames[number])
    return record


class _Asked:
    """Questions about one object of a scene, with their answers in the form of a stage."""

    def __init__(
        self, scene: Scene, number: int, stage: tasks.Stage, draw: np.random.Generator, size_wh: tuple[int, int]
    ):
        self.scene = scene
        self.track = scene.tracks[number]
        self.stage = stage
        self.draw = draw
        self.size_wh = size_wh

    @property
    def shown(self) -> list[int]:
        """Two frames that show the object: a quarter and three quarters into its presence."""
        there = np.flatnonzero(~np.isnan(self.track.boxes_frac[:, 0]))
        return [int(there[len(there) // 4]), int(there[len(there) * 3 // 4])]

    def key_frames(self, clip: str) -> dict[str, Any]:
        key_frames, key_items = [], {}
        for idx, i in enumerate(self.shown):
            time_s = round(float(self.track.times_s[i]), 3)
            key_frames.append({"idx": idx, "time": time_s, "path": f"{clip}_{time_s}.jpg"})
            key_items[str(idx)] = {self.track.name: [self.track.boxes_frac[i].round(4).tolist()]}
        return {"key_frames": key_frames, "key_items": key_items}

    def record(self, task: str) -> dict[str, str]:
        """Question and answer, and in SFT the reasoning with its evidence.

        Boxes are fractions for temporal-spatial QA and px for visual QA, as released; the general tasks cite times
        only, since nothing turns their boxes into px of the frames shown.
        """
        track = self.track
        early, late = (
            tags.render_claim(track.name, track.boxes_frac[i].tolist(), track.times_s[i]) for i in self.shown
        )
        early_s, late_s = (tags.render_time(track.times_s[i]) for i in self.shown)
        box_px = np.rint(track.boxes_frac[self.shown[0]] * [*self.size_wh, *self.size_wh])
        place = f"<obj>{track.name}</obj>{tags.render_box(box_px.tolist())}"
        start_s, end_s = track.visible_s
        seconds = str([start_s, end_s])
        presence = f"It appears at {tags.render_time(start_s)} and is gone at {tags.render_time(end_s)}."
        letter, what_color = self._options()
        question, answer, reasoning = {
            tasks.TEMPORAL_SPATIAL: (
                self._which(),
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
                tags.render_span(start_s, end_s) if self.stage == "sft" else seconds,
                presence,
            ),
            tasks.TEMPORAL_MCQ: (what_color, f"{letter}\n{seconds}", presence),
            tasks.GENERAL_MCQ: (what_color, letter, f"At {early_s} I see a {track.name}: {letter}."),
            tasks.GENERAL_FREE_FORM: (
                f"Which way does the {track.shape} move?",
                track.direction.capitalize(),  # one word each: no guess earns part of another's ROUGE
                f"From {early_s} to {late_s} it moves {_way(track.direction)}.",
            ),
        }[task]
        return {"question": question, "answer": answer} | (
            {"reasoning_process": reasoning} if self.stage == "sft" else {}
        )

    def _which(self) -> str:
        """A question whose answer is the object's name, and that no other object of the scene answers."""
        track = self.track
        starts = sorted(other.visible_s[0] for other in self.scene.tracks)
        if len(starts) == 1:
            return f"Which object is shown on the {track.ground} background?"
        if starts[0] == track.visible_s[0] < starts[1]:
            return "Which object appears first?"
        if starts[-1] == track.visible_s[0] > starts[-2]:
            return "Which object appears last?"
        return f"Which {track.shape} is shown on the {track.ground} background?"

    def _options(self) -> tuple[str, str]:
        """The right letter, and the question with its four options in random order."""
        others = self.draw.permutation([color for color in world.COLORS if color != self.track.color])[:3].tolist()
        place = int(self.draw.integers(4))
        options = [*others[:place], self.track.color, *others[place:]]
        listed = "".join(f"\n{key}. {color}" for key, color in zip("ABCD", options, strict=True))
        return "ABCD"[place], f"What color is the {self.track.shape}?{listed}"


def _way(direction: str) -> str:
    return direction if direction == "nowhere" else f"to the {direction}"


def _save(path: pathlib.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _save_picture(path: pathlib.Path, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    _save(path, file.getvalue())
