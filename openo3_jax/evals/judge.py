"""Open answers -> 0 to 3 by how well they mean the truth: a server, a local model or plain word overlap; cached."""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from openo3_jax import tasks
from openo3_jax.errors import InputError
from openo3_jax.evals import answers, endpoint, items, store
from openo3_jax.policy import Policy
from openo3_jax.rewards import score as score_lib
from openo3_jax.train import metrics, state

CORRECT_FROM = 2  # of 3. Source: Open-o3-Video eval/test/eval_vstar.py
JUDGEMENTS = "judgements.jsonl"
MAX_REPLY_TOKENS = 16
_INTEGER = re.compile(r"(?<![\w.-])\d++(?!\.?\d)")

SYSTEM = "You grade answers to questions about videos. You reply with a single digit and nothing else."
WORDING = """Question: {question}
True answer: {truth}
Given answer: {answer}

How well does the given answer agree in meaning with the true one? Extra detail is fine unless it contradicts.
3: it means the same. 2: it means nearly the same, with a small thing missing or inexact. 1: only a part is right.
0: it is wrong, or answers something else. Reply with 0, 1, 2 or 3."""


class Question(NamedTuple):
    """What a judge sees of one item; `answer` is the model's final answer, without its reasoning."""

    question: str
    truth: str
    answer: str


class Verdict(NamedTuple):
    """`score` in 0..3, None where the judge's reply holds no such digit. `error`: the judge could not be reached."""

    score: int | None
    reply: str = ""
    error: str | None = None


@runtime_checkable
class Judge(Protocol):
    """`name` says which judge and which version of it; it stands in the table and in the cache."""

    name: str

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """(index of the question, verdict), in any order, each as soon as it is known."""


def correctness(verdict: Verdict | None) -> float:
    """1 from a score of 2 on, else 0, also for a reply that holds no score; `nan` where there is no verdict."""
    if verdict is None or verdict.error is not None:
        return math.nan
    return float((verdict.score or 0) >= CORRECT_FROM)


def notes_of(name: str, verdicts: Mapping[str, Verdict]) -> list[str]:
    """What a reader of the table must know: who judged, and how many answers have no score."""
    notes = [f"judge of the open answers: {name}; right from {CORRECT_FROM} of 3"]
    unread = sum(verdict.score is None and verdict.error is None for verdict in verdicts.values())
    if unread:
        notes.append(f"{unread} verdicts hold no score from 0 to 3 and count as wrong")
    errors = [verdict.error for verdict in verdicts.values() if verdict.error is not None]
    if errors:
        notes.append(
            f"{len(errors)} answers have no verdict yet and are left out; run again to judge them; the first: "
            f"{errors[0]}"
        )
    return notes


# ---- judges ----


@dataclasses.dataclass(frozen=True)
class WordJudge:
    """No model. `exact`: 3 where the words are the same; `rouge`: three times ROUGE, rounded, so 2 from 0.5 on.

    ROUGE is the mean of ROUGE-1, ROUGE-2 and ROUGE-L (F1, stemmed), as in the rewards.
    """

    rule: str

    @property
    def name(self) -> str:
        return {"exact": "exact words", "rouge": "ROUGE, offline"}[self.rule]

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        rule = exact_shares if self.rule == "exact" else rouge_shares
        shares = rule([q.truth for q in questions], [q.answer for q in questions]) if questions else []
        for i, share in enumerate(shares):
            yield i, Verdict(int(3 * share + 0.5))


def exact_shares(truths: Sequence[str], said: Sequence[str]) -> np.ndarray:
    """1.0 where the words are the same, case, articles and punctuation aside."""
    return np.array([float(answers.words(t) == answers.words(a)) for t, a in zip(truths, said, strict=True)])


def rouge_shares(truths: Sequence[str], said: Sequence[str]) -> np.ndarray:
    """ROUGE in [0, 1] of each answer, as the rewards score free-form questions."""
    records = [{"task": tasks.GENERAL_FREE_FORM, "answer": truth} for truth in truths]
    return score_lib.score(records, [f"<answer>{answer}</answer>" for answer in said]).terms["ans_acc"]


@dataclasses.dataclass(frozen=True)
class EndpointJudge:
    """A model behind an OpenAI-compatible server, several questions at a time."""

    server: endpoint.Endpoint
    parallel: int = 8

    @property
    def name(self) -> str:
        return f"{self.server.model} ({prompt_version()})"

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        pool = concurrent.futures.ThreadPoolExecutor(self.parallel)
        try:
            waiting = {pool.submit(self._one, question): i for i, question in enumerate(questions)}
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _one(self, question: Question) -> Verdict:
        try:
            reply = self.server.complete(messages(question), max_tokens=MAX_REPLY_TOKENS)
        except endpoint.EndpointError as error:
            return Verdict(None, error=str(error))
        return Verdict(parse_score(reply), reply)


@dataclasses.dataclass(frozen=True)
class PolicyJudge:
    """A model directory through this project's own decoder, greedy; other weights are another judge."""

    policy: Policy
    batch_size: int = 8

    @functools.cached_property
    def name(self) -> str:
        weights = state.checksum(self.policy.params)
        return f"{self.policy.directory.name} {weights:08x} ({prompt_version()})"

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        for start in range(0, len(questions), self.batch_size):
            asked = [_harmless(messages(question)) for question in questions[start : start + self.batch_size]]
            out = self.policy.generate(asked, max_new_tokens=MAX_REPLY_TOKENS, temperature=0.0)
            for i, texts in enumerate(out.texts):
                yield start + i, Verdict(parse_score(texts[0]), texts[0])


def _harmless(said: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Special tokens that an answer spells out are text to the judge, not control."""
    return [{**message, "content": message["content"].replace("<|", "< |")} for message in said]


def messages(question: Question) -> list[dict[str, str]]:
    """What a judging model reads. The parts are put in together, so that braces in them stay as they are."""
    text = re.sub(r"\{(\w+)\}", lambda slot: getattr(question, slot[1]), WORDING)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def prompt_version() -> str:
    """Names the wording: another one is another judge."""
    return f"prompt {items.hash_of([SYSTEM, WORDING])[:6]}"


def parse_score(reply: str) -> int | None:
    """The only whole number of the reply, if it is 0, 1, 2 or 3. Example: `parse_score("Score: 2")` is 2."""
    numbers = _INTEGER.findall(reply)
    return int(numbers[0]) if len(numbers) == 1 and numbers[0] in ("0", "1", "2", "3") else None


def make_judge(spec: str, *, model: str | None = None, key_variable: str | None = None) -> Judge:
    """`exact`, `rouge`, the URL of a server (with the model's name), or the directory of a local model.

    `key_variable` names the environment variable that holds the server's key. Raises InputError for anything else.
    """
    if "://" not in spec and (model is not None or key_variable is not None):
        raise InputError(f"judge {spec}: --judge-model and --judge-key are of a server; give its URL as --judge")
    if spec in ("exact", "rouge"):
        return WordJudge(spec)
    if "://" in spec:
        if model is None:
            raise InputError(f"judge {spec}: the name of the model is missing; give --judge-model")
        key = None if key_variable is None else os.environ.get(key_variable)
        if key_variable is not None and not key:
            raise InputError(f"judge {spec}: the environment variable {key_variable} is empty; set it to the key")
        return EndpointJudge(endpoint.Endpoint(url=spec, model=model, key=key))
    if Path(spec, "config.json").is_file():
        from openo3_jax.evals import text_model

        return PolicyJudge(text_model.load_judge(Path(spec)))
    raise InputError(f"judge {spec!r}: expected exact, rouge, the URL of a server, or a model directory")


# ---- all questions, with the cache ----


def judge_all(judge: Judge, questions: Mapping[str, Question], file: Path) -> dict[str, Verdict]:
    """Item -> verdict; what the judge said once stands in `file` and is not asked again.

    An empty answer gets 0 without being asked about. A verdict with an error is not kept: the next call asks again.
    """
    store.cut_torn(file)
    known = dict(_cached(file))
    keys = {item: items.hash_of([judge.name, *question]) for item, question in questions.items()}
    found = {item: Verdict(0) for item, question in questions.items() if not question.answer.strip()}
    open_items = [item for item in questions if item not in found and keys[item] not in known]
    unique = list({keys[item]: questions[item] for item in open_items}.items())
    errors: dict[str, Verdict] = {}
    with file.open("a", encoding="utf-8") as stream, metrics.Progress("judge", len(unique)) as progress:
        for done, (i, verdict) in enumerate(judge.judge([question for _, question in unique]), 1):
            key, question = unique[i]
            if verdict.error is not None:
                errors[key] = verdict
            else:
                known[key] = verdict
                line = {"key": key, "judge": judge.name, **question._asdict()}
                stream.write(json.dumps({**line, "score": verdict.score, "reply": verdict.reply}) + "\n")
                stream.flush()
            progress.update(done, f"{len(errors)} without a reply")
    return {item: found.get(item) or known.get(keys[item]) or errors[keys[item]] for item in questions}


def _cached(file: Path) -> Iterable[tuple[str, Verdict]]:
    for number, line in enumerate(store.read_lines(file), 1):
        if not isinstance(line, dict) or not {"key", "score"} <= set(line):
            raise InputError(f"{file}:{number}: is no judgement; remove the line")
        yield line["key"], Verdict(line["score"], line.get("reply", ""))
