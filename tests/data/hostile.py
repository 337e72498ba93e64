"""Video files not to be trusted: damaged, misnamed, odd, endless. Number n is always the same file."""

import os

import av
import numpy as np

from data import clips

# Whole clips to damage: file ending and how it is encoded.
SOURCES = (
    ("mp4", {"options": {"bf": "2"}}),
    ("mkv", {}),
    ("ts", {"format": "mpegts"}),
    ("avi", {"codec": "mpeg4"}),
    ("mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
    ("webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    ("flv", {}),
)


def _truncated(rng, content):
    return content[: int(len(content) * rng.uniform(0.05, 0.98))]


def _flipped(rng, content):
    damaged = np.frombuffer(content, np.uint8).copy()
    places = rng.integers(0, len(damaged), rng.choice([1, 8, 200]))
    damaged[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return damaged.tobytes()


def _bad_header(rng, content):
    damaged = np.frombuffer(content, np.uint8).copy()
    ends = np.concatenate([np.arange(200), np.arange(len(damaged) - 1500, len(damaged))])  # mp4 has its index last
    places = rng.choice(ends, 30)
    damaged[places] = rng.integers(0, 256, len(places))
    return damaged.tobytes()


def _hole(rng, content):
    start = int(rng.integers(0, len(content)))
    return content[:start] + bytes(int(rng.integers(1, 4000))) + content[start + 4000 :]


def _shuffled(rng, content):
    blocks = [content[i : i + 512] for i in range(0, len(content), 512)]
    swapped = rng.integers(0, len(blocks), 2)
    blocks[swapped[0]], blocks[swapped[1]] = blocks[swapped[1]], blocks[swapped[0]]
    return b"".join(blocks)


def _twice(rng, content):
    return content + content[int(rng.integers(0, len(content))) :]


DAMAGES = (_truncated, _flipped, _bad_header, _hole, _shuffled, _twice)


def _lose_key_frames(source, path):
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None and not (packet.is_keyframe and packet.pts > 0):
                packet.stream = stream
                new.mux(packet)


def _odd_size(path, rng):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = int(rng.integers(1, 99)), int(rng.integers(1, 99)), "yuv444p"
        for _ in range(int(rng.integers(1, 6))):
            picture = rng.integers(0, 256, (stream.height, stream.width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))


# Kinds that are no damage of a whole clip.
OTHERS = {
    "text": lambda path, rng: path.write_text("no video\n" * int(rng.integers(1, 500))),
    "noise": lambda path, rng: path.write_bytes(rng.bytes(int(rng.integers(1, 50_000)))),
    "empty": lambda path, rng: path.write_bytes(b""),
    "zeros": lambda path, rng: path.write_bytes(bytes(int(rng.integers(1, 100_000)))),
    "one frame": lambda path, rng: clips.encode(path, pts=[0]),
    "pipe": lambda path, rng: os.mkfifo(path),
    "endless": lambda path, rng: path.symlink_to("/dev/zero"),
    "odd size": _odd_size,
    "lost key frames": lambda path, rng: _lose_key_frames(
        clips.encode(path.with_suffix(".whole.mp4"), options={"x264-params": "bframes=0:scenecut=0"}), path
    ),
}


def make_file(directory, number, whole):
    """Write hostile file `number` and return its path; `whole` caches the clips that are damaged, by source."""
    rng = np.random.default_rng(number)
    if number % 3 == 0:
        kind = list(OTHERS)[number // 3 % len(OTHERS)]
        path = directory / f"{number}_{kind.replace(' ', '_')}.mkv"
        OTHERS[kind](path, rng)
        return path
    source = int(rng.integers(len(SOURCES)))
    ending, settings = SOURCES[source]
    if source not in whole:
        whole[source] = clips.encode(directory / f"whole{source}.{ending}", **settings).read_bytes()
    damage = DAMAGES[int(rng.integers(len(DAMAGES)))]
    path = directory / f"{number}{damage.__name__}.{ending}"
    path.write_bytes(damage(rng, whole[source]))
    return path
