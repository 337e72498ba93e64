"""What goes wrong in such runs, by rules that are stated: metrics and samples of a run -> findings with a name."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from openo3_jax import tasks
from openo3_jax.evals import scores
from openo3_jax.report.curves import Series
from openo3_jax.rewards import statistics
from openo3_jax.rewards.parse import Parsed

FEWEST_STEPS = 10  # recorded; fewer say nothing about a course
SHARE = 5  # the first and the last fifth are compared
SPATIAL_LOW, TEMPORAL_FINE = 0.05, 0.2
FORMAT_LOW, FORMAT_DROP = 0.7, 0.1
FORGET_DROP = 0.1
LENGTH_GROWTH, CUT_HIGH = 1.5, 0.25
WHOLE_FRAME, WHOLE_SHARE = 0.9, 0.25
KL_HIGH = 0.5  # nats per token
EQUAL_HIGH = 0.8
CLIP_HIGH = 0.5
GAP_HIGH = 0.01  # nats
LOSS_GROWTH = 1.2

_SPATIAL_TASK = tasks.TEMPORAL_SPATIAL.replace(" ", "_")
_SPATIAL, _POINT = f"reward/thk_spatial/{_SPATIAL_TASK}", f"reward/thk_temporal_point/{_SPATIAL_TASK}"


class Finding(NamedTuple):
    """One rule and what became of it. `advice`: where to look when it is seen."""

    name: str
    verdict: Literal["seen", "not seen", "cannot tell"]
    rule: str
    numbers: str
    advice: str


class Course(NamedTuple):
    """Means of a metric over the first and the last fifth of its steps."""

    first: float
    last: float


class Samples(NamedTuple):
    """Answers of a run's end, None where there are none or they cannot be read; `gap` says why."""

    late: Parsed | None
    gap: str = ""


_Rule = Callable[[Mapping[str, Series], Samples], Finding]


def course(series: Series | None) -> Course | None:
    """None for fewer than `FEWEST_STEPS` finite values."""
    values = [v for v in series.values if math.isfinite(v)] if series is not None else []
    if len(values) < FEWEST_STEPS:
        return None
    fifth = len(values) // SHARE
    return Course(float(np.mean(values[:fifth])), float(np.mean(values[-fifth:])))


def find(metrics: Mapping[str, Series], samples: Samples, stage: str) -> list[Finding]:
    """Every rule of the stage, those seen first."""
    rules = _SFT_RULES if stage == "sft" else _GSPO_RULES
    found = [rule(metrics, samples) for rule in rules]
    order = ("seen", "cannot tell", "not seen")
    return sorted(found, key=lambda one: order.index(one.verdict))


def _judge(name: str, rule: str, advice: str, checks: Sequence[tuple[bool, str] | None], gap: str = "") -> Finding:
    """Seen where one check holds; a check is None where its numbers are not there."""
    known = [check for check in checks if check is not None]
    holding = [numbers for holds, numbers in known if holds]
    if holding:
        return Finding(name, "seen", rule, "; ".join(holding), advice)
    if not known:
        gap = gap or f"fewer than {FEWEST_STEPS} steps with these metrics are recorded"
        return Finding(name, "cannot tell", rule, gap, advice)
    return Finding(name, "not seen", rule, "; ".join(numbers for _, numbers in known), advice)


def _went(name: str, found: Course) -> str:
    return f"{name} went from {found.first:.3g} to {found.last:.3g}"


# ---- rules on metrics ----


def _spatial_collapse(metrics: Mapping[str, Series], samples: Samples) -> Finding:
    del samples
    spatial, point = course(metrics.get(_SPATIAL)), course(metrics.get(_POINT))
    checks: list[tuple[bool, str] | None] = [None]
    if spatial is not None:
        fell = spatial.last < SPATIAL_LOW or (spatial.first >= SPATIAL_LOW and spatial.last < spatial.first / 2)
        numbers = _went("thk_spatial", spatial)
        if point is not None:
            why = "times are precise, boxes are not" if point.last >= TEMPORAL_FINE else "times miss the key frames"
            numbers += f", {_went('thk_temporal_point', point)}" + (f": {why}" if fell else "")
        checks = [(fell, numbers)]
    return _judge(
        "spatial collapse",
        f"in the last fifth thk_spatial of temporal-spatial QA is below {SPATIAL_LOW}, or it halved",
        "thk_temporal_point first: where cited times miss the key frames the gate passes nothing and no box earns, so "
        "widen the gate or start with a larger sigma. Where times are right, see in the samples whether boxes are in "
        "px of the frames shown.",
        checks,
    )


def _format_errors(metrics: Mapping[str, Series], samples: Samples) -> Finding:
    checks: list[tuple[bool, str] | None] = []
    for name in sorted(metrics):
        if name.startswith("reward/format/") and (found := course(metrics[name])) is not None:
            is_bad = found.last < FORMAT_LOW or found.first - found.last > FORMAT_DROP
            checks.append((is_bad, _went(name.removeprefix("reward/"), found)))
    if samples.late is not None:
        broken = statistics.evidence_statistics(samples.late).format_broken
        limit = statistics.LIMITS["format_broken"]
        checks.append((broken > limit, f"{broken:.0%} of the last answers lack think or answer or balanced tags"))
    return _judge(
        "format errors",
        f"in the last fifth the format reward of a task is below {FORMAT_LOW} or fell by more than {FORMAT_DROP}, or "
        f"more than {statistics.LIMITS['format_broken']:.0%} of the last answers are broken",
        "answers as written: are they cut off (gspo/cut, max_new_tokens), in another language, without tags? Stage one "
        "may have been too short; a higher temperature breaks tags too.",
        checks,
        samples.gap,
    )


def _forgetting(metrics: Mapping[str, Series], samples: Samples) -> Finding:
    del samples
    general = [name for name in sorted(metrics) if name.startswith("reward/ans_acc/")]
    evals = [name for name in sorted(metrics) if name.startswith("eval/") and not name.endswith(scores.UNREAD)]
    checks: list[tuple[bool, str] | None] = []
    for name in general:
        if (found := course(metrics[name])) is not None:
            checks.append((found.first - found.last > FORGET_DROP, _went(name.removeprefix("reward/"), found)))
    for name in evals:
        values = [v for v in metrics[name].values if math.isfinite(v)]
        if len(values) >= 2:
            drop = max(values) - values[-1]
            is_lost = drop > FORGET_DROP * max(abs(max(values)), 1e-9)
            checks.append((is_lost, f"{name} is {values[-1]:.3g} at the end, {max(values):.3g} at its best"))
    return _judge(
        "forgetting",
        f"answer accuracy of a task fell by more than {FORGET_DROP} from the first to the last fifth, or an evaluation "
        f"ends more than {FORGET_DROP:.0%} below its best",
        "the divergence from the reference (gspo/kl): raise kl_coef or lower the learning rate; mix general questions "
        "into the data. `openo3 eval --compare` on a general benchmark settles it.",
        checks,
        "neither answer accuracy over enough steps nor two evaluations are recorded",
    )


def _length_explosion(metrics: Mapping[str, Series], samples: Samples) -> Finding:
    del samples
    length, cut = course(metrics.get("gspo/length")), course(metrics.get("gspo/cut"))
    return _judge(
        "length explosion",
        f"answers of the last fifth are more than {LENGTH_GROWTH} times as long as those of the first, or more than "
        f"{CUT_HIGH:.0%} of them reach the limit",
        "gspo/length beside the reward: length without reward is repetition (see the samples); cut answers earn by "
        "luck, so set cut='zero' or 'drop', or raise max_new_tokens.",
        [
            None if length is None else (length.last > LENGTH_GROWTH * length.first, _went("length in tokens", length)),
            None if cut is None else (cut.last > CUT_HIGH, _went("share that the limit cut", cut)),
        ],
    )


def _limit(name: str, rule: str, advice: str, metric: str, limit: float, shown: str, gap: str = "") -> _Rule:
    """Seen where a metric ends above a limit."""

    def judge(metrics: Mapping[str, Series], samples: Samples) -> Finding:
        del samples
        found = course(metrics.get(metric))
        return _judge(name, rule, advice, [None if found is None else (found.last > limit, _went(shown, found))], gap)

    return judge


_divergence = _limit(
    "runaway policy",
    f"the divergence from the reference is above {KL_HIGH} nats per token in the last fifth",
    "gspo/kl, gspo/grad_norm and gspo/clip_fraction: lower the learning rate, raise kl_coef.",
    "gspo/kl",
    KL_HIGH,
    "kl",
    "gspo/kl is not recorded over enough steps (kl_coef=0 keeps no reference)",
)
_nothing_to_learn = _limit(
    "nothing to learn from",
    f"in more than {EQUAL_HIGH:.0%} of the groups of the last fifth all answers earn the same",
    "gspo/all_wrong and gspo/all_right: questions are too hard or too easy; raise temperature or num_samples, or "
    "choose other records.",
    "gspo/all_equal",
    EQUAL_HIGH,
    "share of such groups",
)
_clipping = _limit(
    "clipped away",
    f"more than {CLIP_HIGH:.0%} of the tokens of the last fifth are clipped",
    "gspo/ratio: fewer minibatches per rollout, a lower learning rate or a wider clip.",
    "gspo/clip_fraction",
    CLIP_HIGH,
    "clip fraction",
)
_two_models = _limit(
    "sampler and trainer differ",
    f"their log-probabilities of the same tokens are more than {GAP_HIGH} nats apart on average in the last fifth",
    "dtypes and attention kernels of sampling and training; old_logp='recompute' with importance_cap helps.",
    "gspo/logp_gap_mean",
    GAP_HIGH,
    "mean gap in nats",
)


def _loss(name: str) -> _Rule:
    def rule(metrics: Mapping[str, Series], samples: Samples) -> Finding:
        del samples
        series = metrics.get(name)
        found = course(series)
        checks: list[tuple[bool, str] | None] = [None]
        if found is not None:
            checks = [(found.last > LOSS_GROWTH * found.first, _went("loss", found))]
        if series is not None:
            broken = [step for step, value in zip(series.steps, series.values, strict=True) if not math.isfinite(value)]
            checks += [(True, f"not finite at step {broken[0]}")] if broken else []
        return _judge(
            "diverging loss",
            f"the loss of the last fifth is more than {LOSS_GROWTH} times that of the first, or is not finite",
            "the learning rate, its warm-up and the gradient norm around the step where it turns.",
            checks,
        )

    return rule


# ---- rules on samples ----


def _whole_frames(metrics: Mapping[str, Series], samples: Samples) -> Finding:
    del metrics
    limit = statistics.LIMITS["box_area"]
    checks: list[tuple[bool, str] | None] = []
    if samples.late is not None:
        area = statistics.evidence_statistics(samples.late).box_area
        shares = statistics.box_shares(samples.late)
        if shares:
            whole = float(np.mean([share > WHOLE_FRAME for share in shares]))
            numbers = f"{whole:.0%} of the last answers' {len(shares)} boxes cover nearly all, mean area {area:.2f}"
            checks = [(whole > WHOLE_SHARE or area > limit, numbers)]
    return _judge(
        "reward hacking: whole-frame boxes",
        f"more than {WHOLE_SHARE:.0%} of the last answers' boxes cover more than {WHOLE_FRAME:.0%} of the frame, or "
        f"boxes cover more than {limit:g} of it on average",
        "thk_spatial rises while boxes grow: rules='hardened' or min_iou ends it, `openo3 redteam` shows what each "
        "rule closes.",
        checks,
        samples.gap or "no answer at the end has a box",
    )


def _every_second(metrics: Mapping[str, Series], samples: Samples) -> Finding:
    del metrics
    share_limit, times_limit = statistics.LIMITS["clip_cited"], statistics.LIMITS["times_per_answer"]
    checks: list[tuple[bool, str] | None] = []
    if samples.late is not None:
        found = statistics.evidence_statistics(samples.late)
        if not math.isnan(found.clip_cited):
            numbers = f"the last answers cite {found.clip_cited:.0%} of the clip's seconds, "
            numbers += f"{found.times_per_answer:.1f} times each"
            checks = [(found.clip_cited > share_limit or found.times_per_answer > times_limit, numbers)]
    return _judge(
        "reward hacking: every second cited",
        f"the last answers cite more than {share_limit:.0%} of the clip's seconds or more than {times_limit:g} times",
        "thk_temporal_point and thk_temporal_segment beside ans_tiou: evidence that rises while answers do not. "
        "key_frame_recall and repeats_once of the rules, or rules='hardened', end it.",
        checks,
        samples.gap or "no answer at the end cites a time",
    )


def _repetition(metrics: Mapping[str, Series], samples: Samples) -> Finding:
    del metrics
    names = ("repeated_times", "repeated_claims", "malformed_claims")
    checks: list[tuple[bool, str] | None] = []
    if samples.late is not None:
        found = statistics.evidence_statistics(samples.late)
        values = {name: getattr(found, name) for name in names}
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        checks = [(v > statistics.LIMITS[name], f"{name.replace('_', ' ')}: {v:.0%}") for name, v in known.items()]
    limits = ", ".join(f"{name.replace('_', ' ')} {statistics.LIMITS[name]:.0%}" for name in names)
    return _judge(
        "reward hacking: repeated or malformed claims",
        f"among the last answers' times and claims the shares exceed: {limits}",
        "the samples: a sure claim said again, or an unsure one left unreadable so that it does not count. "
        "repeats_once and malformed_in_denominator of the rules end it.",
        checks,
        samples.gap or "no answer at the end has evidence",
    )


_SFT_RULES: tuple[_Rule, ...] = (_loss("sft/loss"), _forgetting)
_GSPO_RULES: tuple[_Rule, ...] = (
    _spatial_collapse,
    _format_errors,
    _forgetting,
    _length_explosion,
    _whole_frames,
    _every_second,
    _repetition,
    _divergence,
    _clipping,
    _nothing_to_learn,
    _two_models,
)
