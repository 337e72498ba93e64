"""A seed -> a small world: coloured shapes that enter, cross, stop, turn and vanish over a textured ground.

Every frame and every box is exact: nothing here is random but through the seed.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, UInt8

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
MOTIONS = ("cross", "stop", "enter", "turn", "still")
DIRECTIONS = ("left", "right", "nowhere")

_TRIES = 20  # to place an object where it does not hide the others
_MOST_OVERLAP = 0.2  # of the smaller box, mean over the frames that show both


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """How hard a clip is."""

    objects: tuple[int, int] = (1, 1)  # fewest and most in a clip, distractors included
    motions: tuple[str, ...] = MOTIONS
    sizes: tuple[float, float] = (0.25, 0.5)  # of an object, as a share of the shorter side
    beat_s: float = 0.5  # times of appearing and vanishing are multiples of it, where `fps` allows it
    stays: tuple[int, int] = (2, 5)  # fewest and most beats that an object is there
    reach: float = 1.0  # how much of the free room an object crosses
    texture: float = 0.3  # how much the ground's brightness varies
    num_frames: int = 40
    fps: int = 10
    height: int = 112  # px
    width: int = 140

    def __post_init__(self):
        if (
            self.height % 2
            or self.width % 2
            or min(self.height, self.width) < 32
            or self.num_frames < 8
            or self.fps < 1
        ):
            raise InputError(
                f"world: num_frames={self.num_frames}, fps={self.fps}, height={self.height}, width={self.width}; "
                "expected at least 8 frames, 1 fps and even sides of at least 32 px"
            )
        if not 1 <= self.objects[0] <= self.objects[1] <= len(SHAPES):
            raise InputError(f"world: objects={self.objects}; expected 1 to {len(SHAPES)}, the fewest first")
        if not 1 <= self.stays[0] <= self.stays[1] or self.beat_s <= 0:
            raise InputError(
                f"world: stays={self.stays}, beat_s={self.beat_s}; expected 1 or more beats, the fewest first, of more "
                "than 0 s"
            )
        unknown = set(self.motions) - set(MOTIONS)
        if unknown or not self.motions:
            raise InputError(f"world: motions={self.motions}; expected some of {', '.join(MOTIONS)}")
        if not 0 < self.sizes[0] <= self.sizes[1] <= 0.8 or not 0 <= self.reach <= 1 or not 0 <= self.texture <= 0.4:
            raise InputError(
                f"world: sizes={self.sizes}, reach={self.reach}, texture={self.texture}; expected 0 < sizes <= 0.8, "
                "reach in [0, 1] and texture in [0, 0.4]"
            )

    @property
    def beat(self) -> int:
        """In frames."""
        return max(1, int(self.beat_s * self.fps))


@dataclasses.dataclass(frozen=True)
class Track:
    """What one object does, exactly; frame i is presented at `times_s[i]`.

    `boxes_frac`: xyxy as fractions of the frame, tight around what is inside it; NaN while it is not there.
    `visible_s`: from when on it is there, and when it is gone, in seconds.
    """

    color: str
    shape: str
    ground: str  # color of the background
    direction: str  # "left", "right" or "nowhere", from its first to its last place
    times_s: Float64[np.ndarray, " frames"]
    boxes_frac: Float64[np.ndarray, "frames 4"]
    visible_s: tuple[float, float]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The frames of a clip and the tracks of its objects; those drawn later are in front. No two share a shape."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    tracks: tuple[Track, ...]

    @property
    def shown(self) -> Bool[np.ndarray, "tracks frames"]:
        return ~np.isnan(np.stack([track.boxes_frac[:, 0] for track in self.tracks]))


class Still(NamedTuple):
    """A frame, and name and box (xyxy, fractions of it) of each object it shows."""

    pixels: UInt8[np.ndarray, "height width 3"]
    objects: list[tuple[str, Float64[np.ndarray, " 4"]]]
    ground: str  # color of the background


def make_scene(seed: int, config: WorldConfig) -> Scene:
    """Equal arguments, equal frames."""
    draw = np.random.default_rng(seed)
    number = int(draw.integers(config.objects[0], config.objects[1] + 1))
    names = draw.choice(sorted(COLORS), number + 1, replace=False).tolist()
    ground, colors = names[0], names[1:]
    shapes = draw.choice(SHAPES, number, replace=False).tolist()
    frames = np.repeat(_ground(draw, ground, config)[None], config.num_frames, axis=0)
    tracks: list[Track] = []
    for color, shape in zip(colors, shapes, strict=True):
        for _ in range(_TRIES):
            side_px, corners_px, presence = _path(draw, config)
            boxes_px = _boxes(side_px, corners_px, presence, config)
            boxes_frac = boxes_px / [config.width, config.height, config.width, config.height]
            if all(_overlap(boxes_frac, other.boxes_frac) <= _MOST_OVERLAP for other in tracks):
                break
        _paint(frames, _mask(shape, side_px), corners_px, presence, COLORS[color])
        times_s = np.arange(config.num_frames) / config.fps
        visible_s = (presence[0] / config.fps, presence[1] / config.fps)
        tracks.append(Track(color, shape, ground, _direction(boxes_frac), times_s, boxes_frac, visible_s))
    return Scene(frames, tuple(tracks))


def make_still(seed: int, config: WorldConfig) -> Still:
    """A frame of a scene that shows at least one object."""
    scene = make_scene(seed, config)
    shown = scene.shown.sum(0)
    most = np.flatnonzero(shown == shown.max())
    return _still(scene, int(most[len(most) // 2]))


def make_stills(seed: int, config: WorldConfig, number: int) -> list[Still]:
    """`number` frames of one scene, in random order: no time passes from one to the next. Not all of them are empty."""
    scene = make_scene(seed, config)
    draw = np.random.default_rng([seed, number])
    one = draw.choice(np.flatnonzero(scene.shown.any(0)))
    others = draw.choice(np.delete(np.arange(config.num_frames), one), number - 1, replace=False)
    return [_still(scene, int(i)) for i in draw.permutation([one, *others])]


def _still(scene: Scene, frame: int) -> Still:
    there = zip(scene.tracks, scene.shown[:, frame], strict=True)
    objects = [(track.name, track.boxes_frac[frame]) for track, is_there in there if is_there]
    return Still(scene.frames[frame], objects, scene.tracks[0].ground)


def _ground(draw: np.random.Generator, color: str, config: WorldConfig) -> UInt8[np.ndarray, "height width 3"]:
    """The colour, darkened here and there by smooth blotches and towards one side."""
    coarse = draw.random((4, 5))
    rows, columns = np.linspace(0, 3, config.height), np.linspace(0, 4, config.width)
    by_row = np.stack([np.interp(rows, np.arange(4), column) for column in coarse.T], axis=1)
    smooth = np.stack([np.interp(columns, np.arange(5), row) for row in by_row])
    slope = np.linspace(0, 1, config.width)[None, :] * draw.random()
    brightness = 1 - config.texture * (smooth + slope) / 2
    return (np.array(COLORS[color]) * brightness[..., None]).astype(np.uint8)


def _path(
    draw: np.random.Generator, config: WorldConfig
) -> tuple[int, Float64[np.ndarray, "frames 2"], tuple[int, int]]:
    """Side of an object in px, its left upper corner in every frame, and from which frame to which it is there."""
    shorter, num = min(config.height, config.width), config.num_frames
    side_px = int(draw.integers(round(config.sizes[0] * shorter), round(config.sizes[1] * shorter) + 1))
    shortest, longest = (min(num, beats * config.beat) for beats in config.stays)
    first = int(draw.choice(np.arange(0, num - shortest + 1, config.beat)))
    length = int(draw.choice(np.arange(shortest, min(num - first, longest) + 1, config.beat)))
    motion = str(draw.choice(config.motions))
    room = np.array([config.width - side_px, config.height - side_px], float)
    start = draw.random(2) * room
    end = start + (draw.random(2) * room - start) * config.reach
    if motion in ("cross", "enter"):  # from one side towards the other
        sides = np.array([draw.random() / 3, 1 - draw.random() / 3])
        start[0], end[0] = (sides if draw.random() < 0.5 else sides[::-1]) * room[0]
        end[0] = start[0] + (end[0] - start[0]) * config.reach
    if motion == "enter":  # half of it is outside at first
        start[0] = -side_px / 2 if start[0] < end[0] else config.width - side_px / 2
    along = np.clip((np.arange(num) - first) / max(1, length - 1), 0, 1)
    along = {"stop": np.minimum(2 * along, 1), "turn": 1 - np.abs(2 * along - 1), "still": 0 * along}.get(motion, along)
    return side_px, np.rint(start + along[:, None] * (end - start)), (first, first + length)


def _boxes(
    side_px: int, corners_px: Float64[np.ndarray, "frames 2"], presence: tuple[int, int], config: WorldConfig
) -> Float64[np.ndarray, "frames 4"]:
    boxes_px = np.hstack([corners_px, corners_px + side_px])
    boxes_px = np.clip(boxes_px, 0, [config.width, config.height, config.width, config.height])
    boxes_px[: presence[0]] = boxes_px[presence[1] :] = np.nan
    return boxes_px


def _direction(boxes_frac: Float64[np.ndarray, "frames 4"]) -> str:
    there = boxes_frac[~np.isnan(boxes_frac[:, 0])]
    moved = (there[-1, 0] + there[-1, 2] - there[0, 0] - there[0, 2]) / 2
    return "nowhere" if abs(moved) < 0.1 else "right" if moved > 0 else "left"


def _overlap(a: Float64[np.ndarray, "frames 4"], b: Float64[np.ndarray, "frames 4"]) -> float:
    """Shared area as a share of the smaller box, mean over the frames that show both; 0 where none does."""
    both = ~np.isnan(a[:, 0]) & ~np.isnan(b[:, 0])
    if not both.any():
        return 0.0
    a, b = a[both], b[both]
    shared = np.prod(np.maximum(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0), axis=1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a, b)]
    return float((shared / np.minimum(*areas)).mean())


def _paint(
    frames: UInt8[np.ndarray, "frames height width 3"],
    mask: Bool[np.ndarray, "side side"],
    corners_px: Float64[np.ndarray, "frames 2"],
    presence: tuple[int, int],
    color: tuple[int, int, int],
) -> None:
    """Draw the shape into the frames that show it, cut at the frame's sides."""
    height, width = frames.shape[1:3]
    side = len(mask)
    for i in range(*presence):
        left, top = corners_px[i].astype(int)
        x, y = slice(max(0, left), min(width, left + side)), slice(max(0, top), min(height, top + side))
        frames[i, y, x][mask[y.start - top : y.stop - top, x.start - left : x.stop - left]] = color


def _mask(shape: str, side_px: int) -> Bool[np.ndarray, "side side"]:
    """True inside the shape, which touches all four sides of its square box."""
    y, x = np.mgrid[:side_px, :side_px] + 0.5
    half = side_px / 2
    if shape == "circle":
        return (x - half) ** 2 + (y - half) ** 2 <= half**2
    if shape == "triangle":
        return np.abs(x - half) <= (y + 0.5) / 2
    return np.ones((side_px, side_px), bool)
