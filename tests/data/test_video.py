import dataclasses
import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from PIL import Image

from data import clips
from openo3_jax.config import VideoConfig
from openo3_jax.data import sampling, video
from openo3_jax.errors import InputError

SMALL = VideoConfig(min_pixels=3136, max_pixels=3136)


@pytest.fixture(scope="module")
def decoder():
    with video.Decoder() as decoder:
        yield decoder


def numbers(clip):
    return [clips.read_number(frame) for frame in clip.frames]


# ---- which frames, how large: the reference's worked values ----

SIZES = {  # height, width -> height, width after the resize, at 16 frames
    (1080, 1920): (224, 420),
    (720, 1280): (224, 420),
    (480, 640): (280, 364),
    (360, 640): (224, 420),
    (240, 320): (280, 392),
    (1920, 1080): (420, 224),
}


@pytest.mark.parametrize("size", SIZES)
def test_frame_size(size):
    assert sampling.frame_size(*size, 16, VideoConfig()) == SIZES[size]


COUNTS = {  # frames, fps -> frames taken
    (540, 30.0): 16,  # 18 s
    (100, 20.0): 10,  # 5 s, 10 frames at 2 fps
    (110, 20.0): 10,  # 11 frames, floored to even
    (30, 30.0): 4,  # 1 s: at least 4
    (5, 10.0): 4,
    (3, 30.0): 2,  # never more than there are, and even
}


@pytest.mark.parametrize("clip", COUNTS)
def test_choose_num_frames(clip):
    assert sampling.choose_num_frames(*clip, VideoConfig()) == COUNTS[clip]


def test_choose_frames_spreads_from_first_to_last():
    # linspace(0, 59, 12) = 0, 5.36, 10.73, 16.09, 21.45, 26.82, 32.18, 37.55, 42.91, 48.27, 53.64, 59
    expected = [0, 5, 11, 16, 21, 27, 32, 38, 43, 48, 54, 59]
    assert sampling.choose_frames(60, 10.0, VideoConfig()).tolist() == expected


# ---- decoding ----

SIXTY = [0, 5, 11, 16, 21, 27, 32, 38, 43, 48, 54, 59]

FILES = {  # name of the file: how it is encoded
    "plain.mp4": {},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:scenecut=0"}},
    "transport.ts": {"format": "mpegts"},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "open-gop=1:keyint=12:log-level=none"}},
    "old.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "shuffled.avi": {"options": {"bf": "3"}},  # H.264 in AVI: time stamps in decoding order
    "raw.h264": {"format": "h264", "options": {"x264-params": "fps=10/1:force-cfr=1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
}


@pytest.mark.parametrize("name", FILES)
def test_the_frames_asked_for_come_back_with_their_times(name, tmp_path, decoder):
    clip = decoder.read(clips.encode(tmp_path / name, **FILES[name]), SMALL)
    if name == "raw.h264":  # a raw stream is read at the 25 fps that libav assumes: 2.4 s, 4 frames
        assert numbers(clip) == [0, 20, 39, 59]
        np.testing.assert_allclose(clip.times_s, np.array([0, 20, 39, 59]) / 25)
        return
    assert numbers(clip) == SIXTY
    np.testing.assert_allclose(clip.times_s, np.array(SIXTY) / 10, atol=1e-9)
    assert clip.duration_s == pytest.approx(6.0, abs=1e-9)
    assert clip.source_hw == (clips.HEIGHT, clips.WIDTH)
    assert clip.frames.shape[1:] == (28, 56, 3)


def test_times_follow_the_clip_not_its_average_rate(tmp_path, decoder):
    # 20 frames at 10 fps, a pause of two seconds, 20 more: shown at 0..1.9 s and 4..5.9 s, last one for 0.1 s
    pts = [*range(20), *range(40, 60)]
    clip = decoder.read(clips.encode(tmp_path / "pause.mkv", pts=pts), SMALL)
    np.testing.assert_allclose(clip.times_s, np.array(pts)[numbers(clip)] / 10, atol=1e-3)
    # 40 frames in 6 s: 12 frames at 2 fps, every 39/11 = 3.55th
    assert numbers(clip) == [0, 4, 7, 11, 14, 18, 21, 25, 28, 32, 35, 39]


def test_a_stream_that_starts_late_counts_from_its_first_frame(tmp_path, decoder):
    clip = decoder.read(clips.encode(tmp_path / "late.mkv", pts=range(50, 110)), SMALL)
    np.testing.assert_allclose(clip.times_s, np.array(SIXTY) / 10, atol=1e-3)


PARTS = {  # start and end of a clip of 6 s at 10 fps -> frames shown, times, length
    (2.0, 4.0): ([20, 26, 33, 40], [0, 2 / 3, 4 / 3, 2], 2.0),
    (0.0, 6.0): ([0, 5, 10, 16, 21, 27, 32, 38, 43, 49, 54, 59], [i * 6 / 11 for i in range(12)], 6.0),
    (5.0, 9.0): ([50, 53, 56, 59], [0, 1 / 3, 2 / 3, 1], 1.0),  # ends with the clip
    (2.0, 2.2): ([20, 20, 21, 22], [0, 0.2 / 3, 0.4 / 3, 0.2], 0.2),  # four moments in which three frames are shown
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_as_if_it_were_cut_out(part, tmp_path, decoder):
    clip = decoder.read_part(clips.encode(tmp_path / "a.mp4"), SMALL, *part)
    frames, times, length = PARTS[part]
    assert numbers(clip) == frames
    np.testing.assert_allclose(clip.times_s, times, atol=1e-9)
    assert clip.duration_s == pytest.approx(length) and clip.source_hw == (clips.HEIGHT, clips.WIDTH)


@pytest.mark.parametrize("part", [(6.5, 9.0), (-1.0, 2.0), (3.0, 3.0)])
def test_a_part_that_is_none_of_the_clip(part, tmp_path, decoder):
    with pytest.raises(InputError, match=r"a.mp4: is 6.0 s long; expected a part of it"):
        decoder.read_part(clips.encode(tmp_path / "a.mp4"), SMALL, *part)


def test_released_labels_are_even_steps(tmp_path, decoder):
    config = dataclasses.replace(SMALL, frame_times="released")
    clip = decoder.read(clips.encode(tmp_path / "a.mp4"), config)
    # sample_fps = 12 / 60 * 10 = 2
    np.testing.assert_allclose(clip.times_s, np.arange(12) / 2)
    assert (numbers(clip), clip.duration_s) == (SIXTY, 6.0)


@pytest.mark.parametrize("degrees, turns", [(90, 1), (-90, -1), (180, 2)])
def test_phone_videos_stand_upright(degrees, turns, tmp_path, decoder):
    flat = decoder.read(clips.encode(tmp_path / "flat.mp4"), SMALL)
    turned = decoder.read(clips.encode(tmp_path / "turned.mp4", rotation=degrees), SMALL)
    assert turned.source_hw == ((clips.WIDTH, clips.HEIGHT) if turns % 2 else (clips.HEIGHT, clips.WIDTH))
    back = np.rot90(turned.frames[3], -turns)
    assert clips.read_number(back) == clips.read_number(flat.frames[3]) == 16


def test_frames_that_the_edit_list_cuts_are_not_shown(tmp_path, decoder):
    path = clips.encode(tmp_path / "trimmed.mp4", options={"bf": "0"})
    content = bytearray(path.read_bytes())
    # elst: 4 bytes version and flags, 4 number of entries, then duration and the media time shown first, 32 bits each
    at = content.index(b"elst") + 4
    assert int.from_bytes(content[at + 4 : at + 8], "big") == 1
    content[at + 12 : at + 16] = (20 * 1024).to_bytes(4, "big")  # frame 20, within a group of pictures
    path.write_bytes(content)
    clip = decoder.read(path, SMALL)
    # 40 frames in 4 s, 8 shown, every 39/7 = 5.57th: 0, 6, 11, 17, 22, 28, 33, 39 after frame 20
    assert numbers(clip) == [20, 26, 31, 37, 42, 48, 53, 59]
    np.testing.assert_allclose(clip.times_s, np.array([0, 6, 11, 17, 22, 28, 33, 39]) / 10, atol=1e-9)


def test_lost_key_frames_leave_what_can_be_decoded(tmp_path, decoder):
    whole, lost = clips.encode(tmp_path / "whole.mp4", options={"x264-params": "bframes=0:scenecut=0"}), []
    path = tmp_path / "lost.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None and not (packet.is_keyframe and packet.pts > 0):
                packet.stream = stream
                target.mux(packet)
            elif packet.dts is not None:
                lost.append(packet)
    assert len(lost) == 4
    clip = decoder.read(path, SMALL)
    assert len(clip.frames) >= 4 and clip.times_s[0] == 0 and (np.diff(clip.times_s) > 0).all()
    assert numbers(clip)[0] == 0


def test_titles_in_old_encodings_do_no_harm(tmp_path, decoder):
    path = clips.encode(tmp_path / "a.mkv", title="Cafe Ole")
    content = path.read_bytes()
    assert content.count(b"Cafe Ole") == 1
    path.write_bytes(content.replace(b"Cafe Ole", "Café Olé".encode("latin-1")))
    assert numbers(decoder.read(path, SMALL)) == SIXTY


def test_a_cut_tail_leaves_true_times(tmp_path, decoder):
    content = clips.encode(tmp_path / "a.ts", format="mpegts").read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(content[: len(content) * 2 // 3])
    clip = decoder.read(path, SMALL)
    np.testing.assert_allclose(clip.times_s, np.array(numbers(clip)) / 10, atol=1e-9)
    assert 2 < clip.times_s[-1] < 5


# ---- files that are no video ----


def bad_file(kind, path):
    if kind == "text":
        path.write_text("not a video\n" * 50)
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(20_000))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "headless":
        content = clips.encode(path).read_bytes()
        path.write_bytes(content[: len(content) // 2])  # the index of an mp4 stands at its end
    elif kind == "picture":
        Image.fromarray(clips.bars(3)).save(path, "PNG")
    elif kind == "one frame":
        clips.encode(path, pts=[0])
    elif kind == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16_000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    elif kind == "audio with a cover":
        bad_file("audio", path.with_suffix(".m4a"))
        with av.open(str(path.with_suffix(".m4a"))) as source, av.open(str(path), "w") as target:
            audio = target.add_stream_from_template(source.streams.audio[0])
            cover = target.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = clips.WIDTH, clips.HEIGHT, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            target.mux(cover.encode(av.VideoFrame.from_ndarray(clips.bars(3), "rgb24")))
            target.mux(cover.encode(None))
            for packet in source.demux(audio=0):
                if packet.dts is not None:
                    packet.stream = audio
                    target.mux(packet)
    elif kind == "directory":
        path.mkdir()
    else:
        assert kind == "missing"


BAD = {
    "text": "cannot be decoded",
    "noise": "cannot be decoded",
    "empty": "is empty",
    "headless": "cannot be decoded",
    "picture": "holds 1 frame",
    "one frame": "holds 1 frame",
    "audio": "no video stream",
    "audio with a cover": "no video stream",
    "missing": "no such video file",
    "directory": "no such video file",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_in_one_line(kind, tmp_path, decoder):
    path = tmp_path / "clip.mp4"
    bad_file(kind, path)
    with pytest.raises(InputError, match=BAD[kind]) as caught:
        decoder.read(path, SMALL)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_picture_larger_than_allowed_is_refused(tmp_path, decoder):
    path = clips.encode(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=r"128x64 px.*max_side_px=100"):
        decoder.read(path, dataclasses.replace(SMALL, max_side_px=100))
    assert len(decoder.read(path, dataclasses.replace(SMALL, max_side_px=128)).frames) == 12


def test_very_long_pictures_are_refused(tmp_path, decoder):
    path = tmp_path / "strip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 1608, 8, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((8, 1608, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match=r"strip.mkv: 1608x8 px.*200 times"):
        decoder.read(path, SMALL)


# ---- the process ----


def test_one_shot_and_shared_reader_agree(tmp_path, decoder):
    path = clips.encode(tmp_path / "a.mp4")
    read = video.make_reader(decoder)
    first = read(path, SMALL)
    assert read(path, SMALL) is first
    np.testing.assert_array_equal(video.read_video(path, SMALL).frames, first.frames)


def test_a_decode_past_its_deadline_is_killed_and_the_next_one_works(tmp_path):
    path = clips.encode(tmp_path / "a.mp4")
    with video.Decoder() as decoder:
        decoder.read(path, SMALL)
        pid = decoder._process.pid
        os.kill(pid, signal.SIGSTOP)  # a decoder that hangs
        begin = time.monotonic()
        with pytest.raises(InputError, match=r"a.mp4: decoding took longer than deadline_s=0.5 s"):
            decoder.read(path, dataclasses.replace(SMALL, deadline_s=0.5))
        assert time.monotonic() - begin < 10
        assert not is_alive(pid)
        assert len(decoder.read(path, SMALL).frames) == 12
        pid = decoder._process.pid
    assert not is_alive(pid)


def test_a_crash_is_reported_and_the_next_read_works(tmp_path):
    path = clips.encode(tmp_path / "a.mp4")
    with video.Decoder() as decoder:
        decoder.read(path, SMALL)
        # Stopped, the process holds the request; the crash then comes in the middle of it.
        os.kill(decoder._process.pid, signal.SIGSTOP)
        killer = f"import os, time; time.sleep(0.5); os.kill({decoder._process.pid}, {int(signal.SIGSEGV)}); "
        killer += f"os.kill({decoder._process.pid}, {int(signal.SIGCONT)})"
        with (
            subprocess.Popen([sys.executable, "-c", killer]),
            pytest.raises(InputError, match=r"a.mp4: the decoder crashed \(exit status -11"),
        ):
            decoder.read(path, SMALL)
        assert len(decoder.read(path, SMALL).frames) == 12


def test_the_process_ends_with_its_parent(tmp_path):
    parent = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, signal, sys\n"  # no `if __name__` guard: the worker never imports the user's script
            "from openo3_jax.data import video\n"
            "decoder = video.Decoder()\n"
            "decoder._start()\n"
            "print(decoder._process.pid, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n",
        ],
        capture_output=True,
        text=True,
    )
    pid = int(parent.stdout)
    patience = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not is_alive(pid)


SIGNALLED = """
import signal, sys
from openo3_jax.config import VideoConfig
from openo3_jax.data import video
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)  # as a run does, which then saves its state
with video.Decoder() as decoder:
    decoder.read(sys.argv[1], VideoConfig())
    pid = decoder._process.pid
    print("reading", flush=True)
    sys.stdin.readline()
    print(len(decoder.read(sys.argv[1], VideoConfig()).frames), decoder._process.pid == pid)
"""


def test_a_signal_to_the_group_of_its_parent_leaves_the_process_alone(tmp_path):
    path, pipe = clips.encode(tmp_path / "a.mp4"), subprocess.PIPE
    command = [sys.executable, "-c", SIGNALLED, str(path)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as parent:
        assert parent.stdout.readline() == "reading\n"
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(parent.pid, number)
        time.sleep(0.5)  # for what they would do
        assert parent.communicate("\n", timeout=60)[0] == "12 True\n"


def is_alive(pid):
    """False for a zombie as well: its end is for someone else to note."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_worker_imports_no_model_library():
    code = "import sys, openo3_jax.data.decode_worker; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "av" in modules
    assert not {"jax", "torch", "transformers", "flax", "tensorflow", "decord"} & set(modules)
