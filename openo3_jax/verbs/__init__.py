"""The verbs of `openo3`: their arguments become positionals and flags. Heavy imports wait until one is called."""

from collections.abc import Mapping
from typing import Any

from openo3_jax import recipes
from openo3_jax.verbs import data, experiments, models, scores, stages

Verbs = Mapping[str, Any]  # a word -> a function, or the words that may follow it

VERBS: Verbs = {
    "demo": experiments.demo,
    "init-tiny": models.init_tiny,
    "ask": models.ask,
    "sft": {name: stages.sft_of(recipe) for name, recipe in recipes.SFT.items()},
    "gspo": {name: stages.gspo_of(recipe) for name, recipe in recipes.GSPO.items()},
    "plan": {name: stages.plan_of(recipe) for name, recipe in (recipes.SFT | recipes.GSPO).items()},
    "eval": scores.evaluate,
    "export": models.export,
    "replay": stages.replay,
    "score": scores.score,
    "redteam": scores.redteam,
    "report": scores.report,
    "data": {"check": data.check, "prepare": data.prepare, "stats": data.stats, "convert": data.convert},
    "experiment": {
        "overfit": experiments.overfit,
        "sharpen": experiments.sharpen,
        "rewards": experiments.rewards,
    },
}
