"""The evidence page without a browser: what is escaped, where boxes go, what is said of each mention."""

import base64
import errno
import hashlib
import html.parser
import io
import json
import re

import av
import numpy as np
import pytest

from openo3_jax import cli, tasks
from openo3_jax.config import VideoConfig
from openo3_jax.data.video import Decoder
from openo3_jax.errors import InputError
from openo3_jax.report import embed, evidence, pages, verdicts
from report import moving_square

NASTY = "<script>document.title='taken'</script><img src=x onerror=alert(1)>\"'&</pre>"
RECORD = {
    "task": tasks.TEMPORAL_SPATIAL,
    "question": "Who?",
    "answer": "a cat",
    "key_frames": [{"idx": 0, "time": 10.0, "path": "a.jpg"}, {"idx": 1, "time": 20.0, "path": "b.jpg"}],
    "key_items": {"0": {"cat": [[0.0, 0.0, 0.5, 0.5]]}, "1": {"dog": [[0.5, 0.5, 1.0, 1.0]]}},
    "image_size": [40, 20],
}


class Page(html.parser.HTMLParser):
    """Elements, attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._in_script = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data


def answer(completion, **more):
    fields = {"title": "t", "question": "q", "completion": completion, "shown_hw": (20, 40), "gap": "no clip"}
    return evidence.Answer(**fields | more)


def marks(completion, **more):
    return evidence.view(answer(completion, **more), 0)["marks"]


# ---- text of others stays text ----


def test_text_of_a_model_is_never_markup():
    """Everywhere it goes: parts, names of objects (buttons, titles, data of the script), question, facts, notes."""
    claim = f"<obj>{NASTY}</obj><box>[0,0,10,10]</box>at<t>1</t>s"
    text = f"{NASTY}<think>{NASTY}{claim}</think><answer>{NASTY}</answer>"
    shown = answer(text, title=NASTY, question=NASTY, gap=NASTY, facts=[(NASTY, NASTY)])
    page = Page(evidence.render_page(NASTY, [shown], [NASTY]))
    assert [attributes.get("type") for tag, attributes in page.elements if tag == "script"] == [
        "application/json",
        None,
    ]
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert "taken" not in page.scripts[1]
    assert any(
        m["boxes"][0]["name"].startswith("1 <script>document") for m in json.loads(page.scripts[0]) if m["boxes"]
    )


@pytest.mark.parametrize("time", ["0.00001", "7", "10000000000", "9" * 300, f"0.{'0' * 320}1"])
def test_any_time_can_be_drawn(time):
    shown = evidence.view(answer(f"<think><t>{time}</t>s</think>"), 0)
    assert shown["timeline"] is None or 1 <= len(shown["timeline"]["ticks"]) <= 7


def test_half_an_emoji_is_written(tmp_path):
    pages.write(tmp_path / "page.html", evidence.render_page("t", [answer("<think>\ud83d</think>")]))
    assert "\\ud83d" in (tmp_path / "page.html").read_text()


def test_the_page_may_load_nothing_and_run_its_own_script_only():
    page = Page(evidence.render_page("t", [answer("<think></think>")]))
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not [v for _, a in page.elements for k, v in a.items() if k in ("src", "href") and not v.startswith("data:")]


# ---- where boxes go ----


def test_boxes_are_fractions_of_the_frames_shown():
    """[10, 5, 20, 15] px of 40x20 (width x height): a quarter to a half across, a quarter to three quarters down."""
    (mark,) = marks("<think><obj>cat</obj><box>[10,5,20,15]</box>at<t>3.5</t>s</think>")
    assert mark["boxes"] == [{"name": "1 cat", "box": [0.25, 0.25, 0.5, 0.75]}]
    assert (mark["time_s"], mark["is_faulty"]) == (3.5, False)


BOXES = {  # written -> drawn, what is said
    "[0,0,80,10]": ([[0, 0, 1, 0.5]], "leaves the frame of 40x20 px"),
    "[20,5,10,15]": ([], "empty or reversed"),
    "[1,2,x]": ([], "no JSON list"),
    "[1,2,3]": ([], "not four finite numbers"),
    "[NaN,0,1,1]": ([], "not four finite numbers"),
    "[50,0,80,10]": ([], "leaves the frame"),
    "[0,0,10,10]</box><box>[20,10,40,20]": ([[0, 0, 0.25, 0.5], [0.5, 0.5, 1, 1]], "nothing to hold it against"),
}


@pytest.mark.parametrize("written", BOXES)
def test_boxes_that_cannot_be_drawn_are_named(written):
    drawn, said = BOXES[written]
    (mark,) = marks(f"<think><obj>cat</obj><box>{written}</box>at<t>3</t>s</think>")
    assert [one["box"] for one in mark["boxes"]] == drawn
    assert said in "; ".join(mark["lines"])


def test_without_the_size_of_the_frames_no_box_is_drawn():
    (mark,) = marks("<think><obj>cat</obj><box>[0,0,9,9]</box>at<t>3</t>s</think>", shown_hw=None)
    assert mark["boxes"] == [] and "not known" in mark["lines"][0] and mark["time_s"] == 3


def test_every_kind_of_mention_is_a_button():
    text = (
        "<t>1</t>s <think><obj>a</obj><box>[1,1,2,2]</box>at<t>2</t>s <t>3</t>s <box>[0,0,4,4]</box></think>"
        "<answer>From <t>4</t>s to <t>5.5</t>s</answer>"
    )
    assert [mark["times_s"] for mark in marks(text)] == [[1.0], [2.0], [3.0], [], [4.0, 5.5]]
    assert [mark["is_claim"] for mark in marks(text)] == [False, True, False, False, False]


@pytest.mark.parametrize("text", ["", "no tags at all", "<think>unclosed", "<answer></answer><think></think>"])
def test_text_without_claims_is_shown_and_said(text):
    page = evidence.render_page("t", [answer(text)])
    assert "This text points nowhere" in page
    assert ("The model said nothing" if not text else "No claim with object, box and time") in page


def test_thousands_of_mentions_do_not_make_thousands_of_buttons():
    view = evidence.view(answer("<think>" + "<t>1</t>s " * 5000 + "</think>"), 0)
    assert len(view["marks"]) == 400
    assert "<t>1</t>s" in view["parts"][0]["pieces"][-1]["text"]


# ---- what is said of each ----


def scored(completion, record=RECORD, rules="paper"):
    return verdicts.score_rows([record], [completion], 1.0, rules=rules)[0]


def test_a_claim_is_held_against_its_key_frame():
    """Frame 40x20, true box [0, 0, 20, 10]: a claim of [0, 0, 20, 5] has IoU 1/2; sigma is 1 s, dt 1 s: exp(-1/2)."""
    text = "<think>x <obj>cat</obj><box>[0,0,20,5]</box>at<t>11</t>s</think><answer>a cat</answer>"
    (verdict,) = [v for part in scored(text).verdicts for v in part]
    assert verdict.lines == (
        "key frame at 10 s, dt +1.00 s: passes the gate (|dt| <= 3 s)",
        "IoU 0.500 with 'cat'",
        "thk_spatial: earns 0.500",
        "11 s: proximity 0.607 to the nearest key frame",
    )
    assert verdict.true_boxes == (verdicts.TrueBox("cat", (0.0, 0.0, 0.5, 0.5), 10.0),)


def test_verdicts_stay_with_their_claims_behind_malformed_and_bare_ones():
    """Two claims are malformed, by box and by time, and own no box; a bare box is in no claim; the fifth has two."""
    good = "<obj>cat</obj><box>[0,0,20,10]</box>at<t>10</t>s"
    bad_box = "<obj>cat</obj><box>[0,0,x]</box>at<t>10</t>s"
    bad_time = "<obj>cat</obj><box>[0,0,20,10]</box>at<t>12,2</t>s"
    two = "<obj>dog</obj><box>[0,0,20,10]</box><box>[20,10,40,20]</box>at<t>20</t>s"
    half = "<obj>cat</obj><box>[0,0,20,5]</box>at<t>10</t>s"
    text = f"<think>{good}{bad_box}{bad_time} <box>[1,1,2,2]</box> {two}{half}</think><answer>{good}</answer>"
    think, reply = [part for part in scored(text).verdicts if part]
    assert "IoU 1.000 with 'cat'" in think[0].lines
    assert think[1].lines == ("malformed, a box is no JSON list: earns nothing",)
    assert think[2].lines == ("malformed, its time is no number: earns nothing",)
    assert think[3].lines == ()
    assert {"box 1: IoU 0.000 with 'dog'", "box 2: IoU 1.000 with 'dog'"} <= set(think[4].lines)
    assert "IoU 0.500 with 'cat'" in think[5].lines
    assert reply[0].lines == ()


def test_what_does_not_count_is_said():
    good = "<obj>cat</obj><box>[0,0,20,10]</box>at<t>10</t>s"
    (think,) = [part for part in scored(f"<think>{good}<t>1.2.3</t>s</think>").verdicts if part]
    assert "thk_spatial: earns nothing without an answer" in think[0].lines
    assert "not counted, for another time is not a number" in think[0].lines
    assert think[1].lines == ("not a number, voids all times",)
    (think,) = [
        part for part in scored(f"<think>{good * 2}</think><answer>a</answer>", rules="hardened").verdicts if part
    ]
    assert "thk_spatial: earns 1.000" in think[0].lines
    assert "thk_spatial: earns nothing, for it was said before or its true box has earned already" in think[1].lines


def test_spans_and_times_of_temporal_questions():
    record = {"task": tasks.TEMPORAL, "question": "When?", "answer": "[10, 20]"}
    row = scored("<think><t>12</t>s <t>25</t>s</think><answer>From <t>15</t>s to <t>25</t>s</answer>", record)
    lines = [line for part in row.verdicts for verdict in part for line in verdict.lines]
    assert lines == [
        "12 s is inside the true span, 10 to 20 s",
        "25 s is outside the true span, 10 to 20 s",
        "temporal IoU 0.333 with the true span, 10 to 20 s",
    ]
    assert row.spans_s == ((10.0, 20.0),) and row.terms["ans_acc"] is None


def test_boxes_of_pictures_are_held_against_the_resized_truth():
    """True box [0, 0, 100, 100] px of 200x100 is [0, 0, 28, 28] px of the 56x28 shown, the left half."""
    record = {
        "task": tasks.VISUAL,
        "answer": "<box>[0,0,100,100]</box>",
        "image_size": [200, 100],
        "image_size_refine": [56, 28],
    }
    row = scored("<think>a</think><answer><box>[0,0,14,28]</box></answer>", record)
    (verdict,) = [v for part in row.verdicts for v in part]
    assert verdict.lines == ("IoU 0.500 with the true box",)
    assert verdict.true_boxes[0].box_frac == pytest.approx((0.0, 0.0, 0.5, 1.0)) and row.shown_hw == (28, 56)


# ---- media ----


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return moving_square.write(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def decoder():
    with Decoder() as decoder:
        yield decoder


def test_the_embedded_clip_shows_cited_moments_exactly(clip, decoder):
    """10 frames a second; at 2.13 s frame 21 is shown, and the page's clip has a frame that begins just then."""
    made = embed.embed_clip(clip, decoder, [2.13, 99.0, -1.0], embed.Limits(fps=3.0))
    assert (made.kind, made.width, made.height, made.duration_s) == ("video", 140, 112, 4.0)
    content = base64.b64decode(made.uri.removeprefix("data:video/webm;base64,"))
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].codec_context.name in ("vp9", "libvpx-vp9")
        shown = {round(1000 * frame.time): frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}
    times_ms = [0, 333, 667, 1000, 1333, 1667, 2000, 2130, 2333, 2667, 3000, 3333, 3667, 4000]
    assert sorted(shown) == times_ms
    true = decoder.frames_at(clip, [2.1], VideoConfig(min_pixels=784, max_pixels=640 * 360))[0]
    assert np.abs(shown[2130].astype(int) - true).mean() < 6
    assert np.abs(shown[333].astype(int) - true).mean() > 6


@pytest.mark.parametrize(
    ("limits", "reason"),
    [(embed.Limits(max_frames=6), "4 s long"), (embed.Limits(max_bytes=6_000, fps=20.0), "more than 0.0")],
)
def test_what_does_not_fit_becomes_stills(monkeypatch, clip, decoder, limits, reason):
    monkeypatch.setitem(embed._CODEC_OPTIONS, "crf", "0")
    made = embed.embed_clip(clip, decoder, [1.234], limits)
    assert made.kind == "stills" and made.uri == "" and reason in made.note
    assert 1.234 in [still.time_s for still in made.stills]
    assert sum(len(still.uri) for still in made.stills) < limits.max_bytes * 4 / 3 + 1000


def test_media_that_are_missing_leave_a_gap_that_says_so(tmp_path):
    record = RECORD | {"completion": "<think></think>", "source": "STR_x", "video_path": "gone.mp4"}
    for root, said in ((tmp_path, "no such file"), (None, "--root ROOT")):
        (found,) = pages.record_answers([record], ["Line 1"], rules="paper", root=root)
        assert found.media is None and said in found.gap
    (found,) = pages.record_answers([RECORD | {"completion": ""}], ["Line 1"], rules="paper", root=tmp_path)
    assert "no source" in found.gap


def test_score_writes_the_page(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "MOST_ANSWERS", 2)
    text = "<think><obj>cat</obj><box>[0,0,20,5]</box>at<t>11</t>s</think><answer>a cat</answer>"
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(RECORD | {"completion": text}) + "\n" for _ in range(3)))
    out = tmp_path / "new" / "page.html"
    assert cli.main(["score", str(lines), "--html", str(out)]) == 0
    page = out.read_text()
    assert "3 answers in lines.jsonl" in page and "The first 2 are shown" in page
    assert len(re.findall(r'<section class="sample"', page)) == 2
    assert [file.name for file in out.parent.iterdir()] == ["page.html"]
    capsys.readouterr()
    assert cli.main(["score", str(lines), "--html", str(tmp_path)]) == 2
    assert "is a directory; expected the name of an HTML file" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    """As it is on a full disk: an error that names no file."""
    file = tmp_path / "page.html"
    pages.write(file, "old")

    def write_text(self, text, **_):
        self.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(file), "write_text", write_text)
    with pytest.raises(InputError, match=r"page\.html: cannot be written \(No space left on device\)"):
        pages.write(file, "new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("page.html", b"old")]
