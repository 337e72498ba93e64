"""Questions with options, and open ones with a short true answer: items and their accuracy."""

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openo3_jax.errors import InputError
from openo3_jax.evals import answers, files, items, metrics, scores, voting, wording

CALL = "answer"
MEASURES = (scores.mean_of("accuracy"), scores.mean_of("no_option"))
_PREFIX = re.compile(r"\s{0,8}\(?([A-Z])[.):]\s{0,8}(.*)", re.DOTALL)
_OPTION_LINE = re.compile(r"^\s{0,8}\(?([A-J])[.)]\s(.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Truth:
    """`options`: letter -> words, empty for an open question. `answer`: the letter, or the open answer."""

    question: str
    options: Mapping[str, str]
    answer: str


def options_of(listed: Sequence[Any]) -> dict[str, str]:
    """Options in order -> letter -> words; letters that already stand before them are taken off.

    Example: `options_of(["A. red", "B. blue"])` and `options_of(["red", "blue"])` are {"A": "red", "B": "blue"}.
    Raises: InputError for none, or more than 26.
    """
    if not 1 <= len(listed) <= 26 or not all(isinstance(option, str | int | float) for option in listed):
        raise InputError(f"options={listed!r:.80}; expected 1 to 26 texts")
    texts = [str(option) for option in listed]
    letters = string.ascii_uppercase[: len(texts)]
    found = [_PREFIX.fullmatch(text) for text in texts]
    if all(match is not None and match[1] == letter for match, letter in zip(found, letters, strict=True)):
        texts = [match[2] for match in found]
    return {letter: text.strip() for letter, text in zip(letters, texts, strict=True)}


def options_in_text(text: str) -> dict[str, str]:
    """The options that stand in a question as lines `A. words`; empty without any."""
    return dict(_OPTION_LINE.findall(text))


def answer_letter(answer: str, options: Mapping[str, str]) -> str:
    """The letter that the annotation's answer means: a letter, one with words, or the words of one option.

    Raises: InputError where it is none of the options.
    """
    text = answer.removeprefix("<answer>").removesuffix("</answer>").strip()
    prefixed = _PREFIX.fullmatch(text)
    for letter, words in options.items():
        if text.upper() == letter or text == words or (prefixed is not None and prefixed[1] == letter):
            return letter
    raise InputError(f"answer={answer!r:.80}; expected one of {', '.join(options)}")


def make_item(
    key: str,
    clip: Path | None,
    truth: Truth,
    words: wording.Wording,
    *,
    groups: Mapping[str, str],
    images: tuple[Any, ...] = (),
) -> items.Item:
    """One call: clip, pictures, question, and the options where they do not stand in the question already."""
    if not truth.options:
        asked = words["open"].ask(video=clip, images=images, question=truth.question)
    elif options_in_text(truth.question) == dict(truth.options):
        asked = words["choice_in_text"].ask(video=clip, images=images, question=truth.question)
    else:
        listed = "\n".join(f"{letter}. {option}" for letter, option in truth.options.items())
        asked = words["choice"].ask(video=clip, images=images, question=truth.question, options=listed)
    return items.Item(key, {CALL: asked}, truth, groups)


def score(
    asked: Sequence[items.Item],
    said: Mapping[items.Key, items.Prediction],
    weights: Mapping[str, Sequence[float]] | None = None,
) -> scores.Scores:
    """Accuracy, and the share of answers that state no option; a call that could not be asked is left out (`nan`).

    Of several samples the votes decide, each with its weight in `weights` (item -> one per sample), 1 without it.
    """
    rows = [_score_one(item, said.get((item.id, CALL)), (weights or {}).get(item.id)) for item in asked]
    values = np.array(rows, np.float64).reshape(len(rows), 3)
    columns = {"accuracy": values[:, 0], "no_option": values[:, 1], "ties": values[:, 2]}
    texts = [prediction.text for prediction in said.values() if prediction.error is None]
    notes = [f"answers in the taught form: {100 * metrics.format_rate(texts):.1f} %"]
    num_ties = int(np.nansum(columns["ties"]))
    if num_ties:
        notes.append(f"{num_ties} votes were tied; each counts its share of the tied options")
    return scores.Scores(tuple(item.id for item in asked), columns, tuple(item.groups for item in asked), tuple(notes))


def _score_one(
    item: items.Item, prediction: items.Prediction | None, weights: Sequence[float] | None
) -> tuple[float, float, float]:
    """Accuracy, states no option, is tied."""
    truth: Truth = item.truth
    if prediction is None or prediction.error is not None:
        return np.nan, np.nan, np.nan
    if not truth.options:
        return float(answers.matches_open(prediction.text, truth.answer)), np.nan, 0.0
    letters = [answers.parse_letter(text, truth.options) for text in prediction.texts]
    vote = voting.count(letters, weights)
    return vote.share_of(truth.answer), float(not vote.winners), float(len(vote.winners) > 1)


# ---- the four sets ----


def load_videomme(root: Path, words: wording.Wording) -> files.Loaded:
    """`videomme/test-*.parquet`, clips in `data/`, no subtitles. Source: Open-o3-Video eval/test/test_videomme.py."""

    def make(row: files.Row) -> items.Item:
        options = options_of(files.list_of(row, "options"))
        truth = Truth(files.text_of(row, "question"), options, answer_letter(files.text_of(row, "answer"), options))
        clip = files.find_clip(root, files.text_of(row, "videoID"))
        groups = files.groups_of(row, "duration", "domain", "sub_category", "task_type")
        return make_item(files.text_of(row, "question_id"), clip, truth, words, groups=groups)

    return files.load_items(files.read_rows(root, "videomme/test-*.parquet", "test-*.parquet"), make)


def load_worldsense(root: Path, words: wording.Wording) -> files.Loaded:
    """`WorldSense.tsv`, clips in `videos/`, without sound. Source: Open-o3-Video eval/test/test_worldsense.py."""

    def make(row: files.Row) -> items.Item:
        options = options_of(files.list_of(row, "candidates"))
        truth = Truth(files.text_of(row, "question"), options, answer_letter(files.text_of(row, "answer"), options))
        clip = files.find_clip(root, files.text_of(row, "video"))
        groups = files.groups_of(row, "domain", "sub_category", "task_domain", "task_type", "duration")
        audio = files.list_of(row, "audio_class") if row.get("audio_class") else []
        groups |= {"audio_class": " + ".join(map(str, audio))} if audio else {}
        return make_item(files.text_of(row, "index"), clip, truth, words, groups=groups)

    return files.load_items(files.read_rows(root, "WorldSense.tsv", "*.tsv"), make)


MMMU_CATEGORIES = ("Perception", "Comprehension", "Adaptation")
MMMU_DISCIPLINES = ("Art", "Business", "Engineering", "Humanities", "Medicine", "Science")


def load_videommmu(root: Path, words: wording.Wording) -> files.Loaded:
    """A parquet for each of Perception, Comprehension and Adaptation, clips by discipline.

    Adaptation shows a picture after the clip. Questions without options are open.
    Source: Open-o3-Video eval/test/test_videommmu.py.
    """
    rows = [
        (place, {**row, "category": category})
        for category in MMMU_CATEGORIES
        if list(root.glob(f"{category}/*.parquet"))
        for place, row in files.read_rows(root, f"{category}/*.parquet")
    ]
    if not rows:
        raise InputError(f"{root}: has no {' or '.join(f'{name}/*.parquet' for name in MMMU_CATEGORIES)}")

    def make(row: files.Row) -> items.Item:
        answer, options = files.text_of(row, "answer"), {}
        if row.get("question_type") == "multiple-choice":
            options = options_of(files.list_of(row, "options"))
            answer = answer_letter(answer, options)
        truth = Truth(files.text_of(row, "question"), options, answer)
        places = (*MMMU_DISCIPLINES, "", "videos", "data")
        clip = files.find_clip(root, files.text_of(row, "id"), places)
        discipline = {"discipline": clip.parent.name} if clip.parent.name in MMMU_DISCIPLINES else {}
        groups = {**files.groups_of(row, "category", "question_type"), **discipline}
        images = (files.picture_of(row, "image"),) if row.get("image") else ()
        return make_item(f"{row['category']}/{row['id']}", clip, truth, words, groups=groups, images=images)

    return files.load_items(rows, make)


def load_longvideo_reason(root: Path, words: wording.Wording) -> files.Loaded:
    """The test split of LongVideo-Reason; the options stand in the question.

    Clips lie in `longvila_videos/`, or in `longvideo_eval_subset0/` .. `9/` as its archives unpack.
    """
    places = ("", "videos", "longvila_videos", *(f"longvideo_eval_subset{i}" for i in range(10)))

    def make(row: files.Row) -> items.Item:
        question = files.text_of(row, "problem")
        options = options_in_text(question)
        if not options:
            raise InputError("problem: holds no option lines such as 'A. words'")
        truth = Truth(question, options, answer_letter(files.text_of(row, "answer"), options))
        named = row.get("videos")
        name = named[0] if isinstance(named, list) and named else named
        clip = files.find_clip(root, files.text_of({"videos": name}, "videos"), places)
        groups = files.groups_of(row, "problem_type")
        return make_item(files.text_of(row, "problem_id"), clip, truth, words, groups=groups)

    return files.load_items(files.read_rows(root, "*test*.json", "*.json", "**/*test*.parquet", "*.jsonl"), make)
