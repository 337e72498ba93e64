"""`ask --html` and `ask --overlay`, with a model that answers what the test wants."""

import json
import re

import pytest

from openo3_jax import api, cli, policy
from report import moving_square

TEXT = "<think><obj>it</obj><box>[28,21,56,42]</box>at<t>1.5</t>s</think><answer>It.</answer>"
FRAMES = ["--video.max-frames", "4", "--video.min-pixels", "12544", "--video.max-pixels", "12544"]


class Answerer:
    def generate(self, conversations, **_):
        assert len(conversations) == 1
        return policy.Generations([[TEXT]], [[]], [[]], [[True]])


@pytest.fixture
def clip(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "load_pretrained", lambda *_, **__: Answerer())
    return moving_square.write(tmp_path / "clip.mp4")


def test_boxes_are_scaled_from_the_frames_that_were_shown(clip, tmp_path, capsys):
    """The clip has 140x112 px and is shown with 112x84: [28, 21, 56, 42] is a quarter to a half on both axes."""
    out, video = tmp_path / "page.html", tmp_path / "out.mp4"
    arguments = ["ask", "model", str(clip), "What <b>is</b> it?", *FRAMES, "--html", str(out), "--overlay", str(video)]
    assert cli.main(arguments) == 0
    assert capsys.readouterr() == (TEXT + "\n", "")
    page = out.read_text()
    (marks,) = re.findall(r'<script type="application/json" class="marks">(.*?)</script>', page, re.DOTALL)
    (mark,) = json.loads(marks)
    assert mark["boxes"] == [{"name": "1 it", "box": [0.25, 0.25, 0.5, 0.5]}] and mark["time_s"] == 1.5
    assert "112x84" in page and "What &lt;b&gt;is&lt;/b&gt; it?" in page and "nothing is scored" in page
    assert 'data-uri="data:video/webm;base64,' in page
    assert video.stat().st_size > 1000


@pytest.mark.parametrize(
    ("flag", "name", "said"),
    [("--overlay", "out.avi", "expected a name that ends in .mp4 or .gif"), ("--html", "", "is a directory")],
)
def test_a_name_that_cannot_be_written_is_said_before_the_model_is_read(
    clip, tmp_path, capsys, monkeypatch, flag, name, said
):
    monkeypatch.setattr(api, "load_pretrained", lambda *_, **__: pytest.fail("the model was read"))
    assert cli.main(["ask", "model", str(clip), "What?", flag, str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
