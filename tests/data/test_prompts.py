import json

import pytest

from openo3_jax import tasks
from openo3_jax.data import prompts
from openo3_jax.errors import InputError

BOX, TIME, SPAN = "<box>[x1,y1,x2,y2]</box>", "<t>seconds</t>s", "From <t>start</t>s to <t>end</t>s"
MUST_ASK = {
    tasks.TEMPORAL_SPATIAL: ["<obj>name</obj>" + BOX + "at" + TIME],
    tasks.VISUAL: ["<obj>name</obj>" + BOX],
    tasks.TEMPORAL: [SPAN, TIME],
    tasks.TEMPORAL_MCQ: [SPAN, TIME, "Correct Option:"],
    tasks.GENERAL_MCQ: ["letter"],
    tasks.GENERAL_FREE_FORM: [],
}


@pytest.mark.parametrize("stage, task", [(s, t) for s, names in tasks.STAGE_TASKS.items() for t in names])
def test_our_wording_asks_for_what_the_rewards_read(stage, task):
    prompt = prompts.load_prompts().of(stage, task)
    for words in [*MUST_ASK[task], "<think>", "</think>", "<answer>", "</answer>"]:
        assert words in prompt.system
    assert prompt.ask("a {question} b") == "a {question} b"


def test_the_option_comes_last():
    # The letter is what follows `Correct Option:`, to the end of the answer.
    system = prompts.load_prompts().of("rl", tasks.TEMPORAL_MCQ).system
    assert system.index(SPAN) < system.index("Correct Option:")


def test_other_wordings_replace_ours_task_by_task(tmp_path):
    given = {"sft": {"temporal QA": {"system": "Find it.", "question": "Question: {question}\nThink."}}}
    path = tmp_path / "p.json"
    path.write_text(json.dumps(given))
    loaded = prompts.load_prompts(path)
    assert loaded.of("sft", "temporal QA").ask("When {x}?") == "Question: When {x}?\nThink."
    assert loaded.of("sft", "temporal QA").system == "Find it."
    assert loaded.of("rl", "temporal QA") == prompts.load_prompts().of("rl", "temporal QA")


GOOD = {"system": "", "question": "{question}"}
BAD = {
    "[]": "stage: got 'list'",
    '{"eval": {}}': "stage: got 'eval'; expected one of sft, rl",
    '{"sft": {"temporal QA (MCQ)": {}}}': r"sft: task: got 'temporal QA \(MCQ\)'",
    json.dumps({"rl": {"visual QA": {"system": ""}}}): "expected the texts system and question",
    json.dumps({"rl": {"visual QA": GOOD | {"x": ""}}}): "expected the texts system and question",
    json.dumps({"rl": {"visual QA": GOOD | {"system": 1}}}): "expected the texts system and question",
    json.dumps({"rl": {"visual QA": GOOD | {"question": "Q"}}}): "0 times",
    json.dumps({"rl": {"visual QA": GOOD | {"question": "{question}{question}"}}}): "2 times",
    "{": "is not JSON",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_bad_files_say_where(content, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(InputError, match=BAD[content]) as caught:
        prompts.load_prompts(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        prompts.load_prompts(tmp_path / "p.json")


def test_lines():
    assert prompts.render_frame(3, 9.25) == "Frame 3 at 9.2s: "
    assert prompts.render_frame(1, 0.0) == "Frame 1 at 0.0s: "
    assert prompts.render_total(18.9) == "The video is in total 18 seconds.\n"
