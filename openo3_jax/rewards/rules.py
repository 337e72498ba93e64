"""What a reward means: the seven terms, where each applies, and one field per decision in between."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Array, Bool, Float

from openo3_jax import tasks
from openo3_jax.errors import InputError

Term = Literal[
    "ans_acc",
    "ans_tiou",
    "ans_viou",
    "thk_temporal_point",
    "thk_temporal_segment",
    "thk_spatial",
    "format",
]
TERMS: tuple[Term, ...] = get_args(Term)


class Weight(NamedTuple):
    """Factor of one term in the total, for one task or for all of them (`"*"`)."""

    term: str
    task: str
    weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRules:
    """How completions are scored. Defaults are the paper's (arXiv:2510.20579, section 3.3 and appendix A.1).

    The first block has one field per difference between the paper and its released code
    (src/r1-v/src/open_r1/reward_func.py); the second closes ways to game the reward and is off in both.
    """

    gate: Literal["both_sides", "early_only"] = "both_sides"  # |dt| <= gate_s, or gold - cited < gate_s
    gate_s: float = 3.0  # inf: no gate
    match: Literal["nearest_then_gate", "gate_then_nearest"] = "nearest_then_gate"
    box_overlap: Literal["best_pair", "object_mean"] = "best_pair"  # best IoU of the frame, or an object's mean
    claim_denominator: Literal["times", "claims"] = "times"  # thk_spatial is divided by all times, or by claims
    visual_thk_spatial: bool = False  # visual QA: the best box in think against the answer's box
    temporal_mcq_terms: Literal["letter_and_tiou", "letter"] = "letter_and_tiou"
    rouge: Literal["mean", "rouge1", "rouge2", "rougeL"] = "mean"
    sigma_start_s: float = 4.0  # width of the proximity at the start of training
    sigma_end_s: float = 1.0  # and from `sigma_end_progress` on
    sigma_end_progress: float = 0.75
    # Tags must touch, or each just occur; "parsed": touch and hold what can be read.
    format_evidence: Literal["adjacent", "counts", "parsed"] = "adjacent"
    format_one_word_object: bool = False  # visual QA: `<obj>word</obj><box>[..]</box>` anywhere is enough

    malformed_in_denominator: bool = False  # every `<obj>` in think counts as a claim, parsed or not
    repeats_once: bool = False  # an identical claim, or a time in the same half second, counts once
    once_per_box: bool = False  # later claims on a true box that has earned already earn 0
    key_frame_recall: bool = False  # think evidence is multiplied by the share of key frames cited
    compare_names: bool = False  # a claim meets only the objects of its own name
    one_box_per_claim: bool = False  # of several boxes the first counts
    min_iou: float = 0.0  # a box that overlaps less scores 0
    one_bad_time_voids: bool = True  # one `<t>1.2.3</t>s` voids all times (released); False: only itself

    weights: tuple[Weight, ...] = ()  # the last one that fits a term wins; 1 where none does

    def __post_init__(self):
        for field in dataclasses.fields(self):
            choices = get_args(field.type)
            value = getattr(self, field.name)
            if isinstance(value, str) and value not in choices:
                raise InputError(f"rules: {field.name}={value!r}; expected one of {', '.join(choices)}")
        if not self.gate_s >= 0:
            raise InputError(f"rules: gate_s={self.gate_s}; expected seconds >= 0 (inf: no gate)")
        for name in ("sigma_start_s", "sigma_end_s", "sigma_end_progress"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"rules: {name}={getattr(self, name)}; expected a positive finite number")
        if not 0 <= self.min_iou <= 1:
            raise InputError(f"rules: min_iou={self.min_iou}; expected an IoU in [0, 1]")
        for weight in self.weights:
            if weight.term not in TERMS or weight.task not in ("*", *tasks.TASKS):
                raise InputError(
                    f"rules: weight of {weight.term!r} for task {weight.task!r}; terms are {', '.join(TERMS)}; "
                    f"tasks are *, {', '.join(tasks.TASKS)}"
                )
            if not math.isfinite(weight.weight):
                raise InputError(f"rules: weight of {weight.term} is {weight.weight}; expected a finite number")

    def numbers(self) -> "RuleNumbers":
        """The same rules as arrays."""
        weights = np.ones((len(tasks.TASKS), len(TERMS)))
        for term, task, weight in self.weights:
            weights[[task in ("*", name) for name in tasks.TASKS], TERMS.index(term)] = weight
        kinds = ("rouge1", "rouge2", "rougeL")
        return RuleNumbers(
            gate_both_sides=np.bool_(self.gate == "both_sides"),
            gate_s=np.float64(self.gate_s),
            gate_first=np.bool_(self.match == "gate_then_nearest"),
            object_mean=np.bool_(self.box_overlap == "object_mean"),
            per_time=np.bool_(self.claim_denominator == "times"),
            visual_thk_spatial=np.bool_(self.visual_thk_spatial),
            temporal_mcq_tiou=np.bool_(self.temporal_mcq_terms == "letter_and_tiou"),
            rouge_weights=np.array([1 / 3] * 3 if self.rouge == "mean" else [kind == self.rouge for kind in kinds])
            * 1.0,
            sigma_start_s=np.float64(self.sigma_start_s),
            sigma_end_s=np.float64(self.sigma_end_s),
            sigma_end_progress=np.float64(self.sigma_end_progress),
            format_adjacent=np.bool_(self.format_evidence != "counts"),
            format_parsed=np.bool_(self.format_evidence == "parsed"),
            format_one_word_object=np.bool_(self.format_one_word_object),
            malformed_in_denominator=np.bool_(self.malformed_in_denominator),
            repeats_once=np.bool_(self.repeats_once),
            once_per_box=np.bool_(self.once_per_box),
            key_frame_recall=np.bool_(self.key_frame_recall),
            compare_names=np.bool_(self.compare_names),
            one_box_per_claim=np.bool_(self.one_box_per_claim),
            min_iou=np.float64(self.min_iou),
            one_bad_time_voids=np.bool_(self.one_bad_time_voids),
            weights=weights,
        )


class RuleNumbers(NamedTuple):
    """`RewardRules` as data of the scoring program: one compiled program serves every rule set."""

    gate_both_sides: Bool[Array, ""]
    gate_s: Float[Array, ""]
    gate_first: Bool[Array, ""]
    object_mean: Bool[Array, ""]
    per_time: Bool[Array, ""]
    visual_thk_spatial: Bool[Array, ""]
    temporal_mcq_tiou: Bool[Array, ""]
    rouge_weights: Float[Array, "3"]  # of ROUGE-1, ROUGE-2, ROUGE-L
    sigma_start_s: Float[Array, ""]
    sigma_end_s: Float[Array, ""]
    sigma_end_progress: Float[Array, ""]
    format_adjacent: Bool[Array, ""]
    format_parsed: Bool[Array, ""]
    format_one_word_object: Bool[Array, ""]
    malformed_in_denominator: Bool[Array, ""]
    repeats_once: Bool[Array, ""]
    once_per_box: Bool[Array, ""]
    key_frame_recall: Bool[Array, ""]
    compare_names: Bool[Array, ""]
    one_box_per_claim: Bool[Array, ""]
    min_iou: Float[Array, ""]
    one_bad_time_voids: Bool[Array, ""]
    weights: Float[Array, "tasks terms"]


PAPER = RewardRules()
RELEASED = RewardRules(
    gate="early_only",
    gate_s=1.0,
    match="gate_then_nearest",
    box_overlap="object_mean",
    claim_denominator="claims",
    visual_thk_spatial=True,
    format_evidence="counts",
    format_one_word_object=True,
)
# Every option that closes a way to game the reward, on top of the paper's rules.
HARDENED = RewardRules(
    format_evidence="parsed",
    malformed_in_denominator=True,
    repeats_once=True,
    once_per_box=True,
    key_frame_recall=True,
    compare_names=True,
    one_box_per_claim=True,
    min_iou=0.3,
    one_bad_time_voids=False,
)
PRESETS: dict[str, RewardRules] = {"paper": PAPER, "released": RELEASED, "hardened": HARDENED}


def get_rules(rules: str | RewardRules) -> RewardRules:
    """A preset by its name, with changes behind commas if any, or the rules themselves.

    Example: `get_rules("hardened,gate_s=1,weight.format=0.5")`.
    Raises: InputError for an unknown name or change.
    """
    if isinstance(rules, RewardRules):
        return rules
    name, *changes = rules.split(",") if isinstance(rules, str) else [None]
    if name not in PRESETS:
        expected = f"{', '.join(PRESETS)}, one of them with changes such as paper,gate_s=1, or a RewardRules"
        raise InputError(f"rules={rules!r}; expected {expected}")
    return change_rules(PRESETS[name], changes)


def change_rules(rules: RewardRules, changes: Iterable[str]) -> RewardRules:
    """`rules` with `FIELD=VALUE` applied in turn; `weight.TERM=W` and `weight.TERM@TASK=W` add a weight.

    Example: `change_rules(PAPER, ["gate_s=1", "weight.format=0.5"])`.
    Raises: InputError for an unknown field or a value it cannot take.
    """
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"change {change!r} has no '='; expected FIELD=VALUE, such as gate_s=1")
        if name.startswith("weight."):
            term, _, task = name.removeprefix("weight.").partition("@")
            weight = Weight(term, task or "*", _read_value(change, text, float))
            rules = dataclasses.replace(rules, weights=(*rules.weights, weight))
            continue
        fields = {field.name: field for field in dataclasses.fields(RewardRules) if field.name != "weights"}
        if name not in fields:
            raise InputError(f"change {change!r}: no field {name!r}; expected weight.TERM or {', '.join(fields)}")
        choices = get_args(fields[name].type)
        if choices and text not in choices:
            raise InputError(f"change {change!r}: expected one of {', '.join(choices)}")
        value = text if choices else _read_value(change, text, type(fields[name].default))
        rules = dataclasses.replace(rules, **{name: value})
    return rules


def _read_value(change: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"change {change!r}: {text!r} is neither true nor false")
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"change {change!r}: {text!r} is not a number") from error
