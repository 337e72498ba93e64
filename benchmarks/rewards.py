"""Rewards of 4,096 mixed completions: parsed once and scored under jit, against one plain call after the other.

    python benchmarks/rewards.py [--quick] [--json FILE] [--rows 4096] [--group 4]

Four completions share a record, as the rollouts of a prompt do; `--group 1` gives each one of its own.
`--quick` has 256.

Exits with 3 where the values differ by more than 1e-6 or the speed-up is less than four.
"""

import random
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import plain_rewards
import results

from openo3_jax import tags
from openo3_jax.rewards import arrays, parse, rubric, score
from openo3_jax.rewards.rules import RELEASED, TERMS

PROSE = (
    "the man woman child dog cat ball cup car guitar door street kitchen walks runs picks holds puts turns looks sits "
    "slowly quickly behind near left right towards camera then while blue red white small large first finally again"
)
WORDS = PROSE.split()
CHARACTERS = 1000  # of a completion, about
LEAST = 4.0  # times as fast


class Rollouts(NamedTuple):
    """What both sides score; rows of a group share their record."""

    records: list[dict]
    texts: list[str]
    progress: list[float]

    @property
    def rows(self) -> list[dict]:
        """One flat dict per completion, for the plain functions."""
        rows = zip(self.records, self.texts, self.progress, strict=True)
        return [record | {"completion": text, "step_percent": share} for record, text, share in rows]


def make_rollouts(count: int, group: int, seed: int = 0) -> Rollouts:
    """The six tasks in turn, evidence near the truth, the rest prose."""
    rng = random.Random(seed)
    rollouts = Rollouts([], [], [])
    for prompt in range(-(-count // group)):
        record, make_text = _make_prompt(rng, prompt % 6)
        share = rng.random()
        for _ in range(min(group, count - len(rollouts.texts))):
            rollouts.records.append(record)
            rollouts.texts.append(make_text())
            rollouts.progress.append(share)
    return rollouts


def _make_prompt(rng: random.Random, kind: int) -> tuple[dict, Callable[[], str]]:
    """A record of one task, and a function that writes completions for it."""
    tasks = [getattr(plain_rewards, name) for name in ("STR", "VISUAL", "TEMPORAL", "TEMPORAL_MCQ", "MCQ", "FREE")]
    record = {"task": tasks[kind], "image_size": [640, 480], "image_size_refine": [504, 364]}
    start = round(rng.uniform(0, 60), 1)
    span = [start, round(start + rng.uniform(1, 20), 1)]
    box = [round(value) for value in _box(rng, 480)]
    frames = [{"idx": i, "time": round(start + 7.3 * i, 2)} for i in range(rng.randint(1, 5))]
    items = {
        str(frame["idx"]): {name: [_box(rng, 1.0) for _ in range(rng.randint(1, 2))] for name in rng.sample(WORDS, 2)}
        for frame in frames
    }
    letter, sentence = rng.choice("ABCD"), _prose(rng, 12)
    answers = [sentence, f"<obj>dog</obj>{tags.render_box(box)}", str(span), f"{letter}\n{span}", letter, sentence]
    record["answer"] = answers[kind]
    record |= {"key_frames": frames, "key_items": items} if kind == 0 else {"key_frames": [], "key_items": {}}

    def make_text() -> str:
        evidence, reply = [], _prose(rng, 12)
        if kind == 0:
            for frame in frames:
                gold = next(iter(items[str(frame["idx"])].values()))[0]
                guess = [round(value * (640, 480)[i % 2] + rng.gauss(0, 15)) for i, value in enumerate(gold)]
                evidence.append(tags.render_claim(rng.choice(WORDS), guess, frame["time"] + rng.gauss(0, 2)))
        elif kind == 1:
            guess = [round(value * 0.77 + rng.gauss(0, 9)) for value in box]
            reply = f"<obj>{rng.choice(WORDS)}</obj>{tags.render_box(guess)}"
            evidence.append(reply)
        elif kind in (2, 3):
            evidence += [tags.render_time(abs(span[0] + rng.gauss(2, 4))) for _ in range(4)]
            reply = tags.render_span(span[0] + rng.random(), span[1] + rng.random())
            reply += f" Correct Option: {rng.choice('ABCD')}" if kind == 3 else ""
        elif kind == 4:
            reply = rng.choice("ABCD")
        think = "".join(f"{_prose(rng, 20)} {item} " for item in evidence)
        while len(think) < CHARACTERS - 100:
            think += _prose(rng, 10) + ". "
        return tags.render_think_answer(think, reply)

    return record, make_text


def _prose(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def _box(rng: random.Random, side: float) -> list[float]:
    x, y = rng.uniform(0, 0.6), rng.uniform(0, 0.6)
    return [round(side * value, 3) for value in (x, y, x + rng.uniform(0.1, 0.4), y + rng.uniform(0.1, 0.4))]


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def fastest(function: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds of the fastest of several calls."""
    return min(seconds_of(function) for _ in range(repeats))


def main() -> int:
    parser = results.make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--group", type=int, default=4)
    arguments = parser.parse_args()
    rollouts = make_rollouts(256 if arguments.quick else arguments.rows, arguments.group)
    records, texts, progress = rollouts
    rows = rollouts.rows
    print(
        f"{len(rows)} completions, {np.mean([*map(len, texts)]):.0f} characters on average; {jax.devices()[0].platform}"
    )

    start = time.perf_counter()
    ours = score.score(records, texts, progress=progress, rules=RELEASED)
    first = time.perf_counter() - start
    plain = [plain_rewards.score(row) for row in rows]
    gap = max(abs(float(ours.terms[term][i]) - plain[i][term]) for i in range(len(rows)) for term in TERMS)

    # In turn, so that a busy moment of the machine meets both.
    both = [
        (
            seconds_of(lambda: [plain_rewards.score(row) for row in rows]),
            seconds_of(lambda: score.score(records, texts, progress=progress, rules=RELEASED)),
        )
        for _ in range(7)
    ]
    plain_s, whole_s = np.min(both, axis=0)
    ratios = sorted(plain_s / ours_s for plain_s, ours_s in both)
    parsed = parse.parse(records, texts, progress)
    buckets = parsed.buckets()
    parse_s = fastest(lambda: parse.parse(records, texts, progress))
    pad_s = fastest(parsed.buckets)
    numeric_s = fastest(lambda: score.score_buckets(buckets, len(rows), RELEASED))
    numbers = [text.replace("<", " ").replace(">", " ").replace(",", " ").split() for text in texts]
    numbers = [[word for word in line if word[0].isdigit() and word[-1].isdigit()] for line in numbers]
    # Floors: every character looked at once and every number converted; every padded byte copied once.
    scan_s = fastest(lambda: [text.count("<") for text in texts])
    float_s = fastest(lambda: [float(word) for line in numbers for word in line])
    leaves = [leaf for bucket in buckets for leaf in jax.tree.leaves(bucket.rows)]
    copy_s = fastest(lambda: [leaf.copy() for leaf in leaves])
    mib = sum(leaf.nbytes for leaf in leaves) / 2**20

    def show(name: str, seconds: float, note: str = "") -> None:
        print(f"{name:34s}{1e3 * seconds:9.1f} ms {1e6 * seconds / len(rows):8.1f} us/row  {note}")

    show("plain, one call per completion", plain_s)
    show("ours, end to end", whole_s, f"{plain_s / whole_s:.1f} times faster; first call {first:.2f} s")
    print(f"{'':34s}in each of seven rounds: {', '.join(f'{ratio:.1f}' for ratio in ratios)}")
    show("  parse", parse_s)
    show("    floor: scan and convert", scan_s + float_s)
    show("  pad", pad_s)
    show("  numeric part", numeric_s)
    show("    floor: copy the arrays", copy_s, f"{mib:.1f} MiB")
    print(f"largest difference {gap:.1e}; buckets {[bucket.rows.progress.shape[0] for bucket in buckets]}")
    print("rows      numeric ms   us/row   programs")
    for count in (256,) if arguments.quick else (512, 1024, 2048, 4096):
        part = arrays.make_buckets(
            parsed.predictions[:count], [gold.truth for gold in parsed.golds[:count]], parsed.progress[:count]
        )
        score.score_buckets(part, count, RELEASED)
        programs = rubric.score_rows._cache_size()
        seconds = fastest(lambda part=part, count=count: score.score_buckets(part, count, RELEASED))
        other = make_rollouts(count, arguments.group, seed=count)
        score.score(other.records, other.texts, rules=RELEASED)
        new = rubric.score_rows._cache_size() - programs
        print(f"{count:5d} {1e3 * seconds:12.1f} {1e6 * seconds / count:10.2f}   {new} new for other rows of this size")
    row = results.compare(
        f"rewards of {len(rows):,} mixed completions",
        "one plain call per completion",
        ours=len(rows) / whole_s,
        theirs=len(rows) / plain_s,
        unit="completions/s",
        least=LEAST,
        judged=not arguments.quick,
        compile_s=first - whole_s,
        note=f"values within {gap:.0e}; in single rounds {ratios[0]:.1f} to {ratios[-1]:.1f} times",
    )
    return results.finish([row], arguments) or (0 if gap <= 1e-6 else 3)


if __name__ == "__main__":
    sys.exit(main())
