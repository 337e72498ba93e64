"""The overlay: where it stops, what is drawn there, both formats, and names that are refused."""

import av
import numpy as np
import pytest
from PIL import Image

from openo3_jax import tags
from openo3_jax.errors import InputError
from openo3_jax.report import overlay
from report import moving_square

TEXT = (
    "<think><obj>a</obj><box>[0,0,50,50]</box><box>[50,50,100,100]</box>at<t>1</t>s then <t>2.5</t>s and "
    "<obj>b</obj><box>[10,10,20,20]</box>at<t>1.02</t>s, <obj>late</obj><box>[0,0,9,9]</box>at<t>77</t>s "
    "<obj>c</obj><box>[5,5,1,1]</box>at<t>2.5</t>s <obj>d</obj><box>[1,1,8,8]</box></think><answer>yes</answer>"
)


def test_stops():
    """Boxes of 100x200 px (height x width): x over 200, y over 100. A reversed box is not drawn."""
    first, second, last = overlay.find_stops(TEXT, (100, 200), 4.0)
    assert (first.time_s, first.caption) == (1.0, "1 a 1 s   3 b 1.02 s")
    assert [(box.name, box.frac) for box in first.boxes] == [
        ("1 a", (0, 0, 0.25, 0.5)),
        ("1 a", (0.25, 0.5, 0.5, 1.0)),
        ("3 b", (0.05, 0.1, 0.1, 0.2)),
    ]
    assert (second.time_s, second.caption, second.boxes) == (2.5, "2 2.5 s   5 c 2.5 s", ())
    assert (last.time_s, last.caption) == (4.0, "4 late 77 s (outside of the clip)   6 d no time cited")
    assert overlay.find_stops("nothing", (100, 200), 4.0) == []


def test_a_long_clip_is_played_faster_and_stops_are_exact():
    """100 s in 2 s at 5 frames per second: ten frames, 10 s apart, and the stop at 12.3 s between two of them."""
    style = overlay.Style(fps=5, width=64, play_s=2.0)
    stop = overlay.Stop(12.3, "x", ())
    schedule = overlay.make_schedule([stop], 100.0, style)
    assert [t for t, _ in schedule] == [0, 10, 12.3, 20, 30, 40, 50, 60, 70, 80, 90]
    assert [one for _, one in schedule if one is not None] == [stop]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return moving_square.write(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.mark.parametrize("kind", [".mp4", ".gif"])
def test_the_box_is_drawn_where_it_is_cited(clip, tmp_path, kind):
    i = 13
    box = np.array(moving_square.box_frac(i))
    text = f"<think>{tags.render_claim('square', (box * 100).tolist(), i / 10)}</think>"
    out = tmp_path / "new" / f"out{kind}"
    overlay.write(out, clip, "Where is it?", f"{text}<answer>Here.</answer>", (100, 100))
    with av.open(str(out)) as container:
        shown = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    style = overlay.STYLES[kind]
    canvas = overlay.Canvas("Where is it?", "<answer>Here.</answer>", (112, 140), 4.0, [], style)
    assert (shown[0][1].shape[1], shown[0][1].shape[0]) == canvas.total
    width, height = canvas.size
    x1, y1, x2, y2 = box * [width, height, width, height]
    edges = [(int(x2) - 1, int((y1 + y2) / 2)), (int((x1 + x2) / 2), int(y2) - 1), (int(x1) + 1, int((y1 + y2) / 2))]

    def has_box(picture):
        return all(np.abs(picture[y + canvas.top, x].astype(int) - overlay.COLORS[0]).max() < 75 for x, y in edges)

    marked = [time_s for time_s, picture in shown if has_box(picture)]
    assert marked and len(marked) < len(shown)
    if kind == ".mp4":  # played to the moment, held for 1.5 s
        assert marked[0] == pytest.approx((np.arange(0, 4, 1 / 12) <= i / 10).sum() / 12)
        assert len(marked) == 18 and max(np.diff(marked)) < 0.1
    else:
        with Image.open(out) as gif:
            gif.seek([has_box(picture) for _, picture in shown].index(True))
            assert gif.info["duration"] == 1500
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def test_an_answer_without_evidence_is_the_clip_with_the_answer(clip, tmp_path):
    overlay.write(tmp_path / "out.mp4", clip, "q", "just text", (100, 100))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 48


def test_mistakes(clip, tmp_path):
    with pytest.raises(InputError, match=r"out\.avi: expected a name that ends in \.mp4 or \.gif"):
        overlay.check_name(tmp_path / "out.avi")
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    with pytest.raises(InputError, match=r"broken\.mp4"):
        overlay.write(tmp_path / "out.mp4", broken, "q", TEXT, (100, 100))
    assert [file.name for file in tmp_path.iterdir()] == ["broken.mp4"]
