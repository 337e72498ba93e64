"""The evidence page in Chromium: it plays, a click seeks and draws, keyboard, phone and dark work, nothing leaks."""

import json

import numpy as np
import pytest

from openo3_jax import tags
from openo3_jax.data.video import Decoder
from openo3_jax.report import embed, evidence
from openo3_jax.report.verdicts import Scored, TrueBox, Verdict
from report import moving_square
from report.browser import Browser

SHOWN_HW = (84.0, 112.0)  # not the clip's shape: boxes must be scaled on each axis
EARLY, LATE = 5, 30  # frames; ten a second
CLICKED = '#sample-0 .part button[data-mark="1"]'


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two claims that are exact, a true box, a script in the text."""
    folder = tmp_path_factory.mktemp("page")
    path = moving_square.write(folder / "clip.mp4")
    height, width = SHOWN_HW
    scale = np.array([width, height, width, height])
    claims = [
        tags.render_claim(moving_square.NAME, (moving_square.box_frac(i) * scale).tolist(), i / 10)
        for i in (EARLY, LATE)
    ]
    nasty = "<script>window.taken = 1</script><img src='http://127.0.0.1:9/x' onerror='window.taken = 1'>"
    text = f"<think>{claims[0]} {nasty} {claims[1]} <t>1e9</t>s</think><answer>{nasty}</answer>"
    true = TrueBox(moving_square.NAME, tuple(moving_square.box_frac(LATE)), LATE / 10)
    think = (Verdict(("first",)), Verdict(("IoU 1.000",), (true,)))
    verdicts = ((), think, (), (), ())
    scored = Scored({"thk_spatial": 1.0}, 1.0, verdicts, ((0.5, 2.0),), (LATE / 10,), SHOWN_HW)
    with Decoder() as decoder:
        clip = embed.embed_clip(path, decoder, evidence.moments_s(text))
        stills = embed.embed_clip(path, decoder, evidence.moments_s(text), embed.Limits(max_frames=4))
    answers = [
        evidence.Answer(
            title="t", question="q", completion=text, shown_hw=SHOWN_HW, media=media, scored=scored, facts=[("a", "b")]
        )
        for media in (clip, stills)
    ]
    assert [answer.media.kind for answer in answers] == ["video", "stills"]
    file = folder / "page.html"
    file.write_text(evidence.render_page("t", answers))
    return file


def boxes(browser, sample):
    """What is drawn: kind, and place as fractions of the picture, as laid out by the browser."""
    return browser.run(
        """const stage = document.querySelector(arguments[0] + " .stage").getBoundingClientRect();
        return [...document.querySelectorAll(arguments[0] + " .box")].map((box) => {
          const at = box.getBoundingClientRect();
          return [box.className, (at.left - stage.left) / stage.width, (at.top - stage.top) / stage.height,
                  (at.right - stage.left) / stage.width, (at.bottom - stage.top) / stage.height];
        })""",
        sample,
    )


def is_ready(browser):
    browser.wait("return document.querySelector('video').readyState >= 2")


def test_a_click_seeks_and_draws(browser, page):
    browser.open(page)
    is_ready(browser)
    assert boxes(browser, "#sample-0") == []
    browser.click(CLICKED)
    browser.wait(f"const v = document.querySelector('video'); return !v.seeking && v.currentTime > {LATE / 10 - 0.01}")
    assert browser.run("return document.querySelector('video').currentTime") == pytest.approx(LATE / 10, abs=0.01)
    (true, *true_at), (said, *said_at) = boxes(browser, "#sample-0")
    assert (true, said) == ("box true", "box color-1")
    assert said_at == pytest.approx(moving_square.box_frac(LATE), abs=0.012)  # px of the frames shown are whole numbers
    assert true_at == pytest.approx(moving_square.box_frac(LATE), abs=0.005)
    assert (
        browser.run(
            "return document.querySelector('#sample-0 .box.true').style.borderStyle || "
            "getComputedStyle(document.querySelector('#sample-0 .box.true')).borderTopStyle"
        )
        == "dashed"
    )
    assert "IoU 1.000" in browser.run("return document.querySelector('#sample-0 .verdict').innerText")


def test_the_frame_under_the_box_is_the_cited_one(browser, page):
    """The picture that the browser decoded: the shape's colour in the middle of the box, the ground's where it was."""
    browser.open(page)
    is_ready(browser)
    browser.click(CLICKED)
    browser.wait(f"const v = document.querySelector('video'); return !v.seeking && v.currentTime > {LATE / 10 - 0.01}")

    def color(box):
        middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
        return browser.wait(
            """const video = document.querySelector("video"), canvas = document.createElement("canvas");
            canvas.width = video.videoWidth; canvas.height = video.videoHeight;
            const context = canvas.getContext("2d");
            context.drawImage(video, 0, 0);
            const [x, y] = arguments[0];
            return [...context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data].slice(0, 3);""",
            middle,
        )

    assert color(moving_square.box_frac(LATE)) == pytest.approx(moving_square.BLUE, abs=40)
    assert color(moving_square.box_frac(EARLY)) != pytest.approx(moving_square.BLUE, abs=40)


def test_it_plays_and_draws_on_the_way(browser, page):
    browser.open(page)
    is_ready(browser)
    browser.run("const v = document.querySelector('video'); v.currentTime = arguments[0]; v.play()", EARLY / 10 - 0.1)
    browser.wait("return document.querySelector('#sample-0 .box.color-0') !== null")
    browser.wait("return document.querySelector('video').currentTime > arguments[0] + 0.6", EARLY / 10)
    browser.wait("return document.querySelector('#sample-0 .box.color-0') === null")


def test_stills_follow_a_click_and_the_scrubber(browser, page):
    browser.open(page)
    browser.click('#sample-1 .part button[data-mark="1"]')
    shown = "return [...document.querySelectorAll('#sample-1 img.still')].filter((s) => !s.hidden)"
    assert browser.run(f"{shown}.map((s) => Number(s.dataset.time))") == [LATE / 10]
    assert boxes(browser, "#sample-1")[1][1:] == pytest.approx(moving_square.box_frac(LATE), abs=0.012)
    browser.run("const r = document.querySelector('#sample-1 input'); r.value = 0; r.dispatchEvent(new Event('input'))")
    assert browser.run(f"{shown}.map((s) => Number(s.dataset.time))") == [0] and boxes(browser, "#sample-1") == []


def test_the_keyboard_reaches_every_mention(browser, page):
    browser.open(page)
    is_ready(browser)
    for _ in range(30):
        browser.press("Tab")
        at = browser.run("const a = document.activeElement; return [a.dataset.mark, a.closest('.part') !== null]")
        if at == ["0", True]:
            break
    assert at == ["0", True]
    browser.press("Enter")
    browser.wait(f"return Math.abs(document.querySelector('video').currentTime - {EARLY / 10}) < 0.01")
    assert [name for name, *_ in boxes(browser, "#sample-0")] == ["box color-0"]
    assert browser.run("return document.activeElement.getAttribute('aria-pressed')") == "true"


def test_text_of_a_model_does_not_run_and_nothing_is_asked_of_the_network(browser, page):
    browser.open(page)
    is_ready(browser)
    assert browser.run("return window.taken === undefined")
    assert "<script>window.taken = 1</script>" in browser.run("return document.querySelector('.part.answer').innerText")
    loaded = browser.run("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in loaded if not name.startswith(("blob:", "data:"))] == []
    assert browser.errors() == []


def test_markup_that_slips_in_is_stopped_by_the_policy(browser, page, tmp_path):
    """Were the escaping broken: the script does not run, the picture is not asked for."""
    broken = tmp_path / "broken.html"
    nasty = "<script>window.taken = 1</script><img src='http://127.0.0.1:9/x' onerror='window.taken = 1'>"
    broken.write_text(page.read_text().replace("</h1>", f"</h1>{nasty}", 1))
    browser.open(broken)
    assert browser.run("return window.taken === undefined")
    assert len([line for line in browser.errors() if "Content Security Policy" in line]) >= 2


@pytest.mark.parametrize("dark", [False, True])
def test_phone_width_dark_and_light(browser, page, dark):
    """No sideways scrolling at 360 px; text on ground has a contrast of at least 4.5 (WCAG AA); the clip is in view."""
    browser.open(page, width=360, height=740, dark=dark)
    is_ready(browser)
    assert browser.run("return document.documentElement.scrollWidth") == 360
    colors = browser.run(
        """const seen = (element) => {
          for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (!color.endsWith(", 0)") && color !== "transparent") return color;
          }
          return "white";
        };
        return [...document.querySelectorAll(".part, .soft, .part button, .verdict, td")].map((e) =>
          [getComputedStyle(e).color, seen(e)].map((c) => c.match(/\\d+/g).slice(0, 3).map(Number)));"""
    )
    assert len(colors) > 10
    for ink, ground in json.loads(json.dumps(colors)):
        assert contrast(ink, ground) >= 4.5, (ink, ground)
    assert (sum(colors[0][1]) < 200) == dark
    browser.click(CLICKED)
    top = browser.run("return document.querySelector('#sample-0 .stage').getBoundingClientRect().top")
    assert -1 < top < 740


def contrast(ink, ground):
    def luminance(color):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(ink), luminance(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)
