"""The answer against the truth, for one row: option match and ROUGE, arrays in, score in [0, 1] out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from openo3_jax import tasks
from openo3_jax.rewards.arrays import Prediction, Truth
from openo3_jax.rewards.rules import RuleNumbers


def ans_acc(prediction: Prediction, truth: Truth, rules: RuleNumbers) -> Float[Array, ""]:
    """1 or 0 for options, ROUGE for free text, 0 for the tasks whose answer is a span or a box.

    Source: src/r1-v/src/open_r1/reward_func.py:17-84.
    """
    is_option = (truth.task == tasks.TASKS.index(tasks.GENERAL_MCQ)) | (
        truth.task == tasks.TASKS.index(tasks.TEMPORAL_MCQ)
    )
    letter = option_match(prediction.options).astype(float)
    text = rouge(prediction.words, prediction.num_words, truth.words, rules)
    return jnp.where(is_option, letter, text)


def option_match(options: Int[Array, "4"]) -> Bool[Array, ""]:
    """The reply is the right option, bare or as `X.`, `(X)`, `[X]`; code 0 is the right one."""
    return (options == 0).any()


def rouge(
    words: Int[Array, " words"], num_words: Int[Array, ""], gold: Int[Array, " gold_words"], rules: RuleNumbers
) -> Float[Array, ""]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, weighted as in `rouge_weights`; words are codes, gold < 0 is padding.

    `num_words` counts the reply's words, in the vocabulary (code >= 0) or not. 0 where a side is empty.
    Source: src/r1-v/src/open_r1/reward_func.py:60-80; rouge_score 0.1.2, rouge_scorer.py.
    """
    num_gold = (gold >= 0).sum(dtype=jnp.int32)
    scores = jnp.stack(
        [
            _f1(ngram_overlap(words, gold), num_words, num_gold),
            _f1(ngram_overlap(_pairs(words), _pairs(gold)), num_words - 1, num_gold - 1),
            _f1(common_subsequence(words, gold), num_words, num_gold),
        ]
    )
    return (rules.rouge_weights * scores).sum()


def ngram_overlap(codes: Int[Array, " words"], gold: Int[Array, " gold_words"]) -> Int[Array, ""]:
    """n-grams in common, each as often as both sides have it; negative codes match nothing."""
    # sum over distinct g of min(count(g), count_gold(g)) = number of gold n-grams that have fewer equals before
    # them in gold than there are in the reply. int32 sums: the default under x64 is an order slower on the CPU.
    count = (gold[:, None] == codes).sum(1, dtype=jnp.int32)
    place = jnp.arange(len(gold), dtype=jnp.int32)
    rank = ((gold[:, None] == gold) & (place < place[:, None])).sum(1, dtype=jnp.int32)
    return ((rank < count) & (gold >= 0)).sum(dtype=jnp.int32)


def common_subsequence(codes: Int[Array, " words"], gold: Int[Array, " gold_words"]) -> Int[Array, ""]:
    """Length of the longest common subsequence; negative codes match nothing."""
    # best[i, j] = max(best[i - 1, j], best[i, j - 1], best[i - 1, j - 1] + 1 where codes[i] == gold[j])
    # One diagonal i + j = k depends on the two before it only, so a step is a few operations on a whole vector.
    width = len(gold)
    beyond = jnp.full(width - 1, -1, codes.dtype)
    reversed_codes = jnp.concatenate([beyond, codes, beyond])[::-1]
    last = len(codes) + width - 2  # the final diagonal

    def next_diagonal(diagonals: tuple[Array, Array], k: Int[Array, ""]) -> tuple[tuple[Array, Array], None]:
        before_last, previous = diagonals
        matches = jax.lax.dynamic_slice(reversed_codes, (last - k,), (width,)) == gold
        extended = jnp.where(matches, jnp.pad(before_last[:-1], (1, 0)) + 1, 0)
        shorter = jnp.maximum(previous, jnp.pad(previous[:-1], (1, 0)))
        return (previous, jnp.maximum(shorter, extended)), None

    nothing = jnp.zeros(width, jnp.int32)
    (_, best), _ = jax.lax.scan(next_diagonal, (nothing, nothing), jnp.arange(last + 1, dtype=jnp.int32))
    return best[-1]


def _pairs(codes: Int[Array, " words"]) -> Int[Array, " pairs"]:
    """Codes of neighbouring words, one code for each pair; negative where a word is out of the vocabulary."""
    left, right = codes[:-1].astype(jnp.int64), codes[1:].astype(jnp.int64)
    return jnp.where((left >= 0) & (right >= 0), (left << 32) | right, -1)


def _f1(overlap: Int[Array, ""], num_words: Int[Array, ""], num_gold: Int[Array, ""]) -> Float[Array, ""]:
    # F1 = 2 P R / (P + R) with P = overlap / words, R = overlap / gold words, which is 2 overlap / (words + gold)
    total = jnp.maximum(num_words, 0) + jnp.maximum(num_gold, 0)
    return jnp.where(total > 0, 2 * overlap.astype(float) / jnp.maximum(total, 1).astype(float), 0.0)
