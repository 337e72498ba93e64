"""V-STaR on rendered clips: a perfect oracle, a constant guesser, one item by hand, and everything that goes wrong."""

import json
import math

import fake_answerer
import numpy as np
import pytest

from openo3_jax.errors import InputError
from openo3_jax.evals import evaluate, items, judge, metrics, store, synthetic_vstar, vstar, wording
from openo3_jax.evals.config import EvalConfig

WORDS = wording.load_wording()
SOURCE_HW, SHOWN_HW = (112, 140), (224, 280)  # what the model sees is twice as large


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("vstar")
    synthetic_vstar.write_vstar(root, num_items=12, seed=3)
    return root


def evaluate_with(root, out, say, **options):
    return fake_answerer.evaluate_with("vstar", root, out, say, shown_hw=SHOWN_HW, **options)


def full(answer):
    return f"<think>I see it.</think><answer>{answer}</answer>"


def oracle(item, name):
    truth = item.truth
    if name == vstar.WHAT:
        return full(truth.answer)
    if name in (vstar.WHEN_1, vstar.WHEN_2):
        return full(f"From <t>{truth.span_s[0]}</t>s to <t>{truth.span_s[1]}</t>s")
    scale = np.array(SHOWN_HW * 2)[[1, 0, 3, 2]] / np.array(SOURCE_HW * 2)[[1, 0, 3, 2]]
    boxes = (truth.boxes.boxes_px * scale).tolist()
    return full(json.dumps({f"{t:g}": box for t, box in zip(truth.boxes.seconds, boxes, strict=True)}))


# ---- the synthetic world ----


def test_a_perfect_oracle_has_mam_100_and_the_capped_mlgm(world, tmp_path):
    text, results = evaluate_with(world, tmp_path / "out", oracle)
    values = {name: value["value"] for name, value in results["values"].items()}
    assert values["mam"] == pytest.approx(100, abs=1e-9)
    assert values["mlgm"] == pytest.approx(-100 * math.log(1e-6), rel=1e-9)
    for name in (*metrics.MEANS, *vstar.R1_COLUMNS, *vstar.AP_COLUMNS):
        assert values[name] == pytest.approx(100, abs=1e-9), name
    assert results["values"]["mam"]["n"] == 12
    assert set(results["joint_counts"].values()) == {12}
    assert "33.7" in text and "46.6" in text and "1381.6" in text and "exact words" in text
    assert sum(row["n"] for row in results["groups"]["domain"].values()) == 12
    assert list(results["groups"]["duration"]) == ["Short"]


def test_a_constant_guesser_scores_what_arithmetic_says(world, tmp_path):
    """Always what the first clip shows, from 1 to 3 s, the whole frame at every second."""
    height, width = SHOWN_HW
    rows = json.loads((world / "V_STaR_test.json").read_text())
    constant = rows[0]["answer"]

    def guess(item, name):
        if name == vstar.WHAT:
            return full(constant)
        if name in (vstar.WHEN_1, vstar.WHEN_2):
            return full("From 1.0 to 3.0")
        return full(json.dumps({str(t): [0, 0, width, height] for t in range(5)}))

    _, results = evaluate_with(world, tmp_path / "out", guess)
    values = {name: value["value"] for name, value in results["values"].items()}
    acc = np.mean([row["answer"] == constant for row in rows])
    spans = [row["timestamps"] for row in rows]
    overlaps = [max(0, min(3, end) - max(1, start)) / (max(3, end) - min(1, start)) for start, end in spans]
    areas = [[(b["xmax"] - b["xmin"]) * (b["ymax"] - b["ymin"]) for b in row["bboxes"]] for row in rows]
    shares = [np.mean(area) / (112 * 140) for area in areas]
    assert acc > 0 and values["acc"] == pytest.approx(100 * acc)
    assert values["tiou_1"] == values["tiou_2"] == pytest.approx(100 * np.mean(overlaps))
    assert values["viou_1"] == values["viou_2"] == pytest.approx(100 * np.mean(shares))
    assert values["mam"] == pytest.approx(100 * (acc + np.mean(overlaps) + np.mean(shares)) / 3)
    logs = -math.log(1 - acc) - math.log(1 - np.mean(overlaps)) - math.log(1 - np.mean(shares))
    assert values["mlgm"] == pytest.approx(100 * logs / 3)


def test_released_leaves_boxes_in_px_of_the_frames_shown(world, tmp_path):
    """Boxes twice as large lie elsewhere: an oracle's vIoU falls, everything else stays."""
    _, mapped = evaluate_with(world, tmp_path / "a", oracle)
    _, left = evaluate_with(world, tmp_path / "b", oracle, config=EvalConfig(boxes="released"))
    assert left["values"]["tiou_1"] == mapped["values"]["tiou_1"]
    assert left["values"]["viou_1"]["value"] < 50 < mapped["values"]["viou_1"]["value"]


def test_nothing_readable_scores_nothing(world, tmp_path):
    _, results = evaluate_with(world, tmp_path / "out", lambda item, name: "I cannot tell.")
    assert {value["value"] for value in results["values"].values()} == {0.0}
    assert results["values"]["mam"]["n"] == 12


def test_calls_that_cannot_be_asked_are_left_out_and_named(world, tmp_path):
    loaded = vstar.load(world, WORDS)
    bad = [fake_answerer.text_of(loaded.items[0].calls[name]) for name in (vstar.WHAT, vstar.WHEN_1)]
    text, results = evaluate_with(world, tmp_path / "out", oracle, unreadable=bad)
    assert results["values"]["acc"]["value"] == 100 and results["values"]["acc"]["n"] < 12
    assert results["values"]["tiou_2"]["n"] == 12
    assert "could not be asked" in text


def test_a_resumed_evaluation_gives_the_same_table(world, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate_with(world, tmp_path / "out", oracle, die_after=24)
    again, _ = evaluate_with(world, tmp_path / "out", oracle)
    whole, _ = evaluate_with(world, tmp_path / "whole", oracle)
    assert again == whole


def test_another_judge_needs_no_new_answers(world, tmp_path):
    evaluate_with(world, tmp_path / "out", oracle)
    before = (tmp_path / "out" / store.PREDICTIONS).read_bytes()
    text, _ = evaluate_with(world, tmp_path / "out", oracle, judged_by="rouge")
    assert (tmp_path / "out" / store.PREDICTIONS).read_bytes() == before
    assert "ROUGE, offline" in text


# ---- compare ----


def test_compare_is_paired_over_shared_items(world, tmp_path):
    def worse(item, name):
        return "?" if name == vstar.WHAT and item.id.endswith(("0", "1")) else oracle(item, name)

    evaluate_with(world, tmp_path / "a", worse)
    evaluate_with(world, tmp_path / "b", oracle, config=EvalConfig(limit=10))
    text = evaluate.compare(tmp_path / "a", tmp_path / "b")
    (acc,) = [line for line in text.splitlines() if line.strip().startswith("acc ")]
    assert acc.split()[1] == "+20.0" and acc.split()[-2:] == ["10", "no"]  # 0 and 1 of ten
    (tiou,) = [line for line in text.splitlines() if line.strip().startswith("tiou_1 ")]
    assert tiou.split()[1] == "+0.0"
    assert "2 items that only one run has" in text


def test_compare_needs_two_finished_runs(world, tmp_path):
    evaluate_with(world, tmp_path / "a", oracle)
    with pytest.raises(InputError, match="cannot be read"):
        evaluate.compare(tmp_path / "a", tmp_path / "nowhere")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / store.SETTINGS).write_text('{"benchmark": "videomme"}')
    with pytest.raises(InputError, match="expected one benchmark"):
        evaluate.compare(tmp_path / "a", tmp_path / "b")


# ---- one item, by hand ----

ROW = {
    "vid": "v",
    "domain": "sports",
    "fps": 10,
    "frame_count": 700,
    "width": 200,
    "height": 100,
    "question": "What?",
    "answer": "a dog",
    "temporal_question": "When?",
    "spatial_question": "Where?",
    "spatial_question_2": "Where in all?",
    "timestamps": [1.5, 4.2],
    "bboxes": [
        {"timestamp": 2, "xmin": 0, "ymin": 0, "xmax": 100, "ymax": 100},
        {"timestamp": 3, "xmin": 100, "ymin": 0, "xmax": 200, "ymax": 100},
    ],
    "number": 0,
}


def test_the_five_calls(tmp_path):
    item = vstar.make_item(ROW, tmp_path / "v.mp4", WORDS)
    assert tuple(item.calls) == vstar.CALLS
    texts = {name: fake_answerer.text_of(asked) for name, asked in item.calls.items()}
    assert "What?" in texts["what"]
    assert "70.0 seconds long" in texts["when_1"] and "When?" in texts["when_1"]
    assert "from 2 to 4" in texts["where_1"] and '{"2": [x1' in texts["where_1"]
    assert "2 in all" in texts["where_2"] and "Where in all?" in texts["where_2"] and " 4" not in texts["where_2"]
    assert "[0,0,100,100], [100,0,200,100]" in texts["when_2"] and "200 wide and 100 high" in texts["when_2"]
    assert item.groups == {"duration": "Medium", "domain": "sports"}


def test_one_item_by_hand(tmp_path):
    """Shown at half size. tIoU 1 of 3 s, the first box half found, the second not at all."""
    item = vstar.make_item(ROW, tmp_path / "v.mp4", WORDS)
    texts = {
        vstar.WHEN_1: full("1.2 to 2.5"),
        vstar.WHERE_1: full('{"2": [[0, 0, 25, 50], [0, 0, 50, 25]]}'),
        vstar.WHERE_2: full('{"3": [50, 0, 100, 50], "9": [0, 0, 1, 1]}'),
        vstar.WHEN_2: "nothing",
    }
    said = {
        ("v#0", name): items.Prediction("v#0", name, "", 0, "", texts=(text,), shown_hw=(50, 100))
        for name, text in texts.items()
    }
    found = vstar.score([item], said, {"v#0": judge.Verdict(2)})
    values = {name: float(column[0]) for name, column in found.columns.items()}
    assert values["acc"] == 1
    assert values["tiou_1"] == pytest.approx(1 / 3) and values["r1@0.3_1"] == 1 and values["r1@0.5_1"] == 0
    assert values["tiou_2"] == 0
    assert values["viou_1"] == pytest.approx(0.25) and values["ap@0.5_1"] == 0.5 and values["ap@0.7_1"] == 0
    assert values["viou_2"] == pytest.approx(0.5)


@pytest.mark.parametrize(("verdict", "acc"), [(1, 0.0), (2, 1.0), (3, 1.0), (None, 0.0)])
def test_right_from_two_on(verdict, acc):
    assert judge.correctness(judge.Verdict(verdict)) == acc


def test_an_answer_without_a_verdict_is_left_out(tmp_path):
    item = vstar.make_item(ROW, tmp_path / "v.mp4", WORDS)
    found = vstar.score([item], {}, {"v#0": judge.Verdict(None, error="no server")})
    assert math.isnan(found.columns["acc"][0])


SPANS = {(1.5, 4.2): (2, 4), (1.0, 1.0): (1, 1), (1.2, 1.6): (1, 1), (1.6, 1.9): (2, 2), (0.0, 10.0): (0, 10)}


@pytest.mark.parametrize("span", SPANS)
def test_whole_seconds(span):
    """A span within one second made the reference raise."""
    assert vstar.whole_seconds(span) == SPANS[span]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"question": None}, "question=None"),
        ({"timestamps": [1]}, "timestamps=[1]"),
        ({"timestamps": "soon"}, "timestamps='soon'"),
        ({"bboxes": [[0, 0, 1, 1]]}, "bboxes: expected objects"),
        ({"bboxes": [{"timestamp": 1}]}, "xmin=None"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"width": True}, "width=True"),
    ],
)
def test_a_malformed_annotation_is_named(tmp_path, change, part):
    with pytest.raises(InputError, match=part.replace("[", r"\[")):
        vstar.make_item(ROW | change, tmp_path / "v.mp4", WORDS)


def test_a_bad_row_is_passed_and_named(world, tmp_path):
    rows = json.loads((world / "V_STaR_test.json").read_text())
    rows[1] |= {"vid": "gone"}
    rows[2] |= {"vid": "../0"}
    (tmp_path / "V_STaR_test.json").write_text(json.dumps(rows))
    (tmp_path / "videos").symlink_to(world / "videos")
    with pytest.raises(InputError, match="no usable item"):  # clips behind a link lie outside of the root
        vstar.load(tmp_path, WORDS)
    (tmp_path / "videos").unlink()
    (tmp_path / "videos").mkdir()
    for clip in (world / "videos").iterdir():
        (tmp_path / "videos" / clip.name).write_bytes(clip.read_bytes())
    loaded = vstar.load(tmp_path, WORDS)
    assert len(loaded.items) == 10
    assert "V_STaR_test.json:2: video 'gone': no such file" in loaded.rejected[0]
    assert "without '..'" in loaded.rejected[1]
