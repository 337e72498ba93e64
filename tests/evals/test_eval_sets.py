"""The other benchmarks in their own file formats, on rendered clips: oracles, constant guessers, malformed rows."""

import dataclasses
import io
import json

import fake_answerer
import fake_server
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fake_answerer import full
from PIL import Image

from openo3_jax.data import synthetic
from openo3_jax.errors import InputError
from openo3_jax.evals import benchmarks, choice, endpoint, evaluate, files, grounding, judge, own, wording
from openo3_jax.evals.config import EvalConfig

WORDS = wording.load_wording()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    synthetic.render_clip(path, seed=0, num_frames=8)
    return path.read_bytes()


def put(root, clip, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(clip)


def write_parquet(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def videomme(root, clip):
    rows = [
        {
            "video_id": "001",
            "duration": duration,
            "domain": "Sports",
            "sub_category": "Golf",
            "videoID": f"v{i}",
            "question_id": f"001-{i}",
            "task_type": "Counting",
            "question": f"How many? {i}",
            "options": ["A. One", "B. Two", "C. Three", "D. Four"],
            "answer": "ABCD"[i],
        }
        for i, duration in enumerate(["short", "medium", "long", "long"])
    ]
    write_parquet(root / "videomme" / "test-00000-of-00001.parquet", rows)
    put(root, clip, "data/v0.mp4", "data/v1.MP4", "data/v2.mkv", "data/v3.mp4")


def worldsense(root, clip):
    lines = ["index\tvideo\tquestion\tcandidates\tanswer\tdomain\ttask_domain\taudio_class"]
    for i in range(4):
        listed = "['red', \"it's blue\", 'green', 'black']"
        domain = ["Recognition", "Reasoning"][i % 2]
        lines.append(f"{i}\tv{i}\tWhich?\t{listed}\t{'ABCD'[i]}\tSports\t{domain}\t['Speech', 'Music']")
    root.mkdir(exist_ok=True)
    (root / "WorldSense.tsv").write_text("\n".join(lines) + "\n")
    put(root, clip, *(f"videos/v{i}.mp4" for i in range(4)))


def videommmu(root, clip):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    base = {"question": "Which?", "question_type": "multiple-choice", "options": ["x", "y", "z"] * 3}
    write_parquet(root / "Perception" / "test-0.parquet", [{**base, "id": "dev_Art_1", "answer": "A"}])
    write_parquet(root / "Comprehension" / "test-0.parquet", [{**base, "id": "dev_Math_2", "answer": "I"}])
    adaptation = {
        "question": "How much?",
        "question_type": "open",
        "options": [],
        "image": {"bytes": buffer.getvalue()},
    }
    write_parquet(root / "Adaptation" / "test-0.parquet", [{**adaptation, "id": "dev_Math_2", "answer": "12.50"}])
    put(root, clip, "Art/dev_Art_1.mp4", "Science/dev_Math_2.mp4")


def longvideo_reason(root, clip):
    rows = [
        {
            "problem_id": i,
            "problem": "Why?\nA. Rain.\nB. Snow.\nC. Wind.\nD. Sun.",
            "problem_type": kind,
            "videos": f"longvila_videos/v{i}.mp4",
            "answer": f"<answer>{'BADC'[i]}</answer>",
            "reasoning": "",
        }
        for i, kind in enumerate(["temporal", "goal", "spatial", "plot"])
    ]
    root.mkdir(exist_ok=True)
    (root / "LongVideoReason_test.json").write_text(json.dumps(rows))
    put(root, clip, "longvila_videos/v0.mp4", *(f"longvideo_eval_subset{i}/v{i}.mp4" for i in (1, 2, 3)))


def tvgbench(root, clip):
    rows = [
        {
            "path": f"./dataset/DATASET/Charades/Charades_v1/V{i}.mp4",
            "question": "a person sits.",
            "answer": f"{i}.0-{2 * i + 1}.5",
            "start": None,
            "end": None,
            "dataset_name": "charades",
            "qsemtype": "Human Pose",
        }
        for i in range(4)
    ]
    root.mkdir(exist_ok=True)
    (root / "tvgbench.json").write_text(json.dumps(rows))
    put(root, clip, "videos/V0.mp4", "Charades_v1/V1.mp4", "V2.mp4", "Charades/Charades_v1/V3.mp4")


WRITERS = {f.__name__: f for f in (videomme, worldsense, videommmu, longvideo_reason, tvgbench)}


@pytest.fixture
def root(request, tmp_path, clip):
    WRITERS[request.param](tmp_path / "data", clip)
    return tmp_path / "data"


def oracle(item, name):
    truth = item.truth
    return full(f"{truth.start_s} to {truth.end_s}" if name == grounding.CALL else truth.answer)


@pytest.mark.parametrize(("root", "name"), [(name, name) for name in WRITERS], indirect=["root"])
def test_an_oracle_is_right_and_silence_is_wrong(root, name, tmp_path):
    headline = benchmarks.of(name).measures[0].name
    text, results = fake_answerer.evaluate_with(name, root, tmp_path / "a", oracle)
    assert results["values"][headline]["value"] == 100
    assert results["rejected"] == []
    published = benchmarks.of(name).published(headline)
    assert f"{published['Open-o3 Video 7B']:.1f}" in text and f"{published['Qwen2.5-VL-7B']:.1f}" in text
    _, results = fake_answerer.evaluate_with(name, root, tmp_path / "b", lambda item, call: full("I cannot say"))
    assert results["values"][headline]["value"] == 0


@pytest.mark.parametrize(("root", "expected"), [("videomme", 25.0), ("longvideo_reason", 25.0)], indirect=["root"])
def test_always_a_is_right_once_in_four(root, expected, tmp_path, request):
    name = "videomme" if (root / "videomme").exists() else "longvideo_reason"
    _, results = fake_answerer.evaluate_with(name, root, tmp_path / "a", lambda item, call: full("A"))
    assert results["values"]["accuracy"]["value"] == expected
    assert results["values"]["no_option"]["value"] == 0


@pytest.mark.parametrize("root", ["videomme"], indirect=True)
def test_videomme_by_duration(root, tmp_path):
    text, results = fake_answerer.evaluate_with("videomme", root, tmp_path / "a", lambda item, call: full("C"))
    assert results["groups"]["duration"] == {
        "long": {"n": 2, "accuracy": 50.0},
        "medium": {"n": 1, "accuracy": 0.0},
        "short": {"n": 1, "accuracy": 0.0},
    }
    assert "54.9" in text  # the paper's row for long clips
    item = choice.load_videomme(root, WORDS).items[1]
    assert fake_answerer.text_of(item.calls["answer"]).endswith("A. One\nB. Two\nC. Three\nD. Four")
    assert item.calls["answer"][-1]["content"][0]["video"] == root / "data" / "v1.MP4"


@pytest.mark.parametrize("root", ["worldsense"], indirect=True)
def test_worldsense_reads_python_lists(root, tmp_path):
    _, results = fake_answerer.evaluate_with("worldsense", root, tmp_path / "a", lambda item, call: full("It's blue"))
    assert results["values"]["accuracy"]["value"] == 25
    assert results["groups"]["task_domain"]["Reasoning"] == {"n": 2, "accuracy": 50.0}
    assert list(results["groups"]["audio_class"]) == ["Speech + Music"]


@pytest.mark.parametrize("root", ["videommmu"], indirect=True)
def test_videommmu_shows_pictures_and_reads_only_the_answer(root, tmp_path):
    loaded = choice.load_videommmu(root, WORDS)
    assert [item.id for item in loaded.items] == [
        "Perception/dev_Art_1",
        "Comprehension/dev_Math_2",
        "Adaptation/dev_Math_2",
    ]
    shown = loaded.items[2].calls["answer"][-1]["content"]
    assert [part["type"] for part in shown] == ["video", "image", "text"]
    assert shown[1]["image"].size == (40, 30)
    reasoned = "<think>12.5</think><answer>13</answer>"
    _, results = fake_answerer.evaluate_with("videommmu", root, tmp_path / "a", lambda item, call: reasoned)
    assert results["values"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3}
    assert set(results["groups"]["category"]) == {"Perception", "Comprehension", "Adaptation"}
    assert results["values"]["no_option"]["n"] == 2  # the open question has none


@pytest.mark.parametrize("root", ["tvgbench"], indirect=True)
def test_tvgbench_by_hand(root, tmp_path):
    """Truths [0, 1.5], [1, 3.5], [2, 5.5], [3, 7.5] against [0, 3]: 1.5/3, 2/3.5, 1/5.5, 0."""
    _, results = fake_answerer.evaluate_with("tvgbench", root, tmp_path / "a", lambda item, call: full("0 to 3"))
    expected = np.array([1.5 / 3, 2 / 3.5, 1 / 5.5, 0])
    assert results["values"]["miou"]["value"] == pytest.approx(100 * expected.mean())
    assert results["values"]["r1@0.5"]["value"] == 50
    assert results["values"]["no_span"]["value"] == 0


def test_tvgbench_names_what_it_cannot_read(tmp_path, clip):
    tvgbench(tmp_path, clip)
    rows = json.loads((tmp_path / "tvgbench.json").read_text())
    rows[0] |= {"start": 9.0, "end": 3.0}
    rows[1] |= {"answer": "soon"}
    rows[2] |= {"path": "gone.mp4"}
    (tmp_path / "tvgbench.json").write_text(json.dumps(rows))
    loaded = grounding.load_tvgbench(tmp_path, WORDS)
    assert [item.id for item in loaded.items] == ["3"]
    assert [part in line for part, line in zip(["start=9, end=3", "'soon'", "gone.mp4"], loaded.rejected, strict=True)]
    assert all(f"tvgbench.json:{i}" in line for i, line in enumerate(loaded.rejected, 1))


@pytest.mark.parametrize("root", ["tvgbench"], indirect=True)
def test_tvgbench_shows_the_part_that_an_item_names(root):
    """As its first-person clips do; these name their source in `bins` only."""
    rows = json.loads((root / "tvgbench.json").read_text())
    rows[1] |= {"start": 9.38, "end": 170.51, "bins": {"dataset": "egonlq"}}
    del rows[1]["dataset_name"]
    (root / "tvgbench.json").write_text(json.dumps(rows))
    whole, part, *_ = grounding.load_tvgbench(root, WORDS).items
    shown = [item.calls[grounding.CALL][-1]["content"][0] for item in (whole, part)]
    assert shown[0].keys() == {"type", "video"} and shown[1]["part_s"] == [9.38, 170.51]
    assert (whole.groups["dataset_name"], part.groups["dataset_name"]) == ("charades", "egonlq")


@pytest.mark.parametrize("root", ["tvgbench"], indirect=True)
def test_tvgbench_as_time_r1_lays_it_out(root):
    (root / "annotations").mkdir()
    (root / "tvgbench.json").rename(root / "annotations" / "tvgbench.json")
    (root / "annotations" / "train_2k5.json").write_text("[]")
    loaded = grounding.load_tvgbench(root, WORDS)
    assert len(loaded.items) == 4 and loaded.rejected == []


# ---- options ----

OPTIONS = {
    ("A. x", "B. y"): {"A": "x", "B": "y"},
    ("x", "y"): {"A": "x", "B": "y"},
    ("(A) x", "(B) y"): {"A": "x", "B": "y"},
    ("A. x", "C. y"): {"A": "A. x", "B": "C. y"},  # no letters of their own
    (1, 2.5): {"A": "1", "B": "2.5"},
}


@pytest.mark.parametrize("listed", OPTIONS)
def test_options_of(listed):
    assert choice.options_of(listed) == OPTIONS[listed]


@pytest.mark.parametrize("answer", ["B", "b", "B. y", "y", "<answer>B</answer>", "(B) y"])
def test_answer_letter(answer):
    assert choice.answer_letter(answer, {"A": "x", "B": "y"}) == "B"


@pytest.mark.parametrize("answer", ["C", "z", "", "AB"])
def test_an_answer_that_is_no_option(answer):
    with pytest.raises(InputError, match="expected one of A, B"):
        choice.answer_letter(answer, {"A": "x", "B": "y"})


LISTS = {"['a', 'b']": ["a", "b"], '["a"]': ["a"], "('a',)": ["a"]}


@pytest.mark.parametrize("text", LISTS)
def test_list_of(text):
    assert files.list_of({"x": text}, "x") == LISTS[text]


@pytest.mark.parametrize("text", ["a, b", "__import__('os').getcwd()", "[" * 10_000, "{}", None, 3, "1" * 5000])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(InputError, match="expected a list"):
        files.list_of({"x": text}, "x")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"nonsense" * 100])
def test_damaged_parquet_is_named(tmp_path, content):
    (tmp_path / "test-0.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"test-0.parquet: cannot be read as parquet"):
        files.read_rows(tmp_path, "test-*.parquet")


@pytest.mark.parametrize("name", ["own.jsonl", "WorldSense.tsv"])
def test_text_that_is_not_utf_8_is_named(tmp_path, name):
    (tmp_path / name).write_bytes('{"id": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=rf"{name}.*can't decode byte"):
        files.read_file(tmp_path / name)


def test_a_line_of_json_ends_at_a_newline_only(tmp_path):
    """U+2028 and U+0085 may stand in a JSON text as they are."""
    (tmp_path / "[1].jsonl").write_text('\ufeff{"id": "a\u2028b\u0085c"}\r\n\n{"id": "2"}', encoding="utf-8")
    rows = [row for _, row in files.read_file(tmp_path / "[1].jsonl")]
    assert rows == [{"id": "a\u2028b\u0085c"}, {"id": "2"}]


# ---- a set of one's own ----


def own_lines(root, clip):
    put(root, clip, "clips/7.mp4")
    base = {"video": "clips/7.mp4", "question": "What falls?"}
    return [
        {**base, "id": "open", "answer": "A cup", "groups": {"room": "kitchen"}},
        {**base, "id": "choice", "answer": "B", "options": ["a plate", "a cup"]},
        {**base, "id": "span", "span": [1, 3], "when": "When does it fall?"},
        {**base, "id": "boxes", "boxes": {"2": [[10, 20, 60, 80]]}, "size": [140, 112], "where": "Where is it?"},
        {**base, "id": "all", "answer": "A cup", "span": [0, 2], "boxes": {"1": [[0, 0, 70, 112]]}, "size": [140, 112]},
    ]


def own_answers(item, name):
    if name == own.WHERE:
        return full('{"2": [10, 20, 60, 80], "1": [0, 0, 140, 112]}')
    return full("0 to 3" if name == own.WHEN else "a cup")


def test_a_set_of_ones_own(tmp_path, clip):
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in own_lines(tmp_path, clip)) + "\n")
    text, results = fake_answerer.evaluate_with("jsonl", file, tmp_path / "out", own_answers, shown_hw=(112, 140))
    values = {name: (value["value"], value["n"]) for name, value in results["values"].items()}
    assert values["accuracy"] == (100.0, 3)
    assert values["miou"] == pytest.approx((100 * (2 / 3 + 2 / 3) / 2, 2))
    assert values["viou"] == pytest.approx((75.0, 2))
    assert results["groups"] == {"room": {"kitchen": {"n": 1, "accuracy": 100.0, "miou": None, "viou": None}}}
    assert "exact words" in text


def test_answers_without_a_score_are_told_and_those_without_a_verdict_asked_again(tmp_path, clip, monkeypatch):
    """Two open answers of five items; the third accuracy is that of options and needs no judge."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in own_lines(tmp_path, clip)))

    def judged(out, reply):
        with fake_server.serve(reply) as fake:
            server = judge.EndpointJudge(endpoint.Endpoint(url=fake.url, model="judge-7", attempts=1))
            text, results = fake_answerer.evaluate_with("jsonl", file, tmp_path / out, own_answers, judged_by=server)
        return text, (results["values"]["accuracy"]["value"], results["values"]["accuracy"]["n"])

    text, accuracy = judged("a", 503)
    assert "2 answers have no verdict yet and are left out" in text and "status 503" in text and accuracy == (100.0, 1)
    text, accuracy = judged("a", "3")
    assert "no verdict yet" not in text and "judge-7 (prompt" in text and accuracy == (100.0, 3)
    text, accuracy = judged("b", "I cannot say")
    assert "2 verdicts hold no score" in text and accuracy == (pytest.approx(100 / 3), 3)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"span": [1]}, "expected [start, end]"),
        ({"span": [3, 1]}, "the end not before the start"),
        ({"boxes": {"2": [[1, 2, 3]]}, "size": [1, 1]}, "boxes: expected"),
        ({"boxes": {"2": [[50, 20, 30, 80]]}, "size": [90, 90]}, "with x1 < x2"),  # as x, y, width, height
        ({"boxes": {"2": [[1, 2, 3, 4]]}}, "size=None"),
        ({"options": ["x"], "answer": "C"}, "expected one of A"),
        ({}, "neither answer, span nor boxes"),
        ({"answer": "x", "groups": {"a": 1}}, "groups="),
        ({"answer": "x", "question": ""}, "question=''"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, clip, change, part):
    put(tmp_path, clip, "7.mp4")
    line = {"id": "1", "video": "7.mp4", "question": "?"} | change
    (tmp_path / "own.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError) as raised:
        own.load(tmp_path / "own.jsonl", WORDS)
    assert "own.jsonl:1" in str(raised.value) and part in str(raised.value)


# ---- frames ----


@pytest.mark.parametrize("name", ["videomme", "worldsense", "videommmu", "longvideo_reason"])
def test_the_published_budget(name):
    """64 frames of at most 262,144 px as native video, 8,192 tokens, greedy."""
    benchmark = benchmarks.of(name)
    assert (benchmark.video.max_frames, benchmark.video.max_pixels) == (64, 262_144)
    assert (benchmark.video_mode, benchmark.max_new_tokens) == ("native", 8192)
    assert EvalConfig().temperature == 0


def test_the_frames_of_vstar_and_tvgbench():
    """V-STaR: one a second up to 16, at their true times; TVGBench: 64. Both with their times in text."""
    vstar, tvgbench = (benchmarks.of(name) for name in ("vstar", "tvgbench"))
    assert (vstar.video.fps, vstar.video.max_frames, vstar.video.frame_times) == (1.0, 16, "true")
    assert (tvgbench.video.max_frames, tvgbench.video.max_pixels) == (64, 262_144)
    assert {(one.video_mode, one.max_new_tokens) for one in (vstar, tvgbench)} == {("frames", 2048)}


LIMITS = {  # flags -> what changes of VideoMME's 4 to 64 frames of 100,352 to 262,144 px
    (): {},
    (("max_frames", 32),): {"max_frames": 32},
    (("max_frames", 2),): {"max_frames": 2, "min_frames": 2},
    (("max_pixels", 200_000),): {"max_pixels": 200_000},
    (("max_pixels", 50_176),): {"max_pixels": 50_176, "min_pixels": 50_176},
    (("max_pixels", 50_176), ("min_pixels", 3136)): {"max_pixels": 50_176, "min_pixels": 3136},
}


@pytest.mark.parametrize("flags", LIMITS)
def test_flags_replace_the_budget(flags):
    """Fewer pixels than the benchmark's least used to change nothing: the reference lets the lower limit win."""
    benchmark = benchmarks.of("videomme")
    expected = dataclasses.replace(benchmark.video, **LIMITS[flags])
    assert evaluate.video_of(EvalConfig(**dict(flags)), benchmark) == expected


@pytest.mark.parametrize(
    ("given", "expected"), [({}, (8192, 1.05)), ({"max_new_tokens": 5, "repetition_penalty": 1.0}, (5, 1.0))]
)
def test_flags_replace_the_sampling(given, expected):
    sampling = evaluate.sampling_of(EvalConfig(**given), benchmarks.of("videomme"))
    assert (sampling.max_new_tokens, sampling.repetition_penalty) == expected
